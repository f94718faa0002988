"""Labels carried through a video by frozen features, without training (section 4.2.2, Table 5).

    python visualize.py video CKPT film.gif --mask first.png

The patch tokens of the last block say which patches look alike. The labels of a frame's patch i are
a mixture of those of patches j in its sources, the first frame and the few before it:

    affinity(i, j) = exp(cos(token i, token j) / 0.1)    where j is not far from i
    label(i) = sum_j affinity(i, j) label(j) / sum_j affinity(i, j)

over the 5 patches j of all sources with the largest affinity. Frames are resized to whole patches,
the short side as asked for, the long side in proportion and rounded down: from 480 pixels on to
multiples of 64, as in the reference code.

Axes: s sources, h w patches, d width, c labels.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torchvision.transforms.functional import to_pil_image

from augment import normalize, resize
from evaluation.features import fitted_size, usual_size
from evaluation.masks import VOID, numbers_in, read_mask, resize_mask, voc_palette, write_mask
from util import config
from util.checkpoint import load_backbone, require_vit
from util.distributed import usable_device
from util.images import frames, image_paths, stills, write_gif
from util.misc import say
from util.plot import WIDTH, draw_panels, outlined, shown
from util.shapes import ShapesFilm

MOST_AFFINITIES = 2**24  # computed at once: 64 MB


class Propagation(NamedTuple):
    """How labels are carried: the paper's values."""

    n_last_frames: int = 7  # frames before, besides the first
    size_mask_neighborhood: int = 12  # patches, in either direction; 0: no limit
    topk: int = 5
    temperature: float = 0.1


