"""The documents: their numbers are those of the records, their commands run, their links lead somewhere, and their
figures show the weights, data and records of today."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nanomblip.data.emoji import HELD_OUT_LANGS, TEST_ARTISTS, TRAIN_ARTISTS, load_emoji, load_names
from nanomblip.data.languages import LANGUAGES
from nanomblip.measure import ablation_tables
from nanomblip.measure.ablation_suites import SUITES, find_current, read_records, settings_of
from nanomblip.measure.ablation_suites import Config as Ablations
from nanomblip.model.mblip import MBLIP, PRESETS
from nanomblip.training.config import MACHINE, SCALE, WARMUP_SHARE, Config, resolve
from nanomblip.weights.files import write_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))
import make_figures  # noqa: E402

WORDS = 1500  # of README.md
DOCUMENTS = sorted(
    p
    for folder in (".", "data", "notebooks", "notebooks/records", "tests", "weights")
    for p in (ROOT / folder).glob("*.md")
)
MARKS = ("(hub)", "(GPU)", "(hours)", "(minutes)")  # commands that no everyday test runs as they stand
RUN_BY = {  # what a command begins with -> the file that runs it, with smaller numbers, and how it does
    "pip install -r requirements.txt": (".ci/run", "pip install -q -r requirements.txt"),
    "python train.py --lang_mix all": (".ci/run", "python train.py --lang_mix all"),
    "python train.py": ("tests/training/test_train.py", "train.main"),
    "python sample.py": ("tests/test_sample.py", "sample.main"),
    "python -m pytest": (".ci/run", "python -m pytest"),
    "python weights/diagnose.py": ("tests/test_diagnose.py", "diagnose.main"),
    "python weights/make_nano.py": ("tests/training/test_make_nano.py", "make_nano.main"),
    "python -m nanomblip.measure.ablate": ("tests/measure/test_ablate.py", "ablate.main"),
    "python -m nanomblip.measure.evaluate": ("tests/measure/test_evaluate.py", "main("),
    "python -m nanomblip.data.translate": ("tests/data/test_translate.py", "main("),
    "python -m nanomblip.data.builders": ("tests/data/test_builders.py", "main("),
    "python -m nanomblip.weights.convert": ("tests/weights/test_convert.py", "main("),
    "python tests/stress.py": ("tests/test_stress.py", "main("),
    "python notebooks/build.py": ("tests/test_notebooks.py", "build."),
    "torchrun": ("tests/training/test_distributed.py", "torchrun"),
}  # fmt: skip

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))


def read(name: str):
    text = (ROOT / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else text


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


# ---- numbers


def test_the_readmes_first_screen_and_its_length():
    readme = read("README.md")
    assert len(readme.split()) <= WORDS
    first = "\n".join(readme.splitlines()[:25])
    assert "(notebooks/figures/hero.png)" in first and "What to expect" in first and "--image data/" in first


def test_the_readmes_numbers_are_those_of_the_code_and_the_records():
    readme, record = read("README.md"), read("weights/nano/aligned/record.json")
    lines = sum(
        len(read(f"nanomblip/model/{name}.py").splitlines()) for name in ("attention", "vit", "qformer", "mt5", "mblip")
    )
    exact = lambda split, who: 100 * record["summary"][split][who]["exact"]
    nano = record["parameters"] - sum(
        t.numel() for t in load_file(ROOT / "weights/nano/aligned/adapter/adapter_model.safetensors").values()
    )
    assert record["threads"] == 1 and f"{nano:,} parameters" in read("weights/README.md")
    for words in (
        f"The model is {lines} lines in five files",
        f"in {record['seconds'] / 60:.0f} minutes on one CPU thread",
        f"names {exact('pictures', 'english'):.1f} % exactly right in English and {exact('pictures', 'other'):.1f} % in the other 84",
        f"{exact('openmoji', 'english'):.1f} and {exact('streamline', 'english'):.1f} % in English",
        f"first {WARMUP_SHARE['names']:.0%} of the steps".replace("%", " %"),
        f"{nano / 1e6:.1f} M parameters",
    ):
        assert words in readme, words
    today = asdict(resolve(Config(), 0))
    free = {*MACHINE, "eval_every"}
    assert {k: v for k, v in record["config"].items() if k not in free} == {
        k: v for k, v in today.items() if k not in free
    }
    assert (today["lr"], today["qformer_lr"], today["lora_lr"]) == tuple(
        SCALE[name][1] for name in ("lr", "qformer_lr", "lora_lr")
    )


def test_counts_in_the_documents_are_those_of_the_code_and_the_data():
    emoji, names = load_emoji("core"), load_emoji("all").names
    notebooks = len(list((ROOT / "notebooks").glob("*.ipynb")))
    words = {10: "ten", 12: "twelve", 15: "fifteen"}  # numbers that are written out
    things, every, langs = (f"{n:,}" for n in (len(emoji.concepts), len(load_emoji("all").concepts), len(emoji.langs)))
    artists = words[len(TRAIN_ARTISTS) + len(TEST_ARTISTS)]
    scripts = len({s for lang in emoji.langs for s in LANGUAGES[lang].scripts[:1]})
    wanted = {
        "README.md": (
            f"answering in {langs} languages", f"drawings of {things} things", f"{things} things by {artists} artists",
            f"names in {langs} languages", f"{words[notebooks].capitalize()} notebooks",
            f"{words[len(make_figures.LANGS)].capitalize()} [others]",
            f"in all {langs} languages", f"the other {len(emoji.langs) - 1} languages",
        ),
        "data/README.md": (
            f"{every} things, {artists} artists, {langs} languages", f"({len(emoji.pictures)}, 64, 64, 3), uint8",
            f"the {things} of them", f"{langs} of mBLIP's {len(LANGUAGES)}, in {scripts} scripts",
            f"{sum(map(len, load_names().values())):,} names of {len(load_names()['en']):,} concepts in {langs} languages",
            f"{every} concepts, {sum(len(of) for of in names.values()):,} names",
            f"{sum(len(of) for of in emoji.names.values()):,} names.",
            f"| pictures, train | the rest of the eight artists | {len(emoji.cells_in('train')):,} |",
            f"| hash in 0.10-0.13 | {len(emoji.cells_in('val'))} |", f"| hash below 0.10 | {len(emoji.cells_in('test'))} |",
            f"| OpenMoji and Streamline | {len(emoji.cells_in('artist'))} |",
        ),
        "notebooks/README.md": (f'answers in {langs} languages"', f"in {scripts} scripts"),
        "weights/README.md": (f"a drawing in {langs} languages",),
    }  # fmt: skip
    for name, phrases in wanted.items():
        for words_ in phrases:
            assert words_ in read(name), (name, words_)
    for file, size in re.findall(r"^\| `([\w.]+)` \| ([\d,]+) \|", read("data/README.md"), re.M):
        assert f"{(ROOT / 'data' / file).stat().st_size:,}" == size, file
    for folder, size in re.findall(r"^\| `(nano/\w+)` \|.*?\| [\d,]+ \| ([\d.]+) \|", read("weights/README.md"), re.M):
        files = (ROOT / "weights" / folder).rglob("*.safetensors")
        assert f"{sum(file.stat().st_size for file in files) / 1e6:.1f}" == size, folder


def test_what_the_official_size_costs_is_said_alike_everywhere():
    """Gigabytes of fp32 from the shapes, and the peak of memory from the table of the benchmark, which is in MiB."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MBLIP(PRESETS["mblip-mt0-xl"]).parameters())
    peaks = re.findall(r"^\| .+ \| [\d.+ ]+ \| (\d,\d{3}) \|$", read("tests/PERFORMANCE.md"), re.M)
    fp32, peak = f"{4 * parameters / 1e9:.1f} GB", f"{max(int(p.replace(',', '')) for p in peaks) * 2**20 / 1e9:.1f} GB"
    assert len(peaks) >= 3
    for name in ("README.md", "weights/OFFICIAL.md"):
        assert fp32 in read(name) and re.search(rf"peaks at {peak}", read(name)), (name, fp32, peak)
    assert fp32 in read("tests/PERFORMANCE.md") and f"{parameters:,}" in read("weights/OFFICIAL.md")


