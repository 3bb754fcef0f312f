"""The paper's own data: a shuffled, endless stream of examples from JSON files in the released format (json_index.py).

As in mixture.py, which example comes when is a pure function of (seed, epoch, index); the order of an epoch is a
permutation that is computed place by place (`shuffled`) and never stored.

A picture that is missing or damaged is never replaced by a black one, as in the original: another example takes
its place, and what went wrong is written to a file and summed up at the end of the run.
"""

import hashlib
import json
import os
import random
import re
import unicodedata
from functools import cache
from pathlib import Path

import torch

from nanomblip.data.decode import EXTENSIONS, ImageError, load_image
from nanomblip.data.emoji import side_words
from nanomblip.data.image import ImageConfig, augment_image
from nanomblip.data.json_index import JsonExamples, MixtureError
from nanomblip.data.mixture import Batches, Example
from nanomblip.data.prompts import CAPTION, CAPTION_UNNAMED
from nanomblip.data.tokenizer import Tokenizer, pad_rows
from nanomblip.weights.files import read_json, write_json


def shuffled(i: int, n: int, key: str) -> int:
    """Place i of a pseudo-random permutation of 0..n-1, computed alone: no table, no memory.

    A Feistel network (Luby & Rackoff 1988) permutes the numbers of an even number of bits: halves (l, r) become
    (r, l ^ hash(r)), which can be undone whatever the hash is. Results of n and more are fed in again until one falls
    below n.
    """
    assert 0 <= i < n
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for turn in range(4):
            digest = hashlib.blake2b(f"{key}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        i = left << half | right
        if i < n:
            return i


def parse_mixture(spec: str) -> list[tuple[str, float | None]]:
    """The files and weights of `--mixture FILE[:weight][,FILE[:weight]...]`; None where no weight is given."""
    files = []
    for item in spec.split(","):
        path, colon, number = item.strip().rpartition(":")
        try:
            weight = float(number) if colon else None
        except ValueError:  # the colon belongs to the name
            weight = None
        path = item.strip() if weight is None else path
        if not path:
            raise ValueError(f"--mixture {spec!r}: a file is missing; give FILE or FILE:weight, separated by commas")
        if weight is not None and not 0 < weight < float("inf"):
            raise ValueError(f"--mixture {spec!r}: the weight of {path} must be a positive number")
        files.append((path, weight))
    return files


@cache
def _caption_pattern():
    named = [re.escape(template).replace(r"\{L\}", "[^.:]{2,40}") for template in CAPTION]
    return re.compile("|".join([*named, *map(re.escape, CAPTION_UNNAMED)]))


# Thai, Lao, Burmese, Khmer, kana, Han
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u4e00-\u9fff]")


@cache
def _sides() -> tuple[frozenset[str], tuple[str, ...]]:
    """Stems of words for left and right, and those of scripts that write no spaces."""
    words = side_words()
    return frozenset(w[:-1] if len(w) > 4 else w for w in words if not UNSPACED.search(w)), tuple(
        w for w in words if UNSPACED.search(w)
    )


def speaks_of_sides(text: str) -> bool:
    """Does a text say left or right, in one of 85 languages?

    By stems, so rather once too often; but what no name of an arrow has, such as Russian "слева", goes unnoticed.
    """
    (stems, strings), text = _sides(), text.casefold()
    tokens = re.findall(r"[^\s.,;:!?'’\"()-]+", text)
    return any(token in stems or any(token[:n] in stems for n in range(4, len(token))) for token in tokens) or any(
        s in text for s in strings
    )


def may_mirror(context: str, label: str) -> bool:
    """May the picture be mirrored? Only where a caption is asked for in the paper's words and speaks of no side.

    The released format does not say what task an example is of. A question, a match or a long description stays as
    it is, and so does a caption prompt that was itself translated: its wording is not known.
    """
    return bool(_caption_pattern().fullmatch(context)) and not speaks_of_sides(label)


def keep_identity(files: list[JsonExamples], path: Path) -> None:
    """Write down which files a run is made of; MixtureError when `path`, of the run's beginning, names others."""
    mine = [file.contents() for file in files]
    if not Path(path).exists():
        write_json(path, mine)
    elif read_json(path) != mine:
        names = ", ".join(str(file.path) for file in files)
        raise MixtureError(f"{names}: changed since the run began ({path}); start a new run")


