"""The int8 product q_x CB^T of int8.py, as fast as each processor allows.

The sum of codes is exact, so different processors can compute it in different ways with the same result to the bit.
`int8_path("reference")` takes the readable line of `code_product` everywhere. The others:

- Few rows (a model writing text, one row a beam) wait for the weight's bytes alone. With AMX oneDNN reads them at the
  speed of the memory if it is asked for weight q_x^T, the weight first, a megabyte at a time: so they stay in their
  plain order. Asked for q_x weight^T it first reorders the weight, at each call.
- Without AMX FBGEMM's int8 kernel, which torch ships for x86, reads few rows' weight once, from an order of its own. To
  put the codes into that order costs what it saves in about a hundred products, so a layer does it when it has been
  asked for few rows often enough. It then keeps no others: memory stays a byte a number. Whoever asks for `weight` (a
  backward pass, a file) gets the codes back.
- More rows (training, an encoder), with VNNI: q_x weight^T by oneDNN.
- Elsewhere fp32 products, over 1,024 columns at a time: up to there (127^2 * 1024 < 2^24) fp32 counts exactly as well.
- On CUDA bitsandbytes' product of the codes.

Milliseconds for a 2048 -> 5120 layer (10 MB, which take 1.08 to read), one core with AMX, in oneDNN's product alone:

    rows                                 1     5    20    64
    weight q_x^T, by the megabyte      1.15  1.15  1.35  1.99
    weight q_x^T, the whole            1.31  1.31  1.40  1.74
    q_x weight^T                       1.60  1.70  1.97  2.34
    q_x weight^T, without AMX          0.97  1.98  2.14  3.51

Without VNNI the x86 kernels add pairs of products in 16 bits, which overflow: an operator is used only where it has
just shown that it counts correctly. FBGEMM can then still do it in two halves, q_x = max(q_x, 0) - max(-q_x, 0), each
with 7 bits.
"""

import warnings
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F

BLOCK = 1024  # outputs whose weights are converted at a time: a few MB, so that no float copy of a weight ever exists
FEW_ROWS = 64  # up to here a product waits for the bytes of the weight
PACK_AFTER = 150  # a layer packs its codes when products of so few rows have had so many rows together
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


def largest_magnitude(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The largest |x| along a dimension; x.abs() would first write a tensor as large as x."""
    return torch.maximum(x.amax(dim), -x.amin(dim))


def code_product(q: torch.Tensor, weight) -> torch.Tensor:
    """q int8 (M, in), weight int8 (out, in), packed or not -> q weight^T as float32 (M, out): the exact sum, rounded
    once."""
    if not isinstance(weight, torch.Tensor):
        return _fbgemm_product(q, weight, fbgemm_halves())
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


def wants_packed() -> bool:
    """Is there an order that few rows like better than the plain one?"""
    return not (has_int_mm() and has_amx()) and fbgemm_halves() > 0


def pack(weight: torch.Tensor):
    """int8 (out, in) -> the same codes in FBGEMM's order, an opaque object."""
    with warnings.catch_warnings():  # torch means to replace its quantised tensors, in a version that is not out yet
        warnings.simplefilter("ignore")
        return torch.ops.quantized.linear_prepack(torch._make_per_tensor_quantized_tensor(weight, 1.0, 0), None)


def unpack(packed) -> torch.Tensor:
    """The int8 (out, in) that `pack` was given."""
    return torch.ops.quantized.linear_unpack(packed)[0].int_repr()


def _fbgemm_product(q, packed, halves: int):
    """q int8 (M, in) times packed codes: float32 (M, out), the exact sums.

    FBGEMM takes floats and rounds them to 256 steps between the smallest and the largest of them all. One more row sees
    to it that these steps are the whole numbers, so that codes stay what they are.
    """
    low, high = (-127.0, 128.0) if halves == 1 else (0.0, 255.0)
    rows = torch.cat([q.float()] if halves == 1 else [q.clamp(min=0).float(), (-q).clamp(min=0).float()])
    ends = rows.new_zeros(1, rows.shape[1])
    ends[0, 0], ends[0, 1] = low, high
    y = torch.ops.quantized.linear_dynamic(torch.cat([rows, ends]), packed)[:-1]
    return y if halves == 1 else y[: len(q)] - y[len(q) :]


@lru_cache
def fbgemm_halves() -> int:
    """How FBGEMM counts correctly here: 1 = as it is (with VNNI), 2 = in two halves (without), 0 = not at all."""
    q = torch.tensor([[127], [-127]], dtype=torch.int8).expand(2, 64)
    try:
        packed = pack(torch.full((64, 64), 127, dtype=torch.int8))
        for halves in (1, 2):
            if (_fbgemm_product(q, packed, halves) == 127 * 64 * q[:, :1].float()).all():
                return halves
    except (AttributeError, RuntimeError):
        pass
    return 0


def kept_columns(weight, where: torch.Tensor, width: int, columns: dict[int, torch.Tensor]) -> torch.Tensor:
    """Columns `where` of an int8 weight (out, width), packed or not: int8 (len(where), out), kept in `columns`.

    Packed codes give a column as a product with a row that is 1 there and 0 elsewhere.
    """
    wanted = where.tolist()
    new = [i for i in wanted if i not in columns]
    if len(columns) + len(new) > MOST_COLUMNS:
        columns.clear()
        new = wanted
    if new:  # all at once: each would pass over the whole weight
        at = torch.tensor(new)
        if isinstance(weight, torch.Tensor):
            found = weight.index_select(1, at).T.contiguous()
        else:
            found = code_product(F.one_hot(at, width).to(torch.int8), weight).to(torch.int8)
        columns |= zip(new, found)
    return torch.stack([columns[i] for i in wanted])


def input_gradient(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """grad float (M, out) times the dequantised weight (out, in): (M, in) in grad's type.

    Many rows in bf16 on a CPU that multiplies it fast: twice as fast as fp32, with an error of 0.2 %, a fraction of
    what rounding W cost.
    """
    if path == "reference":
        return (grad.float() @ (weight.float() * (scale / 127)[:, None])).to(grad.dtype)
    kind = torch.bfloat16 if grad.device.type == "cpu" and len(grad) > 32 and has_bf16() else torch.float32
    y = torch.zeros(len(grad), weight.shape[1], device=grad.device)
    for part, codes, steps in zip(grad.split(BLOCK, 1), weight.split(BLOCK), (scale / 127).split(BLOCK)):
        y += (part * steps).to(kind) @ codes.to(kind)  # codes are whole numbers up to 127, exact in bf16
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
