"""The house: imports point one way, the model knows torch alone, and files, functions and lines stay short."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "nanomblip").rglob("*.py"))
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py"]
FLOORS = ("model", "weights", "data", "training", "measure")  # from the ground up; flags.py lies below them all
# Lines, and why more than 400 (scripts: less) would be too many: each is read in one sitting.
FILE, FUNCTION, LINE = 400, 80, 120
TOGETHER = {("attention", "vit", "qformer", "mt5", "mblip"): 800, ("lora",): 160, ("int8",): 260, ("generate",): 290}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: a relative import"
            found |= {node.module} if node.module != "nanomblip" else {f"nanomblip.{alias.name}" for alias in node.names}
    return found


def floor(module: str) -> int | None:
    """0 for what lies below, 1 ... for the folders; None outside the package."""
    parts = module.split(".")
    if parts[0] != "nanomblip":
        return None
    return FLOORS.index(parts[1]) + 1 if len(parts) > 1 and parts[1] in FLOORS else 0


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_imports_point_downwards(path):
    folder = path.relative_to(ROOT / "nanomblip").parts[0]
    here = FLOORS.index(folder) + 1 if folder in FLOORS else 0
    if path == ROOT / "nanomblip" / "__init__.py":
        return  # the front door opens to the model
    for module in imported(path):
        assert floor(module) is None or floor(module) <= here, f"{name(path)} imports {module}, which lies above it"
        assert module.split(".")[0] not in ("train", "sample", "transformers", "peft"), f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", sorted((ROOT / "nanomblip" / "model").glob("*.py")), ids=name)
def test_the_model_imports_torch_and_nothing_else(path):
    roots = {module.split(".")[0] for module in imported(path)} - {"nanomblip", "torch"} - set(sys.stdlib_module_names)
    kernels = {"bitsandbytes"} if path.name == "int8_kernels.py" else set()  # on CUDA, inside the function that needs it
    assert roots <= kernels, f"{name(path)} imports {roots - kernels}"


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], ids=name)
def test_budgets(path):
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    most = {"sample.py": 200}.get(path.name, FILE) if path in SCRIPTS else FILE
    assert len(lines) <= most, f"{name(path)} has {len(lines)} lines, at most {most}"
    assert not [i for i, line in enumerate(lines, 1) if len(line) > LINE], f"{name(path)} has lines above {LINE}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            size = node.end_lineno - node.lineno + 1
            assert size <= FUNCTION, f"{name(path)}: {node.name} has {size} lines, at most {FUNCTION}"


@pytest.mark.parametrize("names,most", TOGETHER.items(), ids=str)
def test_what_a_student_reads_stays_short(names, most):
    count = sum(len((ROOT / "nanomblip" / "model" / f"{n}.py").read_text(encoding="utf-8").splitlines()) for n in names)
    assert count <= most, f"{', '.join(names)}: {count} lines, at most {most}"


def test_the_loop_asks_the_config_nothing():
    """train.py's loop is at most 80 lines, and what varies between runs was decided before it."""
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    (loop,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    branches = [node.test for node in ast.walk(loop) if isinstance(node, (ast.If, ast.IfExp))]
    asked = [ast.unparse(test) for test in branches if "cfg" in ast.unparse(test)]
    assert loop.end_lineno - loop.lineno < 80 and asked == ["run.interrupt.signal or time.time() - last_save > run.cfg.save_every"]
