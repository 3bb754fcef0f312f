"""The language table, and every way to name a language or a mixture of them."""

import math
from collections import Counter

import pytest

from nanomblip.data.languages import (
    ALIASES,
    LANGUAGES,
    PAPER_NAMES,
    SCRIPT_GROUPS,
    parse_lang,
    parse_lang_mix,  # fmt: skip
    resource_group,
    script_group,
)

# ------------------------------------------------------------------------------------------------------------ the table


def test_table_is_complete():
    assert len(LANGUAGES) == 96
    assert list(LANGUAGES) == sorted(LANGUAGES)
    assert all(code == lang.code for code, lang in LANGUAGES.items())
    for field in ("code", "name", "nllb"):
        assert len({getattr(lang, field) for lang in LANGUAGES.values()}) == 96
    assert not {"co", "fy", "haw", "hmn", "la", "und"} & LANGUAGES.keys()  # in mC4, but NLLB cannot translate them


@pytest.mark.parametrize("table", ["mc4", "mt5"])
def test_shares_are_percentages(table):
    shares = [getattr(lang, table) for lang in LANGUAGES.values()]
    assert min(shares) > 0
    assert sum(shares) == pytest.approx(100, abs=0.01)
    assert max(LANGUAGES.values(), key=lambda lang: getattr(lang, table)).code == "en"


def test_spot_values():
    assert (LANGUAGES["en"].mc4, LANGUAGES["en"].mt5) == (43.843, 8.485)
    assert (LANGUAGES["yo"].mc4, LANGUAGES["yo"].mt5) == (0.00096673, 0.204)
    assert [LANGUAGES[c].nllb for c in ("zh", "ku", "no", "fil", "iw")] == [
        "zho_Hant", "ckb_Arab", "nob_Latn", "tgl_Latn", "heb_Hebr"]
    assert LANGUAGES["iw"].name == "Hebrew" and PAPER_NAMES["train"]["iw"] == "former Hebrew"


def test_scripts_agree_with_the_translator():
    own = {"ja": {"Hani", "Hira", "Kana"}, "zh": {"Hani"}}
    for code, lang in LANGUAGES.items():
        assert set(lang.scripts) == own.get(code, {lang.nllb[4:]}), code


def test_groups_cover_every_language():
    scripts = Counter(map(script_group, LANGUAGES))
    assert scripts == {"Latin": 56, "Indic": 11, "Cyrillic": 10, "Arabic": 6, "other": 6, "SE Asian": 4, "CJK": 3}
    assert Counter(map(resource_group, LANGUAGES)) == {"high": 16, "mid": 28, "low": 52}
    assert {script for lang in LANGUAGES.values() for script in lang.scripts} == SCRIPT_GROUPS.keys()
    borders = [resource_group(code) for code in ("en", "fa", "el", "mr", "hy", "yo")]
    assert borders == ["high", "high", "mid", "mid", "low", "low"]


# --------------------------------------------------------------------------------------------------------------- --lang


@pytest.mark.parametrize("code", LANGUAGES)
def test_code_and_name_round_trip(code):
    lang = LANGUAGES[code]
    for text in (code, code.upper(), lang.name, lang.name.lower(), f"  {lang.name.upper()} ", lang.nllb, f"{code}-XX"):
        assert parse_lang(text) == code, text


def test_aliases_never_hide_a_code_or_a_name():
    proper = {**{code: code for code in LANGUAGES}, **{lang.name.lower(): code for code, lang in LANGUAGES.items()}}
    for alias, code in ALIASES.items():
        assert code in LANGUAGES and alias not in proper
        assert parse_lang(alias) == code


@pytest.mark.parametrize("names", PAPER_NAMES.values())
def test_paper_names_are_understood(names):
    for code, name in names.items():
        assert parse_lang(name) == code


@pytest.mark.parametrize("text, code", [
    ("he", "iw"), ("tl", "fil"), ("Tagalog", "fil"), ("nb", "no"), ("nb-NO", "no"), ("Farsi", "fa"), ("Bengali", "bn"),
    ("Norwegian Bokmål", "no"), ("norwegian (bokmal)", "no"), ("Chinese (simplified)", "zh"),
    ("Simplified Chinese", "zh"),
    ("zh-CN", "zh"), ("zh_Hans", "zh"), ("zh-Hant-TW", "zh"), ("pt-BR", "pt"), ("PT_br", "pt"), ("es-419", "es"),
    ("fil-PH", "fil"), ("he-IL", "iw"), ("jw", "jv"), ("Māori", "mi"), ("Haitian Creole", "ht"),
    ("Chichewa", "ny"), ("Hebrew.", "iw"),
    ("Slovene", "sl"), ("Scottish  Gaelic", "gd"), ("swa", "sw"), ("deu", "de"), ("Ｓｗａｈｉｌｉ", "sw"), ("\tsw\n", "sw"),
])
def test_other_spellings(text, code):
    assert parse_lang(text) == code


def test_unknown_language_gets_the_nearest():
    with pytest.raises(ValueError) as error:
        parse_lang("swahilli")
    assert str(error.value) == "unknown language 'swahilli'; did you mean Swahili (sw)?"


@pytest.mark.parametrize("typo, code", [
    ("Germn", "de"), ("frech", "fr"), ("ukrainan", "uk"), ("sx", "sw"), ("Hebrw", "iw"), ("nynorsk norwegian", "no"),
    ("Gaelic", "gd"), ("Norvegian Bokmal", "no"),
])
def test_typos_suggest(typo, code):
    with pytest.raises(ValueError, match=rf"unknown language .*did you mean .*\({code}\)"):
        parse_lang(typo)


