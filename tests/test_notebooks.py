"""The notebooks: each runs from top to bottom in this very Python, and what is committed of it is clean."""

import copy
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 300_000  # bytes
ABSOLUTE = re.compile(r"""(?:^|[\s"'(=:>])(?:/(?:root|home|tmp|var|work|mnt|opt|usr|Users|private)/|[A-Z]:\\)""", re.M)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(notebook):
    """(number of the code cell, output) for all of them."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [(number, output) for number, cell in enumerate(code, 1) for output in cell.outputs]


def check_outputs(notebook):
    """No error, nothing on stderr, and a picture for every figure that is shown."""
    for number, output in outputs(notebook):
        assert output.output_type != "error", f"cell {number}: {output.ename}: {output.evalue}"
        assert output.get("name") != "stderr", f"cell {number} wrote to stderr: {output.text[:300]}"
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        pictures = sum("image/png" in output.get("data", {}) for output in cell.outputs)
        assert pictures == len(re.findall(r"^plt\.show\(\)", cell.source, re.M)), f"cell {number} shows another number of figures"


def test_the_readme_lists_them_all():
    readme = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert NOTEBOOKS and set(re.findall(r"\]\((\w+\.ipynb)\)", readme)) == {path.name for path in NOTEBOOKS}


@each_notebook
def test_what_is_committed(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom before committing"
    check_outputs(notebook)
    for number, output in outputs(notebook):
        said = json.dumps(output.get("data", output.get("text")), ensure_ascii=False).replace("\\n", "\n")
        said = re.sub(r'"image/png": "[^"]*"', "", said)
        assert not ABSOLUTE.search(said), f"cell {number} shows a path of the machine it ran on"
    for number, cell in enumerate(code, 1):
        assert not re.search(r"^class \w+\(.*Module\)", cell.source, re.M), f"cell {number} defines a module; import it from nanomblip"
    asserts = sum(bool(re.search(r"^\s*assert ", cell.source, re.M)) for cell in code)
    assert asserts > len(code) // 2, "a section ends with an assert"


@pytest.mark.slow
@each_notebook
def test_runs_from_top_to_bottom(path, tmp_path):
    spec = tmp_path / "kernels" / "this"  # a kernel of this Python, whatever kernels the machine has
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps(dict(argv=argv, display_name="this", language="python", env={"HF_HUB_OFFLINE": "1"})))
    manager = AsyncKernelManager(kernel_name="this", kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")]))
    notebook = nbformat.read(path, as_version=4)
    committed = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(notebook, km=manager, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    check_outputs(notebook)
    kinds = lambda nb: [(number, sorted(output.get("data", {}).keys() - {"text/plain"})) for number, output in outputs(nb)
                        if output.output_type in ("display_data", "execute_result")]  # fmt: skip
    assert kinds(notebook) == kinds(committed)  # the same figures and tables come out again