class JsonMixture:
    """An endless stream of examples from one or more mixture files, `example(index)` as in mixture.Mixture.

    sources: [(path, weight or None)]. Without weights the files are one long list, as in the paper, and every epoch
    shows each example once. With weights each block of BLOCK examples holds the files in exactly these shares (to
    1 / BLOCK), each file being gone through in its own shuffled order, again and again.
    """

    BLOCK = 1000

    def __init__(self, sources: list[tuple[str, float | None]], seed: int, progress=None):
        self.files = [JsonExamples(path, progress) for path, _ in sources]
        self.seed = seed
        for file in self.files:
            if not len(file):
                raise MixtureError(f"--mixture {file.path}: holds no example")
        weights = [weight for _, weight in sources]
        if all(weight is None for weight in weights):
            self.parts = [(list(range(len(self.files))), self.BLOCK)]  # (files, examples a block): one part
        else:
            total = sum(weight or 1.0 for weight in weights)
            exact = [(weight or 1.0) / total * self.BLOCK for weight in weights]
            counts = [int(x) for x in exact]
            for k in sorted(range(len(exact)), key=lambda k: counts[k] - exact[k])[: self.BLOCK - sum(counts)]:
                counts[k] += 1  # largest remainders
            if min(counts) == 0:
                raise ValueError(
                    f"--mixture: {self.files[counts.index(0)].path} would get less than one example in {self.BLOCK}"
                )
            self.parts = [([k], count) for k, count in enumerate(counts)]

    def __len__(self) -> int:
        """Examples in all files."""
        return sum(map(len, self.files))

    def shares(self) -> list[float]:
        """The share of each file in the stream."""
        if len(self.parts) == 1:
            return [len(file) / len(self) for file in self.files]
        return [count / self.BLOCK for _, count in self.parts]

    def example(self, index: int, attempt: int = 0) -> Example:
        """Example number `index` (0, 1, 2 ...); attempt 1, 2, ... take its place when its picture is unusable.

        `picture` is the row in the list of all files; `task` is "caption" where the picture may be mirrored, else
        "other".
        """
        key = f"{self.seed}/{index}" if not attempt else f"{self.seed}/{index}/{attempt}"
        block, place = divmod(index, self.BLOCK)
        place = shuffled(place, self.BLOCK, f"{self.seed}/block/{block}")
        for files, count in self.parts:
            if place < count:
                break
            place -= count
        number, size = block * count + place, sum(len(self.files[k]) for k in files)  # the number-th of this part
        epoch, i = divmod(number, size)
        row = shuffled(i, size, f"{self.seed}/{epoch}/{files}")
        if attempt:
            row = random.Random(key).randrange(size)
        first = sum(map(len, self.files[: files[0]]))
        return self.at(first + row, key)

    def at(self, row: int, key: str = "") -> Example:
        """The example in a row of the list of all files."""
        context, label, _ = self._fields(row)
        return Example(row, "", "caption" if may_mirror(context, label) else "other", context, label, key)

    def image_id(self, row: int) -> str:
        return self._fields(row)[2]

    def _fields(self, row: int) -> tuple[str, str, str]:
        for file in self.files:
            if row < len(file):
                return file[row]
            row -= len(file)
        raise IndexError(row)


def is_relative_name(name: str, windows: bool = os.name == "nt") -> bool:
    """Whether a stranger's name can be joined to a folder: no absolute path, no "..", nothing that is no text.

    What else a name may hold is up to the file system: all on Linux and macOS, where screenshots are called
    "... 10:15\\u202fAM.png". On Windows a colon begins a stream or ends a drive, a backslash is a slash, and dots and
    spaces at the end do not count.
    """
    parts = name.split("/")
    if len(name) > 4096 or re.search("[\0\ud800-\udfff]", name) or any(part in ("", ".", "..") for part in parts):
        return False
    return not windows or not (
        set(name) & {*'\\:*?"<>|', *map(chr, range(32))} or any(part != part.rstrip(". ") for part in parts)
    )


def spelling(folder: Path, name: str) -> Path:
    """folder / name, with accents as the folder has them: JSON says "é" in one character, files from a Mac in two."""
    paths = [folder / form for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))]
    return next(filter(os.path.lexists, paths), paths[0])


