"""LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): linear layers whose frozen weight takes a byte a number.

Each row of W (one output) is scaled by its largest magnitude and rounded to -127..127, each row of x (one piece) likewise:

    W ~ SCB / 127 * CB           y = (s_x SCB / 127^2) (q_x CB^T) + b        q_x CB^T summed exactly, in int32

One large number in a row of x would push all the others of the row towards 0, and transformers do have such numbers, always
in the same few columns. So the columns of x in which some magnitude reaches the threshold (6.0) are left out of q_x and multiplied in
floating point with the same columns of the dequantised W.

With threshold 0 x is not rounded at all: the weight alone is int8 and is dequantised where it is used.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

THRESHOLD = 6.0  # the paper's, section 3.2


def quantize_rows(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float (R, C) -> CB int8 (R, C) and SCB float32 (R,), the largest magnitude of each row; w ~ SCB / 127 * CB.

    A row of zeros stays zeros. ValueError where a number is not finite.
    """
    scale = w.abs().amax(1).float()  # (R,)
    if not scale.isfinite().all():
        raise ValueError(f"int8: {(~scale.isfinite()).sum().item()} of {len(scale)} rows hold a number that is not finite")
    steps = torch.where(scale > 0, 127.0 / scale, 0.0)
    return torch.round(w * steps[:, None]).to(torch.int8), scale


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
        self.register_buffer("weight", weight)
        self.register_buffer("SCB", SCB)
        self.register_buffer("bias", bias)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the layer computes with: (out, in)."""
        return (self.weight.float() * (self.SCB / 127)[:, None]).to(dtype)

    def forward(self, x):
        if self.threshold == 0:
            y = F.linear(x, self.dequantized(x.dtype))
        else:
            y = _Int8Product.apply(x.reshape(-1, self.in_features), self).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, threshold={self.threshold}"


class _Int8Product(torch.autograd.Function):
    """x (M, in) @ W^T by LLM.int8(); backward as if x had not been rounded, with the dequantised weight."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return int8_product(x, layer.weight, layer.SCB, layer.threshold)

    @staticmethod
    def backward(ctx, grad):  # (M, out)
        return grad @ ctx.layer.dequantized(grad.dtype), None


def int8_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, threshold: float) -> torch.Tensor:
    """The equation at the top, without the bias: x float (M, in), weight int8 (out, in), scale (out,) -> (M, out) in x's type.

    The readable reference: any faster kernel must agree with it.
    """
    outlier = (x.abs() >= threshold).any(0)  # (in,)
    q, row_scale = quantize_rows(x.masked_fill(outlier, 0))  # (M, in), (M,)
    total = q.to(torch.int32) @ weight.to(torch.int32).T  # (M, out), exact
    y = total.float() * (row_scale[:, None] * scale / 127**2)
    if outlier.any():
        columns = weight[:, outlier].float() * (scale / 127)[:, None]  # (out, outliers)
        y = y + x[:, outlier].float() @ columns.T
    return y.to(x.dtype)


def quantize_linears(model: nn.Module, skip: tuple[str, ...] = (), threshold: float = THRESHOLD) -> int:
    """Replace every linear layer of a model by an Int8Linear, but those whose name (the last part of their path) is in `skip`.

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
