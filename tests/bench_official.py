"""What the official sizes cost: `python tests/bench_official.py --work /tmp/bench --layers 4` (4.3 GB of disk; --layers 0, all of them: 25 GB).

Random weights in the official shapes, each measurement in a process of its own whose peak memory the kernel tells us when it ends:

1. from fp32 shards to int8, the int8 written, and a caption of 20 pieces with 5 beams
2. the same from the int8 file: time to the first piece, beside the time the disk and the image encoder need alone
3. the caption in fp32, by us and by transformers, and how far their logits are apart (--transformers fp32), or by transformers in bf16

Seconds are given twice: by the clock / of the processor.

Not collected by pytest. Delete --work afterwards.
"""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from make_checkpoint import cut_layers, write_checkpoint
from safetensors.torch import load_file, save_file

from nanomblip.data.decode import load_image
from nanomblip.data.image import ImageConfig, image_to_tensor
from nanomblip.data.processor import save_processor
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.flags import flag, parse_flags, run_main
from nanomblip.model.generate import Decoding, generate
from nanomblip.model.mblip import PRESETS
from nanomblip.weights.files import read_json
from nanomblip.weights.load import load_mblip
from nanomblip.weights.save import save_mblip

LABELS = torch.tensor([[700, 4_000, 7_999, 250_000, 1]])


@dataclass(frozen=True)
class Config:
    work: str = flag("", "folder for the checkpoints; what is there already is used")
    size: str = flag("mblip-mt0-xl", "one of the sizes", tuple(PRESETS))
    layers: int = flag(4, "layers of each stack; 0 = all")
    vision_dtype: str = flag("int8", "as in sample.py", ("int8", "bf16", "fp32"))
    llm_dtype: str = flag("int8", "as in sample.py", ("int8", "bf16", "fp32"))
    pieces: int = flag(20, "pieces to write")
    beams: int = flag(5, "beams")
    pictures: int = flag(0, "also caption so many pictures in one batch, from the int8 file")
    transformers: str = flag("", "also let transformers write: in fp32, with logits against ours, or in bf16", ("", "fp32", "bf16"))
    child: str = flag("", "used by this script itself: folder, types and where to write int8, as JSON")


def peak() -> float:
    """Peak resident memory of this process so far, MB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


class Laps:
    """Seconds since the last call, by the clock and of this process's threads together: on a busy machine only these mean something."""

    def __init__(self):
        self.seconds, self.before = {}, (time.time(), time.process_time())

    def __call__(self, name: str):
        now = time.time(), time.process_time()
        self.seconds[name] = "/".join(f"{b - a:.2f}" for a, b in zip(self.before, now))
        self.before = now


def ask(folder: Path, cfg: Config):
    tokenizer, size = Tokenizer(folder / "spiece.model"), ImageConfig.from_hf(read_json(folder / "preprocessor_config.json"))
    image = image_to_tensor(load_image(ROOT / "data" / "cat.png"), size)[None, None]
    prompt = torch.tensor([tokenizer.encode("Caption the image in Swahili.")])
    return tokenizer, image, prompt, Decoding(num_beams=cfg.beams, min_new_tokens=cfg.pieces, max_new_tokens=cfg.pieces)


def ours(folder: Path, cfg: Config, types: dict, save: str | None) -> dict:
    lap = Laps()
    model = load_mblip(folder, **types)
    lap("load")
    loaded = round(peak())
    tokenizer, image, prompt, decoding = ask(folder, cfg)
    if save:
        save_mblip(model, Path(save), image_token=len(tokenizer), dtype=None)
        save_processor(Path(save), folder, model.cfg.queries)
        lap("save")
    with torch.no_grad():
        features = model.image_features(image)
    lap("encode image")
    generate(model, None, prompt, features=features, vocab=len(tokenizer), decoding=Decoding(max_new_tokens=1))
    lap("first piece")
    (found,) = generate(model, None, prompt, features=features, vocab=len(tokenizer), decoding=decoding)
    lap("caption")
    with torch.no_grad():
        model.image_features(image)
    lap("encode image again")
    if save is None and cfg.pictures:
        with torch.no_grad():
            features = model.image_features(image.repeat(cfg.pictures, 1, 1, 1, 1))
        lap(f"encode {cfg.pictures} images")
        generate(model, None, prompt.repeat(cfg.pictures, 1), features=features, vocab=len(tokenizer), decoding=decoding)
        lap(f"{cfg.pictures} captions")
    if save is None and set(types.values()) == {"fp32"}:
        with torch.no_grad():
            save_file(dict(logits=model(None, prompt, LABELS, features=features)[0]), folder.parent / "ours.safetensors")
    return lap.seconds | dict(peak_MB_after_loading=loaded, ids=found[0].ids)


