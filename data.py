"""Where images come from: a folder, a torchvision data set, or `shapes`, drawn here.

Whatever the source, images[i] is a uint8 tensor [3, h, w] in RGB, images.labels is a list of class indices (-1: none) or None, and
images.classes are their names. load("name or path", "train" or "val") opens one; Views turns one into crops under stateless randomness.
"""

import colorsys
import math
import os
import warnings
from pathlib import Path
from random import Random

import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


def to_tensor(image):
    """A PIL image of any mode -> uint8 [3, h, w]: turned as its EXIF says, 16 bits scaled to 8, transparency over white."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))


def read_image(path):
    """An image file -> uint8 [3, h, w]. OSError or another exception of Pillow's if it cannot be read, or is a decompression bomb by its size."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            image.load()
            return to_tensor(image)


class Folder:
    """The images below a folder, at any depth. Class names are those of the folders at the top, if every image lies in one and there are two."""

    def __init__(self, root):
        self.root, self.paths, seen = Path(root), [], set()
        for folder, subfolders, files in os.walk(root, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:  # a link back up
                subfolders.clear()
                continue
            seen.add(real)
            subfolders.sort()
            folder = os.path.relpath(folder, root)
            self.paths += [os.path.normpath(os.path.join(folder, file)) for file in sorted(files) if file.lower().endswith(EXTENSIONS)]
        if not self.paths:
            raise ValueError(f"no images below {str(root)!r}: looked for {' '.join(EXTENSIONS)}")
        tops = [path.split(os.sep)[0] if os.sep in path else None for path in self.paths]
        classes = sorted(set(tops) - {None})
        labelled = None not in tops and len(classes) > 1
        self.classes = classes if labelled else None
        self.labels = list(map({name: i for i, name in enumerate(classes)}.get, tops)) if labelled else None

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return read_image(self.root / self.paths[i])

    def name(self, i):
        return str(self.root / self.paths[i])

    def mask(self, i):
        """uint8 [h, w]: 1 where the image is opaque (alpha above 127), 0 elsewhere. None: it is opaque everywhere."""
        with Image.open(self.root / self.paths[i]) as image:
            if not image.has_transparency_data:
                return None
            alpha = pil_to_tensor(ImageOps.exif_transpose(image).convert("RGBA"))[3]
        return (alpha > 127).byte() if alpha.min() < 128 else None


def split_folder(root, split):
    """The folder that holds a split. An ImageNet-like root has train/ and val/ (or test/); a root that is itself the train/ of such a pair has val/ beside it.

    Without such folders the whole root is the training split and there is no other: None.
    """
    root = Path(root).absolute()
    for base in (root, root.parent) if root.name == "train" else (root,):
        if (base / "train").is_dir():
            held_out = [base / name for name in ("val", "valid", "validation", "test") if (base / name).is_dir()]
            return base / "train" if split == "train" else held_out[0] if held_out else None
    return root if split == "train" else None


TORCHVISION = {  # name -> how to open its splits, and where it keeps its labels
    "cifar10": (lambda root, train: datasets.CIFAR10(root, train, download=True), lambda data: data.targets),
    "cifar100": (lambda root, train: datasets.CIFAR100(root, train, download=True), lambda data: data.targets),
    "stl10": (lambda root, train: datasets.STL10(root, "train+unlabeled" if train else "test", download=True), lambda data: data.labels.tolist()),
    "imagenette": (
        lambda root, train: datasets.Imagenette(root, "train" if train else "val", size="160px", download=not (Path(root) / "imagenette2-160").exists()),
        lambda data: [label for _, label in data._samples],
    ),
    "flowers102": (lambda root, train: datasets.Flowers102(root, "train" if train else "test", download=True), lambda data: data._labels),
    "pets": (lambda root, train: datasets.OxfordIIITPet(root, "trainval" if train else "test", download=True), lambda data: data._labels),
    "voc2012": (
        lambda root, train: datasets.VOCSegmentation(root, image_set="train" if train else "val", download=not (Path(root) / "VOCdevkit/VOC2012").exists()),
        lambda data: None,  # only masks
    ),
}


class Torchvision:
    """One of torchvision's data sets, downloaded on first use beside torch.hub's cache."""

    def __init__(self, name, split):
        root = Path(torch.hub.get_dir()).parent / "datasets"
        open_split, labels_of = TORCHVISION[name]
        try:
            self.data = open_split(str(root), split == "train")
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot download {name} to {str(root)!r}: {error}") from None
        labels = labels_of(self.data)
        self.labels = labels and [int(label) for label in labels]
        self.classes = labels and (getattr(self.data, "classes", None) or [str(label) for label in sorted(set(self.labels) - {-1})])

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return to_tensor(self.data[i][0])

    def name(self, i):
        return f"image {i}"

    def mask(self, i):
        """VOC2012's objects, uint8 [h, w]: 0 for the background, 1, 2, ... for the objects, 255 for what is left open. None: another data set."""
        if not hasattr(self.data, "masks"):
            return None
        with Image.open(self.data.masks[i].replace("SegmentationClass", "SegmentationObject")) as objects:
            return pil_to_tensor(objects)[0]


class Shapes:
    """The built-in data: one object, a core in a rim of other colour, both of mottled cells, on noise, and a mask of it. No file, no download.

    The class is the step in hue from the rim to the core, in tenths of a turn: neither one's colour tells it, nor do place, size, outline or background.
    Each cell strays from its hue, so that only many together show it. Image i is drawn from (seed, split, i) alone.
    """

    classes = [f"core {36 * step} degrees from rim" for step in range(10)]

    def __init__(self, split="train", length=None, size=64, seed=0):
        self.split, self.size, self.seed = split, size, seed
        self.length = length or {"train": 10_000, "val": 1_000}[split]
        self.labels = [i % len(self.classes) for i in range(self.length)]
        self.drawn = {}  # an image is drawn once in each process

    def __len__(self):
        return self.length

    def name(self, i):
        return f"{self.classes[self.labels[i]]}, {i}"

    def cells(self, mode, values):
        """A PIL image of 16 x 16 cells of one colour each."""
        return Image.frombytes(mode, (16, 16), bytes(round(255 * value) for value in values)).convert("RGB").resize((self.size, self.size), Image.NEAREST)

    def draw(self, i):
        """(PIL image, PIL mask): the mask is 0 on the background and 1 on the object."""
        rng, size = Random(f"shapes {self.seed} {self.split} {i}"), self.size
        image = self.cells("L", (rng.getrandbits(1) for _ in range(256)))
        radius = size * math.sqrt(rng.uniform(0.15, 0.25) / math.pi)
        waves = [(k, rng.uniform(0, 0.2 / k), rng.uniform(0, 2 * math.pi)) for k in (2, 3, 4)]
        angles = [2 * math.pi * j / 48 for j in range(48)]
        radii = [radius * (1 + sum(height * math.cos(k * angle + phase) for k, height, phase in waves)) for angle in angles]
        x, y = (rng.uniform(max(radii), size - max(radii)) for _ in range(2))
        rim = rng.randrange(5) / 5  # hues, in turns
        for hue, scale in ((rim, 1), (rim + self.labels[i] / len(self.classes), rng.uniform(0.5, 0.7))):
            body = Image.new("L", (2 * size, 2 * size))  # twice as large, then reduced: antialiased
            outline = [(2 * (x + scale * r * math.cos(angle)), 2 * (y + scale * r * math.sin(angle))) for r, angle in zip(radii, angles)]
            ImageDraw.Draw(body).polygon(outline, fill=255)
            body = body.reduce(2)
            if scale == 1:
                mask = body.point(lambda value: int(value > 127))
            colors = (colorsys.hsv_to_rgb((hue + rng.uniform(-0.08, 0.08)) % 1, rng.uniform(0.4, 1), rng.uniform(0.4, 1)) for _ in range(256))
            image.paste(self.cells("RGB", (value for color in colors for value in color)), mask=body)
        return image, mask

    def __getitem__(self, i):
        if i not in self.drawn:
            self.drawn[i] = pil_to_tensor(self.draw(i)[0])
        return self.drawn[i]

    def mask(self, i):
        """uint8 [h, w]: 0 for the background, 1 for the object."""
        return pil_to_tensor(self.draw(i)[1])[0]


def load(name, split="train"):
    """The images of a split, or None if the source has no such split. ValueError: no such source, or nothing in it."""
    if name == "shapes":
        return Shapes(split)
    if name in TORCHVISION:
        return Torchvision(name, split)
    if not Path(name).is_dir():
        raise ValueError(f"no folder {name!r}; the built-in data sets are shapes, {', '.join(TORCHVISION)}")
    folder = split_folder(name, split)
    return folder and Folder(folder)


class Views(Dataset):
    """(epoch, index) -> transform(image, generator), with a generator that follows from (seed, epoch, index) alone, and the index if the image is bad.

    An image that cannot be read is replaced by the next one that can, so that a batch stays whole.
    """

    def __init__(self, images, transform, seed=0):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key):
        epoch, index = key
        for i in range(index, index + 10):
            try:
                image = self.images[i % len(self.images)]
            except Exception:  # whatever a decoder may raise
                continue
            return *self.transform(image, Random(f"{self.seed} {epoch} {index}")), (-1 if i == index else index)
        raise ValueError(f"ten images in a row cannot be read, the first of them {self.images.name(index)!r}")


class Batches:
    """A batch sampler: which (epoch, index) make up each of a process's batches, as a function of (seed, step) alone.

    A step takes accumulate batches from each process; together they are the next slice of the epoch's permutation, whatever the number of processes.
    """

    def __init__(self, length, batch, accumulate=1, rank=0, world=1, seed=0, first=0, last=None):
        self.length, self.batch, self.accumulate, self.rank, self.world, self.seed = length, batch, accumulate, rank, world, seed
        self.total = batch * accumulate * world
        if length < self.total:
            raise ValueError(f"{length} images are fewer than a global batch of {self.total}: lower --batch or --accumulate")
        self.steps_per_epoch = length // self.total
        self.first, self.last = first, last

    def __len__(self):
        return (self.last - self.first) * self.accumulate

    def __iter__(self):
        for step in range(self.first, self.last):
            epoch, i = divmod(step, self.steps_per_epoch)
            if i == 0 or step == self.first:
                order = torch.randperm(self.length, generator=torch.Generator().manual_seed(Random(f"{self.seed} {epoch}").getrandbits(63)))
            for micro in range(self.accumulate):
                start = i * self.total + (micro * self.world + self.rank) * self.batch
                yield [(epoch, index) for index in order[start : start + self.batch].tolist()]
