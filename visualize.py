"""Pictures: the class token's attention (Figures 1, 3 and 4), how it emerges, and a run's curves (Figures 6 and 7).

    python visualize.py ckpt.pth img.jpg [more images or folders ...]      img_attention.png: the image, each head's map, their mean, and its mask
    python visualize.py ckpt.pth film.gif                                  film_attention.gif: frame, mean and mask side by side; a folder with --fps too
    python visualize.py runs/laptop                                        curves.png, from the run's log

Images are uint8 [3, h, w], maps [heads, rows, columns] of patches. An image is resized so that its short side is 480 / 224 of what the network was trained at
(480 for the paper's), and its last patches are filled up with the edge's pixels: unlike the reference code's crop, that distorts and loses nothing.
"""

import argparse
import json
import math
import sys
from itertools import chain
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure
from PIL import GifImagePlugin, Image, ImageSequence

from augment import normalize, resize
from data import Folder, read_image, to_tensor
from run import command, read_log, say, status, write_whole
from vit import ViT, describe, load_backbone, usable_device

BLUE, ORANGE, OUTLINE = "#0072b2", "#d55e00", torch.tensor([86, 180, 233], dtype=torch.uint8)  # the colour-blind tell them apart
COLORS = torch.tensor(matplotlib.colormaps["inferno"](range(256)))[:, :3].float() * 255  # perceptually uniform
NOTE = "attention of the class token in the last block, dark to bright: from 0 to the largest value of each map"


@torch.inference_mode()
def attention_maps(backbone, images):
    """[b, 3, h, w] normalised -> [b, heads, h / patch, w / patch]: what the class token attends to in the last block (each map sums to less than 1)."""
    rows = images.shape[2] // backbone.patch
    return rearrange(backbone.attention(images, rows=1)[:, :, 0, 1:], "b heads (h w) -> b heads h w", h=rows)


def keep_mass(maps, mass=0.6):
    """[..., h, w] -> bool: the fewest patches that hold the given share of each map's sum (Figure 4)."""
    flat = rearrange(maps, "... h w -> ... (h w)").double()
    value, order = flat.sort(-1, descending=True)
    before = value.cumsum(-1) - value
    kept = before < mass * value.sum(-1, keepdim=True)
    return rearrange(torch.zeros_like(kept).scatter(-1, order, kept), "... (h w) -> ... h w", h=maps.shape[-2])


