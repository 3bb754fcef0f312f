"""Metadata never costs the picture: whatever is in it, the pixels are read and the orientation is kept."""

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from test_decode import BASE, PIXELS, encode, make_png, needs_avif, png, png_chunk, read, segment, tiff

from nanomblip.data.metadata import without_metadata

BOMB = zlib.compress(b"prompt " * 300_000)  # two megabytes of text
RGB_TIFF = {262: (3, [2]), 278: (3, [24])}


def orientation(tag: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif.tobytes()


@pytest.mark.parametrize("kind, data", [
    (b"zTXt", b"parameters\0\0" + BOMB), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB), (b"iCCP", b"ICC profile\0\0" + BOMB),
    (b"zTXt", b"parameters\0\7" + BOMB), (b"iCCP", b"ICC profile\0\7"), (b"iCCP", b"ICC"), (b"gAMA", b"\0"), (b"cHRM", b"\0"),
    (b"pHYs", b"\0"), (b"sRGB", b""), (b"acTL", b"\0"), (b"fcTL", b"\0"), (b"fdAT", b"\0\0\0\7"), (b"tRNS", b"\0"),
])  # fmt: skip
@pytest.mark.parametrize("after", [False, True])
def test_png_chunks(kind, data, after):
    plain = encode(BASE, "PNG")
    at = len(plain) - 12 if after else 33  # before IEND, or behind IHDR
    for chunk in (png_chunk(kind, data), png_chunk(kind, data)[:-4] + b"\0\0\0\0"):  # the second with a wrong checksum
        assert (read(plain[:at] + chunk + plain[at:]) == PIXELS).all()
    turned = png_chunk(b"eXIf", orientation(6).removeprefix(b"Exif\0\0"))
    assert read(plain[:33] + turned + plain[33:at] + png_chunk(kind, data) + plain[at:]).shape == (20, 24, 3)


def test_many_texts_of_a_megabyte_each():
    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))
    assert read(make_png(3, 2, text * 80)).shape == (2, 3, 3)  # Pillow's limit for all of them is 64


def test_transparency_is_kept_in_the_copy():
    bad = (b"zTXt", b"a\0\0" + BOMB)
    assert read(png(8, 0, b"\x09\x0a", bad, (b"tRNS", b"\0\x09")))[0, :, 0].tolist() == [255, 10]
    palette = (b"PLTE", bytes([1, 2, 3, 4, 5, 6]))
    assert read(png(8, 3, b"\0\1", bad, palette, (b"tRNS", b"\0")))[0].tolist() == [[255] * 3, [4, 5, 6]]


