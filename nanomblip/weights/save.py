"""Writing models in the official layout, whole, in parts, or with their LoRA merged; transformers opens what we write.

A folder holds one set of weights: what an earlier save left there is deleted.
"""

import hashlib
import json
import re
from pathlib import Path

import torch
import torch.nn as nn

from nanomblip.model.int8 import Int8Linear
from nanomblip.model.lora import lora_layers
from nanomblip.model.mblip import MBLIP
from nanomblip.model.mt5 import MT5
from nanomblip.weights.adapter import lora_tensors, save_adapter
from nanomblip.weights.files import (
    BLOCK,
    INDEX,
    SAFETENSORS_NAMES,
    SINGLE,
    digest,
    open_safetensors,
    read_json,
    write_atomic,
    write_json,
)
from nanomblip.weights.layout import (
    WeightsError,
    config_from_hf,
    config_to_hf,
    float_names,
    mt5_config_to_hf,
    mt5_names,
    official_names,
)
from nanomblip.weights.load import _digest_of_bases, _places_of_bases, build
from nanomblip.weights.records import RECORD, write_record
from nanomblip.weights.tensors import blocks_of, check_slice, checked, held_tensors

SHARD = 5_000_000_000  # bytes of a file of weights, at most
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # PEFT's files
_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def write_tensors(path: Path, entries: dict[str, tuple]) -> str:
    """Write a safetensors file block by block, atomically; returns its sha256.

    entries: key -> type, shape and a function that yields the numbers, some rows at a time: so no tensor need ever be
    whole in memory. The format: 8 bytes with the length of a JSON header, the header (where each tensor starts and
    ends), the tensors without gaps. Raises WeightsError when the disk refuses, and for a number that is not finite or
    that its type cannot hold; then the previous file is as it was.
    """
    sizes = {key: dtype.itemsize * torch.Size(shape).numel() for key, (dtype, shape, _) in entries.items()}
    order = sorted(entries, key=lambda key: (-entries[key][0].itemsize, key))  # large types first: all are aligned
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key in order:
        dtype, shape, _ = entries[key]
        header[key] = dict(
            dtype=SAFETENSORS_NAMES[dtype], shape=list(shape), data_offsets=[end, end := end + sizes[key]]
        )
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    sha = hashlib.sha256()

    def write(temporary):
        with open(temporary, "wb") as file:
            for data in (len(text).to_bytes(8, "little"), text):
                sha.update(data)
                file.write(data)
            for key in order:
                dtype, _, blocks = entries[key]
                written = 0
                for block in blocks():
                    block = checked(path, key, block.detach().to("cpu", dtype).contiguous(), f"not written as {dtype}")
                    data = block.view(-1).view(torch.uint8).numpy()
                    sha.update(data)
                    file.write(data)
                    written += data.nbytes
                assert written == sizes[key], f"{key}: {written} bytes came, its shape wants {sizes[key]}"

    try:
        write_atomic(Path(path), write)
    except OSError as error:
        raise WeightsError(f"{path}: not written ({error}); the previous file is untouched, free some space") from None
    return sha.hexdigest()


def write_shards(folder: Path, entries: dict[str, tuple], shard: int = SHARD) -> dict[str, str]:
    """`write_tensors` into model.safetensors, or into several files of at most `shard` bytes and an index.

    Returns name -> sha256. What an earlier save left in the folder is deleted: its files of weights, its index, its
    RECORD and an adapter (transformers would open the adapter, on top of another base).
    """
    sizes = {key: dtype.itemsize * torch.Size(shape).numel() for key, (dtype, shape, _) in entries.items()}
    groups, room = [[]], shard
    for key in entries:
        if groups[-1] and sizes[key] > room:
            groups.append([])
            room = shard
        groups[-1].append(key)
        room -= sizes[key]
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        names = [SINGLE]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)  # it is of files that are about to go
    if any((folder / name).exists() for name in names if name != SINGLE):
        (folder / INDEX).unlink(missing_ok=True)  # or it would name old and new shards after a crash
    done = {}
    for name, group in zip(names, groups):
        done[name] = write_tensors(folder / name, {key: entries[key] for key in group})
    if len(groups) > 1:
        shard_of = {key: name for name, group in zip(names, groups) for key in group}
        write_json(folder / INDEX, dict(metadata=dict(total_size=sum(sizes.values())), weight_map=shard_of))
    for path in folder.iterdir():
        ours = path.name in (SINGLE, *ADAPTER) or _SHARD_NAME.fullmatch(path.name)
        if (ours and path.name not in done) or (path.name == INDEX and len(groups) == 1):
            path.unlink()
    return done


