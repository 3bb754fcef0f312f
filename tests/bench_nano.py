"""nano on a laptop that does other things as well: `python tests/bench_nano.py`.

Start: `sample.py` on the example picture against `python -c "import torch"`. Captions: greedy answers a second. Step: one
of stage 2, LoRA and a batch of 128 captions. Both alone and with one busy process beside them, in turns: with two threads
as nanomblip sets them, two that sleep at once, two as torch would leave them, and one. Memory: the largest resident size of
`train.py`. What is measured runs in a process of its own; the best of --rounds counts.

Not collected by pytest.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from nanomblip.flags import flag, parse_flags, run_main  # noqa: E402

THREADS = {"two threads": {}, "two that sleep at once": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
           "two, torch's default": {"GOMP_SPINCOUNT": "300000"}, "one thread": {"OMP_NUM_THREADS": "1"}}  # fmt: skip


@dataclass(frozen=True)
class Config:
    part: str = flag("all", "what to measure", ("all", "start", "busy", "memory"))
    rounds: int = flag(3, "turns of each side")
    captions: int = flag(512, "answers in a turn")
    steps: int = flag(12, "training steps in a turn, after two that do not count")
    train_steps: int = flag(300, "of the run whose memory is measured, half of them of stage 2")
    worker: bool = flag(False, "this process is one of those that are measured")


def python(*argv, **variables: str) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and stdout of a process of its own, with these environment variables."""
    environment = dict(os.environ, OMP_NUM_THREADS="2") | variables
    with tempfile.TemporaryFile("w+") as out:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, argv)], cwd=ROOT, env=environment, stdout=out, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        out.seek(0)
        assert status == 0, f"{argv} ended with {status}"
        return seconds, usage.ru_maxrss * 1024, out.read()


def start(cfg: Config) -> None:
    best = {}
    for _ in range(cfg.rounds):
        for name, argv in (
            ("import torch", ("-c", "import torch")),
            ("sample.py", ("sample.py", "--model", "nano", "--image", "data/cat.png", "--lang", "sw")),
        ):
            best[name] = min(best.get(name, 1e9), python(*argv)[0])
    print(
        f"start: sample.py {best['sample.py']:.2f} s, import torch {best['import torch']:.2f} s: {best['sample.py'] / best['import torch']:.2f} times"
    )


def busy(cfg: Config) -> None:
    speed = {}
    for _ in range(cfg.rounds):
        for beside in (False, True):
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if beside else None
            try:
                for name, variables in THREADS.items():
                    found = json.loads(
                        python(__file__, "--worker", "--captions", cfg.captions, "--steps", cfg.steps, **variables)[2]
                    )
                    for what, value in found.items():
                        speed[what, name, beside] = max(speed.get((what, name, beside), 0), value)
            finally:
                if other:
                    other.kill()
                    other.wait()
    print(f"\n{'':<24}{'':<24}{'alone':>10}{'beside one':>12}{'ratio':>8}")
    for what in ("captions a second", "steps a second"):
        for name in THREADS:
            alone, beside = (speed[what, name, b] for b in (False, True))
            print(f"{what:<24}{name:<24}{alone:>10.2f}{beside:>12.2f}{beside / alone:>8.2f}")


def memory(cfg: Config) -> None:
    with tempfile.TemporaryDirectory() as out:
        flags = ("--steps", cfg.train_steps, "--warmup_steps", cfg.train_steps // 2, "--out", out, "--name", "memory")
        _, peak, _ = python("train.py", "--lang_mix", "all", *flags)
    print(f"\nmemory: train.py {peak / 1e9:.2f} GB ({cfg.train_steps} steps, measuring included)")


def worker(cfg: Config) -> None:
    """Prints the two speeds of this process."""
    from nanomblip.data.emoji import load_emoji
    from nanomblip.data.folder import load_folder
    from nanomblip.data.image import ImageConfig
    from nanomblip.data.mixture import Batches, Mixture
    from nanomblip.measure.emoji_splits import answer, questions
    from nanomblip.model.lora import add_lora
    from nanomblip.training.parts import STAGE2, mark_trainable

    tokenizer, pictures, model = load_folder(ROOT / "weights" / "nano" / "aligned", "fp32", "fp32")
    emoji = load_emoji("core")
    items = questions(emoji, "pictures", list(emoji.names)[1:], 8)[: cfg.captions]
    answer(model, tokenizer, pictures, emoji, items[:32])
    started = time.perf_counter()
    answer(model, tokenizer, pictures, emoji, items)
    captions = len(items) / (time.perf_counter() - started)

    batches = Batches(
        Mixture(emoji, {lang: 1 / len(emoji.names) for lang in emoji.names}, {"caption": 1.0}, 0),
        tokenizer,
        ImageConfig(size=64),
        128,
    )
    add_lora(model.mt5, "all", 8, 16, 0.0)
    mark_trainable(model, STAGE2)
    model.train()
    batch = batches[0]
    features = model.image_features(batch["image"]).detach()
    for step in range(cfg.steps + 2):
        if step == 2:
            started = time.perf_counter()
        model.loss(features, batch["prompt"], batch["labels"]).backward()
    print(json.dumps({"captions a second": captions, "steps a second": cfg.steps / (time.perf_counter() - started)}))


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Measure nano beside other work.")
    torch.manual_seed(0)
    if cfg.worker:
        worker(cfg)
        return 0
    for name, measure in dict(start=start, busy=busy, memory=memory).items():
        if cfg.part in ("all", name):
            measure(cfg)
    return 0


if __name__ == "__main__":
    run_main(main)
