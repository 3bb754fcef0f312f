"""LoRA in the files of PEFT: adapter_config.json and adapter_model.safetensors."""

import re
from pathlib import Path

import torch
import torch.nn as nn

from nanomblip.model.int8 import Int8Linear, quantize_rows
from nanomblip.model.lora import LoRALinear, check_lora, lora_layers
from nanomblip.model.mt5 import MT5
from nanomblip.weights.files import digest, open_safetensors, read_json, save_tensors, write_json
from nanomblip.weights.layout import MT5_KEYS, WeightsError, _expand, is_empty, shown
from nanomblip.weights.tensors import blocks_of, held_tensors, read_tensor

# Keys of an adapter_config.json that are read, with what they are by default, and keys that change nothing once an
# adapter is trained. Any other must be empty: what nobody here knows could make another function of the same tensors.
_DEFAULTS = dict(peft_type="LORA", bias="none", r=8, lora_alpha=8, lora_dropout=0.0, use_rslora=False,
                 target_modules=None, exclude_modules=[], layers_to_transform=[], layers_pattern=[], rank_pattern={},
                 alpha_pattern={}, init_lora_weights=True)  # fmt: skip
_HARMLESS = frozenset(
    "task_type inference_mode base_model_name_or_path revision auto_mapping peft_version runtime_config "
    "megatron_core qalora_group_size "  # used only with megatron_config and use_qalora, which must be empty
    "loftq_config eva_config corda_config lora_ga_config".split()  # used only by the init_lora_weights of that name
)
# How A and B began. These leave the base as it is; the others (pissa, olora, corda, loftq, lora_ga) take B A out of the
# base, and peft does so again each time it loads the adapter.
_INITS = ("gaussian", "orthogonal", "eva", "mica")  # and true or false


# -------------------------------------------------------------------------------------------------------- the base


def base_digest(mt5: MT5) -> str:
    """sha256 of a language model without its LoRA: the fingerprint that an adapter carries.

    It is that of the floats as they are stored, in fp32. Where bf16 or int8 is held, they are read from the files that
    the model was loaded from (`mt5.stored`); if it was not, the fingerprint is of what is held, int8's scales included.
    ValueError while LoRA is merged.
    """
    held = _held_digest(mt5)
    return _stored_digest(mt5, held) or held


def _held_digest(mt5: MT5) -> str:
    if any(layer.unmerged is not None for layer in lora_layers(mt5).values()):
        raise ValueError("LoRA is merged: unmerge it first")
    return digest(held_tensors(mt5))


def _stored_digest(mt5: MT5, own: str) -> str | None:
    """The fingerprint of the floats that a model's tensors were rounded from; own: that of the tensors it holds.

    None if there are none: nothing is rounded, no files are known, they hold int8, or others than the model was made
    from. The answer is kept with the model, since the files are large.
    """
    held, stored = held_tensors(mt5), getattr(mt5, "stored", {})
    if all(t.dtype == torch.float32 for t in held.values()):
        return None
    if set(stored) != {name for name in held if not name.endswith("SCB")}:
        return None
    if own not in mt5.stored_digests:
        of_files = None
        if all(_is_rounded_from(held, name, *place) for name, place in stored.items()):
            of_files = digest({name: lambda place=place: _read_floats(*place) for name, place in stored.items()})
        mt5.stored_digests[own] = of_files
    return mt5.stored_digests[own]


def _is_rounded_from(held: dict[str, torch.Tensor], name: str, path: Path, key: str) -> bool:
    """Whether a tensor that a model holds is one of a file, as the loader rounds it."""
    t, scale = held[name].cpu(), held.get(name.removesuffix("weight") + "SCB")
    for start, block in blocks_of(path, key, t.shape):
        rows = slice(start, start + len(block))
        if t.dtype == torch.int8:
            codes, scales = quantize_rows(block.half().float())
            if not (torch.equal(codes, t[rows]) and torch.equal(scales, scale[rows].cpu())):
                return False
        elif not torch.equal(block.to(t.dtype), t[rows]):
            return False
    return True


def _read_floats(path: Path, key: str) -> torch.Tensor:
    with open_safetensors(path) as file:
        return file.get_tensor(key).float()


# ----------------------------------------------------------------------------------------------------- the files


