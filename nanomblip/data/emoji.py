"""The embedded data set: drawings of 849 things by ten artists, and human names for them in 85 languages.

A *concept* is one emoji, written as its code points in lower-case hex ("1f408", a cat). Unicode's CLDR gives it a name
and keywords, written by people, in 85 of mBLIP's 96 languages; ten sets of drawings give it pictures. So a name is a
caption, one concept links all languages, and another artist's hand is a visual domain shift. Everything lies in `data/`
(its README has sources, counts and licences). No file is downloaded here and none is trusted: each one's sha256 is
checked against `data/SHA256SUMS` before it is parsed.

Which split an item is in follows from a hash of the item itself, never from a run's seed, so every run, every model and
every future version of the code holds out the same things:

    what            split    rule                                          measures
    picture         test     hash(concept, hand) < 0.10                    new drawings by known artists
      of a training val      hash(concept, hand) < 0.13
      artist        train    the rest
    picture         artist   every drawing by OpenMoji and Streamline      a hand never seen in training
    (lang, concept) test     hash(lang, concept) < 0.15, not English       transfer across languages
                    val      hash(lang, concept) < 0.18, not English
                    train    the rest, and all of English: that is what the English BLIP-2 knows already
    language        -        HELD_OUT_LANGS, in zero-shot runs only        languages never aligned at all

The hand is the artist, but for Microsoft's two sets: Fluent flat is Fluent 3D without the shading, so the two drawings
of a concept always share a split. Apart, nine in ten of their test pictures would have a twin in training.
"""

import hashlib
import io
import json
import lzma
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2] / "data"
CELL = 64  # side of one picture in pixels
COLUMNS = 32  # cells in one row of a sheet

TRAIN_ARTISTS = ("noto", "noto-v1", "twemoji", "fluent-3d", "fluent-flat", "emojitwo", "emojione-v1", "fxemoji")
TEST_ARTISTS = ("openmoji", "streamline")  # never trained on, under any name
HAND = {"fluent-3d": "fluent", "fluent-flat": "fluent"}  # artists whose drawings are one design

HELD_OUT_LANGS = ("sw", "yo", "ka", "si", "eu", "th", "is", "uz")  # eight languages in four scripts

# Chosen once, so that Noto's cat, the example picture, is held out. Another salt draws new splits: never change it.
SALT = "nanomblip-230"
CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")


