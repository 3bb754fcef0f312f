"""Weights in and out: one layout only, that of Hugging Face's BLIP-2 (`config.json` + safetensors).

nano's checkpoints and the official ones go through the same strict loader, and transformers opens what we write. Strict
means that every tensor of the file finds its place and every place gets its tensor, in the right shape; anything else is
a `WeightsError` that names the key. Nothing is ever unpickled.

A model is built on the meta device (shapes without memory) and filled one tensor at a time straight from the
memory-mapped file, so that there are never two copies of it. What is wanted in int8 or bf16 is converted on the way, some rows
at a time: mBLIP mT0-XL is 19.3 GB on the disk and 5.8 GB in memory, and was at no moment more.

A bit that flips in a file of floats is not seen, unless it makes a number that is not finite. Where the sha256 is known (RECORD: files
that hub.py fetched, and quantised ones of ours) a file that was touched since is hashed before it is used.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanomblip.int8 import THRESHOLD, Int8Linear, quantize_rows
from nanomblip.layout import (EMBED_ALIASES, MT5_KEYS, WeightsError, _expand, config_from_hf, config_to_hf, mt5_config_from_hf,
                              mt5_config_to_hf, mt5_names, official_names, vision_config_from_hf)  # fmt: skip
from nanomblip.lora import LoRALinear, check_lora, lora_layers
from nanomblip.mblip import MBLIP
from nanomblip.mt5 import MT5
from nanomblip.tokenizer import Tokenizer, to_hf

INDEX, SINGLE, RECORD = "model.safetensors.index.json", "model.safetensors", "sha256.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}  # what --vision_dtype and --llm_dtype mean
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8"}
BLOCK = 1 << 20  # numbers that are read and converted at a time
SHARD = 5_000_000_000  # bytes of a file of weights, at most


# ------------------------------------------------------------------------------------------------------------- reading


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
    return isinstance(name, str) and name.isprintable() and not name.startswith(".") and not set(name) & set('/\\:*?"<>|')


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

    Keys that start with `skip` are left out; a shard that holds no others is not opened and may be absent.
    """
    folder = Path(folder)
    wanted = lambda key: skip is None or not key.startswith(skip)
    if (folder / INDEX).exists():
        mapped = {key: name for key, name in weight_map(folder / INDEX).items() if wanted(key)}
        found = {}
        for name in sorted(set(mapped.values())):
            with open_safetensors(folder / name) as shard:
                found |= {key: name for key in shard.keys() if wanted(key)}
        if found != mapped:
            odd = sorted(set(mapped.items()) ^ set(found.items()))[0]
            raise WeightsError(f"{folder / INDEX}: disagrees with its shards about {odd[0]!r}")
        return {key: folder / name for key, name in found.items()}
    if (folder / SINGLE).exists():
        with open_safetensors(folder / SINGLE) as file:
            return {key: folder / SINGLE for key in file.keys() if wanted(key)}
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
    if pickles:
        raise WeightsError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when opened, so it is never read; get the "
            "safetensors version, or save the model with transformers' save_pretrained, which writes safetensors"
        )
    raise WeightsError(f"{folder}: no {SINGLE} and no {INDEX}")


def read_record(folder: Path) -> dict:
    """What is known of the files of a folder: {"source": ..., "files": {name: {"size", "sha256", "mtime_ns"}}}."""
    record = read_json(folder / RECORD)
    files = record.get("files") if isinstance(record, dict) else None
    if not (isinstance(files, dict) and all(is_plain_name(name) and isinstance(entry, dict) and {"size", "sha256", "mtime_ns"} <= set(entry)
                                            for name, entry in files.items())):  # fmt: skip
        raise WeightsError(f"{folder / RECORD}: not a list of files with size, sha256 and mtime_ns; delete it if you trust the files")
    return record


def write_record(folder: Path, sha256: dict[str, str], source: dict) -> None:
    """Note size, sha256 (name -> hex digits) and time of the files of a folder, and where they come from."""
    stat = {name: (folder / name).stat() for name in sha256}
    files = {name: dict(size=stat[name].st_size, sha256=sha, mtime_ns=stat[name].st_mtime_ns) for name, sha in sorted(sha256.items())}
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
            raise WeightsError(f"{path}: does not have the sha256 of {RECORD}, so it was changed or damaged; delete it and get it again")
        changed = True
    if changed:
        write_record(folder, {name: entry["sha256"] for name, entry in record["files"].items() if (folder / name).is_file()}, record["source"])


