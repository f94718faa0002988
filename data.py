"""Where images come from: a folder, a torchvision data set, or the built-in shapes.

Whatever the source, images[i] is a uint8 tensor [3, h, w] in RGB; images.labels is a list of class
indices (-1: none) or None, images.classes are their names; images.name(i) and images.mask(i) say
what an image is called and where its objects are. load("name or path", "train" or "val") opens one.

Samples turns images into crops, and Order says which images make up each batch. Both are stateless:
what they give follows from (seed, epoch, sample) and (seed, step), so resuming needs no memory.
"""

import copy
import hashlib
import os
from collections import Counter
from pathlib import Path
from random import Random

import torch
from einops import rearrange
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

from augment import photometry
from decode import open_image, read_image, suffixes, to_tensor, upright
from shapes import Shapes
from terminal import first_line, outlive_signals, say

TRAINING = ("train", "training")  # what a training split's folder is called, in any case
HELD_OUT = ("val", "valid", "validation", "eval", "test", "testing")  # the first there is


# ---- data sets ----


class Folder:
    """The images below a folder, at any depth.

    Classes are the folders at the top, if there are two and every image lies in one. note: what
    else a user should know of the folder, or None. ValueError: there is no image.
    """

    least = None  # see reduced()

    def __init__(self, root):
        self.root = Path(root)
        others = Counter()
        self.paths = list(image_paths(root, others))
        passed_over = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        if not self.paths:
            found = f": passed over {passed_over}" if others else ""
            raise ValueError(f"no images below {str(root)!r}{found}")
        tops = [path.split(os.sep)[0] if os.sep in path else None for path in self.paths]
        names = sorted(set(tops) - {None})
        self.classes = self.labels = None
        notes = []
        if None not in tops and len(names) > 1:
            number = {name: i for i, name in enumerate(names)}
            self.classes = names
            self.labels = [number[top] for top in tops]
        elif len(names) > 1:
            stray = self.paths[tops.index(None)]
            notes.append(f"no labels, since {stray!r} lies beside the {len(names)} folders")
        if others:
            notes.append(f"passed over {others.total()} files that are no images: {passed_over}")
        self.note = "; ".join(notes) or None

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
        with open_image(self.root / self.paths[i]) as image:
            if not image.has_transparency_data:
                return None
            alpha = pil_to_tensor(upright(image).convert("RGBA"))[3]
        return (alpha > 127).byte() if alpha.min() < 128 else None


class Files:
    """The images at some paths."""

    labels = classes = note = least = None

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return read_image(self.paths[i], self.least)

    def name(self, i):
        return str(self.paths[i])


def reduced(images, least):
    """Return the images with JPEGs reduced in decoding, as decode.read_image() does with `least`.

    Images that are not files in a folder are returned as they are.
    """
    if isinstance(images, (Folder, Files)):
        images = copy.copy(images)
        images.least = least
    return images


def image_paths(root, others):
    """Yield the images below a folder as relative paths, folder by folder, sorted in each.

    Hidden names, those that begin with a dot, and __MACOSX are passed over. others counts the
    files that are no images, by suffix.
    """
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        relative = os.path.relpath(folder, root)
        for file in sorted(name for name in files if not is_hidden(name)):
            suffix = os.path.splitext(file)[1].lower()
            if suffix in suffixes():
                yield os.path.normpath(os.path.join(relative, file))
            else:
                others[suffix or "without a suffix"] += 1


def is_hidden(name):
    return name.startswith(".") or name == "__MACOSX"


def split_folder(root, split):
    """Return the folder that holds a split, or None if there is no such split.

    A root like ImageNet's has a folder named as in TRAINING, and may have one as in HELD_OUT; a
    root that is itself such a training folder may have the other beside it. Without these, the
    whole root is the training split; of one like Pascal VOC's or DAVIS's it is the photographs.
    """
    root = Path(root).absolute()
    if (root / "JPEGImages").is_dir():
        return root / "JPEGImages" if split == "train" else None
    bases = [root]
    if root.name.lower() in TRAINING:
        bases.append(root.parent)
    for base in bases:
        folders = {path.name.lower(): path for path in sorted(base.iterdir()) if path.is_dir()}
        training = [folders[name] for name in TRAINING if name in folders]
        held_out = [folders[name] for name in HELD_OUT if name in folders]
        if training and split == "train":
            return root if root in training else training[0]
        if training:
            return held_out[0] if held_out else None
    return root if split == "train" else None


