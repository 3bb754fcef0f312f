"""How answers are scored: one short function a metric, each with its definition and where it comes from.

    exact_match, relaxed_match    is it the label; does it start or end with the label (mBLIP's own two)
    vqa_accuracy                  VQAv2's: people disagree, so an answer that three of nine gave is right
    cider                         CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726), for captions with several references
    interval                      how far a mean could be off, by the bootstrap (Efron 1979)

CIDEr counts words, so it stands and falls with what a word is (`caption_tokens`). Chinese, Japanese and Thai write
none: taken as it is, a sentence is a single word and the score is zero or luck.
"""

import math
import re
import unicodedata
from collections import Counter
from functools import cache

import numpy as np

from nanomblip.data.scripts import normal


def exact_match(answer: str, label: str) -> bool:
    """Is the answer the label, ignoring case and spaces?"""
    return normal(answer) == normal(label)


def relaxed_match(answer: str, label: str) -> bool:
    """Does the answer start or end with the label? "Yes, it does." is "yes", and "noon" is "no": the paper's rule."""
    answer, label = normal(answer), normal(label)
    return bool(label) and (answer.startswith(label) or answer.endswith(label))


def yes_or_no(text: str) -> bool | None:
    """What a short English answer says: True for yes, False for no, None when its first word is neither."""
    first = re.match(r"\W*(yes|no)\b", normal(text))
    return None if first is None else first[1] == "yes"


def above_chance(accuracy: float, chance: float) -> float:
    """The share of the way from guessing (0) to always right (1); below 0 is worse than guessing. chance in [0, 1)."""
    return (accuracy - chance) / (1 - chance)


# ---------------------------------------------------------------------------------------------------------------------
# VQA accuracy
# ---------------------------------------------------------------------------------------------------------------------

_DIGITS = dict(
    none="0",
    zero="0",
    one="1",
    two="2",
    three="3",
    four="4",
    five="5",
    six="6",
    seven="7",
    eight="8",
    nine="9",
    ten="10",
)
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# Contractions that the VQA tool mends when their apostrophe was left out: each form with one of its apostrophes
# missing.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {form[:i] + form[i + 1 :]: form for form in _CONTRACTED.split() for i, c in enumerate(form) if c == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # a slip in the tool; scores are only comparable with it


