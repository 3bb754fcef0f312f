"""Reliability in figures: `python tests/stress.py --part weights,pictures --record tests/stress.json`.

Each part damages, cuts or kills something many times. What comes of a case is one of four:

    refused     an error of the right kind: one line that names the file
    identical   the same numbers as without the damage
    accepted    other numbers, taken as valid, for a reason that is known and counted: a flipped bit in a float, say, of a file
                without sha256.json. Where a hash is known this is a failure
    failure     everything else: another exception, a hang, wrong numbers; and for a whole part, growth of memory

Case n of a part is a function of (--seed, part, n): `--part weights --case 1234` runs that one again and shows its traceback. The
exit status is 1 after any failure. pytest does not collect this file; tests/test_stress.py runs a handful of cases of each part.
"""

import json
import os
import platform
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "weights")]
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and training is forked

import PIL
import safetensors
import torch
from stress_damage import Hang, limit, memory
from stress_files import json_files, names, pictures, weights
from stress_runs import downloads, kills, nan
from tqdm import tqdm

from nanomblip.flags import flag, parse_flags, run_main
from nanomblip.weights.files import write_json

# Name -> what is tried, how many times, and the seconds that one case may take.
PARTS = {
    "kills": (kills, "training runs killed by SIGKILL, up to four times each, and gone on with", 100, 120),
    "weights": (weights, "damaged folders of weights and adapters", 100_000, 10),
    "pictures": (pictures, "damaged pictures in ten formats", 50_000, 10),
    "json": (json_files, "damaged mixture and benchmark files", 20_000, 10),
    "downloads": (downloads, "downloads cut at every kind of byte, up to 25 times each", 1000, 60),
    "names": (names, "hostile names in manifests, indices, image_ids and adapters", 10_000, 10),
    "nan": (nan, "training steps whose loss or gradient is NaN or infinite", 50, 120),
}
GROWTH = 64  # MB of memory by which a part may grow ...
LEAK = 0.001  # ... and MB a case: reading a tensor costs safetensors 0.8 some 0.1 KB that it never gives back


@dataclass(frozen=True)
class Config:
    part: str = flag("all", f"parts, separated by commas: {', '.join(PARTS)}; or all")
    seed: int = flag(0, "seed of the cases")
    minutes: float = flag(0.0, "time that a part may take; 0 = until its count is reached")
    count: int = flag(0, "cases of each part; 0 = the part's own number")
    case: int = flag(-1, "run this case alone and show its traceback")
    record: str = flag("", "JSON file to which the figures of the parts are added")
    table: bool = flag(False, "print the table of --record and run nothing")

    def __post_init__(self):
        if unknown := set(self.parts()) - set(PARTS):
            raise ValueError(f"--part {sorted(unknown)[0]!r}: there are {', '.join(PARTS)}")
        if self.case >= 0 and len(self.parts()) > 1:
            raise ValueError(f"--case {self.case}: of which --part?")
        if self.table and not self.record:
            raise ValueError("--table: of which --record?")

    def parts(self) -> list[str]:
        return list(PARTS) if self.part == "all" else self.part.split(",")


def signature(error: BaseException) -> tuple[str, str]:
    """What is the same when the same fault shows again (the kind of error and the line of the package that it came from), and its message."""
    cause = error.__cause__ or error
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if f.filename.startswith((str(ROOT / "nanomblip"), str(ROOT / "train.py")))]
    where = f" at {Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames and not isinstance(error, Hang) else ""
    if cause is not error:  # a check of ours about an error of the package
        return f"{error}{where}", repr(str(cause))[1:-1][:200]
    return f"{type(error).__name__}{where}", repr(str(error).split("\n")[0])[1:-1][:200]


