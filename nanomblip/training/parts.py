"""The parts of mBLIP as the paper counts them: which learn, which are frozen, what they take."""

from functools import partial

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from nanomblip.model.lora import lora_layers
from nanomblip.model.mblip import MBLIP

WARMUP = {"projection": ("projection",), "names": ("Q-Former", "queries", "projection")}  # trained in stage 1
STAGE2 = ("Q-Former", "queries", "projection", "LoRA")
EVERYTHING = ("ViT", "Q-Former", "queries", "projection", "language model")


def model_parts(model: MBLIP) -> dict[str, list[torch.Tensor]]:
    """Name of each part -> its tensors, codes and scales of int8 layers included; LoRA apart from the language
    model it adapts."""
    tensors_of = lambda module: [*module.parameters(), *module.buffers()]
    lora = [p for layer in lora_layers(model.mt5).values() for p in (layer.A, layer.B)]
    own = {id(p) for p in lora}
    parts = {
        "ViT": tensors_of(model.vit),
        "Q-Former": tensors_of(model.qformer),
        "queries": [model.queries],
        "projection": tensors_of(model.proj),
        "language model": [t for t in tensors_of(model.mt5) if id(t) not in own],
    }
    return parts | ({"LoRA": lora} if lora else {})


def parameter_count(tensors) -> int:
    """Numbers that a model consists of; the scales of int8 layers are a way of writing them, not more of them."""
    return sum(t.numel() for t in tensors if isinstance(t, nn.Parameter) or t.dtype == torch.int8)


def mark_trainable(model: MBLIP, names: tuple[str, ...]) -> None:
    """Freeze all parts but those named."""
    for name, tensors in model_parts(model).items():
        for t in tensors:
            if isinstance(t, nn.Parameter):
                t.requires_grad_(name in names)


def parts_table(model: MBLIP, rates: dict[str, list[str]]) -> str:
    """For people, before step 0: parameters, what is trained, type and bytes of each part; rates: column -> peak
    rate of each part, in the order of `model_parts`, "" where it is frozen."""
    lines = [f"{'part':<16}{'parameters':>14}{'type':>23}{'MB':>10}" + "".join(f"  {column:<20}" for column in rates)]
    total = [0, 0]
    for i, (name, tensors) in enumerate(model_parts(model).items()):
        row = [parameter_count(tensors), sum(t.nbytes for t in tensors)]
        total = [a + b for a, b in zip(total, row)]
        kind = "/".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
        cells = "".join(f"  {column[i] or 'frozen':<20}" for column in rates.values())
        lines.append(f"{name:<16}{row[0]:>14,}{kind:>23}{row[1] / 1e6:>10.1f}{cells}".rstrip())
    return "\n".join([*lines, f"{'all':<16}{total[0]:>14,}{'':>23}{total[1] / 1e6:>10.1f}"])


def add_checkpointing(model: MBLIP) -> None:
    """Let each block of the Q-Former and the language model drop its activations and compute them again in the
    backward pass (Chen et al. 2016, arXiv 1604.06174)."""
    for stack in (model.qformer, model.mt5.encoder, model.mt5.decoder):
        for block in stack.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
