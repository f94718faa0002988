"""Stills and films: the images of a file, a folder or an animated GIF or WebP, and a GIF written.

Images are uint8 [3, h, w], one in memory at a time.
"""

import sys
from itertools import chain

from PIL import GifImagePlugin, Image, ImageSequence

from checkpoint import write_whole
from data import Folder
from decode import read_image, to_tensor
from terminal import say

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
FRAMES = "mkdir frames; ffmpeg -i {} frames/%05d.png, then frames --fps 10"


def stills(source):
    """Yield (path, image) of an image file, or of each below a folder, 2.png before 10.png.

    What cannot be read in a folder is named and left out. ValueError: no images there, or the file
    cannot be read.
    """
    if not source.is_dir():
        try:
            yield source, read_image(source)
        except Exception as error:  # whatever a decoder may raise
            reason = str(error)
            if source.suffix.lower() in VIDEOS:
                reason = f"a film is read as a GIF or a folder of frames: {FRAMES.format(source)}"
            raise ValueError(f"cannot read {str(source)!r}: {reason}") from None
        return
    for name in sorted(Folder(source).paths, key=lambda name: (len(name), name)):
        try:
            image = read_image(source / name)
        except Exception:  # whatever a decoder may raise
            say(f"cannot read {str(source / name)!r}: left out", sys.stderr)
        else:
            yield source / name, image


def frames(source, fps):
    """Yield (image, milliseconds) of a folder of frames or an animated file, one at a time.

    A file that is cut short ends where it is cut.
    """
    if source.is_dir():
        for _, image in stills(source):
            yield image, 1000 / fps
        return
    with Image.open(source) as film:
        try:
            for frame in ImageSequence.Iterator(film):
                yield to_tensor(frame.copy()), frame.info.get("duration") or 100
        except Exception as error:  # whatever a decoder may raise
            say(f"cannot read all of {str(source)!r}: {error}", sys.stderr)


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
            rounded = round(duration, -1)  # a GIF counts hundredths of a second
            data = GifImagePlugin.getdata(picture, duration=rounded, include_color_table=True)
            file.writelines(data)
        file.write(b";")

    write_whole(path, write)
