"""Each metric against another statement of it: pycocoevalcap's scorer, the VQA tool's rules written out, values by hand."""

import builtins
import math
import random
import re

import pytest

from nanomblip.data.scripts import chrf
from nanomblip.measure import metrics
from nanomblip.measure.metrics import (
    CONTRACTIONS,
    above_chance,
    caption_tokens,
    cider,
    cider_name,
    exact_match,
    interval,
    missing_segmenters,
    relaxed_match,
    segmenter,
    vqa_accuracy,  # fmt: skip
    vqa_normal,
    words,
    yes_or_no,
)


def test_exact_and_relaxed_match():
    assert exact_match(" Red  apple", "red apple") and not exact_match("red apples", "red apple")
    assert exact_match("e\u0301", "é") and not exact_match("e", "é")
    assert relaxed_match("Yes, it does.", "yes") and relaxed_match("I say no", "no") and not relaxed_match("I say no.", "no")
    assert not relaxed_match("anything", "") and not relaxed_match("", "yes")
    assert yes_or_no("Yes, there is.") is True and yes_or_no(" no.") is False and yes_or_no("nothing") is None is yes_or_no("")


def test_chance_is_zero_and_always_right_is_one():
    assert above_chance(1 / 3, 1 / 3) == 0 and above_chance(1, 1 / 3) == 1 and above_chance(0.25, 0.5) == -0.5


# ---- CIDEr ------------------------------------------------------------------------------------------------------------


def random_captions(rng, images):
    vocabulary = [f"w{i}" for i in range(rng.choice([3, 12, 60]))]
    sentence = lambda low: [rng.choice(vocabulary) for _ in range(rng.randint(low, 14))]
    return [sentence(0) for _ in range(images)], [[sentence(1) for _ in range(rng.randint(1, 5))] for _ in range(images)]


@pytest.mark.parametrize("seed", range(25))
def test_cider_is_the_one_of_pycocoevalcap(seed):
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    rng = random.Random(seed)
    answers, references = random_captions(rng, rng.choice([1, 2, 7, 40]))
    theirs = CiderScorer(n=4, sigma=6.0)
    for answer, refs in zip(answers, references):
        theirs += (" ".join(answer), [" ".join(ref) for ref in refs])
    mean, each = theirs.compute_score()
    mine = cider(answers, references)
    assert mine == pytest.approx(list(each), abs=1e-9) and sum(mine) / len(mine) == pytest.approx(mean, abs=1e-9)


def test_cider_of_one_image_is_zero_and_a_perfect_answer_reaches_ten():
    assert cider([["a", "b"]], [[["a", "b"]]]) == [0.0] and cider([], []) == []
    texts = [f"{w} one two three".split() for w in "abcdef"]
    unlike = [[f"{w}{i}" for i in range(6)] for w in "abcdef"]
    assert cider(unlike, [[t] for t in unlike]) == pytest.approx([10.0] * 6)
    assert all(s < 0.01 for s in cider(unlike[1:] + unlike[:1], [[t] for t in unlike])) and max(cider(texts, [[t] for t in texts])) <= 10
    with pytest.raises(ValueError, match="reference"):
        cider([["a"]], [[]])


# ---- VQA accuracy -------------------------------------------------------------------------------------------------------


