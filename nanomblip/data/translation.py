"""From English examples to translated ones, a block at a time: who gets which language, what is text, what is rejected.

translate.py is the command; translators.py has the models and cuts texts into sentences.
"""

import random
from bisect import bisect
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

from nanomblip.data.builders import fill
from nanomblip.data.emoji import load_emoji
from nanomblip.data.filters import Report, is_other_language, judge
from nanomblip.data.json_mixture import shuffled
from nanomblip.data.languages import LANGUAGES
from nanomblip.data.prompts import CAPTION, CAPTION_UNNAMED
from nanomblip.data.scripts import chrf, script_share
from nanomblip.data.translators import join, split_text, translate

# Task -> its fields in an example's `texts`; those of type str are translated.
FIELDS = {
    "caption": dict(text=str), "match": dict(text=str, fits=bool),
    **dict.fromkeys(("detail", "conversation", "vqa", "question"), dict(question=str, answer=str)),
}  # fmt: skip
KEPT = ("reasoning", "explanation", "naming", "exists")  # tasks that are not translated, as in the paper
MAY_STAY = ("vqa", "question")  # tasks whose answer may stay English
PROMPTS = {prompt.format(L=lang.name): lang.code for lang in LANGUAGES.values() for prompt in CAPTION}
PROMPTS |= dict.fromkeys(CAPTION_UNNAMED, "en")
TRIES = 3  # languages for an example


class Names:
    """The English names of the embedded pictures as examples; image_id is the concept."""

    def __init__(self):
        self.names = list(load_emoji("core").names["en"].items())

    def __len__(self) -> int:
        return len(self.names)

    def row(self, n: int) -> dict:
        concept, name = self.names[n]
        return dict(context=CAPTION[0].format(L="English"), label=name, image_id=concept)

    def contents(self) -> dict:
        return dict(emoji=self.names)


@dataclass(frozen=True)
class Plan:
    """Which example becomes which language: plan[unit number] -> (number of the example, language).

    mix: the share of each language, summing to 1. A language has every example whose place in a permutation lies in
    its stretch, so that the shares are exact. every: all examples in all languages instead.
    """

    examples: int
    mix: dict[str, float]
    every: bool
    seed: int

    def __len__(self) -> int:
        return self.examples * (len(self.mix) if self.every else 1)

    def __getitem__(self, unit: int) -> tuple[int, str]:
        langs = list(self.mix)
        if self.every:
            return unit // len(langs), langs[unit % len(langs)]
        place = shuffled(unit, self.examples, f"{self.seed}/language")
        ends = list(accumulate(self.mix.values()))[:-1]
        return unit, langs[bisect(ends, (place + 0.5) / self.examples)]

    def another(self, unit: int, tried: list[str]) -> str | None:
        """A language for a unit besides those that were tried, by their shares; None when there is none left."""
        left = [lang for lang in self.mix if lang not in tried]
        if not left or len(tried) == TRIES:
            return None
        rng = random.Random(f"{self.seed}/{unit}/{len(tried)}")
        return rng.choices(left, [self.mix[lang] for lang in left])[0]


def texts_of(row: dict, where: str) -> tuple[str, str, dict]:
    """Task, language and texts of an example; ValueError says `where` for one whose texts are not known."""
    if "texts" not in row:
        if row["context"] not in PROMPTS:
            unknown = "its prompt is not one of the paper's for captions, so what is text in it is not known"
            raise ValueError(f"{where}: {unknown}; make the file with --texts of nanomblip.data.builders")
        return "caption", PROMPTS[row["context"]], dict(text=row["label"])
    task, lang, texts = row.get("task"), row.get("lang"), row["texts"]
    if task not in (*FIELDS, *KEPT) or lang not in list(LANGUAGES):
        raise ValueError(f"{where}: task {task!r} in language {lang!r} is none of nanomblip.data.builders --texts")
    kinds = FIELDS.get(task, {})
    if kinds and not (isinstance(texts, dict) and {name: type(text) for name, text in texts.items()} == kinds):
        raise ValueError(f"{where}: its texts are not {' and '.join(kinds)}, as {task} has")
    return task, lang, texts


def has_letters(text: str) -> bool:
    """Only what has some is given to a translator: of digits alone NLLB makes sentences."""
    return any(map(str.isalpha, text))


def looks_english(text: str) -> bool:
    share = script_share(text, "en")
    return (share is None or share > 0.5) and not is_other_language(text, "en", None)


@dataclass
class Unit:
    """An example to be translated: its number in the plan, its row, its texts (cleaned), and the languages that were
    tried, the present one last."""

    number: int
    row: dict
    task: str
    texts: dict
    langs: list[str]

    def english(self) -> list[tuple[str, str]]:
        """Name and text of what is to be translated."""
        return [(name, self.texts[name]) for name, kind in FIELDS[self.task].items() if kind is str]


