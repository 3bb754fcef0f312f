"""The embedded data: counts, splits, the loader's errors, and the files' sums."""

import hashlib
import lzma
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from nanomblip.data.emoji import (
    CATEGORIES,
    HAND,
    HELD_OUT_LANGS,
    ROOT,
    TEST_ARTISTS,
    TRAIN_ARTISTS,
    load_emoji,  # fmt: skip
    load_udhr,
    pair_split,
    picture_split,
    read_sums,
    unit_hash,
)


@pytest.fixture(scope="module")
def core():
    return load_emoji("core")


@pytest.fixture(scope="module")
def everything():
    return load_emoji("all")


@pytest.fixture
def copy(tmp_path):
    """A copy of the data folder that a test may damage."""
    shutil.copytree(ROOT, tmp_path / "data")
    return tmp_path / "data"


def refresh_sum(root, name):
    """Make SHA256SUMS agree with a file again, so that the damage reaches the parser behind the check."""
    digest = hashlib.sha256((root / name).read_bytes()).hexdigest()
    sums = read_sums(root) | {name: digest}
    (root / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))


# ---- what is there


def test_counts(core, everything):
    assert (len(everything.concepts), everything.pictures.shape) == (849, (6906, 64, 64, 3))
    assert (len(core.concepts), core.pictures.shape) == (519, (4952, 64, 64, 3))
    assert sum(map(len, everything.names.values())) == 71310
    assert Counter(artist for _, artist in everything.cells) == {
        "noto": 849, "noto-v1": 648, "twemoji": 849, "fluent-3d": 845, "fluent-flat": 845, "emojitwo": 650,
        "emojione-v1": 556, "fxemoji": 523, "openmoji": 849, "streamline": 292}  # fmt: skip


def test_core_is_what_every_training_artist_drew(core, everything):
    artists = {}
    for concept, artist in everything.cells:
        artists.setdefault(concept, set()).add(artist)
    assert core.concepts == tuple(c for c in everything.concepts if artists[c] >= set(TRAIN_ARTISTS))


def test_languages_and_names(everything):
    assert len(everything.langs) == 85 and {"iw", "fil", "no"} <= set(everything.langs)
    assert not {"he", "tl", "nb", "ceb", "ht", "yi"} & set(everything.langs)
    partial = {lang for lang, names in everything.names.items() if len(names) < 849}
    assert partial == {"lb", "mi", "mt", "tg", "xh"}
    for names in everything.names.values():
        assert all(name and name == " ".join(name.split()) for name in names.values())
    cat = {"en": "cat", "sw": "paka", "de": "Katze", "ja": "ネコ", "ru": "кошка", "iw": "חתול"}
    assert {lang: everything.names[lang]["1f408"] for lang in cat} == cat
    assert not any("," in name for names in everything.names.values() for c, name in names.items()
                   if "," not in everything.names["en"][c])


def test_categories(everything):
    assert set(everything.category) == set(everything.concepts)
    assert set(everything.category.values()) == set(CATEGORIES)
    assert everything.category["1f408"] == "Animals & Nature"


def test_keywords_and_phrases(everything):
    assert len(everything.keywords) == 85 and "paka" in everything.keywords["sw"]["1f408"]
    assert all(word for of_lang in everything.keywords.values() for words in of_lang.values() for word in words)
    swahili = everything.phrases["sw"]
    assert (swahili["yes"], swahili["no"]) == ("Ndiyo", "Hapana")
    assert swahili["or3"].format("a", "b", "c") == "a, b au c"
    assert set(everything.phrases) == set(everything.langs)
    for key, count in {"yes": 82, "no": 82, "or2": 80, "or3": 80, "labels": 81, "autonym": 85}.items():
        assert sum(key in phrases for phrases in everything.phrases.values()) == count
    for phrases in everything.phrases.values():
        if "or3" in phrases:
            assert all(phrases["or3"].count(slot) == 1 for slot in ("{0}", "{1}", "{2}"))


def test_udhr():
    text = load_udhr()
    assert len(text) == 95 and "sd" not in text and min(map(len, text.values())) >= 60
    assert any(p.startswith("All human beings are born free and equal") for p in text["en"])
    assert not any("<" in p or "&amp;" in p for paragraphs in text.values() for p in paragraphs)


def test_pictures_are_not_blank_and_keep_their_margin(everything):
    spread = everything.pictures.reshape(len(everything.cells), -1).std(axis=1)
    assert spread.min() > 6  # Fluent 3D's fog, the palest, has 8
    distance = 255 - everything.pictures.astype(int)
    edge = np.concatenate([distance[:, :2].reshape(-1), distance[:, -2:].reshape(-1)])
    assert edge.mean() < 1  # nothing but the ringing of a lossy file
    # every drawing touches the margin on its longer side
    used = (distance.max(axis=3) > 60)
    height, width = (np.array([np.ptp(np.flatnonzero(u.any(axis=axis))) + 1 if u.any() else 0 for u in used]) for axis in (1, 0))
    assert np.mean(np.maximum(height, width) >= 50) > 0.95 and np.maximum(height, width).max() <= 58


def test_cells_are_aligned(core, everything):
    """The same cell must hold the same picture in both vocabularies, though they index the sheets differently."""
    where = {cell: p for p, cell in enumerate(everything.cells)}
    assert len(where) == len(everything.cells)
    for p, cell in list(enumerate(core.cells))[::97]:
        assert np.array_equal(core.pictures[p], everything.pictures[where[cell]])


