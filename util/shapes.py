"""The built-in images: colored objects on noise, drawn here, with their masks. No download.

    python -m util.shapes FOLDER     the thousand held-out images as PNG files, by class

An image shows one object, a core in a rim of another color, both of mottled cells, on black and
white noise. Its class is the step in hue from the rim to the core, in tenths of a turn: neither
color alone tells it, nor do place, size, outline or background. Each cell strays from its hue, so
that only many together show it. They are drawn so that one transformer block can learn them in
minutes; docs/laptop.md says what mattered.
"""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image

from util.config import Parser, run_command

LENGTHS = {"train": 10_000, "val": 1_000}
RIM_HUES = 5
CELLS = 16  # along a side of an image


class Shapes:
    """A labelled data set of uint8 images [3, size, size]; image i follows from (seed, split, i).

    length: how many images (default: LENGTHS[split]).
    """

    classes = [f"core {36 * step} degrees from rim" for step in range(10)]
    note = None  # as in data.Folder
    block = 100  # so many images are painted at once

    def __init__(self, split="train", length=None, size=64, seed=0):
        self.split, self.size, self.seed = split, size, seed
        self.length = length or LENGTHS[split]
        self.labels = [i % len(self.classes) for i in range(self.length)]
        self.painted = {}  # each block is painted once in each process

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return self.block_of(i)[0][i % self.block]

    def name(self, i):
        return f"{self.classes[self.labels[i]]}, {i}"

    def mask(self, i):
        """Return uint8 [h, w]: 0 for the background, 1 for the object."""
        return self.block_of(i)[1][i % self.block]

    def block_of(self, i):
        """Return (images, masks) of the block with image i."""
        number = i // self.block
        if number not in self.painted:
            rng = np.random.default_rng([*f"{self.seed} {self.split} {number}".encode()])
            self.painted[number] = self.paint(rng, self.objects(rng))
        return self.painted[number]

    def objects(self, rng):
        """Return what paint() takes, with one object an image."""
        points = self.outlines(rng, self.block)
        largest = abs(points).max(1) + 1
        x, y = rng.uniform(largest, self.size - largest, (2, self.block))
        rim = rng.integers(RIM_HUES, size=self.block) / RIM_HUES
        core = rim + np.arange(self.block) % len(self.classes) / len(self.classes)
        return [(x + 1j * y, points, rim, core, rng.uniform(0.5, 0.7, self.block))]

    def outlines(self, rng, n):
        """Draw n wavy circles about 0, each of 15 to 25 % of an image: [n, 48] points x + iy."""
        angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        wave = 1
        for k in (2, 3, 4):
            height, phase = rng.uniform(0, 0.2 / k, (n, 1)), rng.uniform(0, 2 * np.pi, (n, 1))
            wave = wave + height * np.cos(k * angle + phase)
        radius = self.size * np.sqrt(rng.uniform(0.15, 0.25, (n, 1)) / np.pi)
        return radius * wave * np.exp(1j * angle)

    def paint(self, rng, objects):
        """Paint a block: uint8 images [block, 3, h, w], and masks [block, h, w] of object numbers.

        objects: [(centers, outlines, hues of the rim and of the core in turns, sizes of the core)],
        arrays [block] but for the outlines. A block is one PIL image, a strip of them all.
        """
        strip = self.cells("L", rng.integers(2, size=(self.block, CELLS**2)))
        masks = Image.new("L", strip.size)
        for number, (centers, points, rim, core, core_size) in enumerate(objects, 1):
            body = self.fill(centers, points)
            inner = self.fill(centers, core_size[:, None] * points)
            strip.paste(self.mottled(rng, rim), mask=body)
            strip.paste(self.mottled(rng, core), mask=inner)
            masks.paste(number, mask=body.convert("1", dither=Image.Dither.NONE))
        images = rearrange(np.array(strip), "(n h) w c -> n c h w", n=self.block)
        masks = rearrange(np.array(masks), "(n h) w -> n h w", n=self.block)
        return torch.from_numpy(images), torch.from_numpy(masks)

    def fill(self, centers, points):
        """Fill an outline in each image of a strip: gray, 255 inside, antialiased."""
        tops = self.size * np.arange(self.block)
        strip = Image.new("L", (2 * self.size, 2 * self.size * self.block))  # then reduced
        for outline in 2 * ((centers + 1j * tops)[:, None] + points):
            ImageDraw.Draw(strip).polygon(outline.view(float).tolist(), fill=255)
        return strip.reduce(2)

    def mottled(self, rng, hue):
        """Fill each image of a strip with cells of colors about a hue."""
        hsv = (-0.08, 0.4, 0.4) + (0.16, 0.6, 0.6) * rng.random((self.block, CELLS**2, 3))
        hsv[..., 0] = (hsv[..., 0] + hue[:, None]) % 1
        return self.cells("HSV", hsv)

    def cells(self, mode, values):
        """Make a strip of images, in cells of one color each, from values in [0, 1]."""
        cells = (255 * values).round().astype(np.uint8).tobytes()
        cells = Image.frombytes(mode, (CELLS, CELLS * self.block), cells).convert("RGB")
        return cells.resize((self.size, self.size * self.block), Image.NEAREST)


class ShapesFilm(Shapes):
    """A film of one or two such objects that move on noise. It is a sequence as in davis.Sequence.

    Each object keeps its outline and its two hues. The noise and the cells are new in each frame,
    so that only the hues tell where an object went.
    """

    def __init__(self, film, length=24, size=64, seed=0):
        super().__init__(f"film {film}", length, size, seed)
        self.title, self.block = f"film {film + 1}", length
        self.numbers = list(range(1, 2 + film % 2))

    def objects(self, rng):
        """Draw the film's objects, each of which swings from edge to edge."""
        drawn = []
        for rim in rng.permutation(RIM_HUES)[: len(self.numbers)] / RIM_HUES:
            points = 0.75 * self.outlines(rng, 1)
            largest = abs(points).max() + 1
            start, speed = rng.uniform(0, 2 * np.pi, (2, 1)), rng.uniform(0.1, 0.25, (2, 1))
            swing = (1 + np.sin(start + speed * np.arange(self.block))) / 2
            x, y = largest + (self.size - 2 * largest) * swing
            core = rim + rng.integers(len(self.classes)) / len(self.classes)
            same = [np.full(self.block, value) for value in (rim, core, 0.6)]
            drawn.append((x + 1j * y, points, *same))
        return drawn


def parse_args(argv=None):
    parser = Parser(description="Write the held-out built-in images as PNG files.")
    parser.add_argument("folder", type=Path, help="where they go, a folder for each class")
    return parser.parse_args(argv)


def main(args):
    folder = args.folder
    shapes = Shapes("val")
    for i in range(len(shapes)):
        place = folder / shapes.classes[shapes.labels[i]]
        place.mkdir(parents=True, exist_ok=True)
        to_pil_image(shapes[i]).save(place / f"{i}.png")
    print(f"{len(shapes)} images of {len(shapes.classes)} classes -> {folder}")


if __name__ == "__main__":
    run_command(main, parse_args)
