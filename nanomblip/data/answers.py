"""Answers as JSON lines: written as they are made, and gone on with after an interruption.

    with AnswerFile("captions.jsonl") as file:  # opened, and locked against a second process, before the long part
        known = file.begin(dict(model=..., decoding=...), lambda row: row["image"])
        for image in images:
            if image not in known:
                file.add(image=image, text=...)

A line is in the file as soon as `add` returns: Ctrl-C, SIGTERM, SIGHUP, a full disk or `kill -9` cost at most the
answers in the making. Every line starts with the name of its job, a hash of what was asked of which model, so that an
answer of another model, language or decoding is never taken for one of these. What was half written is dropped the
next time.

Several processes share the questions out: process i of n takes every n-th from the i-th on (`Shard`) and writes to a
file of its own. `merge` makes one file of these when no answer is missing.
"""

import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.nn as nn

from nanomblip.data.image import ImageConfig
from nanomblip.data.nllb_tokenizer import NLLBTokenizer
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.model.int8 import Int8Linear
from nanomblip.model.lora import LoRALinear
from nanomblip.weights.files import digest, lock, sync, write_atomic


def job_name(job: dict) -> str:
    """16 hex digits that stand for everything in `job` (JSON values), whatever the order of its keys."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(model: nn.Module, tokenizer: Tokenizer | NLLBTokenizer, pictures: ImageConfig | None = None) -> str:
    """sha256 of everything of a model that an answer depends on: weights as they are held, settings, tokenizer."""
    settings = [repr(model.cfg), repr(pictures)]
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            settings.append(f"{path} {module.scale}")
        if isinstance(module, Int8Linear):
            settings.append(f"{path} {module.threshold}")
    parts = [digest(model.state_dict()), *settings]
    return hashlib.sha256("\n".join(parts).encode() + tokenizer.path.read_bytes()).hexdigest()


class AnswerFile:
    """A file of JSON lines that belongs to one job; a pipe or a device only takes them.

    flag: what the file is called in errors. ValueError if it cannot be written, or another process writes to it.
    """

    def __init__(self, path: Path | str, flag: str = "--out"):
        self.path = Path(path)
        if not self.path.exists() or self.path.is_file():  # not /dev/stdout, a link to what has no name
            self.path = Path(os.path.realpath(path))  # behind a symbolic link, its target
        self.name, self.job, self.written = f"{flag} {path}", None, 0
        if self.path.is_dir() or not self.path.parent.is_dir():
            problem = "is a folder" if self.path.is_dir() else "its folder does not exist"
            raise ValueError(f"{self.name}: {problem}")
        self.is_new = not self.path.exists()
        self.is_stream = not self.is_new and (not self.path.is_file() or _is_stdout(self.path))
        try:
            self.file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise ValueError(f"{self.name}: cannot be written ({error.strerror}); give another file") from None
        try:
            if not self.is_stream:
                lock(self.file.fileno())
        except BlockingIOError:
            self.file.close()
            raise ValueError(f"{self.name}: another process writes to it; wait for it, or give another file") from None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                sync(self.file.fileno())
        finally:
            self.file.close()
            if kind is KeyboardInterrupt:
                print(f"{self.name}: {self.written} answers added; the same command goes on", file=sys.stderr)
            with suppress(OSError):
                if self.is_new and self.path.stat().st_size == 0:  # nothing came of it
                    self.path.unlink()

    def begin(self, job: dict, keep: Callable[[dict], object], replaceable: str | None = None) -> list:
        """Say what the answers are to; returns keep(row) of each that is there already, in their order.

        job: everything that an answer depends on, but for what is in its own line. Answers of the job named
        `replaceable` are thrown away first; those of any other job, and lines of another kind, are a ValueError.
        """
        self.job, kept, end = job_name(job), [], 0
        if self.is_stream:
            return kept
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):  # half written (after a power cut it may end in zeros)
                    half, whole = line.rstrip(b"\0"), f'{{"job": "{self.job}"'.encode()
                    if not kept and half[: len(whole)] != whole[: len(half)]:
                        raise ValueError(self._not_ours(number))
                    break
                try:
                    row = json.loads(line)
                    if (theirs := row["job"]) == self.job:
                        kept.append(keep(row))
                except (ValueError, TypeError, LookupError, RecursionError):
                    raise ValueError(self._not_ours(number)) from None
                if theirs != self.job and theirs == replaceable:
                    return self._start_again()
                if theirs != self.job:
                    other = [f"{name} {row[name]!r}" for name in job if name in row and row[name] != job[name]]
                    other = " and ".join(other) or "another " + " or ".join(name for name in job if name not in row)
                    raise ValueError(f"{self.name}: holds answers made with {other}; give another file, or delete it")
                end += len(line)
        self.file.truncate(end)
        return kept

    def _start_again(self) -> list:
        self.file.truncate(0)
        return []

    def _not_ours(self, number: int) -> str:
        return f"{self.name}: line {number} is no answer of this program; give another file, or delete it"

    def add(self, **row) -> None:
        """Write one answer; OSError, and all earlier ones untouched, when the disk is full."""
        # A file name that is not UTF-8 holds lone surrogates; "\udcff" is what JSON itself writes for them.
        line = json.dumps(dict(job=self.job, **row), ensure_ascii=False) + "\n"
        left = line.encode("utf-8", "backslashreplace")
        size = 0 if self.is_stream else os.fstat(self.file.fileno()).st_size
        try:
            while left:
                left = left[self.file.write(left) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self.is_stream:
                with suppress(OSError):
                    self.file.truncate(size)
            advice = "the answers before are kept: make room, then give the same command again"
            raise OSError(f"{self.name}: not written ({error.strerror}); {advice}") from None
        self.written += 1


def _is_stdout(path: Path) -> bool:
    """Whether a file is the one that stdout leads to: `--out /dev/stdout >> answers`."""
    try:
        return sys.__stdout__ is not None and os.path.samestat(path.stat(), os.fstat(sys.__stdout__.fileno()))
    except (OSError, ValueError):  # a stdout without a number
        return False


class Stream:
    """Prints what is new of a text each time it has grown."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.shown = tokenizer, ""

    def __call__(self, ids: list[int]):
        text = " ".join(self.tokenizer.decode(ids).rstrip("\ufffd").split())  # a letter may lack some of its bytes
        if text.startswith(self.shown):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text

    def finish(self, text: str):
        print(text[len(self.shown) :] if text.startswith(self.shown) else f"\n{text}", flush=True)


