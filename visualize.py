"""Pictures: the class token's attention (Figures 1, 3 and 4) and a run's curves.

    python visualize.py ckpt.pth img.jpg [more images or folders ...]

For each image: the image, the mean attention of the last block's heads and, for each head, its map over the image and the smallest set of patches that
holds 60 % of its mass. An image is resized so that its short side is 480 / 224 of what the network was trained at, and cropped to whole patches.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure

from augment import normalize, resize
from data import Folder, read_image
from run import command
from vit import ViT, describe, load_backbone, usable_device


@torch.inference_mode()
def attention_maps(backbone, images):
    """[b, 3, h, w] normalised -> [b, heads, h / patch, w / patch]: what the class token attends to in the last block (rows sum to less than 1)."""
    rows = images.shape[2] // backbone.patch
    return rearrange(backbone.attention(images)[:, :, 0, 1:], "b heads (h w) -> b heads h w", h=rows)


def keep_mass(maps, mass=0.6):
    """[..., h, w] -> bool: the fewest patches that hold the given share of each map's sum (Figure 4)."""
    flat = rearrange(maps, "... h w -> ... (h w)")
    value, order = flat.sort(-1, descending=True)
    before = value.cumsum(-1) - value
    kept = before < mass * value.sum(-1, keepdim=True)
    return rearrange(torch.zeros_like(kept).scatter(-1, order, kept), "... (h w) -> ... h w", h=maps.shape[-2])


def fit(image, short, patch):
    """uint8 [3, h, w] -> the short side near short, each side cropped to a multiple of patch."""
    h, w = image.shape[1:]
    image = resize(image, *(max(patch, round(side * short / min(h, w))) for side in (h, w)))
    h, w = (side // patch * patch for side in image.shape[1:])
    return image[:, :h, :w]


def draw_attention(backbone, images, path, short=None, mass=0.6, titles=None):
    """Writes a picture with one row of panels an image: the image, the mean map, and each head's map with its mask outlined.

    images: uint8 [3, h, w] each. short: the short side in pixels they are resized to.
    """
    short = short or max(backbone.patch, backbone.image_size * 480 // 224 // backbone.patch * backbone.patch)
    heads = backbone.blocks[-1].attn.heads
    figure = Figure(figsize=(2 * (heads + 2), 2.2 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), heads + 2, squeeze=False)
    device = backbone.cls_token.device
    for row, (image, panels) in enumerate(zip(images, axes)):
        image = fit(image, short, backbone.patch)
        maps = attention_maps(backbone, normalize(image[None].to(device).float() / 255))[0].cpu()
        pixels = rearrange(image, "c h w -> h w c").numpy()
        for axis in panels:
            axis.imshow(pixels)
            axis.axis("off")
        panels[0].set_title(titles[row] if titles else "image", fontsize=8)
        for axis, name, one in zip(panels[1:], ["mean", *(f"head {i}" for i in range(heads))], [maps.mean(0), *maps]):
            big = F.interpolate(one[None, None], image.shape[1:], mode="nearest")[0, 0].numpy()
            axis.imshow(big, cmap="inferno", alpha=0.8 if name != "mean" else 1)
            axis.set_title(name, fontsize=8)
            if name != "mean":
                mask = F.interpolate(keep_mass(one, mass)[None, None].float(), image.shape[1:], mode="nearest")[0, 0].numpy()
                axis.contour(mask, levels=[0.5], colors="white", linewidths=0.6)
    figure.savefig(path, dpi=110)


def draw_curves(lines, path, out_dim):
    """The lines of a run's log -> a picture: the loss, the entropies that tell collapse (Figure 7), the k-NN accuracy, and the learning rate."""
    steps, tests = [line for line in lines if "loss" in line], [line for line in lines if "knn" in line]
    figure = Figure(figsize=(12, 3), layout="constrained")
    loss, entropy, knn, rate = figure.subplots(1, 4)
    curves = {"loss": (loss, "loss"), "entropy": (entropy, "entropy of P_t"), "mean_entropy": (entropy, "entropy of its mean"), "kl": (entropy, "KL(P_t, P_s)")}
    for name, (axis, label) in (curves | {"lr": (rate, "learning rate")}).items():
        axis.plot([line["epoch"] for line in steps], [line[name] for line in steps], label=label, linewidth=1)
    for axis in (loss, entropy):
        axis.axhline(math.log(out_dim), color="gray", linestyle=":", label="ln K")
    knn.plot([line["epoch"] for line in tests], [line["knn"] for line in tests], marker=".")
    for axis, title in ((loss, "loss"), (entropy, "collapse watch, nats"), (knn, "k-NN top-1, %"), (rate, "learning rate")):
        axis.set(title=title, xlabel="epoch")
    loss.legend()
    entropy.legend()
    figure.savefig(path, dpi=110)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint, or the name of released weights: dino_vits16, dino_vits8, dino_vitb16, dino_vitb8")
    parser.add_argument("images", nargs="+", help="image files or folders of images")
    parser.add_argument("--network", choices=("teacher", "student"), default="teacher", help="which of a checkpoint's two networks")
    parser.add_argument("--size", type=int, help="short side in pixels (default: 480/224 of the training size, 480 for the paper's)")
    parser.add_argument("--mass", type=float, default=0.6, help="share of the attention inside the outlines (the paper's: 0.6)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for the pictures, one NAME_attention.png an image")
    return parser.parse_args(argv)


def main(args):
    if not 0 < args.mass <= 1 or (args.size is not None and args.size < 1):
        raise ValueError(f"--mass {args.mass} must lie in (0, 1] and --size {args.size} be positive")
    backbone, _ = load_backbone(args.checkpoint, args.network)
    if not isinstance(backbone, ViT):
        raise ValueError(f"{args.checkpoint} is a {describe(backbone)}: a convnet has no attention to draw")
    print(f"{args.checkpoint}: {describe(backbone)}")
    backbone.to(usable_device(args.device))
    for source in args.images:
        whole = Path(source).is_dir()
        for name in Folder(source).paths if whole else [Path(source).name]:
            path = Path(source, name) if whole else Path(source)
            try:
                image = read_image(path)
            except Exception as error:  # whatever a decoder may raise
                if not whole:
                    raise ValueError(f"cannot read {str(path)!r}: {error}") from None
                print(f"cannot read {path}: left out", file=sys.stderr)
                continue
            out = (args.output / name).with_name(f"{path.stem}_attention.png")
            out.parent.mkdir(parents=True, exist_ok=True)
            draw_attention(backbone, [image], out, args.size, args.mass, [path.name])
            print(f"{path} -> {out}")


if __name__ == "__main__":
    command(main, parse_args)
