"""Generation against transformers' `generate`, against an exhaustive search, and against itself."""

import random
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch
from conftest import TINY, in_transformers, tiny_mblip, transformers_inputs

from nanomblip.model.generate import DECODING, Decoding, generate

# transformers 5.x sizes its decoder cache by the *encoder's* depth and fails when the decoder is the deeper one.
EVEN = replace(TINY, mt5=replace(TINY.mt5, layers=3))
V, EOS = TINY.mt5.vocab, TINY.mt5.eos


def talkative(cfg=EVEN, seed=0, head=4.0, eos=5.0):
    """A random model that writes varied texts of varied length: `head` makes it sure of itself, `eos` brief."""
    model = tiny_mblip(cfg, seed)
    with torch.no_grad():
        model.mt5.embed.weight.mul_(6)  # let the last piece matter
        model.mt5.lm_head.weight.mul_(head)
        image, prompt, mask = inputs(seed, B=8)
        ids = torch.randint(cfg.mt5.vocab, (8, 10), generator=torch.Generator().manual_seed(seed))
        memory, mask = model.encode(model.encode_image(image), prompt, mask)
        hidden = model.mt5.decoder(model.mt5.embed(ids), memory, mask).mean((0, 1))  # (D,)
        model.mt5.lm_head.weight[EOS] += eos * hidden / hidden.square().sum()  # about +eos on its logit
    return model