def frame_size(image, short, patch_size):
    """Return (height, width) in whole patches at which a network sees a frame.

    ValueError: it has too many patches.
    """
    fitted_size(image, short, patch_size)
    h, w = image.shape[1:]
    unit = 64 if short >= 480 and 64 % patch_size == 0 else patch_size
    long = max(unit, max(h, w) * short // min(h, w) // unit * unit)
    short = max(patch_size, short // patch_size * patch_size)
    return (long, short) if h > w else (short, long)


@torch.inference_mode()
def patch_features(backbone, image, short):
    """Return the last block's patch tokens, normalised, of uint8 [3, height, width]: [h, w, d]."""
    height, width = frame_size(image, short, backbone.patch_size)
    x = resize(image, height, width)[None].to(backbone.cls_token.device)
    tokens = backbone.get_intermediate_layers(normalize(x.float() / 255))[0, 0, 1:]
    h = height // backbone.patch_size
    return rearrange(F.normalize(tokens, dim=-1), "(h w) d -> h w d", h=h)


def mix_labels(query, keys, labels, how):
    """Return a frame's soft labels [h, w, c] from those of its sources.

    query: the frame's features [h, w, d]; keys: the sources' [s, h, w, d]; labels: the sources'
    [s, h, w, c]; how: a Propagation. It goes through the frame in blocks of rows, each with the
    rows around it alone, so that the whole matrix of affinities never exists.
    """
    s, h, w, _ = keys.shape
    reach = min(how.size_mask_neighborhood, h + w) or h + w
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
        value, index = cosine.topk(min(how.topk, cosine.shape[-1]))
        weight = (value / how.temperature).softmax(-1)  # exp, then normalised
        sources = rearrange(labels[:, first:last], "s i j c -> (s i j) c")
        mixed.append(einsum(weight, sources[index], "y x k, y x k c -> y x c"))
    return torch.cat(mixed)


@torch.inference_mode()
def carry_mask(backbone, images, first, short, how=Propagation()):
    """Carry the first frame's mask through a film: yield each frame's, uint8 [height, width].

    images: an iterable of uint8 [3, height, width]; the first mask is given back as it is. What it
    leaves open (255) counts as background, and an object that is in the middle of no patch is lost.
    ValueError: no object, or a frame of another size than the mask.
    """
    numbers = torch.tensor([0, *numbers_in(first)], dtype=torch.uint8)
    if len(numbers) == 1:
        raise ValueError("the first mask shows no object")
    for t, image in enumerate(images):
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
            keys = repeat(features, "h w d -> s h w d", s=1 + how.n_last_frames).clone()
            labels = repeat(soft, "h w c -> s h w c", s=1 + how.n_last_frames).clone()
            yield first
            continue
        # the first frame's stay in front, and the oldest of the others makes room
        used = 1 + min(t - 1, how.n_last_frames)
        soft = mix_labels(features, keys[:used], labels[:used], how)
        if how.n_last_frames:
            slot = 1 + (t - 1) % how.n_last_frames
            keys[slot], labels[slot] = features, soft
        yield numbers[harden(soft, backbone.patch_size, first.shape).long().cpu()]


def soft_labels(mask, numbers, features):
    """Return a mask's labels at the middle of each patch, one-hot: [h, w, c], as features are."""
    grid = resize_mask(mask, *features.shape[:2])
    grid[grid == VOID] = 0
    return (grid[..., None] == numbers).to(features)


def harden(labels, patch_size, size):
    """Soft labels [h, w, c] -> the index of the strongest in each pixel, [height, width].

    They are upsampled to the size at which the network saw the frame, each label's map is stretched
    to 0..1, and the index of the largest is resized to the film's size, from the nearest pixel.
    """
    maps = rearrange(labels, "h w c -> 1 c h w")
    maps = F.interpolate(maps, scale_factor=patch_size, mode="bilinear")[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stretched = torch.where(high > low, (maps - low) / (high - low), maps)
    return resize_mask(stretched.argmax(0).byte(), *size)


# ---- the command ----


def add_propagation_flags(parser):
    paper = Propagation()
    add = parser.add_argument
    add("--size", type=config.count, help="short side (default: 480/224 of the training size, "
        "480 for the paper's)")  # fmt: skip
    for name, kind, text in (
        ("n_last_frames", config.natural, "frames before, besides the first, to take from"),
        ("size_mask_neighborhood", config.natural, "patches that they lie away at most; 0: any"),
        ("topk", config.count, "patches that are mixed"),
        ("temperature", config.positive, "of the affinity"),
    ):
        value = getattr(paper, name)
        add(f"--{name}", type=kind, default=value, help=f"{text} (the paper's: {value})")


def propagation_of(args):
    """Return the Propagation that the flags ask for."""
    return Propagation(*(getattr(args, name) for name in Propagation._fields))


def add_flags(parser, command):
    add = parser.add_argument
    add("checkpoint", help="a checkpoint, or the name of released weights")
    add("film", help="an animated GIF or WebP, a folder of frames, or shapes (built in)")
    add("--mask", type=Path, help="the first frame's mask: a palette or gray image")
    config.add_network_flags(parser)
    config.add_device_flag(parser)
    add_propagation_flags(parser)
    add("--fps", type=config.positive, default=10, help="frames a second of a folder")
    config.add_flag(parser, "output_dir", type=Path, help="folder for the masks, film.gif and "
                    "strip.png (default: FILM_masks)")  # fmt: skip


def open_film(args):
    """Return (film, as images.frames() gives it; first mask; its palette). ValueError: no mask."""
    if args.film == "shapes" and not args.mask:
        shapes = ShapesFilm(1)
        film = ((f"{t:05}", shapes[t], 100) for t in range(len(shapes)))
        return film, shapes.mask(0), voc_palette()
    if not args.mask:
        raise ValueError("give the first frame's mask with --mask")
    first, palette = read_mask(args.mask)
    paths = [Path(args.film) / path for path in image_paths(args.film)[0]]
    for path in [path for path in paths if path.resolve() != args.mask.resolve()][:1]:
        next(stills(path))  # the mask belongs to it: it must be readable
    known = palette if palette and len(palette) > 3 else []
    film = frames(Path(args.film), args.fps, other=args.mask)
    return film, first, known + voc_palette()[len(known) :]


def visualize(args):
    """Carry a mask through a film: write each frame's mask, the film with outlines, a strip.

    ValueError: what is written might replace the film or its mask, or there is one frame alone.
    """
    output = args.output_dir or Path(f"{Path(args.film).absolute()}_masks")
    places = [Path(args.film), args.mask] if args.mask else [Path(args.film)]
    folders = [place.resolve() if place.is_dir() else place.resolve().parent for place in places]
    if output.resolve() in folders or output.resolve().is_relative_to(Path(args.film).resolve()):
        raise ValueError(f"--output {output} holds the film or its mask, and these must stay")
    film, first, palette = open_film(args)
    loaded = load_backbone(args.checkpoint, args.network, args.num_heads)
    backbone = require_vit(loaded.backbone).to(usable_device(args.device))
    say(loaded.description)
    film = list(film)
    images = [image for _, image, _ in film]
    short = args.size or usual_size(backbone)
    masks = list(carry_mask(backbone, images, first, short, propagation_of(args)))
    if len(film) < 2:
        raise ValueError(f"{args.film!r} has one frame: a mask is carried to the next ones")
    names = ["strip", *(name for name, *_ in film)]
    if len(set(names)) < len(names):
        raise ValueError(f"two frames are called {max(names, key=names.count)!r}")

    output.mkdir(parents=True, exist_ok=True)
    drawn = []
    for (name, image, duration), mask in zip(film, masks):
        write_mask(output / f"{name}.png", mask, palette)
        large = image if image.shape[2] > WIDTH else shown(image)
        drawn.append((to_pil_image(outlined(large, mask, palette)), duration))
    write_gif(drawn, output / "film.gif")
    few = torch.linspace(0, len(film) - 1, min(6, len(film))).round().int().tolist()
    strip = {f"frame {t + 1}": outlined(shown(film[t][1]), masks[t], palette) for t in few}
    draw_panels([strip], output / "strip.png", "the first frame's mask, carried along")
    say(f"{args.film}: {len(film)} frames, {len(numbers_in(first))} objects -> {output}")
