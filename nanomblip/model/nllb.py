"""The translator: NLLB-200 (NLLB team 2022, arXiv 2207.04672), which wrote mBLIP's training texts in 95 languages.

The encoder-decoder of Vaswani et al. 2017, with its norms moved to the front of each sub-layer, as in M2M-100 (Fan et
al. 2020, arXiv 2010.11125):

    x_0 = sqrt(D) E[ids] + P[positions]              E (V, D) embedding, P sinusoids
    x   = x + Attn(norm(x))                          decoder: then x + CrossAttn(norm(x), memory)
    x   = x + W_2 relu(W_1 norm(x))
    logits = E norm(x)                               the head is the embedding itself

Where a reader who comes from mt5.py trips:

- Attention is divided by sqrt(K), norms are LayerNorms, and every linear layer but the head has a bias.
- Positions are absolute and not learned. Padding has none: the first real token is at position 2, wherever it stands.
- The embedding is scaled by sqrt(D) where it is read, and not where it is the head.
- Both languages are tokens. The source is `[source] tokens </s>`. The decoder starts with `</s>`, must then write
  `[target]`, and ends with `</s>`.
- There is no dropout: this model is never trained here.
"""

from dataclasses import dataclass
from math import log

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanomblip.model.attention import KVCache, additive_bias, attend
from nanomblip.model.generate import Decoding, eval_mode, write


@dataclass(frozen=True)
class NLLBConfig:
    """Sizes of the translator; the defaults are distilled-1.3B, mBLIP's choice (1,370,638,336 parameters)."""

    vocab: int = 256206  # V; 256,001 tokens of text, 202 languages, 3 rows more
    width: int = 1024  # D
    heads: int = 16  # in the encoder; H * K = D
    decoder_heads: int = 16
    mlp: int = 8192  # in the encoder
    decoder_mlp: int = 8192
    layers: int = 24  # in the encoder
    decoder_layers: int = 24
    pad: int = 1
    eos: int = 2
    start: int = 2  # the decoder's first token: eos

    def __post_init__(self):
        for heads in (self.heads, self.decoder_heads):
            if heads < 1 or self.width % heads:
                raise ValueError(f"a width of {self.width} cannot be divided among {heads} heads")
        if self.width < 4 or self.width % 2:
            raise ValueError(f"a width of {self.width}: sines and cosines want an even one of at least 4")
        if not max(self.pad, self.eos, self.start) < self.vocab:
            raise ValueError(f"pad {self.pad}, eos {self.eos}, start {self.start}: not all below vocab, {self.vocab}")


NLLB_PRESETS = {
    "nllb-200-distilled-600M": NLLBConfig(mlp=4096, decoder_mlp=4096, layers=12, decoder_layers=12),  # 615,073,792
    "nllb-200-distilled-1.3B": NLLBConfig(),
    "nllb-200-1.3B": NLLBConfig(),  # the same sizes, other weights
    "nllb-200-3.3B": NLLBConfig(width=2048),  # 3,344,863,232
}


def sinusoids(positions, width: int):
    """The vectors P of positions: long (B, S) -> float (B, S, D).

    Vaswani et al. 2017, section 3.5, as in the code of tensor2tensor: all sines, then all cosines (not in turns), and
    wave lengths from 2 pi to exactly 10000 * 2 pi:

        P[p, j] = sin(w_j p)    P[p, D/2 + j] = cos(w_j p)    w_j = 10000 ** (-j / (D/2 - 1))    j = 0 .. D/2 - 1
    """
    half = width // 2
    w = torch.exp(torch.arange(half, device=positions.device).float() * -(log(10000) / (half - 1)))  # (D/2,)
    angle = positions[..., None].float() * w  # (B, S, D/2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class NLLBAttention(nn.Module):
    """Attention as in mt5.py, with biases and scaled by 1/sqrt(K). Keys and values come in ready-made."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, M, D) -> (B, H, M, K)

    def keys_values(self, x):
        """Keys and values of x (B, M, D): two tensors (B, H, M, K)."""
        return self.split(self.k(x)), self.split(self.v(x))

    def forward(self, x, kv, bias):
        """x: (B, N, D); kv: keys and values, each (B, H, M, K); bias: float, broadcastable to (B, H, N, M)."""
        x = attend(self.split(self.q(x)), *kv, bias=bias)  # (B, H, N, K)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, N, D)


class NLLBMLP(nn.Module):
    """fc2(relu(fc1(x)))."""

    def __init__(self, width: int, mlp: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))  # (B, *, F) inside


class NLLBEncoderBlock(nn.Module):
    """x + Attn(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, cfg: NLLBConfig):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(cfg.width), NLLBAttention(cfg.width, cfg.heads)
        self.norm2, self.mlp = nn.LayerNorm(cfg.width), NLLBMLP(cfg.width, cfg.mlp)

    def forward(self, x, bias):
        h = self.norm1(x)
        x = x + self.attn(h, self.attn.keys_values(h), bias)
        return x + self.mlp(self.norm2(x))


