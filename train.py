"""Train nanomblip: `python train.py --lang_mix all`.

Reads top to bottom: config, data, model, what is trained, the loop, evaluation, record. Everything a run makes goes to
out/<run>/: the model in the official layout (config.json, model.safetensors, preprocessor_config.json, spiece.model; with --lora the
LoRA merged into it, in floats also with --int8, and the LoRA alone in adapter/, as `peft` writes it), loss.csv and validation.csv, state.safetensors (to go on from), train.json (the config) and record.json (the results).

Every random choice is a function of (seed, step), so `--resume out/<run>` ends with the same bits as an uninterrupted run
on the same machine. Ctrl-C and SIGTERM save and exit.
"""

import math
import os
import platform
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

from nanomblip.data.emoji import ROOT as DATA
from nanomblip.data.emoji import load_emoji
from nanomblip.data.image import ImageConfig
from nanomblip.data.json_mixture import JsonBatches, JsonMixture, parse_mixture, unusable_pictures
from nanomblip.data.language_id import LanguageID
from nanomblip.data.languages import LANGUAGES, parse_lang, parse_lang_mix
from nanomblip.data.mixture import TASKS, Batches, Mixture, parse_tasks
from nanomblip.data.processor import save_processor
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.flags import flag, parse_flags, run_main
from nanomblip.measure.emoji_splits import MEASUREMENTS, evaluate, mean, table
from nanomblip.model.attention import attend_path
from nanomblip.model.generate import DECODING
from nanomblip.model.int8 import THRESHOLD, Int8Linear
from nanomblip.model.int8_kernels import has_bf16
from nanomblip.model.lora import LoRALinear, add_lora, check_lora, lora_layers
from nanomblip.model.mblip import MBLIP, PRESETS
from nanomblip.model.mt5 import MT5
from nanomblip.training.optimizers import Muon
from nanomblip.training.state import (
    Interrupt,
    Log,
    State,
    ignore_interrupt,
    keep_memory,
    pick_device,  # fmt: skip
    remove_leftovers,
)
from nanomblip.training.warmup import imitation_loss, name_places
from nanomblip.weights.adapter import save_adapter
from nanomblip.weights.files import RunLock, digest, read_json, write_json
from nanomblip.weights.hub import MODELS, download
from nanomblip.weights.load import DTYPES, load_mblip, load_mt5, load_vision
from nanomblip.weights.save import frozen_fingerprint, save_mblip, save_merged, save_trained

HERE = Path(__file__).resolve().parent
LARGE = 500_000_000  # parameters, from which on --save auto writes the trained parts alone
LARGEST_CACHE = 4_000_000_000  # bytes of what the ViT sees

