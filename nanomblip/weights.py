"""Weights in and out: one layout only, that of Hugging Face's BLIP-2 (`config.json` + safetensors).

nano's checkpoints and the official ones go through the same strict loader, and transformers opens what we write. Strict
means that every tensor of the file finds its place and every place gets its tensor, in the right shape; anything else is
a `WeightsError` that names the key. Nothing is ever unpickled.

A model is built on the meta device (shapes without memory) and filled one tensor at a time straight from the
memory-mapped file, so that there are never two copies of it.
"""

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanomblip.lora import LoRALinear, check_lora, lora_layers
from nanomblip.mblip import MBLIP, MBLIPConfig
from nanomblip.mt5 import MT5, MT5Config
from nanomblip.qformer import QFormerConfig
from nanomblip.vit import ViTConfig


class WeightsError(ValueError):
    """A weights file, or its config, that cannot be used; the message names the file, what is wrong and what to do."""


# ---------------------------------------------------------------- names: official key -> ours, {} is the layer's number

VIT_KEYS = {
    "vision_model.embeddings.class_embedding": "vit.cls_token",
    "vision_model.embeddings.position_embedding": "vit.pos_embed",
    "vision_model.embeddings.patch_embedding.*": "vit.patch_embed.*",
    "vision_model.encoder.layers.{}.layer_norm1.*": "vit.blocks.{}.norm1.*",
    "vision_model.encoder.layers.{}.self_attn.qkv.*": "vit.blocks.{}.attn.qkv.*",
    "vision_model.encoder.layers.{}.self_attn.projection.*": "vit.blocks.{}.attn.proj.*",
    "vision_model.encoder.layers.{}.layer_norm2.*": "vit.blocks.{}.norm2.*",
    "vision_model.encoder.layers.{}.mlp.fc1.*": "vit.blocks.{}.mlp.fc1.*",
    "vision_model.encoder.layers.{}.mlp.fc2.*": "vit.blocks.{}.mlp.fc2.*",
    "vision_model.post_layernorm.*": "vit.norm.*",
}
QFORMER_KEYS = {
    "query_tokens": "queries",
    "qformer.layernorm.*": "qformer.norm.*",
    "qformer.encoder.layer.{}.attention.attention.query.*": "qformer.blocks.{}.attn.q.*",
    "qformer.encoder.layer.{}.attention.attention.key.*": "qformer.blocks.{}.attn.k.*",
    "qformer.encoder.layer.{}.attention.attention.value.*": "qformer.blocks.{}.attn.v.*",
    "qformer.encoder.layer.{}.attention.output.dense.*": "qformer.blocks.{}.attn.out.*",
    "qformer.encoder.layer.{}.attention.output.LayerNorm.*": "qformer.blocks.{}.norm1.*",
    "qformer.encoder.layer.{}.crossattention.attention.query.*": "qformer.blocks.{}.cross_attn.q.*",
    "qformer.encoder.layer.{}.crossattention.attention.key.*": "qformer.blocks.{}.cross_attn.k.*",
    "qformer.encoder.layer.{}.crossattention.attention.value.*": "qformer.blocks.{}.cross_attn.v.*",
    "qformer.encoder.layer.{}.crossattention.output.dense.*": "qformer.blocks.{}.cross_attn.out.*",
    "qformer.encoder.layer.{}.crossattention.output.LayerNorm.*": "qformer.blocks.{}.norm_cross.*",
    "qformer.encoder.layer.{}.intermediate_query.dense.*": "qformer.blocks.{}.fc1.*",
    "qformer.encoder.layer.{}.output_query.dense.*": "qformer.blocks.{}.fc2.*",
    "qformer.encoder.layer.{}.output_query.LayerNorm.*": "qformer.blocks.{}.norm2.*",
}
PROJ_KEYS = {"language_projection.*": "proj.*"}
MT5_KEYS = {
    "language_model.shared.weight": "mt5.embed.weight",
    "language_model.lm_head.weight": "mt5.lm_head.weight",
}
for _s in ("encoder", "decoder"):
    _blocks = f"language_model.{_s}.block"
    _mlp = 1 if _s == "encoder" else 2  # the decoder's layer 1 is its cross-attention
    MT5_KEYS[f"{_blocks}.0.layer.0.SelfAttention.relative_attention_bias.weight"] = f"mt5.{_s}.bias.weight"
    MT5_KEYS[f"language_model.{_s}.final_layer_norm.weight"] = f"mt5.{_s}.norm.weight"
    for _m in "qkvo":
        MT5_KEYS[f"{_blocks}.{{}}.layer.0.SelfAttention.{_m}.weight"] = f"mt5.{_s}.blocks.{{}}.attn.{_m}.weight"
    MT5_KEYS[f"{_blocks}.{{}}.layer.0.layer_norm.weight"] = f"mt5.{_s}.blocks.{{}}.norm1.weight"
    for _m in ("wi_0", "wi_1", "wo"):
        MT5_KEYS[f"{_blocks}.{{}}.layer.{_mlp}.DenseReluDense.{_m}.weight"] = f"mt5.{_s}.blocks.{{}}.mlp.{_m}.weight"
    MT5_KEYS[f"{_blocks}.{{}}.layer.{_mlp}.layer_norm.weight"] = f"mt5.{_s}.blocks.{{}}.norm2.weight"
