"""Files of the translator: the embedding's four names, the old sinusoids, strictness, configs that are not implemented."""

import json
import random

import pytest
import torch
from conftest import TINY_NLLB, save_nllb, tiny_nllb
from safetensors.torch import load_file, save_file

from nanomblip.weights.files import find_tensors
from nanomblip.weights.layout import WeightsError
from nanomblip.weights.nllb import EMBED_NAMES, SINUSOIDS, load_nllb, nllb_config_from_hf, nllb_names
from nanomblip.weights.records import write_record


@pytest.fixture
def folder(tmp_path):
    save_nllb(tiny_nllb(), tmp_path / "m")
    return tmp_path / "m"


def change(folder, edit):
    """Let `edit` change the tensors of a folder in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same_model(folder):
    want, got = tiny_nllb(), load_nllb(folder)
    return all(torch.equal(a, b) for a, b in zip(want.parameters(), got.parameters(), strict=True)) and got.cfg == want.cfg


def test_keys_are_those_of_the_hub(folder):
    """509 and 1013 tensors of 12 and 24 layers are checked with the sizes; here, that each name is transformers' own."""
    assert set(nllb_names(tiny_nllb()).values()) == set(find_tensors(folder)) and same_model(folder)


@pytest.mark.parametrize("names", [(name,) for name in EMBED_NAMES] + [EMBED_NAMES, EMBED_NAMES[2:], EMBED_NAMES[1:3]])
def test_the_embedding_comes_under_any_of_its_names(folder, names):
    change(folder, lambda t: t.update({name: t["model.shared.weight"].clone() for name in names}))
    if EMBED_NAMES[0] not in names:
        change(folder, lambda t: t.pop(EMBED_NAMES[0]))
    assert same_model(folder)


@pytest.mark.parametrize("at", [(0, 0), (1, 3), (82, 23)])
@pytest.mark.parametrize("name", EMBED_NAMES[1:])
def test_embeddings_that_differ_are_refused(folder, name, at):
    change(folder, lambda t: t.update({key: t["model.shared.weight"].clone() for key in EMBED_NAMES}))
    change(folder, lambda t: t[name].view(-1).__setitem__(at[0] * 24 + at[1], 9.0))
    with pytest.raises(WeightsError, match=f"{name} differs from model.shared.weight"):
        load_nllb(folder)


def test_no_embedding_at_all(folder):
    change(folder, lambda t: t.pop("model.shared.weight"))
    with pytest.raises(WeightsError, match="1 missing.*model.shared.weight"):
        load_nllb(folder)


def test_the_sinusoids_of_old_files_are_left_out_and_nothing_else(folder):
    change(folder, lambda t: t.update({key: torch.randn(18, 24) for key in SINUSOIDS}))
    assert same_model(folder)
    change(folder, lambda t: t.update({"model.encoder.embed_positions.weight": torch.randn(18, 24)}))
    with pytest.raises(WeightsError, match="1 unknown.*embed_positions.weight'"):
        load_nllb(folder)


@pytest.mark.parametrize("edit, words", [
    (lambda t: t.pop("model.decoder.layers.2.encoder_attn.k_proj.bias"), "1 missing.*layers.2.encoder_attn.k_proj.bias"),
    (lambda t: t.pop("model.encoder.layer_norm.weight"), "missing.*encoder.layer_norm.weight"),
    (lambda t: t.update({"final_logits_bias": torch.zeros(1, 83)}), "unknown.*final_logits_bias"),
    (lambda t: t.update({"model.decoder.layers.3.fc1.bias": torch.zeros(28)}), "unknown.*layers.3.fc1.bias"),
    (lambda t: t.update({"model.encoder.layers.0.fc1.weight": torch.zeros(24, 40)}), r"fc1.weight has shape \(24, 40\)"),
    (lambda t: t.update({"model.shared.weight": torch.zeros(84, 24)}), r"shared.weight has shape \(84, 24\)"),
    (lambda t: t["model.decoder.layer_norm.bias"].fill_(float("nan")), "not finite"),
    (lambda t: t.update({"model.encoder.layers.1.fc2.bias": torch.zeros(24, dtype=torch.int64)}), "I64"),
])  # fmt: skip
def test_files_that_do_not_fit_are_refused_by_key(folder, edit, words):
    change(folder, edit)
    with pytest.raises(WeightsError, match=words):
        load_nllb(folder)


def test_every_missing_tensor_is_noticed(folder):
    names = sorted(find_tensors(folder))
    whole = (folder / "model.safetensors").read_bytes()
    for name in random.Random(0).sample(names, 12):
        change(folder, lambda t: t.pop(name))
        with pytest.raises(WeightsError, match=f"(1 missing|has no).*{name}"):
            load_nllb(folder)
        (folder / "model.safetensors").write_bytes(whole)


