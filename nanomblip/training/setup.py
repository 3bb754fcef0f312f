"""Where a run starts from: languages and examples, and the model that a config describes, loaded and frozen."""

import ctypes
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from nanomblip.data.emoji import ROOT, Emoji
from nanomblip.data.image import ImageConfig
from nanomblip.data.json_mixture import JsonBatches, JsonMixture, keep_identity, parse_mixture
from nanomblip.data.languages import parse_lang, parse_lang_mix
from nanomblip.data.mixture import Batches, Mixture, parse_tasks
from nanomblip.data.names import load_translated, with_errors, with_translated
from nanomblip.data.processor import PICTURES, PROCESSOR, load_image_config
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.model.int8 import Int8Linear
from nanomblip.model.lora import add_lora
from nanomblip.model.mblip import MBLIP, PRESETS
from nanomblip.training.config import Config
from nanomblip.training.distributed import gather, rank, world
from nanomblip.weights.files import open_safetensors, read_json, save_tensors
from nanomblip.weights.hub import MODELS, download
from nanomblip.weights.layout import config_from_hf, mt5_config_from_hf, vision_config_from_hf
from nanomblip.weights.load import load_mblip, load_mt5, load_vision, sizes_of

HERE = Path(__file__).resolve().parents[2]


M_MMAP_THRESHOLD, LARGE_TENSOR = -3, 4 << 20  # glibc's name for what mallopt sets; bytes


