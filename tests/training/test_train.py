"""train.py: resuming ends with the same bits, signals save, damage is noticed, only the named parts learn."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from nanomblip.data.emoji import ROOT as DATA
from nanomblip.model.lora import lora_layers
from nanomblip.model.mblip import MBLIP, PRESETS
from nanomblip.model.mt5 import MT5
from nanomblip.training import setup
from nanomblip.training.parts import model_parts
from nanomblip.training.config import resolve
from nanomblip.training.setup import build_mblip
from nanomblip.weights.adapter import load_adapter
from nanomblip.weights.files import digest
from nanomblip.weights.load import load_mblip, load_mt5
from nanomblip.weights.save import save_mblip, save_mt5

ROOT = Path(__file__).resolve().parents[2]
NANO = PRESETS["nano"]
SMALL = replace(
    NANO,
    vit=replace(NANO.vit, width=16, layers=1, heads=2, mlp=16),
    qformer=replace(NANO.qformer, width=16, layers=1, heads=2, mlp=16, vision_width=16, dropout=0.1, attn_dropout=0.1),
    mt5=replace(NANO.mt5, width=16, heads=2, head_width=8, mlp=16, layers=1, decoder_layers=1, dropout=0.1),
    queries=2,
)
COMMON = "--lr_warmup 3 --batch 4 --accumulate 2 --eval_pictures 1 --eval_every 4 --tasks caption,match --lang_mix en,de,sw --data_share 0.05".split()
FLAGS = ["--steps", "9", *COMMON, "--init", "random"]


EMOJI = train.load_emoji("core")
LANGUAGE_ID = train.LanguageID(EMOJI.names)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "nano", SMALL)
    monkeypatch.setattr(train, "MEASUREMENTS", ("validation",))
    monkeypatch.setattr(train, "load_emoji", lambda concepts: EMOJI)  # loaded once for all tests here
    monkeypatch.setattr(train, "LanguageID", lambda names: LANGUAGE_ID)
    yield
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, signal.default_int_handler if s == signal.SIGINT else signal.SIG_DFL)


def stop_at(monkeypatch, step, number=signal.SIGINT):
    """Deliver a real signal to this process while `step` is being finished."""

    class Bar(train.tqdm):
        def update(self, n=1):
            super().update(n)
            if "step" in self.unit and self.n == step:
                signal.raise_signal(number)

    monkeypatch.setattr(train, "tqdm", Bar)


def everything(run):
    """All that must agree between two runs: parameters, moments, step, written model, logs."""
    state = load_file(f"out/{run}/state.safetensors")
    from safetensors import safe_open

    with safe_open(f"out/{run}/state.safetensors", "pt") as file:
        meta = file.metadata()
    logs = [Path(f"out/{run}/{name}.csv").read_text() for name in ("loss", "validation")]
    return meta["sha256"], meta["step"], meta["frozen"], *logs, {k: v.sum().item() for k, v in state.items()}


@pytest.mark.parametrize("extra", [(), ("--workers", "1", "--checkpointing")], ids=str)
def test_a_resumed_run_ends_with_the_same_bits(monkeypatch, extra):
    assert train.main([*FLAGS, *extra, "--name", "whole"]) == 0
    for stop in (1, 8) if not extra else (5,):
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            assert train.main([*FLAGS, *extra, "--name", f"cut{stop}"]) == 128 + signal.SIGINT
        assert train.main(["--resume", f"out/cut{stop}"]) == 0
        assert everything(f"cut{stop}") == everything("whole")


def test_names_by_others_are_trained_on_and_measured_against_the_human_ones(monkeypatch, tmp_path):
    """The batches hold the names of the file, or another thing's; what is measured is the data as it is loaded."""
    rows = [dict(context="", label=f"{lang} {concept}", image_id=concept, lang=lang) for lang in ("de", "sw") for concept in EMOJI.names["de"]]
    Path("names.json").write_text(json.dumps(rows))
    seen, build = {}, train.build_batches

    def watched(*args):
        batches = build(*args)
        seen["names"] = batches[1].mixture.emoji.names
        return batches

    monkeypatch.setattr(train, "build_batches", watched)
    monkeypatch.setattr(train, "evaluate", lambda model, tokenizer, image, emoji, *args, **more: seen.update(measured=emoji) or ({}, []))
    flags = ["--steps", "2", *COMMON, "--init", "random"]
    assert train.main([*flags, "--names", "names.json", "--name", "n"]) == 0
    assert seen["names"]["de"]["1f408"] == "de 1f408" and seen["names"]["en"] == EMOJI.names["en"] and seen["measured"] is EMOJI
    assert train.main([*flags, "--name_errors", "0.5", "--name", "e"]) == 0
    wrong = [seen["names"]["sw"][c] != EMOJI.names["sw"][c] for c in EMOJI.names["sw"]]
    assert 0.3 < sum(wrong) / len(wrong) < 0.5 and seen["measured"] is EMOJI  # of the names of the train split, 82 %
    Path("names.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(ValueError, match="names.json: changed since the run began"):
        train.main(["--resume", "out/n"])
    with pytest.raises(ValueError, match="--names names.json: has none in fr"):
        train.main([*flags, "--lang_mix", "de,fr", "--names", "names.json", "--name", "f"])
    for flags, words in ((["--names", "x", "--mixture", "m", "--image_root", "i"], "leave them out with --mixture"), (["--name_errors", "1.5"], "--name_errors 1.5: between 0 and 1")):
        with pytest.raises(ValueError, match=words):
            train.main(flags)


def test_the_loss_falls_and_the_folder_is_complete():
    assert train.main([*FLAGS[2:], "--steps", "30", "--warmup_lr", "0.01", "--name", "r"]) == 0
    with open("out/r/loss.csv") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows]
    assert [int(row["step"]) for row in rows] == list(range(1, 31)) and losses[0] - min(losses[-5:]) > 1
    record = json.loads(Path("out/r/record.json").read_text())
    assert len(record["results"]["validation"]) == 3 and record["trained_parameters"] == record["parameters"]
    assert sorted(path.name for path in Path("out/r").iterdir()) == sorted(
        ["config.json", "model.safetensors", "preprocessor_config.json", "spiece.model", "train.json", "loss.csv",
         "validation.csv", "record.json", "state.safetensors"])  # fmt: skip
    model = load_mblip("out/r")
    assert model.cfg == SMALL and digest(dict(model.named_parameters())) == record["model_sha256"]


