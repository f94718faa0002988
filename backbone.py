"""The backbone f by its name: a ViT of vit.py, or ResNet-50, the paper's convnet (Table 1)."""

from functools import partial

import torch
import torchvision
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from vit import ARCHITECTURES, ViT


def resnet50(image_size=224):
    """torchvision's ResNet-50 without its classifier, untrained. Features [b, 2048]."""
    backbone = torchvision.models.resnet50()
    backbone.fc = nn.Identity()
    backbone.dim, backbone.image_size = 2048, image_size
    return backbone


def build_backbone(arch, patch, image_size, drop_path=0.0):
    """Return an untrained backbone.

    ValueError: an unknown name, or a size that the patch does not divide.
    """
    if arch == "resnet50":
        return resnet50(image_size)
    if arch not in ARCHITECTURES:
        names = ", ".join(ARCHITECTURES)
        raise ValueError(f"unknown architecture {arch!r}: choose from {names}, resnet50")
    return ViT(patch, image_size=image_size, drop_path=drop_path, **ARCHITECTURES[arch])


class RawPixels(nn.Module):
    """What needs no network: the pixels themselves, [b, 3, h, w] -> [b, 3 h w]."""

    dim, image_size = 3 * 32 * 32, 32

    def forward(self, images):
        return rearrange(images, "b c h w -> b (c h w)")


def trained_at(backbone):
    """Return the side in pixels of the global crops that a backbone was trained on.

    It is that of the position embeddings unless the training, begun from other weights, was at
    another size.
    """
    return getattr(backbone, "trained_at", backbone.image_size)


def architecture(backbone):
    """Return what rebuild() needs, a plain dict; a checkpoint keeps it beside the weights."""
    sizes = {"image_size": backbone.image_size, "trained_at": trained_at(backbone)}
    if not isinstance(backbone, ViT):
        return sizes
    return sizes | {
        "patch": backbone.patch,
        "dim": backbone.dim,
        "depth": len(backbone.blocks),
        "heads": backbone.heads,
    }


def rebuild(saved):
    """Return the untrained backbone that a dict of architecture() describes."""
    shape = {name: value for name, value in saved.items() if name != "trained_at"}
    backbone = ViT(**shape) if "heads" in shape else resnet50(**shape)
    backbone.trained_at = saved["trained_at"]
    return backbone


def untrained(backbone, seed=0):
    """Return the same architecture with fresh weights, for evaluation, on the same device."""
    device = next(backbone.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = rebuild(architecture(backbone))
    return fresh.to(device).eval()


def recompute_activations(vit, part):
    """Let parts of a ViT keep their input alone, and compute the rest again on the way back.

    part: "blocks", each as a whole, or "mlp", the MLP of each: less is saved for less time.
    """
    for block in vit.blocks:
        module = block if part == "blocks" else block.mlp
        module.forward = partial(recomputed, module.forward, use_reentrant=False)


def describe(backbone):
    """Say in a few words what a backbone is."""
    if not isinstance(backbone, ViT):
        return "ResNet-50"
    depth = len(backbone.blocks)
    blocks = "1 block" if depth == 1 else f"{depth} blocks"
    return (
        f"ViT of width {backbone.dim}, {blocks}, {backbone.heads} heads, "
        f"patch {backbone.patch}, trained at {trained_at(backbone)} pixels"
    )


def require_vit(backbone, source):
    """Return the backbone. ValueError: it is a convnet."""
    if not isinstance(backbone, ViT):
        kind = describe(backbone)
        raise ValueError(f"{source} is a {kind}: a convnet has no attention and no patch tokens")
    return backbone
