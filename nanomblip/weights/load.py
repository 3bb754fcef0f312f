"""Models out of files, in one layout only: that of Hugging Face's BLIP-2 (`config.json` + safetensors).

nano's checkpoints and the official ones go through the same strict loader, and transformers opens what we write.
Strict means that every tensor of the file finds its place and every place gets its tensor, in the right shape;
anything else is a `WeightsError` that names the key. Nothing is unpickled (see convert.py).

The header of the files is compared with config.json first. Then a model is built on the meta device (shapes without
memory) and filled one tensor at a time straight from the memory-mapped file, so that there are never two copies of it.
What is wanted in int8 or bf16 is converted on the way, some rows at a time: mBLIP mT0-XL is 19.3 GB on the disk and
5.7 GB in int8, and loading it took 5.7 GB at its peak (tests/bench_official.py).

A bit that flips in a file of floats is not seen, unless it makes a number that is not finite. Where the sha256 is known
(records.py: files that hub.py fetched, and quantised ones of ours) a file that was touched since is hashed first.
"""

import os
from pathlib import Path

import torch
import torch.nn as nn

from nanomblip.model.int8 import Int8Linear, quantize_linears
from nanomblip.model.lora import lora_layers, merge_lora
from nanomblip.model.mblip import MBLIP
from nanomblip.model.mt5 import MT5
from nanomblip.weights.adapter import load_adapter, lora_tensors
from nanomblip.weights.files import SAFETENSORS_NAMES, digest, find_tensors, open_safetensors, read_json
from nanomblip.weights.layout import (
    EMBED_ALIASES,
    WeightsError,
    check_depths,
    config_from_hf,
    float_names,
    int8_threshold,
    mt5_config_from_hf,
    mt5_names,
    official_names,
    vision_config_from_hf,
)
from nanomblip.weights.records import check_record
from nanomblip.weights.tensors import check_slice, convert, quantize, read_tensor, same_tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}  # of --vision_dtype and --llm_dtype


