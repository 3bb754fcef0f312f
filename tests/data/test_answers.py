"""A file of answers that loses nothing: interrupted anywhere, gone on with, never mixed with another job's."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, tiny_mblip

from nanomblip.data.answers import AnswerFile, Shard, fingerprint, job_name, merge
from nanomblip.data.emoji import ROOT as DATA
from nanomblip.data.image import ImageConfig
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.model.int8 import quantize_linears
from nanomblip.model.lora import add_lora, lora_layers

ROOT = Path(__file__).resolve().parents[2]
JOB = dict(lang="sw", model="abc")
name = lambda row: row["image"]


def hear_signals():
    """In a child: a job in the background of a shell would ignore these."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def rows(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def ask(path, images, job=JOB, **more):
    """What a script does; returns the images that were really asked about."""
    with AnswerFile(path) as file:
        known = file.begin(job, name, **more)
        new = [image for image in images if image not in known]
        for image in new:
            file.add(image=image, lang=job["lang"], text=image.upper())
    return new


def test_answers_that_are_there_are_not_asked_for_again(tmp_path):
    path = tmp_path / "a.jsonl"
    assert ask(path, ["a", "b\udcff\n", "ج"]) == ["a", "b\udcff\n", "ج"]
    first = path.read_bytes()
    assert ask(path, ["a", "b\udcff\n", "ج", "d"]) == ["d"] and path.read_bytes().startswith(first)
    assert [row["image"] for row in rows(path)] == ["a", "b\udcff\n", "ج", "d"]
    assert rows(path)[0] == dict(job=job_name(JOB), image="a", lang="sw", text="A")


@pytest.mark.parametrize("tail", [b"", b"\0" * 4096])
def test_a_half_written_line_is_dropped_wherever_it_was_cut(tmp_path, tail):
    path = tmp_path / "a.jsonl"
    ask(path, ["one", "two"])
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for cut in [*range(1, second), *range(second + 1, len(whole))]:
        path.write_bytes(whole[:cut] + tail)
        assert ask(path, ["one", "two"]) == (["one", "two"] if cut < second else ["two"])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"my only copy", b"my only copy\n", b'{"a": 1}', b'{"a": 1}\n', b"[]\n", b"5\n", b"\xff\xfe\n",
                                     b'{"job": [1]}\n', b"[" * 100_000 + b"\n", b'{"image": "a", "lang": "sw", "text": "A"}\n'])  # fmt: skip
def test_a_file_of_something_else_is_refused_and_stays_as_it_is(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"--out .*a.jsonl: .*another file") as error:
        ask(path, ["a"])
    assert "\n" not in str(error.value) and path.read_bytes() == content
    ask(tmp_path / "b.jsonl", ["a"])
    (tmp_path / "b.jsonl").write_bytes(whole := (tmp_path / "b.jsonl").read_bytes() + content + b"\n")
    with pytest.raises(ValueError, match="line 2|made with another"):
        ask(tmp_path / "b.jsonl", ["a", "b"])
    assert (tmp_path / "b.jsonl").read_bytes() == whole


def test_answers_of_another_job_are_refused_and_named(tmp_path):
    path = tmp_path / "a.jsonl"
    ask(path, ["a"])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="made with lang 'sw'; give another file, or delete it"):
        ask(path, ["a"], dict(JOB, lang="th"))
    with pytest.raises(ValueError, match="made with another model"):
        ask(path, ["a"], dict(JOB, model="abd"))
    with pytest.raises(ValueError, match="made with another model"):
        ask(path, ["a"], dict(JOB, model="abd"), replaceable="0" * 16)
    assert path.read_bytes() == before
    assert ask(path, ["a"], dict(JOB, model="abd"), replaceable=job_name(JOB)) == ["a"] and len(rows(path)) == 1
    assert job_name(dict(a=1, b=2)) == job_name(dict(b=2, a=1)) != job_name(dict(a=1, b=3))


