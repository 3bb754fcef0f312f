"""The measurements themselves, on answers whose score is known."""

import pytest
import torch

from nanomblip.data.emoji import ROOT, load_emoji, pair_split, picture_split
from nanomblip.data.image import ImageConfig, array_to_tensor
from nanomblip.data.language_id import LanguageID
from nanomblip.data.languages import script_group
from nanomblip.data.scripts import normal
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.measure.emoji_splits import MEASUREMENTS, answer, pick_examples, questions, score, table
from nanomblip.model.generate import DECODING, Decoding, generate
from nanomblip.model.mblip import MBLIP, PRESETS


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
