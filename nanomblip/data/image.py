"""From a PIL image in mode RGB to the float (3, size, size) tensor that the ViT wants. (decode.py reads files.)

For evaluation (`image_to_tensor`, `array_to_tensor`) this is a few lines of arithmetic, equal to BLIP's image
processor: squeeze to a square, bicubic, divide by 255, then centre and scale by the statistics of CLIP's data. For
training, `augment_image` crops and mirrors at random, and `redraw` makes a drawing as another hand might have made it.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# The steps below, as transformers' `preprocessor_config.json` spells them. 3 is bicubic.
HF_FIXED = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}


@dataclass(frozen=True)
class ImageConfig:
    """What the ViT expects: side length in pixels, mean and deviation of each channel for values in 0..1.

    The defaults are those of BLIP-2: 224 pixels and the statistics of CLIP's training pictures (arXiv 2103.00020).
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"the image size must be a positive whole number of pixels, not {self.size!r}")
        for name, values, lowest in (("mean", self.mean, -math.inf), ("std", self.std, 0)):
            if len(values) != 3 or not all(isinstance(v, (int, float)) and lowest < v < math.inf for v in values):
                raise ValueError(f"the image {name} must be three {'positive ' * (lowest == 0)}numbers, not {values!r}")

    @classmethod
    def from_hf(cls, config: dict) -> "ImageConfig":
        """Read the content of a `preprocessor_config.json`; ValueError lists every value that is not implemented."""
        if not isinstance(config, dict):
            raise ValueError("preprocessor_config.json does not hold an object")
        config = {key: value for key, value in config.items() if value is not None}  # null means: the default
        config.pop("processor_class", None)
        kind = config.pop("image_processor_type", "BlipImageProcessor")
        size = config.pop("size", 384)  # 384 is the default of BlipImageProcessor
        mean, std = config.pop("image_mean", cls.mean), config.pop("image_std", cls.std)

        # What is left is a switch that must stand as in HF_FIXED, or a step we do not have, which must be off.
        fixed = {**HF_FIXED, "default_to_square": True, "data_format": "channels_first"}
        wrong = {key: value for key, value in config.items() if value != fixed.get(key, False)}
        if kind not in ("BlipImageProcessor", "BlipImageProcessorFast", "BlipImageProcessorPil"):
            wrong["image_processor_type"] = kind
        side = size.get("height") if isinstance(size, dict) else size
        if size not in (side, {"height": side, "width": side}):
            wrong["size"] = size
        wrong |= {key: v for key, v in (("image_mean", mean), ("image_std", std)) if not isinstance(v, (list, tuple))}
        if wrong:
            listing = ", ".join(f"{key} = {value!r}" for key, value in wrong.items())
            raise ValueError(f"preprocessor_config.json: not supported: {listing}")
        return cls(side, tuple(mean), tuple(std))

    def to_hf(self) -> dict:
        """Return the content of a `preprocessor_config.json` that transformers opens as a BlipImageProcessor."""
        return {
            "image_processor_type": "BlipImageProcessor",
            "processor_class": "Blip2Processor",
            "size": {"height": self.size, "width": self.size},
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            **HF_FIXED,
        }


def array_to_tensor(pixels: np.ndarray, cfg: ImageConfig) -> torch.Tensor:
    """Normalise pictures that have the right size already: x = (pixel / 255 - mean) / std, channels first.

    pixels: uint8 (B, H, W, 3) with H = W = cfg.size. Returns float32 (B, 3, H, W).
    """
    assert pixels.dtype == np.uint8 and pixels.shape[1:] == (cfg.size, cfg.size, 3), (
        f"expected uint8 (B, {cfg.size}, {cfg.size}, 3), got {pixels.dtype} {pixels.shape}"
    )
    x = torch.from_numpy(pixels.astype(np.float32) / 255)
    x = (x - torch.tensor(cfg.mean)) / torch.tensor(cfg.std)
    return x.permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W)


def image_to_tensor(img: Image.Image, cfg: ImageConfig) -> torch.Tensor:
    """Preprocess one RGB picture for evaluation: squeeze it to a square (no crop, aspect not kept), then normalise.

    Returns float32 (3, size, size), equal to transformers' BlipImageProcessor on its PIL backend to 1e-6.
    """
    assert img.mode == "RGB", f"expected an RGB picture from load_image, got mode {img.mode}"
    img = img.resize((cfg.size, cfg.size), Image.Resampling.BICUBIC)
    return array_to_tensor(np.asarray(img)[None], cfg)[0]


