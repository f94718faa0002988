"""One image file -> uint8 [3, h, w] in RGB, whatever this Pillow can decode; and films.

Of EXIF the orientation alone is read, transparency is laid over white, and 16 bits become 8.
"""

import functools
import math
import os
import re
import sys
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, ImageSequence, PngImagePlugin

from util.misc import atomic_write, first_line, say, track

with suppress(ImportError):  # HEIC, after pip install pillow-heif
    import pillow_heif

    pillow_heif.register_heif_opener()

NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # recognised by Pillow, but no more
SYSTEMS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information",
           "lost+found", "Thumbs.db", "desktop.ini")  # fmt: skip
OUR_PICTURE = re.compile(r"(.+_attention|search|copies|crops|targets|schedules|networks|curves)"
                         r"\.(png|gif)")  # fmt: skip
Image.MAX_IMAGE_PIXELS = 2**27  # twice as many, more than any camera's, are refused
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30  # text is passed over


@functools.cache
def suffixes():
    """Return the suffixes of the files that this Pillow decodes, lower case: {'.jpg', ...}."""
    Image.init()
    known = {kind for kind in Image.OPEN if kind not in NOT_DECODED}
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in known}


def read_image(file, least=None):
    """Read an image file (a path or a stream) into uint8 [3, h, w].

    least: the short side in pixels below which no JPEG is reduced. It is decoded at 1/2, 1/4 or
    1/8 if that leaves as much, which is many times as fast. None: whole.
    OSError or another exception of Pillow's: it cannot be decoded, or is a decompression bomb.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, and of large pictures
        with Image.open(file) as image:
            if least:
                side = math.ceil(least)
                image.draft(None, (side, side))  # of no effect but for a JPEG
            return to_tensor(image)


def to_tensor(image):
    """Turn a PIL image into uint8 [3, h, w]. ValueError: it holds floats, or more than 16 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels, which have no scale")
    if image.mode.startswith("I"):  # 16 bits
        values = np.asarray(image).astype(np.float64) / 257
        if values.min() < 0 or values.max() > 255:
            raise ValueError("pixels of more than 16 bits")
        image = Image.fromarray(values.round().astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return rearrange(pixels, "h w c -> c h w")  # left as Pillow has it, which is faster to crop


def image_paths(root):
    """Return (the images below a folder at any depth, what is passed over: a Counter).

    Paths are relative to root, folder by folder, 2.png before 10.png. Links are followed, but for
    those that lead back up; what this software has written is no data.
    """
    paths, others, above = [], Counter(), {}
    for folder, subfolders, files in os.walk(Path(root), followlinks=True):
        # where the folder really is, after those that it lies in
        places = [*above.get(os.path.dirname(folder), []), os.path.realpath(folder)]
        above[folder] = places
        back_up = any(f"{place}/".startswith(f"{places[-1]}/") for place in places[:-1])
        if back_up or "log.jsonl" in files:
            others["links back up" if back_up else "runs of ours"] += 1
            subfolders.clear()
            continue
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        for file in sorted(files, key=natural):
            suffix = os.path.splitext(file)[1].lower()
            if OUR_PICTURE.fullmatch(file):
                others["pictures of ours"] += 1
            elif suffix in suffixes() and not is_hidden(file):
                paths.append(os.path.relpath(os.path.join(folder, file), root))
            elif not is_hidden(file):
                others[suffix or "without a suffix"] += 1
    return paths, others


def passed_over(others):
    """Say what image_paths() has passed over, the commonest first."""
    return ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))


def is_hidden(name):
    """Return whether a name begins with a dot, or is one that systems leave in folders."""
    return name.startswith(".") or name in SYSTEMS


def natural(name):
    """What to sort names by, so that numbers in them count as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def stills(*sources):
    """Yield (path, image) of image files, and of each image below folders.

    What cannot be read in a folder is named and left out. ValueError: a file cannot be read, or
    nothing can.
    """
    any_read = False
    for source in sources:
        paths = [source]
        if source.is_dir():
            inside, others = image_paths(source)
            paths = [source / path for path in inside]
            if others:
                say(f"{str(source)!r}: passed over {passed_over(others)}", sys.stderr)
        for path in paths:
            try:
                image = read_image(path)
            except Exception as error:  # whatever a decoder may raise
                reason = f"cannot read {str(path)!r}: {first_line(error)}"
                if path == source:
                    raise ValueError(reason) from None
                say(f"{reason}; left out", sys.stderr)
                continue
            any_read = True
            yield path, image
    if not any_read:
        raise ValueError(f"no image below {', '.join(map(str, sources))!r} can be read")


def is_film(path):
    """Return whether a file is an animated GIF or WebP."""
    try:
        with Image.open(path) as image:
            return image.format in ("GIF", "WEBP") and image.is_animated
    except Exception:  # whatever a decoder may raise; reading it as a still says what
        return False


def frames(source, fps=10, other=None):
    """Yield (name, image, milliseconds) of an animated file, or of a folder of frames.

    fps: how many frames a second a folder is shown with. other: an image in it that is no frame.
    """
    if not is_film(source):
        total = len(image_paths(source)[0]) if source.is_dir() else 1
        for path, image in track(stills(source), "frames", total):
            if other is None or path.resolve() != other.resolve():
                yield path.stem, image, 1000 / fps
        return
    with Image.open(source) as film:
        try:
            for i, frame in enumerate(ImageSequence.Iterator(film)):
                yield f"{i:05}", to_tensor(frame.copy()), frame.info.get("duration") or 100
        except Exception as error:  # it is cut short, and ends there
            say(f"cannot read all of {str(source)!r}: {first_line(error)}", sys.stderr)


def write_gif(pictures, path):
    """Write [(PIL image, milliseconds), ...] as a GIF that repeats. ValueError: there is none."""
    pictures = [(picture.quantize(), duration) for picture, duration in pictures]
    if not pictures:
        raise ValueError(f"no frames for {str(path)!r}: none could be read")
    images, durations = zip(*pictures)
    durations = [min(655350, round(duration, -1)) for duration in durations]  # in hundredths
    options = dict(save_all=True, append_images=images[1:], duration=durations, loop=0)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: images[0].save(file, "GIF", **options))