class NLLBDecoderBlock(nn.Module):
    """Causal self-attention, cross-attention to the encoder's output, feed-forward."""

    def __init__(self, cfg: NLLBConfig, index: int):
        super().__init__()
        self.index = index  # its place in the KVCache
        self.norm1, self.attn = nn.LayerNorm(cfg.width), NLLBAttention(cfg.width, cfg.decoder_heads)
        self.norm_cross, self.cross_attn = nn.LayerNorm(cfg.width), NLLBAttention(cfg.width, cfg.decoder_heads)
        self.norm2, self.mlp = nn.LayerNorm(cfg.width), NLLBMLP(cfg.width, cfg.decoder_mlp)

    def forward(self, x, bias, memory, memory_bias, cache: KVCache | None = None):
        h = self.norm1(x)
        kv = self.attn.keys_values(h)
        if cache is not None:
            kv = cache.extend(self.index, *kv)
        x = x + self.attn(h, kv, bias)
        kv = None if cache is None else cache.memory[self.index]
        if kv is None:
            kv = self.cross_attn.keys_values(memory)
        if cache is not None:
            cache.memory[self.index] = kv
        # Beams that share a row of the memory become queries side by side: (B*W, T, D) -> (B, W*T, D).
        h = self.norm_cross(x).reshape(len(kv[0]), -1, x.shape[-1])
        x = x + self.cross_attn(h, kv, memory_bias).view_as(x)
        return x + self.mlp(self.norm2(x))


class NLLBEncoder(nn.Module):
    """forward: x float (B, S, D), mask bool (B, S), True = a real token -> (B, S, D)."""

    def __init__(self, cfg: NLLBConfig):
        super().__init__()
        self.blocks = nn.ModuleList([NLLBEncoderBlock(cfg) for _ in range(cfg.layers)])
        self.norm = nn.LayerNorm(cfg.width)

    def forward(self, x, mask):
        bias = additive_bias(mask[:, None, None, :], None, x.dtype)  # (B, 1, 1, S), once for all layers
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)


class NLLBDecoder(nn.Module):
    """forward: x float (B, T, D), memory (B, S, D) from the encoder, memory_mask bool (B, S) -> (B, T, D).

    With a `cache`, x holds only the new tokens: T of them after the len(cache) that went before. x may then have W
    rows, one after the other, for each row of the memory: (B*W, T, D).
    """

    def __init__(self, cfg: NLLBConfig):
        super().__init__()
        self.blocks = nn.ModuleList([NLLBDecoderBlock(cfg, i) for i in range(cfg.decoder_layers)])
        self.norm = nn.LayerNorm(cfg.width)

    def forward(self, x, memory, memory_mask, cache: KVCache | None = None):
        T = x.shape[1]
        M = T if cache is None else len(cache) + T
        causal = torch.ones(T, M, dtype=torch.bool, device=x.device).tril(M - T)  # (T, M), True up to oneself
        bias = additive_bias(causal, None, x.dtype)
        memory_bias = additive_bias(memory_mask[:, None, None, :], None, x.dtype)  # (B, 1, 1, S)
        for block in self.blocks:
            x = block(x, bias, memory, memory_bias, cache)
        return self.norm(x)


class NLLB(nn.Module):
    """Encoder, decoder, and one matrix that is the embedding of both and the output head.

    The type of the norms is that of all activations. forward: source (B, S), decoder ids (B, T) -> logits (B, T, V).
    """

    def __init__(self, cfg: NLLBConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab, cfg.width, _weight=torch.empty(cfg.vocab, cfg.width))  # as in mt5.py
        self.encoder = NLLBEncoder(cfg)
        self.decoder = NLLBDecoder(cfg)
        self.lm_head = nn.Linear(cfg.width, cfg.vocab, bias=False)  # a layer of its own, so that it can be int8
        self.tie()

    def tie(self):
        """Make the head's weight the embedding's: one parameter, not two alike."""
        self.lm_head.weight = self.embed.weight

    def embed_tokens(self, ids, past: int = 0):
        """ids long (B, S), after `past` tokens -> float (B, S, D). Padding counts for no position and has no P."""
        real = ids != self.cfg.pad
        positions = self.cfg.pad + past + real.cumsum(1)  # (B, S), from 2
        x = self.embed(ids).to(self.decoder.norm.weight.dtype) * self.cfg.width**0.5
        return x + (sinusoids(positions, self.cfg.width) * real[..., None]).to(x.dtype)

    def encode(self, source):
        """source long (B, S), padded anywhere -> memory (B, S, D) and its mask, bool (B, S), True = a real token."""
        mask = source != self.cfg.pad
        return self.encoder(self.embed_tokens(source), mask), mask

    def decode(self, ids, memory, memory_mask, cache: KVCache | None = None, last=False):
        """ids long (B, T), memory (B, S, D), memory_mask bool (B, S) -> logits (B, T, V), or the last, (B, 1, V)."""
        x = self.embed_tokens(ids, 0 if cache is None else len(cache))
        x = self.decoder(x, memory, memory_mask, cache)  # (B, T, D)
        return self.lm_head(x[:, -1:] if last else x)

    def forward(self, source, ids):
        return self.decode(ids, *self.encode(source))


@torch.no_grad()
def translate_tokens(model: NLLB, source, target, decoding=Decoding(max_new_tokens=199), *, vocab=None, **kwargs):
    """Translate source, long (B, S), each row with its language and eos, into the languages target, long (B,).

    vocab: tokens of text, so that no language's token is written after the first. Padding never is. Returns, and takes
    in `kwargs`, what `write` does.
    """
    assert target.shape == source.shape[:1], f"{len(source)} sources, {tuple(target.shape)} target languages"
    cfg = model.cfg
    start = torch.stack([torch.full_like(target, cfg.start), target], dim=1)  # (B, 2)
    allowed = torch.arange(cfg.vocab, device=source.device) != cfg.pad
    with eval_mode(model):
        return write(model, *model.encode(source), start, decoding, allowed=allowed, vocab=vocab, **kwargs)