@pytest.fixture
def bases():
    """A model that sees and a language model of another depth, as make_nano.py writes them."""
    torch.manual_seed(5)
    sees, reads = MBLIP(SMALL), MT5(replace(SMALL.mt5, decoder_layers=2))
    sees.init_weights()
    reads.init_weights()
    save_mblip(sees, Path("sees"), image_token=8000)
    save_mt5(reads, Path("reads"))
    for folder in ("sees", "reads"):
        shutil.copyfile(DATA / "spiece.model", f"{folder}/spiece.model")
    return sees, reads, ["--steps", "9", "--warmup_steps", "4", *COMMON, "--vision", "sees", "--llm", "reads", "--views", "1"]


def stopped_and_resumed(monkeypatch, flags, steps):
    """The run out/cutN, stopped after N steps and gone on with, for each N."""
    for stop in steps:
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            assert train.main([*flags, "--name", f"cut{stop}"]) == 128 + signal.SIGINT
        assert train.main(["--resume", f"out/cut{stop}"]) == 0
        yield f"cut{stop}"


def moved(before, after):
    """Which parts of a model changed."""
    theirs = model_parts(after)
    return {name for name, part in model_parts(before).items() if not all(torch.equal(p, q) for p, q in zip(part, theirs[name]))}


@pytest.mark.parametrize("more,parts", [
    ("--warmup projection --warmup_steps 9", {"projection"}), ("--warmup names --warmup_steps 9", {"Q-Former", "queries", "projection"}),
    ("--warmup none", {"Q-Former", "queries", "projection", "language model"}), ("--warmup names", {"Q-Former", "queries", "projection", "language model"}),
    ("--warmup none --qformer_lr 0", {"projection", "language model"}), ("--warmup none --lora none", {"Q-Former", "queries", "projection"}),
])  # fmt: skip
def test_each_stage_trains_its_parts_and_nothing_else(bases, more, parts):
    """The language model moves by its LoRA, which is merged into the weights that are written."""
    sees, reads, flags = bases
    torch.manual_seed(0)
    load = partial(build_mblip, Path("sees"), Path("reads"))
    before = load()
    keep = [word for word in flags if word != "--warmup_steps"]
    flags = flags if "--warmup none" not in more else [w for i, w in enumerate(flags) if "--warmup_steps" not in (w, flags[i - 1])]
    assert keep and train.main([*flags, *more.split(), "--name", "r"]) == 0
    assert moved(before, load_mblip("out/r")) == parts


