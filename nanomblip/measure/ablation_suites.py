"""What is ablated: experiments, the questions they answer, and which record is of which run."""

import shlex
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from nanomblip.data.emoji import HELD_OUT_LANGS
from nanomblip.flags import flag, parse_flags
from nanomblip.training import config as training
from nanomblip.weights.files import read_json

HERE = Path(__file__).resolve().parents[2]
HELD_OUT = ",".join(HELD_OUT_LANGS)

# Experiment -> flags of train.py. What begins with "@" is made first: a copy of BLIP-2 with a fresh Q-Former and
# queries, and the names of all things as nano's language model translates them.
MADE = {"@random": "random-qformer-base", "@nano": "nano-names.json"}
EXPERIMENTS = {
    "baseline": "",
    "warmup-projection": "--warmup projection",
    "warmup-none": "--warmup none",
    "random-qformer": "--vision @random",
    "task-mixture": f"--tasks {training.MIXTURE}",
    "captions-only": "",
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
    "qformer-slow": "",
    "qformer-frozen": "--qformer_lr 0",
    "qformer-full-rate": "--qformer_lr 2e-4",
    "projection-only": "--lora none --qformer_lr 0",
    "data-1": "--data_share 0.01",
    "data-10": "--data_share 0.1",
    "held-out-languages": f"--hold_out_langs {HELD_OUT}",
    "names-by-nano": "--names @nano",
    "name-errors-10": "--name_errors 0.1",
    "name-errors-30": "--name_errors 0.3",
    "name-errors-50": "--name_errors 0.5",
}


@dataclass(frozen=True)
class Suite:
    """One question: rows are experiments, the first the one that others are compared with.

    measure: (task, group, metric) in the records; expect: what the paper says the others do to it, "lower", "higher" or
    "same"; smallest: percentage points from which on a difference is worth speaking of, written down before the runs.
    by_group: a second table has the metric in every group of languages.
    """

    title: str
    rows: tuple[str, ...]
    measure: tuple[str, str, str]
    claim: str
    expect: str
    smallest: float = 3.0
    by_group: bool = False


CAPTIONS = ("caption", "all other", "chrf")
SUITES = {
    "warmup": Suite("Stage 1: names, the projection alone as in the paper, or none",
                    ("baseline", "warmup-projection", "warmup-none"), CAPTIONS,
                    "a warm-up of the projection is used, and marked optional; names are nano's own", "lower"),
    "realign": Suite("Re-aligned from BLIP-2, or from a random Q-Former", ("baseline", "random-qformer"), CAPTIONS,
                     "an English BLIP-2 is re-aligned with little data; the Q-Former is not learned anew", "lower"),
    "tasks": Suite("Captions only, or the task mixture", ("captions-only", "task-mixture"), CAPTIONS,
                   "the mixture of tasks hurts captioning", "lower"),
    "tasks-vqa": Suite("The same, on questions with three options", ("captions-only", "task-mixture"),
                       ("choice", "all other", "exact"), "the mixture of tasks helps answering questions most",
                       "higher", 10.0),
    "languages": Suite("All languages, or English-only training", ("baseline", "english-only"), CAPTIONS,
                       "translated training data is what makes the model answer in other languages", "lower", 20.0),
    "lora": Suite("LoRA on the language model: all layers, none, q and v, a smaller rank",
                  ("lora-all", "lora-none", "lora-qv", "lora-all-r2"), CAPTIONS,
                  "LoRA on all layers is used; less of it is worse", "lower"),
    "lora-rank": Suite("Four times LoRA's rank", ("lora-all", "lora-all-r32"), CAPTIONS,
                       "rank 8 is used; expected is that more of it changes little", "same"),
    "int8": Suite("Frozen language model in int8, or fp32", ("fp32", "int8"), CAPTIONS,
                  "8-bit weights cost little", "same"),
    "shares": Suite("Language shares: uniform, of mC4, of mC4 flattened; low-resource languages",
                    ("baseline", "mc4", "mc4-flattened"), ("caption", "resources: low", "chrf"),
                    "shares of mC4 leave little for low-resource languages", "lower"),
    "qformer": Suite("The Q-Former in stage 2: slow, frozen, or at LoRA's rate; the projection alone",
                     ("qformer-slow", "qformer-frozen", "qformer-full-rate", "projection-only"), CAPTIONS,
                     "the Q-Former learns at a twentieth of LoRA's rate", "lower"),
    "data": Suite("Amount of data: all, 10 % and 1 % of the pictures", ("baseline", "data-10", "data-1"), CAPTIONS,
                  "not studied in the paper; expected is that less data is worse", "lower"),
    "held-out": Suite("Eight languages held out of re-alignment, measured on these", ("baseline", "held-out-languages"),
                      ("caption", "held-out eight", "chrf"),
                      "languages without training data are answered worse", "lower"),
    "translation": Suite("Names by people, by nano's language model, and with errors in 10, 30 and 50 % of them",
                         ("baseline", "names-by-nano", "name-errors-10", "name-errors-30", "name-errors-50"), CAPTIONS,
                         "all its data are translated by machine, and not compared; expected is that errors cost",
                         "lower", by_group=True),
    "mask": Suite("Language mask off and on, same models", ("baseline", "baseline+mask"),
                  ("caption", "all other", "in_language"),
                  "answers in the wrong language are left open; a mask can only help with it", "higher", 1.0),
}  # fmt: skip
# What is measured of an experiment; of the others captions.
TASKS = {name: ("caption", "choice", "caption+mask") for name in ("baseline", "captions-only", "qformer-slow")}
TASKS["task-mixture"] = ("caption", "choice")
BEGIN, END = "<!-- ablations: begin -->", "<!-- ablations: end -->"


