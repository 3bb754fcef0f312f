"""Several processes that train one model, started by torchrun: who they are, what they agree on, how they end.

Each process (a rank) has the whole model and a share of every optimizer step's micro-batches; torch's
DistributedDataParallel averages the gradients of what is trained. Rank 0 alone writes and speaks. Without torchrun
there is one rank, and everything here gives back what it was given.

A run ends together. What one rank raises is one line on stderr, and the others end without a word: they notice when
they next wait for it. A signal to one rank stops all after the same step.

Texts travel as JSON over gloo, never pickled; gradients go over nccl where there are GPUs.
"""

import hashlib
import json
import os
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them
PATIENCE = timedelta(minutes=30)  # for a rank that is silent and not known to be dead
HERE = Path(__file__).resolve().parents[2]

_store = None  # the key-value store of the run, one for all ranks


class PeerFailed(RuntimeError):
    """Another rank of this run failed, and will say why."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def number(m: int) -> int:
    """Of this rank's m-th micro-batch among those of all ranks, as in mixture.Batches."""
    return m * world() + rank()


# ---------------------------------------------------------------------------------------------------------- agreeing


def gather(value) -> list:
    """The values (JSON) of all ranks, by rank."""
    if world() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    parts = [torch.zeros(int(max(sizes)), dtype=torch.uint8) for _ in sizes]
    dist.all_gather(parts, nn.functional.pad(data, (0, len(parts[0]) - len(data))))
    return [json.loads(bytes(part[:size].numpy())) for part, size in zip(parts, sizes)]


def mean(value: float) -> float:
    """The mean over all ranks, the same bits on each. PeerFailed if it is not finite by another rank's fault."""
    values = gather(value)
    if abs(value) < float("inf") and not all(abs(other) < float("inf") for other in values):
        raise PeerFailed
    return sum(values) / len(values)


def share_out(items: list, answer) -> list:
    """answer(items) -> a list of as many JSON values; each rank answers every world-th item, and gets all answers."""
    answers = [None] * len(items)
    for who, part in enumerate(gather(answer(items[rank() :: world()]))):
        answers[who :: world()] = part
    return answers


def agree(**facts) -> None:
    """ValueError when a rank says another thing (JSON) of itself than rank 0."""
    first, *others = gather(facts)
    for who, other in enumerate(others, 1):
        for name, value in first.items():
            if other.get(name) != value:
                if rank():
                    raise PeerFailed
                difference = f"rank {who} has {name} {other.get(name)}, rank 0 has {value}"
                raise ValueError(f"{difference}: start all with the same flags, code and data")