def tool_normal(text):
    """The rules of the VQA evaluation tool once more, character by character where it has regular expressions."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    joined = any(text[i].isdecimal() and text[i + 1] == "," and text[i + 2].isdecimal() for i in range(len(text) - 2))
    out = ""
    for c in text:
        if c not in set(";/[]\"{}()=+\\_-><@`,?!"):
            out += c
        elif not (joined or (c + " ") in text or (" " + c) in text):
            out += " "
    kept = "".join(c for i, c in enumerate(out) if c != "." or out[i + 1 : i + 2].isdecimal())
    numbers = "zero one two three four five six seven eight nine ten".split()
    result = []
    for word in kept.lower().split():
        word = str(numbers.index(word)) if word in numbers else "0" if word == "none" else word
        if word not in {"a", "an", "the"}:
            result.append(CONTRACTIONS.get(word, word))
    return " ".join(result)


def tool_accuracy(answer, answers):
    """Leave one out, as a loop over people."""
    answer, answers = tool_normal(answer), [tool_normal(a) for a in answers]
    each = []
    for i in range(len(answers)):
        others = answers[:i] + answers[i + 1 :]
        each.append(min(1.0, sum(other == answer for other in others) / 3))
    return sum(each) / len(each)


def test_vqa_accuracy_is_the_official_one_on_random_answers():
    rng = random.Random(0)
    pieces = ["the", "a", "An", "two", "None", "2", "red", "Dont", "it's", "1,000", "3.5", ".", "?", "-", " - ", "/", "dog", "@", "\n", "(x)", ",", "1,", "!"]
    for _ in range(3000):
        make = lambda: "".join(rng.choice(pieces) + rng.choice(["", " ", " "]) for _ in range(rng.randint(1, 4)))
        pool = [make() for _ in range(rng.randint(1, 4))]
        answers = [rng.choice(pool) for _ in range(rng.choice([1, 3, 10, 10]))]
        answer = rng.choice([*pool, make()])
        assert vqa_normal(answer) == tool_normal(answer), repr(answer)
        assert vqa_accuracy(answer, answers) == pytest.approx(tool_accuracy(answer, answers)), (answer, answers)


@pytest.mark.parametrize("text,want", [("The dog.", "dog"), ("two dogs", "2 dogs"), ("dont know", "don't know"), ("3.5", "3.5"), ("1,000", "1000"),
                                       ("red/blue", "red blue"), ("red / blue", "red blue"), ("it's", "it's"), ("Yes!", "yes"), ("", ""),
                                       ("couldn'tve", "couldn't've"), ("somebody'd", "somebodyd"), ("lets", "lets"), ("u.s.a.", "usa")])  # fmt: skip
def test_vqa_normalisation(text, want):
    assert vqa_normal(text) == want


def test_how_many_people_make_an_answer_right():
    for right, want in enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]):
        assert vqa_accuracy("Two.", ["2"] * right + ["no"] * (10 - right)) == pytest.approx(want)
    assert vqa_accuracy("a cat", ["The Cat"] * 10) == 1  # both sides are normalised, people's too
    with pytest.raises(ValueError, match="human answer"):
        vqa_accuracy("x", [])


def test_the_table_of_contractions_has_the_official_size_and_ambiguous_words_are_left_alone():
    # The tool lists 120 spellings; two map to themselves, and four with a capital I never meet its lower-cased words.
    assert len(CONTRACTIONS) == 114 and not {"were", "well", "ill", "shell", "wed", "id", "shes"} & set(CONTRACTIONS)


# ---- words --------------------------------------------------------------------------------------------------------------

# Captions and what COCO's tokenizer (Stanford's PTBTokenizer, lower-cased, punctuation taken out) made of them.
PTB = {
    "A man isn't riding the horse's back - 3.5 kg, 1,000 cans & more!": "a man is n't riding the horse 's back 3.5 kg 1,000 cans & more",
    "It's a co-worker's e-mail, 50% off $5.00 #1": "it 's a co-worker 's e-mail 50 % off $ 5.00 # 1",
    "cannot gonna don't Can't we've I'd they'll": "can not gon na do n't ca n't we 've i 'd they 'll",
    "l'homme qu'il a d'abord vu": "l'homme qu'il a d'abord vu",
    "красивая кошка, сидит на столе.": "красивая кошка сидит на столе",
    "end.": "end",
    "5:30 1/2 and/or T-shirt well-known": "5:30 1/2 and/or t-shirt well-known",
    "a*b c+d e=f ~g ^h": "a * b c + d e = f ~ g ^ h",
    "naïve café": "naïve café",
    "it’s “nice” yes": "it 's nice yes",
    "100,000 1.5": "100,000 1.5",
    "hello…world": "hello world",
    "o'clock": "o'clock",
    "two dogs: one, two; three? yes...": "two dogs one two three yes",
}


@pytest.mark.parametrize("text,want", PTB.items())
def test_words_are_those_of_the_penn_treebank_tokenizer(text, want):
    assert words(text) == want.split()


def test_full_stops_of_all_scripts_go_and_marks_of_all_scripts_stay():
    assert words("एक बिल्ली मेज पर बैठी है।") == "एक बिल्ली मेज पर बैठी है".split()
    assert words("قطة تجلس، على الطاولة؟") == "قطة تجلس على الطاولة".split()
    assert words("a man (left) «ici» ¿qué? — „da“") == "a man left ici qué da".split()
    assert words("") == words(" ... ") == [] and words("CAF\u0045\u0301") == ["café"]


def test_chinese_goes_by_character_and_japanese_and_thai_by_word():
    assert caption_tokens("一只猫, 坐着。", "zh") == list("一只猫坐着") and cider_name("zh") == "cider"
    assert caption_tokens("A cat", "en") == ["a", "cat"] and cider_name("my") == "cider_characters"


def test_japanese_in_mode_a():
    pytest.importorskip("sudachipy")
    pytest.importorskip("sudachidict_core")
    # Mode A is the shortest of Sudachi's three: 選挙管理委員会 is one word in C, two in B, four in A.
    assert caption_tokens("選挙管理委員会。", "ja") == ["選挙", "管理", "委員", "会"] and cider_name("ja") == "cider"


def test_thai_by_newmm():
    pytest.importorskip("pythainlp")
    assert caption_tokens("แมวนั่งบนโต๊ะ", "th") == ["แมว", "นั่ง", "บน", "โต๊ะ"] and cider_name("th") == "cider"


def test_without_a_segmenter_the_score_has_another_name_and_a_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("sudachipy", "pythainlp"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    segmenter.cache_clear()
    try:
        assert cider_name("ja") == cider_name("th") == "cider_characters" and cider_name("en") == cider_name("zh") == "cider"
        assert caption_tokens("แมว", "th") == ["แ", "ม", "ว"]
        message = missing_segmenters(["en", "ja", "th", "zh"])
        assert "sudachipy" in message and "pythainlp" in message and "pip install" in message and "zh" not in message
        assert missing_segmenters(["en", "zh"]) == ""
    finally:
        segmenter.cache_clear()


# ---- chrF ---------------------------------------------------------------------------------------------------------------


def plain_chrf(a, b):
    """The definition once more, with lists of substrings that are struck out one by one."""
    a, b = re.sub(r"\s", "", a.casefold()), re.sub(r"\s", "", b.casefold())
    p, r = [], []
    for n in range(1, 7):
        x, y = [a[i : i + n] for i in range(len(a) - n + 1)], [b[i : i + n] for i in range(len(b) - n + 1)]
        if x and y:
            left, hits = list(y), 0
            for gram in x:
                if gram in left:
                    left.remove(gram)
                    hits += 1
            p.append(hits / len(x))
            r.append(hits / len(y))
    if not p or sum(p) == 0:
        return 0.0
    p, r = sum(p) / len(p), sum(r) / len(r)
    return 5 * p * r / (4 * p + r)


def test_chrf_follows_its_definition():
    rng = random.Random(3)
    for _ in range(500):
        a, b = ("".join(rng.choice("abc ที่") for _ in range(rng.randint(0, 12))) for _ in range(2))
        assert chrf(a, b) == pytest.approx(plain_chrf(a, b)), (a, b)
    assert chrf("Red apple", "red  apple") == 1 and chrf("", "x") == chrf("x", "") == 0 and 0 < chrf("red apples", "apple red") < 1


# ---- bootstrap ------------------------------------------------------------------------------------------------------------


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = random.Random(0)
    hits = 0
    for trial in range(200):
        scores = [float(rng.random() < 0.3) for _ in range(80)]
        low, high = interval([scores], seed=trial, draws=300)
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99
    wide, narrow = (interval([[0.0, 1.0] * n]) for n in (10, 1000))
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0]) and math.isclose(sum(narrow) / 2, 0.5, abs_tol=0.02)


def test_languages_count_once_in_an_interval_and_a_seed_repeats_it():
    groups = [[1.0] * 1000, [0.0] * 2]
    assert interval(groups) == (0.5, 0.5) and interval([[0.0, 1.0, 1.0]], 7) == interval([[0.0, 1.0, 1.0]], 7)
    assert interval([[0.2]], draws=10) == pytest.approx((0.2, 0.2))
    with pytest.raises(AssertionError):
        interval([[]])


def test_nothing_but_numpy_is_needed():
    source = open(metrics.__file__).read()
    assert not re.search(r"^(import|from) (pycocoevalcap|sudachipy|pythainlp|sacrebleu)", source, re.M)
