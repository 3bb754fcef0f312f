"""gpu_check.py: its parts, on the CPU and at small sizes; no number of a GPU comes from here."""

from dataclasses import replace

import gpu_check
import pytest
import torch
from conftest import TINY

CPU = torch.device("cpu")


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main() == 0 and "there is no GPU here" in capsys.readouterr().out


def test_a_fault_is_counted(capsys):
    table = gpu_check.Table()
    table("a", 1.0), table("b", 1.0, most=1.0), table("c", 1.0, least=1.0)
    assert table.faults == 0
    table("d", 1.1, most=1.0), table("e", 0.9, least=1.0), table("f", float("nan"), most=1.0), table("g", float("nan"))
    assert table.faults == 4 and capsys.readouterr().out.count("FAULT") == 4


def test_the_parts_run_and_find_no_fault_where_there_is_none(capsys):
    table = gpu_check.Table()
    gpu_check.compare_nano(table, CPU, 3)
    gpu_check.compare_int8(table, CPU, 64, 96)
    gpu_check.full_size(table, CPU, replace(TINY, mt5=replace(TINY.mt5, dropout=0.0)), 2, (5, 4))
    out = capsys.readouterr().out
    assert table.faults == 0 and len(out.splitlines()) == 3 + 6 + 7


def test_another_result_is_a_fault(monkeypatch):
    table = gpu_check.Table()
    load = gpu_check.load_mblip
    models = []

    def touched(folder):
        models.append(load(folder))
        if len(models) == 2:
            models[1].proj.bias.data += 0.5
        return models[-1]

    monkeypatch.setattr(gpu_check, "load_mblip", touched)
    gpu_check.compare_nano(table, CPU, 2)
    assert table.faults >= 2


@pytest.mark.slow
def test_the_default_run_is_started_and_read():
    table = gpu_check.Table()
    gpu_check.default_run(table, "--steps", "2", "--batch", "4", "--views", "1", "--eval_pictures", "1", least=0)
    assert table.faults == 0
