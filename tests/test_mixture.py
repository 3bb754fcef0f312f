"""The example stream: a pure function of (seed, epoch, index), with exact shares, and nothing held out in it."""

import random
from collections import Counter

import pytest
import torch

from nanomblip.emoji import ROOT, load_emoji, pair_split, picture_split
from nanomblip.image import ImageConfig
from nanomblip.languages import LANGUAGES, parse_lang_mix
from nanomblip.mixture import CAPTION, MATCH, NAMING, TASKS, Batches, Mixture, parse_tasks
from nanomblip.tokenizer import Tokenizer


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


def test_task_shares_are_the_stated_ones(emoji):
    n = 8000
    mixture = stream(emoji, "sw,de", "caption:2,match,naming")
    got = Counter(mixture.example(i).task for i in range(n))
    for task, p in parse_tasks("caption:2,match,naming").items():
        assert abs(got[task] - n * p) < 5 * (n * p * (1 - p)) ** 0.5


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


def test_every_language_is_named_in_its_prompts(emoji):
    for lang in emoji.langs:
        prompt, _ = TASKS["caption"](emoji, next(iter(emoji.names[lang])), lang, random.Random(1), [])
        assert LANGUAGES[lang].name in prompt


@pytest.mark.parametrize("spec", ["", "dance", "caption,caption", "caption:x", "caption:0", "caption:-1", "caption:nan", "caption:inf"])
def test_bad_task_lists_are_refused_by_name(spec):
    with pytest.raises(ValueError, match="--tasks"):
        parse_tasks(spec)


def batches(emoji, tokenizer, views=0, batch=8, pool=4):
    return Batches(stream(emoji, tasks="caption,match"), tokenizer, ImageConfig(size=64), batch, views, pool)


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
    padding = sum((m["labels"] == -100).float().mean().item() for m in got) / len(got)
    assert padding < 0.2  # drawn as they come it is far more: the next lines see to it that this can fail
    loose = batches(emoji, tokenizer, pool=1)
    assert sum((loose[m]["labels"] == -100).float().mean().item() for m in range(8)) / 8 > 0.3


def test_loader_workers_cannot_change_the_data(emoji, tokenizer):
    b = batches(emoji, tokenizer)
    plain = [b[m] for m in range(3, 9)]
    for workers in (1, 2):
        loader = torch.utils.data.DataLoader(b, batch_size=None, sampler=range(3, 9), num_workers=workers)
        for mine, theirs in zip(plain, loader, strict=True):
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_with_cached_features_the_batch_names_a_view_instead(emoji, tokenizer):
    b = batches(emoji, tokenizer, views=3)
    views = torch.cat([b[m]["view"] for m in range(8)])
    assert "image" not in b[0] and set(views.tolist()) == {0, 1, 2}
    assert torch.equal(b[0]["prompt"], batches(emoji, tokenizer)[0]["prompt"])
