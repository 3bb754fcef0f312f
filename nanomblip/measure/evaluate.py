"""What a model can do: on the fixed splits of the embedded data, and on the paper's benchmarks.

    python -m nanomblip.measure.evaluate --model out/RUN --data emoji
    python -m nanomblip.measure.evaluate --model weights/mblip-mt0-xl --data captions.jsonl --task xm3600 --image_root images

On the embedded data the question is "Caption the image in {language}." (or another of the tasks of mixture.py); an answer counts as
right when it is the human-made name, ignoring case and outer spaces (exact match), and as in-language when it belongs to
the requested language, right or not. The benchmarks have their own prompts, decoding and metrics (benchmarks.py).
Languages count equally in every mean, and every mean has a bootstrap interval.
"""

import random
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from nanomblip.data.emoji import Emoji, load_emoji
from nanomblip.data.image import ImageConfig, ImageError, image_to_tensor, load_image
from nanomblip.data.json_mixture import image_path
from nanomblip.data.language_id import LanguageID
from nanomblip.data.languages import LANGUAGES, parse_lang, resource_group, script_group
from nanomblip.data.mixture import TASKS, Mixture
from nanomblip.data.prompts import EVAL_PROMPT
from nanomblip.data.scripts import script_share
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.flags import flag, parse_flags, run_main
from nanomblip.measure.benchmarks import OUTSIDE, READERS, Item, read_benchmark
from nanomblip.measure.emoji_splits import GREEDY, MEASUREMENTS, questions
from nanomblip.measure.fidelity import language_masks
from nanomblip.measure.metrics import (
    above_chance,
    caption_tokens,
    chrf,
    cider,
    cider_name,
    exact_match,
    interval,
    missing_segmenters,
    relaxed_match,
    vqa_accuracy,
    vqa_normal,
    yes_or_no,  # fmt: skip
)
from nanomblip.model.generate import DECODING, Decoding, generate
from nanomblip.model.mblip import MBLIP
from nanomblip.training.state import pick_device
from nanomblip.weights.files import read_json, write_json
from nanomblip.weights.load import load_mblip

BENCHMARKS = (*READERS, "vqav2")
ASKED = tuple(
    task for task in TASKS if task != "keywords" and task != "question"
)  # of the embedded data: tasks with one right answer
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


@dataclass(frozen=True)
class Config:
    model: str = flag("", "a run folder, or a folder in the official layout")
    data: str = flag(
        "emoji", "emoji, or the benchmark's file or files, separated by commas (vqav2: QUESTIONS,ANNOTATIONS)"
    )
    task: str = flag("caption", "with --data emoji " + ", ".join(ASKED) + "; else the benchmark", (*ASKED, *BENCHMARKS))
    image_root: str = flag("", "folder of the benchmark's pictures")
    split: str = flag("pictures", "with --data emoji: which pictures and names", (*MEASUREMENTS, "validation"))
    langs: str = flag("", "languages to measure, as a list; default: all that the data and the model have")
    limit: int = flag(0, "questions a language, 0 = all; the first ones of a benchmark, by hash with --data emoji")
    force_lang: bool = flag(False, "write only pieces that the language of the answer can use (fidelity.py)")
    paper_names: bool = flag(False, "name five languages in prompts as the paper's evaluation does, misspelt")
    preset: str = flag(
        "",
        "decoding; default: caption for captions, vqa for the other benchmarks, greedy for the other tasks of --data emoji",
        ("", *DECODING),
    )
    batch: int = flag(32, "questions at a time")
    seed: int = flag(0, "of the bootstrap, and of what is drawn for the questions of --data emoji")
    out: str = flag("", "the JSON record; default: evaluation_TASK.json in the model's folder")
    device: str = flag("auto", "auto, cpu or cuda")

    def __post_init__(self):
        if not self.model:
            raise ValueError("--model is missing: the folder of a run, or one in the official layout")
        if self.batch < 1 or self.limit < 0 or not 0 <= self.seed < 2**63:
            raise ValueError("--batch is at least 1, --limit and --seed at least 0")
        if (self.data == "emoji") != (self.task in ASKED):
            raise ValueError(f"--task {self.task} does not go with --data {self.data}: emoji has {', '.join(ASKED)}, "
                             f"files have {', '.join(BENCHMARKS)}")  # fmt: skip
        if self.data != "emoji" and not self.image_root:
            raise ValueError("--image_root is missing: the folder of the benchmark's pictures")