def test_the_curves_of_a_run_are_of_the_whole_recipe():
    """Whatever run is shown, its flags are train.py's defaults but for how often it looks and the rates of its day."""
    config = read("weights/records/run.json")["config"]
    free = {*MACHINE, "eval_every", "eval_pictures", "seed"}
    today = asdict(resolve(Config(), parameters=0))
    assert {k: v for k, v in config.items() if k not in free} == {k: v for k, v in today.items() if k not in free}


def test_curves_are_thinned_by_means_and_stages_stay_apart(tmp_path):
    steps, border = 1000, 680
    write_json(tmp_path / "train.json", dict(warmup_steps=border))
    (tmp_path / "loss.csv").write_text(
        "step,loss\n" + "".join(f"{i},{9 if i <= border else 1}\n" for i in range(1, steps + 1))
    )
    (tmp_path / "validation.csv").write_text("step,english_exact,Latin\n500,0.5,\n")
    found = make_figures.curves_of(tmp_path)
    assert len(found["loss"]) <= make_figures.POINTS and found["steps"] == steps
    assert all(value == (9 if at <= border else 1) for at, value in found["loss"])
    assert found["validation"] == [dict(step=500.0, english_exact=0.5, Latin=None)]
    (tmp_path / "validation.csv").write_text("step,english_exact\n")
    with pytest.raises(ValueError, match="never looked"):
        make_figures.curves_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no train.json"):
        make_figures.curves_of(tmp_path / "none")


