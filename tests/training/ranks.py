"""A process that has imported everything, and forks the ranks of a run when it is told to: what torchrun does, without
seconds of imports for each of them. test_distributed.py talks to it by lines of JSON.
"""

import json
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "training")]

import test_train  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402
from nanomblip.model.mblip import PRESETS  # noqa: E402
from nanomblip.training import distributed  # noqa: E402

torch.set_num_threads(1)
PRESETS["nano"], train.MEASUREMENTS = test_train.SMALL, ("validation",)
train.load_emoji, train.LanguageID = (lambda _: test_train.EMOJI), (lambda _: test_train.LANGUAGE_ID)


def rank_main(job: dict, rank: int) -> None:
    """One rank, a child: runs train.py with its streams in files, and ends."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"rank{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["world"])) | job["environ"]
    sys.argv = ["train.py", *job["argv"], *job["more"].get(str(rank), [])]
    status = 1
    try:
        exec(job["patch"], dict(train=train, distributed=distributed, rank=rank, os=os))
        train.run_main(distributed.together(train.main))
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    for line in sys.stdin:
        job, pids = json.loads(line), []
        os.chdir(job["folder"])
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        if job["world"] > 1:  # torchrun, too, holds the store of its ranks, so that it outlives them
            job["environ"] |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
        for rank in range(job["world"]):
            if (pid := os.fork()) == 0:
                rank_main(job, rank)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    serve()
