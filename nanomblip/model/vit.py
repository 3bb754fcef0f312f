"""The image encoder: EVA-CLIP's ViT-g/14 as BLIP-2 uses it (Fang et al. 2022, arXiv 2211.07636; Li et al. 2023,
2301.12597).

A plain pre-LayerNorm Vision Transformer (Dosovitskiy et al. 2021). It stays frozen in mBLIP. What is particular:

- BLIP-2 drops the last of EVA's 40 blocks, since the 39th speaks better about the whole picture, and keeps all
  257 output vectors (256 patches and the class token): the Q-Former chooses what to read.
- q, k, v come out of one linear layer. EVA gives k no bias, because adding the same vector to every key shifts all
  scores of a query alike and softmax does not see it; the official files store zeros in its place.
- eps of the norms is part of the checkpoint's config: 1e-6 is EVA's own, early transformers ran with 1e-5.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanomblip.model.attention import attend


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of the ViT; the defaults are ViT-g/14 of BLIP-2 (985,952,256 parameters)."""

    image_size: int = 224  # pixels, square
    patch_size: int = 14  # pixels, square
    width: int = 1408  # Dv
    layers: int = 39
    heads: int = 16
    mlp: int = 6144
    eps: float = 1e-6

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"ViT width {self.width} is not a multiple of its {self.heads} heads")

    @property
    def tokens(self) -> int:
        """N: one vector a patch, and the class token in front."""
        return (self.image_size // self.patch_size) ** 2 + 1


class ViTAttention(nn.Module):
    """Self-attention with one fused projection to q, k and v."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.heads = cfg.heads
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x)  # (B, N, 3*Dv): all of q, then all of k, then all of v
        q, k, v = qkv.view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, K)
        x = attend(q, k, v)  # (B, H, N, K)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))  # (B, N, Dv)


class ViTMLP(nn.Module):
    """Two linear layers with an exact (erf) GELU between them."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(cfg.width, cfg.mlp)
        self.fc2 = nn.Linear(cfg.mlp, cfg.width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # (B, N, Dv) -> (B, N, F) -> (B, N, Dv)


class ViTBlock(nn.Module):
    """Pre-LayerNorm block: x + Attn(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.attn = ViTAttention(cfg)
        self.norm2 = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.mlp = ViTMLP(cfg)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A picture as N vectors.

    forward: image float (B, 3, image_size, image_size), normalised as image.py does -> (B, N, Dv).
    """

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg = cfg
        # A convolution whose stride is its kernel cuts the picture into patches and maps each to a vector.
        self.patch_embed = nn.Conv2d(3, cfg.width, kernel_size=cfg.patch_size, stride=cfg.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.tokens, cfg.width))
        self.blocks = nn.ModuleList([ViTBlock(cfg) for _ in range(cfg.layers)])
        self.norm = nn.LayerNorm(cfg.width, eps=cfg.eps)

    def init_weights(self):
        """Draw fresh weights (the official ones are loaded instead): matrices with standard deviation 1/sqrt(inputs).

        The usual fixed 0.02 suits a width of 768 or more. At nano's 192, with BERT's LayerNorms behind it, only 0.04 %
        of the variance of what reaches the language model came from the picture; drawn like this, 7 %.
        """
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.LayerNorm):
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.normal_(self.cls_token, std=0.5)
        nn.init.normal_(self.pos_embed, std=0.5)

    def forward(self, image):
        B, C, height, width = image.shape
        size = self.cfg.image_size
        assert (C, height, width) == (3, size, size), f"image is {C}x{height}x{width}, the ViT wants 3x{size}x{size}"
        x = self.patch_embed(image.to(self.patch_embed.weight.dtype))  # (B, Dv, size/patch, size/patch)
        x = x.flatten(2).transpose(1, 2)  # (B, N-1, Dv), patches row by row
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1) + self.pos_embed  # (B, N, Dv)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
