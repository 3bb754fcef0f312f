"""English text into other languages: cut into sentences, translated in batches of equal length, joined again.

Two models translate, behind the same three methods (`clean`, `encode`, `write`): NLLB-200, the one that wrote mBLIP's
data, and a language model such as nano's, which is asked "cat in Swahili:".

Both are given one sentence at a time. Of several, NLLB drops some; and a text beyond what it was trained on (512
tokens, most of them far shorter) ends in the middle. A sentence of more than `longest` tokens is cut further, at a
comma or a space, and nothing is cut off.
"""

import re
import time
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from nanomblip.data.answers import fingerprint
from nanomblip.data.emoji import load_names
from nanomblip.data.languages import LANGUAGES
from nanomblip.data.nllb_tokenizer import NLLB_CODES, NLLBTokenizer
from nanomblip.data.tokenizer import Tokenizer, pad_rows
from nanomblip.model.generate import Decoding, write
from nanomblip.model.int8 import Int8Linear
from nanomblip.model.nllb import translate_tokens
from nanomblip.weights.files import read_json
from nanomblip.weights.hub import MODELS, download
from nanomblip.weights.load import load_mt5
from nanomblip.weights.nllb import load_nllb

HERE = Path(__file__).resolve().parents[2]
NLLB_NAMES = tuple(name for name in MODELS if name.startswith("nllb"))

# NLLB's tokens were learned from text with plain punctuation; for the rest it has no token, and quotes would be lost.
_PLAIN = {'"': "“”„‟«»″", "'": "‘’‚‛`´′", "-": "‐‑–—―−", "...": "…"}
STRAIGHT = str.maketrans({odd: straight for straight, those in _PLAIN.items() for odd in those})
ABBREVIATIONS = frozenset("mr mrs ms dr st prof sr jr vs e.g i.e inc ltd co mt gen capt lt col rev fig".split())
END = re.compile(r"""[.!?]["')\]]*(\s+)(?=["'(\[]?[A-Z])|([ \t]*\n\s*)""")
NO_SPACES = ("zh", "ja")  # nothing stands between two sentences


class Written(NamedTuple):
    """A translated sentence; unknown: tokens that could not be written; ended: by itself, not by the length limit."""

    text: str
    unknown: int
    ended: bool
    tokens: int


def plain(text: str) -> str:
    """Text without control characters, odd spaces, invisible marks and halves of surrogate pairs; line feeds stay."""
    kinds = {"Cc": " ", "Cs": " ", "Zs": " ", "Zl": "\n", "Zp": "\n", "Cf": ""}
    return "".join(c if c == "\n" else kinds.get(unicodedata.category(c), c) for c in text).strip()


def split_sentences(text: str) -> list[str]:
    """Sentences and what stands between them, in turns: "A. B" -> ["A.", " ", "B"]; joined they are the text."""
    parts, start = [], 0
    for match in END.finditer(text):
        group = 1 if match[1] else 2
        last = text[start : match.start()].rsplit(None, 1)[-1:] or [""]
        is_short = last[0].strip("\"'([").casefold() in ABBREVIATIONS or re.fullmatch(r"([A-Z]\.)*[A-Z]", last[0])
        if group == 1 and match[0][0] == "." and is_short:
            continue
        parts += [text[start : match.start(group)], match[group]]
        start = match.end()
    return [*parts, text[start:]]