@dataclass(frozen=True)
class Shard:
    """What one of `count` processes answers: items number, number + count, ... With `merge` it answers nothing."""

    number: int = 0
    count: int = 1
    merge: bool = False

    @classmethod
    def parse(cls, text: str):
        """From `--shard`: "2/8" is the third of eight, "merge/8" joins them, "" is what torchrun says, or all.

        ValueError for anything else.
        """
        if not text:
            text = f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
        first, _, last = text.partition("/")
        number = 0 if first == "merge" else int(first) if first.isdecimal() else -1
        if not last.isdecimal() or not 0 <= number < int(last):
            raise ValueError(f"--shard {text}: give i/n with i from 0 to n - 1, or merge/n")
        return cls(number, int(last), first == "merge")

    def of(self, items: list) -> list:
        """The items of this process."""
        return items[self.number :: self.count]

    def path(self, path: Path | str, number: int | None = None) -> Path:
        """The file of a shard (this one unless said otherwise): answers.jsonl -> answers.2-of-8.jsonl."""
        path, number = Path(path), self.number if number is None else number
        return path if self.count == 1 else path.with_name(f"{path.stem}.{number}-of-{self.count}{path.suffix}")


def merge(path: Path | str, shard: Shard, wanted: list[str], key_of: Callable[[dict], str],
          excused: Callable[[str], bool] = lambda key: False) -> list[str]:  # fmt: skip
    """Write the answers of all shards to `path`, in the order of `wanted`, the keys of all questions.

    key_of(row) -> key. Returns the keys without an answer that are `excused`, such as those of damaged pictures.
    ValueError, and nothing is written, for any other that is missing and for an answer that is not wanted or is of
    another job.
    """
    found, jobs = defaultdict(list), {}  # key -> its lines
    for file in filter(Path.is_file, [shard.path(path, number) for number in range(shard.count)]):
        for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
            if line.endswith(b"\n"):  # else half written
                try:
                    row = json.loads(line)
                    found[key_of(row)].append(line)
                    jobs[row["job"]] = file
                except (ValueError, TypeError, LookupError, RecursionError):
                    raise ValueError(f"{file}: line {number} is no answer of this program") from None
    if len(jobs) > 1:
        raise ValueError(f"{' and '.join(map(str, jobs.values()))} answer different jobs; make one of them again")
    lines, missing = [], []
    for i, key in enumerate(wanted):
        if found[key]:
            lines.append(found[key].pop(0))
        elif excused(key):
            missing.append(key)
        else:
            file = shard.path(path, i % shard.count)
            raise ValueError(f"{file}: holds no answer to {key}; give the command of this shard again")
    if extra := sum(map(len, found.values())):
        raise ValueError(f"{path}: the shards hold {extra} answers to what is not asked")
    write_atomic(Path(path), lambda temporary: temporary.write_bytes(b"".join(lines)))
    return missing