def load_mblip(
    folder: Path | str,
    dtype: torch.dtype = torch.float32,
    vision_dtype: str | None = None,
    llm_dtype: str | None = None,
) -> MBLIP:
    """Build the model of a folder in the official layout and fill it, strictly; returns it in eval mode.

    A folder written by `save_trained` holds some parameters only; the others come from the folders it names, and its
    LoRA is merged.
    dtype: of all floats. vision_dtype: of the ViT, llm_dtype: of the language model, each "fp32", "bf16" or "int8". In
    int8 are the linear layers; beside them the embedding is bf16 and the rest `dtype`. A file that is int8 already
    stays so. `mt5.stored` says where the language model's own files are (adapter.py).

    Raises WeightsError for a missing or damaged file, an unknown or a missing key, a wrong shape or type, a number
    that is not finite, or bases that are not those the trained parts were trained on.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json") if folder.is_dir() else {}
    if isinstance(config, dict) and "bases" in config:
        return _load_on_bases(folder, config, dtype, vision_dtype, llm_dtype)
    forms = _Forms(dtype, vision_dtype, llm_dtype)
    return _load(folder, MBLIP, config_from_hf, official_names, "language_model.", forms)


def load_mt5(folder: Path | str, dtype: torch.dtype = torch.float32, llm_dtype: str | None = None) -> MT5:
    """Build and fill a language model by itself (an mT0 or mT5 folder of the hub, or ours); as `load_mblip`."""
    return _load(Path(folder), MT5, mt5_config_from_hf, mt5_names, "", _Forms(dtype, None, llm_dtype, prefix="mt5."))


def load_vision(
    folder: Path | str, mt5: MT5, dtype: torch.dtype = torch.float32, vision_dtype: str | None = None
) -> MBLIP:
    """ViT, Q-Former and queries of a BLIP-2 (or mBLIP) folder before another language model: where re-alignment starts.

    The projection between them is fresh. Nothing is read of the folder's own language model and projection. As
    `load_mblip`.
    """
    config_of = lambda hf: vision_config_from_hf(hf, mt5.cfg)
    forms = _Forms(dtype, vision_dtype, None)
    model = _load(Path(folder), MBLIP, config_of, _vision_names, "language_model.", forms, skip="language_")
    model.exchange_language_model(mt5)
    return model


def _load_on_bases(
    folder: Path, config: dict, dtype: torch.dtype, vision_dtype: str | None, llm_dtype: str | None
) -> MBLIP:
    """The model of a folder that `save_trained` wrote; errors as in `load_mblip`."""
    bases, keys = config["bases"], ["adapter", "language_model", "sha256", "trained_sha256", "vision"]
    is_text = lambda v: isinstance(v, str) and not Path(v).is_absolute()
    if not (isinstance(bases, dict) and sorted({"adapter": "", **bases}) == keys and all(map(is_text, bases.values()))):
        raise WeightsError(f"{folder / 'config.json'}: bases must name {', '.join(keys)}, folders relative to this one")
    vision, llm = folder / bases["vision"], folder / bases["language_model"]
    # All three before the weights are read, which takes a while.
    own, of_llm = sizes_of(folder, config_from_hf), sizes_of(llm, mt5_config_from_hf)
    if own != sizes_of(vision, lambda hf: vision_config_from_hf(hf, of_llm)):
        raise WeightsError(f"{folder}: its config.json describes another model than its bases")
    if "adapter" in bases:
        mt5, lora = _with_adapter(llm, folder / bases["adapter"], dtype, llm_dtype)
    else:
        mt5, lora = load_mt5(llm, dtype, llm_dtype), {}
    model = load_vision(vision, mt5, dtype, vision_dtype)
    found, names = find_tensors(folder), {official: mine for mine, official in float_names(model).items()}
    if unknown := sorted(set(found) - set(names)):
        raise _not_those(folder, "unknown", unknown)
    if _digest_of_bases(vision, llm, [mine for key, mine in names.items() if key not in found]) != bases["sha256"]:
        other = f"was trained on other weights than {bases['vision']} and {bases['language_model']} hold now"
        raise WeightsError(f"{folder}: {other}{_restore(folder)}")
    trained = {}
    for key, path in found.items():
        with open_safetensors(path) as file:
            trained[key] = read_tensor(file, path, key, model.get_parameter(names[key]).shape)
    if digest(trained | lora) != bases["trained_sha256"]:
        raise WeightsError(f"{folder}: its weights do not have the sha256 they were written with{_restore(folder)}")
    for key, value in trained.items():
        _set_parameter(model, names[key], value.to(dtype))
        if names[key].startswith("mt5."):
            model.mt5.stored[names[key].removeprefix("mt5.")] = found[key], key
    return model.eval()


def _with_adapter(llm: Path, adapter: Path, dtype: torch.dtype, llm_dtype: str | None) -> tuple[MT5, dict]:
    """A language model with the LoRA of an adapter merged into its fp32 weights, which are rounded afterwards; LoRA."""
    mt5 = load_mt5(llm)
    load_adapter(mt5, adapter)
    lora = lora_tensors(mt5)
    merge_lora(mt5)
    for path, layer in lora_layers(mt5).items():
        owner, _, leaf = path.rpartition(".")
        setattr(mt5.get_submodule(owner), leaf, layer.base)
    mt5.stored = {}  # no file holds these weights
    mt5.to(DTYPES[llm_dtype] if llm_dtype == "bf16" else dtype)
    if llm_dtype == "int8":
        quantize_linears(mt5)
        mt5.embed.bfloat16()
    return mt5, lora


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
    mt5, places = build(llm, MT5, mt5_config_from_hf, mt5_names, "")
    _, seen = build(vision, MBLIP, lambda hf: vision_config_from_hf(hf, mt5.cfg), _vision_names, skip="language_")
    return {f"mt5.{mine}": place for mine, place in places.items()} | seen


def _vision_names(model: MBLIP) -> dict[str, str]:
    """`official_names` of what `load_vision` reads."""
    return {mine: key for mine, key in official_names(model).items() if not mine.startswith(("mt5.", "proj."))}


class _Forms:
    """Which parameter is held in which type: `forms(name, is_linear)` is a torch type, int8 to be quantised."""

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


def _read_config(folder: Path) -> dict:
    if not os.path.isdir(folder):  # unlike Path.is_dir, False for a name that no file system can have
        raise WeightsError(f"{folder}: no such folder")
    return read_json(folder / "config.json")


def sizes_of(folder: Path, config_of):
    """What `config_of` makes of a folder's config.json: the sizes of a model. Raises WeightsError naming the folder."""
    hf = _read_config(folder)
    try:
        cfg = config_of(hf)  # first: it knows a config.json that holds no object
        int8_threshold(hf)
    except WeightsError as error:
        raise WeightsError(f"{folder}: {error}") from None
    return cfg


