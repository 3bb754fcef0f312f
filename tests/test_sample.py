"""sample.py as a user meets it: good pictures, bad pictures, wrong flags; never a traceback."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise
from make_checkpoint import write_checkpoint
from PIL import Image

import sample
from nanomblip.data import answers
from nanomblip.data import folder as folders
from nanomblip.data.emoji import ROOT as DATA
from nanomblip.data.image import ImageConfig
from nanomblip.data.scripts import script_share
from nanomblip.model.mblip import MBLIP, PRESETS
from nanomblip.weights.files import write_json
from nanomblip.weights.save import save_mblip

ROOT = Path(__file__).resolve().parent.parent
NANO = PRESETS["nano"]
CFG = replace(
    NANO,
    vit=replace(NANO.vit, width=16, layers=1, heads=2, mlp=16),
    qformer=replace(NANO.qformer, width=16, layers=1, heads=2, mlp=16, vision_width=16),
    mt5=replace(NANO.mt5, width=16, heads=2, head_width=8, mlp=16, layers=1, decoder_layers=1),
    queries=2,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small random model in the official layout, as train.py would leave it, in a run folder."""
    folder = tmp_path_factory.mktemp("cwd") / "out" / "run"
    save_mblip(randomise(MBLIP(CFG), std=0.4), folder, image_token=8000, languages=["en", "sw", "th"])
    write_json(folder / "preprocessor_config.json", ImageConfig(size=64).to_hf())
    (folder / "spiece.model").write_bytes((DATA / "spiece.model").read_bytes())
    return folder


@pytest.fixture(autouse=True)
def here(weights, monkeypatch):
    monkeypatch.chdir(weights.parent.parent)
    monkeypatch.setattr(folders, "HERE", weights.parent.parent)  # nothing shipped there


def hear_signals():
    """In a child: a job in the background of a shell would ignore these."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run(capsys, *argv):
    """(exit status, stdout, stderr) of one call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sample.py", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            sample.run_main(sample.main)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return end.value.code, out, err


CAT = str(DATA / "cat.png")


def test_one_picture_is_one_line_and_stderr_names_the_weights(capsys):
    status, out, err = run(capsys, "--image", CAT, "--lang", "Swahili")
    assert status == 0 and out.count("\n") == 1 and "out/run" in err and "Swahili" in err


def test_the_newest_run_is_taken_and_without_any_it_says_what_to_run(capsys, tmp_path, monkeypatch, weights):
    assert sample.find_model("") == Path("out/run") and sample.find_model(str(weights)) == weights
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "HERE", tmp_path)
    for name in ((), ("--model", "nano")):
        status, out, err = run(capsys, "--image", CAT, *name)
        assert status == 2 and out == "" and "python train.py --lang_mix all" in err and err.count("\n") == 1
    status, _, err = run(capsys, "--image", CAT, "--model", "mblip-mt0-xl")
    assert status == 2 and "weights/mblip-mt0-xl" in err and err.count("\n") == 1


def test_a_shipped_model_answers_when_asked_for_or_when_there_is_no_run(monkeypatch, tmp_path, weights):
    (tmp_path / "weights" / "nano").mkdir(parents=True)
    (tmp_path / "weights" / "nano" / "aligned").symlink_to(weights)
    monkeypatch.setattr(folders, "HERE", tmp_path)
    assert sample.find_model("nano") == tmp_path / "weights" / "nano" / "aligned" and sample.find_model("") == Path("out/run")
    monkeypatch.chdir(tmp_path)
    assert sample.find_model("") == tmp_path / "weights" / "nano" / "aligned"


def test_the_picture_matters(capsys, tmp_path):
    """Two different pictures get different answers from a random model, and the same picture the same one."""
    generator = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    _, out, _ = run(capsys, "--image", tmp_path, CAT, CAT)
    texts = [line.split("\t")[1] for line in out.splitlines()]
    assert len(texts) == 5 and texts[3] == texts[4] and len(set(texts)) > 1


