"""Attention as masks (section 4.2.2, Figure 4; tour, stop 9), and the files that masks lie in.

    python evaluate.py masks runs/laptop/last.pth       shapes: what the checkpoint was trained on
    python evaluate.py masks CKPT --data voc2012        or a folder like VOC's, images with alpha,
                                                        images and --masks FOLDER

Each head's class-token attention in the last block is cut to 60 % of its mass and compared with
each object. The Jaccard index, intersection over union, is that of the best head for each object,
averaged over the objects. An untrained network's stands beside it.

A mask is uint8 [h, w]: 0 for the background, 1, 2, ... for objects, 255 (void) for what is left
open. A palette image, whose color 0 is black, and a gray one hold these numbers; in a gray one of
black and white alone, white is the object. One whose values may be brightness is refused: more than
MOST_VALUES of them, or 255 beside others above MOST_VALUES.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import einsum, repeat
from PIL import ExifTags, Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from augment import normalize, resize
from evaluation.features import (
    add_untrained_flag,
    attention_maps,
    fitted_size,
    keep_mass,
    usual_size,
)
from util.checkpoint import require_vit
from util.config import count, positive_share
from util.data import Folder, load
from util.distributed import all_reduce_sum, rank0_first
from util.misc import atomic_write, first_line, say, track

MOST_VALUES = 32
VOID = 255


# ---- mask files ----


def read_mask(path):
    """Read a mask: (uint8 [h, w], its palette or None). ValueError: it is no mask."""
    try:
        with Image.open(path) as image:
            mode, palette = image.mode, image.getpalette()
            mask = pil_to_tensor(image.convert("L") if mode == "1" else image)[0]
    except Exception as error:  # whatever a decoder may raise
        raise ValueError(f"cannot read the mask {str(path)!r}: {error}") from None
    no_mask = f"{str(path)!r} is no mask"
    if mode not in ("1", "L", "P"):
        raise ValueError(f"{no_mask}: neither a palette image nor a gray one of 8 bits, but {mode}")
    if palette and any(palette[:3]):
        raise ValueError(f"{no_mask}: color 0 of its palette, the background, is not black")
    if palette:
        return mask, palette
    values = set(mask.unique().tolist())
    if values <= {0, 255}:
        return (mask == 255).byte(), None
    if len(values) > MOST_VALUES or (255 in values and max(values - {255}) > MOST_VALUES):
        raise ValueError(f"{no_mask}: its gray values may be brightness; make it black and white, "
                         "or number its objects 1, 2, ...")  # fmt: skip
    return mask, None


def numbers_in(mask):
    """Return the numbers of the objects in a mask, in order."""
    return [number for number in mask.unique().tolist() if 0 < number < VOID]


def same_shape(mask, h, w):
    """Return whether a mask has the shape of h x w pixels, up to scale and rounding."""
    mask_h, mask_w = mask.shape
    return abs(mask_w - w * mask_h / h) <= 1 or abs(mask_h - h * mask_w / w) <= 1


def resize_mask(mask, height, width):
    """Resize a mask, each pixel from the nearest one."""
    return F.interpolate(mask[None, None], (height, width), mode="nearest-exact")[0, 0]


def write_mask(path, mask, palette):
    """Write a mask as a palette PNG. palette: 256 colors, their values in a row."""
    image = to_pil_image(mask)
    image.putpalette(palette)
    atomic_write(path, lambda file: image.save(file, "PNG"))


def voc_palette():
    """Pascal VOC's colors, DAVIS's too: the bits of a number in turn go to red, green and blue."""
    palette = []
    for number in range(256):
        color = [0, 0, 0]
        for bit in range(8):
            color[bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
        palette += color
    return palette


class MaskedFolder(Folder):
    """The images of a folder that have a mask of the same name in another.

    names: those to take (default: all). ValueError: there is none.
    """

    def __init__(self, root, masks, names=None):
        super().__init__(root)
        self.masks = {Path(path).with_suffix(""): path for path in Folder(masks).paths}
        self.masks_root, self.labels, self.classes, self.note = Path(masks), None, None, None
        known = self.masks.keys() if names is None else self.masks.keys() & set(map(Path, names))
        every = self.paths
        self.paths = [path for path in every if Path(path).with_suffix("") in known]
        self.unmasked = [path for path in every if Path(path).with_suffix("") not in known]
        if not self.paths:
            raise ValueError(f"no image below {str(root)!r} has a mask in {str(masks)!r}")

    def mask(self, i):
        """Return an image's mask, turned like it by EXIF if it has the shape only as stored."""
        mask, _ = read_mask(self.masks_root / self.masks[Path(self.paths[i]).with_suffix("")])
        with Image.open(self.name(i)) as image:
            turn, (w, h) = image.getexif().get(ExifTags.Base.Orientation, 1), image.size
        if turn < 5 or same_shape(mask, w, h) or not same_shape(mask, h, w):
            return mask
        picture = to_pil_image(mask)
        picture.getexif()[ExifTags.Base.Orientation] = turn
        return pil_to_tensor(ImageOps.exif_transpose(picture))[0]


def load_with_masks(data, masks=None):
    """Open images that say where their objects are, held-out ones if there are such.

    data: as for load(), or a folder in Pascal VOC's layout. masks: a folder of masks of the same
    names. ValueError: no such source, or nothing in it.
    """
    if masks:
        return MaskedFolder(data, masks)
    root = Path(data)
    for kind in ("SegmentationObject", "SegmentationClass"):
        if (root / "JPEGImages").is_dir() and (root / kind).is_dir():
            listed = root / "ImageSets" / "Segmentation" / "val.txt"
            names = listed.read_text().split() if listed.exists() else None
            return MaskedFolder(root / "JPEGImages", root / kind, names)
    return load(data, "val") or load(data, "train")


