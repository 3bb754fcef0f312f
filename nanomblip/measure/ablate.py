"""One ingredient of mBLIP changed at a time: what the paper claims, what nano shows, whether the two agree.

    python -m nanomblip.measure.ablate                run what is missing; may be stopped at any moment and called again
    python -m nanomblip.measure.ablate --missing      say what is missing, run nothing
    python -m nanomblip.measure.ablate --table        rebuild the tables in notebooks/records/README.md

An experiment is a list of train.py's flags. Each (experiment, seed) is one run of train.py, then of
nanomblip.measure.evaluate, as separate processes, one at a time; what remains of it is one small file,
notebooks/records/EXPERIMENT.SEED.json. A run is done when there is a record whose config is the one that would be run
now; two experiments with the same flags share it, and a changed default of train.py makes its records stale.
The tables are a function of the record files and of nothing else.
"""

import ctypes
import hashlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from nanomblip.data.emoji import HELD_OUT_LANGS, load_emoji
from nanomblip.flags import parse_flags, run_main
from nanomblip.measure.ablation_suites import (
    HERE,
    MADE,
    TASKS,
    Config,
    find_current,
    flags_of,
    read_records,  # fmt: skip
    resolved,
    same_run,
    setting_of,
)
from nanomblip.measure.ablation_tables import write_tables
from nanomblip.weights.files import RunLock, read_json, write_json
from nanomblip.weights.load import load_mblip
from nanomblip.weights.save import save_mblip


def die_with_parent() -> None:
    """Let the kernel end a child with this process (Linux): a killed suite must not train on alone."""
    try:
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)
    except (OSError, AttributeError):
        pass


def call(words: list[str], log: Path) -> None:
    """Run a Python program to its end; its output goes to `log`. ValueError with its last line when it fails."""
    with open(log, "ab") as file:
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        child = subprocess.Popen(
            [sys.executable, *words], cwd=os.getcwd(), env={**os.environ, "PYTHONPATH": path},
            stdout=file, stderr=subprocess.STDOUT, preexec_fn=die_with_parent,
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
        )  # fmt: skip
        try:
            status = child.wait()
        except BaseException:  # Ctrl-C or SIGTERM: train.py saves first
            child.terminate()
            child.wait()
            raise
    if status:
        tail = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()
        raise ValueError(
            f"{' '.join(words[:2])} ended with status {status}: {tail[-1] if tail else 'no output'} (all of it: {log})"
        )


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
    """group -> metric -> mean, from a record of measure.evaluate, and one group more: the eight held-out languages."""
    record = read_json(path)
    groups = {
        name: {k: v["mean"] for k, v in row.items() if isinstance(v, dict)} for name, row in record["groups"].items()
    }
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
    base, names = (Path(cfg.out) / MADE[word] for word in ("@random", "@nano"))
    if str(base) in flags:
        random_base(Path(resolved([])["vision"]), base)
    if str(names) in flags:  # done in a moment if it was done before
        words = ["--model", "nano", "--to", "all", "--every", "--batch", "128", "--out", str(names)]
        call(["-m", "nanomblip.data.translate", *words], log)
    if folder.exists():
        wait_for(folder)
    if folder.exists() and (not (folder / "train.json").exists() or not stored_fits(folder, flags)):
        shutil.rmtree(folder)  # of a kill before anything was saved, or of other flags
    if not (folder / "record.json").exists():
        fresh = [*flags, "--out", cfg.out, "--name", name]
        call([str(HERE / "train.py"), *(["--resume", str(folder)] if (folder / "train.json").exists() else fresh)], log)
    measures = {}
    for what in TASKS.get(experiment, ("caption",)):
        task, _, mask = what.partition("+")
        out = folder / f"{what}.json"
        if not out.exists():
            words = ["-m", "nanomblip.measure.evaluate", "--model", str(folder), "--data", "emoji", "--task", task]
            words += ["--limit", str(cfg.limit), "--preset", "greedy", "--langs", langs, "--out", str(out)]
            call([*words, *(["--force_lang"] if mask else [])], log)
        measures[what] = measured(out)
    told = read_json(folder / "record.json")
    kept = {key: told[key] for key in ("seconds", "parameters", "trained_parameters", "final_loss", "torch", "threads")}
    of = dict(experiments=same_run(experiment, seed, cfg), setting=setting_of(cfg), seed=seed, config=resolved(flags))
    return dict(**of, **kept, measures=measures)


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
    mark = "" if changed == usual else f".{hashlib.sha256(changed.encode()).hexdigest()[:8]}"
    return f"{experiment}.{seed}{mark}.json"


def time_left(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def stop(number, frame):
    raise KeyboardInterrupt


def run_suite(cfg: Config) -> int:
    """Run what is missing, one process at a time; returns the exit status."""
    records_folder, out = Path(cfg.records), Path(cfg.out)
    pairs = [(experiment, seed) for experiment in cfg.experiments() for seed in range(cfg.seeds)]
    not_done = lambda: [pair for pair in pairs if find_current(*pair, cfg, read_records(records_folder)) is None]
    missing = not_done()
    print(f"{len(pairs) - len(missing)} of {len(pairs)} runs are done, {len(missing)} are missing", flush=True)
    if cfg.missing:
        for experiment, seed in missing:
            print(f"  {experiment}, seed {seed}: train.py {' '.join(flags_of(experiment, seed, cfg))}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    records_folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(out)  # noqa: F841, one suite at a time
    signal.signal(signal.SIGTERM, stop)
    langs, spent = ",".join(load_emoji("core").langs), []
    while missing:  # a run may be that of several experiments, so what is left is asked again each time
        experiment, seed = missing[0]
        guess = f", about {time_left(statistics.mean(spent) * len(missing))} left" if spent else ""
        print(f"{len(pairs) - len(missing)} of {len(pairs)} done{guess}; now {experiment}, seed {seed}", flush=True)
        started = time.time()
        record = run(experiment, seed, cfg, langs)
        write_json(records_folder / record_name(experiment, seed, cfg), record)
        shutil.rmtree(out / f"{experiment}.{seed}")
        spent.append(time.time() - started)
        missing = not_done()
    print(
        f"{len(pairs)} of {len(pairs)} done; the tables: python -m nanomblip.measure.ablate --suite {cfg.suite} --table"
    )
    return 0


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Change one ingredient of mBLIP at a time and measure what it did.")
    return write_tables(cfg) if cfg.table else run_suite(cfg)


if __name__ == "__main__":
    run_main(main)
