"""Where images come from: a folder, a torchvision data set, or the built-in shapes.

Whatever the source, images[i] is a uint8 tensor [3, h, w] in RGB; images.labels is a list of class
indices (-1: none) or None, images.classes are their names; images.name(i) and images.mask(i) say
what an image is called and where its objects are. load("name or path", "train" or "val") opens one.

MultiCropDataset turns images into crops, and BatchSampler says which images make up each batch.
Both are stateless: what they give follows from (seed, epoch, sample) and (seed, step), so resuming
needs no memory.
"""

import copy
import hashlib
import os
import signal
from pathlib import Path
from random import Random

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

from util.images import image_paths, is_hidden, passed_over, read_image, to_tensor
from util.misc import STOP_SIGNALS, first_line, say
from util.shapes import Shapes

TRAINING = ("train", "training")  # what a training split's folder is called, in any case
HELD_OUT = ("val", "valid", "validation", "eval", "test", "testing")  # the first there is


# ---- data sets ----


class Files:
    """Image files at some paths below a root."""

    labels = classes = note = None
    least = None  # the short side in pixels that suffices: see read_image()

    def __init__(self, root, paths):
        self.root, self.paths = Path(root), paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return read_image(self.root / self.paths[i], self.least)

    def name(self, i):
        return str(self.root / self.paths[i])

    def mask(self, i):
        """Return uint8 [h, w]: 1 where the image is opaque (alpha above 127), 0 elsewhere.

        None: it is opaque everywhere.
        """
        with Image.open(self.name(i)) as image:
            if not image.has_transparency_data:
                return None
            alpha = pil_to_tensor(ImageOps.exif_transpose(image).convert("RGBA"))[3]
        return (alpha > 127).byte() if alpha.min() < 128 else None


class Folder(Files):
    """The images below a folder, at any depth.

    Classes are the folders at the top, if there are several and every image lies in one. note: what
    else a user should know of the folder, or None. ValueError: there is no image.
    """

    def __init__(self, root):
        paths, others = image_paths(root)
        super().__init__(root, paths)
        if not paths:
            found = f": passed over {passed_over(others)}" if others else ""
            raise ValueError(f"no images below {str(root)!r}{found}")
        tops = [path.split(os.sep)[0] if os.sep in path else "" for path in paths]
        names = sorted(set(tops))
        notes = []
        if "" not in names and len(names) > 1:
            number = {name: i for i, name in enumerate(names)}
            self.classes, self.labels = names, [number[top] for top in tops]
        elif len(names) > 2:
            stray = paths[tops.index("")]
            notes.append(f"no labels, since {stray!r} lies beside the {len(names) - 1} folders")
        folders = sorted({os.path.dirname(path) for path in paths})
        above = (place for folder in folders for place in (Path(folder), *Path(folder).parents))
        split = next((place for place in above if is_split(place.name)), None)
        if split:
            notes.append(f"{str(split)!r} is taken for ordinary images, not for a split (for "
                         f"that: --data {self.root / split})")  # fmt: skip
        if others:
            notes.append(f"passed over {passed_over(others)}")
        self.note = "; ".join(notes) or None


TORCHVISION = {  # name: (class, the arguments of its training split, of the other)
    "cifar10": (datasets.CIFAR10, dict(train=True), dict(train=False)),
    "cifar100": (datasets.CIFAR100, dict(train=True), dict(train=False)),
    "stl10": (datasets.STL10, dict(split="train+unlabeled"), dict(split="test")),
    "imagenette": (datasets.Imagenette, dict(split="train", size="160px"),
                   dict(split="val", size="160px")),
    "flowers102": (datasets.Flowers102, dict(split="train"), dict(split="test")),
    "pets": (datasets.OxfordIIITPet, dict(split="trainval"), dict(split="test")),
    "voc2012": (datasets.VOCSegmentation, dict(image_set="train"), dict(image_set="val")),
}  # fmt: skip
EXTRACTED = {"imagenette": "imagenette2-160", "voc2012": "VOCdevkit/VOC2012"}  # not to do again


