"""LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): linear layers whose frozen weight takes a byte a number.

Each row of W (one output) is scaled by its largest magnitude and rounded to -127..127, each row of x (one piece) likewise:

    W ~ SCB / 127 * CB           y = (s_x / 127) (SCB / 127) (q_x CB^T) + b        q_x CB^T summed exactly, in int32

One large number in a row of x would push all the others of the row towards 0, and transformers do have such numbers, always
in the same few columns. So the columns of x in which some magnitude reaches the threshold (6.0) are left out of q_x and multiplied in
floating point with the same columns of the dequantised W.

With threshold 0 every column is left out: the weight alone is in int8.

The sum of codes q_x CB^T is where the time goes, and it is exact, so different processors can compute it in different ways with the
same result to the bit. `code_product` is the readable one; `int8_path("reference")` takes it everywhere. The others:

- Few rows (a model writing text, one row a beam) wait for the weights' bytes alone. FBGEMM's int8 kernel, which torch ships for x86, reads
  them once, from an order of its own. To put the codes into that order costs what it saves in about 130 products of one row or 35 of
  five, so a layer does it when it has been asked for few rows often enough. It then keeps no others: memory stays a byte a number. Whoever
  asks for `weight` (a backward pass, a file) gets the codes back.
- Many rows (training, an encoder) are oneDNN's int8 product where the processor has AVX-512 VNNI.
- Elsewhere fp32 products, over 1,024 columns at a time: up to there (127^2 * 1024 < 2^24) fp32 counts exactly as well.
- On CUDA bitsandbytes' product of the codes.

A 2048 -> 5120 layer on one AVX-512 core, how many times faster than fp32 (`tests/bench_int8.py`):

    rows                     1     2     4     5     8    16    32    64   128   256   512
    codes as they are      2.1   2.2   2.3   2.2   2.3   2.9   3.1   2.7   3.6   3.9   3.8
    in FBGEMM's order      3.0   5.7   5.1   6.1   7.5   5.5   4.3   3.4   3.7   4.7   3.2
    gradient of x          1.0   1.6   1.2   0.9   1.0   0.8   0.8   1.9   1.9   2.6   2.2

Without VNNI the two x86 kernels add pairs of products in 16 bits, which overflow: an operator is used only where it has just shown that it
counts correctly. FBGEMM can then still do it in two halves, q_x = max(q_x, 0) - max(-q_x, 0), each with 7 bits.
"""

import warnings
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F

THRESHOLD = 6.0  # the paper's, section 3.2
BLOCK = 1024  # outputs whose weights are converted at a time: a few MB, so that no float copy of a weight ever exists

FEW_ROWS, PACK_AFTER = 32, 150  # a layer packs its codes when products of at most so many rows have had so many rows together
MANY_OUTLIERS = 64  # columns

_path = "fast"


@contextmanager
def int8_path(path: str):
    """Use the "fast" kernels or the "reference" inside a with-block, then go back."""
    global _path
    if path not in ("fast", "reference"):
        raise ValueError(f"int8_path takes 'fast' or 'reference', not {path!r}")
    before, _path = _path, path
    try:
        yield
    finally:
        _path = before


