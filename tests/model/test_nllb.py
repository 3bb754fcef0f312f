"""The translator: sizes, parity with transformers through the production loader, padding, the cache, writing."""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import TINY_NLLB, randomise, save_nllb, tiny_nllb

from nanomblip.model.attention import KVCache, attend_path
from nanomblip.model.generate import Decoding
from nanomblip.model.int8 import Int8Linear, quantize_linears
from nanomblip.model.nllb import NLLB, NLLB_PRESETS, NLLBConfig, sinusoids, translate_tokens
from nanomblip.weights.nllb import load_nllb, nllb_names

V, PAD, EOS = TINY_NLLB.vocab, TINY_NLLB.pad, TINY_NLLB.eos


def tokens(rows, length, seed=0, pads="right", vocab=V):
    """Random ids, long (rows, length), with padding of different length on one side, or here and there."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (rows, length), generator=generator)
    real = torch.randint(1, length + 1, (rows, 1), generator=generator)
    real[0] = length
    if pads == "mixed":
        hidden = torch.rand(rows, length, generator=generator) < 0.3
        hidden[:, 0] = False
    else:
        hidden = torch.arange(length) >= real
    return ids.masked_fill(hidden.flip(1) if pads == "left" else hidden, PAD)


@pytest.mark.parametrize("name, parameters, tensors", [
    ("nllb-200-distilled-600M", 615_073_792, 509), ("nllb-200-distilled-1.3B", 1_370_638_336, 1013),
    ("nllb-200-1.3B", 1_370_638_336, 1013), ("nllb-200-3.3B", 3_344_863_232, 1013),
])  # fmt: skip
def test_sizes(name, parameters, tensors):
    with torch.device("meta"):
        model = NLLB(NLLB_PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters and len(list(model.parameters())) == tensors
    assert model.lm_head.weight is model.embed.weight


@pytest.mark.parametrize("bad", [
    dict(heads=5), dict(decoder_heads=0), dict(width=9, heads=3, decoder_heads=3), dict(width=2, heads=1, decoder_heads=1), dict(eos=83),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match="width|vocab"):
        replace(TINY_NLLB, **bad)


def test_sinusoids_equal_transformers():
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding

    want = M2M100SinusoidalPositionalEmbedding.get_embedding(1300, 64, padding_idx=None)
    torch.testing.assert_close(sinusoids(torch.arange(1300)[None], 64)[0], want, atol=1e-6, rtol=0)


def random_config(seed):
    rng = random.Random(seed)
    heads, decoder_heads = rng.sample((1, 2, 3, 4, 6), 2)
    layers, decoder_layers = rng.sample(range(1, 5), 2)
    mlp, decoder_mlp = rng.sample((20, 31, 48, 57), 2)
    return NLLBConfig(vocab=rng.randint(60, 130), width=12 * rng.randint(1, 4), heads=heads, decoder_heads=decoder_heads,
                      mlp=mlp, decoder_mlp=decoder_mlp, layers=layers, decoder_layers=decoder_layers)  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_logits_and_gradients_equal_transformers(seed, tmp_path):
    """Odd sizes, padding on either side or in the middle, texts longer than the table of positions (16 in theirs)."""
    cfg = random_config(seed)
    theirs = save_nllb(tiny_nllb(cfg, seed), tmp_path)
    model = load_nllb(tmp_path)
    assert model.cfg == cfg
    source = tokens(4, 40, seed, ("right", "left", "mixed")[seed % 3], cfg.vocab)
    ids = tokens(4, 33, seed + 100, ("mixed", "right")[seed % 2], cfg.vocab)
    want = theirs(input_ids=source, attention_mask=(source != PAD).long(), decoder_input_ids=ids).logits
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(seed))
    (want * weight).sum().backward()
    for path in ("fast", "written"):
        with attend_path(path):
            got = model(source, ids)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
            model.zero_grad()
            (got * weight).sum().backward()
        for name, key in nllb_names(model).items():
            a, b = model.get_parameter(name).grad, theirs.get_parameter(key).grad
            if name == "embed.weight":  # their embedding gives the row of padding no gradient
                a[PAD] = b[PAD] = 0
            torch.testing.assert_close(a, b, atol=1e-5 + 1e-4 * b.abs().max().item(), rtol=0, msg=lambda m: f"{name}: {m}")


def test_padding_does_not_matter_wherever_it_stands():
    model, ids = tiny_nllb(), tokens(1, 6, 5)
    bare = tokens(1, 9, 4)
    want = model(bare, ids)
    gap = torch.full((1, 3), PAD)
    for source in (torch.cat([gap, bare], 1), torch.cat([bare, gap], 1), torch.cat([bare[:, :4], gap, bare[:, 4:]], 1)):
        torch.testing.assert_close(model(source, ids), want, atol=1e-5, rtol=0)


def test_a_later_token_changes_nothing_before_it():
    model, source, ids = tiny_nllb(), tokens(2, 6), tokens(2, 8, 1, "mixed")
    before = model(source, ids)
    ids[:, 5] = 61
    after = model(source, ids)
    torch.testing.assert_close(after[:, :5], before[:, :5], atol=0, rtol=0)
    assert not torch.allclose(after[:, 5:], before[:, 5:])


@pytest.mark.parametrize("steps", [(1,) * 12, (2, 4, 1, 5)])
def test_cached_decoding_equals_full_decoding(steps):
    model, source = tiny_nllb(), tokens(3, 6)
    ids = torch.randint(3, V, (3, 12), generator=torch.Generator().manual_seed(1))
    memory, mask = model.encode(source)
    full = model.decode(ids, memory, mask)
    cache, parts = KVCache(model.cfg.decoder_layers), []
    for part in ids.split(steps, dim=1):
        parts.append(model.decode(part, memory, mask, cache))
    assert len(cache) == 12
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(ids, memory, mask, last=True), full[:, -1:], atol=1e-5, rtol=0)


def talkative(cfg=TINY_NLLB, seed=0, eos=3.0):
    """A random model that writes varied texts of varied length, the briefer the larger `eos`."""
    model = tiny_nllb(cfg, seed, std=0.4)
    with torch.no_grad():
        # With plain weights it says the last token again, since the head is that token's embedding.
        model.decoder.norm.weight.copy_(torch.arange(cfg.width) % 2 * 2 - 1)
        model.decoder.norm.bias.copy_(eos * model.embed.weight[EOS] / model.embed.weight[EOS].square().sum())
    return model


def random_decodings(seed, n):
    rng = random.Random(seed)
    grid = list(product((2, 3, 5), (-1.0, 0.0, 0.5, 1.0, 2.0), (False, True)))
    for i, (beams, penalty, early) in enumerate(rng.sample(grid, n)):
        beams, longest = 1 if i % 4 == 3 else beams, rng.choice((2, 5, 9, 14))
        yield Decoding(num_beams=beams, num_return=rng.randint(1, beams), min_new_tokens=rng.randint(0, min(longest, 4)),
                       max_new_tokens=longest, length_penalty=penalty, early_stopping=early)  # fmt: skip


@pytest.mark.parametrize("cfg, seed, eos", [
    (TINY_NLLB, 6, 3), (replace(TINY_NLLB, layers=3), 8, 5), (replace(TINY_NLLB, layers=4, decoder_layers=1), 1, 3),
    (replace(TINY_NLLB, vocab=128, layers=3), 4, 2),
])  # fmt: skip
def test_greedy_and_beams_equal_transformers(cfg, seed, eos, tmp_path):
    theirs = save_nllb(talkative(cfg, seed, eos), tmp_path, max_position_embeddings=1024)
    model, texts = load_nllb(tmp_path), []
    for i, decoding in enumerate(random_decodings(seed, 20)):
        source, target = tokens(3, 11, 100 * seed + i, ("right", "left", "mixed")[i % 3], cfg.vocab), 3 + 7 * i % 50
        # 5.x sizes the decoder's cache by the encoder's depth, and fails when the decoder is the deeper one.
        out = theirs.generate(
            input_ids=source, attention_mask=(source != PAD).long(), forced_bos_token_id=target, suppress_tokens=[PAD],
            num_beams=decoding.num_beams, num_return_sequences=decoding.num_return, do_sample=False,
            min_new_tokens=decoding.min_new_tokens, max_new_tokens=decoding.max_new_tokens,
            length_penalty=decoding.length_penalty, early_stopping=decoding.early_stopping,
            use_cache=cfg.decoder_layers <= cfg.layers, return_dict_in_generate=True, output_scores=True)  # fmt: skip
        found = translate_tokens(model, source, torch.full((3,), target), decoding)
        got = [h for row in found for h in row]
        want = [row.tolist() for row in out.sequences]
        assert all(row[:2] == [EOS, target] for row in want)
        want = [row[2:] for row in want]
        assert [(h.ids, h.ended) for h in got] == [
            (row[: row.index(EOS)], True) if EOS in row else (row, False) for row in want], decoding  # fmt: skip
        if decoding.num_beams > 1:
            scores = torch.tensor([h.score for h in got])
            torch.testing.assert_close(scores, out.sequences_scores, atol=2e-4, rtol=1e-4)
        texts += got
    # The comparison is worth something only if texts end early, run out, and differ.
    assert min(sum(h.ended for h in texts), sum(not h.ended for h in texts)) > 0.1 * len(texts)
    assert len({tuple(h.ids) for h in texts}) > 0.5 * len(texts)


BEAMS = Decoding(num_beams=3, num_return=3, max_new_tokens=12)


@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=12), BEAMS, Decoding(do_sample=True, max_new_tokens=12)])
def test_a_batch_of_several_languages_equals_its_singles(decoding):
    model, source, target = talkative(seed=6), tokens(6, 9, 6, "left"), torch.tensor([70, 71, 72, 70, 71, 73])
    batch = translate_tokens(model, source, target, decoding, vocab=70)
    for b in range(6):
        real = source[b : b + 1, source[b] != PAD]
        (alone,) = translate_tokens(model, real, target[b : b + 1], decoding, vocab=70)
        assert [h.ids for h in alone] == [h.ids for h in batch[b]]
        assert [h.score for h in alone] == pytest.approx([h.score for h in batch[b]], abs=1e-4)
    assert len({len(row[0].ids) for row in batch}) > 2 and batch[0] != batch[3]
    assert not {PAD, *range(70, V)} & {i for row in batch for h in row for i in h.ids}


def test_scores_are_teacher_forced_log_probabilities_without_the_language():
    model, source, target = talkative(seed=7), tokens(3, 9, 7), torch.tensor([70, 71, 72])
    for b, row in enumerate(translate_tokens(model, source, target, BEAMS)):
        for h in row:
            written = torch.tensor([[target[b], *h.ids, *[EOS] * h.ended]])
            ids = torch.cat([torch.tensor([[EOS]]), written[:, :-1]], dim=1)
            with torch.no_grad():
                log_p = model(source[b : b + 1], ids).log_softmax(-1).gather(2, written[..., None])[0, 1:].sum()
            assert h.score == pytest.approx(log_p.item() / written.shape[1], abs=1e-3)  # the language counts as length


@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=9), BEAMS])
def test_padding_and_other_languages_are_never_written(decoding):
    model, source, target = talkative(seed=7), tokens(3, 9, 7), torch.tensor([70, 71, 72])
    with torch.no_grad():  # it likes nothing better than padding, then other languages
        model.decoder.norm.bias += 20 * model.embed.weight[PAD] / model.embed.weight[PAD].square().sum()
        model.decoder.norm.bias += 10 * model.embed.weight[75] / model.embed.weight[75].square().sum()
    written = lambda vocab: {i for row in translate_tokens(model, source, target, decoding, vocab=vocab) for h in row for i in h.ids}
    assert PAD not in written(None) and 75 in written(None)
    assert PAD not in written(70) and max(written(70)) < 70


def test_limits_count_the_language_and_eos():
    model, source, target = talkative(seed=8, eos=-20), tokens(2, 9, 8), torch.tensor([70, 71])
    for decoding in (Decoding(max_new_tokens=6), replace(BEAMS, max_new_tokens=6)):
        assert {len(h.ids) for row in translate_tokens(model, source, target, decoding) for h in row} == {5}
    with pytest.raises(ValueError, match="max_new_tokens is 1"):
        translate_tokens(model, source, target, Decoding(max_new_tokens=1))
    seen = []
    ((h,),) = translate_tokens(model, source[:1], target[:1], Decoding(max_new_tokens=6), on_token=seen.append)
    assert seen == [h.ids[: n + 1] for n in range(5)]


def test_a_repetition_penalty_spares_eos_which_also_is_the_start():
    model, source, target = talkative(seed=9, eos=12), tokens(4, 9, 9), torch.full((4,), 70)
    for decoding in (Decoding(max_new_tokens=9), Decoding(max_new_tokens=9, repetition_penalty=50.0)):
        assert all(row[0].ended and not row[0].ids for row in translate_tokens(model, source, target, decoding))
    punished = translate_tokens(talkative(seed=9, eos=-9), source, target, Decoding(max_new_tokens=9, repetition_penalty=50.0))
    assert all(len(set(row[0].ids)) == len(row[0].ids) > 5 for row in punished)


def test_int8_by_the_layers_of_mblip_the_head_included(tmp_path):
    model, source, ids = tiny_nllb(replace(TINY_NLLB, width=48), std=0.08), tokens(3, 9, 3), tokens(3, 7, 4)
    save_nllb(model, tmp_path)
    want = model(source, ids)
    quantize_linears(model)
    assert isinstance(model.lm_head, Int8Linear) and not any(isinstance(m, torch.nn.Linear) for m in model.modules())
    got = model(source, ids)
    assert 1e-4 < (got - want).abs().max() < 0.1 * want.std()
    loaded = load_nllb(tmp_path, llm_dtype="int8")
    assert loaded.embed.weight.dtype == torch.bfloat16 and loaded.encoder.norm.weight.dtype == torch.float32
    for (name, a), (_, b) in zip(sorted(model.named_buffers()), sorted(loaded.named_buffers())):
        assert torch.equal(a, b), name
    torch.testing.assert_close(loaded(source, ids), got, atol=0.05, rtol=0)  # the embedding is rounded to bf16
    loaded.embed = model.embed
    assert torch.equal(loaded(source, ids), got)
    assert translate_tokens(loaded, source, torch.tensor([70, 71, 72]), BEAMS)


def test_bf16_stays_bf16_and_tied(tmp_path):
    save_nllb(randomise(NLLB(TINY_NLLB)), tmp_path)
    model = load_nllb(tmp_path, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.lm_head.weight is model.embed.weight
    assert model(tokens(2, 5), tokens(2, 4)).dtype == torch.bfloat16 and not model.training
