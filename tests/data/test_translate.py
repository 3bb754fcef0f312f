"""The command: killed anywhere it ends with the same bytes; shards make the same file; everything wrong is one line."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from nanomblip.data import json_index, translate
from nanomblip.data.builders import fill
from nanomblip.data.json_mixture import JsonMixture
from nanomblip.data.translators import NLLBTranslator

WORDS = "quick brown fox lazy dog river bank man horse beach two children red ball picture 15 cats sleeping".split()

pytestmark = pytest.mark.usefixtures("three_languages")


def examples(count, seed=0, texts=True):
    rng, rows = random.Random(seed), []
    for i in range(count):
        said = lambda: " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))
        task, of = rng.choice([("caption", dict(text=said())), ("vqa", dict(question=said() + "?", answer=said()))]) if texts else ("caption", dict(text=said()))
        context, label = fill(rng, task, "en", of)
        rows.append(dict(context=context, label=label, image_id=f"{i}.jpg", **(dict(task=task, lang="en", texts=of) if texts else {})))
    return rows


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "english.json"
    path.write_text(json.dumps(examples(37)))
    return path


@pytest.fixture
def run(monkeypatch, capsys, nllb_folder, source, tmp_path):
    """(exit status, stdout, stderr) of the command; blocks of eight texts, so that there are several."""
    monkeypatch.setattr(translate, "BATCHES", 2)

    def call(*flags, out="out.json", model=nllb_folder, to="sw,de,en", rejected="keep", inp=source):
        given = ["--input", inp, "--model", model, "--to", to, "--rejected", rejected, "--batch", 4, "--out", tmp_path / out, *flags]
        monkeypatch.setattr(sys, "argv", ["translate", *map(str, given)])
        with pytest.raises(SystemExit) as end:
            translate.run_main(translate.main)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return end.value.code, out, err

    return call


def files(folder, name):
    return {path.name.replace(name, "X"): path.read_bytes() for path in sorted(folder.glob(f"{name}*")) if not path.name.endswith(".index")}


def test_the_output_is_a_mixture_with_every_example_once(run, source, tmp_path):
    status, said, err = run()
    rows = json.loads((tmp_path / "out.json").read_text())
    english = {row["image_id"]: row for row in json.loads(source.read_text())}
    assert status == 0 and [row["image_id"] for row in rows] == list(english) and "37  examples written, in 3 languages" in said and "tokens written" in said
    counts = {lang: sum(row["lang"] == lang for row in rows) for lang in ("sw", "de", "en")}
    assert set(counts.values()) == {12, 13}
    for row in rows:
        if row["lang"] == "en":
            assert (row["context"], row["label"]) == (english[row["image_id"]]["context"], english[row["image_id"]]["label"])
    mixture = JsonMixture([(str(tmp_path / "out.json"), None)], 0)
    assert len(mixture) == 37 and [mixture.at(n).target for n in range(37)] == [row["label"] for row in rows]
    assert (tmp_path / "out.rejected.md").read_text().startswith("| language") and (tmp_path / "out.rejected.png").stat().st_size > 1000
    before = files(tmp_path, "out")
    assert run()[0] == 0 and files(tmp_path, "out") == before, "all is there: nothing changes"


def test_shards_and_a_merge_make_the_same_file(run, tmp_path):
    assert run()[0] == 0
    for i in (1, 2, 0):
        status, _, err = run("--shard", f"{i}/3", out="parts.json")
        assert status == 0 and f"shard {i} of 3 is done" in err and not (tmp_path / "parts.json").exists()
        if i:
            assert run("--shard", "merge/3", out="parts.json")[::2] == (2, f"translate: error: {tmp_path}/parts.json.0-of-3.jsonl: missing; give the command of --shard 0/3 again\n")
    assert run("--shard", "merge/3", out="parts.json")[0] == 0
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "out.json").read_bytes()
    assert (tmp_path / "parts.rejected.md").read_bytes() == (tmp_path / "out.rejected.md").read_bytes()


def test_a_merge_notices_whatever_is_missing(run, tmp_path):
    for i in (0, 1):
        assert run("--shard", f"{i}/2", out="p.json")[0] == 0
    assert run("--shard", "merge/2", out="p.json")[0] == 0
    whole, path = (tmp_path / "p.json").read_bytes(), tmp_path / "p.json.1-of-2.jsonl"
    good = path.read_bytes()
    lines = good.splitlines(keepends=True)
    assert len(lines) == 3 and len((tmp_path / "p.json.0-of-2.jsonl").read_bytes().splitlines()) == 2
    other = json.dumps(dict(json.loads(lines[1]), job="0" * 16)).encode() + b"\n"
    for bad, words in ((good[:-1], "line 3 is not a whole block"), (b"".join(lines[:2]), "not finished"), (lines[0] + lines[2], "block 4 where 3 belongs"),
                       (lines[0] + lines[0], "block 2 where 3 belongs"), (lines[1], "block 3 where 2 belongs"), (b"", "not finished"), (lines[0] + other, "another model, input or flags"),
                       (b"[]\n", "line 1 is not"), (b"{}\n", "line 1 is not"), (b"\xff\n", "line 1 is not"), (good + lines[2], "block 4 where 5 belongs")):  # fmt: skip
        path.write_bytes(bad)
        status, _, err = run("--shard", "merge/2", out="p.json")
        assert status == 2 and words in err and "give the command of --shard 1/2 again" in err and err.count("\n") == 1 and (tmp_path / "p.json").read_bytes() == whole
    path.write_bytes(good)
    assert run("--shard", "merge/2", out="p.json")[0] == 0 and (tmp_path / "p.json").read_bytes() == whole
    status, _, err = run("--shard", "merge/3", out="p.json")
    assert status == 2 and "0-of-3.jsonl: missing" in err


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_an_interruption_costs_the_block_in_the_making(run, tmp_path, monkeypatch, dtype):
    flags = ["--dtype", dtype]
    assert run(*flags)[0] == 0
    write, calls = NLLBTranslator.write, []

    def stop(self, *args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(NLLBTranslator, "write", stop)
        status, _, err = run(*flags, out="cut.json")
    assert status == 130 and "the same command goes on" in err and not (tmp_path / "cut.json").exists()
    begun = (tmp_path / "cut.json.jsonl").read_bytes()
    assert 0 < begun.count(b"\n") < 5
    (tmp_path / "cut.json.jsonl").write_bytes(begun + (tmp_path / "out.json.jsonl").read_bytes()[len(begun) : len(begun) + 200])
    assert run(*flags, out="cut.json")[0] == 0
    for name in ("", ".jsonl"):
        assert (tmp_path / f"cut.json{name}").read_bytes() == (tmp_path / f"out.json{name}").read_bytes()


def test_parts_of_another_job_are_refused_and_kept(run, tmp_path):
    assert run()[0] == 0
    before = (tmp_path / "out.json.jsonl").read_bytes()
    for flags in (dict(to="sw,de"), dict(rejected="drop"), ("--seed", 1), ("--num_beams", 2), ("--legacy",), ("--dtype", "bf16"), ("--batch", 3)):
        status, _, err = run(**flags) if isinstance(flags, dict) else run(*flags)
        assert status == 2 and "holds answers made with" in err and "give another file, or delete it" in err and err.splitlines()[-1].startswith("translate: error")
        assert (tmp_path / "out.json.jsonl").read_bytes() == before


def test_another_model_or_input_is_refused(run, source, tmp_path, nllb_folder):
    assert run()[0] == 0
    source.write_text(json.dumps(examples(37, seed=1)))
    status, _, err = run()
    assert status == 2 and "made with another input file or model" in err
    copy = tmp_path / "elsewhere.json"  # the same texts under another name are the same
    copy.write_text(json.dumps(examples(37)))
    assert run(inp=copy)[0] == 0


# ---- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags,words", [
    (["--to", "swahli"], "--to 'swahli': unknown language 'swahli'; did you mean Swahili (sw)"), (["--to", "sw,quz"], "--to 'sw,quz': unknown language 'quz'"), (["--to", ""], "it is empty"),
    (["--to", "sw:0"], "not a positive number"), (["--model", "nllb-200-1.2B"], "nllb-200-1.2B: no such folder, and none of nano, nllb-200-distilled-600M"),
    (["--model", "nano", "--to", "sw,ceb"], "the translator knows no Cebuano (ceb)"), (["--model", "nano", "--back"], "--back with --model nano"), (["--shard", "3/2"], "--shard 3/2"), (["--shard", "1"], "--shard 1:"),
    (["--shard", "2/2"], "--shard 2/2"), (["--shard", "1/9"], "there are 5 blocks of 8 examples, so give at most 5"), (["--batch", "0"], "--batch 0: at least 1"), (["--every", "--rejected", "other"], "--rejected other with --every"),
    (["--input", "none.json"], "--input none.json: no such file"), (["--device", "tpu"], "--device tpu"), (["--tu", "sw"], "did you mean --to"), (["--out", "no/folder/x.json"], "its folder does not exist"),
    (["--out", "."], "is a folder"), (["--out", ""], "--out is missing"),
])  # fmt: skip
def test_wrong_flags_are_one_line_and_nothing_is_left(run, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    status, out, err = run(*flags)
    assert status == 2 and out == "" and words in err.splitlines()[-1] and len([line for line in err.splitlines() if "error" in line]) == 1
    assert [name for name in sorted(path.name for path in tmp_path.iterdir()) if not name.endswith(".index")] == before


@pytest.mark.parametrize("content,words", [
    ("[]", "holds no example"), ("{}", "does not begin with ["), ('[{"context": "a"', "ends in the middle"), (b"[\xff]", "not UTF-8"), ('[{"context": "Hm?", "label": "a", "image_id": "1"}]', "example 0: its prompt is not one"),
    ('[{"context": "a", "label": 5, "image_id": "1"}]', "'label' is not a text"), ('[{"context": "a", "label": "b", "image_id": "1", "texts": {}}]', "example 0: task None in language None"),
])  # fmt: skip
def test_inputs_that_are_none(run, source, tmp_path, content, words):
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, _, err = run()
    assert status == 2 and words in err.splitlines()[-1] and "english.json" in err and not (tmp_path / "out.json").exists()


def test_an_example_that_is_none_is_said_before_anything_is_translated(run, source, tmp_path, monkeypatch):
    source.write_text(json.dumps([*examples(36), dict(context="Hm?", label="a", image_id="1")]))
    monkeypatch.setattr(NLLBTranslator, "write", lambda *args: pytest.fail("translated"))
    for flags in ((), ("--every",), ("--shard", "1/2")):
        status, _, err = run(*flags)
        assert status == 2 and "example 36: its prompt is not one" in err and not list(tmp_path.glob("out.json*"))


def test_the_input_is_never_written_over(run, source, tmp_path):
    before = source.read_bytes()
    (tmp_path / "link.json").symlink_to(source)
    for name in ("english.json", "link.json"):
        status, _, err = run(out=name)
        assert status == 2 and "is the file of --input" in err and source.read_bytes() == before


def test_a_part_that_is_something_else_is_refused_and_stays(run, tmp_path):
    path = tmp_path / "out.json.jsonl"
    path.write_text("my only copy\n")
    status, _, err = run()
    assert status == 2 and "line 1 is no answer of this program" in err and path.read_text() == "my only copy\n"


def test_odd_characters_and_long_texts(run, source, tmp_path):
    said = ["“It’s a dog…”\u200b", "tab\tand\x00null\nnext line", "\ud83d", "猫", " ", "a " * 2000, "word" * 600, "é\u0301", "👩\u200d🚀"]
    rows = [dict(context="Caption the image.", label=text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), image_id=f"{i}") for i, text in enumerate(said)]
    source.write_text(json.dumps(rows))
    status, out, err = run(to="sw")
    assert status == 0 and "left out: a text is empty" in out and "do not look English" in out
    assert "2  sentences of more than 128 tokens, cut" in out and len(json.loads((tmp_path / "out.json").read_text())) == 8


def limited(size, work):
    """`work()` where no file can grow beyond `size` bytes: a full disk."""
    resource = pytest.importorskip("resource")
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
        return work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_loses_nothing(run, tmp_path):
    assert run()[0] == 0
    whole, parts = ((tmp_path / f"out.json{name}").read_bytes() for name in ("", ".jsonl"))
    first = parts.index(b"\n") + 1
    status, _, err = limited(max(first, 6000) + 10, lambda: run(out="full.json"))
    assert status == 2 and "not written" in err and "make room, then give the same command again" in err
    assert parts.startswith(done := (tmp_path / "full.json.jsonl").read_bytes()) and len(done) >= first
    (tmp_path / "full.json.jsonl").write_bytes(parts)
    (tmp_path / "full.json").write_text("what was there")
    status, _, err = limited(len(whole) // 2, lambda: run("--shard", "merge/1", out="full.json"))
    assert status == 2 and "all translations are kept: make room" in err and (tmp_path / "full.json").read_text() == "what was there"
    assert run(out="full.json")[0] == 0 and (tmp_path / "full.json").read_bytes() == whole


def test_two_processes_do_not_write_the_same_part(run, tmp_path):
    with translate.AnswerFile(tmp_path / "out.json.jsonl"):
        status, _, err = run()
    assert status == 2 and "another process writes to it" in err


# ---- kills ------------------------------------------------------------------------------------------------------------


def child(flags, folder):
    """The command in a process of its own (a fork: nothing is loaded again); its number."""
    number = os.fork()
    if number:
        return number
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        torch.set_num_threads(1)
        translate.main([str(flag) for flag in flags])
        os._exit(0)
    except BaseException:
        os._exit(1)


def kill_until_done(flags, folder, rng, longest, most):
    """Start the command and kill it after a random time, again and again; how often it was killed before it ended."""
    for kills in range(most):
        number = child(flags, folder)
        deadline = time.time() + rng.uniform(0, longest)
        while time.time() < deadline:
            ended, status = os.waitpid(number, os.WNOHANG)
            if ended:
                assert status == 0
                return kills
            time.sleep(0.002)
        os.kill(number, signal.SIGKILL)
        if os.waitpid(number, 0)[1] == 0:
            return kills
    number = child(flags, folder)
    assert os.waitpid(number, 0)[1] == 0
    return most


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, nllb_folder, monkeypatch, kills):
    monkeypatch.setattr(translate, "BATCHES", 2)
    path, count = tmp_path / "english.json", 40 if kills < 10 else 160
    path.write_text(json.dumps(examples(count)))
    flags = ["--input", path, "--model", nllb_folder, "--to", "sw,de,th,en", "--rejected", "keep", "--batch", 4, "--out"]
    began = time.time()
    assert os.waitpid(child([*flags, tmp_path / "whole.json"], tmp_path), 0)[1] == 0
    once, total, rng = time.time() - began, 0, random.Random(kills)
    for turn in range(kills):
        (tmp_path / "english.json.index").unlink(missing_ok=True)
        folder = tmp_path / f"turn{turn}"
        folder.mkdir()
        total += kill_until_done([*flags, folder / "cut.json"], folder, rng, 0.7 * once, kills - total)
        for name in ("cut.json", "cut.json.jsonl", "cut.rejected.md", "cut.rejected.png"):
            assert (folder / name).read_bytes() == (tmp_path / name.replace("cut", "whole")).read_bytes(), (turn, name)
        assert not list(folder.glob(".cut.json.*.tmp")), "what a killed merge left behind"
        if total >= kills:
            return
    pytest.fail(f"{total} kills of {kills}: every run ended too soon")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path, nllb_folder):
    """Ten times the examples, all of them to stay English: the peak of the process grows by less than 20 MB."""
    resource, peaks = pytest.importorskip("resource"), []
    for count in (20_000, 200_000):
        path = tmp_path / f"{count}.json"
        path.write_text(json.dumps(examples(count, texts=False)))
        number = child(["--input", path, "--model", nllb_folder, "--to", "en", "--out", tmp_path / f"{count}.out"], tmp_path)
        _, status, used = os.wait4(number, 0)
        assert status == 0 and len(json_index.JsonExamples(tmp_path / f"{count}.out")) == count
        peaks.append(used.ru_maxrss / 1024)
    assert resource and peaks[1] - peaks[0] < 20, peaks
    assert Path(tmp_path / "200000.out.jsonl").stat().st_size > 20_000_000
