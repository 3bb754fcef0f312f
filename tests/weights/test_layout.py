"""config.json: every key is read, known to change nothing, or refused by name; absurd values are one line at once."""

import json
import time
from dataclasses import replace

import pytest
import torch
from conftest import TINY, randomise, tiny_mblip, transformers_inputs
from safetensors.torch import load_file

from nanomblip.weights.layout import (
    WeightsError,
    config_from_hf,
    config_to_hf,
    mt5_config_from_hf,
    mt5_config_to_hf,
    vision_config_from_hf,
)
from nanomblip.weights.load import load_mblip, load_mt5
from nanomblip.weights.save import save_mblip, save_mt5, stored_parameters

PARTS = (None, "vision_config", "qformer_config", "text_config")


def config(part=None, **changes):
    hf = config_to_hf(TINY, 66)
    (hf[part] if part else hf).update(changes)
    return hf


# What transformers 4.27 to 4.57 wrote into every part of a config.json, with its values.
OLD_DUMP = {
    "_name_or_path": "google/flan-t5-xl", "_commit_hash": None, "add_cross_attention": False, "architectures": ["X"], "bad_words_ids": None,
    "begin_suppress_tokens": None, "bos_token_id": None, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "diversity_penalty": 0.0,
    "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None, "finetuning_task": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "id2label": {"0": "LABEL_0"}, "is_decoder": False, "is_encoder_decoder": True,
    "label2id": {"LABEL_0": 0}, "length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
    "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False, "output_scores": False, "prefix": None, "problem_type": None,
    "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False,
    "sep_token_id": None, "suppress_tokens": None, "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": "float32", "torchscript": False, "transformers_version": "4.31.0", "typical_p": 1.0,
    "use_bfloat16": False, "initializer_factor": 1.0, "initializer_range": 0.02,
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_the_keys_of_old_files_change_nothing(part):
    assert config_from_hf(config(part, **OLD_DUMP)) == TINY


def test_the_keys_of_the_hubs_files_change_nothing():
    flan = {"n_positions": 512, "output_past": True, "use_cache": True, "classifier_dropout": 0.0, "bos_token_id": 1,
            "task_specific_params": {"summarization": {"max_length": 200}}}  # fmt: skip
    assert config_from_hf(config("text_config", **flan)) == TINY
    assert config_from_hf(config("vision_config", projection_dim=512, num_channels=3, dropout=0.0)) == TINY
    assert config_from_hf(config("qformer_config", vocab_size=30522, max_position_embeddings=512, pad_token_id=0, classifier_dropout=None)) == TINY
    assert config_from_hf(config(image_text_hidden_size=256, tie_word_embeddings=True, use_decoder_only_language_model=True)) == TINY


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("key,value", [("rope_scaling", {"factor": 2}), ("pruned_heads", {"0": [1]}), ("tie_encoder_decoder", True), ("logit_softcapping", 30),
                                       ("forced_eos_token_id", 1), ("suppress_tokens", [5]), ("attention_scale", 0), ("auto_map", {"AutoModel": "x.Y"})])  # fmt: skip
def test_what_nobody_knows_is_refused_by_name(part, key, value):
    with pytest.raises(WeightsError, match=f"{key} = .*not known here"):
        config_from_hf(config(part, **{key: value}))


@pytest.mark.parametrize("part,key,value", [
    ("vision_config", "num_channels", 1), ("vision_config", "dropout", 0.1), ("text_config", "is_decoder", True), ("text_config", "hidden_size", 28),
    ("text_config", "head_dim", 8), ("text_config", "quantization_config", {"quant_method": "gptq"}), ("vision_config", "quantization_config", {"a": 1}),
    ("text_config", "eos_token_id", [1, 2]), ("text_config", "pad_token_id", 67), ("text_config", "eos_token_id", 67), ("text_config", "pad_token_id", None),
])  # fmt: skip
def test_what_is_known_and_not_implemented_is_refused_by_name(part, key, value):
    with pytest.raises(WeightsError, match=key if value != 67 else "tokens.*in a vocabulary of 67"):
        config_from_hf(config(part, **{key: value} | ({"decoder_start_token_id": value} if key == "pad_token_id" else {})))


@pytest.mark.parametrize("part,key", [("vision_config", "num_hidden_layers"), ("qformer_config", "cross_attention_frequency"), ("text_config", "d_kv"), (None, "num_query_tokens"),
                                      ("text_config", "vocab_size"), ("text_config", "relative_attention_max_distance"), ("vision_config", "image_size")])  # fmt: skip
@pytest.mark.parametrize("value", [0, -1, True, False, 2.0, "2", None, [2], {"a": 1}, 10**7, 10**400, float("nan"), float("inf")], ids=lambda v: repr(v)[:9])
def test_counts_are_whole_numbers_within_reason(part, key, value):
    with pytest.raises(WeightsError, match=f"{key} = .*expected a whole number") as error:
        config_from_hf(config(part, **{key: value}))
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("part,key", [("vision_config", "layer_norm_eps"), ("qformer_config", "hidden_dropout_prob"), ("qformer_config", "attention_probs_dropout_prob"),
                                      ("qformer_config", "layer_norm_eps"), ("text_config", "dropout_rate"), ("text_config", "layer_norm_epsilon")])  # fmt: skip
@pytest.mark.parametrize("value", [2, -0.1, 1, True, "0.1", None, 10**400, float("nan"), float("inf")], ids=lambda v: repr(v)[:9])
def test_dropout_and_eps_are_fractions(part, key, value):
    with pytest.raises(WeightsError, match=f"{key} = .*expected a number from 0 to below 1"):
        config_from_hf(config(part, **{key: value}))


def test_numbers_may_lack_their_point():
    assert config_from_hf(config("text_config", dropout_rate=0)).mt5.dropout == 0


def test_the_q_former_reads_what_the_vit_makes():
    """transformers takes the ViT's width, whether the config.json says so or not."""
    hf = config()
    del hf["qformer_config"]["encoder_hidden_size"]
    assert config_from_hf(hf) == TINY


def test_the_decoder_starts_as_in_transformers_or_not_at_all():
    from transformers import MT5Config, T5Config

    hf = mt5_config_to_hf(TINY.mt5) | {"pad_token_id": 3}
    del hf["decoder_start_token_id"]
    assert MT5Config(**hf).decoder_start_token_id == 0  # its own default, not pad
    with pytest.raises(WeightsError, match="decoder_start_token_id = 0 is not implemented .only 3"):
        mt5_config_from_hf(hf)
    assert mt5_config_from_hf(hf | {"decoder_start_token_id": 3}).pad == 3
    assert mt5_config_from_hf(hf | {"pad_token_id": 0}).pad == 0
    t5 = hf | {"pad_token_id": 0, "model_type": "t5"}
    assert getattr(T5Config(**t5), "decoder_start_token_id", None) is None  # it raises, or begins with bos
    with pytest.raises(WeightsError, match="decoder_start_token_id = None"):
        mt5_config_from_hf(t5)


@pytest.mark.parametrize("said,scaled", [
    (dict(tie_word_embeddings=True), True), (dict(tie_word_embeddings=False), False), (dict(), True), (dict(tie_word_embeddings=None), True),
    (dict(tie_word_embeddings=True, scale_decoder_outputs=False), False), (dict(scale_decoder_outputs=False), False),
    (dict(tie_word_embeddings=False, scale_decoder_outputs=True), True),
])  # fmt: skip
def test_whether_a_t5_scales_is_read_as_transformers_reads_it(said, scaled):
    from transformers import T5Config

    hf = {k: v for k, v in mt5_config_to_hf(TINY.mt5).items() if k != "tie_word_embeddings"} | {"model_type": "t5"} | said
    assert T5Config(**hf).scale_decoder_outputs == scaled
    if scaled:
        with pytest.raises(WeightsError, match="scale_decoder_outputs = True"):
            mt5_config_from_hf(hf)
    else:
        assert mt5_config_from_hf(hf) == TINY.mt5


@pytest.mark.parametrize("kind", ["t5", "mt5"])
@pytest.mark.parametrize("head", ["of its own", "tied"])
def test_a_blip2_saved_by_transformers_5_computes_the_same(tmp_path, batch, kind, head):
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    hf = config_to_hf(replace(TINY, mt5=replace(TINY.mt5, gelu="none" if kind == "t5" else "tanh")), 66)
    hf["text_config"]["model_type"] = kind
    theirs = randomise(Blip2ForConditionalGeneration(Blip2Config(**hf)).eval())
    if head == "of its own":
        theirs.language_model.lm_head.weight = torch.nn.Parameter(torch.randn(67, 28) * 0.15)
    theirs.save_pretrained(tmp_path / "m")
    text = json.loads((tmp_path / "m" / "config.json").read_text())["text_config"]
    assert text["tie_word_embeddings"] and not text.get("scale_decoder_outputs")
    assert ("language_model.lm_head.weight" in load_file(tmp_path / "m" / "model.safetensors")) == (head == "of its own")
    ours, theirs = load_mblip(tmp_path / "m"), Blip2ForConditionalGeneration.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    assert torch.equal(ours.mt5.lm_head.weight, ours.mt5.embed.weight) == (head == "tied")
    ids, mask = transformers_inputs(ours, batch["prompt"], batch["prompt_mask"])
    with torch.no_grad():
        want = theirs(pixel_values=batch["image"][:, 0], input_ids=ids, attention_mask=mask, labels=batch["labels"]).logits
        torch.testing.assert_close(ours(**batch)[0], want, atol=1e-5, rtol=1e-4)
    assert stored_parameters(tmp_path / "m") == sum(p.numel() for p in ours.parameters())


def test_a_file_without_a_head_is_refused_when_it_is_not_tied(tmp_path):
    from safetensors.torch import save_file

    save_mt5(tiny_mblip().mt5, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="missing.*lm_head"):
        load_mt5(tmp_path)


@pytest.mark.parametrize("part,changes,words", [
    ("vision_config", dict(num_hidden_layers=1_000_000), "num_hidden_layers = 1000000, the weights have 2 layers vision_model"),
    ("qformer_config", dict(num_hidden_layers=1_000_000), "num_hidden_layers = 1000000, the weights have 3 layers qformer"),
    ("text_config", dict(num_layers=1_000_000, num_decoder_layers=3), "num_layers = 1000000, the weights have 2"),
    ("text_config", dict(num_decoder_layers=1_000_000), "num_decoder_layers = 1000000, the weights have 3"),
    ("vision_config", dict(num_hidden_layers=1), "unknown"), ("qformer_config", dict(cross_attention_frequency=1_000_000), "unknown"),
    ("vision_config", dict(intermediate_size=1_000_000), "shape"), ("text_config", dict(d_ff=999_999), "shape"),
    ("text_config", dict(num_heads=10**6, d_kv=10**6, d_model=10**6), "sizes that no model can have|shape"),
    ("vision_config", dict(patch_size=10**6, image_size=10**6), "sizes that no model can have|shape"), (None, dict(num_query_tokens=10**6), "shape"),
])  # fmt: skip
def test_an_absurd_config_costs_nothing(tmp_path, part, changes, words):
    save_mblip(tiny_mblip(), tmp_path, image_token=66)
    (tmp_path / "config.json").write_text(json.dumps(config(part, **changes)))
    for load in (load_mblip,) if "shape" in words else (load_mblip, stored_parameters):
        start = time.perf_counter()
        with pytest.raises(WeightsError, match=words) as error:
            load(tmp_path)
        assert time.perf_counter() - start < 3 and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_another_language_model_may_say_what_it_likes():
    hf = config(text_config={"model_type": "opt", "rope_scaling": 5})
    assert vision_config_from_hf(hf, TINY.mt5) == TINY


@pytest.mark.parametrize("block", [dict(load_in_8bit=True), dict(quant_method="bitsandbytes", load_in_8bit=1), dict(quant_method="bitsandbytes", load_in_8bit=True, load_in_4bit=True),
                                   dict(quant_method="bitsandbytes", load_in_8bit=True, llm_int8_has_fp16_weight=True), dict(quant_method="awq", bits=4), "int8"])  # fmt: skip
def test_a_quantisation_that_is_not_read_is_refused(tmp_path, block):
    save_mblip(tiny_mblip(), tmp_path, image_token=66)
    (tmp_path / "config.json").write_text(json.dumps(config(quantization_config=block)))
    with pytest.raises(WeightsError, match="quantization_config"):
        load_mblip(tmp_path)
