"""The optimizers of both stages. Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): momentum
whose update is made orthogonal, for matrices.

torch.optim.Muon does the same, always in bf16 and one matrix after the other. On a processor without instructions
for bf16 torch emulates them, at a ninth of fp32's speed, and a step of train.py spent nearly all of its time there.
So here the type follows the processor, and matrices of one shape are made orthogonal together.
"""

import torch
import torch.nn as nn

from nanomblip.model.int8_kernels import has_bf16
from nanomblip.model.lora import LoRALinear

WEIGHT_DECAY = 0.1  # AdamW's, the paper's
MUON_LR, MUON_DECAY = 0.02, 0.3  # singular values stay near the inverse of the decay
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a, b, c of the quintic: steepest at 0, so that five rounds suffice


def orthogonalise(x: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """The nearest matrices with singular values of 1, roughly (0.7 to 1.2): (M, rows, columns) -> the same shape
    and type.

    Newton-Schulz: each round maps every singular value s to a s + b s^3 + c s^5 by products of matrices alone. It
    starts from x / |x| (Frobenius norm), whose singular values are at most 1.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # (M, short, long): the smaller of the two products X X^T
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        gram = x @ x.mT  # (M, short, short)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum m and decoupled weight decay, for 2-D parameters of one group or more. For each
    matrix with a gradient G:

        M = m M + (1 - m) G;   W = (1 - lr decay) W - lr sqrt(max(1, rows / columns)) orthogonalise((1 - m) G + m M)

    dtype: of the products; None: bf16 where the processor or the GPU has instructions for it, else float32.
    ValueError for a parameter that is not a matrix.
    """

    def __init__(
        self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1, dtype: torch.dtype | None = None
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon is for matrices; a parameter has the shape {tuple(p.shape)}")

    def dtype_for(self, device: torch.device) -> torch.dtype:
        return self.dtype or (torch.bfloat16 if has_bf16(device) else torch.float32)

    @torch.no_grad()
    def step(self, closure=None):
        """One update; closure, as torch's optimizers take it, is called with gradients on and its loss returned."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            same = {}  # (shape, device) -> matrices
            for p in group["params"]:
                if p.grad is not None:
                    same.setdefault((p.shape, p.device), []).append(p)
            for (shape, device), params in same.items():
                updates = []
                for p in params:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum_buffer"]
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                update = orthogonalise(torch.stack(updates).to(self.dtype_for(device)))  # (M, rows, columns)
                rate = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for p, u in zip(params, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u, alpha=-rate)
        return loss


def build_optimizers(
    model: nn.Module, rate_of: dict[nn.Parameter, float], muon: bool, beta2: float
) -> list[torch.optim.Optimizer]:
    """Optimizers of the trained parameters, each group with its peak rate as `peak`: AdamW, as in the paper, and
    with `muon` Muon for the matrices inside the towers' blocks.

    rate_of: AdamW's peak rate of each trained parameter. Decayed are the matrices of linear, convolution and
    embedding layers, and LoRA's, found by module type; norms, biases, position tables and queries are not: pulling
    a norm towards 0 or a query towards the others helps nobody. (The original code went by substrings and so
    decayed the Q-Former's first norm, spelled "layernorm".)
    """
    groups, hidden = {}, []  # (rate, decay) -> parameters
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad:
                continue
            if muon and isinstance(module, nn.Linear) and name == "weight" and ".blocks." in path:
                hidden.append(p)
                continue
            matrix = isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)) and name == "weight"
            decay = WEIGHT_DECAY if matrix or isinstance(module, LoRALinear) else 0.0
            groups.setdefault((rate_of[p], decay), []).append(p)
    rows = [dict(params=params, lr=rate, peak=rate, weight_decay=decay) for (rate, decay), params in groups.items()]
    optimizers = [torch.optim.AdamW(rows, betas=(0.9, beta2), eps=1e-8, fused=True)]
    if hidden:
        optimizers.append(Muon([dict(params=hidden, peak=MUON_LR)], lr=MUON_LR, weight_decay=MUON_DECAY))
    return optimizers
