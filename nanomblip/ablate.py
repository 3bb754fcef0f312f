"""One ingredient of mBLIP changed at a time, at nano scale: what the paper claims, what nano shows, whether the two agree.

    python -m nanomblip.ablate --suite paper           run what is missing; may be stopped and started again at any moment
    python -m nanomblip.ablate --suite paper --missing say what is missing, run nothing
    python -m nanomblip.ablate --table                 rebuild the tables and the plot in README.md from the record files

An experiment is a list of train.py's flags. Each (experiment, seed) is one run of train.py, then of nanomblip.evaluate, as
separate processes, one at a time; what remains of it is one small file, notebooks/records/EXPERIMENT.SEED.json. A run is done when
there is a record whose config is the one that would be run now, so that two experiments with the same flags share it, and a
changed default of train.py makes its records stale. The tables are a function of the record files and of nothing else.
"""

import ctypes
import hashlib
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanomblip.emoji import HELD_OUT_LANGS, load_emoji
from nanomblip.flags import flag, parse_flags, run_main
from nanomblip.runs import RunLock
from nanomblip.weights import load_mblip, read_json, save_mblip, write_atomic, write_json

HERE = Path(__file__).resolve().parent.parent
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


# ---------------------------------------------------------------------------------------------------------------------
# Which run is which
# ---------------------------------------------------------------------------------------------------------------------


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
    return words + (["--steps", str(cfg.steps)] if cfg.steps else []) + ["--seed", str(seed), "--eval_every", "0", "--eval_pictures", "1"]


def resolved(flags: list[str]) -> dict:
    """The whole config of a run of train.py, without what does not belong to the experiment."""
    train = train_module()
    config = asdict(parse_flags(train.Config, flags, ""))
    return {name: value for name, value in config.items() if name not in train.MACHINE}


BEFORE = {"redraw": 0.0, "imitate_weight": 0.0, "noise": 0.0}  # what train.py did before it had the flag, where that is not its default


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
            raise ValueError(f"{path}: not a record of an ablation; restore it with git checkout, or delete it to run it again")
        records.append(record)
    return records


def find_record(experiment: str, seed: int, cfg: Config, records: list[dict]) -> dict | None:
    """The record of a run, whatever experiment's name it was filed under, if it has all that this experiment measures."""
    config, defaults = resolved(flags_of(experiment, seed, cfg)), resolved([])
    for record in records:
        if fits(record, config, defaults, cfg.limit) and set(TASKS.get(experiment, ("caption",))) <= set(record["measures"]):
            return record
    return None


def configs_of(records: list[dict]) -> list[Config]:
    """The suites that these records are of, each as the Config that finds them again; the one with the most records first.

    A record keeps the whole config of its run. What its experiment and train.py's defaults do not explain was --steps or --extra.
    """
    found = {}  # (steps, limit, extra) -> seeds of its records
    for record in records:
        if record["experiment"] not in EXPERIMENTS:
            raise ValueError(f"a record of {record['experiment']!r}, which is no experiment of this version: delete {record['experiment']}.*.json")
        plain = resolved(flags_of(record["experiment"], record["seed"], Config()))
        told = {name: value for name, value in (BEFORE | record["config"]).items() if name in plain and value != plain[name]}
        steps, words = told.pop("steps", 0), []
        for name, value in told.items():
            words += [f"--{name}" if value else f"--no_{name}"] if isinstance(value, bool) else [f"--{name}", shlex.quote(str(value))]
        found.setdefault((steps, record["limit"], " ".join(words)), []).append(record["seed"])
    most_first = sorted(found, key=lambda suite: (-len(found[suite]), suite))
    return [Config(steps=steps, limit=limit, extra=extra, seeds=max(Config.seeds, *(seed + 1 for seed in found[steps, limit, extra])))
            for steps, limit, extra in most_first]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


def die_with_parent() -> None:
    """Let the kernel end a child when this process ends, however it ends (Linux); else a killed suite would train on alone."""
    try:
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)
    except (OSError, AttributeError):
        pass


