"""int8.py against bitsandbytes, against the unrounded product, and with LoRA around it."""

import copy
import ctypes
import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from test_lora import model, run, run_hf

from nanomblip.model import int8_kernels as kernels
from nanomblip.model.int8 import Int8Linear, int8_product, quantize_linears, quantize_rows
from nanomblip.model.int8_kernels import int8_path
from nanomblip.model.lora import add_lora, lora_layers, merge_lora, unmerge_lora
from nanomblip.weights.adapter import load_adapter, save_adapter
from nanomblip.weights.files import digest
from nanomblip.weights.layout import WeightsError
from nanomblip.weights.save import save_mt5


def tensors(rows=5, width=64, out=48, outliers=(), seed=0):
    """x (rows, width) with columns that hold large numbers, as transformers have them, and a linear layer."""
    torch.manual_seed(seed)
    x, linear = torch.randn(rows, width), nn.Linear(width, out)
    x[:, list(outliers)] *= 20
    return x, linear


def error(y, exact):
    return ((y - exact).norm() / exact.norm()).item()


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes")


def test_codes_and_scales_are_those_of_bitsandbytes_to_the_bit(bnb):
    _, linear = tensors(width=300, out=200)
    theirs = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    theirs = theirs if theirs.CB is not None else theirs._quantize("cpu")
    ours = Int8Linear(linear)
    assert torch.equal(ours.weight, theirs.CB) and torch.equal(ours.SCB, theirs.SCB) and theirs.SCB.dtype == torch.float32


@pytest.mark.parametrize("rows,outliers", [(1, ()), (7, ()), (7, (3, 40)), (33, (0,)), (4, range(64))])
def test_the_error_is_no_worse_than_that_of_bitsandbytes(bnb, rows, outliers):
    for threshold, train in ((6.0, False), (0.0, True)):  # on a CPU its eval() rounds the input, its train() the weight alone
        ours, theirs = [], []
        for seed in range(8):
            x, linear = tensors(rows, outliers=outliers, seed=seed)
            exact = linear(x).detach()
            layer = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False, threshold=6.0)
            layer.load_state_dict(linear.state_dict())
            with torch.no_grad():
                theirs.append(error(layer.to("cpu").train(train)(x.half()).float(), exact))
                ours.append(error(Int8Linear(linear, threshold)(x), exact))
        assert sum(ours) <= sum(theirs) * 1.01 and max(ours) < 0.01


