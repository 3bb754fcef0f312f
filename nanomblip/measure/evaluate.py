"""What a model can do: on the fixed splits of the embedded data, and on the paper's benchmarks.

    python -m nanomblip.measure.evaluate --model out/RUN --data emoji
    python -m nanomblip.measure.evaluate --model FOLDER --data captions.jsonl --task xm3600 --image_root images

On the embedded data the question is "Caption the image in {language}." (or another of the tasks of mixture.py); an
answer counts as right when it is the human-made name, ignoring case and outer spaces (exact match), and as in-language
when it belongs to the requested language, right or not (language_id.py: names are judged by the names alone, the
answers of benchmarks as filters.py judges sentences). The benchmarks have their own prompts, decoding and metrics
(benchmarks.py). What becomes of the answers is in scores.py.

Every answer goes to a file beside the record as it is made (answers.py); the same command goes on with it.
"""

import json
import random
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from nanomblip.data.answers import AnswerFile, Shard, fingerprint, merge
from nanomblip.data.decode import ImageError, is_damaged, load_image
from nanomblip.data.emoji import Emoji, load_emoji
from nanomblip.data.folder import pick_device
from nanomblip.data.image import ImageConfig, image_to_tensor
from nanomblip.data.json_mixture import image_path
from nanomblip.data.language_id import LanguageID, sentence_id
from nanomblip.data.languages import LANGUAGES, parse_lang
from nanomblip.data.mixture import TASKS, Mixture
from nanomblip.data.processor import load_image_config
from nanomblip.data.prompts import EVAL_PROMPT
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.flags import flag, parse_flags, run_main
from nanomblip.measure.benchmarks import OUTSIDE, READERS, Item, read_benchmark
from nanomblip.measure.emoji_splits import GREEDY, MEASUREMENTS, questions
from nanomblip.measure.fidelity import language_masks
from nanomblip.measure.metrics import missing_segmenters
from nanomblip.measure.scores import report, scores_of, summarise
from nanomblip.model.generate import DECODING, Decoding, generate
from nanomblip.model.mblip import MBLIP
from nanomblip.weights.files import read_json, write_json
from nanomblip.weights.layout import WeightsError
from nanomblip.weights.load import load_mblip

BENCHMARKS = (*READERS, "vqav2")
CAPTIONS = ("xm3600", "xflickrco")  # those without a question
ANSWERED = (*CAPTIONS, "maxm")  # those whose answers are in the language of the item
ASKED = tuple(task for task in TASKS if task not in ("keywords", "question"))  # embedded: with one right answer


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
    force_lang: bool = flag(False, "write only tokens that the language of the answer can use (fidelity.py)")
    paper_names: bool = flag(False, "name five languages in prompts as the paper's evaluation does, misspelt")
    preset: str = flag("", "decoding; default: caption for captions, vqa for other benchmarks, greedy for other tasks "
                           "of --data emoji", ("", *DECODING))  # fmt: skip
    batch: int = flag(32, "questions at a time")
    seed: int = flag(0, "of the bootstrap, and of what is drawn for the questions of --data emoji")
    out: str = flag("", "the JSON record, the answers beside it; default: evaluation_TASK.json in the model's folder")
    shard: str = flag("", "i/n: answer every n-th question from i on, to a file of its own; merge/n: join the files")
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
    """Questions about embedded pictures, as (picture,) in `images`; wrong options and templates follow from the seed.

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
    keep=lambda item, text: None,
):
    """The model's answers to items: (texts, problems); a text is None where a picture could not be loaded.

    load(name) -> float (3, size, size) or ImageError; keep(item, text) is called with every answer as it is made. Items
    are taken in an order in which those about the same pictures are neighbours, so that a picture goes through the ViT
    about once however many languages ask for it.
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
                    keep(items[i], texts[i])
        if progress is not None:
            progress.update(len(part))
    return texts, problems


def emoji_questions(cfg: Config, emoji: Emoji, image: ImageConfig, wanted: list[str]):
    """Items, load and default preset for the embedded data; `load` as in `write_answers`."""
    spoken = read_json(Path(cfg.model) / "config.json").get("languages") or emoji.langs
    langs = [lang for lang in emoji.langs if lang in (wanted or spoken)]
    if not langs:
        raise ValueError(f"--langs {cfg.langs}: the embedded data have none of these")
    if image.size != (size := emoji.pictures.shape[1]):
        raise ValueError(f"--model {cfg.model}: its ViT wants pictures of {image.size}, the embedded ones have {size}")
    items = emoji_items(emoji, cfg.task, cfg.split, langs, cfg.limit, cfg.seed)
    load = lambda picture: image_to_tensor(Image.fromarray(emoji.pictures[picture]), image)
    return items, load, DECODING["caption"] if cfg.task == "caption" else GREEDY


def benchmark_questions(cfg: Config, image: ImageConfig, wanted: list[str]):
    """The same for a benchmark's files."""
    items = read_benchmark(cfg.task, cfg.data.split(","), cfg.paper_names)
    items, seen = [item for item in items if not wanted or item.lang in wanted], Counter()
    items = [item for item in items if not cfg.limit or (seen.update([item.lang]) or seen[item.lang] <= cfg.limit)]
    load = lambda name: image_to_tensor(load_image(image_path(cfg.image_root, name)), image)
    return items, load, DECODING["caption" if cfg.task in CAPTIONS else "vqa"]


def about(item: Item) -> dict:
    """What a line of the answers and of the record says of a question; it tells the question from all others."""
    return dict(images=list(map(str, item.images)), lang=item.lang, prompt=item.prompt, labels=list(item.labels))


def key_of(row: dict) -> str:
    return json.dumps([row[name] for name in ("images", "lang", "prompt", "labels")])