for _m in "qkvo":
    MT5_KEYS[f"language_model.decoder.block.{{}}.layer.1.EncDecAttention.{_m}.weight"] = (
        f"mt5.decoder.blocks.{{}}.cross_attn.{_m}.weight"
    )
MT5_KEYS["language_model.decoder.block.{}.layer.1.layer_norm.weight"] = "mt5.decoder.blocks.{}.norm_cross.weight"

KEYS = VIT_KEYS | QFORMER_KEYS | PROJ_KEYS | MT5_KEYS
# Second names of the shared embedding: old .bin conversions list them, new files do not.
EMBED_ALIASES = ("decoder.embed_tokens.weight", "encoder.embed_tokens.weight")


def _expand(keys: dict[str, str], ours: set[str]) -> dict[str, str]:
    """Our name -> official key, for all of `ours`, from a table with {} for layers and * for weight or bias."""
    layers = 1 + max((int(part) for name in ours for part in name.split(".") if part.isdigit()), default=0)
    names = {}
    for official, mine in keys.items():
        for ending in ("weight", "bias") if official.endswith("*") else ("",):
            for i in range(layers if "{}" in official else 1):
                name = mine.replace("*", ending).format(i)
                if name in ours:  # towers differ in depth, and the Q-Former has cross-attention in some layers only
                    names[name] = official.replace("*", ending).format(i)
    assert set(names) == ours, f"parameters without an official key: {sorted(ours - set(names))}"
    return names


def official_names(model: MBLIP) -> dict[str, str]:
    """Our parameter name -> official key, for every parameter of a whole model."""
    return _expand(KEYS, {name for name, _ in model.named_parameters()})


def mt5_names(model: MT5) -> dict[str, str]:
    """Our parameter name -> official key, for a language model by itself."""
    names = _expand(MT5_KEYS, {f"mt5.{name}" for name, _ in model.named_parameters()})
    return {mine.removeprefix("mt5."): official.removeprefix("language_model.") for mine, official in names.items()}


# ------------------------------------------------------------------------------------------------------------- configs

# What transformers assumes when a config.json does not say (hub files often store differences only).
_MT5_DEFAULTS = dict(vocab_size=250112, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6,
                     relative_attention_num_buckets=32, relative_attention_max_distance=128, dropout_rate=0.1,
                     layer_norm_epsilon=1e-6, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1)  # fmt: skip
_T5_DEFAULTS = _MT5_DEFAULTS | dict(vocab_size=32128, d_ff=2048, num_layers=6, num_heads=8, feed_forward_proj="relu")


def _refuse_unless(part: str, hf: dict, **allowed):
    """Raise WeightsError when a key of `hf` has a value that we do not implement (absent = the first allowed)."""
    for key, values in allowed.items():
        if hf.get(key, values[0]) not in values:
            raise WeightsError(f"{part} with {key} = {hf[key]!r} is not implemented (only {', '.join(map(repr, values))})")


