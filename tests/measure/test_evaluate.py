"""The measurements themselves, on answers whose score is known."""

import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from conftest import randomise
from PIL import Image

from nanomblip.data.emoji import ROOT, load_emoji, pair_split, picture_split
from nanomblip.data.image import ImageConfig, array_to_tensor
from nanomblip.data.language_id import LanguageID
from nanomblip.data.languages import LANGUAGES, script_group
from nanomblip.data.scripts import normal
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.measure import emoji_splits, evaluate
from nanomblip.measure.emoji_splits import MEASUREMENTS, Validation, answer, pick_examples, questions, score, table
from nanomblip.model.generate import DECODING, Decoding, generate
from nanomblip.model.mblip import MBLIP, PRESETS
from nanomblip.weights.files import write_json
from nanomblip.weights.save import save_mblip


@pytest.fixture(scope="module")
def emoji():
    return load_emoji("core")


@pytest.fixture(scope="module")
def language_id(emoji):
    return LanguageID(emoji.names)


def test_perfect_answers_score_one_and_english_ones_are_caught(emoji, language_id):
    items = questions(emoji, "pictures", emoji.langs, 30)
    names = [emoji.names[lang][emoji.cells[p][0]] for p, lang in items]
    perfect = score(emoji, items, names, language_id)
    assert all(row["exact"] == row["in_language"] == 1.0 for row in perfect.values()) and len(perfect) == 85
    english = score(emoji, items, [emoji.names["en"][emoji.cells[p][0]] for p, _ in items], language_id)
    assert english["en"]["exact"] == 1.0 and english["th"] == dict(n=english["th"]["n"], exact=0.0, in_language=0.0)
    silent = score(emoji, items, [""] * len(items), language_id)
    assert all(row["exact"] == row["in_language"] == 0.0 for row in silent.values())


def test_comparison_ignores_case_and_spaces_only():
    assert normal("  Red  Apple ") == normal("red apple") != normal("red apples")
    assert normal("é") == normal("e\u0301")


def test_naive_bayes_tells_languages_apart_on_names_it_has_not_seen(emoji):
    concepts = list(emoji.names["en"])
    seen = {lang: {c: n for c, n in of_lang.items() if c not in concepts[::5]} for lang, of_lang in emoji.names.items()}
    judge = LanguageID(seen)
    tries = [(lang, emoji.names[lang][c]) for lang in emoji.langs for c in concepts[::50] if c in emoji.names[lang]]
    right = sum(judge.guess(name) == lang for lang, name in tries)
    assert right / len(tries) > 0.6  # 85 languages: chance is 0.012


def test_questions_come_from_the_stated_splits(emoji):
    for which in (*MEASUREMENTS, "validation"):
        for picture, lang in questions(emoji, which, emoji.langs, 10):
            concept, artist = emoji.cells[picture]
            split = {"pictures": "test", "validation": "val", "openmoji": "artist", "streamline": "artist"}.get(which, "train")
            assert picture_split(concept, artist) == split
            assert pair_split(lang, concept) == ("test" if which == "held-out pairs" else "train")
            assert which not in ("openmoji", "streamline") or artist == which
    english = [p for p, lang in questions(emoji, "pictures", ["en", "sw"], 10) if lang == "en"]
    assert english == emoji.cells_in("test")


def test_a_look_at_the_validation_slice_has_a_column_for_each_group_of_scripts(monkeypatch):
    """Means over languages, English left out of them; empty where no language of the group is trained."""
    row = lambda exact: dict(n=5, exact=exact, in_language=1.0)
    results = {"validation": {"en": row(0.9), "de": row(0.2), "sw": row(0.4), "ru": row(0.6)}}
    monkeypatch.setattr(emoji_splits, "evaluate", lambda *args: (results, []))
    rows = []

    class Log:
        add = staticmethod(lambda *values: rows.append(dict(zip(Validation.COLUMNS, values, strict=True))))

    look = Validation(None, None, None, None, list(results["validation"]), None, 20, Log)
    for step in (19, 20):
        look(step)
    (found,) = rows
    assert found["step"] == 20 and found["english_exact"] == 0.9 and found["other_exact"] == pytest.approx(0.4)
    assert found["Latin"] == pytest.approx(0.3) and found["Cyrillic"] == 0.6 and found["Indic"] is None
    assert set(Validation.GROUPS) == {script_group(code) for code in LANGUAGES}