@pytest.mark.parametrize("text", [
    "", "   ", "-", "12", "nn", "hr", "mc4", "sw,de", "no way", "Klingon", "English please", "日本sw", "हिन्दी",
    "pt-BR-x!", "\udcff\n\0", "a" * 10**6,
])
def test_other_text_is_one_short_line(text):
    with pytest.raises(ValueError) as error:
        parse_lang(text)
    message = str(error.value)
    assert message.startswith("unknown language ") and "\n" not in message and len(message) < 250
    message.encode("utf-8")  # printable even when the input was not


def test_unavailable_language_lists_what_is_there():
    assert parse_lang("Swahili", {"en", "sw"}) == "sw"
    with pytest.raises(ValueError) as error:
        parse_lang("haitian", ["sw", "en"])
    assert str(error.value) == "this model cannot speak Haitian (ht); it speaks 2 languages: en sw"
    with pytest.raises(ValueError, match="speaks 1 language: en"):
        parse_lang("sw", ["en"])


# ----------------------------------------------------------------------------------------------------------- --lang_mix

SOME = {"sw", "de", "hi", "en", "iw"}


@pytest.mark.parametrize("spec, weights", [
    ("all", {"de": 1, "en": 1, "hi": 1, "iw": 1, "sw": 1}),
    ("uniform", {"de": 1, "en": 1, "hi": 1, "iw": 1, "sw": 1}),
    (" ALL ", {"de": 1, "en": 1, "hi": 1, "iw": 1, "sw": 1}),
    ("mc4", {"de": 6.0886, "en": 43.843, "hi": 0.29771, "iw": 0.19636, "sw": 0.014268}),
    ("mT5", {"de": 3.107, "en": 8.485, "hi": 1.233, "iw": 1.080, "sw": 0.509}),
    ("en", {"en": 1}),
    ("sw,de,hi", {"de": 1, "hi": 1, "sw": 1}),
    ("Swahili, he", {"iw": 1, "sw": 1}),
    ("sw:2,de:1", {"de": 1, "sw": 2}),
    ("sw: 2.5 , de", {"de": 1, "sw": 2.5}),
    ("sw:1e308,de:1e308", {"de": 1, "sw": 1}),
])
def test_mix(spec, weights):
    mix = parse_lang_mix(spec, SOME)
    assert mix == pytest.approx({code: weight / sum(weights.values()) for code, weight in weights.items()})
    assert math.fsum(mix.values()) == pytest.approx(1, abs=1e-12)
    assert list(mix) == sorted(mix)


def test_mix_does_not_depend_on_order():
    a, b = parse_lang_mix("sw:2,de,hi", ["de", "sw", "hi"]), parse_lang_mix("hi,de,sw:2", ["hi", "sw", "de"])
    assert list(a.items()) == list(b.items())


def test_alpha():
    mc4 = parse_lang_mix("mc4", LANGUAGES)
    for alpha in (0.0, 0.3, 0.7, 1.0, 2.0):
        mix = parse_lang_mix("mc4", LANGUAGES, alpha)
        assert sum(mix.values()) == pytest.approx(1)
        assert mix["en"] / mix["sw"] == pytest.approx((mc4["en"] / mc4["sw"]) ** alpha)
    assert parse_lang_mix("mc4", LANGUAGES, 0.0) == pytest.approx(parse_lang_mix("all", LANGUAGES))
    assert parse_lang_mix("all", SOME, 0.3) == parse_lang_mix("all", SOME)
    assert parse_lang_mix("sw:4,de:1", SOME, 0.5) == pytest.approx({"de": 1 / 3, "sw": 2 / 3})


@pytest.mark.parametrize("spec, problem", [
    ("", "it is empty"), ("  ", "it is empty"), (",", "a language is missing"), ("sw,", "a language is missing"),
    ("sw,,de", "a language is missing"), (":2", "a language is missing"),
    ("sw,sw", "comes twice"), ("iw,he:2", "comes twice"),
    ("sw:0", "'0' of Swahili (sw) is not a positive"), ("sw:-1", "not a positive"), ("sw:nan", "not a positive"),
    ("sw:inf", "not a positive"), ("sw:1e999", "not a positive"), ("sw:", "not a positive"),
    ("sw:1:2", "not a positive"), ("sw:x", "not a positive"),
    ("mc4,en", "mc4 stands alone"), ("en,all:2", "all stands alone"),
    ("swahilli", "did you mean Swahili (sw)"),
    ("ht", "the data has no Haitian (ht), it has 5 languages: de en hi iw sw"),
    ("mc5", "unknown language 'mc5'"),
])
def test_bad_mix(spec, problem):
    with pytest.raises(ValueError) as error:
        parse_lang_mix(spec, SOME)
    message = str(error.value)
    assert message.startswith("--lang_mix ") and problem in message and "\n" not in message
    assert "give all, uniform, mc4, mt5 or languages such as" in message


@pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf, -math.inf])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match="^--lang_alpha "):
        parse_lang_mix("all", SOME, alpha)


def test_weights_too_far_apart():
    with pytest.raises(ValueError, match="Swahili .* would never be drawn"):
        parse_lang_mix("sw:1e-300,de", SOME, 30)