# ------------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line; the resolved values are stored with the run."""

    lang_mix: str = flag("all", "languages: all, uniform, mc4, mt5, or a list such as sw,de:2,hi")
    lang_alpha: float = flag(1.0, "exponent on the language shares; below 1 flattens them")
    hold_out_langs: str = flag("", "languages to leave out of the mixture, as a list; to measure them zero-shot")
    tasks: str = flag("caption", "tasks and their shares, each with :weight: " + ", ".join(TASKS))
    concepts: str = flag(
        "core", "vocabulary: core = drawn by all training artists, all = every concept", ("core", "all")
    )
    data_share: float = flag(1.0, "share of the training pictures that is used")
    mixture: str = flag(
        "",
        "train on the paper's data instead of the embedded: a JSON file in the released format, or FILE:weight,FILE:weight",
    )
    image_root: str = flag("", "with --mixture: the folder of its pictures")
    init: str = flag(
        "blip2",
        "starting weights: blip2 (ViT, Q-Former and queries of --vision, the language model of --llm, a fresh "
        "projection: mBLIP's start), random (of size nano), or a folder in the official layout",
    )
    vision: str = flag("weights/nano/blip2", "with --init blip2: the model that can see: a folder, as made by weights/make_nano.py blip2, or "
                                             "blip2-flan-t5-xl, which is fetched (its own language model is not)")  # fmt: skip
    llm: str = flag(
        "weights/nano/mt0",
        "with --init blip2: the language model: a folder, as made by weights/make_nano.py mt0, or mt0-small, "
        "-base, -large, -xl, -xxl, which are fetched; random = fresh weights of nano's size, for comparison",
    )
    vision_dtype: str = flag("fp32", "type of the ViT's weights while it is frozen", tuple(DTYPES))
    imitate: float = flag(0.75, "with --init blip2 on the embedded data: share of the steps, the first ones, in which a picture's vectors imitate "
                               "the embedded English name and the language model does not run; 0 = none, as in the paper")  # fmt: skip
    imitate_weight: float = flag(0.5, "with --imitate: weight of the imitation beside the language model's loss in the steps after; without it "
                                      "the training pictures are learned by heart and the others forgotten")  # fmt: skip
    align: int = flag(100, "with --init blip2 and without --imitate: first steps that train the projection alone, so that a fresh one does "
                           "not spoil the Q-Former")  # fmt: skip
    train: str = flag("auto", "what is trained: projection, all (as in the paper: Q-Former, queries, projection), everything "
                              "(ViT and language model too); auto = everything from random weights, else all",
                      ("auto", "projection", "all", "everything"))  # fmt: skip
    lora: str = flag(
        "none", "layers of the language model that get LoRA: all (as in the paper), qv, or none", ("all", "qv", "none")
    )
    lora_r: int = flag(8, "LoRA's rank")
    lora_alpha: float = flag(16.0, "LoRA's factor is alpha / r")
    lora_dropout: float = flag(0.05, "share of LoRA's input that is dropped in training")
    lora_lr: float = flag(1e-3, "LoRA's peak learning rate; the paper's, at full size, is 2e-4, with 1e-5 for the rest")
    int8: bool = flag(False, "hold the frozen language model in int8: about a byte a number instead of four")
    int8_threshold: float = flag(
        THRESHOLD, "magnitude from which on a column of an int8 layer's input is not rounded; 0 = none is"
    )
    steps: int = flag(2300, "optimizer steps, those of --imitate or --align included")
    budget: str = flag("", "seconds of training instead of --steps, such as 90, 10m or 1.5h: the learning rate and --imitate follow the clock, "
                           "for runs that are to cost the same; no two are equal to the bit")  # fmt: skip
    batch: int = flag(128, "examples in a micro-batch")
    accumulate: int = flag(1, "micro-batches in an optimizer step")
    optimizer: str = flag("auto", "adamw, as in the paper; muon for the matrices inside the towers and adamw for the rest; "
                                  "auto = muon for nano, else adamw",
                          ("auto", "adamw", "muon"))  # fmt: skip
    lr: float = flag(2e-3, "AdamW's peak learning rate; the paper's, at full size, is 1e-5")
    muon_lr: float = flag(0.02, "Muon's peak learning rate")
    muon_decay: float = flag(
        0.3,
        "Muon's weight decay: singular values stay near its inverse (twice that in matrices four times as high as wide); 0 = none",
    )
    warmup: int = flag(100, "steps of linear warm-up, before the cosine decay to 0")
    weight_decay: float = flag(0.1, "AdamW's decay; norms, biases, position tables and queries have none")
    beta2: float = flag(0.98, "AdamW's memory of squared gradients; the paper's 0.999 is for longer runs")
    clip: float = flag(1.0, "largest gradient norm")
    redraw: float = flag(0.5, "how strongly the embedded pictures are redrawn (turned, scaled, shifted, tinted, blurred) as they are looked at, "
                              "0 to 1; 0 = random crops, as in the paper")  # fmt: skip
    crop: float = flag(
        0.8,
        "with --redraw 0 or --mixture: smallest share of a picture's area in a random crop; the paper's 0.5 is for photographs",
    )
    views: int = flag(8, "views cached of each picture when the ViT is frozen; 0 = run it at every step")
    noise: float = flag(0.7, "with --views: Gaussian noise on what the ViT sees, in each picture between none and this times its deviation over all "
                             "pictures, so that the Q-Former reads unseen drawings better (weights/README.md); 0 = none, as in the paper")  # fmt: skip
    bf16: str = flag("auto", "matrix products of training in bf16 (autocast), weights and everything else in fp32: auto = where the processor "
                             "or the GPU has instructions for them, and never with --int8, whose kernels have types of their own",
                     ("auto", "on", "off"))  # fmt: skip
    checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    seed: int = flag(0, "seed of everything random")
    eval_pictures: int = flag(20, "pictures a language in each measurement (English: all)")
    eval_every: int = flag(500, "steps between looks at the validation slice; 0 = never")
    save_every: float = flag(120.0, "seconds between checkpoints")
    save: str = flag("auto", "what is written: whole = the whole model, trained = the trained parts alone and where the bases of --init blip2 "
                             "are; auto = trained for more than 500 million parameters", ("auto", "whole", "trained"))  # fmt: skip
    merge: bool = flag(
        False, "at the end also write the whole model, LoRA merged, for transformers, to merged/ in the run's folder"
    )
    workers: int = flag(0, "processes that prepare batches; cannot change the data")
    device: str = flag("auto", "auto, cpu or cuda")
    out: str = flag("out", "folder of all runs")
    run: str = flag("", "name of this run; default: date, time and languages")
    resume: str = flag("", "folder of a run to go on with; takes its config from there")

    def __post_init__(self):
        for name, low in dict(steps=1, align=0, batch=1, accumulate=1, warmup=0, weight_decay=0, muon_decay=0, views=0, seed=0, workers=0,
                              eval_pictures=1, eval_every=0, save_every=0).items():  # fmt: skip
            value = getattr(self, name)
            if not low <= value < 2**63:  # written so that nan fails too
                raise ValueError(f"--{name} {value}: at least {low}, below 2**63")
        for name in ("lr", "muon_lr", "lora_lr", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"--{name} {getattr(self, name)}: must be a positive number")
        try:
            check_lora(self.lora_r, self.lora_alpha, self.lora_dropout)
        except ValueError as error:
            raise ValueError(f"--lora_r, --lora_alpha, --lora_dropout: {error}") from None
        if self.int8 and self.bf16 == "on":
            raise ValueError("--int8 --bf16 on: int8 layers have types of their own; leave one out")
        if not 0 <= self.int8_threshold < math.inf:
            raise ValueError(f"--int8_threshold {self.int8_threshold}: at least 0")
        if self.int8 and (self.init == "random" or (self.init == "blip2" and self.llm == "random")):
            raise ValueError(
                "--int8 with a random language model: there is nothing to keep frozen; give --llm or --init a folder"
            )
        if not 0 < self.data_share <= 1:
            raise ValueError(f"--data_share {self.data_share}: above 0, at most 1")
        if bool(self.mixture) != bool(self.image_root):
            raise ValueError(
                "--mixture and --image_root go together: the file of examples and the folder of their pictures"
            )
        if not 0 <= self.imitate <= 1:
            raise ValueError(f"--imitate {self.imitate}: a share of the steps, between 0 and 1")
        if not 0 <= self.imitate_weight < math.inf:
            raise ValueError(f"--imitate_weight {self.imitate_weight}: at least 0")
        self.budget_seconds()
        if not 0 < self.beta2 < 1:
            raise ValueError(f"--beta2 {self.beta2}: between 0 and 1")
        if not 0 <= self.redraw <= 1:
            raise ValueError(f"--redraw {self.redraw}: between 0 and 1")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"--noise {self.noise}: at least 0")
        if not 0 < self.crop <= 1:
            raise ValueError(f"--crop {self.crop}: above 0, at most 1")
        if self.run != Path(self.run).name or self.run == ".." or not self.run.isprintable():
            raise ValueError(f"--run {self.run!r}: a plain name, the folder is --out")

    def budget_seconds(self) -> float:
        """--budget in seconds, 0 for none; ValueError for what is not a time."""
        if not self.budget:
            return 0.0
        number, unit = (self.budget[:-1], self.budget[-1]) if self.budget[-1] in "smh" else (self.budget, "s")
        try:
            seconds = float(number) * dict(s=1, m=60, h=3600)[unit]
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise ValueError(f"--budget {self.budget}: a time above 0 such as 90, 90s, 10m or 1.5h")
        return seconds

    def done(self, step: int, seconds: float) -> float:
        """The share of the run that lies behind, 0..1, after so many steps and so many seconds of training."""
        return min(1.0, seconds / self.budget_seconds()) if self.budget else step / self.steps