def load_mblip(folder: Path | str, dtype: torch.dtype = torch.float32, vision_dtype: str | None = None, llm_dtype: str | None = None) -> MBLIP:
    """Build the model of a folder in the official layout and fill it, strictly; returns it in eval mode.

    A folder written by `save_trained` holds some parameters only; the others come from the folders it names.
    dtype: of all floats. vision_dtype: of the ViT, llm_dtype: of the language model, each "fp32", "bf16" or "int8". In int8 are the linear
    layers; beside them the embedding is bf16 and the rest `dtype`. A file that is int8 already stays so.

    Raises WeightsError for a missing or damaged file, an unknown or a missing key, a wrong shape or type, a number that is not
    finite, or bases that are not those the trained parts were trained on.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json") if folder.is_dir() else {}
    if isinstance(config, dict) and "bases" in config:
        return _load_on_bases(folder, config, dtype, vision_dtype, llm_dtype)
    return _load(folder, MBLIP, config_from_hf, official_names, "language_model.", _Forms(dtype, vision_dtype, llm_dtype))


def load_mt5(folder: Path | str, dtype: torch.dtype = torch.float32, llm_dtype: str | None = None) -> MT5:
    """Build and fill a language model by itself (an mT0 or mT5 folder of the hub, or ours); as `load_mblip`."""
    return _load(Path(folder), MT5, mt5_config_from_hf, mt5_names, "", _Forms(dtype, None, llm_dtype, prefix="mt5."))


def load_vision(folder: Path | str, mt5: MT5, dtype: torch.dtype = torch.float32, vision_dtype: str | None = None) -> MBLIP:
    """ViT, Q-Former and queries of a BLIP-2 (or mBLIP) folder in front of another language model, a fresh projection between: where
    re-alignment starts from. Nothing is read of the folder's own language model and projection. As `load_mblip`."""
    config_of = lambda hf: vision_config_from_hf(hf, mt5.cfg)
    names_of = lambda model: {mine: key for mine, key in official_names(model).items() if not mine.startswith(("mt5.", "proj."))}
    model = _load(Path(folder), MBLIP, config_of, names_of, "language_model.", _Forms(dtype, vision_dtype, None), skip="language_")
    model.exchange_language_model(mt5)
    return model


def _load_on_bases(folder: Path, config: dict, dtype: torch.dtype, vision_dtype: str | None, llm_dtype: str | None) -> MBLIP:
    """The model of a folder that `save_trained` wrote; errors as in `load_mblip`."""
    bases = config["bases"]
    if not (isinstance(bases, dict) and set(bases) == {"vision", "language_model", "sha256", "trained_sha256"}
            and all(isinstance(value, str) for value in bases.values())):  # fmt: skip
        raise WeightsError(f"{folder / 'config.json'}: bases must name vision, language_model, sha256 and trained_sha256")
    vision, llm = folder / bases["vision"], folder / bases["language_model"]
    mt5 = load_mt5(llm, dtype, llm_dtype)
    model = load_vision(vision, mt5, dtype, vision_dtype)
    if config_from_hf(config) != model.cfg:
        raise WeightsError(f"{folder}: its config.json describes another model than its bases")
    found, names = find_tensors(folder), {official: mine for mine, official in float_names(model).items()}
    if unknown := sorted(set(found) - set(names)):
        raise WeightsError(f"{folder}: {len(unknown)} unknown key(s), first {unknown[0]!r}: these are not the weights of its config.json")
    if _digest_of_bases(vision, llm, [mine for key, mine in names.items() if key not in found]) != bases["sha256"]:
        raise WeightsError(f"{folder}: was trained on other weights than {bases['vision']} and {bases['language_model']} hold now{_restore(folder)}")
    trained = {}
    for key, path in found.items():
        with open_safetensors(path) as file:
            trained[key] = _read_tensor(file, path, key, model.get_parameter(names[key]).shape)
    if digest(trained) != bases["trained_sha256"]:
        raise WeightsError(f"{folder}: model.safetensors does not have the sha256 it was written with{_restore(folder)}")
    for key, value in trained.items():
        _set_parameter(model, names[key], value.to(dtype))
    return model.eval()


def _digest_of_bases(vision: Path, llm: Path, names: list[str]) -> str:
    """`digest` of parameters in fp32, read one at a time from the folders of the two bases."""
    places = _places_of_bases(vision, llm)

    def read(name):
        path, key = places[name]
        with open_safetensors(path) as file:
            return file.get_tensor(key).float()

    if strange := sorted(set(names) - set(places)):
        raise WeightsError(f"{strange[0]} was not trained, and is in neither of the bases {vision} and {llm}")
    return digest({name: lambda name=name: read(name) for name in names})


