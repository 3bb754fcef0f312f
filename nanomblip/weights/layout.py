"""The official layout, Hugging Face's BLIP-2, in tables: which key of a file is which parameter of ours, and which word
of a `config.json` is which field of a config. Reading and writing with them is load.py and save.py.
"""

from dataclasses import fields

import torch

from nanomblip.model.int8 import THRESHOLD
from nanomblip.model.mblip import MBLIP, MBLIPConfig
from nanomblip.model.mt5 import MT5, MT5Config
from nanomblip.model.qformer import QFormerConfig
from nanomblip.model.vit import ViTConfig


class WeightsError(ValueError):
    """A weights file, or its config, that cannot be used; the message names the file, what is wrong and what to do.

    What a stranger's file says is quoted in it, so it is made one printable line: no control character reaches a
    terminal."""

    def __init__(self, message):
        escape = lambda c: c if c.isprintable() else c.encode("unicode_escape").decode()
        super().__init__("".join(map(escape, str(message))))


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


# Where the official keys count layers: stack -> the word of config.json for its depth, part and field of MBLIPConfig.
STACKS = {
    "vision_model.encoder.layers.": ("num_hidden_layers", "vit", "layers"),
    "qformer.encoder.layer.": ("num_hidden_layers", "qformer", "layers"),
    "language_model.encoder.block.": ("num_layers", "mt5", "layers"),
    "language_model.decoder.block.": ("num_decoder_layers", "mt5", "decoder_layers"),
}


def check_depths(folder, cfg: MBLIPConfig | MT5Config, keys, skip: str | None = None) -> None:
    """Raise WeightsError if the config of a folder has more layers than the official `keys` of its files.

    To be called before a model is built: a million layers take minutes, even without memory. skip: as in
    `find_tensors`.
    """
    for stack, (word, part, name) in STACKS.items():
        if isinstance(cfg, MT5Config):
            if part != "mt5":
                continue
            stack = stack.removeprefix("language_model.")
        elif skip is not None and stack.startswith(skip):
            continue
        wanted = getattr(getattr(cfg, part, cfg), name)
        stored = len({key.removeprefix(stack).split(".")[0] for key in keys if key.startswith(stack)})
        if wanted > stored:
            raise WeightsError(
                f"{folder}: config.json wants {word} = {wanted}, the weights have {stored} layers {stack}*: "
                "these are not the weights of its config.json"
            )


# ------------------------------------------------------------------------------------------------------------- configs

# What transformers assumes when a config.json does not say (hub files often store differences only).
_MT5_DEFAULTS = dict(vocab_size=250112, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6,
                     relative_attention_num_buckets=32, relative_attention_max_distance=128, dropout_rate=0.1,
                     layer_norm_epsilon=1e-6, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
                     decoder_start_token_id=0)  # fmt: skip
_T5_DEFAULTS = _MT5_DEFAULTS | dict(vocab_size=32128, d_ff=2048, num_layers=6, num_heads=8, feed_forward_proj="relu",
                                    decoder_start_token_id=None)  # fmt: skip

# What a config.json may say without changing what the model computes for given tokens and pictures. Everything else
# that is said (not null, false or empty) and that no table here knows is refused, so that the options of next year
# cannot slip through. These are the keys of transformers 4.27 to 5.24 and of the files of the hub.
_HARMLESS = frozenset(
    # Names and history.
    "architectures name_or_path tokenizer_class transformers_version torch_dtype dtype finetuning_task prefix "
    "task_specific_params "
    # How weights are drawn before they are loaded; what a call returns, saves or cuts into parts.
    "initializer_factor initializer_range return_dict output_attentions output_hidden_states output_past use_cache "
    "chunk_size_feed_forward attn_implementation gradient_checkpointing "
    # Heads of other tasks, and limits of texts that these models do not have (their positions are relative).
    "id2label label2id num_labels problem_type classifier_dropout image_text_hidden_size projection_dim "
    "n_positions max_position_embeddings "
    # Said twice: it follows from the rest.
    "is_encoder_decoder use_decoder_only_language_model model_type bos_token_id image_token_index image_token_id "
    # Defaults of generation; sample.py has flags of its own.
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "num_return_sequences".split()
)
_LARGEST = 1_000_000  # of all sizes; the vocabulary, by far the largest, has 250,112
_Q_FORMER_TEXT = ("vocab_size", "pad_token_id")  # of the texts that this Q-Former never reads