def augment_image(
    img: Image.Image, cfg: ImageConfig, rng: random.Random, flip: bool, area: float = 0.5
) -> torch.Tensor:
    """Preprocess one RGB picture for training: a random crop, squeezed to a square and mirrored half of the time.

    The crop covers `area` to 1.0 of the area with an aspect ratio of 3/4 to 4/3; 0.5 is mBLIP's
    (RandomResizedCrop, bicubic). flip allows mirroring: mBLIP does it on every task, but a mirrored picture makes
    "left" and "right" in a question wrong. The result is a function of the arguments and the state of rng alone, and
    the crop does not depend on flip. Returns float32 (3, size, size).
    """
    mirror = rng.random() < 0.5
    img = img.crop(random_crop_box(img.width, img.height, rng, area))
    if flip and mirror:
        img = img.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image_to_tensor(img, cfg)


def redraw(x: torch.Tensor, generator: torch.Generator, strength: float = 1.0, flip: bool = True) -> torch.Tensor:
    """Each drawing as another hand might have made it: x float (B, 3, H, W) in 0..1 on white -> the same.

    Always: turned up to 15 degrees, scaled by 0.8 to 1.15, shifted by up to a tenth, mirrored half of the time. Each
    with its own probability: colours tinted and mixed (0.6), another background colour (0.3; multiplied in, as through
    tinted glass), blurred (0.15), only its edges left, dark on white (0.1). strength 0..1 scales all of these ranges
    and probabilities but the mirror's. flip: as in `augment_image`; the rest does not depend on it.
    """
    B, a = len(x), strength
    u = lambda low, high, *shape: torch.empty(B, *shape).uniform_(low, high, generator=generator)
    some = lambda p: (u(0, 1) < p).float()[:, None, None, None]
    angle, scale, mirror = (
        a * u(-15, 15) * torch.pi / 180,
        1 / (1 + a * u(-0.2, 0.15)),
        torch.where(u(0, 1) < 0.5, -1.0 if flip else 1.0, 1.0),
    )
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos * mirror, -sin, a * u(-0.2, 0.2), sin * mirror, cos, a * u(-0.2, 0.2)], dim=1).view(
        B, 2, 3
    )
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = 1 - F.grid_sample(1 - x, grid, align_corners=False)  # inverted, so that what comes in from outside is white

    ink = 1 - x  # white stays white
    mix = torch.eye(3) + a * u(-0.25, 0.25, 3, 3)  # (B, 3, 3)
    tinted = torch.einsum("bij,bjhw->bihw", mix, ink) * (1 + a * u(-0.3, 0.3))[:, None, None, None]
    x = 1 - torch.lerp(ink, tinted, some(0.6 * a)).clamp(0, 1)
    soft = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    gray = soft.mean(1, keepdim=True)
    dx, dy = gray[..., :, 1:] - gray[..., :, :-1], gray[..., 1:, :] - gray[..., :-1, :]
    edges = 1 - 4 * (F.pad(dx.abs(), (0, 1)) + F.pad(dy.abs(), (0, 0, 0, 1)))
    x = torch.lerp(x, soft, some(0.15 * a))
    x = torch.lerp(x, edges.clamp(0, 1).expand_as(x), some(0.1 * a))
    return torch.lerp(x, x * u(0.5, 1.0, 3)[:, :, None, None], some(0.3 * a))


CROP_ASPECT = (3 / 4, 4 / 3)


def random_crop_box(width: int, height: int, rng: random.Random, smallest: float = 0.5) -> tuple[int, int, int, int]:
    """Draw a crop (left, top, right, bottom) in pixels, as torchvision's RandomResizedCrop does.

    The share of the area is uniform from `smallest` to 1; the aspect ratio, width / height, is uniform in its
    logarithm, so that wide and tall are equally likely. Ten tries to fit inside; then the largest central crop with an
    allowed ratio.
    """
    for _ in range(10):
        area = width * height * rng.uniform(smallest, 1.0)
        ratio = math.exp(rng.uniform(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    ratio = min(max(width / height, CROP_ASPECT[0]), CROP_ASPECT[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
