"""Files in and out: JSON, safetensors, and writing that a crash cannot leave half done.

Nothing is unpickled.
"""

import errno
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanomblip.weights.layout import WeightsError, shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BLOCK = 1 << 20  # numbers that are read and converted at a time


def read_json(path: Path) -> dict | list:
    """Parse a JSON file; raises WeightsError naming it when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, absurd numbers
        raise WeightsError(f"{path}: not readable as JSON ({error})") from None


def is_plain_name(name: str) -> bool:
    """Whether a name from a stranger's file or server is that of a file in the folder itself, here and on Windows."""
    return (
        isinstance(name, str) and name.isprintable() and not name.startswith(".") and not set(name) & set('/\\:*?"<>|')
    )


def open_safetensors(path: Path):
    """`safe_open` with errors that name the file; raises WeightsError."""
    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: damaged, truncated or not a safetensors file ({error}); restore or make it again"
        ) from None


def sync(file: int) -> None:
    """Bring the bytes of an open file to the disk (fsync), where the file system can; OSError if the disk refuses."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise  # the bytes are not there; every other reason only says that this file system has no fsync


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a finished file its real name in one step, its bytes on the disk before. Raises OSError."""
    with open(temporary, "rb+") as file:
        sync(file.fileno())
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: is a folder or a device, not a file to replace")
    try:
        os.replace(temporary, path)
    except PermissionError as error:  # Windows: somebody reads the old one
        raise PermissionError(
            f"{path}: cannot be replaced ({error.strerror}); close what has it open, or allow writing in its folder"
        ) from None
    # The new name itself. A nicety: the file is there, and many file systems (and Windows) cannot sync a folder.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomic(path: Path, write) -> None:
    """Let `write(temporary path)` make a file, then put it in place of `path` in one step.

    The bytes are on the disk (fsync) before the name changes, so that `path` is at all times either the old file or
    the whole new one, also after a power cut. Raises OSError (disk full, no permission) with `path` left as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with suppress(OSError):  # not every file system has permissions
            temporary.chmod(0o644)  # safetensors makes its files readable by their owner only
        put_in_place(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Write JSON for people (indented, UTF-8), atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically; raises WeightsError naming the path when the disk refuses."""

    def write(temporary):
        try:
            save_file({key: t.detach().contiguous().cpu() for key, t in tensors.items()}, temporary, metadata=metadata)
        except SafetensorError as error:  # safetensors wraps "No space left on device" and the like
            raise OSError(str(error)) from None

    try:
        write_atomic(Path(path), write)
    except OSError as error:
        raise WeightsError(f"{path}: not written ({error}); the previous file is untouched, free some space") from None


def digest(tensors: dict) -> str:
    """sha256 over names, types, shapes and bytes of tensors (or of functions that read one), ordered by name."""
    sha = hashlib.sha256()
    for key in sorted(tensors):
        t = tensors[key]() if callable(tensors[key]) else tensors[key]
        t = t.detach().contiguous().cpu()
        sha.update(f"{key} {t.dtype} {tuple(t.shape)}\n".encode())
        sha.update(t.view(-1).view(torch.uint8).numpy() if t.numel() else b"")
    return sha.hexdigest()


def lock(file: int) -> None:
    """Lock an open file or folder for this process; BlockingIOError when another process has it.

    The kernel gives the lock back when the file is closed or the process ends, however it ends. Where there are no
    locks (Windows, some network file systems) nothing is locked.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise BlockingIOError("locked by another process") from None


class RunLock:
    """Holds a run's folder for this process, as long as the object lives; ValueError when another process has it."""

    held = set()  # descriptors of the locks of this process

    def __init__(self, folder: Path):
        self.file = None
        if fcntl is not None:  # Windows cannot even open a folder
            self.file = os.open(folder, os.O_RDONLY)
            self.held.add(self.file)
            try:
                lock(self.file)
            except BlockingIOError:
                raise ValueError(f"{folder}: another process is at work in this run; wait for it or stop it") from None

    @classmethod
    def drop_copies(cls) -> None:
        """Called in a forked child: with copies of the descriptors it would hold the locks after its parent died."""
        while cls.held:
            os.close(cls.held.pop())

    def __del__(self):
        if self.file in self.held:
            self.held.discard(self.file)
            os.close(self.file)


def weight_map(index: Path) -> dict[str, str]:
    """Key -> name of its shard, from an index; raises WeightsError for a name that leads out of the folder."""
    found = read_json(index)
    found = found.get("weight_map") if isinstance(found, dict) else None
    if not (isinstance(found, dict) and found and all(isinstance(v, str) for v in found.values())):
        raise WeightsError(f"{index}: no weight_map of key -> file name")
    bad = [name for name in found.values() if not is_plain_name(name) or not name.endswith(".safetensors")]
    if bad:  # a hostile index could point anywhere
        raise WeightsError(f"{index}: {bad[0]!r} is not the plain name of a safetensors file in this folder")
    return found


def find_tensors(folder: Path, skip: str | None = None) -> dict[str, Path]:
    """Official key -> the safetensors file of `folder` that holds it: one `model.safetensors`, or shards and an index.

    Where both are there, the single file counts, as in transformers. Keys that start with `skip` are left out; a shard
    that holds no others is not opened and may be absent.
    """
    folder = Path(folder)
    wanted = lambda key: skip is None or not key.startswith(skip)
    mapped = weight_map(folder / INDEX) if (folder / INDEX).exists() else {}
    if (folder / SINGLE).exists() and SINGLE not in mapped.values():
        return {key: folder / SINGLE for key in _keys(folder / SINGLE) if wanted(key)}
    if mapped:
        mapped = {key: name for key, name in mapped.items() if wanted(key)}
        names = sorted(set(mapped.values()))
        found = {key: name for name in names for key in _keys(folder / name) if wanted(key)}
        if found != mapped:
            odd = sorted(set(mapped.items()) ^ set(found.items()))[0]
            raise WeightsError(f"{folder / INDEX}: disagrees with its shards about {odd[0]!r}")
        return {key: folder / name for key, name in found.items()}
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
    if pickles:
        raise WeightsError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when opened, so it is not read; get the "
            f"safetensors version, or convert it if you trust it: python -m nanomblip.weights.convert {folder}"
        )
    raise WeightsError(f"{folder}: no {SINGLE} and no {INDEX}")


def _keys(path: Path) -> list[str]:
    """The keys of a safetensors file; WeightsError if it says that it was written for other shapes than torch's."""
    with open_safetensors(path) as file:
        layout = (file.metadata() or {}).get("format", "pt")
        if layout not in ("pt", "mlx"):
            raise WeightsError(f"{path}: its metadata say format {shown(layout)}; get the version for torch ('pt')")
        return list(file.keys())
