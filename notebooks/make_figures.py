"""Make the figures of the documents from the shipped weights, data and records: python notebooks/make_figures.py

Writes notebooks/figures/*.png, and figures.json beside them: what each figure was made from (a hash of the files that
it reads) and what it found, from which the documents take their numbers. Each is a white card in at most 256 colours,
sharp at twice the size that a document shows, and readable on a phone. `--example` only looks for the example picture.

The figure `run` needs the curves of a run: `--run out/RUN` thins its loss.csv and validation.csv out and stores them
as weights/records/run.json.

Every script is drawn by its own font of the Noto Sans family, which the `npm` client installs into out/fonts, once.
Matplotlib 3.11 or newer is needed: it joins letters as Arabic, Devanagari or Khmer want them.
"""

import csv
import io
import json
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import lib  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
from fontTools.ttLib import TTFont  # noqa: E402  (comes with matplotlib)
from lib import BLUE, GREEN, GREY, ORANGE, PINK, RED, ROOT, SKY, plt  # noqa: E402
from matplotlib import font_manager  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle  # noqa: E402
from PIL import Image  # noqa: E402

from nanomblip.data.decode import load_image  # noqa: E402
from nanomblip.data.emoji import (  # noqa: E402
    TEST_ARTISTS,
    TRAIN_ARTISTS,
    load_emoji,
    load_names,
    picture_split,
    unit_hash,
)
from nanomblip.data.image import image_to_tensor  # noqa: E402
from nanomblip.data.languages import LANGUAGES, script_group  # noqa: E402
from nanomblip.data.scripts import script_of  # noqa: E402
from nanomblip.flags import flag, parse_flags, run_main  # noqa: E402
from nanomblip.measure import ablation_tables, emoji_splits  # noqa: E402
from nanomblip.measure.ablation_suites import CAPTIONS, SUITES, read_records, settings_of  # noqa: E402
from nanomblip.model.generate import DECODING  # noqa: E402
from nanomblip.weights.files import read_json, write_atomic, write_json  # noqa: E402

FIGURES = ROOT / "notebooks/figures"
DPI = 220  # eight inches are 1,760 pixels, shown at half of that
# In data/, drawn by data/build_emoji.py. Under the weights before these it was the first of the held-out animals with
# the most languages right (`find_example`); it is not chosen again for each new training.
EXAMPLE = "wolf.png"
SIX = ("sw", "ru", "ar", "hi", "th", "ja")  # languages of the hero figure, in six scripts
DOZEN = ("en", "el", "ru", "iw", "ar", "hi", "ta", "th", "km", "ka", "ko", "zh")
LANGS = ("sw", "de", "ru", "ar", "hi", "bn", "th", "ja", "ko", "ka", "tr", "yo")  # of the twelve captions
THINGS = ("cat", "penguin", "mushroom", "hamburger", "rocket", "bicycle", "balloon", "guitar")
PICTURES, WEIGHTS = ("data/SHA256SUMS",), ("weights/nano/*/model.safetensors", "weights/nano/aligned/record.json")
READS = {  # figure -> the files it is made from
    "hero": (*PICTURES, *WEIGHTS),
    "contact_sheet": PICTURES,
    "scripts": PICTURES,
    "ablations": ("notebooks/records/*.json",),
    "captions": (*PICTURES, *WEIGHTS),
    "run": ("weights/records/run.json",),
}
RUN, POINTS = ROOT / "weights/records/run.json", 300  # of the loss, at most