def what_runs() -> dict[str, str]:
    """What must be the same on all ranks: torch's version, the code and the embedded data, by hash."""

    def sha(*paths: Path) -> str:
        sha = hashlib.sha256()
        for path in sorted(paths):
            sha.update(str(path.relative_to(HERE)).encode() + path.read_bytes())
        return sha.hexdigest()[:16]

    if world() == 1:
        return {}
    data = (path for path in (HERE / "data").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return dict(
        torch=torch.__version__, code=sha(HERE / "train.py", *(HERE / "nanomblip").rglob("*.py")), data=sha(*data)
    )


@contextmanager
def first_alone():
    """Rank 0 does what is inside first, such as fetching a file, and the others when it has finished."""
    first_alone.count = getattr(first_alone, "count", 0) + 1
    key = f"first {first_alone.count}"
    while rank() and not _store.check([key]):
        if _store.check(["spoke"]):
            raise PeerFailed
        time.sleep(0.1)
    yield
    if world() > 1 and not rank():
        _store.set(key, "done")


# ---------------------------------------------------------------------------------------------------------- training


class Loss(nn.Module):
    """The loss of a stage as a module, as DistributedDataParallel wants it: batch -> float ().

    Its parameters are those that are trained; what is frozen, the int8 codes above all, it does not show.
    """

    def __init__(self, model: nn.Module, loss, features):
        super().__init__()
        self.compute = lambda batch: loss(model, batch, features(batch))
        self.trained = nn.ParameterList(p for p in model.parameters() if p.requires_grad)

    def forward(self, batch: dict) -> torch.Tensor:
        return self.compute(batch)


def parallel(model: nn.Module, loss, features) -> nn.Module:
    """The loss of a stage, whose backward pass averages the gradients of the trained parameters over the ranks.

    Built anew for each stage, because another set of parameters is trained.
    """
    module = Loss(model, loss, features)
    return module if world() == 1 else DistributedDataParallel(module, gradient_as_bucket_view=True)


def reducing(module: nn.Module, last: bool):
    """The context of one micro-batch: gradients are averaged at the last of a step alone, and summed here before."""
    return nullcontext() if last or world() == 1 else module.no_sync()


# --------------------------------------------------------------------------------------------------- begin and end


def together(main):
    """main(argv) for `run_main`, by this process alone or by all that torchrun started."""

    def run(argv: list[str]) -> int:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return main(argv)
        streams = sys.stdout, sys.stderr
        try:
            _start()
            if rank():
                sys.stdout = sys.stderr = _Muted()
            status = main(argv)
            gather(status)  # so that no rank ends, and torchrun stops the others, while rank 0 still writes
            dist.destroy_process_group()
            return status
        except Exception as error:
            if (last := _last_word(error)) is error:
                raise
            raise last from None
        except SystemExit as end:  # parse_flags has said why, but on one rank only to the walls
            if end.code and _speaks(wait=2.0 * (rank() > 0)) and rank():
                print(f"rank {rank()}: {sys.stderr.last}", file=streams[1])
            raise
        finally:
            sys.stdout, sys.stderr = streams

    return run


def _start() -> None:
    """Join the other processes. ValueError for an environment that torchrun did not make."""
    global _store
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set: start all processes by "
            "torchrun, or unset WORLD_SIZE"
        )
    try:
        _store, mine, count = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=_store, rank=mine, world_size=count, timeout=PATIENCE)
        gather(None)
    except (RuntimeError, ValueError) as error:
        address = ":".join(os.environ[name] for name in NEEDED[2:])
        port = "the port is in use; give another" if "EADDRINUSE" in str(error) else " ".join(str(error).split())[:200]
        raise ValueError(f"MASTER_ADDR:MASTER_PORT {address}: {port}") from None


class _Muted:
    """A stream of a rank that does not speak; remembers its last line."""

    encoding, last = "utf-8", ""

    def write(self, text: str) -> int:
        self.last = text.strip() or self.last
        return len(text)

    def flush(self) -> None:
        pass


def _speaks(wait: float = 0.0) -> bool:
    """Whether this rank is the one that says why the run ends: the first that asks. wait: seconds for the others."""
    with suppress(RuntimeError):  # the store ended with the process that held it
        deadline = time.time() + wait
        while time.time() < deadline and not _store.check(["spoke"]):
            time.sleep(0.05)
        return _store.add("spoke", 1) == 1
    return True


def _last_word(error: Exception) -> BaseException:
    """What a rank raises in the end: its error if it speaks first, else a silent end."""
    if not dist.is_initialized():
        return error
    if isinstance(error, PeerFailed) or isinstance(error, RuntimeError) and _is_broken_connection(error):
        lost = f"another of the {world()} processes ended without a word (killed, perhaps because memory ran out); "
        error = ValueError(lost + "what was saved last is whole: go on with --resume")
        return error if _speaks(wait=3.0) else SystemExit(2)
    if not _speaks(wait=1.0 * (rank() > 0)):  # what all would say, rank 0 does
        return SystemExit(2)
    if rank() and isinstance(error, (ValueError, OSError)):
        return ValueError(f"rank {rank()}: {error}")
    return error


def _is_broken_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection"))