def return_memory() -> None:
    """Have glibc return freed memory to the system: large tensors as soon as they are freed, from the first call on,
    and the holes between smaller ones at each call, since the tensors of the next batch have other sizes and do not
    fit. At nano's size the first saves a third of a GB, the second half a GB."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_TENSOR)
        libc.malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another libc
        pass


@dataclass
class Start:
    """A loaded model, what it reads with, and where its weights came from.

    source: the folder with the tokenizer; bases: the two folders of --init blip2, vision and language model, else
    None; rounded: whether some of the model is held in another type than it was stored in.
    """

    model: MBLIP
    tokenizer: Tokenizer
    image: ImageConfig
    source: Path
    bases: tuple[Path, Path] | None
    rounded: bool


def source_folders(cfg: Config) -> tuple[Path, ...]:
    """The folders that the weights come from: two for --init blip2, one for a folder, none for random weights.
    Official ones are fetched into weights/ once."""
    if cfg.init == "random":
        return ()
    if cfg.init != "blip2":
        return (Path(cfg.init),)
    fetch = lambda name, skip: download(name, HERE / "weights" / name, skip) if name in MODELS else Path(name)
    return fetch(cfg.vision, "language_"), fetch(
        cfg.llm, None
    )  # of the model that can see, its language model is not needed


def parameters_of(folders: tuple[Path, ...]) -> int:
    """How many parameters the model of these folders has, by their config.json alone."""
    if not folders:
        sizes = PRESETS["nano"]
    elif len(folders) == 1:
        sizes = sizes_of(*folders, config_from_hf)
    else:
        llm = sizes_of(folders[1], mt5_config_from_hf)
        sizes = sizes_of(folders[0], lambda hf: vision_config_from_hf(hf, llm))
    with torch.device("meta"):
        return sum(p.numel() for p in MBLIP(sizes).parameters())


def build_mblip(vision: Path, llm: Path, vision_dtype: str | None = None, llm_dtype: str | None = None) -> MBLIP:
    """mBLIP's start: BLIP-2's ViT, Q-Former and queries, another language model, and a fresh projection between.

    vision, llm: folders in the official layout. Types: as in `load_mblip`.
    """
    return load_vision(vision, load_mt5(llm, llm_dtype=llm_dtype), vision_dtype=vision_dtype)


def build_start(cfg: Config, folders: tuple[Path, ...]) -> Start:
    """The model of a resolved config: random or loaded, frozen parts in the types asked for, LoRA added.

    Draws from torch's global generator: the caller seeds it. ValueError for weights that are int8 already where
    LoRA is to be merged.
    """
    rounded = cfg.int8 or cfg.vision_dtype != "fp32"
    for folder in folders if rounded or cfg.lora != "none" else ():
        if "quantization_config" in read_json(folder / "config.json"):
            raise ValueError(
                f"{folder}: holds int8; LoRA is merged into the weights as they were before: start from those"
            )
    llm_dtype = "int8" if cfg.int8 else None
    if not folders:
        model = MBLIP(PRESETS["nano"])
        model.init_weights()
    elif len(folders) == 1:
        model = load_mblip(*folders, vision_dtype=cfg.vision_dtype, llm_dtype=llm_dtype)
    else:
        model = build_mblip(*folders, cfg.vision_dtype, llm_dtype)
    source = folders[-1] if folders else ROOT
    if cfg.lora != "none":
        add_lora(model.mt5, cfg.lora, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout)
    seen = folders[0] if folders else None  # the ViT is given pictures as it knows them
    known = seen is not None and any((seen / file).exists() for file in (PICTURES, PROCESSOR))
    image = load_image_config(seen) if known else ImageConfig(size=model.cfg.vit.image_size)
    if image.size != model.cfg.vit.image_size:
        raise ValueError(
            f"{seen}: its picture settings are of {image.size} pixels, the ViT wants {model.cfg.vit.image_size}"
        )
    bases = folders if len(folders) == 2 else None
    return Start(model, Tokenizer(source / "spiece.model"), image, source, bases, rounded)


def build_in_turn(cfg: Config, folders: tuple[Path, ...], device: torch.device) -> Start:
    """`build_start`, but processes on the CPUs of one machine share the codes of its int8 layers.

    They build one after the other, so that only one copy is ever in the making. The first leaves the codes in a file
    (in TMPDIR), which all map into their memory instead of what they made; then it has no name any more.
    """
    if world() == 1 or device.type != "cpu" or not cfg.int8:
        return build_start(cfg, folders)
    local, machine = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "GROUP_RANK"))
    start, file = None, ""
    for turn in range(max(gather(local)) + 1):
        if turn == local:
            start = build_start(cfg, folders)
            layers = {path: m for path, m in start.model.named_modules() if isinstance(m, Int8Linear)}
            if local == 0:
                file = str(Path(tempfile.mkdtemp(prefix="nanomblip-")) / "codes.safetensors")
                save_tensors(Path(file), {path: layer.weight for path, layer in layers.items()}, {})
            with open_safetensors(Path(file)) as codes:
                for path, layer in layers.items():
                    layer.replace(codes.get_tensor(path), layer.SCB)
        file = next((name for where, name in gather([machine, file]) if where == machine and name), file)
    if local == 0:
        shutil.rmtree(Path(file).parent)
    return start


def languages_of(cfg: Config, emoji: Emoji) -> tuple[dict[str, float], list[str]]:
    """The shares of the languages that are trained on, summing to 1, and those that are held out."""
    mix = parse_lang_mix(cfg.lang_mix, emoji.langs, cfg.lang_alpha)
    held_out = [parse_lang(word, emoji.langs) for word in cfg.hold_out_langs.split(",") if word.strip()]
    mix = {lang: p for lang, p in mix.items() if lang not in held_out}
    if not mix:
        raise ValueError("--hold_out_langs leaves no language to train on")
    return {lang: p / sum(mix.values()) for lang, p in mix.items()}, held_out


def build_batches(cfg: Config, start: Start, emoji: Emoji, mix: dict[str, float], folder: Path):
    """Batches of stage 1 and of stage 2, and a line about them: captions and the task mixture of the embedded data,
    or twice --mixture."""
    if cfg.mixture:
        bar = tqdm(desc="index --mixture", unit="B", unit_scale=True, leave=False)
        mixture = JsonMixture(parse_mixture(cfg.mixture), cfg.seed, bar)
        keep_identity(mixture.files, folder / "mixture.json")
        report = folder / "unusable_pictures.tsv"
        batches = JsonBatches(mixture, start.tokenizer, start.image, cfg.batch, cfg.image_root, report, crop=cfg.crop,
                              rank=rank(), world=world())  # fmt: skip
        return batches, batches, f"{len(mixture):,} examples of {cfg.mixture}"
    if cfg.names:
        file = load_translated(cfg.names)
        emoji = with_translated(emoji, file)
        keep_identity([file], folder / "mixture.json")
        if missing := [lang for lang in mix if lang not in emoji.names]:
            raise ValueError(f"--names {cfg.names}: has none in {', '.join(missing)}; leave these out of --lang_mix")
    emoji = with_errors(emoji, cfg.name_errors)
    of_tasks = lambda tasks: Batches(
        Mixture(emoji, mix, parse_tasks(tasks), cfg.seed, share=cfg.data_share),
        start.tokenizer, start.image, cfg.batch, views=cfg.views, crop=cfg.crop, rank=rank(), world=world(),
        redraw=cfg.redraw,
    )  # fmt: skip
    captions, tasks = of_tasks("caption"), of_tasks(cfg.tasks)
    pairs = sum(map(len, tasks.mixture.usable.values()))
    return (
        captions,
        tasks,
        f"{len(tasks.mixture):,} pictures of {len(emoji.concepts)} concepts, {len(mix)} languages, {pairs:,} names",
    )