# Script -> package and part of it; what is not here is in Latin letters.
FONTS = {
    "Cyrl": ("", "cyrillic"), "Grek": ("", "greek"), "Arab": "arabic", "Armn": "armenian", "Beng": "bengali",
    "Deva": "devanagari", "Ethi": "ethiopic", "Geor": "georgian", "Gujr": "gujarati", "Guru": "gurmukhi",
    "Hebr": "hebrew", "Knda": "kannada", "Khmr": "khmer", "Laoo": "lao", "Mlym": "malayalam", "Mymr": "myanmar",
    "Sinh": "sinhala", "Taml": "tamil", "Telu": "telugu", "Thai": "thai", "Kana": ("-jp", "japanese"),
    "Hira": ("-jp", "japanese"), "Hani": ("-sc", "chinese-simplified"), "Hang": ("-kr", "korean"),
}  # fmt: skip
LATIN = ("latin", "latin-ext", "vietnamese", "cyrillic", "cyrillic-ext")
FONT_VERSION = "5.3.0"


@dataclass(frozen=True)
class Config:
    names: list = flag((), "figures to make: " + ", ".join(READS) + "; default: all", many=True)
    run: str = flag("", "folder of a run of train.py whose curves are stored first")
    example: bool = flag(False, "say which held-out picture of an animal has the most languages right, and stop")


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Make the figures of the documents.")
    wrong = [name for name in cfg.names if name not in READS]
    if wrong:
        raise ValueError(f"--names {wrong[0]}: none of {', '.join(READS)}")
    lib.begin()
    if cfg.example:
        for count, picture, name in find_example(lib.Nano())[:10]:
            print(f"{count} of 85 languages: {name} by {picture[1]} ({picture[0]})")
        return 0
    if cfg.run:
        text = json.dumps(curves_of(Path(cfg.run))) + "\n"
        write_atomic(RUN, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    install_fonts(ROOT / "out/fonts")
    plt.rcParams.update({"font.family": [family("", part) for part in LATIN], "figure.dpi": DPI, "font.size": 10})
    FIGURES.mkdir(exist_ok=True)
    path = FIGURES / "figures.json"
    found = read_json(path) if path.exists() else {}
    for name in cfg.names or READS:
        fig, facts = globals()[f"draw_{name}"]()
        save(fig, FIGURES / f"{name}.png")
        found[name] = {"read": digest(name), **facts}
        print(f"{name}: {facts}")
    write_json(path, found)
    return 0


def save(fig, path: Path) -> None:
    """Write a figure as a PNG of 256 colours, a quarter of the size; what is nearly white becomes white."""
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=DPI, facecolor="white")
    plt.close(fig)
    pixels = np.array(Image.open(buffer).convert("RGB"))  # (H, W, 3)
    white = (pixels >= 250).all(-1)
    pixels[white] = 255
    image = Image.fromarray(pixels)
    palette = image.quantize(255, method=Image.Quantize.MAXCOVERAGE)
    image = image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    colours = palette.getpalette()[: 3 * 255]
    image.putpalette([*colours, *[0] * (3 * 255 - len(colours)), 255, 255, 255])  # number 255 is white
    image.paste(255, mask=Image.fromarray(white))
    write_atomic(path, lambda temporary: image.save(temporary, "PNG", optimize=True))


