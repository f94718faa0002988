"""Pictures: the class token's attention (Figures 1 and 3), how it emerges, a run's curves (6, 7).

    python visualize.py ckpt.pth img.jpg       img_attention.png; also several images, or folders
    python visualize.py ckpt.pth film.gif      film_attention.gif; also a folder, with --fps
    python visualize.py runs/laptop            curves.png, from the run's log
    python visualize.py video CKPT FILM --mask first.png      a mask carried through a film
    python visualize.py crops img.jpg          what happens in training, drawn; also
    python visualize.py networks | schedules | targets CKPT

A picture shows the image, each head's map, their mean, and the patches that hold most of the mean.
An image is shown to the network at 480 / 224 of the size it was trained at (480 for the paper's).
Images and panels are uint8 [3, h, w], maps [heads, rows, columns] of patches.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

from augment import normalize, resize
from evaluation.features import attention_maps, fitted_size, keep_mass, usual_size
from util import config
from util.checkpoint import RELEASED, load_backbone, require_vit
from util.data import evenly, read_or_next
from util.distributed import usable_device
from util.images import frames, is_film, stills, write_gif
from util.misc import say
from util.plot import draw_log, draw_panels, outlined, overlay, shown, upsample
from util.run import read_log
from vit import ViT

COMMANDS = {  # name: the module that has its add_flags() and visualize()
    "video": "evaluation.video",
    "crops": "evaluation.explain",
    "networks": "evaluation.explain",
    "schedules": "evaluation.explain",
    "targets": "evaluation.explain",
}
NOTE = "attention of the class token in the last block, from 0 to the largest value of each map"


# ---- attention ----


def attend(backbone, image, short=None):
    """Return (the part of an image [3, h, w] that makes whole patches, its attention maps).

    The image is seen at the short side given (default: usual_size), and cropped at its bottom and
    right, as in the reference code. ValueError: it has more than MOST_PATCHES.
    """
    p, (height, width) = backbone.patch_size, image.shape[1:]
    h, w = fitted_size(image, short or usual_size(backbone), p)
    rows, columns = max(1, h // p), max(1, w // p)
    image = image[:, : round(height * rows * p / h), : round(width * columns * p / w)]
    x = resize(image, rows * p, columns * p)[None].to(backbone.cls_token.device)
    return image, attention_maps(backbone, normalize(x.float() / 255))[0].cpu()


def panels(image, maps, mass=0.6, smooth=False):
    """Return {title: panel}, each of the image's size: image, each head, mean of heads, mask."""
    size, mean = image.shape[1:], maps.mean(0, keepdim=True)
    heats = upsample(torch.cat([maps, mean]), *size, smooth)
    titles = [f"head {i + 1}" for i in range(len(maps))] + ["mean of heads"]
    row = {"image": image} | {title: overlay(image, heat) for title, heat in zip(titles, heats)}
    mask = upsample(keep_mass(mean, mass), *size, smooth)[0] > 0.5
    return row | {"mask": outlined(torch.where(mask, image, image // 4), mask)}


def draw_attention(backbone, images, path, sizes=(None,), mass=0.6, smooth=False):
    """Draw a row of panels for each image, and each short side at which the network sees it."""
    rows = []
    for image in images:
        for short in sizes:
            part, maps = attend(backbone, image, short)
            row = panels(shown(part), maps, mass, smooth)
            if len(sizes) > 1:
                row = {f"image\nseen at {short} pixels": row.pop("image"), **row}
            rows.append(row)
    draw_panels(rows, path, f"{NOTE}; mask: the fewest patches with {100 * mass:g} % of the mean")


# ---- a run ----


def few_images(images, count=4):
    """Return a few of the images, spread evenly, always the same; of a long strip, a part."""
    few = []
    for i in evenly(len(images), count):
        image, _ = read_or_next(images, i)
        h, w = image.shape[1:]
        few.append(image[:, : 3 * w, : 3 * h])
    return few


def watch_attention(run, step):
    """At steps 0, 1, 2, 4, 8, ... keep what the teacher attends to in a few images.

    It goes with the checkpoint, and in the end into emergence.png.
    """
    backbone = run.state["teacher"].backbone
    power_of_two = step & (step - 1) == 0
    if run.is_main and power_of_two and isinstance(backbone, ViT):
        few = few_images(run.val or run.images)
        run.attention[step] = [attend(backbone, image)[1] for image in few]


def draw_run(run):
    """Draw a run's curves, and its teacher's attention at the end and over the steps."""
    if not run.is_main:
        return
    backbone = run.state["teacher"].backbone
    draw_log(read_log(run.log_path), run.folder / "curves.png", run.args.out_dim)
    if isinstance(backbone, ViT):
        few = few_images(run.val or run.images)
        draw_attention(backbone, few, run.folder / "attention.png")
        parts, maps = zip(*[attend(backbone, image) for image in few])
        draw_emergence(parts, run.attention | {run.last: maps}, run.folder / "emergence.png")


def draw_emergence(images, kept, path):
    """Draw the heads' mean for each image at the first and the last seven steps of `kept`.

    images: as attend() crops them. kept: {step: the attention maps of each of the images}.
    """
    rows, steps = [], sorted(kept)
    for i, image in enumerate(images):
        image = shown(image)
        row = {"image": image}
        for step in steps[:1] + steps[1:][-7:]:
            heat = upsample(kept[step][i].mean(0, keepdim=True), *image.shape[1:])[0]
            row[f"step {step}" if step else "before training"] = overlay(image, heat)
        rows.append(row)
    draw_panels(rows, path, f"{NOTE}; mean of the heads")


# ---- the commands ----


def side_by_side(backbone, film, args):
    """Yield (PIL image, milliseconds): each frame, its mean map and its mask beside one another.

    All are of the first frame's size, or what attend() leaves of it.
    """
    size = None
    for _, image, duration in film:
        size = size or image.shape[1:]
        image = resize(image, *size)
        part, maps = attend(backbone, image, args.size[0])
        row = panels(part, maps, args.mass, args.smooth)
        pixels = torch.cat([row["image"], row["mean of heads"], row["mask"]], 2)
        yield to_pil_image(pixels), duration


def draw_source(backbone, source, args, written):
    """Draw an image, each image of a folder, or a film, into args.output_dir."""
    if is_film(source) or (args.fps and source.is_dir()):
        if len(args.size) > 1:
            raise ValueError("a film is drawn at one --size")
        place = place_for(source.resolve().name, ".gif", args.output_dir, written)
        write_gif(side_by_side(backbone, frames(source, args.fps or 10), args), place)
        say(f"{source} -> {place}")
        return
    for path, image in stills(source):
        name = path.name if path == source else "_".join(path.relative_to(source).parts)
        place = place_for(name, ".png", args.output_dir, written)
        try:
            draw_attention(backbone, [image], place, args.size, args.mass, args.smooth)
        except ValueError as error:  # too long a strip
            if path == source:
                raise
            say(f"{path}: {error}; left out")
            continue
        say(f"{path} -> {place}")


def place_for(name, ending, folder, written):
    """Return where the picture of an image of this name goes."""
    place = folder / f"{Path(name).stem}_attention{ending}"
    while place in written:  # a.png and a.jpg
        place = place.with_stem(f"{place.stem}_")
    written.add(place)
    return place


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        command, *argv = argv
        parser = config.Parser(prog=f"visualize.py {command}")
        parser.set_defaults(command=command)
        importlib.import_module(COMMANDS[command]).add_flags(parser, command)
    else:
        parser = config.Parser(description=__doc__)
        add_flags(parser)
    return parser.parse_args(argv)


def add_flags(parser):
    add = parser.add_argument
    add("checkpoint", help=f"a checkpoint, one of {', '.join(RELEASED)}, or a run's folder")
    add("images", nargs="*", type=Path, help="images, folders of images, animated GIFs or WebPs")
    config.add_network_flags(parser)
    add("--size", type=config.count, nargs="+", default=[None], help="short side in pixels, or "
        "several (default: 480/224 of the training size, 480 for the paper's)")  # fmt: skip
    add("--mass", type=config.positive_share, default=0.6,
        help="share of the attention inside the outlines (the paper's: 0.6)")  # fmt: skip
    add("--smooth", action="store_true",
        help="interpolate between patches (default: a block for each)")  # fmt: skip
    add("--fps", type=config.positive, help="take a folder as a film, so many frames a second")
    config.add_device_flag(parser)
    config.add_flag(parser, "output_dir", type=Path, default=Path(), help="folder for the pictures "
                    "(default: the current one)")  # fmt: skip


def main(args):
    if "command" in args:
        importlib.import_module(COMMANDS[args.command]).visualize(args)
        return
    log = Path(args.checkpoint, "log.jsonl")
    if log.is_file() and args.images:
        raise ValueError(f"to draw attention name the run's checkpoint, {log.parent / 'last.pth'}")
    if log.is_file():
        settings = json.loads(log.with_name("config.json").read_text())
        draw_log(read_log(log), args.output_dir / "curves.png", settings["out_dim"])
        say(f"{log} -> {args.output_dir / 'curves.png'}")
        return
    if not args.images:
        raise ValueError(f"{args.checkpoint!r} is no run's folder, and no image is named after it")
    loaded = load_backbone(args.checkpoint, args.network, args.num_heads)
    backbone = require_vit(loaded.backbone).to(usable_device(args.device))
    say(loaded.description)
    written = set()
    for source in args.images:
        draw_source(backbone, source, args, written)


if __name__ == "__main__":
    config.run_command(main, parse_args)