def _places_of_bases(vision: Path, llm: Path) -> dict[str, tuple[Path, str]]:
    """Our name -> file and key, of the ViT, Q-Former and queries of one folder and the language model of another."""
    with torch.device("meta"):
        mt5 = MT5(mt5_config_from_hf(read_json(llm / "config.json")))
        model = MBLIP(vision_config_from_hf(read_json(vision / "config.json"), mt5.cfg))
    places = {f"mt5.{mine}": place for mine, place in _locate(llm, {key: mine for mine, key in mt5_names(mt5).items()}, "").items()}
    seen = {key: mine for mine, key in official_names(model).items() if not mine.startswith(("mt5.", "proj."))}
    return places | _locate(vision, seen, "language_model.", skip="language_")


class _Forms:
    """Which parameter is held in which type: `forms(name)` is a torch type, int8 for the weight of a linear layer that is to be quantised."""

    def __init__(self, dtype: torch.dtype, vision: str | None, llm: str | None, prefix: str = ""):
        for flag, name in (("vision_dtype", vision), ("llm_dtype", llm)):
            if name is not None and name not in DTYPES:
                raise ValueError(f"{flag} is {name!r}; it is one of {', '.join(DTYPES)}")
        self.dtype, self.prefix = dtype, prefix
        self.wish = {"vit": vision, "mt5": llm}

    def wished(self, name: str) -> str | None:
        return self.wish.get((self.prefix + name).split(".")[0])

    def __call__(self, name: str, is_linear: bool) -> torch.dtype:
        wish = self.wished(name)
        if wish != "int8":
            return self.dtype if wish is None else DTYPES[wish]
        if is_linear:
            return torch.int8
        return torch.bfloat16 if self.prefix + name == "mt5.embed.weight" else self.dtype


def _load(folder: Path, cls, config_of, names_of, prefix: str, forms: _Forms, skip: str | None = None) -> nn.Module:
    """Build a `cls` on the meta device and fill it; config_of and names_of as above, prefix and skip as in `_locate`."""
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder")
    hf = read_json(folder / "config.json")
    cfg = config_of(hf)
    with torch.device("meta"):
        model = cls(cfg)
    try:
        check_record(folder)
        places = _locate(folder, {official: mine for mine, official in names_of(model).items()}, prefix, skip)
        _fill(model, places, forms, _threshold(folder, hf))
    except WeightsError as error:
        raise WeightsError(f"{error}{_restore(folder)}") from None
    return model.eval()


def _restore(folder: Path) -> str:
    """What to do about damaged weights, if they are the shipped ones."""
    shipped = Path(__file__).resolve().parent.parent / "weights" / "nano"
    return "; restore them with: git checkout -- weights/nano" if shipped in (folder.resolve(), *folder.resolve().parents) else ""


def _locate(folder: Path, targets: dict[str, str], prefix: str, skip: str | None = None) -> dict[str, tuple[Path, str]]:
    """Our name -> file and key, for all of `targets` (official key -> our name), strictly; prefix: of the language model's keys; skip: as
    in `find_tensors`. Beside a weight in int8 stands its SCB, under the weight's name with "SCB" at its end."""
    found = find_tensors(folder, skip)
    shared, aliases = prefix + "shared.weight", [prefix + key for key in EMBED_ALIASES if prefix + key in found]
    if shared in targets:
        for key in aliases if shared in found else aliases[1:]:  # second names must hold the same embedding
            first = shared if shared in found else aliases[0]
            if not _same(found[key], key, found[first], first):
                raise WeightsError(f"{found[key]}: {key} differs from {first}; three embeddings are not implemented")
    places = {mine: (found[key], key) for key, mine in targets.items() if key in found}
    if shared in targets and shared not in found and aliases:
        places[targets[shared]] = found[aliases[0]], aliases[0]
    extra = {}
    for key, mine in targets.items():  # what bitsandbytes writes beside an int8 weight
        if key.endswith(".weight") and key.removesuffix("weight") + "SCB" in found:
            extra[key.removesuffix("weight") + "SCB"] = mine.removesuffix("weight") + "SCB"
    formats = [key for key in found if key.endswith(".weight_format") and key.removesuffix("weight_format") + "SCB" in extra]
    unknown = sorted(set(found) - set(targets) - set(aliases) - set(extra) - set(formats))
    missing = sorted(key for key, mine in targets.items() if mine not in places)
    for what, keys in (("unknown", unknown), ("missing", missing)):
        if keys:
            raise WeightsError(f"{folder}: {len(keys)} {what} key(s), first {keys[0]!r}: these are not the weights of its config.json")
    for key in formats:
        with open_safetensors(found[key]) as file:
            if file.get_slice(key).get_dtype() != "U8" or file.get_tensor(key).any():
                raise WeightsError(f"{found[key]}: {key} is not 0 (row after row), the only order of int8 weights that is implemented")
    return places | {mine: (found[key], key) for key, mine in extra.items()}