# What does not belong to the experiment and may differ when a run goes on.
MACHINE = ("save_every", "workers", "device", "out", "run", "resume")


def resumed_config(cfg: Config, argv: list[str]) -> Config:
    """The stored config of the run to resume, with this call's MACHINE flags; refuses flags that contradict it."""
    if not (Path(cfg.resume) / "train.json").is_file():
        raise ValueError(f"--resume {cfg.resume}: not the folder of a run (it has no train.json)")
    stored = read_json(Path(cfg.resume) / "train.json")
    kinds = {f.name: (int, float) if type(f.default) is float else (type(f.default),) for f in fields(Config)}
    fits = (
        isinstance(stored, dict)
        and set(stored) == set(kinds)
        and all(type(stored[name]) in kinds[name] for name in kinds)
    )
    if not fits:
        raise ValueError(f"{cfg.resume}/train.json does not fit this version of train.py; start a new run")
    given = {word.split("=")[0].removeprefix("--").removeprefix("no_") for word in argv if word.startswith("--")}
    for name in given - set(MACHINE):
        if getattr(cfg, name) != stored[name]:
            raise ValueError(f"--{name} {getattr(cfg, name)}: the run to resume has {stored[name]}; leave the flag out")
    return Config(**stored | {name: getattr(cfg, name) for name in MACHINE})