def test_the_example_is_what_the_figures_script_found():
    readme, hero = read("README.md"), read("notebooks/figures/figures.json")["hero"]
    command, shown = re.findall(r"```(?:bash)?\n(.*?)```", readme, re.S)[:2]
    assert (
        f"sample.py --image data/{hero['picture']} --lang sw --lens" in command
        and shown.splitlines()[-1] == hero["answers"]["sw"]
    )
    assert re.findall(r"(\S+) \d\.\d\d", shown) == hero["tokens"]
    right = f"it is right in {hero['right']} of {hero['languages']}, and {hero['as_good']} of the other {hero['animals'] - 1} are right"
    assert right in readme and hero["in_sheet"] == hero["right"]
    card = read("weights/README.md")
    assert (
        f"`data/wolf.png` is a wolf in {hero['right']} of {hero['languages']}, `data/cat.png` a cat in {hero['cats']}."
        in card
    )


def test_the_model_cards_numbers_are_those_of_the_records():
    card = read("weights/README.md")
    default, control, held_out = (
        read(f"weights/{name}.json")
        for name in ("nano/aligned/record", "records/control", "records/held_out_languages")
    )
    of = lambda record, split, key="exact": [
        percent(record["summary"][split][who][key]) for who in ("english", "other")
    ]
    eight = [
        percent(sum(record["results"]["pictures"][lang]["exact"] for lang in HELD_OUT_LANGS) / 8)
        for record in (held_out, default)
    ]
    wanted = [*(of(default, split) for split in ("pictures", "openmoji", "streamline")), ["", percent(default["summary"]["held-out pairs"]["other"]["exact"])],
              of(default, "pictures", "in_language"), ["", f"{eight[0]} (with them {eight[1]})"], of(control, "pictures")]  # fmt: skip
    table = card.split("## How good it is")[1].split("Run-to-run")[0]
    rows = [[cell.strip() for cell in line.split("|")[2:4]] for line in table.splitlines() if line.startswith("| ")]
    assert rows[1:] == wanted, "the first is the header"
    assert f"{default['trained_parameters']:,}" in card
    for name in ("blip2", "mt0"):
        assert f"| {percent(read(f'weights/nano/{name}/record.json')['exact_match'])} of" in card
    assert set(held_out["config"]["hold_out_langs"].split(",")) == set(HELD_OUT_LANGS)
    machine = {"vision", "hold_out_langs", "eval_every", "run", "name", "out", "resume"}
    assert all(
        record["config"][key] == value
        for record in (control, held_out)
        for key, value in default["config"].items()
        if key not in machine
    )


def test_the_readmes_ablations_are_those_of_the_records():
    records = read_records(ROOT / "notebooks/records")
    setting = settings_of(records)[0]
    rows = re.findall(r"^\| .+ \| `([\w-]+)` \| ([-+\d.]+) \| (.+) \|$", read("README.md"), re.M)
    assert len(rows) == 5
    for row, difference, judged in rows:
        suite = next(suite for suite in SUITES.values() if row in suite.rows[1:])
        base, values = (ablation_tables.values_of(name, suite, setting, records)[0] for name in (suite.rows[0], row))
        assert f"{100 * (sum(values) / len(values) - sum(base) / len(base)):+.1f}" == difference, row
        assert ablation_tables.verdict(base, values, suite.expect, suite.smallest) == judged, row
    cfg = Ablations()
    runs = [(name, seed) for name in cfg.experiments() for seed in range(cfg.seeds)]
    missing = sum(find_current(*run, cfg, records) is None for run in runs)
    assert not missing or f"Still to be run are {missing} of {len(runs)}" in read("README.md")


# ---- figures