def cifar10(root, train):
    data = datasets.CIFAR10(root, train, download=True)
    return data, data.targets


def cifar100(root, train):
    data = datasets.CIFAR100(root, train, download=True)
    return data, data.targets


def stl10(root, train):
    data = datasets.STL10(root, "train+unlabeled" if train else "test", download=True)
    return data, data.labels.tolist()


def imagenette(root, train):
    download = not (Path(root) / "imagenette2-160").exists()
    data = datasets.Imagenette(root, "train" if train else "val", "160px", download)
    data.classes = [names[0] for names in data.classes]  # each class has several
    return data, [label for _, label in data._samples]


def flowers102(root, train):
    data = datasets.Flowers102(root, "train" if train else "test", download=True)
    return data, data._labels


def pets(root, train):
    data = datasets.OxfordIIITPet(root, "trainval" if train else "test", download=True)
    return data, data._labels


def voc2012(root, train):
    download = not (Path(root) / "VOCdevkit/VOC2012").exists()
    split = "train" if train else "val"
    return datasets.VOCSegmentation(root, image_set=split, download=download), None


TORCHVISION = {
    open_split.__name__: open_split  # (root, train) -> (data set, labels or None)
    for open_split in (cifar10, cifar100, stl10, imagenette, flowers102, pets, voc2012)
}


class Torchvision:
    """One of torchvision's data sets, downloaded on first use beside torch.hub's cache."""

    note = None  # as in Folder

    def __init__(self, name, split):
        self.title = f"{name} {split}"
        root = Path(torch.hub.get_dir()).parent / "datasets"
        try:
            self.data, labels = TORCHVISION[name](str(root), split == "train")
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot download {name} to {str(root)!r}: {error}") from None
        self.labels = self.classes = None
        if labels:
            self.labels = [int(label) for label in labels]
            numbers = [str(label) for label in sorted(set(self.labels) - {-1})]
            self.classes = getattr(self.data, "classes", None) or numbers

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


def load(name, split="train"):
    """Open the images of a split; None: the source has no such split.

    ValueError: no such source, or nothing in it.
    """
    if name == "shapes":
        return Shapes(split)
    if name in TORCHVISION:
        return Torchvision(name, split)
    if not Path(name).is_dir():
        built_in = ", ".join(TORCHVISION)
        raise ValueError(f"no folder {name!r}; the built-in data sets are shapes, {built_in}")
    folder = split_folder(name, split)
    return None if folder is None else Folder(folder)


def load_both(name):
    """Open (training images, held-out images with the same classes or None)."""
    train, val = load(name, "train"), load(name, "val")
    if val is not None and val.classes != train.classes:
        say("note: the held-out split has other classes than the training split: it is not used")
        val = None
    return train, val


def load_labelled(data, held_out=False):
    """Return (training split, held-out split or None) of a labelled data set.

    Held-out labels are numbered like the training split's, further classes after those. held_out:
    there must be such a split. ValueError: there is none, no labels, or no class in common.
    """
    train, val = load(data, "train"), load(data, "val")
    if held_out and val is None and train.labels is not None:
        raise ValueError(
            f"{data!r} has no held-out split to test a classifier on: "
            "put its images into train/ and val/"
        )
    for name, images in ((repr(data), train), (f"the held-out split of {data!r}", val)):
        if images is not None and images.labels is None:
            note = f" ({images.note})" if images.note else ""
            raise ValueError(
                f"{name} has no labels: put the images of each class, two or more, into a folder "
                f"of its own{note}"
            )
    if val is None or val.classes == train.classes:
        return train, val
    unseen = [name for name in val.classes if name not in train.classes]
    if len(unseen) == len(val.classes):
        raise ValueError(
            f"{data!r}: the training split has classes {train.classes}, "
            f"the held-out one {val.classes}: none in common"
        )
    if unseen:
        names = ", ".join(map(repr, unseen))
        say(f"note: the training split lacks {names}: held-out images of it count as wrong")
    number = {name: i for i, name in enumerate(train.classes + unseen)}
    val.labels = [label if label < 0 else number[val.classes[label]] for label in val.labels]
    return train, val


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
        name = images.paths[i] if isinstance(images, Folder) else images.name(i)
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