def _build(part: str, cls, hf: dict, **names):
    """Make the config dataclass `cls` from the official keys named in `names` (ours = official); absent = our default."""
    kwargs = {ours: hf[official] for ours, official in names.items() if hf.get(official) is not None}
    for ours, value in kwargs.items():
        default = next(f.default for f in fields(cls) if f.name == ours)
        want = (int, float) if isinstance(default, float) else type(default)
        if isinstance(value, bool) or not isinstance(value, want) or (not isinstance(value, str) and value < 0):
            raise WeightsError(f"{part} with {names[ours]} = {value!r}: expected a number as in {default!r}")
    try:
        return cls(**kwargs)
    except (ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"{part}: {error}") from None


def mt5_config_from_hf(text: dict) -> MT5Config:
    """MT5Config from the official `config.json` of an mT5, an mT0 or a flan-t5 (as a dict), or a BLIP-2's `text_config`."""
    if not isinstance(text, dict):
        raise WeightsError("config.json does not hold an object")
    kind = text.get("model_type")  # absent means OPT; decoder-only models (OPT, BLOOMZ) are out of scope
    _refuse_unless("a language model", {"model_type": kind}, model_type=("mt5", "t5"))
    is_mt5 = kind == "mt5"
    text = (_MT5_DEFAULTS if is_mt5 else _T5_DEFAULTS) | {k: v for k, v in text.items() if v is not None}
    _refuse_unless("a language model", text, feed_forward_proj=("gated-gelu",), is_gated_act=(True,),
                   dense_act_fn=("gelu_new", "gelu"), decoder_start_token_id=(text["pad_token_id"],),
                   scale_decoder_outputs=(False,))  # fmt: skip
    if not is_mt5:  # T5's tied models rescale the decoder's output; flan-t5, which BLIP-2 uses, is untied
        _refuse_unless("a T5", {"tie_word_embeddings": True} | text, tie_word_embeddings=(False,))
    text.setdefault("num_decoder_layers", text["num_layers"])
    return _build("text_config", MT5Config, text | {"gelu": "none" if text.get("dense_act_fn") == "gelu" else "tanh"},
                 vocab="vocab_size", width="d_model", heads="num_heads", head_width="d_kv", mlp="d_ff",
                 layers="num_layers", decoder_layers="num_decoder_layers", buckets="relative_attention_num_buckets",
                 max_distance="relative_attention_max_distance", dropout="dropout_rate", eps="layer_norm_epsilon",
                 gelu="gelu", pad="pad_token_id", eos="eos_token_id")  # fmt: skip


def config_from_hf(hf: dict) -> MBLIPConfig:
    """MBLIPConfig from an official `config.json` (as a dict), legacy or new.

    Whatever changes the arithmetic and is not implemented is refused by name (WeightsError); what only concerns
    training or generation defaults is ignored. `tie_word_embeddings` is ignored on purpose for mT5: transformers 5.x
    writes true for every mT5, also when the file holds a separate head. The file decides, and ours needs a head.
    """
    if not isinstance(hf, dict):
        raise WeightsError("config.json does not hold an object")
    if hf.get("model_type") != "blip-2":
        raise WeightsError(f"config.json says model_type {hf.get('model_type')!r}; this code reads 'blip-2'")
    parts = [hf.get(key) or {} for key in ("vision_config", "qformer_config", "text_config")]
    if not all(isinstance(part, dict) for part in parts):
        raise WeightsError("config.json: vision_config, qformer_config and text_config must be objects")
    vision, qformer, text = parts

    _refuse_unless("a ViT", vision, hidden_act=("gelu",), attention_dropout=(0.0,), qkv_bias=(True,))
    vit = _build("vision_config", ViTConfig, vision, image_size="image_size", patch_size="patch_size", width="hidden_size",
                 layers="num_hidden_layers", heads="num_attention_heads", mlp="intermediate_size",
                 eps="layer_norm_eps")  # fmt: skip
    _refuse_unless("a Q-Former", qformer, hidden_act=("gelu",), position_embedding_type=("absolute",),
                   use_qformer_text_input=(False,))  # fmt: skip
    former = _build("qformer_config", QFormerConfig, qformer, width="hidden_size", layers="num_hidden_layers",
                    heads="num_attention_heads", mlp="intermediate_size", vision_width="encoder_hidden_size",
                    cross_every="cross_attention_frequency", dropout="hidden_dropout_prob",
                    attn_dropout="attention_probs_dropout_prob", eps="layer_norm_eps")  # fmt: skip

    queries = hf.get("num_query_tokens", 32)
    if not isinstance(queries, int) or isinstance(queries, bool) or queries < 1:
        raise WeightsError(f"config.json: num_query_tokens = {queries!r}")
    try:
        return MBLIPConfig(vit=vit, qformer=former, mt5=mt5_config_from_hf(text), queries=queries)
    except ValueError as error:
        raise WeightsError(f"config.json: {error}") from None


