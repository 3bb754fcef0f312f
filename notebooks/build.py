"""Make the notebooks from their sources: `python notebooks/build.py`, or with `--names 00 06` some of them.

A source, src/NAME.md, is Markdown. Fences of ```python become code cells; a second word says what kind:

    ```python colab       fetches the repository on Colab, before all other code
    ```python figure      draws; tagged and folded, its output is not
    ```python thumbnail   a figure that stands for the notebook in README.md
    ```python check       holds the text against the code; tagged and folded
    ```python exercise    has a blank for the reader
    ```python solution    fills it; run here, and folded away below the exercise

Numbers in the text are written {=EXPRESSION=} or {=EXPRESSION:.1f=}, and filled in from the variables of the cells
above. A sentence that says how things compare has its comparison behind it, as a comment that nobody sees:

    The right picture is better. <!-- claim: right < wrong -->

Each notebook is executed. If a cell or a solution fails or a claim does not hold, it is not written, and the report
names the notebook, the sentence, the comparison and the numbers in it. Written are NAME.ipynb (solutions folded), and
in out/notebooks the builds `student` (without solutions) and `teacher` (with solutions as cells).

A source takes from 10 seconds to some minutes on one thread; --jobs 2 executes two of them at a time.
"""

import base64
import io
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from nanomblip.flags import flag, parse_flags, run_main  # noqa: E402
from nanomblip.weights.files import write_atomic, write_json  # noqa: E402

FENCE = re.compile(r"^```python ?(\w*)\n(.*?)^```\n", re.M | re.S)
NUMBER = re.compile(r"\{=(?!\})(.+?)=\}", re.S)  # not the {=} of LaTeX
CLAIM = re.compile(r"\s*<!-- claim: (.+?) -->", re.S)
KINDS = ("", "colab", "figure", "thumbnail", "check", "exercise", "solution")
WIDEST = 100  # characters of a line of code
THUMBNAIL = (300, 160)  # pixels
BUILDS = ("student", "course", "teacher")
# The first cell of each, but for one of Colab's: where the repository is, and what is missing.
START = """import sys
from pathlib import Path

here = Path.cwd()
roots = [p for p in (here, *here.parents) if (p / "notebooks/lib.py").exists()]
if not roots:
    raise FileNotFoundError(
        f"{here} is not inside the repository, which this notebook needs. Clone it, run\\n"
        "pip install -r requirements.txt in it, and open the notebook by: jupyter lab notebooks"
    )
sys.path[:0] = [str(roots[0]), str(roots[0] / "notebooks")]

import lib

lib.begin()
"""


@dataclass(frozen=True)
class Config:
    names: list = flag((), "notebooks to make, by the start of their name; default: all", many=True)
    jobs: int = flag(1, "notebooks to execute at the same time")
    check: bool = flag(False, "execute and check only, write nothing")


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Make the notebooks from notebooks/src.")
    sources = [p for p in sorted((HERE / "src").glob("*.md")) if not cfg.names or p.stem.startswith(tuple(cfg.names))]
    if not sources:
        raise ValueError(f"--names {' '.join(cfg.names)}: none of {', '.join(p.stem for p in HERE.glob('src/*.md'))}")
    parsed = {path.stem: parse(path.read_text(encoding="utf-8"), path.stem) for path in sources}
    problems = []
    with ThreadPoolExecutor(cfg.jobs) as pool:
        for built in pool.map(execute, parsed, parsed.values()):
            print(f"{built.name}: {built.seconds:.0f} s, {len(built.problems)} problems", flush=True)
            if not (cfg.check or built.problems):
                built.write()
            problems += built.problems
    if problems:
        print("\n\n".join(["", *problems]), file=sys.stderr)
    elif not cfg.check and len(cfg.names) == 0:
        write_json(HERE / "weights.json", fingerprint())
    return 1 if problems else 0


def fingerprint() -> dict[str, str]:
    """What the numbers in the text belong to: the weights and the records, by the sha256 of each file."""
    files = [
        *ROOT.glob("weights/nano/*/*.safetensors"),
        *HERE.glob("records/*.json"),
        *ROOT.glob("weights/records/*.json"),
    ]
    return {str(p.relative_to(ROOT)): sha256(p.read_bytes()).hexdigest()[:16] for p in sorted(files)}


def parse(source: str, name: str) -> list[NotebookNode]:
    """The cells of a source, numbers and claims still in them; START comes before all code but that of Colab."""
    cells, at, started = [], 0, False
    for match in [*FENCE.finditer(source), None]:
        for text in re.split(r"^(?=## )", source[at : match.start() if match else None], flags=re.M):
            if text.strip():
                cells.append(new_markdown_cell(text.strip(), id=f"{name}-{len(cells)}"))
        kind, code = match.groups() if match else ("", "")
        if not started and kind != "colab":
            cells.append(code_cell(START, "setup", f"{name}-{len(cells)}"))
            started = True
        if match:
            if kind not in KINDS:
                raise ValueError(f"src/{name}.md: ```python {kind}: one of {KINDS}")
            wide = [line for line in code.splitlines() if len(line) > WIDEST]
            if wide:
                raise ValueError(f"src/{name}.md: a line of code above {WIDEST} characters: {wide[0].strip()}")
            cells.append(code_cell(code, kind, f"{name}-{len(cells)}"))
            at = match.end()
    return cells


def code_cell(code: str, kind: str, name: str) -> NotebookNode:
    cell = new_code_cell(code.strip(), id=name)
    if kind:
        cell.metadata.tags = [kind]
    if kind in ("check", "setup", "figure", "thumbnail"):
        cell.metadata.jupyter = {"source_hidden": True}
    return cell