def test_two_processes_do_not_write_to_one_file(tmp_path):
    with AnswerFile(tmp_path / "a.jsonl") as file:
        file.begin(JOB, name)
        with pytest.raises(ValueError, match="another process writes to it"):
            AnswerFile(tmp_path / "a.jsonl")
        file.add(image="a", lang="sw")
    assert ask(tmp_path / "a.jsonl", ["a", "b"]) == ["b"]


def test_where_it_cannot_be_written_is_said_at_once_and_nothing_is_left(tmp_path, monkeypatch):
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "a", "folder does not exist")):
        with pytest.raises(ValueError, match=f"--out .*{words}"):
            AnswerFile(path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match="--out .*cannot be written"):
        AnswerFile(tmp_path / "loop")
    (tmp_path / "loop").unlink()
    with pytest.raises(RuntimeError), AnswerFile(tmp_path / "a"):
        raise RuntimeError("the model cannot be loaded")
    assert not list(tmp_path.iterdir())


def test_pipes_and_devices_take_the_lines(tmp_path):
    assert ask("/dev/null", ["a"]) == ["a"] and not Path("/dev/null").is_file()
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    ask(tmp_path / "pipe", ["a", "b"])
    reader.join(10)
    assert [json.loads(line)["image"] for line in got[0].splitlines()] == ["a", "b"]
    with pytest.raises(OSError, match="--out /dev/full: not written .*No space"):
        ask("/dev/full", ["a"])
    code = "from nanomblip.data.answers import AnswerFile\nwith AnswerFile('/dev/stdout') as f: f.begin({}, str); f.add(image='a')"
    with open(tmp_path / "log", "wb") as log:
        log.write(b"other text\n")
        log.flush()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=log, check=True)
    assert (tmp_path / "log").read_bytes().startswith(b'other text\n{"job"')