def test_a_folder_that_is_not_there_and_a_truncated_file(folder, tmp_path):
    with pytest.raises(WeightsError, match="no such folder"):
        load_nllb(tmp_path / "elsewhere")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-5])
    with pytest.raises(WeightsError, match="damaged"):
        load_nllb(folder)


def test_a_bit_that_flips_is_noticed_where_the_hash_is_known(folder):
    import hashlib

    path = folder / "model.safetensors"
    write_record(folder, {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}, {})
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="sha256"):
        load_nllb(folder)


HUB = dict(  # facebook/nllb-200-distilled-600M
    model_type="m2m_100", vocab_size=256206, d_model=1024, encoder_layers=12, decoder_layers=12, encoder_attention_heads=16,
    decoder_attention_heads=16, encoder_ffn_dim=4096, decoder_ffn_dim=4096, max_position_embeddings=1024, scale_embedding=True,
    activation_function="relu", dropout=0.1, attention_dropout=0.1, activation_dropout=0.0, encoder_layerdrop=0, decoder_layerdrop=0,
    init_std=0.02, bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, max_length=200, use_cache=True,
    num_hidden_layers=12, is_encoder_decoder=True, tokenizer_class="NllbTokenizer", torch_dtype="float32",
)  # fmt: skip


def test_the_configs_of_the_hub():
    from nanomblip.model.nllb import NLLB_PRESETS

    assert nllb_config_from_hf(HUB) == NLLB_PRESETS["nllb-200-distilled-600M"]
    assert nllb_config_from_hf(dict(model_type="m2m_100")).vocab == 128112
    large = HUB | dict(d_model=2048, encoder_layers=24, decoder_layers=24, encoder_ffn_dim=8192, decoder_ffn_dim=8192)
    assert nllb_config_from_hf(large) == NLLB_PRESETS["nllb-200-3.3B"]
    assert nllb_config_from_hf(HUB | dict(vocab_size=256208, decoder_layers=3)).decoder_layers == 3


@pytest.mark.parametrize("bad, words", [
    (dict(activation_function="gelu"), "activation_function"), (dict(tie_word_embeddings=False), "tie_word_embeddings"),
    (dict(scale_embedding=False), "scale_embedding"), (dict(model_type="nllb-moe"), "model_type"), (dict(model_type=None), "model_type"),
    (dict(d_model="1024"), "d_model"), (dict(encoder_layers=-1), "encoder_layers"), (dict(d_model=1000), "width"),
    (dict(encoder_attention_heads=0), "heads"), (dict(pad_token_id=300000), "pad"), (dict(is_encoder_decoder=False), "is_encoder_decoder"),
    (dict(scale_attention=True), "scale_attention"), (dict(quantization_config=dict(load_in_8bit=True)), "quantization_config"),
])  # fmt: skip
def test_configs_that_are_not_implemented_are_refused(bad, words, folder):
    with pytest.raises(WeightsError, match=words):
        nllb_config_from_hf(HUB | bad)
    theirs = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(theirs | bad))
    with pytest.raises(WeightsError):
        load_nllb(folder)


@pytest.mark.parametrize("bad, words", [
    (dict(encoder_layers=10**6), "model.encoder.layers.999999.fc1.weight, the last of the 1000000"),
    (dict(decoder_layers=4), "model.decoder.layers.3.fc1.weight"), (dict(decoder_layers=0), "decoder.layers.-1|decoder_layers = 0"),
    (dict(encoder_layers=1), "16 unknown.*encoder.layers.1"), (dict(decoder_ffn_dim=10**30), "sizes that no model can have|decoder_ffn_dim"),
    (dict(vocab_size=10**18), "sizes that no model can have|vocab_size"), (dict(encoder_ffn_dim=41), "fc1"),
])  # fmt: skip
def test_a_config_that_says_other_sizes_than_the_file(folder, bad, words):
    theirs = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(theirs | bad))
    with pytest.raises(WeightsError, match=words):
        load_nllb(folder)


def test_a_config_that_is_no_object(folder):
    (folder / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="object"):
        load_nllb(folder)


def test_shards_and_half_precision(folder):
    """Three files with an index, the embedding in two of them, in fp16: as the largest model is stored."""
    tensors = {key: t.half() for key, t in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    keys = sorted(tensors)
    parts = [keys[:40], keys[40:], ["lm_head.weight"]]
    tensors["lm_head.weight"] = tensors["model.shared.weight"].clone()
    where = {}
    for i, part in enumerate(parts):
        name = f"model-0000{i + 1}-of-00003.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name)
        where |= {key: name for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))
    want, got = tiny_nllb().half().float(), load_nllb(folder)
    assert got.cfg == TINY_NLLB and all(torch.equal(a, b) for a, b in zip(want.parameters(), got.parameters(), strict=True))
