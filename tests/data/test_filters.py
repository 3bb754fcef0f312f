"""Filters of translations: each rule catches the fault that is planted, in every language, and accepts what people wrote."""

import random
import re
from collections import Counter

import pytest

from nanomblip.data import filters
from nanomblip.data.filters import RULES, Report, judge, judge_people, sentences, words
from nanomblip.data.language_id import fold, sentence_id
from nanomblip.data.languages import LANGUAGES
from nanomblip.data.parallel import align, length_scale, parallel_declaration, parallel_names
from nanomblip.data.scripts import chrf, digits

LANGS = [lang for lang in LANGUAGES if lang != "en"]
OTHER = {lang: next(o for o in ("ru", "de") if not set(LANGUAGES[o].scripts) & set(LANGUAGES[lang].scripts)) for lang in LANGS}


def article(pairs, lang, least=100, most=400, number=0):
    """A (source, translation) of the Declaration that `judge` accepts, without numbers; Sindhi and Kurdish have names only."""
    found = [(en, text) for en, text in pairs if least < len(en) < most and not digits(en) and judge(en, text, lang) is None]
    return found[number % len(found)]


def samples(lang):
    if lang in ("sd", "ku"):  # no Declaration, or in another script: a sentence that a person wrote
        text = {"sd": "هڪ ٻلي صوفي تي ويٺي آهي، ڳاڙهن ڪپڙن ۾ هڪ ننڍڙي ڇوڪري جي ڀرسان. هڪ ڪتو در وٽ بيٺو آهي ۽ ٻاهر ڏسي رهيو آهي.",
                "ku": "پشیلەیەک لەسەر قەنەفەکە دانیشتووە، لە تەنیشت کچێکی بچووک بە جلی سوور. سەگێک لەبەر دەرگاکە وەستاوە و سەیری دەرەوە دەکات."}[lang]  # fmt: skip
        return [("A cat sits on the sofa, next to a little girl in red clothes. A dog stands at the door and is looking outside.", text)]
    return [article(parallel_declaration(lang), lang, number=n) for n in (1,)]


def end_of(text):
    return text[-1] if not text[-1].isalnum() and text[-1] in "።។။。।۔" else "."


