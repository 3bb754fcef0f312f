"""A picture file without its metadata: for files whose text, profile or EXIF block keeps Pillow from the pixels.

Pillow reads metadata on its way to the pixels and gives a file up when a block is too long, cut short or malformed: a
PNG with a megabyte of compressed text, a JPEG with half a Photoshop block, a TIFF with odd XMP. Viewers show these. All
formats mark what is not pixels, so a copy can be made without it. Of the metadata it keeps the camera's orientation.
"""

import os
import re
import struct
import zlib

from PIL import Image

MAX_BYTES = 1 << 30  # of a file that is copied
ORIENTATION = 0x0112  # the EXIF and TIFF tag that says how the camera was held

# TIFF tags that say how the pixels are stored: size, depth, compression, strips, tiles, palette, kind of alpha ...
PHOTOMETRIC, COMPRESSION = 262, 259
PIXEL_TAGS = {PHOTOMETRIC, ORIENTATION, 256, 257, 258, COMPRESSION, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320}
PIXEL_TAGS |= {322, 323, 324, 325, 338, 339, 347, *range(512, 522), *range(529, 533)}
FAX = (2, 3, 4)  # the compressions of black and white pages


def without_metadata(source) -> tuple[bytes, bool] | None:
    """Return a copy of a PNG, JPEG, TIFF or AVIF file that holds its pixels and orientation and nothing else.

    source is a path or a binary file object. Returns (copy, invert): invert is True for a TIFF in which white is zero;
    its copy says the opposite. None for other formats, and where the file's structure is damaged.
    """
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            return without_metadata(file)
    source.seek(0)
    head = source.read(12)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        strip = _strip_png
    elif head.startswith(b"\xff\xd8\xff"):
        strip = _strip_jpeg
    elif head.startswith((b"II", b"MM")):
        strip = _strip_tiff
    elif head[4:8] == b"ftyp":
        strip = _strip_avif
    else:
        return None
    data = head + source.read(MAX_BYTES)
    try:
        return (strip(data), strip is _strip_tiff and _photometric(data) == 0) if len(data) <= MAX_BYTES else None
    except (struct.error, IndexError):
        return None


def _orientation_only(exif: bytes) -> bytes:
    """An EXIF block that says how the camera was held and nothing else; b"" when `exif` does not say it readably."""
    try:
        told, clean = Image.Exif(), Image.Exif()
        told.load(exif)
        if told.get(ORIENTATION) not in range(1, 9):
            return b""
        clean[ORIENTATION] = told[ORIENTATION]
        return clean.tobytes()
    except Exception:  # SyntaxError, struct.error ...: the block is damaged, and it is only metadata
        return b""


def _strip_png(data: bytes) -> bytes:
    """Keep the critical chunks (bit 5 of their names' first byte is 0), transparency and orientation.

    As libpng does, damaged transparency is ignored: the picture is opaque then.
    """
    parts, at, colour = [data[:8]], 8, data[25]
    while at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        body, crc = data[at + 8 : end - 4], int.from_bytes(data[end - 4 : end], "big")
        if not kind[0] & 32:
            parts.append(data[at:end])
        elif kind == b"tRNS" and len(body) >= {0: 2, 2: 6}.get(colour, 1) and crc == zlib.crc32(kind + body):
            parts.append(data[at:end])
        elif kind == b"eXIf" and (exif := _orientation_only(body)):
            chunk = kind + exif.removeprefix(b"Exif\0\0")
            parts.append(struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)))
        at = end
    return b"".join(parts)


def _strip_jpeg(data: bytes) -> bytes:
    """Drop comments and application segments but JFIF's and Adobe's, which say what the channels are."""
    parts, at = [data[:2]], 2
    while data[at] == 0xFF and data[at + 1] != 0xDA:  # up to the scan
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            if exif := _orientation_only(body):
                parts.append(b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif)
        elif (
            not (0xE0 <= marker <= 0xEF or marker == 0xFE)
            or (marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14)
            or (marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12)
        ):
            parts.append(data[at:end])
        at = end
    return b"".join([*parts, data[at:]])


def _strip_tiff(data: bytes) -> bytes:
    """Leave only PIXEL_TAGS in the first page's directory, in its place, and no further page.

    Pillow reads white-is-zero in few depths, so the copy always says that black is zero.
    """
    order, start, entries, number, size = _tiff_directory(data)
    kept = {tag: entry for tag, entry in entries.items() if tag in PIXEL_TAGS}
    kept[PHOTOMETRIC] = struct.pack(f"{order}HH{number}H", PHOTOMETRIC, 3, 1, _photometric(data) or 1).ljust(
        size, b"\0"
    )
    if len(kept) > len(entries):
        raise struct.error("no room for an entry that is missing")
    count = "Q" if number == "Q" else "H"
    directory = struct.pack(order + count, len(kept)) + b"".join(kept[tag] for tag in sorted(kept))
    directory += struct.pack(order + number, 0)
    return data[:start] + directory + data[start + len(directory) :]


def _tiff_directory(data: bytes) -> tuple[str, int, dict[int, bytes], str, int]:
    """Byte order, place and entries (by tag) of the first directory, code of an offset, size of an entry."""
    order, big = "<>"[data.startswith(b"MM")], 43 in data[2:4]
    place, number, count, size = (8, "Q", "Q", 20) if big else (4, "I", "H", 12)
    (start,) = struct.unpack_from(order + number, data, place)
    (entries,) = struct.unpack_from(order + count, data, start)
    first = start + struct.calcsize(count)
    if first + entries * size > len(data):
        raise struct.error("cut short")
    places = range(first, first + entries * size, size)
    found = {struct.unpack_from(order + "H", data, at)[0]: data[at : at + size] for at in places}
    if list(found) != sorted(found):
        raise struct.error("out of order, as it must not be: damaged")
    return order, start, found, number, size


def _photometric(data: bytes) -> int:
    """What the first page of a TIFF says of its numbers' meaning: 0 = white is zero, 1 = black is zero, 2 = RGB ..."""
    order, _, entries, number, size = _tiff_directory(data)

    def value(tag: int, default: int) -> int:
        if tag not in entries:
            return default
        return struct.unpack_from(order + "H", entries[tag], size - struct.calcsize(number))[0]

    return value(PHOTOMETRIC, 0 if value(COMPRESSION, 1) in FAX else 1)


def _strip_avif(data: bytes) -> bytes:
    """Rename the EXIF item to a type that nobody knows. The orientation is a property of the picture, and stays."""
    return re.sub(rb"(infe.{8}(?:..)?)Exif", rb"\1skip", data, flags=re.DOTALL)
