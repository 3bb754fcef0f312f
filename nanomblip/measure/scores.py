"""From answers to a table: scores of each, means with intervals of every language and group, and a summary for people.

Languages count equally in every mean, and every mean has a bootstrap interval.
"""

from collections import defaultdict

from nanomblip.data.language_id import LanguageID
from nanomblip.data.languages import LANGUAGES, resource_group, script_group
from nanomblip.data.scripts import chrf, script_share
from nanomblip.measure.benchmarks import OUTSIDE, Item
from nanomblip.measure.metrics import (
    above_chance,
    caption_tokens,
    cider,
    cider_name,
    exact_match,
    interval,
    relaxed_match,
    vqa_accuracy,
    vqa_normal,
    yes_or_no,
)

CHANCE = {
    "choice": 1 / 3,
    "category": 1 / 3,
    "match": 1 / 2,
    "exists": 1 / 2,
    "yes_no": 1 / 2,
    "xvnli": 1 / 3,
    "marvl": 1 / 2,
    "pope": 1 / 2,
}


def scores_of(
    task: str, items: list[Item], texts: list[str], language_id: LanguageID | None
) -> dict[str, dict[str, list[float]]]:
    """language -> metric -> one score in 0..1 for each of its items (CIDEr: 0..10). The task decides on the metrics."""
    rows = defaultdict(lambda: defaultdict(list))
    answers = defaultdict(list)
    for item, text in zip(items, texts, strict=True):
        row, label = rows[item.lang], item.labels[0]
        if task in ("xm3600", "xflickrco"):
            answers[item.lang].append(
                (caption_tokens(text, item.lang), [caption_tokens(ref, item.lang) for ref in item.labels])
            )
        elif task == "vqav2":
            row["vqa_accuracy"].append(vqa_accuracy(text, list(item.labels)))
        elif task == "maxm":
            row["exact"].append(any(exact_match(text, ref) for ref in item.labels))
        elif task in ("xgqa", "xvnli", "marvl", "pope"):
            row["exact"].append(exact_match(vqa_normal(text), vqa_normal(label)))
            row["relaxed"].append(relaxed_match(vqa_normal(text), vqa_normal(label)))
        elif task in ("match", "exists"):
            row["accuracy"].append(yes_or_no(text) == yes_or_no(label))
        else:
            row["exact"].append(exact_match(text, label))
        if task in ("marvl", "pope"):
            row["accuracy"].append(yes_or_no(text) == (label == "yes"))
        if task == "pope":  # what the precision, recall and share of yes are made of
            row["says_yes"].append(yes_or_no(text) is True)
            row["is_yes"].append(label == "yes")
        if item.answer_lang == item.lang and task != "vqav2" and task != "pope":
            row["chrf"].append(max(chrf(text, ref) for ref in item.labels))
            if item.lang in LANGUAGES:
                row["script"].append(script_share(text, item.lang) or 0.0)
            if language_id is not None and item.lang in language_id.unseen:
                row["in_language"].append(language_id.is_in(text, item.lang))
    for lang, pairs in answers.items():
        rows[lang][cider_name(lang)] = cider(*map(list, zip(*pairs)))
    return {lang: {name: [float(x) for x in xs] for name, xs in row.items()} for lang, row in rows.items()}


def main_metric(task: str) -> str:
    """The metric that a task is known by."""
    if task in ("xm3600", "xflickrco"):
        return "cider"
    return {"vqav2": "vqa_accuracy", "pope": "accuracy", "match": "accuracy", "exists": "accuracy"}.get(task, "exact")


def groups_of(langs) -> dict[str, list[str]]:
    """The rows of a result table: English, all other languages, and these by script and by resources (share of mC4)."""
    other = [lang for lang in langs if lang != "en"]
    groups = {"English": [lang for lang in langs if lang == "en"], "all other": other}
    for group_of, title in ((script_group, "script"), (resource_group, "resources")):
        inside = [lang for lang in other if lang in LANGUAGES]
        for group in sorted({group_of(lang) for lang in inside}):
            groups[f"{title}: {group}"] = [lang for lang in inside if group_of(lang) == group]
    groups["outside the 96"] = [lang for lang in other if lang in OUTSIDE]
    return {name: members for name, members in groups.items() if members}


def summarise(task: str, scores: dict[str, dict[str, list[float]]], seed: int = 0) -> dict:
    """Means and 95 % intervals of every metric for every language and group, chance, and the five worst languages."""

    def measured(langs):
        names = dict.fromkeys(name for lang in langs for name in scores[lang])
        out = dict(languages=len(langs), n=sum(max(map(len, scores[lang].values())) for lang in langs))
        for name in names:
            lists = [scores[lang][name] for lang in langs if scores[lang].get(name)]
            if lists:
                low, high = interval(lists, seed)
                out[name] = dict(
                    mean=sum(sum(xs) / len(xs) for xs in lists) / len(lists), low=low, high=high, languages=len(lists)
                )
        return out

    main = main_metric(task)
    groups = {name: measured(langs) for name, langs in groups_of(scores).items()}
    languages = {lang: measured([lang]) for lang in scores}
    result = dict(metric=main, chance=CHANCE.get(task), groups=groups, languages=languages)
    ranked = [lang for lang in scores if main in result["languages"][lang]]
    result["worst"] = sorted(ranked, key=lambda lang: (result["languages"][lang][main]["mean"], lang))[:5]
    if task == "pope":
        says, true = scores["en"]["says_yes"], scores["en"]["is_yes"]
        right = sum(a * b for a, b in zip(says, true))
        precision, recall = right / max(1, sum(says)), right / max(1, sum(true))
        result["pope"] = dict(
            precision=precision, recall=recall, f1=2 * precision * recall / max(1e-12, precision + recall)
        )
    return result


def report(result: dict) -> str:
    """A summary for people: a row a group, in percent (CIDEr times 100) with intervals, then the worst languages."""
    main = result["metric"]
    first = [name for name in (main, "cider_characters") if any(name in row for row in result["groups"].values())]
    names = first + sorted({n for row in result["groups"].values() for n in row} - {*first, "languages", "n"})
    percent = lambda cell: f"{100 * cell['mean']:.1f}" if cell else "-"
    shown = lambda cell, wide: (
        percent(cell) + (f" [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]" if cell and wide else "")
    )
    table = [["language group", "languages", "n", *(name.replace("_", " ") for name in names)]]
    rows = list(result["groups"].items())
    rows += [
        (f"worst: {LANGUAGES[lang].name if lang in LANGUAGES else OUTSIDE[lang]}", result["languages"][lang])
        for lang in result["worst"]
    ]
    for title, row in rows:
        table.append(
            [title, str(row["languages"]), f"{row['n']:,}", *(shown(row.get(name), name in first) for name in names)]
        )
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in table
    ]
    lines.insert(1, "-" * len(lines[0]))
    if result["chance"] is not None and "all other" in result["groups"]:
        share = above_chance(result["groups"]["all other"][main]["mean"], result["chance"])
        way = f"all other languages are {100 * share:.1f} % of the way from there to 100"
        lines.append(f"chance is {100 * result['chance']:.1f}; {way}")
    if "pope" in result:
        lines.append("yes: " + ", ".join(f"{name} {100 * value:.1f}" for name, value in result["pope"].items()))
    return "\n".join(lines)