@dataclass(frozen=True)
class Config:
    suite: str = flag("paper", "paper (all), or some of " + ",".join(SUITES))
    seeds: int = flag(3, "runs of each experiment, with seeds 0, 1, ...")
    steps: int = flag(1200, "optimizer steps of each run; 0 = train.py's default")
    limit: int = flag(20, "pictures a language in each measurement")
    extra: str = flag("--batch 64 --views 4", "more flags for every run of train.py, in one string")
    missing: bool = flag(False, "say what is missing and run nothing")
    table: bool = flag(False, "rebuild the tables from the records and run nothing")
    setting: str = flag("", "with --table: which records, by their setting; default: the one with the most records")
    out: str = flag("out/ablations", "folder of the runs; each is deleted when its record is written")
    records: str = flag(str(HERE / "notebooks" / "records"), "folder of the record files")
    readme: str = flag(str(HERE / "notebooks/records/README.md"), "with --table: the file for the tables")

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


def flags_of(experiment: str, seed: int, cfg: Config) -> list[str]:
    """The flags of train.py for one run."""
    words = shlex.split(EXPERIMENTS[experiment]) + shlex.split(cfg.extra)
    words = [str(Path(cfg.out) / MADE[word]) if word in MADE else word for word in words]
    words += ["--steps", str(cfg.steps)] if cfg.steps else []
    return [*words, "--seed", str(seed), "--eval_every", "0", "--eval_pictures", "1"]


def resolved(flags: list[str]) -> dict:
    """The whole config of a run of train.py at nano's size, without what does not belong to the experiment."""
    config = asdict(training.resolve(parse_flags(training.Config, flags, ""), parameters=0))
    return {name: value for name, value in config.items() if name not in training.MACHINE}


def setting_of(cfg: Config) -> str:
    """What all runs of a suite have in common. Only records of one setting are compared."""
    steps = cfg.steps or resolved([])["steps"]
    return f"{steps:,} steps, {cfg.limit} held-out pictures a language" + (f", {cfg.extra}" if cfg.extra else "")


KEYS = {"experiments", "setting", "seed", "config", "measures", "seconds", "trained_parameters"}


def read_records(folder: Path | str) -> list[dict]:
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


def settings_of(records: list[dict]) -> list[str]:
    """The settings of these records, the one with the most records first."""
    return [setting for setting, _ in Counter(record["setting"] for record in records).most_common()]


def find_record(experiment: str, seed: int, setting: str, records: list[dict]) -> dict | None:
    """The record of a run; experiments with the same flags share one."""
    for record in records:
        if experiment in record["experiments"] and (record["seed"], record["setting"]) == (seed, setting):
            return record
    return None


def find_current(experiment: str, seed: int, cfg: Config, records: list[dict]) -> dict | None:
    """The record of what would be run now, with all that is measured of it: another default of train.py makes records
    stale. Whatever experiment's name it was filed under."""
    config, tasks = resolved(flags_of(experiment, seed, cfg)), set(TASKS.get(experiment, ("caption",)))
    for record in records:
        if record["config"] == config and record["setting"] == setting_of(cfg) and tasks <= set(record["measures"]):
            return record
    return None


def same_run(experiment: str, seed: int, cfg: Config) -> list[str]:
    """The experiments whose flags mean the same run as this one's, itself first."""

    def config_of(name: str) -> dict | None:
        try:
            return resolved(flags_of(name, seed, cfg))
        except ValueError:  # its flags contradict those of --extra
            return None

    config = config_of(experiment)
    return [experiment, *(name for name in EXPERIMENTS if name != experiment and config_of(name) == config)]
