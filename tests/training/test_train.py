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
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from nanomblip.model.lora import lora_layers, merge_lora
from nanomblip.model.mblip import MBLIP, PRESETS
from nanomblip.model.mt5 import MT5
from nanomblip.training.state import Log, State
from nanomblip.weights.adapter import load_adapter
from nanomblip.weights.files import RunLock
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
FLAGS = "--steps 9 --warmup 3 --batch 4 --accumulate 2 --eval_pictures 1 --eval_every 4 --tasks caption,match --init random".split()


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
            if self.desc == "train" and self.n == step:
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


@pytest.mark.parametrize("extra", [(), ("--train", "all", "--views", "2"), ("--workers", "1", "--checkpointing")], ids=str)
def test_a_resumed_run_ends_with_the_same_bits(monkeypatch, extra):
    assert train.main([*FLAGS, *extra, "--run", "whole"]) == 0
    for stop in (1, 4, 8) if not extra else (5,):
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            assert train.main([*FLAGS, *extra, "--run", f"cut{stop}"]) == 128 + signal.SIGINT
        assert train.main(["--resume", f"out/cut{stop}"]) == 0
        assert everything(f"cut{stop}") == everything("whole")


def test_the_loss_falls_and_the_folder_is_complete():
    assert train.main([*FLAGS[2:], "--steps", "30", "--lr", "0.01", "--run", "r"]) == 0
    with open("out/r/loss.csv") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows]
    assert [int(row["step"]) for row in rows] == list(range(1, 31)) and losses[0] - min(losses[-5:]) > 1
    record = json.loads(Path("out/r/record.json").read_text())
    assert len(record["results"]["validation"]) == 85 and record["trained_parameters"] == record["parameters"]
    assert sorted(path.name for path in Path("out/r").iterdir()) == sorted(
        ["config.json", "model.safetensors", "preprocessor_config.json", "spiece.model", "train.json", "loss.csv",
         "validation.csv", "record.json", "state.safetensors"])  # fmt: skip
    model = load_mblip("out/r")
    assert model.cfg == SMALL and train.digest(dict(model.named_parameters())) == record["model_sha256"]


@pytest.mark.parametrize("which,parts", train.TRAINED.items())
def test_only_the_named_parts_learn(which, parts):
    torch.manual_seed(0)
    before = MBLIP(SMALL)
    before.init_weights()
    assert train.main([*FLAGS, "--train", which, "--run", which]) == 0
    after = load_mblip(f"out/{which}")
    moved = {name: any(not torch.equal(p, q) for p, q in zip(flat(before)[name], flat(after)[name])) for name in flat(before)}
    assert moved == {name: name in parts for name in moved}


def flat(model):
    return {name: [p for piece in pieces for p in (piece.parameters() if isinstance(piece, torch.nn.Module) else [piece])]
            for name, pieces in train.model_parts(model).items()}  # fmt: skip


def test_noise_on_what_the_vit_sees_is_as_strong_as_asked(monkeypatch):
    """In a picture between none and --noise times the deviation over pictures, in training only; --noise 0 leaves it as it is."""
    seen, read = {}, MBLIP.image_tokens
    for noise in ("0", "2"):
        rows = seen[noise] = []
        with monkeypatch.context() as patch:
            patch.setattr(MBLIP, "image_tokens", lambda model, x, rows=rows: (model.training and rows.append(x.detach()), read(model, x))[1])
            assert train.main([*FLAGS, "--train", "all", "--views", "2", "--noise", noise, "--run", f"noise{noise}"]) == 0
    clean, noisy = (torch.cat(rows)[:, 0] for rows in seen.values())  # (examples, N, Dv)
    added = ((noisy - clean) / clean.std(0)).flatten(1).std(1)  # (examples,)
    assert 0 <= added.min() < 0.5 and 1.5 < added.max() < 2.6 and 0.7 < added.mean() < 1.4


