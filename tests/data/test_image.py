"""Strange and broken pictures come out right or as one ImageError; preprocessing equals BLIP's image processor."""

import io
import json
import os
import random
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from nanomblip.data.image import (
    MAX_PIXELS,
    ImageConfig,
    ImageError,
    array_to_tensor,
    augment_image,
    image_to_tensor,  # fmt: skip
    list_images,
    load_image,
    random_crop_box,
    redraw,
)

Y, X = np.mgrid[:24, :20]
PIXELS = np.stack([X * 12, Y * 10, (X + Y) * 5], -1).astype(np.uint8)  # (24, 20, 3), every corner is different
BASE = Image.fromarray(PIXELS)
GREY16 = (X * 3000).astype(np.uint16)


def encode(img, fmt, **options) -> bytes:
    out = io.BytesIO()
    img.save(out, fmt, **options)
    return out.getvalue()


def read(data: bytes) -> np.ndarray:
    img = load_image(io.BytesIO(data))
    assert img.mode == "RGB" and not img.info
    return np.asarray(img)


def one(mode, value, fmt="PNG", **options):
    """The first pixel of a 4x4 picture of one colour, after writing and reading it."""
    pixels = read(encode(Image.new(mode, (4, 4), value), fmt, **options))
    assert (pixels == pixels[0, 0]).all()
    return tuple(pixels[0, 0].tolist())


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_png(width, height, extra=b"") -> bytes:
    rows = zlib.compressobj(1)
    body = b"".join(rows.compress(bytes(1 + 3 * width)) for _ in range(height)) + rows.flush()
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------------ what is strange


@pytest.mark.parametrize("fmt, options", [
    ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("JPEG", {"quality": 100}),
])
def test_exif_orientations_give_the_same_picture(fmt, options):
    T = Image.Transpose
    as_held = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90,
               7: T.TRANSVERSE, 8: T.ROTATE_270}  # what the camera stored, so that turning it by the tag gives BASE
    source = Image.new("RGB", (32, 48))  # flat patches on whole JPEG blocks: lossy coding treats all turns alike
    for box, colour in (((0, 0), "red"), ((16, 0), "lime"), ((0, 32), "blue"), ((16, 32), "white")):
        source.paste(colour, (*box, box[0] + 16, box[1] + 16))
    tensors = []
    for tag, turn in as_held.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        data = encode(source if turn is None else source.transpose(turn), fmt, exif=exif, **options)
        tensors.append(image_to_tensor(load_image(io.BytesIO(data)), ImageConfig(size=24)))
    for tensor in tensors[1:]:
        torch.testing.assert_close(tensor, tensors[0], rtol=0, atol=0 if fmt != "JPEG" else 0.05)


def test_rotation_is_applied_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    img = load_image(io.BytesIO(encode(BASE, "PNG", exif=exif)))
    assert img.size == (24, 20) and not img.getexif()
    img.save(tmp_path / "again.png")
    assert load_image(tmp_path / "again.png").size == (24, 20)


