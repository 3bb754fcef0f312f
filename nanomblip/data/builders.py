"""From each data set's own files to examples in the released format: one JSON array of {context, label, image_id}.

    python -m nanomblip.data.builders coco --karpathy dataset_coco.json --out coco.json

    data set    its files
    coco        --karpathy dataset_coco.json
    vqav2       --karpathy, --questions v2_OpenEnded_mscoco_train2014_questions.json,
                --annotations v2_mscoco_train2014_annotations.json
    aokvqa      --karpathy, --input aokvqa_v1p0_train.json
    llava       --karpathy, --input detail_23k.json or conversation_58k.json
    capfilt     --input ccs_synthetic_filtered_large.json
    imagenet    --images ILSVRC2012/train, --babel babel_imagenet-298.json

Tasks and templates are the paper's (prompts.py). Texts are English, but for ImageNet, whose names are in 96 languages.
With --texts each example also has its `task`, `lang` and `texts`: a translator puts these into another language and
calls `fill` again, so that an instruction always names the language its answer is in.

Which pictures: of COCO, for all four sets that show it, Karpathy's train split. A-OKVQA and LLaVA name pictures of
COCO 2017, whose train split holds Karpathy's val and test; these rows are left out. Pictures named in any --exclude
file (captions of XM3600, Flickr30k, xGQA ...) are left out everywhere. The number of rows left out is printed, by
reason.

Beside the paper: web captions are chosen by runs of content words instead of noun phrases, and the captions that do
not fit ("match") share no such run with the right one, instead of coming from CLIP's ranks.
"""

import json
import random
import re
import sys
import zlib
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanomblip.data import prompts
from nanomblip.data.decode import EXTENSIONS
from nanomblip.data.languages import LANGUAGES
from nanomblip.data.scripts import normal
from nanomblip.data.sources import Pictures, clean, expect, rows
from nanomblip.flags import flag, parse_flags, run_main
from nanomblip.weights.files import read_json, write_atomic


def fill(rng: random.Random, task: str, lang: str, texts: dict, answer_lang: str | None = None) -> tuple[str, str]:
    """(context, label) of an example from its texts: the one place where a template and a text meet.

    lang: the language of the texts, but of a VQA answer, which is in `answer_lang` (None: the same). English captions
    are also asked for by the templates that name no language. `fits` and `there` of yes-or-no tasks are truth values.
    """
    name, answer_name = LANGUAGES[lang].name, LANGUAGES[answer_lang or lang].name
    if task == "caption":
        named = prompts.CAPTION + prompts.CAPTION_UNNAMED if lang == "en" else prompts.CAPTION
        return rng.choice(named).format(L=name), texts["text"]
    if task in ("detail", "conversation"):
        return texts["question"], texts["answer"]
    if task == "vqa":
        return prompts.vqa(rng, answer_name, **texts)
    if task in ("question", "naming"):
        return getattr(prompts, task)(rng, name, **texts)
    return getattr(prompts, task)(
        rng, **texts
    )  # reasoning and explanation are English; match and exists are answered in English


# ---- one builder a data set: yields (task, language, texts, image_id) ------------------------------------------------


@dataclass(frozen=True)
class Common:
    out: str = flag(None, "the file to write")
    exclude: list = flag(
        (), "files that name pictures of evaluation sets, in any format: none of them is used", many=True
    )
    tasks: list = flag((), "some of the tasks of the data set; nothing: all", many=True)
    texts: bool = flag(False, "keep task, lang and texts in each example, for a translator")
    seed: int = flag(42, "of the choice of templates")


@dataclass(frozen=True)
class Coco(Common):
    karpathy: str = flag(None, "dataset_coco.json, Karpathy's splits and captions of COCO")


def coco(cfg: Coco, pictures: Pictures):
    fields = dict(filename=str, split=str, cocoid=int, sentences=list)
    for row in rows(cfg.karpathy, fields, "Karpathy's dataset_coco.json", "images"):
        if row["split"] == "train" and (name := pictures.of_coco(row["cocoid"])):
            for sentence in row["sentences"]:
                good = isinstance(sentence, dict) and isinstance(sentence.get("raw"), str)
                expect(good, cfg.karpathy, f"a sentence of {name} has no text 'raw'", "Karpathy's dataset_coco.json")
                yield "caption", "en", dict(text=clean(sentence["raw"])), name


