"""Which language is a text in? Naive Bayes over character n-grams, learned from the embedded data.

`LanguageID(names)` judges short answers: a table of known names first, naive Bayes for the rest. `sentence_id()` is
the same class over names and the Declaration of Human Rights together, for whole sentences (filters.py).

Accuracy on texts it has not seen (every second concept and every second paragraph held out; mean over languages):

                                             paragraphs   50 characters   names
    names alone, add-one                           84 %            81 %    81 %
    names and Declaration, add-one                 95 %            96 %    81 %
    names and Declaration, add-0.03                99 %            99 %    84 %
    the same, 3- and 4-grams: sentence_id          99 %            99 %    82 %
    py3langid, 140 languages                       93 %            92 %    70 %
    py3langid, without the seven it lacks          99 %            98 %    72 %

It lacks Cebuano, Maori, Nyanja, Samoan, Sindhi, Sundanese and Yiddish. Paragraphs of one text share its words, so other
sentences will be harder than these numbers say; Indonesian and Malay stay hard to tell apart.
"""

import math
import zlib
from collections import Counter, defaultdict
from functools import cache

from nanomblip.data.emoji import load_names, load_udhr
from nanomblip.data.scripts import normal, script_share


class LanguageID:
    """Which language is a short text in? Exact look-up among all known names first, naive Bayes for the rest.

    names: language -> concept -> name. Of the core names 87 % occur in one language only, so the table settles most
    answers; the others are judged by their character 1- to 4-grams, all languages equally likely. smoothing is what
    is added to every count: 1 favours the languages with more text, which matters once they differ.
    """

    def __init__(
        self, names: dict[str, dict[str, str]], smoothing: float = 1.0, orders: tuple[int, ...] = (1, 2, 3, 4)
    ):
        self.orders = orders
        self.table = defaultdict(set)  # name -> languages that use it
        self.seen = defaultdict(
            list
        )  # n-gram -> [(language, log(count / smoothing + 1))] of the languages that have it
        totals = {}
        for lang, of_lang in names.items():
            counts = Counter()
            for name in map(normal, of_lang.values()):
                self.table[name].add(lang)
                counts.update(self.grams(name))
            totals[lang] = counts.total()
            for gram, n in counts.items():
                self.seen[gram].append((lang, math.log(n / smoothing + 1)))
        # log((count + s) / (total + s kinds)) = log(count / s + 1) - log(total / s + kinds): the first term is 0 for
        # nearly # all (n-gram, language), so only the others are stored, and a guess touches few of them.
        self.unseen = {lang: math.log(total / smoothing + len(self.seen)) for lang, total in totals.items()}

    def grams(self, text: str) -> list[str]:
        text = f"^{text}$"
        return [text[i : i + n] for n in self.orders for i in range(len(text) - n + 1)]

    def scores(self, text: str) -> dict[str, float]:
        """The log likelihood of a text in each language, in nats."""
        grams = self.grams(normal(text))
        score = {lang: -len(grams) * cost for lang, cost in self.unseen.items()}
        for gram in grams:
            for lang, log_count in self.seen.get(gram, ()):
                score[lang] += log_count
        return score

    def guess(self, text: str) -> str:
        """The most likely language by naive Bayes."""
        score = self.scores(text)
        return max(score, key=score.get)

    def is_in(self, text: str, lang: str) -> bool:
        """Is the text in `lang`? A name that several languages share is in each of them; an empty text in none."""
        if not normal(text):
            return False
        known = self.table.get(normal(text))
        return lang in known if known else self.guess(text) == lang


def fold(text: str) -> int:
    """Which half of the embedded texts one belongs to, 0 or 1: for measuring on texts that were not learned from."""
    return zlib.crc32(normal(text).encode()) & 1


@cache
def sentence_id(without: int | None = None) -> LanguageID:
    """The judge of sentences, from all names and the Declaration of Human Rights in 95 languages, or from all but one
    `fold`.

    Texts in another script than LANGUAGES has for the language do not count. That leaves out Kurdish: the Declaration
    is in Kurmanji, in Latin letters, and mBLIP's Kurdish is Sorani. Takes some seconds and 400 MB.
    """
    texts = {lang: dict(names) for lang, names in load_names().items()}
    for lang, paragraphs in load_udhr().items():
        texts.setdefault(lang, {}).update({str(i): paragraph for i, paragraph in enumerate(paragraphs)})
    kept = {}
    for lang, of_lang in texts.items():
        if (script_share(" ".join(of_lang.values()), lang) or 0) > 0.5:
            kept[lang] = {key: text for key, text in of_lang.items() if without is None or fold(text) != without}
    return LanguageID(kept, smoothing=0.03, orders=(3, 4))