@pytest.mark.parametrize("tag", [0, 9, 255, 65535])
def test_unknown_orientation_is_ignored(tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    assert (read(encode(BASE, "PNG", exif=exif)) == PIXELS).all()


@pytest.mark.parametrize("exif", [
    b"", b"x", b"not exif at all", b"MM\0*", b"II*\0\xff\xff\xff\xff",
    b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40,
])
def test_bad_exif_is_ignored(exif):
    assert read(make_png(3, 2, png_chunk(b"eXIf", exif))).shape == (2, 3, 3)
    jpeg = encode(BASE, "JPEG")
    block = b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
    assert (read(jpeg[:2] + block + jpeg[2:]) == read(jpeg)).all()


@pytest.mark.parametrize("mode, value, fmt, options, expected", [
    ("RGB", (10, 20, 30), "PNG", {}, (10, 20, 30)),
    ("RGB", (10, 20, 30), "BMP", {}, (10, 20, 30)),
    ("RGB", (10, 20, 30), "PPM", {}, (10, 20, 30)),
    ("L", 77, "PNG", {}, (77, 77, 77)),
    ("1", 1, "PNG", {}, (255, 255, 255)),
    ("1", 0, "TIFF", {"compression": "group4"}, (0, 0, 0)),
    ("CMYK", (0, 255, 255, 0), "TIFF", {}, (255, 0, 0)),
    ("YCbCr", (76, 85, 255), "TIFF", {}, (254, 0, 0)),
    # transparency goes on white
    ("RGBA", (255, 0, 0, 0), "PNG", {}, (255, 255, 255)),
    ("RGBA", (255, 0, 0, 255), "PNG", {}, (255, 0, 0)),
    ("RGBA", (255, 0, 0, 128), "PNG", {}, (255, 127, 127)),
    ("RGBA", (255, 0, 0, 0), "WEBP", {"lossless": True, "exact": True}, (255, 255, 255)),
    ("LA", (0, 0), "PNG", {}, (255, 255, 255)),
    ("LA", (0, 255), "PNG", {}, (0, 0, 0)),
    ("L", 9, "PNG", {"transparency": 9}, (255, 255, 255)),
    ("RGB", (1, 2, 3), "PNG", {"transparency": (1, 2, 3)}, (255, 255, 255)),
    ("I;16", 3000, "PNG", {"transparency": 3000}, (255, 255, 255)),
    # deep greys are scaled, not clipped
    ("I;16", 40000, "PNG", {}, (156, 156, 156)),
    ("I;16", 40000, "TIFF", {}, (156, 156, 156)),
    ("I;16B", 40000, "TIFF", {}, (156, 156, 156)),
    ("I;16", 65535, "PNG", {}, (255, 255, 255)),
    ("I", 40000, "TIFF", {}, (156, 156, 156)),
    ("I", 40000, "PPM", {}, (156, 156, 156)),
    ("I", -5, "TIFF", {}, (0, 0, 0)),
    ("I", 2**31 - 1, "TIFF", {}, (255, 255, 255)),
    ("F", 0.5, "TIFF", {}, (128, 128, 128)),
    ("F", 77.0, "TIFF", {}, (77, 77, 77)),
    ("F", 40000.0, "TIFF", {}, (156, 156, 156)),
    ("F", 1e9, "TIFF", {}, (255, 255, 255)),
    ("F", float("nan"), "TIFF", {}, (0, 0, 0)),
    ("F", 0.5, "PPM", {}, (128, 128, 128)),
])
def test_modes(mode, value, fmt, options, expected):
    assert one(mode, value, fmt, **options) == expected


def test_cmyk_jpeg():
    assert np.abs(np.array(one("CMYK", (0, 255, 255, 0), "JPEG", quality=95)) - (255, 0, 0)).max() <= 3


def test_palettes():
    img = Image.new("P", (4, 4), 1)
    img.putpalette([0, 0, 0, 200, 100, 50])
    assert (read(encode(img, "PNG")) == (200, 100, 50)).all()
    assert (read(encode(img, "PNG", transparency=1)) == 255).all()
    assert (read(encode(img, "GIF", transparency=1)) == 255).all()
    assert (read(encode(img, "PNG", transparency=b"\xff\x80")) == (227, 177, 152)).all()  # half of it shows
    for alpha, expected in ((255, (200, 100, 50)), (0, (255, 255, 255))):
        img = Image.new("PA", (4, 4), (1, alpha))
        img.putpalette([0, 0, 0, 200, 100, 50])
        assert (read(encode(img, "TIFF")) == expected).all()


def test_16_bit_grey_keeps_its_shape():
    expected = np.round(GREY16 / 257).astype(np.uint8)
    assert (read(encode(Image.fromarray(GREY16), "PNG"))[..., 0] == expected).all()
    pgm = b"P5\n20 24\n65535\n" + GREY16.astype(">u2").tobytes()
    assert (read(pgm)[..., 1] == expected).all()


def test_floats_that_are_not_numbers_do_not_spoil_the_rest():
    values = np.array([[0.5, np.nan, np.inf, -np.inf, -3, 1]], dtype=np.float32)
    assert read(encode(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [128, 0, 0, 0, 0, 255]


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_first_frame_of_several(fmt):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], fmt, save_all=True, append_images=frames[1:])
    assert np.abs(read(data).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_extreme_shapes(size):
    img = load_image(io.BytesIO(encode(Image.new("RGB", size, "white"), "PNG")))
    assert img.size == size
    cfg = ImageConfig(size=16)
    assert torch.equal(image_to_tensor(img, cfg), augment_image(img, cfg, random.Random(0), flip=True))


# ------------------------------------------------------------------------------------------------------- what is broken


def bad_files(folder):
    """(path, what the message must say) for every kind of file that is not a usable picture."""
    jpeg, png = encode(BASE, "JPEG"), encode(BASE, "PNG")
    contents = {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "damaged"),
        "truncated.png": (png[: len(png) - 30], "damaged"),
        "truncated.tif": (encode(BASE, "TIFF", compression="jpeg")[:-20], "damaged"),
        "header_only.gif": (encode(BASE, "GIF")[:12], "damaged"),
        "empty.png": (b"", "empty"),
        "text.png": (b"this is not a picture", "not a picture"),
        "html.jpg": (b"<!DOCTYPE html><html></html>", "not a picture"),
        "zeros.webp": (bytes(1000), "not a picture"),
        "drawing.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        "icon.ico": (encode(BASE, "ICO", sizes=[(16, 16)]), "not a picture"),
        "bomb.ppm": (b"P6 12000 8000 255\n", "million pixels"),
        "bomb.gif": (b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3) + b"," + bytes(20), "million pixels"),
        "bad\nname\x1b[31m.png": (b"x", "not a picture"),
    }
    for name, (data, problem) in contents.items():
        path = folder / name
        path.write_bytes(data)
        yield path, problem
    yield folder, "folder"
    yield folder / "missing.png", "no such file"
    yield folder / "text.png" / "x.png", "no such file"
    yield "", "no such file"
    yield "zero\0byte.png", "cannot be opened"
    yield "x" * 5000, "cannot be opened"
    yield os.devnull, "not an ordinary file"


