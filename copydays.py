"""Copy detection on Copydays, or on copies that are made here (section 4.2.1, Table 4).

    python retrieve.py copydays CKPT --data COPYDAYS [--distractors FOLDER] [--whitening FOLDER]
    python retrieve.py copydays CKPT --data shapes       copies of these images, made here

COPYDAYS holds original/ and blocks of copies: strong/, jpegqual/3, ..., crops/10, .... A copy
belongs to the original whose name has the same first four characters; it is looked for among the
originals and the distractors. The feature is the class token and the patch tokens pooled by GeM, of
the image resized to a square, whitened if asked for. Mean average precision is over all ranks,
where the reference code stops at 20, and whitening takes the covariance around the mean, where the
reference code takes it around 0.
"""

import io
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms.functional import to_pil_image

from backbone import RawPixels
from data import Files, Folder, load
from decode import to_tensor
from distributed import in_turn
from features import extract, square
from protocol import extraction
from ranking import mean_average_precision
from terminal import say
from vit import ViT

MADE = 1000  # originals at most, of which copies are made


# ---- copies made here ----


def crop(image):
    """Cut the middle out, half of the image's area."""
    w, h = image.size
    return ImageOps.crop(image, (round(0.15 * w), round(0.15 * h)))


def jpeg(image):
    """Compress at quality 10."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=10)
    return Image.open(file)


def grey(image):
    return image.convert("L")


def blur(image):
    """Blur by 2 % of the long side."""
    return image.filter(ImageFilter.GaussianBlur(0.02 * max(image.size)))


class Copies:
    """Copies of images, each changed by change(PIL image) -> PIL image."""

    labels = classes = None

    def __init__(self, images, change):
        self.images, self.change = images, change

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return to_tensor(self.change(to_pil_image(self.images[i])))

    def name(self, i):
        return f"{self.images.name(i)}, {self.change.__name__}"


# ---- the benchmark ----


class Block(NamedTuple):
    """Copies, and the number of the original of each."""

    images: object
    originals: list


def open_copydays(data):
    """Open a folder in Copydays' layout: (originals, {name: Block}).

    ValueError: there are no originals or no copies, two originals begin alike, or a copy has none.
    """
    root = Path(data)
    originals = Files(files_below(root / "original"))
    number = {}
    for i, path in enumerate(originals.paths):
        if path.name[:4] in number:
            first = originals.paths[number[path.name[:4]]]
            raise ValueError(
                f"{str(first)!r} and {str(path)!r} begin with the same four characters, which say "
                "what a copy's original is"
            )
        number[path.name[:4]] = i
    blocks = {}
    for path in files_below(root):
        if root / "original" in path.parents:
            continue
        if path.name[:4] not in number:
            raise ValueError(f"{str(path)!r} is a copy of no image in original/")
        name = path.parent.relative_to(root).as_posix()
        block = blocks.setdefault(name, Block(Files([]), []))
        block.images.paths.append(path)
        block.originals.append(number[path.name[:4]])
    if not blocks:
        raise ValueError(f"{data!r} holds originals, but no copies of them")
    return originals, blocks


def files_below(folder):
    return [folder / name for name in Folder(folder).paths]


def make_copies(images):
    """Return the blocks of copies of the first images, made here."""
    count = min(MADE, len(images))
    made = {change.__name__: Copies(images, change) for change in (crop, jpeg, blur, grey)}
    return {name: Block(copies, list(range(count))) for name, copies in made.items()}


def whitening(features):
    """Learn a whitening from features [n, d]: a function of features [m, d].

    Each principal component is divided by the root of its eigenvalue, at least 1e-5 of the largest.
    ValueError: all features are the same.
    """
    x = features.double()
    mean = x.mean(0)
    value, vector = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    if value.max() <= 0:
        raise ValueError("a whitening needs images whose features differ")
    scaled = vector / value.clamp_min(1e-5 * value.max()).sqrt()
    return lambda features: ((features.double() - mean) @ scaled).float()


def detect_copies(backbone, originals, count, blocks, distractors, learned_from, how):
    """Look for each copy's original, and return each block's mAP in per cent: {name: mAP}.

    count: how many of the originals are looked for. distractors, and the images that a whitening is
    learned from, may be None.
    """

    def features_of(images, count=None):
        return extract(backbone, images, list(range(count or len(images))), how)

    database, read = features_of(originals, count)
    place = {number: [n] for n, number in enumerate(read)}  # of an original in the database
    if distractors:
        database = torch.cat([database, features_of(distractors)[0]])
    if learned_from:
        whiten = whitening(features_of(learned_from)[0])
        database = whiten(database)
    figures = {}
    for name, block in blocks.items():
        queries, read = features_of(block.images, len(block.originals))
        if learned_from:
            queries = whiten(queries)
        positives = [place.get(block.originals[i], []) for i in read]
        figures[name] = mean_average_precision(queries, database, positives)
    return figures


def evaluate_copydays(args, subject):
    """Print each block's mean average precision, and return them."""
    made = not (Path(subject.data) / "original").is_dir()
    if made:
        originals = in_turn(lambda: load(subject.data, "val") or load(subject.data, "train"))
        blocks = make_copies(originals)
        count = len(blocks["crop"].originals)
        say(f"{subject.data} has no folder original/: copies of {count} images are made here")
    else:
        originals, blocks = in_turn(lambda: open_copydays(subject.data))
        count = len(originals)
    distractors = in_turn(lambda: Folder(args.distractors)) if args.distractors else None
    learned_from = in_turn(lambda: Folder(args.whitening)) if args.whitening else None

    is_vit = isinstance(subject.backbone, ViT)
    how = replace(extraction(args, subject), fit=square, size=args.size, gem=is_vit)
    size = how.size_for(subject.backbone)
    width = how.width(subject.backbone)
    if is_vit and size % subject.backbone.patch:
        raise ValueError(f"--size {size} must be divisible by the patch, {subject.backbone.patch}")
    if learned_from and len(learned_from) < width:
        say(f"note: a whitening of {width} dimensions is learned from {len(learned_from)} images")
    beside = made if args.untrained is None else args.untrained
    networks = {name: (network, how) for name, network in subject.networks(beside).items()}
    if made:
        networks["raw pixels"] = RawPixels(), replace(how, size=None, gem=False)
    columns = {}
    for name, (network, how_seen) in networks.items():
        columns[name] = detect_copies(
            network, originals, count, blocks, distractors, learned_from, how_seen
        )

    others = f" among {len(distractors)} distractors" if distractors else ""
    say(f"{subject.data}: {count} originals{others}; mean average precision in %")
    say(f"{'':16}  copies" + "".join(f"  {name:>10}" for name in columns))
    for name, block in blocks.items():
        row = "".join(f"  {column[name]:10.1f}" for column in columns.values())
        say(f"{name:16}  {len(block.originals):6}{row}")
    settings = {"size": size, "gem": how.gem, "dtype": str(how.dtype)}
    settings["whitening"] = args.whitening and str(args.whitening)
    return settings | {"originals": count, "distractors": len(distractors or ()), **columns}
