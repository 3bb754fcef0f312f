"""The ablation runner: records decide what is run, a killed suite ends like an undisturbed one, tables follow from records."""

import json
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import train
from nanomblip.data.emoji import HELD_OUT_LANGS
from nanomblip.measure import ablate
from nanomblip.measure.ablate import record_name
from nanomblip.measure.ablation_suites import (BEGIN, END, EXPERIMENTS, SUITES, TASKS, Config, configs_of, find_record, flags_of,
                                              read_records, resolved)  # fmt: skip
from nanomblip.measure.ablation_tables import tables, verdict, write_tables

ROOT = Path(__file__).resolve().parents[2]
AVAILABLE = [name for name in EXPERIMENTS if not name.startswith(("lora", "int8", "fp32"))]


def test_every_suite_of_the_paper_is_there_and_every_experiment_is_known():
    asked = {row.removesuffix("+mask") for suite in SUITES.values() for row in suite.rows}
    assert asked == set(EXPERIMENTS) and len(SUITES) >= 10
    for suite in SUITES.values():
        assert suite.expect in ("lower", "higher", "same") and suite.claim and len(suite.rows) >= 2
    for name in AVAILABLE:
        config = resolved(flags_of(name, 3, Config(steps=7)))
        assert config["seed"] == 3 and config["steps"] == 7 and not set(config) & set(train.MACHINE)
    assert resolved(flags_of("english-only", 0, Config()))["lang_mix"] == "en"


def test_flags_that_train_does_not_have_are_named(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "baseline", "--dance 3")
    with pytest.raises(ValueError, match="train.py has no flag --dance"):
        flags_of("baseline", 0, Config())


@pytest.mark.parametrize("flags", [dict(seeds=0), dict(steps=-1), dict(limit=0), dict(suite="dance"), dict(suite="tasks,")])
def test_bad_flags(flags):
    with pytest.raises(ValueError, match="--"):
        Config(**flags)


def record(experiment, seed, cfg, value, trained=1000, seconds=10.0):
    """A record as `run` makes it, with one value for every measure that a suite asks for."""
    measures = {what: {group: {"chrf": value, "exact": value, "in_language": value} for group in ("all other", "resources: low", "held-out eight")}
                for what in TASKS.get(experiment, ("caption",))}  # fmt: skip
    return dict(experiment=experiment, seed=seed, limit=cfg.limit, config=resolved(flags_of(experiment, seed, cfg)), seconds=seconds, parameters=5000,
                trained_parameters=trained, final_loss=1.0, torch="x", threads=1, measures=measures)  # fmt: skip


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    (tmp_path / "records").mkdir()
    return Config(suite="qformer,data,mask", records=str(tmp_path / "records"), readme=str(tmp_path / "README.md"), out=str(tmp_path / "out"))


def put(cfg, values, **more):
    for experiment, of_seeds in values.items():
        for seed, value in enumerate(of_seeds):
            path = Path(cfg.records) / record_name(experiment, seed, cfg)
            path.write_text(json.dumps(record(experiment, seed, cfg, value, **more)))


def test_the_numbers_of_the_table_follow_from_the_records(cfg, tmp_path, capsys):
    put(cfg, {"baseline": [0.30, 0.32, 0.34], "projection-only": [0.10, 0.11, 0.12], "data-10": [0.31], "data-1": [0.33, 0.31, 0.35]})
    assert ablate.main(["--suite", cfg.suite, "--records", cfg.records, "--readme", cfg.readme, "--table"]) == 0
    text = Path(cfg.readme).read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n") and "old" not in text and capsys.readouterr().out.strip() in text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ") and "experiment" not in line}
    sd = 100 * statistics.stdev([0.30, 0.32, 0.34])
    assert rows["projection-only"] == f"| projection-only | 1,000 | 10 | 3 | 11.0 ± {100 * statistics.stdev([0.10, 0.11, 0.12]):.1f} | -21.0 | agrees |"
    assert f"| 32.0 ± {sd:.1f} | - | reference |" in rows["baseline"] and "single seed" in rows["data-10"] and "one seed: open" in rows["data-10"]
    assert "+1.0 | no difference seen" in rows["data-1"] and "baseline+mask" in rows
    assert (tmp_path / "records" / "ablations.png").stat().st_size > 5000 and "records/ablations.png" in text
    again = Path(cfg.readme).read_bytes()
    write_tables(cfg)
    assert Path(cfg.readme).read_bytes() == again, "twice the same"
    put(cfg, {"projection-only": [0.50, 0.51, 0.52]})
    assert "disagrees" in tables(cfg, read_records(cfg.records))  # a disagreement stays in the table