def _entry(t: torch.Tensor, dtype: torch.dtype | None = None) -> tuple:
    """A tensor that is in memory, as `write_tensors` takes it; dtype: None = as it is."""
    return dtype or t.dtype, tuple(t.shape), lambda: [t]


def save_mblip(model: MBLIP, folder: Path, image_token: int, languages=None, dtype: torch.dtype | None = torch.float32,
               shard: int = SHARD) -> None:  # fmt: skip
    """Write `config.json` and the weights in the official layout; transformers opens the folder.

    image_token: see `config_to_hf`; languages: the codes it was trained to answer in, stored as one more key. dtype: of
    all floats, None = as each is held. shard: bytes a file, at most. LoRA is not written: see `save_merged` and
    `save_adapter`.

    What is held in int8 is written in int8, as bitsandbytes names it, and loads at once the next time. Such a folder
    gets a RECORD; transformers, which keeps `wo` and the head in floats, cannot run it.
    """
    folder, held, entries = Path(folder), held_tensors(model), {}
    official = float_names(model)
    for mine, key in official.items():
        stem, scale = key.removesuffix("weight"), held.get(mine.removesuffix("weight") + "SCB")
        if held[mine].dtype == torch.int8:
            entries[key], entries[stem + "SCB"] = _entry(held[mine]), _entry(scale)
            entries[stem + "weight_format"] = _entry(torch.zeros((), dtype=torch.uint8))
        else:
            entries[key] = _entry(held[mine], dtype)
    done = write_shards(folder, entries, shard)
    extra = {} if languages is None else {"languages": sorted(languages)}
    if int8 := [m for m in model.modules() if isinstance(m, Int8Linear)]:
        kept = [f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Linear)]
        extra["quantization_config"] = dict(
            quant_method="bitsandbytes",
            load_in_8bit=True,
            llm_int8_threshold=int8[0].threshold,
            llm_int8_skip_modules=[official[name].removesuffix(".weight") for name in kept],
        )
        write_record(folder, done, {"written_by": "nanomblip"})
    write_json(folder / "config.json", config_to_hf(model.cfg, image_token) | extra)


def save_trained(model: MBLIP, folder: Path, trained, vision: str, language_model: str, image_token: int,
                 languages=None, fingerprint: str | None = None, adapter: str = "") -> None:  # fmt: skip
    """Write some parameters only, as fp16, and where the others are: a few MB instead of the whole model.

    trained: names of parameters as in `model.named_parameters()`, LoRA not among them; vision and language_model: the
    folders of the two bases, relative to `folder`; their parameters must be the model's own. fingerprint: of these, if
    `frozen_fingerprint` has taken it already. adapter: a folder, relative to `folder`, that gets the model's LoRA;
    `load_mblip` merges it. Otherwise as `save_mblip`; transformers cannot open it.
    """
    folder, names, held = Path(folder), float_names(model), held_tensors(model)
    folder.mkdir(parents=True, exist_ok=True)  # the paths of the bases go through it
    tensors = {names[mine]: held[mine].detach().to(torch.float16) for mine in trained}
    fingerprint = fingerprint or frozen_fingerprint(model, trained, folder / vision, folder / language_model)
    bases = dict(vision=vision, language_model=language_model, sha256=fingerprint)
    if adapter:
        save_adapter(model.mt5, folder / adapter)
        bases["adapter"] = adapter
    bases["trained_sha256"] = digest(tensors | (lora_tensors(model.mt5) if adapter else {}))
    write_shards(folder, {key: _entry(t) for key, t in tensors.items()})
    extra = {} if languages is None else {"languages": sorted(languages)}
    write_json(folder / "config.json", config_to_hf(model.cfg, image_token) | extra | {"bases": bases})


