"""From pictures and a prompt to text: greedy, beam search, nucleus sampling; batched, and cached in the KVCache.

`generate` is for mBLIP; `write` is for any encoder-decoder whose encoder has run, such as the translator of nllb.py.
What it asks of one are `cfg.vocab`, `cfg.eos`, `decoder.blocks` and `decode`.

All of them write one token after another. What the model says about the next token is first *steered* (repetition
penalty, minimum length, tokens that may not be written), then a token is chosen:

- greedy takes the most probable one;
- sampling draws one from softmax(logits / temperature), cut to the `top_k` most probable tokens and then to the
  nucleus, the fewest of them that hold `top_p` of the probability (Holtzman et al. 2020, arXiv 1904.09751);
- beam search keeps the `num_beams` most probable beginnings of every sample and returns the ended texts with the best

      score = sum of log-probabilities / length ** length_penalty        length: tokens written, eos included

  A length penalty above 0 favours long texts, below 0 short ones: log-probabilities are negative.

Greedy and beam search give the same tokens as `generate` of transformers 5.x, and beams the same scores.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanomblip.model.attention import KVCache
from nanomblip.model.mblip import MBLIP


@dataclass(frozen=True)
class Decoding:
    """How to choose the tokens. Raises ValueError naming the flag that makes no sense."""

    num_beams: int = 1  # 1: greedy, or sampling
    min_new_tokens: int = 0  # tokens before eos may come
    max_new_tokens: int = 32  # eos included, and the language token of a translation
    length_penalty: float = 1.0
    early_stopping: bool = False  # True: num_beams ended texts are enough; False: go on while a better one may come
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
            raise ValueError(f"min_new_tokens is {self.min_new_tokens}, above max_new_tokens, {self.max_new_tokens}")
        if self.num_return > self.num_beams:
            raise ValueError(f"num_return is {self.num_return}: no more than num_beams, {self.num_beams}")
        if not -10 <= self.length_penalty <= 10:  # comparisons are written so that nan fails
            raise ValueError(f"length_penalty is {self.length_penalty}: it lies between -10 and 10")
        if self.early_stopping not in (False, True):
            raise ValueError(f"early_stopping is {self.early_stopping!r}: only False and True are implemented")
        if not 1e-4 <= self.temperature < inf:
            raise ValueError(f"temperature is {self.temperature}: at least 0.0001 (for greedy leave do_sample off)")
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
def generate(model: MBLIP, image, prompt, prompt_mask=None, decoding=Decoding(), *, features=None, **kwargs):
    """Write a text for each picture and prompt; returns, and takes in `kwargs`, what `write` does.

    image: float (B, I, 3, size, size), or None when `features` (B, I, N, Dv) are given; prompt: long (B, S), padded
    where samples differ in length; prompt_mask: bool (B, S), True = a real token, by default all but the pad id.
    """
    given = image if features is None else features
    assert len(given) == len(prompt), f"{len(prompt)} prompts, {len(given)} samples with pictures"
    with eval_mode(model):
        features = model.image_features(image) if features is None else features
        memory, mask = model.encode(model.image_tokens(features), prompt, prompt_mask)  # (B, L, D), (B, L)
        start = prompt.new_full((len(prompt), 1), model.cfg.mt5.pad)  # mT5's decoder starts with pad
        return write(model.mt5, memory, mask, start, decoding, **kwargs)


@torch.no_grad()
def write(lm, memory, mask, start, decoding=Decoding(), *, allowed=None, vocab=None, seeds=None, on_token=None):
    """Write on from `start` for each sample: a list of B lists of up to `num_return` hypotheses, best first.

    lm: MT5 or NLLB; memory: float (B, L, D) and mask: bool (B, L), from its encoder; start: long (B, P), the decoder's
    first tokens. Those after the first count as written, with probability 1, but are left out of the result.
    vocab: tokens of the tokenizer; the matrix has rows beyond, which are then never written.
    allowed: bool (V,) or (B, V), or narrower; only tokens that are True are written, and eos.
    seeds: for sampling, one int a sample, `decoding.seed` for each by default. Each sample has its own generator: what
    is drawn for it depends neither on the others nor on its place among them.
    on_token: without beams and for one sample, called after each token with the list of ids so far.

    A score is the model's own log-probability, except in beam search with a repetition penalty, where it sums the
    penalised ones. Raises ValueError for arguments that contradict each other, or when an output is not finite.
    """
    B, V, eos = len(memory), lm.cfg.vocab, lm.cfg.eos
    vocab = V if vocab is None else vocab
    seeds = [decoding.seed] * B if seeds is None else seeds
    assert len(seeds) == len(start) == B, f"{B} samples, {len(start)} to start from, {len(seeds)} seeds"
    if not eos < vocab <= V:
        raise ValueError(f"a tokenizer of {vocab} tokens does not go with a model of {V}")
    if decoding.max_new_tokens < start.shape[1]:
        raise ValueError(f"max_new_tokens is {decoding.max_new_tokens}: it is at least {start.shape[1]} here")
    if on_token is not None and (B > 1 or decoding.num_beams > 1):
        raise ValueError(f"on_token follows one text: 1 sample and num_beams 1, not {B} and {decoding.num_beams}")
    may = torch.arange(V, device=start.device) < vocab  # (V,)
    if allowed is not None:
        assert allowed.shape[-1] <= V, f"allowed is {tuple(allowed.shape)}, the model has {V} tokens"
        may = may & F.pad(allowed, (0, V - allowed.shape[-1]))
    may = may.expand(B, V).clone()  # (B, V)
    may[:, eos] = True
    if may.sum(-1).min() < 2:
        raise ValueError("allowed leaves a sample no token to write")
    found = (beam_search(lm, memory, mask, start, may, decoding) if decoding.num_beams > 1
             else write_one_each(lm, memory, mask, start, may, decoding, seeds, on_token))  # fmt: skip
    return [[h._replace(ids=h.ids[start.shape[1] - 1 :]) for h in row] for row in found]


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


def next_logits(lm, ids, memory, mask, cache):
    """Logits of the token after ids (R, T), of which the cache knows the first: fp32 (R, V); and log sum exp (R,)."""
    logits = lm.decode(ids[:, len(cache) :], memory, mask, cache, last=True)[:, -1].float()  # (R, 1, V) -> (R, V)
    lse = logits.logsumexp(-1)
    if not (lse.isfinite().all() and logits.sum(-1).isfinite().all()):  # the sum sees -inf, which the exponential hides
        raise ValueError("the model's output is not finite: are its weights damaged, or in fp16, which overflows?")
    return logits, lse


def steer(scores, ids, may, decoding, eos):
    """Apply what `decoding` asks of single tokens to scores fp32 (R, V), in place, and return them; -inf = impossible.

    scores: logits or log-probabilities; ids: long (R, T), start included; may: bool (B, V), R is a multiple of B.
    """
    if decoding.repetition_penalty != 1:
        # Seen tokens only, each once; the sign decides which way is down. The start token counts, as in transformers,
        # unless it is eos, as in NLLB, whose texts would then not end.
        seen, penalty = scores.gather(1, ids), decoding.repetition_penalty  # (R, T)
        penalised = torch.where(seen < 0, seen * penalty, seen / penalty)
        scores.scatter_(1, ids, torch.where(ids == eos, seen, penalised))
    scores.unflatten(0, (len(may), -1)).masked_fill_(~may[:, None], -inf)  # by (B, R/B, V)
    if ids.shape[1] - 1 < decoding.min_new_tokens:
        scores[:, eos] = -inf
    return scores


def best_tokens(scores, k):
    """`scores.topk(k)` of fp32 (R, V), eight times as fast over 250,112 tokens."""
    R, V = scores.shape  # the k best lie in the k runs of 64 with the best maxima
    if V % 64 or k * 64 > V:
        return scores.topk(k)
    runs = scores.view(R, -1, 64)  # (R, V/64, 64)
    run = runs.amax(-1).topk(k).indices  # (R, k)
    values, place = runs.gather(1, run[:, :, None].expand(-1, -1, 64)).flatten(1).topk(k)  # (R, k), of k*64
    return values, run.gather(1, place // 64) * 64 + place % 64


def draw(scores, decoding, generators):
    """Sample a token for each row of steered logits (R, V), with one generator a row: long (R,)."""
    scores, tokens = scores.topk(min(decoding.top_k or scores.shape[1], scores.shape[1]))  # best first, (R, k)
    probs = (scores / decoding.temperature).softmax(-1)
    before = probs.cumsum(-1) - probs  # what more probable tokens hold; 0 for the first, which therefore stays
    cdf = probs.masked_fill(before >= decoding.top_p, 0).cumsum(-1)
    u = torch.stack([torch.rand(1, generator=g) for g in generators]).to(cdf)  # (R, 1)
    place = (cdf <= u * cdf[:, -1:]).sum(-1, keepdim=True)  # the first token at which the cdf passes u
    return tokens.gather(1, place)[:, 0]


def hypothesis(written, total, decoding, eos):
    """Make a Hypothesis of the ids after the first (with eos, if it came) and the sum of their log-probabilities."""
    ended = written[-1] == eos
    return Hypothesis(written[:-1] if ended else written, total / len(written) ** decoding.length_penalty, ended)


def write_one_each(lm, memory, mask, start, may, decoding, seeds, on_token):
    """Greedy or sampling; arguments and result as in `write`. Samples that have ended leave the batch."""
    eos, out = lm.cfg.eos, [None] * len(memory)
    samples, ids = list(range(len(memory))), start  # the ones that still write, one row each: below, R of them
    total = torch.zeros(len(memory), device=memory.device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    cache = KVCache(len(lm.decoder.blocks))
    for length in range(start.shape[1], decoding.max_new_tokens + 1):
        logits, lse = next_logits(lm, ids, memory, mask, cache)
        # A repetition penalty changes tokens that may be chosen all the same; the score is the model's own.
        scores = steer(logits if decoding.repetition_penalty == 1 else logits.clone(), ids, may, decoding, eos)
        token = draw(scores, decoding, generators) if decoding.do_sample else scores.argmax(-1)  # (R,)
        total = total + logits.gather(1, token[:, None])[:, 0] - lse
        ids = torch.cat([ids, token[:, None]], dim=1)  # (R, 1 + length)
        if on_token is not None and token[0] != eos:
            on_token(ids[0, start.shape[1] :].tolist())
        done = (token == eos) | (length == decoding.max_new_tokens)
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


def beam_search(lm, memory, mask, start, may, decoding):
    """Keep `num_beams` = W beginnings a sample; arguments and result as in `write`. Finished samples leave the batch.

    A step looks at the best 2W continuations of a sample: at most W of them end, so at least W can go on. Those that
    end are taken only if among the best W. A sample is finished when it has W ended texts and (unless `early_stopping`,
    when that is enough) the best open one, taken as if it ended here, would not beat the worst of them. That is a
    heuristic: with a length penalty above 0 the open text might still get better. It is the rule of transformers.

    The encoder's output, and its keys and values, are there once a sample: its beams are queries side by side.
    """
    eos, V, W = lm.cfg.eos, lm.cfg.vocab, decoding.num_beams
    if 2 * W > V:
        raise ValueError(f"num_beams is {W}: it is at most half of the model's {V} tokens")
    pools = [[] for _ in memory]  # each sample's ended texts, best first, at most W
    samples, ids = list(range(len(memory))), start  # the ones that go on; below, A of them
    total = torch.zeros(len(memory), 1, device=memory.device)  # log-probability of each beginning, (A, 1), then (A, W)
    cache = KVCache(len(lm.decoder.blocks))
    for length in range(start.shape[1], decoding.max_new_tokens + 1):
        # In the first step a sample has one row, its start; from the second on W, in one block.
        logits, lse = next_logits(lm, ids, memory, mask, cache)  # (A*W, V), (A*W,)
        scores, tokens = best_tokens(steer(logits.sub_(lse[:, None]), ids, may, decoding, eos), 2 * W)  # (A*W, 2W)
        # (A, W, 2W): more than the best 2W of a row cannot matter
        scores = scores.view(*total.shape, 2 * W) + total[:, :, None]
        best, index = scores.flatten(1).topk(2 * W)  # (A, 2W), best first
        block = torch.arange(len(samples), device=index.device)[:, None] * total.shape[1]  # (A, 1), where it starts
        row = block + index // (2 * W)  # (A, 2W): which beginning goes on,
        token = tokens.view(len(samples), -1).gather(1, index)  # and with what
        ends = (token == eos) | (length == decoding.max_new_tokens)  # (A, 2W)
        # A score of -inf means "there is none": with few tokens allowed there may be less than 2W continuations.
        for a, c in (ends[:, :W] & (best[:, :W] > -inf)).nonzero().tolist():
            written = ids[row[a, c], 1:].tolist() + [token[a, c].item()]
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
        ids = torch.cat([ids[rows], token.gather(1, choice)[kept].flatten()[:, None]], dim=1)  # (A*W, 1 + length)
        total, leaving = total[kept], len(going) < len(samples)
        cache.reorder(rows, memory=kept if leaving else False)
        if leaving:
            samples, may, memory, mask = [samples[a] for a in going], may[kept], memory[kept], mask[kept]
    return [pool[: decoding.num_return] for pool in pools]