def test_batched_answers_equal_single_ones(emoji):
    torch.manual_seed(0)
    model = MBLIP(PRESETS["nano"])
    model.init_weights()
    tokenizer, image = Tokenizer(ROOT / "spiece.model"), ImageConfig(size=64)
    items = [(5, "en"), (700, "ps"), (5, "de"), (2, "zu")]
    together = answer(model, tokenizer, image, emoji, items, batch=3)
    for (picture, lang), text in zip(items, together):
        assert answer(model, tokenizer, image, emoji, [(picture, lang)]) == [text]
    prompt = tokenizer.batch(["Caption the image in English."])
    found = generate(model, array_to_tensor(emoji.pictures[[5]], image)[:, None], prompt, decoding=Decoding(max_new_tokens=24), vocab=8000)
    assert tokenizer.decode(found[0][0].ids) == together[0]
    beams = answer(model, tokenizer, image, emoji, [(5, "en")], decoding=DECODING["caption"])
    found = generate(model, array_to_tensor(emoji.pictures[[5]], image)[:, None], prompt, decoding=DECODING["caption"], vocab=8000)
    assert [tokenizer.decode(found[0][0].ids)] == beams != together[:1]


def test_the_table_shows_means_over_languages(emoji, language_id):
    results = {"pictures": {"en": dict(n=4, exact=0.5, in_language=1.0), "sw": dict(n=4, exact=0.25, in_language=0.75),
                            "ru": dict(n=4, exact=0.75, in_language=0.25)}}  # fmt: skip
    rows = {line.split("  ")[0].strip(): line.split() for line in table(results).splitlines()[2:]}
    assert rows["English"][-2:] == ["50.0", "100.0"] and rows["all other"][-2:] == ["50.0", "50.0"]
    held = {line.split("  ")[0].strip(): line.split() for line in table(results, ["sw"]).splitlines()[2:]}
    assert held["held-out languages"][-2:] == ["25.0", "75.0"] and held["all other"][-2:] == ["75.0", "25.0"]
    assert rows["script: Latin"][-2:] == ["25.0", "75.0"] and rows["resources: high"][-2:] == ["75.0", "25.0"]


def test_examples_take_turns_over_scripts(emoji):
    items = questions(emoji, "pictures", emoji.langs, 5)
    chosen = pick_examples(emoji, items, ["x"] * len(items))
    assert len(chosen) == 12 and chosen[0]["lang"] == "en"
    assert len({script_group(e["lang"]) for e in chosen}) >= 6


# ------------------------------------------------------------------------------------------------- the long command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    nano, path = PRESETS["nano"], tmp_path_factory.mktemp("model")
    small = replace(nano, vit=replace(nano.vit, width=16, layers=1, heads=2, mlp=16), queries=2,
                    qformer=replace(nano.qformer, width=16, layers=1, heads=2, mlp=16, vision_width=16),
                    mt5=replace(nano.mt5, width=16, heads=2, head_width=8, mlp=16, layers=1, decoder_layers=1))  # fmt: skip
    save_mblip(randomise(MBLIP(small), std=0.4), path, image_token=8000)
    write_json(path / "preprocessor_config.json", ImageConfig(size=64).to_hf())
    (path / "spiece.model").write_bytes((ROOT / "spiece.model").read_bytes())
    return path


