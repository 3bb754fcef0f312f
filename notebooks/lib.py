"""What all notebooks share: colours, figures, tables, nano ready to be asked, and the checks of exercises.

Nothing here is part of the model; it keeps the notebooks' cells short.
"""

import ast
import base64
import html
import io
import json
import math
import os
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSTALL = "pip install -r requirements.txt"
missing = [name for name in ("torch", "sentencepiece", "matplotlib", "IPython") if find_spec(name) is None]
if missing:
    raise ModuleNotFoundError(f"not installed: {', '.join(missing)}; run `{INSTALL}` in {ROOT}")

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from IPython.display import HTML, display  # noqa: E402
from matplotlib import font_manager  # noqa: E402
from PIL import Image  # noqa: E402

from nanomblip.data.emoji import load_emoji, load_names  # noqa: E402
from nanomblip.data.image import ImageConfig, array_to_tensor  # noqa: E402
from nanomblip.data.languages import LANGUAGES  # noqa: E402
from nanomblip.data.prompts import EVAL_PROMPT  # noqa: E402
from nanomblip.data.scripts import normal, script_of  # noqa: E402
from nanomblip.data.tokenizer import Tokenizer, pad_rows  # noqa: E402
from nanomblip.measure.lens import lens  # noqa: E402
from nanomblip.model.generate import Decoding, eval_mode, write  # noqa: E402
from nanomblip.weights.load import load_mblip  # noqa: E402

# Okabe and Ito's palette, safe for colour-blind eyes.
ORANGE, SKY, GREEN, BLUE, RED, PINK, GREY = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#777777"
PARTS = {"ViT": SKY, "Q-Former": ORANGE, "queries": PINK, "projection": RED, "language model": BLUE, "LoRA": GREEN}


# ---- the first cell -------------------------------------------------------------------------------------------------


def begin() -> None:
    """Set up figures and threads, and say what is missing and how to get it."""
    torch.set_num_threads(1)
    plt.rcParams.update({
        "figure.dpi": 150, "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.spines.top": False,
        "axes.spines.right": False, "image.interpolation": "nearest", "image.cmap": "cividis", "legend.frameon": False,
    })  # fmt: skip
    for folder in ("blip2", "mt0", "aligned"):
        if not (ROOT / "weights/nano" / folder / "model.safetensors").exists():
            raise FileNotFoundError(f"weights/nano/{folder} is missing; run: git checkout weights/nano")
    changed = [name for name, digest in stored_fingerprint().items() if digest_of(ROOT / name) != digest]
    if changed:
        print(f"Not the files that the text's numbers were computed from: {', '.join(changed)}.")
        print("Get those by `git checkout weights notebooks`, or new numbers by `python notebooks/build.py`.")
    absent = [name for name in ("transformers", "peft") if find_spec(name) is None]
    if absent:
        print(f"Without {' and '.join(absent)}: comparisons with them are left out (tests/requirements.txt).")


def stored_fingerprint() -> dict[str, str]:
    path = ROOT / "notebooks/weights.json"
    return json.loads(path.read_text()) if path.exists() else {}


def digest_of(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else ""


def has(*packages: str) -> bool:
    """Are these packages installed? Says so if not."""
    absent = [name for name in packages if find_spec(name) is None]
    if absent:
        print(f"{', '.join(absent)} not installed, nothing compared: pip install -r tests/requirements.txt")
    return not absent


# ---- figures and tables ---------------------------------------------------------------------------------------------


def show(fig, alt: str) -> None:
    """Display a figure as a PNG of 150 dpi, with a text for those who cannot see it."""
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=150, bbox_inches="tight", facecolor="white", pil_kwargs=dict(optimize=True))
    plt.close(fig)
    width = round(Image.open(buffer).width * 96 / 150)
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": f"Figure: {alt}"}
    display(data, raw=True, metadata={"image/png": {"width": width, "alt": alt}})


