"""Several ranks on gloo: the same batches and losses for every number of them, and how a run ends."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from test_train import COMMON, DATA, SMALL, save_mblip, save_mt5
from torch.distributed.run import get_args_parser

import sample
import train
from nanomblip.measure import evaluate
from nanomblip.model.mblip import MBLIP

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
        self.folder, self.world = folder, world
        job = dict(folder=str(folder), world=world, argv=list(map(str, argv)), more=more or {}, patch=patch, environ=environ)
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def end(self):
        """(exit statuses, what was said on stderr without progress bars, one string a rank)."""
        statuses = json.loads(self.server.stdout.readline())
        said = [(self.folder / f"rank{r}.err").read_text() for r in range(self.world)]
        said = [re.sub(r"[^\n]*\|[^\n]*?(step|caption)(/s|)[^\n\]]*\]", "\n", text).split("\n") for text in said]
        return statuses, ["\n".join(line.strip() for line in lines if line.strip()) for lines in said]

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


def bases(folder):
    """Flags for a model that sees and a language model, written into the folder."""
    torch.manual_seed(5)
    model = MBLIP(SMALL)
    model.init_weights()
    save_mblip(model, folder / "sees", image_token=8000)
    save_mt5(model.mt5, folder / "reads")
    for name in ("sees", "reads"):
        shutil.copyfile(DATA / "spiece.model", folder / name / "spiece.model")
    return ["--vision", folder / "sees", "--llm", folder / "reads", "--init", "blip2", "--views", "1"]


def same_run(ranks, folder, layouts, steps, more=()):
    """Runs of (ranks, --accumulate): the global batches that each saw, step by step, and its losses."""
    seen, found = [], []
    for world, accumulate in layouts:
        here = folder / f"of{world}"
        here.mkdir()
        flags = [*FLAGS, steps, *more, "--accumulate", accumulate, "--name", "r"]
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
    """In the paper's two stages, with dropout everywhere. (Muon, which --init random takes, makes the noise of sums in
    another order 500 times as large: there the losses are 1e-4 apart after as many steps.)"""
    more = [*bases(tmp_path), "--warmup", "projection", "--warmup_steps", 15, "--lora_dropout", 0.1]
    seen, found = same_run(ranks, tmp_path, [(1, 4), (2, 2), (4, 1)], 50, more)
    assert seen[0] == seen[1] == seen[2]
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)
    print([max(abs(a - b) / a for a, b in zip(found[0], other)) for other in found[1:]])


SHARED = """
from nanomblip.model.int8 import Int8Linear
train_stage = train.train
def looked_at(stage, run):
    mapped = [line.split() for line in open("/proc/self/maps") if "codes.safetensors" in line]
    places = [tuple(int(end, 16) for end in words[0].split("-")) for words in mapped]
    layers = [m for m in run.model.modules() if isinstance(m, Int8Linear)]
    inside = sum(any(a <= m.weight.data_ptr() < b for a, b in places) for m in layers)
    print(inside, len(layers), {words[4] for words in mapped}, file=open(f"shared{rank}", "w"))
    train_stage(stage, run)
