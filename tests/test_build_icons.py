"""weights/build_icons.py: which icons are drawn under which names, and how they are coloured."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "weights"), str(ROOT / "data")]

import build_icons  # noqa: E402
from build_emoji import IconSet  # noqa: E402

from nanomblip.data.emoji import TEST_ARTISTS, TRAIN_ARTISTS, load_emoji, picture_split  # noqa: E402


@pytest.mark.parametrize(
    "icon, what, style",
    [
        ("dog-side-outline", "dog side", "outline"),
        ("outline-cat-24", "cat", "outline"),
        ("arrow-left-02", "arrow left", ""),
        ("bold", "bold", "bold"),  # a name that is a style alone stays one
    ],
)
def test_a_name_is_parted_into_what_and_how(icon, what, style):
    assert build_icons.split_name(icon) == (what, style)


def make_sets(folder: Path, sets: dict[str, list[str]]) -> dict[str, IconSet]:
    for name, icons in sets.items():
        (folder / name).mkdir()
        (folder / name / "icons.json").write_text(json.dumps(dict(icons={icon: dict(body="") for icon in icons})))
    return {name: IconSet(folder / name) for name in sets}


def test_icons_get_the_name_of_a_concept_or_one_that_enough_sets_share(tmp_path):
    sets = {f"set{i}": ["zip-file-bold", "zip-file", "zip-file-line"] for i in range(build_icons.SHARED)}
    sets["set0"] += ["honey-bee-outline", "bees", "rare-thing", "cat3"]
    rows = build_icons.choose(make_sets(tmp_path, sets), {"honeybee": "honeybee", "bee": "bee"}, {("set1", "zip file")})
    by_name = {name: [(s, icon) for s, icon, label in rows if label == name] for name in {label for _, _, label in rows}}
    assert set(by_name) == {"honeybee", "bee", "zip file"}  # nothing that one set alone has, and no numbers
    assert by_name["honeybee"] == [("set0", "honey-bee-outline")] and by_name["bee"] == [("set0", "bees")]
    assert len(by_name["zip file"]) == build_icons.STYLES * (build_icons.SHARED - 1)  # without what is held out


def test_half_of_the_black_drawings_are_coloured_inside_and_not_outside():
    ring = np.full((64, 64, 3), 255, np.uint8)
    ring[10:54, 10:54] = 0
    ring[14:50, 14:50] = 255
    blue = np.full((64, 64, 3), 255, np.uint8)
    blue[20:40, 20:40] = (0, 0, 255)
    cells = np.stack([ring] * 60 + [blue] * 4)
    out = build_icons.colour(cells)
    changed = (out != cells).any((1, 2, 3))
    assert 15 < changed[:60].sum() < 45 and not changed[60:].any()
    assert (out[:60, :10] == 255).all() and (out[:60, :, 54:] == 255).all()  # outside
    inside = out[:60, 14:50, 14:50][changed[:60]]
    assert (inside == inside[:, :1, :1]).all() and len(np.unique(inside[:, 0, 0], axis=0)) > 10
    assert (build_icons.colour(cells) == out).all()


def test_no_set_holds_an_artist_and_all_licences_are_open():
    rows = [line.split("\t") for line in (ROOT / "weights" / "icons.tsv").read_text().splitlines()]
    names = {name for name, _, _ in rows}
    assert len(rows) == len(names) > 100
    assert not any(name.startswith(("openmoji", "streamline")) for name in names)
    assert not names & {"noto", "noto-v1", "twemoji", "fluent-emoji", "fluent-emoji-flat", "emojione", "emojione-v1", "fxemoji"}
    assert {licence for _, _, licence in rows} <= {"MIT", "Apache-2.0", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "OFL-1.1", "ISC", "Unlicense"}


def test_what_draws_a_training_artist_again_is_held_out_with_it():
    emoji = load_emoji("all")
    held = build_icons.held_out(emoji)
    english = emoji.names["en"]
    for name, artists in build_icons.AGAIN.items():
        assert set(artists) <= set(TRAIN_ARTISTS) and not set(artists) & set(TEST_ARTISTS)
        for concept in emoji.concepts:
            trained = all(picture_split(concept, artist) == "train" for artist in artists)
            assert ((name, english[concept]) in held) == (not trained)
