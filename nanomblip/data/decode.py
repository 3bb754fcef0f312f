"""From a file that a stranger made to an upright, opaque PIL image in mode RGB, or to one line that says why not.

Rotated, transparent, 16-bit, animated, huge or broken files come out right or as one `ImageError`. (The original
training code turns an unreadable file into a black picture and trains on it.) Metadata never costs the picture
(metadata.py). Where a file may be read in two ways, this is what the common viewers do:

- Transparent places become white, in PNG, WebP, GIF and AVIF also when that is the whole picture. A fourth channel that
  is 0 everywhere in a BMP, or in a TIFF that does not say what it is, was never meant as alpha: opaque, as in browsers.
  TIFF's extra channels of no stated meaning (Photoshop's saved selections) are ignored.
- The first frame of an animation, the first page of a TIFF. Where a GIF's first frame leaves its canvas free: white.
- Greys of more than 8 bits: the depth that the file states says which value is white (2**bits - 1, or 2**(bits - 1) - 1
  for signed numbers, with all below 0 black). Floats and 32-bit numbers state nothing useful: see `_white_level`.
- A TIFF in which white is zero is inverted, whatever its depth.
- Colour profiles and gamma (ICC, gAMA) are ignored, as in the original; CMYK is converted by the plain formula.
"""

import io
import logging
import os
import stat
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nanomblip.data.metadata import COMPRESSION, FAX, ORIENTATION, PHOTOMETRIC, without_metadata

MAX_PIXELS = 50_000_000

# What we let Pillow try, where it was built with it (AVIF since Pillow 11.3). Its full list has formats that run other
# programs (EPS starts Ghostscript) or that nobody fuzzes; these are what photographs and drawings come in.
_EXTENSIONS = Image.registered_extensions()  # ".jfif": "JPEG" ...
FORMATS = tuple(name for name in "JPEG PNG WEBP GIF BMP TIFF PPM AVIF".split() if name in {*_EXTENSIONS.values()})
EXTENSIONS = frozenset(end for end, name in _EXTENSIONS.items() if name in (*FORMATS, "MPO"))  # MPO: several JPEGs

BITS, EXTRA_SAMPLES, SAMPLE_FORMAT = 258, 338, 339  # TIFF tags

# How the camera was held, as the transposition that undoes it.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# Pillow logs some damage before it raises. With nobody listening Python would print that; a silent listener stops it.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class ImageError(ValueError):
    """One line about a picture that cannot be used: the file, what is wrong and what to do."""


def load_image(source) -> Image.Image:
    """Read a picture as an upright, opaque PIL image in mode RGB; the file's docstring says how files are understood.

    source is a path or a binary file object. Raises ImageError for everything that cannot be read, and before decoding
    for more than MAX_PIXELS pixels.
    """
    # repr keeps a hostile file name (newline, escape codes, broken bytes) on one printable line.
    name = repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else "<bytes>"
    if name != "<bytes>":
        _check_file(source, name)
    try:
        with warnings.catch_warnings():  # Pillow warns about odd metadata and about sizes below our own limit
            warnings.simplefilter("ignore")
            try:
                return _decode(source)
            except Image.DecompressionBombError:
                raise
            except Exception:
                copy = without_metadata(source)
                if copy is None:
                    raise
                return _decode(io.BytesIO(copy[0]), invert=copy[1])
    except UnidentifiedImageError:
        problem = _unidentified(source)
    except Image.DecompressionBombError:  # ours, or Pillow's own for four times as much
        problem = f"too large, more than {MAX_PIXELS // 10**6} million pixels; scale it down first"
    except Exception as error:
        # Decoders meet damage in the middle of arithmetic, so nearly any exception can come out: OSError, SyntaxError,
        # struct.error, EOFError, KeyError, MemoryError ... Each means the same: this file cannot be used.
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        problem = f"damaged, cut short or of an unsupported kind ({detail}); save it again or leave it out"
    raise ImageError(f"{name}: {problem}")


def is_damaged(load, names) -> bool:
    """Whether load(name) fails for one of the pictures."""
    try:
        return any(load(name) is None for name in names)
    except ImageError:
        return True


