"""The parts of stress.py about runs that end too early: training that is killed or meets a NaN, and downloads that are cut.

As in stress_files.py each part is a generator that yields case(rng) -> outcome. Training runs in a fork of this process, which has
everything imported already, so that a run takes a second; a fork can be killed like any other process.
"""

import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from stress_damage import Failure, damage_bytes, refused

from nanomblip.data.emoji import ROOT as DATA
from nanomblip.data.emoji import load_emoji
from nanomblip.data.language_id import LanguageID
from nanomblip.model.mblip import MBLIP, PRESETS
from nanomblip.weights import hub
from nanomblip.weights.files import digest
from nanomblip.weights.records import RECORD
from nanomblip.weights.save import save_mblip, save_mt5

# train.py's flags, in this one place. The model is as small as the embedded data allow.
TRAIN = "--init random --lang_mix en,sw --steps 6 --lr_warmup 2 --batch 2 --views 0 --noise 0 --eval_pictures 1 --eval_every 0 --device cpu".split()
NAME, SAVE_ALWAYS = "--name", ["--save_every", "0"]
TWO_STAGES = "--init blip2 --vision {}/sees --llm {}/reads --warmup projection --warmup_steps 3"
VARIANTS = ("", "--accumulate 2", "--workers 1", TWO_STAGES, TWO_STAGES + " --workers 1")
NANO = replace(PRESETS["nano"], queries=2, vit=replace(PRESETS["nano"].vit, width=16, layers=1, heads=2, mlp=16),
               qformer=replace(PRESETS["nano"].qformer, width=16, layers=1, heads=2, mlp=16, vision_width=16),
               mt5=replace(PRESETS["nano"].mt5, width=16, heads=2, head_width=8, mlp=16, layers=1, decoder_layers=1))  # fmt: skip


class Training:
    """`train.py ARGUMENTS` in a fork, with the small model and the embedded data loaded once. `wait` gives its exit status."""

    def __init__(self, argv: list[str], log: Path, data: dict, before=lambda: None):
        self.log = log
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.setsid()  # so that its loader workers can be killed with it
            sys.stdout = sys.stderr = open(log, "w")  # pytest has its own in their place
            os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stdout.fileno(), 2)
            import train

            PRESETS["nano"] = NANO
            for name, value in data.items():
                setattr(train, name, value)
            before()
            status = train.main(argv)
        except (ValueError, OSError) as error:
            print(f"\nerror: {' '.join(str(error).split())}", file=sys.stderr)
            status = 2
        except BaseException:  # the fork must end here, whatever happened, and never return into this file
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def wait(self) -> int:
        """The exit status, -9 after SIGKILL. If the wait itself is broken off, nothing is left running."""
        try:
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except BaseException:
            os.killpg(self.pid, signal.SIGKILL)
            raise

    def told(self) -> str:
        """The line with the error, else the last one."""
        lines = self.log.read_text(errors="replace").replace("\r", "\n").split("\n")
        return next((line for line in lines if line.startswith("error: ")), "".join(lines[-2:]))


@cache
def embedded() -> dict:
    """What every run would load anew, name in train.py -> value."""
    importlib.import_module("train")
    importlib.import_module("torch._dynamo")  # which the first optimizer imports, for two seconds

    emoji = load_emoji("core")
    language_id = LanguageID(emoji.names)
    return dict(load_emoji=lambda *args: emoji, LanguageID=lambda *args: language_id, MEASUREMENTS=())


def save_bases(folder: Path) -> None:
    """The two folders that TWO_STAGES starts from."""
    model = MBLIP(NANO)
    model.init_weights()
    save_mblip(model, folder / "sees", image_token=8000)
    save_mt5(model.mt5, folder / "reads")
    for name in ("sees", "reads"):
        shutil.copyfile(DATA / "spiece.model", folder / name / "spiece.model")


def bits(run: Path) -> tuple:
    """What must agree between two runs: the model and the log."""
    return digest(load_file(run / "model.safetensors")), (run / "loss.csv").read_bytes()


def kill_itself(run: Path, at: int):
    """Let this process end, as by SIGKILL, just before the at-th time that it opens, renames or deletes something in the run's folder."""
    left = [at]

    def hook(event, args):
        if event in ("open", "os.rename", "os.remove", "os.chmod") and str(args[0]).startswith(str(run)):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def go_on(run: Path, start: list[str], folder: Path, data: dict, notes: Counter, before=lambda: None) -> Training:
    """A run begun, or gone on with if it has come far enough to have a config."""
    if run.exists() and not (run / "train.json").exists():
        shutil.rmtree(run)  # as its error says: not a run yet
        notes["killed before there was a run"] += 1
    return Training(["--resume", str(run), *SAVE_ALWAYS] if run.exists() else start, folder / "log", data, before)


