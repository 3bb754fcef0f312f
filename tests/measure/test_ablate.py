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

from nanomblip.data.emoji import HELD_OUT_LANGS
from nanomblip.measure import ablate
from nanomblip.measure.ablate import record_name
from nanomblip.measure.ablation_suites import (
    BEGIN,
    END,
    EXPERIMENTS,
    SUITES,
    TASKS,
    Config,
    find_current,
    find_record,
    flags_of,
    read_records,  # fmt: skip
    resolved,
    same_run,
    setting_of,
    settings_of,
)
from nanomblip.measure.ablation_tables import tables, verdict, write_tables
from nanomblip.training.config import MACHINE

ROOT = Path(__file__).resolve().parents[2]


def test_every_suite_of_the_paper_is_there_and_every_experiment_is_known():
    asked = {row.removesuffix("+mask") for suite in SUITES.values() for row in suite.rows}
    assert asked == set(EXPERIMENTS) and len(SUITES) >= 10
    for suite in SUITES.values():
        assert suite.expect in ("lower", "higher", "same") and suite.claim and len(suite.rows) >= 2
    for name in EXPERIMENTS:
        config = resolved(flags_of(name, 3, Config(steps=7)))
        assert config["seed"] == 3 and config["steps"] == 7 and not set(config) & set(MACHINE)
    assert resolved(flags_of("english-only", 0, Config()))["lang_mix"] == "en"


@pytest.mark.parametrize("flags", [dict(seeds=0), dict(steps=-1), dict(limit=0), dict(suite="dance"), dict(suite="tasks,")])
def test_bad_flags(flags):
    with pytest.raises(ValueError, match="--"):
        Config(**flags)


def record(experiment, seed, cfg, value, trained=1000, seconds=10.0):
    """A record as `run` makes it, with one value for every measure that a suite asks for."""
    groups = {group: {metric: value for metric in ("exact", "chrf", "in_language")} for group in ("all other", "resources: low", "held-out eight")}
    measures = {what: groups for what in TASKS.get(experiment, ("caption",))}
    return dict(experiments=same_run(experiment, seed, cfg), setting=setting_of(cfg), seed=seed, config=resolved(flags_of(experiment, seed, cfg)),
                seconds=seconds, trained_parameters=trained, final_loss=1.0, torch="x", threads=1, measures=measures)  # fmt: skip


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
    put(cfg, {"baseline": [0.30, 0.32, 0.34], "qformer-frozen": [0.10, 0.11, 0.12], "data-10": [0.31], "data-1": [0.33, 0.31, 0.35]})
    assert ablate.main(["--suite", cfg.suite, "--records", cfg.records, "--readme", cfg.readme, "--table"]) == 0
    text = Path(cfg.readme).read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n") and "old" not in text and capsys.readouterr().out.strip() in text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ") and "experiment" not in line}
    sd = 100 * statistics.stdev([0.30, 0.32, 0.34])
    assert rows["qformer-frozen"] == f"| qformer-frozen | 1,000 | 3 | 11.0 ± {100 * statistics.stdev([0.10, 0.11, 0.12]):.1f} | -21.0 | agrees |"
    assert f"| 32.0 ± {sd:.1f} | - | reference |" in rows["baseline"] and "single seed" in rows["data-10"] and "one seed: open" in rows["data-10"]
    assert "+1.0 | not significant" in rows["data-1"] and "baseline+mask" in rows
    again = Path(cfg.readme).read_bytes()
    write_tables(cfg)
    assert Path(cfg.readme).read_bytes() == again, "twice the same"
    put(cfg, {"qformer-frozen": [0.50, 0.51, 0.52]})
    assert "disagrees" in tables(cfg, setting_of(cfg), read_records(cfg.records))  # a disagreement stays in the table


def test_a_suite_by_groups_has_a_second_table(cfg):
    put(cfg, {"baseline": [0.3, 0.32], "names-by-nano": [0.2, 0.22]})
    text = tables(replace(cfg, suite="translation"), setting_of(cfg), read_records(cfg.records))
    assert "| experiment | all other | resources: low | held-out eight |" in text and "| names-by-nano | 21.0 | 21.0 | 21.0 |" in text
    assert text.count("| name-errors-30") == 1 and "| names-by-nano | 1,000 | 2 | 21.0" in text and "not run" in text