def test_going_on_from_a_folder_trains_what_the_paper_trains():
    assert train.main([*FLAGS, "--run", "base"]) == 0
    assert train.main([*FLAGS, "--init", "out/base", "--run", "next"]) == 0
    assert json.loads(Path("out/next/record.json").read_text())["trained"] == "all"
    a, b = load_mblip("out/base"), load_mblip("out/next")
    assert torch.equal(a.vit.pos_embed, b.vit.pos_embed) and torch.equal(a.mt5.embed.weight, b.mt5.embed.weight)
    assert not torch.equal(a.queries, b.queries)


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
        shutil.copyfile(train.DATA / "spiece.model", f"{folder}/spiece.model")
    return sees, reads, [*FLAGS, "--imitate", "0", "--init", "blip2", "--vision", "sees", "--llm", "reads", "--views", "1"]


def test_mblip_starts_from_one_model_that_sees_and_one_that_reads(bases, monkeypatch):
    sees, reads, flags = bases
    assert train.main([*flags, "--align", "9", "--run", "aligned"]) == 0
    assert train.main([*flags, "--align", "4", "--run", "whole"]) == 0
    aligned, whole = load_mblip("out/aligned"), load_mblip("out/whole")
    for model in (aligned, whole):
        assert train.digest(dict(model.mt5.named_parameters())) == train.digest(dict(reads.named_parameters()))
        assert train.digest(dict(model.vit.named_parameters())) == train.digest(dict(sees.vit.named_parameters()))
        assert not torch.equal(model.proj.weight, sees.proj.weight)
    assert torch.equal(aligned.queries, sees.queries), "only the projection was trained"
    assert not torch.equal(whole.queries, sees.queries)
    for stop in (2, 6):  # before and after the Q-Former joins
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            assert train.main([*flags, "--align", "4", "--run", f"cut{stop}"]) == 128 + signal.SIGINT
        assert train.main(["--resume", f"out/cut{stop}"]) == 0
        assert everything(f"cut{stop}") == everything("whole")


ADAPTED = "--align 2 --lora all --lora_dropout 0.2 --lora_r 4 --lora_lr 0.01 --int8 --views 0 --eval_every 0".split()


def test_lora_over_int8_learns_and_a_resumed_run_ends_with_the_same_bits(bases, monkeypatch, capsys):
    sees, reads, flags = bases
    assert train.main([*flags, *ADAPTED, "--run", "whole"]) == 0
    rows = {line[:16].strip(): line[16:].split() for line in capsys.readouterr().out.splitlines()}
    count = sum(4 * (p.shape[0] + p.shape[1]) for name, p in reads.named_parameters() if p.ndim == 2 and ".blocks." in name)
    size = sum(p.numel() for p in reads.parameters())
    assert rows["LoRA"] == [f"{count:,}", f"{count:,}", "float32", f"{4 * count / 1e6:.1f}", "AdamW", "0.01"]
    assert rows["language model"][:3] == [f"{size:,}", "0", "bfloat16/float32/int8"] and float(rows["language model"][3]) < 4 * size / 1e6 / 1.8
    record = json.loads(Path("out/whole/record.json").read_text())
    assert record["parameters"] == sum(p.numel() for p in load_mblip("out/whole").parameters()) + count
    for stop in (1, 6):  # in the alignment and after it
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            assert train.main([*flags, *ADAPTED, "--run", f"cut{stop}"]) == 128 + signal.SIGINT
        assert train.main(["--resume", f"out/cut{stop}"]) == 0
        assert everything(f"cut{stop}") == everything("whole")
        for name in ("model.safetensors", "adapter/adapter_model.safetensors"):  # tensors only: metadata stand in any order
            assert train.digest(load_file(f"out/cut{stop}/{name}")) == train.digest(load_file(f"out/whole/{name}"))