def answer_all(
    cfg: Config, answers: AnswerFile, job: dict, finished: str | None, parts: tuple, items, load, decoding, masks
):
    """The texts to items, None where a picture could not be used, and the problems; first those that are known."""
    model, tokenizer = parts
    known = dict(answers.begin(job, lambda row: (key_of(row), row["answer"]), finished))
    todo = [item for item in items if key_of(about(item)) not in known]
    if len(todo) < len(items):
        name = answers.path.name
        print(f"evaluate: {len(items) - len(todo)} of {len(items)} answers are in {name} already", file=sys.stderr)

    def keep(item, text):
        answers.add(**about(item), answer=text)
        known[key_of(about(item))] = text

    with tqdm(total=len(items), initial=len(items) - len(todo), unit="question", desc=cfg.task, leave=False) as bar:
        _, problems = write_answers(model, tokenizer, todo, load, decoding, cfg.batch, masks, bar, keep)
    return [known.get(key_of(about(item))) for item in items], problems


def finished_job(record: Path, answers: Path) -> str | None:
    """The job of an earlier record, if it counts all the answers: they may be replaced, like the record itself."""
    try:
        old = read_json(record)["answers"]
        return old["job"] if old["bytes"] == answers.stat().st_size else None
    except (WeightsError, LookupError, TypeError):  # no record, a damaged or an older one
        return None


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Measure a model on the embedded data or on a benchmark.")
    folder, device = Path(cfg.model), pick_device(cfg.device)
    if not folder.is_dir():
        raise ValueError(f"--model {cfg.model}: no such folder")
    out = Path(cfg.out or folder / f"evaluation_{cfg.task}.json")
    if out.exists() and not out.is_file():
        raise ValueError(f"--out {out}: is a folder or a device, not a file")
    emoji = load_emoji("core")
    tokenizer = Tokenizer(folder / "spiece.model")
    image = load_image_config(folder)
    wanted = [w if w in OUTSIDE else parse_lang(w) for w in cfg.langs.split(",") if w.strip()]
    if cfg.data == "emoji":
        items, load, decoding = emoji_questions(cfg, emoji, image, wanted)
    else:
        items, load, decoding = benchmark_questions(cfg, image, wanted)
    if not items:
        raise ValueError(f"no question is left for --task {cfg.task} in --langs {cfg.langs or 'of the model'}")
    decoding, masks = DECODING[cfg.preset] if cfg.preset else decoding, None
    if cfg.force_lang:
        if outside := sorted({item.answer_lang for item in items} & set(OUTSIDE)):
            raise ValueError(f"--force_lang: nothing is known of {', '.join(outside)}; choose others by --langs")
        masks = language_masks(tokenizer, {item.answer_lang for item in items}, emoji)
        # Else silence is the easiest way to obey.
        decoding = replace(decoding, min_new_tokens=max(1, decoding.min_new_tokens))
    if cfg.task in CAPTIONS and (message := missing_segmenters(list(dict.fromkeys(item.lang for item in items)))):
        print(f"evaluate: {message}", file=sys.stderr)

    shard, answered = Shard.parse(cfg.shard), out.with_name(out.name.removesuffix(".json") + ".answers.jsonl")
    asked = {key_of(about(item)): item for item in items}  # one that is asked twice is answered once
    if shard.merge:
        merge(answered, shard, list(asked), key_of, lambda key: is_damaged(load, asked[key].images))
        shard = Shard()
    items = list(map(asked.get, shard.of(list(asked)))) if shard.count > 1 else items
    with AnswerFile(shard.path(answered)) as answers:
        finished = finished_job(out, answers.path)
        model = load_mblip(folder)
        job = dict(model=fingerprint(model, tokenizer, image), decoding=asdict(decoding), force_lang=cfg.force_lang,
                   image_root=cfg.image_root)  # fmt: skip
        parts = model.to(device).eval(), tokenizer
        texts, problems = answer_all(cfg, answers, job, finished, parts, items, load, decoding, masks)
        counted = dict(job=answers.job, bytes=answers.path.stat().st_size)
    if shard.count > 1:
        mine = f"{len(items)} of {len(asked)} questions belong to --shard {shard.number}/{shard.count}"
        print(f"evaluate: {mine}; when all are answered: --shard merge/{shard.count}", file=sys.stderr)
        return 0  # the merge sees what is missing; torchrun would stop the other processes
    kept = [(item, text) for item, text in zip(items, texts) if text is not None]
    if not kept:
        first = next(iter(problems.values()))
        raise ValueError(f"--image_root {cfg.image_root}: not one picture could be used, the first: {first}")
    language_id = LanguageID(emoji.names) if cfg.data == "emoji" else sentence_id() if cfg.task in ANSWERED else None
    result = summarise(cfg.task, scores_of(cfg.task, *map(list, zip(*kept)), language_id), cfg.seed)
    samples = [dict(**about(item), answer=text) for item, text in kept[:: max(1, len(kept) // 20)]][:20]
    write_json(out, dict(config=asdict(cfg), decoding=asdict(decoding), questions=len(items), answered=len(kept),
                         torch=torch.__version__, answers=counted, unusable_pictures=dict(list(problems.items())[:100]),
                         **result, samples=samples))  # fmt: skip
    print(report(result))
    print(f"every language and {len(samples)} answers: {out}, all answers: {answers.path.name}", file=sys.stderr)
    for problem in list(problems.values())[:10]:
        print(f"evaluate: {problem}", file=sys.stderr)
    if problems:
        lost = f"{len(items) - len(kept)} of {len(items)} questions are not counted"
        print(f"evaluate: {len(problems)} pictures could not be used; {lost}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    run_main(main)
