"""The example stream: a pure function of (seed, epoch, index), with exact shares, and nothing held out in it."""

import hashlib
import random
from collections import Counter

import pytest
import torch
from PIL import Image

from nanomblip.data import prompts
from nanomblip.data.emoji import ROOT, load_emoji, pair_split, picture_split
from nanomblip.data.image import ImageConfig, image_to_tensor
from nanomblip.data.languages import LANGUAGES, parse_lang_mix
from nanomblip.data.mixture import LABELS, NEEDS, NOT_EMBEDDED, TASKS, Batches, Mixture, parse_tasks
from nanomblip.data.prompts import CAPTION, EXISTS, MATCH, NAMING, QUESTION, VQA
from nanomblip.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def emoji():
    return load_emoji("core")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(ROOT / "spiece.model")


def stream(emoji, spec="all", tasks="caption", seed=0, split="train"):
    return Mixture(emoji, parse_lang_mix(spec, emoji.langs), parse_tasks(tasks), seed, split)


def test_an_example_does_not_depend_on_what_was_asked_before(emoji):
    numbers = [0, 5, 9_999, 123_456, 4]
    first = [stream(emoji, tasks=",".join(TASKS)).example(i) for i in numbers]
    mixture = stream(emoji, tasks=",".join(TASKS))
    assert [mixture.example(i) for i in reversed(numbers)] == first[::-1]
    assert stream(emoji, seed=1).example(5) != stream(emoji, seed=0).example(5)


@pytest.mark.parametrize("spec,tasks,digest", [("all", "caption", "abcfaa3faa41a607"), ("mc4", "caption", "1d0a3502bd5909f1")])
def test_the_caption_stream_is_for_ever_the_same(emoji, spec, tasks, digest):
    """Runs of other days and their records rest on it; a new task must not move a bit of it."""
    mixture, sha = stream(emoji, spec, tasks, seed=7), hashlib.sha256()
    for i in (*range(3000), *range(50_000, 50_500)):
        e = mixture.example(i)
        sha.update(repr((e.picture, e.lang, e.task, e.prompt, e.target, e.key)).encode())
    assert sha.hexdigest().startswith(digest)


