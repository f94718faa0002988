"""Labels carried through a video by frozen features, without training (section 4.2.2, Table 5).

    python segment.py video CKPT film.gif --mask first.png

The patch tokens of the last block say which patches look alike. The labels of a frame's patch i are
a mixture of those of patches j in its sources, the first frame and the few before it:

    affinity(i, j) = exp(cos(token i, token j) / 0.1)    where j is not far from i
    label(i) = sum_j affinity(i, j) label(j) / sum_j affinity(i, j)

over the 5 patches j of all sources with the largest affinity. Frames are resized to whole patches,
the short side as asked for, the long side in proportion and rounded down: from 480 pixels on to
multiples of 64, as in the reference code. Only the sources are kept, however long the film is.

Axes: s sources, h w patches, d width, c labels.
"""

import sys
import time
from itertools import tee
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from PIL import Image

from augment import normalize, resize
from features import fitted_size, usual_size
from files import whole_folder
from film import Film, stills, write_gif
from masks import VOID, numbers_in, read_mask, resize_mask, whole_palette, write_mask
from pictures import draw_panels, tint
from protocol import load_vit
from recipe import add_size_flag
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
    """Return (height, width) in whole patches at which a network sees a frame.

    ValueError: it has too many patches.
    """
    fitted_size(image, short, patch)
    h, w = image.shape[1:]
    unit = 64 if short >= 480 and 64 % patch == 0 else patch
    long = max(unit, max(h, w) * short // min(h, w) // unit * unit)
    short = max(patch, short // patch * patch)
    return (long, short) if h > w else (short, long)


@torch.inference_mode()
def patch_features(backbone, image, short):
    """Return the last block's patch tokens, normalised, of uint8 [3, height, width]: [h, w, d]."""
    height, width = frame_size(image, short, backbone.patch)
    x = resize(image, height, width)[None].to(backbone.cls_token.device)
    tokens = backbone.tokens(normalize(x.float() / 255))[0, 0, 1:]
    return rearrange(F.normalize(tokens, dim=-1), "(h w) d -> h w d", h=height // backbone.patch)


def mix_labels(query, keys, labels, how):
    """Return a frame's soft labels [h, w, c] from those of its sources.

    query: the frame's features [h, w, d]; keys: the sources' [s, h, w, d]; labels: the sources'
    [s, h, w, c]; how: a Propagation. It goes through the frame in blocks of rows, each with the
    rows around it alone, so that the whole matrix of affinities never exists.
    """
    s, h, w, _ = keys.shape
    reach = min(how.radius, h + w) or h + w
    rows = 1
    while rows < h and s * w * w * (rows + 1) * min(h, rows + 1 + 2 * reach) <= MOST_AFFINITIES:
        rows += 1
    places = torch.arange(max(h, w), device=query.device)
    near = (places[:, None] - places).abs() <= reach
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
            for number in numbers[~(soft > 0).any(0).any(0).cpu()].tolist():
                say(f"note: object {number} is in the middle of no patch, and is lost", sys.stderr)
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

    They are upsampled to the size at which the network saw the frame, each label's map is stretched
    to 0..1, and the index of the largest is resized to the film's size, from the nearest pixel.
    """
    maps = rearrange(labels, "h w c -> 1 c h w")
    maps = F.interpolate(maps, scale_factor=patch, mode="bilinear")[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stretched = torch.where(high > low, (maps - low) / (high - low), maps)
    return resize_mask(stretched.argmax(0).byte(), *size)


# ---- the command ----


def add_propagation_flags(parser):
    paper = Propagation()
    add_size_flag(parser)
    add = parser.add_argument
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
        if not least <= getattr(args, flag) <= 1000:
            raise ValueError(f"--{flag} {getattr(args, flag)} must be from {least} to 1000")
    return Propagation(args.context, args.radius, args.nearest, args.temperature)


def open_film(args):
    """Return (film, first mask, its palette). ValueError: there is none, or only one frame."""
    if args.film == "shapes":
        shapes = ShapesFilm(1)
        film = [(f"{t:05}", shapes[t], 100) for t in range(len(shapes))]
    else:
        film = Film(Path(args.film), args.fps, other=args.mask)
        if film.names:  # the mask belongs to the first: it must be readable
            next(stills(film.source / film.names[0]))
    if len(film) < 2:
        raise ValueError(f"{args.film!r} has one frame: a mask is carried to the next ones")
    if args.film == "shapes" and not args.mask:
        return film, shapes.mask(0), whole_palette(None)
    if not args.mask:
        raise ValueError("give the first frame's mask with --mask")
    mask, palette = read_mask(args.mask)
    return film, mask, whole_palette(palette)


def choose_output(args):
    """Return the folder for the masks.

    ValueError: what is written there might replace the film or its mask, or --strip has no folder.
    """
    output = args.output or Path(f"{Path(args.film).absolute()}_masks")
    film = Path(args.film).resolve()
    read = [film, args.mask.resolve()] if args.mask else [film]
    beside = [path.parent for path in read if path.is_file()]
    if output.resolve().is_relative_to(film) or output.resolve() in beside:
        raise ValueError(f"--output {output} holds the film or its mask, and these must stay")
    if args.strip:
        strip = args.strip.resolve()
        if strip.is_relative_to(film) or strip in read:
            raise ValueError(f"--strip {args.strip} would replace the film or its mask")
        if not args.strip.absolute().parent.is_dir():
            raise ValueError(f"--strip {args.strip}: there is no such folder")
    return output


def write_masks(film, total, masks, folder, palette):
    """Write each frame's mask into a folder, and yield (PIL image with its objects tinted, ms).

    ValueError: two frames have one name.
    """
    start = time.monotonic()
    for t, ((name, image, duration), mask) in enumerate(zip(film, masks)):
        path = folder / f"{name}.png"
        if path.exists():
            raise ValueError(f"two frames are called {name!r}")
        write_mask(path, mask, palette)
        progress("frames", t + 1, total, start)
        yield Image.fromarray(tint(image, mask, palette).numpy()), duration


def draw_strip(film, folder, palette, path):
    """Draw six of a film's frames, with the masks that lie in a folder, as a PNG."""
    row = {}
    shown = torch.linspace(0, len(film) - 1, 6).round().tolist()
    for t, (name, image, _) in enumerate(film):
        if t in shown:
            mask, _ = read_mask(folder / f"{name}.png")
            row[f"frame {t + 1}"] = tint(image, mask, palette)
    draw_panels([row], path, "the first frame's mask, carried along")


def carry_film(args):
    """Carry a mask through a film: write each frame's mask, and the film with tinted objects."""
    how = propagation_of(args)
    output = choose_output(args)
    film, first, palette = open_film(args)
    backbone = load_vit(args)
    frames, seen = tee(film)
    images = (image for _, image, _ in seen)
    masks = carry_mask(backbone, images, first, args.size or usual_size(backbone), how)
    with whole_folder(output) as folder:
        tinted = write_masks(frames, len(film), masks, folder, palette)
        write_gif(tinted, folder / "film.gif")
    say(f"{args.film}: {len(film)} frames, {len(numbers_in(first))} objects -> {output}")
    if args.strip:
        draw_strip(film, output, palette, args.strip)
        say(f"{args.film} -> {args.strip}")
