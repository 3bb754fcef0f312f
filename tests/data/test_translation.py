"""Who gets which language, what is text and what is a template, and what becomes of what the filters reject."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from nanomblip.data import prompts
from nanomblip.data.builders import fill
from nanomblip.data.languages import LANGUAGES, parse_lang_mix
from nanomblip.data.translation import FIELDS, KEPT, Block, Names, Plan, texts_of
from nanomblip.model.generate import Hypothesis

SWAHILI = {"A cat on a sofa.": "Paka kwenye sofa.", "What color is the bus?": "Basi lina rangi gani?", "blue": "bluu", "A dog": "Mbwa",
           "Two dogs and 12 balls": "Mbwa wawili na mipira 12", "Yes, it is.": "Ndiyo, ndivyo."}  # fmt: skip
MADE = {"sw": SWAHILI, "de": {"A cat on a sofa.": "Eine Katze auf einem Sofa.", "A dog": "Ein Hund"}}

pytestmark = pytest.mark.usefixtures("three_languages")


class Dictionary:
    """A translator that looks sentences up, and does not know its way back from what is not there."""

    langs, longest, both_ways, unk = tuple(LANGUAGES), 40, True, -1

    def __init__(self, made=MADE):
        self.made, self.tokenizer, self.asked = made, self, []

    def clean(self, text):
        return text.strip()

    def encode(self, text, source, target):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def write(self, rows, targets, decoding):
        out = []
        for row, lang in zip(rows, targets):
            text = self.decode(row)
            self.asked.append((text, lang))
            table = {theirs: ours for of_lang in self.made.values() for ours, theirs in of_lang.items()} if lang == "en" else self.made.get(lang, {})
            out.append(Hypothesis([ord(c) for c in table.get(text, "")], 0.0, True))
        return out


def example(task="caption", lang="en", image_id="1.jpg", **texts):
    context, label = fill(random.Random(0), task, lang, texts)
    return dict(context=context, label=label, image_id=image_id, task=task, lang=lang, texts=texts)


def block(rows, to="sw", every=False, rejected="drop", back=False, translator=None):
    class Rows(list):
        row = list.__getitem__

    translator = translator or Dictionary()
    plan = Plan(len(rows), parse_lang_mix(to, translator.langs, flag="--to"), every, 42)
    made = Block(plan, translator, rejected, back, batch=4, num_beams=1)
    made.make(Rows(rows), range(len(plan)), "--input a.json")
    return made


# ---- languages --------------------------------------------------------------------------------------------------------


def test_shares_are_exact_and_every_example_has_one_language():
    mix = parse_lang_mix("mc4", tuple(LANGUAGES))
    plan = Plan(10_000, mix, False, 42)
    got = [plan[unit] for unit in range(len(plan))]
    assert [n for n, _ in got] == list(range(10_000)) and got == [plan[unit] for unit in range(10_000)]
    counts = Counter(lang for _, lang in got)
    assert all(abs(counts[lang] - 10_000 * share) <= 1 for lang, share in mix.items()) and counts["en"] == round(10_000 * mix["en"])
    first = Counter(lang for _, lang in got[:1000])  # shuffled: any part has all of the larger ones
    assert abs(first["en"] - 438) < 80 and first["ru"] > 60
    assert [plan[unit] for unit in range(100)] != [Plan(10_000, mix, False, 43)[unit] for unit in range(100)]


def test_every_example_in_every_language():
    plan = Plan(3, parse_lang_mix("de,sw", tuple(LANGUAGES)), True, 0)
    assert [plan[unit] for unit in range(len(plan))] == [(n, lang) for n in range(3) for lang in ("de", "sw")]


def test_another_language_is_one_that_was_not_tried():
    plan = Plan(10, parse_lang_mix("sw:8,de,en", tuple(LANGUAGES)), False, 0)
    assert Counter(plan.another(unit, ["de"]) for unit in range(900))["sw"] > 700
    assert plan.another(3, ["de", "sw"]) == "en" and plan.another(3, ["de", "sw", "en"]) is None
    assert Plan(10, parse_lang_mix("all", tuple(LANGUAGES)), False, 0).another(3, ["de", "sw", "fr"]) is None  # three are enough


# ---- what is text -----------------------------------------------------------------------------------------------------


def test_a_captions_prompt_says_what_it_is_and_no_other_does():
    for prompt in (*prompts.CAPTION_UNNAMED, *(t.format(L="English") for t in prompts.CAPTION)):
        row = dict(context=prompt, label="A cat.", image_id="1")
        assert texts_of(row, "") == ("caption", "en", dict(text="A cat."))
    assert texts_of(dict(row, context="Caption the image in Swahili."), "")[1] == "sw"
    with pytest.raises(ValueError, match="here: its prompt is not one of the paper's.*--texts"):
        texts_of(dict(row, context="What color is the bus? Short English answer:"), "here")


@pytest.mark.parametrize("change", [dict(task="dance"), dict(task=["caption"]), dict(lang="xx"), dict(lang=["en"]), dict(lang=None), dict(texts=[]), dict(texts={}), dict(texts=dict(text=5)),
                                    dict(texts=dict(text="a", more="b")), dict(task="match", texts=dict(text="a")), dict(task="match", texts=dict(text="a", fits=1))])  # fmt: skip
def test_texts_that_are_none(change):
    with pytest.raises(ValueError, match="^here: "):
        texts_of(example(text="A cat.") | change, "here")


def test_texts_are_translated_and_templates_are_not():
    rows = [
        example(text="A cat on a sofa."), example("match", text="A cat on a sofa.", fits=True), example("vqa", question="What color is the bus?", answer="blue"),
        example("question", question="What color is the bus?", answer="blue"), example("detail", question="What color is the bus?", answer="Yes, it is. A dog"),
    ]  # fmt: skip
    made = block(rows)
    got = [made.rows[n] for n in range(5)]
    assert all(row["lang"] == "sw" and row["image_id"] == "1.jpg" and set(row) == {"context", "label", "image_id", "lang"} for row in got)
    assert got[0]["context"] in [t.format(L="Swahili") for t in prompts.CAPTION] and got[0]["label"] == "Paka kwenye sofa."
    assert (got[1]["context"], got[1]["label"]) in [(q.format(c="Paka kwenye sofa."), yes) for q, yes, _ in prompts.MATCH]
    assert got[2]["context"] in [t.format(q="Basi lina rangi gani?", L="Swahili") for t in prompts.VQA] and got[2]["label"] == "bluu"
    assert got[3]["context"] in [t.format(a="bluu", L="Swahili") for t in prompts.QUESTION] and got[3]["label"] == "Basi lina rangi gani?"
    assert (got[4]["context"], got[4]["label"]) == ("Basi lina rangi gani?", "Ndiyo, ndivyo. Mbwa")


def test_each_field_and_sentence_goes_alone_and_once():
    translator = Dictionary()
    block([example("detail", question="What color is the bus?", answer="Yes, it is. A dog"), example(text="A dog")], translator=translator)
    assert sorted(translator.asked) == [("A dog", "sw"), ("What color is the bus?", "sw"), ("Yes, it is.", "sw")]


def test_what_is_english_or_of_other_tasks_stays_as_it_is():
    reasoning = example("reasoning", question="Why?", answer="cab", rationale="He waits.")
    rows = [reasoning, example("exists", name="cat", there=True), example(lang="de", text="Eine Katze"), dict(context="Short Thai image caption: ", label="แมว", image_id="x")]
    for every in (False, True):
        made = block(rows, "de,sw,en", every)
        assert sorted(row["label"] for row in made.rows.values()) == sorted(row["label"] for row in rows), "once, not once a language"
        assert made.counts["kept as they are: not English"] == 2 and made.counts["kept as they are: reasoning"] == 1
    kept = block([example(text="A cat on a sofa.")], "en").rows[0]
    assert kept == dict(context=example(text="A cat on a sofa.")["context"], label="A cat on a sofa.", image_id="1.jpg", lang="en")
    assert set(KEPT).isdisjoint(FIELDS)


def test_digits_alone_are_not_given_to_the_translator():
    translator = Dictionary()
    made = block([example("vqa", question="What color is the bus?", answer="102")], translator=translator)
    listed = block([example(text="1.\nA dog\n22")], rejected="keep", translator=translator).rows[0]["label"]
    assert listed == "1.\nMbwa\n22" and made.rows[0]["label"] == "102" and [text for text, _ in translator.asked] == ["What color is the bus?", "A dog"] and not made.report.rejected


def test_texts_that_are_empty_or_not_english_are_said():
    rows = [example(text=" \n"), example("vqa", question="What color is the bus?", answer=""), example(text="一只猫坐在沙发上"), example(text="A dog"),
            example(text="Eine kleine Katze sitzt auf einem großen Sofa neben der Tür.")]  # fmt: skip
    made = block(rows, rejected="keep")
    assert sorted(made.rows) == [2, 3, 4] and made.counts["left out: a text is empty"] == 2 and made.counts["do not look English"] == 2


def test_a_long_text_is_cut_and_no_word_is_lost():
    class Upper(Dictionary):
        def write(self, rows, targets, decoding):
            assert max(map(len, rows)) <= self.longest
            return [Hypothesis([ord(chr(c).upper()) for c in row], 0.0, True) for row in rows]

    text = "the quick brown fox, which jumps over the lazy dog; " * 20 + "x" * 100
    made = block([example(text=text)], rejected="keep", translator=Upper())
    assert made.rows[0]["label"] == " ".join(text.upper().split()) and made.counts["sentences of more than 40 tokens, cut"] == 1


# ---- what is rejected -------------------------------------------------------------------------------------------------


def test_what_is_rejected_is_left_out_or_tried_in_another_language():
    rows = [example(text="A cat on a sofa."), example(text="A dog"), example(text="Two dogs and 12 balls")]
    made = block(rows, "de", rejected="drop")
    assert sorted(made.rows) == [0, 1] and made.counts["rejected, left out"] == 1 and made.report.rejected == {("de", "blank"): 1} and made.report.judged["de"] == 3
    made = block(rows, "de:9999,sw", rejected="other")  # all begin in German
    assert made.rows[2]["label"] == "Mbwa wawili na mipira 12" and made.rows[2]["lang"] == "sw" and "Swahili" in made.rows[2]["context"]
    assert made.counts["rejected, in another language"] == 1 and made.report.judged == {"de": 3, "sw": 1}
    made = block(rows, "de:9999,en", rejected="other")
    assert made.rows[2] == dict(context=rows[2]["context"], label="Two dogs and 12 balls", image_id="1.jpg", lang="en")
    made = block(rows, "th:9999,zh,ja,ko,ru", rejected="other")  # known in none
    assert not made.rows and made.counts["rejected, left out"] == 3 and made.report.judged.total() == 9
    made = block(rows, "de", rejected="keep")
    assert made.rows[2]["label"] == "" and not made.report.judged


def test_an_answer_that_is_rejected_stays_english_and_its_prompt_says_so():
    made = block([example("vqa", question="What color is the bus?", answer="red and white"), example("question", question="What color is the bus?", answer="red and white")])
    vqa, question = made.rows[0], made.rows[1]
    assert vqa["label"] == "red and white" and vqa["context"] in [t.format(q="Basi lina rangi gani?", L="English") for t in prompts.VQA]
    assert question["label"] == "Basi lina rangi gani?" and question["context"] in [t.format(a="red and white", L="Swahili") for t in prompts.QUESTION]
    assert made.counts["answers that stay English"] == 2 and vqa["lang"] == "sw" and made.report.rejected == {("sw", "blank"): 2}
    assert not block([example("vqa", question="Unknown?", answer="blue")]).rows and not block([example("detail", question="A dog", answer="red")]).rows


def test_what_does_not_come_back_is_rejected():
    wrong = {"sw": dict(SWAHILI, **{"A dog": "Hakuna picha"})}
    translator = Dictionary(wrong)
    translator.made["back"] = {"There is no photo of it": "Hakuna picha"}
    rows = [example(text="A cat on a sofa."), example(text="A dog")]
    assert len(block(rows, translator=translator).rows) == 2
    made = block(rows, back=True, translator=translator)
    assert sorted(made.rows) == [0] and made.report.rejected == {("sw", "back"): 1}


def test_the_line_of_a_block_is_the_same_whenever_it_is_made():
    rows = [example(text=text, image_id=f"{i}") for i, text in enumerate([*SWAHILI, *SWAHILI])]
    first, second = (block(rows, "sw,de,en", rejected="other") for _ in range(2))
    assert first.line() == second.line() and {row["lang"] for row in first.line()["rows"]} <= {"sw", "de", "en"}
    assert first.line()["counts"]["tokens written"] > 0 and sum(n for *_, n in first.line()["verdicts"]) == first.report.rejected.total()
    assert replace(first.plan, seed=1)[0][0] == 0


def test_the_embedded_names_are_english_captions():
    names = Names()
    task, lang, texts = texts_of(names.row(0), "")
    assert len(names) == 519 and task == "caption" and lang == "en" and texts["text"] == names.row(0)["label"]