@pytest.mark.parametrize("name", make_figures.READS)
def test_figures_are_of_todays_weights_data_and_records(name):
    assert read("notebooks/figures/figures.json")[name]["read"] == make_figures.digest(name), (
        "run: python notebooks/make_figures.py"
    )
    with Image.open(ROOT / f"notebooks/figures/{name}.png") as image:
        assert image.width == 8 * make_figures.DPI


def test_every_script_of_the_data_has_a_font():
    names = make_figures.lib.load_names()
    scripts = {make_figures.script_of(c) for of_lang in names.values() for name in of_lang.values() for c in name}
    assert scripts - {None, "Latn", "Zyyy"} <= set(make_figures.FONTS)


# ---- links


def anchors(path: Path) -> set[str]:
    """The anchors of a Markdown file's headings, made as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = [re.sub(r"\[(.+?)\]\(.+?\)", r"\1", line) for line in re.findall(r"^#+ (.+)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere_and_pictures_have_a_text(path):
    text = re.sub(r"```.*?```|`[^`\n]+`(?!\])", "", path.read_text(encoding="utf-8"), flags=re.S)
    assert not re.findall(r"!\[\s*\]\(", text), "a picture without a text for those who cannot see it"
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", link):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists() and target.is_relative_to(ROOT), f"{link} leads nowhere"
            assert not anchor or anchor in anchors(target), f"{link}: no such heading"


# ---- commands


def commands(path: Path) -> list[tuple[str, str]]:
    """Every line of the blocks of bash: (command, comment); `a && b` are two."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S):
        for line in filter(None, map(str.strip, block.splitlines())):
            command, _, comment = line.partition(" #")
            found += [(re.sub(r"^(\w+=\S+ )+", "", part.strip()), comment) for part in command.split("&&")]
    return [(command, comment) for command, comment in found if not command.startswith(("export ", "#"))]


@cache
def script_of(command: str) -> Path | None:
    words = command.split()
    if words[0] not in ("python", "torchrun") or words[1:3] == ["-m", "pytest"]:
        return None
    file = (
        words[2].replace(".", "/") + ".py" if words[1] == "-m" else next(word for word in words if word.endswith(".py"))
    )
    return ROOT / file


@cache
def help_of(script: Path) -> str:
    """What `--help` prints, without another process."""
    spec = importlib.util.spec_from_file_location(f"documented_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    sys.path.insert(0, str(script.parent))
    out = io.StringIO()
    try:
        spec.loader.exec_module(module)
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            module.main(["--help"])
    finally:
        sys.path.remove(str(script.parent))
    return out.getvalue()


ALL = [(path, *pair) for path in DOCUMENTS if path.name != "LOG.md" for pair in commands(path)]  # the log is of its day
each_command = pytest.mark.parametrize(
    "path,command,comment", ALL, ids=[f"{p.relative_to(ROOT)}: {c}" for p, c, _ in ALL]
)


@each_command
def test_every_command_is_run_by_a_test_or_marked(path, command, comment):
    if not any(mark in comment for mark in MARKS):
        runs = [where for begin, where in RUN_BY.items() if command.startswith(begin)]
        assert runs, f"mark it with one of {MARKS}, or name the test that runs it"
        assert runs[0][1] in read(runs[0][0])


@each_command
def test_scripts_and_flags_of_commands_exist(path, command, comment):
    script = script_of(command)
    if script is None:
        return
    assert script.exists()
    words = command[command.index(script.name) :] if script.name in command else command
    flags = set(re.findall(r"(--\w+)", words))
    if flags and "def main(argv" in script.read_text(encoding="utf-8"):
        told = (
            help_of(script)
            if script.name != "builders.py"
            else script.read_text(encoding="utf-8").replace("    ", " --")
        )
        missing = {flag for flag in flags if not re.search(rf"{flag}\b", told)}
        assert not missing, f"{script.name} has no {missing}"


HERE = [(c, m) for p, c, m in ALL if c.startswith("python sample.py --image data/") and p.parent == ROOT]


@pytest.mark.parametrize("command,comment", HERE, ids=[c for c, _ in HERE])
def test_captions_of_the_readme_are_written(command, comment, capsys, monkeypatch):
    import sample

    monkeypatch.chdir(ROOT)
    assert sample.main([*shlex.split(command)[2:], "--model", "nano"]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    if "--lens" in command:
        shown = re.findall(r"```(?:bash)?\n(.*?)```", read("README.md"), re.S)[1].splitlines()
        assert out.strip() == shown[-1] and shown[0].split() == err.splitlines()[-1].split()
