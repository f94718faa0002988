"""One image file -> uint8 [3, h, w] in RGB, whatever this Pillow can decode.

The pixels decide. Metadata that is too large or broken is passed over, and of EXIF the orientation
alone is read. Transparency is laid over white. Eight bits stay as they are; of deeper images

    a 16-bit PNG is divided by 257,
    floats within 0 and 1 are multiplied by 255,
    anything else is stretched from its own smallest and largest value to 0 and 255.
"""

import functools
import io
import math
import struct
import warnings
from contextlib import contextmanager

import numpy as np
from PIL import EpsImagePlugin, Image
from torchvision.transforms.functional import pil_to_tensor

NOT_DECODED = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # recognised by Pillow, but no more
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # the chunks that are not metadata
TURNS = {  # EXIF's orientation -> what puts the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@functools.cache
def suffixes():
    """Return the suffixes of the files that this Pillow decodes, lower case: {'.jpg', ...}."""
    Image.init()
    found = set()
    for suffix, kind in Image.registered_extensions().items():
        if kind in Image.OPEN and kind not in NOT_DECODED:
            found.add(suffix.lower())
    if not EpsImagePlugin.has_ghostscript():
        found -= {".eps", ".ps"}
    return frozenset(found)


def read_image(file, least=None):
    """Read an image file (a path or a stream) into uint8 [3, h, w].

    least: (short side, square root of the area), in pixels, below which no JPEG is reduced. It is
    decoded at 1/2, 1/4 or 1/8 if that leaves as much, which is many times as fast. None: whole.
    OSError or another exception of Pillow's: it cannot be decoded, or is a decompression bomb.
    """
    with open_image(file, least) as image:
        return to_tensor(image)


@contextmanager
def open_image(file, least=None):
    """Open and decode an image file, whatever its metadata; least: as for read_image()."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(file)
            if least is not None:
                w, h = image.size
                by = divisor(h, w, least)
                image.draft(None, (w // by, h // by))  # of no effect but for a JPEG
            image.load()
        except Exception:
            pixels = png_pixels(file)
            if pixels is None:
                raise
            image = Image.open(pixels)
            image.load()
    with image:
        yield image


def divisor(height, width, least):
    """Return by what a JPEG's sides are divided in decoding: 8, 4, 2 or 1."""
    short, root = least
    most = min(min(height, width) / short, math.sqrt(height * width) / root)
    return next((number for number in (8, 4, 2) if number <= most), 1)


def png_pixels(file):
    """Return a stream of a PNG without its metadata; None: it is no PNG."""
    if hasattr(file, "seek"):
        file.seek(0)
        content = file.read()
    else:
        with open(file, "rb") as stream:
            content = stream.read()
    start = 8
    if content[:start] != b"\x89PNG\r\n\x1a\n":
        return None
    kept = [content[:start]]
    while start + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[start : start + 8])
        end = start + 12 + length  # length, kind, body, checksum
        if kind in PNG_PIXELS:
            kept.append(content[start:end])
        start = end
    return io.BytesIO(b"".join(kept))


def to_tensor(image):
    """Turn a PIL image of any mode into uint8 [3, h, w]."""
    kind = image.format
    image = upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = to_8_bits(image, kind)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))


def upright(image):
    """Turn an image as its EXIF says; if that cannot be read, it stays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd fields
        try:
            turn = TURNS.get(image.getexif().get(0x0112))
        except Exception:  # whatever they may raise
            turn = None
    return image if turn is None else image.transpose(turn)


def to_8_bits(image, kind):
    """Scale a deep grey image by the rules above. kind: Pillow's name of the file's format."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    low, high = values.min(), values.max()
    if image.mode == "F" and 0 <= low and high <= 1:
        values = values * 255
    elif kind == "PNG" or low == high:
        values = values / 257
    else:
        values = (values - low) * (255 / (high - low))
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
