"""The benchmarks of the paper, read in their own file formats: every line becomes an `Item`, a question with answers.

    task        file                                   fields read                                  answer in
    xm3600      captions.jsonl                         image/key, <lang>: {caption: [...]}          the language
    xflickrco   <lang>/test.jsonl                      img_path, sentences: [...]                   the language
    xgqa        <lang>/test.json or ..._<lang>.json    {id: {imageId, question, answer}}            English
    maxm        maxm_v1_<lang>.json                    annotations: [{image_id, qa_pairs: [...]}]   the language
    vqav2       questions.json and annotations.json    questions; annotations: ten answers each     English
    xvnli       <lang>/test.jsonl                      Flikr30kID, sentence2, gold_label            English yes/no/maybe
    marvl       marvl-<lang>.jsonl                     left_img, right_img, concept, caption, label English yes/no
    pope        coco_pope_*.json (JSON lines)          image, text, label                           English yes/no

What is asked are the paper's prompts (prompts.BENCHMARK). Where a file does not say its language, its name or folder
does. Every field is checked when the file is read, so that no model answers a benchmark that cannot be scored
afterwards. A caption or answer in a list is a text, or an object with a text as `caption` (COCO) or `raw` (Karpathy).
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
    """One question of a benchmark.

    `images`: what names its pictures (file names below --image_root, or embedded pictures); `lang`: the row of the
    table it belongs to; `answer_lang`: what the answer is to be written in.
    """

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
    """Yield (place for messages, object) of a JSON-lines file; ValueError naming file and line for anything else."""
    number = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    if not isinstance(row, dict):
                        raise ValueError("not an object {...}")
                    yield f"{path}: line {number}", row
    except FileNotFoundError:
        raise FileNotFoundError(f"--data {path}: no such file") from None
    except OSError as error:
        raise ValueError(f"--data {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: line {number}: not readable as JSON ({error})") from None


def read_object(path: Path) -> dict:
    if not Path(path).is_file():
        raise FileNotFoundError(f"--data {path}: no such file")
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: does not hold an object; is it the file that --task says?")
    return content


def field(row, name: str, kind, where: str, empty: bool = False):
    """row[name], checked to be of a type and, unless `empty` is allowed, not empty; ValueError says where."""
    value = row.get(name) if isinstance(row, dict) else None
    if value is None:
        problem = "missing"
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        problem = "of another kind than expected"
    elif not empty and (value in ([], {}) or (isinstance(value, str) and not value.strip())):
        problem = "empty"
    elif isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        problem = "not a text (half of a surrogate pair)"
    else:
        return value
    raise ValueError(f"{where}: {name!r} is {problem}; is it the file that --task says?")


def texts(row, name: str, where: str) -> tuple[str, ...]:
    """The texts of row[name], a list of texts or of objects that hold one as `caption` or `raw`."""
    found = []
    for i, value in enumerate(field(row, name, list, where)):
        place = f"{where}: {name!r} {i}"
        if isinstance(value, dict):
            keys = [key for key in ("caption", "raw") if key in value]
            if len(keys) != 1:
                raise ValueError(f"{place}: an object should have the text as one of 'caption' and 'raw'")
            value = value[keys[0]]
        found.append(field({"text": value}, "text", str, place))
    return tuple(found)


def language(code: str, where: str) -> str:
    """The code of a language that a file names, in our spelling; ValueError says where."""
    try:
        return code if code in OUTSIDE else parse_lang(code)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


# Codes only: in file names, words such as "test" or "fin" are not meant as languages.
_CODES = {**{code: code for code in (*LANGUAGES, *OUTSIDE)}, "he": "iw", "tl": "fil", "nb": "no", "jw": "jv"}
# Codes that are words or abbreviations in file names ("my_test", "ms_coco", "mt" = machine translated). They name a
# language at the end of a name and as a folder only.
_WORDS = frozenset("am be co et he hi id is it la lo ml ms mt my no pa sd sm so st te tr".split())


def file_language(path: Path) -> str:
    """The language that a file's name and folder agree on: ..._de.json, marvl-sw.jsonl, de_test.json, de/test.jsonl.

    Codes count wherever they stand in the name, but see _WORDS. ValueError where none or several are named. A name in
    "_gmt" (XVNLI and MaRVL: "en/test-fr_gmt.jsonl") is translated by machine; the folder then says from what.
    """
    stem, translated = re.subn(r"[-_]gmt$", "", path.stem)
    *others, last = re.split(r"[-_.]", stem)
    said = [last, *(token for token in others if token not in _WORDS), *[path.parent.name] * (not translated)]
    codes = dict.fromkeys(_CODES[token] for token in said if token in _CODES)
    if len(codes) == 1:
        return next(iter(codes))
    problem = f"its name and folder say {' and '.join(codes)}" if codes else "its name and folder do not say"
    raise ValueError(
        f"--data {path}: which language is it? {problem[0].upper()}{problem[1:]}; "
        "let the name end in the code (..._de.json) or the folder be it (de/test.jsonl), and no other"
    )


def xm3600(path: Path, names) -> list[Item]:
    items = []
    for where, row in read_lines(path):
        image = f"{field(row, 'image/key', str, where)}.jpg"
        for code, content in row.items():
            if code in _CODES or (isinstance(content, dict) and "caption" in content):
                lang = language(code, where)
                labels = texts(content, "caption", f"{where}, {code}")
                items.append(Item((image,), lang, lang, BENCHMARK["xm3600"].format(L=names(lang)), labels))
    return items


def xflickrco(path: Path, names) -> list[Item]:
    lang, items = file_language(path), []
    for where, row in read_lines(path):
        image, labels = field(row, "img_path", str, where), texts(row, "sentences", where)
        items.append(Item((image,), lang, lang, BENCHMARK["xflickrco"].format(L=names(lang)), labels))
    return items


def xgqa(path: Path, names) -> list[Item]:
    lang, items = file_language(path), []
    for key, row in read_object(path).items():
        where = f"{path}: question {key[:40]!r}"
        image, asked, label = (field(row, name, str, where) for name in ("imageId", "question", "answer"))
        items.append(Item((f"{image}.jpg",), lang, "en", BENCHMARK["xgqa"].format(q=asked), (label,)))
    return items


def maxm(path: Path, names) -> list[Item]:
    content, items = read_object(path), []
    split = content.get("split")
    lang = language(split, str(path)) if isinstance(split, str) and len(split) < 4 else file_language(path)
    for i, row in enumerate(field(content, "annotations", list, str(path))):
        where = f"{path}: annotation {i}"
        image = field(row, "image_id", str, where)
        for n, pair in enumerate(field(row, "qa_pairs", list, where)):
            asked = field(pair, "question", str, f"{where}, question {n}")
            labels = texts(pair, "processed_answers", f"{where}, question {n}")
            items.append(Item((f"{image}.jpg",), lang, lang, BENCHMARK["maxm"].format(q=asked, L=names(lang)), labels))
    return items


def vqav2(questions: Path, annotations: Path) -> list[Item]:
    """VQAv2 comes in two files; the pictures are COCO's, with the split in their names."""
    asked, told = read_object(questions), read_object(annotations)
    split = re.search(r"(train|val|test)20\d\d", str(asked.get("data_subtype", "")) + questions.name)
    split = split[0] if split else "val2014"
    answers = {}
    for i, row in enumerate(field(told, "annotations", list, str(annotations))):
        where = f"{annotations}: annotation {i}"
        humans = field(row, "answers", list, where)
        key = field(row, "question_id", (int, str), where)
        answers[key] = tuple(field(human, "answer", str, where, empty=True) for human in humans)
    items = []
    for i, row in enumerate(field(asked, "questions", list, str(questions))):
        where = f"{questions}: question {i}"
        key, image = (field(row, name, (int, str), where) for name in ("question_id", "image_id"))
        text = field(row, "question", str, where)
        if key not in answers:
            raise ValueError(f"{annotations}: has no answers to question {key!r} of {questions}")
        if not re.fullmatch("[0-9]{1,12}", str(image)):
            raise ValueError(f"{where}: 'image_id' is {str(image)[:20]!r}, not the number of a picture of COCO")
        name = f"COCO_{split}_{int(image):012d}.jpg"
        items.append(Item((name,), "en", "en", BENCHMARK["vqav2"].format(q=text), answers[key]))
    return items


