"""What a run of train.py is: its flags, the defaults that depend on the size of the model, and going on with a
stored run.

Two tables say what a run does unless a flag says otherwise. CHOICES are decisions: the paper's, and nano's where
they differ. SCALE are the numbers that go with the size of the model and of the data. The official sizes take the
paper's choices, nano takes nano's, and `--recipe paper` makes nano take the paper's, at nano's scale.
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from nanomblip.data.mixture import TASKS, parse_tasks
from nanomblip.flags import flag
from nanomblip.model.lora import check_lora
from nanomblip.weights.files import read_json
from nanomblip.weights.load import DTYPES

LARGE = 500_000_000  # parameters, from which on a model takes the paper's choices and the official scale
# The paper's tasks that the embedded data has texts for. nano's language model does not follow instructions yet, so
# captions alone are its default (weights/LOG.md).
MIXTURE = "caption:4,naming,match,choice,category,question,exists,yes_no"

CHOICES = {
    #                  nano               the paper
    "warmup":        ("names",           "projection"),
    "tasks":         ("caption",         MIXTURE),
    "redraw":        (0.5,               0.0),
    "crop":          (0.8,               0.5),
    "noise":         (0.7,               0.0),
    "lora":          ("all",             "all"),
    "lora_dropout":  (0.0,               0.05),  # nano has no dropout anywhere
    "int8":          (False,             True),
}  # fmt: skip
SCALE = {
    #                  nano               official sizes
    "steps":         (2525,              87_000),  # 8,000 of warm-up, then two epochs of 5.1 million examples
    "warmup_lr":     (2e-3,              5e-3),
    "lr":            (1e-5,              1e-5),  # the projection's
    "qformer_lr":    (1e-5,              1e-5),  # a twentieth of LoRA's
    "lora_lr":       (2e-4,              2e-4),
    "lr_warmup":     (100,               1000),
    "beta2":         (0.98,              0.999),
    "batch":         (128,               8),
    "accumulate":    (1,                 16),
    "views":         (8,                 0),
    "checkpointing": (False,             True),
}  # fmt: skip
# Without the names warm-up nano's vectors still have to be learned in stage 2: higher rates (weights/LOG.md).
RATES_WITHOUT_NAMES = {"lr": 2e-3, "qformer_lr": 1e-4, "lora_lr": 1e-3}
WARMUP_SHARE = {"names": 0.68, "projection": 0.092, "none": 0.0}  # of the steps; the paper's 8,000 of 87,000
CLIP = 1.0  # the largest gradient norm, the paper's


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line. None means "as the recipe says"; `resolve` fills these in."""

    lang_mix: str = flag(
        "all",
        "languages and their shares: all, uniform, mc4, mt5, or a list such as sw,de:2,hi",
        group="what to train on",
    )
    lang_alpha: float = flag(1.0, "exponent on the language shares; below 1 flattens them")
    hold_out_langs: str = flag("", "languages to leave out of training, as a list; they are measured all the same")
    tasks: str | None = flag(None, "tasks to mix, each with :weight if not 1: " + ", ".join(TASKS))
    concepts: str = flag("core", "core = the things that all training artists drew, all = every thing", ("core", "all"))
    data_share: float = flag(1.0, "share of the training pictures that is used")
    mixture: str = flag("", "train on JSON files in the released format instead: FILE or FILE:weight,FILE:weight")
    image_root: str = flag("", "with --mixture: the folder of its pictures")
    names: str = flag("", "train on these names of the embedded pictures instead of the human ones: a file written by "
                          "nanomblip.data.translate --input emoji; what is measured stays human")  # fmt: skip
    name_errors: float = flag(
        0.0, "give this share of the names in other languages to another thing, to see what errors cost"
    )

    init: str = flag(
        "blip2",
        "start from blip2 = --vision and --llm with a fresh projection, as in mBLIP; from random = random weights of "
        "nano's size, all of them trained; or from a folder in the official layout",
        group="the two pretrained models",
    )
    vision: str = flag(
        "weights/nano/blip2",
        "with --init blip2: ViT and Q-Former from this folder, or from blip2-flan-t5-xl (fetched)",
    )
    llm: str = flag(
        "weights/nano/mt0",
        "with --init blip2: language model from this folder, or mt0-small, -base, -large, -xl or -xxl (fetched)",
    )

    recipe: str = flag(
        "auto",
        "auto = nano's choices for nano, the paper's for the official sizes; paper = the paper's",
        ("auto", "paper"),
        group="the recipe (flags without a default follow --recipe; the run prints what it took)",
    )
    warmup: str | None = flag(
        None,
        "stage 1: projection = only the projection learns, as in the paper; names = a picture's vectors learn to match "
        "the embedded English name, and the language model does not run; none = skip it",
        ("projection", "names", "none"),
    )
    warmup_steps: int | None = flag(None, "how many of --steps belong to stage 1")
    steps: int | None = flag(None, "optimizer steps of both stages together")
    warmup_lr: float | None = flag(None, "peak learning rate of stage 1")
    lr: float | None = flag(None, "peak learning rate of the projection in stage 2")
    qformer_lr: float | None = flag(None, "peak learning rate of the Q-Former and the queries in stage 2; 0 = frozen")
    lora_lr: float | None = flag(None, "peak learning rate of LoRA in stage 2")
    lora: str | None = flag(
        None,
        "layers of the language model that get LoRA in stage 2: all (as in the paper), qv, or none",
        ("all", "qv", "none"),
    )
    lora_r: int = flag(8, "LoRA's rank r")
    lora_alpha: float = flag(16.0, "numerator of LoRA's factor, alpha / r")
    lora_dropout: float | None = flag(None, "dropout on LoRA's input")
    lr_warmup: int | None = flag(
        None, "steps of linear warm-up of the learning rate in each stage, before the cosine decay to 0"
    )
    beta2: float | None = flag(None, "decay of AdamW's average of squared gradients")
    batch: int | None = flag(None, "examples in a micro-batch")
    accumulate: int | None = flag(None, "micro-batches in an optimizer step, of each process under torchrun")
    redraw: float | None = flag(
        None,
        "how strongly the embedded pictures are turned, scaled, shifted, tinted and blurred, 0 to 1; 0 = random crops",
    )
    crop: float | None = flag(None, "with --redraw 0 or --mixture: smallest share of a picture's area in a random crop")
    views: int | None = flag(
        None,
        "redrawn views of each picture whose ViT features are computed once and kept; 0 = run the ViT at every step",
    )
    noise: float | None = flag(
        None,
        "with --views: Gaussian noise on the ViT's features, up to this many of their standard deviations",
    )
    seed: int = flag(0, "seed of all random choices")

    int8: bool | None = flag(None, "hold the frozen language model in int8, one byte a weight", group="the machine")
    vision_dtype: str = flag("fp32", "type of the frozen ViT's weights", tuple(DTYPES))
    bf16: str = flag(
        "auto", "matrix products in bf16 (autocast), weights in fp32: auto = where there are instructions for it",
        ("auto", "on", "off"),
    )  # fmt: skip
    checkpointing: bool | None = flag(
        None, "recompute the language model's activations in the backward pass: less memory, more time"
    )
    workers: int = flag(0, "processes that prepare batches; the results do not depend on their number")
    device: str = flag("auto", "where to compute: auto, cpu or cuda")

    out: str = flag("out", "folder that holds all runs", group="output")
    name: str = flag("", "name of this run; default: date, time and languages")
    resume: str = flag("", "go on with the run in this folder, with its stored config")
    save_every: float = flag(120.0, "seconds between checkpoints")
    eval_every: int = flag(500, "steps between looks at the validation slice; 0 = never")
    eval_pictures: int = flag(20, "pictures a language in each measurement at the end (English: all)")

    def __post_init__(self):
        check_numbers(self)
        try:
            check_lora(self.lora_r, self.lora_alpha, self.lora_dropout or 0.0)
        except ValueError as error:
            raise ValueError(f"--lora_r, --lora_alpha, --lora_dropout: {error}") from None
        if self.tasks is not None:
            parse_tasks(self.tasks)
        if bool(self.mixture) != bool(self.image_root):
            raise ValueError(
                "--mixture and --image_root go together: the file of examples and the folder of their pictures"
            )
        if self.name != Path(self.name).name or self.name == ".." or not self.name.isprintable():
            raise ValueError(f"--name {self.name!r}: a plain name; the folder is --out")
        check_stages(self)

    @property
    def stage1_steps(self) -> int:
        """The first steps, those of the warm-up; of a resolved config."""
        share = WARMUP_SHARE[self.warmup] * self.steps
        return min(self.steps, round(share) if self.warmup_steps is None else self.warmup_steps)