def evenly(length, count):
    """Return the numbers of at most `count` of `length` images, spread evenly."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def are_constant(images, count=100):
    """Whether each of the first images that can be read is of one colour throughout."""
    read = 0
    for i in range(min(count, len(images))):
        try:
            image = images[i]
        except Exception:  # whatever a decoder may raise
            continue
        read += 1
        if (image != image[:, :1, :1]).any():
            return False
    return read > 0


# ---- samples and batches ----


class Samples(Dataset):
    """What `transform` makes of an image: samples[epoch, index] -> *transform(image, rng), bad.

    rng follows from (seed, epoch, index) alone. An image that cannot be read is replaced by the
    next one that can, so that a batch stays whole, and bad is its index; otherwise bad is -1.
    ValueError: ten in a row cannot be read.
    """

    def __init__(self, images, transform, seed=0):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key):
        epoch, index = key
        image, bad = read_or_next(self.images, index)
        return *self.transform(image, Random(f"{self.seed} {epoch} {index}")), bad


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
    """Say in one line why an image cannot be read; None: it can."""
    try:
        images[index]
    except Exception as error:  # whatever a decoder may raise
        return first_line(error)
    return None


class Order:
    """In what order a process sees `length` images; it follows from (seed, step) alone.

    A step takes `accumulate` batches from each of `world` processes. Together they are the next
    slice of the epoch's permutation, whatever the number of processes.
    """

    def __init__(self, length, batch, accumulate=1, rank=0, world=1, seed=0):
        self.length, self.batch, self.accumulate = length, batch, accumulate
        self.rank, self.world, self.seed = rank, world, seed
        self.global_batch = batch * accumulate * world
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
                start = i * self.global_batch + (micro * self.world + self.rank) * self.batch
                yield [(epoch, index) for index in images[start : start + self.batch].tolist()]

    def permutation(self, epoch):
        seed = Random(f"{self.seed} {epoch}").getrandbits(63)
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(seed))


def load_views(samples, batches, workers, device, bad):
    """Yield each batch as the networks see it; add the indices of what cannot be read to `bad`.

    samples: Samples of MultiCrop. batches: Order.batches(). Yields [2, b, 3, g, g] and
    [v - 2, b, 3, l, l] on the device.
    """
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=outlive_signals,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # torch's own is left to drop path
    )
    for *batch, replaced in loader:
        bad.update(replaced[replaced >= 0].tolist())
        yield views_on(device, batch)


def views_on(device, batch):
    """A loader's batch -> what the networks see: [2, b, 3, g, g] and [v - 2, b, 3, l, l]."""
    *groups, parameters = batch
    views = []
    for crops, drawn in zip(groups, parameters.split([group.shape[1] for group in groups], 1)):
        v = crops.shape[1]
        crops = rearrange(crops.to(device, non_blocking=True), "b v c h w -> (v b) c h w")
        drawn = rearrange(drawn, "b v p -> (v b) p")
        # All at once would be the same; a CPU is twice as fast on parts that its cache holds.
        part = max(1, 2**20 // crops[0].numel()) if crops.device.type == "cpu" else len(crops)
        parts = [photometry(x, p) for x, p in zip(crops.split(part), drawn.split(part))]
        views.append(rearrange(torch.cat(parts), "(v b) c h w -> v b c h w", v=v))
    return views