def quantize_rows(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float (R, C) -> CB int8 (R, C) and SCB float32 (R,), the largest magnitude of each row; w ~ SCB / 127 * CB.

    A row of zeros stays zeros. ValueError where a number is not finite.
    """
    scale = w.abs().amax(1).float()  # (R,)
    if not scale.isfinite().all():
        raise ValueError(f"int8: {(~scale.isfinite()).sum().item()} of {len(scale)} rows hold a number that is not finite")
    steps = torch.where(scale > 1e-36, 127.0 / scale, 0.0)  # below, 127 / scale is infinite
    return (w * steps[:, None]).round_().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A frozen linear layer in int8; x float (..., in) -> (..., out) in x's type. It trains nothing, but gradients pass to x.

    Parts: `weight` int8 (out, in) and `SCB` float32 (out,), named as bitsandbytes names them, and the bias as it was. The weight is rounded
    to fp16 first: so CB and SCB are those of bitsandbytes to the bit. threshold: above. ValueError for a weight that is not
    finite (in fp16), for x that is not, and for a negative threshold.
    """

    def __init__(self, linear: nn.Linear, threshold: float = THRESHOLD):
        weight, scale = quantize_rows(linear.weight.detach().half())
        self._set(weight, scale, None if linear.bias is None else linear.bias.detach().clone(), threshold)
        self.train(linear.training)

    @classmethod
    def from_tensors(cls, weight: torch.Tensor, SCB: torch.Tensor, bias: torch.Tensor | None = None, threshold: float = THRESHOLD):
        """A layer from codes and scales that exist already: weight int8 (out, in), SCB float32 (out,), bias float (out,) or None.

        The tensors are taken as they are, not copied. ValueError where a type or a shape is another, or a scale is negative or not finite.
        """
        if weight.dtype != torch.int8 or weight.ndim != 2:
            raise ValueError(f"int8: weight is int8 (out, in), not {weight.dtype} {tuple(weight.shape)}")
        if SCB.dtype != torch.float32 or SCB.shape != weight.shape[:1]:
            raise ValueError(f"int8: SCB is float32 ({len(weight)},), not {SCB.dtype} {tuple(SCB.shape)}")
        if bias is not None and (not bias.is_floating_point() or bias.shape != SCB.shape):
            raise ValueError(f"int8: bias is float ({len(weight)},), not {bias.dtype} {tuple(bias.shape)}")
        if not SCB.is_meta and not (SCB.isfinite() & (SCB >= 0)).all():
            raise ValueError("int8: a scale in SCB is negative or not finite")
        layer = cls.__new__(cls)
        layer._set(weight, SCB, bias, threshold)
        return layer

    def _set(self, weight, SCB, bias, threshold):
        super().__init__()
        if not 0 <= threshold < float("inf"):
            raise ValueError(f"int8 threshold {threshold}: at least 0")
        self.out_features, self.in_features = weight.shape
        self.threshold = threshold
        self._buffers["weight"] = weight  # not by register_buffer, which takes the property below for another thing of this name
        self.register_buffer("SCB", SCB)
        self.register_buffer("bias", bias)
        self.packed, self.short_rows = None, 0  # the codes in FBGEMM's order, instead of `weight`; rows that would have liked it
        self.columns = {}  # see `short_product`

    @property
    def weight(self) -> torch.Tensor:
        """CB: int8 (out, in)."""
        if self.packed is not None:
            self.replace(unpack(self.packed), self.SCB)
        return self._buffers["weight"]

    def replace(self, weight: torch.Tensor, SCB: torch.Tensor) -> None:
        """Compute with other codes and scales from now on."""
        self.packed, self.short_rows, self.columns = None, 0, {}
        self._buffers["weight"], self.SCB = weight, SCB

    def pack(self) -> None:
        """Keep the codes in FBGEMM's order from now on, until somebody asks for `weight`; nothing happens where FBGEMM is missing."""
        if self.packed is None and fbgemm_halves() and self.in_features > 1 and self._buffers["weight"].device.type == "cpu":
            self.packed = pack(self._buffers["weight"])
            self._buffers["weight"] = None

    def _save_to_state_dict(self, *args):
        self.weight  # so that it is in the file
        super()._save_to_state_dict(*args)

    def _apply(self, *args, **kwargs):
        self.weight  # so that it moves to another device with the rest
        return super()._apply(*args, **kwargs)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the layer computes with: (out, in)."""
        return (self.weight.float() * (self.SCB / 127)[:, None]).to(dtype)

    def forward(self, x):
        rows = x.reshape(-1, self.in_features)
        y = _Product.apply(rows, self) if rows.requires_grad and torch.is_grad_enabled() else self.product(rows)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: torch.Tensor, often: bool = True) -> torch.Tensor:
        """x (M, in) -> (M, out) without the bias; often: whether more such products may follow before anybody asks for `weight`."""
        if _path == "fast" and often and self.packed is None and len(x) <= FEW_ROWS:
            self.short_rows += len(x)
            if self.short_rows > PACK_AFTER:
                self.pack()
        if _path == "fast" and (self.packed is not None or (len(x) <= FEW_ROWS and x.device.type == "cpu")):
            codes = self.weight if self.packed is None else self.packed
            return short_product(x, codes, self.SCB, self.threshold, self.columns)
        return int8_product(x, self.weight, self.SCB, self.threshold)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, threshold={self.threshold}"


class _Product(torch.autograd.Function):
    """The layer's product; backward as if x had not been rounded, with the dequantised weight."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer.product(x, often=False)

    @staticmethod
    def backward(ctx, grad):  # (M, out)
        return input_gradient(grad, ctx.layer.weight, ctx.layer.SCB), None


# ------------------------------------------------------------------------------------------------------------ products


def find_outliers(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Columns of x (M, in) in which some magnitude reaches the threshold: bool (in,). ValueError where x is not finite.

    If these are more than half, all are: the rest would not be worth a product of its own. In T5 this happens before `wo`, which reads
    what no norm has scaled (in nano's mT0 half of its columns reach 6, and none of those of q, k, v and o).
    """
    largest = x.abs().amax(0)
    if not largest.isfinite().all():
        raise ValueError(f"int8: {(~largest.isfinite()).sum().item()} of {len(largest)} inputs hold a number that is not finite")
    outlier = largest >= threshold
    return outlier | (2 * outlier.sum() > len(outlier))


def int8_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, threshold: float) -> torch.Tensor:
    """The equation at the top, without the bias: x float (M, in), weight int8 (out, in), scale (out,) -> (M, out) in x's type."""
    if len(x) == 0:
        return x.new_zeros(0, len(scale))
    outlier = find_outliers(x, threshold)  # (in,)
    if outlier.all():
        y = torch.zeros(len(x), len(scale), device=x.device)  # (M, out)
    else:
        q, row_scale = quantize_rows(x.masked_fill(outlier, 0))  # (M, in), (M,)
        y = code_product(q, weight).mul_((row_scale / 127)[:, None])  # (M, out)
    if outlier.any():
        where = outlier.nonzero()[:, 0]
        x_out = x[:, where].float()  # (M, outliers)
        block = max(BLOCK, 2**22 // max(x_out.shape))
        for start in range(0, len(weight), block):
            y[:, start : start + block].addmm_(x_out, weight[start : start + block].index_select(1, where).float().T)
    return y.mul_(scale / 127).to(x.dtype)


def short_product(x: torch.Tensor, codes, scale: torch.Tensor, threshold: float, columns: dict[int, torch.Tensor]) -> torch.Tensor:
    """`int8_product` for few rows or packed codes. There, to take the outliers' columns out of the codes takes longer than the product
    itself, or is impossible.

    As these are always the same few columns, they are kept in `columns`. Those that are not there yet the product fetches, by a row for
    each, which is 1 there and 0 elsewhere. If it is many columns, x is instead said in three int8 digits, each the rounded rest of what
    the digits before could not say: half a 127^3th of a row's largest number is as exact as fp32.
    """
    if len(x) == 0:
        return x.new_zeros(0, len(scale))
    product = lambda q: code_product(q, codes) if isinstance(codes, torch.Tensor) else _fbgemm_product(q, codes, fbgemm_halves())
    outlier = find_outliers(x, threshold)  # (in,)
    where = outlier.nonzero()[:, 0]
    parts = [quantize_rows(x.masked_fill(outlier, 0))]  # pairs of codes and row scales
    if len(where) > MANY_OUTLIERS:
        rest = x.float().masked_fill(~outlier, 0)
        for _ in range(3):
            q, row_scale = quantize_rows(rest)
            parts.append((q, row_scale))
            rest = rest - q * (row_scale / 127)[:, None]
    q, row_scale = (torch.cat(tensors) for tensors in zip(*parts))
    y = sum(product(q).mul_((row_scale / 127)[:, None]).split(len(x)))  # (M, out)
    if 0 < len(where) <= MANY_OUTLIERS:
        new = torch.tensor([i for i in where.tolist() if i not in columns], dtype=torch.long)
        if len(columns) + len(new) > 4 * MANY_OUTLIERS:
            columns.clear()
            new = where
        if len(new):
            columns |= zip(new.tolist(), product(F.one_hot(new, len(outlier)).to(torch.int8)).to(torch.int8))
        y.addmm_(x[:, where].float(), torch.stack([columns[i] for i in where.tolist()]).float())
    return y.mul_(scale / 127).to(x.dtype)


def code_product(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """q int8 (M, in), weight int8 (out, in) -> q weight^T as float32 (M, out): the exact sum, rounded once."""
    if _path == "reference":
        return (q.to(torch.int32) @ weight.to(torch.int32).T).float()
    if q.is_cuda and (y := _bitsandbytes_product(q, weight)) is not None:
        return y.float()
    y = torch.empty(len(q), len(weight), device=q.device)
    int_mm = q.device.type == "cpu" and has_int_mm() and q.shape[1] > 1  # of a single column torch 2.13's _int_mm makes nonsense
    block = max(BLOCK, 2**22 // len(q)) if int_mm else BLOCK  # few rows: all at once; many: int32 sums that stay in the cache
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
    """Whether torch's int8 product is fast here (AVX-512 VNNI; without, it is slower than fp32) and counts correctly."""
    q, weight = torch.full((32, 64), 127, dtype=torch.int8), torch.full((64, 64), 127, dtype=torch.int8)
    try:
        return torch.cpu._is_vnni_supported() and all((torch._int_mm(rows, weight.T) == 127**2 * 64).all() for rows in (q, q[:1]))
    except (AttributeError, RuntimeError):
        return False


# ---------------------------------------------------------------------------------------- products of packed codes


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

    FBGEMM takes floats and rounds them to 256 steps between the smallest and the largest of them all. One more row sees to it that these
    steps are the whole numbers, so that codes stay what they are.
    """
    low, high = (-127.0, 128.0) if halves == 1 else (0.0, 255.0)
    rows = torch.cat([q.float()] if halves == 1 else [q.clamp(min=0).float(), (-q).clamp(min=0).float()])
    ends = rows.new_zeros(1, rows.shape[1])
    ends[0, 0], ends[0, 1] = low, high
    y = torch.ops.quantized.linear_dynamic(torch.cat([rows, ends]), packed)[:-1]
    return y if halves == 1 else y[: len(q)] - y[len(q) :]


@lru_cache
def fbgemm_halves() -> int:
    """How FBGEMM counts correctly here: 1 = as it is (with VNNI), 2 = in two halves (without), 0 = not at all, or it is missing."""
    q = torch.tensor([[127], [-127]], dtype=torch.int8).expand(2, 64)
    try:
        packed = pack(torch.full((64, 64), 127, dtype=torch.int8))
        for halves in (1, 2):
            if (_fbgemm_product(q, packed, halves) == 127 * 64 * q[:, :1].float()).all():
                return halves
    except (AttributeError, RuntimeError):
        pass
    return 0


def input_gradient(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """grad float (M, out) times the dequantised weight (out, in): (M, in) in grad's type.

    Many rows in bf16 on a CPU that multiplies it fast: twice as fast as fp32, with an error of 0.2 %, a fraction of what rounding W cost.
    """
    if _path == "reference":
        return (grad.float() @ (weight.float() * (scale / 127)[:, None])).to(grad.dtype)
    kind = torch.bfloat16 if grad.device.type == "cpu" and len(grad) > FEW_ROWS and has_bf16() else torch.float32
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


def quantize_linears(model: nn.Module, skip: tuple[str, ...] = (), threshold: float = THRESHOLD) -> int:
    """Replace every linear layer of a model by an Int8Linear, but those whose name (the last part of their path) is in `skip`.

    By default `wo` and the head go too, which transformers leaves in floats. Measured on nano, captions of held-out batches, the whole
    language model in int8 against floats, and what fp32 would take for mT0-XL:

                            KL of the answers    argmax changed    mT0-XL, linear layers
        all                 0.0011 nats          1.4 %              3.2 GB
        but wo              0.0007               1.1 %              4.7 GB
        but the head        0.0010               1.2 %              4.8 GB
        but both            0.0006               1.0 %              6.3 GB
        all, threshold 0    0.0005               0.9 %              3.2 GB

    On a nano whose activations had grown to 10,000 (weights/README.md) all of them were five to ten times as large.

    Add LoRA afterwards, around the int8 layers. Returns the bytes saved. ValueError, and an untouched model, if there is nothing to replace, a
    name in `skip` matches nothing, a weight is not finite, or the model is quantised already.
    """
    if any(isinstance(m, Int8Linear) for m in model.modules()):
        raise ValueError("the model is quantised already")
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name in skip:
        if not any(path.rpartition(".")[2] == name for path in linears):
            raise ValueError(f"int8: {name!r} matches no linear layer")
    linears = {path: m for path, m in linears.items() if path.rpartition(".")[2] not in skip}
    if not linears:
        raise ValueError("int8: no linear layer to quantise")
    made = {}
    for path, linear in linears.items():
        try:
            made[path] = Int8Linear(linear, threshold)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    for path, layer in made.items():
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer)
    size = lambda m: sum(t.nbytes for t in (*m.parameters(), *m.buffers()))
    return sum(size(linears[path]) - size(made[path]) for path in made)
