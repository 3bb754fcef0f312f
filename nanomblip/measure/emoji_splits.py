"""What a model can do on the fixed splits of the embedded data: the table that train.py prints."""

from collections import defaultdict

import torch
from PIL import Image

from nanomblip.data.emoji import TEST_ARTISTS, Emoji, pair_split, unit_hash
from nanomblip.data.image import ImageConfig, image_to_tensor
from nanomblip.data.language_id import LanguageID
from nanomblip.data.languages import LANGUAGES, SCRIPT_GROUPS, resource_group, script_group
from nanomblip.data.prompts import EVAL_PROMPT
from nanomblip.data.scripts import normal
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.model.generate import Decoding, generate
from nanomblip.model.mblip import MBLIP
from nanomblip.training.distributed import rank, share_out, world

GREEDY = Decoding(max_new_tokens=24)  # for looks on the way: a fifth of the time of the paper's five beams


def questions(emoji: Emoji, which: str, langs, limit: int) -> list[tuple[int, str]]:
    """The (picture, language) items of one measurement, at most `limit` pictures for each language but English.

    which: "pictures" (held-out pictures by the training artists, names of the train split), "validation" (the same on
    the slice for tuning), "openmoji" or "streamline" (held-out artists), "seen pairs" and "held-out pairs" (training
    pictures, names of the train and the test split). English always answers all pictures of the split where that is
    affordable. The choice is by hash, so it is the same in every run.
    """
    if which in TEST_ARTISTS:
        cells, split = emoji.cells_in("artist", (which,)), "train"
    else:
        cells, split = {
            "pictures": (emoji.cells_in("test"), "train"),
            "validation": (emoji.cells_in("val"), "train"),
            "seen pairs": (emoji.cells_in("train"), "train"),
            "held-out pairs": (emoji.cells_in("train"), "test"),
        }[which]
    items = []
    for lang in langs:
        mine = [p for p in cells if (c := emoji.cells[p][0]) in emoji.names[lang] and pair_split(lang, c) == split]
        if lang != "en" or "pairs" in which:
            mine = sorted(mine, key=lambda p: unit_hash("question", which, lang, *emoji.cells[p]))[:limit]
        items += [(p, lang) for p in mine]
    return items


@torch.no_grad()
def answer(model: MBLIP, tokenizer: Tokenizer, image: ImageConfig, emoji: Emoji, items, batch: int = 256,
           progress=None, masks=None, decoding: Decoding = GREEDY):  # fmt: skip
    """Captions for (picture, language) items, greedy unless told otherwise: a list of strings in the same order.

    Each picture goes through the ViT once, however many languages ask for it. masks: language -> tokens that it may
    use, as in fidelity.py; None = all.
    """
    if not items:
        return []
    model.eval()
    device = model.queries.device
    pictures = sorted({p for p, _ in items})
    row = {p: i for i, p in enumerate(pictures)}
    look = lambda some: torch.stack([image_to_tensor(Image.fromarray(emoji.pictures[p]), image) for p in some])[:, None]
    features = torch.cat(
        [model.image_features(look(pictures[i : i + batch]).to(device)) for i in range(0, len(pictures), batch)]
    )  # (P, 1, N, Dv)
    answers = []
    for i in range(0, len(items), batch):
        part = items[i : i + batch]
        prompt = tokenizer.batch([EVAL_PROMPT.format(L=LANGUAGES[lang].name) for _, lang in part]).to(device)
        allowed = None if masks is None else torch.stack([masks[lang] for _, lang in part]).to(device)  # (B, V)
        found = generate(model, None, prompt, features=features[[row[p] for p, _ in part]], vocab=len(tokenizer),
                         decoding=decoding, allowed=allowed)  # fmt: skip
        answers += [tokenizer.decode(best[0].ids) for best in found]
        if progress is not None:
            progress.update(len(part))
    return answers


def score(emoji: Emoji, items, answers, language_id: LanguageID) -> dict[str, dict[str, float]]:
    """language -> {"n", "exact", "in_language"}: number of questions and shares in 0..1."""
    rows = defaultdict(list)
    for (picture, lang), text in zip(items, answers, strict=True):
        right = normal(text) == normal(emoji.names[lang][emoji.cells[picture][0]])
        rows[lang].append((right, language_id.is_in(text, lang)))
    return {lang: dict(n=len(r), exact=sum(a for a, _ in r) / len(r), in_language=sum(b for _, b in r) / len(r))
            for lang, r in rows.items()}  # fmt: skip


MEASUREMENTS = ("pictures", "openmoji", "streamline", "seen pairs", "held-out pairs")


