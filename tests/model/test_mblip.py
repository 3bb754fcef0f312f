"""The joined model against transformers' Blip2ForConditionalGeneration, through our own writer and loader."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, in_transformers, tiny_mblip, transformers_inputs

from nanomblip.model.attention import attend_path
from nanomblip.model.mblip import MBLIP, PRESETS
from nanomblip.weights.layout import official_names
from nanomblip.weights.load import load_mblip
from nanomblip.weights.save import save_mblip

OFFICIAL = {  # vit, qformer, language model, all; from the official checkpoints' configs
    "mblip-mt0-small": (985_952_256, 105_137_664, 300_176_768, None),
    "mblip-mt0-base": (985_952_256, 105_137_664, 582_401_280, None),
    "mblip-mt0-large": (985_952_256, 105_137_664, 1_229_581_312, None),
    "mblip-mt0-xl": (985_952_256, 105_137_664, 3_742_619_648, 4_835_309_056),
    "mblip-mt0-xxl": (985_952_256, 105_137_664, 12_921_057_280, None),
}


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sizes_have_the_official_parameter_counts(name):
    with torch.device("meta"):
        model = MBLIP(PRESETS[name])
    vit, qformer, mt5, total = OFFICIAL[name]
    assert (count(model.vit), count(model.qformer), count(model.mt5)) == (vit, qformer, mt5)
    assert total is None or count(model) == total
    assert len(official_names(model)) == len(list(model.parameters()))


def test_the_official_key_list_has_1289_distinct_tensors():
    """transformers 4.46 lists 1291 keys for mBLIP mT0-XL; two of them are second names of the shared embedding."""
    with torch.device("meta"):
        model = MBLIP(PRESETS["mblip-mt0-xl"])
    assert len(set(official_names(model).values())) == 1289


@pytest.mark.parametrize("path", ["fast", "written"])
def test_logits_loss_and_gradients_equal_transformers(path, batch, tmp_path):
    model = tiny_mblip()
    theirs = in_transformers(model, tmp_path)
    model = load_mblip(tmp_path)
    ids, mask = transformers_inputs(model, batch["prompt"], batch["prompt_mask"])
    with attend_path(path):
        logits, loss = model(**batch)
    out = theirs(pixel_values=batch["image"][:, 0], input_ids=ids, attention_mask=mask, labels=batch["labels"])
    torch.testing.assert_close(logits, out.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss, out.loss, atol=1e-5, rtol=1e-5)

    loss.backward()
    out.loss.backward()
    grads = dict(theirs.named_parameters())
    names = official_names(model)
    prefix = "" if "query_tokens" in grads else "model."
    checked = 0
    for mine, official in names.items():
        key = official if official in grads else prefix + official
        grad = dict(model.named_parameters())[mine].grad
        assert grad is not None and key in grads, (mine, official)
        torch.testing.assert_close(grad, grads[key].grad, atol=1e-5, rtol=1e-3, msg=lambda m: f"{mine}: {m}")
        checked += 1
    assert checked == len(names)


def test_a_different_image_changes_the_logits(batch):
    """The popular workaround for running mBLIP in current transformers fails exactly this: it ignores the picture."""
    model = tiny_mblip()
    other = batch | {"image": batch["image"].flip(0)}
    with torch.no_grad():
        assert (model(**batch)[0] - model(**other)[0]).abs().amax(dim=(1, 2))[[0, 2]].min() > 1e-3


def test_several_images_come_in_order_and_before_the_prompt(batch):
    model = tiny_mblip()
    images = torch.cat([batch["image"], batch["image"].roll(1, 0)], dim=1)  # (B, 2, 3, h, w)
    with torch.no_grad():
        both = model.encode_image(images)
        single = [model.encode_image(images[:, i : i + 1]) for i in range(2)]
        memory, mask = model.encode(both, batch["prompt"], batch["prompt_mask"])
    Q, S = model.cfg.queries, batch["prompt"].shape[1]
    torch.testing.assert_close(both, torch.cat(single, dim=1))
    assert memory.shape == (3, 2 * Q + S, model.cfg.mt5.width) and mask.shape == (3, 2 * Q + S)
    assert mask[:, : 2 * Q].all() and torch.equal(mask[:, 2 * Q :], batch["prompt_mask"])


def test_padding_changes_nothing(batch):
    """Neither what stands in padded places nor how much padding there is."""
    model = tiny_mblip()
    with torch.no_grad():
        logits, loss = model(**batch)
        garbage = torch.where(batch["prompt_mask"], batch["prompt"], 13)
        wide = torch.nn.functional.pad(batch["prompt"], (0, 5))
        for prompt, mask in ((garbage, batch["prompt_mask"]), (wide, wide != 0), (wide, None)):
            got, got_loss = model(batch["image"], prompt, batch["labels"], prompt_mask=mask)
            torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(got_loss, loss)
        row = model(batch["image"][2:], batch["prompt"][2:, :2], batch["labels"][2:, :7])[0]  # a sample by itself
        torch.testing.assert_close(row[0], logits[2, :7], atol=1e-5, rtol=1e-5)


def test_fresh_weights_let_the_picture_through():
    """Of the variance of the visual vectors a good part must come from the picture; with a fixed 0.02 it was 0.04 %."""
    from nanomblip.data.emoji import load_emoji
    from nanomblip.data.image import ImageConfig, array_to_tensor

    torch.manual_seed(0)
    model = MBLIP(PRESETS["nano"]).eval()
    model.init_weights()
    image = array_to_tensor(load_emoji().pictures[:512:8], ImageConfig(64))[:, None]
    with torch.no_grad():
        visual = model.encode_image(image).flatten(1)
    assert (visual.var(0).sum() / visual.square().mean(0).sum()).item() > 0.04


def test_features_can_be_computed_beforehand(batch):
    model = tiny_mblip()
    with torch.no_grad():
        features = model.image_features(batch["image"])
        again = model(None, batch["prompt"], batch["labels"], features=features)[0]
        torch.testing.assert_close(again, model(**batch)[0], atol=0, rtol=0)


def test_bf16_runs_and_stays_close(batch, tmp_path):
    model = tiny_mblip()
    save_mblip(model, tmp_path, image_token=66)
    low = load_mblip(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        a, b = model(**batch)[0], low(**batch)[0]
    assert b.dtype == torch.bfloat16 and (a - b.float()).abs().mean() < 0.05 * a.abs().mean()


def test_queries_and_vision_width_must_agree():
    with pytest.raises(ValueError, match="the ViT makes 24"):
        replace(TINY, qformer=replace(TINY.qformer, vision_width=25))
