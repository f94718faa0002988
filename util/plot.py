"""What pictures are made of: panels, pixels with something laid over them, and curves.

Images and panels are uint8 [3, h, w], maps [c, rows, columns] of patches, masks [h, w]. matplotlib
is imported where it draws: that takes half a second.
"""

import math
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_segmentation_masks

from augment import resize
from util.misc import atomic_write

WIDTH, LINE, GAP = 224, 24, 8  # of a panel, of a line of text and between panels, in pixels
BLUE, ORANGE = "#0072b2", "#d55e00"  # the color-blind tell them apart


# ---- panels ----


def shown(image):
    """Resize an image to a panel's width, or twice that height; a small one's pixels are blocks."""
    h, w = image.shape[1:]
    scale = min(WIDTH / w, 2 * WIDTH / h)
    size = max(1, round(scale * h)), max(1, round(scale * w))
    return resize(image, *size) if scale < 1 else upsample(image, *size).byte()


def upsample(maps, height, width, smooth=False):
    """Bring maps [c, rows, columns] to [c, height, width]; a patch is one block, or smooth."""
    mode = "bilinear" if smooth else "nearest-exact"
    return F.interpolate(maps[None].float(), (height, width), mode=mode)[0]


def overlay(image, heat):
    """Lay a map [h, w] in colors, from 0 to its largest value, over the faded gray image."""
    from matplotlib import colormaps

    levels = (255 * heat / heat.max().clamp_min(1e-12)).long()
    colors = torch.from_numpy(colormaps["inferno"](levels.numpy())[..., :3]).movedim(-1, 0)
    return (0.15 * image.float().mean(0) + 0.85 * 255 * colors).byte()


def outlined(image, mask, palette=None):
    """Draw a white line around each object of a mask of any size, and a black one around that."""
    mask = upsample(mask[None], *image.shape[1:])[0].byte()
    wide = max(1, round(min(mask.shape) / 120))
    for number in sorted({*mask.unique().tolist()} - {0, 255}):  # background, left open
        inside = mask == number
        if palette:  # tint it lightly
            color = tuple(palette[3 * number : 3 * number + 3])
            image = draw_segmentation_masks(image, inside, alpha=0.3, colors=color)
        for color, reach in ((0, 2 * wide), (255, wide)):
            grown = F.max_pool2d(inside[None].float(), (2 * reach + 1, 1), 1, (reach, 0))
            grown = F.max_pool2d(grown, (1, 2 * reach + 1), 1, (0, reach))[0] > 0
            image = torch.where(grown & ~inside, color, image)
    return image


def draw_panels(rows, path, note):
    """Draw rows of {title: panel} as a PNG; more than nine panels a row take several lines.

    What follows a line break in a title stands under the panel, shortened to its width.
    """
    from matplotlib import get_data_path

    longest = max(map(len, rows))
    columns = math.ceil(longest / math.ceil(longest / 9))
    lines = [[*row.items()][i : i + columns] for row in rows for i in range(0, len(row), columns)]
    width = GAP + columns * (WIDTH + GAP)
    picture = Image.new("RGB", (width, 4 * WIDTH * len(lines)), "white")  # cut in the end
    draw = ImageDraw.Draw(picture)
    draw.font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", 18)
    bottom = GAP
    for line in lines:
        titled = line is lines[0] or columns < longest  # the others' would be the same
        y = bottom + (LINE if titled else 0)
        for n, (title, panel) in enumerate(line):
            x = GAP + WIDTH // 2 + n * (WIDTH + GAP)
            title, *under = title.split("\n")
            if titled:
                draw.text((x, y), title, "black", anchor="md")
            panel = to_pil_image(shown(panel))
            picture.paste(panel, (x - panel.width // 2, y))
            for m, name in enumerate(under):
                while draw.textlength(name) > WIDTH:
                    name = f"{name[: len(name) // 2 - 1]}…{name[len(name) // 2 + 2 :]}"
                draw.text((x, y + panel.height + m * LINE), name, "black", anchor="ma")
            bottom = max(bottom, y + panel.height + len(under) * LINE + GAP)
    note = textwrap.wrap(note, width // 10)
    draw.text((width // 2, bottom), "\n".join(note), "black", anchor="ma", align="center")
    picture = picture.crop((0, 0, width, bottom + len(note) * LINE + GAP))
    save_png(path, lambda file: picture.save(file, "PNG", optimize=True))


# ---- curves and other figures ----


def new_figure(width, height):
    """Return an empty matplotlib Figure; width and height are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_png(path, write):
    """Call write(file) on a new file, and make its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, write)


def draw_log(lines, path, out_dim):
    """Draw what a log has of these: loss, collapse (Figure 7), k-NN (Figure 6), schedules."""
    full = math.log(out_dim)
    two = {"entropy": "of each", "mean_entropy": "of their mean"}
    plots = {  # title: ({name in the log: label}, {label of a level: its value})
        "loss": ({"loss": None}, {"ln K": full}),
        "entropy of the teacher, nats": (two, {"ln K:\nuniform": full, "0: one\noutput": 0}),
        "KL(teacher, student), nats": ({"kl": None}, {"0:\ncollapse": 0}),
        "k-NN top-1, %": ({"knn": "teacher", "knn_student": "student"}, {}),
        "learning rate": ({"lr": None}, {}),
        "weight decay": ({"weight_decay": None}, {}),
        "momentum of the teacher": ({"momentum": None}, {}),
        "temperature of the teacher": ({"teacher_temp": None}, {}),
    }
    logged = {name for line in lines for name in line}
    plots = {title: plot for title, plot in plots.items() if logged & plot[0].keys()}
    rows = math.ceil(len(plots) / 4)
    figure = new_figure(12, 2.4 * rows)
    for n, (title, plot) in enumerate(plots.items(), 1):
        draw_curves(figure.add_subplot(rows, 4, n), lines, title, *plot)
    figure.supxlabel("epoch", fontsize=10)
    save_png(path, figure.savefig)


def draw_curves(axis, lines, title, curves, levels):
    """Draw values of a log over its epochs, and levels beside which they are read."""
    for (name, label), color in zip(curves.items(), (BLUE, ORANGE)):
        known = [line for line in lines if name in line]
        epochs, values = [line["epoch"] for line in known], [line[name] for line in known]
        marker = "." if len(known) < 20 else None
        axis.plot(epochs, values, color=color, label=label, marker=marker, clip_on=False)
    for label, level in levels.items():
        axis.axhline(level, color="gray", linestyle=":")
        axis.text(1.02, level, label, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.margins(x=0)
    axis.set_xlim(left=math.floor(lines[0]["epoch"]))
    if len(curves) > 1:
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.25 * (high - low))  # room for the legend
        axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", handlelength=1)
    axis.ticklabel_format(useOffset=False)
    axis.spines[["top", "right"]].set_visible(False)