def unit_hash(*key: str) -> float:
    """Map a key of strings to a number in [0, 1), uniform over keys and the same on every machine, for ever.

    It is the first 53 bits (what a float holds exactly) of the sha256 of the salted key; the parts are joined by a
    character that none of them contains, so ("a", "bc") and ("ab", "c") differ.
    """
    digest = hashlib.sha256("\x1f".join((SALT, *key)).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def picture_split(concept: str, artist: str) -> str:
    """Return the split of one drawing: "train", "val" or "test", or "artist" when its artist is held out."""
    if artist in TEST_ARTISTS:
        return "artist"
    if artist not in TRAIN_ARTISTS:
        raise ValueError(f"unknown artist {artist!r}; there are {', '.join(TRAIN_ARTISTS + TEST_ARTISTS)}")
    h = unit_hash("picture", concept, HAND.get(artist, artist))
    return "test" if h < 0.10 else "val" if h < 0.13 else "train"


def pair_split(lang: str, concept: str) -> str:
    """Return the split of a concept's name in a language: "train", "val" or "test"; English is always "train"."""
    if lang == "en":
        return "train"
    h = unit_hash("pair", lang, concept)
    return "test" if h < 0.15 else "val" if h < 0.18 else "train"


@dataclass(frozen=True)
class Emoji:
    """The data set in memory.

    concepts    the vocabulary, in Unicode's order (related things are neighbours)
    category    concept -> one of CATEGORIES
    names       language -> concept -> name; five languages (lb mi mt tg xh) lack some
    pictures    uint8[P, 64, 64, 3], RGB on white, each drawing scaled to touch a margin of 4 pixels
    cells       cells[p] = (concept, artist) of pictures[p]
    phrases     language -> {"yes", "no", "or2", "or3", "labels", "autonym"}; a key is missing where CLDR has no text
    """

    concepts: tuple[str, ...]
    category: dict[str, str]
    names: dict[str, dict[str, str]]
    pictures: np.ndarray
    cells: list[tuple[str, str]]
    phrases: dict[str, dict]
    root: Path = field(default=ROOT, repr=False)

    @property
    def langs(self) -> tuple[str, ...]:
        """The 85 language codes, mBLIP's spelling (iw, fil, no), sorted."""
        return tuple(self.names)

    @cached_property
    def keywords(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Language -> concept -> keywords; read at first use, because a caption run never needs the 13 MB of text."""
        keywords = {}
        wanted = set(self.concepts)
        for lang, concept, words in _rows("keywords.tsv.xz", 3, self.root, read_sums(self.root)):
            if concept in wanted:
                keywords.setdefault(lang, {})[concept] = tuple(words.split("|"))
        return keywords

    def cells_in(self, split: str, artists: tuple[str, ...] | None = None) -> list[int]:
        """Return the indices of the pictures in a split ("train", "val", "test", "artist"), of some artists or all."""
        assert split in ("train", "val", "test", "artist"), split
        return [
            p
            for p, (concept, artist) in enumerate(self.cells)
            if picture_split(concept, artist) == split and (artists is None or artist in artists)
        ]


def load_emoji(concepts: str = "core", root: str | Path | None = None) -> Emoji:
    """Load the data set: `core` is what all eight training artists drew, `all` every concrete concept (849).

    Raises FileNotFoundError for a missing and ValueError for a damaged file, one line that says how to restore it.
    """
    if concepts not in ("core", "all"):
        raise ValueError(f"concepts must be 'core' or 'all', not {concepts!r}")
    root = Path(root) if root is not None else ROOT
    sums = read_sums(root)

    table = list(_rows("concepts.tsv", 5, root, sums))  # concept, English name, category, core, artists
    category = {c: group for c, _, group, core, _ in table if concepts == "all" or core == "1"}
    names = {}
    for lang, concept, name in _rows("names.tsv.xz", 3, root, sums):
        of_lang = names.setdefault(lang, {})
        if concept in category:
            of_lang[concept] = name
    phrases = _parse("phrases.json", json.loads, root, sums)

    wanted = {}  # artist -> [(cell, concept)]
    for artist, cell, concept, _ in _rows("pictures.tsv", 4, root, sums):
        if not cell.isdecimal() or artist not in TRAIN_ARTISTS + TEST_ARTISTS:
            raise ValueError(f"{root / 'pictures.tsv'} has no cell {cell!r} by {artist!r} to offer; {_RESTORE}")
        if concept in category:
            wanted.setdefault(artist, []).append((int(cell), concept))
    cells = [(concept, artist) for artist, of_artist in wanted.items() for _, concept in of_artist]

    def pictures_of(artist: str) -> np.ndarray:
        indices = [cell for cell, _ in wanted[artist]]
        return _parse(f"sheets/{artist}.webp", lambda data: _cut(data, indices), root, sums)

    with ThreadPoolExecutor() as pool:  # decoding is most of the loading time, and leaves Python's lock free
        pictures = np.concatenate(list(pool.map(pictures_of, wanted)))
    return Emoji(tuple(category), category, names, pictures, cells, phrases, root)


def load_names(root: str | Path | None = None) -> dict[str, dict[str, str]]:
    """Load all names, also those of emoji that are no concept here: language -> emoji -> name."""
    root = Path(root) if root is not None else ROOT
    names = {}
    for lang, concept, name in _rows("names.tsv.xz", 3, root, read_sums(root)):
        names.setdefault(lang, {})[concept] = name
    return names


def load_udhr(root: str | Path | None = None) -> dict[str, list[str]]:
    """Load the Universal Declaration of Human Rights: language -> paragraphs, running text for a language model."""
    root = Path(root) if root is not None else ROOT
    text = {}
    for lang, paragraph in _rows("udhr.tsv.xz", 2, root, read_sums(root)):
        text.setdefault(lang, []).append(paragraph)
    return text


# Pairs of things that differ in their side only: arrows, pointing hands, magnifying glasses.
MIRRORED = (("2b05", "27a1"), ("1f448", "1f449"), ("1f50d", "1f50e"))


@cache
def side_words(root: str | Path | None = None) -> frozenset[str]:
    """Words for left and right in 85 languages, lower-case: what the names of two mirrored things do not share.

    Where a language writes no spaces, single characters or their shortest differing string ("左", "ซ้าย").
    """
    root = Path(root) if root is not None else ROOT
    found = set()
    for of_lang in load_names(root).values():
        for left, right in MIRRORED:
            a, b = of_lang.get(left, "").casefold(), of_lang.get(right, "").casefold()
            if a == b or not a or not b:
                continue
            if " " in a and " " in b:
                found |= set(a.split()) ^ set(b.split())
            else:
                start = len(os.path.commonprefix([a, b]))
                end = len(os.path.commonprefix([a[start:][::-1], b[start:][::-1]]))
                found |= {a[start : len(a) - end], b[start : len(b) - end]}
    return frozenset(word.strip() for word in found if len(word) > 2 or not word.isascii())


# ---- reading files: everything that can be wrong with one becomes a single clear error -------------------------------

_RESTORE = "restore it with `git checkout data/` or rebuild it with `python data/build_emoji.py`"


def read_sums(root: Path) -> dict[str, str]:
    """Read SHA256SUMS (the format of the `sha256sum` command): file name -> hex digest."""
    path = root / "SHA256SUMS"
    try:
        return {name: digest for digest, name in (line.split("  ") for line in _read(path).decode().splitlines())}
    except ValueError:  # a line of another form, or bytes that are not UTF-8
        raise ValueError(f"{path} is damaged; {_RESTORE}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; {_RESTORE}") from None
    except OSError as error:  # a folder, no permission, a bad disk
        raise ValueError(f"{path} cannot be read ({error.strerror}); {_RESTORE}") from None


def _parse(name: str, parse, root: Path, sums: dict[str, str]):
    """Read a file, check its sha256 and return parse(bytes)."""
    path = root / name
    data = _read(path)
    # The sum is checked first: all 8.6 MB take about 25 ms, and no decoder has to be trusted with a broken file.
    if hashlib.sha256(data).hexdigest() != sums.get(name):
        raise ValueError(f"{path} is damaged (its sha256 is not the one in SHA256SUMS); {_RESTORE}")
    try:
        return parse(data)
    except (ValueError, IndexError, lzma.LZMAError, EOFError, OSError) as error:
        # The sum was right, so the file was made wrong: by an edit, or by a change to build_emoji.py.
        raise ValueError(f"{path} cannot be read ({error}); {_RESTORE}") from None


def _rows(name: str, columns: int, root: Path, sums: dict[str, str]) -> list[list[str]]:
    """Read a table of tab-separated lines, unpacking .xz, and check that every line has `columns` fields."""

    def parse(data: bytes) -> list[list[str]]:
        text = (lzma.decompress(data) if name.endswith(".xz") else data).decode()
        rows = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
        for number, row in enumerate(rows, 1):
            if len(row) != columns or not all(row):
                raise ValueError(f"line {number} does not have {columns} fields")
        return rows

    return _parse(name, parse, root, sums)


def _cut(data: bytes, cells: list[int]) -> np.ndarray:
    """Decode a sheet and cut out some of its cells: uint8[len(cells), 64, 64, 3]."""
    sheet = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    height, width, _ = sheet.shape
    grid = sheet.reshape(height // CELL, CELL, width // CELL, CELL, 3).swapaxes(1, 2).reshape(-1, CELL, CELL, 3)
    return grid[cells]  # an index too large is an IndexError