@pytest.mark.parametrize("lang", LANGS)
def test_every_rule_catches_its_planted_fault_and_accepts_the_text_without(lang):
    pool = samples(lang)
    for source, text in pool:
        assert judge(source, text, lang) is None
        for blank in ("", "   ", "…!?", "\n"):
            assert judge(source, blank, lang) == "blank"
        assert judge(source, text, lang, unknown=1) == "unknown"
        assert judge(source, text[:9] + " ⁇ " + text[9:], lang) == judge(source, text[:9] + "\ufffd" + text[9:], lang) == "unknown"
        assert judge(source, text, lang, ended=False) == "cut"
        assert judge(source, parallel_declaration(OTHER[lang])[2][1], lang) == "script"
        # A copy in Latin letters, also with other case and marks; in another script it is caught for its letters.
        assert judge(source, source.upper().rstrip(".") + " !", lang) == ("copy" if "Latn" in LANGUAGES[lang].scripts else "script")
        assert judge(source, text + " " + " ".join([words(text)[-1][-12:]] * 6), lang) == "repetition"
        assert judge(source, text[: len(text) // 4], lang) in ("length", "sentences")
        assert judge(source, text[: len(text) // 9], lang) == "length"
        long = " ".join(t for _, t in pool * 6)[: 6 * len(text)] if len(pool) > 1 else text + " " + "".join(sorted(text * 3))
        assert judge(source, long, lang) in ("length", "repetition")
        # A number must stay, in any system of digits.
        assert judge(f"1948: {source}", f"1948: {text}", lang) is None
        assert judge(f"1948: {source}", text, lang) == judge(f"1948: {source}", f"1949: {text}", lang) == "digits"
        assert judge(f"25: {source}", f"٢٥: {text}", lang) is None and judge(f"25: {source}", f"፳፭: {text}", lang) is None
        assert judge(f"1,948: {source}", f"1 948: {text}", lang) is None
        back = dict(score=chrf, back="There is no photo.")
        assert judge(source, text, lang, **back) == "back" and judge(source, text, lang, score=chrf, back=source.lower()) is None


def test_a_lost_sentence_is_noticed_in_every_language():
    """Two sentences of about the same length, of which the translation has the first only: 20 pairs a language."""
    rates = {}
    for lang in LANGS:
        rng, caught, pairs = random.Random(lang), [], parallel_declaration(lang)
        end = pairs[-1][1].strip()[-1] if pairs else ""
        one = [(en.rstrip(".,;"), text.rstrip(" .,;:،।۔።။។。")) for en, text in pairs if 60 < len(en) < 300 and sentences(en) == 1]
        while one and lang != "ku" and len(caught) < 20:
            (en1, text1), (en2, text2) = rng.sample(one, 2)
            if 0.7 < len(en1) / len(en2) < 1.3:
                whole, first = f"{text1}{end} {text2}{end}", f"{text1}{end}"
                if len(caught) < 2:
                    assert judge(f"{en1}. {en2}.", whole, lang) in (None, "language"), (lang, en1, whole)
                caught.append(judge(f"{en1}. {en2}.", first, lang) in ("sentences", "length"))
        rates |= {lang: sum(caught) / 20} if caught else {}
    assert len(rates) == 93 and sum(rates.values()) / 93 > 0.93 and min(rates.values()) >= 0.7, rates


@pytest.mark.slow
def test_another_language_in_the_same_script_is_noticed():
    """60 characters of each language given out as other ones of its script: nearly all are caught, English always."""
    rng, missed, count = random.Random(0), Counter(), 0
    for lang in [*LANGS, "en"]:
        texts = [t[:60] for _, t in parallel_declaration(lang)] if lang != "en" else [e[:60] for e, _ in parallel_declaration("de")]
        texts = [t for t in texts if len(t) == 60][3:30:9] if lang != "ku" else []
        others = [o for o in LANGS if o not in (lang, "ku") and LANGUAGES[o].scripts == LANGUAGES[lang].scripts]
        for text in texts:
            for claimed in others if lang == "en" else rng.sample(others, min(8, len(others))):
                count += 1
                source = "x" * int(60 / length_scale(claimed))
                missed[lang, claimed] += judge(source, text, claimed, identifier=sentence_id(fold(text))) is None
    assert count > 1500 and missed.total() < 0.005 * count, +missed
    assert not sum(n for (lang, _), n in missed.items() if lang == "en"), +missed


@pytest.fixture(scope="module")
def people():
    """All of the Declaration; of the names every twentieth."""
    return judge_people(parallel_declaration), judge_people(lambda lang: parallel_names(lang)[::20])


@pytest.mark.slow
def test_nearly_all_that_people_wrote_is_accepted(people):
    """The exceptions are named: Kurmanji in Latin letters, and articles numbered in words, Roman or Hebrew numerals."""
    declaration, names = people
    assert len(declaration.judged) == 94 and len(names.judged) == 84 and declaration.judged.total() > 8000
    assert names.share() < 0.006 and max(names.share(lang) for lang in names.judged) < 0.06
    assert declaration.share("ku", "script") == 1
    numbered_in_words = {lang for lang in declaration.judged if declaration.share(lang, "digits") > 0.1}
    assert numbered_in_words == {"fa", "iw", "mn", "ps", "pt", "so", "yo"}
    for rule, most in dict(script=0.0, copy=0.0, blank=0.0, repetition=0.001, length=0.002, sentences=0.002, language=0.004).items():
        rejected = sum(n for (lang, r), n in declaration.rejected.items() if r == rule and lang != "ku")
        assert rejected <= most * declaration.judged.total(), (rule, rejected)
    plain = [lang for lang in declaration.judged if lang not in numbered_in_words | {"ku", "am"}]
    assert max(declaration.share(lang) for lang in plain) < 0.06 and sum(declaration.share(lang) for lang in plain) / len(plain) < 0.006


@pytest.mark.slow
def test_the_documented_rates_are_these(people):
    """The table in the docstring, for the Declaration, which the test judges as a whole."""
    rows = dict(re.findall(r"^    ([a-z ]+?) {2,}([\d.]+) %", filters.__doc__, re.MULTILINE))
    declaration = people[0]
    assert rows["any rule"] == f"{100 * declaration.share():.2f}"
    for rule in RULES:
        if any(r == rule for _, r in declaration.rejected):
            assert rows[rule] == f"{100 * declaration.share(rule=rule):.2f}", rule


@pytest.mark.slow
def test_the_identifier_is_no_worse_than_py3langid():
    """On 50 characters of each second paragraph and on names, not learned from; languages that py3langid lacks do not count."""
    langid = pytest.importorskip("py3langid.langid")
    langid.classify("load the model")
    codes = {"he": "iw", "nb": "no", "nn": "no", "tl": "fil"}
    known = {codes.get(label, label) for label in langid.IDENTIFIER.labels} & set(LANGUAGES) - {"ku"}
    for pairs, step in ((parallel_declaration, 4), (parallel_names, 40)):
        texts = [(lang, text[:50]) for lang in sorted(known) for _, text in pairs(lang)[::step] if len(text) > 3]
        ours = sum(sentence_id(fold(text)).guess(text) == lang for lang, text in texts)
        theirs = sum(codes.get(guess := langid.classify(text)[0], guess) == lang for lang, text in texts)
        assert len(texts) > 1000 and ours > theirs, (ours / len(texts), theirs / len(texts))


def test_words_of_the_caller_are_checked():
    with pytest.raises(ValueError, match="'xx' is no language"):
        judge("a", "b", "xx")
    with pytest.raises(ValueError, match="'en' is no language"):
        judge("a", "b", "en")
    with pytest.raises(ValueError, match="empty source"):
        judge(" ", "b", "de")
    with pytest.raises(AssertionError, match="needs a score"):
        judge("a", "b", "de", back="a")


def test_names_loan_words_and_small_numbers_may_stay_or_become_words():
    assert judge("pizza", "Pizza", "de") is None and judge("Santa Claus", "Santa Claus", "cs") is None
    assert judge("2 dogs play on the grass", "Zwei Hunde spielen auf dem Gras", "de") is None
    assert judge("25 dogs play on the grass", "二十五只狗在草地上玩耍", "zh") is None
    assert judge("25 dogs play on the grass", "两只狗在草地上玩耍", "zh") == "digits"
    assert judge("a cat sits next to a little girl on a red sofa", "一隻貓坐在紅色沙發上的小女孩旁邊", "zh") is None, "Traditional, as NLLB writes it"


def test_digits_of_any_system():
    assert digits("२५") == digits("٢٥") == digits("۲۵") == digits("25") == {"2": 1, "5": 1}
    assert digits("፳፭") == {"2": 1, "0": 1, "5": 1} and not digits("25") - digits("二十五")
    assert digits("½ cat") == {}


def test_sentences_are_counted():
    assert [sentences(t) for t in ("", "a cat", "a cat.", "A cat. A dog", "A cat... no!", "3.5 m by 1.5 m", "猫がいます。犬もいます。", "एक। दो।", "U.S. cat.")] == [
        0, 1, 1, 2, 2, 1, 2, 2, 2]  # fmt: skip


# ---- the Declaration as a parallel text ------------------------------------------------------------------------------


def test_paragraphs_find_their_translation_past_what_was_left_out_joined_or_added():
    rng = random.Random(0)
    english = ["".join(rng.choice("abcd ") for _ in range(rng.randint(30, 300))) for _ in range(30)]
    other = [text.upper() * 2 for text in english]
    other[4:6] = [other[4] + other[5]]  # joined
    del other[10]  # left out
    other.insert(20, "Z" * 260)  # added
    steps = align(english, other)
    assert [e for ours, _ in steps for e in ours] == english and [t for _, theirs in steps for t in theirs] == other
    right = [(ours, theirs) for ours, theirs in steps if "".join(ours).upper() * 2 == "".join(theirs)]
    assert sum(len(ours) == 1 for ours, _ in right) >= 22, steps


def test_articles_of_the_declaration_meet_the_same_number():
    wrong, count = [], 0
    for lang in LANGS:
        for english, text in parallel_declaration(lang):
            if english.startswith("Article ") and any(c.isdecimal() for c in text):
                count += 1
                wrong += [(lang, english, text)] if digits(english) != digits(text) else []
    assert count > 2000 and len(wrong) <= 6, wrong  # four of them Malayalam and Malagasy, which lack articles


def test_length_scales_are_those_of_another_parallel_text():
    """English over other characters on FLORES-200, as published with a filter of NLLB's data; the Declaration agrees."""
    flores = dict(
        zh=2.97, ja=2.29, ko=1.99, am=1.47, iw=1.28, ar=1.13, fil=0.79, my=0.80, gd=0.80, mg=0.81, km=0.83, el=0.83, ceb=0.83, es=0.84, fr=0.84
    )
    for lang, factor in flores.items():
        assert 0.7 < length_scale(lang) * factor < 1.35, (lang, length_scale(lang) * factor)
    assert 0.8 < length_scale("sd") < 1.2  # from the names


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_counts_by_rule_and_language_and_draws_it(tmp_path):
    report = Report()
    verdicts = [("de", None)] * 7 + [("de", "copy")] + [("th", "script"), ("th", None)] + [("sw", None)]
    assert [report.add(*v) for v in verdicts] == [rule is None for _, rule in verdicts]
    assert report.share() == 2 / 11 and report.share("th") == 0.5 and report.share("de", "copy") == 1 / 8 and report.share(rule="script") == 1 / 11
    assert report.worst() == ["th", "de", "sw"]
    report.write(tmp_path / "new", "mine")
    lines = (tmp_path / "new" / "mine.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| language | texts | rejected | script | copy |" and lines[1].count("|") == lines[0].count("|")
    assert lines[2:] == [
        "| all | 11 | 18.18 % | 9.09 % | 9.09 % |", "| Thai (th) | 2 | 50.00 % | 50.00 % | - |", "| German (de) | 8 | 12.50 % | - | 12.50 % |",
        "| Swahili (sw) | 1 | 0.00 % | - | - |"]  # fmt: skip
    from PIL import Image

    with Image.open(tmp_path / "new" / "mine.png") as picture:
        assert picture.width > 300 and len(picture.convert("RGB").getcolors(1 << 20)) > 10
    with pytest.raises(AssertionError):
        report.add("de", "nonsense")
    assert Report().table().splitlines()[-1] == "| all | 0 | 0.00 % |"
    Report().plot(tmp_path / "empty.png")


def test_the_command_prints_both_and_writes_files(tmp_path, capsys, monkeypatch):
    few = lambda pairs: lambda lang: pairs(lang)[:3] if lang in ("de", "th") else ()
    monkeypatch.setattr(filters, "parallel_declaration", few(parallel_declaration))
    monkeypatch.setattr(filters, "parallel_names", few(parallel_names))
    filters.main(["--out", str(tmp_path / "r")])
    out = capsys.readouterr().out
    assert "declaration" in out and "names" in out and "| German (de) | 3 |" in out
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["declaration.md", "declaration.png", "names.md", "names.png"]
