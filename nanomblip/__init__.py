"""nanomblip: mBLIP (arXiv 2307.06930) from scratch, in short files that can be read in one afternoon.

The letters used in every shape comment of this package:

    B  batch                    Q  learned queries an image        D  language-model width
    I  images a sample          S  prompt tokens                   H  attention heads
    N  visual tokens an image   L  encoder length, I*Q + S         K  width of one head
    Dv ViT width                T  target tokens                   F  feed-forward width
    Dq Q-Former width           M  keys attended to                V  vocabulary rows

Masks are boolean and True means "attend".
"""

from nanomblip.model.mblip import MBLIP, PRESETS, MBLIPConfig

__all__ = ["MBLIP", "MBLIPConfig", "PRESETS"]