def usual_size(backbone):
    """The short side, in pixels, at which a network is shown images: 480 / 224 of what it was trained at, in whole patches."""
    return max(backbone.patch, backbone.image_size * 480 // 224 // backbone.patch * backbone.patch)


def attend(backbone, image, short=None):
    """uint8 [3, h, w] -> (maps [heads, rows, columns], (y, x) the share of their grid that the image covers; the rest fills up the last patches).

    short: the short side in pixels, of any size. ValueError: more patches than fit into memory.
    """
    patch, short = backbone.patch, short or usual_size(backbone)
    h, w = (max(1, round(side * short / min(image.shape[1:]))) for side in image.shape[1:])
    if h * w > 2**16 * patch**2:
        raise ValueError(f"an image of {image.shape[2]} x {image.shape[1]} with its short side at {short} has more than {2**16} patches: lower --size")
    x = normalize(resize(image, h, w)[None].to(backbone.cls_token.device).float() / 255)
    down, right = -h % patch, -w % patch
    return attention_maps(backbone, F.pad(x, (0, right, 0, down), mode="replicate"))[0].cpu(), (h / (h + down), w / (w + right))


def upsample(maps, covered, height, width, smooth=False):
    """[c, rows, columns] -> [c, height, width]: the part of the grid that the image covers, at any size; a patch is one block, or smooth."""
    y, x = covered
    grid = F.affine_grid(torch.tensor([[[x, 0, x - 1], [0, y, y - 1]]]), (1, 1, height, width), align_corners=False)
    return F.grid_sample(maps[None].float(), grid, "bilinear" if smooth else "nearest", "border", align_corners=False)[0]


def overlay(image, heat):
    """A map [h, w] in colours, from 0 to its largest value, over the grey image, uint8 [3, h, w] -> uint8 [h, w, 3]."""
    gray, colors = image.float().mean(0)[..., None], COLORS[(255 * heat / heat.max().clamp_min(1e-12)).long()]
    return (0.3 * gray + 0.7 * colors).byte()


def cut_out(image, mask):
    """uint8 [3, h, w] -> uint8 [h, w, 3]: dark outside the mask [h, w], with an outline around it, a hundredth of the short side wide."""
    wide = max(1, round(min(mask.shape) / 100))
    grown = F.max_pool2d(F.max_pool2d(mask[None].float(), (2 * wide + 1, 1), 1, (wide, 0)), (1, 2 * wide + 1), 1, (0, wide))[0] > 0
    pixels = rearrange(image, "c h w -> h w c")
    return torch.where(mask[..., None], pixels, torch.where(grown[..., None], OUTLINE, pixels // 4))


def panels(image, maps, covered, mass=0.6, smooth=False):
    """{title: uint8 [h, w, 3]}, each of the image's size: the image, each head's map over it, their mean, and the patches that hold most of the mean."""
    mean, size = maps.mean(0, keepdim=True), image.shape[1:]
    titles = [*(f"head {i + 1}" for i in range(len(maps))), "mean of heads"]
    heats = {title: overlay(image, heat) for title, heat in zip(titles, upsample(torch.cat([maps, mean]), covered, *size, smooth))}
    mask = upsample(keep_mass(mean, mass), covered, *size, smooth)[0] > 0.5
    return {"image": rearrange(image, "c h w -> h w c")} | heats | {"mask": cut_out(image, mask)}


def shown(image, side=320):
    """The image as a figure shows it: the long side at so many pixels."""
    return resize(image, *(max(1, round(length * side / max(image.shape[1:]))) for length in image.shape[1:]))


def draw_panels(rows, path, note):
    """Rows of {title: uint8 [h, w, 3]} -> a PNG; a row with more than nine panels takes several lines."""
    lines = math.ceil(len(rows[0]) / 9)
    columns = math.ceil(len(rows[0]) / lines)
    ratios = [min(4, max(0.2, pixels.shape[0] / pixels.shape[1])) for row in rows for pixels in [next(iter(row.values()))] * lines]
    figure = Figure(figsize=(1.45 * columns, sum(1.45 * ratio + 0.25 for ratio in ratios) + 0.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.04, wspace=0, hspace=0)
    axes = rearrange(figure.subplots(len(ratios), columns, squeeze=False, height_ratios=ratios), "(rows lines) columns -> rows (lines columns)", lines=lines)
    for axis in axes.flat:
        axis.axis("off")
    for row, places in zip(rows, axes):
        for axis, (title, pixels) in zip(places, row.items()):
            axis.imshow(pixels.numpy())
            axis.set_title(title, fontsize=8, pad=3)
    figure.supxlabel(note, fontsize=8, wrap=True)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100, pil_kwargs={"optimize": True}))


def draw_attention(backbone, images, path, sizes=(None,), mass=0.6, smooth=False):
    """A PNG with a row of panels for each uint8 image [3, h, w] and each short side, in pixels, at which the network sees it."""
    rows = []
    for image in images:
        for short in sizes:
            row = panels(shown(image), *attend(backbone, image, short), mass, smooth)
            rows.append({f"seen at {short} pixels": row.pop("image"), **row} if len(sizes) > 1 else row)
    draw_panels(rows, path, f"{NOTE}; mask: the fewest patches with {100 * mass:g} % of the mean")


def draw_emergence(images, kept, path):
    """A film strip of the heads' mean. kept: {step: what attend() gave for each of the images}; the first step and the last seven are drawn."""
    rows, steps = [], sorted(kept)
    for i, image in enumerate(map(shown, images)):
        row = {"image": rearrange(image, "c h w -> h w c")}
        for step in steps[:1] + steps[1:][-7:]:
            maps, covered = kept[step][i]
            heat = upsample(maps.mean(0, keepdim=True), covered, *image.shape[1:])[0]
            row[f"step {step}" if step else "before training"] = overlay(image, heat)
        rows.append(row)
    draw_panels(rows, path, f"{NOTE}; mean of the heads")


def draw_curves(lines, path, out_dim):
    """The lines of a run's log -> a PNG: loss, collapse watch (Figure 7), k-NN of teacher and student (Figure 6), schedules."""
    full = math.log(out_dim)
    plots = (  # title, the log's names and what they are, levels
        ("loss", {"loss": None}, {"ln K": full}),
        ("entropy of the teacher, nats", {"entropy": "each output's", "mean_entropy": "their mean's"}, {"ln K: uniform": full, "0: one dimension": 0}),
        ("KL(teacher, student), nats", {"kl": None}, {"0: collapse": 0}),
        ("k-NN top-1, %", {"knn": "teacher", "knn_student": "student"}, {}),
        ("learning rate", {"lr": None}, {}), ("weight decay", {"weight_decay": None}, {}),
        ("momentum of the teacher", {"momentum": None}, {}), ("temperature of the teacher", {"teacher_temp": None}, {}),
    )  # fmt: skip
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axis, (title, curves, levels) in zip(figure.subplots(2, 4).flat, plots):
        for (name, label), color in zip(curves.items(), (BLUE, ORANGE)):
            known = [line for line in lines if name in line]
            axis.plot([line["epoch"] for line in known], [line[name] for line in known], color=color, label=label, marker="." if len(known) < 20 else None)
        for label, level in levels.items():
            axis.axhline(level, color="gray", linestyle=":")
            axis.text(1, level, label, transform=axis.get_yaxis_transform(), ha="right", va="bottom" if level else "top", fontsize=8)
        if len(curves) > 1:
            axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", borderaxespad=0, handlelength=1, columnspacing=1)
        axis.margins(y=0.3 if len(curves) > 1 else 0.15)  # room for the labels
        axis.set_title(title, fontsize=10)
        axis.ticklabel_format(useOffset=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("epoch", fontsize=10)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100))


def stills(source):
    """(path, uint8 [3, h, w]) of an image file, or of each below a folder, 2.png before 10.png; what cannot be read there is named and left out.

    ValueError: no images there, or the file cannot be read.
    """
    whole = source.is_dir()
    for path in [source / name for name in sorted(Folder(source).paths, key=lambda name: (len(name), name))] if whole else [source]:
        try:
            image = read_image(path)
        except Exception as error:  # whatever a decoder may raise
            if not whole:
                raise ValueError(f"cannot read {str(path)!r}: {error}") from None
            say(f"cannot read {str(path)!r}: left out", sys.stderr)
            continue
        yield path, image


def frames(source, fps):
    """(uint8 [3, h, w], milliseconds) of a folder of frames or of an animated file, one at a time. A file that is cut short ends where it is cut."""
    if source.is_dir():
        yield from ((image, 1000 / fps) for _, image in stills(source))
        return
    with Image.open(source) as film:
        try:
            for frame in ImageSequence.Iterator(film):
                yield to_tensor(frame.copy()), frame.info.get("duration") or 100
        except Exception as error:  # whatever a decoder may raise
            say(f"cannot read all of {str(source)!r}: {error}", sys.stderr)


def is_film(path):
    """Whether a file is an animated GIF or WebP."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.format in ("GIF", "WEBP") and image.is_animated
    except Exception:  # whatever a decoder may raise; reading it as a still says what
        return False


def side_by_side(backbone, frames, short=None, mass=0.6, smooth=False):
    """(PIL image, milliseconds) of each frame, its mean map and the mask beside it; all of the first frame's size."""
    size = None
    for i, (image, duration) in enumerate(frames):
        size = size or image.shape[1:]
        image = resize(image, *size)
        frame, *_, mean, mask = panels(image, *attend(backbone, image, short), mass, smooth).values()
        yield Image.fromarray(torch.cat([frame, mean, mask], 1).numpy()), duration
        status(f"frame {i + 1}")


def write_gif(pictures, path):
    """(PIL image, milliseconds) one at a time -> a GIF that repeats. One picture is held: Pillow's save_all would gather them all. ValueError: there is none."""
    first = next(pictures, None)
    if first is None:
        raise ValueError(f"no frames for {str(path)!r}: none could be read")

    def write(file):
        for i, (picture, duration) in enumerate(chain([first], pictures)):
            picture = picture.quantize()
            if i == 0:
                file.writelines(GifImagePlugin.getheader(picture, info={"loop": 0})[0])
            file.writelines(GifImagePlugin.getdata(picture, duration=round(duration, -1), include_color_table=True))
        file.write(b";")

    write_whole(path, write)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint, dino_vits16, dino_vits8, dino_vitb16 or dino_vitb8 (released weights), or a run's folder for its curves")
    parser.add_argument("images", nargs="*", type=Path, help="images, folders of images, animated GIFs or WebPs")
    parser.add_argument("--network", choices=("teacher", "student"), default="teacher", help="which of a checkpoint's two networks")
    parser.add_argument("--size", type=int, nargs="+", default=[None], help="short side in pixels, or several (default: 480/224 of the training size, 480 for the paper's)")
    parser.add_argument("--mass", type=float, default=0.6, help="share of the attention inside the outlines (the paper's: 0.6)")
    parser.add_argument("--smooth", action="store_true", help="interpolate between patches (default: a block for each)")
    parser.add_argument("--panels", action="store_true", help="also write each panel of the figure alone, at the image's own size")
    parser.add_argument("--fps", type=float, help="take a folder as the frames of a film, so many a second")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder for the pictures (default: beside the image; of a folder, in FOLDER_attention)")
    return parser.parse_args(argv)


def main(args):
    log = Path(args.checkpoint, "log.jsonl")
    if log.is_file():
        out = (args.output or log.parent) / "curves.png"
        out.parent.mkdir(parents=True, exist_ok=True)
        draw_curves(read_log(log), out, json.loads(log.with_name("config.json").read_text())["out_dim"])
        return say(f"{log} -> {out}")
    if not args.images:
        raise ValueError("no images given: name some, or folders of them, after the checkpoint")
    if not 0 < args.mass <= 1 or any(size is not None and size < 1 for size in args.size) or (args.fps is not None and not 0 < args.fps <= 100):
        raise ValueError(f"--mass {args.mass} must lie in (0, 1], --size {' '.join(map(str, args.size))} be positive, --fps {args.fps} lie in (0, 100]")
    backbone, _ = load_backbone(args.checkpoint, args.network)
    if not isinstance(backbone, ViT):
        raise ValueError(f"{args.checkpoint} is a {describe(backbone)}: a convnet has no attention to draw")
    backbone.to(usable_device(args.device))
    say(f"{args.checkpoint}: {describe(backbone)}")
    written = set()
    for source in args.images:
        film = is_film(source) or (args.fps and source.is_dir())
        for path, image in [(source, None)] if film else stills(source):
            folder = args.output or (source.parent if path == source else Path(f"{source.resolve()}_attention"))
            out = folder / path.relative_to(source).parent / f"{path.stem}_attention{'.gif' if film else '.png'}"
            while out in written:  # a.png and a.jpg
                out = out.with_stem(f"{out.stem}_")
            written.add(out)
            out.parent.mkdir(parents=True, exist_ok=True)
            if film:
                write_gif(side_by_side(backbone, frames(source, args.fps), args.size[0], args.mass, args.smooth), out)
            else:
                draw_attention(backbone, [image], out, args.size, args.mass, args.smooth)
                alone = panels(image, *attend(backbone, image, args.size[0]), args.mass, args.smooth) if args.panels else {}
                for title, pixels in alone.items():
                    Image.fromarray(pixels.numpy()).save(out.with_stem(f"{out.stem}_{title.replace(' ', '_')}"))
            say(f"{path} -> {out}")
    if not written:
        raise ValueError("none of the images can be read")


if __name__ == "__main__":
    command(main, parse_args)