@pytest.mark.parametrize("warmup", ["names", "projection"])
def test_two_stages_and_stops_in_each_of_them(bases, monkeypatch, warmup):
    """The language model runs in stage 2 and in the warm-up by its loss; a stop costs no bit, in either stage or between them."""
    sees, reads, flags = bases
    flags, calls, loss = [*flags, "--warmup", warmup], [], MBLIP.loss
    with monkeypatch.context() as patch:
        patch.setattr(MBLIP, "loss", lambda self, *args: (calls.append(1), loss(self, *args))[1])
        assert train.main([*flags, "--name", "whole"]) == 0
    assert len(calls) == 2 * (5 if warmup == "names" else 9)
    for name in stopped_and_resumed(monkeypatch, flags, (2, 4, 6)):
        assert everything(name) == everything("whole")


ADAPTED = "--warmup projection --lora_dropout 0.2 --lora_r 4 --lora_lr 0.01 --int8 --views 0 --noise 0 --eval_every 0".split()


def test_lora_over_int8_learns_and_a_resumed_run_ends_with_the_same_bits(bases, monkeypatch, capsys):
    sees, reads, flags = bases
    assert train.main([*flags, *ADAPTED, "--name", "whole"]) == 0
    rows = {line[:16].strip(): line[16:].split() for line in capsys.readouterr().out.splitlines()}
    count = sum(4 * (p.shape[0] + p.shape[1]) for name, p in reads.named_parameters() if p.ndim == 2 and ".blocks." in name)
    size = sum(p.numel() for p in reads.parameters())
    assert rows["LoRA"] == [f"{count:,}", "float32", f"{4 * count / 1e6:.1f}", "frozen", "0.01"]
    assert rows["language model"][:2] == [f"{size:,}", "bfloat16/float32/int8"] and float(rows["language model"][2]) < 4 * size / 1e6 / 1.8
    record = json.loads(Path("out/whole/record.json").read_text())
    assert record["parameters"] == sum(p.numel() for p in load_mblip("out/whole").parameters()) + count
    for name in stopped_and_resumed(monkeypatch, [*flags, *ADAPTED], (6,)):
        assert everything(name) == everything("whole")
        for file in ("model.safetensors", "adapter/adapter_model.safetensors"):  # tensors only: metadata stand in any order
            assert digest(load_file(f"out/{name}/{file}")) == digest(load_file(f"out/whole/{file}"))


