"""Frozen features: what a backbone makes of images ("Evaluation protocols", section 3.2).

The central crop of each image goes in, a vector comes out: the class token of the last block, those
of several blocks, or the mean patch token beside it; for retrieval (4.2.1) also the whole image,
and patch tokens pooled by GeM. Or a map of the class token's attention (4.2.2). However many
processes share the work, every image counts once, in the order of the images.
"""

import argparse
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.data import DataLoader, Dataset

from augment import normalize, random_resized_crop, resize
from util.checkpoint import RELEASED, describe, load_backbone, load_checkpoint, untrained
from util.config import add_amp_flag, add_flag, count, natural, true_or_false, usable_cores
from util.data import Files, reduced, unreadable
from util.distributed import all_reduce_max, all_reduce_sum, amp_dtype, rank0_first
from util.misc import Progress, atomic_write, is_main_process, say
from vit import ViT

MOST_PATCHES = 2**16  # of an image
KEEP_EVERY = 600  # seconds between writes of the cache


# ---- how an image is fitted ----


def center_crop(image, size):
    """Evaluation's view: uint8 [3, h, w] -> [3, size, size].

    The short side is resized to 256 / 224 of size, then the middle is cut out.
    """
    h, w = image.shape[1:]
    short = size * 256 // 224
    height, width = h * short // min(h, w), w * short // min(h, w)
    top, left = round((height - size) / 2), round((width - size) / 2)
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
    patches = backbone.img_size * 480 // 224 // backbone.patch_size
    return backbone.patch_size * max(1, patches)


def fitted_size(image, short, patch_size):
    """Return (height, width) of an image [c, h, w] with its short side at so many pixels.

    ValueError: it has more than MOST_PATCHES.
    """
    scale = short / min(image.shape[1:])
    h, w = (max(1, round(side * scale)) for side in image.shape[1:])
    if h * w > MOST_PATCHES * patch_size**2:
        raise ValueError(
            f"an image of {image.shape[2]} x {image.shape[1]} with its short side at {short} "
            f"has more than {MOST_PATCHES} patches: lower --size"
        )
    return h, w


# ---- features ----


@dataclass(frozen=True)
class Extraction:
    """How features are extracted: where, from which tokens, by how many processes."""

    device: torch.device
    batch_size: int = 256
    num_workers: int = 0
    dtype: torch.dtype | None = None  # of autocast; None: float32
    n_last_blocks: int = 1  # how many blocks' class tokens
    avgpool_patchtokens: bool = False  # whether the last block's mean patch token goes along
    gem: bool = False  # whether its patch tokens, pooled by GeM, go along
    fit: Callable = center_crop  # (image, size) -> what the backbone sees
    size: int | None = None  # None: what the backbone was trained at
    scales: tuple = (1.0,)  # of what the backbone sees; the features are averaged
    rank: int = 0
    world: int = 1  # processes that call together and share the images
    cache: Path | None = None  # a folder that keeps the features of image files

    def size_for(self, backbone):
        return self.size or backbone.img_size

    def width(self, backbone):
        """How many numbers a feature has."""
        return backbone.embed_dim * (self.n_last_blocks + self.avgpool_patchtokens + self.gem)


class Crops(Dataset):
    """(epoch, n) -> (n, a crop of the n-th of the given images, uint8 [3, size, size]).

    seed None: what fit(image, size) gives. Else a random resized crop, flipped or not, that follows
    from (seed, epoch, image). An image that cannot be read gives -1 in place of n.
    """

    def __init__(self, images, indices, size, seed=None, fit=center_crop):
        # JPEGs are decoded no smaller than twice the size that is needed.
        least = 2 * size * 256 // 224 if seed is None else 2 * size / math.sqrt(3 / 4 * 0.08)
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
        crop = random_resized_crop(image.numpy(), self.size, (0.08, 1), rng)[0]
        return n, crop.flip(-1) if rng.random() < 0.5 else crop