def call(words: list[str], log: Path) -> None:
    """Run a Python program to its end; its output goes to `log`. ValueError with its last line when it fails."""
    with open(log, "ab") as file:
        child = subprocess.Popen([sys.executable, *words], cwd=os.getcwd(), stdout=file, stderr=subprocess.STDOUT, preexec_fn=die_with_parent,
                                 start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
                                 env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])})  # fmt: skip
        try:
            status = child.wait()
        except BaseException:  # Ctrl-C or SIGTERM: train.py saves first
            child.terminate()
            child.wait()
            raise
    if status:
        tail = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()
        raise ValueError(f"{' '.join(words[:2])} ended with status {status}: {tail[-1] if tail else 'no output'} (all of it: {log})")


def wait_for(folder: Path, seconds: float = 60) -> None:
    """Wait until no process works in a run: one whose suite was killed may still be saving."""
    for _ in range(round(2 * seconds)):
        try:
            RunLock(folder)
            return
        except ValueError:
            time.sleep(0.5)


def random_base(source: Path, folder: Path) -> None:
    """A copy of a BLIP-2 folder with a fresh Q-Former and fresh queries; seed 0, made once."""
    if (folder / "config.json").exists() and (folder / "model.safetensors").exists():
        return
    torch.manual_seed(0)
    model = load_mblip(source)
    fresh = type(model)(model.cfg)
    fresh.init_weights()
    model.qformer.load_state_dict(fresh.qformer.state_dict())
    model.queries.data.copy_(fresh.queries)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("spiece.model", "preprocessor_config.json"):
        shutil.copyfile(source / name, folder / name)
    config = read_json(source / "config.json")
    save_mblip(model, folder, image_token=config.get("image_token_index", model.cfg.mt5.vocab - 1))


def measured(path: Path) -> dict[str, dict[str, float]]:
    """group -> metric -> mean, from a record of nanomblip.evaluate, with one group more: the eight languages of held-out runs."""
    record = read_json(path)
    groups = {name: {k: v["mean"] for k, v in row.items() if isinstance(v, dict)} for name, row in record["groups"].items()}
    eight = [record["languages"][lang] for lang in HELD_OUT_LANGS if lang in record["languages"]]
    if eight:
        metrics = [k for k, v in eight[0].items() if isinstance(v, dict)]
        groups["held-out eight"] = {k: sum(row[k]["mean"] for row in eight) / len(eight) for k in metrics}
    return {name: {k: round(v, 5) for k, v in row.items()} for name, row in groups.items()}


def run(experiment: str, seed: int, cfg: Config, langs: str) -> dict:
    """One run from wherever it stands to its record."""
    flags = flags_of(experiment, seed, cfg)
    name = f"{experiment}.{seed}"
    folder, log = Path(cfg.out) / name, Path(cfg.out) / f"{name}.log"
    if any(word.endswith("random-qformer-base") for word in flags):
        source = resolved([])
        random_base(Path(source.get("vision") or source["blip2"]), Path(cfg.out) / "random-qformer-base")
    if folder.exists():
        wait_for(folder)
    if folder.exists() and (not (folder / "train.json").exists() or not stored_fits(folder, flags)):
        shutil.rmtree(folder)  # of a kill before anything was saved, or of other flags
    if not (folder / "record.json").exists():
        start = ["--resume", str(folder)] if (folder / "train.json").exists() else [*flags, "--out", cfg.out, "--run", name]
        call([str(HERE / "train.py"), *start], log)
    measures = {}
    for what in TASKS.get(experiment, ("caption",)):
        task, _, mask = what.partition("+")
        out = folder / f"{what}.json"
        if not out.exists():
            call(["-m", "nanomblip.evaluate", "--model", str(folder), "--data", "emoji", "--task", task, "--limit", str(cfg.limit),
                  "--preset", "greedy", "--langs", langs, "--out", str(out), *(["--force_lang"] if mask else [])], log)  # fmt: skip
        measures[what] = measured(out)
    told = read_json(folder / "record.json")
    kept = {key: told[key] for key in ("seconds", "parameters", "trained_parameters", "final_loss", "torch", "threads")}
    return dict(experiment=experiment, seed=seed, limit=cfg.limit, config=resolved(flags), **kept, measures=measures)


