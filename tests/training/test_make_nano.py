"""weights/make_nano.py: its text examples, and that it goes on where it was stopped."""

import importlib.util
import json
import random
import signal
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanomblip.data.emoji import HELD_OUT_LANGS, load_emoji, picture_split, unit_hash
from nanomblip.data.emoji import ROOT as DATA
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.model.mblip import PRESETS
from nanomblip.model.mt5 import MT5, MT5Attention
from nanomblip.model.qformer import QFormer, QFormerAttention
from nanomblip.model.vit import ViT, ViTAttention
from nanomblip.weights.files import digest
from nanomblip.weights.load import load_mblip, load_mt5

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("make_nano", ROOT / "weights" / "make_nano.py")
make_nano = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_nano)


@pytest.fixture(scope="module")
def emoji():
    return load_emoji("core")


@pytest.fixture(scope="module")
def texts(emoji):
    return make_nano.Texts(emoji, Tokenizer(DATA / "spiece.model"), 8064, seed=0)


def same(a, b):
    equal = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y  # the last of each is a seed
    return all(equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def test_a_pool_is_a_function_of_its_number_and_of_what_is_known(emoji, texts):
    again = make_nano.Texts(emoji, texts.tokenizer, 8064, seed=0)
    first = texts.pool(3, 8)
    assert same(first, again.pool(3, 8)) and not same(first, again.pool(4, 8))
    assert not same(first, make_nano.Texts(emoji, texts.tokenizer, 8064, seed=1).pool(3, 8))
    again.loss[1000:] = 0.0
    assert not same(first, again.pool(3, 8))


def test_what_is_known_is_drawn_a_tenth_as_often(emoji):
    texts = make_nano.Texts(emoji, Tokenizer(DATA / "spiece.model"), 8064, seed=0)
    half = len(texts.pairs) // 2
    for _ in range(9):  # the running loss halves each time
        texts.note(torch.arange(half), torch.zeros(half))
    texts.note(torch.tensor([-1]), torch.tensor([5.0]))  # no pair: nothing changes
    assert texts.loss[:half].max() < 0.002 and bool((texts.loss[half:] == 1).all())
    drawn = torch.cat([pair for _, _, pair, *_ in texts.pool(0, 64)])
    drawn = drawn[(drawn >= 0) & ~texts.english[drawn]]
    share = (drawn < half).float().mean().item()
    assert abs(share - 1 / 11) < 4 * (1 / 11 / len(drawn)) ** 0.5


def test_english_names_are_drawn_eight_times_as_often(emoji, texts):
    drawn = torch.cat([pair for _, _, pair, *_ in texts.pool(0, 64)])
    drawn = drawn[drawn >= 0]
    share = 8 * 519 / (8 * 519 + len(texts.pairs) - 519)
    assert abs(texts.english[drawn].float().mean() - share) < 4 * (share / len(drawn)) ** 0.5


def test_translations_name_the_language_of_their_target(emoji, texts):
    checked, rng = Counter(), random.Random(0)
    for _ in range(3000):
        pair = rng.randrange(len(texts.pairs))
        prompt, target, found, first = texts.example(rng, pair)
        assert 0 <= first < len(prompt)
        if found >= 0:
            lang, concept = texts.pairs[found]
            assert texts.tokenizer.decode(target) == emoji.names[lang][concept]
            assert make_nano.LANGUAGES[lang].name in texts.tokenizer.decode(prompt)
            checked[lang] += 1
    assert len(checked) == 85 and checked.total() > 2200


@pytest.fixture(scope="module")
def instructions(emoji, texts):
    return make_nano.Instructions(emoji, texts.tokenizer, make_nano.parse_tasks(make_nano.Config.tasks))


def test_instructions_are_the_mixtures_own_and_never_about_what_is_held_out(emoji, instructions, monkeypatch):
    held = {c for c in emoji.concepts if unit_hash("instruct", c) < 0.1}
    assert 30 < len(held) < 75
    made = []

    def record(task, function):
        def recorded(emoji, concept, lang, rng, pool):
            pair = function(emoji, concept, lang, rng, pool)
            made.append((task, concept, lang, set(pool), pair))
            return pair

        return recorded

    monkeypatch.setattr(make_nano, "TASKS", {task: record(task, function) for task, function in make_nano.TASKS.items()})
    rng, tasks, described = random.Random(0), Counter(), Counter()
    for _ in range(1500):
        ids, target, pair, blurred = instructions.example(rng)
        task, concept, lang, pool, (prompt, answer) = made[-1]
        assert concept in pool and not pool & held and lang not in HELD_OUT_LANGS and pair == -1
        decode = instructions.tokenizer.decode
        prompt = decode(instructions.tokenizer.encode(prompt))  # as the tokenizer normalises it
        text = decode(ids)
        assert text.endswith(prompt) and decode(target) == decode(instructions.tokenizer.encode(answer))
        before = text.removesuffix(prompt).strip()
        places = make_nano.name_places(instructions.tokenizer, [emoji.names["en"][concept]], 8)[0].tolist()
        assert blurred in (0, 8) and (not blurred or ids[:8] == places)
        kind = "blurred" if blurred else "stretched" if ids[:8] == places else "text"
        described[kind] += 1
        tasks[task] += 1
        if kind == "text":
            known = {emoji.names[lang].get(concept) for lang in emoji.langs if lang not in HELD_OUT_LANGS}
            names = {decode(instructions.tokenizer.encode(name)) for name in known if name}
            words = set(emoji.keywords["en"].get(concept, ()))
            assert any(before.startswith(name) for name in names) or set(before.rstrip(".").split(", ")) <= words, before
    assert tasks.keys() == set(instructions.tasks) and min(tasks["match"], tasks["exists"], tasks["yes_no"]) > 200
    weights = Counter()
    for template, weight in make_nano.DESCRIBE.items():
        weights[template.strip("{}") if template in ("{stretched}", "{blurred}") else "text"] += weight
    assert all(abs(described[kind] / 1500 - weight / weights.total()) < 0.06 for kind, weight in weights.items())


def test_questions_to_test_with_are_of_their_group_and_an_ideal_model_is_right(emoji, instructions, monkeypatch):
    held = {c for c in emoji.concepts if unit_hash("instruct", c) < 0.1}
    asked = []
    ask = instructions.ask
    monkeypatch.setattr(instructions, "ask", lambda rng, task, lang, held_out: asked.append((lang, held_out)) or ask(rng, task, lang, held_out))
    for group in make_nano.GROUPS:
        del asked[:]
        items = instructions.questions("choice", group, 40)
        langs = {lang for lang, _ in asked}
        assert len(items) == 40 and {held_out for _, held_out in asked} == {group == "held_out_things"}
        assert langs == {"english": {"en"}, "held_out_languages": set(HELD_OUT_LANGS)}.get(group, langs - {"en", *HELD_OUT_LANGS})
        names = {emoji.names[lang].get(c) for lang in langs for c in held}
        assert all(answer in names for _, answer in items) == (group == "held_out_things")
        assert items == instructions.questions("choice", group, 40)
    monkeypatch.setattr(instructions, "ask", ask)
    right = {tuple(ids): answer for task in make_nano.SCORED for group in make_nano.GROUPS for ids, answer in instructions.questions(task, group, 20)}
    answers = lambda change: lambda model, tokenizer, prompts: [change(right[tuple(ids)]) for ids in prompts]
    for change, share in ((str.upper, 1.0), (lambda text: text + "x", 0.0)):  # case does not count
        monkeypatch.setattr(make_nano, "translate", answers(change))
        found = make_nano.score_tasks(None, instructions, 20)
        assert found.keys() == set(make_nano.SCORED) and all(of_task == dict.fromkeys(make_nano.GROUPS, share) for of_task in found.values())


def test_instructions_have_their_share_and_parts_are_of_one_length(emoji, texts, instructions):
    make = lambda share, blur=3.0, read=0.0: make_nano.Texts(emoji, texts.tokenizer, 8064, 0, instructions, share, blur, read)
    parts = make(0.5).pool(0, 16, parts=4)
    assert len(parts) == 4 * make_nano.POOL and all(prompt.shape[0] == 4 for prompt, *_ in parts)
    drawn = torch.cat([pair for _, _, pair, *_ in parts])
    names = 18 / 20  # of the other half; some of the keywords have none either
    assert abs((drawn >= 0).float().mean() - 0.5 * names) < 0.06
    padding = sum((prompt == 0).sum() for prompt, *_ in parts) / sum(prompt.numel() for prompt, *_ in parts)
    assert padding < 0.15
    drawn = torch.cat([pair for _, _, pair, *_ in make(0.3, read=0.4).pool(0, 16)])
    reads = (drawn >= len(texts.pairs)).float().mean()
    assert abs(reads - 0.4) < 0.06 and abs((drawn >= 0).float().mean() - reads - 0.3 * names) < 0.06
    assert any((noise > 0).any() for _, _, _, noise, _, _ in parts)
    assert all((noise == 0).all() and (scale == 1).all() for _, _, _, noise, scale, _ in make(0.5, 0.0).pool(0, 16))


def test_facts_are_cldrs(emoji, texts):
    rng, kinds, langs = random.Random(0), Counter(), set()
    for _ in range(600):
        lang, concept = texts.pairs[rng.randrange(len(texts.pairs))]
        fact = texts.fact(rng, lang, concept)
        labels = emoji.phrases[lang].get("labels", {})
        if fact is None:
            assert len(labels) == 0 or "yes" not in emoji.phrases[lang]
            continue
        prompt, target = fact
        langs.add(lang)
        if prompt.startswith("Category in "):
            assert target == labels[make_nano.LABELS[emoji.category[concept]]] and prompt.endswith(emoji.names["en"][concept])
            kinds["category"] += 1
        else:
            english = emoji.phrases["en"]
            pairs = [(english["yes"], emoji.phrases[lang].get("yes")), (english["no"], emoji.phrases[lang].get("no"))]
            pairs += [(english["labels"][key], labels.get(key)) for key in make_nano.LABELS.values()]
            assert (prompt.removesuffix(f" in {make_nano.LANGUAGES[lang].name}:"), target) in pairs
            kinds[target in (pairs[0][1], pairs[1][1])] += 1
    assert kinds["category"] > 250 and kinds[True] > 30 and kinds[False] > 80 and len(langs) > 75


def test_names_are_read_into_english_and_those_known_well_seldom(emoji):
    texts = make_nano.Texts(emoji, Tokenizer(DATA / "spiece.model"), 8064, seed=0, read=1.0)
    N, decode, rng = len(texts.pairs), texts.tokenizer.decode, random.Random(0)
    german = [i for i, (lang, _) in enumerate(texts.pairs) if lang == "de"]
    for _ in range(9):
        texts.note(N + torch.tensor(german), torch.zeros(len(german)))
    assert bool((texts.loss[:N] == 1).all())  # writing them is another matter
    for i in german[:50]:
        prompt, target, pair, blurred = texts.example(rng, N + i)
        concept = texts.pairs[i][1]
        assert (decode(target), pair, blurred) == (emoji.names["en"][concept], N + i, 0)
        name = decode(texts.tokenizer.encode(emoji.names["de"][concept]))
        assert name in decode(prompt) and "English" in decode(prompt)
    drawn = torch.cat([pair for _, _, pair, *_ in texts.pool(0, 64)]) - N
    assert drawn.min() >= 0 and not texts.english[drawn].any()
    share = torch.isin(drawn, torch.tensor(german)).float().mean()
    expected = 0.1 * len(german) / (N - texts.english.sum() - 0.9 * len(german))
    assert abs(share - expected) < 4 * (expected / len(drawn)) ** 0.5


def test_read_match_asks_for_english_names(emoji, monkeypatch):
    asked = []
    monkeypatch.setattr(make_nano, "translate", lambda model, tokenizer, prompts: asked.extend(prompts) or ["qq"] * len(prompts))
    few = replace(emoji, names={lang: {c: "qq" if c == emoji.concepts[0] else name for c, name in emoji.names[lang].items()} for lang in ("en", "de", "sw")})
    assert make_nano.read_match(None, None, few, 519) == 1 / 519
    assert len(asked) == 2 * 519 and all(prompt.endswith(". Caption the image in English.") for prompt in asked)


def test_mixed_names_keep_the_largest_share_and_leave_the_rest_alone():
    Q, D = PRESETS["nano"].queries, 6000
    embedded, blurred = torch.randn(40, Q + 3, D, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3 > 0
    mix = lambda seed: make_nano.mix_names(embedded, blurred, torch.Generator().manual_seed(seed))
    mixed = mix(1)
    assert torch.equal(mixed[~blurred], embedded[~blurred]) and torch.equal(mixed[:, Q:], embedded[:, Q:])
    assert torch.equal(mixed, mix(1)) and not torch.equal(mixed, mix(2))
    names, found = embedded[blurred, :Q].flatten(1), mixed[blurred, :Q].flatten(1)
    shares = found @ names.T / (Q * D)  # the names are all but orthogonal, so a share is a product
    assert torch.equal(shares.argmax(1), torch.arange(len(names)))
    own = shares.diagonal()
    assert own.min() > 1 - make_nano.MIX - 0.02 and own.min() < 0.62 and own.max() > 0.9 and abs(shares.sum(1) - 1).max() < 0.1
    nothing = torch.zeros(40, dtype=torch.bool)  # such a batch may have fewer than Q places
    assert torch.equal(make_nano.mix_names(embedded[:, :3], nothing, torch.Generator().manual_seed(0)), embedded[:, :3])


def test_blurred_names_stand_where_a_pictures_vectors_will_and_are_as_long(emoji, texts):
    blurred = clean = 0
    for prompt, labels, pair, noise, scale, _ in texts.pool(0, 16):
        assert noise.shape == scale.shape == (*prompt.shape, 1) and noise.min() >= 0 and noise.max() < texts.blur
        for ids, deviation, length, known in zip(prompt, noise[:, :, 0], scale[:, :, 0], pair):
            places = (deviation > 0).sum()
            assert places in (0, 8) and (deviation[places:] == 0).all() and (length[places:] == 1).all()
            assert len(set(deviation[:places].tolist())) <= 1 and (ids[:places] > 2).all() and (known >= 0 or places == 0)
            if places:
                size = length[0] * (1 + deviation[0].square()).sqrt()  # of what was N(0, 1), piece and noise
                assert 0.39 < size < 1.21
            blurred, clean = blurred + bool(places), clean + bool(known >= 0 and not places)
    share = sum(n for template, n in make_nano.TRANSLATE.items() if "blurred" in template) / sum(make_nano.TRANSLATE.values())
    assert abs(blurred / (blurred + clean) - share) < 0.08


def test_hidden_spans_put_back_give_the_text(texts):
    is_part = lambda part, ids: any(ids[i : i + len(part)] == part for i in range(len(ids) - len(part) + 1))
    pieces, hidden = [texts.tokenizer.encode(text, 10_000)[:-1] for text in texts.paragraphs], 0
    for i in range(30):
        prompt, target = texts.spans(random.Random(i))
        assert prompt[-1] == target[-1] == 1
        fill, current = {}, None
        for piece in target[:-1]:
            if piece >= 8000:
                current = piece
                fill[current] = []
            else:
                fill[current].append(piece)
        whole = [p for piece in prompt[:-1] for p in (fill[piece] if piece >= 8000 else [piece])]
        hidden += sum(p >= 8000 for p in prompt)
        assert 0 < len(whole) <= 24 and any(is_part(whole, ids) for ids in pieces)
    assert hidden > 15


def test_scores_are_capped_by_scaling_q_and_k_and_left_alone_where_small():
    nano = PRESETS["nano"]
    small = dict(width=64, heads=4, layers=1, mlp=64)
    models = [MT5(replace(nano.mt5, **small, head_width=16, decoder_layers=1)), ViT(replace(nano.vit, **small)),
              QFormer(replace(nano.qformer, **small, vision_width=64))]  # fmt: skip
    seen = []
    for model in models:
        model.init_weights() if isinstance(model, MT5) else [nn.init.normal_(p, std=0.05) for p in model.parameters() if p.ndim == 2]
        fresh = {name: p.clone() for name, p in model.named_parameters()}
        make_nano.cap_scores(model)
        assert all(torch.equal(p, fresh[name]) for name, p in model.named_parameters())
        for name, p in model.named_parameters():
            if name.endswith(("q.weight", "k.weight", "qkv.weight")):
                p.data *= 50
        make_nano.cap_scores(model)
        once = {name: p.clone() for name, p in model.named_parameters()}
        for module in model.modules():
            if isinstance(module, (MT5Attention, QFormerAttention)):
                q, k = module.q, module.k
            elif isinstance(module, ViTAttention):
                q, k = [nn.Linear(64, 64, bias=False) for _ in range(2)]
                q.weight.data, k.weight.data, _ = module.qkv.weight.data.chunk(3)
            else:
                continue
            x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
            heads = lambda linear: F.linear(x, linear.weight).view(512, 4, 16).transpose(0, 1)  # (H, 512, K)
            scores = heads(q) @ heads(k).mT * (1 if isinstance(module, MT5Attention) else 16**-0.5)
            seen.append(scores.std().item())
        make_nano.cap_scores(model)
        assert all(torch.allclose(p, once[name]) for name, p in model.named_parameters())
    assert len(seen) == 3 + 1 + 2 and all(abs(s - make_nano.SCORES) < 0.6 for s in seen), seen


def test_stopped_and_resumed_ends_with_the_same_model(monkeypatch, tmp_path):
    small = replace(PRESETS["nano"].mt5, width=16, heads=2, head_width=8, mlp=16, layers=1, decoder_layers=1)
    monkeypatch.setitem(PRESETS, "nano", replace(PRESETS["nano"], mt5=small))
    monkeypatch.setattr(make_nano, "exact_match", lambda model, tokenizer, emoji, limit: {"sw": 0.5})
    monkeypatch.setattr(make_nano, "POOL", 3)  # a stop waits for the end of a pool
    monkeypatch.setattr(make_nano, "read_match", lambda model, tokenizer, emoji, limit: 0.25)
    monkeypatch.setattr(make_nano, "score_tasks", lambda model, instructions, limit: {"match": {"english": 0.9}})
    flags = "mt0 --steps 8 --batch 8 --warmup 2 --eval_every 4 --bf16 off --instruct 0.5 --read 0.2".split()
    run = lambda name: make_nano.main([*flags, "--work", str(tmp_path / "work" / name), "--out", str(tmp_path / name)])
    assert run("whole") == 0

    class Bar(make_nano.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n == 5:
                signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(make_nano, "tqdm", Bar)
        assert run("cut") == 143
    assert json.loads((tmp_path / "cut" / "mt0" / "record.json").read_text())["steps_done"] == 6
    assert json.loads((tmp_path / "cut" / "mt0" / "record.json").read_text())["tasks"] == {"match": {"english": 0.9}}
    assert run("cut") == 0
    models = [load_mt5(tmp_path / name / "mt0") for name in ("whole", "cut")]
    assert digest(dict(models[0].named_parameters())) == digest(dict(models[1].named_parameters()))
    losses = [(tmp_path / "work" / name / "mt0" / "loss.csv").read_text() for name in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_answers_are_greedy(emoji):
    torch.manual_seed(0)
    model = make_nano.MT5(PRESETS["nano"].mt5)
    model.init_weights()
    tokenizer = Tokenizer(DATA / "spiece.model")
    prompts = ["cat. Caption the image in Swahili.", "x in Thai:"]
    together = make_nano.translate(model, tokenizer, prompts)
    assert [make_nano.translate(model, tokenizer, [p])[0] for p in prompts] == together


def test_pictures_are_english_and_of_the_training_split(emoji, texts):
    stream = make_nano.Pictures(emoji, texts.tokenizer, make_nano.ImageConfig(size=64), seed=0)
    prompts, batches = Counter(), list(islice(stream.pool(0, 16), 3))
    for image, prompt, labels, target in batches:
        assert image.shape == (16, 1, 3, 64, 64) and bool((target.sum(1) == 1).all())
        concept = target.argmax(1)
        for p, t, c in zip(prompt.tolist(), labels.tolist(), concept.tolist()):
            asked, target = (texts.tokenizer.decode([i for i in ids if i > 1]) for ids in (p, t))
            assert "English" in asked
            prompts[asked] += 1
            assert target == emoji.names["en"][emoji.concepts[c]] or asked == "List keywords for the image in English."
    assert len(prompts) > 4
    assert all(picture_split(*emoji.cells[p]) == "train" for p in stream.sources[0])
    assert same(batches, list(islice(stream.pool(0, 16), 3)))


def test_icons_are_further_pictures_of_the_concepts_and_of_other_things(emoji, texts, tmp_path):
    bee = emoji.names["en"][emoji.concepts[7]]
    np.savez_compressed(tmp_path / "icons.npz", pictures=np.full((3, 64, 64, 3), 9, np.uint8), names=np.array([bee, "zip file", "abacus arrow"]))
    size = make_nano.ImageConfig(size=64)
    stream = make_nano.Pictures(emoji, texts.tokenizer, size, seed=0, icons=str(tmp_path / "icons.npz"))
    C = len(emoji.concepts)
    assert stream.names[C:] == ["abacus arrow", "zip file"] and stream.names[:C] == make_nano.Pictures(emoji, texts.tokenizer, size, 0).names
    counts = Counter()
    for image, _, labels, target in islice(stream.pool(0, 64, strength=0.0), 8):
        assert target.shape == (64, C + 2)
        for x, ids, c in zip(image, labels.tolist(), target.argmax(1).tolist()):
            if x.std() < 1 and x.mean() < 0:  # dark all over: an icon
                counts[c] += 1
                assert texts.tokenizer.decode([i for i in ids if i > 1]) == stream.names[c]
    assert set(counts) == {7, C, C + 1}
    assert 0.22 < counts[7] / 512 < 0.38 and 0.12 < (counts[C] + counts[C + 1]) / 512 < 0.28  # SHARES


@pytest.mark.parametrize("content", [None, b"junk", b"PK\x03\x04junk"])
def test_icons_that_are_none_are_refused(content, emoji, texts, tmp_path):
    if content is not None:
        (tmp_path / "icons.npz").write_bytes(content)
    with pytest.raises(ValueError, match="damaged.*build_icons.py$"):
        make_nano.Pictures(emoji, texts.tokenizer, make_nano.ImageConfig(size=64), seed=0, icons=str(tmp_path / "icons.npz"))


def test_blended_pictures_have_the_shares_of_their_parts(emoji, texts):
    stream = make_nano.Pictures(emoji, texts.tokenizer, make_nano.ImageConfig(size=64), seed=0)
    plain, blended = (next(iter(stream.pool(0, 64, strength=0.0, blend=blend))) for blend in (False, True))
    share = (plain[3] * blended[3]).sum(1)  # of the first picture
    alone = share == 1
    assert 0.2 < alone.float().mean() < 0.8 and share.min() < 0.4
    by_hand = torch.lerp(plain[0], plain[0].roll(1, 0), 1 - share[:, None, None, None, None])
    other = plain[3].argmax(1) != plain[3].roll(1, 0).argmax(1)
    assert torch.allclose(by_hand[other], blended[0][other], atol=1e-5)
    assert torch.allclose(blended[3].sum(1), torch.ones(64))


def test_redrawing_grows_with_the_vit_and_is_half_of_it_for_the_qformer(emoji, texts, monkeypatch):
    stage = make_nano.MakeBLIP2(emoji, texts.tokenizer, make_nano.Config(contrast=0.5, redraw=0.9))
    monkeypatch.setattr(stage.pictures, "pool", lambda number, batch, strength, blend: (strength, blend))
    strengths, blends = zip(*(stage.pool(0, 4, done) for done in (0.0, 0.125, 0.25, 0.4, 0.5, 0.9)))
    assert strengths == pytest.approx((0.3, 0.6, 0.9, 0.9, 0.45, 0.45)) and blends == (True, True, True, True, False, False)


def test_rates_rise_and_fall_in_each_phase():
    cfg = make_nano.Config(steps=100, warmup=10, decay=0.5)
    rates = [make_nano.rate(cfg, step, [0, 60]) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:30] == [1.0] * 21 and rates[59] == pytest.approx(1 / 30)
    assert rates[60] == 0.1 and rates[70] == 1.0 and rates[99] == pytest.approx(1 / 20)
    assert [make_nano.rate(cfg, step, [0]) for step in (9, 50, 75)] == [1.0, 1.0, 0.5]


def test_the_blip2_stage_writes_the_official_layout_and_goes_on(monkeypatch, tmp_path, capsys):
    tiny = replace(
        PRESETS["nano"],
        vit=replace(PRESETS["nano"].vit, width=16, layers=1, heads=2, mlp=16),
        qformer=replace(PRESETS["nano"].qformer, width=16, layers=1, heads=2, mlp=16, vision_width=16),
        mt5=replace(PRESETS["nano"].mt5, width=24, heads=3, head_width=8, mlp=16),
    )
    monkeypatch.setitem(PRESETS, "nano", tiny)
    monkeypatch.setattr(make_nano, "POOL", 2)
    flags = ["--batch", "4", "--warmup", "2", "--bf16", "off", "--eval_every", "2", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert make_nano.main(["blip2", "--steps", "4", *flags]) == 0
    vit = digest(dict(load_mblip(tmp_path / "out" / "blip2").vit.named_parameters()))
    began, begin = [], make_nano.MakeBLIP2.begin
    monkeypatch.setattr(make_nano.MakeBLIP2, "begin", lambda stage, phase: began.append(phase) or begin(stage, phase))
    assert make_nano.main(["blip2", "--steps", "12", "--contrast", "0.5", *flags]) == 0  # phases from steps 0, 6 and 10 on
    assert began == [1, 2]
    assert digest(dict(load_mblip(tmp_path / "out" / "blip2").vit.named_parameters())) != vit
    record = json.loads((tmp_path / "out" / "blip2" / "record.json").read_text())
    assert record["steps_done"] == 12 and record["exact_match_by_language"].keys() == {"en"}
    model = load_mblip(tmp_path / "out" / "blip2")
    assert model.cfg.vit.width == 16 and model.cfg.mt5.layers == 1
    more = ["--init", str(tmp_path / "out" / "blip2"), "--work", str(tmp_path / "more"), "--out", str(tmp_path / "more"), "--lr", "1e-9", "--muon_lr", "1e-9"]
    assert make_nano.main(["blip2", "--steps", "3", "--contrast", "1", *flags, *more]) == 0  # the Q-Former stays, too
    again = load_mblip(tmp_path / "more" / "blip2")
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert make_nano.main(["blip2", "--steps", "4", "--contrast", "0", *flags, *more, "--work", str(tmp_path / "third")]) == 0
    again = load_mblip(tmp_path / "more" / "blip2")  # the ViT is kept, and the Q-Former new
    assert all(torch.equal(a, b) for a, b in zip(model.vit.parameters(), again.vit.parameters(), strict=True))
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(model.qformer.parameters(), again.qformer.parameters(), strict=True) if a.ndim == 2)
    for wrong, message in (("--contrast 1.5", "between 0 and 1"), ("--redraw nan", "between 0 and 1"), ("--decay 0", "above 0"), ("--instruct 2", "between 0 and 1"), ("--instruct 0.7 --read 0.4", "at most 1"), ("--blur -1", "0 or above"), ("--tasks dance", "dance"), ("--contrast 0", "--init")):
        with pytest.raises(ValueError, match=message):
            make_nano.main(["blip2", *wrong.split()])
    with pytest.raises(ValueError, match="mt0, blip2, aligned"):
        make_nano.main(["--steps", "2"])


@pytest.mark.parametrize("pieces", (5, 256, 700))
def test_the_loss_in_parts_is_cross_entropy(pieces):
    generator = torch.Generator().manual_seed(pieces)
    labels = torch.randint(0, 97, (pieces,), generator=generator)
    made = [torch.randn(pieces, 24, generator=generator), torch.randn(97, 24, generator=generator)]
    ours, theirs = ([t.clone().requires_grad_() for t in made] for _ in range(2))
    loss, losses = make_nano.HeadLoss.apply(*ours, labels)
    expected = torch.nn.functional.cross_entropy(theirs[0] @ theirs[1].T, labels, reduction="none")
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(loss, expected.mean())
    (3 * loss).backward()
    (3 * expected.mean()).backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad)