@dataclass(frozen=True)
class VQAv2(Coco):
    questions: str = flag(None, "v2_OpenEnded_mscoco_train2014_questions.json")
    annotations: str = flag(None, "v2_mscoco_train2014_annotations.json")


def vqav2(cfg: VQAv2, pictures: Pictures):
    fields = dict(image_id=int, question_id=int)
    asked = rows(cfg.questions, {**fields, "question": str}, "VQAv2's questions", "questions")
    answered = rows(cfg.annotations, {**fields, "multiple_choice_answer": str}, "VQAv2's annotations", "annotations")
    for question in asked:
        answer = next(answered, None)
        same = answer is not None and all(answer[field] == question[field] for field in fields)
        what = f"the annotations of {cfg.questions} in its order"
        expect(same, cfg.annotations, f"no answer to question_id {question['question_id']} in its place", what)
        if name := pictures.of_coco(question["image_id"]):
            texts = dict(question=clean(question["question"]), answer=clean(answer["multiple_choice_answer"]))
            yield "vqa", "en", texts, name
            yield "question", "en", texts, name
    expect(
        next(answered, None) is None,
        cfg.annotations,
        "more answers than questions",
        f"the annotations of {cfg.questions}",
    )


@dataclass(frozen=True)
class AOKVQA(Coco):
    input: str = flag(None, "aokvqa_v1p0_train.json")


def aokvqa(cfg: AOKVQA, pictures: Pictures):
    what = "aokvqa_v1p0_train.json"
    fields = dict(split=str, image_id=int, question=str, choices=list, correct_choice_idx=int, rationales=list)
    for row in rows(cfg.input, fields, what):
        expect(row["split"] == "train", cfg.input, f"a row of the split {row['split']!r}", what)
        strings = all(isinstance(text, str) for text in [*row["choices"], *row["rationales"]])
        good = strings and 0 <= row["correct_choice_idx"] < len(row["choices"])
        expect(good, cfg.input, f"question {row['question']!r} has no right choice or no texts", what)
        if name := pictures.of_coco(row["image_id"]):
            texts = dict(question=clean(row["question"]), answer=clean(row["choices"][row["correct_choice_idx"]]))
            for rationale in filter(None, map(clean, row["rationales"])):
                for task in ("reasoning", "explanation"):
                    yield task, "en", dict(texts, rationale=rationale), name


@dataclass(frozen=True)
class LLaVA(Coco):
    input: str = flag(None, "detail_23k.json or conversation_58k.json")
    sentences: int = flag(3, "a longer answer of a conversation is left out")