def finish(run: Path, start: list[str], folder: Path, data: dict, notes: Counter) -> None:
    """Go on with a run to its end; Failure if it does not get there."""
    for _ in range(100):
        training = go_on(run, start, folder, data, notes)
        if (status := training.wait()) == 0:
            return
        if status != 2 or "another process" not in training.told():
            raise Failure(f"going on ended with status {status}: {training.told()}")
        notes["waited for a loader worker of a killed run"] += 1
        time.sleep(0.2)
    raise Failure("the run stays locked")


def kills(folder: Path, notes: Counter):
    data = embedded()
    save_bases(folder)
    variants = [variant.format(folder, folder).split() for variant in VARIANTS]

    @cache
    def whole(which: int) -> tuple[tuple, float]:
        """What an uninterrupted run ends with, and its seconds."""
        started, name = time.time(), f"whole{which}"
        finish(folder / name, [*TRAIN, *variants[which], *SAVE_ALWAYS, "--out", str(folder), NAME, name], folder, data, notes)
        return bits(folder / name), time.time() - started

    def case(rng):
        which, run = rng.randrange(len(variants)), folder / "run"
        want, seconds = whole(which)
        shutil.rmtree(run, ignore_errors=True)
        start = [*TRAIN, *variants[which], *SAVE_ALWAYS, "--out", str(folder), NAME, "run"]
        for _ in range(rng.randint(1, 4)):
            at, delay, group = rng.randrange(1, 80), rng.uniform(0, seconds), rng.random() < 0.5
            if rng.random() < 0.5:
                training = go_on(run, start, folder, data, notes, lambda at=at: kill_itself(run, at))
            else:
                training = go_on(run, start, folder, data, notes)
                time.sleep(delay)
                (os.killpg if group else os.kill)(training.pid, signal.SIGKILL)
            status = training.wait()
            if status not in (0, -signal.SIGKILL) and not (status == 2 and "another process" in training.told()):
                raise Failure(f"ended with status {status}: {training.told()}")
            notes["kills"] += status == -signal.SIGKILL
            notes["kills during a save"] += status == -signal.SIGKILL and any(run.rglob(".*tmp*"))
        finish(run, start, folder, data, notes)
        if bits(run) != want:
            raise Failure("another model or another loss.csv than without kills")
        if left := [path.name for path in run.rglob(".*tmp*")]:
            raise Failure(f"{left[0]} was left behind")
        return "identical"

    yield case


NOT_FINITE = (float("nan"), float("inf"), -float("inf"))


def plant(step: int, where: str, seed: int, marks: Path):
    """Let the loss, or one number of one gradient, be NaN or infinite in the step-th call of the model; write to `marks` what the parameters
    were then, and what they are when the process ends."""
    rng, honest, calls = random.Random(seed), MBLIP.loss, []
    value = rng.choice(NOT_FINITE)

    def poisoned(self, *args, **more):
        loss = honest(self, *args, **more)
        calls.append(1)
        if len(calls) != step:
            return loss
        before, end = digest(dict(self.named_parameters())), os._exit

        def note(status):
            marks.write_text(json.dumps([before, digest(dict(self.named_parameters()))]))
            end(status)

        os._exit = note
        if where == "loss":
            return loss * value
        p = rng.choice([p for p in self.parameters() if p.requires_grad])

        def spoil(gradient):
            gradient = gradient.clone()
            gradient.view(-1)[rng.randrange(gradient.numel())] = value
            return gradient

        p.register_hook(spoil)
        return loss

    MBLIP.loss = poisoned


def nan(folder: Path, notes: Counter):
    data, start = embedded(), [*TRAIN, *SAVE_ALWAYS, "--out", str(folder), NAME]
    finish(folder / "whole", [*start, "whole"], folder, data, notes)
    whole, run, marks = bits(folder / "whole"), folder / "run", folder / "marks"

    def case(rng):
        shutil.rmtree(run, ignore_errors=True)
        marks.unlink(missing_ok=True)
        step, where, seed = rng.randint(1, 6), rng.choice(("loss", "gradient", "gradient")), rng.random()
        training = Training([*start, "run"], folder / "log", data, lambda: plant(step, where, seed, marks))
        status = training.wait()
        if status != 2 or f"step {step - 1}" not in training.told():
            raise Failure(f"{where} at step {step - 1}: status {status}: {training.told()}")
        before, after = json.loads(marks.read_text())
        if before != after:
            raise Failure(f"the parameters were changed by step {step - 1}, whose {where} is not finite")
        outcome = refused(ValueError(training.told()), f"step {step - 1}")
        finish(run, [*start, "run"], folder, data, notes)
        if bits(run) != whole:
            raise Failure("another model or another loss.csv after going on")
        notes[where] += 1
        return outcome

    yield case