# -------------------------------------------------------------------------------------------------- what is trained


def model_parts(model: MBLIP) -> dict[str, list[nn.Module | torch.Tensor]]:
    """The parts as the paper counts them; LoRA, where there is any, apart from the language model that it adapts."""
    parts = {"ViT": [model.vit], "Q-Former": [model.qformer], "queries": [model.queries],
             "projection": [model.proj], "language model": [model.mt5]}  # fmt: skip
    lora = [p for layer in lora_layers(model.mt5).values() for p in (layer.A, layer.B)]
    if lora:
        own = {id(p) for p in lora}
        parts["language model"] = [t for t in tensors_of(model.mt5) if id(t) not in own]
        parts["LoRA"] = lora
    return parts


def parameter_count(tensors) -> int:
    """Numbers that a model consists of; the scales of int8 layers are a way of writing them, not more of them."""
    return sum(t.numel() for t in tensors if isinstance(t, nn.Parameter) or t.dtype == torch.int8)


def tensors_of(piece: nn.Module | torch.Tensor) -> list[torch.Tensor]:
    """Everything a part consists of, the codes and scales of int8 layers included."""
    return [*piece.parameters(), *piece.buffers()] if isinstance(piece, nn.Module) else [piece]


TRAINED = {
    "projection": ("projection",),
    "all": ("Q-Former", "queries", "projection", "LoRA"),
    "everything": ("ViT", "Q-Former", "queries", "projection", "language model"),
}


def base_folder(name: str, skip: str | None = None) -> Path:
    """The folder of a base; the official ones are fetched into weights/ once. skip: as in `hub.download`."""
    return download(name, HERE / "weights" / name, skip) if name in MODELS else Path(name)


def refuse_int8(*folders: Path | str) -> None:
    """ValueError for a folder whose weights are int8 already."""
    for folder in folders:
        if folder != "random" and "quantization_config" in read_json(Path(folder) / "config.json"):
            raise ValueError(f"{folder}: holds int8; what is trained is written beside or merged into the weights before they were rounded: "
                             "start from those")  # fmt: skip


def build_mblip(vision: Path, llm: Path | str, vision_dtype: str | None = None, llm_dtype: str | None = None) -> MBLIP:
    """What mBLIP starts from: BLIP-2's ViT, Q-Former and queries, another language model, and a fresh projection between.

    vision, llm: folders in the official layout; llm may be "random": fresh weights of nano's size. Types: as in `load_mblip`.
    """
    if llm == "random":
        mt5 = MT5(PRESETS["nano"].mt5)
        mt5.init_weights()
    else:
        mt5 = load_mt5(llm, llm_dtype=llm_dtype)
    return load_vision(vision, mt5, vision_dtype=vision_dtype)


def mark_trainable(model: MBLIP, names: tuple[str, ...]) -> None:
    """Freeze all parts but those named."""
    for name, pieces in model_parts(model).items():
        for piece in pieces:
            piece.requires_grad_(name in names)


def build_optimizers(model: MBLIP, kind: str, cfg: Config) -> list[torch.optim.Optimizer]:
    """AdamW as in the paper, and for `kind` "muon" Muon (Jordan et al. 2024) for the matrices inside the towers' blocks.

    AdamW has two groups. Decayed are the matrices of linear, convolution and embedding layers, found by module type;
    norms, biases, position tables and queries are not: pulling a norm towards 0 or a query towards the others helps
    nobody. (The original code went by substrings and so decayed the Q-Former's first norm, spelled "layernorm".)
    LoRA's matrices are a third group, with a learning rate of their own.
    """
    decayed, rest, hidden, lora = [], [], [], []
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad:
                continue
            if isinstance(module, LoRALinear):
                lora.append(p)
            elif isinstance(module, nn.Linear) and name == "weight" and ".blocks." in path and kind == "muon":
                hidden.append(p)
            elif isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)) and name == "weight":
                decayed.append(p)
            else:
                rest.append(p)
    groups = [dict(params=decayed, weight_decay=cfg.weight_decay), dict(params=rest, weight_decay=0.0)]
    if lora:
        groups.append(dict(params=lora, weight_decay=cfg.weight_decay, lr=cfg.lora_lr))
    optimizers = [torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), eps=1e-8, fused=True)]
    if hidden:
        optimizers.append(Muon(hidden, lr=cfg.muon_lr, weight_decay=cfg.muon_decay))
    return optimizers


