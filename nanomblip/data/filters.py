"""What a translation must not be: rules that judge one text against its English source, and a report of what they
reject.

A translator such as NLLB fails in ways that can be seen without knowing the language; mBLIP's own data were not
filtered.

    rule          a text is rejected when
    blank         it has no letter and no digit
    unknown       the translator could not write a token: its count, "⁇" or U+FFFD
    cut           the translator stopped at its length limit, not by itself
    script        less than half of its letters are in a script of the language
    copy          it is the source, of three words or more (names may stay)
    repetition    a string with a letter is in it four times in a row, or it packs to less than a third of what the
                  source does
    length        it is over 2.5 times longer or shorter than the source, in characters, scaled by language
                  (parallel.py)
    sentences     it has fewer sentences than the source, and less than 0.8 of the length
    digits        digits of a number of two or more digits are lost, in any digit system; small numbers may become words
    language      its n-grams are likelier in another language by 20 nats and 0.2 each (language_id.py); from 20
                  characters on
    back          back in English it is not the source, by a score such as chrF that the caller passes

`judge` names the first rule that a text breaks, in this order. What the rules cost is measured on texts that people
wrote:

    python -m nanomblip.data.filters --out FOLDER

judges the Declaration of Human Rights and the names of the embedded data, each half of them with a language model of
the other half. Rejected of 8,317 paragraphs in 94 languages and 135,574 names in 84:

    rule            paragraphs       names
    any rule            3.19 %      0.28 %
    script              1.06 %      0.04 %   all of Kurdish, whose Declaration is in Latin letters
    copy                0.00 %      0.04 %   Zulu and Filipino names that are English
    repetition          0.01 %      0.00 %
    length              0.10 %      0.08 %
    sentences           0.07 %      0.01 %
    digits              1.82 %      0.00 %   headings of seven languages: "Artigo XII", "مادهٔ بیستم"
    language            0.13 %      0.09 %   Danish and Norwegian, Czech and Slovak, Indonesian and Malay

Without these headings and Kurdish, 0.46 % of 5,463 paragraphs.
"""

import re
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nanomblip.data.language_id import LanguageID, fold, sentence_id
from nanomblip.data.languages import LANGUAGES
from nanomblip.data.parallel import length_scale, parallel_declaration, parallel_names
from nanomblip.data.scripts import digits, normal, script_share
from nanomblip.flags import flag, parse_flags, run_main
from nanomblip.weights.files import write_atomic

RULES = ("blank", "unknown", "cut", "script", "copy", "repetition", "length", "sentences", "digits", "language", "back")
# Marks that end a sentence in the 96 languages; those of Chinese and Japanese need no space after them.
SENTENCE_END = re.compile(r"[.!?؟۔।॥։።፧។៕။](?=[\s\"'”»)\]]|$)|[。！？]")
LOOP = re.compile(r"(.{1,40}?)\1{3,}")
LONGEST_RATIO, SHORTEST_SHARE = 2.5, 0.8
SURE, SURE_EACH, JUDGED_FROM = 20.0, 0.2, 20  # nats; nats an n-gram; characters
LEAST_BACK = 0.3  # of a score in 0..1


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; a run of characters where a language writes no spaces."""
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in normal(text)).split()


def sentences(text: str) -> int:
    """How many sentences end in a text; what stands after the last end is one too."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return len(ends) + bool(words(text[ends[-1] if ends else 0 :]))


def relative_length(source: str, text: str, lang: str) -> float:
    """Characters of a text over what its language would need for the source; 10 are added to both, so short texts may
    vary more."""
    return (len(text) + 10) / (len(source) * length_scale(lang) + 10)


def is_repetitive(source: str, text: str) -> bool:
    def loops(t: str) -> bool:
        return any(re.search(r"[^\W\d_]", match[1]) for match in LOOP.finditer(" ".join(words(t)) + " "))

    def packed(t: str) -> float:  # two bytes a character, so that scripts compare
        return len(zlib.compress(t.encode("utf-16-le"))) / (2 * len(t))

    return (loops(text) and not loops(source)) or (len(text) > 60 and packed(text) < packed(source) / 3)


def has_lost_digits(source: str, text: str) -> bool:
    numbers = [n for n in re.findall(r"\d[\d.,:]*", source) if sum(map(str.isdecimal, n)) > 1]
    return bool(digits("".join(numbers)) - digits(text))


def is_other_language(text: str, lang: str, identifier: LanguageID | None) -> bool:
    if len(normal(text)) < JUDGED_FROM:
        return False
    identifier = identifier or sentence_id()
    scores = identifier.scores(text)
    margin = SURE + SURE_EACH * len(identifier.grams(normal(text)))
    return lang in scores and max(scores.values()) - scores[lang] > margin  # Kurdish is not among them