def test_what_lora_has_learned_is_merged_into_the_weights_as_they_were_before_int8(bases):
    sees, reads, flags = bases
    assert train.main([*flags, *ADAPTED, "--run", "r"]) == 0
    merged, adapted = load_mblip("out/r").mt5, load_mt5("reads", llm_dtype="int8")
    load_adapter(adapted, "out/r/adapter")
    layers, before = lora_layers(adapted), dict(reads.named_parameters())
    assert len(layers) == 7 + 2 * 11 and all(layer.B.abs().max() > 0 and layer.scale == 4 for layer in layers.values())
    for path, layer in layers.items():
        assert torch.allclose(merged.get_submodule(path).weight, before[f"{path}.weight"] + layer.scale * layer.B @ layer.A, atol=1e-6)
    ids = torch.tensor([[5, 9, 13, 2, 1], [7, 3, 1, 0, 0]])
    one, other = (mt5.eval()(ids, ids != 0, ids) for mt5 in (merged, adapted))
    assert (one - other).norm() / other.norm() < 0.05  # but for the rounding


def test_lora_alone_over_floats(bases):
    sees, reads, flags = bases
    assert train.main([*flags, "--align", "0", "--lora", "qv", "--views", "0", "--run", "r"]) == 0
    after, before = load_mblip("out/r").mt5, dict(reads.named_parameters())
    changed = {name.split(".")[-2] for name, p in after.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"q", "v"}
    load_adapter(reads, "out/r/adapter")
    merge_lora(reads)
    assert all(torch.allclose(after.get_submodule(path).weight, layer.base.weight, atol=1e-6) for path, layer in lora_layers(reads).items())


def test_with_int8_the_loss_ends_where_it_ends_without(bases):
    _, _, flags = bases
    ends = {}
    for name, more in (("float", []), ("int8", ["--int8"]), ("weights", ["--int8", "--int8_threshold", "0"])):
        assert train.main([*flags, "--steps", "40", "--align", "0", "--lora", "all", "--lr", "0.01", "--lora_lr", "0.01", "--eval_every", "0",
                           "--views", "0", *more, "--run", name]) == 0  # fmt: skip
        with open(f"out/{name}/loss.csv") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        ends[name] = sum(losses[-10:]) / 10
    assert losses[0] - ends["float"] > 0.3
    assert len(set(ends.values())) == 3 and max(ends.values()) < 1.01 * min(ends.values()), ends


@pytest.mark.parametrize("more,words", [
    (["--lora", "all", "--train", "projection"], "--lora all goes with --train all"), (["--lora", "qv", "--train", "everything"], "--lora qv goes"),
    (["--int8", "--train", "everything"], "--int8 is for a frozen"), (["--int8", "--llm", "random"], "--int8 with a random"),
    (["--lora_r", "0"], "--lora_r.*rank 0"), (["--lora_alpha", "nan"], "alpha nan"), (["--lora_dropout", "1"], "dropout 1"),
    (["--lora_lr", "0"], "--lora_lr 0"), (["--int8_threshold", "-1"], "--int8_threshold -1"), (["--int8_threshold", "nan"], "--int8_threshold nan"),
])  # fmt: skip
def test_lora_and_int8_where_they_make_no_sense(bases, more, words):
    with pytest.raises(ValueError, match=words):
        train.main([*bases[2], *more, "--run", "r"])
    assert not Path("out/r/train.json").exists()


def test_a_language_model_that_is_int8_in_its_file_is_refused(bases):
    config = json.loads(Path("reads/config.json").read_text())
    Path("reads/config.json").write_text(json.dumps(config | {"quantization_config": dict(quant_method="bitsandbytes", load_in_8bit=True)}))
    with pytest.raises(ValueError, match="reads: holds int8"):
        train.main([*bases[2], *ADAPTED, "--run", "r"])


def test_the_tokenizer_is_that_of_the_language_model(bases):
    """A BLIP-2 brings the tokenizer of an English T5, which has nothing to say here."""
    sees, reads, flags = bases
    Path("sees/spiece.model").write_bytes(b"other pieces")
    assert train.main([*flags, "--run", "r1"]) == 0
    assert Path("out/r1/spiece.model").read_bytes() == Path("reads/spiece.model").read_bytes()
    Path("reads/spiece.model").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="spiece.model"):
        train.main([*flags, "--run", "r2"])
    shutil.copyfile(train.DATA / "spiece.model", "sees/spiece.model")
    assert train.main([*flags[:-3], "random", "--run", "r3"]) == 0
    assert load_mblip("out/r3").mt5.cfg == SMALL.mt5