def build(folder: Path, cls, config_of, names_of, prefix: str = "language_model.", skip: str | None = None):
    """A `cls` on the meta device for a folder, and our name -> file and key for all that its files hold of it.

    config_of: config.json -> the config of a `cls`; names_of: such a model -> our names and official keys; prefix: of
    the language model's keys; skip: as in `find_tensors`. Raises WeightsError, at once, if config.json and the files
    disagree.
    """
    cfg, hf = sizes_of(folder, config_of), _read_config(folder)
    try:
        check_record(folder)
        found = find_tensors(folder, skip)
        check_depths(folder, cfg, found, skip)
        try:
            with torch.device("meta"):
                model = cls(cfg)
        except RuntimeError as error:
            raise WeightsError(f"{folder / 'config.json'}: sizes that no model can have ({error})") from None
        targets = {official: mine for mine, official in names_of(model).items()}
        is_tied = (hf.get("text_config") or hf).get("tie_word_embeddings") is not False
        places = _locate(folder, found, targets, prefix, is_tied)
    except WeightsError as error:
        raise WeightsError(f"{error}{_restore(folder)}") from None
    return model, places


def _load(folder: Path, cls, config_of, names_of, prefix: str, forms: _Forms, skip: str | None = None) -> nn.Module:
    """`build` a model and fill it. Where its language model comes from is noted there: `stored`, our name -> place."""
    model, places = build(folder, cls, config_of, names_of, prefix, skip)
    try:
        _fill(model, places, forms, int8_threshold(read_json(folder / "config.json")))
    except WeightsError as error:
        raise WeightsError(f"{error}{_restore(folder)}") from None
    places = {forms.prefix + name: place for name, place in places.items()}
    mt5 = model if isinstance(model, MT5) else model.mt5
    mt5.stored = {name.removeprefix("mt5."): place for name, place in places.items() if name.startswith("mt5.")}
    mt5.stored_digests = {}  # see adapter.py
    return model.eval()


def _restore(folder: Path) -> str:
    """What to do about damaged weights, if they are the shipped ones."""
    shipped = Path(__file__).resolve().parents[2] / "weights" / "nano"
    return (
        "; restore them with: git checkout -- weights/nano"
        if shipped in (folder.resolve(), *folder.resolve().parents)
        else ""
    )


def _not_those(folder: Path, what: str, keys: list[str]) -> WeightsError:
    return WeightsError(
        f"{folder}: {len(keys)} {what} key(s), first {keys[0]!r}: these are not the weights of its config.json"
    )


def _locate(
    folder: Path, found: dict[str, Path], targets: dict[str, str], prefix: str, is_tied: bool
) -> dict[str, tuple[Path, str]]:
    """Our name -> file and key, for all of `targets` (official key -> our name), strictly.

    found: from `find_tensors`; prefix: of the language model's keys. Beside a weight in int8 stands its SCB, under the
    weight's name with "SCB" at its end. is_tied: where the file has no head, the embedding is the head as well.
    """
    shared, aliases = prefix + "shared.weight", [prefix + key for key in EMBED_ALIASES if prefix + key in found]
    if shared in targets:
        for key in aliases if shared in found else aliases[1:]:  # second names must hold the same embedding
            first = shared if shared in found else aliases[0]
            if not same_tensor(found[key], key, found[first], first):
                raise WeightsError(f"{found[key]}: {key} differs from {first}; three embeddings are not implemented")
    places = {mine: (found[key], key) for key, mine in targets.items() if key in found}
    if shared in targets and shared not in found and aliases:
        places[targets[shared]] = found[aliases[0]], aliases[0]
    head = prefix + "lm_head.weight"
    if is_tied and head in targets and head not in found and targets[shared] in places:
        places[targets[head]] = places[targets[shared]]
    extra = {}
    for key, mine in targets.items():  # what bitsandbytes writes beside an int8 weight
        if key.endswith(".weight") and key.removesuffix("weight") + "SCB" in found:
            extra[key.removesuffix("weight") + "SCB"] = mine.removesuffix("weight") + "SCB"
    ending = "weight_format"
    formats = [key for key in found if key.endswith("." + ending) and key.removesuffix(ending) + "SCB" in extra]
    unknown = sorted(set(found) - set(targets) - set(aliases) - set(extra) - set(formats))
    missing = sorted(key for key, mine in targets.items() if mine not in places)
    for what, keys in (("unknown", unknown), ("missing", missing)):
        if keys:
            raise _not_those(folder, what, keys)
    for path in {found[key] for key in formats}:
        with open_safetensors(path) as file:
            for key in (key for key in formats if found[key] == path):
                if file.get_slice(key).get_dtype() != "U8" or file.get_tensor(key).any():
                    raise WeightsError(
                        f"{path}: {key} is not 0 (row after row), the only order of int8 weights that is implemented"
                    )
    return places | {mine: (found[key], key) for key, mine in extra.items()}