def test_what_lora_has_learned_is_merged_into_the_weights_as_they_were_before_int8(bases):
    sees, reads, flags = bases
    assert train.main([*flags, *ADAPTED, "--name", "r"]) == 0
    merged, adapted = load_mblip("out/r").mt5, load_mt5("reads", llm_dtype="int8")
    load_adapter(adapted, "out/r/adapter")
    layers, before = lora_layers(adapted), dict(reads.named_parameters())
    assert len(layers) == 7 + 2 * 11 and all(layer.B.abs().max() > 0 and layer.scale == 4 for layer in layers.values())
    for path, layer in layers.items():
        assert torch.allclose(merged.get_submodule(path).weight, before[f"{path}.weight"] + layer.scale * layer.B @ layer.A, atol=1e-6)
    ids = torch.tensor([[5, 9, 13, 2, 1], [7, 3, 1, 0, 0]])
    one, other = (mt5.eval()(ids, ids != 0, ids) for mt5 in (merged, adapted))
    assert (one - other).norm() / other.norm() < 0.05  # but for the rounding


def test_going_on_from_a_folder_has_no_warm_up(bases):
    sees, reads, flags = bases
    assert train.main([*flags, "--name", "base"]) == 0
    assert train.main(["--steps", "4", *COMMON, "--init", "out/base", "--name", "next"]) == 0
    assert moved(load_mblip("out/base"), load_mblip("out/next")) == {"Q-Former", "queries", "projection", "language model"}


def test_a_damaged_state_is_noticed_and_the_one_before_taken(monkeypatch, capsys):
    assert train.main([*FLAGS, "--name", "whole"]) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        train.main([*FLAGS, "--save_every", "0", "--name", "cut"])
    newest = Path("out/cut/state.safetensors")
    data = bytearray(newest.read_bytes())
    data[-100] ^= 1  # a flipped bit in a tensor, which safetensors itself cannot see
    newest.write_bytes(data)
    assert train.main(["--resume", "out/cut"]) == 0
    assert "sha256" in capsys.readouterr().err
    assert everything("cut") == everything("whole")
    for path in Path("out/cut").glob("state*"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no undamaged state"):
        train.main(["--resume", "out/cut"])


def test_a_run_is_not_overwritten_nor_resumed_with_other_flags():
    Path("out/r").mkdir(parents=True)
    Path("out/r/other").touch()
    with pytest.raises(ValueError, match="is not a run"):
        train.main([*FLAGS, "--name", "r"])
    Path("out/r/train.json").touch()
    with pytest.raises(ValueError, match="--resume out/r"):
        train.main([*FLAGS, "--name", "r"])
    assert train.main([*FLAGS, "--name", "s"]) == 0
    with pytest.raises(ValueError, match="--lr 0.5: the run to resume has"):
        train.main(["--resume", "out/s", "--lr", "0.5"])


def process(*flags):
    """A real `python train.py` on the small model, as a process that can be killed."""
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests' / 'training')!r}, {str(ROOT / 'tests')!r}]; import train, test_train\n"
            "from nanomblip.model.mblip import PRESETS; PRESETS['nano'] = test_train.SMALL; train.MEASUREMENTS = ('validation',)\n"
            "train.load_emoji, train.LanguageID = (lambda _: test_train.EMOJI), (lambda _: test_train.LANGUAGE_ID)\n"
            "train.run_main(train.main)")  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def wait_for_step(run, step, seconds=60):
    end, path = time.time() + seconds, Path(f"out/{run}/loss.csv")
    while time.time() < end:
        if path.exists() and len(path.read_text().splitlines()) > step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


LONG = [*FLAGS[2:], "--steps", "90", "--save_every", "0", "--eval_every", "0"]


@pytest.mark.slow
def test_kill_9_and_sigterm_cost_nothing_but_time():
    whole = process(*LONG, "--name", "whole")
    whole.communicate()
    rng = random.Random(0)
    run = process(*LONG, "--name", "killed")
    for at in (5, 60):
        wait_for_step("killed", at)
        time.sleep(rng.random() / 20)  # somewhere in a step, or in the middle of a save
        run.kill()
        run.communicate()
        run = process("--resume", "out/killed", "--save_every", "0")
    wait_for_step("killed", 75)
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 143
    last = process("--resume", "out/killed")
    last.communicate()
    assert (whole.returncode, last.returncode) == (0, 0)
    assert everything("killed") == everything("whole")
    assert not list(Path("out/killed").glob(".*.tmp"))