def shown(value) -> str:
    """A value of a stranger's file in an error message, never longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_empty(value) -> bool:
    """Whether an option of a JSON file is not used: null, false, or an empty text, list or object. 0 is a value."""
    return value is None or value is False or value in ("", [], {})


def _refuse_unless(part: str, hf: dict, **allowed):
    """Raise WeightsError when a key of `hf` has a value that we do not implement (absent = the first allowed)."""
    for key, values in allowed.items():
        if hf.get(key, values[0]) not in values:
            raise WeightsError(
                f"{part} with {key} = {shown(hf[key])} is not implemented (only {', '.join(map(repr, values))})"
            )


def _refuse_unknown(part: str, hf: dict, known) -> None:
    """Raise WeightsError for a key that says something which nothing here reads."""
    for key, value in hf.items():
        if not (key in known or key in _HARMLESS or key.startswith("_") or is_empty(value)):
            raise WeightsError(
                f"{part} with {shown(key)[1:-1]} = {shown(value)} is not known here, so it could change what the model "
                "computes; delete it from config.json if it does not"
            )


def _build(part: str, cls, hf: dict, more: dict | None = None, /, **names):
    """Make the config dataclass `cls` from the official keys in `names` (ours = official); absent = our default.

    more: fields that come from elsewhere.
    """
    kwargs = {ours: hf[official] for ours, official in names.items() if official in hf}
    for ours, value in kwargs.items():
        default = next(f.default for f in fields(cls) if f.name == ours)
        if isinstance(default, str):
            continue  # checked by cls
        if isinstance(default, float):  # a dropout or an epsilon
            want, good = "a number from 0 to below 1", isinstance(value, (int, float)) and 0 <= value < 1
        else:
            lowest = 0 if ours in ("pad", "eos", "start") else 1
            want = f"a whole number from {lowest} to {_LARGEST:,}"
            good = isinstance(value, int) and lowest <= value <= _LARGEST
        if isinstance(value, bool) or not good:
            raise WeightsError(f"{part} with {names[ours]} = {shown(value)}: expected {want}")
    try:
        return cls(**kwargs, **(more or {}))
    except (ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"{part}: {error}") from None


_MT5_NAMES = dict(vocab="vocab_size", width="d_model", heads="num_heads", head_width="d_kv", mlp="d_ff",
                  layers="num_layers", decoder_layers="num_decoder_layers", buckets="relative_attention_num_buckets",
                  max_distance="relative_attention_max_distance", dropout="dropout_rate", eps="layer_norm_epsilon",
                  gelu="gelu", pad="pad_token_id", eos="eos_token_id")  # fmt: skip
_VIT_NAMES = dict(image_size="image_size", patch_size="patch_size", width="hidden_size", layers="num_hidden_layers",
                  heads="num_attention_heads", mlp="intermediate_size", eps="layer_norm_eps")  # fmt: skip
_QFORMER_NAMES = dict(width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads",
                      mlp="intermediate_size", vision_width="encoder_hidden_size",
                      cross_every="cross_attention_frequency", dropout="hidden_dropout_prob",
                      attn_dropout="attention_probs_dropout_prob", eps="layer_norm_eps")  # fmt: skip


def mt5_config_from_hf(text: dict) -> MT5Config:
    """MT5Config from the official `config.json` of an mT5, an mT0 or a flan-t5, or a BLIP-2's `text_config` (a dict).

    Raises WeightsError for whatever changes the arithmetic and is not implemented.
    """
    if not isinstance(text, dict):
        raise WeightsError("config.json does not hold an object")
    kind = text.get("model_type")  # absent means OPT; decoder-only models (OPT, BLOOMZ) are out of scope
    _refuse_unless("a language model", {"model_type": kind}, model_type=("mt5", "t5"))
    text = (_MT5_DEFAULTS if kind == "mt5" else _T5_DEFAULTS) | text
    if text.get("num_decoder_layers") is None:
        text["num_decoder_layers"] = text["num_layers"]
    # T5 scales the decoder's output, T5 1.1 and flan-t5 do not. Old files say so by tying the embeddings or not;
    # transformers 5 writes that they are tied for all, and has a word of its own for the scaling. mT5 never scales.
    scaled = kind == "t5" and text.get("tie_word_embeddings") is not False
    text = {"scale_decoder_outputs": scaled} | text
    if text["scale_decoder_outputs"] is not False:
        said = f"{shown(text['scale_decoder_outputs'])}, tie_word_embeddings = {shown(text.get('tie_word_embeddings'))}"
        raise WeightsError(f"a language model with scale_decoder_outputs = {said} is not implemented (only False)")
    fixed = dict(feed_forward_proj=("gated-gelu",), is_gated_act=(True,), dense_act_fn=("gelu_new", "gelu"),
                 decoder_start_token_id=(text["pad_token_id"],), is_decoder=(False,))  # fmt: skip
    _refuse_unless("a language model", text, **fixed)
    # The file decides what is tied, and ours needs a head. quantization_config: see `load.threshold_of`.
    other = ("tie_word_embeddings", "scale_decoder_outputs", "quantization_config")
    _refuse_unknown("a language model", text, {*_MT5_NAMES.values(), *fixed, *other})
    text["gelu"] = "none" if text.get("dense_act_fn") == "gelu" else "tanh"
    cfg = _build("text_config", MT5Config, text, **_MT5_NAMES)
    if max(cfg.pad, cfg.eos) >= cfg.vocab:
        raise WeightsError(f"text_config: tokens {cfg.pad} and {cfg.eos} (pad, eos) in a vocabulary of {cfg.vocab}")
    return cfg


def config_from_hf(hf: dict) -> MBLIPConfig:
    """MBLIPConfig from an official `config.json` (as a dict), legacy or new.

    What changes the arithmetic and is not implemented is refused by name (WeightsError), and so is what nobody here
    knows; what only concerns training or defaults of generation is ignored (_HARMLESS). `tie_word_embeddings` is
    left to the file: transformers 5 writes true for every T5, also beside a separate head, which then counts.
    """
    _check_kind(hf)
    text = hf.get("text_config") or {}
    if isinstance(text, dict) and not is_empty(text.get("quantization_config")):
        raise WeightsError("config.json: a quantization_config of the language model alone is not implemented")
    return vision_config_from_hf(hf, mt5_config_from_hf(text))


def vision_config_from_hf(hf: dict, mt5: MT5Config) -> MBLIPConfig:
    """The same, with another language model than the one of the `config.json`, which may be of any kind (OPT, say)."""
    _check_kind(hf)
    parts = ("vision_config", "qformer_config", "text_config")
    ours = ("num_query_tokens", "languages", "bases", "quantization_config", "tie_word_embeddings")
    _refuse_unknown("config.json", hf, (*parts, *ours))
    vision, qformer = hf.get("vision_config") or {}, hf.get("qformer_config") or {}
    fixed = dict(hidden_act=("gelu",), attention_dropout=(0.0,), qkv_bias=(True,), num_channels=(3,), dropout=(0.0,))
    _refuse_unless("a ViT", vision, **fixed)
    _refuse_unknown("a ViT", vision, {*_VIT_NAMES.values(), *fixed})
    vit = _build("vision_config", ViTConfig, vision, **_VIT_NAMES)

    fixed = dict(hidden_act=("gelu",), position_embedding_type=("absolute",), use_qformer_text_input=(False,))
    _refuse_unless("a Q-Former", qformer, **fixed)
    _refuse_unknown("a Q-Former", qformer, {*_QFORMER_NAMES.values(), *fixed, *_Q_FORMER_TEXT})
    qformer = {"encoder_hidden_size": vit.width} | qformer
    former = _build("qformer_config", QFormerConfig, qformer, **_QFORMER_NAMES)

    made = dict(vit=vit, qformer=former, mt5=mt5)
    return _build("config.json", MBLIPConfig, hf, made, queries="num_query_tokens")


def _check_kind(hf: dict) -> None:
    if not isinstance(hf, dict):
        raise WeightsError("config.json does not hold an object")
    if hf.get("model_type") != "blip-2":
        raise WeightsError(f"config.json says model_type {shown(hf.get('model_type'))}; this code reads 'blip-2'")
    if not all(isinstance(hf.get(key) or {}, dict) for key in ("vision_config", "qformer_config", "text_config")):
        raise WeightsError("config.json: vision_config, qformer_config and text_config must be objects")


# Keys of a quantization_config that say nothing about weights that are there: what is not int8 is told by its type.
_OF_INT8 = ("quant_method", "load_in_8bit", "llm_int8_threshold", "llm_int8_skip_modules",
            "llm_int8_enable_fp32_cpu_offload")  # fmt: skip


def int8_threshold(hf: dict) -> float:
    """The outlier threshold of int8 layers: that of a config.json, if bitsandbytes or we have quantised its weights.

    Raises WeightsError for any other quantisation.
    """
    block = hf.get("quantization_config")
    if block is None:
        return THRESHOLD
    if (
        not isinstance(block, dict)
        or block.get("quant_method") != "bitsandbytes"
        or block.get("load_in_8bit") is not True
    ):
        raise WeightsError(
            "config.json: quantization_config is not that of bitsandbytes in 8 bits; get the original weights"
        )
    for key, value in block.items():  # bnb_4bit_*: 8 bits do not use them; _*: bitsandbytes' own copies
        if not (key in _OF_INT8 or key.startswith(("_", "bnb_4bit_")) or is_empty(value)):
            raise WeightsError(
                f"config.json: quantization_config with {shown(key)} = {shown(value)} is not implemented"
            )
    value = block.get("llm_int8_threshold", THRESHOLD)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise WeightsError(f"config.json: llm_int8_threshold = {shown(value)}; expected a number, at least 0")
    return float(value)


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
    """The official `config.json` (as a dict) of a model; `image_token` is the token id that transformers >= 4.55
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
