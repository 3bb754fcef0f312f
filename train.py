"""Train nanomblip: `python train.py --lang_mix all`.

Read it top to bottom; it is mBLIP's recipe. Pictures with texts in many languages; a ViT and a Q-Former that were
aligned to an English language model; another language model, frozen, that knows the languages; a fresh projection
between them. Stage 1 warms the projection up, stage 2 trains LoRA, projection and Q-Former on a mixture of tasks.
Then the model is measured on fixed splits.

Everything goes to out/<name>/: the model in the official layout (config.json, model.safetensors,
preprocessor_config.json, spiece.model; LoRA merged into the weights), the LoRA alone in adapter/ as PEFT writes it,
loss.csv and validation.csv, state.safetensors (to go on from), train.json (the config) and record.json (the
results).

Every random choice is a function of (seed, step), so `--resume out/<name>` ends with the same bits as an
uninterrupted run on the same machine. Ctrl-C and SIGTERM save and exit. Started by torchrun, several processes train
one model (training/distributed.py).
"""

import nanomblip  # isort: skip, before torch: how its threads wait  # noqa: F401
import math
import platform
import sys
import time
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

from nanomblip.data.emoji import load_emoji
from nanomblip.data.folder import pick_device
from nanomblip.data.json_mixture import unusable_pictures
from nanomblip.data.language_id import LanguageID
from nanomblip.data.languages import LANGUAGES
from nanomblip.flags import parse_flags, run_main
from nanomblip.measure.emoji_splits import MEASUREMENTS, Validation, evaluate, summary, table
from nanomblip.model.generate import DECODING
from nanomblip.training import distributed as ranks
from nanomblip.training.config import CLIP, MACHINE, Config, resolve, resumed_config
from nanomblip.training.features import CachedFeatures, LiveFeatures, Loader, WorkerDied
from nanomblip.training.parts import add_checkpointing, mark_trainable, model_parts, parameter_count, parts_table
from nanomblip.training.saver import Saver
from nanomblip.training.setup import (
    build_batches,
    build_in_turn,
    languages_of,
    parameters_of,
    return_memory,
    source_folders,
)
from nanomblip.training.stages import Stage, build_stages, precision, uses_bf16
from nanomblip.training.state import Interrupt, Log, State, claim
from nanomblip.weights.files import digest


