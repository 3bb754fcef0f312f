"""Builders: files as their makers wrote them become examples that JsonMixture reads; every other file is named in one line."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from nanomblip.data import json_index, prompts
from nanomblip.data.builders import BUILDERS, build, fill, main, phrases
from nanomblip.data.json_mixture import JsonMixture
from nanomblip.data.languages import LANGUAGES
from nanomblip.data.sources import picture_keys

ROOT = Path(__file__).resolve().parents[2]


def save(path, value, **options):
    path.write_text(json.dumps(value, **options), encoding="utf-8")
    return str(path)


def coco_name(number, folder="train2014"):
    return f"COCO_{folder}_{number:012d}.jpg"


# number -> split: 9 and 25 are trained on, 42 is in Karpathy's val, 73 in test, 139 in restval
SPLITS = {9: "train", 25: "train", 42: "val", 73: "test", 139: "restval", 391895: "train"}


@pytest.fixture
def files(tmp_path):
    """The files of all data sets, with the fields and the nesting of the originals."""
    images = []
    for i, (number, split) in enumerate(SPLITS.items()):
        folder = "train2014" if split == "train" else "val2014"
        sentences = [
            dict(tokens=["a", "cat"], raw=raw, imgid=i, sentid=10 * i + k)
            for k, raw in enumerate([f"A cat on sofa {number}.", "Two  dogs\nand a #1 ball. "])
        ]
        images.append(
            dict(
                filepath=folder,
                sentids=[10 * i, 10 * i + 1],
                filename=coco_name(number, folder),
                imgid=i,
                split=split,
                sentences=sentences,
                cocoid=number,
            )
        )
    asked = [dict(image_id=n, question=f"Is this #{n} what color?", question_id=1000 * n + k) for n in (9, 25, 42) for k in (0, 1)]
    answered = [dict(question_type="what", multiple_choice_answer=f"answer {q['question_id']}", image_id=q["image_id"], answer_type="other", question_id=q["question_id"],
                     answers=[dict(answer="blue", answer_confidence="yes", answer_id=i) for i in range(1, 11)]) for q in asked]  # fmt: skip
    info = dict(description="VQA", year=2014, version="2.0")
    okvqa = [dict(split="train", image_id=n, question_id=f"q{n}", question="What is the man by the bags awaiting?", choices=["skateboarder", "train", "delivery", "cab"],
                  correct_choice_idx=3, direct_answers=["ride"] * 10, difficult_direct_answer=False,
                  rationales=["A train would not be on the street.", "He is waiting for a cab.", "The man is at a curb"]) for n in (9, 42, 139)]  # fmt: skip
    turn = lambda who, value: {"from": who, "value": value}
    talk = [dict(id=f"{n:012d}", image=f"{n:012d}.jpg", conversations=[
        turn("human", "What color is the bus?\n<image>"), turn("gpt", "It is 3.5 m long, e.g. red, and costs 1.50 dollars."),
        turn("human", "Why?"), turn("gpt", "One. Two. Three. Four.")]) for n in (25, 73)]  # fmt: skip
    detail = [
        dict(
            id="000000000009",
            image="000000000009.jpg",
            conversations=[turn("human", "<image>\nDescribe the\nimage."), turn("gpt", "A. B. C. D.\n\nE.")],
        )
    ]
    return dict(
        karpathy=save(tmp_path / "dataset_coco.json", dict(images=images, dataset="coco")),
        questions=save(tmp_path / "v2_questions.json", dict(info=info, task_type="Open-Ended", data_type="mscoco", license=dict(url="x"), data_subtype="train2014", questions=asked)),
        annotations=save(tmp_path / "v2_annotations.json", dict(info=info, license=dict(url="x"), data_subtype="train2014", annotations=answered, data_type="mscoco")),
        aokvqa=save(tmp_path / "aokvqa_v1p0_train.json", okvqa),
        conversation=save(tmp_path / "conversation_58k.json", talk, indent=2),
        detail=save(tmp_path / "detail_23k.json", detail),
        out=str(tmp_path / "out.json"),
    )  # fmt: skip


def make(dataset, **flags):
    cfg = BUILDERS[dataset][1](**flags)
    return build(dataset, cfg), read(flags["out"])


def read(path):
    """The examples, by way of the reader that training uses."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    mixture = JsonMixture([(str(path), None)], seed=0)
    assert len(mixture) == len(rows)
    for i, row in enumerate(rows):
        example = mixture.at(i)
        assert (example.prompt, example.target, mixture.image_id(i)) == (row["context"], row["label"], row["image_id"])
        assert row["context"].strip() and row["label"].strip() and "\n" not in row["context"] + row["label"]
    return rows


