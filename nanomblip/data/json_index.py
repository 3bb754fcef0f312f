"""The paper's own data: JSON files of millions of examples, read at random without loading them.

A mixture in the released format (Gregor/mblip-train) is one JSON array of objects {context, label, image_id}: a whole
prompt, the text to write, and the file name of a picture. Five million of them are a gigabyte, and more than ten once
they are Python objects, in every loader worker again. So the file is read once from front to back (`build_index`),
each object is checked, and the place where it starts goes to a sidecar, `FILE.index`, as 8 bytes. From then on example
n is one read of a few hundred bytes, and opening takes the same time however long the file is.

    FILE.index = 4096 bytes (JSON: size, time and hash of head and tail of FILE, number of examples)
                 + uint64 (count + 1,) offsets

The sidecar is made again when FILE changes.
"""

import codecs
import hashlib
import json
import os
import re
from itertools import islice
from pathlib import Path

import numpy as np

from nanomblip.weights.files import write_atomic

CHUNK = 1 << 20  # characters or bytes read at a time
LONGEST = 1 << 20  # characters of one example; more is damage, not an example
HEAD = 4096  # bytes of the sidecar before the offsets
FIELDS = ("context", "label", "image_id")
DECODE, BLANK = json.JSONDecoder().raw_decode, re.compile(r"[ \t\n\r]*")


class MixtureError(ValueError):
    """A mixture file that cannot be used; the message names the file and the byte."""


def fingerprint(path: Path) -> dict:
    """What changes when a file does: size, time, and the sha256 of its first and last megabyte."""
    info = os.stat(path)
    with open(path, "rb") as file:
        head = file.read(1 << 20)
        file.seek(max(0, info.st_size - (1 << 20)))
        tail = file.read()
    return dict(
        size=info.st_size,
        mtime_ns=info.st_mtime_ns,
        head=hashlib.sha256(head).hexdigest(),
        tail=hashlib.sha256(tail).hexdigest(),
    )


def check_example(row) -> str | None:
    """What is wrong with a parsed example, None if nothing."""
    if not isinstance(row, dict):
        return "not an object {...}"
    for name in FIELDS:
        if not isinstance(row.get(name), str):
            return f"{name!r} is {'missing' if name not in row else 'not a text'}"
        try:
            row[name].encode()
        except UnicodeEncodeError:  # "\ud800" is allowed by JSON and cannot be written anywhere
            return f"{name!r} holds half a surrogate pair"
    return None


class _Cursor:
    """A place in a long JSON text that is read a few CHUNKs at a time; `place` is the byte of the file at which
    text[at] stands."""

    def __init__(self, path: Path, file):
        self.path, self.file = path, file
        self.place = 3 if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(self.place)
        self.text, self.at, self.ended, self.utf8 = "", 0, False, codecs.getincrementaldecoder("utf-8")()

    def fail(self, problem: str, position: int | None = None):
        there = self.place + len(self.text[self.at : self.at if position is None else position].encode())
        raise MixtureError(f"{self.path}: byte {there:,}: {problem}; mend it or fetch it again")

    def more(self):
        """Forget what was dealt with, and read on."""
        data = self.file.read(CHUNK)
        pending = self.utf8.getstate()[0]  # the beginning of a character that the last chunk cut
        try:
            self.text, self.at = self.text[self.at :] + self.utf8.decode(data, final=not data), 0
            self.ended = not data
        except UnicodeDecodeError as error:
            there = self.file.tell() - len(data) - len(pending) + error.start
            raise MixtureError(f"{self.path}: byte {there:,}: not UTF-8; mend it or fetch it again") from None

    def go(self, end: int):
        self.place, self.at = self.place + len(self.text[self.at : end].encode()), end

    def next_char(self) -> str:
        """Skip blanks; the character that follows, "" at the end of the file."""
        while True:
            self.go(BLANK.match(self.text, self.at).end())
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def value(self) -> tuple[object, int]:
        """The JSON value that starts here, and where it ends in `text`; the cursor stays."""
        while True:
            try:
                value, end = DECODE(self.text, self.at)
                if end < len(self.text) or self.ended:  # else 12 may be the beginning of 123
                    return value, end
            except (ValueError, RecursionError) as error:
                if (
                    self.ended or len(self.text) - self.at > LONGEST
                ):  # else it may only be cut by the end of what was read
                    problem, there = getattr(error, "msg", type(error).__name__), getattr(error, "pos", self.at)
                    if self.ended and (there >= len(self.text.rstrip()) or problem.startswith("Unterminated")):
                        self.fail("the file ends in the middle of the array", len(self.text))
                    self.fail(f"not JSON ({problem})", there)
            self.more()

    def enter(self, key: str) -> None:
        """Go into an object {...} as far as the value of `key`, over the values before it."""
        if self.next_char() != "{":
            self.fail(f"the file does not begin with {{, so it is not a JSON object with {key!r}")
        while True:
            self.go(self.at + 1)
            if self.next_char() != '"':
                self.fail(f"there is no {key!r} in the object")
            name, end = self.value()
            self.go(end)
            if self.next_char() != ":":
                self.fail("expected : after a name")
            self.go(self.at + 1)
            self.next_char()
            if name == key:
                return
            self.go(self.value()[1])
            if self.next_char() != ",":
                self.fail(f"there is no {key!r} in the object")


