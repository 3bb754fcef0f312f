"""What is ablated: experiments, the questions they answer, and which record is of which run."""

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from nanomblip.data.emoji import HELD_OUT_LANGS
from nanomblip.flags import flag, parse_flags
from nanomblip.weights.files import read_json

HERE = Path(__file__).resolve().parents[2]
HELD_OUT = ",".join(HELD_OUT_LANGS)
MIXTURE = "caption:4,naming,match,choice,category,question,exists,yes_no,keywords"
# Experiment -> flags of train.py. "@random" stands for a copy of BLIP-2 with a fresh Q-Former and queries, which is made first.
EXPERIMENTS = {
    "baseline": "",
    "random-qformer": "--vision @random",
    "task-mixture": f"--tasks {MIXTURE}",
    "english-only": "--lang_mix en",
    "lora-none": "--lora none",
    "lora-qv": "--lora qv",
    "lora-all": "--lora all",
    "lora-all-r2": "--lora all --lora_r 2",
    "lora-all-r32": "--lora all --lora_r 32",
    "int8": "--int8",
    "fp32": "--no_int8",
    "mc4": "--lang_mix mc4",
    "mc4-flattened": "--lang_mix mc4 --lang_alpha 0.3",
    "projection-only": "--train projection",
    "data-1": "--data_share 0.01",
    "data-10": "--data_share 0.1",
    "held-out-languages": f"--hold_out_langs {HELD_OUT}",
}


@dataclass(frozen=True)
class Suite:
    """One question: rows are experiments, the first the one that others are compared with.

    measure: (task, group, metric) in the records; expect: what the paper says the others do to it, "lower", "higher" or "same".
    """

    title: str
    rows: tuple[str, ...]
    measure: tuple[str, str, str]
    claim: str
    expect: str


CAPTIONS = ("caption", "all other", "chrf")
SUITES = {
    "realign": Suite("Re-aligned from BLIP-2, or from a random Q-Former", ("baseline", "random-qformer"), CAPTIONS,
                     "an English BLIP-2 is re-aligned with little data; the Q-Former is not learned anew", "lower"),
    "tasks": Suite("Task mixture, or captions only", ("baseline", "task-mixture"), CAPTIONS,
                   "the mixture of tasks hurts captioning", "lower"),
    "tasks-vqa": Suite("The same, on questions with three options", ("baseline", "task-mixture"), ("choice", "all other", "exact"),
                       "the mixture of tasks helps answering questions most", "higher"),
    "languages": Suite("All languages, or English-only training", ("baseline", "english-only"), CAPTIONS,
                       "translated training data is what makes the model answer in other languages", "lower"),
    "lora": Suite("LoRA on the language model: all layers, none, q and v, a smaller rank",
                  ("lora-all", "lora-none", "lora-qv", "lora-all-r2"), CAPTIONS,
                  "LoRA on all layers is used; less of it is worse", "lower"),
    "lora-rank": Suite("Four times LoRA's rank", ("lora-all", "lora-all-r32"), CAPTIONS,
                       "rank 8 is used; expected is that more of it changes little", "same"),
    "int8": Suite("Frozen language model in int8, or fp32", ("fp32", "int8"), CAPTIONS,
                  "8-bit weights cost little", "same"),
    "shares": Suite("Language shares: uniform, of mC4, of mC4 flattened; low-resource languages", ("baseline", "mc4", "mc4-flattened"),
                    ("caption", "resources: low", "chrf"), "shares of mC4 leave little for low-resource languages", "lower"),
    "qformer": Suite("Q-Former and projection trained, or the projection only", ("baseline", "projection-only"), CAPTIONS,
                     "training the projection alone is a warm-up, not enough", "lower"),
    "data": Suite("Amount of data: all, 10 % and 1 % of the pictures", ("baseline", "data-10", "data-1"), CAPTIONS,
                  "not studied in the paper; expected is that less data is worse", "lower"),
    "held-out": Suite("Eight languages held out of re-alignment, measured on these", ("baseline", "held-out-languages"),
                      ("caption", "held-out eight", "chrf"),
                      "languages without training data are answered worse", "lower"),
    "mask": Suite("Language mask off and on, same models", ("baseline", "baseline+mask"), ("caption", "all other", "in_language"),
                  "answers in the wrong language are left as an open problem; a mask can only help with it", "higher"),
}  # fmt: skip
TASKS = {"task-mixture": ("caption", "choice"), "baseline": ("caption", "choice", "caption+mask")}  # others: caption
BEGIN, END = "<!-- ablations: begin -->", "<!-- ablations: end -->"


