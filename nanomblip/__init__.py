"""nanomblip: mBLIP (arXiv 2307.06930) from scratch, in short files that can be read in one afternoon.

The letters used in every shape comment of this package:

    B  batch                    Q  learned queries an image        D  language-model width
    I  images a sample          S  prompt tokens                   H  attention heads
    N  visual tokens an image   L  encoder length, I*Q + S         K  width of one head
    Dv ViT width                T  target tokens                   F  feed-forward width
    Dq Q-Former width           M  keys attended to                V  vocabulary rows

Masks are boolean and True means "attend".

Import it before torch, as train.py and sample.py do: torch reads two settings only when it is loaded.
"""

import os

# A thread that waits for another spins a little, then sleeps. By default it spins for long, and where anything else runs
# on the machine, it does so in the place of the thread that it waits for: two threads then write a tenth of what
# they write alone. With 3,000 turns they lose little alone, and half beside another process (tests/bench_nano.py).
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# oneDNN compiles a kernel for every shape and keeps 1,024 of them: with batches of ever new lengths, gigabytes.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

from nanomblip.model.mblip import MBLIP, PRESETS, MBLIPConfig

__all__ = ["MBLIP", "MBLIPConfig", "PRESETS"]