def mt5_config_to_hf(t: MT5Config) -> dict:
    """The official `config.json` (as a dict) of a language model."""
    return {
        "model_type": "mt5",
        "vocab_size": t.vocab, "d_model": t.width, "num_heads": t.heads, "d_kv": t.head_width, "d_ff": t.mlp,
        "num_layers": t.layers, "num_decoder_layers": t.decoder_layers,
        "relative_attention_num_buckets": t.buckets, "relative_attention_max_distance": t.max_distance,
        "dropout_rate": t.dropout, "layer_norm_epsilon": t.eps, "feed_forward_proj": "gated-gelu",
        "dense_act_fn": {"tanh": "gelu_new", "none": "gelu"}[t.gelu], "is_gated_act": True,
        "tie_word_embeddings": False, "pad_token_id": t.pad, "eos_token_id": t.eos,
        "decoder_start_token_id": t.pad, "is_encoder_decoder": True,
    }  # fmt: skip


def config_to_hf(cfg: MBLIPConfig, image_token: int) -> dict:
    """The official `config.json` (as a dict) of a model; `image_token` is the piece id that transformers >= 4.55
    replaces by the picture's vectors: the first row of the embedding that the tokenizer cannot produce."""
    assert image_token < cfg.mt5.vocab, f"image_token {image_token} has no row in an embedding of {cfg.mt5.vocab}"
    v, q = cfg.vit, cfg.qformer
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "num_query_tokens": cfg.queries,
        "image_token_index": image_token,
        "use_decoder_only_language_model": False,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "image_size": v.image_size, "patch_size": v.patch_size, "hidden_size": v.width,
            "num_hidden_layers": v.layers, "num_attention_heads": v.heads, "intermediate_size": v.mlp,
            "layer_norm_eps": v.eps, "hidden_act": "gelu", "attention_dropout": 0.0, "qkv_bias": True,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "hidden_size": q.width, "num_hidden_layers": q.layers, "num_attention_heads": q.heads,
            "intermediate_size": q.mlp, "encoder_hidden_size": q.vision_width,
            "cross_attention_frequency": q.cross_every, "hidden_dropout_prob": q.dropout,
            "attention_probs_dropout_prob": q.attn_dropout, "layer_norm_eps": q.eps, "hidden_act": "gelu",
        },
        "text_config": mt5_config_to_hf(cfg.mt5),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- reading


def read_json(path: Path) -> dict | list:
    """Parse a JSON file; raises WeightsError naming it when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, absurd numbers
        raise WeightsError(f"{path}: not readable as JSON ({error})") from None


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


def find_tensors(folder: Path) -> dict[str, Path]:
    """Official key -> the safetensors file of `folder` that holds it: one `model.safetensors`, or shards and an index."""
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        weight_map = read_json(index)
        weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise WeightsError(f"{index}: no weight_map of key -> file name")
        bad = [name for name in weight_map.values() if name != Path(name).name or not name.endswith(".safetensors")]
        if bad:  # a hostile index could point anywhere
            raise WeightsError(f"{index}: {bad[0]!r} is not the plain name of a safetensors file in this folder")
        found = {}
        for name in sorted(set(weight_map.values())):
            with open_safetensors(folder / name) as shard:
                found.update(dict.fromkeys(shard.keys(), folder / name))
        if {key: path.name for key, path in found.items()} != weight_map:
            odd = sorted(set(weight_map.items()) ^ {(key, path.name) for key, path in found.items()})[0]
            raise WeightsError(f"{index}: disagrees with its shards about {odd[0]!r}")
        return found
    if single.exists():
        with open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
    if pickles:
        raise WeightsError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when opened, so it is never read; get the "
            "safetensors version, or save the model with transformers' save_pretrained, which writes safetensors"
        )
    raise WeightsError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def load_mblip(folder: Path | str, dtype: torch.dtype = torch.float32) -> MBLIP:
    """Build the model of a folder in the official layout and fill it, strictly; returns it in eval mode.

    A folder written by `save_trained` holds some parameters only; the others come from the folders it names.

    Raises WeightsError for a missing or damaged file, an unknown or a missing key, a wrong shape, a tensor that is
    not floating point, or bases that are not those the trained parts were trained on.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json") if folder.is_dir() else {}
    if isinstance(config, dict) and "bases" in config:
        return _load_on_bases(folder, config, dtype)
    return _load(folder, MBLIP, config_from_hf, official_names, "language_model.", dtype)