def test_a_batch_goes_on_past_bad_pictures_and_reports_them_at_the_end(capsys, tmp_path):
    good = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(good):
        Image.new("RGB", (30 + i, 20), (80 * i, 0, 0)).save(path)
    (tmp_path / "0bad.png").write_bytes(b"")
    (tmp_path / "zbad.jpg").write_bytes(b"not a picture")
    for name in ("a.heic", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    target = tmp_path / "captions.jsonl"
    status, out, err = run(capsys, "--image", tmp_path, tmp_path / "gone.png", "--batch", 2, "--lang", "sw", "--out", target)
    assert status == 1 and out == ""
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["image"] for row in rows] == [str(path) for path in good]
    assert all(row["lang"] == "sw" and row["prompt"] == "Caption the image in Swahili." and row["texts"] for row in rows)
    for word in ("0bad.png", "zbad.jpg", "gone.png", "3 of 6"):
        assert word in err
    assert "sample.py: 2 other files in the folder left out (1 .heic, 1 .txt); save HEIC as JPEG or PNG\n" in err


@pytest.mark.parametrize("content,words", [(None, "no such file"), (b"", "empty"), (b"hello", "not a picture"), ("cut", "damaged"),
                                           ("bomb", "million pixels"), ("folder", "no picture")])  # fmt: skip
def test_a_bad_picture_is_one_line_and_status_2(capsys, tmp_path, content, words):
    path = tmp_path / "picture.png"
    if content == "cut":
        path.write_bytes(Path(CAT).read_bytes()[:3000])
    elif content == "bomb":
        Image.new("1", (12_000, 8_000)).save(path)
    elif content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    status, out, err = run(capsys, "--image", path)
    lines = [line for line in err.splitlines() if "weights" not in line]
    assert status == 2 and out == "" and len(lines) == 1 and words in lines[0] and "picture.png" in lines[0]


@pytest.mark.parametrize("flags,words", [
    ("--lang klingon", "unknown language 'klingon'"), ("--lang de", "en sw th"), ("--lang swahilli", "Swahili (sw)"), ("", "--image"),
    ("--model nowhere", "nowhere"), ("--num_beams -1", "num_beams"), ("--num_return 6", "num_return"), ("--preset greedy --num_return 3", "num_return"), ("--temperature 0.5", "--sample"),
    ("--sample --top_p 2", "top_p"), ("--sample --num_beams 5", "--num_beams"), ("--preset best", "--preset"), ("--batch 0", "--batch"), ("--imagee x", "--image"),
    ("--sample --temperature nan", "temperature"), ("--device tpu", "--device"),
])  # fmt: skip
def test_bad_flags_are_one_line_and_status_2(capsys, flags, words):
    argv = flags.split() if flags in ("",) else ["--image", CAT, *flags.split()]
    status, out, err = run(capsys, *argv)
    assert status == 2 and out == "" and words in err.splitlines()[-1] and err.count("error") == 1


@pytest.mark.parametrize("prompt", ["   ", "x" * 100_000, "\udcff\udcfe", "a\0b", "</s>", "{L} {", "👩\u200d🚀", "\u202eltr"])
def test_odd_prompts(capsys, prompt):
    status, out, err = run(capsys, "--image", CAT, "--prompt", prompt)
    if prompt.strip():
        assert status == 0 and out.count("\n") == 1 and ("left out" in err) == (len(prompt) > 1000)
    else:
        assert status == 2 and "empty" in err


def test_out_goes_through_links_and_pipes_and_takes_any_name(capsys, tmp_path):
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    real.write_text("")
    link.symlink_to(real)
    assert run(capsys, "--image", CAT, "x\udcff\n.png", "--out", link, "--prompt", "hi \udcff")[0] == 1
    assert link.is_symlink() and json.loads(real.read_text())["prompt"] == "hi \udcff"
    status, _, err = run(capsys, "--image", CAT, "--out", "/dev/null")
    assert status == 0 and not Path("/dev/null").is_file()
    (tmp_path / "mine.txt").write_text("old")
    for target, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "x.jsonl", "does not exist"), (tmp_path / "mine.txt", "another file")):
        status, _, err = run(capsys, "--image", CAT, "--out", target)
        assert status == 2 and words in err and "--out" in err and ("weights" not in err or target.is_file())  # before the model is loaded
    assert (tmp_path / "mine.txt").read_text() == "old"