def read_array(path: Path, check, key: str | None = None, what: str = "example"):
    """Yield (byte, value) of each element of a JSON array, then (byte, None) of its "]".

    key: the array is that member of an object {...}, whatever follows it is not looked at; None: the array is the
    whole file. check(value) says what is wrong with an element, None if nothing. Memory: a few CHUNKs. Raises
    MixtureError naming the file and the byte for anything but a whole array of good elements.
    """
    with open(path, "rb") as file:
        cursor = _Cursor(path, file)
        if key is not None:
            cursor.enter(key)
        if cursor.next_char() != "[":
            begins = "the file does not begin" if key is None else f"{key!r} does not begin"
            cursor.fail(f"{begins} with [, so it is not a JSON array of {what}s")
        cursor.go(cursor.at + 1)
        if cursor.next_char() != "]":
            while True:
                value, end = cursor.value()
                problem = check(value)
                if problem:
                    cursor.fail(f"{what}: {problem}")
                yield cursor.place, value
                cursor.go(end)
                c = cursor.next_char()
                if c == "]":
                    break
                if c != ",":
                    cursor.fail(f"expected , or ] after an {what}" if c else "the file ends in the middle of the array")
                cursor.go(cursor.at + 1)
                cursor.next_char()
        yield cursor.place, None
        cursor.go(cursor.at + 1)
        if key is None and cursor.next_char():
            cursor.fail("something follows the array")


def scan(path: Path):
    """Yield the byte at which each example of a mixture file starts, then the byte of its "]"; see `read_array`."""
    return (place for place, _ in read_array(path, check_example))


def build_index(path: Path, progress=None) -> Path:
    """Write the sidecar of a mixture file and return its path. Raises MixtureError for a damaged file."""
    path = Path(path)
    sidecar = path.with_name(path.name + ".index")
    before = fingerprint(path)

    def write(temporary):
        count = -1  # the last place is the end of the array
        with open(temporary, "wb") as file:
            file.seek(HEAD)
            for block in batched(scan(path), 1 << 14):
                np.array(block, "<u8").tofile(file)
                count += len(block)
                if progress is not None:
                    progress.update(block[-1] - progress.n)
            if fingerprint(path) != before:
                raise MixtureError(f"{path} changed while it was indexed; start again when it is complete")
            file.seek(0)
            file.write(json.dumps(dict(before, format=1, count=count)).encode().ljust(HEAD))

    try:
        write_atomic(sidecar, write)
    except OSError as error:
        advice = f"make a link to {path.name} in a folder of your own and give that"
        raise MixtureError(f"{sidecar} cannot be written ({error.strerror}); {advice}") from None
    return sidecar


def batched(values, size: int):
    """Lists of up to `size` values. (itertools.batched is of Python 3.12.)"""
    values = iter(values)
    while block := list(islice(values, size)):
        yield block


class JsonExamples:
    """The examples of one mixture file by number: `examples[n]` -> (context, label, image_id).

    `row(n)` is the whole object. The index is built at first use or when the file has changed. Only the offsets are
    memory-mapped; each example is read from the file and parsed when it is asked for. Usable from several processes.
    Raises MixtureError naming file and byte; flag: what the file is called if there is none.
    """

    def __init__(self, path: Path | str, progress=None, flag: str = "--mixture"):
        self.path = Path(path)
        if not self.path.is_file():
            raise MixtureError(f"{flag} {path}: no such file")
        self.file = None
        self.identity = fingerprint(self.path)
        sidecar = self.path.with_name(self.path.name + ".index")
        header = self._header(sidecar)
        if header is None:
            build_index(self.path, progress)
            header = self._header(sidecar)
            assert header is not None, f"{sidecar} was written a moment ago"
        self.count = header["count"]
        self.offsets = np.memmap(sidecar, "<u8", "r", HEAD, (self.count + 1,))

    def _header(self, sidecar: Path) -> dict | None:
        """The header of a sidecar that fits the file as it is now, else None."""
        try:
            with open(sidecar, "rb") as file:
                header = json.loads(file.read(HEAD))
            whole = os.stat(sidecar).st_size == HEAD + 8 * (header["count"] + 1)
            return header if whole and header == dict(self.identity, format=1, count=header["count"]) else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def contents(self) -> dict:
        """What tells the contents of the file from others', wherever and whenever it was written."""
        return {key: self.identity[key] for key in ("size", "head", "tail")}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, n: int) -> tuple[str, str, str]:
        row = self.row(n)
        return tuple(row[name] for name in FIELDS)

    def row(self, n: int) -> dict:
        start, end = (int(place) for place in self.offsets[n : n + 2])
        if not 0 < end - start <= 4 * (LONGEST + CHUNK):  # bytes of so many characters
            sidecar = self.path.with_name(self.path.name + ".index")
            raise MixtureError(
                f"{sidecar}: example {n:,} lies at bytes {start:,} to {end:,}; delete it, and it is made again"
            )
        if self.file is None or self.file[0] != os.getpid():  # a file position must not be shared between processes
            self.file = os.getpid(), open(self.path, "rb", buffering=0)
        file = self.file[1]
        file.seek(start)
        data = file.read(end - start)
        try:
            row = json.loads(data.decode().rstrip().rstrip(",]"))
            problem = check_example(row)
        except (ValueError, RecursionError) as error:
            problem = f"not JSON ({error})"
        if problem:
            raise MixtureError(
                f"{self.path}: example {n:,}, byte {start:,}: {problem}; the file changed after it was indexed"
            )
        return row

    def __getstate__(self):  # to a loader worker that is not a fork
        return {**self.__dict__, "file": None}