def test_official_bases_are_fetched(bases, monkeypatch):
    """Of the model that sees, only what is not its language model."""
    _, reads, flags = bases
    asked = []
    folders = {"blip2-flan-t5-xl": Path("sees"), "mt0-small": Path("reads")}
    monkeypatch.setattr(setup, "download", lambda name, folder, skip: asked.append((name, folder.name, skip)) or folders[name])
    assert train.main([*flags, "--lora", "none", "--vision", "blip2-flan-t5-xl", "--llm", "mt0-small", "--name", "r"]) == 0
    assert asked == [("blip2-flan-t5-xl", "blip2-flan-t5-xl", "language_"), ("mt0-small", "mt0-small", None)]
    assert digest(dict(load_mblip("out/r").mt5.named_parameters())) == digest(dict(reads.named_parameters()))


def test_the_tokenizer_is_that_of_the_language_model(bases):
    """A BLIP-2 brings the tokenizer of an English T5, which has nothing to say here."""
    sees, reads, flags = bases
    Path("sees/spiece.model").write_bytes(b"other pieces")
    assert train.main([*flags, "--name", "r1"]) == 0
    assert Path("out/r1/spiece.model").read_bytes() == Path("reads/spiece.model").read_bytes()
    Path("reads/spiece.model").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="spiece.model"):
        train.main([*flags, "--name", "r2"])


def test_a_language_model_that_is_int8_in_its_file_is_refused(bases):
    config = json.loads(Path("reads/config.json").read_text())
    Path("reads/config.json").write_text(json.dumps(config | {"quantization_config": dict(quant_method="bitsandbytes", load_in_8bit=True)}))
    with pytest.raises(ValueError, match="reads: holds int8"):
        train.main([*bases[2], *ADAPTED, "--name", "r"])


def test_of_a_large_model_the_trained_parts_alone_are_written(bases, monkeypatch):
    """With the ViT in int8, too; what was adapted is in adapter/."""
    sees, reads, flags = bases
    monkeypatch.setattr("nanomblip.training.saver.LARGE", 1000)
    assert train.main([*flags, "--vision_dtype", "int8", "--name", "r"]) == 0
    model = load_mblip("out/r")
    for name, p in model.named_parameters():
        frozen = (sees if name.startswith("vit.") else reads if name.startswith("mt5.") else None)
        assert frozen is None or torch.equal(p, frozen.get_parameter(name.removeprefix("mt5."))), name
    load_adapter(model.mt5, "out/r/adapter")
    assert Path("out/r/model.safetensors").stat().st_size < 0.2 * Path("sees/model.safetensors").stat().st_size
    assert json.loads(Path("out/r/config.json").read_text())["bases"]["vision"] == "../../sees"


def test_a_killed_loader_worker_is_one_line_and_the_run_can_be_gone_on_with(monkeypatch):
    """A worker that the system kills, in a real process of its own."""
    assert train.main([*FLAGS, "--name", "whole"]) == 0
    fetch = train.Loader.__next__

    def killed(loader):
        if train.Path("out/r/loss.csv").read_text().count("\n") == 4:
            for worker in loader.batches._workers:
                os.kill(worker.pid, signal.SIGKILL)
                worker.join()
        return fetch(loader)

    with monkeypatch.context() as patch:
        patch.setattr(train.Loader, "__next__", killed)
        with pytest.raises(ValueError, match="loader worker was killed.*--workers"):
            train.main([*FLAGS, "--workers", "1", "--name", "r"])
    assert train.main(["--resume", "out/r"]) == 0
    assert everything("r") == everything("whole")


