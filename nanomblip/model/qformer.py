"""The Q-Former (Li et al. 2023, BLIP-2, section 3): a few learned queries that read a picture and come back with a
summary.

A BERT-base (post-LayerNorm) over the queries; every second layer also cross-attends to the ViT's output. Its 32 output
vectors are all that the language model will ever see of the picture, so this is the bottleneck, and the part mBLIP
trains.

- Post-LN: each sub-layer is LN(x + dropout(sublayer(x))), with BERT's eps 1e-12.
- The queries pass through a LayerNorm and dropout first: BERT's embedding norm, although there is no text to embed.
- No positions: the queries are told apart by what they have learned. No mask: each query sees all queries and all
  patches.
"""

from dataclasses import dataclass

import torch.nn as nn
import torch.nn.functional as F

from nanomblip.model.attention import attend


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of the Q-Former; the defaults are BLIP-2's (105,137,664 parameters without the queries)."""

    width: int = 768  # Dq
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    vision_width: int = 1408  # Dv, what the cross-attention reads
    cross_every: int = 2  # cross-attention in layers 0, 2, 4 ...
    dropout: float = 0.1  # after each sub-layer
    attn_dropout: float = 0.1  # on the attention weights
    eps: float = 1e-12

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"Q-Former width {self.width} is not a multiple of its {self.heads} heads")


class QFormerAttention(nn.Module):
    """Multi-head attention of the queries over themselves, or over the picture (`kv_width` = Dv)."""

    def __init__(self, cfg: QFormerConfig, kv_width: int):
        super().__init__()
        self.heads, self.dropout = cfg.heads, cfg.attn_dropout
        self.q = nn.Linear(cfg.width, cfg.width)
        self.k = nn.Linear(kv_width, cfg.width)
        self.v = nn.Linear(kv_width, cfg.width)
        self.out = nn.Linear(cfg.width, cfg.width)

    def forward(self, x, context):
        B, Q, D = x.shape
        split = lambda t: t.view(B, -1, self.heads, D // self.heads).transpose(1, 2)  # (B, *, Dq) -> (B, H, *, K)
        q, k, v = split(self.q(x)), split(self.k(context)), split(self.v(context))
        x = attend(q, k, v, dropout=self.dropout if self.training else 0.0)  # (B, H, Q, K)
        return self.out(x.transpose(1, 2).reshape(B, Q, D))  # (B, Q, Dq)


class QFormerBlock(nn.Module):
    """Self-attention, cross-attention (in every second block), feed-forward, each followed by its LayerNorm."""

    def __init__(self, cfg: QFormerConfig, index: int):
        super().__init__()
        norm = lambda: nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.attn, self.norm1 = QFormerAttention(cfg, cfg.width), norm()
        self.has_cross = index % cfg.cross_every == 0
        if self.has_cross:
            self.cross_attn, self.norm_cross = QFormerAttention(cfg, cfg.vision_width), norm()
        self.fc1, self.fc2, self.norm2 = nn.Linear(cfg.width, cfg.mlp), nn.Linear(cfg.mlp, cfg.width), norm()
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, image):
        x = self.norm1(x + self.dropout(self.attn(x, x)))
        if self.has_cross:
            x = self.norm_cross(x + self.dropout(self.cross_attn(x, image)))
        return self.norm2(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))  # exact (erf) GELU


class QFormer(nn.Module):
    """Queries in, the same number of picture-dependent vectors out.

    forward: queries float (B, Q, Dq), image float (B, N, Dv) from the ViT -> (B, Q, Dq).
    """

    def __init__(self, cfg: QFormerConfig):
        super().__init__()
        self.cfg = cfg
        self.norm = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList([QFormerBlock(cfg, i) for i in range(cfg.layers)])

    def init_weights(self):
        """Draw fresh weights, matrices with standard deviation 1/sqrt(inputs); why not 0.02: `ViT.init_weights`."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=m.in_features**-0.5)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.LayerNorm):
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)

    def forward(self, queries, image):
        dtype = self.blocks[0].fc1.weight.dtype  # the Q-Former is trained, so fp32, even behind a bf16 ViT
        x, image = self.dropout(self.norm(queries.to(dtype))), image.to(dtype)
        for block in self.blocks:
            x = block(x, image)
        return x
