"""The built-in images: colored objects on noise, drawn here, with their masks. No download.

    python -m util.shapes FOLDER     the thousand held-out images as PNG files, by class

An image shows one object, a core in a rim of another color, both of mottled cells, on black and
white noise. Its class is the step in hue from the rim to the core, in tenths of a turn: neither
color alone tells it, nor do place, size, outline or background. Each cell strays from its hue, so
that only many together show it. They are drawn so that one transformer block can learn them in
minutes; docs/laptop.md says what mattered.
"""

import colorsys
import math
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw
from torchvision.transforms.functional import pil_to_tensor

from util.config import Parser, run_command


LENGTHS = {"train": 10_000, "val": 1_000}
RIM_HUES = 5


class Shapes:
    """A labelled data set of uint8 images [3, size, size]; image i follows from (seed, split, i).

    length: how many images (default: LENGTHS[split]).
    """

    classes = [f"core {36 * step} degrees from rim" for step in range(10)]
    note = None  # as in data.Folder

    def __init__(self, split="train", length=None, size=64, seed=0):
        self.split, self.size, self.seed = split, size, seed
        self.length = length or LENGTHS[split]
        self.labels = [i % len(self.classes) for i in range(self.length)]
        self.drawn = {}  # an image is drawn once in each process

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if i not in self.drawn:
            self.drawn[i] = pil_to_tensor(self.draw(i)[0])
        return self.drawn[i]

    def name(self, i):
        return f"{self.classes[self.labels[i]]}, {i}"

    def mask(self, i):
        """Return uint8 [h, w]: 0 for the background, 1 for the object."""
        return pil_to_tensor(self.draw(i)[1])[0]

    def draw(self, i):
        """Return an image and its mask, both PIL images; the mask is 1 on the object."""
        rng = Random(f"shapes {self.seed} {self.split} {i}")
        image = self.cells("L", [rng.getrandbits(1) for _ in range(256)])
        outline = self.outline(rng)
        rim = rng.randrange(RIM_HUES) / RIM_HUES  # hues, in turns
        core = rim + self.labels[i] / len(self.classes)
        core_size = rng.uniform(0.5, 0.7)

        body = self.fill(outline, 1)
        image.paste(self.mottled(rng, rim), mask=body)
        image.paste(self.mottled(rng, core), mask=self.fill(outline, core_size))
        return image, body.point(lambda value: int(value > 127))

    def outline(self, rng):
        """Draw a wavy circle of 15 to 25 % of the image: (centre, [(angle, radius), ...])."""
        size = self.size
        radius = size * math.sqrt(rng.uniform(0.15, 0.25) / math.pi)
        waves = []
        for k in (2, 3, 4):
            waves.append((k, rng.uniform(0, 0.2 / k), rng.uniform(0, 2 * math.pi)))
        points = []
        for j in range(48):
            angle = 2 * math.pi * j / 48
            wave = sum(height * math.cos(k * angle + phase) for k, height, phase in waves)
            points.append((angle, radius * (1 + wave)))
        largest = max(r for _, r in points)
        x = rng.uniform(largest, size - largest)
        y = rng.uniform(largest, size - largest)
        return (x, y), points

    def fill(self, outline, scale):
        """Fill an outline, scaled about its centre: a gray PIL image, 255 inside, antialiased."""
        (x, y), points = outline
        twice = []  # drawn twice as large, then reduced
        for angle, r in points:
            right, down = scale * r * math.cos(angle), scale * r * math.sin(angle)
            twice.append((2 * (x + right), 2 * (y + down)))
        body = Image.new("L", (2 * self.size, 2 * self.size))
        ImageDraw.Draw(body).polygon(twice, fill=255)
        return body.reduce(2)

    def mottled(self, rng, hue):
        """Cells of colors about a hue."""
        values = []
        for _ in range(256):
            strayed = (hue + rng.uniform(-0.08, 0.08)) % 1
            values += colorsys.hsv_to_rgb(strayed, rng.uniform(0.4, 1), rng.uniform(0.4, 1))
        return self.cells("RGB", values)

    def cells(self, mode, values):
        """Turn values in [0, 1] into a PIL image of 16 x 16 cells of one color each."""
        cells = Image.frombytes(mode, (16, 16), bytes(round(255 * value) for value in values))
        return cells.convert("RGB").resize((self.size, self.size), Image.NEAREST)


class ShapesFilm(Shapes):
    """A film of one or two such objects that move on noise; frame t follows from (seed, film, t).

    Each object keeps its outline and its two hues. The noise and the cells are new in each frame,
    so that only the hues tell where an object went. It is a sequence as in davis.Sequence.
    """

    def __init__(self, film, length=24, size=64, seed=0):
        super().__init__("film", length, size, seed)
        self.title, self.film = f"film {film + 1}", film
        rng = Random(f"film {seed} {film}")
        rims = rng.sample(range(RIM_HUES), 1 + film % 2)
        self.objects = [self.moving_object(rng, rim / RIM_HUES) for rim in rims]
        self.numbers = list(range(1, 1 + len(self.objects)))

    def moving_object(self, rng, rim):
        """Choose an object: (points of its outline, hues of rim and core, its paths in x and y)."""
        _, points = self.outline(rng)
        points = [(angle, 0.75 * r) for angle, r in points]
        core = rim + rng.randrange(len(self.classes)) / len(self.classes)
        paths = [(rng.uniform(0, 2 * math.pi), rng.uniform(0.1, 0.25)) for _ in "xy"]
        return points, rim, core, paths

    def draw(self, t):
        """Return frame t and its mask, both PIL images; the mask numbers the objects from 1."""
        rng = Random(f"film {self.seed} {self.film} {t}")
        image = self.cells("L", [rng.getrandbits(1) for _ in range(256)])
        mask = Image.new("L", image.size)
        for i, (points, rim, core, paths) in enumerate(self.objects):
            largest = max(r for _, r in points)
            center = []
            for start, speed in paths:  # it swings from edge to edge
                swing = (1 + math.sin(start + speed * t)) / 2
                center.append(largest + (self.size - 2 * largest) * swing)
            body = self.fill((center, points), 1)
            image.paste(self.mottled(rng, rim), mask=body)
            image.paste(self.mottled(rng, core), mask=self.fill((center, points), 0.6))
            mask.paste(i + 1, mask=body.point(lambda value: 255 * (value > 127)))
        return image, mask


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
        shapes.draw(i)[0].save(place / f"{i}.png")
    print(f"{len(shapes)} images of {len(shapes.classes)} classes -> {folder}")


if __name__ == "__main__":
    run_command(main, parse_args)
