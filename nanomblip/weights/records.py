"""sha256.json: what is known of the files of a folder, so that damage is noticed.

A bit that flips in a file of floats is not seen, unless it makes a number that is not finite. Where the sha256 is known
(files that hub.py fetched, and quantised ones of ours) a file that was touched since is hashed before it is used.
"""

import hashlib
from contextlib import suppress
from pathlib import Path

from nanomblip.weights.files import is_plain_name, read_json, write_json
from nanomblip.weights.layout import WeightsError

RECORD = "sha256.json"


def read_record(folder: Path) -> dict:
    """What is known of the files of a folder: {"source": ..., "files": {name: {"size", "sha256", "mtime_ns"}}}."""
    record = read_json(folder / RECORD)
    files = record.get("files") if isinstance(record, dict) else None
    if (
        not isinstance(files, dict)
        or not isinstance(record.get("source"), dict)
        or not all(
            is_plain_name(name) and isinstance(entry, dict) and {"size", "sha256", "mtime_ns"} <= set(entry)
            for name, entry in files.items()
        )
    ):
        raise WeightsError(
            f"{folder / RECORD}: no source, or no files with size, sha256 and mtime_ns; delete it if you trust them"
        )
    return record


def write_record(folder: Path, sha256: dict[str, str], source: dict) -> None:
    """Note size, sha256 (name -> hex digits) and time of the files of a folder, and where they come from."""
    stat = {name: (folder / name).stat() for name in sha256}
    files = {
        name: dict(size=stat[name].st_size, sha256=sha, mtime_ns=stat[name].st_mtime_ns)
        for name, sha in sorted(sha256.items())
    }
    write_json(folder / RECORD, dict(source=source, files=files))


def check_record(folder: Path) -> None:
    """Raise WeightsError if a file is not the one of the folder's RECORD, if it has one.

    Files whose size and time are those of the record are taken to be untouched; the others are hashed.
    """
    if not (folder / RECORD).exists():
        return
    record, changed = read_record(folder), False
    for name, entry in record["files"].items():
        path = folder / name
        if not path.is_file():
            continue  # whoever needs it will say so
        stat = path.stat()
        if (stat.st_size, stat.st_mtime_ns) == (entry["size"], entry["mtime_ns"]):
            continue
        sha = hashlib.sha256()
        with open(path, "rb") as file:
            while data := file.read(1 << 20):
                sha.update(data)
        if sha.hexdigest() != entry["sha256"]:
            damage = f"does not have the sha256 of {RECORD}, so it was changed or damaged"
            raise WeightsError(f"{path}: {damage}; delete it and get it again")
        changed = True
    if changed:
        known = {name: entry["sha256"] for name, entry in record["files"].items() if (folder / name).is_file()}
        with suppress(OSError):  # a folder that cannot be written: the next time they are hashed again
            write_record(folder, known, record["source"])
