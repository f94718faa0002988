"""What the features know of objects: attention as masks, labels in a film (4.2.2; tour, stop 9).

    python segment.py masks runs/laptop/last.pth         shapes: what the checkpoint was trained on
    python segment.py masks CKPT --data voc2012          a folder like VOC's, or with alpha, --masks
    python segment.py video CKPT film.gif --mask first.png      a mask carried through a film
    python segment.py davis CKPT --data path/to/DAVIS    Table 5; shapes: built-in films
    torchrun --nproc_per_node=8 segment.py davis ...     each process with its share

Video is in propagation.py, its figures in davis.py; here is Figure 4.

Each head's class-token attention in the last block is cut to 60 % of its mass and compared with
each object. The Jaccard index, intersection over union, is that of the best head for each object,
averaged over the objects. An untrained network's stands beside it.

Images are uint8 [3, h, w], maps [heads, rows, columns] of patches.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat

from augment import normalize, resize
from backbone import require_vit
from davis import evaluate_davis
from distributed import combine, in_turn
from features import fit_to_patches, fitted_size, usual_size
from masks import VOID, load_with_masks, numbers_in, resize_mask
from pictures import cut_out, draw_panels
from propagation import add_propagation_flags, carry_film
from protocol import add_flags, check_positive, run_protocol
from recipe import add_device_flag, add_network_flags, add_size_flag
from terminal import first_line, first_process, progress, run_command, say

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


def read_objects(images, i, short, patch):
    """Return (image, objects, void), uint8 [3, h, w] and bool [o, h, w] and [h, w], all fit.

    None: it shows no object. Whatever a decoder may raise: the image or its mask cannot be read.
    ValueError: it is too large, or too long a strip.
    """
    image, mask = images[i], images.mask(i)
    if mask is None:
        return None
    if mask.shape != image.shape[1:]:
        mask = resize_mask(mask, *image.shape[1:])
    image = fit_to_patches(image, short, patch)
    numbers = numbers_in(mask)
    masks = torch.stack([mask == number for number in (VOID, *numbers)])
    masks = fit_to_patches(255 * masks.byte(), short, patch) > 127
    return (image, masks[1:], masks[0]) if numbers else None


def attend_to_objects(networks, images, device, short, mass=0.6, rank=0, world=1):
    """Compare attention with objects: sums over each image's objects [images, networks, 1 + heads].

    Of the Jaccard indices, the first takes each object's best head, the others are one head's each.
    Images are fit to whole patches near short pixels, objects like them. Returns (sums, counts),
    how many objects each image has; 0: none, or it cannot be read. ValueError: that is all of them.
    """
    heads = networks[0].heads
    start = time.monotonic()
    sums = torch.zeros(len(images), len(networks), 1 + heads, dtype=torch.float64)
    counts = torch.zeros(len(images), dtype=torch.long)
    reason = ""
    for i in range(rank, len(images), world):
        progress("images", i + 1, len(images), start)
        try:
            found = read_objects(images, i, short, networks[0].patch)
        except Exception as error:  # whatever a decoder may raise
            found = None
            name, why = images.name(i), first_line(error)
            reason = reason or f" (the first that cannot be read, {name!r}: {why})"
        if found is not None:
            index = image_jaccard(networks, *found, device, mass)
            best = index.amax(2, keepdim=True)
            sums[i] = torch.cat([best, index], 2).sum(1)
            counts[i] = index.shape[1]
    sums, counts = combine(sums, world), combine(counts, world)
    if not counts.any():
        raise ValueError(
            f"none of {len(images)} images says where its objects are{reason}: take shapes, "
            "voc2012, a folder of images with an alpha channel, or --masks"
        )
    return sums, counts


def attention_masks(networks, images, device, short, mass=0.6):
    """Figure 4 in numbers: (mean over objects in per cent [networks, 1 + heads], objects, images).

    The columns are those of attend_to_objects().
    """
    sums, counts = attend_to_objects(networks, images, device, short, mass)
    return 100 * sums.sum(0) / counts.sum(), counts.sum().item(), (counts > 0).sum().item()


def kept_pixels(network, image, device, mass):
    """Return each head's mask of an image [3, h, w]: bool [heads, h, w]."""
    p = network.patch
    image = normalize(image[None].to(device).float() / 255)
    kept = keep_mass(attention_maps(network, image)[0].cpu(), mass)
    return repeat(kept, "heads h w -> heads (h p) (w q)", p=p, q=p)


def image_jaccard(networks, image, objects, void, device, mass):
    """Compare each network's heads with an image's objects: Jaccard index [networks, o, heads]."""
    rows = []
    for network in networks:
        kept = kept_pixels(network, image, device, mass)
        rows.append(jaccard(kept, objects, void).double())
    return torch.stack(rows)