def parts_table(model: MBLIP, optimizers: list[torch.optim.Optimizer]) -> str:
    """For people, before step 0: parameters, what is trained, type, bytes and peak learning rates of each part."""
    rate_of = {p: f"{type(o).__name__} {g['lr']:g}" for o in optimizers for g in o.param_groups for p in g["params"]}
    lines = [f"{'part':<16}{'parameters':>14}{'trained':>14}{'type':>23}{'MB':>10}  optimizer and peak rate"]
    total = [0, 0, 0]
    for name, pieces in model_parts(model).items():
        ps = [t for piece in pieces for t in tensors_of(piece)]
        row = [parameter_count(ps), sum(p.numel() for p in ps if p.requires_grad), sum(p.nbytes for p in ps)]
        total = [a + b for a, b in zip(total, row)]
        kind = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in ps}))
        rates = ", ".join(sorted({rate_of[p] for p in ps if p in rate_of})) or "frozen"
        lines.append(f"{name:<16}{row[0]:>14,}{row[1]:>14,}{kind:>23}{row[2] / 1e6:>10.1f}  {rates}")
    return "\n".join([*lines, f"{'all':<16}{total[0]:>14,}{total[1]:>14,}{'':>23}{total[2] / 1e6:>10.1f}"])


def add_checkpointing(model: MBLIP) -> None:
    """Let every block drop its activations and compute them again in the backward pass (Chen et al. 2016)."""
    for stack in (model.vit, model.qformer, model.mt5.encoder, model.mt5.decoder):
        for block in stack.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def schedule(cfg: Config, step: int, seconds: float = 0.0) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then a cosine to 0 at the last step, or with --budget at its end."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    done = cfg.done(step, seconds) if cfg.budget else (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def cache_features(model: MBLIP, batches: Batches, device) -> torch.Tensor:
    """What the frozen ViT sees of every training picture, in `views` random views: (P, views, N, Dv), on the CPU.

    Pictures outside the training split stay zero; nothing asks for them.
    """
    cells, seed, vit = batches.mixture.cells, batches.mixture.seed, model.cfg.vit
    task = (
        "caption" if batches.mixture.tasks == ["caption"] else "several"
    )  # one view serves all tasks: mirror for captions only
    cache = torch.zeros(len(batches.mixture.emoji.cells), batches.views, vit.tokens, vit.width)
    jobs = [(p, v) for p in cells for v in range(batches.views)]
    for i in tqdm(range(0, len(jobs), 256), desc="frozen ViT", leave=False):
        part = jobs[i : i + 256]
        image = torch.stack([batches.augmented(p, random.Random(f"{seed}/cached/{p}/{v}"), task) for p, v in part])[
            :, None
        ]
        features = model.image_features(image.to(device))[:, 0].cpu()
        for (p, v), row in zip(part, features):
            cache[p, v] = row
    return cache