def thumbnails(axes, images, titles=None) -> None:
    """Pictures uint8 (B, H, W, 3) on axes without ticks or labels."""
    for i, (ax, image) in enumerate(zip(axes, images)):
        ax.imshow(image)
        ax.axis("off")
        if titles is not None:
            ax.set_title(titles[i], fontsize=8, fontweight="normal", pad=2)


def bars_with_intervals(ax, labels, shares, counts, colours=BLUE, horizontal=True) -> None:
    """Shares in percent with their 95 % intervals (Wilson), n behind each label."""
    low, high = zip(*(interval(share, n) for share, n in zip(shares, counts)))
    error = [[100 * (s - a) for s, a in zip(shares, low)], [100 * (b - s) for s, b in zip(shares, high)]]
    places, names = range(len(labels)), [f"{label} (n = {n})" for label, n in zip(labels, counts)]
    percent, look = [100 * s for s in shares], dict(capsize=2, error_kw=dict(lw=1))
    if horizontal:
        ax.barh(places, percent, xerr=error, color=colours, **look)
        ax.set_yticks(places, names)
        ax.set_ylim(len(names) - 0.5, -0.5)  # the first on top
    else:
        ax.bar(places, percent, yerr=error, color=colours, **look)
        ax.set_xticks(places, names)


def interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    middle, spread = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    low, high = (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def table(header, rows, bold=lambda row, column: False) -> None:
    """An HTML table of text cells; bold(row, column) says which stand out."""
    cell = lambda text, r, c: f"<td>{'<b>' * bold(r, c)}{html.escape(str(text))}{'</b>' * bold(r, c)}</td>"
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in header)
    body = "".join("<tr>" + "".join(cell(t, r, c) for c, t in enumerate(row)) + "</tr>" for r, row in enumerate(rows))
    display(HTML(f"<table><tr>{head}</tr>{body}</table>"))


def lens_figure(images, readings, titles, heading="") -> plt.Figure:
    """Pictures on the left, beside each the nearest token to each of its vectors; the darker, the nearer.

    images: uint8 (B, H, W, 3), or None for rows without pictures; readings: as `Nano.read` returns them.
    """
    B, Q = len(readings), len(readings[0])
    grid = dict(width_ratios=[0.1 if images is None else 1, Q], wspace=0.02, hspace=0.08)
    fig, axes = plt.subplots(B, 2, figsize=(1.6 + 0.62 * Q, 0.62 * B), squeeze=False, gridspec_kw=grid)
    for i, ((left, right), pairs, title) in enumerate(zip(axes, readings, titles)):
        left.axis("off")
        if images is not None:
            left.imshow(images[i])
        left.text(-0.06, 0.5, title, transform=left.transAxes, ha="right", va="center", fontsize=8)
        draw_reading(right, pairs)
    axes[0, 1].set_title(heading, loc="left", pad=6)
    return fig


def draw_reading(ax, pairs) -> None:
    """One row of the lens: a cell a vector, with the nearest token and the cosine."""
    ax.set(xlim=(0, len(pairs)), ylim=(0, 1))
    ax.axis("off")
    for q, (token, cosine) in enumerate(pairs):
        text, colour = printable(token), "white" if cosine > 0.65 else "black"
        shade = plt.get_cmap("Blues")(max(0.0, cosine) * 0.75)
        ax.add_patch(plt.Rectangle((q + 0.03, 0.06), 0.94, 0.88, facecolor=shade))
        size = 9 if len(text) < 6 else 54 / len(text)
        ax.text(q + 0.5, 0.6, text, ha="center", va="center", fontsize=size, color=colour)
        ax.text(q + 0.5, 0.22, f"{cosine:.2f}", ha="center", va="center", fontsize=6, color=colour)


SHOWN = {"Latn", "Grek", "Cyrl", "Armn", "Geor", None}  # scripts that a figure can show, written as they are


def printable(token: str) -> str:
    """A token as a figure can show it: "_" begins a word; the script's name where the font lacks its letters."""
    glyphs = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    other = [script_of(c) or "sign" for c in token if script_of(c) not in SHOWN or ord(c) not in glyphs]
    return f"({other[0]})" if other else token.replace("▁", "_").replace("$", r"\$")