def digest(name: str) -> str:
    """The sha256 of the names and contents of all files that a figure is made from."""
    whole = sha256()
    for path in sorted(path for pattern in READS[name] for path in ROOT.glob(pattern)):
        whole.update(f"{path.relative_to(ROOT).as_posix()} {sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def find_example(nano: lib.Nano) -> list[tuple[int, tuple[str, str], str]]:
    """Held-out pictures of animals by the number of languages in which five beams write the right name, best first;
    of equal ones the first in Unicode's order: (number, (concept, artist), English name)."""
    table = (line.split("\t") for line in (ROOT / "data/concepts.tsv").read_text("utf-8").splitlines())
    order = {row[0]: i for i, row in enumerate(table) if row[2] == "Animals & Nature"}
    cells = [p for p in nano.emoji.cells_in("test") if nano.emoji.cells[p][0] in order]
    langs, found = list(nano.emoji.names), []
    for p, vectors in zip(cells, nano.vectors(cells)):
        answers = nano.write(vectors.expand(len(langs), -1, -1), langs, decoding=DECODING["caption"])
        count = sum(nano.right(p, lang, text) for lang, text in zip(langs, answers))
        found.append((count, nano.emoji.cells[p], nano.english(p)))
    return sorted(found, key=lambda row: (-row[0], order[row[1][0]]))


# ---- fonts ----------------------------------------------------------------------------------------------------------


def parts_of(script: str) -> tuple[str, str]:
    """The package and the part of it that draws a script."""
    found = FONTS.get(script, ("", "latin"))
    return found if isinstance(found, tuple) else (f"-{found}", found)


def family(package: str, part: str) -> str:
    return f"nanomblip{package} {part}"


def fonts_for(text: str) -> list[str]:
    """The families for a text: its own script's first, Latin letters and digits for the rest."""
    counted = Counter(script for script in map(script_of, text) if script in FONTS)
    scripts = [script for script, _ in counted.most_common()]
    if "Hira" in scripts or "Kana" in scripts:  # Japanese has its own forms of Chinese characters
        scripts = ["Kana"]
    return [*(family(*parts_of(script)) for script in scripts), *(family("", part) for part in LATIN)]


def install_fonts(folder: Path) -> None:
    """Noto Sans for every script of the data: fetch the packages, unpack their files, tell matplotlib."""
    if tuple(map(int, matplotlib.__version__.split(".")[:2])) < (3, 11):
        raise ValueError(f"matplotlib {matplotlib.__version__} does not join letters; pip install 'matplotlib>=3.11'")
    wanted = dict.fromkeys([*(("", part) for part in LATIN), *map(parts_of, FONTS)])
    packages = dict.fromkeys(f"@fontsource/noto-sans{package}" for package, _ in wanted)
    missing = [f"{name}@{FONT_VERSION}" for name in packages if not (folder / "node_modules" / name).exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}\n')
        subprocess.run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--save-exact", *missing],
                       cwd=folder, check=True, stdout=sys.stderr)  # fmt: skip
    for package, part in wanted:
        path = folder / f"{family(package, part)}.ttf"
        if not path.exists():
            files = folder / f"node_modules/@fontsource/noto-sans{package}/files"
            font = TTFont(files / f"noto-sans{package}-{part}-400-normal.woff")
            font.flavor = None  # not compressed
            for record in font["name"].names:
                if record.nameID in (1, 16):  # else all would have the same name, and matplotlib could not choose
                    font["name"].setName(path.stem, record.nameID, record.platformID, record.platEncID, record.langID)
            font.save(path)
        font_manager.fontManager.addfont(path)


# ---- drawing --------------------------------------------------------------------------------------------------------


def canvas(width: float, height: float):
    """A white card of so many inches with axes in inches, origin at the upper left."""
    fig = plt.figure(figsize=(width, height))
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    return fig, ax


def write(ax, x, y, text, size=10, **look) -> None:
    look = dict(ha="center", va="center", color="black") | look
    ax.text(x, y, text.replace("$", r"\$"), fontsize=size, family=fonts_for(text), **look)


def box(ax, x, y, width, height, colour, alpha=1.0) -> None:
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.07", facecolor=colour,
                                alpha=alpha, edgecolor="none"))  # fmt: skip


def arrow(ax, start, end) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=GREY, shrinkA=0, shrinkB=0))


def picture(ax, image, x, y, size) -> None:
    """An image with its upper left corner at (x, y)."""
    ax.imshow(image, extent=(x, x + size, y + size, y), interpolation="lanczos", zorder=2)
    ax.autoscale(False)