def test_a_layer_from_ready_codes_and_scales():
    x, linear = tensors()
    made = Int8Linear(linear)
    layer = Int8Linear.from_tensors(made.weight, made.SCB, made.bias)
    assert torch.equal(layer(x), made(x)) and layer.weight is made.weight and layer.threshold == 6.0
    assert str(layer) == str(made) and list(layer.state_dict()) == list(made.state_dict()) == ["weight", "SCB", "bias"]
    for bad, message in (((made.weight.float(), made.SCB), "weight is int8"), ((made.weight[0], made.SCB), "weight is int8"),
                         ((made.weight, made.SCB.half()), "SCB is float32"), ((made.weight, made.SCB[:5]), "SCB is float32"),
                         ((made.weight, -made.SCB), "negative"), ((made.weight, made.SCB * float("nan")), "not finite"),
                         ((made.weight, made.SCB, made.bias[:5]), "bias is float"), ((made.weight, made.SCB, None, -1.0), "threshold")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Int8Linear.from_tensors(*bad)


# ------------------------------------------------------------------------------------------- every path is the reference

PROCESSORS = {"AMX": (True, True), "VNNI": (True, False), "neither": (False, False)}  # what is asked: has_int_mm, has_amx
OUTLIERS = {"none": (), "few": (3, 40), "many": range(100), "most": range(1200)}


@pytest.mark.parametrize("outliers", OUTLIERS)
@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("rows", [1, 5, 64, 100])
def test_every_path_is_the_reference(monkeypatch, rows, threshold, outliers):
    x, linear = tensors(rows, width=2100, out=1100, outliers=OUTLIERS[outliers])
    with int8_path("reference"):
        exact = Int8Linear(linear, threshold)(x)
    close = lambda y: torch.equal(y, exact) if threshold and outliers == "none" else (y - exact).abs().max() < 2e-6 * exact.abs().max()
    for kind, (int_mm, amx) in PROCESSORS.items():
        if kernels.has_int_mm() or not int_mm:
            with monkeypatch.context() as force:
                force.setattr(kernels, "has_int_mm", lambda: int_mm)
                force.setattr(kernels, "has_amx", lambda: amx)
                layer = Int8Linear(linear, threshold)
                assert close(layer(x)) and close(layer(x)), kind  # the second time with the columns that it kept
                for halves in range(1, 3) if kernels.fbgemm_halves() == 1 else ():
                    force.setattr(kernels, "fbgemm_halves", lambda: halves)
                    packed = Int8Linear(linear, threshold)
                    packed.pack()
                    assert (packed.packed is None) == (kind == "AMX") and close(packed(x)), (kind, halves)
                    force.setattr(kernels, "fbgemm_halves", lambda: 1)


def worst(K):
    """Codes whose sums overflow 16 bits soonest."""
    q = torch.full((3, K), 127, dtype=torch.int8)
    q[1] = -127
    q[2, ::2] = -127
    return q, torch.full((40, K), 127, dtype=torch.int8)


@pytest.mark.parametrize("isa", [1, 2])  # AVX2, and AVX-512 without VNNI
def test_without_vnni_fbgemm_counts_in_halves(isa):
    try:
        force = ctypes.CDLL(f"{torch.__path__[0]}/lib/libtorch_cpu.so")._ZN6fbgemm14fbgemmForceIsaENS_10inst_set_tE
    except (OSError, AttributeError):
        pytest.skip("this torch has no FBGEMM, or does not let its instruction set be chosen")
    if isa == 2 and not torch.cpu._is_avx512_supported():
        pytest.skip("no AVX-512 here")
    force(isa)
    kernels.fbgemm_halves.cache_clear()
    try:
        assert kernels.fbgemm_halves() == 2
        q, weight = worst(512)
        assert torch.equal(kernels._fbgemm_product(q, kernels.pack(weight), 2), (q.int() @ weight.int().T).float())
        assert not torch.equal(kernels._fbgemm_product(q, kernels.pack(weight), 1), (q.int() @ weight.int().T).float())
    finally:
        force(0)
        kernels.fbgemm_halves.cache_clear()


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"])
def test_a_processor_that_cannot_count_in_int8_is_found_out(isa):
    """oneDNN is told to use older instructions, of which those without VNNI add products in 16 bits, which overflow."""
    code = """if True:
        import torch
        from nanomblip.model import int8_kernels as kernels
        kernels.has_amx = lambda: False
        for K in (2, 512, 5120):
            q, weight = torch.full((3, K), 127, dtype=torch.int8), torch.full((1030, K), 127, dtype=torch.int8)
            q[1], q[2, ::2] = -127, -127
            assert torch.equal(kernels.code_product(q, weight), (q.int() @ weight.int().T).float())
        print(kernels.has_int_mm())
    """
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa}, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(isa == "AVX512_CORE_VNNI" and kernels.has_int_mm())


def test_worst_cases_are_counted_correctly():
    for K in (1, 2, 1023, 1024, 1025, 5120):
        q, weight = worst(K)
        exact = (q.int() @ weight.int().T).float()
        assert torch.equal(kernels.code_product(q, weight), exact) and torch.equal(kernels._float_product(q, weight).float(), exact)
        if kernels.fbgemm_halves() == 1 and K > 1:
            assert torch.equal(kernels._fbgemm_product(q, kernels.pack(weight), 1), exact)


def test_the_product_of_bitsandbytes_is_called_as_it_wants_to_be(bnb):
    q, weight = worst(64)  # on CUDA; its own CPU version takes the same arguments
    assert torch.equal(kernels._bitsandbytes_product(q, weight), (q.int() @ weight.int().T).to(torch.int32))


