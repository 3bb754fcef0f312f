"""Weights in and out: one layout only, that of Hugging Face's BLIP-2 (`config.json` + safetensors).

nano's checkpoints and the official ones go through the same strict loader, and transformers opens what we write. Strict
means that every tensor of the file finds its place and every place gets its tensor, in the right shape; anything else is
a `WeightsError` that names the key. Nothing is ever unpickled.

A model is built on the meta device (shapes without memory) and filled one tensor at a time straight from the
memory-mapped file, so that there are never two copies of it. What is wanted in int8 or bf16 is converted on the way, some rows
at a time: mBLIP mT0-XL is 19.3 GB on the disk and 5.7 GB in int8, and loading it took 5.7 GB at its peak (tests/bench_official.py).

A bit that flips in a file of floats is not seen, unless it makes a number that is not finite. Where the sha256 is known (RECORD: files
that hub.py fetched, and quantised ones of ours) a file that was touched since is hashed before it is used.
"""

from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError

from nanomblip.model.int8 import THRESHOLD, Int8Linear, quantize_rows
from nanomblip.model.mblip import MBLIP
from nanomblip.model.mt5 import MT5
from nanomblip.weights.files import BLOCK, SAFETENSORS_NAMES, digest, is_plain_name, open_safetensors, read_json
from nanomblip.weights.layout import (
    EMBED_ALIASES,
    WeightsError,
    config_from_hf,
    float_names,
    mt5_config_from_hf,
    mt5_names,  # fmt: skip
    official_names,
    vision_config_from_hf,
)
from nanomblip.weights.records import check_record

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}  # what --vision_dtype and --llm_dtype mean


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


def load_mblip(
    folder: Path | str,
    dtype: torch.dtype = torch.float32,
    vision_dtype: str | None = None,
    llm_dtype: str | None = None,
) -> MBLIP:
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
    return _load(
        folder, MBLIP, config_from_hf, official_names, "language_model.", _Forms(dtype, vision_dtype, llm_dtype)
    )


def load_mt5(folder: Path | str, dtype: torch.dtype = torch.float32, llm_dtype: str | None = None) -> MT5:
    """Build and fill a language model by itself (an mT0 or mT5 folder of the hub, or ours); as `load_mblip`."""
    return _load(Path(folder), MT5, mt5_config_from_hf, mt5_names, "", _Forms(dtype, None, llm_dtype, prefix="mt5."))


def load_vision(
    folder: Path | str, mt5: MT5, dtype: torch.dtype = torch.float32, vision_dtype: str | None = None
) -> MBLIP:
    """ViT, Q-Former and queries of a BLIP-2 (or mBLIP) folder in front of another language model, a fresh projection between: where
    re-alignment starts from. Nothing is read of the folder's own language model and projection. As `load_mblip`."""
    config_of = lambda hf: vision_config_from_hf(hf, mt5.cfg)
    names_of = lambda model: {
        mine: key for mine, key in official_names(model).items() if not mine.startswith(("mt5.", "proj."))
    }
    model = _load(
        Path(folder), MBLIP, config_of, names_of, "language_model.", _Forms(dtype, vision_dtype, None), skip="language_"
    )
    model.exchange_language_model(mt5)
    return model


