"""The one way from a pickle to safetensors, for folders of the hub that have nothing else; it is never taken by itself.

    python -m nanomblip.weights.convert FOLDER

It reads `pytorch_model.bin`, or its shards, or `adapter_model.bin`, and writes safetensors beside them. A pickle is a
program: opening it can do anything that its author liked. Torch's restricted loader (`weights_only=True`) runs only the
part of the language that builds tensors, and refuses the rest; here everything that is not a plain tensor under a name
is refused as well. That loader has had holes before (CVE-2025-32434, mended in torch 2.6): convert files of people you
trust.

The numbers stay on the disk and pass through memory one tensor at a time. All files are written in a folder of their
own and compared with their source byte by byte before they get their names. `sha256.json` says what they were made of.
"""

import hashlib
import re
import shutil
import sys
import zipfile
from pathlib import Path

import torch

from nanomblip.flags import run_main
from nanomblip.weights.files import BLOCK, INDEX, SAFETENSORS_NAMES, SINGLE, is_plain_name, open_safetensors, read_json
from nanomblip.weights.layout import WeightsError
from nanomblip.weights.records import RECORD, read_record, write_record
from nanomblip.weights.save import SHARD, write_shards, write_tensors

PICKLE, PICKLE_INDEX, ADAPTER_PICKLE = "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"
ADAPTER = "adapter_model.safetensors"
STAGING = ".converting"  # where the files are until they are found to be right