def test_names_by_nano_are_made_before_the_run_that_needs_them(cfg, monkeypatch, tmp_path):
    def call(words, log):
        assert words[0] == "-m" or words[words.index("--names") + 1] == str(tmp_path / "out" / "nano-names.json"), words
        called.append(words)
        if words[0] != "-m":
            raise KeyboardInterrupt

    for experiment in ("names-by-nano", "name-errors-30"):
        called = []
        monkeypatch.setattr(ablate, "call", call if experiment == "names-by-nano" else lambda words, log: called.append(words) or 1 / 0)
        with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
            ablate.run(experiment, 0, cfg, "de,sw")
        made = [words for words in called if words[0] == "-m"]
        assert len(made) == (experiment == "names-by-nano") and all("nanomblip.data.translate" in words and "--every" in words for words in made)
    assert "0.3" in called[0] and resolved(flags_of("name-errors-30", 0, cfg))["name_errors"] == 0.3


def test_what_was_not_run_is_in_the_table_as_such(cfg):
    text = tables(replace(cfg, suite="paper"), "", [])
    assert text.count("not run") == sum(len(suite.rows) for suite in SUITES.values())


def test_verdicts():
    """A difference counts with its sign, twice its standard error and a smallest size, in percentage points."""
    one, lower, near = [1, 1.1, 0.9], [0.5, 0.6, 0.4], [0.98, 0.981, 0.979]
    assert verdict(one, lower, "lower", 3) == "agrees" and verdict(one, lower, "higher", 3) == verdict(one, lower, "same", 3) == "disagrees"
    assert verdict(one, lower, "lower", 60) == "below 60 points" and verdict(one, lower, "same", 60) == "agrees"
    assert verdict([1, 1, 1], near, "lower", 1) == "agrees" and verdict([1, 1, 1], near, "lower", 3) == "below 3 points"
    assert verdict(one, near, "lower", 1) == "not significant" and verdict(one, near, "same", 1) == "agrees"
    assert verdict([1], [0, 0], "lower", 1) == verdict([1, 1], [0], "lower", 1) == "one seed: open"
    assert verdict([0, 0, 0], [0, 0, 0], "lower", 0) == "not significant"


def test_a_record_counts_for_all_experiments_with_its_flags_and_is_stale_when_a_default_changes(cfg):
    put(cfg, {"baseline": [0.3]})
    records, setting = read_records(cfg.records), setting_of(cfg)
    assert {"baseline", "captions-only", "lora-all", "fp32", "qformer-slow"} <= set(records[0]["experiments"]) and "int8" not in records[0]["experiments"]
    assert find_current("fp32", 0, cfg, records) and find_record("fp32", 0, setting, records) and find_current("baseline", 1, cfg, records) is None
    assert find_current("projection-only", 0, cfg, records) is None
    for other in (replace(cfg, steps=5), replace(cfg, limit=5), replace(cfg, extra="--redraw 0")):
        assert find_current("baseline", 0, other, records) is None and find_record("baseline", 0, setting_of(other), records) is None
    records[0]["config"]["lr"] = 0.5  # a default that has changed since: to be run again, and still in the table
    assert find_current("baseline", 0, cfg, records) is None and find_record("baseline", 0, setting, records)
    names = {record_name("baseline", 0, c) for c in (cfg, replace(cfg, steps=5), replace(cfg, limit=3), replace(cfg, extra="--lr 1"))}
    assert len(names) == 4 and "baseline.0.json" in names


def test_the_readmes_tables_follow_from_the_committed_records():
    """Those with the most records of one setting are shown."""
    records = read_records(ROOT / "notebooks" / "records")
    text = (ROOT / "notebooks/records/README.md").read_text(encoding="utf-8")
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert shown == tables(Config(), settings_of(records)[0], records).strip()


def test_damaged_records_and_missing_markers_are_named(cfg, tmp_path):
    Path(cfg.readme).write_text("no markers")
    with pytest.raises(ValueError, match="needs the lines"):
        write_tables(cfg)
    (Path(cfg.records) / "x.json").write_text('{"experiments": ["baseline"]}')
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


@pytest.mark.slow
def test_a_killed_suite_ends_with_the_same_records(tmp_path):
    """Real training processes, the suite killed (-9 or by signal) at a random moment, against an undisturbed one."""
    (tmp_path / "driver.py").write_text(DRIVER)
    extra = "--init random --lang_mix de,sw --data_share 0.05 --batch 2 --save_every 0 --lr_warmup 0"
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
