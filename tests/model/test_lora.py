"""lora.py: identity at the start, the paper's parameter counts, merging, and PEFT's files in both directions."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from conftest import TINY, randomise
from safetensors.torch import load_file, save_file

from nanomblip.model.lora import LoRALinear, add_lora, lora_layers, merge_lora, unmerge_lora
from nanomblip.model.mt5 import MT5, MT5Config
from nanomblip.weights.adapter import load_adapter, save_adapter
from nanomblip.weights.files import digest
from nanomblip.weights.layout import WeightsError
from nanomblip.weights.save import save_mt5

CFG = replace(TINY.mt5, dropout=0.0)


def model(seed=0):
    return randomise(MT5(CFG), seed).eval()


def with_lora(targets="all", seed=3, **more):
    mt5 = model()
    add_lora(mt5, targets, **(dict(r=4, alpha=6.0) | more))
    for i, layer in enumerate(lora_layers(mt5).values()):
        nn.init.normal_(layer.A, std=0.3, generator=torch.Generator().manual_seed(seed + i))
        nn.init.normal_(layer.B, std=0.3, generator=torch.Generator().manual_seed(seed - i - 1000))
    return mt5


def run(mt5):
    ids = torch.tensor([[5, 9, 13, 2, 1], [7, 3, 1, 0, 0]])
    labels = torch.tensor([[4, 6, 1], [8, 1, -100]])
    mask = ids != 0
    return mt5.decode(mt5.shift_right(labels), mt5.encode(mt5.embed(ids), mask), mask)


def test_the_paper_trains_17_694_720_parameters_of_the_language_model():
    for targets, count in (("all", 17_694_720), ("qv", 4_718_592)):
        with torch.device("meta"):
            mt5 = MT5(MT5Config())
        assert add_lora(mt5, targets, r=8) == count
        assert all(p.requires_grad == (name.rpartition(".")[2] in "AB") for name, p in mt5.named_parameters())


def test_nothing_changes_at_the_start_and_only_lora_learns():
    before = run(model())
    mt5 = model()
    add_lora(mt5, "all", r=4)
    after = run(mt5)
    assert torch.allclose(before, after, atol=1e-5)
    after.square().mean().backward()
    for name, p in mt5.named_parameters():
        assert (p.grad is not None) == name.endswith((".A", ".B")), name
    layer = mt5.decoder.blocks[0].mlp.wo
    assert layer.B.grad.abs().max() > 0 and layer.A.grad.abs().max() == 0  # B is zero, so A has no say yet
    assert layer.A.abs().max() <= layer.A.shape[1] ** -0.5 and layer.A.std() > 0


def test_the_equation():
    torch.manual_seed(0)
    x, base = torch.randn(2, 3, 10), nn.Linear(10, 7)
    for rslora, scale in ((False, 6 / 4), (True, 6 / 2)):
        layer = LoRALinear(base, 4, 6.0, rslora=rslora)
        nn.init.normal_(layer.B)
        assert torch.allclose(layer(x), x @ base.weight.T + base.bias + scale * x @ layer.A.T @ layer.B.T, atol=1e-5)
    layer = LoRALinear(base, 4, 6.0, dropout=0.5).train()
    nn.init.normal_(layer.B)
    assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))
    low = LoRALinear(nn.Linear(10, 7).bfloat16(), 4, 6.0)
    assert low(x.bfloat16()).dtype == torch.bfloat16 and low.A.dtype == torch.float32


def test_merged_computes_the_same_and_unmerging_restores_the_bits():
    mt5 = with_lora()
    bits, before = digest(dict(mt5.named_parameters())), run(mt5)
    merge_lora(mt5)
    assert torch.allclose(run(mt5), before, atol=1e-4) and digest(dict(mt5.named_parameters())) != bits
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(mt5)
    with pytest.raises(ValueError, match="merged"):
        save_adapter(mt5, "unused")
    unmerge_lora(mt5)
    assert digest(dict(mt5.named_parameters())) == bits
    with pytest.raises(ValueError, match="no merged LoRA"):
        unmerge_lora(mt5)


def test_lora_is_added_in_the_mode_the_model_is_in():
    mt5 = with_lora(dropout=0.5)
    assert torch.equal(run(mt5), run(mt5)) and not torch.equal(run(mt5.train()), run(mt5))


def test_a_merge_that_overflows_changes_nothing():
    mt5 = with_lora()
    mt5.decoder.blocks[-1].mlp.wo.B.data[0, 0] = float("inf")
    bits = digest(dict(mt5.named_parameters()))
    with pytest.raises(ValueError, match="wo.*not finite"):
        merge_lora(mt5)
    assert digest(dict(mt5.named_parameters())) == bits and all(layer.unmerged is None for layer in lora_layers(mt5).values())


@pytest.mark.parametrize("flags,message", [(dict(targets=("q", "query")), "'query' matches no"), (dict(targets="some"), "targets 'some'"),
                                           (dict(targets=()), "targets"), (dict(r=0), "rank 0"), (dict(r=-1), "rank -1"),
                                           (dict(alpha=float("nan")), "alpha nan"), (dict(dropout=1.0), "dropout 1.0")])  # fmt: skip
def test_bad_settings_are_refused_and_change_nothing(flags, message):
    mt5 = model()
    with pytest.raises(ValueError, match=message):
        add_lora(mt5, **(dict(targets="all") | flags))
    assert not lora_layers(mt5) and all(p.requires_grad for p in mt5.parameters())


def test_lora_twice_is_refused(tmp_path):
    mt5 = with_lora()
    save_adapter(mt5, tmp_path)
    with pytest.raises(ValueError, match="LoRA already"):
        add_lora(mt5, "qv")
    with pytest.raises(WeightsError, match="LoRA already"):
        load_adapter(mt5, tmp_path)
    with pytest.raises(ValueError, match="no LoRA to save"):
        save_adapter(model(), tmp_path)
    with pytest.raises(ValueError, match="no LoRA to merge"):
        merge_lora(model())


# --------------------------------------------------------------------------------------------------------------- PEFT


def in_peft(folder):
    """The same language model in transformers."""
    from transformers import MT5ForConditionalGeneration

    save_mt5(model(), folder)
    return MT5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def run_hf(hf):
    ids = torch.tensor([[5, 9, 13, 2, 1], [7, 3, 1, 0, 0]])
    return hf(input_ids=ids, attention_mask=(ids != 0).long(), labels=torch.tensor([[4, 6, 1], [8, 1, -100]])).logits


@pytest.mark.parametrize("targets,rslora", [("all", False), ("qv", True)])
def test_peft_opens_our_adapter(tmp_path, targets, rslora):
    peft = pytest.importorskip("peft")
    mt5 = with_lora(targets, rslora=rslora, dropout=0.1)
    save_adapter(mt5, tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(in_peft(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.allclose(run_hf(wrapped), run(mt5), atol=1e-5)
    assert (run(mt5) - run(model())).abs().max() > 0.05
    again = model()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(run(again), run(mt5))


@pytest.mark.parametrize("more", [dict(target_modules=["q", "v"]), dict(target_modules=["SelfAttention.k", "wo"], use_rslora=True)], ids=str)
def test_we_open_an_adapter_of_peft_with_the_same_outputs_and_gradients(tmp_path, more):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    hf = peft.get_peft_model(in_peft(tmp_path / "base"), peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **more))
    hf.save_pretrained(tmp_path / "adapter")
    mt5 = model()
    load_adapter(mt5, tmp_path / "adapter")
    ours, theirs = run(mt5), run_hf(hf)
    assert torch.allclose(ours, theirs, atol=1e-5)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    grads = {name: p.grad for name, p in hf.named_parameters() if p.requires_grad}
    layers = lora_layers(mt5)
    assert len(grads) == 2 * len(layers) and sum(g.abs().max() > 0 for g in grads.values()) == len(grads)
    for path, name in (("encoder.blocks.0.attn", "encoder.block.0.layer.0.SelfAttention"), ("decoder.blocks.1.attn", "decoder.block.1.layer.0.SelfAttention")):
        leaf = "q" if "q" in more["target_modules"] else "k"
        for side in "AB":
            theirs = next(g for n, g in grads.items() if f"{name}.{leaf}.lora_{side}." in n)
            assert torch.allclose(getattr(layers[f"{path}.{leaf}"], side).grad, theirs, atol=1e-6)


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))

    return change


def change_tensors(edit):
    def change(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return change


@pytest.mark.parametrize("change,message", [
    (change_config(target_modules=["q", ".k", "v", ".o", "wi_0", "wi_1"]), "disagree about 5"),
    (change_config(target_modules=["q", "dance"]), "'dance' matches no"), (change_config(target_modules="all-linear"), "all-linear"),
    (change_config(use_dora=True), "use_dora"), (change_config(bias="all"), "bias"), (change_config(rank_pattern={"q": 2}), "shape"),
    (change_config(peft_type="IA3"), "IA3"), (change_config(r=0), "rank 0"), (change_config(r=5), "shape"), (change_config(r="x"), "rank x"),
    (change_tensors(lambda t: t.pop(sorted(t)[0])), "disagree about 1"), (change_tensors(lambda t: t.update(x=torch.zeros(1))), "unknown key 'x'"),
    (change_tensors(lambda t: t[sorted(t)[3]].fill_(float("nan"))), "not finite"),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12"), "adapter_model"),
    (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), "pickle"),
])  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, change, message):
    save_adapter(with_lora(), tmp_path)
    change(tmp_path)
    mt5 = model()
    bits = digest(dict(mt5.named_parameters()))
    with pytest.raises(WeightsError, match=message):
        load_adapter(mt5, tmp_path)
    assert digest(dict(mt5.named_parameters())) == bits and not lora_layers(mt5)


def test_mblips_own_targets_are_read_whole(tmp_path):
    mt5 = with_lora()
    save_adapter(mt5, tmp_path, prefix="language_model.")
    change_config(target_modules=["q", ".k", "v", ".o", "wi_0", "wi_1", "wo"])(tmp_path)
    again = model()
    load_adapter(again, tmp_path)
    assert torch.equal(run(again), run(mt5))


def test_an_adapter_for_another_base_is_refused(tmp_path):
    save_adapter(with_lora(), tmp_path)
    with pytest.raises(WeightsError, match="another language model"):
        load_adapter(model(seed=8), tmp_path)