# ---- attention against objects ----


def jaccard(masks, objects, void):
    """Intersection over union of masks [heads, h, w] with objects [o, h, w]: [o', heads].

    Pixels in void [h, w] do not count, and objects with no other pixel are left out.
    """
    masks, objects = (masks & ~void).float(), (objects & ~void).float()
    objects = objects[objects.sum((1, 2)) > 0]
    intersection = einsum(masks, objects, "heads h w, o h w -> o heads")
    union = masks.sum((1, 2)) + objects.sum((1, 2))[:, None] - intersection
    return intersection / union


def fit_to_patches(image, short, patch_size):
    """Resize uint8 [c, h, w] to a short side near short, and crop each side to whole patches.

    ValueError: it has more than MOST_PATCHES.
    """
    h, w = (max(patch_size, side) for side in fitted_size(image, short, patch_size))
    image = resize(image, h, w)
    return image[:, : h // patch_size * patch_size, : w // patch_size * patch_size]


def fit_objects(image, mask, short, patch_size):
    """Return (image, objects, void), uint8 [3, h, w] and bool [o, h, w] and [h, w], all fit.

    None: it shows no object. ValueError: the mask is of another shape than the image, up to scale.
    """
    h, w = image.shape[1:]
    if not same_shape(mask, h, w):
        raise ValueError(
            f"it is of {w} x {h} pixels, its mask of {mask.shape[1]} x {mask.shape[0]}"
        )
    mask = resize_mask(mask, h, w)
    image = fit_to_patches(image, short, patch_size)
    numbers = numbers_in(mask)
    masks = torch.stack([mask == number for number in (VOID, *numbers)])
    masks = fit_to_patches(255 * masks.byte(), short, patch_size) > 127
    return (image, masks[1:], masks[0]) if numbers else None


def kept_pixels(network, image, device, mass):
    """Return each head's mask of an image [3, h, w]: bool [heads, h, w]."""
    p = network.patch_size
    image = normalize(image[None].to(device).float() / 255)
    kept = keep_mass(attention_maps(network, image)[0].cpu(), mass)
    return repeat(kept, "heads h w -> heads (h p) (w q)", p=p, q=p)


def attention_masks(networks, images, device, short, mass=0.6, rank=0, world=1):
    """Compare attention with objects: sums over each image's objects [images, networks, 1 + heads].

    Of the Jaccard indices, the first takes each object's best head, the others are one head's each.
    Images are fit to whole patches near short pixels, objects like them. Returns (sums, counts),
    how many objects each image has; 0: none, or it cannot be read. ValueError: that is all of them.
    """
    sums = torch.zeros(len(images), len(networks), 1 + networks[0].num_heads, dtype=torch.double)
    counts = torch.zeros(len(images), dtype=torch.long)
    reason, patch_size = "", networks[0].patch_size
    for i in track(range(rank, len(images), world), "images", math.ceil(len(images) / world)):
        try:
            image, mask = images[i], images.mask(i)
        except Exception as error:  # whatever a decoder may raise
            why = f"{images.name(i)!r}: {first_line(error)}"
            reason = reason or f" (the first that cannot be read, {why})"
            continue
        try:
            found = None if mask is None else fit_objects(image, mask, short, patch_size)
        except ValueError as error:
            raise ValueError(f"{images.name(i)!r}: {error}") from None
        if found:
            image, objects, void = found
            kept = [kept_pixels(network, image, device, mass) for network in networks]
            index = torch.stack([jaccard(masks, objects, void).double() for masks in kept])
            best = index.amax(2, keepdim=True)
            sums[i], counts[i] = torch.cat([best, index], 2).sum(1), index.shape[1]
    sums, counts = all_reduce_sum(sums), all_reduce_sum(counts)
    if not counts.any():
        raise ValueError(
            f"none of {len(images)} images says where its objects are{reason}: take shapes, "
            "voc2012, a folder of images with an alpha channel, or --masks"
        )
    return sums, counts


def add_flags(parser, command):
    add = parser.add_argument
    add("--masks", type=Path, help="a folder of masks with the names of the images in --data")
    add("--mass", type=positive_share, default=0.6, help="share of the attention (the paper's 0.6)")
    add("--size", type=count, help="short side in pixels (default: 480/224 of the training size, "
        "480 for the paper's)")  # fmt: skip
    add_untrained_flag(parser)


def evaluate(args, subject):
    """Print the table of Jaccard indices, and return its figures."""
    backbone, device = require_vit(subject.backbone), subject.device
    images = rank0_first(lambda: load_with_masks(subject.data, args.masks))
    networks = subject.networks(args.untrained is not False)
    short = args.size or usual_size(backbone)
    several = list(networks.values())
    sums, counts = attention_masks(
        several, images, device, short, args.mass, subject.rank, subject.world
    )
    used = (counts > 0).sum().item()
    if used < len(images):
        left = len(images) - used
        say(f"{left} of {len(images)} images show no object or cannot be read, and are left out")
    say(
        f"{subject.data}: {counts.sum()} objects in {used} images at {short} pixels, "
        f"{100 * args.mass:g} % of the attention; Jaccard index in %"
    )
    means = dict(zip(networks, (100 * sums.sum(0) / counts.sum()).tolist()))
    titles = [f"head {i + 1}" for i in range(backbone.num_heads)]
    say(f"{'':9}  {'best head':>9}" + "".join(f"  {title:>7}" for title in titles))
    for name, (best, *single) in means.items():
        say(f"{name:9}  {best:9.1f}" + "".join(f"  {one:7.1f}" for one in single))
    settings = {"objects": counts.sum().item(), "images": used, "size": short, "mass": args.mass}
    return settings | means