def test_an_epoch_shows_every_picture_about_once_and_another_epoch_another_order(emoji):
    mixture = stream(emoji, "en")  # nothing is held out in English, so exactly once
    epochs = [[mixture.example(e * len(mixture) + i).picture for i in range(len(mixture))] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(mixture.cells) and epochs[0] != epochs[1]


def test_nothing_held_out_is_ever_shown(emoji):
    mixture = stream(emoji, tasks=",".join(TASKS))
    names = {lang: {} for lang in emoji.langs}  # language -> name -> concepts
    for lang, of_lang in emoji.names.items():
        for concept, name in of_lang.items():
            names[lang].setdefault(name, []).append(concept)
    for i in range(6000):
        e = mixture.example(i)
        concept, artist = emoji.cells[e.picture]
        assert picture_split(concept, artist) == "train" and pair_split(e.lang, concept) == "train"
        if e.task in ("caption", "naming", "choice"):
            assert concept in names[e.lang][e.target]


@pytest.mark.parametrize("spec", ["all", "mc4", "sw:3,de:1"])
def test_language_shares_are_the_stated_ones(emoji, spec):
    n = 20_000
    want = parse_lang_mix(spec, emoji.langs)
    mixture = stream(emoji, spec)
    got = Counter(mixture.example(i).lang for i in range(n))
    for lang, p in want.items():
        assert abs(got[lang] - n * p) < 5 * (n * p * (1 - p)) ** 0.5 + 1, lang


@pytest.mark.parametrize("tasks", ["caption:2,match,naming", ",".join(TASKS), "choice,keywords,category"])
def test_task_shares_are_the_stated_ones(emoji, tasks):
    n = 15_000
    mixture, want = stream(emoji, "all", tasks, seed=3), parse_tasks(tasks)
    shares = mixture.shares()
    assert sum(shares.values()) == pytest.approx(1)
    drawn = [mixture.example(i) for i in range(n)]
    for key, p in shares.items():  # each (language, task), also where a language has no text for one
        assert abs(sum((e.lang, e.task) == key for e in drawn[:4000]) - 4000 * p) < 5 * (4000 * p * (1 - p)) ** 0.5 + 1, key
    for lang, p in parse_lang_mix("all", emoji.langs).items():
        assert sum(q for (of, _), q in shares.items() if of == lang) == pytest.approx(p)
    got = Counter(e.task for e in drawn)
    for task in TASKS:
        p = sum(q for (_, of), q in shares.items() if of == task)
        assert abs(got[task] - n * p) < 5 * (n * p * (1 - p)) ** 0.5 + 1, task
        full = [lang for lang in emoji.langs if mixture.has(task, lang)]
        assert task == "caption" or p == pytest.approx(want.get(task, 0) * len(full) / 85)
    assert {lang for lang in emoji.langs if not mixture.has("choice", lang)} == {lang for lang in emoji.langs if "or3" not in emoji.phrases[lang]}


def test_tasks_say_what_the_paper_says(emoji):
    rng, cat = random.Random(0), "1f408"
    pool = list(emoji.names["sw"])
    for task, templates in (("caption", CAPTION), ("naming", NAMING)):
        seen = {TASKS[task](emoji, cat, "sw", rng, pool) for _ in range(200)}
        assert seen == {(t.format(L="Swahili"), "paka") for t in templates}
    answers = Counter()
    for _ in range(600):
        prompt, target = TASKS["match"](emoji, cat, "sw", rng, pool)
        assert any(target in (yes, no) for _, yes, no in MATCH)
        answers[target.startswith("Yes")] += 1
        assert target.startswith("Yes") == any(prompt == t.format(c="paka") for t, _, _ in MATCH)
    assert abs(answers[True] - 300) < 75
    prompt, target = TASKS["choice"](emoji, cat, "sw", rng, pool)
    assert "paka" in prompt and target == "paka" and "Swahili" in prompt
    prompt, target = TASKS["keywords"](emoji, cat, "en", rng, pool)
    assert prompt == "List keywords for the image in English." and "cat" in target.split(", ")


def template_of(prompt, templates, **parts):
    """The one template that makes this prompt; fails when there is none."""
    (found,) = {t for t in templates if t.format(**parts) == prompt}
    return found


def test_the_new_tasks_ask_in_the_papers_words_and_answer_in_peoples(emoji):
    cat, lang, names, phrases = "1f408", "sw", emoji.names["sw"], emoji.phrases["sw"]
    mixture = stream(emoji, lang)
    pool, rng = mixture.usable[lang], random.Random(1)
    seen = {task: [TASKS[task](emoji, cat, lang, rng, pool) for _ in range(400)] for task in ("exists", "yes_no", "category", "question", "choice")}
    by_prompt = {t.format(n=name): (name, yes, no) for t, yes, no in EXISTS for name in set(names.values())}
    told = Counter()
    for prompt, target in seen["exists"]:
        name, yes, no = by_prompt[prompt]
        assert target == (yes if name == "paka" else no)
        told["right" if name == "paka" else "next" if name == names[pool[pool.index(cat) + 1]] else "other"] += 1
    assert abs(told["right"] - 200) < 50 and abs(told["next"] - 100) < 45 and abs(told["other"] - 100) < 45
    for prompt, target in seen["yes_no"]:
        assert target == phrases["yes" if "paka?" in prompt and any(prompt == t.format(q="paka?", L="Swahili") for t in VQA) else "no"]
    assert {target for _, target in seen["yes_no"]} == {"Ndiyo", "Hapana"}
    labels = {phrases["labels"][key] for key in LABELS.values()}
    for prompt, target in seen["category"]:
        assert target == phrases["labels"]["animals_nature"] and sum(label in prompt for label in labels) == 3
    pattern = [part for part in phrases["or3"].replace("{0}", "|").replace("{1}", "|").replace("{2}", "|").split("|") if part.strip()]
    for prompt, target in filter(None, seen["question"]):  # None when two of three names were the same
        template_of(prompt, QUESTION, L="Swahili", a="paka")
        assert target.endswith("?") and "paka" in target and all(part in target for part in pattern)


# ---- slips of the original data code ---------------------------------------------------------------------------------


def test_the_language_named_is_the_language_of_the_target(emoji):
    """There, question generation named English in half of its prompts and wanted another language; here never."""
    mixture = stream(emoji, "all", "question,choice,category,yes_no,naming,caption,keywords")
    own = {lang: {*emoji.names[lang].values(), *emoji.phrases.get(lang, {}).get("labels", {}).values(),
                  *(emoji.phrases.get(lang, {}).get(k) for k in ("yes", "no"))} for lang in emoji.langs}  # fmt: skip
    for i in range(4000):
        e = mixture.example(i)
        assert LANGUAGES[e.lang].name in e.prompt
        if e.task == "question":
            assert sum(name in e.target for name in emoji.names[e.lang].values()) >= 3
        elif e.task == "keywords":
            concept = emoji.cells[e.picture][0]
            assert e.target == ", ".join(emoji.keywords[e.lang][concept][:4])
        else:
            assert e.target in own[e.lang]


def test_the_answer_in_a_question_prompt_belongs_to_the_picture(emoji):
    """There it came from the same position of another shuffled list: another picture's answer in almost every prompt."""
    mixture = stream(emoji, "sw,de,ja", "question")
    for i in range(500):
        e = mixture.example(i)
        name = emoji.names[e.lang][emoji.cells[e.picture][0]]
        template_of(e.prompt, QUESTION, L=LANGUAGES[e.lang].name, a=name)
        assert name in e.target
    prompt, target = prompts.question(random.Random(0), "Swahili", "Ni nini hiki?", "cat")  # full size: an answer left in English
    assert "Swahili" in prompt and "English" not in prompt and "cat" in prompt and target == "Ni nini hiki?"


def test_reasoning_never_says_x_because_x():
    rng = random.Random(0)
    seen = {prompts.reasoning(rng, "What is it?", "a cat", "It has whiskers.") for _ in range(400)}
    targets = {target for _, target in seen}
    assert targets == {"It has whiskers. So the answer is a cat", "It has whiskers so a cat", "It has whiskers. This means the answer is a cat",
                       "The answer is a cat because It has whiskers.", "a cat because It has whiskers."}  # fmt: skip
    assert len({prompt for prompt, _ in seen}) == 5
    asked = {prompts.explanation(rng, "What {0} is it?", "a cat", "It has whiskers.") for _ in range(200)}
    assert len(asked) == 5 and all("What {0} is it?" in p and "a cat" in p and t == "It has whiskers." for p, t in asked)


def test_chinese_is_simplified_as_in_the_benchmarks(emoji):
    text = "".join(emoji.names["zh"].values())
    assert set("车马鸟鱼飞") <= set(text) and not set("車馬鳥魚飛") & set(text)


def test_training_and_evaluation_name_a_language_alike(emoji):
    mixture = stream(emoji, "fa,iw,bn,uk,pt", "caption")
    asked = {(e.lang, e.prompt) for e in map(mixture.example, range(600))}
    for lang in ("fa", "iw", "bn", "uk", "pt"):  # the five that the original names in two ways
        assert (lang, prompts.EVAL_PROMPT.format(L=LANGUAGES[lang].name)) in asked


@pytest.mark.parametrize("redraw", [0.0, 0.5])
def test_pictures_are_mirrored_for_captions_only(emoji, tokenizer, redraw):
    b = batches(emoji, tokenizer, redraw=redraw)
    picture = next(p for p, (concept, _) in enumerate(emoji.cells) if concept == "1f50d")  # looks to the left
    views = {task: [b.augmented(picture, random.Random(i), task) for i in range(12)] for task in ("caption", "match", "choice", "yes_no")}
    mirrored = [not torch.equal(x, y) for x, y in zip(views["caption"], views["match"])]
    assert 2 < sum(mirrored) < 10
    assert all(torch.equal(x, y) for task in ("choice", "yes_no") for x, y in zip(views["match"], views[task]))


def test_a_task_that_nobody_wrote_texts_for_names_the_way_out():
    for task in NOT_EMBEDDED:
        with pytest.raises(ValueError, match="--mixture"):
            parse_tasks(f"caption,{task}")
    assert set(NEEDS) <= set(TASKS)


def test_every_language_is_named_in_its_prompts(emoji):
    for lang in emoji.langs:
        prompt, _ = TASKS["caption"](emoji, next(iter(emoji.names[lang])), lang, random.Random(1), [])
        assert LANGUAGES[lang].name in prompt


@pytest.mark.parametrize("spec", ["", "dance", "caption,caption", "caption:x", "caption:0", "caption:-1", "caption:nan", "caption:inf"])
def test_bad_task_lists_are_refused_by_name(spec):
    with pytest.raises(ValueError, match="--tasks"):
        parse_tasks(spec)


def batches(emoji, tokenizer, views=0, batch=8, pool=4, redraw=0.0):
    return Batches(stream(emoji, tasks="caption,match"), tokenizer, ImageConfig(size=64), batch, views, pool, redraw=redraw)


def test_batches_hold_the_examples_of_their_pool_sorted_by_length(emoji, tokenizer):
    b = batches(emoji, tokenizer)
    got = [b[m] for m in range(8)]
    for number in range(2):
        want = Counter(b.mixture.example(number * 32 + i).picture for i in range(32))
        assert Counter(p for m in got[number * 4 : number * 4 + 4] for p in m["picture"].tolist()) == want
    for m in got:
        B = len(m["picture"])
        assert B == 8 and m["image"].shape == (B, 1, 3, 64, 64) and m["image"].dtype == torch.float32
        assert (m["labels"] == 1).sum(1).tolist() == [1] * B and (m["prompt"] == 1).sum(1).tolist() == [1] * B
        assert (m["labels"] != 0).all() and m["labels"][:, 0].min() > 1
    share = lambda found: [sum((m[key] == pad).sum().item() for m in found) / sum(m[key].numel() for m in found) for key, pad in (("prompt", 0), ("labels", -100))]
    loose = batches(emoji, tokenizer, pool=1)
    sorted_, drawn = share(got), share([loose[m] for m in range(8)])
    assert sum(sorted_) < 0.8 * sum(drawn) and sorted_[1] < 0.3 < drawn[1], (sorted_, drawn)


def test_redrawn_views_are_of_the_picture_at_the_models_size(emoji, tokenizer):
    """Strength 0 is the crop; the weaker, the nearer to the picture as it is; another size is the same picture, larger."""
    plain = image_to_tensor(Image.fromarray(emoji.pictures[5]), ImageConfig(size=64))
    apart = {r: (batches(emoji, tokenizer, redraw=r).augmented(5, random.Random(3), "match") - plain).abs().mean() for r in (1e-6, 0.3, 1.0)}
    assert apart[1e-6] < 0.02 < apart[0.3] < apart[1.0]
    sizes = [Batches(stream(emoji), tokenizer, ImageConfig(size=size), 8, redraw=0.5).augmented(5, random.Random(3)) for size in (64, 128)]
    assert sizes[1].shape == (3, 128, 128)
    assert (torch.nn.functional.avg_pool2d(sizes[1], 2) - sizes[0]).abs().mean() < 0.1


@pytest.mark.parametrize("redraw", [0.0, 0.5])
def test_loader_workers_cannot_change_the_data(emoji, tokenizer, redraw):
    b = batches(emoji, tokenizer, redraw=redraw)
    plain = [b[m] for m in range(3, 9)]
    for workers in (1, 2):
        loader = torch.utils.data.DataLoader(b, batch_size=None, sampler=range(3, 9), num_workers=workers)
        for mine, theirs in zip(plain, loader, strict=True):
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_share_of_the_pictures_is_part_of_a_larger_one(emoji):
    mix, tasks = parse_lang_mix("all", emoji.langs), parse_tasks("caption,keywords,choice")
    shares = {share: Mixture(emoji, mix, tasks, 0, share=share) for share in (0.01, 0.1, 1.0)}
    cells = {share: set(mixture.cells) for share, mixture in shares.items()}
    assert cells[0.01] < cells[0.1] < cells[1.0] == set(emoji.cells_in("train"))
    assert 0.07 < len(cells[0.1]) / len(cells[1.0]) < 0.13 and len(cells[0.01]) > 10
    assert {shares[0.01].example(i).picture for i in range(300)} <= cells[0.01]
    with pytest.raises(ValueError, match="--data_share"):
        Mixture(emoji, mix, tasks, 0, share=1e-4)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_one_stream(emoji, tokenizer, world):
    def made(rank, world, count):
        b = Batches(stream(emoji, tasks="caption,choice"), tokenizer, ImageConfig(size=64), 4, 3, 4, rank=rank, world=world)
        return [b[m] for m in range(count)]

    alone, parts = made(0, 1, 4 * world), [made(rank, world, 4) for rank in range(world)]
    for m, batch in enumerate(alone):
        mine = parts[m % world][m // world]
        assert mine.keys() == batch.keys() and all(torch.equal(mine[k], batch[k]) for k in mine)
    with pytest.raises(AssertionError):
        made(2, 2, 1)


def test_with_cached_features_the_batch_names_a_view_instead(emoji, tokenizer):
    b = batches(emoji, tokenizer, views=3)
    views = torch.cat([b[m]["view"] for m in range(8)])
    assert "image" not in b[0] and set(views.tolist()) == {0, 1, 2}
    assert torch.equal(b[0]["prompt"], batches(emoji, tokenizer)[0]["prompt"])


def test_more_processes_than_pictures_are_refused(emoji, tokenizer):
    mixture = stream(emoji, tasks="caption")
    Batches(mixture, tokenizer, ImageConfig(size=64), 4, world=len(mixture))
    with pytest.raises(ValueError, match=f"{len(mixture) + 1} processes for {len(mixture)} pictures: start fewer"):
        Batches(mixture, tokenizer, ImageConfig(size=64), 4, world=len(mixture) + 1)