def frozen_fingerprint(model: MBLIP, trained, vision: Path, language_model: Path) -> str:
    """`digest` of all parameters but the trained ones, in fp32: of the model's own, or if not fp32, of the files."""
    held, frozen = held_tensors(model), [mine for mine in float_names(model) if mine not in set(trained)]
    if all(held[mine].dtype == torch.float32 for mine in frozen):
        return digest({mine: held[mine] for mine in frozen})
    return _digest_of_bases(vision, language_model, frozen)


def save_merged(model: MBLIP, folder: Path, image_token: int, source: Path | tuple[Path, Path], languages=None,
                dtype: torch.dtype = torch.float32, shard: int = SHARD) -> None:  # fmt: skip
    """Write the whole model in floats with its LoRA merged into the weights; transformers computes the same with it.

    source: the folder that the model was loaded from, or those of its two bases, vision and language model: what is
    held in int8 or bf16 is taken from there as it was before (to merge into rounded weights, and round again, moves
    the model), one tensor at a time. Otherwise as `save_mblip`. Raises WeightsError when the source holds int8
    itself.
    """
    held, lora, entries, places = held_tensors(model), lora_layers(model), {}, None
    for mine, official in float_names(model).items():
        t, layer = held[mine], lora.get(mine.removesuffix(".weight"))
        rounded = t.dtype != torch.float32
        if rounded:
            places = places or _places(source)
            with open_safetensors(places[mine][0]) as file:
                check_slice(*places[mine], file.get_slice(places[mine][1]), t.shape)

        def blocks(mine=mine, t=t, layer=layer, rounded=rounded):
            rows = max(1, BLOCK // max(1, t.shape[-1]))
            parts = (
                blocks_of(*places[mine], t.shape) if rounded else ((i, t[i : i + rows]) for i in range(0, len(t), rows))
            )
            for start, part in parts:
                if layer is not None and layer.unmerged is None:
                    part = part.float() + layer.scale * layer.B[start : start + len(part)] @ layer.A
                yield part

        entries[official] = dtype, tuple(t.shape), blocks
    write_shards(Path(folder), entries, shard)
    extra = {} if languages is None else {"languages": sorted(languages)}
    write_json(Path(folder) / "config.json", config_to_hf(model.cfg, image_token) | extra)


def _places(source: Path | tuple[Path, Path]) -> dict[str, tuple[Path, str]]:
    """Our name -> file and key, for a folder in the official layout, one of `save_trained`, or two bases."""
    if isinstance(source, tuple):
        return _places_of_bases(*source)
    config = read_json(source / "config.json")
    if "bases" in config:
        return _places_of_bases(source / config["bases"]["vision"], source / config["bases"]["language_model"])
    return build(source, MBLIP, config_from_hf, official_names)[1]


def stored_parameters(folder: Path) -> int:
    """How many parameters the model of a folder has, from the headers of its files and those of its bases."""
    places = _places(folder)
    files = {path: open_safetensors(path) for path in {path for path, _ in places.values()}}
    return sum(torch.Size(files[path].get_slice(key).get_shape()).numel() for path, key in places.values())


def save_mt5(model: MT5, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a language model by itself in the official layout."""
    folder, parameters = Path(folder), dict(model.named_parameters())
    write_shards(folder, {official: _entry(parameters[mine], dtype) for mine, official in mt5_names(model).items()})
    write_json(folder / "config.json", mt5_config_to_hf(model.cfg) | {"architectures": ["MT5ForConditionalGeneration"]})
