"""From pictures and a prompt to text: greedy, beam search, nucleus sampling; batched, and cached in the KVCache.

All of them write one piece after another. What the model says about the next piece is first *steered* (repetition
penalty, minimum length, pieces that may not be written), then a piece is chosen:

- greedy takes the most probable one;
- sampling draws one from softmax(logits / temperature), cut to the `top_k` most probable pieces and then to the nucleus,
  the fewest of them that hold `top_p` of the probability (Holtzman et al. 2020, arXiv 1904.09751);
- beam search keeps the `num_beams` most probable beginnings of every sample and returns the ended texts with the best

      score = sum of log-probabilities / length ** length_penalty        length: pieces written, eos included

  A length penalty above 0 favours long texts, below 0 short ones: log-probabilities are negative.

Greedy and beam search give the same pieces as `generate` of transformers 5.x, and beams the same scores.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanomblip.model.mblip import MBLIP
from nanomblip.model.mt5 import KVCache


@dataclass(frozen=True)
class Decoding:
    """How to choose the pieces. Raises ValueError naming the flag that makes no sense."""

    num_beams: int = 1  # 1: greedy, or sampling
    min_new_tokens: int = 0  # pieces before eos may come
    max_new_tokens: int = 32  # eos included
    length_penalty: float = 1.0
    early_stopping: bool = (
        False  # True: num_beams ended texts are enough; False: go on while there is hope of a better one
    )
    num_return: int = 1  # n-best: so many texts a sample, best first
    do_sample: bool = False
    temperature: float = 1.0  # above 1 flattens the distribution, below 1 sharpens it
    top_p: float = 1.0  # 1: no nucleus
    top_k: int = 0  # 0: no limit
    repetition_penalty: float = 1.0  # above 1: what was written already gets less probable (Keskar et al. 2019)
    seed: int = 0  # of sampling

    def __post_init__(self):
        for name, least in dict(num_beams=1, min_new_tokens=0, max_new_tokens=1, num_return=1, top_k=0, seed=0).items():
            if not least <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} is {getattr(self, name)}: it is at least {least} and below 2**63")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens, {self.max_new_tokens}"
            )
        if self.num_return > self.num_beams:
            raise ValueError(f"num_return is {self.num_return}: no more than num_beams, {self.num_beams}")
        if not -10 <= self.length_penalty <= 10:  # comparisons are written so that nan fails
            raise ValueError(f"length_penalty is {self.length_penalty}: it lies between -10 and 10")
        if self.early_stopping not in (False, True):
            raise ValueError(f"early_stopping is {self.early_stopping!r}: only False and True are implemented")
        if not 1e-4 <= self.temperature < inf:
            raise ValueError(
                f"temperature is {self.temperature}: it is at least 0.0001 (for greedy leave do_sample off)"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it is above 0 and at most 1")
        if not 0 < self.repetition_penalty < inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}: it is above 0, and 1 for none")
        if self.do_sample and self.num_beams > 1:
            raise ValueError(f"do_sample goes with num_beams 1, not {self.num_beams}")
        for name, off in dict(temperature=1, top_p=1, top_k=0).items():
            if getattr(self, name) != off and not self.do_sample:
                raise ValueError(f"{name} is {getattr(self, name)}, which means nothing without do_sample")


DECODING = {  # the paper's, by task; "detail" is for long descriptions
    "greedy": Decoding(),
    "caption": Decoding(num_beams=5, min_new_tokens=1, max_new_tokens=50),
    "vqa": Decoding(num_beams=5, min_new_tokens=1, max_new_tokens=10, length_penalty=-1.0),
    "detail": Decoding(num_beams=5, max_new_tokens=256, repetition_penalty=1.5),
}


class Hypothesis(NamedTuple):
    """One text that the model wrote."""

    ids: list[int]  # without start, eos and padding
    score: float  # log-probability in nats / length ** length_penalty
    ended: bool  # by eos; False: cut off at max_new_tokens


@torch.no_grad()
def generate(model: MBLIP, image, prompt, prompt_mask=None, decoding=Decoding(), *, features=None, allowed=None,
             vocab=None, seeds=None, on_token=None) -> list[list[Hypothesis]]:  # fmt: skip
    """Write a text for each sample: a list of B lists of up to `num_return` hypotheses, best first.

    image: float (B, I, 3, size, size), or None when `features` (B, I, N, Dv) are given; prompt: long (B, S), with padding
    where samples differ in length; prompt_mask: bool (B, S), True = a real piece, by default all but the pad id.
    vocab: pieces of the tokenizer; the matrix has rows beyond, which are then never written.
    allowed: bool (V,) or (B, V), or narrower; only pieces that are True are written, and eos.
    seeds: for sampling, one int a sample, `decoding.seed` for each by default. Each sample has its own generator: what
    is drawn for it depends neither on the others nor on its place among them.
    on_token: without beams and for one sample, called after each piece with the list of ids so far.

    A score is the model's own log-probability, except in beam search with a repetition penalty, where it sums the
    penalised ones. Raises ValueError for arguments that contradict each other, or when the model's output is not finite.
    """
    cfg, B = model.cfg.mt5, len(prompt)
    vocab = cfg.vocab if vocab is None else vocab
    seeds = [decoding.seed] * B if seeds is None else seeds
    given = image if features is None else features
    assert len(given) == len(seeds) == B, f"{B} prompts, {len(given)} samples with pictures, {len(seeds)} seeds"
    if not cfg.eos < vocab <= cfg.vocab:
        raise ValueError(f"a tokenizer of {vocab} pieces does not go with a model of {cfg.vocab}")
    if on_token is not None and (B > 1 or decoding.num_beams > 1):
        raise ValueError(f"on_token follows one text: 1 sample and num_beams 1, not {B} and {decoding.num_beams}")
    may = torch.arange(cfg.vocab, device=prompt.device) < vocab  # (V,)
    if allowed is not None:
        assert allowed.shape[-1] <= cfg.vocab, f"allowed is {tuple(allowed.shape)}, the model has {cfg.vocab} pieces"
        may = may & F.pad(allowed, (0, cfg.vocab - allowed.shape[-1]))
    may = may.expand(B, cfg.vocab).clone()  # (B, V)
    may[:, cfg.eos] = True
    if may.sum(-1).min() < 2:
        raise ValueError("allowed leaves a sample no piece to write")

    with eval_mode(model):
        features = model.image_features(image) if features is None else features
        memory, mask = model.encode(model.image_tokens(features), prompt, prompt_mask)  # (B, L, D), (B, L)
        if decoding.num_beams > 1:
            return beam_search(model.mt5, memory, mask, may, decoding)
        return write_one_each(model.mt5, memory, mask, may, decoding, seeds, on_token)


@contextmanager
def eval_mode(model):
    """No dropout inside a with-block; afterwards each module is back in the mode in which it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def next_logits(mt5, ids, memory, mask, cache):
    """Logits of the piece after ids (R, T), of which the cache knows all but the last: fp32 (R, V), and log sum exp of each row (R,)."""
    logits = mt5.decode(ids[:, -1:], memory, mask, cache)[:, -1].float()  # (R, 1, V) -> (R, V)
    lse = logits.logsumexp(-1)
    if not (lse.isfinite().all() and logits.sum(-1).isfinite().all()):  # the sum sees -inf, which the exponential hides
        raise ValueError(
            "the model's output is not finite: are its weights damaged, or in fp16, in which mT5 overflows?"
        )
    return logits, lse


