"""PEFT's adapters: what their config may say, which layers they are for, and which base they were trained on."""

import json
import shutil
from dataclasses import fields, replace

import pytest
import torch
import torch.nn as nn
from conftest import TINY, in_transformers, randomise, tiny_mblip, transformers_inputs
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nanomblip.model.int8 import quantize_linears
from nanomblip.model.lora import add_lora, lora_layers, merge_lora
from nanomblip.model.mt5 import MT5
from nanomblip.weights import adapter as adapters
from nanomblip.weights.adapter import base_digest, load_adapter, save_adapter
from nanomblip.weights.files import digest
from nanomblip.weights.layout import WeightsError
from nanomblip.weights.load import load_mblip, load_mt5
from nanomblip.weights.save import save_mblip, save_merged, save_mt5, save_trained
from nanomblip.weights.tensors import held_tensors

peft = pytest.importorskip("peft")
CFG = replace(TINY.mt5, dropout=0.0)
LM = "language_model."
SOME = ["encoder.block.1.layer.0.SelfAttention.q", "decoder.block.2.layer.1.EncDecAttention.v", "decoder.block.0.layer.2.DenseReluDense.wo"]


def model(seed=0):
    return randomise(MT5(CFG), seed).eval()


def hf_model(folder):
    from transformers import MT5ForConditionalGeneration

    save_mt5(model(), folder)
    return MT5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


IDS, LABELS = torch.tensor([[5, 9, 13, 2, 1], [7, 3, 1, 0, 0]]), torch.tensor([[4, 6, 1], [8, 1, -100]])


def run(mt5):
    return mt5.decode(mt5.shift_right(LABELS), mt5.encode(mt5.embed(IDS), IDS != 0), IDS != 0)


def run_hf(hf):
    return hf(input_ids=IDS, attention_mask=(IDS != 0).long(), labels=LABELS).logits