def theirs(folder: Path, cfg: Config, dtype: torch.dtype) -> dict:
    from transformers import Blip2ForConditionalGeneration

    lap = Laps()
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    lap("load")
    tokenizer, image, prompt, decoding = ask(folder, cfg)
    image = image.to(dtype)
    ids = torch.cat([torch.full((1, 32), len(tokenizer)), prompt], dim=1)
    with torch.no_grad():
        model.vision_model(image[0])
    lap("encode image")
    with torch.no_grad():
        out = model.generate(pixel_values=image[0], input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=cfg.beams, do_sample=False,
                             min_new_tokens=cfg.pieces, max_new_tokens=cfg.pieces)  # fmt: skip
    lap("encode image and caption")
    with torch.no_grad():
        logits = model(pixel_values=image[0], input_ids=ids, attention_mask=torch.ones_like(ids), labels=LABELS).logits
    save_file(dict(logits=logits), folder.parent / "theirs.safetensors")
    return lap.seconds | dict(ids=out[0, 1:].tolist())


def run_child(flags: list[str], folder: Path, types: dict | None, save: str | None) -> dict:
    """Measure in a process of its own; the peak is what the kernel says when it has ended."""
    job = json.dumps(dict(folder=str(folder), types=types, save=save))
    child = subprocess.Popen([sys.executable, __file__, *flags, "--child", job], stdout=subprocess.PIPE, text=True)
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = status
    if status:
        raise ValueError(f"{folder}: the measuring process ended with status {status}")
    return json.loads(text.strip().splitlines()[-1]) | dict(peak_MB=usage.ru_maxrss // 1024)


def forget(folder: Path) -> None:
    """Ask the system to forget what it keeps of a folder's weights in memory."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(folder: Path) -> dict:
    """GB of the weights, and seconds to read them."""
    size, start = 0, time.time()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while data := file.read(1 << 24):
                size += len(data)
    return dict(GB=round(size / 1e9, 2), seconds=round(time.time() - start, 2))


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Measure memory and time of the official sizes.")
    if cfg.child:
        job = json.loads(cfg.child)
        folder = Path(job["folder"])
        print(json.dumps(theirs(folder, cfg, dict(fp32=torch.float32, bf16=torch.bfloat16)[cfg.transformers]) if job["types"] is None else ours(folder, cfg, job["types"], job["save"])))
        return 0
    if not cfg.work:
        raise ValueError("--work is missing; name a folder with room")
    shape = PRESETS[cfg.size] if not cfg.layers else cut_layers(PRESETS[cfg.size], cfg.layers)
    folder, quantised = Path(cfg.work) / f"{cfg.size}-{cfg.layers}", Path(cfg.work) / f"{cfg.size}-{cfg.layers}-int8"
    if not (folder / "preprocessor_config.json").exists():
        write_checkpoint(folder, shape)
    types = dict(vision_dtype=cfg.vision_dtype, llm_dtype=cfg.llm_dtype)
    is_int8 = "int8" in types.values()
    show = lambda what, row: print(f"{what}: " + ", ".join(f"{k} {v}" for k, v in row.items() if k != "ids"), flush=True)
    first = run_child(argv, folder, types, str(quantised) if is_int8 and not quantised.exists() else None)
    show("from fp32 shards", first)
    if is_int8:
        for state in ("cold", "warm"):
            for what, measure in (("reading the int8 file", lambda: read_once(quantised)), ("from the int8 file", lambda: run_child(argv, quantised, {}, None))):
                if state == "cold":
                    forget(quantised)
                show(f"{what}, {state}", measure())
    if cfg.transformers == "bf16":
        show("transformers, bf16", run_child(argv, folder, None, None))
    if cfg.transformers == "fp32":
        mine = run_child(argv, folder, dict(vision_dtype="fp32", llm_dtype="fp32"), None)
        show("fp32", mine)
        other = run_child(argv, folder, None, None)
        show("transformers, fp32", other)
        a, b = (load_file(folder.parent / f"{who}.safetensors")["logits"] for who in ("ours", "theirs"))
        same = sum(x == y for x, y in zip(mine["ids"], other["ids"]))
        show("fp32 against transformers", dict(largest_difference_of_logits=f"{(a - b).abs().max():.2e}", largest_logit=f"{b.abs().max():.1f}",
                                               same_pieces=f"{same} of {cfg.pieces}"))  # fmt: skip
    return 0


if __name__ == "__main__":
    run_main(main)
