"""LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): linear layers whose frozen weight takes a byte a number.

Each row of W (one output) is scaled by its largest magnitude and rounded to -127..127, each row of x (one token)
likewise:

    W ~ SCB / 127 * CB           y = (s_x / 127) (SCB / 127) (q_x CB^T) + b        q_x CB^T summed exactly, in int32

One large number in a row of x would push all the others of the row towards 0, and transformers do have such numbers,
always in the same few columns. So the columns of x in which some magnitude reaches the threshold (6.0) are left out of
q_x and multiplied in floating point with the same columns of the dequantised W.

With threshold 0 every column is left out: the weight alone is in int8.

The sum of codes q_x CB^T is where the time goes, and it is exact. The fast ways to compute it, with the same result to
the bit, are in int8_kernels.py; `int8_path("reference")` takes the readable one everywhere.
"""

from math import inf

import torch
import torch.nn as nn

from nanomblip.model import int8_kernels as kernels

THRESHOLD = 6.0  # the paper's, section 3.2


def quantize_rows(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float (R, C) -> CB int8 (R, C) and SCB float32 (R,), the largest magnitude of each row; w ~ SCB / 127 * CB.

    A row of zeros stays zeros. ValueError where a number is not finite.
    """
    scale = kernels.largest_magnitude(w, 1).float()  # (R,)
    if len(scale) and not scale.amax().item() < inf:
        raise ValueError(
            f"int8: {(~scale.isfinite()).sum().item()} of {len(scale)} rows hold a number that is not finite"
        )
    steps = 127 / scale.clamp(min=1e-36)  # of less, 127 / scale would be infinite
    return (w * steps[:, None]).round_().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A frozen linear layer in int8; x float (..., in) -> (..., out) in x's type. It trains nothing, but gradients pass
    to x.

    Parts: `weight` int8 (out, in) and `SCB` float32 (out,), named as bitsandbytes names them, and the bias as it was.
    The weight is rounded to fp16 first: so CB and SCB are those of bitsandbytes to the bit. threshold: above.
    ValueError for a weight that is not finite (in fp16), for x that is not, and for a negative threshold.
    """

    def __init__(self, linear: nn.Linear, threshold: float = THRESHOLD):
        weight, scale = quantize_rows(linear.weight.detach().half())
        self._set(weight, scale, None if linear.bias is None else linear.bias.detach().clone(), threshold)
        self.train(linear.training)

    @classmethod
    def from_tensors(
        cls, weight: torch.Tensor, SCB: torch.Tensor, bias: torch.Tensor | None = None, threshold: float = THRESHOLD
    ):
        """A layer from codes and scales that exist already: weight int8 (out, in), SCB float32 (out,), bias float
        (out,) or None.

        The tensors are taken as they are, not copied. ValueError where a type or a shape is another, or a scale is
        negative or not finite.
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
        if not 0 <= threshold < inf:
            raise ValueError(f"int8 threshold {threshold}: at least 0")
        self.out_features, self.in_features = weight.shape
        self.threshold = threshold
        self._buffers["weight"] = weight  # not by register_buffer, which takes the property below for something else
        self.register_buffer("SCB", SCB)
        self.register_buffer("bias", bias)
        self.packed, self.short_rows = None, 0  # codes that `pack` made of `weight`; rows that would have liked them
        self.columns = {}  # see `fast_product`

    @property
    def weight(self) -> torch.Tensor:
        """CB: int8 (out, in)."""
        if self.packed is not None:
            self.replace(kernels.unpack(self.packed), self.SCB)
        return self._buffers["weight"]

    def replace(self, weight: torch.Tensor, SCB: torch.Tensor) -> None:
        """Compute with other codes and scales from now on."""
        self.packed, self.short_rows, self.columns = None, 0, {}
        self._buffers["weight"], self.SCB = weight, SCB

    def pack(self) -> None:
        """Keep the codes in the order that few rows like best, if there is one, until `weight` is asked for."""
        codes = self._buffers["weight"]
        if codes is not None and codes.device.type == "cpu" and self.in_features > 1 and kernels.wants_packed():
            self._buffers["weight"], self.packed = None, kernels.pack(codes)

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
        return y.view(*x.shape[:-1], self.out_features)

    def product(self, x: torch.Tensor, often: bool = True) -> torch.Tensor:
        """x (M, in) -> (M, out); often: may more such products follow before `weight` is asked for?"""
        if kernels.path == "fast" and often and len(x) <= kernels.FEW_ROWS:
            self.short_rows += len(x)
            if self.short_rows > kernels.PACK_AFTER:
                self.pack()
        if kernels.path == "fast" and x.device.type == "cpu":
            codes = self.weight if self.packed is None else self.packed
            y = fast_product(x, codes, self.SCB, self.threshold, self.columns)
        else:
            y = int8_product(x, self.weight, self.SCB, self.threshold)
        return y if self.bias is None else y.add_(self.bias)

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
        return kernels.input_gradient(grad, ctx.layer.weight, ctx.layer.SCB), None


def find_outliers(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Columns of x (M, in) in which some magnitude reaches the threshold: bool (in,). ValueError where x is not finite.

    If these are more than half, all are: the rest would not be worth a product of its own. In T5 this happens before
    `wo`, which reads what no norm has scaled (in nano's mT0 half of its columns reach 6, and none of those of q, k, v
    and o).
    """
    largest = kernels.largest_magnitude(x, 0)
    if not largest.amax().item() < inf:
        raise ValueError(
            f"int8: {(~largest.isfinite()).sum().item()} of {len(largest)} inputs hold a number that is not finite"
        )
    outlier = largest >= threshold
    return outlier if 2 * outlier.sum().item() <= len(outlier) else torch.ones_like(outlier)


def int8_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, threshold: float) -> torch.Tensor:
    """The equation at the top without the bias: x float (M, in), weight int8 (out, in), scale (out,) -> (M, out)."""
    if len(x) == 0:
        return x.new_zeros(0, len(scale))
    outlier = find_outliers(x, threshold)  # (in,)
    if outlier.all():
        y = torch.zeros(len(x), len(scale), device=x.device)  # (M, out)
    else:
        q, row_scale = quantize_rows(x * ~outlier)  # (M, in), (M,)
        y = kernels.code_product(q, weight).mul_((row_scale / 127)[:, None])  # (M, out)
    if outlier.any():
        where = outlier.nonzero()[:, 0]
        x_out = x.index_select(1, where).float()  # (M, outliers)
        block = max(kernels.BLOCK, 2**22 // max(x_out.shape))
        for start in range(0, len(weight), block):
            y[:, start : start + block].addmm_(x_out, weight[start : start + block].index_select(1, where).float().T)
    return y.mul_(scale / 127).to(x.dtype)


def fast_product(
    x: torch.Tensor, codes, scale: torch.Tensor, threshold: float, columns: dict[int, torch.Tensor]
) -> torch.Tensor:
    """`int8_product` on a CPU. codes: the weight, packed or not; columns: the weight's columns that the layer keeps.

    To gather the outliers' columns takes as long as a product of few rows. They are always the same few, so they are
    kept. Many outliers are not: for few rows their part of x is written as three int8 digits, each the rounded
    remainder of those before, which are three more rows of the same product and together as exact as fp32.
    """
    if len(x) == 0:
        return x.new_zeros(0, len(scale))
    kind, x = x.dtype, x.float()
    outlier = find_outliers(x, threshold)  # (in,)
    where = outlier.nonzero()[:, 0]
    if len(where) > kernels.MANY_OUTLIERS and len(x) > kernels.FEW_ROWS and isinstance(codes, torch.Tensor):
        return int8_product(x, codes, scale, threshold).to(kind)
    parts = [quantize_rows(x * ~outlier if len(where) else x)]  # codes and row scales, whose sum says x
    if len(where) > kernels.MANY_OUTLIERS:
        rest = x * outlier
        for _ in range(3):
            q, row_scale = quantize_rows(rest)
            parts.append((q, row_scale))
            rest = rest - q * (row_scale / 127)[:, None]
        where = where[:0]
    q, row_scale = (torch.cat(tensors) for tensors in zip(*parts)) if len(parts) > 1 else parts[0]
    y = kernels.code_product(q, codes).mul_((row_scale / 127)[:, None])  # (M, out), or of four parts (4 M, out)
    y = y.unflatten(0, (len(parts), len(x))).sum(0) if len(parts) > 1 else y
    if len(where):
        y.addmm_(x.index_select(1, where), kernels.kept_columns(codes, where, x.shape[1], columns).float())
    return y.mul_(scale / 127).to(kind)


def quantize_linears(model: nn.Module, skip: tuple[str, ...] = (), threshold: float = THRESHOLD) -> int:
    """Replace every linear layer of a model by an Int8Linear, but those whose name (the last part of their path) is in
    `skip`.

    By default `wo` and the head go too, which transformers leaves in floats. Measured on nano, captions of held-out
    batches, the whole language model in int8 against floats, and what fp32 would take for mT0-XL:

                            KL of the answers    argmax changed    mT0-XL, linear layers
        all                 0.0011 nats          1.4 %              3.2 GB
        but wo              0.0007               1.1 %              4.7 GB
        but the head        0.0010               1.2 %              4.8 GB
        but both            0.0006               1.0 %              6.3 GB
        all, threshold 0    0.0005               0.9 %              3.2 GB

    On a nano whose activations had grown to 10,000 (weights/LOG.md) all of them were five to ten times as large.

    Add LoRA afterwards, around the int8 layers. Returns the bytes saved. ValueError, and an untouched model, if there
    is nothing to replace, a name in `skip` matches nothing, a weight is not finite, or the model is quantised already.
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