def matches(template, text):
    return re.fullmatch(re.sub(r"\\{\w\\}", "(.+)", re.escape(template)), text)


def test_coco_takes_karpathys_train_split_and_names_english(files):
    counts, rows = make("coco", karpathy=files["karpathy"], out=files["out"])
    assert [(r["label"], r["image_id"]) for r in rows] == [
        (text, coco_name(n)) for n in (9, 25, 391895) for text in (f"A cat on sofa {n}.", "Two dogs and a #1 ball.")]  # fmt: skip
    english = {t.format(L="English") for t in prompts.CAPTION + prompts.CAPTION_UNNAMED}
    assert all(r["context"] in english and set(r) == {"context", "label", "image_id"} for r in rows) and counts == {"caption": 6}


def test_vqav2_joins_question_and_answer_of_one_picture(files):
    counts, rows = make("vqav2", **{k: files[k] for k in ("karpathy", "questions", "annotations", "out")})
    assert counts == {"vqa": 4, "question": 4, "left out: picture not in Karpathy's train split": 2}, "number 42 is an evaluation picture"
    for vqa, question in zip(rows[::2], rows[1::2]):
        number = int(re.search(r"#(\d+)", question["label"])[1])
        assert vqa["image_id"] == question["image_id"] == coco_name(number), "the answer in a prompt belongs to the same picture"
        assert question["label"] in vqa["context"] and vqa["label"] in question["context"] and vqa["label"].startswith(f"answer {number}00")
        assert "English" in vqa["context"] and "English" in question["context"] and "#" in vqa["context"], "a # is no reason to drop a row"
    assert len({r["label"] for r in rows[::2]}) == 4


def test_aokvqa_has_every_rationale_and_never_an_answer_for_its_own_reason(files):
    counts, rows = make("aokvqa", karpathy=files["karpathy"], input=files["aokvqa"], out=files["out"])
    assert counts == {"reasoning": 3, "explanation": 3, "left out: picture not in Karpathy's train split": 2}
    for rationale, (reasoning, explanation) in zip(
        ["A train would not be on the street", "He is waiting for a cab", "The man is at a curb"], zip(rows[::2], rows[1::2])
    ):
        assert explanation["label"].removesuffix(".") == rationale and "cab" in explanation["context"]
        assert (
            rationale in reasoning["label"]
            and "cab" in reasoning["label"]
            and "cab because cab" not in reasoning["label"]
            and ".." not in reasoning["label"]
        )
        assert "cab" not in reasoning["context"], "the answer is not in the question"


def test_llava_pairs_keep_their_words_apart_and_decimals_are_no_sentences(files):
    counts, rows = make("llava", karpathy=files["karpathy"], input=files["conversation"], out=files["out"])
    assert [(r["context"], r["label"], r["image_id"]) for r in rows] == [
        ("What color is the bus?", "It is 3.5 m long, e.g. red, and costs 1.50 dollars.", coco_name(25))]  # fmt: skip
    assert counts == {"conversation": 1, "left out: answer of more than 3 sentences": 1, "left out: picture not in Karpathy's train split": 1}
    counts, rows = make("llava", karpathy=files["karpathy"], input=files["detail"], out=files["out"])
    assert [(r["context"], r["label"], r["image_id"]) for r in rows] == [("Describe the image.", "A. B. C. D. E.", coco_name(9))] and counts == {
        "detail": 1
    }


CAPTIONS = ["a red car on the street", "a red car in front of a house", "two dogs on the beach", "a cat on a sofa", "a man riding a wave"]


def capfilt_file(tmp_path, n=600, seed=0):
    rng = random.Random(seed)
    rows = [dict(url=f"http://static.flickr.com/{i}/{4385050000 + i}_b0f291553e.jpg", caption=rng.choice(CAPTIONS)) for i in range(n)]
    rows[7]["caption"] = "an xylophone"  # too rare
    return save(tmp_path / "ccs_synthetic_filtered_large.json", rows), rows


