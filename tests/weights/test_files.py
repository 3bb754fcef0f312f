"""Writing, locking and records on file systems that lack one thing or another; the system's calls are made to fail as they do there."""

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_mblip

from nanomblip.weights import files
from nanomblip.weights.files import RunLock, lock, put_in_place, read_json, save_tensors, write_atomic, write_json
from nanomblip.weights.layout import WeightsError
from nanomblip.weights.load import load_mblip
from nanomblip.weights.records import RECORD, check_record, write_record
from nanomblip.weights.save import save_mblip

ROOT = Path(__file__).resolve().parents[2]


def fail(number, only=lambda *args: True, real=None):
    """A system call that fails with an errno, or where `only` says no works as ever."""

    def call(*args, **kwargs):
        if only(*args):
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    return call


def is_folder(file):
    return os.path.isdir(f"/proc/self/fd/{file}")


@pytest.mark.parametrize("name", ["EINVAL", "EBADF", "EPERM", "ENOTSUP", "ENOSYS", "EIO", "EACCES"])
def test_a_folder_that_cannot_be_synced_is_a_nicety(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files.os, "fsync", fail(getattr(errno, name), is_folder, os.fsync))
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_folder_that_cannot_be_opened_is_one_too(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "open", fail(errno.EACCES, lambda path, *rest: os.path.isdir(path), os.open))  # as on Windows
    write_json(tmp_path / "a.json", 5)
    assert read_json(tmp_path / "a.json") == 5


@pytest.mark.parametrize("name", ["EINVAL", "ENOSYS", "ENOTSUP"])
def test_a_file_system_without_fsync_and_without_permissions(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files.os, "fsync", fail(getattr(errno, name)))
    monkeypatch.setattr(files.Path, "chmod", fail(errno.EPERM))
    write_json(tmp_path / "a.json", 5)
    assert read_json(tmp_path / "a.json") == 5


@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EDQUOT"])
def test_a_disk_that_does_not_take_the_bytes_leaves_the_old_file(tmp_path, monkeypatch, name):
    write_json(tmp_path / "a.json", "old")
    monkeypatch.setattr(files.os, "fsync", fail(getattr(errno, name)))
    with pytest.raises(OSError):
        write_json(tmp_path / "a.json", "new")
    with pytest.raises(WeightsError, match="a.safetensors: not written"):
        save_tensors(tmp_path / "a.safetensors", {}, {})
    assert read_json(tmp_path / "a.json") == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_file_that_another_program_has_open_on_windows(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", "old")

    def replace(old, new):
        raise PermissionError(errno.EACCES, "Access is denied", str(old), 5, str(new))

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(PermissionError, match=r"a.json: cannot be replaced \(.*\); close what has it open") as error:
        write_json(tmp_path / "a.json", "new")
    assert ".tmp" not in str(error.value) and os.listdir(tmp_path) == ["a.json"] and read_json(tmp_path / "a.json") == "old"


def test_devices_and_folders_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match=f"{name}: is a folder or a device"):
            write_json(tmp_path / name, 5)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_a_failed_write_leaves_nothing_and_a_part_gets_its_name(tmp_path):
    def write(path):
        path.write_text("half")
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_atomic(tmp_path / "a", write)
    assert os.listdir(tmp_path) == []
    (tmp_path / ".part").write_text("whole")
    put_in_place(tmp_path / ".part", tmp_path / "a")
    assert (tmp_path / "a").read_text() == "whole" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["ENOSYS", "EOPNOTSUPP", "ENOLCK", "EBADF", "EINVAL"])
def test_where_there_are_no_locks_it_goes_on_without(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files.fcntl, "flock", fail(getattr(errno, name)))
    held = RunLock(tmp_path), RunLock(tmp_path)
    assert all(one.file is not None for one in held)


@pytest.mark.parametrize("name", ["EWOULDBLOCK", "EAGAIN", "EACCES"])
def test_what_somebody_else_holds_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files.fcntl, "flock", fail(getattr(errno, name)))
    with pytest.raises(ValueError, match="another process"):
        RunLock(tmp_path)
    with open(tmp_path / "a", "w") as file, pytest.raises(BlockingIOError):
        lock(file.fileno())


def test_on_windows_nothing_is_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    assert RunLock(tmp_path).file is None and RunLock(tmp_path).file is None


def test_a_model_on_a_read_only_place_with_new_times_is_hashed_and_used(tmp_path, monkeypatch):
    save_mblip(tiny_mblip(), tmp_path, image_token=66)
    sha = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")}
    write_record(tmp_path, sha, dict(repository="a/b"))
    for name in sha:
        os.utime(tmp_path / name, (1, 1))
    before = (tmp_path / RECORD).read_bytes()
    with monkeypatch.context() as patch:
        for call in ("replace", "open"):
            patch.setattr(files.os, call, fail(errno.EROFS))
        patch.setattr(files.Path, "write_text", fail(errno.EROFS))
        load_mblip(tmp_path)
        assert (tmp_path / RECORD).read_bytes() == before and sorted(os.listdir(tmp_path)) == sorted([*sha, RECORD])
        data = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(WeightsError, match="sha256"):
            load_mblip(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(data)
    check_record(tmp_path)  # writable again: the new times are noted
    assert (tmp_path / RECORD).read_bytes() != before


def test_a_forked_child_does_not_keep_the_lock_of_a_parent_that_died(tmp_path):
    """The kernel gives a lock back when its last copy is closed; a loader worker that outlives its parent has one."""
    code = (
        "import os, sys, time; from nanomblip.weights.files import RunLock\n"
        "lock = RunLock(sys.argv[1])\n"
        "if os.fork() == 0:\n"
        "    RunLock.drop_copies(); print(os.getpid(), flush=True); time.sleep(60)\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child = int(parent.stdout.readline())
    try:
        with pytest.raises(ValueError, match="another process"):
            RunLock(tmp_path)
        parent.kill()
        parent.wait()
        RunLock(tmp_path)
    finally:
        os.kill(child, 9)
