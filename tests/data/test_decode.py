"""Strange and broken pictures come out right or as one ImageError."""

import io
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

from nanomblip.data.decode import FORMATS, MAX_PIXELS, ImageError, list_images, load_image
from nanomblip.data.image import ImageConfig, augment_image, image_to_tensor

Y, X = np.mgrid[:24, :20]
PIXELS = np.stack([X * 12, Y * 10, (X + Y) * 5], -1).astype(np.uint8)  # (24, 20, 3), every corner is different
BASE = Image.fromarray(PIXELS)
GREY16 = (X * 3000).astype(np.uint16)
needs_avif = pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow has no AVIF")


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


def png(depth, colour, row: bytes, *chunks) -> bytes:
    """A PNG of one row of raw samples, with (kind, data) chunks before them."""
    width = len(row) * 8 // (depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour])
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(b"\0" + row)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(png_chunk(*chunk) for chunk in chunks) + body


def tiff(samples: bytes, width: int, bits: list, more: dict, order="<", big=False) -> bytes:
    """An uncompressed TIFF of one row; more: tag -> (type, values) with values of up to four bytes, None to leave out."""
    offset, count, size = ("Q", "Q", 20) if big else ("I", "H", 12)
    tags = {256: (3, [width]), 257: (3, [1]), 258: (3, bits), 259: (3, [1]), 262: (3, [1]), 273: (4, [0]),
            277: (3, [len(bits)]), 278: (3, [1]), 279: (4, [len(samples)]), **more}  # fmt: skip
    tags = {tag: entry for tag, entry in sorted(tags.items()) if entry is not None}
    start = 16 if big else 8
    extra, data = b"", start + struct.calcsize(order + count + offset) + size * len(tags)
    tags[273] = (4, [data + 1000])
    body = struct.pack(order + count, len(tags))
    for tag, (kind, values) in tags.items():
        value = struct.pack(f"{order}{len(values)}{ {1: 'B', 2: 'B', 3: 'H', 4: 'I', 7: 'B'}[kind] }", *values)
        if len(value) > struct.calcsize(order + offset):
            value, extra = struct.pack(order + offset, data + len(extra)), extra + value + b"\0" * (len(value) % 2)
        body += struct.pack(f"{order}HH{offset}", tag, kind, len(values)) + value.ljust(struct.calcsize(order + offset), b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    head += struct.pack(order + "HHQ", 8, 0, 16) if big else struct.pack(order + "I", 8)
    return head + body + struct.pack(order + offset, 0) + extra.ljust(1000, b"\0") + samples


def bmp(pixel: bytes, masks, header=108) -> bytes:
    """A 32-bit BMP of 2 x 2 equal pixels with the given channel masks (red, green, blue, alpha)."""
    info = struct.pack("<IiiHHIIiiII", header, 2, 2, 1, 32, 3, 16, 0, 0, 0, 0) + struct.pack("<4I", *masks)
    info = info.ljust(header, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + 16, 0, 0, 14 + len(info)) + info + pixel * 4


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def make_png(width, height, extra=b"") -> bytes:
    rows = zlib.compressobj(1)
    body = b"".join(rows.compress(bytes(1 + 3 * width)) for _ in range(height)) + rows.flush()
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------------ what is strange


@pytest.mark.parametrize("fmt, options", [
    ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("JPEG", {"quality": 100}),
    pytest.param("AVIF", {"quality": 100, "subsampling": "4:4:4"}, marks=needs_avif),
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
        torch.testing.assert_close(tensor, tensors[0], rtol=0, atol=0 if fmt not in ("JPEG", "AVIF") else 0.05)


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


RAMP = {  # kind of number -> (bits, SampleFormat, samples, the greys they mean when black is zero)
    "1": ([1], 1, bytes([0b01010000]), [0, 255, 0, 255]),
    "2": ([2], 1, bytes([0b00011011]), [0, 85, 170, 255]),
    "4": ([4], 1, bytes([0x0F, 0x84]), [0, 255, 136, 68]),
    "8": ([8], 1, bytes([0, 64, 128, 255]), [0, 64, 128, 255]),
    "8 signed": ([8], 2, bytes([0, 251, 64, 127]), [0, 0, 129, 255]),
    "12": ([12], 1, bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x10]), [0, 128, 255, 1]),
    "16": ([16], 1, (0, 257, 40000, 65535), [0, 1, 156, 255]),
    "16 signed": ([16], 2, (0, -5, 20000, 32767), [0, 0, 156, 255]),
    "32": ([32], 1, (0, 1 << 30, 3 << 30, (1 << 32) - 1), [0, 64, 191, 255]),
    "32 small": ([32], 1, (0, 257, 40000, 65535), [0, 1, 156, 255]),
    "32 signed": ([32], 2, (0, -5, 1 << 30, (1 << 31) - 1), [0, 0, 128, 255]),
    "float": ([32], 3, (0.0, 0.25, 0.5, 1.0), [0, 64, 128, 255]),
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", RAMP)
def test_a_grey_tiff_means_what_it_says(kind, order):
    bits, sample_format, samples, greys = RAMP[kind]
    if order == ">" and kind in ("12", "32", "32 small"):
        pytest.skip("Pillow reads these in one byte order only; the other is refused")
    if not isinstance(samples, bytes):
        code = {(16, 1): "H", (16, 2): "h", (32, 1): "I", (32, 2): "i", (32, 3): "f"}[bits[0], sample_format]
        samples = struct.pack(f"{order}4{code}", *samples)
    form = {339: (3, [sample_format])}
    for big in (False, True) if order == "<" else (False,):  # Pillow reads no big-endian BigTIFF
        black_is_zero = read(tiff(samples, 4, bits, form, order, big))
        white_is_zero = read(tiff(samples, 4, bits, form | {262: (3, [0])}, order, big))
        assert black_is_zero[0, :, 0].tolist() == greys
        assert (white_is_zero == 255 - black_is_zero).all()
    if sample_format == 1 and kind in ("1", "2", "4", "8", "16") and order == "<":  # a page that does not say: black
        assert read(tiff(samples, 4, bits, form | {262: None}, order))[0, :, 0].tolist() == greys


def test_a_tiff_that_pillow_does_not_read_is_refused_by_name():
    for data in (tiff(bytes(6), 1, [16] * 3, {262: (3, [9])}), tiff(bytes(16), 4, [32], {}, ">")):
        with pytest.raises(ImageError, match="a TIFF that is damaged or of a kind that Pillow does not read"):
            read(data)


def test_white_is_zero_survives_compression():
    img = Image.fromarray(GREY16)
    plain = read(encode(img, "TIFF", compression="tiff_lzw"))
    inverted = read(encode(img, "TIFF", compression="tiff_lzw", tiffinfo={262: 0}))
    assert (inverted == 255 - plain).all() and plain.max() > 200


def test_bmp_with_an_alpha_of_zero_everywhere_is_opaque():
    for header in (56, 108, 124):
        for masks, pixel in (
            ((0xFF0000, 0xFF00, 0xFF, 0xFF000000), b"\x1e\x14\x0a\0"),
            ((0xFF, 0xFF00, 0xFF0000, 0xFF000000), b"\x0a\x14\x1e\0"),
            ((0xFF000000, 0xFF0000, 0xFF00, 0xFF), b"\0\x1e\x14\x0a"),
            ((0, 0, 0, 0), b"\x1e\x14\x0a\0"),
        ):
            assert (read(bmp(pixel, masks, header)) == (10, 20, 30)).all()
    half = read(bmp(b"\x1e\x14\x0a\x80", (0xFF0000, 0xFF00, 0xFF, 0xFF000000)))
    assert (half == (132, 137, 142)).all()  # alpha that is used counts
    mixed = bytearray(bmp(b"\x1e\x14\x0a\0", (0xFF0000, 0xFF00, 0xFF, 0xFF000000)))
    mixed[-1] = 255  # one pixel that shows: the others were hidden on purpose
    assert sorted(map(tuple, read(bytes(mixed)).reshape(-1, 3).tolist())) == [(10, 20, 30)] + [(255, 255, 255)] * 3


@pytest.mark.parametrize("extra, alpha, expected", [
    (None, 0, (10, 20, 30)), (None, 128, (132, 137, 142)), (None, 255, (10, 20, 30)),  # not said what it is
    (0, 0, (10, 20, 30)), (0, 128, (10, 20, 30)),  # of no stated meaning
    (1, 255, (10, 20, 30)), (1, 128, (137, 147, 157)), (1, 0, (255, 255, 255)),  # premultiplied alpha
    (2, 255, (10, 20, 30)), (2, 128, (132, 137, 142)), (2, 0, (255, 255, 255)),  # alpha
])
def test_the_fourth_channel_of_a_tiff(extra, alpha, expected):
    more = {262: (3, [2])} | ({} if extra is None else {338: (3, [extra])})
    for order in "<>":
        assert np.abs(read(tiff(bytes([10, 20, 30, alpha]), 1, [8] * 4, more, order))[0, 0].astype(int) - expected).max() <= 1


def test_the_second_channel_of_a_grey_tiff():
    samples = bytes([100, 0, 100, 128, 100, 255])
    for extra, expected in ((1, [255, 227, 100]), (2, [255, 177, 100])):  # premultiplied and not
        assert read(tiff(samples, 3, [8] * 2, {338: (3, [extra])}))[0, :, 0].tolist() == expected


def test_nothing_shows_of_a_png_webp_or_gif_that_hides_everything():
    hidden = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    for fmt, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert (read(encode(hidden, fmt, **options)) == 255).all()


def test_a_gif_frame_smaller_than_its_canvas_stands_on_white():
    img = Image.new("P", (2, 2), 1)
    img.putpalette([255, 0, 0, 0, 255, 0])
    data = bytearray(encode(img, "GIF"))
    data[6:10] = struct.pack("<HH", 4, 4)
    at = data.rindex(b",\0\0\0\0\2\0\2\0")
    data[at + 1 : at + 5] = struct.pack("<HH", 1, 1)
    expected = np.full((4, 4, 3), 255)
    expected[1:3, 1:3] = (0, 255, 0)
    assert (read(bytes(data)) == expected).all()


def test_the_transparent_colour_of_a_png_is_in_its_own_depth():
    white, at = (255, 255, 255), lambda data: [tuple(pixel) for pixel in read(data)[0].tolist()]
    grey = lambda *values: [(v, v, v) for v in values]
    assert at(png(1, 0, b"\x50", (b"tRNS", b"\0\0")))[:4] == grey(255, 255, 255, 255)
    assert at(png(2, 0, b"\x1b", (b"tRNS", b"\0\1"))) == grey(0, 255, 170, 255)
    assert at(png(4, 0, b"\x8f", (b"tRNS", b"\0\x08"))) == grey(255, 255)
    assert at(png(8, 0, b"\x09\x0a", (b"tRNS", b"\0\x09"))) == grey(255, 10)
    assert at(png(16, 0, b"\x12\x34\x56\x78", (b"tRNS", b"\x12\x34"))) == grey(255, 86)
    two = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x3400, 0x7800, 0xBC00)
    assert at(png(16, 2, two, (b"tRNS", two[:6]))) == [white, (0x34, 0x78, 0xBC)]
    assert at(png(8, 2, bytes(range(6)), (b"tRNS", b"\0"))) == [(0, 1, 2), (3, 4, 5)]  # damaged: ignored, as by libpng


def test_a_png_without_its_palette_is_refused():
    palette = (b"PLTE", bytes([1, 2, 3, 4, 5, 6]))
    good = png(8, 3, b"\0\1", palette)
    assert read(good)[0].tolist() == [[1, 2, 3], [4, 5, 6]]
    for bad in (png(8, 3, b"\0\1"), good.replace(b"PLTE", b"pLTE"), good.replace(b"PLTE", b"\xcbLTE")):
        with pytest.raises(ImageError, match="damaged"):
            read(bad)


def test_gamma_and_profiles_are_ignored():
    for chunk in ((b"gAMA", struct.pack(">I", 100_000)), (b"iCCP", b"x\0\0" + zlib.compress(b"a profile"))):
        assert (read(png(8, 2, bytes([100, 50, 25]), chunk)) == (100, 50, 25)).all()


def test_lab_tiff():
    lab = bytes([255, 0, 0, 136, 81, 70, 0, 0, 0, 128, 0, 0])  # white, red, black, grey; a and b are signed
    expected = [(255, 255, 255), (254, 0, 0), (0, 0, 0), (119, 119, 119)]
    assert np.abs(read(tiff(lab, 4, [8] * 3, {262: (3, [8])}))[0].astype(int) - expected).max() <= 4


def test_ycck_jpeg():
    data = bytearray(encode(Image.new("CMYK", (8, 8), (10, 200, 100, 30)), "JPEG", quality=100, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2  # the same numbers, as YCCK
    y, cb, cr, k = 245, 55 - 128, 155 - 128, 225  # what is stored is inverted
    rgb = np.array([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb]).clip(0, 255)
    assert np.abs(read(bytes(data))[0, 0] - (255 - rgb) * k / 255).max() <= 3


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
        "photo.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIC, which Pillow reads with a plugin only"),
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
        encode(floats, "PPM"), encode(BASE, "PPM"), tiff(bytes(range(8)), 4, [16], {262: (3, [0])}, ">"),
        tiff(bytes(range(16)), 4, [8] * 4, {262: (3, [2])}, big=True), bmp(b"\1\2\3\0", (0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
        *([encode(BASE, "AVIF", exif=exif), encode(alpha, "AVIF")] if "AVIF" in FORMATS else []),
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
    pictures = ("a.JPG", "b.png", "c.webp", "d.tiff", "e.jfif", "f.jpe", "g.mpo") + ("h.avif",) * ("AVIF" in FORMATS)
    for name in (*pictures, "notes.txt", "IMG_1.HEIC", "IMG_2.heic", "README", "x.\x1b[31m", ".hidden.png", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    inside = [tmp_path / name for name in pictures]
    left_out = "5 other files in the folder left out (2 .heic, 1 no extension, 1 .txt, 1 .\\x1b[31m); save HEIC as JPEG or PNG"
    files, line = list_images([str(tmp_path)])
    assert files == inside and sorted(line.split(", ")) == sorted(left_out.split(", "))
    single = [str(tmp_path / "notes.txt"), str(tmp_path / "missing.png")]
    files, line = list_images(single)
    assert [str(path) for path in files] == single and line == ""  # `load_image` complains about each in its turn
    assert list_images([single[1], str(tmp_path), single[1]])[0][1:-1] == inside


def test_what_has_a_picture_s_extension_is_read(tmp_path):
    for name, fmt in (("a.jfif", "JPEG"), ("b.jpe", "JPEG"), ("c.mpo", "MPO"), ("d.avif", "AVIF")):
        if fmt == "AVIF" and "AVIF" not in FORMATS:
            continue
        (tmp_path / name).write_bytes(encode(BASE, fmt, quality=95))
    for file in list_images([str(tmp_path)])[0]:
        assert np.abs(np.asarray(load_image(file)).astype(int) - PIXELS).mean() < 8


def test_list_images_of_nothing(tmp_path):
    with pytest.raises(ImageError, match="no picture given"):
        list_images([])
    with pytest.raises(ImageError, match=r"holds no picture \(.*\)$"):
        list_images([str(tmp_path)])
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(ImageError, match="holds no picture .*; 1 other file in the folder left out .1 .heic.; save HEIC as"):
        list_images([str(tmp_path)])