@pytest.fixture
def run(capsys, emoji, language_id, monkeypatch):
    """(exit status, stdout, stderr, number of questions that the model was asked) of one call."""

    def call(*argv, stop_after=None):
        asked = []

        def slow(model, image, prompt, **more):
            if stop_after is not None and len(asked) >= stop_after:
                raise KeyboardInterrupt
            asked.append(len(prompt))
            return generate(model, image, prompt, **more)

        monkeypatch.setattr(evaluate, "load_emoji", lambda concepts: emoji)
        monkeypatch.setattr(evaluate, "LanguageID", lambda names: language_id)
        monkeypatch.setattr(evaluate, "generate", slow)
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            evaluate.run_main(evaluate.main)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return end.value.code, out, err, sum(asked)

    return call


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(run, folder, tmp_path):
    flags = ["--model", folder, "--langs", "th,ta", "--limit", 10, "--batch", 4, "--preset", "greedy", "--out"]
    status, report, _, asked = run(*flags, tmp_path / "whole.json")
    assert status == 0 and asked == 20
    whole = json.loads((tmp_path / "whole.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "whole.answers.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and {line["job"] for line in lines} == {whole["answers"]["job"]}
    assert set(lines[0]) == {"job", "images", "lang", "prompt", "labels", "answer"}

    out = tmp_path / "r.json"
    status, _, err, asked = run(*flags, out, stop_after=2)
    assert status == 130 and asked == 8 and not out.exists() and "8 answers added; the same command goes on" in err
    with open(tmp_path / "r.answers.jsonl", "ab") as file:
        file.write(b'{"job": "')
    status, again, err, asked = run(*flags, out)
    assert status == 0 and asked == 12 and "8 of 20 answers are in r.answers.jsonl already" in err and again == report
    record = json.loads(out.read_text())
    whole["config"]["out"] = record["config"]["out"]
    assert record == whole
    assert run(*flags, out)[3] == 0 and json.loads(out.read_text()) == record  # all is there
    more = run(*flags[:3], "th,ta,hi", *flags[4:], out)
    assert more[0] == 0 and more[3] == 10  # other languages of the same job: only these are asked for


def test_unfinished_answers_of_another_job_are_kept_and_finished_ones_replaced(run, folder, tmp_path):
    out, answers = tmp_path / "r.json", tmp_path / "r.answers.jsonl"
    flags = ["--model", folder, "--langs", "th", "--limit", 6, "--batch", 2, "--preset", "greedy", "--out", out]
    run(*flags, stop_after=1)
    before = answers.read_bytes()
    status, _, err, asked = run(*flags, "--force_lang")
    assert status == 2 and asked == 0 and "made with another" in err and "r.answers.jsonl" in err and answers.read_bytes() == before
    assert run(*flags)[0] == 0
    assert run(*flags, "--force_lang")[::3] == (0, 6)  # a record stood for them
    assert answers.read_text().count("\n") == 6 and json.loads(out.read_text())["answers"]["job"] in answers.read_text()
    run(*flags, stop_after=1)
    assert run(*flags, "--force_lang")[0] == 2  # unfinished again, whatever the record says
    assert run(*flags)[0] == 0
    more = [16 if flag == 6 else flag for flag in flags]
    assert run(*more, stop_after=1)[3] == 2 and run(*flags, "--force_lang")[0] == 2  # more of the same job, unfinished


def test_the_place_of_the_record_is_looked_at_before_the_model(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_mblip", lambda folder: pytest.fail("the model was loaded"))
    os.mkfifo(tmp_path / "pipe")
    for out, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "r.json", "folder does not exist"), (tmp_path / "pipe", "a device"),
                       ("/dev/null", "a device")):  # fmt: skip
        status, stdout, err, _ = run("--model", folder, "--langs", "th", "--limit", 2, "--out", out)
        assert status == 2 and stdout == "" and "--out" in err and words in err and err.count("\n") == 1
    status, _, err, _ = run("--model", folder, "--data", tmp_path / "none.json", "--task", "pope", "--image_root", ".", "--out", tmp_path / "r.json")
    assert status == 2 and "no such file" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe"]


def test_a_picture_that_is_missing_is_tried_again(run, folder, tmp_path):
    rows = [dict(image=f"{i}.png", text="Is there a cat?", label="yes") for i in range(3)]
    (tmp_path / "pope.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", folder, "--data", tmp_path / "pope.json", "--task", "pope", "--image_root", tmp_path, "--out", tmp_path / "r.json"]
    for i in (0, 2):
        Image.new("RGB", (30, 30), (90 * i, 0, 0)).save(tmp_path / f"{i}.png")
    assert run(*flags)[::3] == (1, 2) and run(*flags)[::3] == (1, 0)
    assert json.loads((tmp_path / "r.json").read_text())["answered"] == 2
    Image.new("RGB", (30, 30), (90, 0, 0)).save(tmp_path / "1.png")
    assert run(*flags)[::3] == (0, 1) and json.loads((tmp_path / "r.json").read_text())["answered"] == 3


def test_shards_are_merged_into_the_record_of_one_process(run, folder, tmp_path):
    flags = ["--model", folder, "--langs", "th,ta", "--limit", 6, "--batch", 4, "--preset", "greedy", "--out"]
    _, report, _, _ = run(*flags, tmp_path / "whole.json")
    out = tmp_path / "r.json"
    assert run(*flags, out, "--shard", "0/2")[3] == 6 and not out.exists()
    status, _, err, asked = run(*flags, out, "--shard", "merge/2")
    assert status == 2 and asked == 0 and "r.answers.1-of-2.jsonl: holds no answer" in err and not out.exists()
    status, printed, err, asked = run(*flags, out, "--shard", "1/2")
    assert (status, printed, asked) == (0, "", 6) and "6 of 12 questions belong to --shard 1/2" in err
    status, merged, _, asked = run(*flags, out, "--shard", "merge/2")
    assert (status, asked, merged) == (0, 0, report)
    whole, record = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "r.json"))
    assert record["results" if "results" in record else "samples"] == whole["results" if "results" in whole else "samples"]
    assert record["answers"] == whole["answers"]