# What does not belong to the experiment and may differ when a run goes on.
MACHINE = ("save_every", "workers", "device", "out", "name", "resume")


def check_numbers(cfg: Config) -> None:
    """ValueError for a flag outside its range; None, "as the recipe says", is always inside."""
    at_least = dict(steps=1, warmup_steps=0, batch=1, accumulate=1, lr_warmup=0, views=0, seed=0, workers=0,
                    eval_pictures=1, eval_every=0, save_every=0, qformer_lr=0, noise=0)  # fmt: skip
    for name, low in at_least.items():
        value = getattr(cfg, name)
        if value is not None and not low <= value < 2**63:  # written so that nan fails too
            raise ValueError(f"--{name} {value}: at least {low}, below 2**63")
    for name in ("lr", "warmup_lr", "lora_lr"):
        value = getattr(cfg, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value}: must be a positive number")
    for name in ("data_share", "crop"):
        value = getattr(cfg, name)
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"--{name} {value}: above 0, at most 1")
    for name in ("redraw", "name_errors"):
        value = getattr(cfg, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"--{name} {value}: between 0 and 1")
    if cfg.beta2 is not None and not 0 < cfg.beta2 < 1:
        raise ValueError(f"--beta2 {cfg.beta2}: between 0 and 1")


def check_stages(cfg: Config) -> None:
    """ValueError for flags that contradict each other."""
    if cfg.recipe == "paper":
        for name, (_, choice) in CHOICES.items():
            if getattr(cfg, name) not in (None, choice):
                raise ValueError(
                    f"--recipe paper has --{name} {choice}; leave out --{name} {getattr(cfg, name)}, or --recipe paper"
                )
    if cfg.mixture and (cfg.names or cfg.name_errors):
        raise ValueError("--names and --name_errors are for the embedded pictures; leave them out with --mixture")
    if cfg.warmup == "names" and cfg.mixture:
        raise ValueError(
            "--warmup names with --mixture: the pictures of a JSON file have no names; give --warmup projection"
        )
    if cfg.warmup not in (None, "none") and cfg.init != "blip2":
        raise ValueError(
            f"--warmup {cfg.warmup} with --init {cfg.init}: a warm-up is for the fresh projection of --init blip2"
        )
    if cfg.warmup == "none" and cfg.warmup_steps:
        raise ValueError(f"--warmup none has no steps; leave out --warmup_steps {cfg.warmup_steps}")
    if cfg.steps is not None and cfg.warmup_steps is not None and cfg.warmup_steps > cfg.steps:
        raise ValueError(f"--warmup_steps {cfg.warmup_steps}: of the {cfg.steps} of --steps")
    if cfg.init == "random":  # everything is trained: nothing is frozen, so nothing is rounded and nothing needs LoRA
        for name, value, none in (
            ("int8", cfg.int8, False),
            ("lora", cfg.lora, "none"),
            ("vision_dtype", cfg.vision_dtype, "fp32"),
        ):
            if value not in (None, none):
                raise ValueError(f"--{name} {value} is for a frozen part; --init random trains everything")
    if cfg.int8 and cfg.bf16 == "on":
        raise ValueError("--int8 --bf16 on: int8 layers have types of their own; leave one out")