def load_mt5(folder: Path | str, dtype: torch.dtype = torch.float32) -> MT5:
    """Build and fill a language model by itself (an mT0 or mT5 folder of the hub, or ours); errors as in `load_mblip`."""
    return _load(Path(folder), MT5, mt5_config_from_hf, mt5_names, "", dtype)


def _load_on_bases(folder: Path, config: dict, dtype: torch.dtype) -> MBLIP:
    """The model of a folder that `save_trained` wrote; errors as in `load_mblip`."""
    bases = config["bases"]
    if not (isinstance(bases, dict) and set(bases) == {"vision", "language_model", "sha256", "trained_sha256"}
            and all(isinstance(value, str) for value in bases.values())):  # fmt: skip
        raise WeightsError(f"{folder / 'config.json'}: bases must name vision, language_model, sha256 and trained_sha256")
    model = load_mblip(folder / bases["vision"])
    model.exchange_language_model(load_mt5(folder / bases["language_model"]))
    if config_from_hf(config) != model.cfg:
        raise WeightsError(f"{folder}: its config.json describes another model than its bases")
    found, names = find_tensors(folder), {official: mine for mine, official in official_names(model).items()}
    if unknown := sorted(set(found) - set(names)):
        raise WeightsError(f"{folder}: {len(unknown)} unknown key(s), first {unknown[0]!r}: these are not the weights of its config.json")
    parameters = dict(model.named_parameters())
    frozen = digest({mine: parameters[mine] for official, mine in names.items() if official not in found})
    if frozen != bases["sha256"]:
        raise WeightsError(f"{folder}: was trained on other weights than {bases['vision']} and {bases['language_model']} hold now{_restore(folder)}")
    trained = {}
    for key, path in found.items():
        with open_safetensors(path) as file:
            trained[key] = _read_tensor(file, path, key, parameters[names[key]].shape)
    if digest(trained) != bases["trained_sha256"]:
        raise WeightsError(f"{folder}: model.safetensors does not have the sha256 it was written with{_restore(folder)}")
    for key, value in trained.items():
        _set_parameter(model, names[key], value)
    return model.to(dtype).eval()


def _restore(folder: Path) -> str:
    """What to do about damaged weights, if they are the shipped ones."""
    shipped = Path(__file__).resolve().parent.parent / "weights" / "nano"
    return "; restore them with: git checkout -- weights/nano" if shipped in (folder.resolve(), *folder.resolve().parents) else ""


def _load(folder: Path, cls, config_of, names_of, prefix: str, dtype: torch.dtype) -> nn.Module:
    """Build a `cls` on the meta device and fill it; config_of and names_of as above, prefix as in `_fill`."""
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder")
    cfg = config_of(read_json(folder / "config.json"))
    with torch.device("meta"):
        model = cls(cfg)
    try:
        _fill(model, folder, {official: mine for mine, official in names_of(model).items()}, prefix, dtype)
    except WeightsError as error:
        raise WeightsError(f"{error}{_restore(folder)}") from None
    return model.eval()


def _fill(model: nn.Module, folder: Path, targets: dict[str, str], prefix: str, dtype: torch.dtype) -> None:
    """Fill a meta model from the tensors of a folder; targets: official key -> our name; prefix: of the language model."""
    found = find_tensors(folder)
    shared, aliases = prefix + "shared.weight", [prefix + key for key in EMBED_ALIASES if prefix + key in found]
    if shared not in found and aliases:
        found[shared] = found[aliases[0]]
    unknown = sorted(set(found) - set(targets) - set(aliases))
    missing = sorted(set(targets) - set(found))
    for what, keys in (("unknown", unknown), ("missing", missing)):
        if keys:
            raise WeightsError(f"{folder}: {len(keys)} {what} key(s), first {keys[0]!r}: these are not the weights of its config.json")
    parameters = dict(model.named_parameters())
    for path in sorted(set(found.values())):
        with open_safetensors(path) as file:
            keys = set(file.keys())
            for key in sorted(k for k in found if found[k] == path and k in targets):
                stored = key if key in keys else aliases[0]
                value = _read_tensor(file, path, stored, parameters[targets[key]].shape).to(dtype)
                _set_parameter(model, targets[key], value)
    embedding = dict(model.named_parameters())[targets[shared]]
    for key in aliases:  # second names must hold the same embedding
        with open_safetensors(found[key]) as file:
            if not torch.equal(file.get_tensor(key).to(dtype), embedding):
                raise WeightsError(f"{found[key]}: {key} differs from {shared}; three embeddings are not implemented")