def main(argv: list[str]) -> int:
    # Config: from the flags or from the run to resume; what the flags leave open follows from the size of the model.
    # Data: pictures, names and languages.
    cfg, folder = begin(argv)
    return_memory()
    device = pick_device(cfg.device)
    emoji = load_emoji(cfg.concepts)
    mix, held_out = languages_of(cfg, emoji)
    with ranks.first_alone():
        sources = source_folders(cfg)
    cfg = resolve(cfg, parameters_of(sources), ranks.world())

    # Model: ViT, Q-Former and queries of one folder, a language model of another, frozen, in int8 and with LoRA,
    # and a fresh projection.
    torch.manual_seed(cfg.seed)
    start = build_in_turn(cfg, sources, device)
    model, tokenizer, image = start.model.to(device), start.tokenizer, start.image
    with ranks.first_alone():
        lock = claim(folder)  # noqa: F841, held until main returns
        captions, mixture, about = build_batches(cfg, start, emoji, mix, folder)
    if cfg.checkpointing:
        add_checkpointing(model)

    # Recipe: what each of the two stages trains, by which loss, at which rates.
    stages = build_stages(cfg, model, tokenizer, emoji, captions, mixture)
    mark_trainable(model, tuple({part for stage in stages for part in stage.rates}))

    # Going on: the state on disk holds all that is trained in some stage.
    state = State(folder, model, [])
    step, seconds = state.load() if cfg.resume else (0, 0.0)
    spoken = None if cfg.mixture else mix  # the languages that the model says it answers in
    ranks.agree(weights=state.frozen, state=digest(state.trained), step=step)
    saver = Saver(folder, start, state, spoken)
    saver.begin(None if cfg.resume else asdict(cfg))

    print(f"run     {folder}" + (f", going on at step {step}" if step else ""))
    print("config  " + ", ".join(f"{k}={v}" for k, v in asdict(cfg).items() if v != "" and k not in MACHINE))
    print(f"data    {about}; {cfg.steps * cfg.accumulate * cfg.batch:,} examples to see")
    micro = f"{cfg.batch} x {cfg.accumulate // ranks.world()} micro-batches x {ranks.world()} processes"
    print(f"step    {cfg.accumulate * cfg.batch} examples: {micro}")
    print(parts_table(model, {stage.title: stage.column(model) for stage in stages}), flush=True)

    # The two stages. Only the embedded pictures' size can be measured on the embedded data.
    language_id, measurable = LanguageID(emoji.names), not cfg.mixture or image.size == emoji.pictures.shape[1]
    run = Run(cfg, model, saver, device)
    run.step, run.seconds = step, seconds
    run.bf16 = uses_bf16(cfg, device)
    run.features = CachedFeatures(model, mixture, device, cfg.noise) if cfg.views else LiveFeatures(model)
    run.log = Log(folder / "loss.csv", ("step", "loss", "gradient_norm", "rate"), step)
    every, log = cfg.eval_every if measurable else 0, Log(folder / "validation.csv", Validation.COLUMNS, step)
    run.look = Validation(model, tokenizer, image, emoji, mix, language_id, every, log)
    run.interrupt = Interrupt()
    for i, stage in enumerate(stages):
        if run.step < stage.last:
            state.use(stage.begin(model, cfg), i)
            train(stage, run)
        if run.interrupt.signal:
            print(f"saved at step {run.step}; go on with: python train.py --resume {folder}", file=sys.stderr)
            return 128 + run.interrupt.signal
    saver.save(run.step, run.seconds, last=True)
    run.interrupt.release()

    # What it can do now: fixed splits, captions written as in the paper, with five beams.
    progress = tqdm(desc="evaluate", unit="caption", leave=False)
    asked, which = (*mix, *held_out), MEASUREMENTS if measurable else ()
    results, examples = evaluate(model, tokenizer, image, emoji, asked, language_id, cfg.eval_pictures, which, progress,
                                 decoding=DECODING["caption"])  # fmt: skip
    progress.close()
    saver.write("record.json", run.record(results, examples))
    if cfg.mixture and (problems := unusable_pictures(mixture.report)):
        print(f"\n{problems}", file=sys.stderr)
    show(results, examples, held_out)
    print(f"\n{run.seconds:.0f} s of training; everything is in {folder}; next:")
    print(f"  {saver.command()} --image data/wolf.png --lang sw")
    return 0


def show(results: dict, examples: list[dict], held_out: list[str]) -> None:
    """The results for people: a table, and a few answers."""
    if results:
        print("\nexact match in percent, captions of five beams (record.json has every language)")
        print(table(results, held_out))
        print("\nheld-out pictures: language, what it is, its name, the model's answer")
    for e in examples:
        print(f"  {LANGUAGES[e['lang']].name:<16} {e['english']:<24} {e['name']:<24} -> {e['answer']}")


class Run:
    """What the loop works with: the model and how it is fed (`features`, `bf16`), where it stands (`step`,
    `seconds`), what it writes (`log`, `saver`, `look`), and who may stop it (`interrupt`)."""

    def __init__(self, cfg: Config, model, saver: Saver, device: torch.device):
        self.cfg, self.model, self.saver, self.device = cfg, model, saver, device

    def record(self, results: dict, examples: list[dict]) -> dict:
        """What stays of a run: its config, cost, versions and results."""
        cfg, model = self.cfg, self.model
        return dict(
            config=asdict(cfg), seconds=round(self.seconds, 1), steps_done=self.step,
            examples_seen=self.step * cfg.accumulate * cfg.batch, final_loss=self.log.recent_mean(1),
            parameters=parameter_count(t for tensors in model_parts(model).values() for t in tensors),
            trained_parameters=sum(p.numel() for p in self.saver.state.trained.values()),
            torch=torch.__version__, python=platform.python_version(),
            processes=ranks.world(), threads=torch.get_num_threads(), device=str(self.device),
            model_sha256=digest(model.state_dict()),
            summary={which: dict(zip(("english", "other"), summary(r))) for which, r in results.items()},
            results=results, samples=examples,
        )  # fmt: skip