def _check_shapes(model: nn.Module, places: dict[str, tuple[Path, str]]) -> None:
    """Raise WeightsError unless all tensors of the files have the shapes and types of a (meta) model's parameters."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    linears = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    files = {path: open_safetensors(path) for path in {path for path, _ in places.values()}}
    for name, (path, key) in places.items():
        if name not in shapes:  # an SCB
            continue
        stored, scale = files[path].get_slice(key), name.removesuffix("weight") + "SCB"
        is_int8 = stored.get_dtype() == "I8" and name in linears
        check_slice(path, key, stored, shapes[name], torch.int8 if is_int8 else None)
        if is_int8 and scale not in places:
            raise WeightsError(f"{path}: {key} is int8 and has no scales (SCB) beside it")
        if not is_int8 and scale != name + "SCB" and scale in places:
            raise WeightsError(f"{path}: {key} is {stored.get_dtype()}, and {places[scale][1]} beside it scales int8")


def _fill(model: nn.Module, places: dict[str, tuple[Path, str]], forms: _Forms, threshold: float) -> None:
    """Fill a meta model; places: from `build`, threshold: of int8 layers."""
    _check_shapes(model, places)
    shapes = {name: p.shape for name, p in model.named_parameters() if name in places}
    linears = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    has_int8 = any(place.endswith("SCB") for place in places)
    codes = {}  # name -> weight and SCB of the layers that become int8
    # What fills the tensors that are made here; room for all of them first, or their blocks would leave holes between.
    later = []
    shared = {path: open_safetensors(path) for path in {path for path, _ in places.values()}}
    for name in sorted(shapes, key=lambda name: (str(places[name][0]), name)):
        path, key = places[name]
        stored = shared[path].get_slice(key).get_dtype()
        form = forms(name, name in linears)
        if stored == "BF16" and forms.prefix + name == "mt5.embed.weight" and has_int8:
            form = torch.bfloat16  # as it was written beside int8 layers
        if stored == "I8":
            if forms.wished(name) not in (None, "int8"):
                raise WeightsError(
                    f"{path}: {key} is stored in int8; it cannot become {forms.wished(name)}, which needs the original "
                    "weights"
                )
            scale = places[name.removesuffix("weight") + "SCB"]
            weight = read_tensor(shared[path], path, key, shapes[name], torch.int8)
            codes[name] = weight, read_tensor(shared[scale[0]], *scale, shapes[name][:1])
        elif stored == SAFETENSORS_NAMES.get(form):
            _set_parameter(model, name, read_tensor(shared[path], path, key, shapes[name]))
        else:
            made = torch.empty(shapes[name], dtype=form)
            if form == torch.int8:
                codes[name] = made, torch.empty(len(made))
                later.append((quantize, path, key, codes[name]))
            else:
                _set_parameter(model, name, made)
                later.append((convert, path, key, made))
    for fill, path, key, made in later:
        fill(path, key, made)
    for name, (weight, scale) in codes.items():
        owner, _, leaf = name.removesuffix(".weight").rpartition(".")
        bias = model.get_submodule(name.removesuffix(".weight")).bias
        try:
            layer = Int8Linear.from_tensors(weight, scale, None if bias is None else bias.detach(), threshold)
        except ValueError as error:
            raise WeightsError(f"{places[name][0]}: {name}: {error}") from None
        setattr(model.get_submodule(owner), leaf, layer)


def _set_parameter(model: nn.Module, name: str, value: torch.Tensor):
    """Put a tensor where a (meta) parameter was."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value))