def _read_tensor(file, path: Path, key: str, shape) -> torch.Tensor:
    """One tensor of an open safetensors file, its shape and type checked."""
    try:
        found = tuple(file.get_slice(key).get_shape())
        if found != tuple(shape):
            raise WeightsError(f"{path}: {key} has shape {found}, its config.json wants {tuple(shape)}")
        value = file.get_tensor(key)
    except (SafetensorError, RuntimeError) as error:
        raise WeightsError(f"{path}: {key} cannot be read ({error})") from None
    if not value.is_floating_point():
        raise WeightsError(f"{path}: {key} is {value.dtype}, expected floating point")
    return value


def _set_parameter(model: nn.Module, name: str, value: torch.Tensor):
    """Put a tensor where a (meta) parameter was."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value))


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


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of tensors, in the order of their names."""
    sha = hashlib.sha256()
    for key in sorted(tensors):
        t = tensors[key].detach().contiguous().cpu()
        sha.update(f"{key} {t.dtype} {tuple(t.shape)}\n".encode())
        sha.update(t.view(-1).view(torch.uint8).numpy() if t.numel() else b"")
    return sha.hexdigest()


def save_mblip(model: MBLIP, folder: Path, image_token: int, languages=None, dtype: torch.dtype = torch.float32) -> None:
    """Write `config.json` and `model.safetensors` in the official layout; transformers opens the folder.

    image_token: see `config_to_hf`; languages: the codes it was trained to answer in, stored as one more key.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names, parameters = official_names(model), dict(model.named_parameters())
    tensors = {official: parameters[mine].to(dtype) for mine, official in names.items()}
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    extra = {} if languages is None else {"languages": sorted(languages)}
    write_json(folder / "config.json", config_to_hf(model.cfg, image_token) | extra)


def save_trained(model: MBLIP, folder: Path, trained, vision: str, language_model: str, image_token: int, languages=None) -> None:
    """Write some parameters only, as fp16, and where the others are: a few MB instead of the whole model.

    trained: names of parameters as in `model.named_parameters()`; vision and language_model: the folders of the two bases, relative to
    `folder`; their parameters must be the model's own. Otherwise as `save_mblip`; transformers cannot open it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names, parameters = official_names(model), dict(model.named_parameters())
    tensors = {names[mine]: parameters[mine].detach().to(torch.float16) for mine in trained}
    frozen = digest({mine: p for mine, p in parameters.items() if mine not in set(trained)})
    bases = dict(vision=vision, language_model=language_model, sha256=frozen, trained_sha256=digest(tensors))
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    extra = {} if languages is None else {"languages": sorted(languages)}
    write_json(folder / "config.json", config_to_hf(model.cfg, image_token) | extra | {"bases": bases})


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
    ours = {f"mt5.{path}.weight" for path, m in mt5.named_modules() if isinstance(m, (torch.nn.Linear, LoRALinear)) and not path.endswith(".base")}
    names = _expand(MT5_KEYS, ours).items()
    cut = lambda name, start: name.removeprefix(start).removesuffix(".weight")
    return {cut(official, "language_model."): cut(mine, "mt5.") for mine, official in names}


def base_digest(mt5: MT5) -> str:
    """sha256 of a language model without its LoRA: the fingerprint that an adapter of ours carries."""
    if any(layer.unmerged is not None for layer in lora_layers(mt5).values()):
        raise ValueError("LoRA is merged: unmerge it first")
    own = {id(p) for layer in lora_layers(mt5).values() for p in (layer.A, layer.B)}
    return digest({name.replace(".base.", "."): p for name, p in mt5.named_parameters() if id(p) not in own})


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