train.train = looked_at
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what is mapped")
def test_int8_codes_are_in_memory_once(ranks, tmp_path):
    """Both ranks map the same file, which has no name any more, and train as one process does."""
    more = [*bases(tmp_path), "--int8", "--warmup", "none"]
    flags = [*FLAGS, 2, *more, "--batch", 4, "--name"]
    statuses, said = ranks.run(tmp_path, 2, [*flags, "of2", "--accumulate", 1], patch=SHARED, TMPDIR=str(tmp_path))
    assert statuses == [0, 0], said
    one, two = ((tmp_path / f"shared{r}").read_text().split(maxsplit=2) for r in range(2))
    assert one == two and one[0] == one[1] != "0" and "," not in one[2]  # the same inode
    assert not list(tmp_path.glob("nanomblip-*"))
    assert ranks.run(tmp_path, 1, [*flags, "of1", "--accumulate", 2])[0] == [0]
    assert losses(tmp_path / "out/of2") == pytest.approx(losses(tmp_path / "out/of1"), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ ends

LONG = [*FLAGS, "40", "--accumulate", "1", "--save_every", "0", "--name", "r"]


def wait_for_step(folder, step, seconds=120):
    end, path = time.time() + seconds, folder / "out/r/loss.csv"
    while time.time() < end:
        if path.exists() and len(path.read_text().splitlines()) > step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def one_line(said):
    (line,) = [line for part in said for line in part.splitlines()]
    return line


def test_sigterm_to_one_rank_saves_once_and_another_number_goes_on(ranks, tmp_path):
    """Rank 1 is told, rank 0 saves; one process alone and two end with the losses of those who were never stopped."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    flags = [*FLAGS, "14", "--accumulate", "2", "--name", "r"]
    assert ranks.run(whole, 1, flags)[0] == [0]
    pids = ranks.start(cut, 2, [*flags, "--accumulate", "1"])
    wait_for_step(cut, 3)
    os.kill(pids[1], signal.SIGTERM)
    statuses, said = ranks.end()
    assert statuses == [143, 143] and "go on with: python train.py --resume out/r" in one_line(said)
    done = len(losses(cut / "out/r"))
    assert 3 <= done < 14  # it may stop with the very step that was waited for
    statuses, said = ranks.run(cut, 3, ["--resume", "out/r"])
    assert statuses == [2, 2, 2] and "2 micro-batches, which 3 processes cannot share evenly" in one_line(said)
    assert ranks.run(cut, 1, ["--resume", "out/r"])[0] == [0]
    assert losses(cut / "out/r") == pytest.approx(losses(whole / "out/r"), rel=1e-5)


def test_a_killed_rank_ends_all_in_one_line(ranks, tmp_path):
    pids = ranks.start(tmp_path, 2, LONG)
    wait_for_step(tmp_path, 3)
    started = time.time()
    os.kill(pids[1], signal.SIGKILL)
    statuses, said = ranks.end()
    assert statuses == [2, -9] and time.time() - started < 60
    assert "another of the 2 processes ended without a word" in one_line(said)
    pids = ranks.start(tmp_path, 2, ["--resume", "out/r", "--save_every", "0"])  # the last state is good
    wait_for_step(tmp_path, 8)
    os.kill(pids[0], signal.SIGKILL)
    statuses, said = ranks.end()
    assert statuses == [-9, 2] and "another of the 2 processes ended" in one_line(said)
    assert ranks.run(tmp_path, 1, ["--resume", "out/r"])[0] == [0]


NAN = """
from nanomblip.model.mblip import MBLIP
whole = MBLIP.loss
MBLIP.loss = lambda self, *args: whole(self, *args) * (float("nan") if rank == 1 else 1.0)
"""
BAD_PICTURES = """
def fails(loader):
    raise ValueError("--image_root x: 20 examples in a row have no usable picture")
if rank == 1:
    train.Loader.__next__ = fails
"""
OTHER_CODE = """
facts = distributed.what_runs()
distributed.what_runs = lambda: dict(torch=facts.get("torch"), code=str(rank), data="same")
"""
OTHER_WEIGHTS = """
from nanomblip.training import setup
build = setup.build_start
def other(cfg, folders):
    start = build(cfg, folders)
    start.model.proj.bias.data += rank
    return start
setup.build_start = other
"""


@pytest.mark.parametrize("patch,more,words", [
    (NAN, {}, "rank 1: loss nan, gradient norm nan at step 0: stopped before the update"),
    (BAD_PICTURES, {}, "rank 1: --image_root x: 20 examples in a row"),
    ("", {"1": ["--batch", "8"]}, "rank 1 has --batch 8, rank 0 has 4: start all with the same flags"),
    ("", {"1": ["--batsh", "8"]}, "rank 1: train.py: error: unknown argument '--batsh'"),
    (OTHER_CODE, {}, "rank 1 has code 1, rank 0 has 0"),
    (OTHER_WEIGHTS, {}, "rank 1 has state"),
])  # fmt: skip
def test_what_one_rank_alone_does_wrong_is_one_line_and_hangs_nobody(ranks, tmp_path, patch, more, words):
    statuses, said = ranks.run(tmp_path, 2, LONG, more, patch)
    assert statuses == [2, 2] and words in one_line(said)


def test_what_all_do_wrong_is_said_once(ranks, tmp_path):
    statuses, said = ranks.run(tmp_path, 2, [*LONG, "--stepz", "3"])
    assert statuses == [2, 2] and said[1] == "" and "did you mean --steps" in one_line(said)
    statuses, said = ranks.run(tmp_path, 2, [*LONG, "--init", "nowhere"])
    assert statuses == [2, 2] and said[1] == "" and "nowhere" in one_line(said)


def test_torchrun_takes_no_flag_for_its_own():
    for config in (train.Config, sample.Config, evaluate.Config):
        for name in (f.name for f in fields(config)):
            words = [f"--{name}", "x", f"--no_{name}"]
            assert get_args_parser().parse_args(["train.py", *words]).training_script_args == words


SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import ranks
print(os.getpid(), file=open("pid" + os.environ["RANK"], "w"))
ranks.train.run_main(ranks.distributed.together(ranks.train.main))
"""


@pytest.mark.slow
def test_torchrun_itself(tmp_path):
    """A signal to torchrun saves; a rank that is killed ends the job within a minute; what was saved goes on."""
    (tmp_path / "small.py").write_text(SCRIPT)

    def start(*argv):
        for pid in tmp_path.glob("pid*"):
            pid.unlink()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "small.py"]
        return subprocess.Popen([*command, *map(str, argv)], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                                text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip

    job = start(*LONG)
    wait_for_step(tmp_path, 3)
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=60)
    assert job.returncode != 0 and said.count("go on with: python train.py --resume out/r") == 1
    done = len(losses(tmp_path / "out/r"))
    job = start("--resume", "out/r", "--save_every", "0")
    wait_for_step(tmp_path, done + 3)
    started = time.time()
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    _, said = job.communicate(timeout=60)
    assert job.returncode != 0 and said.count("another of the 2 processes ended without a word") == 1
    assert time.time() - started < 60 and "error: another" in said
    job = start("--resume", "out/r")
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0 and len(losses(tmp_path / "out/r")) == 40


def test_an_environment_that_torchrun_did_not_make(ranks, tmp_path):
    statuses, said = ranks.run(tmp_path, 1, LONG, WORLD_SIZE="2")
    assert statuses == [2] and "WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT not set: start" in one_line(said)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1]))
        statuses, said = ranks.run(tmp_path, 1, LONG, WORLD_SIZE="2", **address)
    assert statuses == [2] and "the port is in use; give another" in one_line(said)