@pytest.mark.parametrize("file,change,words", [
    ("preprocessor_config.json", {"size": {"height": 32, "width": 32}}, "32"), ("preprocessor_config.json", [], "object"),
    ("config.json", {"languages": 5}, "languages"), ("config.json", {"languages": "sw"}, "languages"),
    ("config.json", {"languages": ["zz"]}, "languages"),
])  # fmt: skip
def test_contradicting_files_are_one_line(capsys, tmp_path, weights, file, change, words):
    folder = tmp_path / "w"
    shutil.copytree(weights, folder)
    old = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(old | change if isinstance(change, dict) else change))
    status, out, err = run(capsys, "--image", CAT, "--model", folder)
    assert status == 2 and out == "" and words in err and err.count("error") == 1


@pytest.mark.parametrize("given,preset", [({}, "caption"), (dict(question="How many?"), "vqa"), (dict(stream=True), "greedy"), (dict(sample=True), "greedy"),
                                          (dict(sample=True, question="How many?"), "greedy"), (dict(preset="greedy"), "greedy")])  # fmt: skip
def test_answers_are_written_as_in_the_paper_unless_told_otherwise(given, preset):
    decoding, wanted = sample.decoding_of(sample.Config(**given)), sample.DECODING[preset]
    assert (decoding.num_beams, decoding.length_penalty) == (wanted.num_beams, wanted.length_penalty)
    assert (decoding.max_new_tokens, decoding.do_sample) == (wanted.max_new_tokens, given.get("sample", False))


