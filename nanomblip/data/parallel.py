"""The Declaration of Human Rights as a parallel text: which English paragraph is which in 94 other languages.

Its paragraphs were translated by people and mostly one by one, but a title, a preamble or an article may be split,
joined or left out. `align` finds the pairs by length, as Gale & Church 1993 did: a long paragraph has a long
translation. From the pairs follows how much longer a language writes than English (`length_scale`), which filters.py
needs.
"""

import math
from functools import cache

from nanomblip.data.emoji import load_names, load_udhr
from nanomblip.data.scripts import digits

_declaration, _names = cache(load_udhr), cache(load_names)  # read once

# (English paragraphs, other paragraphs) that may belong together -> cost of using it, in nats.
BEADS = {(1, 1): 0.1, (1, 2): 2.5, (2, 1): 2.5, (1, 0): 5.0, (0, 1): 5.0}


def align(english: list[str], other: list[str], band: int = 20) -> list[tuple[list[str], list[str]]]:
    """The cheapest way to go through both texts in steps of BEADS, never more than `band` paragraphs apart.

    A step costs (log of the length ratio / 0.25)^2 / 2 more, where the ratio is relative to that of the two whole
    texts and 8 characters are added to each side, since short paragraphs vary more; and 3 more if both sides are
    single paragraphs with numbers and these differ. Returns pairs of lists of 0, 1 or 2 paragraphs.
    """
    scale = sum(map(len, other)) / sum(map(len, english))
    numbers = {paragraph: digits(paragraph) for paragraph in {*english, *other}}
    band += abs(len(english) - len(other))
    best = {(0, 0): (0.0, None)}
    for i in range(len(english) + 1):
        for j in range(max(0, i - band), min(len(other), i + band) + 1):
            for (a, b), cost in BEADS.items():
                before = best.get((i - a, j - b))
                if before is None:
                    continue
                ours, theirs = english[i - a : i], other[j - b : j]
                ratio = (sum(map(len, theirs)) + 8) / (sum(map(len, ours)) * scale + 8)
                price = before[0] + cost + (math.log(ratio) / 0.25) ** 2 / 2
                if a == b and numbers[ours[0]] and numbers[theirs[0]]:
                    price += 3 * (numbers[ours[0]] != numbers[theirs[0]])
                if price < best.get((i, j), (math.inf,))[0]:
                    best[i, j] = price, (a, b)
    pairs, i, j = [], len(english), len(other)
    while (i, j) != (0, 0):
        a, b = best[i, j][1]
        pairs.append((english[i - a : i], other[j - b : j]))
        i, j = i - a, j - b
    return pairs[::-1]


@cache
def parallel_declaration(lang: str) -> tuple[tuple[str, str], ...]:
    """(English paragraph, its translation), those that belong together one to one; none for Sindhi, the only one
    without a text."""
    texts = _declaration()
    steps = align(texts["en"], texts[lang]) if lang in texts else []
    return tuple((ours[0], theirs[0]) for ours, theirs in steps if len(ours) == len(theirs) == 1)


@cache
def parallel_names(lang: str) -> tuple[tuple[str, str], ...]:
    """(English name, name in the language); none for the 11 languages without names."""
    names = _names()
    return tuple((names["en"][concept], name) for concept, name in names.get(lang, {}).items())


@cache
def length_scale(lang: str) -> float:
    """Characters of a language for one of English, from the Declaration; for Sindhi, of which it has no text, from
    the names."""
    pairs = parallel_declaration(lang) or parallel_names(lang)
    return sum(len(text) for _, text in pairs) / sum(len(english) for english, _ in pairs)