def test_official_bases_are_fetched(bases, monkeypatch):
    """Of the model that sees, only what is not its language model."""
    _, reads, flags = bases
    asked = []
    folders = {"blip2-flan-t5-xl": Path("sees"), "mt0-small": Path("reads")}
    monkeypatch.setattr(train, "download", lambda name, folder, skip: asked.append((name, folder.name, skip)) or folders[name])
    assert train.main([*flags, "--vision", "blip2-flan-t5-xl", "--llm", "mt0-small", "--run", "r"]) == 0
    assert asked == [("blip2-flan-t5-xl", "blip2-flan-t5-xl", "language_"), ("mt0-small", "mt0-small", None)]
    assert train.digest(dict(load_mblip("out/r").mt5.named_parameters())) == train.digest(dict(reads.named_parameters()))


def test_trained_parts_alone_and_the_merged_whole(bases):
    """With the ViT in int8, too; the merged folder has the ViT of the file, not of the rounded one."""
    sees, reads, flags = bases
    assert train.main([*flags, "--save", "trained", "--merge", "--vision_dtype", "int8", "--run", "r"]) == 0
    model, merged = load_mblip("out/r"), load_mblip("out/r/merged")
    assert train.digest(dict(merged.vit.named_parameters())) == train.digest(dict(sees.vit.named_parameters()))
    for name, p in merged.named_parameters():
        trained = not name.startswith(("vit.", "mt5."))
        assert torch.equal(p.half().float() if trained else p, model.get_parameter(name)), name
    assert Path("out/r/model.safetensors").stat().st_size < 0.2 * Path("out/r/merged/model.safetensors").stat().st_size
    assert json.loads(Path("out/r/config.json").read_text())["bases"]["vision"] == "../../sees"
    for wrong in (["--save", "trained", "--init", "out/r/merged"], ["--save", "trained", "--llm", "random"], ["--vision_dtype", "int8", "--train", "everything"]):
        with pytest.raises(ValueError, match="--save|--vision_dtype"):
            train.main([*flags, *wrong, "--run", "w"])


def test_a_log_is_whole_on_disk_as_soon_as_it_is_open():
    path = Path("log.csv")
    path.write_text("step,loss\n1,0.5\n2,0.25\n3,0.1")
    log = Log(path, ("step", "loss"), 2)  # nothing is closed or flushed: a process killed here must leave this behind
    assert path.read_text().split() == ["step,loss", "1,0.5", "2,0.25"]
    log.add(3, 0.2)
    assert path.read_text().split()[-1] == "3,0.2" and log.recent_mean(1, 2) == pytest.approx(0.225)


def test_weight_decay_goes_by_module_type():
    model = MBLIP(SMALL)
    (optimizer,) = train.build_optimizers(model, "adamw", train.Config())
    decayed, rest = optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    rest, decayed = ({names[id(p)] for p in group["params"]} for group in (rest, decayed))
    assert len(rest) + len(decayed) == len(names) and (optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[1]["weight_decay"]) == (0.1, 0)
    tables = {"queries", "vit.pos_embed", "vit.cls_token", "mt5.encoder.bias.weight", "mt5.decoder.bias.weight"}
    assert tables | {"qformer.norm.weight", "proj.bias"} <= rest
    assert all("norm" in n or n.endswith("bias") or n in tables for n in rest)
    assert all("norm" not in n and n.endswith("weight") for n in decayed)


def test_muon_gets_the_matrices_inside_the_towers_and_adamw_the_rest():
    model = MBLIP(SMALL)
    adamw, muon = train.build_optimizers(model, "muon", train.Config())
    names = {id(p): name for name, p in model.named_parameters()}
    of_muon = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert of_muon == {n for n, p in model.named_parameters() if ".blocks." in n and p.ndim == 2}
    assert len(of_muon) + sum(len(g["params"]) for g in adamw.param_groups) == len(names)