@dataclass(frozen=True)
class Config:
    suite: str = flag("paper", "paper (all), or some of " + ",".join(SUITES))
    seeds: int = flag(3, "runs of each experiment, with seeds 0, 1, ...")
    steps: int = flag(0, "optimizer steps of each run; 0 = train.py's default")
    limit: int = flag(20, "pictures a language in each measurement")
    extra: str = flag("", "more flags for every run of train.py, in one string")
    missing: bool = flag(False, "say what is missing and run nothing")
    table: bool = flag(False, "rebuild the tables and the plot from the records and run nothing")
    out: str = flag("out/ablations", "folder of the runs; each is deleted when its record is written")
    records: str = flag(str(HERE / "notebooks" / "records"), "folder of the record files")
    readme: str = flag(str(HERE / "README.md"), "with --table: the file with the markers between which the tables go")

    def __post_init__(self):
        for name, low in dict(seeds=1, steps=0, limit=1).items():
            if not low <= getattr(self, name) < 2**31:
                raise ValueError(f"--{name} {getattr(self, name)}: at least {low}")
        self.suites()

    def suites(self) -> dict[str, Suite]:
        if self.suite == "paper":
            return SUITES
        names = [name.strip() for name in self.suite.split(",")]
        for name in names:
            if name not in SUITES:
                raise ValueError(f"--suite {self.suite}: {name!r} is none of paper, {', '.join(SUITES)}")
        return {name: SUITES[name] for name in names}

    def experiments(self) -> list[str]:
        """The experiments of the suites, each once, in the order in which they are run."""
        return list(dict.fromkeys(row.removesuffix("+mask") for suite in self.suites().values() for row in suite.rows))


def train_module():
    """train.py, whose Config says which flags there are and what they default to."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    import train

    return train


def flags_of(experiment: str, seed: int, cfg: Config) -> list[str]:
    """The flags of train.py for one run. ValueError where this version of train.py has no such flag."""
    known = {f"--{name}" for name in train_module().Config.__dataclass_fields__}
    words = shlex.split(EXPERIMENTS[experiment]) + shlex.split(cfg.extra)
    if "--vision" not in known:  # an older name of the flag
        words = ["--blip2" if word == "--vision" else word for word in words]
    words = [str(Path(cfg.out) / "random-qformer-base") if word == "@random" else word for word in words]
    for word in words:
        if word.startswith("--") and word.split("=")[0].replace("--no_", "--") not in known:
            raise ValueError(f"experiment {experiment}: train.py has no flag {word}")
    return (
        words
        + (["--steps", str(cfg.steps)] if cfg.steps else [])
        + ["--seed", str(seed), "--eval_every", "0", "--eval_pictures", "1"]
    )


def resolved(flags: list[str]) -> dict:
    """The whole config of a run of train.py, without what does not belong to the experiment."""
    train = train_module()
    config = asdict(parse_flags(train.Config, flags, ""))
    return {name: value for name, value in config.items() if name not in train.MACHINE}


BEFORE = {
    "redraw": 0.0,
    "imitate_weight": 0.0,
    "noise": 0.0,
}  # what train.py did before it had the flag, where that is not its default


def fits(record: dict, config: dict, defaults: dict, limit: int) -> bool:
    """Is this the record of a run with `config`? Flags that train.py did not have then must stand at BEFORE, else at their defaults now."""
    told = defaults | BEFORE | record["config"]
    return record["limit"] == limit and all(told[k] == v for k, v in config.items())


KEYS = {"experiment", "seed", "config", "limit", "measures", "seconds", "trained_parameters"}


def read_records(folder: Path) -> list[dict]:
    """All record files, in the order of their names; a damaged one is an error that names it."""
    records = []
    for path in sorted(Path(folder).glob("*.json")):
        record = read_json(path)
        if not (isinstance(record, dict) and KEYS <= set(record)):
            raise ValueError(
                f"{path}: not a record of an ablation; restore it with git checkout, or delete it to run it again"
            )
        records.append(record)
    return records


def find_record(experiment: str, seed: int, cfg: Config, records: list[dict]) -> dict | None:
    """The record of a run, whatever experiment's name it was filed under, if it has all that this experiment measures."""
    config, defaults = resolved(flags_of(experiment, seed, cfg)), resolved([])
    for record in records:
        if fits(record, config, defaults, cfg.limit) and set(TASKS.get(experiment, ("caption",))) <= set(
            record["measures"]
        ):
            return record
    return None


def configs_of(records: list[dict]) -> list[Config]:
    """The suites that these records are of, each as the Config that finds them again; the one with the most records first.

    A record keeps the whole config of its run. What its experiment and train.py's defaults do not explain was --steps or --extra.
    """
    found = {}  # (steps, limit, extra) -> seeds of its records
    for record in records:
        if record["experiment"] not in EXPERIMENTS:
            raise ValueError(
                f"a record of {record['experiment']!r}, which is no experiment of this version: delete {record['experiment']}.*.json"
            )
        plain = resolved(flags_of(record["experiment"], record["seed"], Config()))
        told = {
            name: value for name, value in (BEFORE | record["config"]).items() if name in plain and value != plain[name]
        }
        steps, words = told.pop("steps", 0), []
        for name, value in told.items():
            words += (
                [f"--{name}" if value else f"--no_{name}"]
                if isinstance(value, bool)
                else [f"--{name}", shlex.quote(str(value))]
            )
        found.setdefault((steps, record["limit"], " ".join(words)), []).append(record["seed"])
    most_first = sorted(found, key=lambda suite: (-len(found[suite]), suite))
    return [Config(steps=steps, limit=limit, extra=extra, seeds=max(Config.seeds, *(seed + 1 for seed in found[steps, limit, extra])))
            for steps, limit, extra in most_first]  # fmt: skip