def _check_file(path, name: str) -> None:
    """Raise ImageError unless `path` is an ordinary file that has content and may be read (a pipe would block)."""
    try:
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            problem = "is a folder; give a picture in it"
        elif not stat.S_ISREG(info.st_mode):
            problem = "is not an ordinary file; give a picture file"
        elif info.st_size == 0:
            problem = "the file is empty (0 bytes); fetch it again"
        else:
            open(path, "rb").close()
            return
    except (FileNotFoundError, NotADirectoryError):
        problem = "no such file; check the path"
    except (OSError, ValueError) as error:  # no permission, name too long; ValueError for a zero byte in the name
        problem = f"cannot be opened ({getattr(error, 'strerror', None) or error}); check the path and its permissions"
    raise ImageError(f"{name}: {problem}")


def _unidentified(source) -> str:
    """What to say of a file that Pillow took for none of FORMATS."""
    with open(source, "rb") if isinstance(source, (str, os.PathLike)) else nullcontext(source) as file:
        file.seek(0)
        head = file.read(64)
    if head[4:8] == b"ftyp" and any(brand in head for brand in (b"hei", b"hev")):
        return "HEIC, which Pillow reads with a plugin only; save it as JPEG or PNG"
    if head[4:8] == b"ftyp" and b"avi" in head and "AVIF" not in FORMATS:
        return "AVIF, which this Pillow does not read; install Pillow 11.3 or newer, or save it as JPEG or PNG"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "a TIFF that is damaged or of a kind that Pillow does not read; save it as PNG or leave it out"
    return f"not a picture, or a damaged one, or not one of {', '.join(FORMATS)}; convert it or leave it out"


@contextmanager
def _quiet_libtiff():
    """Mute the process's stderr for a moment: libtiff, a C library, prints there what Pillow then raises anyway."""
    try:
        saved = os.dup(2)
    except OSError:  # a process without stderr has nothing to silence
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _decode(source, invert: bool = False) -> Image.Image:
    """Read a picture, or raise whatever Pillow raises. invert: its numbers mean the opposite of what the file says."""
    with Image.open(source, formats=FORMATS) as img:
        if img.width * img.height > MAX_PIXELS:  # only the header has been read so far
            raise Image.DecompressionBombError
        if img.format == "PNG":
            if img.mode == "P" and img.palette is None:
                raise OSError("its palette is missing")  # Pillow would take the numbers for greys
            _scale_colour_key(img)
        box = img.tile[0][1] if img.format == "GIF" and img.tile else None
        with _quiet_libtiff() if img.format == "TIFF" else nullcontext():
            img.load()
        upright = _upright(img)  # after load: Pillow turns TIFF files by itself, and then takes the tag away
        rgb = _to_rgb(img, invert)
        if box not in (None, (0, 0, *img.size)):
            frame, rgb = rgb.crop(box), Image.new("RGB", img.size, "white")
            rgb.paste(frame, box[:2])
    rgb.info.clear()  # else the tag stays behind, and the next reader turns the picture again
    return rgb if upright is None else rgb.transpose(upright)


def _scale_colour_key(img: Image.Image) -> None:
    """Bring the colour that a PNG declares transparent to 8 bits, as Pillow does the pixels that it compares with it.

    Of a 16-bit RGB colour the high bytes are compared; a colour that differs in the low bytes only is hidden as well.
    """
    key, layout = img.info.get("transparency"), img.tile[0][3] if img.tile else None
    if isinstance(key, int) and layout in ("L;2", "L;4"):
        img.info["transparency"] = (key & 3) * 85 if layout == "L;2" else (key & 15) * 17
    elif isinstance(key, tuple) and layout == "RGB;16B":
        img.info["transparency"] = tuple(value >> 8 for value in key)


def _upright(img: Image.Image) -> Image.Transpose | None:
    """Return the transposition that turns a loaded picture upright according to its EXIF tag, None for no change.

    Shorter than Pillow's `exif_transpose`, which also writes the remaining tags back and fails when one of them is odd.
    """
    try:
        return UPRIGHT.get(img.getexif().get(ORIENTATION))
    except Exception:  # damaged metadata (SyntaxError, struct.error, ...) must not cost us the picture
        return None


