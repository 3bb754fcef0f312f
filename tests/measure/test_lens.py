"""Which token stands under a vector: held against a plain computation over the whole embedding."""

import pytest
import torch
import torch.nn.functional as F

from nanomblip.data.decode import load_image
from nanomblip.data.emoji import ROOT
from nanomblip.data.folder import find_model, load_folder
from nanomblip.data.image import image_to_tensor
from nanomblip.measure import lens as module
from nanomblip.measure.lens import lens, show_lens


@pytest.fixture(scope="module")
def nano():
    return load_folder(find_model("nano"))


def test_a_row_of_the_embedding_is_its_own_token_at_any_length(nano):
    tokenizer, _, model = nano
    ids = torch.tensor([[5, 300, 4095, 4096], [4097, 7999, 1, 42]])  # at the edges of blocks too
    rows = model.mt5.embed.weight.detach()[ids]
    for factor in (1.0, 1e-3, 1e4):
        found = lens(model, rows * factor, tokenizer)
        assert [[text for text, _ in pairs] for pairs in found] == [[tokenizer.sentencepiece.id_to_piece(i) for i in row] for row in ids.tolist()]
        assert all(0.999999 < cosine <= 1.0 for pairs in found for _, cosine in pairs)
    assert all(cosine < 0.9 for pairs in lens(model, -rows, tokenizer) for _, cosine in pairs)  # the direction counts, not the line


@pytest.mark.parametrize("rows", [1, 7, 8000, 4096])
def test_blocks_give_what_the_whole_embedding_gives(nano, monkeypatch, rows):
    tokenizer, pictures, model = nano
    monkeypatch.setattr(module, "ROWS", rows if rows > 1 else 997)
    visual = model.encode_image(image_to_tensor(load_image(ROOT / "cat.png"), pictures)[None, None])
    visual = torch.cat([visual, torch.randn(1, 8, visual.shape[-1], generator=torch.Generator().manual_seed(0))])  # (2, Q, D)
    want = F.cosine_similarity(visual[:, :, None], model.mt5.embed.weight[None, None, :8000], dim=-1).max(-1)
    found = lens(model, visual, tokenizer)
    assert [[text for text, _ in pairs] for pairs in found] == [[tokenizer.sentencepiece.id_to_piece(i) for i in row] for row in want.indices.tolist()]
    torch.testing.assert_close(torch.tensor([[c for _, c in pairs] for pairs in found]), want.values.detach())


def test_ties_rows_beyond_the_tokenizer_and_zeros(nano):
    tokenizer, pictures, model = nano
    weight = model.mt5.embed.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[6000] = 2 * weight[50]  # the same direction in another block: the first is taken
            weight[8010] = 7.0  # beyond the tokenizer's 8,000
        visual = torch.stack([weight[6000], torch.full_like(weight[0], 3.0), torch.zeros_like(weight[0])])[None].detach()
        (first, beyond, zero), = lens(model, visual, tokenizer)  # fmt: skip
        assert first == (tokenizer.sentencepiece.id_to_piece(50), pytest.approx(1.0))
        assert beyond[1] < 0.9 and zero[1] == 0.0
    finally:
        with torch.no_grad():
            weight.copy_(before)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_in_every_type_that_a_model_is_held_in(nano, dtype):
    tokenizer, pictures, _ = nano
    picture = image_to_tensor(load_image(ROOT / "cat.png"), pictures)[None, None]
    _, _, model = load_folder(find_model("nano"), dtype, dtype)
    with torch.no_grad():
        (pairs,), (exact,) = (lens(m, m.encode_image(picture), tokenizer) for m in (model, nano[2]))
    assert sum(a == b for (a, _), (b, _) in zip(pairs, exact)) >= 6  # of eight: near ties may fall the other way
    assert all(abs(a - b) < 0.05 for (_, a), (_, b) in zip(pairs, exact))


def test_eight_vectors_a_line():
    lines = show_lens([(f"▁t{i}", i / 32) for i in range(20)]).splitlines()
    assert len(lines) == 3 and lines[1].split()[:3] == ["8", "▁t8", "0.25"] and lines[2].split()[-2:] == ["▁t19", "0.59"]
