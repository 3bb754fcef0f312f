"""Data sets' own files for builders.py: their rows one by one, checked, and which of their pictures may be used."""

import re
from collections import Counter
from pathlib import Path

from nanomblip.data.json_index import read_array


def clean(text: str) -> str:
    """One line, single spaces, as mT5's tokenizer reads it."""
    return " ".join(text.split())


def rows(path: str, fields: dict[str, type], what: str, key: str | None = None):
    """The objects of a JSON array in a file, one by one, each with these fields; MixtureError naming the file for
    anything else."""
    named = ", ".join(fields)

    def check(row) -> str | None:
        if not isinstance(row, dict):
            return f"not an object with {named}, as {what} has"
        for name, kind in fields.items():
            if not isinstance(row.get(name), kind) or isinstance(row[name], bool):
                problem = "missing" if name not in row else f"not of type {kind.__name__}"
                return f"{name!r} is {problem}; {what} has {named}"
        return None

    for _, row in read_array(Path(path), check, key, what=f"row of {what}"):
        if row is not None:
            yield row


def expect(good: bool, path: str, problem: str, what: str) -> None:
    if not good:
        raise ValueError(f"{path}: {problem}; {what} was expected")


def picture_keys(text: str) -> set[str]:
    """What may be names of pictures in a text: runs of six or more letters and digits with a digit, without leading
    zeros."""
    found = re.findall(r"[0-9A-Za-z]{6,}", text)
    return {key.lstrip("0").lower() for key in found if any(map(str.isdigit, key))}


class Pictures:
    """Which pictures may be used: those of Karpathy's train split, none of an evaluation set."""

    def __init__(self, exclude, karpathy: str | None = None):
        self.excluded = set()
        for path in exclude:
            with open(path, encoding="utf-8") as file:
                while block := file.read(1 << 20):
                    self.excluded |= picture_keys(block + file.readline())
        self.coco, self.left_out, self.addresses = {}, Counter(), None
        if karpathy is not None:
            what = "Karpathy's dataset_coco.json"
            fields = dict(filename=str, split=str, cocoid=int, sentences=list)
            for row in rows(karpathy, fields, what, "images"):
                if row["split"] == "train":
                    self.coco[row["cocoid"]] = row["filename"]
            expect(bool(self.coco), karpathy, "no picture of the split 'train'", what)

    def usable(self, name: str) -> bool:
        if self.excluded and picture_keys(name) & self.excluded:
            self.left_out["picture of an --exclude file"] += 1
            return False
        return True

    def of_coco(self, number: int) -> str | None:
        """The file name of a COCO picture of Karpathy's train split, None for any other."""
        name = self.coco.get(number)
        if name is None:
            self.left_out["picture not in Karpathy's train split"] += 1
        return name if name is not None and self.usable(name) else None