def stored_fits(folder: Path, flags: list[str]) -> bool:
    """Was the run in this folder started with these flags?"""
    try:
        stored = read_json(folder / "train.json")
        return all(stored.get(name, object()) == value for name, value in resolved(flags).items())
    except ValueError:
        return False


def record_name(experiment: str, seed: int, cfg: Config) -> str:
    """The file name of a record; that of a shortened or changed suite ends in a hash of what is changed."""
    changed = f"{cfg.steps} {cfg.limit} {cfg.extra}"
    usual = f"{Config.steps} {Config.limit} {Config.extra}"
    return f"{experiment}.{seed}.json" if changed == usual else f"{experiment}.{seed}.{hashlib.sha256(changed.encode()).hexdigest()[:8]}.json"


def time_left(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def stop(number, frame):
    raise KeyboardInterrupt


def run_suite(cfg: Config) -> int:
    """Run what is missing, one process at a time; returns the exit status."""
    records_folder, out = Path(cfg.records), Path(cfg.out)
    records, missing, impossible = read_records(records_folder), [], []
    for experiment in cfg.experiments():
        try:
            missing += [(experiment, seed) for seed in range(cfg.seeds) if find_record(experiment, seed, cfg, records) is None]
        except ValueError as error:
            impossible.append(str(error))
    for problem in impossible:
        print(f"left out: {problem}", file=sys.stderr)
    total = cfg.seeds * (len(cfg.experiments()) - len(impossible))
    print(f"{total - len(missing)} of {total} runs are done, {len(missing)} are missing" + (":" if cfg.missing and missing else ""), flush=True)
    if cfg.missing:
        print("\n".join(f"  {experiment}, seed {seed}: train.py {' '.join(flags_of(experiment, seed, cfg))}" for experiment, seed in missing))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    records_folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(out)  # noqa: F841, one suite at a time
    signal.signal(signal.SIGTERM, stop)
    langs, spent = ",".join(load_emoji("core").langs), []
    for experiment, seed in missing:
        records = read_records(records_folder)
        if find_record(experiment, seed, cfg, records) is not None:  # an experiment with the same flags has just been run
            continue
        left = [pair for pair in missing if find_record(*pair, cfg, records) is None]
        guess = f", about {time_left(statistics.mean(spent) * len(left))} left" if spent else ""
        print(f"{total - len(left)} of {total} done{guess}; now {experiment}, seed {seed}", flush=True)
        started = time.time()
        record = run(experiment, seed, cfg, langs)
        write_json(records_folder / record_name(experiment, seed, cfg), record)
        shutil.rmtree(out / f"{experiment}.{seed}")
        spent.append(time.time() - started)
    print(f"{total} of {total} done; the tables: python -m nanomblip.ablate --suite {cfg.suite} --table")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The tables
# ---------------------------------------------------------------------------------------------------------------------


def values_of(row: str, suite: Suite, cfg: Config, records: list[dict]) -> tuple[list[float], list[dict]]:
    """The measure of a row for each seed that has a record, and these records."""
    task, group, metric = suite.measure
    experiment, _, mask = row.partition("+")
    found = []
    for seed in range(cfg.seeds):
        try:
            record = find_record(experiment, seed, cfg, records)
        except ValueError:
            break
        what = f"{task}+mask" if mask else task
        if record is not None and metric in record["measures"].get(what, {}).get(group, {}):
            found.append((record["measures"][what][group][metric], record))
    return [value for value, _ in found], [record for _, record in found]


def verdict(base: list[float], other: list[float], expect: str) -> str:
    """Does a difference agree with "lower", "higher" or "same"? One is seen when it exceeds two standard errors of it.

    The standard error is from the deviation over seeds on both sides; with a single seed on either side nothing is concluded.
    """
    if len(base) < 2 or len(other) < 2:
        return "one seed: open"
    difference = statistics.mean(other) - statistics.mean(base)
    error = math.sqrt(statistics.variance(base) / len(base) + statistics.variance(other) / len(other))
    seen = "same" if abs(difference) <= 2 * error else "lower" if difference < 0 else "higher"
    return "agrees" if seen == expect else "no difference seen" if seen == "same" else "disagrees"


def suite_table(name: str, suite: Suite, cfg: Config, records: list[dict]) -> list[str]:
    """The lines of one suite's markdown table."""
    task, group, metric = suite.measure
    lines = [f"**{suite.title}.** Measured: {metric.replace('_', ' ')} of {task}s in percent, {group}. Paper: {suite.claim}.", "",
             "| experiment | trained parameters | seconds | seeds | measure | difference | nano and the paper |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    base, _ = values_of(suite.rows[0], suite, cfg, records)
    for row in suite.rows:
        values, of = values_of(row, suite, cfg, records)
        if not values:
            lines.append(f"| {row} | - | - | 0 | not run | - | - |")
            continue
        spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else " (single seed)"
        first = row == suite.rows[0]
        difference = "-" if first or not base else f"{100 * (statistics.mean(values) - statistics.mean(base)):+.1f}"
        judged = "reference" if first else verdict(base, values, suite.expect) if base else "-"
        cost = f"{of[0]['trained_parameters']:,} | {statistics.mean(r['seconds'] for r in of):.0f}"
        lines.append(f"| {row} | {cost} | {len(values)} | {100 * statistics.mean(values):.1f}{spread} | {difference} | {judged} |")
    return [*lines, ""]


def tables(cfg: Config, records: list[dict]) -> str:
    """All tables as markdown, a function of the records alone."""
    steps = cfg.steps or resolved([])["steps"]
    head = (f"At nano scale ({steps:,} steps, {cfg.limit} held-out pictures a language, mean and deviation over seeds; chrf is a "
            f"character F-score). A difference is called one when it exceeds twice its standard error over seeds.")  # fmt: skip
    return "\n".join([head, "", *(line for name, suite in cfg.suites().items() for line in suite_table(name, suite, cfg, records))])


def plot(cfg: Config, records: list[dict], path: Path) -> bool:
    """Every row's difference to its reference, a point a seed; False when there is nothing to show."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = []
    for suite in cfg.suites().values():
        base, _ = values_of(suite.rows[0], suite, cfg, records)
        for row in suite.rows[1:]:
            values, _ = values_of(row, suite, cfg, records)
            if base and values:
                label = f"{row} ({', '.join(suite.measure).replace('_', ' ')})"
                rows.append((label, [100 * (v - statistics.mean(base)) for v in values]))
    if not rows:
        return False
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.3 * len(rows)))
    for y, (_, values) in enumerate(rows):
        axes.plot(values, [y] * len(values), "o", color="0.6", markersize=4)
        axes.plot([statistics.mean(values)], [y], "D", color="C0", markersize=6)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("difference to the reference in points; grey: single seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return True


def write_tables(cfg: Config) -> int:
    """Put the tables between the markers of --readme, and the plot beside the records."""
    records, readme = read_records(Path(cfg.records)), Path(cfg.readme)
    text = readme.read_text(encoding="utf-8")
    start, end = text.find(BEGIN), text.find(END)
    if not 0 <= start < end or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"--readme {readme}: needs the lines {BEGIN} and {END}, once each, in this order")
    content = tables(cfg, records)
    picture = Path(cfg.records) / "ablations.png"
    if plot(cfg, records, picture):
        content += f"\n![Differences to the reference of each suite]({os.path.relpath(picture, readme.parent)})\n"
    whole = f"{text[:start]}{BEGIN}\n{content}\n{text[end:]}"
    write_atomic(readme, lambda path: path.write_text(whole, encoding="utf-8"))
    print(content)
    return 0


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Change one ingredient of mBLIP at a time and measure what it did.")
    return write_tables(cfg) if cfg.table else run_suite(cfg)


if __name__ == "__main__":
    run_main(main)
