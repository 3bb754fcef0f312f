"""nanomblip: mBLIP (arXiv 2307.06930) from scratch, in short files that can be read in one afternoon.

The letters used in every shape comment of this package:

    B  batch                    Q  learned queries an image        D  language-model width
    I  images a sample          S  prompt tokens                   H  attention heads
    N  visual tokens an image   L  encoder length, I*Q + S         K  width of one head
    Dv ViT width                T  target tokens                   F  feed-forward width
    Dq Q-Former width           M  keys attended to                V  vocabulary rows

Masks are boolean and True means "attend".

Import it before torch, as train.py and sample.py do: torch reads these settings only when it is loaded.
"""

import os

# A waiting thread spins for a moment and then sleeps. By default it spins for long, and on a busy machine it takes the
# processor from the very thread that it waits for. tests/bench_nano.py compares the two.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# oneDNN compiles a kernel for every shape and keeps 1,024 of them: with batches of ever new lengths, gigabytes.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
# Large tensors in pages of 2 MB, where Linux gives them on request: fresh memory is then written sooner.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from nanomblip.model.mblip import MBLIP, PRESETS, MBLIPConfig

__all__ = ["MBLIP", "MBLIPConfig", "PRESETS"]
