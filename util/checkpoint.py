"""Backbones by name, and weights in and out: any DINO checkpoint is read, none in part.

Wherever a checkpoint is asked for, these work: ours, the authors' full checkpoints, a bare backbone
of ours, theirs or timm's, and the names in RELEASED. A file that does not fit as a whole is an
error that says which keys, and no file can run code.
"""

import argparse
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from util.config import starts_anew
from util.misc import first_line
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


# ---- backbones ----


def resnet50(img_size=224):
    """torchvision's ResNet-50 without its classifier, untrained. Features [b, 2048]."""
    backbone = torchvision.models.resnet50()
    backbone.fc = nn.Identity()
    backbone.embed_dim, backbone.img_size = 2048, img_size
    return backbone


def build_backbone(args):
    """Return the untrained backbone of train.py's arguments: a ViT, or ResNet-50 (Table 1)."""
    size = args.global_crops_size
    if args.arch == "resnet50":
        return resnet50(size)
    sizes = ARCHITECTURES[args.arch]
    return ViT(args.patch_size, img_size=size, drop_path_rate=args.drop_path_rate, **sizes)


def recompute_activations(backbone):
    """Let each block of a ViT keep its input alone, and compute the rest again on the way back."""
    for block in require_vit(backbone).blocks:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)


def untrained(backbone, seed=0):
    """Return the same architecture with fresh weights, for evaluation, on the same device."""
    device = next(backbone.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(backbone, ViT):
            depth, heads = len(backbone.blocks), backbone.num_heads
            sizes = backbone.patch_size, backbone.embed_dim, depth, heads, backbone.img_size
            fresh = ViT(*sizes)
        else:
            fresh = resnet50(backbone.img_size)
    return fresh.to(device).eval()


def describe(backbone):
    """Say in a few words what a backbone is."""
    if not isinstance(backbone, ViT):
        return "ResNet-50"
    depth = len(backbone.blocks)
    blocks = "1 block" if depth == 1 else f"{depth} blocks"
    return (
        f"ViT of width {backbone.embed_dim}, {blocks}, {backbone.num_heads} heads, "
        f"patch {backbone.patch_size}"
    )


def require_vit(backbone):
    """Return the backbone. ValueError: it is a convnet."""
    if not isinstance(backbone, ViT):
        raise ValueError("this is a ResNet-50: a convnet has no attention and no patch tokens")
    return backbone


# ---- files ----


def load_checkpoint(path):
    """Return the dictionary in a checkpoint file; only tensors and plain values are read.

    ValueError: a missing, truncated or foreign file, with the reason.
    """
    if not Path(path).is_file():
        names = ", ".join(RELEASED)
        raise ValueError(f"no checkpoint at {str(path)!r}, and the released names are {names}")
    try:
        with torch.serialization.safe_globals(SAFE):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file may be wrong in any way
        reason = f"cut short or of another kind ({first_line(error)})"
        if "Weights only" in str(error):
            reason = "it holds code or objects, which are never loaded"
        raise ValueError(f"{str(path)!r} is not a readable checkpoint: {reason}") from None
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise ValueError(f"{str(path)!r} holds a {kind}, not a dictionary of weights")
    return checkpoint


def download(name):
    """Return released weights, from torch.hub's cache or the authors' server.

    ValueError: neither, with the URL and the cache's folder.
    """
    url = RELEASED_AT + RELEASED[name]
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except Exception as error:  # of the network, or of a file that was put there
        place = Path(torch.hub.get_dir(), "checkpoints")
        reason = first_line(error)
        raise ValueError(f"cannot load {url} ({reason}): put the file into {place}") from None


def load_backbone(source, network="teacher", num_heads=None):
    """Load a backbone: source is a path or a name in RELEASED. Returns Loaded.

    network: which of a checkpoint's two networks. num_heads: of a ViT, for a file that does not
    say. ValueError: what does not fit as a whole or is not finite, with the keys.
    """
    checkpoint = download(source) if source in RELEASED else load_checkpoint(source)
    trained_with = checkpoint.get("args", {})
    if isinstance(trained_with, argparse.Namespace):
        trained_with = vars(trained_with)
    if not isinstance(trained_with, dict):
        trained_with = {}
    state = backbone_state(checkpoint, network, source)
    assumed = ""
    try:
        if "layer4.0.conv1.weight" in state:
            backbone = resnet50(trained_with.get("global_crops_size", 224))
        else:
            dim = len(state["patch_embed.proj.weight"])
            saved = checkpoint.get("num_heads")
            if num_heads and saved and num_heads != saved:
                raise ValueError(f"it says {saved} heads: leave --num_heads {num_heads} out")
            if not (num_heads or saved):
                by_width = {a["embed_dim"]: a["num_heads"] for a in ARCHITECTURES.values()}
                saved = by_width.get(dim, max(1, dim // 64))  # 64 channels a head, as in the paper
                assumed = " (the number of heads is an assumption: --num_heads sets it)"
            backbone = vit_from_shapes(state, num_heads or saved)
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        keys = ", ".join(list(state)[:4])
        raise ValueError(
            f"{str(source)!r} is not a DINO backbone, its keys begin with {keys} ({error})"
        ) from None
    load_strictly(backbone, state, source)
    what = f"{describe(backbone)}, for {backbone.img_size} pixels{assumed}"
    return Loaded(backbone.eval(), trained_with, f"{source}: {network}, {what}")


def backbone_state(checkpoint, network, source):
    """Find a backbone's weights in a checkpoint, and give them our names and shapes."""
    state = checkpoint
    if "teacher" in checkpoint or "student" in checkpoint:
        if network not in checkpoint:
            names = ", ".join(map(str, checkpoint))
            raise ValueError(f"{str(source)!r} has no {network}, only {names}")
        state = checkpoint[network]
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise ValueError(f"{str(source)!r} has no weights where a backbone should be")

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


def vit_from_shapes(state, num_heads):
    """Build a ViT from the shapes in a state dict. KeyError or the like: it is not a ViT's."""
    dim, pixels = state["patch_embed.proj.weight"].shape
    if dim % num_heads:
        raise ValueError(f"--num_heads {num_heads} must divide the width, {dim}")
    patch_size = math.isqrt(pixels // 3)
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    return ViT(patch_size, dim, depth, num_heads, side * patch_size)


def load_strictly(module, state, source):
    """Load a state dict. ValueError: keys, shapes or values do not fit, with their names."""
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{str(source)!r}: {key} holds values that are not finite")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(source)!r} does not fit the network: {reason[:400]}") from None


def start_from(args):
    """Return the backbone of train.py's arguments, with the weights of --init if a run begins.

    Position embeddings are interpolated to --global_crops_size. ValueError: the weights are of
    another architecture.
    """
    backbone = build_backbone(args)
    goes_on = (args.output_dir / "last.pth").exists() and not starts_anew(args)
    if goes_on or args.init is None:
        return backbone
    if Path(args.init).resolve().parent == args.output_dir.resolve():
        raise ValueError(f"--init {args.init} lies in --output, where this run would replace it")
    loaded = load_backbone(args.init).backbone
    state = loaded.state_dict()
    if isinstance(loaded, ViT):
        side = args.global_crops_size // loaded.patch_size
        state["pos_embed"] = loaded.interpolate_pos_encoding(side, side).detach()
    if describe(loaded) != describe(backbone):
        raise ValueError(
            f"--init {args.init} is a {describe(loaded)}, "
            f"--arch and --patch say {describe(backbone)}"
        )
    backbone.load_state_dict(state)
    return backbone


def export(backbone):
    """Return a state dict as timm and the authors have it: a convolution embeds the patches."""
    state = backbone.state_dict()
    if isinstance(backbone, ViT):
        kernel = state["patch_embed.proj.weight"]
        p = backbone.patch_size
        kernel = rearrange(kernel, "d (c p q) -> d c p q", c=3, p=p, q=p)
        state["patch_embed.proj.weight"] = kernel
    return state
