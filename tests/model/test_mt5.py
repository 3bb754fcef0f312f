"""The language model alone: buckets against T5's own, parity, causality, the cache."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, in_transformers, randomise, tiny_mblip

from nanomblip.model.attention import attend_path
from nanomblip.model.mt5 import MT5, KVCache, MT5Norm, relative_bucket


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("buckets,max_distance", [(32, 128), (8, 10), (16, 40)])
def test_buckets_equal_transformers(two_sided, buckets, max_distance):
    from transformers.models.mt5.modeling_mt5 import MT5Attention

    distance = torch.arange(-400, 401)
    want = MT5Attention._relative_position_bucket(distance, two_sided, buckets, max_distance)
    assert torch.equal(relative_bucket(distance, buckets, max_distance, two_sided), want)


@pytest.mark.parametrize("buckets,max_distance", [(3, 128), (32, 16), (0, 10)])
def test_buckets_without_a_logarithmic_half_are_refused(buckets, max_distance):
    with pytest.raises(ValueError, match="buckets"):
        replace(TINY.mt5, buckets=buckets, max_distance=max_distance)


@pytest.mark.parametrize("gelu", ["tanh", "none"])
def test_parity_with_transformers(gelu, tmp_path):
    model = tiny_mblip(replace(TINY, mt5=replace(TINY.mt5, gelu=gelu)))
    theirs = in_transformers(model, tmp_path)
    theirs = theirs.get_submodule("language_model" if hasattr(theirs, "language_model") else "model.language_model")
    prompt = torch.randint(2, 60, (2, 30))  # longer than max_distance
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 11:] = False
    ids = torch.randint(2, 60, (2, 25))
    want = theirs(input_ids=prompt, attention_mask=mask.long(), decoder_input_ids=ids).logits
    for path in ("fast", "written"):
        with attend_path(path):
            torch.testing.assert_close(model.mt5(prompt, mask, ids), want, atol=1e-5, rtol=1e-4)


def test_the_two_gelus_differ():
    a, b = (randomise(MT5(replace(TINY.mt5, gelu=gelu)), std=0.5) for gelu in ("tanh", "none"))
    prompt, ids = torch.randint(2, 60, (1, 5)), torch.randint(2, 60, (1, 4))
    assert not torch.equal(a.eval()(prompt, prompt > 0, ids), b.eval()(prompt, prompt > 0, ids))


def test_a_later_piece_changes_nothing_before_it():
    model = tiny_mblip().mt5
    prompt, ids = torch.randint(2, 60, (2, 6)), torch.randint(2, 60, (2, 8))
    before = model(prompt, prompt > 0, ids)
    ids[:, 5] = 61
    after = model(prompt, prompt > 0, ids)
    torch.testing.assert_close(after[:, :5], before[:, :5], atol=0, rtol=0)
    assert not torch.allclose(after[:, 5:], before[:, 5:])


@pytest.mark.parametrize("steps", [(1,) * 12, (3, 4, 1, 4)])
def test_cached_decoding_equals_full_decoding(steps):
    model = tiny_mblip().mt5
    prompt, ids = torch.randint(2, 60, (3, 6)), torch.randint(2, 60, (3, 12))
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    memory = model.encode(model.embed(prompt), mask)
    full = model.decode(ids, memory, mask)
    cache, parts = KVCache(model.cfg.decoder_layers), []
    for piece in ids.split(steps, dim=1):
        parts.append(model.decode(piece, memory, mask, cache))
    assert len(cache) == 12
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5, rtol=1e-5)


def test_the_cache_can_be_reordered_and_shrunk():
    model = tiny_mblip().mt5
    prompt, ids = torch.randint(2, 60, (3, 6)), torch.randint(2, 60, (3, 5))
    mask, rows = prompt > 0, torch.tensor([2, 0])
    memory = model.encode(model.embed(prompt), mask)
    cache = KVCache(model.cfg.decoder_layers)
    model.decode(ids[:, :4], memory, mask, cache)
    cache.reorder(rows)
    got = model.decode(ids[rows, 4:], memory[rows], mask[rows], cache)
    torch.testing.assert_close(got, model.decode(ids, memory, mask)[rows, 4:], atol=1e-5, rtol=1e-5)


def test_labels_are_shifted_right():
    labels = torch.tensor([[5, 6, 1, -100], [7, 1, -100, -100]])
    assert MT5(TINY.mt5).shift_right(labels).tolist() == [[0, 5, 6, 1], [0, 7, 1, 0]]


def test_norm_is_computed_in_fp32():
    norm = MT5Norm(64, 1e-6).bfloat16()
    x = (torch.randn(4, 64) * 300).bfloat16()
    want = x.float() / x.float().pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
    assert torch.equal(norm(x), want.bfloat16())


def test_fresh_weights_start_near_the_uniform_loss():
    torch.manual_seed(0)
    model = MT5(replace(TINY.mt5, vocab=500, width=64, heads=4, head_width=16, mlp=128)).eval()
    model.init_weights()
    prompt, ids = torch.randint(2, 500, (8, 6)), torch.randint(2, 500, (8, 10))
    loss = torch.nn.functional.cross_entropy(model(prompt, prompt > 0, ids).flatten(0, 1), torch.randint(2, 500, (80,)))
    assert abs(loss.item() - torch.tensor(500.0).log().item()) < 1.0
