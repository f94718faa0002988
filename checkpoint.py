"""Weights in and out: any DINO checkpoint is read, and a backbone is written for other code.

    python checkpoint.py runs/laptop/last.pth backbone.pth     for timm and the authors' code

Wherever a checkpoint is asked for, these work: ours, the authors' full checkpoints, a bare backbone
of ours, theirs or timm's, and the names in RELEASED. A file that does not fit as a whole is an
error that says which keys: nothing is ever loaded in part, and no file can run code.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np  # torchvision needs it, so it is there
import torch
from einops import rearrange
from torch import nn

from backbone import architecture, build_backbone, describe, rebuild, trained_at
from files import write_whole
from recipe import add_network_flags
from terminal import run_command
from vit import ARCHITECTURES, ViT

RELEASED_AT = "https://dl.fbaipublicfiles.com/dino/"
RELEASED = {
    "dino_vits16": "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "dino_vits8": "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    "dino_vitb16": "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "dino_vitb8": "dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
    "dino_resnet50": "dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
    # trained on Google Landmarks, for retrieval (Table 3)
    "dino_vits16_landmarks": "dino_vitsmall16_googlelandmark_pretrain/"
    "dino_vitsmall16_googlelandmark_pretrain.pth",
}
# What a file may hold besides tensors and plain values: the authors' full checkpoints keep their
# arguments in a Namespace with numpy's numbers. Numpy 2 renamed the module that rebuilds these.
SCALAR = np.float64(0).__reduce__()[0]
SAFE = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8")),
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


class Loaded(NamedTuple):
    """A backbone from a file."""

    backbone: nn.Module  # in evaluation mode
    trained_with: dict  # the arguments it was trained with; empty if the file has none
    description: str  # one line to print


# ---- checkpoint files ----


def download(name):
    """Return the path of released weights, from torch.hub's cache or the authors' server.

    ValueError: neither, with the URL and the cache's folder.
    """
    url = RELEASED_AT + RELEASED[name]
    folder = Path(torch.hub.get_dir(), "checkpoints")
    path = folder / url.split("/")[-1]
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path)
    except OSError as error:
        raise ValueError(
            f"cannot download {url} ({error}): put the file into {folder}"
        ) from None
    return path


def load_checkpoint(path):
    """Return the dictionary in a checkpoint file; only tensors and plain values are read.

    ValueError: a missing, truncated or foreign file, with the reason.
    """
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {str(path)!r}")
    try:
        with torch.serialization.safe_globals(SAFE):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file may be wrong in any way
        if "Weights only" in str(error):
            reason = "it holds code or objects, which are never loaded"
        else:
            first = (str(error).splitlines() or [repr(error)])[0]
            reason = f"cut short or of another kind ({first})"
        raise ValueError(f"{str(path)!r} is not a readable checkpoint: {reason}") from None
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise ValueError(f"{str(path)!r} holds a {kind}, not a dictionary of weights")
    return checkpoint


# ---- backbones ----


def load_backbone(source, network="teacher", heads=None):
    """Load a backbone: source is a path or a name in RELEASED. Returns Loaded.

    network: which of a checkpoint's two networks. The architecture is the one saved with it, or
    read from the tensors' shapes; heads: their number, for a file that does not say. ValueError:
    what does not fit as a whole or is not finite, with the keys.
    """
    path = download(source) if source in RELEASED else source
    checkpoint = load_checkpoint(path)
    state = backbone_state(checkpoint, network, path)
    trained_with = training_args(checkpoint)
    width = state["cls_token"].shape[-1] if "cls_token" in state else 0
    if heads and width % heads:
        raise ValueError(f"--heads {heads} must divide the width, {width}")
    assumed = False
    try:
        if "architecture" in checkpoint:
            backbone = rebuild(checkpoint["architecture"])
        elif "layer4.0.conv1.weight" in state:
            backbone = build_backbone("resnet50", None, trained_with.get("global_size", 224))
        else:
            known, assumed = number_of_heads(state, trained_with)
            assumed = assumed and heads is None
            backbone = vit_from_shapes(state, heads or known)
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError):
        keys = ", ".join(list(state)[:4])
        raise ValueError(
            f"{str(path)!r} is not a DINO backbone: its keys begin with {keys}"
        ) from None
    load_strictly(backbone, state, path)
    if heads and isinstance(backbone, ViT) and backbone.heads != heads:
        raise ValueError(f"{str(path)!r} says {backbone.heads} heads: leave --heads {heads} out")

    description = f"{source}: {network}, {describe(backbone)}"
    if assumed:
        description += (
            f" ({backbone.heads} heads are an assumption: the file does not say; --heads sets them)"
        )
    return Loaded(backbone.eval(), trained_with, description)


def training_args(checkpoint):
    """Return the arguments that a checkpoint was trained with, a dict; {}: it does not say."""
    args = checkpoint.get("args", {})
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    return args if isinstance(args, dict) else {}


def backbone_state(checkpoint, network, path):
    """Find a backbone's weights in a checkpoint, and give them our names and shapes."""
    state = checkpoint
    if "teacher" in checkpoint or "student" in checkpoint:
        if network not in checkpoint:
            names = ", ".join(map(str, checkpoint))
            raise ValueError(f"{str(path)!r} has no {network}, only {names}")
        state = checkpoint[network]
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        found = list(state)[:4] if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{str(path)!r} has no weights where a backbone should be: {found}")

    # DDP puts module. before the names, torch.compile _orig_mod.
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("backbone.") for key in state):
        without_head = {k: v for k, v in state.items() if not k.startswith("head.")}
        state = {key.removeprefix("backbone."): value for key, value in without_head.items()}
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4:  # a convolution's
        state["patch_embed.proj.weight"] = rearrange(kernel, "d c p q -> d (c p q)")
    return state