@pytest.mark.parametrize("marker, body", [
    (0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04"), (0xED, b"Photoshop 3.0\x008BIM\x03\xed\0"), (0xE0, b"JFIF"), (0xE0, b"JFIF\0\1"),
    (0xE2, b"ICC_PROFILE\0"), (0xE2, b"ICC_PROFILE\0\1"), (0xEE, b"Adobe"), (0xE2, b"MPF\0" + b"MM\0*\0\0\0\x08\xff\xff"),
    (0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x"), (0xFE, b""),
])  # fmt: skip
def test_jpeg_segments(marker, body):
    jpeg = encode(BASE, "JPEG")
    assert (read(jpeg[:2] + segment(marker, body) + jpeg[2:]) == read(jpeg)).all()
    turned = segment(0xE1, orientation(6))
    assert read(jpeg[:2] + segment(marker, body) + turned + jpeg[2:]).shape == (
        (24, 20, 3) if b"Exif" in body else (20, 24, 3)
    )


def test_the_copy_of_a_cmyk_jpeg_stays_cmyk():
    jpeg = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert (read(jpeg[:2] + segment(0xED, b"Photoshop 3.0\x008BIM\1\1") + jpeg[2:]) == read(jpeg)).all()


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("tag, kind, values", [
    (700, 1, [60, 120]), (700, 3, [7]),  # XMP that is no text
    (282, 2, [65, 66, 0]), (283, 7, [1, 2, 3]), (34665, 4, [99_999_999]), (34853, 4, [3]), (37724, 7, [1]), (33723, 4, [1]), (34675, 7, [1]),
])  # fmt: skip
def test_tiff_tags(tag, kind, values, big):
    for turn, rows in ((1, 24), (6, 20)):
        more = RGB_TIFF | {257: (3, [24]), 274: (3, [turn]), 296: (3, [3]), tag: (kind, values)}
        data = tiff(PIXELS.tobytes(), 20, [8] * 3, more, big=big)
        pixels = read(data)
        assert pixels.shape[0] == rows and (pixels == (PIXELS if turn == 1 else np.rot90(PIXELS, 3))).all()


@needs_avif
def test_avif_with_damaged_exif():
    good = encode(BASE, "AVIF", quality=100, subsampling="4:4:4")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a title"
    turned = encode(BASE, "AVIF", quality=100, subsampling="4:4:4", exif=exif)
    at = turned.index(exif.tobytes()[6:10])
    damaged = turned[:at] + b"XX" + turned[at + 2 :]
    assert (read(damaged) == np.rot90(read(good), 3)).all()  # the turn is AVIF's own, beside the EXIF block


def test_random_metadata(capfd):
    """Random and damaged blocks in every format: the same pixels, upright or turned as a readable tag says."""
    rng, jpeg = random.Random(0), encode(BASE, "JPEG")
    prefixes = (
        b"",
        b"Photoshop 3.0\x008BIM",
        b"ICC_PROFILE\0",
        b"MPF\0",
        b"JFIF",
        b"Adobe",
        b"http://ns.adobe.com/xap/1.0/\0",
    )
    chunks = (
        b"eXIf",
        b"tEXt",
        b"zTXt",
        b"iTXt",
        b"iCCP",
        b"gAMA",
        b"cHRM",
        b"sRGB",
        b"pHYs",
        b"acTL",
        b"fcTL",
        b"fdAT",
        b"sBIT",
        b"zzZz",
    )
    for _ in range(600):
        junk = bytearray(
            orientation(1)[6:] + b"\0\0\0\0" + bytes(20) if rng.random() < 0.5 else rng.randbytes(rng.randrange(80))
        )
        for _ in range(rng.choice((0, 1, 4)) if junk else 0):
            junk[rng.randrange(len(junk))] = rng.choice((0, 1, 255))
        junk = bytes(junk)
        marker, prefix = rng.choice((0xE0, 0xE1, 0xE2, 0xE5, 0xED, 0xFE)), rng.choice(prefixes)
        pixels = read(jpeg[:2] + segment(marker, prefix + junk) + jpeg[2:])
        assert sorted(pixels.shape) == [3, 20, 24] and (
            pixels.shape[0] != 24 or abs(pixels.mean() - read(jpeg).mean()) < 1
        )
        kind, keyword = rng.choice(chunks), rng.choice((b"", b"key\0", b"key\0\0"))
        assert sorted(
            read(encode(BASE, "PNG")[:33] + png_chunk(kind, keyword + junk) + encode(BASE, "PNG")[33:]).shape
        ) == [3, 20, 24]
        more = RGB_TIFF | {
            257: (3, [24]),
            rng.choice((270, 282, 305, 700, 34665, 34675, 34853, 50341)): (rng.choice((1, 2, 7)), list(junk or b"x")),
        }
        assert read(tiff(PIXELS.tobytes(), 20, [8] * 3, more)).shape == (24, 20, 3)
        assert read(encode(BASE, "WEBP", exif=junk, xmp=junk, icc_profile=junk)).size == PIXELS.size
    assert capfd.readouterr() == ("", "")


def test_a_copy_has_no_metadata_and_damage_has_no_copy():
    secret = b"secret of the camera"
    files = [
        encode(BASE, "PNG", exif=orientation(3), icc_profile=secret), encode(BASE, "JPEG", exif=orientation(3), comment=secret),
        encode(BASE, "TIFF", tiffinfo={274: 3, 65000: 7}),
    ]  # fmt: skip
    for data in files:
        copy, invert = without_metadata(io.BytesIO(data))
        assert not invert and secret not in copy and (read(copy) == read(data)).all()
        with Image.open(io.BytesIO(copy)) as img:
            assert img.getexif()[0x0112] == 3 and 65000 not in img.getexif() and "icc_profile" not in img.info
    assert without_metadata(io.BytesIO(encode(BASE, "GIF"))) is None and without_metadata(io.BytesIO(b"")) is None
    page = tiff(bytes(4), 4, [8], {})
    swapped = page[:10] + page[22:34] + page[10:22] + page[34:]  # entries out of order
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jpegs, short = (b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xe1\xff\xffx"), b"\x89PNG\r\n\x1a\n\0\0\0\0"
        for data in (*jpegs, b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", swapped, short):
            assert without_metadata(io.BytesIO(data)) is None
    assert without_metadata(io.BytesIO(tiff(struct.pack("<4H", 1, 2, 3, 4), 4, [16], {262: (3, [0])})))[1] is True