def test_beams_nbest_and_sampling(capsys):
    status, out, _ = run(capsys, "--image", CAT, "--preset", "caption", "--num_return", 3, "--max_new_tokens", 6)
    assert status == 0 and len(out.splitlines()) == 3
    draws = [run(capsys, "--image", CAT, "--sample", "--seed", seed, "--max_new_tokens", 8)[1] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "spiece.model", "preprocessor_config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_damaged_weights_are_one_line(capsys, tmp_path, weights, file, damage):
    folder = tmp_path / "w"
    folder.mkdir()
    for path in weights.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    data = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage != "missing":
        (folder / file).write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    status, out, err = run(capsys, "--image", CAT, "--model", folder)
    assert status == 2 and out == "" and str(folder) in err and err.count("\n") == 1


def test_a_terminal_without_unicode_and_a_closed_pipe_do_not_crash(weights):
    command = [sys.executable, str(ROOT / "sample.py"), "--image", CAT, CAT, "--lang", "th", "--model", str(weights)]
    plain = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=plain, capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and done.stdout.count(b"\n") == 2
    pipe = subprocess.run(f"{' '.join(command)} | true", shell=True, env=plain, capture_output=True)
    assert b"Traceback" not in pipe.stderr


def test_photos_of_any_shape_and_mode_are_answered(capsys, tmp_path):
    for i, (mode, size) in enumerate((("L", (1, 1)), ("RGBA", (5, 900)), ("CMYK", (64, 64)), ("P", (10, 10)))):
        Image.new(mode, size).save(tmp_path / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    status, out, _ = run(capsys, "--image", tmp_path)
    assert status == 0 and len(out.splitlines()) == 4
    assert torch.get_num_threads() == 1  # nothing here changed the process's settings


def test_force_lang_keeps_the_answer_in_the_script_of_the_language(capsys):
    free = run(capsys, "--image", CAT, "--lang", "th")[1]
    status, kept, _ = run(capsys, "--image", CAT, "--lang", "th", "--force_lang")
    assert status == 0 and (script_share(kept, "th") or 1) > 0.9 and (script_share(free, "th") or 0) < 0.9


# -------------------------------------------------------------------------------------------- long jobs, odd terminals


def pictures(folder, count):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (20, 20), (i * 40 % 256, i * 70 % 256, 90)).save(folder / f"{i:03}.png")
    return folder


def test_what_is_answered_is_not_answered_again(capsys, tmp_path, monkeypatch):
    asked, target = [], tmp_path / "a.jsonl"
    real = sample.generate
    monkeypatch.setattr(sample, "generate", lambda model, image, prompt, **more: asked.append(len(prompt)) or real(model, image, prompt, **more))
    argv = ["--image", pictures(tmp_path / "p", 5), CAT, CAT, "--batch", 2, "--max_new_tokens", 5, "--out", target]
    assert run(capsys, *argv)[0] == 0 and sum(asked) == 7
    whole = target.read_bytes()
    lines = whole.splitlines(keepends=True)
    keys = {"job", "image", "lang", "prompt", "text", "texts"}
    assert len(lines) == 7 and lines[-1] == lines[-2] and all(set(json.loads(line)) == keys for line in lines)
    for left in (0, 1, 3, 6, 7):
        target.write_bytes(b"".join(lines[:left]) + lines[left % 7][:30])
        asked.clear()
        status, out, err = run(capsys, *argv)
        assert status == 0 and out == "" and sum(asked) == 7 - left and target.read_bytes() == whole
        assert (f"{left} of 7 answers are in a.jsonl already" in err) == (left > 0)


def test_a_picture_that_could_not_be_read_is_tried_again(capsys, tmp_path):
    folder, target = pictures(tmp_path / "p", 3), tmp_path / "a.jsonl"
    good = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(b"bad")
    for _ in range(2):
        status, _, err = run(capsys, "--image", folder, "--out", target)
        assert status == 1 and "1 of 3 pictures could not be read" in err and "001.png" in err
    (folder / "001.png").write_bytes(good)
    assert run(capsys, "--image", folder, "--out", target)[0] == 0
    assert sorted(Path(json.loads(line)["image"]).name for line in target.read_text().splitlines()) == ["000.png", "001.png", "002.png"]


def test_shards_are_merged_into_the_file_of_one_process(capsys, tmp_path, monkeypatch):
    """A picture that cannot be read is no missing answer; one that nobody was asked about is."""
    folder, whole, target = pictures(tmp_path / "p", 5), tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    (folder / "003.png").write_bytes(b"bad")
    argv = ["--image", folder, CAT, "--max_new_tokens", 5, "--batch", 1]
    assert run(capsys, *argv, "--out", whole)[0] == 1
    argv += ["--out", target]
    for i in (0, 2):
        assert run(capsys, *argv, "--shard", f"{i}/4")[0] == 0
    monkeypatch.setenv("RANK", "3"), monkeypatch.setenv("WORLD_SIZE", "4")
    status, _, err = run(capsys, *argv)  # under torchrun, without the flag: the shard of the damaged picture
    assert status == 0 and "003.png" in err  # else torchrun would stop the others
    status, _, err = run(capsys, *argv, "--shard", "merge/4")
    assert status == 2 and "a.1-of-4.jsonl: holds no answer to" in err and "001.png" in err and not target.exists()
    assert run(capsys, *argv, "--shard", "1/4")[0] == 0
    status, _, err = run(capsys, *argv, "--shard", "merge/4")
    assert status == 1 and "5 answers in" in err and "1 pictures could not be read" in err
    assert target.read_bytes() == whole.read_bytes()
    status, out, err = run(capsys, *argv, "--shard", "7/8")  # more processes than pictures
    assert (status, out) == (0, "") and "no picture is left for it" in err
    for flags, words in ((("--shard", "4/4"), "give i/n"), (("--shard", "0/2", "--save", tmp_path / "s"), "for one process")):
        status, _, err = run(capsys, *argv, *flags)
        assert status == 2 and words in err and err.count("\n") == 1


def test_answers_to_another_question_are_refused_in_one_line(capsys, tmp_path, weights):
    target, other = tmp_path / "a.jsonl", tmp_path / "w"
    assert run(capsys, "--image", CAT, "--out", target, "--model", weights)[0] == 0
    before = target.read_bytes()
    shutil.copytree(weights, other)
    save_mblip(randomise(MBLIP(CFG), std=0.4, seed=1), other, image_token=8000, languages=["en", "sw", "th"])
    for flags, words in ((["--lang", "th"], "lang 'en'"), (["--prompt", "x"], "prompt 'Caption the image in English.'"),
                         (["--num_beams", 2], "another"), (["--force_lang"], "another"), (["--model", other], "another")):  # fmt: skip
        status, _, err = run(capsys, "--image", CAT, "--out", target, "--model", weights, *flags)
        assert status == 2 and words in err.splitlines()[-1] and "give another file" in err and err.count("error") == 1
        assert target.read_bytes() == before
    copy = tmp_path / "copy"  # the same model elsewhere is the same model
    shutil.copytree(weights, copy)
    assert run(capsys, "--image", CAT, "--out", target, "--model", copy)[0] == 0 and target.read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_and_called_again(capsys, tmp_path, weights, number):
    folder, target = pictures(tmp_path / "p", 40), tmp_path / "a.jsonl"
    argv = ["--image", str(folder), "--batch", "1", "--max_new_tokens", "4", "--out", str(target), "--model", str(weights)]
    slow = "import sample, time; g = sample.generate; sample.generate = lambda *a, **k: (time.sleep(0.1), g(*a, **k))[1]; "
    slow += "sample.run_main(sample.main)"
    child = subprocess.Popen([sys.executable, "-c", slow, *argv], cwd=ROOT, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=hear_signals)
    deadline = time.time() + 300
    while (target.read_bytes().count(b"\n") if target.exists() else 0) < 3 and time.time() < deadline:
        time.sleep(0.02)
    child.send_signal(number)
    err = child.communicate()[1].decode()
    done = target.read_bytes().count(b"\n")
    assert child.returncode == (130 if number == signal.SIGINT else -number) and "Traceback" not in err and 3 <= done < 40
    assert number != signal.SIGINT or "the same command goes on" in err
    status, _, err = run(capsys, *argv)
    assert status == 0 and f"{done} of 40 answers are in a.jsonl already" in err
    names = [Path(json.loads(line)["image"]).name for line in target.read_text().splitlines()]
    assert names == [f"{i:03}.png" for i in range(40)]


def test_a_full_disk_is_one_line_and_the_answers_before_are_kept(capsys, tmp_path):
    resource = pytest.importorskip("resource")
    folder, target = pictures(tmp_path / "p", 12), tmp_path / "a.jsonl"
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    argv = ["--image", folder, "--batch", 1, "--max_new_tokens", 4, "--out", target]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, old[1]))
        status, _, err = run(capsys, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    kept = target.read_text().count("\n")
    assert status == 2 and "make room" in err.splitlines()[-1] and err.count("error") == 1 and 2 < kept < 12
    status, _, err = run(capsys, *argv)
    assert status == 0 and f"{kept} of 12" in err and target.read_text().count("\n") == 12


def test_without_stdout_it_says_so_and_with_out_it_needs_none(tmp_path, weights):
    call = f"{sys.executable} {ROOT / 'sample.py'} --image {CAT} --model {weights} --max_new_tokens 3"
    shell = lambda command: subprocess.run(["bash", "-c", command], capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    done = shell(f"{call} >&-")
    assert done.returncode == 2 and done.stderr == b"sample.py: error: stdout is closed; give --out FILE for the answers\n"
    done = shell(f"{call} --out {tmp_path / 'a'} >&- 2>&-")
    assert done.returncode == 0 and json.loads((tmp_path / "a").read_text())["image"] == CAT
    done = shell(f"{call} 2>&-")
    assert done.returncode == 0 and done.stdout.count(b"\n") == 1 and b"sample.py" not in done.stdout
    done = shell(f"{call} --out /dev/stdout | cat")
    assert done.returncode == 0 and json.loads(done.stdout)["image"] == CAT


def test_nano_says_once_what_it_knows_and_what_to_run_for_photographs(capsys, tmp_path):
    status, out, err = run(capsys, "--image", pictures(tmp_path / "p", 3), "--batch", 1)
    assert status == 0 and err.count("519 things") == 1 and "python sample.py --model mblip-mt0-xl" in err and "519" not in out


def test_the_lens_goes_to_stderr_and_shows_a_token_under_each_vector(capsys, tmp_path):
    plain = run(capsys, "--image", CAT, "--max_new_tokens", 3)
    status, out, err = run(capsys, "--image", CAT, "--max_new_tokens", 3, "--lens", "--vision_dtype", "bf16", "--llm_dtype", "int8")
    assert status == 0 and plain[1].count("\n") == out.count("\n") == 1
    (line,) = [line for line in err.splitlines() if line.startswith("    0  ")]
    cells = line.split()[1:]
    assert len(cells) == 2 * CFG.queries and all(-1 <= float(cosine) <= 1 for cosine in cells[1::2]) and "nearest token" in err
    two = run(capsys, "--image", CAT, CAT, "--together", "--lens", "--max_new_tokens", 3)[2]
    (line,) = [line for line in two.splitlines() if line.startswith("    0  ")]
    assert len(line.split()[1:]) == 4 * CFG.queries


# ------------------------------------------------------------------------------------------------- official weights


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A checkpoint as it lies on the hub, as regards the tokenizer: 250,100 tokens, 250,112 rows, no image token in its config."""
    folder = tmp_path_factory.mktemp("official")
    write_checkpoint(folder, replace(CFG, mt5=replace(CFG.mt5, vocab=250112)), legacy=True, shard=10_000_000)
    return folder


def test_an_official_checkpoint_answers_in_every_type(capsys, official):
    argv = ["--image", CAT, "--model", official, "--max_new_tokens", 6]
    texts = {t: run(capsys, *argv, "--vision_dtype", t, "--llm_dtype", t) for t in ("fp32", "bf16", "int8")}
    assert all(status == 0 and out.count("\n") == 1 for status, out, _ in texts.values())
    assert run(capsys, *argv) == texts["fp32"]  # auto, for a model of this size
    status, _, err = run(capsys, *argv, "--llm_dtype", "int4")
    assert status == 2 and "--llm_dtype" in err


def test_a_question_is_asked_as_in_the_paper(capsys, tmp_path):
    target = tmp_path / "a.jsonl"
    assert run(capsys, "--image", CAT, "--question", "What is it?", "--lang", "sw", "--out", target)[0] == 0
    assert json.loads(target.read_text())["prompt"] == "Question: What is it? Short answer in Swahili:"
    assert sample.decoding_of(sample.Config(question="x")).num_beams == 5
    for flags in (("--question", "x", "--prompt", "y"), ("--question", "  ")):
        status, _, err = run(capsys, "--image", CAT, *flags)
        assert status == 2 and "--question" in err


def test_two_pictures_together_are_one_question(capsys, tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    a, b, target = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "out.jsonl"
    assert run(capsys, "--image", a, b, "--together", "--question", "Which is red?", "--out", target)[0] == 0
    (row,) = [json.loads(line) for line in target.read_text().splitlines()]
    assert row["image"] == [str(a), str(b)]
    one, two, swapped = (run(capsys, "--image", *files, "--together", "--sample", "--temperature", 3, "--max_new_tokens", 20)[1] for files in ((a,), (a, b), (b, a)))
    assert len({one, two, swapped}) > 1 and two.count("\n") == 1
    (tmp_path / "b.png").write_bytes(b"bad")
    status, out, err = run(capsys, "--image", a, b, "--together")
    assert status == 2 and out == "" and "b.png" in err


def test_a_stream_prints_the_same_text(capsys, monkeypatch):
    status, want, _ = run(capsys, "--image", CAT, "--preset", "greedy", "--max_new_tokens", 30)
    parts = []
    monkeypatch.setattr(answers, "print", lambda *args, **kwargs: (parts.append(args[0] if args else ""), print(*args, **kwargs))[1], raising=False)
    status, got, _ = run(capsys, "--image", CAT, "--stream", "--max_new_tokens", 30)
    assert status == 0 and got.splitlines()[-1] == want.splitlines()[-1] and len(parts) > 3
    for flags in (("--num_beams", 3), ("--preset", "caption"), ("--out", "x"), (CAT,)):
        status, _, err = run(capsys, *(("--image", CAT, CAT) if flags == (CAT,) else ("--image", CAT, *flags)), "--stream")
        assert status == 2 and "--stream" in err


def test_saved_in_int8_it_answers_the_same(capsys, official, tmp_path):
    argv = ["--image", CAT, "--max_new_tokens", 6]
    want = run(capsys, *argv, "--model", official, "--vision_dtype", "int8", "--llm_dtype", "int8", "--save", tmp_path / "q")
    assert want[0] == 0 and "wrote" in want[2]
    got = run(capsys, *argv, "--model", tmp_path / "q")
    assert got[0] == 0 and got[1] == want[1]
    assert sum(p.stat().st_size for p in (tmp_path / "q").glob("*.safetensors")) < 0.45 * sum(p.stat().st_size for p in official.glob("*.safetensors"))
    status, _, err = run(capsys, *argv, "--model", official, "--save", tmp_path / "q")
    assert status == 2 and "not an empty folder" in err
    status, _, err = run(capsys, *argv, "--model", tmp_path / "q", "--llm_dtype", "fp32")
    assert status == 2 and "stored in int8" in err


@pytest.mark.parametrize("llm", ["fp32", "int8"])
def test_a_merged_folder_is_the_same_model_in_transformers(capsys, official, tmp_path, llm):
    """LoRA on the language model, held in floats or in int8: transformers opens the folder with its processor and computes our logits."""
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    from nanomblip.model.lora import add_lora, lora_layers
    from nanomblip.weights.adapter import save_adapter
    from nanomblip.weights.load import load_mblip

    model = load_mblip(official)
    add_lora(model.mt5, "all", r=4)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.3)
    save_adapter(model.mt5, tmp_path / "lora")
    flags = ("--adapter", tmp_path / "lora") if llm == "fp32" else ("--adapter", tmp_path / "lora", "--llm_dtype", "int8")
    status, _, err = run(capsys, "--image", CAT, "--model", official, *flags, "--merge", tmp_path / "merged", "--max_new_tokens", 2)
    assert status == 0, err
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    processor = Blip2Processor.from_pretrained(tmp_path / "merged")
    picture, question = Image.open(CAT).convert("RGB"), "Caption the image in Swahili."
    batch = processor(images=picture, text=question, return_tensors="pt")
    ids, labels = model_inputs(official, question), torch.tensor([[5, 9, 1]])
    assert batch["input_ids"].tolist() == [[250100] * CFG.queries + ids[0].tolist()]
    with torch.no_grad():
        want = theirs(**batch, labels=labels).logits
        got, _ = model.eval()(batch["pixel_values"][:, None], ids, labels)
        other, _ = model(torch.zeros_like(batch["pixel_values"])[:, None], ids, labels)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (got - other).abs().max() > 1e-2  # the picture matters
    again, _ = load_mblip(tmp_path / "merged")(batch["pixel_values"][:, None], ids, labels)
    torch.testing.assert_close(got, again, atol=1e-4, rtol=1e-4)


def model_inputs(folder, question):
    from nanomblip.data.tokenizer import Tokenizer

    return torch.tensor([Tokenizer(folder / "spiece.model").encode(question)])


def test_an_official_name_is_fetched_into_weights(capsys, official, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(folders, "HERE", tmp_path)
    monkeypatch.setattr(folders, "download", lambda name, place: asked.append((name, place)) or official)
    status, out, err = run(capsys, "--image", CAT, "--model", "mblip-mt0-xl", "--max_new_tokens", 2)
    assert status == 0 and asked == [("mblip-mt0-xl", tmp_path / "weights" / "mblip-mt0-xl")]
    status, _, err = run(capsys, "--image", CAT, "--model", "mblip-mt0-small")
    assert status == 2 and "train.py --llm mt0-small" in err
