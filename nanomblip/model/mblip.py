"""mBLIP: ViT -> Q-Former -> projection -> mT5, joined (Geigle et al. 2023, arXiv 2307.06930, section 3).

    image  (B, I, 3, 224, 224)
      ViT        -> (B*I, N, Dv)   N = 257, Dv = 1408    frozen
      Q-Former   -> (B*I, Q, Dq)   Q = 32, Dq = 768      trained
      projection -> (B, I*Q, D)    D = 2048              trained
    prompt ids (B, S) -> (B, S, D) -> behind the pictures: (B, L = I*Q + S, D)
      mT5 encoder -> (B, L, D); mT5 decoder (B, T) -> logits (B, T, V)   frozen, int8 + LoRA

The pictures' vectors always come first; to mT5's relative positions they are simply the first I*Q tokens. Nothing here
knows about files, tokenizers or devices.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanomblip.model.mt5 import MT5, MT5Config
from nanomblip.model.qformer import QFormer, QFormerConfig
from nanomblip.model.vit import ViT, ViTConfig

LOGITS, FEWEST = 2**23, 256  # logits that a training step holds at a time, but no fewer than those of 256 tokens


@dataclass(frozen=True)
class MBLIPConfig:
    """Sizes of all parts; the defaults are mBLIP mT0-XL (4,835,309,056 parameters)."""

    vit: ViTConfig = field(default_factory=ViTConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    mt5: MT5Config = field(default_factory=MT5Config)
    queries: int = 32  # Q

    def __post_init__(self):
        if self.qformer.vision_width != self.vit.width:
            raise ValueError(
                f"the Q-Former reads vectors of {self.qformer.vision_width}, the ViT makes {self.vit.width}"
            )


_XL = MT5Config()
PRESETS = {
    # Small enough for ten minutes on two cores: pictures of 64x64, 85 languages, a vocabulary of 8,000 tokens (and 64
    # rows more, as mT5 has 12). No dropout: with 0.1 in the Q-Former
    # fewer validation pictures were named right (weights/LOG.md, "A Q-Former to start from").
    "nano": MBLIPConfig(
        vit=ViTConfig(image_size=64, patch_size=16, width=192, layers=4, heads=6, mlp=768),
        qformer=QFormerConfig(width=192, layers=2, heads=6, mlp=768, vision_width=192, dropout=0.0, attn_dropout=0.0),
        mt5=MT5Config(vocab=8064, width=192, heads=6, head_width=32, mlp=512, layers=3, decoder_layers=3, dropout=0.0),
        queries=8,
    ),
    "mblip-mt0-small": MBLIPConfig(mt5=replace(_XL, width=512, heads=6, mlp=1024, layers=8, decoder_layers=8)),
    "mblip-mt0-base": MBLIPConfig(mt5=replace(_XL, width=768, heads=12, mlp=2048, layers=12, decoder_layers=12)),
    "mblip-mt0-large": MBLIPConfig(mt5=replace(_XL, width=1024, heads=16, mlp=2816)),
    "mblip-mt0-xl": MBLIPConfig(),
    "mblip-mt0-xxl": MBLIPConfig(mt5=replace(_XL, width=4096, heads=64, mlp=10240)),
}


class MBLIP(nn.Module):
    """The whole model: pictures and a prompt in, text out.

    Parts: `vit`, `queries` (1, Q, Dq), `qformer`, `proj` (Dq -> D, with bias), `mt5`.
    """

    def __init__(self, cfg: MBLIPConfig):
        super().__init__()
        self.cfg = cfg
        self.vit = ViT(cfg.vit)
        self.queries = nn.Parameter(torch.zeros(1, cfg.queries, cfg.qformer.width))
        self.qformer = QFormer(cfg.qformer)
        self.proj = nn.Linear(cfg.qformer.width, cfg.mt5.width)
        self.mt5 = MT5(cfg.mt5)

    def init_weights(self):
        """Draw fresh weights for every part from torch's global generator."""
        self.vit.init_weights()
        self.qformer.init_weights()
        self.mt5.init_weights()
        nn.init.normal_(self.queries)  # a LayerNorm follows, so only their directions count
        self.init_projection()

    def init_projection(self):
        """Draw a fresh projection, as mBLIP does between BLIP-2's Q-Former and a language model it has never met."""
        nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)  # as large as embedded tokens
        nn.init.zeros_(self.proj.bias)

    def exchange_language_model(self, mt5: MT5) -> None:
        """Put another language model behind the Q-Former, with a fresh projection to its width: where re-alignment
        starts from."""
        self.mt5, self.cfg = mt5, replace(self.cfg, mt5=mt5.cfg)
        self.proj = nn.Linear(self.cfg.qformer.width, mt5.cfg.width)
        self.init_projection()

    def image_features(self, image):
        """What the ViT sees: image float (B, I, 3, size, size) -> (B, I, N, Dv). Cache this when the ViT is frozen."""
        assert image.ndim == 5, f"image is (B, I, 3, size, size), I = images a sample; got {tuple(image.shape)}"
        B, I = image.shape[:2]
        return self.vit(image.flatten(0, 1)).unflatten(0, (B, I))  # (B*I, N, Dv) -> (B, I, N, Dv)

    def image_tokens(self, features):
        """What the language model sees of it: features (B, I, N, Dv) -> (B, I*Q, D), image after image."""
        B, I = features.shape[:2]
        x = self.qformer(
            self.queries.expand(B * I, -1, -1), features.flatten(0, 1).to(self.queries.dtype)
        )  # (B*I, Q, Dq)
        return self.proj(x.unflatten(0, (B, I)).flatten(1, 2))  # (B, I*Q, D)

    def encode_image(self, image):
        """Pictures as tokens of the language model: image float (B, I, 3, size, size) -> (B, I*Q, D)."""
        return self.image_tokens(self.image_features(image))

    def encode(self, visual, prompt, prompt_mask=None):
        """Run the mT5 encoder over pictures and prompt.

        visual: float (B, I*Q, D); prompt: long (B, S), padded anywhere; prompt_mask: bool (B, S), True = a real token,
        by default everything but the pad id. Returns memory (B, L, D) and its mask (B, L).
        """
        mask = prompt != self.cfg.mt5.pad if prompt_mask is None else prompt_mask.bool()
        text = self.mt5.embed_tokens(prompt)  # (B, S, D)
        x = torch.cat([visual.to(text.dtype), text], dim=1)  # (B, L, D)
        mask = torch.cat([mask.new_ones(visual.shape[:2]), mask], dim=1)  # (B, L)
        return self.mt5.encode(x, mask), mask

    def forward(self, image, prompt, labels, prompt_mask=None, features=None, visual=None):
        """Teacher-forced logits and loss.

        image: float (B, I, 3, size, size), or None when `features` (B, I, N, Dv) from `image_features` or `visual`
        (B, I*Q, D) from `image_tokens` are given; prompt: long (B, S); labels: long (B, T), -100 where there is no
        loss; prompt_mask: as in `encode`. Returns logits (B, T, V) and the mean cross-entropy over the labels, in
        nats per token, fp32.
        """
        if visual is None:
            visual = self.image_tokens(self.image_features(image) if features is None else features)
        memory, mask = self.encode(visual, prompt, prompt_mask)
        logits = self.mt5.decode(self.mt5.shift_right(labels), memory, mask)  # (B, T, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        return logits, loss

    def loss(self, features, prompt, labels, prompt_mask=None):
        """The loss of `forward` for training: the head, whose V logits a token are the largest tensor of a step,
        sees only the places where a token is to be written, a few at a time; if that is not all at once, then once
        more in the backward pass. features: float (B, I, N, Dv); the rest as in `forward`."""
        memory, mask = self.encode(self.image_tokens(features), prompt, prompt_mask)
        embedded = self.mt5.embed_tokens(self.mt5.shift_right(labels))  # (B, T, D)
        hidden, real = self.mt5.decoder(embedded, memory, mask), labels != -100  # (B, T, D), (B, T)
        total = lambda h, target: F.cross_entropy(self.mt5.lm_head(h).float(), target, reduction="sum")
        few = max(FEWEST, LOGITS // self.cfg.mt5.vocab)  # tokens at a time
        parts = list(zip(hidden[real].split(few), labels[real].split(few)))
        if len(parts) == 1:  # which would be computed twice for nothing
            return total(*parts[0]) / real.sum()
        return sum(checkpoint(total, *part, use_reentrant=False) for part in parts) / real.sum()
