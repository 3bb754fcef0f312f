"""Preprocessing equals BLIP's image processor; augmentation is a function of the random state alone."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from nanomblip.data.image import ImageConfig, array_to_tensor, augment_image, image_to_tensor, random_crop_box, redraw

Y, X = np.mgrid[:24, :20]
PIXELS = np.stack([X * 12, Y * 10, (X + Y) * 5], -1).astype(np.uint8)  # (24, 20, 3), every corner is different
BASE = Image.fromarray(PIXELS)

# -------------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("size", [(224, 224), (640, 427), (31, 500), (1, 1), (64, 64), (5, 3)])
@pytest.mark.parametrize("side", [224, 37])
def test_equals_blip(size, side):
    blip = pytest.importorskip("transformers.models.blip.image_processing_pil_blip").BlipImageProcessorPil
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    img = Image.fromarray(pixels)
    theirs = blip(size={"height": side, "width": side})(img, return_tensors="pt")["pixel_values"][0]
    ours = image_to_tensor(img, ImageConfig(size=side))
    assert ours.dtype == torch.float32 and ours.shape == (3, side, side) and ours.is_contiguous()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_transformers_opens_our_config(tmp_path):
    blip = pytest.importorskip("transformers.models.blip.image_processing_pil_blip").BlipImageProcessorPil
    cfg = ImageConfig(size=48, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(cfg.to_hf()))
    theirs = blip.from_pretrained(str(tmp_path))
    torch.testing.assert_close(
        image_to_tensor(BASE, cfg), theirs(BASE, return_tensors="pt")["pixel_values"][0], rtol=0, atol=1e-6
    )
    assert ImageConfig.from_hf(json.loads(theirs.to_json_string())) == cfg


def test_array_equals_image():
    pixels = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    pixels.setflags(write=False)
    cfg = ImageConfig(size=16)
    batch = array_to_tensor(pixels, cfg)
    assert batch.dtype == torch.float32 and batch.shape == (5, 3, 16, 16)
    assert torch.equal(batch, torch.stack([image_to_tensor(Image.fromarray(p), cfg) for p in pixels]))
    with pytest.raises(AssertionError, match="expected uint8"):
        array_to_tensor(pixels, ImageConfig(size=17))
    with pytest.raises(AssertionError, match="mode L"):
        image_to_tensor(BASE.convert("L"), cfg)


def test_value_range():
    cfg = ImageConfig(size=4)
    for colour, level in (("black", 0.0), ("white", 1.0)):
        tensor = image_to_tensor(Image.new("RGB", (9, 9), colour), cfg)
        expected = (level - torch.tensor(cfg.mean)) / torch.tensor(cfg.std)
        torch.testing.assert_close(tensor, expected.view(3, 1, 1).expand(3, 4, 4))


OFFICIAL = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "BlipImageProcessor", "processor_class": "Blip2Processor",
    "rescale_factor": 0.00392156862745098, "size": {"height": 224, "width": 224},
}


def test_config_from_hf():
    assert ImageConfig.from_hf(OFFICIAL) == ImageConfig()
    assert ImageConfig().to_hf() == OFFICIAL
    assert ImageConfig.from_hf({**OFFICIAL, "size": 64}).size == 64
    assert ImageConfig.from_hf({}).size == 384  # what transformers would do
    others = {"do_center_crop": None, "do_pad": False, "data_format": "channels_first", "default_to_square": True}
    fast = {**OFFICIAL, **others, "image_processor_type": "BlipImageProcessorFast"}  # as transformers 4.5x saved it
    assert ImageConfig.from_hf(fast) == ImageConfig()


@pytest.mark.parametrize("key, value", [
    ("resample", 2), ("resample", "bicubic"), ("do_resize", False), ("do_normalize", False), ("do_rescale", False),
    ("do_convert_rgb", False), ("rescale_factor", 1.0), ("do_center_crop", True), ("do_flip", 1),
    ("crop_size", {"height": 9, "width": 9}), ("image_processor_type", "CLIPImageProcessor"),
    ("size", {"height": 224, "width": 225}), ("size", {"shortest_edge": 224}), ("size", {}), ("size", [224, 224]),
    ("size", "224"), ("size", 0), ("size", -3), ("size", True),
    ("image_mean", 0.5), ("image_mean", [0.5, 0.5]), ("image_mean", ["a", 1, 2]),
    ("image_std", [1, 1, 0]), ("image_std", [1, 1, float("nan")]),
])
def test_config_from_hf_rejects(key, value):
    with pytest.raises(ValueError, match=key.removeprefix("image_")):
        ImageConfig.from_hf({**OFFICIAL, key: value})


# --------------------------------------------------------------------------------------------------------- augmentation


def test_augmentation_is_a_function_of_the_random_state():
    cfg = ImageConfig(size=16)
    first = augment_image(BASE, cfg, random.Random(7), flip=True)
    assert first.dtype == torch.float32 and first.shape == (3, 16, 16) and first.is_contiguous()
    for _ in range(20):
        random.random(), np.random.rand(), torch.rand(1)  # nobody else's state matters
        assert torch.equal(first, augment_image(BASE, cfg, random.Random(7), flip=True))
    assert len({augment_image(BASE, cfg, random.Random(s), flip=False).sum().item() for s in range(20)}) > 15
    assert BASE.tobytes() == PIXELS.tobytes()


def test_flip_mirrors_half_of_the_pictures_and_nothing_else():
    cfg, mirrored = ImageConfig(size=16), 0
    for seed in range(200):
        plain = augment_image(BASE, cfg, random.Random(seed), flip=False)
        flipped = augment_image(BASE, cfg, random.Random(seed), flip=True)
        assert plain[0, :, 0].mean() < plain[0, :, -1].mean()  # red grows to the right in BASE: never mirrored
        if not torch.equal(plain, flipped):
            torch.testing.assert_close(plain.flip(-1), flipped, rtol=0, atol=0.02)
            mirrored += 1
    assert 70 < mirrored < 130


def test_augmented_values_stay_in_range():
    cfg = ImageConfig(size=32)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    low, high = (image_to_tensor(Image.new("RGB", (1, 1), c), cfg) for c in ("black", "white"))
    for seed in range(50):
        tensor = augment_image(noise, cfg, random.Random(seed), flip=True)
        assert ((tensor >= low) & (tensor <= high)).all()


def test_redrawn_pictures_stay_pictures():
    raw = torch.ones(32, 3, 64, 64)
    raw[:, :, 16:48, 8:40] = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    draw = lambda seed, *more: redraw(raw, torch.Generator().manual_seed(seed), *more)
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert draw(0).shape == raw.shape and 0 <= draw(0).min() and draw(0).max() <= 1
    moved = [(draw(0, strength, False) - raw).abs().mean() for strength in (0.0, 0.3, 1.0)]
    assert moved[0] < 1e-6 and moved[0] < moved[1] < moved[2]
    mirrored = [(a - b).abs().mean() > 0.01 for a, b in zip(draw(0, 0.0, True), raw)]
    assert 8 < sum(mirrored) < 24 and not torch.equal(draw(0, 0.5, True), draw(0, 0.5, False))
    white = redraw(torch.ones(64, 3, 16, 16), torch.Generator().manual_seed(0))
    assert bool((white.std(dim=(2, 3)) < 1e-3).all()), "nothing drawn, nothing to see"
    assert 0.5 < (white.mean(dim=(1, 2, 3)) > 0.999).float().mean() < 0.9  # about seven backgrounds in ten stay white


def test_crops_follow_the_recipe():
    rng, areas, ratios = random.Random(0), [], []
    for _ in range(3000):
        left, top, right, bottom = random_crop_box(400, 400, rng)
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 400
        areas.append((right - left) * (bottom - top) / 400**2)
        ratios.append((right - left) / (bottom - top))
    assert 0.495 < min(areas) < 0.52 and 0.95 < max(areas) <= 1
    assert 0.74 < min(ratios) < 0.78 and 1.29 < max(ratios) < 1.35
    assert 0.66 < np.mean(areas) < 0.76  # below 0.75: large crops that do not fit are drawn again
    assert abs(np.mean(np.log(ratios))) < 0.02  # wide and tall alike


@pytest.mark.parametrize("size, box", [
    ((1, 1), (0, 0, 1, 1)), ((1, 20000), (0, 9999, 1, 10000)), ((20000, 1), (9999, 0, 10000, 1)),
    ((30, 900), (0, 430, 30, 470)), ((900, 30), (430, 0, 470, 30)),
])
def test_very_long_pictures_fall_back_to_the_centre(size, box):
    assert random_crop_box(*size, random.Random(0)) == box