def llava(cfg: LLaVA, pictures: Pictures):
    what = "LLaVA's detail_23k.json or conversation_58k.json"
    for row in rows(cfg.input, dict(id=str, image=str, conversations=list), what):
        turns = row["conversations"]
        good = turns and all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns)
        speakers = [turn.get("from") for turn in turns] if good else []
        right = good and speakers == ["human", "gpt"] * (len(turns) // 2)
        expect(right, cfg.input, f"the turns of id {row['id']!r} are not human, gpt, human, gpt ...", what)
        number = Path(row["image"]).stem.rpartition("_")[2]
        expect(number.isdecimal(), cfg.input, f"image {row['image']!r} is no picture of COCO", what)
        if name := pictures.of_coco(int(number)):
            for human, gpt in zip(turns[::2], turns[1::2]):
                texts = dict(question=clean(human["value"].replace("<image>", " ")), answer=clean(gpt["value"]))
                task = "detail" if len(turns) == 2 else "conversation"
                # A full stop inside a number or word ends no sentence.
                if task == "conversation" and len(re.findall(r"[.!?](?=\s|$)", texts["answer"])) > cfg.sentences:
                    pictures.left_out[f"answer of more than {cfg.sentences} sentences"] += 1
                elif all(texts.values()):
                    yield task, "en", texts, name


@dataclass(frozen=True)
class CapFilt(Common):
    input: str = flag(None, "ccs_synthetic_filtered_large.json, BLIP's captions of CC3M, CC12M and SBU")
    often: int = flag(10, "a phrase in fewer captions chooses none")
    each: int = flag(30, "captions that a phrase chooses, on average over seeds")
    match_share: float = flag(0.26, "share of the chosen captions that also become a question whether they fit")


STOP_WORDS = frozenset(
    """a an the of in on at with and or to for from by is are was were be being been it its this that these those there
    his her their he she they him them as into onto over under up down out off near next behind front top some one two
    three four other another while who which very has have having not no""".split()
)


def phrases(caption: str) -> set[str]:
    """The runs of words between stop words and marks, in lower case: "a red car on the street" -> {"red car",
    "street"}."""
    found, run = set(), []
    for token in [*re.findall(r"[^\W_]+(?:['-][^\W_]+)*|[^\w\s]", normal(caption)), "."]:
        if token in STOP_WORDS or not token[0].isalnum():
            found |= {" ".join(run)} if run else set()
            run = []
        else:
            run.append(token)
    return found


def capfilt(cfg: CapFilt, pictures: Pictures):
    """Row i is picture `{i:08d}.jpg`; its address goes to OUT.urls.tsv, from which it can be downloaded.

    Twice through the file. First each phrase is counted, in a table of 2^24 places by hash, so memory does not grow;
    then a phrase that c captions have chooses each of them with probability each / c.
    """
    what, fields = "ccs_synthetic_filtered_large.json", dict(url=str, caption=str)
    place = lambda phrase: zlib.crc32(phrase.encode()) & ((1 << 24) - 1)
    counts, recent = np.zeros(1 << 24, np.uint32), deque(maxlen=1000)
    for row in rows(cfg.input, fields, what):
        for phrase in phrases(row["caption"]):
            counts[place(phrase)] += 1
    for i, row in enumerate(rows(cfg.input, fields, what)):
        rng, text, found = (
            random.Random(f"{cfg.seed}/choice/{i}"),
            clean(row["caption"]),
            sorted(phrases(row["caption"])),
        )
        often = [n for n in (int(counts[place(phrase)]) for phrase in found) if n >= cfg.often]
        if not any([rng.random() * n < cfg.each for n in often]) or not pictures.usable(row["url"]):
            continue
        name = f"{i:08d}.jpg"
        pictures.addresses.write(f"{name}\t{clean(row['url'])}\n")
        yield "caption", "en", dict(text=text), name
        others = [other for other, its in recent if not its & set(found)]
        if others and rng.random() < cfg.match_share:
            fits = rng.random() < 0.5
            yield "match", "en", dict(text=text if fits else rng.choice(others), fits=fits), name
        recent.append((text, set(found)))


@dataclass(frozen=True)
class ImageNet(Common):
    images: str = flag(None, "folder of ImageNet's train pictures: 1,000 folders n01440764 ... of JPEG files")
    babel: str = flag(None, "babel_imagenet-298.json, names of the classes")
    passes: int = flag(8, "pictures for each class in each language")


BABEL_CODES = {"iw": "HE", "fil": "TL"}


def imagenet(cfg: ImageNet, pictures: Pictures):
    """Names in every language, and "is there a ...?": half true, a quarter another class, a quarter the next one in
    the list. A class with the same name is the same thing, so the answer to it is yes."""
    what = "Babel-ImageNet's {code: [[class numbers], [names]]}"
    folders = sorted(path.name for path in Path(cfg.images).iterdir() if re.fullmatch(r"n\d{8}", path.name))
    expect(
        len(folders) == 1000,
        cfg.images,
        f"{len(folders)} folders such as n01440764",
        "1,000, for classes go by their order",
    )
    table, names = read_json(cfg.babel), defaultdict(list)
    expect(isinstance(table, dict), cfg.babel, "not an object", what)
    for lang in LANGUAGES:
        pair = table.get(BABEL_CODES.get(lang, lang.upper()), [[], []])
        good = isinstance(pair, list) and list(map(type, pair)) == [list, list] and len(pair[0]) == len(pair[1])
        good = (
            good
            and all(isinstance(n, int) and 0 <= n < 1000 for n in pair[0])
            and all(isinstance(t, str) for t in pair[1])
        )
        expect(good, cfg.babel, f"{lang!r} is no pair of lists", what)
        names[lang] = [(number, clean(name)) for number, name in zip(*pair) if name.strip()]
    expect(any(names.values()), cfg.babel, "no language of mBLIP", what)
    spoken = defaultdict(list)  # class -> [(language, place in its list)]
    for lang, of_lang in names.items():
        for k, (number, _) in enumerate(of_lang):
            spoken[number].append((lang, k))
    for number, uses in sorted(spoken.items()):
        folder = folders[number]
        files = sorted(path.name for path in Path(cfg.images, folder).iterdir() if path.suffix.lower() in EXTENSIONS)
        files = [f"{folder}/{name}" for name in files if pictures.usable(name)]
        expect(bool(files), f"{cfg.images}/{folder}", "no picture", "a folder of JPEG files")
        rng = random.Random(f"{cfg.seed}/class/{number}")
        rng.shuffle(files)
        shown = 0
        for lang, k in uses * cfg.passes:
            of_lang, name = names[lang], names[lang][k][1]
            yield "naming", lang, dict(name=name), files[shown % len(files)]
            draw = rng.random()
            other = rng.randrange(len(of_lang)) if draw < 0.75 else (k + 1) % len(of_lang)
            asked = name if draw < 0.5 else of_lang[other][1]
            yield "exists", lang, dict(name=asked, there=normal(asked) == normal(name)), files[(shown + 1) % len(files)]
            shown += 2


# ---- writing --------------------------------------------------------------------------------------------------------

# data set -> (builder, its flags, its tasks)
BUILDERS = {
    "coco": (coco, Coco, ("caption",)),
    "vqav2": (vqav2, VQAv2, ("vqa", "question")),
    "aokvqa": (aokvqa, AOKVQA, ("reasoning", "explanation")),
    "llava": (llava, LLaVA, ("detail", "conversation")),
    "imagenet": (imagenet, ImageNet, ("naming", "exists")),
    "capfilt": (capfilt, CapFilt, ("caption", "match")),
}


def build(dataset: str, cfg) -> Counter:
    """Write cfg.out and return how many examples each task has and how many rows were left out, by reason.

    The file appears whole or not at all. Same input and flags, same bytes.
    """
    make, kind, tasks = BUILDERS[dataset]
    for name, value in vars(cfg).items():
        if value is None:
            raise ValueError(f"--{name} is missing: {kind.__dataclass_fields__[name].metadata['help']}")
    wanted = cfg.tasks or tasks
    for task in set(wanted) - set(tasks):
        raise ValueError(f"--tasks {task}: {dataset} has {', '.join(tasks)}")
    pictures, written = Pictures(cfg.exclude, getattr(cfg, "karpathy", None)), Counter()

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            for n, (task, lang, texts, image_id) in enumerate(make(cfg, pictures)):
                if task not in wanted:
                    continue
                context, label = fill(random.Random(f"{cfg.seed}/{dataset}/{n}"), task, lang, texts)
                row = dict(context=context, label=label, image_id=image_id)
                row |= dict(task=task, lang=lang, texts=texts) if cfg.texts else {}
                file.write((",\n" if written.total() else "[\n") + json.dumps(row, ensure_ascii=False))
                written[task] += 1
            file.write("\n]\n" if written.total() else "[]\n")

    def write_with_addresses(temporary):
        with open(temporary, "w", encoding="utf-8") as pictures.addresses:
            write_atomic(Path(cfg.out), write)

    if dataset == "capfilt":
        write_atomic(Path(f"{cfg.out}.urls.tsv"), write_with_addresses)
    else:
        write_atomic(Path(cfg.out), write)
    return Counter({**written, **{f"left out: {why}": count for why, count in pictures.left_out.items()}})


def main(argv: list[str]) -> None:
    if not argv or argv[0] not in BUILDERS:
        given = f"{argv[0]!r} is none of them" if argv and not argv[0].startswith("-") else "give one"
        raise ValueError(f"data sets are {', '.join(BUILDERS)}; {given}, then --help for its flags")
    cfg = parse_flags(BUILDERS[argv[0]][1], argv[1:], f"Examples of {argv[0]} in the released format.")
    for what, count in build(argv[0], cfg).items():
        print(f"{count:>12,}  {what}")
    print(f"wrote {cfg.out}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
