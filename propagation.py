"""Labels carried through a video by frozen features, without training (section 4.2.2, Table 5).

    python segment.py video CKPT film.gif --mask first.png

The patch tokens of the last block say which patches look alike. A frame's labels are a mixture of
those of the first frame and of the few before it:

    affinity(i, j) = exp(cos(token i, token j) / 0.1)    for patches j not far from i
    label(i) = sum over the 5 patches j of all sources with the largest affinity, normalised

Frames are resized to whole patches, the short side as asked for and the long side rounded down: at
480 pixels or more to multiples of 64, as the reference code does it. Nothing is cut off. Only the
sources are kept, however long the film is. Axes: s sources, h w patches, d width, c labels.
"""

import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from PIL import Image

from augment import normalize, resize
from backbone import require_vit
from checkpoint import load_backbone
from distributed import usable_device
from features import fitted_size, usual_size
from files import whole_folder
from film import Film, write_gif
from masks import VOID, numbers_in, read_mask, resize_mask, voc_palette, write_mask
from pictures import draw_panels, tint
from shapes import ShapesFilm
from terminal import progress, say

MOST_AFFINITIES = 2**24  # computed at once: 64 MB


class Propagation(NamedTuple):
    """How labels are carried: the paper's values."""

    context: int = 7  # frames before, besides the first
    radius: int = 12  # patches, in either direction; 0: no limit
    nearest: int = 5
    temperature: float = 0.1