def test_a_loss_that_is_not_finite_stops_before_the_update(monkeypatch):
    before = {}
    loss = MBLIP.loss

    def poisoned(self, *args, **kwargs):
        before["model"] = self
        before["digest"] = digest(dict(self.named_parameters()))
        return loss(self, *args, **kwargs) * float("nan")

    monkeypatch.setattr(MBLIP, "loss", poisoned)
    with pytest.raises(ValueError, match="loss nan.*step 0"):
        train.main([*FLAGS, "--name", "nan"])
    assert digest(dict(before["model"].named_parameters())) == before["digest"]


@pytest.mark.parametrize("flags,words", [
    ("--steps 0", "--steps 0"), ("--steps x", "--steps"), ("--lr nan", "--lr"), ("--lr -1", "--lr"), ("--beta2 1", "--beta2"),
    ("--lang_mix klingon", "klingon"), ("--lang_mix sw:0", "--lang_mix"), ("--lang_alpha nan", "--lang_alpha"),
    ("--tasks dance", "--tasks"), ("--concepts some", "--concepts"), ("--warmup all", "--warmup"), ("--init nowhere", "nowhere"),
    ("--name a/b", "--name"), ("--name ..", "--name"), ("--name q\udcff", "--name"), ("--seed 99999999999999999999", "--seed"), ("--resume nowhere", "nowhere"), ("--device tpu", "--device"), ("--stepz 3", "--steps"),
    ("--lang_mix sw --hold_out_langs sw", "--hold_out_langs"), ("--batch 4.5", "--batch"), ("--no_checkpointin", "checkpointing"),
    ("--redraw -0.1", "--redraw"), ("--lora_r 0", "--lora_r"), ("--lora_alpha nan", "alpha nan"), ("--lora_dropout 1", "dropout 1"), ("--lora_lr 0", "--lora_lr 0"),
    ("--warmup names --mixture m.json --image_root .", "--warmup names with --mixture"), ("--mixture m.json", "--image_root"),
    ("--recipe paper --warmup names", "--recipe paper has --warmup projection"), ("--recipe paper --noise 0.5", "--recipe paper has --noise 0"),
    ("--warmup_steps 9 --steps 8", "--warmup_steps 9"),
    ("--warmup none --warmup_steps 2", "--warmup none"), ("--init random --warmup names", "--warmup names with --init random"),
    ("--init random --int8", "--int8 True is for a frozen part"), ("--init random --lora qv", "--lora qv is for"), ("--int8 --bf16 on", "--int8 --bf16 on"),
    ("--init random --vision_dtype int8", "--vision_dtype int8 is for"),
    ("--redraw 1.5", "--redraw"), ("--redraw nan", "--redraw"), ("--noise -1", "--noise"), ("--noise nan", "--noise"),
])  # fmt: skip
def test_bad_flags_are_one_line_and_status_2(monkeypatch, capsys, flags, words):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    with pytest.raises(SystemExit) as end:
        train.run_main(train.main)
    err = capsys.readouterr().err.strip()
    assert end.value.code == 2 and words in err and "\n" not in err


@pytest.mark.parametrize("key,value", [("steps", None), ("steps", 2.5), ("checkpointing", "yes"), ("lang_mix", 3)])
def test_a_damaged_config_cannot_be_resumed(key, value):
    Path("out/r").mkdir(parents=True)
    config = asdict(resolve(train.Config(), 0))
    Path("out/r/train.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match="does not fit"):
        train.main(["--resume", "out/r"])


def test_flags_that_contradict_each_other_once_the_recipe_is_known():
    with pytest.raises(ValueError, match="--lora all without stage 2"):
        resolve(train.Config(lora="all", steps=9, warmup_steps=9), 0)
    with pytest.raises(ValueError, match="--noise 0.5 with --views 0"):
        resolve(train.Config(views=0, noise=0.5), 0)
    assert resolve(train.Config(steps=9, warmup_steps=9), 0).stage1_steps == 9
