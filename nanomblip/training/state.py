"""Stopping and going on: the state of a run on disk, its logs, and what Ctrl-C does.

A run can end at any moment (Ctrl-C, SIGTERM, kill -9, a full disk, a power cut) and goes on from its last saved
state to the same final bits as if nothing had happened. Three things make that possible: every random choice is a
function of (seed, step), so no generator's state need be kept; the file is written under another name and renamed;
and it carries the sha256 of its content.
"""

import csv
import os
import signal
import sys
from pathlib import Path

import torch
import torch.nn as nn

from nanomblip.training.distributed import gather, rank, world
from nanomblip.weights.files import RunLock, digest, open_safetensors, save_tensors, write_atomic
from nanomblip.weights.layout import WeightsError


class State:
    """What a run needs to go on: trained parameters, the optimizers' memory, the step; one file, written atomically.

    The last two are kept (state.safetensors and state.previous.safetensors). Each carries the sha256 of its content, so
    a damaged one is noticed and the older one taken.
    """

    def __init__(
        self, folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], extra: dict | None = None
    ):
        self.extra = extra or {}  # name -> tensor, saved and restored in place with the rest
        self.path, self.older = folder / "state.safetensors", folder / "state.previous.safetensors"
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rest = {name: t for name, t in model.state_dict().items() if name not in self.trained}
        self.frozen = digest(rest)  # int8 codes too
        self.optimizers, self.stage = optimizers, 0
        self.memory = None  # the stage and the optimizers' memory that were loaded, until these optimizers are there

    def save(self, step: int, seconds: float) -> None:
        tensors = {f"parameter.{name}": p for name, p in self.trained.items()}
        tensors |= {f"extra.{name}": value for name, value in self.extra.items()}
        names = {p: name for name, p in self.trained.items()}
        for optimizer in self.optimizers:
            for p, memory in optimizer.state.items():  # exp_avg, exp_avg_sq and step of AdamW, momentum_buffer of Muon
                tensors |= {f"{key}.{names[p]}": value for key, value in memory.items()}
        meta = dict(
            step=step,
            stage=self.stage,
            seconds=seconds,
            frozen=self.frozen,
            sha256=digest(tensors),
            torch=torch.__version__,
        )
        if self.path.exists():
            os.replace(self.path, self.older)
        save_tensors(self.path, tensors, {key: str(value) for key, value in meta.items()})

    def load(self) -> tuple[int, float]:
        """Restore the newest undamaged state; returns its step and the seconds spent so far. (0, 0.0) if there is
        none."""
        problems = []
        for path in (self.path, self.older):
            if path.exists():
                try:
                    found = self._load(path)
                    if path == self.older:
                        self.path.unlink(
                            missing_ok=True
                        )  # else the next save would put the damaged one over the good one
                    return found
                except WeightsError as error:
                    problems.append(str(error))
                    print(f"{error}; trying the one before", file=sys.stderr)
        if problems:
            raise WeightsError(f"{self.path.parent}: no undamaged state to resume from; start a new run")
        return 0, 0.0

    def _load(self, path: Path) -> tuple[int, float]:
        with open_safetensors(path) as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        if digest(tensors) != meta.get("sha256"):
            raise WeightsError(f"{path}: its content does not have the sha256 it was written with")
        if meta["frozen"] != self.frozen:
            raise WeightsError(f"{path}: belongs to other frozen weights than the run starts from")
        if {key.split(".", 1)[1] for key in tensors} != set(self.trained) | set(self.extra):
            raise WeightsError(f"{path}: holds other parameters than the run trains")
        if meta["torch"] != torch.__version__:
            was, now = meta["torch"], torch.__version__
            print(f"{path}: written by torch {was}, this is {now}; the last bits may differ", file=sys.stderr)
        memory = {}
        for key, value in tensors.items():
            what, name = key.split(".", 1)
            if what in ("extra", "parameter"):
                (self.extra[name] if what == "extra" else self.trained[name].data).copy_(value)
            else:
                memory[what, name] = value
        self.memory = int(meta.get("stage", 0)), memory
        self.use(self.optimizers, self.stage)
        return int(meta["step"]), float(meta["seconds"])

    def use(self, optimizers: list[torch.optim.Optimizer], stage: int) -> None:
        """Save the memory of these optimizers from now on. They get the memory that was loaded, if it is of this
        stage."""
        self.optimizers, self.stage = optimizers, stage
        if not optimizers or self.memory is None:
            return
        (of_stage, memory), self.memory = self.memory, None
        if of_stage == stage:
            owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
            for (what, name), value in memory.items():
                p = self.trained[name]
                owner[p].state[p][what] = value.to(p.device)


class Log:
    """A CSV file that survives resuming: rows after the step to go on from are dropped and written again."""

    def __init__(self, path: Path, columns: tuple[str, ...], step: int):
        rows = []
        if path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= step]

        def write(temporary):
            with open(temporary, "w", newline="") as file:
                csv.writer(file).writerows([columns, *rows])

        if not rank():
            write_atomic(path, write)  # so that a kill in this moment does not cost the rows there were
        self.file = open(os.devnull if rank() else path, "a", newline="")
        self.writer = csv.writer(self.file)
        self.rows = rows

    def add(self, *row):
        self.rows.append([str(value) for value in row])
        self.writer.writerow(row)
        self.file.flush()

    def recent_mean(self, column: int, count: int = 50) -> float | None:
        """Mean of a column over the last rows, None if there are none yet."""
        values = [float(row[column]) for row in self.rows[-count:]]
        return sum(values) / len(values) if values else None


class Interrupt:
    """Remembers the first Ctrl-C or SIGTERM until the step is over; a second one ends the process at once.

    `signal` is what all ranks know of. Under torchrun, which hands signals on, a second one is nothing new; it kills
    by itself what has not ended after 30 seconds.
    """

    def __init__(self):
        self.signal = self.received = None
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.note)

    def note(self, number, frame):
        self.received = number
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, signal.SIG_DFL if world() == 1 else signal.SIG_IGN)
        if world() == 1:
            self.signal = number
            print(
                f"\n{signal.Signals(number).name}: saving after this step; once more to stop at once", file=sys.stderr
            )

    def agree(self):
        """Tell the other ranks, and learn of theirs."""
        self.signal = max(gather(self.received or 0)) or None

    def release(self):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)




def begin_worker(worker: int) -> None:
    """In a loader worker: Ctrl-C reaches the whole process group, but the main process decides; so for its locks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    RunLock.drop_copies()


def claim(folder: Path) -> RunLock | None:
    """Make the folder of a run, lock it, and clear away what a killed process left half written; rank 0 does."""
    if rank():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    remove_leftovers(folder)
    return lock


def remove_leftovers(folder: Path) -> None:
    """Delete the half-written files of a process that was killed while it saved (ours, and safetensors' own)."""
    for leftover in (*folder.rglob(".*.tmp"), *folder.rglob(".tmp*")):
        if leftover.is_file():
            leftover.unlink()
