"""The benchmarks' own file formats, field by field, and the command that measures a model on them."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import randomise
from PIL import Image

from nanomblip.data.emoji import ROOT as DATA
from nanomblip.data.emoji import load_emoji
from nanomblip.data.image import ImageConfig
from nanomblip.measure import evaluate
from nanomblip.measure.benchmarks import Item, file_language, read_benchmark
from nanomblip.measure.evaluate import emoji_items
from nanomblip.measure.metrics import segmenter
from nanomblip.measure.scores import CHANCE, groups_of, report, scores_of, summarise
from nanomblip.model.mblip import MBLIP, PRESETS
from nanomblip.weights.files import write_json
from nanomblip.weights.save import save_mblip

EMOJI = load_emoji("core")
LANGUAGE_ID = evaluate.LanguageID(EMOJI.names)
SENTENCE_ID = evaluate.LanguageID({lang: EMOJI.names[lang] for lang in ("de", "sw")})  # those that it knows can be told apart


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def whole(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def xm3600(root):
    captions = lambda *texts: {"caption": list(texts), "caption/tokenized": list(texts), "caption/tokenized/lowercase": [t.lower() for t in texts]}
    rows = [{"image/key": f"{i:016x}", "image/locale": "de", "de": captions(f"Ein Hund {i}", "Hund"), "en": captions("A dog", f"dog {i}"),
             "he": captions("כלב"), "hr": captions("Pas"), "fa": captions("سگ"), "th": captions("หมา")} for i in range(3)]  # fmt: skip
    return lines(root / "captions.jsonl", rows)


def test_xm3600(tmp_path):
    items = read_benchmark("xm3600", [xm3600(tmp_path)])
    assert len(items) == 18 and items[0] == Item(("0000000000000000.jpg",), "de", "de", "Caption in German: ", ("Ein Hund 0", "Hund"))
    assert {i.lang: i.prompt for i in items} == {"de": "Caption in German: ", "en": "Caption in English: ", "iw": "Caption in Hebrew: ",
                                                 "hr": "Caption in Croatian: ", "fa": "Caption in Persian: ", "th": "Caption in Thai: "}  # fmt: skip
    paper = {i.lang: i.prompt for i in read_benchmark("xm3600", [str(tmp_path / "captions.jsonl")], paper_names=True)}
    assert paper["fa"] == "Caption in Farsi: " and paper["de"] == "Caption in German: "


def test_xflickrco(tmp_path):
    de = lines(tmp_path / "de" / "test.jsonl", [{"sentences": ["Zwei Männer", "Männer"], "id": 0, "img_path": "1007129816.jpg"}])
    ja = lines(tmp_path / "ja" / "test.jsonl", [{"sentences": ["二人の男"], "id": 0, "img_path": "COCO_val2014_000000000042.jpg"}])
    items = read_benchmark("xflickrco", [de, ja])
    assert items == [Item(("1007129816.jpg",), "de", "de", "Caption in German: ", ("Zwei Männer", "Männer")),
                     Item(("COCO_val2014_000000000042.jpg",), "ja", "ja", "Caption in Japanese: ", ("二人の男",))]  # fmt: skip


def xgqa(root, name="testdev_balanced_questions_bn.json"):
    return whole(root / name, {"20572": {"isBalanced": True, "groups": {"global": None}, "answer": "no", "imageId": "n161313",
                                         "question": "ছবিটি কি ডানদিকে?", "types": {"structural": "verify"}}})  # fmt: skip


def test_xgqa(tmp_path):
    want = Item(("n161313.jpg",), "bn", "en", "Question: ছবিটি কি ডানদিকে? Short answer in English:", ("no",))
    assert read_benchmark("xgqa", [xgqa(tmp_path)]) == [want]
    assert read_benchmark("xgqa", [xgqa(tmp_path / "bn", "test.json")]) == [want]


def test_maxm(tmp_path):
    file = whole(tmp_path / "maxm_v1_iw.json", {"dataset": "maxm_v1", "version": "1.0", "split": "iw", "annotations": [
        {"image_id": "00a1", "image_url": "http://x", "qa_pairs": [
            {"question_id": "1", "question": "מה זה?", "answers": ["כלב"], "processed_answers": ["כלב", "הכלב"], "is_collection": False},
            {"question_id": "2", "question": "כמה?", "answers": ["2"], "processed_answers": ["2"], "is_collection": True}]}]})  # fmt: skip
    items = read_benchmark("maxm", [file])
    assert items[0] == Item(("00a1.jpg",), "iw", "iw", "Question: מה זה? Short answer in Hebrew:", ("כלב", "הכלב")) and len(items) == 2


def test_vqav2(tmp_path):
    questions = whole(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", {
        "info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014", "license": {},
        "questions": [{"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}]})  # fmt: skip
    annotations = whole(tmp_path / "v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": [
        {"question_type": "none of the above", "multiple_choice_answer": "down", "image_id": 262148, "answer_type": "other", "question_id": 262148000,
         "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(["down"] * 7 + ["at table"] * 3)]}]})  # fmt: skip
    (item,) = read_benchmark("vqav2", [questions, annotations])
    assert item.images == ("COCO_val2014_000000262148.jpg",) and len(item.labels) == 10
    assert item.prompt == "Question: Where is he looking? Short answer in English:"
    assert scores_of("vqav2", [item] * 2, ["Down.", "at a table"], None)["en"]["vqa_accuracy"] == pytest.approx([1.0, 0.9])
    with pytest.raises(ValueError, match="two files"):
        read_benchmark("vqav2", [questions])
    with pytest.raises(ValueError, match="no answers to question 262148000"):
        read_benchmark("vqav2", [questions, whole(tmp_path / "other.json", {"annotations": [{"question_id": 1, "answers": [{"answer": "x"}]}]})])


def test_xvnli(tmp_path):
    row = {"annotator_labels": ["entailment"], "gold_label": "entailment", "Flikr30kID": "4705552913.jpg", "pairID": "4705552913.jpg#2r1e",
           "sentence1": "Two women", "sentence2": "Zwei Frauen"}  # fmt: skip
    file = lines(tmp_path / "ru" / "test.jsonl", [row, {**row, "gold_label": "-"}, {**row, "gold_label": "neutral"}, {**row, "gold_label": "contradiction"}])
    items = read_benchmark("xvnli", [file])
    assert [i.labels for i in items] == [("yes",), ("maybe",), ("no",)] and items[0].lang == "ru" and items[0].answer_lang == "en"
    assert items[0].images == ("4705552913.jpg",)
    assert items[0].prompt == 'Is it guaranteed true that "Zwei Frauen"? Yes, no, or maybe? Answer in English:'


def marvl(root):
    return lines(root / "marvl-sw.jsonl", [{"concept": "39-Panen", "language": "sw", "caption": "Picha {moja}", "left_img": "39-8.jpg", "right_img": "39-2.jpg",
                                            "annotator_info": {"annotator_id": "sw_01"}, "chapter": "Agriculture", "id": f"sw-{i}", "label": bool(i % 2)}
                                           for i in range(4)])  # fmt: skip


def test_marvl(tmp_path):
    items = read_benchmark("marvl", [marvl(tmp_path)])
    assert items[1] == Item(("sw/images/39-Panen/39-8.jpg", "sw/images/39-Panen/39-2.jpg"), "sw", "en",
                            'Based on the two images, is it correct to say "Picha {moja}"? Yes or no? Answer in English:', ("yes",))  # fmt: skip
    assert items[0].labels == ("no",)


def test_pope(tmp_path):
    file = lines(tmp_path / "coco_pope_random.json", [{"question_id": i, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the image?",
                                                       "label": label} for i, label in enumerate(["yes", "no", "no", "yes"])])  # fmt: skip
    items = read_benchmark("pope", [file])
    assert items[0] == Item(("COCO_val2014_000000310196.jpg",), "en", "en", "Is there a snowboard in the image?", ("yes",))
    scores = scores_of("pope", items, ["Yes, there is.", "Yes.", "No, there is not.", "no"], None)
    result = summarise("pope", scores)
    assert result["groups"]["English"]["accuracy"]["mean"] == 0.5 and result["pope"] == dict(precision=0.5, recall=0.5, f1=pytest.approx(0.5))
    assert scores["en"]["exact"] == [0, 0, 0, 0] and scores["en"]["relaxed"] == [1, 0, 1, 0]


@pytest.mark.parametrize("name,lang", [("x_de.json", "de"), ("marvl-sw.jsonl", "sw"), ("zh/test.jsonl", "zh"), ("maxm_v1_iw.json", "iw"), ("he/test.jsonl", "iw"),
                                       ("en/dev-fr_gmt.jsonl", "fr"), ("zh/my_test.json", "zh"), ("my/test.json", "my"), ("x/test_my.json", "my"),
                                       ("de_test.json", "de"), ("xgqa_de_test.json", "de"), ("zh/ms_coco_val.json", "zh"), ("de/xgqa_de.json", "de"),
                                       ("testdev_balanced_questions_id.json", "id"), ("maxm_zh-CN.json", "zh"), ("x_pt-BR.json", "pt"), ("iw/x_he.json", "iw"),
                                       ("en/test-en_gmt.jsonl", "en"), ("quz/t.jsonl", "quz"), ("xx_hr.jsonl", "hr"), ("testdev_balanced_questions_pt.json", "pt")])  # fmt: skip
def test_the_language_of_a_file(tmp_path, name, lang):
    assert file_language(tmp_path / name) == lang


@pytest.mark.parametrize("name,said", [("my_test.json", "do not say"), ("ms_coco_val.json", "do not say"), ("zh/test_my.json", "my and zh"),
                                       ("zh/de_test.json", "de and zh"), ("de_to_fr.json", "fr and de"), ("en/test-fr.jsonl", "fr and en"),
                                       ("questions.json", "do not say"), ("de/fr/x.json", None)])  # fmt: skip
def test_a_language_is_asked_for_where_the_name_does_not_settle_it(tmp_path, name, said):
    if said is None:
        assert file_language(tmp_path / name) == "fr", "the folder of the file, not those above it"
        return
    with pytest.raises(ValueError, match=f"which language is it.*{said}.*(..._de.json)") as error:
        file_language(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


# One good file for each reader, and where its items are: (task, file name, content, path to the item, what the message names).
GOOD = {
    "xm3600": ("c.jsonl", {"image/key": "k", "de": {"caption": ["Hund"]}}, "line 2"),
    "xflickrco": ("de/test.jsonl", {"img_path": "1.jpg", "sentences": ["Hund"]}, "line 2"),
    "xgqa": ("q_de.json", {"imageId": "n1", "question": "Was?", "answer": "dog"}, "question 'b'"),
    "maxm": ("m_de.json", {"image_id": "1", "qa_pairs": [{"question": "Was?", "processed_answers": ["Hund"]}]}, "annotation 1"),
    "xvnli": ("de/test.jsonl", {"Flikr30kID": "1.jpg", "sentence2": "Zwei", "gold_label": "neutral"}, "line 2"),
    "marvl": ("m.jsonl", {"language": "sw", "concept": "c", "caption": "t", "left_img": "1.jpg", "right_img": "2.jpg", "label": True}, "line 2"),
    "pope": ("p.jsonl", {"image": "a.jpg", "text": "Is it?", "label": "yes"}, "line 2"),
}


def benchmark_file(root, task, row):
    """A file of two items, the second of which is `row`."""
    name, good, _ = GOOD[task]
    if task == "xgqa":
        return whole(root / name, {"a": good, "b": row})
    if task == "maxm":
        return whole(root / name, {"annotations": [good, row]})
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("".join(json.dumps(r) + "\n" for r in (good, row)))
    return str(root / name)


def places(value, path=()):
    """Every path to a field or list element of a JSON value."""
    for key, inside in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inside, (*path, key))


def with_value(row, path, value):
    copy = json.loads(json.dumps(row))
    at = copy
    for key in path[:-1]:
        at = at[key]
    if value is KeyError and isinstance(at, dict):
        del at[path[-1]]
    else:
        at[path[-1]] = None if value is KeyError else value
    return copy


@pytest.mark.parametrize("task", GOOD)
def test_every_field_of_every_reader_is_checked_when_the_file_is_read(tmp_path, task):
    _, good, item = GOOD[task]
    assert len(read_benchmark(task, [benchmark_file(tmp_path, task, good)])) == 2
    for path in places(good):
        lists, objects = ([], [[]], [{}], [None], [""], [3]), ({}, {"x": 1}, {"raw": 3}, {"raw": "a", "caption": "b"})
        for value in (KeyError, None, 3, 1.5, "", "  ", "\ud800", *lists, *objects):
            if path == ("de",) and value is KeyError:
                continue  # XM3600 has no caption in a language that a line does not name
            with pytest.raises(ValueError) as error:
                read_benchmark(task, [benchmark_file(tmp_path, task, with_value(good, path, value))])
                pytest.fail(f"{task}: {path} = {value!r} was read")
            message = str(error.value)
            assert item in message and GOOD[task][0] in message and "\n" not in message, message


def test_captions_and_answers_may_be_objects_with_one_text(tmp_path):
    for wrap in (lambda text: {"raw": text, "tokens": text.split()}, lambda text: {"caption": text, "id": 3}):
        row = {"img_path": "1.jpg", "sentences": [wrap("ein Hund"), "Hund"]}
        assert read_benchmark("xflickrco", [lines(tmp_path / "de" / "t.jsonl", [row])])[0].labels == ("ein Hund", "Hund")
        row = {"image/key": "k", "de": {"caption": [wrap("ein Hund")]}}
        assert read_benchmark("xm3600", [lines(tmp_path / "x.jsonl", [row])])[0].labels == ("ein Hund",)


@pytest.mark.parametrize("value", [None, 3, [], {}, "x", [3], ["x"], [{}], [{"answer": 3}], [{"x": "y"}], [None]])
def test_every_field_of_vqav2_is_checked(tmp_path, value):
    question, annotation = {"image_id": 5, "question": "What?", "question_id": 7}, {"question_id": 7, "answers": [{"answer": "a"}, {"answer": ""}]}
    read = lambda q, a: read_benchmark("vqav2", [whole(tmp_path / "q.json", {"questions": q}), whole(tmp_path / "a.json", {"annotations": a})])
    assert read([question], [annotation])[0].labels == ("a", "")  # people did leave answers empty
    for name in question:
        if name in ("question", "question_id") and value == "x" or name != "question" and value == 3:
            continue
        with pytest.raises(ValueError, match="q.json") as error:
            read([question, {**question, name: value}], [annotation])
        assert "\n" not in str(error.value)
    for name in annotation:
        if name == "question_id" and value in (3, "x"):
            continue
        with pytest.raises(ValueError, match="a.json: annotation 1"):
            read([question], [annotation, {**annotation, name: value}])
    if value != [{}]:
        for bad in (lambda: read(value, [annotation]), lambda: read([question], value)):
            with pytest.raises(ValueError, match=r"[qa]\.json"):
                bad()
    for image in ("12a", -3, "1" * 5000, 10**40, True):
        with pytest.raises(ValueError, match="q.json: question 0: 'image_id'"):
            read([{**question, "image_id": image}], [annotation])


def test_unknown_languages_and_labels_are_named_with_the_line(tmp_path):
    with pytest.raises(ValueError, match="m.jsonl: line 1: unknown language"):
        read_benchmark("marvl", [lines(tmp_path / "m.jsonl", [{**GOOD["marvl"][1], "language": "qqq"}])])
    with pytest.raises(ValueError, match="c.jsonl: line 1: unknown language"):
        read_benchmark("xm3600", [lines(tmp_path / "c.jsonl", [{"image/key": "k", "qqq": {"caption": ["x"]}}])])
    with pytest.raises(ValueError, match="test.jsonl: line 1: the gold_label is 'maybe'"):
        read_benchmark("xvnli", [lines(tmp_path / "de" / "test.jsonl", [{**GOOD["xvnli"][1], "gold_label": "maybe"}])])
    (tmp_path / "p.jsonl").write_bytes(json.dumps(GOOD["pope"][1]).encode() + b"\n\xff\n")
    with pytest.raises(ValueError, match="p.jsonl: line 2: not readable"):
        read_benchmark("pope", [str(tmp_path / "p.jsonl")])
    with pytest.raises(ValueError, match="cannot be read"):
        read_benchmark("pope", [str(tmp_path)])


def test_wrong_files_are_named_with_the_line(tmp_path):
    with pytest.raises(ValueError, match="which language is it"):
        file_language(tmp_path / "questions.json")
    good = {"image": "a.jpg", "text": "?", "label": "yes"}
    for bad, message in (({**good, "label": "maybe"}, "line 2: the label is 'maybe'"), ({"image": 3, "text": "?", "label": "no"}, "line 2: 'image'"),
                         ([1], "line 2: not readable"), ({}, "'image' is missing")):  # fmt: skip
        with pytest.raises(ValueError, match=message) as error:
            read_benchmark("pope", [lines(tmp_path / "p.json", [good, bad])])
        assert "p.json" in str(error.value)
    (tmp_path / "p.json").write_text('{"image": "a.jpg"\n')
    with pytest.raises(ValueError, match="p.json: line 1"):
        read_benchmark("pope", [str(tmp_path / "p.json")])
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_benchmark("marvl", [str(tmp_path / "none.jsonl")])
    with pytest.raises(ValueError, match="holds no question"):
        read_benchmark("pope", [lines(tmp_path / "p.json", [])])
    with pytest.raises(ValueError, match="'annotations' is missing"):
        read_benchmark("maxm", [whole(tmp_path / "m_th.json", {"x": 1})])
    with pytest.raises(ValueError, match="does not hold an object"):
        read_benchmark("maxm", [whole(tmp_path / "m_th.json", [1])])


# ---- scores -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji():
    return EMOJI


@pytest.mark.parametrize("task", evaluate.ASKED)
def test_perfect_answers_to_embedded_questions_score_one_and_the_questions_are_held_out(emoji, task):
    langs = ["en", "sw", "th", "xh", "yo"]
    items = emoji_items(emoji, task, "pictures", langs, 10, 0)
    assert items == emoji_items(emoji, task, "pictures", langs, 10, 0)
    assert {i.images[0] for i in items} <= set(emoji.cells_in("test"))
    result = summarise(task, scores_of(task, items, [i.labels[0] for i in items], None))
    assert result["groups"]["all other"][result["metric"]]["mean"] == 1.0 and result["chance"] == CHANCE.get(task)
    if task in ("match", "exists", "yes_no"):
        yes = [i.labels[0].lower().startswith(("yes", "ndiyo", "ใช่")) for i in items if i.lang in ("en", "sw", "th")]
        assert 0.3 < sum(yes) / len(yes) < 0.7
    with_words = {i.lang for i in items}
    assert with_words <= set(langs) and {"en", "sw", "th"} <= with_words


def test_a_summary_has_means_of_languages_intervals_and_the_worst_five():
    scores = {lang: {"exact": [1.0] * right + [0.0] * (20 - right)} for lang, right in zip(["en", "de", "sw", "ru", "hi", "th", "quz"], range(20, 6, -2))}
    result = summarise("caption", scores)
    assert result["worst"] == ["quz", "th", "hi", "ru", "sw"]
    other = result["groups"]["all other"]["exact"]
    assert other["mean"] == pytest.approx(sum(range(18, 6, -2)) / 6 / 20) and other["low"] < other["mean"] < other["high"]
    assert result["groups"]["English"]["exact"] == dict(mean=1.0, low=1.0, high=1.0, languages=1)
    assert set(groups_of(scores)) >= {"script: Latin", "script: Indic", "resources: high", "resources: low", "outside the 96"}
    text = report(result)
    assert "worst: Quechua" in text and "100.0 [100.0, 100.0]" in text and len(text.splitlines()) > 12


def test_cider_by_character_is_never_mixed_with_cider(monkeypatch):
    items = [Item((f"{i}.jpg",), lang, lang, "", (text + str(i),)) for lang, text in (("de", "ein Hund"), ("th", "หมาสองตัว")) for i in range(3)]
    monkeypatch.setattr("nanomblip.measure.metrics.segmenter", lambda lang: (list, "characters") if lang == "th" else segmenter(lang))
    result = summarise("xm3600", scores_of("xm3600", items, [i.labels[0] for i in items], None))
    assert "cider" in result["languages"]["de"] and "cider" not in result["languages"]["th"] and "cider_characters" in result["languages"]["th"]
    assert result["groups"]["all other"]["cider"]["languages"] == 1 == result["groups"]["all other"]["cider_characters"]["languages"]
    assert "cider characters" in report(result)


# ---- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    nano, path = PRESETS["nano"], tmp_path_factory.mktemp("model")
    small = replace(nano, vit=replace(nano.vit, width=16, layers=1, heads=2, mlp=16), queries=2,
                    qformer=replace(nano.qformer, width=16, layers=1, heads=2, mlp=16, vision_width=16),
                    mt5=replace(nano.mt5, width=16, heads=2, head_width=8, mlp=16, layers=1, decoder_layers=1))  # fmt: skip
    save_mblip(randomise(MBLIP(small), std=0.4), path, image_token=8000)
    write_json(path / "preprocessor_config.json", ImageConfig(size=64).to_hf())
    (path / "spiece.model").write_bytes((DATA / "spiece.model").read_bytes())
    return path


def run(capsys, *argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load_emoji", lambda concepts: EMOJI)  # loaded once for all tests here
        patch.setattr(evaluate, "LanguageID", lambda names: LANGUAGE_ID)
        patch.setattr(evaluate, "sentence_id", lambda: SENTENCE_ID)
        patch.setattr(sys, "argv", ["evaluate", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            evaluate.run_main(evaluate.main)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return end.value.code, out, err


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(path)


def test_captions_of_a_benchmark_with_a_missing_picture(capsys, tmp_path, folder):
    data = xm3600(tmp_path)
    for i in range(2):
        picture(tmp_path / "images" / f"{i:016x}.jpg", i)
    status, out, err = run(capsys, "--model", folder, "--data", data, "--task", "xm3600", "--image_root", tmp_path / "images",
                           "--preset", "greedy", "--out", tmp_path / "r.json")  # fmt: skip
    record = json.loads((tmp_path / "r.json").read_text())
    assert status == 1 and "1 pictures could not be used; 6 of 18" in err and "0000000000000002" in err
    assert record["questions"] == 18 and record["answered"] == 12 and record["languages"]["de"]["n"] == 2 and len(record["worst"]) == 5
    assert "language group" in out and "outside the 96" in out and "cider" in out
    assert {lang for lang, row in record["languages"].items() if "in_language" in row} == {"de", "sw"} & set(record["languages"]), "as filters.py judges"
    assert 0 <= record["groups"]["all other"]["script"]["mean"] <= 1 and all(math.isfinite(record["languages"]["de"]["cider"][k]) for k in ("mean", "low", "high"))


def test_two_pictures_a_question(capsys, tmp_path, folder):
    for i, name in enumerate(("39-8.jpg", "39-2.jpg")):
        picture(tmp_path / "sw" / "images" / "39-Panen" / name, i)
    status, out, _ = run(capsys, "--model", folder, "--data", marvl(tmp_path), "--task", "marvl", "--image_root", tmp_path, "--limit", "3",
                         "--out", tmp_path / "r.json", "--force_lang")  # fmt: skip
    record = json.loads((tmp_path / "r.json").read_text())
    assert status == 0 and record["answered"] == 3 and record["chance"] == 0.5 and "chance is 50.0" in out
    assert record["decoding"]["num_beams"] == 5 and record["decoding"]["length_penalty"] == -1.0 and record["decoding"]["max_new_tokens"] == 10


def test_the_embedded_data_with_and_without_the_mask(capsys, tmp_path, folder):
    script = {}
    for flags in ((), ("--force_lang",)):
        status, out, err = run(capsys, "--model", folder, "--langs", "th,ta", "--limit", "6", "--out", tmp_path / "r.json", *flags)
        record = json.loads((tmp_path / "r.json").read_text())
        assert status == 0 and record["metric"] == "exact" and set(record["languages"]) == {"th", "ta"} and len(record["samples"]) <= 20
        script[bool(flags)] = record["groups"]["all other"]["script"]["mean"]
        assert record["decoding"]["num_beams"] == 5, "captions as in the paper"
    assert script[True] > 0.8 > script[False]
    again = run(capsys, "--model", folder, "--langs", "th,ta", "--limit", "6", "--out", tmp_path / "s.json", "--force_lang", "--batch", "5")
    assert again[1] == out, "the batch size must not matter"


@pytest.mark.parametrize("flags,message", [
    (["--task", "xgqa"], "does not go with"), (["--data", "x.json", "--task", "xgqa"], "--image_root is missing"), (["--langs", "xx"], "unknown language"),
    (["--data", "x_de.json", "--task", "xgqa", "--image_root", "."], "no such file"), (["--langs", "ceb"], "have none of these"), (["--batch", "0"], "--batch"),
])  # fmt: skip
def test_wrong_flags_are_one_line(capsys, folder, flags, message):
    status, out, err = run(capsys, "--model", folder, *flags)
    assert status == 2 and message in err and err.count("\n") == 1 and out == ""
    assert run(capsys)[0] == 2 and run(capsys, "--model", "nowhere")[0] == 2