def _linear_names(mt5: MT5) -> dict[str, str]:
    """Official name -> our path, for every linear layer of a language model (as `mt5_names`, without ".weight")."""
    ours = {
        f"mt5.{path}.weight"
        for path, m in mt5.named_modules()
        if isinstance(m, (nn.Linear, Int8Linear, LoRALinear)) and not path.endswith(".base")
    }
    names = _expand(MT5_KEYS, ours).items()
    cut = lambda name, start: name.removeprefix(start).removesuffix(".weight")
    return {cut(official, "language_model."): cut(mine, "mt5.") for mine, official in names}


def save_adapter(mt5: MT5, folder: Path, prefix: str = "") -> None:
    """Write the LoRA of a language model as `peft` does: adapter_config.json and adapter_model.safetensors.

    prefix: "" for an adapter to the language model alone, "language_model." for one to the whole BLIP-2 model. The
    fingerprint of the base stands in the safetensors metadata. ValueError without LoRA, or while it is merged.
    """
    layers = lora_layers(mt5)
    if not layers:
        raise ValueError("the model has no LoRA to save")
    base = base_digest(mt5)
    official = {mine: prefix + name for name, mine in _linear_names(mt5).items()}
    tensors = {
        f"base_model.model.{official[path]}.lora_{side}.weight": getattr(layer, side).detach()
        for path, layer in layers.items()
        for side in "AB"
    }
    leaves = {path.rpartition(".")[2] for path in layers}
    if {path for path in official if path.rpartition(".")[2] in leaves} == set(layers):
        targets = sorted(leaves)
    else:  # some layers of a name only
        targets = sorted(official[path] for path in layers)
    one = next(iter(layers.values()))
    if any((layer.dropout, layer.rslora) != (one.dropout, one.rslora) for layer in layers.values()):
        raise ValueError("the layers of the LoRA differ in dropout or rslora, which an adapter cannot say")
    config = dict(
        peft_type="LORA", task_type=None if prefix else "SEQ_2_SEQ_LM", inference_mode=True, r=one.r,
        lora_alpha=one.alpha, lora_dropout=one.dropout, use_rslora=one.rslora, bias="none", target_modules=targets,
        rank_pattern={official[path]: layer.r for path, layer in layers.items() if layer.r != one.r},
        alpha_pattern={official[path]: layer.alpha for path, layer in layers.items() if layer.alpha != one.alpha},
        base_model_name_or_path=None,
    )  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt", "base_sha256": base})
    write_json(folder / "adapter_config.json", config)


def lora_tensors(mt5: MT5) -> dict[str, torch.Tensor]:
    """Path of A or B -> its values, of every LoRA layer."""
    return {
        f"{path}.{side}": getattr(layer, side).detach() for path, layer in lora_layers(mt5).items() for side in "AB"
    }


def load_adapter(mt5: MT5, folder: Path | str) -> None:
    """Add the LoRA of an adapter written by us or by `peft`, to the language model alone or to the whole BLIP-2 model.

    Strict where PEFT is silent: every tensor must belong to a targeted layer and every targeted layer must have its
    two. mBLIP's own targets ".k" and ".o" mean k and o. Raises WeightsError, and leaves the model as it was, for what
    is not implemented, does not fit, or was trained on another base (if the adapter says on which).
    """
    folder = Path(folder)
    if lora_layers(mt5):
        raise WeightsError(f"{folder}: the model has LoRA already")
    config, linears, path = _read_config(folder), _linear_names(mt5), folder / "adapter_model.safetensors"
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise WeightsError(
            f"{folder}: adapter_model.bin is a pickle and is not read; convert it if you trust it: "
            f"python -m nanomblip.weights.convert {folder}"
        )
    with open_safetensors(path) as file:
        base, keys = (file.metadata() or {}).get("base_sha256"), list(file.keys())
        start = "base_model.model."
        if all(key.startswith(f"{start}language_model.") for key in keys):  # of the whole model
            linears = {f"language_model.{name}": mine for name, mine in linears.items()}
        try:
            settings = _layer_settings(config, linears)
        except (re.error, TypeError, ValueError) as error:
            raise WeightsError(f"{folder}: {error}") from None
        tensors = {}
        for key in keys:
            name, _, side = key.removeprefix(start).removesuffix(".weight").rpartition(".lora_")
            if name not in linears or side not in ("A", "B"):
                raise WeightsError(f"{path}: unknown key {key!r}")
            tensors[name, side] = key
        odd = sorted({(name, side) for name in settings for side in "AB"} ^ set(tensors))
        if odd:
            names = sorted({name for name, _ in odd})
            raise WeightsError(
                f"{folder}: its targets and its tensors disagree about {len(names)} layer(s), first {names[0]!r}"
            )
        for (name, side), key in tensors.items():
            layer, r = mt5.get_submodule(linears[name]), settings[name][0]
            shape = (r, layer.in_features) if side == "A" else (layer.out_features, r)
            tensors[name, side] = read_tensor(file, path, key, shape).float()
            if not tensors[name, side].isfinite().all():
                raise WeightsError(f"{path}: {key} is not finite")
    if base is not None and base != (own := _held_digest(mt5)) and base != _stored_digest(mt5, own):
        raise WeightsError(f"{folder}: this adapter was trained on another language model (its fingerprint differs)")
    mt5.requires_grad_(False)
    for name, values in settings.items():
        owner, _, leaf = linears[name].rpartition(".")
        parent = mt5.get_submodule(owner)
        layer = LoRALinear(getattr(parent, leaf), *values)
        layer.A.data.copy_(tensors[name, "A"])
        layer.B.data.copy_(tensors[name, "B"])
        setattr(parent, leaf, layer)