def number_of_heads(state, trained_with):
    """(heads, whether they are an assumption): no tensor tells, but the arguments may.

    For want of these, the architecture of that width, or 64 channels a head, as in the paper.
    """
    dim = len(state["patch_embed.proj.weight"])
    named = ARCHITECTURES.get(trained_with.get("arch"))
    if named and named["dim"] == dim:
        return named["heads"], False
    for listed in ARCHITECTURES.values():
        if listed["dim"] == dim:
            return listed["heads"], True
    return max(1, dim // 64), True


def vit_from_shapes(state, heads):
    """Build a ViT from the shapes in a state dict. KeyError or the like: it is not a ViT's."""
    dim, pixels = state["patch_embed.proj.weight"].shape
    patch = math.isqrt(pixels // 3)
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    return ViT(patch, dim, depth, heads, side * patch)


def load_strictly(backbone, state, path):
    """Load a state dict.

    ValueError: keys or shapes are not the backbone's, or values are not finite, with their names.
    """
    ours = shapes_of(backbone.state_dict())
    theirs = shapes_of(state)
    wrong = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
    if wrong:
        raise ValueError(
            f"{str(path)!r} does not fit the backbone that it resembles: "
            f"missing, unexpected or misshapen {', '.join(wrong[:4])}"
        )
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{str(path)!r}: {key} holds values that are not finite")
    backbone.load_state_dict(state)


def shapes_of(state):
    return {key: value.shape for key, value in state.items()}


def start_from(source, arch, patch, drop_path, global_size):
    """Build a backbone with the weights of --init, to be trained at global_size.

    ValueError: they are of another architecture than arch and patch.
    """
    loaded = load_backbone(source).backbone
    image_size = loaded.image_size
    if arch != "resnet50":
        image_size = image_size // patch * patch
    backbone = build_backbone(arch, patch, image_size, drop_path)
    backbone.trained_at = trained_at(loaded)
    if architecture(backbone) != architecture(loaded):
        raise ValueError(
            f"--init {source} is a {describe(loaded)}: --arch {arch} --patch {patch} must say so"
        )
    backbone.load_state_dict(loaded.state_dict())
    backbone.trained_at = global_size
    return backbone


def export(backbone):
    """Return a state dict as timm and the authors have it: a convolution embeds the patches."""
    state = backbone.state_dict()
    if isinstance(backbone, ViT):
        kernel = state["patch_embed.proj.weight"]
        p = backbone.patch
        kernel = rearrange(kernel, "d (c p q) -> d c p q", c=3, p=p, q=p)
        state["patch_embed.proj.weight"] = kernel
    return state


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Write a checkpoint's backbone as a bare state dict, which timm and the "
        "authors' code load."
    )
    parser.add_argument("checkpoint", help=f"a checkpoint, or {', '.join(RELEASED)}")
    parser.add_argument("file", help="where the state dict goes")
    add_network_flags(parser)
    return parser.parse_args(argv)


def main(args):
    loaded = load_backbone(args.checkpoint, args.network, args.heads)
    write_whole(args.file, lambda file: torch.save(export(loaded.backbone), file))
    print(f"{loaded.description} -> {args.file}")


if __name__ == "__main__":
    run_command(main, parse_args)
