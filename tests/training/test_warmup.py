"""warmup.py: where a name's pieces go, the loss, and that vectors which have learned it are the names."""

import torch

from nanomblip.data.emoji import ROOT as DATA
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.training.warmup import TAU, name_places, names_loss


def test_pieces_are_stretched_over_the_places():
    tokenizer = Tokenizer(DATA / "spiece.model")
    names = ["cat", "sailboat", "a very long name of many many pieces indeed"]
    for row, name in zip(name_places(tokenizer, names, 6).tolist(), names, strict=True):
        pieces = tokenizer.encode(name)[:-1]
        kept = [piece for i, piece in enumerate(row) if i == 0 or i * len(pieces[:6]) // 6 != (i - 1) * len(pieces[:6]) // 6]
        assert len(row) == 6 and kept == pieces[:6]


def test_the_loss_is_its_equation():
    generator = torch.Generator().manual_seed(0)
    v, table = torch.randn(2, 3, 5, generator=generator), torch.randn(4, 3, 5, generator=generator)
    concept, want = torch.tensor([2, 0]), 0.0
    for row, c in zip(v, concept.tolist()):
        distance = ((row - table) ** 2).sum((1, 2))  # |v - T_c|^2
        blurred = (-distance / (2 * 5 * TAU**2)).log_softmax(0)  # |v|^2 is in all of them alike
        want = want + 2 * distance[c] / 15 - blurred[c]
    torch.testing.assert_close(names_loss(v, concept, table), want / 2)


def test_who_has_learned_it_is_the_name():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7, 3, 16, generator=generator)
    v = torch.zeros(7, 3, 16, requires_grad=True)
    optimizer = torch.optim.Adam([v], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        names_loss(v, torch.arange(7), table).backward()
        optimizer.step()
    assert (v - table).square().mean() < 0.05  # the second term holds names a little further apart than they are
    assert torch.equal(torch.cdist(v.flatten(1), table.flatten(1)).argmin(1), torch.arange(7))