def resolve(cfg: Config, parameters: int, world: int = 1) -> Config:
    """The config with every None filled in, for a model of so many parameters; ValueError for what does not go
    together then.

    Of a new run by `world` processes `accumulate` becomes that of all together: what one process would have to do.
    """
    large = parameters > LARGE
    values = {name: row[large or cfg.recipe == "paper"] for name, row in CHOICES.items()} | {
        name: row[large] for name, row in SCALE.items()
    }
    if cfg.mixture:
        values |= dict(views=0, noise=0.0, redraw=0.0, warmup="projection", tasks="caption")
    if cfg.init != "blip2":
        values |= dict(warmup="none")
    if cfg.init == "random":
        values |= dict(int8=False, lora="none", views=0, noise=0.0)
    if not large and cfg.init == "blip2" and (cfg.warmup or values["warmup"]) != "names":
        values |= RATES_WITHOUT_NAMES
    asked = cfg.lora
    cfg = replace(cfg, **{name: value for name, value in values.items() if getattr(cfg, name) is None})
    if cfg.noise and not cfg.views:
        raise ValueError(
            f"--noise {cfg.noise} with --views 0: noise is added to what is cached of the ViT; leave one out"
        )
    check_stages(replace(cfg, recipe="auto"))
    if cfg.stage1_steps == cfg.steps and asked not in (None, "none"):
        raise ValueError(f"--lora {asked} without stage 2, where it is trained: give more --steps than --warmup_steps")
    if cfg.accumulate % world and cfg.resume:
        raise ValueError(f"--resume {cfg.resume}: a step has {cfg.accumulate} micro-batches, which {world} processes "
                         f"cannot share evenly; start as many as divide {cfg.accumulate}")  # fmt: skip
    accumulate = cfg.accumulate * (1 if cfg.resume else world)
    return replace(cfg, warmup_steps=cfg.stage1_steps, accumulate=accumulate)


def resumed_config(cfg: Config, argv: list[str], world: int = 1) -> Config:
    """The stored config of the run to resume, with this call's MACHINE flags; refuses flags that contradict it."""
    if not (Path(cfg.resume) / "train.json").is_file():
        raise ValueError(f"--resume {cfg.resume}: not the folder of a run (it has no train.json)")
    stored = read_json(Path(cfg.resume) / "train.json")
    kinds = {f.name: types_of(f) for f in fields(Config)}
    if not (
        isinstance(stored, dict)
        and set(stored) == set(kinds)
        and all(type(stored[name]) in kinds[name] for name in kinds)
    ):
        raise ValueError(f"{cfg.resume}/train.json does not fit this version of train.py; start a new run")
    given = {word.split("=")[0].removeprefix("--").removeprefix("no_") for word in argv if word.startswith("--")}
    mine = asdict(cfg) | ({"accumulate": cfg.accumulate * world} if cfg.accumulate else {})
    for name in given - set(MACHINE):
        if mine[name] != stored[name]:
            raise ValueError(f"--{name} {getattr(cfg, name)}: the run to resume has {stored[name]}; leave the flag out")
    return Config(**stored | {name: getattr(cfg, name) for name in MACHINE})


def types_of(field) -> tuple[type, ...]:
    """The types that a resolved value of a flag may have in JSON."""
    options = tuple(kind for kind in getattr(field.type, "__args__", (field.type,)) if kind is not type(None))
    return (*options, int) if float in options else options