def inputs(seed=0, B=3, I=1, S=7):
    """Pictures and prompts of different lengths, with garbage in the padded places of some."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(B, I, 3, TINY.vit.image_size, TINY.vit.image_size, generator=generator) * 2
    prompt = torch.randint(3, V - 1, (B, S), generator=generator)
    length = torch.randint(1, S + 1, (B,), generator=generator)
    length[0] = S
    mask = torch.arange(S) < length[:, None]
    prompt[1::2] = prompt[1::2].masked_fill(~mask[1::2], 0)
    return image, prompt, mask


def cut(row):
    """What transformers wrote, without start, eos and padding, and whether eos came."""
    row = row[1:].tolist()
    return (row[: row.index(EOS)], True) if EOS in row else (row, False)


def in_their_words(decoding):
    names = "num_beams min_new_tokens max_new_tokens length_penalty early_stopping repetition_penalty".split()
    return {name: asdict(decoding)[name] for name in names} | dict(num_return_sequences=decoding.num_return, do_sample=False)


def check_parity(model, theirs, decoding, seed, images=1, ours=None, **more):
    """Compare pieces, and the scores of beams; returns our result."""
    image, prompt, mask = inputs(seed, I=images)
    kwargs = in_their_words(decoding) | dict(return_dict_in_generate=True, output_scores=True) | more
    kwargs["use_cache"] = model.cfg.mt5.decoder_layers <= model.cfg.mt5.layers
    if images == 1:
        ids, their_mask = transformers_inputs(model, prompt, mask)
        out = theirs.generate(pixel_values=image[:, 0], input_ids=ids, attention_mask=their_mask, **kwargs)
    else:  # they have no samples with several pictures, but their language model takes embeddings
        with torch.no_grad():
            x = torch.cat([model.encode_image(image), model.mt5.embed(prompt)], dim=1)
        their_mask = torch.cat([torch.ones(len(x), x.shape[1] - mask.shape[1]), mask], dim=1)
        out = theirs.language_model.generate(inputs_embeds=x, attention_mask=their_mask, **kwargs)
    got = [h for row in generate(model, image, prompt, mask, decoding, **(ours or {})) for h in row]
    assert [(h.ids, h.ended) for h in got] == [cut(row) for row in out.sequences], decoding
    if decoding.num_beams > 1:
        torch.testing.assert_close(torch.tensor([h.score for h in got]), out.sequences_scores, atol=2e-4, rtol=1e-4)
    return got


def random_decodings(seed, n):
    rng = random.Random(seed)
    grid = list(product((2, 3, 5), (-1.0, 0.5, 1.0, 2.0), (False, True), (1.0, 1.5)))  # all of it, in random order
    for i, (beams, penalty, early, repetition) in enumerate(rng.sample(grid, n)):
        beams, longest = 1 if i % 8 == 7 else beams, rng.choice((1, 4, 9, 14))
        yield Decoding(
            num_beams=beams,
            num_return=rng.randint(1, beams),
            min_new_tokens=rng.randint(0, min(longest, 5)),
            max_new_tokens=longest,
            length_penalty=penalty,
            early_stopping=early,
            repetition_penalty=repetition,
        )


@pytest.mark.parametrize("cfg, seed, head, eos", [(EVEN, 1, 2, 4), (EVEN, 2, 4, 4), (TINY, 3, 2, 3), (EVEN, 4, 8, 2)])
def test_greedy_and_beams_equal_transformers(cfg, seed, head, eos, tmp_path):
    model = talkative(cfg, seed, head, eos)
    theirs = in_transformers(model, tmp_path)
    texts = []
    for i, decoding in enumerate(random_decodings(seed, 40)):
        texts += check_parity(model, theirs, decoding, seed=100 * seed + i, images=2 if i % 5 == 4 else 1)
    # The comparison is worth something only if texts end early, run out, and differ.
    assert min(sum(h.ended for h in texts), sum(not h.ended for h in texts)) > 0.1 * len(texts)
    assert len({tuple(h.ids) for h in texts}) > 0.5 * len(texts)


@pytest.mark.parametrize("decoding", [*DECODING.values(), Decoding(repetition_penalty=1.3, min_new_tokens=4)])
def test_presets_equal_transformers(decoding, tmp_path):
    model = talkative(seed=5, eos=6)
    decoding = replace(decoding, max_new_tokens=min(decoding.max_new_tokens, 20))
    check_parity(model, in_transformers(model, tmp_path), decoding, seed=5)


@pytest.mark.parametrize("beams", [1, 4])
def test_restricted_pieces_equal_transformers(beams, tmp_path):
    model = talkative(seed=6)
    theirs = in_transformers(model, tmp_path)
    decoding = Decoding(num_beams=beams, num_return=beams, max_new_tokens=8)
    check_parity(model, theirs, decoding, 6, ours=dict(vocab=40), suppress_tokens=list(range(40, V)))
    allowed = torch.rand(3, 50, generator=torch.Generator().manual_seed(6)) < 0.4
    lists = [sorted({EOS, *row.nonzero()[:, 0].tolist()}) for row in allowed]
    check_parity(model, theirs, decoding, 6, ours=dict(allowed=allowed), prefix_allowed_tokens_fn=lambda b, ids: lists[b])


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 2.0])
def test_wide_beams_find_every_text(length_penalty):
    """With two pieces allowed and beams enough for all 31 texts of up to four pieces, beam search is exhaustive."""
    model, (image, prompt, mask) = talkative(seed=7), inputs(7)
    may = torch.zeros(V, dtype=torch.bool)
    may[[5, 9]] = True
    decoding = Decoding(num_beams=33, num_return=33, max_new_tokens=4, length_penalty=length_penalty)
    got = generate(model, image, prompt, mask, decoding, allowed=may)
    texts = [[*p, EOS] for n in range(4) for p in product((5, 9), repeat=n)] + [list(p) for p in product((5, 9), repeat=4)]
    for b, row in enumerate(got):
        want = sorted(((score(model, image[b], prompt[b], mask[b], t, length_penalty), t) for t in texts), reverse=True)
        assert [h.ids + [EOS] * h.ended for h in row] == [text for _, text in want]
        assert [h.score for h in row] == pytest.approx([s for s, _ in want], abs=1e-3)


def score(model, image, prompt, mask, written, length_penalty):
    """Teacher-forced log-probability of a text with its eos, per length ** length_penalty."""
    with torch.no_grad():
        logits, loss = model(image[None], prompt[None], torch.tensor([written]), prompt_mask=mask[None])
    return -loss.item() * len(written) / len(written) ** length_penalty


@pytest.mark.parametrize("decoding", [
    Decoding(), Decoding(length_penalty=-1.0, repetition_penalty=1.5), Decoding(do_sample=True, temperature=2.0, seed=3),
    Decoding(num_beams=4, num_return=3, length_penalty=0.5),
])  # fmt: skip
def test_scores_are_teacher_forced_log_probabilities(decoding):
    model, (image, prompt, mask) = talkative(seed=8), inputs(8)
    for b, row in enumerate(generate(model, image, prompt, mask, replace(decoding, max_new_tokens=10))):
        assert len(row) == decoding.num_return and row == sorted(row, key=lambda h: -h.score)
        for h in row:
            want = score(model, image[b], prompt[b], mask[b], h.ids + [EOS] * h.ended, decoding.length_penalty)
            assert h.score == pytest.approx(want, abs=1e-3)


def test_cached_equals_uncached_greedy():
    model, (image, prompt, mask) = talkative(TINY, seed=9), inputs(9, B=6, I=2)
    got = generate(model, image, prompt, mask, Decoding(max_new_tokens=15))
    with torch.no_grad():
        memory, memory_mask = model.encode(model.encode_image(image), prompt, mask)
        for b, (h,) in enumerate(got):
            ids = [0]
            while len(ids) <= 15 and ids[-1] != EOS:
                logits = model.mt5.decode(torch.tensor([ids]), memory[b : b + 1], memory_mask[b : b + 1])
                ids.append(logits[0, -1].argmax().item())
            assert h.ids + [EOS] * h.ended == ids[1:]
    assert len({len(h.ids) for (h,) in got}) > 2  # samples leave the batch at different times


SAMPLING = Decoding(
    do_sample=True, temperature=1.5, top_p=0.9, top_k=30, repetition_penalty=1.2, min_new_tokens=2, max_new_tokens=12, seed=4
)
BEAMS = Decoding(num_beams=3, num_return=3, max_new_tokens=12)


@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=12), BEAMS, replace(BEAMS, early_stopping=True), SAMPLING])
def test_a_batch_equals_its_singles_and_features_equal_images(decoding):
    model, (image, prompt, mask) = talkative(seed=10, eos=4), inputs(10, B=7)
    allowed = torch.rand(7, V, generator=torch.Generator().manual_seed(1)) < 0.8
    batch = generate(model, image, prompt, mask, decoding, allowed=allowed)
    with torch.no_grad():
        features = model.image_features(image)
    for b in range(7):
        real = prompt[b : b + 1, mask[b]]  # without its padding
        (alone,) = generate(model, None, real, None, decoding, features=features[b : b + 1], allowed=allowed[b])
        assert [h.ids for h in alone] == [h.ids for h in batch[b]]
        assert [h.score for h in alone] == pytest.approx([h.score for h in batch[b]], abs=1e-4)
    assert len({len(row[0].ids) for row in batch}) > 2


def test_sampling_follows_its_seeds():
    model, (image, prompt, mask) = talkative(seed=11, head=2), inputs(11, B=4)
    first = generate(model, image, prompt, mask, SAMPLING)
    torch.manual_seed(99)
    assert generate(model, image, prompt, mask, SAMPLING) == first
    assert generate(model, image, prompt, mask, replace(SAMPLING, seed=5)) != first
    same = [t[:1].expand(4, *t.shape[1:]) for t in (image, prompt, mask)]
    texts = [tuple(row[0].ids) for row in generate(model, *same, SAMPLING, seeds=[4, 5, 6, 4])]
    assert list(texts[0]) == list(texts[3]) == first[0][0].ids and len(set(texts)) == 3


@pytest.mark.parametrize("cut_off", [dict(top_p=1e-6), dict(top_k=1), dict(temperature=1e-4)])
def test_sampling_cut_to_one_piece_is_greedy(cut_off):
    model, (image, prompt, mask) = talkative(seed=12), inputs(12)
    greedy = generate(model, image, prompt, mask)
    assert generate(model, image, prompt, mask, Decoding(do_sample=True, **cut_off)) == greedy


@pytest.mark.parametrize("temperature, top_p, top_k", [(1.0, 1.0, 0), (2.0, 0.7, 0), (1.5, 0.8, 6)])
def test_samples_have_the_distribution_of_transformers_warpers(temperature, top_p, top_k):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    model, (image, prompt, mask) = talkative(seed=13, head=2), inputs(13, B=1)
    n = 4000
    with torch.no_grad():
        scores = model(image, prompt, torch.tensor([[5]]), prompt_mask=mask)[0][:, 0]  # of the first piece, (1, V)
        features = model.image_features(image).expand(n, -1, -1, -1)
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k or V), TopPLogitsWarper(top_p)):
        scores = warper(None, scores)
    want = scores[0].softmax(-1)
    decoding = Decoding(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=1)
    got = generate(model, None, prompt.expand(n, -1), mask.expand(n, -1), decoding, features=features, seeds=range(n))
    pieces = torch.tensor([h.ids[0] if h.ids else EOS for (h,) in got])
    assert (want[pieces] > 0).all()
    share = pieces.bincount(minlength=V) / n
    assert ((share - want).abs() <= 5 * (want / n).sqrt() + 1 / n).all()


@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=10), BEAMS, SAMPLING])
def test_only_allowed_pieces_are_written(decoding):
    model, (image, prompt, mask) = talkative(seed=14), inputs(14)
    for row in generate(model, image, prompt, mask, decoding, vocab=20):
        assert all(i < 20 for h in row for i in h.ids)
    allowed = torch.zeros(3, 12, dtype=torch.bool)
    for b in range(3):
        allowed[b, [4 + b, 8 + b]] = True
    for b, row in enumerate(generate(model, image, prompt, mask, decoding, allowed=allowed)):
        assert row and all(set(h.ids) <= {4 + b, 8 + b} for h in row)


@pytest.mark.parametrize("decoding", [Decoding(), BEAMS, SAMPLING])
def test_minimum_and_maximum_length(decoding):
    model, (image, prompt, mask) = talkative(seed=15, eos=30), inputs(15)
    for least, most in ((0, 6), (3, 6), (6, 6), (1, 1)):
        got = generate(model, image, prompt, mask, replace(decoding, min_new_tokens=least, max_new_tokens=most))
        for h in (h for row in got for h in row):
            assert least <= len(h.ids) <= most - h.ended and EOS not in h.ids and (h.ended or len(h.ids) == most)
        assert least in {len(row[0].ids) for row in got}  # this model wants to stop at once


def test_streaming():
    model, (image, prompt, mask) = talkative(seed=16), inputs(16, B=1)
    seen = []
    ((h,),) = generate(model, image, prompt, mask, Decoding(max_new_tokens=10), on_token=seen.append)
    assert seen == [h.ids[: n + 1] for n in range(len(h.ids))] and len(seen) > 1
    with pytest.raises(ValueError, match="num_beams 1"):
        generate(model, image, prompt, mask, BEAMS, on_token=print)


def test_dropout_is_off_and_modes_come_back():
    model, (image, prompt, mask) = talkative(seed=17), inputs(17)
    want = generate(model, image, prompt, mask, BEAMS)
    model.train()
    model.vit.eval()  # a frozen tower stays in eval while the rest trains
    assert generate(model, image, prompt, mask, BEAMS) == want
    assert not any(m.training for m in model.vit.modules()) and all(m.training for m in model.mt5.modules())
    with pytest.raises(ValueError, match="no token"):
        generate(model, image, prompt, mask, allowed=torch.zeros(V, dtype=torch.bool))
    with torch.no_grad():
        model.mt5.lm_head.weight[3, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        generate(model, image, prompt, mask)
    assert model.training and not model.vit.training
    labels = torch.tensor([[5, EOS]] * 3)
    model(image, prompt, labels, prompt_mask=mask)[1].backward()  # nothing born without gradients stays behind in a cache


@pytest.mark.parametrize("flag, values", [
    ("num_beams", dict(num_beams=0)), ("num_return", dict(num_return=2)), ("num_return", dict(num_beams=3, num_return=4)),
    ("min_new_tokens", dict(min_new_tokens=33)), ("min_new_tokens", dict(min_new_tokens=-1)), ("max_new_tokens", dict(max_new_tokens=0)),
    ("length_penalty", dict(length_penalty=float("nan"))), ("early_stopping", dict(early_stopping="never")), ("temperature", dict(do_sample=True, temperature=0.0)),
    ("temperature", dict(do_sample=True, temperature=float("nan"))), ("temperature", dict(temperature=0.7)),
    ("top_p", dict(do_sample=True, top_p=0.0)), ("top_p", dict(do_sample=True, top_p=1.1)), ("top_p", dict(top_p=0.9)),
    ("top_p", dict(do_sample=True, top_p=float("nan"))), ("top_k", dict(do_sample=True, top_k=-1)), ("top_k", dict(top_k=5)),
    ("repetition_penalty", dict(repetition_penalty=0.0)), ("do_sample", dict(do_sample=True, num_beams=2)), ("seed", dict(seed=-1)),
])  # fmt: skip
def test_bad_flags_are_named(flag, values):
    with pytest.raises(ValueError, match=f"^{flag} "):
        Decoding(**values)


def test_arguments_that_do_not_fit():
    model, (image, prompt, mask) = talkative(seed=18), inputs(18)
    with pytest.raises(ValueError, match="tokenizer of 99 tokens"):
        generate(model, image, prompt, mask, vocab=99)
    with pytest.raises(ValueError, match="num_beams is 40"):
        generate(model, image, prompt, mask, Decoding(num_beams=40))
    with pytest.raises(AssertionError, match="3 prompts, 2 samples"):
        generate(model, image[:2], prompt, mask)


@pytest.mark.parametrize("V", [67, 640, 8064, 250112])
def test_best_tokens_are_those_of_topk(V):
    from nanomblip.model.generate import best_tokens

    generator = torch.Generator().manual_seed(V)
    for k in (1, 10, 40 if V > 80 else 20):
        scores = torch.randn(3, V, generator=generator)
        scores[0, 5:] = -torch.inf  # few that are possible
        scores[1, :20] = 9.0 - torch.arange(20) / 100  # all the best side by side
        (values, places), want = best_tokens(scores, k), scores.topk(k)
        assert torch.equal(values, want.values) and torch.equal(places[1:], want.indices[1:])
        assert torch.equal(places[0, : min(k, 5)], want.indices[0, : min(k, 5)])


def test_beams_share_the_keys_and_values_of_the_encoder(monkeypatch):
    from nanomblip.model import generate as module

    model, (image, prompt, mask) = talkative(seed=19), inputs(19)
    caches = []

    class Cache(module.KVCache):
        def reorder(self, rows, memory=True):
            super().reorder(rows, memory)
            caches.append((len(self.memory[0][0]), len(self.past[0][0])))

    monkeypatch.setattr(module, "KVCache", Cache)
    generate(model, image, prompt, mask, BEAMS)
    assert caches[0] == (3, 9) and all(past == 3 * memory for memory, past in caches)
