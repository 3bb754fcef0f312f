"""LoRA in the files of PEFT: adapter_config.json and adapter_model.safetensors."""

from pathlib import Path

import torch.nn as nn

from nanomblip.model.int8 import Int8Linear
from nanomblip.model.lora import LoRALinear, check_lora, lora_layers
from nanomblip.model.mt5 import MT5
from nanomblip.weights.files import digest, open_safetensors, read_json, save_tensors, write_json
from nanomblip.weights.layout import MT5_KEYS, WeightsError, _expand
from nanomblip.weights.load import _read_tensor
from nanomblip.weights.save import held_tensors

# What must have this value (or be absent) in an adapter_config.json: anything else would be another function.
_PEFT_FIXED = dict(peft_type="LORA", bias="none", use_dora=False, fan_in_fan_out=False, modules_to_save=None, layers_to_transform=None,
                   layers_pattern=None, rank_pattern={}, alpha_pattern={}, exclude_modules=None, lora_bias=False, layer_replication=None,
                   target_parameters=None, trainable_token_indices=None, use_qalora=False, megatron_config=None, alora_invocation_tokens=None)  # fmt: skip


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
        if config.get(key, value) != value and not (
            not value and not config[key]
        ):  # None, False, [] and {} all mean: not used
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
        raise WeightsError(
            f"{folder}: adapter_model.bin is a pickle and is not read; save it as safetensors with peft first"
        )
    with open_safetensors(path) as file:
        base = (file.metadata() or {}).get("base_sha256")
        for key in file.keys():
            name, _, side = (
                key.removeprefix("base_model.model.")
                .removeprefix("language_model.")
                .removesuffix(".weight")
                .rpartition(".lora_")
            )
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
    odd = sorted({name for name, _ in tensors} ^ set(meant)) or sorted(
        name for name in meant if not {(name, "A"), (name, "B")} <= set(tensors)
    )
    if odd:
        raise WeightsError(
            f"{folder}: its targets and its tensors disagree about {len(odd)} layer(s), first {odd[0]!r}"
        )
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
