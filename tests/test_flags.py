"""Flags made from a dataclass, and scripts that end well whatever stands behind stdout and stderr."""

import builtins
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nanomblip.flags import flag, parse_flags, run_main

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config:
    steps: int = flag(10, "steps, 100 % of them", group="the recipe")
    lr: float = flag(0.1, "rate")
    fast: bool = flag(True, "speed")
    kind: str = flag("a", "which", ("a", "b"))
    image: list = flag((), "files", many=True, group="output")


def parse(text):
    return parse_flags(Config, text.split(), "test")


def test_values_have_the_type_of_their_field():
    assert parse("") == Config()
    assert parse("--steps 3 --lr 1e-3 --no_fast --kind b --image x y") == Config(3, 1e-3, False, "b", ["x", "y"])
    assert parse("--lr 1 --fast").lr == 1.0 and isinstance(parse("--lr 1").lr, float)


@pytest.mark.parametrize("text,words", [
    ("--steps x", "--steps"), ("--steps 1.5", "--steps"), ("--kind c", "--kind"), ("--step 3", "did you mean --steps"),
    ("--no-fast", "--no_fast"), ("--fast False", "False"), ("stray", "stray"), ("--zzzzzz", "unknown argument '--zzzzzz'"),
])  # fmt: skip
def test_everything_else_is_one_line_and_status_2(capsys, text, words):
    with pytest.raises(SystemExit) as end:
        parse(text)
    err = capsys.readouterr().err
    assert end.value.code == 2 and words in err and err.count("\n") == 1


def test_help_shows_defaults_and_reasons(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    out = capsys.readouterr().out
    assert "rate (default: 0.1)" in out and "--no_fast" in out and "{a,b}" in out
    recipe, output = out.split("the recipe:")[1].split("output:")
    assert "100 % of them" in recipe and "--kind" in recipe and "--image" in output and "default: ()" not in output


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_is_grouped_and_says_one_thing_a_flag(script):
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, env=os.environ | {"COLUMNS": "400"})
    assert done.returncode == 0 and all(f"\n{name}" in done.stdout for name in ("what to ", "the recipe", "the machine:", "output:"))
    lines = [line.split("  ")[-1] for line in done.stdout.splitlines() if line.startswith("  ") and "--help" not in line]
    assert all(20 > len(line) or len(line) < 260 for line in lines) and not [line for line in lines if "default: )" in line or "None" in line]


def test_a_full_gpu_is_one_line_that_says_what_to_lower(monkeypatch, capsys):
    def main(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        run_main(main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("train.py: error: the memory of the GPU is full: give a smaller --batch")
    assert err.count("\n") == 1
    with pytest.raises(RuntimeError, match="a mistake"):
        run_main(lambda argv: (_ for _ in ()).throw(RuntimeError("a mistake")))


# ------------------------------------------------------------------------------------------------------ terminals

SCRIPT = r"""
import sys
from pathlib import Path
from flags import run_main  # not from the package, which imports torch: these are many processes

def main(argv):
    print("said", file=sys.stderr)
    print("answer \u17a0 \udcff")
    Path(argv[0]).write_text("written")
    if len(argv) > 1:
        raise ValueError("wrong\nflag")
    return 3

run_main(main)
"""


def shell(command, tmp_path, **environ):
    """One call through a real shell: (exit status, stdout, stderr, whether the file was written)."""
    script, target = tmp_path / "script.py", tmp_path / "file"
    script.write_text(SCRIPT)
    target.unlink(missing_ok=True)
    command = command.replace("RUN", f"{sys.executable} {script} {target}")
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT / "nanomblip")} | environ)  # fmt: skip
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    return done.returncode, done.stdout, done.stderr, target.exists()


def test_closed_streams_cost_neither_the_file_nor_the_status(tmp_path):
    assert shell("RUN", tmp_path)[::3] == (3, True)
    assert shell("RUN >&-", tmp_path) == (3, b"", b"said\n", True)
    status, out, err, written = shell("RUN 2>&-", tmp_path)
    assert (status, err, written) == (3, b"", True) and out.startswith(b"answer") and b"said" not in out
    assert shell("RUN >&- 2>&-", tmp_path) == shell("RUN <&- >&- 2>&-", tmp_path) == (3, b"", b"", True)
    assert shell("RUN wrong 2>&-", tmp_path)[::2] == (2, b"") and shell("RUN wrong >&- 2>&-", tmp_path)[0] == 2
    assert shell("RUN wrong >&-", tmp_path)[2] == b"said\nscript.py: error: wrong flag\n"


def test_a_stderr_that_takes_nothing_does_not_end_the_program(tmp_path):
    assert shell("RUN 2>/dev/full", tmp_path)[::3] == (3, True)
    status, _, _, written = shell("RUN 2>&1 >/dev/null | true", tmp_path)  # pipefail: RUN's own status
    assert status == 3 and written
    assert shell("RUN wrong 2>/dev/full", tmp_path)[::3] == (2, True)


def test_a_stdout_that_takes_nothing_is_one_line_and_a_status(tmp_path):
    status, _, err, _ = shell("RUN >/dev/full", tmp_path)
    assert status == 2 and err.splitlines()[-1].startswith(b"script.py: error: ") and b"No space left" in err
    assert shell("RUN | true", tmp_path)[0] in (3, 141)  # whether the text fits into the pipe before it closes


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "ascii:strict", "utf-16"])
def test_every_encoding_shows_what_it_can(tmp_path, encoding):
    status, out, _, written = shell("RUN", tmp_path, PYTHONIOENCODING=encoding)
    assert status == 3 and written and b"\\udcff" in out.replace(b"\0", b"")
    assert encoding == "utf-16" or b"\\u17a0" in out


class Notebook(io.TextIOBase):
    """A stream as a notebook has it: text in, no reconfigure, no number."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)


def test_in_a_notebook_it_returns_and_leaves_the_streams_as_they_were(monkeypatch):
    out, err = Notebook(), Notebook()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)

    def wrong(argv):
        print("answer")
        raise ValueError("no such flag")

    assert run_main(wrong) is None and sys.stderr is err and sys.stdout is out
    assert out.text == "answer\n" and err.text == "script.py: error: no such flag\n"
    assert run_main(lambda argv: parse_flags(Config, ["--step", "3"], "")) is None and "did you mean --steps" in err.text
    monkeypatch.delattr(builtins, "__IPYTHON__")
    with pytest.raises(SystemExit) as end:
        run_main(lambda argv: 7)
    assert end.value.code == 7


def test_run_in_a_real_notebook_shell(tmp_path):
    pytest.importorskip("IPython")
    (tmp_path / "script.py").write_text(SCRIPT)
    code = (
        "import io, sys\n"
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "class Out(io.TextIOBase):\n"
        "    def write(self, text): return sys.__stdout__.write(ascii(text))\n"
        "shell = InteractiveShell.instance()\n"
        "sys.stdout = Out()\n"
        "result = shell.run_cell('%run script.py file')\n"
        "result = shell.run_cell('%run script.py file wrong')\n"
        "sys.stdout = sys.__stdout__\n"
        "print('\\nalive')"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT / "nanomblip")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.stdout.endswith("alive\n") and "Traceback" not in done.stdout + done.stderr and "SystemExit" not in done.stdout + done.stderr
    assert "script.py: error: wrong flag" in done.stderr and (tmp_path / "file").read_text() == "written"
