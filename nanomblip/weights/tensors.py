"""Tensors out of safetensors files: checked, and some rows at a time, so that none need be in memory twice."""

from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError

from nanomblip.model.int8 import quantize_rows
from nanomblip.model.lora import lora_layers
from nanomblip.weights.files import BLOCK, open_safetensors
from nanomblip.weights.layout import WeightsError

FLOATS = ("F32", "BF16", "F16", "F64")  # types of safetensors that become a parameter


def same_tensor(path: Path, key: str, other_path: Path, other_key: str) -> bool:
    """Whether two tensors hold the same numbers, block by block."""
    with open_safetensors(path) as a, open_safetensors(other_path) as b:
        a, b = a.get_slice(key), b.get_slice(other_key)
        shape = a.get_shape()
        if not shape or shape != b.get_shape() or a.get_dtype() != b.get_dtype():
            return False
        rows = max(1, BLOCK // max(1, shape[-1]))
        return all(torch.equal(a[i : i + rows], b[i : i + rows]) for i in range(0, shape[0], rows))


def blocks_of(path: Path, key: str, shape):
    """The rows of a tensor, some at a time: where they start, and they.

    The file is opened anew every 16 blocks: pages once read of a mapped file count as ours until it is closed, and a
    shard has ten gigabytes of them.
    """
    rows = max(1, BLOCK // max(1, torch.Size(shape[1:]).numel()))
    for first in range(0, shape[0], 16 * rows):
        with open_safetensors(path) as file:
            stored = file.get_slice(key)
            for start in range(first, min(first + 16 * rows, shape[0]), rows):
                yield start, checked(path, key, stored[start : start + rows])


def checked(path: Path, key: str, value: torch.Tensor, why: str = "the file is damaged") -> torch.Tensor:
    """`value`, if its numbers are all finite."""
    if value.is_floating_point():
        # A sum is 14 times as fast as isfinite, but that of finite numbers can overflow.
        for part in value.view(-1).split(BLOCK):
            if not part.sum().isfinite() and not part.isfinite().all():
                raise WeightsError(f"{path}: {key} holds numbers that are not finite; {why}")
    return value


def check_slice(path: Path, key: str, stored, shape, kind: torch.dtype | None = None) -> None:
    """Raise WeightsError unless a tensor in a file has this shape and is of this type (None: floating point)."""
    found, name = tuple(stored.get_shape()), stored.get_dtype()
    if found != tuple(shape):
        raise WeightsError(f"{path}: {key} has shape {found}, its config.json wants {tuple(shape)}")
    if name not in (FLOATS if kind is None else ("I8",)):
        wanted = "floating point" if kind is None else "int8"
        raise WeightsError(f"{path}: {key} has the type {name}, expected {wanted}")


def read_tensor(file, path: Path, key: str, shape, kind: torch.dtype | None = None) -> torch.Tensor:
    """One tensor of an open file as it is stored, checked: a view of the mapped file. kind: as in `check_slice`."""
    try:
        check_slice(path, key, file.get_slice(key), shape, kind)
        return checked(path, key, file.get_tensor(key))
    except (SafetensorError, RuntimeError) as error:
        raise WeightsError(f"{path}: {key} cannot be read ({error})") from None


def convert(path: Path, key: str, out: torch.Tensor) -> None:
    """Fill `out` with a tensor of a file, block by block; WeightsError where its type cannot hold a number."""
    try:
        for start, block in blocks_of(path, key, out.shape):
            rows = out[start : start + len(block)]
            rows.copy_(block)
            checked(path, key, rows, f"as {out.dtype} that is: they are beyond its range")
    except (SafetensorError, RuntimeError) as error:
        raise WeightsError(f"{path}: {key} cannot be read ({error})") from None


def quantize(path: Path, key: str, out: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Fill codes, int8 (out, in), and scales, float32 (out,), with those of a weight in a file, block by block."""
    codes, scales = out
    try:
        for start, block in blocks_of(path, key, codes.shape):
            rows = slice(start, start + len(block))
            codes[rows], scales[rows] = quantize_rows(block.half().float())  # by way of fp16, as bitsandbytes
    except (SafetensorError, RuntimeError, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path}: {key} cannot become int8 ({error})") from None


def held_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Our name -> tensor, named as in a model without LoRA: A and B are left out, and an int8 layer has its SCB."""
    own = {f"{path}.{side}" for path, layer in lora_layers(model).items() for side in "AB"}
    return {name.replace(".base.", "."): t for name, t in model.state_dict().items() if name not in own}
