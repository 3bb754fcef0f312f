"""The official layout, Hugging Face's BLIP-2, in tables: which key of a file is which parameter of ours, and which word of a
`config.json` is which field of a config. Reading and writing with them is weights.py.
"""

from dataclasses import fields

import torch

from nanomblip.model.mblip import MBLIP, MBLIPConfig
from nanomblip.model.mt5 import MT5, MT5Config
from nanomblip.model.qformer import QFormerConfig
from nanomblip.model.vit import ViTConfig


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


def float_names(model: MBLIP) -> dict[str, str]:
    """`official_names` of the same model without int8 and LoRA."""
    with torch.device("meta"):
        return official_names(MBLIP(model.cfg))


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
            raise WeightsError(
                f"{part} with {key} = {hf[key]!r} is not implemented (only {', '.join(map(repr, values))})"
            )


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
    _check_kind(hf)
    return vision_config_from_hf(hf, mt5_config_from_hf(hf.get("text_config") or {}))


def vision_config_from_hf(hf: dict, mt5: MT5Config) -> MBLIPConfig:
    """The same, with another language model than the one of the `config.json`, which may be of any kind (OPT, say)."""
    _check_kind(hf)
    vision, qformer = hf.get("vision_config") or {}, hf.get("qformer_config") or {}
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
        return MBLIPConfig(vit=vit, qformer=former, mt5=mt5, queries=queries)
    except ValueError as error:
        raise WeightsError(f"config.json: {error}") from None


def _check_kind(hf: dict) -> None:
    if not isinstance(hf, dict):
        raise WeightsError("config.json does not hold an object")
    if hf.get("model_type") != "blip-2":
        raise WeightsError(f"config.json says model_type {hf.get('model_type')!r}; this code reads 'blip-2'")
    if not all(isinstance(hf.get(key) or {}, dict) for key in ("vision_config", "qformer_config", "text_config")):
        raise WeightsError("config.json: vision_config, qformer_config and text_config must be objects")


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