def emoji_items(emoji: Emoji, task: str, split: str, langs, limit: int, seed: int) -> list[Item]:
    """Questions about embedded pictures, as (picture,) in `images`; wrong options and templates are a function of the seed.

    Captions are asked by EVAL_PROMPT; a language that has no text for a task (mixture.NEEDS) is left out.
    """
    mixture, items = Mixture(emoji, {lang: 1 / len(langs) for lang in langs}, {task: 1.0}, seed), []
    for picture, lang in questions(emoji, split, langs, limit or 10**9):
        concept = emoji.cells[picture][0]
        if task == "caption":
            prompt, label = EVAL_PROMPT.format(L=LANGUAGES[lang].name), emoji.names[lang][concept]
        else:
            rng = random.Random(f"{seed}/{task}/{lang}/{picture}")
            pair = (
                TASKS[task](emoji, concept, lang, rng, mixture.usable[lang]) if mixture.available(task, lang) else None
            )
            if pair is None:
                continue
            prompt, label = pair
        items.append(Item((picture,), lang, "en" if task in ("match", "exists") else lang, prompt, (label,)))
    return items


@torch.no_grad()
def write_answers(
    model: MBLIP,
    tokenizer: Tokenizer,
    items: list[Item],
    load,
    decoding: Decoding,
    batch: int = 32,
    masks=None,
    progress=None,
):
    """The model's answers to items: (texts, problems); a text is None where a picture could not be loaded.

    load(name) -> float (3, size, size) or ImageError. Items are taken in an order in which those about the same pictures are
    neighbours, so that a picture goes through the ViT about once however many languages ask for it.
    """
    device, texts, problems = model.queries.device, [None] * len(items), {}
    features = {}  # name -> (1, N, Dv), of the last pictures only
    order = sorted(range(len(items)), key=lambda i: (len(items[i].images), tuple(map(str, items[i].images)), i))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        names = {name for i in part for name in items[i].images}
        features = {name: kept for name, kept in features.items() if name in names}
        fresh = {}
        for name in sorted(names - set(features) - set(problems), key=str):
            try:
                fresh[name] = load(name)
            except ImageError as error:
                problems[name] = str(error)
        if fresh:
            seen = model.image_features(torch.stack(list(fresh.values()))[:, None].to(device))  # (P, 1, N, Dv)
            features |= dict(zip(fresh, seen))
        for count in sorted({len(items[i].images) for i in part}):  # one and two pictures cannot be in one batch
            rows = [
                i for i in part if len(items[i].images) == count and all(name in features for name in items[i].images)
            ]
            if rows:
                seen = torch.stack(
                    [torch.cat([features[name] for name in items[i].images]) for i in rows]
                )  # (B, I, N, Dv)
                prompt = tokenizer.batch([items[i].prompt for i in rows], 256).to(device)
                allowed = None if masks is None else torch.stack([masks[items[i].answer_lang] for i in rows]).to(device)
                found = generate(
                    model, None, prompt, features=seen, vocab=len(tokenizer), decoding=decoding, allowed=allowed
                )
                for i, best in zip(rows, found):
                    texts[i] = " ".join(tokenizer.decode(best[0].ids).split())
        if progress is not None:
            progress.update(len(part))
    return texts, problems


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
    result = dict(metric=main, chance=CHANCE.get(task), groups={name: measured(langs) for name, langs in groups_of(scores).items()},
                  languages={lang: measured([lang]) for lang in scores})  # fmt: skip
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
    """A summary for people: a row a group, in percent (CIDEr times 100) with intervals, then the worst five languages."""
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
        lines.append(
            f"chance is {100 * result['chance']:.1f}; all other languages are {100 * share:.1f} % of the way from there to 100"
        )
    if "pope" in result:
        lines.append("yes: " + ", ".join(f"{name} {100 * value:.1f}" for name, value in result["pope"].items()))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Measure a model on the embedded data or on a benchmark.")
    folder, device = Path(cfg.model), pick_device(cfg.device)
    if not folder.is_dir():
        raise ValueError(f"--model {cfg.model}: no such folder")
    emoji = load_emoji("core")
    tokenizer = Tokenizer(folder / "spiece.model")
    image = ImageConfig.from_hf(read_json(folder / "preprocessor_config.json"))
    wanted = [w if w in OUTSIDE else parse_lang(w) for w in cfg.langs.split(",") if w.strip()]

    # Questions.
    if cfg.data == "emoji":
        spoken = read_json(folder / "config.json").get("languages") or emoji.langs
        langs = [lang for lang in emoji.langs if lang in (wanted or spoken)]
        if not langs:
            raise ValueError(f"--langs {cfg.langs}: the embedded data have none of these")
        if image.size != emoji.pictures.shape[1]:
            raise ValueError(
                f"--model {cfg.model}: its ViT wants pictures of {image.size}, the embedded ones have {emoji.pictures.shape[1]}"
            )
        items = emoji_items(emoji, cfg.task, cfg.split, langs, cfg.limit, cfg.seed)
        load = lambda picture: image_to_tensor(Image.fromarray(emoji.pictures[picture]), image)
        decoding = DECODING[cfg.preset] if cfg.preset else DECODING["caption"] if cfg.task == "caption" else GREEDY
    else:
        items = read_benchmark(cfg.task, cfg.data.split(","), cfg.paper_names)
        items = [item for item in items if not wanted or item.lang in wanted]
        seen = Counter()
        items = [item for item in items if not cfg.limit or (seen.update([item.lang]) or seen[item.lang] <= cfg.limit)]
        load = lambda name: image_to_tensor(load_image(image_path(cfg.image_root, name)), image)
        decoding = DECODING[cfg.preset or ("caption" if cfg.task in ("xm3600", "xflickrco") else "vqa")]
    if not items:
        raise ValueError(f"no question is left for --task {cfg.task} in --langs {cfg.langs or 'of the model'}")
    langs = list(dict.fromkeys(item.lang for item in items))
    masks = None
    if cfg.force_lang:
        outside = sorted({item.answer_lang for item in items} & set(OUTSIDE))
        if outside:
            raise ValueError(f"--force_lang: nothing is known of {', '.join(outside)}; choose others by --langs")
        masks = language_masks(tokenizer, {item.answer_lang for item in items}, emoji)
        decoding = replace(
            decoding, min_new_tokens=max(1, decoding.min_new_tokens)
        )  # else silence is the easiest way to obey
    if cfg.task in ("xm3600", "xflickrco") and (message := missing_segmenters(langs)):
        print(f"evaluate: {message}", file=sys.stderr)

    # Answers and scores.
    model = load_mblip(folder).to(device).eval()
    with tqdm(total=len(items), unit="question", desc=cfg.task, leave=False) as bar:
        texts, problems = write_answers(model, tokenizer, items, load, decoding, cfg.batch, masks, bar)
    kept = [(item, text) for item, text in zip(items, texts) if text is not None]
    if not kept:
        raise ValueError(
            f"--image_root {cfg.image_root}: not one picture could be used, the first: {next(iter(problems.values()))}"
        )
    language_id = LanguageID(emoji.names) if cfg.task in (*ASKED, "xm3600", "xflickrco", "maxm") else None
    result = summarise(cfg.task, scores_of(cfg.task, *map(list, zip(*kept)), language_id), cfg.seed)
    print(report(result))
    out = Path(cfg.out or folder / f"evaluation_{cfg.task}.json")
    samples = [dict(images=list(map(str, item.images)), lang=item.lang, prompt=item.prompt, labels=list(item.labels), answer=text)
               for item, text in kept[:: max(1, len(kept) // 20)]]  # fmt: skip
    write_json(out, dict(config=asdict(cfg), decoding=asdict(decoding), questions=len(items), answered=len(kept), torch=torch.__version__,
                         unusable_pictures=dict(list(problems.items())[:100]), **result, samples=samples[:20]))  # fmt: skip
    print(f"every language and {min(20, len(samples))} answers: {out}", file=sys.stderr)
    for problem in list(problems.values())[:10]:
        print(f"evaluate: {problem}", file=sys.stderr)
    if problems:
        lost = f"{len(items) - len(kept)} of {len(items)} questions are not counted"
        print(f"evaluate: {len(problems)} pictures could not be used; {lost}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    run_main(main)