def draw_masks(network, images, ranking, device, short, mass, path):
    """Draw the best and the worst three images of a ranking: an object, and its best head's mask.

    Of an image's objects it is the one that was found best, or worst.
    """
    rows = []
    best, worst = ranking[:3], ranking[3:][-3:]
    for i in best + worst:
        image, objects, void = read_objects(images, i, short, network.patch)
        objects = objects[(objects & ~void).any(-1).any(-1)]
        kept = kept_pixels(network, image, device, mass)
        index, head = jaccard(kept, objects, void).max(1)
        n = index.argmax() if i in best else index.argmin()
        rows.append({
            "image": rearrange(image, "c h w -> h w c"),
            "object": cut_out(image, objects[n]),
            f"head {head[n] + 1}: {100 * index[n]:.0f} %": cut_out(image, kept[head[n]]),
        })
    draw_panels(rows, path, "the best and the worst three, with the best head's Jaccard index")


# ---- the commands ----


def evaluate_masks(args, subject):
    """Print the table of Jaccard indices, and return its figures."""
    require_vit(subject.backbone, args.checkpoint)
    images = in_turn(lambda: load_with_masks(subject.data, args.masks))
    networks = subject.networks(args.untrained)
    short = args.size or usual_size(subject.backbone)
    device = subject.device
    sums, counts = attend_to_objects(
        list(networks.values()), images, device, short, args.mass, subject.rank, subject.world
    )
    used = (counts > 0).sum().item()
    if used < len(images):
        left = len(images) - used
        say(f"{left} of {len(images)} images show no object or cannot be read, and are left out")
    say(
        f"{subject.data}: {counts.sum()} objects in {used} images at {short} pixels, "
        f"{100 * args.mass:g} % of the attention; Jaccard index in %"
    )
    means = 100 * sums.sum(0) / counts.sum()
    titles = [f"head {i + 1}" for i in range(subject.backbone.heads)]
    say(f"{'':9}  {'best head':>9}" + "".join(f"  {title:>7}" for title in titles))
    for name, (best, *single) in zip(networks, means.tolist()):
        say(f"{name:9}  {best:9.1f}" + "".join(f"  {one:7.1f}" for one in single))

    if args.output and first_process():
        means_of = (sums[:, 0, 0] / counts).nan_to_num(-1)
        ranking = means_of.argsort(descending=True)[:used].tolist()
        path = args.output / "masks.png"
        draw_masks(subject.backbone, images, ranking, device, short, args.mass, path)
        say(f"the best and the worst of them -> {path}")
    figures = {"objects": counts.sum().item(), "images": used, "size": short, "mass": args.mass}
    figures |= {"best_head": means[0, 0].item(), "heads": means[0, 1:].tolist()}
    if args.untrained:
        figures["untrained"] = means[1, 0].item()
    return figures


def add_masks(parser):
    add_flags(parser)
    add = parser.add_argument
    add("--masks", type=Path, help="a folder of masks with the names of the images in --data")
    add("--mass", type=float, default=0.6, help="share of the attention inside (the paper's: 0.6)")
    add_size_flag(parser)
    add("--untrained", action=argparse.BooleanOptionalAction, default=True,
        help="an untrained network beside")  # fmt: skip


def add_video(parser):
    add = parser.add_argument
    add("checkpoint", help="a checkpoint, or the name of released weights")
    add("film", help="an animated GIF or WebP, a folder of frames, or shapes (built in)")
    add("--mask", type=Path, help="the first frame's mask: a palette or grey image")
    add_network_flags(parser)
    add_device_flag(parser)
    add_propagation_flags(parser)
    add("--fps", type=float, default=10, help="frames a second of a folder")
    add("--output", type=Path, help="folder for the masks and film.gif (default: FILM_masks)")
    add("--strip", type=Path, help="also draw six frames beside one another, as this PNG")


def add_davis(parser):
    add_flags(parser, nargs="?")
    add_propagation_flags(parser)
    add = parser.add_argument
    add("--year", type=int, choices=(2017, 2016), default=2017,
        help="which list of sequences; in 2016's all objects of a sequence are one")  # fmt: skip
    add("--untrained", action="store_true", help="an untrained network beside")
    add("--write", type=Path, help="folder for the masks that are carried, a palette PNG a frame")
    add("--results", type=Path, help="a folder of masks that another tool has written: these are "
        "measured, and no checkpoint is needed")  # fmt: skip


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    protocols = parser.add_subparsers(dest="protocol", required=True)
    add_masks(protocols.add_parser("masks", help="attention compared with objects (Figure 4)"))
    add_video(protocols.add_parser("video", help="a mask carried through a film"))
    add_davis(protocols.add_parser("davis", help="video object segmentation (Table 5)"))
    return parser.parse_args(argv)


def main(args):
    check_positive(args, "size")
    if args.protocol == "masks":
        check_positive(args, "mass")
        if args.mass > 1:
            raise ValueError(f"--mass {args.mass} must not be above 1")
        run_protocol(args, evaluate_masks)
    elif args.protocol == "video":
        check_positive(args, "fps")
        carry_film(args)
    else:
        if bool(args.checkpoint) == bool(args.results):
            raise ValueError("give either a checkpoint, or --results with masks that are written")
        if args.results and (args.write or args.untrained):
            raise ValueError("--results are measured as they are, without --write or --untrained")
        if args.results and not args.data:
            raise ValueError("give --data, the sequences that the results belong to")
        run_protocol(args, evaluate_davis)


if __name__ == "__main__":
    run_command(main, parse_args)