def test_capfilt_chooses_captions_by_phrase_and_lists_what_to_download(tmp_path):
    path, source = capfilt_file(tmp_path)
    out = tmp_path / "web.json"
    counts, rows = make("capfilt", input=path, out=str(out), each=20, match_share=0.5)
    caption = [r for r in rows if r["label"] in CAPTIONS]
    assert len(caption) == counts["caption"] and len(rows) == counts["caption"] + counts["match"]
    for r in caption:
        assert source[int(r["image_id"][:8])]["caption"] == r["label"], "row i of the source is picture i"
    assert "an xylophone" not in {r["label"] for r in rows}
    frequency = Counter(p for row in source for p in phrases(row["caption"]))
    chosen = Counter(p for r in caption for p in phrases(r["label"]))
    for phrase in frequency:  # about 20 by each of its own phrases, and what other phrases of the caption chose
        assert phrase == "xylophone" or 8 <= chosen[phrase] <= 75 < frequency[phrase], (phrase, chosen[phrase], frequency[phrase])
    urls = dict(line.split("\t") for line in Path(f"{out}.urls.tsv").read_text().splitlines())
    assert urls == {r["image_id"]: source[int(r["image_id"][:8])]["url"] for r in caption}
    match = [r for r in rows if r["label"] not in CAPTIONS]
    assert 0.3 < counts["match"] / counts["caption"] < 0.7
    said_yes = 0
    for r in match:
        right = source[int(r["image_id"][:8])]["caption"]
        asked = max((c for c in CAPTIONS if c in r["context"]), key=len)
        yes = r["label"].startswith("Yes")
        said_yes += yes
        assert yes == (asked == right) and (yes or not phrases(asked) & phrases(right)), (r, right)
    assert 0.25 < said_yes / len(match) < 0.75


def test_phrases():
    assert phrases("A red car on the street.") == {"red car", "street"} and phrases("the of") == set()
    assert phrases('a man\'s t-shirt, with "dogs"') == {"man's t-shirt", "dogs"}


def test_capfilt_leaves_out_flickr_pictures_of_evaluation_sets(tmp_path):
    path, source = capfilt_file(tmp_path)
    (tmp_path / "test_ann.jsonl").write_text(json.dumps(dict(sentences=["a dog"], img_path=f"{4385050000 + 3}.jpg")) + "\n")
    everything = dict(input=path, out=str(tmp_path / "o.json"), often=1, each=10**9)
    assert "00000003.jpg" in {r["image_id"] for r in make("capfilt", **everything)[1]}
    counts, rows = make("capfilt", **everything, exclude=[str(tmp_path / "test_ann.jsonl")])
    assert counts["left out: picture of an --exclude file"] == 1 and "00000003.jpg" not in {r["image_id"] for r in rows}


@pytest.mark.parametrize("text", ['{"image/key": "00a411001ff7dd4f", "en": {"caption": ["cats"]}}', '{"1": {"imageId": "COCO_val2014_000000391895"}}',
                                  '{"id": 391895}', "x " * 600_000 + "\n391895.jpg"])  # fmt: skip
def test_pictures_of_evaluation_sets_are_left_out_whatever_the_format(tmp_path, files, text):
    (tmp_path / "eval").write_text(text)
    counts, rows = make("coco", karpathy=files["karpathy"], out=files["out"], exclude=[str(tmp_path / "eval")])
    expected = {9, 25, 391895} - ({391895} if "391895" in text else set())
    assert {r["image_id"] for r in rows} == {coco_name(n) for n in expected}
    assert picture_keys("000411001ff7dd4f.jpg, n278495, because, 12345") == {"411001ff7dd4f", "n278495"}


def imagenet_files(tmp_path, missing=0):
    for i in range(1000 - missing):
        (tmp_path / "train" / f"n{i:08d}").mkdir(parents=True)
    for i in (0, 1, 2, 3):
        for k in range(5):
            (tmp_path / "train" / f"n{i:08d}" / f"n{i:08d}_{k}.JPEG").write_bytes(b"")
    babel = {"DE": [[0, 1, 2], ["Schleie", "Goldfisch", "Goldfisch"]], "HE": [[1], ["דג זהב"]], "TL": [[3, 0], ["pating", "tenka"]], "AST": [[0], ["tenca"]],
             "EN": [[0, 1, 2, 3], ["tench", "goldfish", "white shark", "tiger shark"]]}  # fmt: skip
    return dict(images=str(tmp_path / "train"), babel=save(tmp_path / "babel_imagenet-298.json", babel, ensure_ascii=False)), babel


