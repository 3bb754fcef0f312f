"""The one attention kernel that all towers call, in two versions that return the same thing, and the decoders' cache.

    attend(q, k, v) = softmax(scale * q k^T + bias) v          (Vaswani et al. 2017, equation 1)

The towers differ in everything around it (fused or separate projections, scaled or not, position bias or not, self or
cross), so each tower file writes its own attention class and reads like its paper; only this function is shared.

- The *fast* path hands the work to torch's fused kernel and never stores the (N, M) weights.
- The *written-out* path is the equation, line by line: step through it, or plot its weights.

`attend_path("written")` is a context manager that switches between them; a test holds the two together.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

_path = "fast"


@contextmanager
def attend_path(path: str):
    """Use the "fast" or the "written" version of `attend` inside a with-block, then go back."""
    global _path
    if path not in ("fast", "written"):
        raise ValueError(f"attend_path takes 'fast' or 'written', not {path!r}")
    before, _path = _path, path
    try:
        yield
    finally:
        _path = before


def additive_bias(mask, bias, dtype):
    """Turn a boolean mask (True = attend) into a bias that is added to the scores.

    mask: bool, broadcastable to (B, H, N, M), or None; bias: float, broadcastable to the same, or None.
    Returns a `dtype` tensor or None. Hidden places get the smallest finite number rather than -inf: a row in which
    everything is hidden then becomes an even average instead of NaN.
    """
    if mask is None:
        return None if bias is None else bias.to(dtype)
    assert mask.dtype == torch.bool, f"masks are boolean, True = attend; got {mask.dtype}"
    lowest = torch.finfo(dtype).min
    if bias is None:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest)
    return bias.to(dtype).masked_fill(~mask, lowest)  # (B, H, N, M)


def attend(q, k, v, mask=None, bias=None, scale=None, dropout=0.0):
    """Attention of N queries over M keys.

    q: float (B, H, N, K); k, v: float (B, H, M, K); mask: bool, broadcastable to (B, H, N, M), True = attend;
    bias: float, broadcastable to (B, H, N, M), added to the scores; scale: factor on q k^T, 1/sqrt(K) if None;
    dropout: probability with which a weight is dropped (pass 0.0 outside training). Returns (B, H, N, K).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = additive_bias(mask, bias, q.dtype)
    if _path == "fast":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    scores = scale * (q @ k.transpose(-2, -1))  # (B, H, N, M)
    if bias is not None:
        scores = scores + bias
    weights = scores.float().softmax(dim=-1).to(q.dtype)  # softmax in fp32 whatever the type of the rest
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights @ v  # (B, H, N, K)


class KVCache:
    """Keys and values that the decoder need not compute again while it writes one token after another.

    `memory[i]` are layer i's cross-attention keys and values, computed from the encoder's output once; `past[i]` its
    self-attention keys and values, one position longer after each call. All are (B, H, M, K). In beam search several
    rows of the past, a sample's beams, share one row of the memory.
    """

    def __init__(self, layers: int):
        self.past, self.memory = [None] * layers, [None] * layers

    def __len__(self):
        return 0 if self.past[0] is None else self.past[0][0].shape[2]

    def extend(self, layer: int, k, v):
        """Append new positions to a layer's past; returns all keys and values so far."""
        if self.past[layer] is not None:
            k, v = (torch.cat([old, new], dim=2) for old, new in zip(self.past[layer], (k, v)))
        self.past[layer] = (k, v)
        return k, v

    def reorder(self, rows, memory=True):
        """Row b becomes what row rows[b] was (rows: long (B',)); for beam search and for dropping finished rows.

        memory: True = likewise, False = stays (enough when rows stay within their sample), or its own rows, long (A',).
        """
        self.past = [tuple(t.index_select(0, rows) for t in kv) for kv in self.past]
        if memory is not False:
            rows = rows if memory is True else memory
            self.memory = [tuple(t.index_select(0, rows) for t in kv) for kv in self.memory]