# --------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Train nanomblip on pictures with captions in many languages.")
    if cfg.resume:
        cfg, folder = resumed_config(cfg, argv), Path(cfg.resume)
    else:
        name = cfg.run or time.strftime("%Y-%m-%d_%H%M%S_") + cfg.lang_mix.replace(",", "-").replace(":", "")[:40]
        folder = Path(cfg.out) / name
        if (folder / "train.json").exists():
            raise ValueError(f"{folder} exists; go on with it by --resume {folder}, or give another --run")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} exists and is not a run; give another --run")
    device = pick_device(cfg.device)
    keep_memory()

    # Data: pictures, names, languages, tasks.
    emoji = load_emoji(cfg.concepts)
    mix = parse_lang_mix(cfg.lang_mix, emoji.langs, cfg.lang_alpha)
    held_out = [parse_lang(word, emoji.langs) for word in cfg.hold_out_langs.split(",") if word.strip()]
    mix = {lang: p for lang, p in mix.items() if lang not in held_out}
    if not mix:
        raise ValueError("--hold_out_langs leaves no language to train on")
    mix = {lang: p / sum(mix.values()) for lang, p in mix.items()}
    mixture = Mixture(emoji, mix, parse_tasks(cfg.tasks), cfg.seed, share=cfg.data_share)
    language_id = LanguageID(emoji.names)

    # Model: from random weights or from a folder, its language model in int8 and with LoRA if wanted, then what is frozen.
    train = cfg.train if cfg.train != "auto" else "everything" if cfg.init == "random" else "all"
    if cfg.lora != "none" and train != "all":
        raise ValueError(
            f"--lora {cfg.lora} goes with --train all, where it is trained with the rest; here --train is {train}"
        )
    for flag_name, is_rounded in (("int8", cfg.int8), ("vision_dtype", cfg.vision_dtype != "fp32")):
        if is_rounded and train == "everything":
            raise ValueError(f"--{flag_name} is for a frozen part; --train everything trains it")
    torch.manual_seed(cfg.seed)
    llm_dtype, rounded = "int8" if cfg.int8 else None, cfg.int8 or cfg.vision_dtype != "fp32"
    if cfg.init == "random":
        source = DATA
        model = MBLIP(PRESETS["nano"])
        model.init_weights()
    elif cfg.init == "blip2":
        vision, llm = (
            base_folder(cfg.vision, skip="language_"),
            cfg.llm if cfg.llm == "random" else base_folder(cfg.llm),
        )
        if rounded or cfg.lora != "none":
            refuse_int8(vision, llm)
        model = build_mblip(vision, llm, cfg.vision_dtype, llm_dtype)
        source = vision if llm == "random" else llm
    else:
        source = Path(cfg.init)
        if rounded or cfg.lora != "none":
            refuse_int8(source)
        model = load_mblip(source, vision_dtype=cfg.vision_dtype, llm_dtype=llm_dtype)
    tokenizer = Tokenizer(source / "spiece.model")
    image = ImageConfig(size=model.cfg.vit.image_size)
    for layer in (m for m in model.mt5.modules() if isinstance(m, Int8Linear)):
        layer.threshold = cfg.int8_threshold
    if cfg.lora != "none":
        add_lora(model.mt5, cfg.lora, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout)
    measurable = (
        not cfg.mixture or image.size == emoji.pictures.shape[1]
    )  # else the model is for other pictures than the embedded ones
    mark_trainable(model, TRAINED[train])
    model.to(device)
    originals = (
        (vision, llm) if cfg.init == "blip2" and llm != "random" else source
    )  # what is held rounded is written as it was before
    trained = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("mt5.")]
    has_bases = isinstance(originals, tuple) and train != "everything"
    parts_only = cfg.save == "trained" or (
        cfg.save == "auto" and has_bases and parameter_count(tensors_of(model)) > LARGE
    )
    if parts_only and not has_bases:
        raise ValueError(
            "--save trained: goes with --init blip2, two folders as bases, and both frozen; give --save whole"
        )
    vit_is_frozen = not model.vit.patch_embed.weight.requires_grad
    batches = Batches(
        mixture, tokenizer, image, cfg.batch, views=cfg.views if vit_is_frozen else 0, crop=cfg.crop, redraw=cfg.redraw
    )
    data = (f"{len(mixture):,} pictures of {len(emoji.concepts)} concepts, {len(mix)} languages, "
            f"{sum(map(len, mixture.usable.values())):,} names")  # fmt: skip
    if cfg.mixture:
        mixture = JsonMixture(
            parse_mixture(cfg.mixture), cfg.seed, tqdm(desc="index --mixture", unit="B", unit_scale=True, leave=False)
        )
        batches = JsonBatches(
            mixture, tokenizer, image, cfg.batch, cfg.image_root, folder / "unusable_pictures.tsv", crop=cfg.crop
        )
        data = f"{len(mixture):,} examples of {cfg.mixture}"
    if cfg.checkpointing:
        add_checkpointing(model)
    bf16 = cfg.bf16 == "on" or (cfg.bf16 == "auto" and has_bf16(device) and not cfg.int8)

    # Optimizers, and where to go on.
    kind = (
        cfg.optimizer if cfg.optimizer != "auto" else "muon" if parameter_count(tensors_of(model)) < LARGE else "adamw"
    )
    optimizers = build_optimizers(model, kind, cfg)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)  # noqa: F841, held until main returns
    remove_leftovers(folder)
    state = State(folder, model, optimizers)
    step, seconds = state.load() if cfg.resume else (0, 0.0)
    if not cfg.resume:
        write_json(folder / "train.json", asdict(cfg))
    if cfg.mixture:
        mixture.keep_identity(folder / "mixture.json")
    write_json(folder / "preprocessor_config.json", image.to_hf())
    shutil.copyfile(tokenizer.path, folder / "spiece.model")

    if parts_only:
        fingerprint = frozen_fingerprint(model, trained, vision, llm)
        bases = [os.path.relpath(base.resolve(), folder.resolve()) for base in (vision, llm)]

    spoken = None if cfg.mixture else mix  # the languages that the model says it answers in

    def save():
        state.save(step, seconds)
        if parts_only:
            save_trained(model, folder, trained, *bases, len(tokenizer), spoken, fingerprint)
        elif rounded or cfg.lora != "none":
            save_merged(model, folder, len(tokenizer), originals, spoken)
        else:
            save_mblip(model, folder, image_token=len(tokenizer), languages=spoken)
        if cfg.lora != "none":
            save_adapter(model.mt5, folder / "adapter")

    print(f"run     {folder}" + (f", going on at step {step}" if step else ""))
    print("config  " + ", ".join(f"{k}={v}" for k, v in asdict(cfg).items() if v != "" and k not in MACHINE))
    print(
        f"data    {data}; "
        + (f"{cfg.budget} of training" if cfg.budget else f"{cfg.steps * cfg.accumulate * cfg.batch:,} examples to see")
    )
    print(parts_table(model, optimizers), flush=True)

    size = len(emoji.cells) * batches.views * model.cfg.vit.tokens * model.cfg.vit.width * 4
    if size > LARGEST_CACHE:
        raise ValueError(
            f"--views {cfg.views}: the cache of what the ViT sees would take {size / 1e9:.1f} GB; give --views 0, which runs it at every step"
        )
    features = cache_features(model, batches, device) if batches.views else None
    loss_log = Log(folder / "loss.csv", ("step", "loss", "gradient_norm", "lr"), step)
    validation_log = Log(folder / "validation.csv", ("step", "english_exact", "other_exact", "other_in_language"), step)
    micro = range(step * cfg.accumulate, 2**62 if cfg.budget else cfg.steps * cfg.accumulate)
    loader = iter(
        DataLoader(batches, batch_size=None, sampler=micro, num_workers=cfg.workers, worker_init_fn=ignore_interrupt)
    )
    interrupt = Interrupt()
    bar = tqdm(total=None if cfg.budget else cfg.steps, initial=step, unit="step", desc="train", smoothing=0.05)
    last_save, average = time.time(), loss_log.recent_mean(1)

    noise = None
    if features is not None and cfg.noise:
        noise = cfg.noise * features[mixture.cells].std((0, 1)).to(device)  # (N, Dv)
    imitating = 0.0  # share of the run
    if cfg.init == "blip2" and not cfg.mixture and train != "everything":
        imitating = cfg.imitate if cfg.budget else round(cfg.imitate * cfg.steps) / cfg.steps
    if imitating:
        english = [emoji.names["en"][concept] for concept in emoji.concepts]
        names = (
            model.mt5.embed_pieces(name_places(tokenizer, english, model.cfg.queries).to(device)).detach().float()
        )  # (C, Q, D)
        index = {concept: i for i, concept in enumerate(emoji.concepts)}
        shown = torch.tensor([index[concept] for concept, _ in emoji.cells], device=device)  # (P,)
    aligning = step < cfg.align and cfg.init == "blip2" and train != "projection" and not imitating
    if aligning:  # what has no gradient is passed over by the optimizers, and costs no backward pass
        mark_trainable(model, ("projection",))
    while cfg.done(step, seconds) < 1:
        started = time.time()
        if aligning and step >= cfg.align:
            mark_trainable(model, TRAINED[train])
            aligning = False
        total_loss, rate, done = 0.0, schedule(cfg, step, seconds), cfg.done(step, seconds)
        for group, peak in zip(groups, peaks):
            group["lr"] = peak * rate
        for i in range(cfg.accumulate):
            torch.manual_seed(step_seed(cfg.seed, step * cfg.accumulate + i))  # dropout: a function of (seed, step)
            batch = {key: value.to(device) for key, value in next(loader).items()}
            model.train()
            # In bf16 attention of a few places takes less time written out than in torch's fused kernel. The backward pass is in the block
            # because --checkpointing runs attention there once more.
            with attend_path("written" if bf16 else "fast"):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    if features is not None:
                        seen = features[batch["picture"].cpu(), batch["view"].cpu()][:, None].to(
                            device
                        )  # (B, 1, N, Dv)
                        if noise is not None:
                            seen = seen + noise * torch.randn_like(seen) * torch.rand(len(seen), 1, 1, 1, device=device)
                    else:
                        with torch.set_grad_enabled(not vit_is_frozen):
                            seen = model.image_features(batch["image"])
                    visual, imitation = model.image_tokens(seen), 0.0  # (B, I*Q, D)
                    if imitating:
                        imitation = imitation_loss(visual, shown[batch["picture"]], names)
                    if done < imitating:
                        loss, told = imitation, imitation
                    else:
                        _, told = model(None, batch["prompt"], batch["labels"], visual=visual)
                        loss = told + cfg.imitate_weight * imitation
                (loss / cfg.accumulate).backward()
            total_loss += told.item() / cfg.accumulate  # of one kind at a time, so that runs can be compared
        norm = nn.utils.clip_grad_norm_(
            [p for group in groups for p in group["params"] if p.grad is not None], cfg.clip
        )
        if not (math.isfinite(total_loss) and math.isfinite(norm)):
            raise ValueError(f"loss {total_loss}, gradient norm {norm:g} at step {step}: stopped before the update; lower "
                             f"--lr and --resume {folder}, or look at the pictures {batch['picture'].tolist()[:8]} ...")  # fmt: skip
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds += time.time() - started

        loss_log.add(step, f"{total_loss:.6f}", f"{norm:.6f}", f"{cfg.lr * rate:.6g}")
        average = total_loss if average is None else 0.98 * average + 0.02 * total_loss
        bar.update(1)
        bar.set_postfix_str(
            f"loss {average:.3f}" + f", {100 * cfg.done(step, seconds):.0f} % of {cfg.budget}" * bool(cfg.budget),
            refresh=False,
        )
        if cfg.eval_every and measurable and step % cfg.eval_every == 0 and cfg.done(step, seconds) < 1:
            results, _ = evaluate(model, tokenizer, image, emoji, mix, language_id, 5, ("validation",))
            english, other = summary(results["validation"])
            validation_log.add(step, english["exact"], other["exact"], other["in_language"])
        if interrupt.signal or time.time() - last_save > cfg.save_every:
            save()
            last_save = time.time()
        if interrupt.signal:
            bar.close()
            print(f"saved at step {step}; go on with: python train.py --resume {folder}", file=sys.stderr)
            return 128 + interrupt.signal
    bar.close()
    save()
    state.older.unlink(missing_ok=True)  # it was for accidents on the way
    if interrupt.signal:  # it came during the last step or the last save
        print(f"saved at step {step}; evaluate with: python train.py --resume {folder}", file=sys.stderr)
        return 128 + interrupt.signal
    interrupt.release()

    # What it can do now: fixed splits, captions written as in the paper, with five beams.
    progress = tqdm(desc="evaluate", unit="caption", leave=False)
    results, examples = evaluate(model, tokenizer, image, emoji, (*mix, *held_out), language_id, cfg.eval_pictures,
                                 MEASUREMENTS if measurable else (), progress, decoding=DECODING["caption"])  # fmt: skip
    progress.close()
    if cfg.mixture and (problems := unusable_pictures(batches.report)):
        print(f"\n{problems}", file=sys.stderr)
    if results:
        print(
            f"\nexact match in percent, captions of five beams (record.json has every language)\n{table(results, held_out)}\n"
        )
        print("held-out pictures: language, what it is, its name, the model's answer")
    for e in examples:
        print(f"  {LANGUAGES[e['lang']].name:<16} {e['english']:<24} {e['name']:<24} -> {e['answer']}")
    record = dict(
        config=asdict(cfg), trained=train, seconds=round(seconds, 1), steps_done=step, examples_seen=step * cfg.accumulate * cfg.batch,
        final_loss=loss_log.recent_mean(1), parameters=parameter_count(tensors_of(model)),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        torch=torch.__version__, python=platform.python_version(), threads=torch.get_num_threads(), device=str(device),
        model_sha256=digest(model.state_dict()),
        summary={which: dict(zip(("english", "other"), summary(r))) for which, r in results.items()},
        results=results, samples=examples,
    )  # fmt: skip
    write_json(folder / "record.json", record)
    if cfg.merge:
        save_merged(model, folder / "merged", len(tokenizer), originals, spoken)
        save_processor(folder / "merged", folder, model.cfg.queries)
    beside = (
        f" --adapter {folder}/adapter" + " --llm_dtype int8" * cfg.int8 if parts_only and cfg.lora != "none" else ""
    )
    print(
        f"\n{seconds:.0f} s of training; everything is in {folder}; next:\n"
        f"  python sample.py --model {folder}{beside} --image data/cat.png --lang sw"
    )
    return 0


def summary(of_language: dict) -> tuple[dict, dict]:
    """English and the mean over all other languages: exact and in_language, each in 0..1 or None."""
    rows = [[r for lang, r in of_language.items() if (lang == "en") == is_english] for is_english in (True, False)]
    return tuple({key: mean(r[key] for r in part) for key in ("exact", "in_language")} for part in rows)


def step_seed(seed: int, micro: int) -> int:
    """A seed for torch's generator from the run's seed and the number of the micro-batch."""
    return int.from_bytes(sha256(f"{seed}/dropout/{micro}".encode()).digest()[:7], "big")


if __name__ == "__main__":
    run_main(main)
