"""Checkpoints of any size in the official layout, with random weights: `python tests/make_checkpoint.py --size mblip-mt0-xl --out /tmp/xl`.

Config, sharded safetensors with an index, picture settings and a tokenizer of 250,100 pieces, as they lie on the hub, but nothing in them means
anything: for measuring memory and time, and for the tests. Tensors are drawn some rows at a time, so that the 19.3 GB of mBLIP mT0-XL
need no memory to speak of. Each number is a function of (seed, key, place), whatever the type and the shards.
"""

import sys
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanomblip.data.emoji import ROOT as DATA
from nanomblip.data.image import ImageConfig
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.flags import flag, parse_flags, run_main
from nanomblip.model.mblip import MBLIP, PRESETS, MBLIPConfig
from nanomblip.weights.files import BLOCK, write_json
from nanomblip.weights.layout import EMBED_ALIASES, config_to_hf, mt5_config_to_hf, mt5_names, official_names
from nanomblip.weights.save import write_shards


@dataclass(frozen=True)
class Config:
    size: str = flag("mblip-mt0-xl", "one of the sizes", tuple(PRESETS))
    out: str = flag("", "folder to write to")
    dtype: str = flag("fp32", "type of all tensors", ("fp32", "bf16", "fp16"))
    layers: int = flag(0, "layers of the ViT, of each side of the language model, and twice as many of the Q-Former; 0 = all")
    part: str = flag("all", "all, or the language model alone, as an mT0 lies on the hub", ("all", "llm"))
    pieces: int = flag(0, "pieces of the tokenizer; 0 = 12 less than rows of the embedding, as in mT5")
    shard: float = flag(10.0, "GB a file, at most")
    seed: int = flag(0, "of the weights")
    aliases: bool = flag(False, "as old files: the shared embedding under its three names")
    legacy: bool = flag(False, "as a config.json of 2023: no image token, architecture mBLIP, tie_word_embeddings true")


def cut_layers(cfg: MBLIPConfig, layers: int) -> MBLIPConfig:
    """The same widths with fewer layers; two of the Q-Former's for each, since every second looks at the picture."""
    return replace(cfg, vit=replace(cfg.vit, layers=layers), qformer=replace(cfg.qformer, layers=2 * layers),
                   mt5=replace(cfg.mt5, layers=layers, decoder_layers=layers))  # fmt: skip


def deviation(name: str, shape: tuple, cfg: MBLIPConfig) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's numbers: about what trained ones have, so that activations neither die nor explode."""
    if "norm" in name:
        return (1.0 if name.endswith("weight") else 0.0), 0.1
    if name.endswith((".q.weight",)) and name.startswith("mt5."):
        return 0.0, (cfg.mt5.width * cfg.mt5.head_width) ** -0.5  # attention without 1/sqrt(K)
    if name in ("mt5.embed.weight", "queries"):
        return 0.0, 1.0
    if name.endswith("bias.weight"):
        return 0.0, 0.5
    if name.endswith("bias"):
        return 0.0, 0.02
    return 0.0, torch.Size(shape[1:]).numel() ** -0.5 if len(shape) > 1 else 0.1


def drawn(key: str, shape: tuple, mean: float, std: float, seed: int):
    """A function that yields the rows of a tensor."""

    def blocks():
        generator = torch.Generator().manual_seed(int.from_bytes(sha256(f"{seed}/{key}".encode()).digest()[:7], "big"))
        rows = max(1, BLOCK // max(1, torch.Size(shape[1:]).numel()))
        for start in range(0, shape[0], rows):
            yield torch.randn(min(rows, shape[0] - start), *shape[1:], generator=generator) * std + mean

    return blocks


def padded_pieces(pieces: int) -> bytes:
    """The embedded tokenizer with pieces at its end that no text contains. A SentencePiece model is a protobuf message, in which further
    members of a list (field 1: the pieces; each with its text, field 1, and its kind, field 3, 5 = unused) may simply be appended."""
    parts = [(DATA / "spiece.model").read_bytes()]
    for i in range(len(Tokenizer(DATA / "spiece.model")), pieces):
        text = f"<unused_{i}>".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x18\x05"
        parts.append(b"\x0a" + bytes([len(piece)]) + piece)
    return b"".join(parts)


def write_checkpoint(folder: Path, cfg: MBLIPConfig, dtype: torch.dtype = torch.float32, *, part: str = "all", pieces: int = 0, shard: int = 10**10,
                     seed: int = 0, aliases: bool = False, legacy: bool = False) -> None:  # fmt: skip
    """See the flags."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = MBLIP(cfg)
    if part == "all":
        names, prefix, ours = official_names(model), "language_model.", lambda name: name
    else:
        model = model.mt5
        names, prefix, ours = mt5_names(model), "", lambda name: f"mt5.{name}"
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    entries = {key: (dtype, shapes[name], drawn(ours(name), shapes[name], *deviation(ours(name), shapes[name], cfg), seed))
               for name, key in names.items()}  # fmt: skip
    if aliases:
        entries |= {prefix + key: entries[prefix + "shared.weight"] for key in EMBED_ALIASES}
    write_shards(folder, entries, shard)

    pieces = pieces or cfg.mt5.vocab - 12
    hf = config_to_hf(cfg, pieces) if part == "all" else mt5_config_to_hf(cfg.mt5)
    if legacy:
        hf.pop("image_token_index", None)
        (hf["text_config"] if part == "all" else hf)["tie_word_embeddings"] = True
        hf |= dict(architectures=["mBLIP"], transformers_version="4.31.0", torch_dtype="float32", initializer_factor=1.0)
    write_json(folder / "config.json", hf)
    (folder / "spiece.model").write_bytes(padded_pieces(pieces))
    if part == "all":
        write_json(folder / "preprocessor_config.json", ImageConfig(size=cfg.vit.image_size).to_hf())


def main(argv: list[str]) -> int:
    flags = parse_flags(Config, argv, "Write a checkpoint with random weights in the official layout.")
    if not flags.out:
        raise ValueError("--out is missing; name a folder")
    cfg = PRESETS[flags.size] if not flags.layers else cut_layers(PRESETS[flags.size], flags.layers)
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[flags.dtype]
    write_checkpoint(Path(flags.out), cfg, dtype, part=flags.part, pieces=flags.pieces, shard=int(flags.shard * 1e9), seed=flags.seed,
                     aliases=flags.aliases, legacy=flags.legacy)  # fmt: skip
    return 0


if __name__ == "__main__":
    run_main(main)
