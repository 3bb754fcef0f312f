"""Files in and out: JSON, safetensors, and writing that a crash cannot leave half done.

Nothing is unpickled.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanomblip.weights.layout import WeightsError

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


def write_atomic(path: Path, write) -> None:
    """Let `write(temporary path)` make a file, then put it in place of `path` in one step.

    The bytes are on the disk (fsync) before the name changes, so that `path` is at all times either the old file or
    the whole new one, also after a power cut. Raises OSError (disk full, no permission) with `path` left as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors makes its files readable by their owner only
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name itself
    finally:
        os.close(directory)


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
    """sha256 over names, types, shapes and bytes of tensors (or of functions that read one), in the order of their names."""
    sha = hashlib.sha256()
    for key in sorted(tensors):
        t = tensors[key]() if callable(tensors[key]) else tensors[key]
        t = t.detach().contiguous().cpu()
        sha.update(f"{key} {t.dtype} {tuple(t.shape)}\n".encode())
        sha.update(t.view(-1).view(torch.uint8).numpy() if t.numel() else b"")
    return sha.hexdigest()


class RunLock:
    """Holds a run's folder for this process, as long as the object lives; ValueError when another process has it.

    The kernel gives the lock back when a process ends, however it ends. Without `fcntl` (Windows) nothing is locked.
    """

    def __init__(self, folder: Path):
        self.file = None
        if fcntl is not None:
            self.file = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"{folder}: another process is at work in this run; wait for it or stop it") from None

    def __del__(self):
        if self.file is not None:
            os.close(self.file)
