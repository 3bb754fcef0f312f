"""Draw tens of thousands of English (picture, name) pairs for nano's BLIP-2 from open icon sets: `python weights/build_icons.py`.

BLIP-2 has seen 129 million pictures with English texts before mBLIP begins. The embedded data has 5,900 pictures, and what is trained on these
alone knows them by heart. Iconify's npm packages hold the icons of some 140 open families, each with an English name; where a name
is that of one of the 849 concepts, the icon is a further picture of it, and names that several sets share are classes of their own.

No icon is shipped, none is needed to use nano: only `make_nano.py blip2 --icons out/icons.npz` reads what this writes (nano's Q-Former was made with it). The
artists held out (OpenMoji, Streamline) are in none of the sets, and a set that draws a training artist's pictures once more in one colour
lends only pictures of which that artist's are trained on (AGAIN).

It needs the `npm` and `pip` clients, and takes about five minutes; the packages are pinned in icons.tsv, with their licences.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from build_emoji import RESVG, IconSet, fit, render_svg, squash  # noqa: E402

from nanomblip.data.emoji import CELL, Emoji, load_emoji, picture_split, unit_hash  # noqa: E402

# Words that say how something is drawn, not what.
STYLE = set(
    "outline outlined line linear fill filled solid bold duotone broken twotone round rounded sharp alt alternate light thin regular "
    "baseline two tone color mono bulk dual stroke glyph icon ios md ltr rtl o s l r b".split()
)
AGAIN = {"fluent-emoji-high-contrast": ("fluent-flat", "fluent-3d"), "emojione-monotone": ("emojitwo", "emojione-v1")}
SHARED = 8  # sets that must know a name before it becomes a class of its own
STYLES = 2  # drawings of one thing taken from one set, each in another style


def split_name(icon: str) -> tuple[str, str]:
    """Part an icon's name into what it shows and how: "dog-side-outline" -> ("dog side", "outline"). Numbers are left out."""
    words = [word for word in icon.split("-") if not word.isdigit()]
    what = list(words)
    while len(what) > 1 and what[-1] in STYLE:
        what.pop()
    while len(what) > 1 and what[0] in STYLE:
        what.pop(0)
    return " ".join(what), " ".join(word for word in words if word in STYLE)