def test_the_learning_rate_warms_up_and_ends_near_zero():
    cfg = train.Config(steps=100, warmup=10)
    rates = [train.schedule(cfg, s) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[99] < 0.001
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_a_budget_is_spent_and_the_rate_follows_the_clock(monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train.main([*FLAGS, "--eval_every", "0", "--budget", "6s", "--run", "timed"]) == 128 + signal.SIGINT
    assert train.main(["--resume", "out/timed"]) == 0
    record = json.loads(Path("out/timed/record.json").read_text())
    with open("out/timed/loss.csv") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert 6 <= record["seconds"] < 20 and len(rates) == record["steps_done"] > 3
    assert record["examples_seen"] == record["steps_done"] * 4 * 2
    assert rates[2] == max(rates) and rates[-1] < 0.2 * rates[2] and rates[3:] == sorted(rates[3:], reverse=True)


@pytest.mark.parametrize("text,seconds", [("", 0), ("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("0", None), ("-1m", None), ("m", None), ("nan", None),
                                          ("infh", None), ("ten", None)])  # fmt: skip
def test_a_budget_is_a_time(text, seconds):
    if seconds is None:
        with pytest.raises(ValueError, match="--budget .*10m"):
            train.Config(budget=text)
    else:
        assert train.Config(budget=text).budget_seconds() == seconds


def test_a_damaged_state_is_noticed_and_the_one_before_taken(monkeypatch, capsys):
    assert train.main([*FLAGS, "--run", "whole"]) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        train.main([*FLAGS, "--save_every", "0", "--run", "cut"])
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


def test_a_loss_that_is_not_finite_stops_before_the_update(monkeypatch):
    before = {}
    forward = MBLIP.forward

    def poisoned(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        before["model"] = self
        before["digest"] = train.digest(dict(self.named_parameters()))
        return logits, loss * float("nan")

    monkeypatch.setattr(MBLIP, "forward", poisoned)
    with pytest.raises(ValueError, match="loss nan.*step 0"):
        train.main([*FLAGS, "--run", "nan"])
    assert train.digest(dict(before["model"].named_parameters())) == before["digest"]


@pytest.mark.parametrize("flags,words", [
    ("--steps 0", "--steps 0"), ("--steps x", "--steps"), ("--lr nan", "--lr"), ("--lr -1", "--lr"), ("--beta2 1", "--beta2"),
    ("--lang_mix klingon", "klingon"), ("--lang_mix sw:0", "--lang_mix"), ("--lang_alpha nan", "--lang_alpha"),
    ("--tasks dance", "--tasks"), ("--concepts some", "--concepts"), ("--train nothing", "--train"), ("--init nowhere", "nowhere"),
    ("--run a/b", "--run"), ("--run ..", "--run"), ("--run q\udcff", "--run"), ("--seed 99999999999999999999", "--seed"), ("--resume nowhere", "nowhere"), ("--device tpu", "--device"), ("--stepz 3", "--steps"),
    ("--lang_mix sw --hold_out_langs sw", "--hold_out_langs"), ("--batch 4.5", "--batch"), ("--no_checkpointin", "checkpointing"),
    ("--imitate_weight -1", "--imitate_weight"), ("--imitate_weight nan", "--imitate_weight"), ("--redraw -0.1", "--redraw"),
    ("--redraw 1.5", "--redraw"), ("--redraw nan", "--redraw"), ("--noise -1", "--noise"), ("--noise nan", "--noise"),
])  # fmt: skip
def test_bad_flags_are_one_line_and_status_2(monkeypatch, capsys, flags, words):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    with pytest.raises(SystemExit) as end:
        train.run_main(train.main)
    err = capsys.readouterr().err.strip()
    assert end.value.code == 2 and words in err and "\n" not in err


def test_a_run_is_not_overwritten_nor_resumed_with_other_flags():
    Path("out/r").mkdir(parents=True)
    Path("out/r/other").touch()
    with pytest.raises(ValueError, match="is not a run"):
        train.main([*FLAGS, "--run", "r"])
    Path("out/r/train.json").touch()
    with pytest.raises(ValueError, match="--resume out/r"):
        train.main([*FLAGS, "--run", "r"])
    assert train.main([*FLAGS, "--run", "s"]) == 0
    with pytest.raises(ValueError, match="--lr 0.5: the run to resume has"):
        train.main(["--resume", "out/s", "--lr", "0.5"])


def process(*flags):
    """A real `python train.py` on the small model, as a process that can be killed."""
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; import train, test_train\n"
            "train.PRESETS['nano'] = test_train.SMALL; train.MEASUREMENTS = ('validation',)\n"
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


def test_kill_9_and_sigterm_cost_nothing_but_time():
    whole = process(*LONG, "--run", "whole")
    whole.communicate()
    rng = random.Random(0)
    run = process(*LONG, "--run", "killed")
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


def test_after_a_damaged_state_the_good_one_is_never_overwritten_by_it(tmp_path):
    model = torch.nn.Linear(3, 2)
    state = State(tmp_path, model, [torch.optim.AdamW(model.parameters())])
    state.save(1, 0.0)
    state.save(2, 0.0)
    data = bytearray(state.path.read_bytes())
    data[-3] ^= 1
    state.path.write_bytes(data)
    assert state.load()[0] == 1
    state.save(3, 0.0)
    state.path.unlink()  # as if that save had been cut off
    assert state.load()[0] == 1


def test_a_second_process_on_the_same_run_is_refused(tmp_path):
    lock = RunLock(tmp_path)
    with pytest.raises(ValueError, match="another process"):
        RunLock(tmp_path)
    del lock
    RunLock(tmp_path)


@pytest.mark.parametrize("key,value", [("steps", None), ("steps", 2.5), ("checkpointing", 1), ("lang_mix", 3)])
def test_a_damaged_config_cannot_be_resumed(key, value):
    Path("out/r").mkdir(parents=True)
    config = {f.name: f.default for f in train.fields(train.Config)}
    Path("out/r/train.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match="does not fit"):
        train.main(["--resume", "out/r"])


def test_imitation_comes_first_and_moves_the_whole_bridge(bases, monkeypatch):
    """The Q-Former, queries and projection learn in it, the language model is not run, and a stop inside it costs no bit."""
    sees, reads, flags = bases
    flags = [*flags, "--imitate", "0.5"]
    calls = []
    with monkeypatch.context() as patch:
        forward = MBLIP.forward
        patch.setattr(MBLIP, "forward", lambda self, *args, **kwargs: (calls.append(1), forward(self, *args, **kwargs))[1])
        assert train.main([*flags, "--run", "whole"]) == 0
    assert len(calls) == 2 * (9 - 4)  # micro-batches of the steps after the first four
    whole = load_mblip("out/whole")
    assert not torch.equal(whole.queries, sees.queries) and not torch.equal(whole.qformer.blocks[0].fc1.weight, sees.qformer.blocks[0].fc1.weight)
    assert train.digest(dict(whole.mt5.named_parameters())) == train.digest(dict(reads.named_parameters()))
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train.main([*flags, "--run", "cut"]) == 128 + signal.SIGINT
    assert train.main(["--resume", "out/cut"]) == 0
    assert everything("cut") == everything("whole")
    with pytest.raises(ValueError, match="--imitate 2"):
        train.main([*flags, "--imitate", "2", "--run", "r"])


def test_imitation_goes_on_beside_the_language_model_with_its_weight(bases):
    """The first phase does not know the weight; the second logs the language model's loss alone, and both pull."""
    _, _, flags = bases
    losses = {}
    for weight in ("0", "5"):
        assert train.main([*flags, "--imitate", "0.5", "--imitate_weight", weight, "--run", f"w{weight}"]) == 0
        losses[weight] = [line.split(",") for line in Path(f"out/w{weight}/loss.csv").read_text().splitlines()[1:]]
    (none, some), phase = losses.values(), 4
    assert none[:phase] == some[:phase]
    assert none[phase][1] == some[phase][1] and float(none[phase][2]) < float(some[phase][2])  # the same loss told, a larger gradient
    assert none[phase + 1][1] != some[phase + 1][1]
