"""The two versions of `attend` against each other."""

import pytest
import torch

from nanomblip.model.attention import attend, attend_path


@pytest.mark.parametrize("use_mask", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_both_paths_agree_forward_and_backward(use_mask, use_bias, scale):
    torch.manual_seed(0)
    B, H, N, M, K = 2, 3, 5, 7, 4
    q, k, v = torch.randn(B, H, N, K), torch.randn(B, H, M, K), torch.randn(B, H, M, K)
    mask = (torch.rand(B, 1, 1, M) < 0.7).index_fill(-1, torch.tensor([0]), True) if use_mask else None
    bias = torch.randn(1, H, N, M) if use_bias else None
    results = []
    for path in ("fast", "written"):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        with attend_path(path):
            out = attend(*inputs, mask=mask, bias=bias, scale=scale)
        assert out.shape == (B, H, N, K)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_row_in_which_all_is_hidden_is_an_even_average():
    q, k, v = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    for path in ("fast", "written"):
        with attend_path(path):
            out = attend(q, k, v, mask=torch.zeros(1, 1, 1, 3, dtype=torch.bool))
        torch.testing.assert_close(out[0, 0, 0], v[0, 0].mean(0))


def test_the_path_is_restored_and_checked():
    with pytest.raises(ValueError, match="written"), attend_path("slow"):
        pass
    with pytest.raises(RuntimeError), attend_path("written"):
        raise RuntimeError
    from nanomblip.model import attention

    assert attention._path == "fast"


def test_an_additive_mask_is_refused():
    with pytest.raises(AssertionError, match="boolean"):
        attend(*[torch.zeros(1, 1, 2, 4)] * 3, mask=torch.zeros(2, 2))