def image_path(root: Path, image_id: str) -> Path:
    """The picture file that an image_id names, inside root; ImageError for one that would leave it or does not exist.

    No "..", no absolute path and no symbolic link that leads outside. Where the name has no extension of a picture,
    ".jpg" is added, as in the original, unless only the name as it stands is there. Letter case counts.
    """
    shown = repr(image_id if len(image_id) <= 80 else image_id[:80] + "...")
    if not is_relative_name(image_id):
        raise ImageError(f"image_id {shown}: not a plain file name inside --image_root")
    *folders, name = image_id.split("/")
    folder = Path(root)
    for part in folders:
        folder = spelling(folder, part)
    names = [name] if Path(name).suffix.lower() in EXTENSIONS else [name + ".jpg", name]
    paths = [spelling(folder, name) for name in names]
    real, inside = os.path.realpath(next(filter(os.path.lexists, paths), paths[0])), os.path.realpath(root)
    if not Path(real).is_relative_to(inside):
        raise ImageError(f"image_id {shown}: leads outside --image_root by a symbolic link")
    if not os.path.isfile(real):
        raise ImageError(f"image_id {shown}: no such file in --image_root")
    return Path(real)


class JsonBatches(Batches):
    """Micro-batches of a JsonMixture, as `Batches` but with pictures from `root`.

    report: a file to which each unusable picture is added as a line "image_id <tab> what is wrong", by every process
    that meets it.
    """

    TRIES = 20

    def __init__(
        self,
        mixture: JsonMixture,
        tokenizer: Tokenizer,
        image: ImageConfig,
        batch: int,
        root: Path | str,
        report: Path | str,
        pool: int = 32,
        crop: float = 0.5,
        rank: int = 0,
        world: int = 1,
    ):
        super().__init__(mixture, tokenizer, image, batch, 0, pool, crop, rank, world)
        self.root, self.report, self.bad = Path(root), Path(report), set()
        if not self.root.is_dir():
            raise ValueError(f"--image_root {root}: no such folder")

    def __getitem__(self, m: int) -> dict[str, torch.Tensor]:
        number, i = divmod(m * self.world + self.rank, self.pool)
        rows, pictures = [], []
        for example, prompt, target in self.pool_of(number)[i]:
            for attempt in range(self.TRIES):
                if attempt:
                    example = self.mixture.example(int(example.key.split("/")[1]), attempt)
                    prompt, target = self.tokenizer.encode(example.prompt), self.tokenizer.encode(example.target)
                try:
                    pictures.append(self.augmented(example.picture, random.Random(f"{example.key}/view"), example.task))
                    rows.append((example, prompt, target))
                    break
                except ImageError as error:
                    self.note(self.mixture.image_id(example.picture), str(error))
            else:
                raise ValueError(f"--image_root {self.root}: {self.TRIES} examples in a row have no usable picture, "
                                 f"the last: {error_of(self.report)}")  # fmt: skip
        return dict(
            picture=torch.tensor([example.picture for example, _, _ in rows]),
            prompt=pad_rows([prompt for _, prompt, _ in rows], self.tokenizer.pad),
            labels=pad_rows([target for _, _, target in rows], -100),
            image=torch.stack(pictures)[:, None],
        )

    def augmented(self, picture: int, rng: random.Random, task: str = "caption") -> torch.Tensor:
        img = load_image(image_path(self.root, self.mixture.image_id(picture)))
        return augment_image(img, self.image, rng, flip=task == "caption", area=self.crop)

    def note(self, image_id: str, problem: str) -> None:
        if image_id in self.bad:
            return
        self.bad.add(image_id)
        line = f"{json.dumps(image_id)}\t{' '.join(problem.split())}\n".encode()
        with open(self.report, "ab", buffering=0) as file:  # one short write: lines of several processes do not mix
            file.write(line)


def error_of(report: Path) -> str:
    """The last problem in a report."""
    return report.read_text(encoding="utf-8").splitlines()[-1].split("\t", 1)[1]


def unusable_pictures(report: Path, show: int = 10) -> str:
    """What a report says, for people: how many pictures could not be used, and the first of them; "" for none."""
    if not Path(report).exists():
        return ""
    problems = dict(
        line.split("\t", 1) for line in Path(report).read_text(encoding="utf-8").splitlines() if "\t" in line
    )
    count = f"{len(problems):,} picture{'s' * (len(problems) != 1)}"
    lines = [f"{count} could not be used; other examples took their place (all of them: {report})"]
    lines += [f"  {problem}" for problem in list(problems.values())[:show]]
    return "\n".join([*lines, *([f"  ... and {len(problems) - show:,} more"] if len(problems) > show else [])])