def install(work: Path, packages: list[tuple[str, str]]) -> Path:
    """Install the pinned packages below `work`; nothing of them is executed."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "package.json").write_text('{"private": true}\n')
    names = [f"@iconify-json/{name}@{version}" for name, version in packages]
    subprocess.run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--save-exact", *names], cwd=work, check=True, stdout=sys.stderr)  # fmt: skip
    python = work / "python"
    if not list(python.glob(f"resvg_py-{RESVG[1]}.dist-info")):
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(python), f"{RESVG[0]}=={RESVG[1]}"], check=True, stdout=sys.stderr)  # fmt: skip
    sys.path.insert(0, str(python))
    return work / "node_modules" / "@iconify-json"


def held_out(emoji: Emoji) -> set[tuple[str, str]]:
    """(set, English name) of the pictures that AGAIN keeps from being drawn."""
    return {(name, emoji.names["en"][concept]) for name, artists in AGAIN.items() for concept in emoji.concepts
            if any(picture_split(concept, artist) != "train" for artist in artists)}  # fmt: skip


def choose(sets: dict[str, IconSet], concepts: dict[str, str], held: set[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """The icons to draw, as (set, icon, name): of each set up to STYLES for a name.

    concepts: squashed English name -> the name, where an icon of that name shows the concept. held: (set, name) not to be drawn.
    """
    found = {}  # squashed name -> set -> style -> icon
    spelled = {}
    for name, icons in sets.items():
        for icon in sorted(icons.data["icons"]):
            what, style = split_name(icon)
            key = squash(what)
            if key.endswith("s") and key not in concepts and key[:-1] in concepts:
                key = key[:-1]
            if len(key) > 2 and not re.search("[0-9]", key):
                spelled.setdefault(key, what)
                found.setdefault(key, {}).setdefault(name, {})[style] = icon
    rows = []
    for key, by_set in sorted(found.items()):
        if key in concepts or len(by_set) >= SHARED:
            label = concepts.get(key, spelled[key])
            for name, by_style in sorted(by_set.items()):
                if (name, label) not in held:
                    styles = sorted(by_style, key=lambda style: unit_hash("icons", name, key, style))[:STYLES]
                    rows += [(name, by_style[style], label) for style in styles]
    return rows


def colour(cells: np.ndarray, seed: int = 0) -> np.ndarray:
    """Colour half of the black drawings, as emoji are: uint8 (P, S, S, 3) on white -> the same shape.

    Ink gets one colour and what it encloses another; what white can be reached in from the edge stays white.
    """
    rng = np.random.default_rng(seed)
    out = cells.copy()
    for start in range(0, len(cells), 4096):
        part = cells[start : start + 4096].astype(np.float32) / 255
        ink = 1 - part.mean(3)  # (P, S, S)
        free = ink < 0.25
        outside = np.zeros_like(free)
        outside[:, 0] = outside[:, -1] = outside[:, :, 0] = outside[:, :, -1] = True
        while True:  # one pixel further in all four directions
            grown = outside.copy()
            grown[:, 1:] |= outside[:, :-1]
            grown[:, :-1] |= outside[:, 1:]
            grown[:, :, 1:] |= outside[:, :, :-1]
            grown[:, :, :-1] |= outside[:, :, 1:]
            grown &= free
            if (grown == outside).all():
                break
            outside = grown
        encloses = (free & ~outside).mean((1, 2)) > 0.1  # (P,)
        fill, line = rng.random((2, len(part), 1, 1, 3), np.float32)
        fill = 0.3 + 0.7 * fill
        line = np.where(encloses[:, None, None, None], 0.4, 0.9) * line
        base = np.where(outside[..., None], 1, fill)
        drawn = base * (1 - ink[..., None]) + line * ink[..., None]
        chosen = (np.ptp(part, axis=3).max((1, 2)) < 0.1) & (rng.random(len(part)) < 0.5)  # black ones only
        out[start : start + 4096][chosen] = (255 * drawn[chosen]).round().astype(np.uint8)
    return out


def main():
    parser = argparse.ArgumentParser(description="Draw English (picture, name) pairs for nano's BLIP-2 from open icon sets.")
    parser.add_argument("--work", type=Path, default=Path("out/icons"), help="folder for the packages")
    parser.add_argument("--out", type=Path, default=Path("out/icons.npz"), help="file to write")
    args = parser.parse_args()
    pinned = [line.split("\t") for line in (Path(__file__).parent / "icons.tsv").read_text().splitlines()]
    folder = install(args.work, [(name, version) for name, version, _ in pinned])
    sets = {name: IconSet(folder / name) for name, _, _ in pinned}

    emoji = load_emoji("all")
    english = emoji.names["en"]
    whole = {squash(name) for name in english.values()}
    # "cat" is an animal and "cat face" its face, and sets mean either: such a name is a class of its own.
    concepts = {squash(english[c]): english[c] for c in emoji.concepts if squash(english[c] + " face") not in whole}
    pictures, names = [], []
    for name, icon, label in choose(sets, concepts, held_out(emoji)):
        try:
            cell = np.asarray(fit(render_svg(sets[name].svg(icon, 2 * CELL)), CELL, 4))
        except (AssertionError, ValueError):  # empty, or no SVG that resvg can draw
            continue
        pictures.append(cell)
        names.append(label)
    np.savez_compressed(args.out, pictures=colour(np.stack(pictures)), names=np.array(names))
    known = len(set(names) & {english[c] for c in emoji.concepts})
    print(f"{len(names)} pictures of {len(set(names))} names, {known} of them concepts; {args.out}")


if __name__ == "__main__":
    main()