def _same(path: Path, key: str, other_path: Path, other_key: str) -> bool:
    """Whether two tensors hold the same numbers, block by block."""
    with open_safetensors(path) as a, open_safetensors(other_path) as b:
        a, b = a.get_slice(key), b.get_slice(other_key)
        shape = a.get_shape()
        if not shape or shape != b.get_shape() or a.get_dtype() != b.get_dtype():
            return False
        rows = max(1, BLOCK // max(1, shape[-1]))
        return all(torch.equal(a[i : i + rows], b[i : i + rows]) for i in range(0, shape[0], rows))


def _fill(model: nn.Module, places: dict[str, tuple[Path, str]], forms: _Forms, threshold: float) -> None:
    """Fill a meta model; places: from `_locate`, threshold: of int8 layers."""
    shapes = {name: p.shape for name, p in model.named_parameters() if name in places}
    linears = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    codes = {}  # name -> weight and SCB of the layers that become int8
    later = []  # what fills the tensors that are made here; room for all of them first, or their blocks would leave holes between them
    shared = {path: open_safetensors(path) for path in {path for path, _ in places.values()}}  # for tensors that are used as they are stored
    for name in sorted(shapes, key=lambda name: (str(places[name][0]), name)):
        path, key = places[name]
        stored = shared[path].get_slice(key).get_dtype()
        form = forms(name, name in linears)
        if stored == "BF16" and forms.prefix + name == "mt5.embed.weight" and any(place.endswith("SCB") for place in places):
            form = torch.bfloat16  # as it was written beside int8 layers
        if stored == "I8" and name in linears:
            scale = name.removesuffix("weight") + "SCB"
            if scale not in places:
                raise WeightsError(f"{path}: {key} is int8 and has no scales (SCB) beside it")
            if forms.wished(name) not in (None, "int8"):
                raise WeightsError(f"{path}: {key} is stored in int8; it cannot become {forms.wished(name)}, which needs the original weights")
            weight = _read_tensor(shared[path], path, key, shapes[name], torch.int8)
            codes[name] = weight, _read_tensor(shared[places[scale][0]], *places[scale], shapes[name][:1])
        elif stored == SAFETENSORS_NAMES.get(form):
            _set_parameter(model, name, _read_tensor(shared[path], path, key, shapes[name]))
        else:
            _check_slice(path, key, shared[path].get_slice(key), shapes[name])
            made = torch.empty(shapes[name], dtype=form)
            if form == torch.int8:
                codes[name] = made, torch.empty(len(made))
                later.append((_quantize, path, key, codes[name]))
            else:
                _set_parameter(model, name, made)
                later.append((_convert, path, key, made))
    for fill, path, key, made in later:
        fill(path, key, made)
    for name, (weight, scale) in codes.items():
        owner, _, leaf = name.removesuffix(".weight").rpartition(".")
        linear = model.get_submodule(name.removesuffix(".weight"))
        try:
            layer = Int8Linear.from_tensors(weight, scale, None if linear.bias is None else linear.bias.detach(), threshold)
        except ValueError as error:
            raise WeightsError(f"{places[name][0]}: {name}: {error}") from None
        setattr(model.get_submodule(owner), leaf, layer)


def _blocks(path: Path, key: str, shape):
    """The rows of a tensor, some at a time. The file is opened anew for each block: pages once read of a mapped file count as ours until
    it is closed, and a shard has ten gigabytes of them."""
    rows = max(1, BLOCK // max(1, torch.Size(shape[1:]).numel()))
    for start in range(0, shape[0], rows):
        with open_safetensors(path) as file:
            yield start, _checked(path, key, file.get_slice(key)[start : start + rows])


def _checked(path: Path, key: str, value: torch.Tensor) -> torch.Tensor:
    """`value`, if its numbers are all finite."""
    if value.is_floating_point():
        for part in value.view(-1).split(BLOCK):  # a sum is 14 times as fast as isfinite, but that of finite numbers can overflow
            if not part.sum(dtype=torch.float32).isfinite() and not part.isfinite().all():
                raise WeightsError(f"{path}: {key} holds numbers that are not finite; the file is damaged")
    return value


def _check_slice(path: Path, key: str, piece, shape, kind: torch.dtype | None = None) -> None:
    """Raise WeightsError unless a tensor in a file has this shape and is of this type (None: floating point)."""
    found, stored = tuple(piece.get_shape()), piece.get_dtype()
    if found != tuple(shape):
        raise WeightsError(f"{path}: {key} has shape {found}, its config.json wants {tuple(shape)}")
    if stored not in (("F32", "BF16", "F16", "F64") if kind is None else ("I8",)):
        raise WeightsError(f"{path}: {key} has the type {stored}, expected {'floating point' if kind is None else 'int8'}")


def _read_tensor(file, path: Path, key: str, shape, kind: torch.dtype | None = None) -> torch.Tensor:
    """One tensor of an open safetensors file as it is stored, checked: a view of the mapped file. kind: as in `_check_slice`."""
    try:
        _check_slice(path, key, file.get_slice(key), shape, kind)
        return _checked(path, key, file.get_tensor(key))
    except (SafetensorError, RuntimeError) as error:
        raise WeightsError(f"{path}: {key} cannot be read ({error})") from None


def _convert(path: Path, key: str, out: torch.Tensor) -> None:
    """Fill `out` with a tensor of a file, block by block."""
    try:
        for start, block in _blocks(path, key, out.shape):
            out[start : start + len(block)] = block
    except (SafetensorError, RuntimeError) as error:
        raise WeightsError(f"{path}: {key} cannot be read ({error})") from None


def _quantize(path: Path, key: str, out: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Fill codes, int8 (out, in), and scales, float32 (out,), with those of a weight in a file, block by block."""
    codes, scales = out
    try:
        for start, block in _blocks(path, key, codes.shape):
            rows = slice(start, start + len(block))
            codes[rows], scales[rows] = quantize_rows(block.half().float())  # by way of fp16, as bitsandbytes
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise error if isinstance(error, WeightsError) else WeightsError(f"{path}: {key} cannot become int8 ({error})") from None


def _set_parameter(model: nn.Module, name: str, value: torch.Tensor):
    """Put a tensor where a (meta) parameter was."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value))


def _threshold(folder: Path, hf: dict) -> float:
    """The outlier threshold of int8 layers: that of the config.json, if bitsandbytes or we have quantised its weights."""
    block = hf.get("quantization_config")
    if block is None:
        return THRESHOLD
    if not isinstance(block, dict) or block.get("quant_method") != "bitsandbytes" or not block.get("load_in_8bit"):
        raise WeightsError(f"{folder / 'config.json'}: quantization_config is not that of bitsandbytes in 8 bits; get the original weights")
    value = block.get("llm_int8_threshold", THRESHOLD)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise WeightsError(f"{folder / 'config.json'}: llm_int8_threshold = {value!r}; expected a number, at least 0")
    return float(value)


# ------------------------------------------------------------------------------------------------------------- writing


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


def write_tensors(path: Path, entries: dict[str, tuple]) -> str:
    """Write a safetensors file piece by piece, atomically; returns its sha256. Raises WeightsError when the disk refuses.

    entries: key -> type, shape and a function that yields the numbers, some rows at a time: so no tensor need ever be whole in memory.
    The format: 8 bytes with the length of a JSON header, the header (where each tensor starts and ends), the tensors without gaps.
    """
    sizes = {key: dtype.itemsize * torch.Size(shape).numel() for key, (dtype, shape, _) in entries.items()}
    order = sorted(entries, key=lambda key: (-entries[key][0].itemsize, key))  # large types first keeps all of them aligned
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key in order:
        dtype, shape, _ = entries[key]
        header[key] = dict(dtype=SAFETENSORS_NAMES[dtype], shape=list(shape), data_offsets=[end, end := end + sizes[key]])
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    sha = hashlib.sha256()

    def write(temporary):
        with open(temporary, "wb") as file:
            for data in (len(text).to_bytes(8, "little"), text):
                sha.update(data)
                file.write(data)
            for key in order:
                dtype, _, blocks = entries[key]
                written = 0
                for block in blocks():
                    data = block.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy()
                    sha.update(data)
                    file.write(data)
                    written += data.nbytes
                assert written == sizes[key], f"{key}: {written} bytes came, its shape wants {sizes[key]}"

    try:
        write_atomic(Path(path), write)
    except OSError as error:
        raise WeightsError(f"{path}: not written ({error}); the previous file is untouched, free some space") from None
    return sha.hexdigest()


def write_shards(folder: Path, entries: dict[str, tuple], shard: int = SHARD) -> dict[str, str]:
    """`write_tensors` into model.safetensors, or into several files of at most `shard` bytes and an index; name -> sha256."""
    sizes = {key: dtype.itemsize * torch.Size(shape).numel() for key, (dtype, shape, _) in entries.items()}
    groups, room = [[]], shard
    for key in entries:
        if groups[-1] and sizes[key] > room:
            groups.append([])
            room = shard
        groups[-1].append(key)
        room -= sizes[key]
    folder.mkdir(parents=True, exist_ok=True)
    if len(groups) == 1:
        done = {SINGLE: write_tensors(folder / SINGLE, entries)}
        (folder / INDEX).unlink(missing_ok=True)  # of shards that were there before
        return done
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    done = {name: write_tensors(folder / name, {key: entries[key] for key in group}) for name, group in zip(names, groups)}
    shard_of = {key: name for name, group in zip(names, groups) for key in group}
    write_json(folder / INDEX, dict(metadata=dict(total_size=sum(sizes.values())), weight_map=shard_of))
    return done


def float_names(model: MBLIP) -> dict[str, str]:
    """`official_names` of the same model without int8 and LoRA."""
    with torch.device("meta"):
        return official_names(MBLIP(model.cfg))


def held_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Our name -> tensor, with the names of a model without LoRA (A and B are left out); an int8 layer has weight, SCB and bias."""
    own = {f"{path}.{side}" for path, layer in lora_layers(model).items() for side in "AB"}
    return {name.replace(".base.", "."): t for name, t in model.state_dict().items() if name not in own}


def save_mblip(model: MBLIP, folder: Path, image_token: int, languages=None, dtype: torch.dtype | None = torch.float32,
               shard: int = SHARD) -> None:  # fmt: skip
    """Write `config.json` and the weights in the official layout; transformers opens the folder.

    image_token: see `config_to_hf`; languages: the codes it was trained to answer in, stored as one more key. dtype: of all floats, None =
    as each is held. shard: bytes a file, at most. LoRA is not written: see `save_merged` and `save_adapter`.

    What is held in int8 is written in int8, as bitsandbytes names it, and loads at once the next time. Such a folder gets a RECORD;
    transformers, which keeps `wo` and the head in floats, cannot run it.
    """
    folder, held, entries = Path(folder), held_tensors(model), {}
    add = lambda key, t: entries.update({key: (t.dtype, tuple(t.shape), lambda: [t])})
    for mine, official in float_names(model).items():
        scale = mine.removesuffix("weight") + "SCB"
        if held[mine].dtype == torch.int8:
            add(official, held[mine])
            add(official.removesuffix("weight") + "SCB", held[scale])
            add(official.removesuffix("weight") + "weight_format", torch.zeros((), dtype=torch.uint8))
        else:
            t = held[mine]
            entries[official] = (dtype or t.dtype, tuple(t.shape), lambda t=t: [t])
    done = write_shards(folder, entries, shard)
    extra = {} if languages is None else {"languages": sorted(languages)}
    if int8 := [m for m in model.modules() if isinstance(m, Int8Linear)]:
        kept = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
        official = {mine.removesuffix(".weight"): key.removesuffix(".weight") for mine, key in float_names(model).items()}
        extra["quantization_config"] = dict(quant_method="bitsandbytes", load_in_8bit=True, llm_int8_threshold=int8[0].threshold,
                                            llm_int8_skip_modules=[official[path] for path in kept])  # fmt: skip
        write_record(folder, done, {"written_by": "nanomblip"})
    write_json(folder / "config.json", config_to_hf(model.cfg, image_token) | extra)


def save_trained(model: MBLIP, folder: Path, trained, vision: str, language_model: str, image_token: int, languages=None,
                 fingerprint: str | None = None) -> None:  # fmt: skip
    """Write some parameters only, as fp16, and where the others are: a few MB instead of the whole model.

    trained: names of parameters as in `model.named_parameters()`, LoRA not among them; vision and language_model: the folders of the two
    bases, relative to `folder`; their parameters must be the model's own. fingerprint: of these, if `frozen_fingerprint` has taken it
    already. Otherwise as `save_mblip`; transformers cannot open it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names, held = float_names(model), held_tensors(model)
    tensors = {names[mine]: held[mine].detach().to(torch.float16) for mine in trained}
    fingerprint = fingerprint or frozen_fingerprint(model, trained, folder / vision, folder / language_model)
    bases = dict(vision=vision, language_model=language_model, sha256=fingerprint, trained_sha256=digest(tensors))
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    extra = {} if languages is None else {"languages": sorted(languages)}
    write_json(folder / "config.json", config_to_hf(model.cfg, image_token) | extra | {"bases": bases})


def frozen_fingerprint(model: MBLIP, trained, vision: Path, language_model: Path) -> str:
    """`digest` of all parameters but the trained ones, in fp32: of the model's own, or if it holds them in another type, of the files."""
    held, frozen = held_tensors(model), [mine for mine in float_names(model) if mine not in set(trained)]
    if all(held[mine].dtype == torch.float32 for mine in frozen):
        return digest({mine: held[mine] for mine in frozen})
    return _digest_of_bases(vision, language_model, frozen)


def save_merged(model: MBLIP, folder: Path, image_token: int, source: Path | tuple[Path, Path], languages=None, dtype: torch.dtype = torch.float32,
                shard: int = SHARD) -> None:  # fmt: skip
    """Write the whole model in floats with its LoRA merged into the weights; transformers opens the folder and computes the same.

    source: the folder that the model was loaded from, or those of its two bases, vision and language model: what is held in int8 or
    bf16 is taken from there as it was before (to merge into rounded weights, and round again, moves the model), one tensor at a time.
    Otherwise as `save_mblip`. Raises WeightsError when the source holds int8 itself.
    """
    held, lora, entries, places = held_tensors(model), lora_layers(model), {}, None
    for mine, official in float_names(model).items():
        t, layer = held[mine], lora.get(mine.removesuffix(".weight"))
        rounded = t.dtype != torch.float32
        if rounded:
            places = places or _places(source)
            with open_safetensors(places[mine][0]) as file:
                _check_slice(*places[mine], file.get_slice(places[mine][1]), t.shape)

        def blocks(mine=mine, t=t, layer=layer, rounded=rounded):
            rows = max(1, BLOCK // max(1, t.shape[-1]))
            parts = _blocks(*places[mine], t.shape) if rounded else ((i, t[i : i + rows]) for i in range(0, len(t), rows))
            for start, part in parts:
                if layer is not None and layer.unmerged is None:
                    part = part.float() + layer.scale * layer.B[start : start + len(part)] @ layer.A
                yield part

        entries[official] = dtype, tuple(t.shape), blocks
    write_shards(Path(folder), entries, shard)
    extra = {} if languages is None else {"languages": sorted(languages)}
    write_json(Path(folder) / "config.json", config_to_hf(model.cfg, image_token) | extra)


def save_processor(folder: Path, source: Path, queries: int) -> None:
    """Write what belongs beside the weights: tokenizer and picture settings of the folder `source`, for us and for transformers' Blip2Processor."""
    tokenizer = Tokenizer(source / "spiece.model")
    pictures = read_json(source / "preprocessor_config.json")
    write_atomic(folder / "spiece.model", lambda path: path.write_bytes(tokenizer.path.read_bytes()))
    write_json(folder / "preprocessor_config.json", pictures)
    write_json(folder / "processor_config.json", dict(processor_class="Blip2Processor", num_query_tokens=queries))
    for name, content in to_hf(tokenizer, image_token=len(tokenizer)).items():
        write_json(folder / name, content)


def _places(source: Path | tuple[Path, Path]) -> dict[str, tuple[Path, str]]:
    """Our name -> file and key, for a folder in the official layout, one of `save_trained` (its bases), or two bases."""
    if isinstance(source, tuple):
        return _places_of_bases(*source)
    config = read_json(source / "config.json")
    if "bases" in config:
        return _places_of_bases(source / config["bases"]["vision"], source / config["bases"]["language_model"])
    with torch.device("meta"):
        model = MBLIP(config_from_hf(config))
    return _locate(source, {official: mine for mine, official in official_names(model).items()}, "language_model.")


def save_mt5(model: MT5, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a language model by itself in the official layout."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names, parameters = mt5_names(model), dict(model.named_parameters())
    tensors = {official: parameters[mine].to(dtype) for mine, official in names.items()}
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", mt5_config_to_hf(model.cfg) | {"architectures": ["MT5ForConditionalGeneration"]})


# ------------------------------------------------------------------------------------------------- LoRA in PEFT's files

# What must have this value (or be absent) in an adapter_config.json: anything else would be another function.
_PEFT_FIXED = dict(peft_type="LORA", bias="none", use_dora=False, fan_in_fan_out=False, modules_to_save=None, layers_to_transform=None,
                   layers_pattern=None, rank_pattern={}, alpha_pattern={}, exclude_modules=None, lora_bias=False, layer_replication=None,
                   target_parameters=None, trainable_token_indices=None, use_qalora=False, megatron_config=None, alora_invocation_tokens=None)  # fmt: skip


def _linear_names(mt5: MT5) -> dict[str, str]:
    """Official name -> our path, for every linear layer of a language model (as `mt5_names`, without ".weight")."""
    ours = {f"mt5.{path}.weight" for path, m in mt5.named_modules() if isinstance(m, (nn.Linear, Int8Linear, LoRALinear)) and not path.endswith(".base")}
    names = _expand(MT5_KEYS, ours).items()
    cut = lambda name, start: name.removeprefix(start).removesuffix(".weight")
    return {cut(official, "language_model."): cut(mine, "mt5.") for mine, official in names}


def base_digest(mt5: MT5) -> str:
    """sha256 of a language model without its LoRA, the codes and scales of int8 layers included: the fingerprint that an adapter carries."""
    if any(layer.unmerged is not None for layer in lora_layers(mt5).values()):
        raise ValueError("LoRA is merged: unmerge it first")
    return digest(held_tensors(mt5))


def save_adapter(mt5: MT5, folder: Path, prefix: str = "") -> None:
    """Write the LoRA of a language model as `peft` does: adapter_config.json and adapter_model.safetensors.

    prefix: "" for an adapter to the language model alone, "language_model." for one to the whole BLIP-2 model. The fingerprint of
    the base stands in the safetensors metadata. ValueError without LoRA, or while it is merged.
    """
    layers = lora_layers(mt5)
    if not layers:
        raise ValueError("the model has no LoRA to save")
    base = base_digest(mt5)
    official = {mine: name for name, mine in _linear_names(mt5).items()}
    tensors = {f"base_model.model.{prefix}{official[path]}.lora_{side}.weight": getattr(layer, side).detach()
               for path, layer in layers.items() for side in "AB"}  # fmt: skip
    one = next(iter(layers.values()))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt", "base_sha256": base})
    write_json(folder / "adapter_config.json", dict(
        peft_type="LORA", task_type=None if prefix else "SEQ_2_SEQ_LM", inference_mode=True, r=one.r, lora_alpha=one.alpha,
        lora_dropout=one.dropout, use_rslora=one.rslora, bias="none", target_modules=sorted({path.rpartition(".")[2] for path in layers}),
        base_model_name_or_path=None))  # fmt: skip


def load_adapter(mt5: MT5, folder: Path | str) -> None:
    """Add the LoRA of an adapter written by us or by `peft`, to the language model alone or to the whole BLIP-2 model.

    Strict where PEFT is silent: every tensor must belong to a targeted layer and every targeted layer must have its two. mBLIP's own
    targets ".k" and ".o" mean k and o. Raises WeightsError, and leaves the model as it was, for what is not implemented, does
    not fit, or was trained on another base (if the adapter says on which).
    """
    folder = Path(folder)
    if lora_layers(mt5):
        raise WeightsError(f"{folder}: the model has LoRA already")
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict):
        raise WeightsError(f"{folder}: adapter_config.json does not hold an object")
    for key, value in _PEFT_FIXED.items():
        if config.get(key, value) != value and not (not value and not config[key]):  # None, False, [] and {} all mean: not used
            raise WeightsError(f"{folder}: an adapter with {key} = {config[key]!r} is not implemented (only {value!r})")
    r, alpha, dropout = config.get("r", 8), config.get("lora_alpha", 8), config.get("lora_dropout", 0.0)
    targets = config.get("target_modules")
    if not (isinstance(targets, list) and targets and all(isinstance(t, str) and t.strip(".") for t in targets)):
        raise WeightsError(f"{folder}: target_modules = {targets!r}; only a list of names is implemented")
    try:
        check_lora(r, alpha, dropout)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{folder}: {error}") from None

    linears = _linear_names(mt5)
    tensors, path = {}, folder / "adapter_model.safetensors"
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise WeightsError(f"{folder}: adapter_model.bin is a pickle and is not read; save it as safetensors with peft first")
    with open_safetensors(path) as file:
        base = (file.metadata() or {}).get("base_sha256")
        for key in file.keys():
            name, _, side = key.removeprefix("base_model.model.").removeprefix("language_model.").removesuffix(".weight").rpartition(".lora_")
            if name not in linears or side not in ("A", "B"):
                raise WeightsError(f"{path}: unknown key {key!r}")
            layer = mt5.get_submodule(linears[name])
            shape = (r, layer.in_features) if side == "A" else (layer.out_features, r)
            tensors[name, side] = _read_tensor(file, path, key, shape).float()
            if not tensors[name, side].isfinite().all():
                raise WeightsError(f"{path}: {key} is not finite")
    meant = [name for name in linears if any(f".{name}".endswith("." + target.lstrip(".")) for target in targets)]
    for target in targets:
        if not any(f".{name}".endswith("." + target.lstrip(".")) for name in linears):
            raise WeightsError(f"{folder}: target {target!r} matches no linear layer")
    odd = sorted({name for name, _ in tensors} ^ set(meant)) or sorted(name for name in meant if not {(name, "A"), (name, "B")} <= set(tensors))
    if odd:
        raise WeightsError(f"{folder}: its targets and its tensors disagree about {len(odd)} layer(s), first {odd[0]!r}")
    if base is not None and base != base_digest(mt5):
        raise WeightsError(f"{folder}: this adapter was trained on another language model (its fingerprint differs)")
    mt5.requires_grad_(False)
    for name in meant:
        owner, _, leaf = linears[name].rpartition(".")
        parent = mt5.get_submodule(owner)
        layer = LoRALinear(getattr(parent, leaf), r, alpha, dropout, bool(config.get("use_rslora", False)))
        layer.A.data.copy_(tensors[name, "A"])
        layer.B.data.copy_(tensors[name, "B"])
        setattr(parent, leaf, layer)