def steer(scores, ids, may, decoding, eos):
    """Apply what `decoding` asks of single pieces to scores (logits or log-probabilities) fp32 (R, V), in place; -inf = impossible.

    ids: long (R, T), start included; may: bool (B, V), where R is a multiple of B. Returns scores.
    """
    if decoding.repetition_penalty != 1:
        # Seen pieces only, each once; the sign decides which way is down. The start token counts, as in transformers.
        seen = scores.gather(1, ids)  # (R, T)
        seen = torch.where(seen < 0, seen * decoding.repetition_penalty, seen / decoding.repetition_penalty)
        scores.scatter_(1, ids, seen)
    scores.unflatten(0, (len(may), -1)).masked_fill_(~may[:, None], -inf)  # by (B, R/B, V)
    if ids.shape[1] - 1 < decoding.min_new_tokens:
        scores[:, eos] = -inf
    return scores


def best_pieces(scores, k):
    """`scores.topk(k)` of fp32 (R, V), eight times as fast over 250,112 pieces: the k best lie in the k runs of 64 with the best maxima."""
    R, V = scores.shape
    if V % 64 or k * 64 > V:
        return scores.topk(k)
    runs = scores.view(R, -1, 64)  # (R, V/64, 64)
    run = runs.amax(-1).topk(k).indices  # (R, k)
    values, place = runs.gather(1, run[:, :, None].expand(-1, -1, 64)).flatten(1).topk(k)  # (R, k), of k*64
    return values, run.gather(1, place // 64) * 64 + place % 64


def draw(scores, decoding, generators):
    """Sample a piece for each row of steered logits (R, V), with one generator a row: long (R,)."""
    scores, pieces = scores.topk(min(decoding.top_k or scores.shape[1], scores.shape[1]))  # best first, (R, k)
    probs = (scores / decoding.temperature).softmax(-1)
    before = probs.cumsum(-1) - probs  # what more probable pieces hold; 0 for the first, which therefore stays
    cdf = probs.masked_fill(before >= decoding.top_p, 0).cumsum(-1)
    u = torch.stack([torch.rand(1, generator=g) for g in generators]).to(cdf)  # (R, 1)
    place = (cdf <= u * cdf[:, -1:]).sum(-1, keepdim=True)  # the first piece at which the cdf passes u
    return pieces.gather(1, place)[:, 0]


def hypothesis(written, total, decoding, eos):
    """Make a Hypothesis of the ids after the start (with eos, if it came) and the sum of their log-probabilities."""
    ended = written[-1] == eos
    return Hypothesis(written[:-1] if ended else written, total / len(written) ** decoding.length_penalty, ended)


def write_one_each(mt5, memory, mask, may, decoding, seeds, on_token):
    """Greedy or sampling; arguments and result as in `generate`. Samples that have ended leave the batch."""
    eos, out = mt5.cfg.eos, [None] * len(memory)
    samples = list(range(len(memory)))  # the ones that still write, one row each: below, R of them
    ids = torch.full((len(memory), 1), mt5.cfg.pad, device=memory.device)  # the decoder starts with pad
    total = torch.zeros(len(memory), device=memory.device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    cache = KVCache(len(mt5.decoder.blocks))
    for length in range(1, decoding.max_new_tokens + 1):
        logits, lse = next_logits(mt5, ids, memory, mask, cache)
        # A repetition penalty changes pieces that may be chosen all the same; the score is the model's own.
        scores = steer(logits if decoding.repetition_penalty == 1 else logits.clone(), ids, may, decoding, eos)
        piece = draw(scores, decoding, generators) if decoding.do_sample else scores.argmax(-1)  # (R,)
        total = total + logits.gather(1, piece[:, None])[:, 0] - lse
        ids = torch.cat([ids, piece[:, None]], dim=1)  # (R, 1 + length)
        if on_token is not None and piece[0] != eos:
            on_token(ids[0, 1:].tolist())
        done = (piece == eos) | (length == decoding.max_new_tokens)
        for r in done.nonzero()[:, 0].tolist():
            out[samples[r]] = [hypothesis(ids[r, 1:].tolist(), total[r].item(), decoding, eos)]
        if done.all():
            break
        if done.any():
            kept = (~done).nonzero()[:, 0]
            samples, generators = zip(*((samples[r], generators[r]) for r in kept.tolist()))
            ids, total, memory, mask, may = (t[kept] for t in (ids, total, memory, mask, may))
            cache.reorder(kept)
    return out


def beam_search(mt5, memory, mask, may, decoding):
    """Keep `num_beams` = W beginnings a sample; arguments and result as in `generate`. Finished samples leave the batch.

    A step looks at the best 2W continuations of a sample: at most W of them end, so at least W can go on. Those that end
    are taken only if among the best W. A sample is finished when it has W ended texts and (unless `early_stopping`, when
    that is enough) the best open one, taken as if it ended here, would not beat the worst of them. That is a heuristic:
    with a length penalty above 0 the open text might still get better. It is the rule of transformers.

    The encoder's output, and the keys and values made of it, are there once a sample: its beams are queries side by side.
    """
    eos, V, W = mt5.cfg.eos, mt5.cfg.vocab, decoding.num_beams
    if 2 * W > V:
        raise ValueError(f"num_beams is {W}: it is at most half of the model's {V} pieces")
    pools = [[] for _ in memory]  # each sample's ended texts, best first, at most W
    samples = list(range(len(memory)))  # the ones that go on; below, A of them
    ids = torch.full((len(memory), 1), mt5.cfg.pad, device=memory.device)
    total = torch.zeros(len(memory), 1, device=memory.device)  # log-probability of each beginning, (A, 1), then (A, W)
    cache = KVCache(len(mt5.decoder.blocks))
    for length in range(1, decoding.max_new_tokens + 1):
        # In the first step a sample has one row, the start token; from the second on W, in one block.
        logits, lse = next_logits(mt5, ids, memory, mask, cache)  # (A*W, V), (A*W,)
        scores, pieces = best_pieces(steer(logits.sub_(lse[:, None]), ids, may, decoding, eos), 2 * W)  # (A*W, 2W)
        scores = (
            scores.view(*total.shape, 2 * W) + total[:, :, None]
        )  # (A, W, 2W): more than the best 2W of a row cannot matter
        best, index = scores.flatten(1).topk(2 * W)  # (A, 2W), best first
        block = torch.arange(len(samples), device=index.device)[:, None] * total.shape[1]  # (A, 1), where it starts
        row = block + index // (2 * W)  # (A, 2W): which beginning goes on,
        piece = pieces.view(len(samples), -1).gather(1, index)  # and with what
        ends = (piece == eos) | (length == decoding.max_new_tokens)  # (A, 2W)
        # A score of -inf means "there is none": with few pieces allowed there may be less than 2W continuations.
        for a, c in (ends[:, :W] & (best[:, :W] > -inf)).nonzero().tolist():
            written = ids[row[a, c], 1:].tolist() + [piece[a, c].item()]
            pools[samples[a]].append(hypothesis(written, best[a, c].item(), decoding, eos))
        total, choice = best.masked_fill(ends, -inf).topk(W)  # (A, W), the best that go on
        going = []
        for a, hope in enumerate((total[:, 0] / length**decoding.length_penalty).tolist()):
            pool = pools[samples[a]]
            pool.sort(key=lambda h: h.score, reverse=True)
            del pool[W:]
            if hope > -inf and (len(pool) < W or (hope > pool[-1].score and not decoding.early_stopping)):
                going.append(a)
        if not going:
            break

        kept = torch.tensor(going, device=memory.device)
        rows = row.gather(1, choice)[kept].flatten()  # (A*W,), A from here on without the finished samples
        ids = torch.cat([ids[rows], piece.gather(1, choice)[kept].flatten()[:, None]], dim=1)  # (A*W, 1 + length)
        total, leaving = total[kept], len(going) < len(samples)
        cache.reorder(rows, memory=kept if leaving else False)
        if leaving:
            samples, may, memory, mask = [samples[a] for a in going], may[kept], memory[kept], mask[kept]
    return [pool[: decoding.num_return] for pool in pools]