class Built:
    """One executed notebook: its cells, numbers filled in, and what is wrong with it."""

    def __init__(self, name: str):
        self.name, self.cells, self.problems, self.seconds = name, [], [], 0.0

    def notebook(self, build: str) -> NotebookNode:
        """The cells of one of BUILDS."""
        cells, count = [], 0
        for cell in self.cells:
            cell = nbformat.from_dict(cell)
            if "solution" in cell.metadata.get("tags", ()):
                if build == "student":
                    continue
                if build == "course":
                    said = "".join(out.get("text", "") for out in cell.outputs).strip()
                    text = f"<details><summary>Solution</summary>\n\n```python\n{cell.source}\n```\n\n"
                    text += f"It prints: `{said}`\n\n</details>" if said else "</details>"
                    cell = new_markdown_cell(text, id=cell.id, metadata={"tags": ["solution"]})
            if cell.cell_type == "code":
                count += 1
                cell.execution_count = count
                for out in cell.outputs:
                    if "execution_count" in out:
                        out.execution_count = count
            cells.append(cell)
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})

    def write(self) -> None:
        for build in BUILDS:
            folder = HERE if build == "course" else ROOT / "out/notebooks" / build
            folder.mkdir(parents=True, exist_ok=True)
            text = nbformat.writes(self.notebook(build))
            write_atomic(
                folder / f"{self.name}.ipynb", lambda path, text=text: Path(path).write_text(text + "\n", "utf-8")
            )
        for cell in self.cells:
            if "thumbnail" in cell.metadata.get("tags", ()):
                png = next(out.data["image/png"] for out in cell.outputs if "image/png" in out.get("data", {}))
                image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
                image.thumbnail(THUMBNAIL)
                (HERE / "thumbnails").mkdir(exist_ok=True)
                image.quantize(64).save(HERE / f"thumbnails/{self.name}.png", optimize=True)


def execute(name: str, cells: list[NotebookNode]) -> Built:
    """Run the cells of one source, fill in the numbers and compare the claims."""
    built = Built(name)
    folder = {"metadata": {"path": str(HERE)}}
    client = NotebookClient(new_notebook(cells=cells), timeout=3600, kernel_name="python3", resources=folder,
                            extra_arguments=["--log-level=40"])  # fmt: skip
    run = lambda cell, i: client.execute_cell(cell, i, store_history=False)
    title, begun = "", time.time()
    with client.setup_kernel(env=os.environ | {"NANOMBLIP_BUILD": "1", "TQDM_DISABLE": "1"}):
        for i, cell in enumerate(cells):
            where = f"{name}, cell {i}"
            if cell.cell_type == "markdown":
                title = (re.findall(r"^#+ (.+)$", cell.source, re.M) or [title])[-1]
                asked = NUMBER.findall(cell.source), [c for c in CLAIM.findall(cell.source)]
                if any(asked):
                    ask = new_code_cell(f"lib.evaluate({asked[0]!r}, {asked[1]!r}, globals())")
                    numbers, claims = json.loads(run(ask, i).outputs[0]["text"])
                    client.nb.cells[i] = cell
                    built.problems += complaints(cell.source, f"{where}, {title}", asked, numbers, claims)
                    values = iter(numbers)
                    cell.source = CLAIM.sub("", NUMBER.sub(lambda _: str(next(values)[0]), cell.source))
            else:
                try:
                    run(cell, i)
                except (CellExecutionError, DeadKernelError, TimeoutError) as error:
                    built.problems.append(f"{where}, {title}: the cell failed\n{short(str(error))}")
                    break
                noise = [out.text for out in cell.outputs if out.get("name") == "stderr"]
                if noise:
                    built.problems.append(f"{where}, {title}: the cell wrote to stderr: {noise[0][:300]}")
                said = "".join(out.get("text", "") for out in cell.outputs)
                if "solution" in cell.metadata.get("tags", ()) and "not yet" in said:
                    built.problems.append(f"{where}, {title}: the solution is wrong: {said}")
                merge_streams(cell)
        built.seconds = time.time() - begun
    built.cells = cells
    return built


def complaints(text: str, where: str, asked, numbers, claims) -> list[str]:
    """What is wrong with the numbers and the claims of one Markdown cell."""
    found = [
        f"{where}: the number {{={expression}=}}: {error}" for expression, (_, error) in zip(asked[0], numbers) if error
    ]
    sentences = re.split(r"<!-- claim: .+? -->", text, flags=re.S)
    for expression, sentence, (holds, detail) in zip(asked[1], sentences, claims):
        if not holds:
            values = iter(numbers[len(NUMBER.findall("".join(sentences[: sentences.index(sentence)]))) :])
            sentence = NUMBER.sub(lambda _: str(next(values)[0]), sentence.strip())
            last = re.split(r"(?<=[.!?:|])\s+(?=[A-Z*])", sentence)[-1]
            found.append(f"{where}: this no longer holds:\n    {last}\n    claim: {expression}\n    {detail}")
    return found


def merge_streams(cell: NotebookNode) -> None:
    """One text where a cell printed several times in a row."""
    merged = []
    for out in cell.outputs:
        if merged and out.output_type == "stream" == merged[-1].output_type and out.name == merged[-1].name:
            merged[-1].text += out.text
        else:
            merged.append(out)
    cell.outputs = merged


def short(error: str) -> str:
    lines = re.sub(r"\x1b\[[0-9;]*m", "", error).splitlines()
    return "\n".join("    " + line for line in lines[-12:])


if __name__ == "__main__":
    run_main(main)