def test_a_full_disk_costs_the_last_answer_only(tmp_path):
    resource = pytest.importorskip("resource")
    path, old = tmp_path / "a.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
        with pytest.raises(OSError, match="a.jsonl: not written .*answers before are kept: make room.*same command"):
            ask(path, [str(i) for i in range(100)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    kept = rows(path)
    assert 5 < len(kept) < 30 and path.read_bytes().endswith(b"}\n")
    assert ask(path, [str(i) for i in range(100)]) == [str(i) for i in range(len(kept), 100)] and len(rows(path)) == 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_every_finished_line_survives_every_signal(tmp_path, number):
    path = tmp_path / "a.jsonl"
    code = (
        "import sys, time; from nanomblip.flags import run_main; from nanomblip.data.answers import AnswerFile\n"
        "def main(argv):\n"
        "    with AnswerFile(argv[0]) as f:\n"
        "        known = f.begin(dict(lang='sw', model='abc'), lambda row: row['image'])\n"
        "        for i in range(400):\n"
        "            if str(i) not in known: f.add(image=str(i), text='x' * 50_000); time.sleep(0.005)\n"
        "run_main(main)"
    )  # fmt: skip
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=hear_signals)
    deadline = time.time() + 300
    while (path.stat().st_size if path.exists() else 0) < 500_000 and time.time() < deadline:
        time.sleep(0.01)
    child.send_signal(number)
    err = child.communicate()[1]
    assert child.returncode == (130 if number == signal.SIGINT else -number) and b"Traceback" not in err
    assert number != signal.SIGINT or b"the same command goes on" in err
    done = path.read_bytes().count(b"\n")
    assert 9 <= done < 400
    assert ask(path, [str(i) for i in range(400)]) == [str(i) for i in range(done, 400)]
    assert [row["image"] for row in rows(path)] == [str(i) for i in range(400)]


def test_a_fingerprint_tells_models_apart_by_everything_that_answers_depend_on(tmp_path):
    tokenizer, pictures = Tokenizer(DATA / "spiece.model"), ImageConfig(size=64)
    one = lambda model, pictures=pictures: fingerprint(model, tokenizer, pictures)
    assert one(tiny_mblip()) == one(tiny_mblip())
    with_lora, scaled, int8, threshold, touched = (tiny_mblip() for _ in range(5))
    for model, alpha in ((with_lora, 16.0), (scaled, 8.0)):
        torch.manual_seed(0)
        add_lora(model.mt5, "qv", r=2, alpha=alpha)
        assert lora_layers(model)
    for model, value in ((int8, 6.0), (threshold, 5.0)):
        quantize_linears(model.mt5, threshold=value)
    with torch.no_grad():
        touched.proj.bias[0] += 1e-6
    models = [tiny_mblip(), with_lora, scaled, int8, threshold, touched, tiny_mblip(replace(TINY, mt5=replace(TINY.mt5, max_distance=11)))]
    prints = {one(model) for model in models} | {one(tiny_mblip(), ImageConfig(size=64, mean=(0.5, 0.5, 0.5)))}
    assert len(prints) == len(models) + 1


# --------------------------------------------------------------------------------------------------------- shards


def test_a_shard_is_a_flag_or_what_torchrun_says(monkeypatch):
    monkeypatch.delenv("RANK", raising=False), monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Shard.parse("") == Shard(0, 1) and Shard.parse("2/8") == Shard(2, 8) and Shard.parse("merge/8").merge
    monkeypatch.setenv("RANK", "3"), monkeypatch.setenv("WORLD_SIZE", "4")
    assert Shard.parse("") == Shard(3, 4) and Shard.parse("0/2") == Shard(0, 2)
    parts = [Shard(i, 4).of(list(range(10))) for i in range(4)]
    assert parts[1] == [1, 5, 9] and sorted(sum(parts, [])) == list(range(10))
    assert Shard(2, 8).path("out/a.answers.jsonl") == Path("out/a.answers.2-of-8.jsonl")
    assert Shard().path("a.jsonl") == Path("a.jsonl")


@pytest.mark.parametrize("text", ["3/3", "-1/3", "1", "a/b", "1/0", "/", "merge", "merge/0", "1/2/3"])
def test_a_shard_that_there_is_not(text):
    with pytest.raises(ValueError, match="--shard .*give i/n"):
        Shard.parse(text)


def sharded(path, images, count):
    for i in range(count):
        ask(Shard(i, count).path(path), Shard(i, count).of(images))


@pytest.mark.parametrize("images,count", [("abcdefg", 3), ("ab", 4), ("abacab", 2)])
def test_merged_shards_are_the_file_of_one_process(tmp_path, images, count):
    path = tmp_path / "a.jsonl"
    images = list(images)
    for i in range(count):
        with AnswerFile(Shard(i, count).path(path)) as file:
            file.begin(JOB, name)
            for image in Shard(i, count).of(images):  # one that is asked for twice is answered twice
                file.add(image=image, lang="sw", text=image.upper())
    assert merge(path, Shard(0, count, True), images, name) == []
    assert [row["image"] for row in rows(path)] == images
    assert ask(path, images) == []


def test_a_merge_notices_what_is_missing_and_what_is_too_much(tmp_path):
    path, all_of = tmp_path / "a.jsonl", Shard(0, 3, True)
    sharded(path, list("abcdefg"), 3)
    part = tmp_path / "a.1-of-3.jsonl"
    whole = part.read_bytes()

    def fails(words, images="abcdefg"):
        with pytest.raises(ValueError, match=words):
            merge(path, all_of, list(images), name)
        assert not path.exists()

    part.write_bytes(whole[:-1])
    fails("a.1-of-3.jsonl: holds no answer to e")
    assert merge(path, all_of, list("abcdefg"), name, lambda key: key == "e") == ["e"]
    path.unlink()
    part.unlink()
    fails("a.1-of-3.jsonl: holds no answer to b")
    part.write_bytes(b"[]\n" + whole)
    fails("a.1-of-3.jsonl: line 1 is no answer")
    part.write_bytes(whole)
    fails("1 answers to what is not asked", "abcdef")
    part.unlink()
    ask(part, list("be"), dict(lang="sw", model="other"))
    fails("different jobs")
