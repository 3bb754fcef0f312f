"""What the parts of stress.py share: damaged bytes and JSON, a time limit, and what counts as a proper refusal."""

import copy
import ctypes
import gc
import json
import random
import resource
import signal
import struct
from contextlib import contextmanager, suppress
from pathlib import Path


class Failure(Exception):
    """A check of this file that did not hold."""


class Hang(BaseException):
    """Out of time; not an Exception, so that no decoder's `except` swallows it."""


@contextmanager
def limit(seconds: float):
    """Raise Hang in the block after so many seconds."""

    def ring(number, frame):
        raise Hang(f"more than {seconds:g} s")

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def refused(error: Exception, *names) -> str:
    """The outcome of a case that ended with an error of the right kind, if it is one short line that names one of `names`."""
    text = str(error)
    if not text.isprintable() or len(text) > 1000:
        raise Failure("not one short, printable line") from error
    if not any(str(name) in text for name in names):
        raise Failure("names no file") from error
    return "refused"


def memory() -> float:
    """MB that this process holds (without Linux's /proc: has held at most)."""
    gc.collect()
    statm = Path("/proc/self/statm")
    if statm.exists():
        with suppress(OSError, AttributeError):  # glibc alone has it; other C libraries give memory back by themselves
            ctypes.CDLL(None).malloc_trim(0)
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# ------------------------------------------------------------------------------------------------------------- damage

STRANGE = [None, True, False, -1, 0, 1, 2, 3, 7, 0.5, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "x", "../x", "/etc/passwd", "a\0b",
           "\ud800", "\x1b[2J\n", "é" * 300, [], {}, [[]], {"a": None}, ["x", 1]]  # fmt: skip


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bits flipped, bytes put in or overwritten, or the rest cut off."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, kind = rng.randrange(len(data)) if data else 0, rng.randrange(6)
        at = at % 64 if rng.random() < 0.3 else at
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 2:
            data[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice((0, 1, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)))
        elif data:
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def damage_json(value, rng: random.Random):
    """One node of a parsed JSON file deleted, renamed, put to something strange, moved a little, or exchanged with another."""
    value, nodes = copy.deepcopy(value), []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            nodes.append((node, key))
            walk(node[key])

    walk(value)
    if not nodes:
        return rng.choice(STRANGE)
    (node, key), (other, other_key), kind = rng.choice(nodes), rng.choice(nodes), rng.randrange(8)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice([f"{key}x", str(key)[1:], "x", str(other_key)])] = node.pop(key)
    elif kind == 2:
        node[key] = copy.deepcopy(other[other_key])
    elif kind < 5 and type(node[key]) in (int, float):
        node[key] = rng.choice([node[key] + rng.choice((-4, -1, 1, 4)), -node[key], 2 * node[key], node[key] // 2])
    elif kind == 5 and isinstance(node, dict):
        node["unknown"] = rng.choice(STRANGE)
    else:
        node[key] = rng.choice(STRANGE)
    return value


def damage_file(name: str, data: bytes, rng: random.Random) -> tuple[bytes | None, str]:
    """Damaged bytes of a file (None: it is missing), and what was damaged: "file", "json", "header" or "number"."""
    kind, is_json = rng.random(), name.endswith(".json")
    if kind < 0.05:
        return rng.choice((None, b"", data + bytes(rng.randrange(1, 100)))), "file"
    if is_json:
        if kind < 0.3:
            return damage_bytes(data, rng), "json"
        return json.dumps(damage_json(json.loads(data), rng)).encode(), "json"
    start = 8 + int.from_bytes(data[:8], "little")
    if kind < 0.4:
        header = json.dumps(damage_json(json.loads(data[8:start]), rng)).encode()
        return len(header).to_bytes(8, "little") + header + data[start:], "header"
    if kind < 0.65:
        return damage_bytes(data[:start], rng) + data[start:], "header"
    if kind < 0.75:
        return data[: rng.randrange(len(data))], "file"
    at = rng.randrange(start, len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :], "number"
