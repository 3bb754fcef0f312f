"""The benchmarks of the paper, read in their own file formats: every line becomes one `Item`, a question with its answers.

    task        file                                          fields read                                  answer in
    xm3600      captions.jsonl                                image/key, <lang>: {caption: [...]}          the language
    xflickrco   <lang>/test.jsonl                             img_path, sentences: [...]                   the language
    xgqa        <lang>/test.json or ..._<lang>.json (GQA's)   {id: {imageId, question, answer}}            English
    maxm        maxm_v1_<lang>.json                           annotations: [{image_id, qa_pairs: [...]}]   the language
    vqav2       questions.json and annotations.json           questions; annotations: ten answers each     English
    xvnli       <lang>/test.jsonl                             Flikr30kID, sentence2, gold_label            English yes/no/maybe
    marvl       marvl-<lang>.jsonl                            left_img, right_img, concept, caption, label  English yes/no
    pope        coco_pope_*.json (JSON lines)                 image, text, label                           English yes/no

What is asked are the paper's prompts (prompts.BENCHMARK). Where a file does not say its language, its name or folder does.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from nanomblip.data.languages import LANGUAGES, PAPER_NAMES, parse_lang
from nanomblip.data.prompts import BENCHMARK
from nanomblip.weights.files import read_json

OUTSIDE = {"hr": "Croatian", "quz": "Quechua"}  # XM3600 has them, mBLIP's 96 languages do not
VERDICTS = {"entailment": "yes", "contradiction": "no", "neutral": "maybe"}


@dataclass(frozen=True)
class Item:
    """One question of a benchmark. `images`: what names its pictures (file names below --image_root, or embedded pictures);
    `lang`: the row of the table it belongs to; `answer_lang`: what the answer is to be written in."""

    images: tuple
    lang: str
    answer_lang: str
    prompt: str
    labels: tuple[str, ...]


def language_name(code: str, paper_names: bool = False) -> str:
    """The English name of a language in a prompt; as the paper's evaluation misspells it, if asked."""
    names = PAPER_NAMES["eval"] if paper_names else {}
    return names.get(code) or OUTSIDE.get(code) or LANGUAGES[code].name


def read_lines(path: Path):
    """Yield (line number, object) of a JSON-lines file; ValueError naming file and line for anything else."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not an object {...}")
                    yield number, row
    except FileNotFoundError:
        raise FileNotFoundError(f"--data {path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: line {locals().get('number', 0)}: not readable as JSON ({error})") from None


def field(row: dict, name: str, kind, where: str):
    """row[name], checked; ValueError naming the place."""
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind) or (kind is list and not all(isinstance(v, (str, dict)) for v in value)):
        problem = "missing" if value is None else "of another kind than expected"
        raise ValueError(f"{where}: {name!r} is {problem}; is it the file that --task says?")
    return value


def file_language(path: Path) -> str:
    """The language that a file's name (..._de.json, marvl-sw.jsonl) or folder (de/test.jsonl) says; ValueError if neither does."""
    for part in (*re.split(r"[-_.]", path.stem)[::-1], path.parent.name):
        if part in _CODES:
            return _CODES[part]
    raise ValueError(
        f"--data {path}: which language is it? Its name should end in the code (..._de.json) or its folder be it (de/test.jsonl)"
    )


# Codes only: in file names, words such as "test" or "fin" are not meant as languages.
_CODES = {**{code: code for code in (*LANGUAGES, *OUTSIDE)}, "he": "iw", "tl": "fil", "nb": "no", "jw": "jv"}


def xm3600(path: Path, names) -> list[Item]:
    items = []
    for number, row in read_lines(path):
        key = field(row, "image/key", str, f"{path}: line {number}")
        for code, content in row.items():
            if isinstance(content, dict) and "caption" in content:
                lang = code if code in OUTSIDE else parse_lang(code)
                captions = field(content, "caption", list, f"{path}: line {number}, {code}")
                if captions:
                    items.append(
                        Item((f"{key}.jpg",), lang, lang, BENCHMARK["xm3600"].format(L=names(lang)), tuple(captions))
                    )
    return items


def xflickrco(path: Path, names) -> list[Item]:
    lang, items = file_language(path), []
    for n, row in read_lines(path):
        image, sentences = (
            field(row, "img_path", str, f"{path}: line {n}"),
            field(row, "sentences", list, f"{path}: line {n}"),
        )
        items.append(Item((image,), lang, lang, BENCHMARK["xflickrco"].format(L=names(lang)), tuple(sentences)))
    return items


def xgqa(path: Path, names) -> list[Item]:
    lang, items = file_language(path), []
    for key, row in read_object(path).items():
        where = f"{path}: question {key}"
        image, asked, label = (field(row, name, str, where) for name in ("imageId", "question", "answer"))
        items.append(Item((f"{image}.jpg",), lang, "en", BENCHMARK["xgqa"].format(q=asked), (label,)))
    return items


