"""The notebooks: what is committed fits its sources and is clean; each runs, and each claim in its text holds."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))

import build  # noqa: E402
import lib  # noqa: E402

SOURCES = sorted((ROOT / "notebooks/src").glob("*.md"))
LARGEST = 1_500_000  # bytes
ABSOLUTE = re.compile(r"""(?:^|[\s"'(=:>])(?:/(?:root|home|tmp|var|work|mnt|opt|usr|Users|private)/|[A-Z]:\\)""", re.M)

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)


def committed(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / f"notebooks/{path.stem}.ipynb", as_version=4)


def code_of(cells) -> list[str]:
    return [cell.source for cell in cells if cell.cell_type == "code"]


def test_every_source_has_its_notebook_its_row_and_its_thumbnail():
    readme = (ROOT / "notebooks/README.md").read_text(encoding="utf-8")
    names = {path.stem for path in SOURCES}
    assert names == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert names == {path.stem for path in (ROOT / "notebooks/thumbnails").glob("*.png")}
    assert names <= set(re.findall(r"\]\((\w+)\.ipynb\)", readme)) and names == set(
        re.findall(r"thumbnails/(\w+)", readme)
    )


@each_source
def test_what_is_committed_is_what_the_source_says(path):
    """Code is the same to the letter; text is, with any value in the place of a number."""
    cells = build.parse(path.read_text(encoding="utf-8"), path.stem)
    of_source = [cell for cell in cells if "solution" not in cell.metadata.get("tags", ())]
    stored = [cell for cell in committed(path).cells if "solution" not in cell.metadata.get("tags", ())]
    assert code_of(of_source) == code_of(stored), f"run: python notebooks/build.py --names {path.stem}"
    text = lambda cells: [cell.source for cell in cells if cell.cell_type == "markdown"]
    for wanted, found in zip(text(of_source), text(stored), strict=True):
        parts = [re.escape(part) for part in build.NUMBER.split(build.CLAIM.sub("", wanted))[::2]]
        assert re.fullmatch(".+?".join(parts), found, re.S), f"build it again: {wanted[:80]}"
        assert not build.NUMBER.search(found) and "claim:" not in found


@each_source
def test_what_is_committed_is_clean(path):
    notebook = committed(path)
    nbformat.validate(notebook)
    assert (ROOT / f"notebooks/{path.stem}.ipynb").stat().st_size < LARGEST
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for number, cell in enumerate(code, 1):
        assert not re.search(r"^class \w+\(.*Module\)", cell.source, re.M), f"cell {number}: models are in nanomblip"
        for output in cell.outputs:
            assert output.output_type != "error", f"cell {number}: {output.get('evalue')}"
            assert output.get("name") != "stderr", f"cell {number} wrote to stderr"
            said = json.dumps({k: v for k, v in output.get("data", {}).items() if k != "image/png"}, ensure_ascii=False)
            said = (said + output.get("text", "")).replace("\\n", "\n")
            assert not ABSOLUTE.search(said), f"cell {number} shows a path of the machine it ran on"
            if "image/png" in output.get("data", {}):
                assert output.metadata["image/png"]["alt"], f"cell {number}: a figure without a text for it"


def test_interactive_cells_are_pictures_where_no_kernel_runs():
    """Stored is what was drawn once: a PNG with its text, and no widget that needs a kernel."""
    found = []
    for path in SOURCES:
        notebook = committed(path)
        assert "widgets" not in notebook.metadata
        for cell in notebook.cells:
            if cell.cell_type == "code" and re.search(r"^interact\(", cell.source, re.M):
                kinds = [set(output.get("data", ())) for output in cell.outputs if output.output_type == "display_data"]
                assert kinds == [{"image/png", "text/plain"}]
                found.append(path.stem)
    assert found == ["00_tour", "05_gluing"]


@each_source
def test_each_is_a_lesson(path):
    text = path.read_text(encoding="utf-8")
    numbered = not path.stem.startswith("E")
    wanted = ["**Predict.**", "**What you see.**", "**Exercise.**", "$$"]
    for mark in wanted + (["## Summary", "After this notebook", "*Needs:*", "*Next:*"] if numbered else []):
        assert mark in text, mark
    assert not re.search(r"\bExpect\b", build.FENCE.sub("", text)), "say what came out"
    for seen in re.split(r"^(?=#)|(?=\*\*Exercise)", text, flags=re.M):
        if "What you see." in seen:
            assert build.CLAIM.search(seen), f"no claim is compared: {seen[:100]}"
    kinds = [kind for kind, _ in build.FENCE.findall(text)]
    assert kinds.count("exercise") == kinds.count("solution") and kinds.count("thumbnail") == 1


def test_links_lead_somewhere():
    for path in (*SOURCES, ROOT / "notebooks/README.md"):
        here = ROOT / "notebooks"  # sources are read as the notebooks that they become
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (here / link).exists(), f"{path.name}: {link}"


SMALL = """# A title

```python
small, large = 1, 2
```

It is {=large:.1f=}. One is smaller. <!-- claim: small < large --> Three is {=small=}? <!-- claim: small == 3 -->

```python exercise
answer = ...
lib.check("the sum", answer, 3)
```

```python solution
answer = small + large
lib.check("the sum", answer, 3)
```
"""


