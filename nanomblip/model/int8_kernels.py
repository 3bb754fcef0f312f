"""The int8 product q_x CB^T of int8.py, as fast as each processor allows.

The sum of codes is exact, so different processors can compute it in different ways with the same result to the bit.
`int8_path("reference")` takes the readable line of `code_product` everywhere. The others:

- Few rows (a model writing text, one row a beam) wait for the weight's bytes alone. With AMX oneDNN reads them at the
  speed of the memory if it is asked for weight q_x^T, the weight first, a megabyte at a time: so they stay in their
  plain order. Asked for q_x weight^T it first reorders the weight, at each call.
- More rows (training, an encoder) and processors with VNNI but without AMX: q_x weight^T by oneDNN.
- Elsewhere fp32 products, over 1,024 columns at a time: up to there (127^2 * 1024 < 2^24) fp32 counts exactly as well.
- On CUDA bitsandbytes' product of the codes.

TABLE
Without VNNI oneDNN adds pairs of products in 16 bits, which overflow: it is used only where it has just shown that it
counts correctly.
"""

from contextlib import contextmanager
from functools import lru_cache

import torch

BLOCK = 1024  # outputs whose weights are converted at a time: a few MB, so that no float copy of a weight ever exists
FEW_ROWS = 64  # up to here a product waits for the bytes of the weight
MANY_OUTLIERS, MOST_COLUMNS = 64, 256  # columns in one product, columns that a layer keeps

path = "fast"


@contextmanager
def int8_path(name: str):
    """Use the "fast" kernels or the "reference" inside a with-block, then go back."""
    global path
    if name not in ("fast", "reference"):
        raise ValueError(f"int8_path takes 'fast' or 'reference', not {name!r}")
    before, path = path, name
    try:
        yield
    finally:
        path = before


def code_product(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """q int8 (M, in), weight int8 (out, in) -> q weight^T as float32 (M, out): the exact sum, rounded once."""
    if path == "reference":
        return (q.to(torch.int32) @ weight.to(torch.int32).T).float()
    if q.is_cuda and (y := _bitsandbytes_product(q, weight)) is not None:
        return y.float()
    int_mm = q.device.type == "cpu" and has_int_mm() and q.shape[1] > 1  # of one column torch 2.13 makes nonsense
    if int_mm and has_amx() and len(q) <= FEW_ROWS:
        qT, parts = q.T, weight.split(max(1, 2**20 // q.shape[1]))  # of a megabyte
        sums = torch.cat([torch._int_mm(part, qT) for part in parts])  # (out, M)
        return sums.T.to(torch.float32, memory_format=torch.contiguous_format)
    block = max(BLOCK, 2**19 // len(q)) if int_mm else BLOCK if len(q) > FEW_ROWS else 256  # what stays in the cache
    y = torch.empty(len(q), len(weight), device=q.device)
    for start in range(0, len(weight), block):
        part = weight[start : start + block]
        y[:, start : start + block] = torch._int_mm(q, part.T) if int_mm else _float_product(q, part)
    return y


def _float_product(q, weight):
    """q weight^T as int32 by fp32 products of 1,024 columns, which are exact: 127^2 * 1024 < 2^24."""
    parts = (q[:, k : k + 1024].float() @ weight[:, k : k + 1024].float().T for k in range(0, q.shape[1], 1024))
    return sum(part.to(torch.int32) for part in parts)


def _bitsandbytes_product(q, weight):
    """q weight^T as int32 by bitsandbytes, imported only here; None where it is not installed."""
    try:
        from bitsandbytes.functional import int8_linear_matmul
    except ImportError:
        return None
    return int8_linear_matmul(q, weight)


@lru_cache
def has_int_mm() -> bool:
    """Is torch's int8 product fast here (with VNNI; without, it is slower than fp32), and correct?"""
    q, weight = torch.full((32, 64), 127, dtype=torch.int8), torch.full((64, 64), 127, dtype=torch.int8)
    try:
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_vnni") or able.get("avx_vnni")) and all(
            (torch._int_mm(a, b.T) == 127**2 * 64).all() for a, b in ((q, weight), (q[:1], weight), (weight, q))
        )
    except (AttributeError, RuntimeError):
        return False


@lru_cache
def has_amx() -> bool:
    """Does the processor multiply tiles of int8?"""
    try:
        return torch.cpu._is_amx_tile_supported()
    except AttributeError:
        return False


def kept_columns(weight: torch.Tensor, where: torch.Tensor, columns: dict[int, torch.Tensor]) -> torch.Tensor:
    """Columns `where` of an int8 weight (out, in): int8 (len(where), out), from `columns` or put there."""
    wanted = where.tolist()
    new = [i for i in wanted if i not in columns]
    if len(columns) + len(new) > MOST_COLUMNS:
        columns.clear()
        new = wanted
    if new:  # all at once: each would pass over the whole weight
        columns |= zip(new, weight.index_select(1, torch.tensor(new)).T.contiguous())
    return torch.stack([columns[i] for i in wanted])


def input_gradient(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """grad float (M, out) times the dequantised weight (out, in): (M, in) in grad's type.

    Many rows in bf16 on a CPU that multiplies it fast: twice as fast as fp32, with an error of 0.2 %, a fraction of
    what rounding W cost.
    """
    if path == "reference":
        return (grad.float() @ (weight.float() * (scale / 127)[:, None])).to(grad.dtype)
    kind = torch.bfloat16 if grad.device.type == "cpu" and len(grad) > 32 and has_bf16() else torch.float32
    scaled = (grad.float() * (scale / 127)).to(kind)  # codes are whole numbers up to 127, exact in bf16
    y = torch.zeros(len(grad), weight.shape[1], device=grad.device)
    for start in range(0, len(weight), BLOCK):
        y += scaled[:, start : start + BLOCK] @ weight[start : start + BLOCK].to(kind)
    return y.to(grad.dtype)


@lru_cache
def has_bf16(device: torch.device = torch.device("cpu")) -> bool:
    """Whether a CPU or GPU multiplies bf16 by itself; elsewhere torch emulates it, 10 to 20 times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return torch.cpu._is_avx512_bf16_supported()
    except AttributeError:
        return False
