"""weights/diagnose.py: the probe on data whose answer is known, and both tables of a few concepts."""

import importlib.util
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanomblip.data.emoji import load_emoji

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("diagnose", ROOT / "weights" / "diagnose.py")
diagnose = importlib.util.module_from_spec(spec)
spec.loader.exec_module(diagnose)


def test_the_probe_reads_what_is_linear_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(5, 12, generator=generator)  # one a class
    y = {split: torch.arange(5).repeat(n) for split, n in dict(train=40, validation=10, test=20).items()}
    noise = {split: torch.randn(len(of), 12, generator=generator) for split, of in y.items()}
    seen = diagnose.probe({split: 3 * direction[of] + noise[split] + 7 for split, of in y.items()}, y, 5)
    assert seen.keys() == {"validation", "test"} and seen["test"] > 0.95
    assert 0.05 < diagnose.probe(noise, y, 5)["test"] < 0.4, "chance is 0.2"


def test_both_tables_of_what_is_shipped(monkeypatch, tmp_path, capsys):
    emoji = load_emoji("core")
    held_out = Counter(emoji.cells[p][0] for p in emoji.cells_in("test"))
    concepts = tuple(c for c in emoji.concepts if held_out[c] and any((c, artist) in emoji.cells for artist in ("openmoji", "streamline")))[:30]
    kept = [p for p, (concept, _) in enumerate(emoji.cells) if concept in concepts]
    few = replace(emoji, concepts=concepts, cells=[emoji.cells[p] for p in kept], pictures=emoji.pictures[kept])
    monkeypatch.setattr(diagnose, "load_emoji", lambda _: few)
    out = tmp_path / "diagnosis.json"
    assert diagnose.main(["--names", "2", "--out", str(out)]) == 0
    record, printed = json.loads(out.read_text()), capsys.readouterr().out
    for name, row in record["english"].items():
        assert set(row) == {"validation", *diagnose.SPLITS}
        line = next(line for line in printed.splitlines() if line.startswith(name.ljust(24)))
        assert [f"{100 * row[split]:.1f}" for split in diagnose.SPLITS] == line[24:].split()
    rows = record["english"]
    assert all(rows[name]["pictures"] > 10 / len(concepts) for name in ("vit", "qformer", "nearest")), "chance is 1/30"
    assert 0 < rows["cosine"]["openmoji"] < rows["cosine"]["pictures"] < 1
    losses = record["losses"]
    assert losses["right name"] < losses["held-out picture"] < losses["another picture"] and losses["training picture"] < 1 < losses["another name"]


def test_the_model_cards_tables_are_those_of_the_record():
    record = json.loads((ROOT / "weights" / "records" / "diagnosis.json").read_text())
    part = (ROOT / "weights/README.md").read_text(encoding="utf-8").split("Where it is lost")[1].split("## Known failures")[0]
    cells = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    loss = {name: f"{value:.2f}" for name, value in record["losses"].items()}
    assert [row[1] for row in cells[1:5]] == [loss["right name"], f"{loss['training picture']}, {loss['held-out picture']}", loss["another picture"], loss["another name"]]
    percent = lambda name, digits: [f"{100 * record['english'][name][split]:.{digits}f}" for split in diagnose.SPLITS]
    assert [row[1:] for row in cells[6:]] == [percent("vit", 0), percent("qformer", 0), percent("nearest", 0), percent("written", 1)]


@pytest.mark.parametrize("flags,message", [("--names 0", "--names 0"), ("--model nowhere", "nowhere"), ("--vision weights/nano/mt0", "config.json")])
def test_wrong_flags_say_what_is_wrong(flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((ValueError, OSError), match=message):
        diagnose.main(flags.split())