def _to_rgb(img: Image.Image, invert: bool = False) -> Image.Image:
    """Convert a loaded picture of any mode to RGB: deep greys scaled to 8 bits, transparency put on white."""
    tags = img.tag_v2 if img.format == "TIFF" else {}
    undeclared = img.format == "BMP" or (img.format == "TIFF" and EXTRA_SAMPLES not in tags)  # is it alpha?
    opaque = undeclared and img.mode == "RGBA" and img.getextrema()[3] == (0, 0)

    # Pillow inverts up to 8 bits, and takes a file that says nothing for one in which white is zero.
    if tags:
        white_is_zero = tags.get(PHOTOMETRIC, 0 if tags.get(COMPRESSION) in FAX else 1) == 0
        inverted = img.mode in ("1", "L") and tags.get(PHOTOMETRIC, 0) == 0
        invert ^= white_is_zero ^ inverted

    signed = tags.get(SAMPLE_FORMAT, (1,))[0] == 2
    if img.mode.startswith(("I", "F")) or (signed and img.mode == "L"):
        img = _grey(img, tags.get(BITS, (16,))[0], signed)
    elif img.mode == "La":  # premultiplied: Pillow knows the way to LA only
        img = img.convert("LA")
    alpha = None
    if img.has_transparency_data and not opaque:
        # Plain convert("RGB") drops the alpha and shows the colours that were hidden under it.
        img = img.convert("RGBA")
        alpha = img.getchannel("A")
    rgb = img.convert("RGB")
    if invert:
        rgb = ImageOps.invert(rgb)
    if alpha is None:
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


def _grey(img: Image.Image, bits: int, signed: bool) -> Image.Image:
    """Scale a grey picture of `bits` bits to mode L. (Pillow's convert clips: a 16-bit grey of 40,000 would be white.)

    The one grey that a 16-bit PNG may declare transparent becomes alpha (mode LA).
    """
    values = np.asarray(img)
    if bits == 8:
        values = values.view(np.int8)
    elif bits == 32 and img.mode == "I" and not signed:  # Pillow has no unsigned 32-bit mode
        values = values.view(np.uint32)
    key = img.info.get("transparency")
    values = values.astype(np.float32)
    values = np.where(np.isfinite(values), values, 0)
    guess = img.mode == "F" or bits == 32
    white = _white_level(img.mode, float(values.max())) if guess else 2 ** (bits - signed) - 1
    grey = Image.fromarray(np.clip(values * (255 / white), 0, 255).round().astype(np.uint8))
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _white_level(mode: str, largest: float) -> float:
    """Guess which value is white: 65535 for integers (I), 1, 255 or 65535 for floats (F), or else the largest."""
    levels = (1, 255, 65535) if mode == "F" else (65535,)
    return next((level for level in levels if largest <= level), largest)


def list_images(paths: list[str]) -> tuple[list[Path], str]:
    """Expand what a user gave as `--image` into files: a file stays as it is, a folder becomes its pictures by name.

    Folders are not searched deeper and hidden files are left out. A file that does not exist is kept, so that a job
    over many pictures can report it and go on. Returns the files, and a line about what in the folders was left out
    because its extension is not in EXTENSIONS, "" if nothing was. Raises ImageError when nothing was given or a folder
    holds no picture.
    """
    assert not isinstance(paths, str), f"a list of paths, not the string {paths!r}"
    files, others = [], Counter()
    for path in paths:
        if not os.path.isdir(path):
            files.append(Path(path))
            continue
        try:
            inside = [file for file in sorted(Path(path).iterdir()) if file.name[0] != "." and file.is_file()]
        except OSError as error:
            problem = f"the folder cannot be read ({error.strerror}); check its permissions"
            raise ImageError(f"{str(path)!r}: {problem}") from None
        found = [file for file in inside if file.suffix.lower() in EXTENSIONS]
        left = Counter(
            file.suffix.lower() or "no extension" for file in inside if file.suffix.lower() not in EXTENSIONS
        )
        if not found:
            problem = f"the folder holds no picture ({' '.join(sorted(EXTENSIONS))})"
            raise ImageError(f"{str(path)!r}: {problem}{'; ' * bool(left)}{_left_out(left)}")
        files += found
        others += left
    if not files:
        raise ImageError("no picture given; name at least one file or folder")
    return files, _left_out(others)


def _left_out(others: Counter) -> str:
    """One line about files that were left out of a folder, by extension; "" for none."""
    kinds = ", ".join(f"{count} {ascii(end[:20])[1:-1]}" for end, count in others.most_common(5))
    kinds += ", ..." * (len(others) > 5)
    count = others.total()
    hint = "; save HEIC as JPEG or PNG" if {".heic", ".heif"} & set(others) else ""
    return f"{count} other file{'s' * (count != 1)} in the folder left out ({kinds}){hint}" if count else ""