@pytest.mark.parametrize("name,cell", {"cat": ("1f408", "noto"), "wolf": ("1f43a", "twemoji")}.items())
def test_examples_are_held_out(core, name, cell):
    assert picture_split(*cell) == "test" and core.names["en"][cell[0]] == name
    example = Image.open(ROOT / f"{name}.png")
    assert (example.size, example.mode) == ((256, 256), "RGB")
    small = np.asarray(example.resize((64, 64), Image.Resampling.BOX)).astype(int)
    assert np.abs(small - core.pictures[core.cells.index(cell)]).mean() < 6


# ---- splits


def test_hash_never_changes():
    assert (unit_hash("a"), unit_hash("a", "b"), unit_hash("ab")) == (0.6994727585232108, 0.029571936055955095, 0.4950920906600631)
    assert all(0 <= unit_hash(str(n)) < 1 for n in range(1000))


def test_picture_splits(everything):
    count = Counter(picture_split(*cell) for cell in everything.cells)
    trained = len(everything.cells) - count["artist"]
    assert count["artist"] == 849 + 292
    assert abs(count["test"] / trained - 0.10) < 0.015 and abs(count["val"] / trained - 0.03) < 0.01
    splits = [everything.cells_in(split) for split in ("train", "val", "test", "artist")]
    assert sorted(sum(splits, [])) == list(range(len(everything.cells)))  # together all, none twice
    assert {everything.cells[p][1] for p in splits[3]} == set(TEST_ARTISTS)
    noto = everything.cells_in("test", ("noto",))
    assert noto and {everything.cells[p][1] for p in noto} == {"noto"}
    assert all(picture_split(c, "fluent-3d") == picture_split(c, "fluent-flat") for c in everything.concepts)
    assert set(HAND) == {"fluent-3d", "fluent-flat"}
    with pytest.raises(ValueError, match="unknown artist"):
        picture_split("1f408", "apple")


def test_pair_splits(everything):
    for lang, names in everything.names.items():
        count = Counter(pair_split(lang, concept) for concept in names)
        if lang == "en":
            assert count == {"train": 849}
        else:
            assert abs(count["test"] / len(names) - 0.15) < 0.05 and abs(count["val"] / len(names) - 0.03) < 0.03
    every = Counter(pair_split(lang, c) for lang, names in everything.names.items() if lang != "en" for c in names)
    assert abs(every["test"] / every.total() - 0.15) < 0.005 and abs(every["val"] / every.total() - 0.03) < 0.003
    assert set(HELD_OUT_LANGS) <= set(everything.langs) and len(HELD_OUT_LANGS) == 8


# ---- damaged files: one line that names the file and the way out


FILES = ("SHA256SUMS", "concepts.tsv", "names.tsv.xz", "phrases.json", "pictures.tsv", "sheets/noto.webp")


@pytest.mark.parametrize("name, damage", [
    *((name, damage) for name in FILES for damage in ("missing", "truncated")),
    ("names.tsv.xz", "flipped"), ("sheets/noto.webp", "flipped"), ("SHA256SUMS", "flipped"),
    ("SHA256SUMS", "empty"), ("names.tsv.xz", "empty"), ("names.tsv.xz", "folder"),
])  # fmt: skip
def test_damaged_file(copy, name, damage):
    path = copy / name
    data = path.read_bytes()
    path.unlink()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif damage == "folder":
        path.mkdir()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_emoji(root=copy)
    message = str(caught.value)
    assert "\n" not in message and "git checkout data/" in message and "data/build_emoji.py" in message
    # a wrong sum makes another file look damaged: the reader is then sent to restore the whole folder
    assert name in message or name == "SHA256SUMS"


@pytest.mark.parametrize("name, data", [
    ("names.tsv.xz", lzma.compress("en\t1f408\n".encode())),  # a field short
    ("names.tsv.xz", lzma.compress("en\t1f408\t\n".encode())),  # an empty name
    ("names.tsv.xz", lzma.compress(b"en\t1f408\t\xff\n")),  # not UTF-8
    ("names.tsv.xz", b"en\t1f408\tcat\n"),  # not packed
    ("pictures.tsv", b"noto\t9999\t1f408\tcat\n"),  # no such cell
    ("pictures.tsv", b"noto\t-1\t1f408\tcat\n"),
    ("pictures.tsv", b"noto\tone\t1f408\tcat\n"),
    ("pictures.tsv", b"nobody\t1\t1f408\tcat\n"),
    ("phrases.json", b"{"),
    ("sheets/twemoji.webp", b"RIFF"),
])  # fmt: skip
def test_wrong_content_with_the_right_sum(copy, name, data):
    (copy / name).write_bytes(data)
    refresh_sum(copy, name)
    with pytest.raises(ValueError, match="git checkout data/") as caught:
        load_emoji(root=copy)
    assert "\n" not in str(caught.value)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="'core' or 'all'"):
        load_emoji("some")
    with pytest.raises(FileNotFoundError, match="SHA256SUMS is missing"):
        load_emoji(root="no/such/folder")


def test_sums_match():
    for name, digest in read_sums(ROOT).items():
        assert hashlib.sha256((ROOT / name).read_bytes()).hexdigest() == digest, name
    assert len(read_sums(ROOT)) == 18
