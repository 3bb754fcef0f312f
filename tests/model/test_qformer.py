"""The Q-Former alone."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, in_transformers, tiny_mblip

from nanomblip.model.attention import attend_path


@pytest.mark.parametrize("every,layers", [(2, 3), (1, 2), (3, 4)])
def test_parity_with_transformers(every, layers, tmp_path):
    cfg = replace(TINY, qformer=replace(TINY.qformer, cross_every=every, layers=layers))
    model = tiny_mblip(cfg)
    theirs = in_transformers(model, tmp_path)
    theirs = theirs.get_submodule("qformer" if hasattr(theirs, "qformer") else "model.qformer")
    image = torch.randn(2, 17, cfg.vit.width)
    queries = model.queries.expand(2, -1, -1)
    want = theirs(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
    for path in ("fast", "written"):
        with attend_path(path):
            out = model.qformer(queries, image)
        assert out.shape == (2, cfg.queries, cfg.qformer.width)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)


def test_queries_are_told_apart_only_by_their_content():
    """No positions: permuting the queries permutes the output."""
    model = tiny_mblip()
    image, order = torch.randn(1, 17, TINY.vit.width), torch.tensor([3, 0, 4, 1, 2])
    out = model.qformer(model.queries, image)
    torch.testing.assert_close(model.qformer(model.queries[:, order], image), out[:, order], atol=1e-5, rtol=1e-5)


def test_dropout_is_on_in_training_only():
    model = tiny_mblip()
    image = torch.randn(1, 17, TINY.vit.width)
    assert torch.equal(model.qformer(model.queries, image), model.qformer(model.queries, image))
    model.train()
    assert not torch.equal(model.qformer(model.queries, image), model.qformer(model.queries, image))
