"""weights/make_nano.py: its text examples, and that it goes on where it was stopped."""

import importlib.util
import json
import random
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanomblip.emoji import ROOT as DATA
from nanomblip.emoji import load_emoji
from nanomblip.mblip import PRESETS
from nanomblip.tokenizer import Tokenizer
from nanomblip.weights import digest, load_mt5

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("make_nano", ROOT / "weights" / "make_nano.py")
make_nano = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_nano)


@pytest.fixture(scope="module")
def emoji():
    return load_emoji("core")


@pytest.fixture(scope="module")
def texts(emoji):
    return make_nano.Texts(emoji, Tokenizer(DATA / "spiece.model"), 8064, seed=0)


def test_examples_are_a_function_of_their_index(emoji, texts):
    again = make_nano.Texts(emoji, texts.tokenizer, 8064, seed=0)
    assert [texts.example(i) for i in (7, 3, 99)] == [again.example(i) for i in (7, 3, 99)]
    assert texts.example(7) != make_nano.Texts(emoji, texts.tokenizer, 8064, seed=1).example(7)


def test_translations_name_the_language_of_their_target(emoji, texts):
    names = {name: lang for lang, of_lang in emoji.names.items() for name in of_lang.values()}
    languages = {make_nano.LANGUAGES[lang].name: lang for lang in emoji.langs}
    checked = Counter()
    for i in range(3000):
        prompt, target = (texts.tokenizer.decode(ids) for ids in texts.example(i))
        lang = next((code for name, code in languages.items() if prompt.startswith(f"Translate to {name}: ")), None)
        if lang is not None:
            assert target in emoji.names[lang].values(), (prompt, target)
            source = prompt.split(": ", 1)[1]
            assert source in names
            checked[lang] += 1
    assert len(checked) > 70


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


def test_stopped_and_resumed_ends_with_the_same_model(monkeypatch, tmp_path):
    small = replace(PRESETS["nano"].mt5, width=16, heads=2, head_width=8, mlp=16, layers=1, decoder_layers=1)
    monkeypatch.setitem(PRESETS, "nano", replace(PRESETS["nano"], mt5=small))
    monkeypatch.setattr(make_nano, "exact_match", lambda model, tokenizer, emoji, limit: {"sw": 0.5})
    flags = "mt0 --steps 8 --batch 8 --warmup 2 --eval_every 4".split()
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
    assert json.loads((tmp_path / "cut" / "mt0" / "record.json").read_text())["steps_done"] == 5
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
