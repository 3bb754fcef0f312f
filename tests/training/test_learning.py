"""The whole path learns: nano takes a few pictures by heart, in two languages, and says the right name for each.

A wrong mask, a picture that does not arrive, a label off by one or a frozen part that should not be would all fail here.
"""

import pytest
import torch

from nanomblip.training.optimizers import build_optimizers
from nanomblip.data.emoji import ROOT, load_emoji
from nanomblip.data.image import ImageConfig, array_to_tensor
from nanomblip.data.languages import LANGUAGES
from nanomblip.data.prompts import EVAL_PROMPT
from nanomblip.data.tokenizer import Tokenizer, pad_rows
from nanomblip.measure.emoji_splits import answer
from nanomblip.model.mblip import MBLIP, PRESETS


@pytest.mark.slow
def test_nano_learns_six_pictures_by_heart_in_two_languages():
    emoji, tokenizer, image = load_emoji(), Tokenizer(ROOT / "spiece.model"), ImageConfig(size=64)
    pictures = [p for p in emoji.cells_in("train") if emoji.cells[p][1] == "noto"][5::60][:6]
    items = [(p, lang) for p in pictures for lang in ("en", "th")]
    name = lambda p, lang: emoji.names[lang][emoji.cells[p][0]]
    torch.manual_seed(0)
    model = MBLIP(PRESETS["nano"])
    model.init_weights()
    optimizers = build_optimizers(model, dict.fromkeys(model.parameters(), 2e-3), muon=True, beta2=0.98)
    pixels = array_to_tensor(emoji.pictures[[p for p, _ in items]], image)[:, None]
    prompt = tokenizer.batch([EVAL_PROMPT.format(L=LANGUAGES[lang].name) for _, lang in items])
    labels = pad_rows([tokenizer.encode(name(p, lang)) for p, lang in items], -100)
    for step in range(110):
        for optimizer, peak in zip(optimizers, (2e-3, 0.02)):
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1, (step + 1) / 20, (110 - step) / 40)
        _, loss = model(pixels, prompt, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    answers = answer(model, tokenizer, image, emoji, items)
    assert [a == name(p, lang) for a, (p, lang) in zip(answers, items)] == [True] * len(items), answers
    swapped = answer(model, tokenizer, image, emoji, [(items[i - 2][0], lang) for i, (_, lang) in enumerate(items)])
    assert swapped == [answers[i - 2] for i in range(len(items))]  # the picture decides, not the place in the batch