def test_where_an_operator_is_missing_the_result_is_the_same(monkeypatch):
    x, linear = tensors(outliers=(3,))
    exact = Int8Linear(linear)(x)
    monkeypatch.delattr(torch, "_int_mm")
    monkeypatch.delattr(torch, "_make_per_tensor_quantized_tensor")
    for name in ("get_capabilities", "_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    asks = kernels.has_int_mm, kernels.has_amx, kernels.fbgemm_halves, kernels.has_bf16
    for ask in asks:
        ask.cache_clear()
    try:
        layer = Int8Linear(linear)
        for _ in range(kernels.PACK_AFTER // 5 + 5):
            assert torch.allclose(layer(x), exact, atol=1e-6)
        assert not any(ask() for ask in asks) and layer.packed is None
    finally:
        for ask in asks:
            ask.cache_clear()


@pytest.mark.skipif(not kernels.fbgemm_halves(), reason="no FBGEMM here")
def test_a_layer_packs_its_codes_when_it_writes_and_gives_them_back_when_asked(monkeypatch):
    monkeypatch.setattr(kernels, "has_amx", lambda: False)
    x, linear = tensors()
    layer, codes = Int8Linear(linear), Int8Linear(linear).weight
    before = layer(x)
    for _ in range(kernels.PACK_AFTER // 5):
        assert layer.packed is None and torch.equal(layer(x), before)
    assert layer.packed is not None and layer._buffers["weight"] is None  # a byte a number still
    assert torch.equal(layer(x), before) and torch.equal(layer(x.repeat(30, 1))[:5], before)
    with int8_path("reference"):
        assert torch.equal(layer(x), before)
    assert layer.packed is None and torch.equal(layer.weight, codes)
    for use in (lambda: layer.state_dict()["weight"], lambda: copy.deepcopy(layer).weight, lambda: layer.float().weight, lambda: layer.weight):
        layer.pack()
        assert layer.packed is not None and torch.equal(use(), codes)
    x.requires_grad_()
    for _ in range(kernels.PACK_AFTER // 4):  # who learns asks for the weight at each step, so it is not packed
        layer(x).sum().backward()
    assert layer.packed is None
    layer.pack()
    y = layer(x)
    assert layer.packed is not None and torch.equal(y, before)
    y.sum().backward()
    assert layer.packed is None


@pytest.mark.parametrize("able", [{"architecture": "aarch64", "neon": True}, {"avx2": True, "avx512_f": True}, {}])
def test_the_int8_product_of_torch_is_left_alone_where_it_is_slow(monkeypatch, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert kernels.has_int_mm.__wrapped__() is False


def test_a_layer_keeps_the_columns_of_outliers_and_forgets_them_with_its_codes():
    x, linear = tensors(outliers=(3, 40))
    layer = Int8Linear(linear)
    exact = int8_product(x, layer.weight, layer.SCB, 6.0)
    assert torch.allclose(layer(x), exact + linear.bias, atol=1e-5) and set(layer.columns) == {3, 40}
    assert torch.equal(layer.columns[40], layer.weight[:, 40])
    layer.replace(-layer.weight, layer.SCB)
    assert not layer.columns and torch.allclose(layer(x), linear.bias - exact, atol=1e-5)
    wide = Int8Linear(nn.Linear(600, 8))
    for first in range(0, 600, 50):  # ever new ones
        y = torch.ones(2, 600)
        y[:, first : first + 50] = 9.0
        assert torch.allclose(wide(y) - wide.bias, int8_product(y, wide.weight, wide.SCB, 6.0), atol=1e-4)
        assert len(wide.columns) <= kernels.MOST_COLUMNS


def test_a_path_has_a_name():
    with pytest.raises(ValueError, match="'quick'"), int8_path("quick"):
        pass


# ------------------------------------------------------------------------------------------------------------ properties


def test_half_a_step_a_row_at_most():
    _, linear = tensors()
    layer = Int8Linear(linear)
    assert ((layer.dequantized() - linear.weight).abs() <= layer.SCB[:, None] * (0.5 / 127 + 2**-11)).all()
    assert layer.weight.abs().amax(1).eq(127).all()


def test_outlier_columns_are_kept_in_floating_point():
    x, linear = tensors(outliers=(3, 40))
    exact = linear(x)
    with_them, without = (error(Int8Linear(linear, threshold)(x), exact) for threshold in (6.0, 1e6))
    assert with_them < without / 3
    assert error(Int8Linear(linear, 0.0)(x), exact) < with_them  # x unrounded


def test_the_sum_is_exact():
    weight = torch.full((2, 5120), 127, dtype=torch.int8)
    x = torch.ones(1, 5120)
    x[0, 2560:] = -1
    x[0, -1] = 1 / 127  # 2560 times 127^2, 2559 times -127^2, once 127: on the way past 2^24, where fp32 has no odd numbers
    assert torch.equal(int8_product(x, weight, torch.full((2,), 127.0), 6.0), torch.full((1, 2), 128.0))


def test_shapes_types_and_bias():
    x, linear = tensors(rows=6)
    for threshold in (6.0, 0.0):
        layer = Int8Linear(linear, threshold)
        assert layer(x.view(2, 3, 64)).shape == (2, 3, 48) and layer(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(layer(x.view(2, 3, 64)).view(6, 48), layer(x))
        plain = nn.Linear(64, 48, bias=False)
        plain.weight = linear.weight
        assert torch.allclose(layer(x) - linear.bias, Int8Linear(plain, threshold)(x), atol=1e-5)


def test_gradients_reach_the_input_through_the_frozen_weight():
    x, linear = tensors(outliers=(5,))
    for threshold in (6.0, 0.0):
        layer = Int8Linear(linear, threshold)
        x.grad = None
        x.requires_grad_()
        (layer(x) * torch.arange(48.0)).sum().backward()
        assert torch.allclose(x.grad, (torch.arange(48.0) @ layer.dequantized()).expand_as(x), rtol=1e-4, atol=1e-3)
        assert not list(layer.parameters())
    many, weight = torch.randn(100, 1500), torch.randint(-127, 128, (1500, 64), dtype=torch.int8)  # many rows may go in bf16
    fast = kernels.input_gradient(many, weight, torch.ones(1500))
    with int8_path("reference"):
        exact = kernels.input_gradient(many, weight, torch.ones(1500))
    assert error(fast, exact) < (3e-3 if kernels.has_bf16() else 1e-6)


def test_zero_rows_and_an_empty_batch():
    _, linear = tensors()
    with torch.no_grad():
        linear.weight[3] = 0
    layer = Int8Linear(linear)
    x = torch.randn(2, 64)
    x[1] = 0
    y = layer(x)
    assert y.isfinite().all() and torch.equal(y[1], linear.bias) and y[0, 3] == linear.bias[3]
    layer.pack()
    assert torch.equal(layer(x), y)
    for layer in (layer, Int8Linear(linear), Int8Linear(linear, 0.0)):
        assert layer(torch.zeros(0, 64)).shape == (0, 48) and layer(torch.zeros(2, 0, 64)).shape == (2, 0, 48)
        empty = torch.zeros(0, 64, requires_grad=True)
        layer(empty).sum().backward()
        assert empty.grad.shape == (0, 64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_weights_that_are_not_finite_are_refused_and_nothing_is_changed(bad):
    mt5 = model()
    mt5.decoder.blocks[-1].mlp.wo.weight.data[2, 3] = bad  # 1e6: not finite in fp16
    bits = digest(dict(mt5.named_parameters()))
    with pytest.raises(ValueError, match="wo.*1 of 28 rows"):
        quantize_linears(mt5)
    assert digest(dict(mt5.named_parameters())) == bits and not any(isinstance(m, Int8Linear) for m in mt5.modules())


def test_other_bad_input():
    x, linear = tensors()
    for bad in (float("nan"), float("inf")):
        x[1, 1] = bad
        with pytest.raises(ValueError, match="not finite"):
            quantize_rows(x)
        for threshold in (6.0, 0.0):
            layer = Int8Linear(linear, threshold)
            with pytest.raises(ValueError, match="1 of 64 inputs hold a number that is not finite"):
                layer(x)
    assert quantize_rows(torch.tensor([[1e-40, 0.0]]))[0].eq(0).all()  # 127 / 1e-40 is infinite
    for threshold in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="threshold"):
            Int8Linear(linear, threshold)
    mt5 = model()
    with pytest.raises(ValueError, match="'dance' matches no"):
        quantize_linears(mt5, skip=("dance",))
    with pytest.raises(ValueError, match="no linear layer"):
        quantize_linears(mt5.embed)
    quantize_linears(mt5)
    with pytest.raises(ValueError, match="already"):
        quantize_linears(mt5)


def test_a_quantised_model_says_nearly_the_same_and_learns_through_lora():
    exact = run(model()).detach()
    mt5 = model()
    before = sum(p.nbytes for p in mt5.parameters())
    saved = quantize_linears(mt5, skip=("lm_head",))
    assert before - saved == sum(t.nbytes for t in (*mt5.parameters(), *mt5.buffers()))
    assert error(run(mt5), exact) < 0.05 and not torch.equal(run(mt5), exact)
    assert isinstance(mt5.lm_head, nn.Linear) and isinstance(mt5.encoder.blocks[0].mlp.wo, Int8Linear)
    add_lora(mt5, "all", r=4)
    trained = [p for p in mt5.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(lora_layers(mt5)) == 2 * sum(isinstance(m, Int8Linear) for m in mt5.modules())
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(30):
        loss = nn.functional.cross_entropy(run(mt5).flatten(0, 1), torch.tensor([4, 6, 1, 8, 1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def int8_with_lora():
    mt5 = model()
    quantize_linears(mt5, skip=("lm_head",))
    add_lora(mt5, "all", r=4, alpha=6.0)
    for i, layer in enumerate(lora_layers(mt5).values()):
        nn.init.normal_(layer.B, std=0.05, generator=torch.Generator().manual_seed(i))
    return mt5


def test_lora_is_merged_into_freshly_quantised_weights_and_unmerging_restores_the_bits():
    mt5 = int8_with_lora()
    bits, before, layers = digest(mt5.state_dict()), run(mt5), lora_layers(mt5)
    wanted = {path: layer.base.dequantized() + layer.scale * layer.B @ layer.A for path, layer in layers.items()}
    merge_lora(mt5)
    assert error(run(mt5), before) < 0.1 and digest(mt5.state_dict()) != bits  # two roundings of W more, in a model of random numbers
    for path, layer in layers.items():
        codes, scale = quantize_rows(wanted[path].half())
        assert torch.equal(layer.base.weight, codes) and torch.equal(layer.base.SCB, scale) and layer.base.weight.dtype == torch.int8
    assert error(run(mt5), before) < 0.1
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(mt5)
    unmerge_lora(mt5)
    assert digest(mt5.state_dict()) == bits and torch.equal(run(mt5), before)


def test_a_merge_into_int8_that_overflows_changes_nothing():
    mt5 = int8_with_lora()
    list(lora_layers(mt5).values())[-1].B.data.fill_(1e6)  # not finite in fp16
    bits = digest(mt5.state_dict())
    with pytest.raises(ValueError, match="wo.*not finite"):
        merge_lora(mt5)
    assert digest(mt5.state_dict()) == bits and all(layer.unmerged is None for layer in lora_layers(mt5).values())


def test_an_adapter_knows_the_int8_base_it_was_trained_on(tmp_path):
    mt5 = int8_with_lora()
    save_adapter(mt5, tmp_path)
    again = model()
    quantize_linears(again, skip=("lm_head",))
    again.decoder.blocks[0].mlp.wo.pack()  # the fingerprint is of the codes, wherever they are
    load_adapter(again, tmp_path)
    assert torch.equal(run(again), run(mt5))
    for change in (lambda m: None, lambda m: quantize_linears(m), lambda m: (quantize_linears(m, skip=("lm_head",)), m.encoder.blocks[0].attn.q.weight[0].neg_()),
                   lambda m: (quantize_linears(m, skip=("lm_head",)), m.encoder.blocks[0].attn.q.SCB[:1].mul_(1.01))):  # fmt: skip
        other = model()
        change(other)
        with pytest.raises(WeightsError, match="another language model"):
            load_adapter(other, tmp_path)
        assert not lora_layers(other)


@pytest.mark.parametrize("targets", [["q", "v"], ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]], ids=len)
def test_an_adapter_of_peft_over_an_8_bit_base(bnb, tmp_path, targets):
    """transformers + bitsandbytes + peft on the CPU: the same outputs and gradients but for the rounding of x, which their training leaves out."""
    peft = pytest.importorskip("peft")
    from transformers import BitsAndBytesConfig, MT5ForConditionalGeneration

    save_mt5(model(), tmp_path / "base")
    hf = MT5ForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    torch.manual_seed(1)
    hf = peft.get_peft_model(hf, peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, target_modules=targets)).train()
    hf.save_pretrained(tmp_path / "adapter")
    mt5 = model()
    quantize_linears(mt5, skip=("wo", "lm_head"), threshold=0.0)
    load_adapter(mt5, tmp_path / "adapter")
    assert all(isinstance(layer.base, Int8Linear) == (not path.endswith("wo")) for path, layer in lora_layers(mt5).items())
    ours, theirs = run(mt5), run_hf(hf)
    assert error(ours, theirs) < 2e-3
    ours.square().mean().backward()
    theirs.square().mean().backward()
    of = lambda name, side: next(p.grad for n, p in hf.named_parameters() if f"{name}.lora_{side}." in n)
    for path, name in (("encoder.blocks.0.attn.q", "encoder.block.0.layer.0.SelfAttention.q"), ("decoder.blocks.2.cross_attn.v", "decoder.block.2.layer.1.EncDecAttention.v")):
        for side in "AB":
            assert error(getattr(lora_layers(mt5)[path], side).grad, of(name, side)) < 0.01
    with_x_rounded = model()
    quantize_linears(with_x_rounded, skip=("wo", "lm_head"))
    load_adapter(with_x_rounded, tmp_path / "adapter")
    assert 0 < error(run(with_x_rounded), theirs) < 0.1 and 0 < error(run_hf(hf.eval()), theirs) < 0.1  # in eval() they round x as well