def frame_size(image, short, patch):
    """Return (height, width) at which a network sees a frame: whole patches."""
    h, w = fitted_size(image, short, patch)
    unit = 64 if short >= 480 and 64 % patch == 0 else patch
    if h > w:
        h = h // unit * unit
    else:
        w = w // unit * unit
    return max(patch, h // patch * patch), max(patch, w // patch * patch)


@torch.inference_mode()
def patch_features(backbone, image, short):
    """Return the last block's patch tokens, normalised, of uint8 [3, height, width]: [h, w, d]."""
    height, width = frame_size(image, short, backbone.patch)
    x = resize(image, height, width)[None].to(backbone.cls_token.device)
    tokens = backbone.tokens(normalize(x.float() / 255))[0, 0, 1:]
    return rearrange(F.normalize(tokens, dim=-1), "(h w) d -> h w d", h=height // backbone.patch)


def mix_labels(query, keys, labels, how):
    """Return a frame's soft labels [h, w, c]: query [h, w, d], keys [s, h, w, d], labels likewise.

    It goes through the frame in blocks of rows, each with the rows around it alone, so that the
    whole matrix of affinities never exists.
    """
    s, h, w, _ = keys.shape
    reach = how.radius or max(h, w)
    rows = max(1, MOST_AFFINITIES // (s * w * w * min(h, 2 * reach + 1)))
    place = torch.arange(max(h, w), device=query.device)
    near = (place[:, None] - place).abs() <= reach
    mixed = []
    for top in range(0, h, rows):
        bottom = min(h, top + rows)
        first, last = max(0, top - reach), min(h, bottom + reach)
        cosine = einsum(query[top:bottom], keys[:, first:last], "y x d, s i j d -> y x s i j")
        near_rows = rearrange(near[top:bottom, first:last], "y i -> y 1 1 i 1")
        near_columns = rearrange(near[:w, :w], "x j -> 1 x 1 1 j")
        cosine.masked_fill_(~(near_rows & near_columns), -torch.inf)
        cosine = rearrange(cosine, "y x s i j -> y x (s i j)")
        value, index = cosine.topk(min(how.nearest, cosine.shape[-1]))
        weight = (value / how.temperature).softmax(-1)  # exp, then normalised
        sources = rearrange(labels[:, first:last], "s i j c -> (s i j) c")
        mixed.append(einsum(weight, sources[index], "y x k, y x k c -> y x c"))
    return torch.cat(mixed)


@torch.inference_mode()
def carry_mask(backbone, frames, first, short, how=Propagation()):
    """Carry the first frame's mask through a film: yield each frame's, uint8 [height, width].

    frames: an iterable of uint8 [3, height, width]; the first mask is given back as it is. What it
    leaves open (255) counts as background, and an object that is in the middle of no patch is lost.
    ValueError: no object, or a frame of another size than the mask.
    """
    numbers = torch.tensor([0, *numbers_in(first)], dtype=torch.uint8)
    if len(numbers) == 1:
        raise ValueError("the first mask shows no object")
    for t, image in enumerate(frames):
        if image.shape[1:] != first.shape:
            raise ValueError(
                f"frame {t + 1} is of {image.shape[2]} x {image.shape[1]} pixels, "
                f"the first mask of {first.shape[1]} x {first.shape[0]}"
            )
        features = patch_features(backbone, image, short)
        if t == 0:
            soft = soft_labels(first, numbers, features)
            keys = repeat(features, "h w d -> s h w d", s=1 + how.context).clone()
            labels = repeat(soft, "h w c -> s h w c", s=1 + how.context).clone()
            yield first
            continue
        # the first frame's stay in front, and the oldest of the others makes room
        used = 1 + min(t - 1, how.context)
        soft = mix_labels(features, keys[:used], labels[:used], how)
        if how.context:
            slot = 1 + (t - 1) % how.context
            keys[slot], labels[slot] = features, soft
        yield numbers[harden(soft, backbone.patch, first.shape).long().cpu()]


def soft_labels(mask, numbers, features):
    """Return a mask's labels at the middle of each patch, one-hot: [h, w, c], as features are."""
    grid = resize_mask(mask, *features.shape[:2])
    grid[grid == VOID] = 0
    return (grid[..., None] == numbers).to(features)


def harden(labels, patch, size):
    """Soft labels [h, w, c] -> the index of the strongest in each pixel, [height, width].

    They are upsampled to pixels of what the network saw, each label's map is stretched to 0..1,
    and the strongest is taken to the film's size.
    """
    maps = rearrange(labels, "h w c -> 1 c h w")
    maps = F.interpolate(maps, scale_factor=patch, mode="bilinear")[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stretched = torch.where(high > low, (maps - low) / (high - low), maps)
    return resize_mask(stretched.argmax(0).byte(), *size)


# ---- the command ----


def add_propagation_flags(parser):
    paper = Propagation()
    add = parser.add_argument
    add("--size", type=int, help="short side in pixels (default: 480/224 of the training size, "
        "480 for the paper's)")  # fmt: skip
    add("--context", type=int, default=paper.context,
        help="frames before that labels come from, besides the first (the paper's: 7)")  # fmt: skip
    add("--radius", type=int, default=paper.radius,
        help="how many patches away they may lie (the paper's: 12; 0: anywhere)")  # fmt: skip
    add("--nearest", type=int, default=paper.nearest, help="patches mixed (the paper's: 5)")
    add("--temperature", type=float, default=paper.temperature,
        help="of the affinity (the paper's: 0.1)")  # fmt: skip


def propagation_of(args):
    """Return the Propagation that the flags ask for. ValueError: a value that makes no sense."""
    for flag, least in (("context", 0), ("radius", 0), ("nearest", 1), ("temperature", 1e-3)):
        if not least <= getattr(args, flag) < float("inf"):
            raise ValueError(f"--{flag} {getattr(args, flag)} must be at least {least}")
    return Propagation(args.context, args.radius, args.nearest, args.temperature)


def open_film(args):
    """Return (film, first mask, its palette). ValueError: there is none, or only one frame."""
    if args.film == "shapes":
        film = ShapesFilm(1)
        frames = [(f"{t:05}", film[t], 100) for t in range(len(film))]
    else:
        frames = Film(Path(args.film), args.fps)
    if len(frames) < 2:
        raise ValueError(f"{args.film!r} has one frame: a mask is carried to the next ones")
    if args.mask:
        first, palette = read_mask(args.mask)
        return frames, first, palette or voc_palette()
    if args.film == "shapes":
        return frames, film.mask(0), voc_palette()
    raise ValueError("give the first frame's mask with --mask")


def write_masks(film, masks, folder, palette):
    """Write each frame's mask into a folder, and yield (PIL image with the objects tinted, ms)."""
    start = time.monotonic()
    for t, ((name, image, duration), mask) in enumerate(zip(film, masks)):
        write_mask(folder / f"{name}.png", mask, palette)
        progress("frames", t + 1, len(film), start)
        yield Image.fromarray(tint(image, mask, palette).numpy()), duration


def draw_strip(film, folder, palette, path):
    """Draw six of a film's frames, with the masks that lie in a folder, as a PNG."""
    row = {}
    for t, (name, image, _) in enumerate(film):
        if t % max(1, (len(film) - 1) // 5) == 0 and len(row) < 6:
            mask, _ = read_mask(folder / f"{name}.png")
            row[f"frame {t + 1}"] = tint(image, mask, palette)
    draw_panels([row], path, "the first frame's mask, carried along")


def carry_film(args):
    """Carry a mask through a film: write each frame's mask, and the film with tinted objects."""
    how = propagation_of(args)
    film, first, palette = open_film(args)
    loaded = load_backbone(args.checkpoint, args.network, args.heads)
    backbone = require_vit(loaded.backbone, args.checkpoint).to(usable_device(args.device))
    say(loaded.description)
    output = args.output or Path(f"{args.film}_masks")
    images = (image for _, image, _ in film)
    masks = carry_mask(backbone, images, first, args.size or usual_size(backbone), how)
    with whole_folder(output) as folder:
        write_gif(write_masks(film, masks, folder, palette), folder / "film.gif")
    say(f"{args.film}: {len(film)} frames, {len(numbers_in(first))} objects -> {output}")
    if args.strip:
        draw_strip(film, output, palette, args.strip)
        say(f"{args.film} -> {args.strip}")