def filled(wrapped, seed=3):
    """A PEFT model whose A and B are all drawn."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.3
    return wrapped.eval()


def trained_lora(mt5, targets="all", **more):
    add_lora(mt5, targets, **(dict(r=4, alpha=6.0) | more))
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(mt5).values():
        for side in (layer.A, layer.B):
            nn.init.normal_(side, std=0.3, generator=generator)
    return mt5


def set_config(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


# ------------------------------------------------------------------------------------- what the config may say


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An adapter as peft writes it, and what its model computes."""
    folder = tmp_path_factory.mktemp("peft")
    wrapped = filled(peft.get_peft_model(hf_model(folder / "base"), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q", "v"])))
    wrapped.save_pretrained(folder / "adapter")
    return folder / "adapter", run_hf(wrapped).detach()


@pytest.fixture
def folder(written, tmp_path):
    import shutil

    shutil.copytree(written[0], tmp_path / "adapter")
    return tmp_path / "adapter"


def test_what_peft_writes_by_default_is_all_known(folder, written):
    said = json.loads((folder / "adapter_config.json").read_text())
    assert len(said) > 30
    mt5 = model()
    load_adapter(mt5, folder)
    torch.testing.assert_close(run(mt5), written[1], atol=1e-5, rtol=1e-5)


KNOWN = {*adapters._DEFAULTS, *adapters._HARMLESS}


@pytest.mark.parametrize("key", sorted({f.name for f in fields(peft.LoraConfig)} - KNOWN) + ["an_option_of_next_year"])
@pytest.mark.parametrize("value", [True, {"a": 1}, [3], "yes", 0, 0.5], ids=str)
def test_every_option_that_is_not_read_is_refused_by_name(folder, key, value):
    set_config(folder, **{key: value})
    mt5 = model()
    with pytest.raises(WeightsError, match=f"{key} = .* is not implemented") as error:
        load_adapter(mt5, folder)
    assert not lora_layers(mt5) and "\n" not in str(error.value)
    for empty in (None, False, [], {}, ""):
        set_config(folder, **{key: empty})
        load_adapter(model(), folder)


@pytest.mark.parametrize("key", sorted(adapters._HARMLESS))
def test_what_changes_nothing_is_allowed(folder, key):
    set_config(folder, **{key: {"some": "thing"}})
    load_adapter(model(), folder)


@pytest.mark.parametrize("changes,words", [
    (dict(r=True), "r = True"), (dict(r=4.0), "rank 4.0"), (dict(lora_alpha=True), "lora_alpha"), (dict(lora_alpha=float("nan")), "alpha nan"), (dict(lora_alpha="6"), "must be"),
    (dict(use_rslora="false"), "use_rslora"), (dict(lora_dropout=1.5), "dropout 1.5"), (dict(lora_dropout="0"), "not supported|dropout"), (dict(target_modules="("), "missing|unterminated"),
    (dict(target_modules=[]), "target_modules"), (dict(target_modules=[1]), "target_modules"), (dict(target_modules="nothing"), "match no linear layer"),
    (dict(layers_to_transform=["1"]), "layers_to_transform"), (dict(layers_to_transform=True), "layers_to_transform"), (dict(layers_pattern=[2]), "layers_pattern"),
    (dict(rank_pattern={"q": "2"}), "rank_pattern"), (dict(rank_pattern={"q": 0}), "rank 0"), (dict(rank_pattern={"(": 2}), "missing|unterminated"),
    (dict(alpha_pattern={"q": None}), "alpha_pattern"), (dict(alpha_pattern=[3]), "alpha_pattern"), (dict(exclude_modules=[None]), "exclude_modules"),
    (dict(exclude_modules=["q"]), "disagree about 8"), (dict(layers_to_transform=0), "disagree about 10"), (dict(target_modules=["q"]), "disagree about 8"),
    (dict(init_lora_weights=1), "init_lora_weights = 1"), (dict(init_lora_weights="next_year"), "init_lora_weights = 'next_year'"), (dict(bias="lora_only"), "bias"),
    (dict(target_modules=["x" * 5000]), "matches no linear"),
])  # fmt: skip
def test_values_that_are_not_implemented_are_refused(folder, changes, words):
    set_config(folder, **changes)
    mt5 = model()
    bits = digest(held_tensors(mt5))
    with pytest.raises(WeightsError, match=words) as error:
        load_adapter(mt5, folder)
    assert digest(held_tensors(mt5)) == bits and not lora_layers(mt5) and "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva", "mica", True, False], ids=str)