def run_part(name: str, cfg: Config) -> dict:
    """The figures of one part."""
    part, what, count, seconds = PARTS[name]
    cases = [cfg.case] if cfg.case >= 0 else range(cfg.count or count)
    outcomes, notes, failures, slowest, held, start = Counter(), Counter(), {}, (0.0, 0), None, time.time()
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="stress", dir=shm if shm.is_dir() else None) as folder:
        with contextmanager(part)(Path(folder), notes) as case:
            for n in tqdm(cases, desc=name, smoothing=0.01, disable=None):
                begun = time.time()
                if cfg.minutes and begun - start > 60 * cfg.minutes:
                    break
                if held is None and n >= max(50, len(cases) // 10):  # by now every cache is filled
                    held = memory()
                try:
                    with limit(seconds):
                        outcome = case(random.Random(f"{cfg.seed}/{name}/{n}"))
                except (Exception, Hang) as error:  # whatever comes out is what this file looks for
                    outcome = "failure"
                    kind, text = signature(error)
                    failures.setdefault(kind, dict(kind=kind, count=0, case=n, first=text.replace(folder, "")))["count"] += 1
                    if cfg.case >= 0:
                        traceback.print_exc()
                outcomes[outcome] += 1
                slowest = max(slowest, (time.time() - begun, n))
            grown = 0.0 if held is None else memory() - held
    if grown > GROWTH + LEAK * len(cases):
        failures["memory"] = dict(kind="memory", count=1, case=-1, first=f"grew by {grown:.0f} MB")
    return dict(
        what=what, seed=cfg.seed, wanted=len(cases), tried=outcomes.total(), refused=outcomes["refused"], identical=outcomes["identical"],
        accepted={key.removeprefix("accepted: "): value for key, value in sorted(outcomes.items()) if key.startswith("accepted")},
        failures=sorted(failures.values(), key=lambda f: -f["count"]), slowest=dict(seconds=round(slowest[0], 2), case=slowest[1]),
        grown_mb=round(max(0.0, grown), 1), seconds=round(time.time() - start, 1), notes=dict(notes),
        versions=dict(python=platform.python_version(), torch=torch.__version__, safetensors=safetensors.__version__, pillow=PIL.__version__),
    )  # fmt: skip


def table(record: dict) -> str:
    """The figures of all parts as a table in Markdown, and below it why something was accepted, and what failed."""
    heads = "part,what,tried,refused by one line,same numbers,accepted although changed,failures,slowest case (s),memory grew by (MB)".split(",")
    rows, below = [heads, ["---"] * 2 + ["---:"] * 7], []
    for name, f in record.items():
        failed = sum(failure["count"] for failure in f["failures"])
        tried = f"{f['tried']:,}" + f" of {f['wanted']:,}" * (f["tried"] < f["wanted"])
        rows.append([name, f["what"], tried, *(f"{n:,}" for n in (f["refused"], f["identical"], sum(f["accepted"].values()), failed)),
                     f"{f['slowest']['seconds']:.1f}", f"{f['grown_mb']:.0f}"])  # fmt: skip
        below += [f"- {name}, accepted: {n:,} with {why}" for why, n in f["accepted"].items()]
        below += [f"- {name}: " + ", ".join(f"{n:,} {what}" for what, n in f["notes"].items())] if f["notes"] else []
        below += [
            f"- {name}, **failed** {b['count']:,} times, first case {b['case']} of seed {f['seed']}: {b['kind']}: {b['first']}" for b in f["failures"]
        ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n\n" + "\n".join(below)


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Damage files and kill runs by the thousand, and count what comes of it.")
    record = json.loads(Path(cfg.record).read_text()) if cfg.record and Path(cfg.record).exists() else {}
    if cfg.table:
        print(table(record))
        return 0
    torch.set_num_threads(1)
    failed = False
    for name in cfg.parts():
        figures = run_part(name, cfg)
        print(table({name: figures}), flush=True)
        failed |= bool(figures["failures"])
        if cfg.record and cfg.case < 0:
            if Path(cfg.record).exists():  # again: another process may have added a part
                record = json.loads(Path(cfg.record).read_text())
            record[name] = figures
            write_json(Path(cfg.record), record)
    return int(failed)


if __name__ == "__main__":
    run_main(main)
