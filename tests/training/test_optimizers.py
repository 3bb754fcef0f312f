"""Muon against torch's own, and what it must not do."""

import pytest
import torch

from nanomblip.training.optimizers import Muon, orthogonalise


def matrices(seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape) / 8) for shape in ((24, 24), (24, 96), (96, 24), (24, 24), (5, 1))]


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 16, 64), (3, 64, 16)])
def test_singular_values_come_near_one_and_the_directions_stay(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = orthogonalise(x)
    assert y.shape == x.shape
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    values = U.mT @ y @ Vh.mT
    large = S > 0.1 * S.amax(1, keepdim=True)  # a value near 0 has further to go than five rounds
    assert 0.6 < values.diagonal(dim1=1, dim2=2)[large].min() and values.diagonal(dim1=1, dim2=2).max() < 1.3
    assert (values - torch.diag_embed(values.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


def test_steps_equal_torchs_in_bf16_and_agree_with_it_in_fp32():
    sides = {}
    for name in ("torch", "bf16", "fp32"):
        params = matrices()
        if name == "torch":
            optimizer = torch.optim.Muon(params, lr=0.02, momentum=0.95, weight_decay=0.3)
        else:
            optimizer = Muon(params, lr=0.02, weight_decay=0.3, dtype=torch.bfloat16 if name == "bf16" else torch.float32)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        sides[name] = params
    for start, theirs, ours, exact in zip(matrices(), *sides.values()):
        moved = (theirs - start).norm()
        assert (ours - theirs).norm() < 0.01 * moved  # batched products round otherwise
        assert (exact - theirs).norm() < 0.02 * moved  # what bf16 rounds away


def test_the_type_follows_the_processor(monkeypatch):
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("nanomblip.training.optimizers.has_bf16", lambda device, has=has: has)
        assert Muon(matrices(), lr=0.1).dtype_for(torch.device("cpu")) == expected


def test_what_has_no_gradient_stays_and_a_zero_gradient_only_decays():
    still, decayed, *_ = params = matrices()
    decayed.grad = torch.zeros_like(decayed)
    before = [p.detach().clone() for p in params]
    Muon(params, lr=0.5, weight_decay=0.2).step()
    assert torch.equal(still, before[0]) and torch.allclose(decayed, 0.9 * before[1])


def test_what_is_not_a_matrix_is_refused():
    with pytest.raises(ValueError, match=r"Muon is for matrices.*\(7,\)"):
        Muon([torch.nn.Parameter(torch.zeros(7))], lr=0.1)