def test_a_claim_that_does_not_hold_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    built = build.execute("small", build.parse(SMALL, "small"))
    assert len(built.problems) == 1
    assert (
        "small, cell" in built.problems[0] and "Three is 1?" in built.problems[0] and "small = 1" in built.problems[0]
    )
    assert "It is 2.0. One is smaller. Three is 1?" in built.cells[3].source
    course, student, teacher = (built.notebook(name) for name in ("course", "student", "teacher"))
    assert "the sum: still blank" in course.cells[4].outputs[0].text
    assert "<details>" in course.cells[5].source and "the sum: right" in course.cells[5].source
    assert len(student.cells) == len(course.cells) - 1 and teacher.cells[5].cell_type == "code"
    wrong = build.execute("small", build.parse(SMALL.replace("small + large", "4"), "small"))
    assert any("the solution is wrong" in problem for problem in wrong.problems)
    broken = build.execute("small", build.parse(SMALL.replace("= 1, 2", "= 1, None, 0"), "small"))
    assert "the cell failed" in broken.problems[0]


def test_the_cell_for_colab_comes_first_and_does_nothing_elsewhere(tmp_path, monkeypatch):
    """On Colab it clones, installs the packages that are in the requirements but not torch, and goes where the notebooks are."""
    cells = build.parse((ROOT / "notebooks/src/00_tour.md").read_text(encoding="utf-8"), "00_tour")
    colab, setup = [cell for cell in cells if cell.cell_type == "code"][:2]
    assert colab.metadata.tags == ["colab"] and setup.source == build.START.strip()
    monkeypatch.chdir(tmp_path)
    calls = []

    def run(words, check):
        calls.append(words)
        if words[0] == "git":
            shutil.copytree(ROOT / "notebooks/src", tmp_path / "nanomblip/notebooks")
            shutil.copy(ROOT / "requirements.txt", tmp_path / "nanomblip")

    monkeypatch.setattr(subprocess, "run", run)
    exec(colab.source, {})
    assert not calls and Path.cwd() == tmp_path
    monkeypatch.setitem(sys.modules, "google.colab", object())
    with pytest.raises(ValueError, match="REPOSITORY"):
        exec(colab.source, {})
    exec(colab.source.replace('REPOSITORY = ""', 'REPOSITORY = "ADDRESS"'), {})
    assert calls[0] == ["git", "clone", "--depth", "1", "ADDRESS", "nanomblip"] and Path.cwd().name == "notebooks"
    packages = calls[1][calls[1].index("-q") + 1 :]
    assert len(packages) == 2 and all(">=" in package and " " not in package for package in packages)


def test_a_source_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="above 100 characters"):
        build.parse(f"# A\n\n```python\n{'x' * 101}\n```\n", "small")
    with pytest.raises(ValueError, match="python solved"):
        build.parse("# A\n\n```python solved\nx\n```\n", "small")


def test_the_first_cell_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="jupyter lab notebooks"):
        exec(build.START, {})
    monkeypatch.setattr(lib, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="git checkout weights/nano"):
        lib.begin()
    for folder in ("blip2", "mt0", "aligned"):
        (tmp_path / "weights/nano" / folder).mkdir(parents=True)
        (tmp_path / "weights/nano" / folder / "model.safetensors").write_bytes(b"older")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/weights.json").write_text(json.dumps({"weights/nano/mt0/model.safetensors": "0" * 16}))
    monkeypatch.setattr(lib, "find_spec", lambda name: None)
    lib.begin()
    said = capsys.readouterr().out
    assert "weights/nano/mt0" in said and "git checkout weights" in said and "transformers" in said
    assert lib.has("peft") is False and "tests/requirements.txt" in capsys.readouterr().out


def test_checks_and_intervals(capsys):
    for given, wanted, said in (
        (..., 3, "still blank"), (3, 3, "right"), (4, 3, "not yet"), ("3", 3, "not yet"), ("3", 3.0, "not yet"),
        ([None, ...], [0.5, 1], "still blank"), ({"a": ...}, {"a": 1}, "still blank"), ([0.5, 1], [0.5, 1], "right"),
        ([0.5], [0.5, 1], "not yet"),
        ([0.5, None], [0.5, 1], "not yet"), ({"en": 0.5 + 1e-9}, {"en": 0.5}, "right"), ({}, {"en": 0.5}, "not yet"),
        (torch.tensor(0.5), 0.5, "right"), (0.5, torch.tensor(0.5), "right"), (3.0, 3, "right"),
        (torch.ones(2), torch.ones(1, 2), "not yet"), (0.5, torch.ones(2), "not yet"), (None, None, "still blank"),
    ):  # fmt: skip
        lib.check("x", given, wanted)
        assert said in capsys.readouterr().out, (given, wanted)
    low, high = lib.interval(0.5, 100)
    assert (round(low, 3), round(high, 3)) == (0.404, 0.596)  # Wilson 1927
    assert lib.interval(0.0, 10)[0] == 0 < lib.interval(0.0, 10)[1] and lib.interval(1.0, 10)[1] == 1
    assert lib.as_shown("paka", "sw") == "paka" and lib.as_shown("xyzzy", "sw") == "(no name)"


@pytest.mark.slow
@each_source
def test_runs_and_its_claims_hold(path, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    built = build.execute(path.stem, build.parse(path.read_text(encoding="utf-8"), path.stem))
    assert not built.problems, "\n\n".join(built.problems)