class Torchvision:
    """One of torchvision's data sets, downloaded on first use beside torch.hub's cache."""

    note = None

    def __init__(self, name, split):
        self.title = f"{name} {split}"
        kind, train, val = TORCHVISION[name]
        root = Path(torch.hub.get_dir()).parent / "datasets"
        download = not (name in EXTRACTED and (root / EXTRACTED[name]).exists())
        try:
            self.data = kind(root, download=download, **(train if split == "train" else val))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot download {name} to {str(root)!r}: {error}") from None
        self.labels = self.classes = None
        if name == "imagenette":
            self.labels = [label for _, label in self.data._samples]
            self.classes = [names[0] for names in self.data.classes]  # each class has several
        elif name != "voc2012":
            known = [getattr(self.data, name, None) for name in ("targets", "labels", "_labels")]
            self.labels = [int(label) for label in next(x for x in known if x is not None)]
            numbers = sorted(set(self.labels) - {-1})
            self.classes = getattr(self.data, "classes", None) or list(map(str, numbers))

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return to_tensor(self.data[i][0])

    def name(self, i):
        return f"{self.title}, image {i}"

    def mask(self, i):
        """Return VOC2012's objects, uint8 [h, w]: 0 background, 1, 2, ... objects, 255 left open.

        None: another data set.
        """
        if not hasattr(self.data, "masks"):
            return None
        path = self.data.masks[i].replace("SegmentationClass", "SegmentationObject")
        with Image.open(path) as objects:
            return pil_to_tensor(objects)[0]


def is_split(name):
    return name.lower() in (*TRAINING, *HELD_OUT)


def split_folder(root, split):
    """Return the folder that holds a split, or None if there is no such split.

    A root like ImageNet's has splits if each folder of images in it is named as in TRAINING and
    HELD_OUT; a root that is itself such a training folder may have the others beside it. Without
    these, the whole root is the training split; of one like Pascal VOC's or DAVIS's it is the
    photographs.
    """
    root = Path(root).absolute()
    if (root / "JPEGImages").is_dir():
        return root / "JPEGImages" if split == "train" else None
    for base in [root, root.parent] if root.name.lower() in TRAINING else [root]:
        folders = [path for path in sorted(base.iterdir())
                   if path.is_dir() and not is_hidden(path.name)]  # fmt: skip
        names = {path.name.lower(): path for path in folders if is_split(path.name)}
        training = [names[name] for name in TRAINING if name in names]
        held_out = [names[name] for name in HELD_OUT if name in names]
        others = [path for path in folders if not is_split(path.name)]
        if training and not any(image_paths(path)[0] for path in others):
            found = training if split == "train" else held_out
            return root if root in found else next(iter(found), None)
    return root if split == "train" else None


def load(name, split="train"):
    """Open the images of a split; None: the source has no such split.

    name: a folder, or one of TORCHVISION or "shapes". ValueError: no such source, or it is empty.
    """
    if name == "shapes":
        return Shapes(split)
    if name in TORCHVISION:
        return Torchvision(name, split)
    if not (name and Path(name).is_dir()):
        names = ", ".join(TORCHVISION)
        raise ValueError(f"no folder {str(name)!r}; the built-in data sets are shapes, {names}")
    folder = split_folder(name, split)
    try:
        return folder and Folder(folder)
    except ValueError:
        if split == "train":
            raise
        say(f"note: {str(folder)!r} holds no image, and is left out")
        return None


def load_splits(name):
    """Open (training images, held-out images with the same classes or None)."""
    train, val = load(name, "train"), load(name, "val")
    if val is not None and val.classes != train.classes:
        say("note: the held-out split has other classes than the training split: it is not used")
        val = None
    say(describe_images(train))
    for i in evenly(len(train), 16):
        image, bad = read_or_next(train, i)
        if bad < 0 and 0 < image.max() < 26:
            say(f"note: {train.name(i)!r} uses less than a tenth of its range, and is nearly black "
                "here: 8 bits are taken for 0 to 255, 16 for 0 to 65535")  # fmt: skip
            break
    if val is not None:
        say(f"held out: {describe_images(val)}")
    return train, val


def load_labelled(data, held_out=False):
    """Return (training split, held-out split or None) of a labelled data set.

    Held-out labels are numbered like the training split's. held_out: there must be such a split.
    ValueError: there is none, no labels, or a held-out class that the training split lacks.
    """
    train, val = load(data, "train"), load(data, "val")
    for name, images in ((repr(data), train), (f"the held-out split of {data!r}", val)):
        if images is not None and images.note:
            say(f"note: {name}: {images.note}")
        if images is not None and images.labels is None:
            note = f" ({images.note})" if images.note else ""
            raise ValueError(f"{name} has no labels: put each class into a folder of its own{note}")
    if held_out and val is None:
        raise ValueError(f"{data!r} has no held-out split: put its images into train/ and val/")
    if val is None or val.classes == train.classes:
        return train, val
    unseen = [name for name in val.classes if name not in train.classes]
    if unseen:
        names = ", ".join(map(repr, unseen[:5]))
        raise ValueError(f"the training split of {data!r} lacks classes of the held-out: {names}")
    number = {name: i for i, name in enumerate(train.classes)}
    val.labels = [label if label < 0 else number[val.classes[label]] for label in val.labels]
    return train, val