def cut_long(text: str, count, longest: int) -> list[str]:
    """A sentence, or parts of at most `longest` tokens by count(part) and what stands between them, in turns.

    It is cut at the comma or semicolon nearest to its middle, else at the nearest space, else between two characters.
    """
    if count(text) <= longest or len(text) < 2:
        return [text]
    middle = len(text) / 2
    gaps = [match.span() for match in re.finditer(r"(?<=[,;:])\s+", text)]
    gaps = [gap for gap in gaps if 0.25 < gap[0] / len(text) < 0.75] or [m.span() for m in re.finditer(r"\s+", text)]
    at, to = min(gaps, key=lambda gap: abs(gap[0] - middle), default=(len(text) // 2,) * 2)
    return [*cut_long(text[:at], count, longest), text[at:to], *cut_long(text[to:], count, longest)]


def split_text(text: str, count, longest: int) -> tuple[list[str], int]:
    """Sentences of at most `longest` tokens and what stands between them, in turns, and how many had to be cut.

    Joined they are the text.
    """
    parts, cut = [], 0
    for i, part in enumerate(split_sentences(text)):
        shorter = [part] if i % 2 else cut_long(part, count, longest)
        parts += shorter
        cut += len(shorter) > 1
    return parts, cut


def join(parts: list[str], lang: str) -> str:
    """The translations of sentences, and what stood between them, as one text; line feeds stay."""
    space = "" if lang in NO_SPACES else " "
    between = lambda gap: "\n" if "\n" in gap else space if gap else ""
    return "".join(between(part) if i % 2 else " ".join(part.split()) for i, part in enumerate(parts)).strip()


class NLLBTranslator:
    """NLLB-200 from a folder in the official layout, between any two of the 96 languages."""

    langs, longest, both_ways = tuple(LANGUAGES), 128, True

    def __init__(self, folder: Path, dtype: str, device: torch.device, legacy: bool = False):
        self.tokenizer = NLLBTokenizer(folder / "sentencepiece.bpe.model", legacy)
        self.model = load_nllb(folder, llm_dtype=dtype).to(device)
        if (rows := self.model.cfg.vocab) < len(self.tokenizer) + len(NLLB_CODES):
            have = f"{len(self.tokenizer)} tokens of text and {len(NLLB_CODES)} languages"
            raise ValueError(f"{folder}: its tokenizer has {have}, its model {rows} rows: they do not belong together")

    def clean(self, text: str) -> str:
        return plain(text).translate(STRAIGHT)

    def encode(self, text: str, source: str, target: str) -> list[int]:
        return self.tokenizer.encode(text, source)

    def write(self, rows: list[list[int]], targets: list[str], decoding: Decoding):
        """One hypothesis for each row of ids."""
        device, vocab = self.model.embed.weight.device, len(self.tokenizer)
        source = pad_rows(rows, self.tokenizer.pad).to(device)  # (B, S)
        target = torch.tensor([self.tokenizer.language(lang) for lang in targets], device=device)  # (B,)
        return [best[0] for best in translate_tokens(self.model, source, target, decoding, vocab=vocab)]


class PromptedTranslator:
    """A language model that has read names in many languages, such as nano's: English to the 85 with names."""

    longest, both_ways = 48, False  # nano has read nothing longer

    def __init__(self, folder: Path, dtype: str, device: torch.device, legacy: bool = False):
        if legacy:
            raise ValueError("--legacy is a form of NLLB's sources; leave it out with another model")
        self.langs = tuple(load_names())
        self.tokenizer = Tokenizer(folder / "spiece.model")
        self.model = load_mt5(folder, llm_dtype=dtype).to(device)

    def clean(self, text: str) -> str:
        return plain(text)

    def encode(self, text: str, source: str, target: str) -> list[int]:
        return self.tokenizer.encode(f"{text} in {LANGUAGES[target].name}:", 1 << 20)

    @torch.no_grad()
    def write(self, rows: list[list[int]], targets: list[str], decoding: Decoding):
        """One hypothesis for each row of ids."""
        model, pad = self.model, self.tokenizer.pad
        prompt = pad_rows(rows, pad).to(model.embed.weight.device)  # (B, S)
        mask = prompt != pad
        memory = model.encode(model.embed(prompt), mask)  # (B, S, D)
        start = prompt.new_full((len(rows), 1), model.cfg.pad)
        return [best[0] for best in write(model, memory, mask, start, decoding, vocab=len(self.tokenizer))]


def open_translator(name: str, dtype: str, device: torch.device, legacy: bool = False):
    """The translator that `--model` means: nano, the name of an NLLB-200, which is fetched, or a folder of either.

    Its `fingerprint` tells it from all others.
    """
    folder = HERE / "weights" / "nano" / "mt0" if name == "nano" else Path(name)
    if name in NLLB_NAMES:
        folder = download(name, HERE / "weights" / name)
    if not folder.is_dir():
        raise FileNotFoundError(f"--model {name}: no such folder, and none of nano, {', '.join(NLLB_NAMES)}")
    config = read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ("m2m_100", "mt5"):
        raise ValueError(f"--model {name}: its config.json is of type {kind!r}, neither m2m_100 (NLLB) nor mt5")
    translator = (NLLBTranslator if kind == "m2m_100" else PromptedTranslator)(folder, dtype, device, legacy)
    translator.fingerprint = fingerprint(translator.model, translator.tokenizer)
    for module in translator.model.modules():
        if isinstance(module, Int8Linear):
            module.pack()  # now, and not after some use: a run that goes on must compute as one that never stopped
    return translator


def translate(translator, items: Iterable[tuple[str, str, str]], batch: int, num_beams: int = 1, progress=None):
    """Translate (sentence, source language, target language): a dict from each to its `Written`.

    The longest come first, so that too large a batch fails at once. What a batch holds follows from the items alone.
    progress(tokens, seconds) is called after each batch.
    """
    rows = {item: translator.encode(*item) for item in dict.fromkeys(items)}
    order, found = sorted(rows, key=lambda item: (-len(rows[item]), item)), {}
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        decoding = Decoding(num_beams=num_beams, max_new_tokens=10 + 3 * len(rows[part[0]]))
        began = time.perf_counter()
        written = translator.write([rows[item] for item in part], [target for _, _, target in part], decoding)
        for item, best in zip(part, written, strict=True):
            unknown = sum(i == translator.tokenizer.unk for i in best.ids)
            found[item] = Written(
                translator.tokenizer.decode(best.ids), unknown, best.ended, len(best.ids) + best.ended
            )
        if progress is not None:
            progress(sum(found[item].tokens for item in part), time.perf_counter() - began)
    return found
