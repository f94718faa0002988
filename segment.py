"""What the features know of objects: the class token's attention as masks (4.2.2, Figure 4).

    python segment.py masks runs/laptop/last.pth         shapes: what the checkpoint was trained on
    python segment.py masks CKPT --data voc2012          or images with an alpha channel
    torchrun --nproc_per_node=8 segment.py masks ...     each process with its share of the images

Each head's class-token attention in the last block is cut to 60 % of its mass and compared with
each object. The Jaccard index, intersection over union, is that of the best head for each object,
averaged over the objects. An untrained network's stands beside it.

Images are uint8 [3, h, w], maps [heads, rows, columns] of patches.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat

from augment import normalize, resize
from backbone import describe, trained_at
from data import load
from distributed import combine, in_turn
from protocol import add_flags, check_positive, run_protocol
from terminal import progress, run_command, say
from vit import ViT

MOST_PATCHES = 2**16  # of an image

# ---- attention as maps ----


@torch.inference_mode()
def attention_maps(backbone, images):
    """Normalised images [b, 3, h, w] -> [b, heads, h / patch, w / patch].

    This is what the class token attends to in the last block; each map sums to less than 1, since
    some attention stays on the class token.
    """
    rows = images.shape[2] // backbone.patch
    attention = backbone.attention(images, queries=1)
    return rearrange(attention[:, :, 0, 1:], "b heads (h w) -> b heads h w", h=rows)


def keep_mass(maps, mass=0.6):
    """[..., h, w] -> bool: the fewest patches that hold the given share of each map (Figure 4)."""
    flat = rearrange(maps, "... h w -> ... (h w)").cpu().double()  # not every device has float64
    value, order = flat.sort(-1, descending=True)
    held_by_larger = value.cumsum(-1) - value
    kept = held_by_larger < mass * value.sum(-1, keepdim=True)
    kept = torch.zeros_like(kept).scatter(-1, order, kept)
    return rearrange(kept, "... (h w) -> ... h w", h=maps.shape[-2]).to(maps.device)


def usual_size(backbone):
    """Return the short side, in pixels and whole patches, at which a network is shown images.

    It is 480 / 224 of what the network was trained at: 480 for the paper's.
    """
    patches = trained_at(backbone) * 480 // 224 // backbone.patch
    return backbone.patch * max(1, patches)


def attend(backbone, image, short=None):
    """Return the attention maps of a uint8 image [3, h, w] of any size, on the host.

    The image is resized to the short side given (default: usual_size) and its last patches are
    filled up with the edge's pixels. Returns (maps, (y, x)), where y and x are the share of the
    maps that the image covers. ValueError: it has more than MOST_PATCHES.
    """
    patch = backbone.patch
    h, w = fitted_size(image, short or usual_size(backbone), patch)
    x = resize(image, h, w)[None].to(backbone.cls_token.device)
    down, right = -h % patch, -w % patch
    x = F.pad(normalize(x.float() / 255), (0, right, 0, down), mode="replicate")
    return attention_maps(backbone, x)[0].cpu(), (h / (h + down), w / (w + right))


# ---- masks against objects ----


def jaccard(masks, objects, void):
    """Intersection over union of masks [heads, h, w] with objects [o, h, w]: [o', heads].

    Pixels in void [h, w] do not count, and objects with no other pixel are left out.
    """
    masks, objects = (masks & ~void).float(), (objects & ~void).float()
    objects = objects[objects.sum((1, 2)) > 0]
    intersection = einsum(masks, objects, "heads h w, o h w -> o heads")
    union = masks.sum((1, 2)) + objects.sum((1, 2))[:, None] - intersection
    return intersection / union


def fit_to_patches(image, short, patch):
    """Resize uint8 [c, h, w] to a short side near short, and crop each side to whole patches.

    ValueError: it has more than MOST_PATCHES.
    """
    h, w = fitted_size(image, short, patch)
    h, w = max(patch, h), max(patch, w)
    image = resize(image, h, w)
    return image[:, : h // patch * patch, : w // patch * patch]


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


def read_objects(images, i, short, patch):
    """Return (image, objects, void), uint8 [3, h, w] and bool [o, h, w] and [h, w], all fit.

    None: the image cannot be read, is too long a strip, or shows no object.
    """
    try:
        image, numbers = images[i], images.mask(i)
        if numbers is None:
            return None
        image = fit_to_patches(image, short, patch)
        present = [number for number in numbers.unique().tolist() if 0 < number < 255]
        masks = torch.stack([numbers == number for number in (255, *present)])
        masks = fit_to_patches(255 * masks.byte(), short, patch) > 127
    except Exception:  # whatever a decoder may raise
        return None
    return (image, masks[1:], masks[0]) if present else None


def attention_masks(networks, images, device, short, mass=0.6, rank=0, world=1):
    """Figure 4 in numbers: (Jaccard index in per cent [networks, 1 + heads], objects, images).

    It is the mean over objects. The first column takes each object's best head, the others are one
    head's each. Images are fit to whole patches near short pixels, objects like them; images
    without objects are left out.
    ValueError: no image shows an object.
    """
    heads, start = networks[0].heads, time.monotonic()
    sums = torch.zeros(len(images), len(networks), 1 + heads, dtype=torch.float64)
    counts = torch.zeros(len(images), dtype=torch.long)
    for i in range(rank, len(images), world):
        progress("images", i + 1, len(images), start)
        found = read_objects(images, i, short, networks[0].patch)
        if found is not None:
            index = image_jaccard(networks, *found, device, mass)
            best = index.amax(2, keepdim=True)
            sums[i] = torch.cat([best, index], 2).sum(1)
            counts[i] = index.shape[1]
    sums, counts = combine(sums, world), combine(counts, world)
    if not counts.any():
        raise ValueError(
            f"none of {len(images)} images says where its objects are: "
            "take shapes, voc2012, or images with an alpha channel"
        )
    return 100 * sums.sum(0) / counts.sum(), counts.sum().item(), (counts > 0).sum().item()


def image_jaccard(networks, image, objects, void, device, mass):
    """Compare each network's heads with an image's objects: Jaccard index [networks, o, heads]."""
    patch = networks[0].patch
    image = normalize(image[None].to(device).float() / 255)
    rows = []
    for network in networks:
        kept = keep_mass(attention_maps(network, image)[0].cpu(), mass)
        kept = repeat(kept, "heads h w -> heads (h p) (w q)", p=patch, q=patch)
        rows.append(jaccard(kept, objects, void).double())
    return torch.stack(rows)


# ---- the command ----


def evaluate_masks(args, subject):
    """Print the table of Jaccard indices, and return its figures."""
    if not isinstance(subject.backbone, ViT):
        kind = describe(subject.backbone)
        raise ValueError(f"{args.checkpoint} is a {kind}: a convnet has no attention")
    images = in_turn(lambda: load(subject.data, "val") or load(subject.data, "train"))
    networks = subject.networks(args.untrained)
    short = args.size or usual_size(subject.backbone)
    rank, world = subject.rank, subject.world
    means, objects, used = attention_masks(
        list(networks.values()), images, subject.device, short, args.mass, rank, world
    )
    if used < len(images):
        left = len(images) - used
        say(f"{left} of {len(images)} images show no object or cannot be read, and are left out")
    say(
        f"{subject.data}: {objects} objects in {used} images at {short} pixels, "
        f"{100 * args.mass:g} % of the attention; Jaccard index in %"
    )
    titles = [f"head {i + 1}" for i in range(subject.backbone.heads)]
    say(f"{'':9}  {'best head':>9}" + "".join(f"  {title:>7}" for title in titles))
    for name, (best, *single) in zip(networks, means.tolist()):
        say(f"{name:9}  {best:9.1f}" + "".join(f"  {one:7.1f}" for one in single))

    figures = {"objects": objects, "images": used, "size": short, "mass": args.mass}
    figures |= {"best_head": means[0, 0].item(), "heads": means[0, 1:].tolist()}
    if args.untrained:
        figures["untrained"] = means[1, 0].item()
    return figures


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("protocol", choices=("masks",))
    add_flags(parser)
    add("--mass", type=float, default=0.6, help="share of the attention inside (the paper's: 0.6)")
    add("--size", type=int, help="short side in pixels (default: 480/224 of the training size, "
        "480 for the paper's)")  # fmt: skip
    add("--untrained", action=argparse.BooleanOptionalAction, default=True,
        help="an untrained network beside")  # fmt: skip
    return parser.parse_args(argv)


def main(args):
    check_positive(args, "size", "mass")
    if args.mass > 1:
        raise ValueError(f"--mass {args.mass} must not be above 1")
    run_protocol(args, evaluate_masks)


if __name__ == "__main__":
    run_command(main, parse_args)