def evaluate(model, tokenizer, image: ImageConfig, emoji: Emoji, langs, language_id: LanguageID, limit: int = 40,
             measurements=MEASUREMENTS, progress=None, masks=None, decoding: Decoding = GREEDY):  # fmt: skip
    """All measurements of a model over `langs`, at most `limit` pictures a language; masks and decoding as in `answer`.

    Returns (results, examples): results[measurement][language] as in `score`; examples are 12 dicts with the answers to
    held-out pictures, in languages of different scripts, chosen by hash and not by how good they look.
    """
    asked = {which: questions(emoji, which, langs, limit) for which in measurements}
    if progress is not None:
        progress.reset(total=sum(len(items[rank() :: world()]) for items in asked.values()))
    results, examples = {}, []
    for which, items in asked.items():
        if not items:
            continue
        answers = share_out(items, lambda part: answer(model, tokenizer, image, emoji, part, progress=progress,
                                                       masks=masks, decoding=decoding))  # fmt: skip
        results[which] = score(emoji, items, answers, language_id)
        if which == measurements[0]:
            examples = pick_examples(emoji, items, answers)
    return results, examples


def pick_examples(emoji: Emoji, items, answers, count: int = 12) -> list[dict]:
    """A few answers for people to look at: English first, then languages that take turns over the script groups."""
    by_group = defaultdict(list)
    order = sorted(range(len(items)), key=lambda i: unit_hash("example", *map(str, items[i])))
    for i in order:
        by_group["English" if items[i][1] == "en" else script_group(items[i][1])].append(i)
    groups = sorted(by_group, key=lambda g: (g != "English", g))
    turns = [by_group[g][turn] for turn in range(count) for g in groups if turn < len(by_group[g])]
    chosen = []
    for i in turns[:count]:
        picture, lang = items[i]
        concept, artist = emoji.cells[picture]
        chosen.append(dict(lang=lang, concept=concept, artist=artist, english=emoji.names["en"][concept],
                           name=emoji.names[lang][concept], answer=answers[i]))  # fmt: skip
    return chosen


def mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def table(results: dict, held_out=()) -> str:
    """The results as a table for people: a row a language group, exact match in percent a measurement, and the share of
    answers in the requested language. Languages in `held_out` were not trained on and get a row of their own."""
    first = next(iter(results.values()))
    other = [lang for lang in first if lang != "en" and lang not in held_out]
    groups = {
        "English": [lang for lang in first if lang == "en"],
        "all other": other,
        "held-out languages": list(held_out),
    }
    for group_of, title in ((script_group, "script"), (resource_group, "resources")):
        for group in sorted({group_of(lang) for lang in other}):
            groups[f"{title}: {group}"] = [lang for lang in other if group_of(lang) == group]
    percent = lambda share: "-" if share is None else f"{100 * share:.1f}"
    header = ["language group", "languages", *results, "in language"]
    rows = [header]
    for group, langs in groups.items():
        if langs:
            cells = [percent(mean(r[lang]["exact"] for lang in langs if lang in r)) for r in results.values()]
            rows.append([group, str(len(langs)), *cells, percent(mean(first[lang]["in_language"] for lang in langs))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summary(of_language: dict) -> tuple[dict, dict]:
    """English and the mean over all other languages: exact and in_language, each in 0..1 or None."""
    rows = [[r for lang, r in of_language.items() if (lang == "en") == is_english] for is_english in (True, False)]
    return tuple({key: mean(r[key] for r in part) for key in ("exact", "in_language")} for part in rows)


class Validation:
    """A look at the validation slice every so many steps (0 = never): greedy, five pictures a language but English.

    The columns after the first four are the exact share of the languages other than English in each group of scripts,
    empty where none of its languages is trained.
    """

    GROUPS = tuple(sorted(set(SCRIPT_GROUPS.values())))
    COLUMNS = ("step", "english_exact", "other_exact", "other_in_language", *GROUPS)

    def __init__(
        self, model, tokenizer, image: ImageConfig, emoji: Emoji, langs, language_id: LanguageID, every: int, log
    ):
        self.of = model, tokenizer, image, emoji, langs, language_id
        self.every, self.log = every, log

    def __call__(self, step: int) -> None:
        if self.every and step % self.every == 0:
            results, _ = evaluate(*self.of, 5, ("validation",))
            english, other = summary(results["validation"])
            by_script = defaultdict(list)
            for lang, row in results["validation"].items():
                if lang != "en":
                    by_script[script_group(lang)].append(row["exact"])
            groups = [mean(by_script[group]) for group in self.GROUPS]
            self.log.add(step, english["exact"], other["exact"], other["in_language"], *groups)
