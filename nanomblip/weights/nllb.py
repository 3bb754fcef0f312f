"""The translator's weights, in the layout of facebook/nllb-200-* on the hub: `config.json` and safetensors.

They are read as strictly as load.py reads mBLIP's, with the same machinery. One matrix is embedding and head. Whoever
wrote a file chose one of its four names, or several: any of them is taken, and several must hold the same numbers.
Files saved by transformers before 4.31 also hold the sinusoids, which are computed here: these two keys are left out,
and no others.
"""

from pathlib import Path

import torch
import torch.nn as nn

from nanomblip.model.int8 import THRESHOLD
from nanomblip.model.nllb import NLLB, NLLBConfig
from nanomblip.weights.files import find_tensors
from nanomblip.weights.layout import WeightsError, _build, _expand, _refuse_unknown, _refuse_unless
from nanomblip.weights.load import _fill, _Forms, sizes_of
from nanomblip.weights.records import check_record
from nanomblip.weights.tensors import same_tensor

EMBED_NAMES = (
    "model.shared.weight",
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "lm_head.weight",
)
SINUSOIDS = ("model.encoder.embed_positions.weights", "model.decoder.embed_positions.weights")

# Official key -> ours, {} is the layer's number. In theirs `final_layer_norm` stands before the feed-forward of each
# layer, and `layer_norm` at the end of the stack.
NLLB_KEYS = {EMBED_NAMES[0]: "embed.weight"}
for _s in ("encoder", "decoder"):
    _theirs, _ours = f"model.{_s}.layers.{{}}", f"{_s}.blocks.{{}}"
    NLLB_KEYS[f"model.{_s}.layer_norm.*"] = f"{_s}.norm.*"
    for _their, _our in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "out")):
        NLLB_KEYS[f"{_theirs}.self_attn.{_their}.*"] = f"{_ours}.attn.{_our}.*"
        if _s == "decoder":
            NLLB_KEYS[f"{_theirs}.encoder_attn.{_their}.*"] = f"{_ours}.cross_attn.{_our}.*"
    NLLB_KEYS[f"{_theirs}.self_attn_layer_norm.*"] = f"{_ours}.norm1.*"
    NLLB_KEYS[f"{_theirs}.fc1.*"] = f"{_ours}.mlp.fc1.*"
    NLLB_KEYS[f"{_theirs}.fc2.*"] = f"{_ours}.mlp.fc2.*"
    NLLB_KEYS[f"{_theirs}.final_layer_norm.*"] = f"{_ours}.norm2.*"
NLLB_KEYS["model.decoder.layers.{}.encoder_attn_layer_norm.*"] = "decoder.blocks.{}.norm_cross.*"

# What transformers assumes when a config.json does not say.
_DEFAULTS = dict(vocab_size=128112, d_model=1024, encoder_layers=12, decoder_layers=12, encoder_attention_heads=16,
                 decoder_attention_heads=16, encoder_ffn_dim=4096, decoder_ffn_dim=4096, pad_token_id=1, eos_token_id=2,
                 decoder_start_token_id=2)  # fmt: skip

_NAMES = dict(vocab="vocab_size", width="d_model", heads="encoder_attention_heads", mlp="encoder_ffn_dim",
              decoder_heads="decoder_attention_heads", decoder_mlp="decoder_ffn_dim", layers="encoder_layers",
              decoder_layers="decoder_layers", pad="pad_token_id", eos="eos_token_id",
              start="decoder_start_token_id")  # fmt: skip
_OF_TRAINING = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop",
                "init_std", "num_hidden_layers", "forced_bos_token_id", "forced_eos_token_id")  # fmt: skip


def nllb_config_from_hf(hf: dict) -> NLLBConfig:
    """NLLBConfig from an official `config.json` (as a dict); WeightsError for what is not implemented.

    Dropout concerns training alone, and the table of positions here has no end: both are ignored.
    """
    if not isinstance(hf, dict):
        raise WeightsError("config.json does not hold an object")
    hf = _DEFAULTS | {key: value for key, value in hf.items() if value is not None}
    _refuse_unless("a translator", {"model_type": None} | hf, model_type=("m2m_100",))
    fixed = dict(activation_function=("relu",), scale_embedding=(True,), tie_word_embeddings=(True,),
                 is_encoder_decoder=(True,), add_cross_attention=(False,), quantization_config=(None,))  # fmt: skip
    _refuse_unless("an NLLB", hf, **fixed)
    _refuse_unknown("an NLLB", hf, {*_NAMES.values(), *fixed, *_OF_TRAINING})
    return _build("config.json", NLLBConfig, hf, **_NAMES)


def nllb_names(model: NLLB) -> dict[str, str]:
    """Our parameter name -> official key; the head is not among them, since it is the embedding."""
    return _expand(NLLB_KEYS, {name for name, _ in model.named_parameters()})


def load_nllb(folder: Path | str, dtype: torch.dtype = torch.float32, llm_dtype: str | None = None) -> NLLB:
    """Build the translator of a folder in the official layout and fill it, strictly; returns it in eval mode.

    dtype: of all floats. llm_dtype: "fp32", "bf16" or "int8", as in `load_mblip`. In int8 are the linear layers and the
    head, which then is no longer the embedding: that is in bf16.
    Raises WeightsError for a missing or damaged file, an unknown or a missing key, embeddings that differ, a wrong
    shape or type, and a number that is not finite.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder")
    cfg = sizes_of(folder, nllb_config_from_hf)
    check_record(folder)
    found = find_tensors(folder)
    for stack, layers in (("encoder", cfg.layers), ("decoder", cfg.decoder_layers)):
        last = f"model.{stack}.layers.{layers - 1}.fc1.weight"
        if last not in found:  # said before a model of a million layers is built
            raise WeightsError(f"{folder}: has no {last}, the last of the {layers} layers of its config.json")
    try:
        with torch.device("meta"):
            model = NLLB(cfg)
            untied = nn.Linear(cfg.width, cfg.vocab, bias=False)
    except (RuntimeError, TypeError):  # numbers that do not fit into 64 bits
        raise WeightsError(f"{folder / 'config.json'}: sizes that no model can have") from None
    places = _locate(folder, found, nllb_names(model))
    if llm_dtype == "int8":
        model.lm_head, places["lm_head.weight"] = untied, places["embed.weight"]
    _fill(model, places, _Forms(dtype, None, llm_dtype, prefix="mt5."), THRESHOLD)  # filled like mBLIP's language model
    if llm_dtype != "int8":
        model.tie()
    return model.eval()


def _locate(folder: Path, found: dict[str, Path], names: dict[str, str]) -> dict[str, tuple[Path, str]]:
    """Our name -> file and key, for all of `names` (our name -> official key), strictly; found: from `find_tensors`."""
    embeddings = [key for key in EMBED_NAMES if key in found]
    for key in embeddings[1:]:
        if not same_tensor(found[key], key, found[embeddings[0]], embeddings[0]):
            raise WeightsError(f"{found[key]}: {key} differs from {embeddings[0]}; an untied head is not implemented")
    keys = names | {"embed.weight": embeddings[0] if embeddings else EMBED_NAMES[0]}
    unknown = sorted(set(found) - set(keys.values()) - set(EMBED_NAMES) - set(SINUSOIDS))
    missing = sorted(set(keys.values()) - set(found))
    for what, odd in (("unknown", unknown), ("missing", missing)):
        if odd:
            raise WeightsError(
                f"{folder}: {len(odd)} {what} key(s), first {odd[0]!r}: these are not the weights of its config.json"
            )
    return {mine: (found[key], key) for mine, key in keys.items()}
