"""Stills and films: the images of a file, a folder or an animated GIF or WebP, and a GIF written.

Images are uint8 [3, h, w], one in memory at a time.
"""

import re
import sys
from itertools import chain

from PIL import GifImagePlugin, Image, ImageSequence

from data import Folder
from decode import read_image, to_tensor
from files import write_whole
from terminal import say

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
FRAMES = "mkdir frames; ffmpeg -i {} frames/%05d.png, then frames --fps 10"


def stills(source, names=None):
    """Yield (path, image) of an image file, or of each below a folder, 2.png before 10.png.

    names: which of a folder's to read (default: all, as names_in() gives them). What cannot be read
    in a folder is named and left out. ValueError: no images there, or the file cannot be read.
    """
    if not source.is_dir():
        try:
            yield source, read_image(source)
        except Exception as error:  # whatever a decoder may raise
            raise unreadable_film(source, error) from None
        return
    for name in names_in(source) if names is None else names:
        try:
            image = read_image(source / name)
        except Exception:  # whatever a decoder may raise
            say(f"cannot read {str(source / name)!r}: left out", sys.stderr)
        else:
            yield source / name, image


def names_in(folder):
    """Return the names of the images below a folder, 2.png before 10.png."""
    return sorted(Folder(folder).paths, key=natural)


def natural(name):
    """What to sort names by, so that numbers in them count as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def unreadable_film(path, error):
    """Return the error that says why a file cannot be read, and what to do with a video."""
    reason = str(error)
    if path.suffix.lower() in VIDEOS:
        reason = f"a film is read as a GIF or a folder of frames: {FRAMES.format(path)}"
    return ValueError(f"cannot read {str(path)!r}: {reason}")


class Film:
    """The frames of a folder or of an animated file: (name, image, milliseconds), one at a time.

    fps: how many frames a second a folder is shown with. other: an image in it that is no frame.
    What cannot be read in a folder is named and left out; a file that is cut short ends where it is
    cut. ValueError: it cannot be read at all.
    """

    def __init__(self, source, fps=10, other=None):
        self.source, self.fps, self.names, self.length = source, fps, [], 0
        if source.is_dir():
            is_other = other and other.resolve().is_relative_to(source.resolve())
            left_out = str(other.resolve().relative_to(source.resolve())) if is_other else None
            self.names = [name for name in names_in(source) if name != left_out]
            self.length = len(self.names)
            return
        try:
            with Image.open(source) as film:
                for _ in ImageSequence.Iterator(film):
                    self.length += 1
        except Exception as error:  # whatever a decoder may raise
            if self.length == 0:
                raise unreadable_film(source, error) from None

    def __len__(self):
        return self.length

    def __iter__(self):
        if self.source.is_dir():
            for path, image in stills(self.source, self.names):
                yield path.stem, image, 1000 / self.fps
            return
        with Image.open(self.source) as film:
            try:
                for i, frame in enumerate(ImageSequence.Iterator(film)):
                    yield f"{i:05}", to_tensor(frame.copy()), frame.info.get("duration") or 100
            except Exception as error:  # whatever a decoder may raise
                say(f"cannot read all of {str(self.source)!r}: {error}", sys.stderr)


def is_film(path):
    """Whether a file is an animated GIF or WebP."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.format in ("GIF", "WEBP") and image.is_animated
    except Exception:  # whatever a decoder may raise; reading it as a still says what
        return False


def write_gif(pictures, path):
    """Write (PIL image, milliseconds) as a GIF that repeats. ValueError: there is none.

    One picture is held at a time: Pillow's save_all would gather them all.
    """
    first = next(pictures, None)
    if first is None:
        raise ValueError(f"no frames for {str(path)!r}: none could be read")

    def write(file):
        for i, (picture, duration) in enumerate(chain([first], pictures)):
            picture = picture.quantize()
            if i == 0:
                header, _ = GifImagePlugin.getheader(picture, info={"loop": 0})
                file.writelines(header)
            rounded = min(655350, round(duration, -1))  # a GIF counts hundredths of a second
            data = GifImagePlugin.getdata(picture, duration=rounded, include_color_table=True)
            file.writelines(data)
        file.write(b";")

    write_whole(path, write)