def test_imagenet_names_every_class_in_every_language_and_twins_are_no_mistake(tmp_path):
    flags, babel = imagenet_files(tmp_path)
    counts, rows = make("imagenet", **flags, out=str(tmp_path / "o.json"), passes=20, texts=True)
    assert counts == {"naming": 200, "exists": 200}, "10 names, 20 passes"
    number = lambda r: int(r["image_id"][1:9])
    for r in rows:
        code = {"iw": "HE", "fil": "TL"}.get(r["lang"], r["lang"].upper())
        mine = dict(zip(*babel[code]))[number(r)]
        if r["task"] == "naming":
            assert (
                r["label"] == mine
                and ("{L}" not in r["context"])
                and (LANGUAGES[r["lang"]].name in r["context"] or any(r["context"] == t for t in prompts.NAMING))
            )
        else:
            assert r["texts"]["name"] in r["context"] and r["label"].startswith("Yes" if r["texts"]["name"] == mine else "No"), (
                "two classes of one name are one thing"
            )
    assert Counter(r["lang"] for r in rows) == dict(de=120, en=160, fil=80, iw=40)
    english = [r for r in rows if r["task"] == "exists" and r["lang"] == "en"]
    assert 0.4 < sum(r["label"].startswith("Yes") for r in english) / len(english) < 0.75
    assert len({r["image_id"] for r in rows if number(r) == 1}) == 5


