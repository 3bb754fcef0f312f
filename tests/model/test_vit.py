"""The ViT alone: documented shapes, and parity with transformers' class on configurations of different shape."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, in_transformers, randomise, tiny_mblip

from nanomblip.model.attention import attend_path
from nanomblip.model.vit import ViT, ViTConfig


@pytest.mark.parametrize("cfg", [
    ViTConfig(image_size=20, patch_size=5, width=24, layers=2, heads=3, mlp=40),
    ViTConfig(image_size=28, patch_size=14, width=22, layers=3, heads=2, mlp=7, eps=1e-5),
])  # fmt: skip
def test_parity_with_transformers(cfg, tmp_path):
    model = tiny_mblip(replace(TINY, vit=cfg, qformer=replace(TINY.qformer, vision_width=cfg.width)))
    theirs = in_transformers(model, tmp_path)
    image = torch.randn(2, 3, cfg.image_size, cfg.image_size)
    want = theirs.get_submodule("vision_model" if hasattr(theirs, "vision_model") else "model.vision_model")(image)
    for path in ("fast", "written"):
        with attend_path(path), torch.no_grad():
            out = model.vit(image)
        assert out.shape == (2, cfg.tokens, cfg.width)
        torch.testing.assert_close(out, want.last_hidden_state, atol=1e-5, rtol=1e-4)


def test_eps_is_used():
    """1e-5 against 1e-6 is the difference between early transformers and BLIP-2's own code."""
    image = torch.randn(1, 3, 20, 20)
    outs = []
    for eps in (1e-6, 1e-1):
        model = randomise(ViT(ViTConfig(image_size=20, patch_size=5, width=24, layers=1, heads=3, mlp=40, eps=eps)))
        outs.append(model(image))
    assert (outs[0] - outs[1]).abs().max() > 1e-3


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="patch_size"):
        ViTConfig(image_size=30, patch_size=14)
    with pytest.raises(ValueError, match="heads"):
        ViTConfig(width=100, heads=16)
    with pytest.raises(AssertionError, match="3x20x20"):
        ViT(ViTConfig(image_size=20, patch_size=5, width=24, layers=1, heads=3, mlp=40))(torch.zeros(1, 3, 25, 20))