def maxm(path: Path, names) -> list[Item]:
    content, items = read_object(path), []
    lang = (
        parse_lang(content["split"])
        if isinstance(content.get("split"), str) and len(content["split"]) < 4
        else file_language(path)
    )
    for i, row in enumerate(field(content, "annotations", list, str(path))):
        where = f"{path}: annotation {i}"
        image = field(row, "image_id", str, where)
        for pair in field(row, "qa_pairs", list, where):
            asked, labels = field(pair, "question", str, where), field(pair, "processed_answers", list, where)
            items.append(
                Item((f"{image}.jpg",), lang, lang, BENCHMARK["maxm"].format(q=asked, L=names(lang)), tuple(labels))
            )
    return items


def vqav2(questions: Path, annotations: Path) -> list[Item]:
    """VQAv2 comes in two files; the pictures are COCO's, with the split in their names."""
    asked, told = read_object(questions), read_object(annotations)
    split = re.search(r"(train|val|test)20\d\d", str(asked.get("data_subtype", "")) + questions.name)
    split = split[0] if split else "val2014"
    answers = {}
    for row in field(told, "annotations", list, str(annotations)):
        humans = field(row, "answers", list, f"{annotations}: question {row.get('question_id')}")
        answers[row.get("question_id")] = tuple(field(human, "answer", str, str(annotations)) for human in humans)
    items = []
    for row in field(asked, "questions", list, str(questions)):
        key, image, text = row.get("question_id"), row.get("image_id"), field(row, "question", str, str(questions))
        if key not in answers or not str(image).isdecimal():
            raise ValueError(f"{annotations}: has no answers to question {key} of {questions}")
        items.append(
            Item((f"COCO_{split}_{int(image):012d}.jpg",), "en", "en", BENCHMARK["vqav2"].format(q=text), answers[key])
        )
    return items


def xvnli(path: Path, names) -> list[Item]:
    lang, items = file_language(path), []
    for n, row in read_lines(path):
        where = f"{path}: line {n}"
        verdict = field(row, "gold_label", str, where)
        if verdict not in VERDICTS:  # "-": people did not agree
            continue
        image, text = field(row, "Flikr30kID", str, where), field(row, "sentence2", str, where)
        image = image if image.endswith(".jpg") else image + ".jpg"
        items.append(Item((image,), lang, "en", BENCHMARK["xvnli"].format(s=text), (VERDICTS[verdict],)))
    return items


def marvl(path: Path, names) -> list[Item]:
    items = []
    for n, row in read_lines(path):
        where = f"{path}: line {n}"
        code, concept, text = (field(row, name, str, where) for name in ("language", "concept", "caption"))
        pictures = tuple(
            f"{code}/images/{concept}/{field(row, side, str, where)}" for side in ("left_img", "right_img")
        )
        label = "yes" if field(row, "label", bool, where) else "no"
        items.append(Item(pictures, parse_lang(code), "en", BENCHMARK["marvl"].format(s=text), (label,)))
    return items


def pope(path: Path, names) -> list[Item]:
    items = []
    for n, row in read_lines(path):
        image, text, label = (field(row, name, str, f"{path}: line {n}") for name in ("image", "text", "label"))
        if label not in ("yes", "no"):
            raise ValueError(f"{path}: line {n}: the label is {label!r}, neither yes nor no")
        items.append(Item((image,), "en", "en", BENCHMARK["pope"].format(q=text), (label,)))
    return items


def read_object(path: Path) -> dict:
    if not Path(path).is_file():
        raise FileNotFoundError(f"--data {path}: no such file")
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: does not hold an object; is it the file that --task says?")
    return content


READERS = {
    "xm3600": xm3600,
    "xflickrco": xflickrco,
    "xgqa": xgqa,
    "maxm": maxm,
    "xvnli": xvnli,
    "marvl": marvl,
    "pope": pope,
}


def read_benchmark(task: str, files: list[str], paper_names: bool = False) -> list[Item]:
    """All items of a benchmark's files, in their order; for vqav2 the two files are questions and annotations.

    Raises ValueError or FileNotFoundError naming the file, and the line or question where it is about one.
    """
    paths = [Path(file) for file in files]
    if task == "vqav2":
        if len(paths) != 2:
            raise ValueError("--data for vqav2 are two files: QUESTIONS,ANNOTATIONS")
        items = vqav2(*paths)
    else:
        names = lambda code: language_name(code, paper_names)
        items = [item for path in paths for item in READERS[task](path, names)]
    if not items:
        raise ValueError(f"--data {', '.join(files)}: holds no question for {task}")
    return items