@torch.no_grad()
def features_of(backbone, crops, how):
    """uint8 crops [b, 3, h, w] -> float32 features [b, d], the mean over how.scales.

    Those are the last blocks' class tokens, each through the final norm, and if asked for the last
    block's mean patch token, or its patch tokens pooled by GeM; or what a convnet pools.
    """
    images = normalize(crops.to(how.device, non_blocking=True).float() / 255)
    patch_size = backbone.patch_size if isinstance(backbone, ViT) else 1
    features = [tokens_of(backbone, scaled(images, s, patch_size), how) for s in how.scales]
    return torch.stack(features).mean(0)


def scaled(images, scale, patch_size):
    """Scale images [b, 3, h, w], and cut what is no whole patch."""
    h, w = images.shape[2:]
    if scale != 1:
        images = F.interpolate(images, scale_factor=scale, mode="bilinear")
    h, w = (side // patch_size * patch_size for side in images.shape[2:])
    return images[:, :, :h, :w]


def tokens_of(backbone, images, how):
    """Normalised images [b, 3, h, w] in whole patches -> features [b, d]."""
    plain = how.n_last_blocks == 1 and not how.avgpool_patchtokens and not how.gem
    with torch.autocast(how.device.type, how.dtype, enabled=how.dtype is not None):
        if not isinstance(backbone, ViT) or plain:
            return backbone(images).float()
        tokens = backbone.get_intermediate_layers(images, how.n_last_blocks).float()
    features = list(tokens[:, :, 0])
    if how.avgpool_patchtokens:
        features.append(tokens[-1, :, 1:].mean(1))
    if how.gem:
        features.append(gem(tokens[-1, :, 1:]))
    return torch.cat(features, -1)


def gem(tokens, power=4):
    """Generalised mean pooling (GeM) of patch tokens [b, n, d]: [b, d]."""
    return tokens.clamp_min(1e-6).pow(power).mean(1).pow(1 / power)


class RawPixels(nn.Module):
    """What needs no network: the pixels themselves, [b, 3, h, w] -> [b, 3 h w]."""

    embed_dim, img_size = 3 * 32 * 32, 32

    def forward(self, images):
        return rearrange(images, "b c h w -> b (c h w)")


@torch.no_grad()
def extract_features(backbone, images, how, indices=None):
    """Return the features of the images, or of those at `indices`: ([n, d] float32, indices).

    The indices returned are those of the n images that could be read, in order. If several
    processes call together, each reads its share and all get the whole. With how.cache, what is
    known of an image file of this name, size and time of change is not computed again. ValueError:
    no image can be read.
    """
    indices = list(range(len(images))) if indices is None else indices
    out = torch.zeros(len(indices), how.width(backbone))
    known = torch.zeros(len(indices), dtype=torch.bool)
    files = []
    if how.cache and isinstance(images, Files):
        path = how.cache / f"features-{made_by(backbone, how)}.pth"
        files = [as_it_is(images.name(i)) for i in indices]
        kept = recall(path) if is_main_process() else {}
        for n, file in enumerate(files):
            if file in kept:
                out[n], known[n] = kept[file], True
    missing = (all_reduce_max(known.byte()) == 0).nonzero()[:, 0].tolist()

    training = backbone.training
    backbone.eval()
    dataset = Crops(images, indices, how.size_for(backbone), fit=how.fit)
    share = [(0, n) for n in missing[how.rank :: how.world]]
    loader = DataLoader(dataset, how.batch_size, sampler=share, num_workers=how.num_workers,
                        pin_memory=how.device.type == "cuda")  # fmt: skip
    progress, done, kept_at = Progress(len(missing)), 0, time.monotonic()
    for n, crops in loader:
        good = n[n >= 0]
        out[good], known[good] = features_of(backbone, crops[n >= 0], how).cpu(), True
        done = min(len(missing), done + how.world * len(n))
        progress.show(done, f"features {done}/{len(missing)}")
        if files and time.monotonic() - kept_at > KEEP_EVERY:
            keep(path, kept, files, out, known)
            kept_at = time.monotonic()
    backbone.train(training)

    out, known = all_reduce_sum(out), all_reduce_max(known.byte()).bool()
    if files and missing:
        keep(path, kept, files, out, known)
    return readable(out.to(how.device), known, images, indices)


def readable(out, known, images, indices):
    """Leave out the images that could not be read, and say so. ValueError: that is all of them."""
    if known.all():
        return out, indices
    bad = [index for index, good in zip(indices, known.tolist()) if not good]
    text = f"{len(bad)} of {len(indices)} images cannot be read, the first {images.name(bad[0])!r}"
    if len(bad) == len(indices):
        raise ValueError(f"{text}: {unreadable(images, bad[0])}")
    say(f"{text}; they are left out", sys.stderr)
    kept = [index for index, good in zip(indices, known.tolist()) if good]
    return out[known.to(out.device)], kept


# ---- the cache: one file for what made the features ----


def made_by(backbone, how):
    """Sixteen digits of what makes the features of an image: weights and settings."""
    kinds = how.n_last_blocks, how.avgpool_patchtokens, how.gem, how.fit.__name__, how.scales
    settings = describe(backbone), how.size_for(backbone), *kinds, how.dtype
    digest = hashlib.sha256(repr(settings).encode())
    for value in backbone.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def as_it_is(path):
    """Return a file's (path, size, time of change, inode), or zeros for one that is gone."""
    name = os.path.realpath(path)
    try:
        stat = os.stat(name)
    except OSError:
        return name, 0, 0, 0
    return name, stat.st_size, stat.st_mtime_ns, stat.st_ino  # folders may exchange names


def recall(path):
    """Return the features that are kept, {(path, size, time, inode): [d]}."""
    saved = load_checkpoint(path) if path.exists() else {"files": [], "features": []}
    return dict(zip(map(tuple, saved["files"]), saved["features"]))


def keep(path, kept, files, out, known):
    """Write the features that are known, beside those kept of files that are as they were."""
    new = {file: x for file, x, good in zip(files, out, known.tolist()) if good}
    rest = {file: x for file, x in kept.items() if file not in new and as_it_is(file[0]) == file}
    if is_main_process() and new:
        saved = {"files": [*new, *rest], "features": torch.stack([*new.values(), *rest.values()])}
        atomic_write(path, lambda file: torch.save(saved, file))


# ---- labelled images ----


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
    indices = choose_labelled(images.labels, limit)
    x, read = extract_features(backbone, images, how, indices)
    return x, torch.tensor([images.labels[i] for i in read], device=x.device)


def probe_tokens(backbone, args):
    """Choose the tokens that the probe sees: two fields of Extraction.

    The paper takes the last four blocks' class tokens for ViT-S; for ViT-B the last one's and its
    mean patch token. So do we for a ViT with fewer than four blocks, which the paper lacks.
    """
    if not isinstance(backbone, ViT):
        return {"n_last_blocks": 1, "avgpool_patchtokens": False}
    depth = len(backbone.blocks)
    as_vit_b = backbone.embed_dim >= 768 or depth < 4
    n_last_blocks = args.n_last_blocks or (1 if as_vit_b else 4)
    avgpool = as_vit_b if args.avgpool_patchtokens is None else args.avgpool_patchtokens
    return {"n_last_blocks": min(n_last_blocks, depth), "avgpool_patchtokens": avgpool}


def describe_tokens(backbone, n_last_blocks, avgpool_patchtokens):
    if not isinstance(backbone, ViT):
        return "pooled features"
    blocks = "1 block" if n_last_blocks == 1 else f"{n_last_blocks} blocks"
    mean = ", mean patch token" if avgpool_patchtokens else ""
    return f"class tokens of the last {blocks}{mean}"


# ---- attention (Figures 1, 3 and 4) ----


@torch.inference_mode()
def attention_maps(backbone, images):
    """Normalised images [b, 3, h, w] -> [b, heads, h / patch, w / patch].

    This is what the class token attends to in the last block; each map sums to less than 1, since
    some attention stays on the class token.
    """
    rows = images.shape[2] // backbone.patch_size
    attention = backbone.get_last_selfattention(images, queries=1)
    return rearrange(attention[:, :, 0, 1:], "b heads (h w) -> b heads h w", h=rows)


def keep_mass(maps, mass=0.6):
    """[..., h, w] -> bool: the fewest patches that hold the given share of each map (Figure 4)."""
    flat = rearrange(maps, "... h w -> ... (h w)").cpu().double()  # not every device has float64
    value, order = flat.sort(-1, descending=True)
    held_by_larger = value.cumsum(-1) - value
    kept = held_by_larger < mass * value.sum(-1, keepdim=True)
    kept = torch.zeros_like(kept).scatter(-1, order, kept)
    return rearrange(kept, "... (h w) -> ... h w", h=maps.shape[-2]).to(maps.device)


# ---- what the commands of evaluate.py share ----


class Subject(NamedTuple):
    """What is evaluated, and where."""

    backbone: nn.Module
    data: str | None  # a folder or a data set's name; None: the checkpoint does not say
    folder: Path  # for evaluate.jsonl and other results
    device: torch.device
    rank: int
    world: int

    def networks(self, beside):
        """{name: network}: the trained one and, if asked for, an untrained one beside it."""
        networks = {"trained": self.backbone}
        if beside:
            networks["untrained"] = untrained(self.backbone)
        return networks


def open_subject(args, device, rank, world):
    """Load the checkpoint, and say what it is. ValueError: it does not load."""
    source, folder = args.checkpoint, args.output_dir
    loaded = rank0_first(lambda: load_backbone(source, args.network, args.num_heads))
    data = args.data_path or loaded.trained_with.get("data_path")
    if folder is None:
        folder = Path(".") if source in RELEASED else Path(source).parent
    folder.mkdir(parents=True, exist_ok=True)
    writes = args.command not in ("predict", "export")
    if writes and data is None:
        raise ValueError(f"{source!r} does not say what it was trained on: give --data")
    if writes and not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write to {str(folder)!r}: choose another --output")
    say(loaded.description)
    return Subject(loaded.backbone.to(device), data, folder, device, rank, world)


def extraction(args, subject, **changes):
    """Return the Extraction that the flags of add_extraction_flags() ask for.

    ValueError: --size, where it is the side of a square, is not in whole patches.
    """
    cache = subject.folder if args.cache else None
    how = Extraction(
        subject.device, args.batch_size_per_gpu, args.num_workers,
        amp_dtype(args.amp, subject.device), size=args.size, rank=subject.rank,
        world=subject.world, cache=cache, **changes,
    )  # fmt: skip
    size, patch_size = how.size_for(subject.backbone), getattr(subject.backbone, "patch_size", 1)
    if how.fit is not shrink and size % patch_size:
        raise ValueError(f"--size {size} must be divisible by the patch, {patch_size}")
    return how


def add_extraction_flags(parser, text="side in pixels (default: the training size)", size=None):
    """Add the flags of a command that extracts features. text and size: of --size."""
    add = parser.add_argument
    add("--size", type=count, default=size, help=text)
    add("--cache", action="store_true", help="keep the features of image files in the output "
        "folder, and read those that are there")  # fmt: skip
    add_amp_flag(parser)
    add_flag(parser, "batch_size_per_gpu", type=count, default=256, help="images at a time")
    add_flag(parser, "num_workers", type=natural, default=min(2, usable_cores()),
             help="processes that read images")  # fmt: skip


def add_untrained_flag(parser, text="yes"):
    parser.add_argument("--untrained", action=argparse.BooleanOptionalAction,
                        help=f"an untrained network beside (default: {text})")  # fmt: skip


def add_token_flags(parser):
    add = parser.add_argument
    add("--n_last_blocks", type=count, help="how many blocks' class tokens (default: 4; from width "
        "768 on, or of fewer than four blocks, 1)")  # fmt: skip
    add("--avgpool_patchtokens", type=true_or_false, metavar="true|false", help="the mean patch "
        "token too (default: from width 768 on, or of fewer than four blocks)")  # fmt: skip