def test_the_same_flags_make_the_same_bytes_and_another_seed_others(tmp_path, files):
    flags = {k: files[k] for k in ("karpathy", "questions", "annotations")}
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make("vqav2", **flags, out=str(tmp_path / name), seed=seed)
        texts.append((tmp_path / name).read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_texts_let_a_translator_fill_the_template_anew(files):
    counts, rows = make("vqav2", **{k: files[k] for k in ("karpathy", "questions", "annotations", "out")}, texts=True, tasks=["question"])
    assert set(counts) == {"question", "left out: picture not in Karpathy's train split"}
    row = rows[0]
    context, label = fill(random.Random(0), row["task"], "sw", dict(row["texts"], question="Hii ni rangi gani?"))
    assert label == "Hii ni rangi gani?" and "Swahili" in context and row["texts"]["answer"] in context
    context, label = fill(random.Random(0), "vqa", "sw", dict(question="Hii ni rangi gani?", answer="blue"), answer_lang="en")
    assert label == "blue" and "English" in context and "Swahili" not in context, "the instruction names the language of the answer"
    for _ in range(20):
        assert "Swahili" in fill(random.Random(_), "caption", "sw", dict(text="paka"))[0]
    assert fill(random.Random(0), "match", "sw", dict(text="paka", fits=False))[1].startswith("No")


@pytest.mark.parametrize("dataset,flag,text,problem", [
    ("coco", "karpathy", "[]", "does not begin with {"), ("coco", "karpathy", '{"annotations": []}', "no 'images'"), ("coco", "karpathy", '{"images": {}}', "'images' does not begin"),
    ("coco", "karpathy", '{"images": [{"filename": "x"}]}', "'split' is missing; Karpathy's dataset_coco.json has filename, split"),
    ("coco", "karpathy", '{"images": []}', "no picture of the split 'train'"), ("coco", "karpathy", '{"images": [', "ends in the middle"),
    ("coco", "karpathy", '{"images": [{"filename": "a", "split": "train", "cocoid": 1, "sentences": ["a cat"]}]}', "no text 'raw'"),
    ("vqav2", "questions", '{"annotations": []}', "no 'questions'"), ("vqav2", "annotations", '{"annotations": []}', "no answer to question_id 9000"),
    ("vqav2", "questions", '{"questions": []}', "more answers than questions"), ("vqav2", "questions", "SELF.annotations", "no 'questions'"),
    ("aokvqa", "input", '[{"split": "val", "image_id": 9, "question": "q", "choices": ["a"], "correct_choice_idx": 0, "rationales": []}]', "split 'val'"),
    ("aokvqa", "input", '[{"split": "train", "image_id": 9, "question": "q", "choices": ["a"], "correct_choice_idx": 1, "rationales": []}]', "no right choice"),
    ("aokvqa", "input", '[{"split": "train", "image_id": true, "question": "q", "choices": ["a"], "correct_choice_idx": 0, "rationales": []}]', "'image_id' is not of type int"),
    ("llava", "input", '[{"id": "1", "image": "000000000009.jpg", "conversations": [{"from": "gpt", "value": "x"}]}]', "not human, gpt"),
    ("llava", "input", '[{"id": "1", "image": "abc.jpg", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "x"}]}]', "no picture of COCO"),
    ("llava", "input", '[{"context": "q", "label": "a", "image_id": "1"}]', "'id' is missing"), ("capfilt", "input", '{"url": "caption"}', r"does not begin with \["),
    ("capfilt", "input", '[["url", "caption"]]', "not an object with url, caption"), ("capfilt", "input", "PK\x03\x04", r"does not begin with \["),
])  # fmt: skip
def test_another_file_gets_one_line_that_names_it_and_what_was_expected(tmp_path, files, dataset, flag, text, problem):
    wrong = tmp_path / "wrong file.json"
    wrong.write_text(Path(files[text[5:]]).read_text() if text.startswith("SELF.") else text)
    inputs = dict(
        vqav2=dict(questions=files["questions"], annotations=files["annotations"]),
        aokvqa=dict(input=files["aokvqa"]),
        llava=dict(input=files["detail"]),
    )
    flags = dict(dict(karpathy=files["karpathy"]) if dataset != "capfilt" else {}, **inputs.get(dataset, {}), out=files["out"])
    flags[flag] = str(wrong)
    with pytest.raises(ValueError, match=problem) as error:
        build(dataset, BUILDERS[dataset][1](**flags))
    named = wrong if "more answers" not in problem else Path(files["annotations"])
    assert str(named) in str(error.value) and "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir() if "out.json" in p.name) == [], "nothing half written"


@pytest.mark.parametrize("babel,problem", [("[]", "not an object"), ('{"DE": [1, 2]}', "'de' is no pair"), ('{"DE": [[1], []]}', "'de' is no pair"),
                                           ('{"DE": [[1000], ["x"]]}', "'de' is no pair"), ('{"XX": [[1], ["x"]]}', "no language of mBLIP"), ("{", "JSON")])  # fmt: skip
def test_other_names_of_classes_are_refused(tmp_path, babel, problem):
    flags, _ = imagenet_files(tmp_path)
    (tmp_path / "babel_imagenet-298.json").write_text(babel)
    with pytest.raises(ValueError, match=problem) as error:
        build("imagenet", BUILDERS["imagenet"][1](**flags, out=str(tmp_path / "o.json")))
    assert "babel_imagenet-298.json" in str(error.value)


def test_a_part_of_imagenet_is_refused_for_its_folders_are_the_classes(tmp_path):
    flags, _ = imagenet_files(tmp_path, missing=1)
    with pytest.raises(ValueError, match="999 folders"):
        build("imagenet", BUILDERS["imagenet"][1](**flags, out=str(tmp_path / "o.json")))


def command(*words):
    return subprocess.run([sys.executable, "-m", "nanomblip.data.builders", *map(str, words)], cwd=ROOT, capture_output=True, text=True)


def test_the_command_line(files):
    done = command("coco", "--karpathy", files["karpathy"], "--out", files["out"])
    assert done.returncode == 0 and done.stdout.split() == ["6", "caption"] and len(read(files["out"])) == 6
    done = command("coco", "--out", "x")
    assert done.returncode == 2 and "--karpathy is missing: dataset_coco.json" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    given = ["--karpathy", files["karpathy"], "--out", files["out"]]
    for words, message in (
        (["cococo"], "'cococo' is none of them"),
        (["--out", "x"], "give one"),
        ([], "give one"),
        (["coco", "--tasks", "vqa", *given], "--tasks vqa: coco has caption"),
    ):
        with pytest.raises(ValueError, match=message):
            main(words)
    with pytest.raises(FileNotFoundError, match="/no/such"):
        main(["coco", *given, "--karpathy", "/no/such"])


def test_values_before_the_array_are_passed_over_at_any_chunk(tmp_path, monkeypatch):
    text = '{"version": 123456789, "note": "a \\"questions\\": [", "none": null, "questions": [{"a": 1}, {"a": 2}], "rest": broken'
    (tmp_path / "q.json").write_text(text)
    for chunk in (1, 2, 3, 7, 1 << 20):
        monkeypatch.setattr(json_index, "CHUNK", chunk)
        found = [row for _, row in json_index.read_array(tmp_path / "q.json", lambda row: None, "questions")]
        assert found == [{"a": 1}, {"a": 2}, None]


def test_a_long_list_is_read_in_flat_memory(tmp_path):
    """150,000 web captions, 22 MB: as Python objects they would take 60 MB more."""
    path = tmp_path / "ccs.json"
    rng = random.Random(0)
    with open(path, "w") as file:
        file.write("[")
        for i in range(150_000):
            file.write(
                ("," if i else "")
                + json.dumps(dict(url=f"http://example.org/{i:09d}/{'x' * 80}.jpg", caption=f"a {rng.choice('abc')}{rng.randrange(99999)} on a sofa"))
            )
        file.write("]")
    peak = "import resource, sys; sys.argv = ['x']; from nanomblip.data.builders import *; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; " \
           f"build('capfilt', CapFilt(input={str(path)!r}, out={str(tmp_path / 'o.json')!r})); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", peak], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 95_000, done.stderr  # KiB; 64 MB are the table of counts
