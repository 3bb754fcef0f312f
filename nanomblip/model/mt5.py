"""The language model: mT5 (Xue et al. 2021, arXiv 2010.11934), the encoder-decoder under mT0 (Muennighoff et al. 2022).

It stays frozen in mBLIP (in int8, with LoRA beside it). Where a reader who knows other transformers trips:

- Attention is *not* divided by sqrt(K): T5 folded that factor into the initialisation, and the weights rely on it.
- No absolute positions. Each stack has one table of (buckets, heads) numbers that is added to the scores by distance
  key - query; it lives in layer 0 of the official files and serves all layers. Cross-attention has none.
- The encoder's buckets are two-sided (half for the past, half for the future); the decoder's are all for the past.
- RMSNorm (no mean, no bias), before each sub-layer and once more at the end of each stack. No biases anywhere.
- Gated feed-forward (Shazeer 2020): wo(gelu(wi_0 x) * wi_1 x), tanh-approximated GELU in mT5, erf in BLIP-2's flan-t5.
- `lm_head` is not the embedding (mT5 is untied) and the decoder's output is not rescaled before it (T5's tied models
  do).
- H * K need not equal D: mT5-small has 6 heads of 64 and a width of 512.
- fp16 overflows in `wo`: run in bf16 or fp32.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import log

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanomblip.model.attention import KVCache, additive_bias, attend


@dataclass(frozen=True)
class MT5Config:
    """Sizes of the language model; the defaults are mT5-XL = mT0-XL (3,742,619,648 parameters)."""

    vocab: int = 250112  # V; the tokenizer has 250,100 tokens, the matrix a few rows more
    width: int = 2048  # D
    heads: int = 32
    head_width: int = 64  # K
    mlp: int = 5120
    layers: int = 24  # in the encoder
    decoder_layers: int = 24
    buckets: int = 32  # of the relative position bias
    max_distance: int = 128  # from here on all distances share the last bucket
    dropout: float = 0.1
    eps: float = 1e-6
    gelu: str = "tanh"  # "tanh" (mT5, "gelu_new") or "none" (exact erf; BLIP-2's flan-t5)
    pad: int = 0  # also the decoder's start token
    eos: int = 1

    def __post_init__(self):
        if self.gelu not in ("tanh", "none"):
            raise ValueError(f"gelu is 'tanh' or 'none', not {self.gelu!r}")
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"{self.buckets} position buckets up to distance {self.max_distance}: "
                "at least 4 buckets, and the distance must pass the exact half of them"
            )


class MT5Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight, computed in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x32 * self.weight.float()).to(x.dtype)


def relative_bucket(distance, buckets: int, max_distance: int, two_sided: bool):
    """Sort distances (key position - query position, long, any shape) into `buckets` classes (T5, section 2.1).

    Half of a side's buckets hold one distance each, the other half grow logarithmically up to `max_distance`; what is
    further shares the last. Two-sided: the upper half of the buckets is for keys after the query.
    """
    bucket = torch.zeros_like(distance)
    if two_sided:
        buckets //= 2
        bucket = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)  # a key after the query (hidden anyway) counts as distance 0
    exact = buckets // 2
    far = (
        exact
        + (torch.log(distance.clamp(min=1).float() / exact) / log(max_distance / exact) * (buckets - exact)).long()
    )
    return bucket + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


@lru_cache(maxsize=256)
def _bucket_table(queries: int, keys: int, buckets: int, max_distance: int, two_sided: bool, device: torch.device):
    """Buckets of the last `queries` of `keys` positions against all of them: long (N, M)."""
    with torch.inference_mode(False):  # it outlives this call, and autograd refuses tensors born in inference mode
        position = torch.arange(keys, device=device)
        return relative_bucket(position[None, :] - position[keys - queries :, None], buckets, max_distance, two_sided)


class MT5Bias(nn.Module):
    """The relative position bias of one stack: a learned number for each (bucket, head)."""

    def __init__(self, cfg: MT5Config, two_sided: bool):
        super().__init__()
        self.buckets, self.max_distance, self.two_sided = cfg.buckets, cfg.max_distance, two_sided
        self.weight = nn.Parameter(torch.zeros(cfg.buckets, cfg.heads))

    def forward(self, queries: int, keys: int):
        """The bias of the last `queries` of `keys` positions: float (1, H, N, M)."""
        table = _bucket_table(queries, keys, self.buckets, self.max_distance, self.two_sided, self.weight.device)
        return F.embedding(table, self.weight).permute(2, 0, 1)[None]  # (N, M, H) -> (1, H, N, M)


class MT5Attention(nn.Module):
    """Unscaled attention without biases. Keys and values come in ready-made, from `keys_values` or from a cache."""

    def __init__(self, cfg: MT5Config):
        super().__init__()
        self.heads, self.head_width, self.dropout = cfg.heads, cfg.head_width, cfg.dropout
        inner = cfg.heads * cfg.head_width
        self.q = nn.Linear(cfg.width, inner, bias=False)
        self.k = nn.Linear(cfg.width, inner, bias=False)
        self.v = nn.Linear(cfg.width, inner, bias=False)
        self.o = nn.Linear(inner, cfg.width, bias=False)

    def split(self, x):
        return x.view(x.shape[0], -1, self.heads, self.head_width).transpose(1, 2)  # (B, M, H*K) -> (B, H, M, K)

    def keys_values(self, x):
        """Keys and values of x (B, M, D): two tensors (B, H, M, K)."""
        return self.split(self.k(x)), self.split(self.v(x))

    def forward(self, x, kv, bias):
        """x: (B, N, D); kv: keys and values, each (B, H, M, K); bias: float, broadcastable to (B, H, N, M), or None."""
        B, N, _ = x.shape
        x = attend(self.split(self.q(x)), *kv, bias=bias, scale=1.0, dropout=self.dropout if self.training else 0.0)
        return self.o(x.transpose(1, 2).reshape(B, N, -1))  # (B, H, N, K) -> (B, N, H*K) -> (B, N, D)


class MT5MLP(nn.Module):
    """Gated GELU: wo(gelu(wi_0 x) * wi_1 x)."""

    def __init__(self, cfg: MT5Config):
        super().__init__()
        self.wi_0 = nn.Linear(cfg.width, cfg.mlp, bias=False)
        self.wi_1 = nn.Linear(cfg.width, cfg.mlp, bias=False)
        self.wo = nn.Linear(cfg.mlp, cfg.width, bias=False)
        self.gelu, self.dropout = cfg.gelu, nn.Dropout(cfg.dropout)

    def forward(self, x):
        return self.wo(self.dropout(F.gelu(self.wi_0(x), approximate=self.gelu) * self.wi_1(x)))  # (B, *, F) inside


class MT5EncoderBlock(nn.Module):
    """x + Attn(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, cfg: MT5Config):
        super().__init__()
        self.norm1, self.attn = MT5Norm(cfg.width, cfg.eps), MT5Attention(cfg)
        self.norm2, self.mlp = MT5Norm(cfg.width, cfg.eps), MT5MLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, bias):
        h = self.norm1(x)
        x = x + self.dropout(self.attn(h, self.attn.keys_values(h), bias))
        return x + self.dropout(self.mlp(self.norm2(x)))