# ---- nano -----------------------------------------------------------------------------------------------------------


class Nano:
    """A model of weights/nano with its tokenizer and the embedded data, and the questions that notebooks ask of it."""

    def __init__(self, which: str = "aligned", model=None):
        folder = ROOT / "weights/nano" / which
        self.model = load_mblip(folder) if model is None else model
        self.model.eval().requires_grad_(False)
        self.tokenizer, self.emoji = Tokenizer(folder / "spiece.model"), load_emoji()
        self.image = ImageConfig(size=self.model.cfg.vit.image_size)
        self.where = {cell: p for p, cell in enumerate(self.emoji.cells)}  # (concept, artist) -> picture
        self.concept = {name: c for c, name in self.emoji.names["en"].items()}  # English name -> concept

    def find(self, name: str, artist: str = "noto") -> int:
        """The number of a picture: its English name and its artist."""
        return self.where[self.concept[name], artist]

    def english(self, p: int) -> str:
        """What picture p shows."""
        return self.emoji.names["en"][self.emoji.cells[p][0]]

    def name(self, p: int, lang: str) -> str:
        """The human name of what picture p shows; "" where the language has none."""
        return self.emoji.names[lang].get(self.emoji.cells[p][0], "")

    def pixels(self, cells) -> torch.Tensor:
        """Pictures as the ViT takes them: (B, 1, 3, size, size)."""
        return array_to_tensor(self.emoji.pictures[list(cells)], self.image)[:, None]

    @torch.no_grad()
    def seen(self, cells) -> torch.Tensor:
        """What the ViT makes of them: (B, 1, N, Dv)."""
        parts = [self.model.image_features(self.pixels(cells[i : i + 256])) for i in range(0, len(cells), 256)]
        return torch.cat(parts)

    @torch.no_grad()
    def vectors(self, cells) -> torch.Tensor:
        """What the language model receives of them: (B, Q, D)."""
        return self.model.image_tokens(self.seen(list(cells)))

    def read(self, vectors) -> list[list[tuple[str, float]]]:
        """The lens: the nearest token to each vector, and the cosine; vectors (B, Q, D)."""
        return lens(self.model, vectors, self.tokenizer)

    @torch.no_grad()
    def write(self, vectors, langs, template: str = EVAL_PROMPT, decoding=Decoding(max_new_tokens=24), allowed=None):
        """The texts that the model writes behind given vectors (B, Q, D), one language each."""
        answers = []
        for i in range(0, len(langs), 256):
            part = langs[i : i + 256]
            prompt = self.tokenizer.batch([template.format(L=LANGUAGES[lang].name) for lang in part])
            may = None if allowed is None else allowed[i : i + 256]
            with eval_mode(self.model):
                memory, mask = self.model.encode(vectors[i : i + 256], prompt)
                start = prompt.new_full((len(part), 1), self.model.cfg.mt5.pad)
                found = write(self.model.mt5, memory, mask, start, decoding, vocab=len(self.tokenizer), allowed=may)
            answers += [self.tokenizer.decode(best[0].ids) for best in found]
        return answers

    @torch.no_grad()
    def losses(self, vectors, langs, names) -> torch.Tensor:
        """Cross-entropy per token (nats) of given names behind given vectors (B, Q, D): (B,)."""
        found = []
        for i in range(0, len(langs), 128):
            prompt = self.tokenizer.batch([EVAL_PROMPT.format(L=LANGUAGES[lang].name) for lang in langs[i : i + 128]])
            labels = pad_rows([self.tokenizer.encode(name) for name in names[i : i + 128]], -100)
            with eval_mode(self.model):
                logits, _ = self.model(None, prompt, labels, visual=vectors[i : i + 128])
            each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")  # (B, T)
            found.append(each.sum(1) / (labels != -100).sum(1))
        return torch.cat(found)

    def right(self, p: int, lang: str, text: str) -> bool:
        """Is a text exactly the human name of picture p?"""
        return normal(text) == normal(self.name(p, lang))