def name_file(nano: lib.Nano, image, cell: tuple[str, str]):
    """What the ViT and the language model see of an image, and what is written in every language: features (1, 1, N,
    Dv), vectors (1, Q, D), language -> answer, language -> whether it is a name of the cell's concept."""
    features = nano.model.image_features(image_to_tensor(image, nano.image)[None, None])
    vectors = nano.model.image_tokens(features)
    langs, p = list(nano.emoji.names), nano.where[cell]
    answers = dict(zip(langs, nano.write(vectors.expand(len(langs), -1, -1), langs, decoding=DECODING["caption"])))
    return features, vectors, answers, {lang: nano.right(p, lang, text) for lang, text in answers.items()}


def draw_hero():
    """From a picture to answers in six scripts: what each part hands to the next, what is frozen, what is trained."""
    nano = lib.Nano()
    image = load_image(ROOT / "data" / EXAMPLE)
    best = find_example(nano)
    count, cell, english = next(row for row in best if row[2].replace(" ", "_") == Path(EXAMPLE).stem)
    langs = list(nano.emoji.names)
    features, vectors, answers, right = name_file(nano, image, cell)
    *_, cats = name_file(nano, load_image(ROOT / "data/cat.png"), ("1f408", "noto"))
    (reading,) = nano.read(vectors)
    trains_lora = read_json(ROOT / "weights/nano/aligned/record.json")["config"].get("lora", "none") != "none"

    fig, ax = canvas(8, 5.3)
    cfg, top = nano.model.cfg, 0.42
    picture(ax, image, 0.2, top, 1.6)
    patches = cfg.vit.image_size // cfg.vit.patch_size
    for i in range(patches + 1):
        at = 1.6 * i / patches
        ax.plot([0.2 + at] * 2, [top, top + 1.6], color="0.55", lw=0.7, zorder=3)
        ax.plot([0.2, 1.8], [top + at] * 2, color="0.55", lw=0.7, zorder=3)
    write(ax, 0.2, 0.22, f"a drawing it never saw, {patches * patches} patches", 11, ha="left")
    N, Q = features.shape[2], vectors.shape[1]
    for x, width, name, gives, colour in (
        (2.2, 1.45, "ViT", f"{N} vectors", SKY),
        (4.05, 1.75, "Q-Former", f"{Q} queries, {Q} vectors", ORANGE),
        (6.2, 1.6, "projection", f"to width {vectors.shape[-1]}", ORANGE),
    ):
        arrow(ax, (x - 0.36, top + 0.8), (x - 0.04, top + 0.8))
        box(ax, x, top + 0.3, width, 1.0, colour, 0.55)
        write(ax, x + width / 2, top + 0.62, name, 15)
        write(ax, x + width / 2, top + 0.99, gives, 11)
    ax.plot([7.0, 7.0, 2.6, 2.6], [top + 1.34, 2.28, 2.28, 2.4], color=GREY, lw=1.2)
    arrow(ax, (2.6, 2.3), (2.6, 2.52))

    cells, left, y = 0.6, 0.2, 2.55
    for i, (token, _) in enumerate(reading):
        box(ax, left + cells * i + 0.02, y, cells - 0.04, 0.42, ORANGE, 0.55)
        text = token.replace("▁", "")
        write(ax, left + cells * (i + 0.5), y + 0.21, text or "_", 13 if len(text) < 5 else 62 / len(text))
    prompt = left + cells * Q + 0.12
    box(ax, prompt, y, 7.8 - prompt, 0.42, "0.88")
    write(ax, (prompt + 7.8) / 2, y + 0.21, "Caption the image in Swahili.", 11.5)
    write(ax, left, y + 0.6, f"its {Q} vectors, each read as the nearest token", 11, ha="left")
    write(ax, 7.8, y + 0.6, "the prompt", 11, ha="right")
    arrow(ax, (4.6, y + 0.5), (4.6, y + 0.78))
    box(ax, 0.2, 3.36, 7.6, 0.42, SKY, 0.55)
    lora = ", with trained LoRA" if trains_lora else ""
    write(ax, 4.0, 3.57, f"multilingual language model (mT5){lora}", 14)
    arrow(ax, (4.0, 3.8), (4.0, 4.02))
    for i, lang in enumerate(SIX):
        x, line = 0.2 + 2.56 * (i % 3), 4.2 + 0.4 * (i // 3)
        mark, colour = ("right", GREEN) if right[lang] else ("wrong", RED)
        write(ax, x, line, LANGUAGES[lang].name, 10.5, ha="left", color="0.35")
        write(ax, x + 0.83, line, answers[lang], 13.5, ha="left")
        if not right[lang]:
            write(ax, x + 2.5, line, mark, 10.5, ha="right", color=colour)
    for x, colour, text in ((0.2, SKY, "frozen"), (1.15, ORANGE, "trained")):
        box(ax, x, 5.0, 0.16, 0.16, colour, 0.55)
        write(ax, x + 0.22, 5.08, text, 11, ha="left")
    credit = f"right in {sum(right.values())} of {len(langs)} languages; drawing: Twemoji, CC BY 4.0"
    write(ax, 7.8, 5.08, credit, 10, ha="right", color="0.35")
    shown = {lang: answers[lang] for lang in SIX}
    as_good = sum(row[0] >= count for row in best) - 1
    return fig, dict(picture=EXAMPLE, artist=cell[1], english=english, in_sheet=count, as_good=as_good,
                     animals=len(best), right=sum(right.values()), languages=len(langs), cats=sum(cats.values()),
                     answers=shown, tokens=[token for token, _ in reading])  # fmt: skip


def draw_contact_sheet():
    """Eight things by ten artists: frames for the two artists no model is trained on, dots for held-out pictures."""
    emoji = load_emoji()
    concept = {name: c for c, name in emoji.names["en"].items()}
    where = {cell: p for p, cell in enumerate(emoji.cells)}
    artists, left, step, size = (*TRAIN_ARTISTS, *TEST_ARTISTS), 1.02, 0.69, 0.66
    fig, ax = canvas(8, 0.75 + 0.72 * len(THINGS) + 0.4)
    for column, artist in enumerate(artists):
        x = left + step * column
        write(ax, x + size / 2, 0.5, artist.replace("-", "\n"), 9)
        for row, thing in enumerate(THINGS):
            y, at = 0.75 + 0.72 * row, where[concept[thing], artist]
            picture(ax, emoji.pictures[at], x, y, size)
            if picture_split(concept[thing], artist) == "test":
                ax.plot(x + 0.05, y + 0.05, "o", color=RED, markersize=6, zorder=4, clip_on=False)
            if column == 0:
                write(ax, left - 0.1, y + size / 2, thing, 11, ha="right")
    x = left + step * len(TRAIN_ARTISTS)
    ax.add_patch(Rectangle((x - 0.02, 0.28), 2 * step, 0.47 + 0.72 * len(THINGS), fill=False, edgecolor=BLUE, lw=1.6))
    write(ax, x + step, 0.14, "never trained on", 11, color=BLUE)
    ax.plot(0.2, fig.get_figheight() - 0.18, "o", color=RED, markersize=6)
    write(ax, 0.32, fig.get_figheight() - 0.18, "held-out picture by a training artist", 11, ha="left")
    return fig, dict(artists=len(artists), things=len(THINGS))


def draw_scripts():
    """What people call the example in twelve scripts."""
    emoji = load_emoji()
    cell = next(c for c, name in emoji.names["en"].items() if name == Path(EXAMPLE).stem)
    fig, ax = canvas(8, 3.3)
    picture(ax, load_image(ROOT / "data" / EXAMPLE), 0.1, 0.55, 1.7)
    for i, lang in enumerate(DOZEN):
        x, y = 2.1 + 2.0 * (i % 3), 0.2 + 0.71 * (i // 3)
        write(ax, x, y, LANGUAGES[lang].name, 10.5, ha="left", color="0.35")
        name = emoji.names[lang][cell]
        write(ax, x, y + 0.3, name, 16 if len(name) < 13 else 208 / len(name), ha="left")
    write(ax, 0.1, 3.13, "drawing: Twemoji, CC BY 4.0; names: Unicode CLDR", 10, ha="left", color="0.35")
    return fig, dict(languages=len(DOZEN))


def draw_ablations():
    """Every row's difference to its reference with two standard errors, a point a seed."""
    records = read_records(ROOT / "notebooks/records")
    setting, rows = settings_of(records)[0], []
    for suite in SUITES.values():
        base, _ = ablation_tables.values_of(suite.rows[0], suite, setting, records)
        for row in suite.rows[1:]:
            values, _ = ablation_tables.values_of(row, suite, setting, records)
            if len(base) > 1 and len(values) > 1:
                middle = statistics.mean(base)
                error = (statistics.variance(base) / len(base) + statistics.variance(values) / len(values)) ** 0.5
                judged = ablation_tables.verdict(base, values, suite.expect, suite.smallest)
                label = f"{row}  −  {suite.rows[0]}"
                rows.append((label, suite.measure, [100 * (v - middle) for v in values], 200 * error, judged))
    fig, ax = plt.subplots(figsize=(8, 1.1 + 0.34 * len(rows)), layout="constrained")
    colours = {"agrees": BLUE, "disagrees": RED}
    beside = dict(transform=ax.get_yaxis_transform(), va="center", fontsize=10.5)
    for y, (_, measure, values, error, judged) in enumerate(rows):
        colour = colours.get(judged, GREY)
        ax.plot(values, [y] * len(values), "o", color="0.75", markersize=4)
        ax.errorbar(statistics.mean(values), y, xerr=error, fmt="D", color=colour, markersize=6, capsize=3)
        other = "" if measure == CAPTIONS else "*"
        ax.text(1.03, y, judged + other, color=colour, **beside)
    ax.axvline(0, color="0.3", lw=0.8)
    ax.text(1.03, -0.9, "as in the paper?", **beside)
    ax.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=10.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="x", labelsize=10.5)
    ax.set_xlabel("difference in chrF of captions, other languages (points), ± 2 standard errors\n"
                  "grey: single seeds; * another measure or group", fontsize=10.5)  # fmt: skip
    return fig, dict(rows=len(rows), setting=setting)


def draw_captions():
    """Twelve held-out pictures, the first by hash, each captioned in another language, right or wrong as they come."""
    nano = lib.Nano()
    emoji = nano.emoji
    cells = sorted(emoji.cells_in("test"), key=lambda p: unit_hash("twelve", *emoji.cells[p]))[: len(LANGS)]
    vectors = nano.vectors(cells)
    answers = nano.write(vectors, list(LANGS), decoding=DECODING["caption"])
    fig, ax = canvas(8, 5.95)
    correct = 0
    for i, (p, lang, answer) in enumerate(zip(cells, LANGS, answers)):
        x, y = 0.04 + 1.98 * (i % 4), 0.1 + 1.88 * (i // 4)
        good = nano.right(p, lang, answer)
        correct += good
        middle, colour = x + 0.99, GREEN if good else RED
        picture(ax, emoji.pictures[p], middle - 0.47, y, 0.95)
        shown, said = lib.as_shown(answer, lang), f"{nano.english(p)}, {LANGUAGES[lang].name}"
        write(ax, middle, y + 1.08, said, min(10.5, 260 / len(said)), color="0.35")
        write(ax, middle, y + 1.33, shown, min(15, 208 / len(shown)))
        said = "right" if good else f"wrong: {lib.meaning(answer, lang) or 'no name'}"
        write(ax, middle, y + 1.57, said, min(10.5, 260 / len(said)), color=colour)
    credit = "drawings: " + ", ".join(sorted({emoji.cells[p][1] for p in cells})) + " (data/NOTICE)"
    write(ax, 0.15, 5.82, credit, 10, ha="left", color="0.35")
    return fig, dict(right=correct, pictures=len(cells))


def curves_of(folder: Path) -> dict:
    """What the figure of a run shows: its config, loss (each stage thinned by means of neighbouring steps), and every
    look at the validation slice."""
    for name in ("train.json", "loss.csv", "validation.csv"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"--run {folder}: not the folder of a run of train.py (it has no {name})")
    config = read_json(folder / "train.json")
    rows = {
        name: list(csv.DictReader(io.StringIO((folder / f"{name}.csv").read_text()))) for name in ("loss", "validation")
    }
    if not rows["validation"]:
        raise ValueError(f"--run {folder}: it never looked at the validation slice; train with --eval_every 100")
    steps, each = len(rows["loss"]), -(-len(rows["loss"]) // (POINTS - 1))  # one point more where two stages meet
    border, loss = config["warmup_steps"], []
    for first, last in ((0, border), (border, steps)):
        for at in range(first, last, each):
            part = [float(row["loss"]) for row in rows["loss"][at : min(at + each, last)]]
            loss.append([at + (len(part) + 1) / 2, round(statistics.mean(part), 4)])
    looks = [{name: float(value) if value else None for name, value in row.items()} for row in rows["validation"]]
    return dict(config=config, steps=steps, loss=loss, validation=looks)


def draw_run():
    """The loss of both stages over a run, and exact match by script at each look at the validation slice."""
    record = read_json(RUN)
    border, looks = record["config"]["warmup_steps"], record["validation"]
    fig, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained", height_ratios=(2, 3))
    for ax in (above, below):
        ax.axvline(border, color="0.6", lw=0.8, ls="--")
        ax.tick_params(labelsize=11)
    for first, last, colour in ((0, border, ORANGE), (border, record["steps"], BLUE)):
        above.plot(*zip(*(point for point in record["loss"] if first < point[0] <= last)), color=colour)
    top = dict(transform=above.get_xaxis_transform(), fontsize=11, va="top")
    names = {"names": "warm-up: towards the English name", "projection": "warm-up: the projection alone"}
    if border:
        above.text(border * 0.98, 0.98, names[record["config"]["warmup"]], ha="right", color="#9a6700", **top)
    above.text(border + 0.01 * record["steps"], 0.98, "the language model's loss", ha="left", color=BLUE, **top)
    above.set_ylabel("loss", fontsize=11)
    above.set_yscale("log")
    above.minorticks_off()
    above.set_yticks((0.1, 0.3, 1, 3, 10), ("0.1", "0.3", "1", "3", "10"))
    above.set_ylim(top=2.5 * max(value for _, value in record["loss"]), bottom=0.05)  # room for the words
    count = Counter(script_group(lang) for lang in load_names() if lang != "en")
    groups = [name for name in emoji_splits.Validation.GROUPS if looks[0].get(name) is not None]
    lines = {"English": "english_exact", **{f"{name} ({count[name]})": name for name in groups}}
    lines["all but English"] = "other_exact"
    for name, colour in zip(lines, ("black", GREEN, BLUE, ORANGE, RED, PINK, SKY, GREY, "black")):
        mean = name == "all but English"
        values = [100 * row[lines[name]] for row in looks]
        below.plot([row["step"] for row in looks], values, label=name, color=colour, ls=":" if mean else "-",
                   lw=2.4 if colour == "black" else 1.4)  # fmt: skip
    below.set_ylabel("validation pictures\nnamed exactly (%)", fontsize=11)
    below.set_xlabel("step", fontsize=11)
    below.set_ylim(bottom=0)
    below.legend(title="by script (number of languages)", title_fontsize=11, fontsize=11, loc="lower right", ncols=3)
    return fig, dict(steps=record["steps"], looks=len(looks), english=looks[-1]["english_exact"],
                     other=looks[-1]["other_exact"])  # fmt: skip


if __name__ == "__main__":
    run_main(main)