def convert(folder: Path | str, shard: int = SHARD) -> dict[str, str]:
    """Write the weights of a folder's pickles as safetensors of at most `shard` bytes each; returns name -> sha256.

    Tensors that share their memory (an embedding that is also the head) are written once, under the first of their
    names. Raises WeightsError for a folder without pickles or that has safetensors already, and for a damaged pickle or
    one with anything in it but plain tensors; the folder is then as it was.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder")
    jobs = _find_pickles(folder)
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)  # of a call that was interrupted
    staging.mkdir()
    try:
        done, sources = {}, {}
        for target, pickles in jobs.items():
            done |= _write(staging, target, _read_all(folder, pickles), shard)
            for name in pickles:
                with open(folder / name, "rb") as file:
                    sources[name] = hashlib.file_digest(file, "sha256").hexdigest()
        for path in sorted(staging.iterdir(), key=lambda path: path.name == INDEX):  # the index last
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    known = read_record(folder) if (folder / RECORD).exists() else dict(source={}, files={})
    kept = {name: entry["sha256"] for name, entry in known["files"].items() if (folder / name).is_file()}
    write_record(folder, kept | done, {**known["source"], "converted_from": sources})
    return done


def _find_pickles(folder: Path) -> dict[str, dict[str, set[str] | None]]:
    """Safetensors file to write -> pickles to read -> their keys, where an index says so."""
    jobs = {}
    if (folder / PICKLE_INDEX).is_file():
        jobs[SINGLE] = _shards(folder / PICKLE_INDEX)
    elif (folder / PICKLE).is_file():
        jobs[SINGLE] = {PICKLE: None}
    if (folder / ADAPTER_PICKLE).is_file():
        jobs[ADAPTER] = {ADAPTER_PICKLE: None}
    if not jobs:
        names = f"{PICKLE}, {PICKLE_INDEX} and {ADAPTER_PICKLE}"
        raise WeightsError(f"{folder}: has none of {names}; give the file that you want to convert such a name")
    for target in jobs:
        for name in (target, INDEX) if target == SINGLE else (target,):
            if (folder / name).exists():
                raise WeightsError(f"{folder}: has {name} already; delete it to convert again")
    return jobs


def _shards(index: Path) -> dict[str, set[str]]:
    """Name of each pickle -> its keys, from an index."""
    found = read_json(index)
    found = found.get("weight_map") if isinstance(found, dict) else None
    if not (isinstance(found, dict) and found and all(is_plain_name(v) and v.endswith(".bin") for v in found.values())):
        raise WeightsError(f"{index}: no weight_map of key -> name of a .bin file in this folder")
    return {name: {key for key in found if found[key] == name} for name in sorted(set(found.values()))}


def _read_all(folder: Path, pickles: dict[str, set[str] | None]) -> dict[str, torch.Tensor]:
    """Key -> tensor, mapped from the disk, of several pickles; each tensor once."""
    tensors, places = {}, set()
    for name, keys in pickles.items():
        found = _read_pickle(folder / name)
        if keys is not None and keys != set(found):
            odd = sorted(keys ^ set(found))[0]
            raise WeightsError(f"{folder / PICKLE_INDEX}: disagrees with {name} about {odd!r}")
        for key, t in found.items():
            place = (t.data_ptr(), t.dtype, t.shape, t.stride())
            if place in places and t.numel():
                continue  # a second name of the same memory
            places.add(place)
            tensors[key] = t
    return tensors


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Key -> tensor of one pickle, mapped from the disk; WeightsError for all else that it holds, and for damage."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 6):
        raise WeightsError(
            f"torch {torch.__version__} cannot open pickles safely (CVE-2025-32434); install 2.6 or newer"
        )
    try:  # hostile bytes can make both readers fail in any way
        with zipfile.ZipFile(path) as archive:
            squeezed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            damaged = None if squeezed else archive.testzip()  # the loader below does not look at checksums
    except Exception as error:
        what = f"cut off, damaged, or written before torch 1.6 ({type(error).__name__})"
        raise WeightsError(f"{path}: {what}; get the file again") from None
    if squeezed or damaged:
        what = "holds compressed files, which torch never writes" if squeezed else f"{damaged} in it is damaged"
        raise WeightsError(f"{path}: {what}; get the file again")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        name = re.search(r"GLOBAL (\S+)", str(error))  # the rest of torch's words is how to open it all the same
        what = f"wants to run {name[1]:.100}" if name else f"does not hold tensors alone ({type(error).__name__})"
        raise WeightsError(f"{path}: {what}; nothing of it was run, get the weights from elsewhere") from None
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: holds a {type(state).__name__}, not tensors under their names")
    for key, t in state.items():
        if not (isinstance(key, str) and key.isprintable() and key != "__metadata__"):
            raise WeightsError(f"{path}: {key!r:.100} is not the name of a tensor")
        if problem := _problem(t):
            raise WeightsError(f"{path}: {key:.100} is {problem}; only plain tensors are converted")
    if not state:
        raise WeightsError(f"{path}: holds no tensors")
    return {key: t.detach() for key, t in state.items()}


def _problem(t) -> str | None:
    """What keeps a value from being a plain tensor, or None."""
    if type(t) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(t).__name__}, not a tensor"
    if t.layout != torch.strided or t.is_nested or t.is_quantized or t.is_neg() or t.is_conj():
        return f"a tensor in a special form ({t.layout}, {t.dtype})"
    if t.device.type != "cpu":
        return f"a tensor without numbers (on {t.device.type})"
    if t.dtype not in SAFETENSORS_NAMES:
        return f"of type {t.dtype}, which no model here has"
    if t.nbytes > t.untyped_storage().nbytes():  # a few numbers that pose as a tensor larger than any disk
        return f"larger ({tuple(t.shape)}) than what is stored of it"
    if t.is_floating_point() and not all(part.isfinite().all() for part in t.reshape(-1).split(BLOCK)):
        return "damaged: some of its numbers are not finite"
    return None


def _write(staging: Path, target: str, tensors: dict[str, torch.Tensor], shard: int) -> dict[str, str]:
    """Write tensors into `target` or shards of it, compare every byte, and return name -> sha256."""
    need, free = sum(t.nbytes for t in tensors.values()), shutil.disk_usage(staging).free
    if need > free:
        raise WeightsError(f"{staging}: {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; make room")
    entries = {key: (t.dtype, tuple(t.shape), lambda t=t: [t]) for key, t in tensors.items()}
    if target == SINGLE:
        done = write_shards(staging, entries, shard)
    else:
        done = {target: write_tensors(staging / target, entries)}
    as_bytes = lambda t: t.contiguous().view(-1).view(torch.uint8)
    left = dict(tensors)
    for name in done:
        with open_safetensors(staging / name) as file:
            for key in file.keys():
                got, want = file.get_tensor(key), left.pop(key)
                if (got.dtype, got.shape) != (want.dtype, want.shape) or not torch.equal(as_bytes(got), as_bytes(want)):
                    raise WeightsError(f"{staging / name}: {key} is not what was written; try again, or another disk")
    if left:
        raise WeightsError(f"{staging}: {len(left)} tensor(s) were not written, first {sorted(left)[0]!r}; try again")
    return done


def main(argv: list[str]) -> int:
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ValueError("give one folder: python -m nanomblip.weights.convert FOLDER")
    for name, sha in convert(argv[0]).items():
        print(f"convert.py: wrote {Path(argv[0]) / name}, sha256 {sha}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_main(main)