def meaning(text: str, lang: str) -> str:
    """The English name of what a text names in a language; "" where it names nothing that we know."""
    return meanings(lang).get(normal(text), "")


def as_shown(text: str, lang: str) -> str:
    """A text as a notebook may show it: as it is where people use it as a name, else hidden, because nobody here could
    say what a word that does not exist looks like to those who read the language."""
    return text if lang == "en" or meaning(text, lang) else "(no name)"


@cache
def meanings(lang: str) -> dict[str, str]:
    """Every name that CLDR has in a language -> its English name."""
    names = load_names()
    return {normal(name): names["en"].get(emoji, emoji) for emoji, name in names.get(lang, {}).items()}


# ---- exercises and claims -------------------------------------------------------------------------------------------


def check(what: str, given, wanted, tolerance: float = 1e-6) -> None:
    """Say whether an exercise's answer is right, not yet, or still blank; tensors and numbers up to a tolerance."""
    said = "still blank" if blank(given) else "right" if same(given, wanted, tolerance) else "not yet"
    print(f"{what}: {said}")


def blank(given) -> bool:
    """Is an answer, or all of a list of answers, not filled in? A function without a body returns None."""
    if isinstance(given, (list, tuple, dict)):
        parts = given.values() if isinstance(given, dict) else given
        return len(given) > 0 and all(map(blank, parts))
    return given is ... or given is None


def same(given, wanted, tolerance: float) -> bool:
    """Is an answer the wanted one? One of another kind or shape is not."""
    given, wanted = (x.tolist() if isinstance(x, torch.Tensor) else x for x in (given, wanted))
    if isinstance(wanted, dict):
        if not isinstance(given, dict) or given.keys() != wanted.keys():
            return False
        given, wanted = [given[key] for key in wanted], list(wanted.values())
    if isinstance(wanted, (list, tuple)):
        alike = isinstance(given, (list, tuple)) and len(given) == len(wanted)
        return alike and all(same(one, other, tolerance) for one, other in zip(given, wanted))
    if isinstance(wanted, float):
        return isinstance(given, (int, float)) and math.isclose(given, wanted, rel_tol=1e-5, abs_tol=tolerance)
    return bool(given == wanted)


def live() -> bool:
    """Is a person at the notebook, and can they touch it? Not while build.py executes it."""
    return "NANOMBLIP_BUILD" not in os.environ and find_spec("ipywidgets") is not None


def interact(draw, **choices) -> None:
    """Let a person choose the arguments of draw(...); where nobody can, the first choice of each is drawn once."""
    if live():
        import ipywidgets

        ipywidgets.interact(draw, **choices)
    else:
        draw(**{name: choice[0] for name, choice in choices.items()})


def evaluate(numbers: list[str], claims: list[str], variables: dict) -> None:
    """For build.py: print the values of numbers in the text, and whether claims hold, as JSON."""

    def attempt(code):
        try:
            return eval(code, variables), ""
        except Exception as error:  # it is reported with the sentence that it belongs to
            return None, f"{type(error).__name__}: {error}"

    filled = [attempt(f"f'''{{{expression}}}'''") for expression in numbers]
    held = []
    for claim in claims:
        value, error = attempt(f"bool({claim})")
        parts = error or "; ".join(values_in(claim, variables))
        held.append((bool(value), parts))
    print(json.dumps([filled, held]))


def values_in(expression: str, variables: dict) -> list[str]:
    """ "part = value" for the sides of each comparison in an expression, so that a failure can be understood."""
    found = []
    for node in ast.walk(ast.parse(expression.strip(), mode="eval")):
        for side in [node.left, *node.comparators] if isinstance(node, ast.Compare) else []:
            if not isinstance(side, ast.Constant):
                try:
                    value = eval(compile(ast.Expression(side), "", "eval"), variables)
                    found.append(f"{ast.unparse(side)} = {str(value)[:200]}")
                except Exception:  # a part of a generator has no value outside it
                    continue
    return found