def _load_on_bases(
    folder: Path, config: dict, dtype: torch.dtype, vision_dtype: str | None, llm_dtype: str | None
) -> MBLIP:
    """The model of a folder that `save_trained` wrote; errors as in `load_mblip`."""
    bases = config["bases"]
    if not (isinstance(bases, dict) and set(bases) == {"vision", "language_model", "sha256", "trained_sha256"}
            and all(isinstance(value, str) for value in bases.values())):  # fmt: skip
        raise WeightsError(
            f"{folder / 'config.json'}: bases must name vision, language_model, sha256 and trained_sha256"
        )
    vision, llm = folder / bases["vision"], folder / bases["language_model"]
    mt5 = load_mt5(llm, dtype, llm_dtype)
    model = load_vision(vision, mt5, dtype, vision_dtype)
    if config_from_hf(config) != model.cfg:
        raise WeightsError(f"{folder}: its config.json describes another model than its bases")
    found, names = find_tensors(folder), {official: mine for mine, official in float_names(model).items()}
    if unknown := sorted(set(found) - set(names)):
        raise WeightsError(
            f"{folder}: {len(unknown)} unknown key(s), first {unknown[0]!r}: these are not the weights of its config.json"
        )
    if _digest_of_bases(vision, llm, [mine for key, mine in names.items() if key not in found]) != bases["sha256"]:
        raise WeightsError(
            f"{folder}: was trained on other weights than {bases['vision']} and {bases['language_model']} hold now{_restore(folder)}"
        )
    trained = {}
    for key, path in found.items():
        with open_safetensors(path) as file:
            trained[key] = _read_tensor(file, path, key, model.get_parameter(names[key]).shape)
    if digest(trained) != bases["trained_sha256"]:
        raise WeightsError(
            f"{folder}: model.safetensors does not have the sha256 it was written with{_restore(folder)}"
        )
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
    places = {
        f"mt5.{mine}": place
        for mine, place in _locate(llm, {key: mine for mine, key in mt5_names(mt5).items()}, "").items()
    }
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
    shipped = Path(__file__).resolve().parents[2] / "weights" / "nano"
    return (
        "; restore them with: git checkout -- weights/nano"
        if shipped in (folder.resolve(), *folder.resolve().parents)
        else ""
    )


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
    formats = [
        key for key in found if key.endswith(".weight_format") and key.removesuffix("weight_format") + "SCB" in extra
    ]
    unknown = sorted(set(found) - set(targets) - set(aliases) - set(extra) - set(formats))
    missing = sorted(key for key, mine in targets.items() if mine not in places)
    for what, keys in (("unknown", unknown), ("missing", missing)):
        if keys:
            raise WeightsError(
                f"{folder}: {len(keys)} {what} key(s), first {keys[0]!r}: these are not the weights of its config.json"
            )
    for path in {found[key] for key in formats}:
        with open_safetensors(path) as file:
            for key in (key for key in formats if found[key] == path):
                if file.get_slice(key).get_dtype() != "U8" or file.get_tensor(key).any():
                    raise WeightsError(
                        f"{path}: {key} is not 0 (row after row), the only order of int8 weights that is implemented"
                    )
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
    shared = {
        path: open_safetensors(path) for path in {path for path, _ in places.values()}
    }  # for tensors that are used as they are stored
    for name in sorted(shapes, key=lambda name: (str(places[name][0]), name)):
        path, key = places[name]
        stored = shared[path].get_slice(key).get_dtype()
        form = forms(name, name in linears)
        if (
            stored == "BF16"
            and forms.prefix + name == "mt5.embed.weight"
            and any(place.endswith("SCB") for place in places)
        ):
            form = torch.bfloat16  # as it was written beside int8 layers
        if stored == "I8" and name in linears:
            scale = name.removesuffix("weight") + "SCB"
            if scale not in places:
                raise WeightsError(f"{path}: {key} is int8 and has no scales (SCB) beside it")
            if forms.wished(name) not in (None, "int8"):
                raise WeightsError(
                    f"{path}: {key} is stored in int8; it cannot become {forms.wished(name)}, which needs the original weights"
                )
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
            layer = Int8Linear.from_tensors(
                weight, scale, None if linear.bias is None else linear.bias.detach(), threshold
            )
        except ValueError as error:
            raise WeightsError(f"{places[name][0]}: {name}: {error}") from None
        setattr(model.get_submodule(owner), leaf, layer)


def _blocks(path: Path, key: str, shape):
    """The rows of a tensor, some at a time. The file is opened anew every 16 blocks: pages once read of a mapped file count as ours until
    it is closed, and a shard has ten gigabytes of them."""
    rows = max(1, BLOCK // max(1, torch.Size(shape[1:]).numel()))
    for first in range(0, shape[0], 16 * rows):
        with open_safetensors(path) as file:
            piece = file.get_slice(key)
            for start in range(first, min(first + 16 * rows, shape[0]), rows):
                yield start, _checked(path, key, piece[start : start + rows])


def _checked(path: Path, key: str, value: torch.Tensor) -> torch.Tensor:
    """`value`, if its numbers are all finite."""
    if value.is_floating_point():
        for part in value.view(-1).split(
            BLOCK
        ):  # a sum is 14 times as fast as isfinite, but that of finite numbers can overflow
            if not part.sum().isfinite() and not part.isfinite().all():
                raise WeightsError(f"{path}: {key} holds numbers that are not finite; the file is damaged")
    return value


def _check_slice(path: Path, key: str, piece, shape, kind: torch.dtype | None = None) -> None:
    """Raise WeightsError unless a tensor in a file has this shape and is of this type (None: floating point)."""
    found, stored = tuple(piece.get_shape()), piece.get_dtype()
    if found != tuple(shape):
        raise WeightsError(f"{path}: {key} has shape {found}, its config.json wants {tuple(shape)}")
    if stored not in (("F32", "BF16", "F16", "F64") if kind is None else ("I8",)):
        raise WeightsError(
            f"{path}: {key} has the type {stored}, expected {'floating point' if kind is None else 'int8'}"
        )


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
        raise (
            error if isinstance(error, WeightsError) else WeightsError(f"{path}: {key} cannot become int8 ({error})")
        ) from None


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
        raise WeightsError(
            f"{folder / 'config.json'}: quantization_config is not that of bitsandbytes in 8 bits; get the original weights"
        )
    value = block.get("llm_int8_threshold", THRESHOLD)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise WeightsError(f"{folder / 'config.json'}: llm_int8_threshold = {value!r}; expected a number, at least 0")
    return float(value)