# ---------------------------------------------------------------------------------------------------------- downloads


class Cut:
    """A connection's writer that ends after so many bytes, in one of three ways: closed, reset, or silent until the client gives up."""

    closed = False

    def __init__(self, handler, after: int, how: str):
        self.handler, self.writer, self.left, self.how = handler, handler.wfile, after, how

    def write(self, data):
        self.writer.write(data[: self.left])
        self.left -= len(data)
        if self.left < 0:
            if self.how == "silent":
                time.sleep(2 * hub.TIMEOUT[1])
            if self.how == "reset":
                self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.handler.close_connection = True
            raise ConnectionAbortedError

    def flush(self):
        pass

    close = flush


def make_server(files: dict[str, bytes], plan: list):
    """The hub of tests/weights/test_hub.py, whose next answers, listings and redirects among them, go as `plan` says."""
    import test_hub

    class CuttingServer(test_hub.Server):
        def answer(self, handler):
            fault, name = plan.pop(0) if plan else None, handler.path.split("?")[0].rpartition("/")[2]
            if isinstance(fault, tuple):
                handler.wfile = Cut(handler, *fault)
            elif isinstance(fault, int):
                location = {"Location": handler.path} if fault < 400 else {}
                return self.reply(handler, fault, b"sorry", **location)
            elif fault is not None and name in self.files and self.storage is None:
                return fault(self, handler, name, self.files[name])
            if not handler.path.startswith("/api/") and name not in self.files:  # a Location that was cut in the middle is followed
                return self.reply(handler, 404)
            return super().answer(handler)

    server = CuttingServer(files)
    server.http.shutdown_request = server.http.close_request  # else a reset would be an ordinary end
    return server


@contextmanager
def hub_server(files: dict[str, bytes], plan: list):
    """Two such servers, the hub and its storage, and a downloader that loses no time."""
    servers = [make_server(dict(files), plan) for _ in range(2)]
    names = ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT")
    environment = {name: os.environ.pop(name) for name in names if name in os.environ}
    constants = dict(BACKOFF=0.0, CHUNK=1000, TIMEOUT=(5, 0.3), TRIES=3, LONGEST_WAIT=0.0)
    kept = {name: getattr(hub, name) for name in constants}
    try:
        os.environ["HF_ENDPOINT"] = servers[0].url
        for name, value in constants.items():
            setattr(hub, name, value)
        yield servers
    finally:
        for server in servers:
            server.close()
        for name, value in kept.items():
            setattr(hub, name, value)
        del os.environ["HF_ENDPOINT"]
        os.environ.update(environment)


def repository() -> dict[str, bytes]:
    """Files as a model has them on the hub."""
    rng = random.Random(0)
    shards = {f"model-0000{i}-of-00002.safetensors": rng.randbytes(30_000 * i) for i in (1, 2)}
    index = {"weight_map": {f"key{i}": shard for i, shard in enumerate(shards)}}
    return shards | {
        hub.INDEX: json.dumps(index).encode(),
        "config.json": b"{}",
        "spiece.model": rng.randbytes(5000),
        "preprocessor_config.json": b"{}",
    }


def downloads(folder: Path, notes: Counter):
    import test_hub

    others = [test_hub.wrong_bytes, test_hub.ignore_range, test_hub.too_much, test_hub.other_part, test_hub.compressed, 302, 404, 416, 429, 500]
    files, plan, target = repository(), [], folder / "m"
    want = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}

    def fault(rng):
        if rng.random() < 0.2:
            return rng.choice(others)
        place = rng.choice((rng.randrange(250), rng.randrange(2000), rng.randrange(62_000)))  # in the header, a listing, a body
        return place, "silent" if rng.random() < 0.05 else rng.choice(("closed", "reset"))

    with hub_server(files | {"README.md": b"words", "pytorch_model.bin": b"pickle"}, plan) as (server, storage):

        def case(rng):
            rounds = 0
            shutil.rmtree(target, ignore_errors=True)
            plan[:] = [fault(rng) for _ in range(rng.randint(1, 25))]
            server.storage = rng.choice((None, storage.url.replace("127.0.0.1", "localhost")))
            while True:
                try:
                    hub.download("owner/name", target)
                    break
                except hub.HubError as error:
                    refused(error, "owner/name", *files)
                    rounds += 1
                    if rounds > 40:
                        raise Failure(f"started {rounds} times in vain: {error}") from None
                for part in target.glob(".*.part"):
                    if rng.random() < 0.2:  # as a power cut may leave it
                        part.write_bytes(damage_bytes(part.read_bytes(), rng))
            notes["downloads given up and started again"] += rounds
            found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in target.iterdir() if path.name != RECORD}
            if found != want:
                raise Failure("a file is not the one of the server, or there is one too many")
            return "identical"

        yield case