def _read_config(folder: Path) -> dict:
    """What an adapter_config.json says, with PEFT's defaults; WeightsError for what is not implemented."""
    said = read_json(folder / "adapter_config.json")
    if not isinstance(said, dict):
        raise WeightsError(f"{folder}: adapter_config.json does not hold an object")
    config = _DEFAULTS | {key: value for key, value in said.items() if not is_empty(value)}
    is_text = lambda value: isinstance(value, str) and value.strip(".") != ""
    are_texts = lambda value: is_text(value) or (isinstance(value, list) and all(map(is_text, value)))
    is_pattern = lambda value: isinstance(value, dict) and all(type(v) in (int, float) for v in value.values())
    good = dict(
        peft_type=lambda value: value == "LORA",
        bias=lambda value: value == "none",
        r=lambda value: value is not True,
        lora_alpha=lambda value: value is not True,
        use_rslora=lambda value: isinstance(value, bool),
        target_modules=lambda value: are_texts(value) and value != "all-linear",
        exclude_modules=are_texts,
        layers_pattern=are_texts,
        layers_to_transform=lambda value: all(type(i) is int for i in (value if isinstance(value, list) else [value])),
        rank_pattern=is_pattern,
        alpha_pattern=is_pattern,
        init_lora_weights=lambda value: value is True or value in _INITS,
    )
    for key, value in config.items():
        if key in good and good[key](value) or key in _HARMLESS or key == "lora_dropout":
            continue
        line = f"{folder}: an adapter with {shown(key)[1:-1]} = {shown(value)} is not implemented"
        if key == "init_lora_weights":
            line += (
                ": peft alters the base for it; let peft save the adapter converted, with save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...), or merged"
            )
        raise WeightsError(line)
    return config


def _layer_settings(config: dict, names) -> dict[str, tuple]:
    """Name -> rank, alpha, dropout and rslora, for those of the linear layers `names` that an adapter is for.

    These are PEFT's rules, `check_target_module_exists` and `get_pattern_key`. Raises re.error or ValueError.
    """
    targets, layers, pattern = config["target_modules"], config["layers_to_transform"], config["layers_pattern"]
    layers = layers if isinstance(layers, list) else [layers]
    stacks = [pattern] if isinstance(pattern, str) else pattern or [r"[^.]*"]

    def is_target(name):
        if _matches(config["exclude_modules"], name) or not _matches(targets, name):
            return False
        if isinstance(targets, str) or name in targets or not layers:
            return True
        found = [re.match(rf"(?:^|.*?\.){stack}\.(\d+)\.", name) for stack in stacks]
        index = next((match[1] for match in found if match), None)
        return index is not None and int(index) in layers

    for target in targets if isinstance(targets, list) else []:
        if not any(_matches([target], name) for name in names):
            raise ValueError(f"target {shown(target)} matches no linear layer")
    settings = {}
    for name in filter(is_target, names):
        r, alpha = (
            next(
                (value for key, value in config[which].items() if re.match(rf"(.*\.)?({key})$", name)), config[default]
            )
            for which, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        check_lora(r, alpha, config["lora_dropout"])
        settings[name] = r, alpha, config["lora_dropout"], config["use_rslora"]
    if not settings:
        raise ValueError(f"target_modules = {shown(targets)} match no linear layer")
    return settings


def _matches(targets: str | list[str], name: str) -> bool:
    """Whether a layer's name is one of PEFT's targets: the end of it, or all of it for a regular expression."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith("." + target.lstrip(".")) for target in targets)