def vqa_normal(text: str) -> str:
    """The form in which VQA answers are compared, as the official tool makes it, slips included.

    Punctuation is removed where it touches a space (or anywhere, in a text with a number such as 1,000) and else
    becomes a space; full stops go unless a digit follows; number words up to ten become digits; articles go; "dont"
    becomes "don't".
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", text) is not None
    out = text
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if thousands or mark + " " in text or " " + mark in text else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)  # 32 is re.UNICODE, which the tool passes where the count belongs
    words = [_DIGITS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, answers: list[str]) -> float:
    """VQAv2's accuracy against the answers of (usually ten) people, in 0..1.

        mean over people p of min(1, matches among the others / 3)

    Both sides are normalised, always. The versions of the official tool differ in that: none touches the people's
    answers where all agree, some leave number words and articles in them. On VQAv2's clean answers it is the same.
    """
    if not answers:
        raise ValueError("VQA accuracy needs at least one human answer")
    answer, n = vqa_normal(answer), len(answers)
    right = sum(vqa_normal(human) == answer for human in answers)
    # Leave-one-out needs no loop: right people see right - 1 matches among the others, the n - right wrong ones see
    # right.
    return (right * min(1, (right - 1) / 3) + (n - right) * min(1, right / 3)) / n


# ---------------------------------------------------------------------------------------------------------------------
# Captions: words, CIDEr-D
# ---------------------------------------------------------------------------------------------------------------------

_QUOTES = str.maketrans("’‘ʼ`´", "'''''")
_SPLIT = re.compile(r"(n't|'(?:s|re|ve|ll|d|m))(?![\w'])")  # isn't -> is n't, man's -> man 's, as in the Penn Treebank
_JOINED = {"cannot": "can not", "gonna": "gon na", "wanna": "wan na", "gotta": "got ta"}
SEGMENTED = {"zh": "single characters", "ja": "sudachipy and sudachidict_core", "th": "pythainlp"}
UNSPACED = ("km", "lo", "my")  # no segmenter is agreed on here


def words(text: str) -> list[str]:
    """Lower-case words of a text that writes spaces, without punctuation: close to the Penn Treebank tokenizer of
    COCO's tools.

    Marks inside a word or number stay (t-shirt, l'homme, 3.5, 5:30, and/or); English clitics are words (is n't, man
    's); %, $ and other symbols too. On 92.7 % of the embedded names the two agree. They do not where that tokenizer
    harms what it was not made for: it drops the vowel signs of Kannada, Khmer, Burmese and others, keeps the full stops
    of other scripts and makes brackets the word "-lrb-".
    """
    text = unicodedata.normalize("NFC", text).lower().translate(_QUOTES)
    kinds = [unicodedata.category(c)[0] for c in text]
    out = []
    for i, c in enumerate(text):
        if kinds[i] == "S" or c in "%#&*":
            out += [" ", c, " "]
        elif kinds[i] != "P":
            out.append(c)
        else:
            near = (kinds[i - 1] if i else "Z") + (kinds[i + 1] if i + 1 < len(text) else "Z")
            inside = near == "NN" if c in ",:" else near.strip("LMN") == "" and c in "-'./@·״׳"
            out.append(c if inside else "'" if c == "'" and near[1] == "L" else " ")
    spaced = _SPLIT.sub(r" \1 ", "".join(out))
    found = []
    for word in spaced.split():
        if word != "'":
            found += _JOINED.get(word, word).split()
    return found


@cache
def segmenter(lang: str):
    """What makes words of a caption in a language: (function, unit), unit "words" or "characters".

    "characters" means that a segmenter is missing: scores in this unit are not comparable with those in words and carry
    another name (`cider_name`). Chinese goes by single characters by definition, as in the paper, and is "words".
    """
    characters = lambda text: words(" ".join(unicodedata.normalize("NFC", text)))
    if lang == "zh":
        return characters, "words"
    if lang == "ja":
        try:
            from sudachipy import Dictionary, SplitMode

            dictionary = Dictionary()
            tagger = getattr(dictionary, "tokenizer", dictionary.create)(mode=SplitMode.A)  # `create` until 0.6
        except (ImportError, OSError):
            return characters, "characters"
        return lambda text: words(
            " ".join(m.surface() for m in tagger.tokenize(unicodedata.normalize("NFC", text)))
        ), "words"
    if lang == "th":
        try:
            from pythainlp.tokenize import word_tokenize
        except ImportError:
            return characters, "characters"
        return lambda text: words(" ".join(word_tokenize(unicodedata.normalize("NFC", text), engine="newmm"))), "words"
    return (characters, "characters") if lang in UNSPACED else (words, "words")


def caption_tokens(text: str, lang: str) -> list[str]:
    """The words of a caption in a language (code of LANGUAGES), as CIDEr counts them."""
    return segmenter(lang)[0](text)


def cider_name(lang: str) -> str:
    """What a language's CIDEr may be called: "cider", or "cider_characters" where its segmenter is not installed."""
    return "cider" if segmenter(lang)[1] == "words" else "cider_characters"


def missing_segmenters(langs) -> str:
    """One line on what to install so that `langs` are scored in words; empty when nothing is missing."""
    missing = [f"{lang} needs {SEGMENTED[lang]}" for lang in langs if lang in SEGMENTED and cider_name(lang) != "cider"]
    return f"CIDEr goes by character, under another name: {', '.join(missing)}; pip install them" if missing else ""


def ngrams(tokens: list[str], n: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def cider(answers: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """CIDEr-D of each caption, usually 0..1 and at most 10; their mean is the score (papers print it times 100).

        10 * mean over references r, mean over n = 1..4 of  exp(-(l_a - l_r)^2 / 2 sigma^2) * min(a, r) . r / (|a| |r|)

    a, r: vectors of count * idf over the n-grams of answer and reference, with sigma 6 and idf = log(images) -
    log(images whose references have the n-gram). answers: tokens of one caption an image; references: tokens of each
    reference of it. The idf comes from these very references: scores on different sets of images cannot be compared,
    and a single image always scores 0. The lengths l count bigrams, one less than words; that is how the reference code
    has it.
    """
    assert len(answers) == len(references), f"{len(answers)} answers, {len(references)} lists of references"
    if any(not refs for refs in references):
        raise ValueError("CIDEr needs at least one reference for each image")
    documents = Counter()
    for refs in references:
        documents.update({gram for ref in refs for n in range(1, 5) for gram in ngrams(ref, n)})
    images = math.log(len(references)) if references else 0.0

    def vectors(tokens):  # [(n-gram -> count * idf, its length)] for n = 1..4
        out = []
        for n in range(1, 5):
            vector = {
                gram: count * (images - math.log(max(1, documents[gram]))) for gram, count in ngrams(tokens, n).items()
            }
            out.append((vector, math.sqrt(sum(x * x for x in vector.values()))))
        return out

    scores = []
    for answer, refs in zip(answers, references):
        mine, total = vectors(answer), 0.0
        for ref in refs:
            penalty = math.exp(-((max(0, len(answer) - 1) - max(0, len(ref) - 1)) ** 2) / (2 * 6.0**2))
            for (a, a_norm), (r, r_norm) in zip(mine, vectors(ref)):
                if a_norm and r_norm:
                    total += (
                        penalty
                        * sum(min(x, r[gram]) * r[gram] for gram, x in a.items() if gram in r)
                        / (a_norm * r_norm)
                    )
        scores.append(10 * total / (4 * len(refs)))
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# Uncertainty
# ---------------------------------------------------------------------------------------------------------------------


def interval(groups: list[list[float]], seed: int = 0, draws: int = 1000, level: float = 0.95) -> tuple[float, float]:
    """A bootstrap confidence interval of a mean of means: (low, high).

    groups: the scores of each language; the mean over languages of their means is what the interval is about, so that a
    language counts once however many items it has. Each draw takes as many items of each language, with
    replacement; the languages themselves stay, since they are not a sample of anything. Same seed, same interval.
    """
    assert groups and all(len(scores) for scores in groups), "an interval needs scores"
    rng = np.random.default_rng(seed)
    total = np.zeros(draws)
    for scores in groups:
        scores = np.asarray(scores, dtype=np.float64)
        # Draw how often each item comes instead of which: for n items and 1,000 draws in blocks that stay small.
        for first in range(0, draws, 100):
            count = min(100, draws - first)
            picks = rng.integers(len(scores), size=(count, len(scores)))
            total[first : first + count] += scores[picks].mean(axis=1)
    low, high = np.quantile(total / len(groups), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