class MT5DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention to the encoder's output, feed-forward."""

    def __init__(self, cfg: MT5Config, index: int):
        super().__init__()
        self.index = index  # its place in the KVCache
        self.norm1, self.attn = MT5Norm(cfg.width, cfg.eps), MT5Attention(cfg)
        self.norm_cross, self.cross_attn = MT5Norm(cfg.width, cfg.eps), MT5Attention(cfg)
        self.norm2, self.mlp = MT5Norm(cfg.width, cfg.eps), MT5MLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, bias, memory, memory_bias, cache: KVCache | None = None):
        h = self.norm1(x)
        kv = self.attn.keys_values(h)
        if cache is not None:
            kv = cache.extend(self.index, *kv)
        x = x + self.dropout(self.attn(h, kv, bias))
        if cache is None:
            kv = self.cross_attn.keys_values(memory)
        else:
            if cache.memory[self.index] is None:
                cache.memory[self.index] = self.cross_attn.keys_values(memory)
            kv = cache.memory[self.index]
        h = self.norm_cross(x).reshape(
            len(kv[0]), -1, x.shape[-1]
        )  # rows that share a memory become queries side by side
        x = x + self.dropout(self.cross_attn(h, kv, memory_bias)).view_as(x)
        return x + self.dropout(self.mlp(self.norm2(x)))


class MT5Encoder(nn.Module):
    """forward: x float (B, L, D), mask bool (B, L), True = a real position -> (B, L, D)."""

    def __init__(self, cfg: MT5Config):
        super().__init__()
        self.bias = MT5Bias(cfg, two_sided=True)
        self.blocks = nn.ModuleList([MT5EncoderBlock(cfg) for _ in range(cfg.layers)])
        self.norm, self.dropout = MT5Norm(cfg.width, cfg.eps), nn.Dropout(cfg.dropout)

    def forward(self, x, mask):
        L = x.shape[1]
        bias = additive_bias(mask[:, None, None, :], self.bias(L, L), x.dtype)  # (B, H, L, L), once for all layers
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, bias)
        return self.dropout(self.norm(x))


