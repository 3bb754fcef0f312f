"""Several ranks on gloo: the same batches and losses for every number of them, and how a run ends."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import COMMON

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [*COMMON, "--init", "random", "--bf16", "off", "--eval_every", "0", "--steps"]


class Ranks:
    """Starts runs of several ranks in a folder."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ranks.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, folder, world, argv, more=None, patch="", **environ):
        """more: flags that one rank has beyond the others. Returns the process ids."""
        if world > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                environ = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1])) | environ
        self.folder, self.world = folder, world
        job = dict(folder=str(folder), world=world, argv=list(map(str, argv)), more=more or {}, patch=patch, environ=environ)
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def end(self):
        """(exit statuses, what was said on stderr without progress bars, one string a rank)."""
        statuses = json.loads(self.server.stdout.readline())
        said = [(self.folder / f"rank{r}.err").read_text() for r in range(self.world)]
        lines = [[line.rsplit("\r", 1)[-1].strip() for line in text.splitlines()] for text in said]
        return statuses, ["\n".join(line for line in part if line and "it/s" not in line) for part in lines]

    def run(self, *args, **more):
        self.start(*args, **more)
        return self.end()


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks()
    yield ranks
    ranks.server.stdin.close()
    ranks.server.wait()


def losses(folder):
    with open(folder / "loss.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


SEEN = """
fetch = train.Loader.__next__
def noted(loader):
    batch = fetch(loader)
    with open(f"seen{rank}", "a") as file:
        file.write(f"{batch['picture'].tolist()}\\n")
    return batch
train.Loader.__next__ = noted
"""


def same_run(ranks, folder, layouts, steps):
    """Runs of (ranks, --accumulate): the global batches that each saw, step by step, and its losses."""
    seen, found = [], []
    for world, accumulate in layouts:
        here = folder / f"of{world}"
        here.mkdir()
        flags = [*FLAGS, steps, "--accumulate", accumulate, "--name", "r"]
        statuses, said = ranks.run(here, world, flags, patch=SEEN)
        assert statuses == [0] * world, said
        parts = [(here / f"seen{r}").read_text().splitlines() for r in range(world)]
        seen.append([sorted(sum((part[s * accumulate : (s + 1) * accumulate] for part in parts), [])) for s in range(steps)])
        found.append(losses(here / "out/r"))
        words = f"step    16 examples: 4 x {accumulate} micro-batches x {world} processes"
        assert words in (here / "rank0.out").read_text()
        assert all((here / f"rank{r}.out").read_text() == said[r] == "" for r in range(1, world))
        record = json.loads((here / "out/r/record.json").read_text())
        assert record["examples_seen"] == 16 * steps and record["processes"] == world
    return seen, found


def test_two_ranks_see_what_one_sees(ranks, tmp_path):
    seen, found = same_run(ranks, tmp_path, [(1, 4), (2, 2)], 4)
    assert seen[0] == seen[1] and len(set(map(str, seen[0]))) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.slow
def test_fifty_steps_of_one_two_and_four_ranks(ranks, tmp_path):
    seen, found = same_run(ranks, tmp_path, [(1, 4), (2, 2), (4, 1)], 50)
    assert seen[0] == seen[1] == seen[2]
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)
    print([max(abs(a - b) / a for a, b in zip(found[0], other)) for other in found[1:]])