def xvnli(path: Path, names) -> list[Item]:
    lang, items = file_language(path), []
    for where, row in read_lines(path):
        image, text, verdict = (field(row, name, str, where) for name in ("Flikr30kID", "sentence2", "gold_label"))
        if verdict == "-":  # people did not agree
            continue
        if verdict not in VERDICTS:
            raise ValueError(f"{where}: the gold_label is {verdict!r}, none of {', '.join(VERDICTS)}")
        image = image if image.endswith(".jpg") else image + ".jpg"
        items.append(Item((image,), lang, "en", BENCHMARK["xvnli"].format(s=text), (VERDICTS[verdict],)))
    return items


def marvl(path: Path, names) -> list[Item]:
    items = []
    for where, row in read_lines(path):
        code, concept, text = (field(row, name, str, where) for name in ("language", "concept", "caption"))
        sides = [field(row, side, str, where) for side in ("left_img", "right_img")]
        label = "yes" if field(row, "label", bool, where) else "no"
        pictures = tuple(f"{code}/images/{concept}/{side}" for side in sides)
        items.append(Item(pictures, language(code, where), "en", BENCHMARK["marvl"].format(s=text), (label,)))
    return items


def pope(path: Path, names) -> list[Item]:
    items = []
    for where, row in read_lines(path):
        image, text, label = (field(row, name, str, where) for name in ("image", "text", "label"))
        if label not in ("yes", "no"):
            raise ValueError(f"{where}: the label is {label!r}, neither yes nor no")
        items.append(Item((image,), "en", "en", BENCHMARK["pope"].format(q=text), (label,)))
    return items


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
