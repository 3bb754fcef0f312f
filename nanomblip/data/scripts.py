"""Which writing system a character belongs to, and how two texts are compared."""

import unicodedata
from collections import Counter
from functools import cache

from nanomblip.data.languages import LANGUAGES

# The first word of a character's Unicode name tells its script, which Python's unicodedata does not.
SCRIPT_WORDS = {
    "LATIN": "Latn", "CYRILLIC": "Cyrl", "ARABIC": "Arab", "BENGALI": "Beng", "DEVANAGARI": "Deva", "GUJARATI": "Gujr",
    "GURMUKHI": "Guru", "KANNADA": "Knda", "MALAYALAM": "Mlym", "SINHALA": "Sinh", "TAMIL": "Taml", "TELUGU": "Telu",
    "CJK": "Hani", "IDEOGRAPHIC": "Hani", "HIRAGANA": "Hira", "KATAKANA": "Kana", "KATAKANA-HIRAGANA": "Kana",
    "HANGUL": "Hang", "KHMER": "Khmr", "LAO": "Laoo", "MYANMAR": "Mymr", "THAI": "Thai", "ARMENIAN": "Armn",
    "ETHIOPIC": "Ethi", "GEORGIAN": "Geor", "GREEK": "Grek", "HEBREW": "Hebr",
}  # fmt: skip


def normal(text: str) -> str:
    """The form in which names are compared: NFC, no case, no outer or double spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


@cache
def script_of(char: str) -> str | None:
    """The ISO 15924 code of a letter's or mark's script; "Zyyy" for another script, None for what belongs to all of
    them (digits, punctuation, spaces, symbols, combining accents)."""
    if unicodedata.category(char)[0] not in "LM":
        return None
    words = unicodedata.name(char, "UNKNOWN").split()
    first = words[1] if words[0] in ("HALFWIDTH", "FULLWIDTH") else words[0]
    return (
        None
        if first in ("COMBINING", "MODIFIER", "VARIATION", "MASCULINE", "FEMININE")
        else SCRIPT_WORDS.get(first, "Zyyy")
    )


def script_share(text: str, lang: str) -> float | None:
    """The share of a text's letters that are in a script of the language, in 0..1; None for a text without letters."""
    scripts = [script for script in map(script_of, text) if script is not None]
    return sum(script in LANGUAGES[lang].scripts for script in scripts) / len(scripts) if scripts else None


@cache
def script_characters(script: str) -> frozenset[str]:
    """All letters and marks of a script in Unicode's first three planes."""
    return frozenset(c for c in map(chr, range(0x30000)) if script_of(c) == script)


def digits(text: str) -> Counter:
    """How often each digit stands in a text, in whatever system it is written: "٢٥", "፳፭", "二十五" and "25"
    all hold a 2 and a 5.

    A sign for ten or a hundred counts with its digits, so that one may find more than were meant, never fewer.
    """
    found = Counter()
    for c in text:
        value = unicodedata.numeric(c, -1)  # of "½" too, which is no whole number
        if value >= 0 and value == int(value):
            found.update(str(int(value)))
    return found


def chrf(answer: str, label: str, order: int = 6, beta: float = 2.0) -> float:
    """Character F-score in 0..1 (Popovic 2015): precision and recall of character n-grams, n = 1..order, recall beta
    times as important. It gives credit for half a name, in any script.

        F = (1 + beta^2) P R / (beta^2 P + R),   P, R: means over the n for which both texts have n-grams

    Spaces do not count; NFC and case as in `normal`, since names differ in case for no reason.
    """
    a, b = ("".join(normal(text).split()) for text in (answer, label))
    precision, recall = [], []
    for n in range(1, min(order, len(a), len(b)) + 1):
        mine, theirs = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (a, b))
        shared = (mine & theirs).total()
        precision.append(shared / mine.total())
        recall.append(shared / theirs.total())
    if not precision or not sum(precision):
        return 0.0
    p, r = sum(precision) / len(precision), sum(recall) / len(recall)
    return (1 + beta**2) * p * r / (beta**2 * p + r)