def train(stage: Stage, run: Run) -> None:
    """The steps of one stage that are not done yet; returns early when the user interrupts."""
    model, average, last_save = run.model, run.log.recent_mean(1), time.time()
    accumulate, forward = run.cfg.accumulate // ranks.world(), ranks.parallel(model, stage.loss, run.features)
    loader = Loader(stage.batches, (run.step - stage.first) * accumulate, run.cfg.workers, run.device)
    bar = tqdm(total=stage.last, initial=run.step, unit="step", desc=stage.title, smoothing=0.05)
    while run.step < stage.last and not run.interrupt.signal:
        started, total = time.time(), 0.0
        share = stage.set_rates(run.step)
        model.train()
        for micro in range(accumulate):
            torch.manual_seed(step_seed(run.cfg.seed, ranks.number(run.step * accumulate + micro)))  # noise and dropout
            try:
                batch = next(loader)
            except WorkerDied:
                run.saver.save(run.step, run.seconds)
                raise
            with precision(run.device, run.bf16), ranks.reducing(forward, micro == accumulate - 1):
                loss = forward(batch)
                (loss / accumulate).backward()
            total += loss.item() / accumulate
        total = ranks.mean(total)
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], CLIP)
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise ValueError(
                f"loss {total}, gradient norm {norm:g} at step {run.step}: stopped before the update; "
                f"start again with lower rates, or look at the pictures {batch['picture'].tolist()[:8]} ..."
            )
        for optimizer in stage.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        run.step += 1
        if run.step % 25 == 0:
            return_memory()
        run.seconds += time.time() - started

        run.log.add(run.step, f"{total:.6f}", f"{norm:.6f}", f"{share:.6g}")
        average = total if average is None else 0.98 * average + 0.02 * total
        bar.update(1)
        bar.set_postfix_str(f"loss {average:.3f}", refresh=False)
        if run.step < stage.last:
            run.look(run.step)
        run.interrupt.agree()
        if run.interrupt.signal or time.time() - last_save > run.cfg.save_every:
            run.saver.save(run.step, run.seconds)
            last_save = time.time()
    bar.close()


def begin(argv: list[str]) -> tuple[Config, Path]:
    """The config of this call and the folder of its run. ValueError for a folder that holds something else."""
    cfg = parse_flags(Config, argv, "Train nanomblip on pictures with texts in many languages.")
    ranks.agree(**ranks.what_runs(), **{f"--{name}": value for name, value in asdict(cfg).items()})
    if cfg.resume:
        return resumed_config(cfg, argv, ranks.world()), Path(cfg.resume)
    name = cfg.name or time.strftime("%Y-%m-%d_%H%M%S_") + cfg.lang_mix.replace(",", "-").replace(":", "")[:40]
    name = ranks.gather(name)[0]  # the clock of one process
    folder = Path(cfg.out) / name
    if (folder / "train.json").exists():
        raise ValueError(f"{folder} exists; go on with it by --resume {folder}, or give another --name")
    if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a run; give another --name")
    return cfg, folder


def step_seed(seed: int, micro: int) -> int:
    """A seed for torch's generator from the run's seed and the number of the micro-batch."""
    return int.from_bytes(sha256(f"{seed}/dropout/{micro}".encode()).digest()[:7], "big")


if __name__ == "__main__":
    run_main(ranks.together(main))