def reduced(images, least):
    """Return the images with JPEGs reduced in decoding to a short side of at least `least` pixels.

    Images that are not files are returned as they are.
    """
    if isinstance(images, Files):
        images = copy.copy(images)
        images.least = least
    return images


def describe_images(images):
    """Say in a few words what was found: how many images, of which classes."""
    text = f"{len(images)} images"
    if isinstance(images, Folder):
        text = f"{str(images.root)!r}: {text}"
    if images.classes:
        first = ", ".join(images.classes[:3])
        more = ", ..." if len(images.classes) > 3 else ""
        text += f" of {len(images.classes)} classes ({first}{more})"
    else:
        text += " without labels"
    return f"{text}; {images.note}" if images.note else text


def fingerprint(images):
    """Return sixteen digits that follow from the images' names, wherever their folder lies."""
    digest = hashlib.sha256()
    for i in range(len(images)):
        name = images.paths[i] if isinstance(images, Files) else images.name(i)
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


def evenly(length, count):
    """Return the numbers of at most `count` of `length` images, spread evenly."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


# ---- samples and batches ----


class MultiCropDataset(Dataset):
    """dataset[epoch, index] -> (what `crop` makes of an image: see MultiCrop; -1).

    The crops follow from (seed, epoch, index) alone. An image that cannot be read is replaced by
    the next one that can, so that a batch stays whole, and its index stands in the place of -1.
    ValueError: ten in a row cannot be read.
    """

    def __init__(self, images, crop, seed=0):
        self.images, self.crop, self.seed = reduced(images, crop.least), crop, seed

    def __getitem__(self, key):
        epoch, index = key
        image, bad = read_or_next(self.images, index)
        return self.crop(image, Random(f"{self.seed} {epoch} {index}")), bad


def read_or_next(images, index):
    """Return (image, -1), or for one that cannot be read (the next one that can, index).

    ValueError: ten in a row cannot be read.
    """
    for i in range(index, index + 10):
        try:
            return images[i % len(images)], -1 if i == index else index
        except Exception:  # whatever a decoder may raise
            continue
    first, reason = images.name(index), unreadable(images, index)
    raise ValueError(f"ten images in a row cannot be read, the first of them {first!r}: {reason}")


def unreadable(images, index):
    """Return the reason why an image cannot be read, or None if it can."""
    try:
        images[index]
    except Exception as error:  # whatever a decoder may raise
        return first_line(error)
    return None


class BatchSampler:
    """In what order a process sees `length` images; it follows from (seed, step) alone.

    A step takes `accumulate` batches from each of `world` processes. Together they are the next
    slice of the epoch's permutation, whatever the number of processes.
    """

    def __init__(self, length, batch_size, accumulate=1, rank=0, world=1, seed=0):
        self.length, self.batch_size, self.accumulate = length, batch_size, accumulate
        self.rank, self.world, self.seed = rank, world, seed
        self.global_batch = batch_size * accumulate * world
        if length < self.global_batch:
            raise ValueError(
                f"{length} images are fewer than a global batch of {self.global_batch}: "
                "lower --batch or --accumulate"
            )
        self.steps_per_epoch = length // self.global_batch

    def batches(self, first, last):
        """Yield this process's batches, [(epoch, index), ...], of the steps from first to last."""
        for step in range(first, last):
            epoch, i = divmod(step, self.steps_per_epoch)
            if i == 0 or step == first:
                images = self.permutation(epoch)
            for micro in range(self.accumulate):
                start = i * self.global_batch + (micro * self.world + self.rank) * self.batch_size
                batch = images[start : start + self.batch_size]
                yield [(epoch, index) for index in batch.tolist()]

    def permutation(self, epoch):
        seed = Random(f"{self.seed} {epoch}").getrandbits(63)
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(seed))


def view_loader(images, crop, sampler, run, num_workers):
    """Yield the batches of a run's steps: [(crops, drawn), ...], as photometry() takes them.

    crop: a MultiCrop. run: has the first and the last step; the indices of images that cannot be
    read are added to run.bad.
    """
    loader = DataLoader(
        MultiCropDataset(images, crop, sampler.seed),
        batch_sampler=sampler.batches(run.first, run.last),
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=run.center.device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator(),  # torch's own is left to drop path
    )
    for views, replaced in loader:
        run.bad.update(replaced[replaced >= 0].tolist())
        yield views


def ignore_signals(worker):
    """Let a loader's process outlive signals sent to the whole group: it ends with its parent."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