def test_beginnings_that_leave_the_base_alone(tmp_path, init):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q", "wo"], init_lora_weights=init)
    filled(peft.get_peft_model(hf_model(tmp_path / "base"), config)).save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(hf_model(tmp_path / "base"), tmp_path / "adapter").eval()
    mt5 = model()
    load_adapter(mt5, tmp_path / "adapter")
    torch.testing.assert_close(run(mt5), run_hf(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_beginnings_that_alter_the_base_are_refused_with_the_way_out(tmp_path, init):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q", "v"], init_lora_weights=init)
    wrapped = peft.get_peft_model(hf_model(tmp_path / "base"), config)
    wrapped.peft_config["default"].init_lora_weights = True  # peft wants the beginning saved as one that leaves the base alone
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = init
    filled(wrapped)
    want = run_hf(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(WeightsError, match=f"init_lora_weights = '{init}'.*path_initial_model_for_weight_conversion"):
        load_adapter(model(), tmp_path / "adapter")
    set_config(tmp_path / "adapter", init_lora_weights=True)  # what we would compute without the word: another function
    wrong = model()
    load_adapter(wrong, tmp_path / "adapter")
    assert (run(wrong) - want).abs().max() > 0.05
    wrapped.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    mt5 = model()
    load_adapter(mt5, tmp_path / "converted")
    torch.testing.assert_close(run(mt5), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("init", ["loftq", "corda", "lora_ga", "PiSSA"])
def test_other_beginnings_are_refused(folder, init):
    set_config(folder, init_lora_weights=init)
    with pytest.raises(WeightsError, match=f"init_lora_weights = '{init}'"):
        load_adapter(model(), folder)


# ------------------------------------------------------------------------------------------ which layers it is for

CHOICES = [
    dict(target_modules=["SelfAttention.q"]), dict(target_modules=SOME), dict(target_modules=[*SOME, "k"]), dict(target_modules=r".*decoder.*\.(q|v|wi_1)"), dict(target_modules=r".*\.block\.1\..*wo"),
    dict(target_modules=["q", "v"], layers_to_transform=[0, 2]), dict(target_modules=["o"], layers_to_transform=1), dict(target_modules=["q"], layers_to_transform=[0], layers_pattern="layer"),
    dict(target_modules=["q"], layers_to_transform=[1], layers_pattern=["decoder.block", "layer"]), dict(target_modules=["q", SOME[0]], layers_to_transform=[0]),
    dict(target_modules=["q", "v", "wo"], exclude_modules=["EncDecAttention.q", "wo"]), dict(target_modules=["q", "o"], exclude_modules=r".*encoder.*"),
    dict(target_modules=["q", "v", "wo"], rank_pattern={"wo": 2, "SelfAttention.q": 5}, alpha_pattern={"v": 9, r"^decoder.*q": 1.5}),
    dict(target_modules=["q", "v"], rank_pattern={SOME[0]: 6}, alpha_pattern={SOME[1]: 2}, use_rslora=True), dict(target_modules="all-linear"),
]  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_an_adapter_on_some_layers_goes_both_ways(tmp_path, choice):
    """From peft to us, to peft and to us again: the same layers and the same outputs. (peft writes "all-linear" as a list.)"""
    wrapped = filled(peft.get_peft_model(hf_model(tmp_path / "base"), peft.LoraConfig(r=4, lora_alpha=6, **choice)))
    wrapped.save_pretrained(tmp_path / "theirs")
    mt5 = model()
    load_adapter(mt5, tmp_path / "theirs")
    assert len(lora_layers(mt5)) == sum("lora_A" in name for name, _ in wrapped.named_parameters()) > 0
    torch.testing.assert_close(run(mt5), run_hf(wrapped), atol=1e-5, rtol=1e-5)
    save_adapter(mt5, tmp_path / "ours")
    again = model()
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(run(again), run(mt5))
    theirs = peft.PeftModel.from_pretrained(hf_model(tmp_path / "base"), tmp_path / "ours").eval()
    torch.testing.assert_close(run_hf(theirs), run(mt5), atol=1e-5, rtol=1e-5)


def test_all_layers_of_a_name_are_written_as_the_name(tmp_path):
    save_adapter(trained_lora(model(), "qv"), tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["target_modules"] == ["q", "v"] and said["rank_pattern"] == said["alpha_pattern"] == {}


@pytest.mark.parametrize("choice", [
    dict(target_modules=[LM + name for name in SOME]), dict(target_modules=SOME), dict(target_modules=["q", "wo"]), dict(target_modules=rf"{LM}encoder\..*\.(q|wi_0)"),
    dict(target_modules=["q", "v"], layers_to_transform=[1]), dict(target_modules=["q"], rank_pattern={LM + SOME[0]: 2}, alpha_pattern={SOME[0]: 1}),
    dict(target_modules=["q", "v"], exclude_modules=rf"{LM}decoder.*"),
], ids=str)  # fmt: skip
def test_an_adapter_of_a_whole_blip2_goes_both_ways(tmp_path, batch, choice):
    ours = tiny_mblip()
    prompt, mask, labels = batch["prompt"], batch["prompt_mask"], batch["labels"]

    def theirs_of(wrapped):
        ids, full = transformers_inputs(ours, prompt, mask)
        return wrapped(pixel_values=batch["image"][:, 0], input_ids=ids, attention_mask=full, labels=labels).logits

    wrapped = filled(peft.get_peft_model(in_transformers(ours, tmp_path / "base"), peft.LoraConfig(r=4, lora_alpha=6, **choice)))
    wrapped.save_pretrained(tmp_path / "theirs")
    assert all(key.startswith("base_model.model.language_model.") for key in load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    load_adapter(ours.mt5, tmp_path / "theirs")
    ours.eval()
    with torch.no_grad():
        want, got = theirs_of(wrapped), ours(**batch)[0]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        assert (got - tiny_mblip()(**batch)[0]).abs().max() > 1e-3
        save_adapter(ours.mt5, tmp_path / "ours", prefix=LM)
        again = peft.PeftModel.from_pretrained(in_transformers(tiny_mblip(), tmp_path / "base"), tmp_path / "ours").eval()
        torch.testing.assert_close(theirs_of(again), got, atol=1e-5, rtol=1e-4)
    other = tiny_mblip()
    load_adapter(other.mt5, tmp_path / "ours")
    assert lora_layers(other.mt5).keys() == lora_layers(ours.mt5).keys()


def test_an_adapter_on_the_vision_tower_too_is_refused(tmp_path):
    wrapped = peft.get_peft_model(in_transformers(tiny_mblip(), tmp_path / "base"), peft.LoraConfig(r=2, target_modules=["q", "qkv", "query"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(WeightsError, match="unknown key|matches no linear layer"):
        load_adapter(tiny_mblip().mt5, tmp_path / "adapter")


def test_layers_that_differ_in_what_a_config_cannot_say_are_not_written(tmp_path):
    mt5 = trained_lora(model())
    next(iter(lora_layers(mt5).values())).dropout = 0.5
    with pytest.raises(ValueError, match="differ in dropout or rslora"):
        save_adapter(mt5, tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ which base it is for

HELD = [dict(), dict(llm_dtype="int8"), dict(llm_dtype="bf16"), dict(dtype=torch.float16), dict(dtype=torch.bfloat16)]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_an_adapter_goes_with_its_base_however_that_is_held(tmp_path, stored):
    save_mt5(model(), tmp_path / "base", dtype=stored)
    save_mt5(model(seed=5), tmp_path / "other", dtype=stored)
    for i, held in enumerate(HELD):
        save_adapter(trained_lora(load_mt5(tmp_path / "base", **held)), tmp_path / f"adapter{i}")
        for other in HELD:
            load_adapter(load_mt5(tmp_path / "base", **other), tmp_path / f"adapter{i}")
        with pytest.raises(WeightsError, match="another language model"):
            load_adapter(load_mt5(tmp_path / "other", **held), tmp_path / f"adapter{i}")


@pytest.mark.parametrize("held", HELD[1:], ids=str)
def test_old_adapters_carry_the_fingerprint_of_what_was_held(tmp_path, held):
    save_mt5(model(), tmp_path / "base")
    mt5 = load_mt5(tmp_path / "base", **held)
    old = digest(held_tensors(mt5))
    save_adapter(trained_lora(mt5), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "base_sha256": old})
    load_adapter(load_mt5(tmp_path / "base", **held), tmp_path / "adapter")
    with pytest.raises(WeightsError, match="another language model"):
        load_adapter(load_mt5(tmp_path / "base"), tmp_path / "adapter")


@pytest.mark.parametrize("held", HELD[1:3], ids=str)
def test_a_base_that_was_changed_after_it_was_loaded_is_another(tmp_path, held):
    """Quantised or rounded from other numbers than the files hold, or altered by hand: the files do not speak for it."""
    save_mt5(model(), tmp_path / "base")
    floats = base_digest(load_mt5(tmp_path / "base"))
    mt5 = load_mt5(tmp_path / "base", **held)
    assert base_digest(mt5) == floats
    weight = mt5.encoder.blocks[0].attn.q.weight
    weight.data[0] = -weight.data[0]
    assert base_digest(mt5) == digest(held_tensors(mt5)) != floats
    weight.data[0] = -weight.data[0]
    assert base_digest(mt5) == floats
    moved = load_mt5(tmp_path / "base")
    moved.lm_head.weight.data += 0.5
    quantize_linears(moved)
    assert base_digest(moved) == digest(held_tensors(moved))
    same = load_mt5(tmp_path / "base")
    quantize_linears(same)
    assert base_digest(same) == floats


def test_the_language_model_of_a_whole_model_and_of_bases(tmp_path):
    whole = tiny_mblip()
    save_mblip(whole, tmp_path / "whole", image_token=66)
    want = digest(held_tensors(whole.mt5))
    for held in HELD[:3]:
        assert base_digest(load_mblip(tmp_path / "whole", **held).mt5) == want
    save_mt5(tiny_mblip(seed=2).mt5, tmp_path / "mt0")
    aligned = tiny_mblip()
    aligned.exchange_language_model(tiny_mblip(seed=2).mt5)
    names = ["proj.weight", "proj.bias", "mt5.lm_head.weight"]
    for name in names:
        aligned.get_parameter(name).data = aligned.get_parameter(name).data.half().float()
    save_trained(aligned, tmp_path / "aligned", names, "../whole", "../mt0", image_token=66)
    want = digest(held_tensors(aligned.mt5))
    assert base_digest(load_mblip(tmp_path / "aligned").mt5) == want == base_digest(load_mblip(tmp_path / "aligned", dtype=torch.bfloat16).mt5)
    save_adapter(trained_lora(load_mblip(tmp_path / "aligned").mt5), tmp_path / "adapter")
    load_adapter(load_mblip(tmp_path / "aligned", dtype=torch.bfloat16).mt5, tmp_path / "adapter")


def test_trained_parts_with_an_adapter_come_back_merged(tmp_path):
    save_mblip(tiny_mblip(), tmp_path / "whole", image_token=66)
    save_mt5(tiny_mblip(seed=2).mt5, tmp_path / "mt0")
    aligned = tiny_mblip()
    aligned.exchange_language_model(load_mt5(tmp_path / "mt0"))
    trained_lora(aligned.mt5)
    names = ["proj.weight", "proj.bias"]
    for name in names:
        aligned.get_parameter(name).data = aligned.get_parameter(name).data.half().float()
    folder = tmp_path / "aligned"
    save_trained(aligned, folder, names, "../whole", "../mt0", image_token=66, adapter="adapter")
    merge_lora(aligned.mt5)
    want, got = held_tensors(aligned), held_tensors(load_mblip(folder))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert not lora_layers(load_mblip(folder).mt5) and base_digest(load_mblip(folder).mt5) == digest(held_tensors(aligned.mt5))
    for held in (dict(llm_dtype="int8"), dict(llm_dtype="bf16")):  # the same as a file of the merged weights
        save_merged(aligned, tmp_path / "merged", image_token=66, source=(tmp_path / "whole", tmp_path / "mt0"))
        want, got = (held_tensors(load_mblip(path, **held)) for path in (tmp_path / "merged", folder))
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    path = folder / "adapter" / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, path, meta)
    with pytest.raises(WeightsError, match="sha256"):
        load_mblip(folder)
    shutil.rmtree(folder / "adapter")
    with pytest.raises(WeightsError, match="adapter"):
        load_mblip(folder)


def test_an_int8_file_speaks_for_itself(tmp_path):
    save_mt5(model(), tmp_path / "base")
    held = tiny_mblip()
    quantize_linears(held.mt5)
    save_mblip(held, tmp_path / "int8", image_token=66, dtype=None)
    mt5 = load_mblip(tmp_path / "int8").mt5
    assert base_digest(mt5) == digest(held_tensors(mt5))
    save_adapter(trained_lora(mt5), tmp_path / "adapter")
    load_adapter(load_mblip(tmp_path / "int8").mt5, tmp_path / "adapter")


def test_the_files_are_read_once(tmp_path, monkeypatch):
    save_mt5(model(), tmp_path / "base")
    mt5 = trained_lora(load_mt5(tmp_path / "base", llm_dtype="int8"))
    save_adapter(mt5, tmp_path / "adapter")
    (tmp_path / "base" / "model.safetensors").unlink()
    save_adapter(mt5, tmp_path / "again")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert all(torch.equal(one[key], two[key]) for key in one)