def test_what_was_not_run_is_in_the_table_as_such(cfg):
    text = tables(replace(cfg, suite="paper"), [])
    assert text.count("not run") == sum(len(suite.rows) for suite in SUITES.values())


def test_verdicts():
    assert verdict([1, 1.1, 0.9], [0.5, 0.6, 0.4], "lower") == "agrees" and verdict([1, 1.1, 0.9], [0.5, 0.6, 0.4], "higher") == "disagrees"
    assert verdict([1, 1.1, 0.9], [1, 1.05, 1.0], "same") == "agrees" and verdict([1, 1.1, 0.9], [1, 1.05, 1.0], "lower") == "no difference seen"
    assert verdict([1], [0, 0], "lower") == verdict([1, 1], [0], "lower") == "one seed: open"
    assert verdict([0, 0, 0], [0, 0, 0], "lower") == "no difference seen"


def test_a_record_counts_for_its_config_whatever_its_name_and_no_longer_when_a_default_changes(cfg, monkeypatch):
    put(cfg, {"baseline": [0.3]})
    records = read_records(cfg.records)
    assert find_record("baseline", 0, cfg, records) and find_record("baseline", 1, cfg, records) is None
    monkeypatch.setitem(EXPERIMENTS, "twin", "--tasks caption")  # the default, spelled out
    assert find_record("twin", 0, cfg, records)["experiment"] == "baseline"
    assert find_record("projection-only", 0, cfg, records) is None
    assert find_record("baseline", 0, replace(cfg, steps=5), records) is None and find_record("baseline", 0, replace(cfg, limit=5), records) is None
    del records[0]["config"]["data_share"]  # a flag that train.py did not have then: it stands at its default now
    assert find_record("baseline", 0, cfg, records) and find_record("data-10", 0, cfg, records) is None
    del records[0]["config"]["redraw"]  # before it had this one, it did not redraw
    assert find_record("baseline", 0, cfg, records) is None and find_record("baseline", 0, replace(cfg, extra="--redraw 0"), records)
    records[0]["config"]["lr"] = 0.5  # a default that has changed since
    assert find_record("baseline", 0, cfg, records) is None
    names = {record_name("baseline", 0, c) for c in (cfg, replace(cfg, steps=5), replace(cfg, limit=3), replace(cfg, extra="--lr 1"))}
    assert len(names) == 4 and "baseline.0.json" in names


def test_the_suites_of_a_folder_of_records_are_found_from_the_records_alone():
    """The most frequent configuration comes first, its records are found with it, and no flag of an experiment counts as an extra one."""
    cuts = [Config(steps=7, limit=3, extra="--checkpointing --lr 0.5 --tasks 'caption:2, match'", seeds=4), Config(), Config(steps=7)]
    runs = [[("projection-only", 3), ("int8", 0), ("random-qformer", 1), ("task-mixture", 0)], [("baseline", 0), ("data-1", 1)], [("mc4", 0)]]
    records = [record(name, seed, cfg, 0.5) for cfg, pairs in zip(cuts, runs) for name, seed in reversed(pairs)]
    configs = configs_of(records)
    assert [(c.steps, c.limit, c.seeds) for c in configs] == [(7, 3, 4), (0, 20, 3), (7, 20, 3)] and configs[1].extra == configs[2].extra == ""
    for found, pairs in zip(configs, runs):
        for name, seed in pairs:
            assert find_record(name, seed, found, records)["experiment"] == name
        others = [pair for of_other in runs if of_other is not pairs for pair in of_other]
        assert all(find_record(*pair, found, records) is None for pair in others)
    assert configs_of([]) == []
    with pytest.raises(ValueError, match="'dance', which is no experiment"):
        configs_of([records[0] | {"experiment": "dance"}])


