"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen linear layer learns through two thin matrices beside it.

    y = W x + s B A dropout(x)        A (r, in), B (out, r),  s = alpha / r

W stays as it is. B starts at zero, so that at first nothing changes; A starts at random, so that B has something to
learn from. Of mT0-XL's 3.7 billion parameters 17.7 million are trained in this way at r = 8, half a percent. rsLoRA
(Kalajdzievski 2023, arXiv 2312.03732) uses s = alpha / sqrt(r), which keeps the size of the update when r grows.

After training B A can be added to W (`merge_lora`): the same function, with nothing beside it.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanomblip.model.int8 import Int8Linear, quantize_rows

# Names of linear layers in mt5.py: the paper adapts all of them; q and v are the choice of the LoRA paper.
LORA_TARGETS = {"all": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"), "qv": ("q", "v")}


class LoRALinear(nn.Module):
    """A linear layer and its two thin matrices; x float (..., in) -> (..., out), in the type of the layer's own output.

    base: frozen here; r: rank, at least 1; dropout: on what A reads. A and B are fp32 whatever the base is.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        check_lora(r, alpha, dropout)
        self.base = base.requires_grad_(False)  # float or int8
        self.r, self.alpha, self.dropout, self.rslora = r, alpha, dropout, rslora
        where = dict(dtype=torch.float32, device=(base.SCB if isinstance(base, Int8Linear) else base.weight).device)
        self.A = nn.Parameter(torch.empty(r, base.in_features, **where))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, **where))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # uniform in +-1/sqrt(in), as the original code has it
        self.unmerged = None  # W, or its codes and scales, while B A is merged into it
        self.train(base.training)  # a fresh module would drop out even inside a model in eval mode

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def forward(self, x):
        y = self.base(x)
        if self.unmerged is not None:
            return y
        low = F.linear(F.dropout(x.float(), self.dropout, self.training), self.A)  # (..., r)
        return y + (F.linear(low, self.B) * self.scale).to(y.dtype)  # (..., out)

    @torch.no_grad()
    def merge(self) -> None:
        """W becomes W + s B A. An int8 W is dequantised for it and then quantised freshly, so it moves by up to half a
        step of its own.

        ValueError if it is merged already, or if the sum is not finite.
        """
        if self.unmerged is not None:
            raise ValueError("LoRA is merged already; unmerge it first")
        change = self.scale * self.B @ self.A
        if isinstance(self.base, Int8Linear):
            weight, scale = quantize_rows((self.base.dequantized() + change).half())
            self.unmerged = self.base.weight, self.base.SCB
            self.base.replace(weight, scale)
            return
        merged = (self.base.weight.float() + change).to(self.base.weight.dtype)
        if not merged.isfinite().all():
            raise ValueError(f"LoRA merged into {self.base.weight.dtype} is not finite")
        self.unmerged = self.base.weight.data
        self.base.weight.data = merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """W becomes what it was, to the bit (it was kept: subtracting would round). ValueError if it is not merged."""
        if self.unmerged is None:
            raise ValueError("LoRA is not merged")
        if isinstance(self.base, Int8Linear):
            self.base.replace(*self.unmerged)
        else:
            self.base.weight.data = self.unmerged
        self.unmerged = None


def check_lora(r: int, alpha: float, dropout: float) -> None:
    """ValueError for a rank below 1, an alpha that is not a positive number, a dropout outside 0 <= p < 1."""
    if not (isinstance(r, int) and r >= 1):
        raise ValueError(f"LoRA rank {r}: at least 1")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"LoRA alpha {alpha}: must be a positive number")
    if not 0 <= dropout < 1:
        raise ValueError(f"LoRA dropout {dropout}: at least 0, below 1")


def is_linear(module: nn.Module) -> bool:
    """A linear layer, in floating point or in int8."""
    return isinstance(module, (nn.Linear, Int8Linear))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Path -> layer, for every LoRALinear in a model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(model: nn.Module, targets: str | tuple[str, ...], r: int = 8, alpha: float = 16.0, dropout: float = 0.0,
             rslora: bool = False) -> int:  # fmt: skip
    """Wrap the linear layers of a model whose name (the last part of their path) is in `targets`, and freeze all the
    rest.

    targets: "all", "qv" or names; give the language model (`mblip.mt5`), since the Q-Former's layers are called q and v
    as well. Returns the number of trained parameters. ValueError, and an untouched model, if a name matches no linear
    layer or the model has LoRA already.
    """
    names = LORA_TARGETS[targets] if isinstance(targets, str) and targets in LORA_TARGETS else targets
    if isinstance(names, str) or not names:
        raise ValueError(f"LoRA targets {targets!r}: {', '.join(LORA_TARGETS)} or a list of names")
    check_lora(r, alpha, dropout)
    if lora_layers(model):
        raise ValueError("the model has LoRA already; a second one would adapt the first")
    found = [path for path, module in model.named_modules() if is_linear(module) and path.rpartition(".")[2] in names]
    for name in names:
        if not any(path.rpartition(".")[2] == name for path in found):
            raise ValueError(f"LoRA target {name!r} matches no linear layer")
    model.requires_grad_(False)
    for path in found:
        owner, _, leaf = path.rpartition(".")
        parent = model.get_submodule(owner)
        setattr(parent, leaf, LoRALinear(getattr(parent, leaf), r, alpha, dropout, rslora))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def merge_lora(model: nn.Module) -> None:
    """Merge every layer, or none: ValueError, and a model as before, if one cannot be merged or there is no LoRA."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA to merge")
    done = []
    try:
        for path, layer in layers.items():
            try:
                layer.merge()
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            done.append(layer)
    except ValueError:
        for layer in done:
            layer.unmerge()
        raise


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`, to the bit; ValueError if nothing is merged."""
    layers = list(lora_layers(model).values())
    if not layers or any(layer.unmerged is None for layer in layers):
        raise ValueError("the model has no merged LoRA")
    for layer in layers:
        layer.unmerge()
