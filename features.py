"""Frozen features: what a backbone makes of images ("Evaluation protocols", section 3.2).

The central crop of each image goes in, a vector comes out: the class token of the last block, those
of several blocks, or the mean patch token beside it; for retrieval (4.2.1) also the whole image,
and patch tokens pooled by GeM. However many processes share the work, every image counts once, and
what they get is in the order of the images.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from augment import normalize, random_resized_crop, resize
from backbone import architecture, trained_at
from checkpoint import load_checkpoint
from data import Folder, reduced
from distributed import agree, autocast, combine
from files import write_whole
from terminal import first_process, progress, say
from vit import ViT

MOST_PATCHES = 2**16  # of an image


# ---- how an image is fitted ----


def center_crop(image, size):
    """Evaluation's view: uint8 [3, h, w] -> [3, size, size].

    The short side is resized to 256 / 224 of size, then the middle is cut out.
    """
    h, w = image.shape[1:]
    short = size * 256 // 224
    height, width = h * short // min(h, w), w * short // min(h, w)
    top, left = round((height - size) / 2), round((width - size) / 2)
    if max(h, w) > 8 * min(h, w):  # a long strip, of which the middle alone is resized
        box = (left * w / width, top * h / height)
        box += ((left + size) * w / width, (top + size) * h / height)
        middle = to_pil_image(image).resize((size, size), Image.Resampling.BICUBIC, box)
        return pil_to_tensor(middle)
    image = resize(image, height, width)
    return image[:, top : top + size, left : left + size]


def square(image, size):
    """The whole image, its sides made equal: uint8 [3, h, w] -> [3, size, size]."""
    return resize(image, size, size)


def shrink(image, size):
    """The whole image, its long side shrunk to size pixels if it is longer: uint8 [3, h', w']."""
    scale = min(1, size / max(image.shape[1:]))
    h, w = (max(1, round(side * scale)) for side in image.shape[1:])
    return resize(image, h, w)


def usual_size(backbone):
    """Return the short side, in pixels and whole patches, at which a network is shown images.

    It is 480 / 224 of what the network was trained at: 480 for the paper's.
    """
    patches = trained_at(backbone) * 480 // 224 // backbone.patch
    return backbone.patch * max(1, patches)


def fitted_size(image, short, patch):
    """Return (height, width) of an image [c, h, w] with its short side at so many pixels.

    ValueError: it has more than MOST_PATCHES.
    """
    scale = short / min(image.shape[1:])
    h, w = (max(1, round(side * scale)) for side in image.shape[1:])
    if h * w > MOST_PATCHES * patch**2:
        raise ValueError(
            f"an image of {image.shape[2]} x {image.shape[1]} with its short side at {short} "
            f"has more than {MOST_PATCHES} patches: lower --size"
        )
    return h, w


def fit_to_patches(image, short, patch):
    """Resize uint8 [c, h, w] to a short side near short, and crop each side to whole patches.

    ValueError: it has more than MOST_PATCHES.
    """
    h, w = fitted_size(image, short, patch)
    h, w = max(patch, h), max(patch, w)
    image = resize(image, h, w)
    return image[:, : h // patch * patch, : w // patch * patch]


# ---- features ----


@dataclass(frozen=True)
class Extraction:
    """How features are extracted: where, from which tokens, by how many processes."""

    device: torch.device
    batch: int = 256
    workers: int = 0
    dtype: torch.dtype | None = None  # of autocast; None: float32
    last: int = 1  # how many blocks' class tokens
    mean_patches: bool = False  # whether the last block's mean patch token goes along
    gem: bool = False  # whether its patch tokens, pooled by GeM, go along
    fit: Callable = center_crop  # (image, size) -> what the backbone sees
    size: int | None = None  # None: what the backbone was trained at
    scales: tuple = (1.0,)  # of what the backbone sees; the features are averaged
    rank: int = 0
    world: int = 1  # processes that call together and share the images
    cache: Path | None = None  # a folder that keeps features

    def size_for(self, backbone):
        return self.size or trained_at(backbone)

    def width(self, backbone):
        """How many numbers a feature has."""
        return backbone.dim * (self.last + self.mean_patches + self.gem)


class Crops(Dataset):
    """(epoch, n) -> (n, a crop of the n-th of the given images, uint8 [3, size, size]).

    seed None: what fit(image, size) gives. Else a random resized crop, flipped or not, that follows
    from (seed, epoch, image). An image that cannot be read gives -1 in place of n.
    """

    def __init__(self, images, indices, size, seed=None, fit=center_crop):
        # Of an image reduced in decoding there remains twice what is needed, or a JPEG is whole.
        short = 2 * size * 256 // 224
        least = (short, short) if seed is None else (2 * size, 2 * size / (3 / 4 * 0.08) ** 0.5)
        self.images, self.indices, self.size = reduced(images, least), indices, size
        self.seed, self.fit = seed, fit

    def __getitem__(self, key):
        epoch, n = key
        try:
            image = self.images[self.indices[n]]
        except Exception:  # whatever a decoder may raise
            return -1, torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        if self.seed is None:
            return n, self.fit(image, self.size)
        rng = Random(f"{self.seed} {epoch} {self.indices[n]}")
        return n, random_resized_crop(image, self.size, (0.08, 1), rng)


@torch.no_grad()
def represent(backbone, crops, how):
    """uint8 crops [b, 3, h, w] -> float32 features [b, d], the mean over how.scales.

    Those are the last blocks' class tokens, each through the final norm, and if asked for the last
    block's mean patch token, or its patch tokens pooled by GeM; or what a convnet pools.
    """
    images = normalize(crops.to(how.device, non_blocking=True).float() / 255)
    patch = backbone.patch if isinstance(backbone, ViT) else 1
    features = [represent_at(backbone, scaled(images, s, patch), how) for s in how.scales]
    return torch.stack(features).mean(0)


def represent_image(backbone, image, how):
    """One image, uint8 [3, h, w], as how.fit shows it to the backbone -> its features [d]."""
    return represent(backbone, how.fit(image, how.size_for(backbone))[None], how)[0]


def scaled(images, scale, patch):
    """Scale images [b, 3, h, w], to at least a patch, and cut what is no whole patch."""
    h, w = images.shape[2:]
    if min(h, w) * scale < patch:
        size = [max(patch, int(side * scale)) for side in (h, w)]
        images = F.interpolate(images, size, mode="bilinear")
    elif scale != 1:
        images = F.interpolate(images, scale_factor=scale, mode="bilinear")
    h, w = (side // patch * patch for side in images.shape[2:])
    return images[:, :, :h, :w]


def represent_at(backbone, images, how):
    """Normalised images [b, 3, h, w] in whole patches -> features [b, d]."""
    with autocast(how.device, how.dtype):
        if not isinstance(backbone, ViT) or not (how.last > 1 or how.mean_patches or how.gem):
            return backbone(images).float()
        tokens = backbone.tokens(images, how.last).float()
    features = list(tokens[:, :, 0])
    if how.mean_patches:
        features.append(tokens[-1, :, 1:].mean(1))
    if how.gem:
        features.append(gem(tokens[-1, :, 1:]))
    return torch.cat(features, -1)


def gem(tokens, power=4):
    """Generalised mean pooling (GeM) of patch tokens [b, n, d]: [b, d]."""
    return tokens.clamp_min(1e-6).pow(power).mean(1).pow(1 / power)


def extract(backbone, images, indices, how):
    """Return the features of the given images: ([n, d] float32, indices).

    The indices returned are those of the n images that could be read, in the order given. If
    several processes call together, each reads its share and all get the whole. ValueError: no
    image can be read.
    """
    path = None
    if how.cache:
        path = how.cache / f"features-{fingerprint(backbone, images, indices, how)}.pth"
        missing = agree(int(not path.exists()))
        if not missing:
            saved = load_checkpoint(path)
            return saved["features"].to(how.device), saved["read"]

    out, read = compute(backbone, images, indices, how)
    if path and first_process() and all(read):  # an image may be mended under its name
        kept = {"features": out.cpu(), "read": indices}
        write_whole(path, lambda file: torch.save(kept, file))
    return without_unread(out, read, images, indices)


@torch.no_grad()
def compute(backbone, images, indices, how, span=None):
    """Return the features of the given images, [n, d], and whether each could be read, [n] bools.

    The processes share the images. span, for the progress of a longer work that this is part of:
    (how many images are done, of how many, since when).
    """
    out = torch.zeros(len(indices), how.width(backbone), device=how.device)
    read = torch.zeros(len(indices), device=how.device)
    before, total, start = span or (0, len(indices), time.monotonic())
    training = backbone.training
    done = 0
    backbone.eval()
    share = [(0, n) for n in range(how.rank, len(indices), how.world)]
    dataset = Crops(images, indices, how.size_for(backbone), fit=how.fit)
    pin = how.device.type == "cuda"
    loader = DataLoader(dataset, how.batch, sampler=share, num_workers=how.workers, pin_memory=pin)
    for n, crops in loader:
        good = n[n >= 0].to(how.device)
        out[good] = represent(backbone, crops[n >= 0], how)
        read[good] = 1.0
        done += how.world * len(n)
        progress("features", before + min(done, len(indices)), total, start)
    backbone.train(training)

    return combine(out, how.world), combine(read, how.world).bool().tolist()


def without_unread(out, read, images, indices):
    """Leave out the images that could not be read, and say so. ValueError: that is all of them."""
    if all(read):
        return out, indices
    first = images.name(indices[read.index(False)])
    if not any(read):
        raise ValueError(f"none of {len(indices)} images can be read, the first of them {first!r}")
    count = read.count(False)
    say(f"{count} images cannot be read and are left out, the first {first!r}", sys.stderr)
    kept = [index for index, good in zip(indices, read) if good]
    return out[torch.tensor(read, device=out.device)], kept


def fingerprint(backbone, images, indices, how):
    """Sixteen digits of what features depend on: weights, settings, names and labels of images.

    An image changed under its name is not noticed.
    """
    place = os.path.abspath(images.root) if isinstance(images, Folder) else None
    names = [images.name(i) for i in indices]
    content = made_by(backbone, how), images.classes, images.labels, place, names
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def made_by(backbone, how):
    """Sixteen digits of what makes the features of an image: weights and settings."""
    kinds = how.last, how.mean_patches, how.gem, how.fit.__name__, how.scales, how.dtype
    settings = architecture(backbone), how.size_for(backbone), kinds
    digest = hashlib.sha256(repr(settings).encode())
    for value in backbone.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def choose_labelled(labels, limit=None):
    """Return the indices of labelled images: all of them, or limit drawn at random.

    The draw is always the same. ValueError: there are none.
    """
    indices = [i for i, label in enumerate(labels) if label >= 0]
    if not indices:
        raise ValueError("no labelled images")
    if limit and limit < len(indices):
        return sorted(Random(0).sample(indices, limit))
    return indices


def labelled_features(backbone, images, how, limit=None):
    """Return (features [n, d], labels [n]) of the labelled images, or of limit of them."""
    x, read = extract(backbone, images, choose_labelled(images.labels, limit), how)
    return x, torch.tensor([images.labels[i] for i in read], device=x.device)


def probe_tokens(backbone, args):
    """Choose the tokens that the probe sees: {"last": ..., "mean_patches": ...}, as in Extraction.

    The paper takes the last four blocks' class tokens for ViT-S; for ViT-B the last one's and its
    mean patch token. So do we for a ViT with fewer than four blocks, which the paper lacks.
    """
    if not isinstance(backbone, ViT):
        return {"last": 1, "mean_patches": False}
    depth = len(backbone.blocks)
    as_vit_b = backbone.dim >= 768 or depth < 4
    last = args.last or (1 if as_vit_b else 4)
    mean_patches = as_vit_b if args.mean_patches is None else args.mean_patches
    return {"last": min(last, depth), "mean_patches": mean_patches}


def describe_tokens(backbone, last, mean_patches):
    if not isinstance(backbone, ViT):
        return "pooled features"
    blocks = "1 block" if last == 1 else f"{last} blocks"
    mean = ", mean patch token" if mean_patches else ""
    return f"class tokens of the last {blocks}{mean}"