def test_damaged_records_and_missing_markers_are_named(cfg, tmp_path):
    Path(cfg.readme).write_text("no markers")
    with pytest.raises(ValueError, match="needs the lines"):
        write_tables(cfg)
    (Path(cfg.records) / "x.json").write_text('{"experiment": "baseline"}')
    with pytest.raises(ValueError, match="x.json: not a record"):
        read_records(cfg.records)


def test_a_record_is_small_and_has_the_held_out_eight(tmp_path):
    metric = lambda x: dict(mean=x, low=0, high=1, languages=1)
    row = lambda x: dict(languages=1, n=20, exact=metric(x), chrf=metric(x / 2))
    (tmp_path / "e.json").write_text(json.dumps(dict(groups={"all other": row(0.123456789)}, languages={lang: row(i) for i, lang in enumerate(HELD_OUT_LANGS)})))
    got = ablate.measured(tmp_path / "e.json")
    assert got == {"all other": {"exact": 0.12346, "chrf": 0.06173}, "held-out eight": {"exact": 3.5, "chrf": 1.75}}


DRIVER = """
from dataclasses import replace
from types import SimpleNamespace
from nanomblip.measure import ablate, ablation_suites
ablation_suites.SUITES = {"qformer": replace(ablation_suites.SUITES["qformer"], rows=("projection-only",))}
ablation_suites.TASKS.clear()
ablate.load_emoji = lambda concepts: SimpleNamespace(langs=("de", "sw"))
ablate.run_main(ablate.main)
"""


def test_a_killed_suite_ends_with_the_same_records(tmp_path):
    """Real training processes, the suite killed (-9 or by signal) at a random moment, against an undisturbed one."""
    (tmp_path / "driver.py").write_text(DRIVER)
    extra = "--init random --lang_mix de,sw --batch 2 --views 0 --save_every 0 --warmup 0"
    flags = lambda name: [sys.executable, "driver.py", "--suite", "qformer", "--seeds", "1", "--steps", "5", "--limit", "2", "--extra", extra,
                          "--records", f"{name}/records", "--out", f"{name}/runs"]  # fmt: skip
    env = dict(PYTHONPATH=str(ROOT), PATH="/usr/bin:/bin", OMP_NUM_THREADS="1", HOME=str(tmp_path))
    start = lambda name: subprocess.Popen(flags(name), cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    whole, began = start("whole"), time.time()
    out, _ = whole.communicate()
    took = time.time() - began
    assert whole.returncode == 0 and "1 of 1 done" in out and "now projection-only" in out, out
    rng = random.Random(time.time_ns())
    killed, began = start("cut"), time.time()
    moment = rng.uniform(0, took)
    while killed.poll() is None and time.time() - began < moment:
        time.sleep(0.1)
    killed.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
    killed.communicate()
    again = start("cut")
    out, _ = again.communicate()
    assert again.returncode == 0 and "1 of 1 done" in out, out

    def told(name):
        records = [json.loads(path.read_text()) for path in sorted((tmp_path / name / "records").glob("*.json"))]
        return [{k: v for k, v in r.items() if k not in ("seconds", "threads")} for r in records]

    assert told("cut") == told("whole") and len(told("whole")) == 1
    assert told("whole")[0]["measures"]["caption"]["all other"].keys() >= {"exact", "chrf", "in_language", "script"}
    assert all(path.stat().st_size < 6000 for path in (tmp_path / "whole" / "records").glob("*.json"))
    assert not [path for path in (tmp_path / "cut" / "runs").iterdir() if path.is_dir()], "runs are deleted when their record is written"
    done = start("cut")
    out, _ = done.communicate()
    assert done.returncode == 0 and "1 of 1 runs are done, 0 are missing" in out