class MT5Decoder(nn.Module):
    """forward: x float (B, T, D) embedded tokens, memory (B, L, D) from the encoder, memory_mask bool (B, L) -> (B, T,
    D).

    With a `cache`, x holds only the new tokens: T of them after the len(cache) that went before. x may then have W
    rows, one after the other, for each row of the memory: (B*W, T, D).
    """

    def __init__(self, cfg: MT5Config):
        super().__init__()
        self.bias = MT5Bias(cfg, two_sided=False)
        self.blocks = nn.ModuleList([MT5DecoderBlock(cfg, i) for i in range(cfg.decoder_layers)])
        self.norm, self.dropout = MT5Norm(cfg.width, cfg.eps), nn.Dropout(cfg.dropout)

    def forward(self, x, memory, memory_mask, cache: KVCache | None = None):
        T = x.shape[1]
        M = T if cache is None else len(cache) + T
        causal = torch.ones(T, M, dtype=torch.bool, device=x.device).tril(M - T)  # (T, M), True up to oneself
        bias = additive_bias(causal, self.bias(T, M), x.dtype)  # (1, H, T, M)
        memory_bias = additive_bias(memory_mask[:, None, None, :], None, x.dtype)  # (B, 1, 1, L)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, bias, memory, memory_bias, cache)
        return self.dropout(self.norm(x))


class MT5(nn.Module):
    """Encoder, decoder, one shared embedding and a separate output head.

    `encode` takes *embeddings*, because mBLIP puts projected picture vectors in front of the embedded prompt; `decode`
    takes token ids. The type of the norms is that of all activations, also when the embedding is held in bf16 to save
    memory. forward: prompt ids (B, S), mask bool (B, S), decoder ids (B, T) -> logits (B, T, V).
    """

    def __init__(self, cfg: MT5Config):
        super().__init__()
        self.cfg = cfg
        # Given undrawn: to draw on the meta device, torch imports its compiler, which takes longer than all else.
        self.embed = nn.Embedding(cfg.vocab, cfg.width, _weight=torch.empty(cfg.vocab, cfg.width))
        self.encoder = MT5Encoder(cfg)
        self.decoder = MT5Decoder(cfg)
        self.lm_head = nn.Linear(cfg.width, cfg.vocab, bias=False)

    def init_weights(self):
        """Draw fresh weights as Mesh TensorFlow does for T5: attention without 1/sqrt(K) starts well with these."""
        cfg = self.cfg
        for m in self.modules():
            if isinstance(m, MT5Norm):
                nn.init.ones_(m.weight)
            elif isinstance(m, MT5Bias):
                nn.init.normal_(m.weight, std=cfg.width**-0.5)
            elif isinstance(m, MT5Attention):
                nn.init.normal_(m.q.weight, std=(cfg.width * cfg.head_width) ** -0.5)  # here is the missing 1/sqrt(K)
                nn.init.normal_(m.k.weight, std=cfg.width**-0.5)
                nn.init.normal_(m.v.weight, std=cfg.width**-0.5)
                nn.init.normal_(m.o.weight, std=(cfg.heads * cfg.head_width) ** -0.5)
            elif isinstance(m, MT5MLP):
                nn.init.normal_(m.wi_0.weight, std=cfg.width**-0.5)
                nn.init.normal_(m.wi_1.weight, std=cfg.width**-0.5)
                nn.init.normal_(m.wo.weight, std=cfg.mlp**-0.5)
        nn.init.normal_(self.embed.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=cfg.width**-0.5)

    def embed_tokens(self, ids):
        """ids long (B, S) -> float (B, S, D), in the type of the activations."""
        return self.embed(ids).to(self.decoder.norm.weight.dtype)

    def encode(self, embedded, mask):
        """embedded float (B, L, D), mask bool (B, L) -> memory (B, L, D)."""
        return self.encoder(embedded, mask)

    def decode(self, ids, memory, memory_mask, cache: KVCache | None = None, last=False):
        """ids long (B, T), memory (B, L, D), memory_mask bool (B, L) -> logits (B, T, V), or the last, (B, 1, V)."""
        x = self.decoder(self.embed_tokens(ids), memory, memory_mask, cache)  # (B, T, D)
        return self.lm_head(x[:, -1:] if last else x)

    def shift_right(self, labels):
        """The decoder's input for labels long (B, T), -100 = no loss: the start token, then each label but the last."""
        ids = labels.masked_fill(labels == -100, self.cfg.pad)
        return F.pad(ids[:, :-1], (1, 0), value=self.cfg.pad)  # (B, T)

    def forward(self, prompt, mask, ids):
        return self.decode(ids, self.encode(self.embed_tokens(prompt), mask), mask)
