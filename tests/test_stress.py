"""stress.py itself: a handful of cases of each part go well, and faults planted in the code are noticed."""

import json
import time
from pathlib import Path

import pytest

pytest.importorskip("resource")  # killing, alarms and figures of memory are those of Unix

import stress
import stress_files
import stress_runs
from PIL import Image
from stress_damage import Failure

from nanomblip.training.state import State
from nanomblip.weights import hub, load

# Part -> cases and seed.
HANDFUL = dict(kills=(1, 51), weights=(30, 24), pictures=(60, 1), json=(60, 1), downloads=(4, 1), names=(60, 1), nan=(1, 1))


def run(part, count, seed=1):
    return stress.run_part(part, stress.Config(part=part, count=count, seed=seed))


@pytest.mark.parametrize("part", HANDFUL)
def test_a_handful_of_each_part_goes_well(part):
    figures = run(part, *HANDFUL[part])
    assert figures["failures"] == [] and figures["tried"] == HANDFUL[part][0]
    assert figures["refused"] + figures["identical"] + sum(figures["accepted"].values()) == figures["tried"]


def let_the_parser_speak(patch):
    patch.setattr(load, "read_json", lambda path: json.loads(Path(path).read_text()))


def forget_the_hashes(patch):
    patch.setattr(load, "check_record", lambda folder: None)
    patch.setattr(stress_files, "damage_file", lambda name, data, rng: (data[:-1] + bytes([data[-1] ^ 1]), "number"))


def open_anything(patch):
    patch.setattr(stress_files, "load_image", lambda path: Image.open(path).convert("RGB"))


def join_any_name(patch):
    patch.setattr(stress_files, "image_path", lambda root, name: Path(root, name))


def trust_every_row(patch):
    patch.setattr("nanomblip.data.json_index.check_example", lambda row: None)


def flip_a_byte_at_the_end(patch):
    download = hub.download

    def spoilt(name, folder):
        download(name, folder)
        (folder / "spiece.model").write_bytes(b"other")

    patch.setattr(hub, "download", spoilt)


def restore_less_than_all(patch):
    restore = State.load

    def moved(self):
        step = restore(self)
        next(iter(self.trained.values())).data.add_(1e-3)
        return step

    patch.setattr(State, "load", moved)


def plant_nothing(patch):
    patch.setattr(stress_runs, "plant", lambda *args: None)


@pytest.mark.parametrize("part,fault,count,words", [
    ("weights", let_the_parser_speak, 30, "Error at nanomblip|names no file"), ("weights", forget_the_hashes, 40, "no error"),
    ("pictures", open_anything, 20, "Unidentified"), ("names", join_any_name, 30, "was opened"), ("json", trust_every_row, 60, "Error at nanomblip"),
    ("downloads", flip_a_byte_at_the_end, 1, "not the one of the server"), ("kills", restore_less_than_all, 1, "another model"),
    ("nan", plant_nothing, 1, "status 0"),
])  # fmt: skip
def test_a_planted_fault_is_noticed(monkeypatch, part, fault, count, words):
    fault(monkeypatch)
    found = run(part, count, HANDFUL[part][1])["failures"]
    assert any(word in f["kind"] + f["first"] for f in found for word in words.split("|")), found


def test_hangs_growth_and_exceptions_are_failures_that_can_be_run_again(monkeypatch, tmp_path, capsys):
    held = []

    def bad(folder, notes):
        def case(rng):
            number = rng.random()
            held.append(b"x" * 2_000_000)
            if number < 0.05:
                time.sleep(5)
            if number < 0.1:
                raise KeyError(number)
            if number < 0.2:
                raise Failure("wrong numbers")
            return "identical" if number < 0.6 else "refused" if number < 0.8 else "accepted: luck"

        yield case

    monkeypatch.setitem(stress.PARTS, "weights", (bad, "bad things", 100, 0.1))
    record = tmp_path / "stress.json"
    assert stress.main(["--part", "weights", "--record", str(record)]) == 1
    figures = json.loads(record.read_text())["weights"]
    failures = {f["kind"].split()[0]: f for f in figures["failures"]}
    assert set(failures) == {"Hang", "KeyError", "Failure", "memory"} and figures["grown_mb"] > stress.GROWTH
    assert figures["tried"] == 100 == sum(figures[k] for k in ("refused", "identical")) + figures["accepted"]["luck"] + sum(
        f["count"] for kind, f in failures.items() if kind != "memory")  # fmt: skip
    held.clear()
    capsys.readouterr()
    assert stress.main(["--part", "weights", "--case", str(failures["KeyError"]["case"])]) == 1
    assert "Traceback" in (told := capsys.readouterr()).err and failures["KeyError"]["first"] in told.out
    assert stress.main(["--table", "--record", str(record)]) == 0
    assert "| weights | bad things | 100 |" in capsys.readouterr().out


def test_a_part_stops_when_its_minutes_are_over_and_other_parts_of_the_record_stay(monkeypatch, tmp_path, capsys):
    def slow(folder, notes):
        yield lambda rng: time.sleep(0.05) or "identical"

    monkeypatch.setitem(stress.PARTS, "json", (slow, "slow things", 1000, 1))
    record = tmp_path / "stress.json"
    record.write_text(json.dumps({"names": dict(run("names", 3), tried=7)}))
    assert stress.main(["--part", "json", "--minutes", "0.01", "--record", str(record)]) == 0
    both = json.loads(record.read_text())
    assert both["names"]["tried"] == 7 and 5 < both["json"]["tried"] < 15
    assert "of 1,000" in capsys.readouterr().out


@pytest.mark.parametrize("flags,words", [("--part cats", "cats"), ("--case 3", "--part"), ("--table", "--record")])
def test_flags(flags, words):
    with pytest.raises(ValueError, match=words):
        stress.main(flags.split())
