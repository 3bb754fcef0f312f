"""state.py: logs that survive a kill, states that survive damage, one process a run."""


import pytest
import torch

from nanomblip.data.folder import pick_device
from nanomblip.training.state import Log, State
from nanomblip.weights.files import RunLock


def test_a_log_is_whole_on_disk_as_soon_as_it_is_open(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,0.5\n2,0.25\n3,0.1")
    log = Log(path, ("step", "loss"), 2)  # nothing is closed or flushed: a process killed here must leave this behind
    assert path.read_text().split() == ["step,loss", "1,0.5", "2,0.25"]
    log.add(3, 0.2)
    assert path.read_text().split()[-1] == "3,0.2" and log.recent_mean(1, 2) == pytest.approx(0.225)


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


def test_the_memory_of_one_stage_is_not_given_to_the_next(tmp_path):
    model = torch.nn.Linear(3, 2)
    one, other = (torch.optim.AdamW(model.parameters()) for _ in range(2))
    model(torch.ones(1, 3)).sum().backward()
    one.step()
    State(tmp_path, model, [one]).save(5, 1.5)
    for stage, kept in ((0, True), (1, False)):
        state = State(tmp_path, model, [])
        assert state.load() == (5, 1.5)
        other.state.clear()
        state.use([other], stage)
        assert bool(other.state) == kept and (not kept or torch.equal(other.state[model.weight]["exp_avg"], one.state[model.weight]["exp_avg"]))


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr("nanomblip.data.folder.find_spec", lambda name: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == torch.device("cuda") and taken == [1]
    said = capsys.readouterr().err
    assert said.startswith("bitsandbytes is not installed") and said.count("\n") == 1
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 3 of this machine, which has 2 GPUs: --nproc_per_node 2"):
        pick_device("cuda")
    assert pick_device("cpu") == torch.device("cpu") and taken == [1]