class Block:
    """Some units, from English to the rows of the output.

    rejected: "other", "drop" or "keep"; back: whether to translate back as well; batch, num_beams, progress: as in
    `translate`. rows: unit number -> row. counts: what people should know, by what it is.
    """

    def __init__(self, plan: Plan, translator, rejected: str, back: bool, batch: int, num_beams: int, progress=None):
        self.plan, self.translator, self.rejected, self.back = plan, translator, rejected, back
        self.translate = lambda items: translate(translator, items, batch, num_beams, progress)
        self.report, self.counts, self.rows = Report(), Counter(), {}

    def make(self, rows, numbers: range, name: str) -> None:
        """Fill `rows` of the output from those of the input; name: what the input is called in errors."""
        units = self.begin(rows, numbers, name)
        while units:
            units = self.finish(units)

    def keep(self, number: int, row: dict, lang: str) -> None:
        """Put an example into the output as it is."""
        self.rows[number] = dict(context=row["context"], label=row["label"], image_id=row["image_id"], lang=lang)

    def begin(self, rows, numbers: range, name: str) -> list[Unit]:
        """The units that are to be translated; the others are kept or left out."""
        units, first = [], next(iter(self.plan.mix))
        for number in numbers:
            n, lang = self.plan[number]
            row = rows.row(n)
            task, source, texts = texts_of(row, f"{name}: example {n:,}")
            is_first = not self.plan.every or lang == first  # said and kept once, not once a language
            if source != "en" or task in KEPT:
                if is_first:
                    self.keep(number, row, source)
                    self.counts[f"kept as they are: {task}" if source == "en" else "kept as they are: not English"] += 1
                continue
            clean = {key: self.translator.clean(x) if isinstance(x, str) else x for key, x in texts.items()}
            unit = Unit(number, row, task, clean, [lang])
            if not all(text for _, text in unit.english()):
                self.counts["left out: a text is empty"] += is_first
                continue
            self.counts["do not look English"] += is_first and not all(looks_english(x) for _, x in unit.english())
            if lang == "en":
                self.keep(number, row, "en")
            else:
                units.append(unit)
        return units

    def finish(self, units: list[Unit]) -> list[Unit]:
        """Translate, judge, keep what is good; returns the units that are to be tried in another language."""
        again, found = [], self.translated(units)
        for unit in units:
            lang, texts = unit.langs[-1], dict(unit.texts)
            verdicts = {name: found[unit.number, name] for name, _ in unit.english()}
            texts |= {name: text for name, (text, rule) in verdicts.items() if rule is None}
            bad = [name for name, (_, rule) in verdicts.items() if rule is not None]
            stays = bad == ["answer"] and unit.task in MAY_STAY
            self.counts["answers that stay English"] += stays
            if not bad or stays:
                rng = random.Random(f"{self.plan.seed}/{unit.number}/template")
                context, label = fill(rng, unit.task, lang, texts, "en" if stays else lang)
                self.keep(unit.number, dict(unit.row, context=context, label=label), lang)
                continue
            another = self.plan.another(unit.number, unit.langs) if self.rejected == "other" else None
            self.counts["rejected, left out" if another is None else "rejected, in another language"] += 1
            if another == "en":
                self.keep(unit.number, unit.row, "en")
            elif another is not None:
                unit.langs.append(another)
                again.append(unit)
        return again

    def translated(self, units: list[Unit]) -> dict[tuple[int, str], tuple[str, str | None]]:
        """(unit number, name of a text) -> its translation, and the rule that this breaks or None."""
        longest, found, parts, todo = self.translator.longest, {}, {}, []
        for unit in units:
            lang = unit.langs[-1]
            count = lambda text: len(self.translator.encode(text, "en", lang))
            for name, text in unit.english():
                key = unit.number, name
                if not has_letters(text):
                    found[key] = text, None
                    continue
                parts[key], cut = split_text(text, count, longest)
                self.counts[f"sentences of more than {longest} tokens, cut"] += cut
                todo += [(part, "en", lang) for part in parts[key][::2] if has_letters(part)]
        forth, back = self.translate(todo), {}
        if self.back:
            back = self.translate((w.text, lang, "en") for (_, _, lang), w in forth.items() if w.text.strip())
        for unit in units:
            for name, text in unit.english():
                if (key := (unit.number, name)) in parts:
                    found[key] = self.judged(text, parts[key], unit.langs[-1], forth, back)
        return found

    def judged(self, source: str, parts: list[str], lang: str, forth: dict, back: dict) -> tuple[str, str | None]:
        """A text from its translated sentences, and the rule that it breaks or None."""
        made = {i: forth[part, "en", lang] for i, part in enumerate(parts) if i % 2 == 0 and has_letters(part)}
        text = join([made[i].text if i in made else part for i, part in enumerate(parts)], lang)
        written = made.values()
        self.counts["tokens written"] += sum(w.tokens for w in written)
        if self.rejected == "keep":
            return text, None
        again = {}
        if self.back:
            returned = [back[w.text, lang, "en"].text for w in written if w.text.strip()]
            again = dict(back=" ".join(returned), score=chrf)
        unknown, ended = sum(w.unknown for w in written), all(w.ended for w in written)
        rule = judge(source, text, lang, unknown, ended, **again)
        self.report.add(lang, rule)
        return text, rule

    def line(self) -> dict:
        """What is written of the block; no times, so that it is the same whenever it is made."""
        rows = [self.rows[number] for number in sorted(self.rows)]
        verdicts = [[lang, rule, n] for (lang, rule), n in sorted(self.report.rejected.items())]
        counts = {what: n for what, n in sorted(self.counts.items()) if n}
        return dict(judged=dict(sorted(self.report.judged.items())), verdicts=verdicts, counts=counts, rows=rows)