def test_bad_files_are_one_line(tmp_path, capfd):
    for path, problem in bad_files(tmp_path):
        for given in {path, str(path)}:
            with pytest.raises(ImageError) as error:
                load_image(given)
                pytest.fail(f"no error for {given}")
            message = str(error.value)
            assert message.startswith(repr(str(path))) and message.isprintable() and len(message) < len(str(path)) + 300
            assert problem in message[len(repr(str(path))) :], message
    assert capfd.readouterr() == ("", "")  # not even from the C libraries


def test_a_bomb_is_refused_before_decoding(monkeypatch):
    data = make_png(12000, 8000)  # 96 MP: Pillow alone lets it pass, at the price of 400 MB
    assert len(data) < 2_000_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="50 million pixels"):
        load_image(io.BytesIO(data))


def test_global_switches_stay(tmp_path):
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    big = encode(Image.new("1", (10_000, 9_000)), "PNG")  # 90 MP: Pillow warns, we refuse
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ImageError):
            load_image(io.BytesIO(big))
        load_image(io.BytesIO(encode(BASE, "PNG")))
    assert not caught
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS


def test_stderr_works_after_a_tiff(capfd):
    load_image(io.BytesIO(encode(BASE, "TIFF", compression="tiff_lzw")))
    print("still here", file=sys.stderr)
    assert capfd.readouterr().err == "still here\n"


def test_the_file_is_closed(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(BASE, "PNG"))
    (tmp_path / "b.png").write_bytes(encode(BASE, "PNG")[:-40])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        load_image(tmp_path / "a.png").getpixel((0, 0))
        with pytest.raises(ImageError):
            load_image(tmp_path / "b.png")


def damage(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind < 2:
            data[at if kind else at % 64] = rng.randrange(256)
        elif kind == 2:
            del data[at + 1 :]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            number = rng.choice((0, 1, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF))
            data[at : at + 4] = struct.pack(rng.choice("<>") + "I", number)
    return bytes(data)


def test_fuzz(capfd):
    """10,000 damaged files of all formats: a picture or an ImageError, nothing else, and nothing printed."""
    alpha = Image.merge("RGBA", (*BASE.split(), Image.fromarray(PIXELS[..., 0])))
    deep = Image.fromarray(GREY16)
    floats = Image.fromarray(GREY16.astype(np.float32))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "title"
    seeds = [
        encode(BASE, "JPEG", exif=exif), encode(BASE, "JPEG", progressive=True), encode(BASE.convert("CMYK"), "JPEG"),
        encode(BASE, "PNG", exif=exif), encode(alpha, "PNG"), encode(BASE.convert("P"), "PNG", transparency=3),
        encode(deep, "PNG", transparency=3000), encode(BASE, "PNG", save_all=True, append_images=[BASE.rotate(90)]),
        encode(BASE, "WEBP", exif=exif), encode(alpha, "WEBP", save_all=True, append_images=[alpha.rotate(180)]),
        encode(BASE.convert("P"), "GIF", save_all=True, append_images=[BASE.rotate(90)]), encode(BASE, "BMP"),
        encode(BASE.convert("P"), "BMP"), encode(BASE, "TIFF"), encode(BASE, "TIFF", compression="tiff_lzw", exif=exif),
        encode(BASE, "TIFF", compression="jpeg"), encode(deep, "TIFF", compression="tiff_adobe_deflate"),
        encode(BASE.convert("1"), "TIFF", compression="group4"), encode(floats, "TIFF"),
        encode(floats, "PPM"), encode(BASE, "PPM"),
        b"P5\n20 24\n65535\n" + GREY16.astype(">u2").tobytes(), b"P3\n2 2\n255\n" + b"1 2 3 " * 4,
    ]
    rng, cfg, good = random.Random(0), ImageConfig(size=8), 0
    for i in range(10_000):
        data = damage(seeds[i % len(seeds)], rng)
        try:
            img = load_image(io.BytesIO(data))
        except ImageError as error:
            assert str(error).isprintable()
        else:
            assert img.mode == "RGB" and torch.isfinite(image_to_tensor(img, cfg)).all()
            good += 1
    assert 1000 < good < 9000  # the damage is neither harmless nor always fatal
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------------- the list


def test_list_images(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp", "notes.txt", ".hidden.png", "d.tiff"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    inside = [tmp_path / name for name in ("a.JPG", "b.png", "c.webp", "d.tiff")]
    assert list_images([str(tmp_path)]) == inside
    single = [str(tmp_path / "notes.txt"), str(tmp_path / "missing.png")]
    assert [str(path) for path in list_images(single)] == single  # `load_image` complains about each in its turn
    assert list_images([single[1], str(tmp_path), single[1]])[1:-1] == inside


def test_list_images_of_nothing(tmp_path):
    with pytest.raises(ImageError, match="no picture given"):
        list_images([])
    with pytest.raises(ImageError, match="holds no picture"):
        list_images([str(tmp_path)])


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