def judge(source: str, text: str, lang: str, unknown: int = 0, ended: bool = True, back: str | None = None,
          score=None, identifier: LanguageID | None = None) -> str | None:  # fmt: skip
    """The first of RULES that a translation of an English source breaks, None for a good one.

    lang: code of LANGUAGES. unknown: how many tokens the translator could not write; ended: did it stop by itself.
    back: the text translated back into English, and score(back, source) in 0..1, such as scripts.chrf; without, that
    rule is left out. identifier: another judge of languages than `sentence_id()`, which takes some seconds at first
    use.
    """
    assert (back is None) == (score is None), "a back-translation needs a score, and a score a back-translation"
    if lang not in LANGUAGES or lang == "en":
        raise ValueError(f"{lang!r} is no language that English is translated into; give one of {' '.join(LANGUAGES)}")
    if not source.strip():
        raise ValueError("an empty source cannot be translated; leave it out")
    if not any(c.isalnum() for c in text):
        return "blank"
    share, length = script_share(text, lang), relative_length(source, text, lang)
    broken = {
        "unknown": lambda: unknown > 0 or "⁇" in text or "\ufffd" in text,
        "cut": lambda: not ended,
        "script": lambda: share is not None and share < 0.5,
        "copy": lambda: len(words(source)) > 2 and words(text) == words(source),
        "repetition": lambda: is_repetitive(source, text),
        "length": lambda: not 1 / LONGEST_RATIO < length < LONGEST_RATIO,
        "sentences": lambda: length < SHORTEST_SHARE and sentences(text) < sentences(source),
        "digits": lambda: has_lost_digits(source, text),
        "language": lambda: is_other_language(text, lang, identifier),
        "back": lambda: back is not None and score(back, source) < LEAST_BACK,
    }
    return next((rule for rule, breaks in broken.items() if breaks()), None)


class Report:
    """How many texts of each language were judged, and how many each rule rejected."""

    def __init__(self):
        self.judged, self.rejected = Counter(), Counter()  # language -> texts; (language, rule) -> texts

    def add(self, lang: str, rule: str | None) -> bool:
        """Count one verdict of `judge`; True when the text is kept."""
        assert rule is None or rule in RULES, rule
        self.judged[lang] += 1
        if rule is not None:
            self.rejected[lang, rule] += 1
        return rule is None

    def share(self, lang: str | None = None, rule: str | None = None) -> float:
        """The share rejected in a language (None: in all) by a rule (None: by any)."""
        texts = sum(n for code, n in self.judged.items() if lang in (None, code))
        return sum(n for (c, r), n in self.rejected.items() if lang in (None, c) and rule in (None, r)) / max(1, texts)

    def worst(self) -> list[str]:
        """The languages, the one with the largest share of rejected texts first."""
        return sorted(self.judged, key=lambda lang: (-self.share(lang), lang))

    def table(self) -> str:
        """Markdown: a row for all languages and one for each, the worst first; a column for each rule that rejected
        something."""
        rules = [rule for rule in RULES if any(r == rule for _, r in self.rejected)]
        lines = [
            f"| language | texts | rejected |{''.join(f' {rule} |' for rule in rules)}",
            "|---" * (3 + len(rules)) + "|",
        ]
        for lang in [None, *self.worst()]:
            name = "all" if lang is None else f"{LANGUAGES[lang].name} ({lang})"
            texts = self.judged.total() if lang is None else self.judged[lang]
            cells = [
                self.rejected[lang, rule] if lang else sum(self.rejected[c, rule] for c in self.judged)
                for rule in rules
            ]
            shares = "".join(f" {100 * n / max(1, texts):.2f} % |" if n else " - |" for n in cells)
            lines.append(f"| {name} | {texts:,} | {100 * self.share(lang):.2f} % |{shares}")
        return "\n".join(lines) + "\n"

    def plot(self, path: Path | str) -> None:
        """A bar for each language, the worst first, in the colours of the rules: a PNG."""
        from matplotlib.figure import Figure  # the class alone: no window, no global state

        langs = self.worst()
        figure = Figure(figsize=(max(4, 0.16 * len(langs) + 1.5), 4), layout="constrained")
        axes, bottom = figure.subplots(), [0.0] * len(langs)
        for rule, color in zip(RULES, [f"C{i}" for i in range(10)] + ["black"]):
            heights = [100 * self.share(lang, rule) for lang in langs]
            if any(heights):
                axes.bar(langs, heights, bottom=bottom, label=rule, color=color)
                bottom = [low + height for low, height in zip(bottom, heights)]
        axes.set(xlabel="language", ylabel="rejected (%)", xlim=(-0.6, len(langs) - 0.4))
        axes.tick_params(axis="x", rotation=90, labelsize=7)
        if any(bottom):
            axes.legend(fontsize=8)
        write_atomic(Path(path), lambda temporary: figure.savefig(temporary, format="png", dpi=120))

    def write(self, folder: Path | str, name: str = "rejected") -> None:
        """Write FOLDER/NAME.md and FOLDER/NAME.png."""
        folder, text = Path(folder), self.table()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{name}.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self.plot(folder / f"{name}.png")


def judge_people(pairs, langs=tuple(LANGUAGES)) -> Report:
    """What `judge` rejects of texts that people wrote; pairs(lang) are (English, text), as in parallel.py. Each half
    of them is judged by an identifier that has read the other half only."""
    report = Report()
    for half in (0, 1):
        identifier = sentence_id(half)
        for lang in langs:
            for english, text in pairs(lang) if lang != "en" else ():
                if fold(text) == half:
                    report.add(lang, judge(english, text, lang, identifier=identifier))
    return report


@dataclass(frozen=True)
class Config:
    out: str = flag("", "folder for a table and a plot of each of the two; nothing: print the first rows only")


def main(argv: list[str]) -> None:
    cfg = parse_flags(Config, argv, "What the filters of translations reject of texts that people wrote.")
    for name, pairs in (("declaration", parallel_declaration), ("names", parallel_names)):
        report = judge_people(pairs)
        print(f"{name}\n\n{''.join(line + chr(10) for line in report.table().splitlines()[:12])}")
        if cfg.out:
            report.write(cfg.out, name)


if __name__ == "__main__":
    run_main(main)
