"""The backbone f: a Vision Transformer written in einops (section 3.2 and Table 1 of the paper).

Images [b, 3, h, w] go in, the class token [b, d] comes out. Parameter names are the reference code's, so released weights fit; the
patch embedding is a linear layer on flattened patches, whose weight is the reference convolution's, flattened. There is no batch normalisation anywhere.
"""

import argparse
import math
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

ARCHITECTURES = {  # the head width is 64 in the paper's; vit_micro is ours, for a laptop's CPU
    "vit_micro": dict(dim=64, depth=4, heads=4),
    "vit_tiny": dict(dim=192, depth=12, heads=3),
    "vit_small": dict(dim=384, depth=12, heads=6),
    "vit_base": dict(dim=768, depth=12, heads=12),
}


class PatchEmbed(nn.Module):
    """[b, 3, h, w] -> [b, n, d]: every patch, flattened as a convolution flattens it, through one linear layer."""

    def __init__(self, patch, dim):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(3 * patch * patch, dim)

    def forward(self, images):
        return self.proj(rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch))


class Attention(nn.Module):
    """Multi-head self-attention, [b, n, d] -> [b, n, d]."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x):
        return rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)

    def forward(self, x):
        q, k, v = self.split(x)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)"))

    def weights(self, x):
        """softmax(q k^T / sqrt(d)), [b, heads, n, n]: computed only where somebody wants to look at it."""
        q, k, _ = self.split(x)
        return (q @ rearrange(k, "b heads n d -> b heads d n") * q.shape[-1] ** -0.5).softmax(-1)


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block. drop_path skips a branch for a whole image, in training only (stochastic depth)."""

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = drop_path

    def drop(self, branch):
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep) / keep

    def forward(self, x):
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision Transformer with a class token and learned position embeddings.

    image_size: the side, in pixels, that the position embeddings are made for; any other size divisible by patch works too.
    drop_path: the last block's rate; it grows linearly from 0 at the first.
    """

    def __init__(self, patch=16, dim=384, depth=12, heads=6, image_size=224, drop_path=0.0):
        super().__init__()
        if image_size % patch or dim % heads:
            raise ValueError(f"image size {image_size} is not divisible by patch {patch}, or width {dim} by {heads} heads")
        self.dim, self.patch, self.image_size = dim, patch, image_size
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image_size // patch) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        for embedding in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(embedding, std=0.02)

    def position_embeddings(self, h, w):
        """[1, 1 + h w, d] for a grid of h x w patches: bicubic from the native grid, and the embeddings themselves at native size.

        As in the reference code the scale is (h + 0.1) / native. That shifts the sampling grid a little, and the released attention maps were made so.
        """
        native = self.image_size // self.patch
        if h == w == native:
            return self.pos_embed
        grid = rearrange(self.pos_embed[:, 1:], "b (h w) d -> b d h w", h=native)
        grid = F.interpolate(grid, scale_factor=((h + 0.1) / native, (w + 0.1) / native), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], rearrange(grid, "b d h w -> b (h w) d")], 1)

    def embed(self, images):
        b, _, h, w = images.shape
        if h % self.patch or w % self.patch:
            raise ValueError(f"image {h}x{w} is not divisible by patch {self.patch}: crop or resize it to a multiple")
        x = torch.cat([repeat(self.cls_token, "1 1 d -> b 1 d", b=b), self.patch_embed(images)], 1)
        return x + self.position_embeddings(h // self.patch, w // self.patch)

    def tokens(self, images, last=1):
        """[last, b, 1 + n, d]: what the last blocks put out, each through the final norm; the class token comes first."""
        x, outputs = self.embed(images), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - last:
                outputs.append(self.norm(x))
        return torch.stack(outputs)

    def forward(self, images):
        return self.tokens(images)[-1][:, 0]

    def attention(self, images):
        """[b, heads, 1 + n, 1 + n]: the last block's attention. Row 0 is the class token's, which Figures 1 and 4 show."""
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].attn.weights(self.blocks[-1].norm1(x))


def init_weights(module):
    """Truncated normal of standard deviation 0.02 and zero bias for every linear layer."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def build_backbone(arch, patch, image_size, drop_path=0.0):
    """An untrained backbone. ValueError: an unknown name, or a size that the patch does not divide."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}: choose from {', '.join(ARCHITECTURES)}")
    return ViT(patch, image_size=image_size, drop_path=drop_path, **ARCHITECTURES[arch])


def untrained(backbone, seed=0):
    """A backbone of the same architecture with fresh weights, in evaluation mode on the same device."""
    torch.manual_seed(seed)
    fresh = ViT(backbone.patch, backbone.dim, len(backbone.blocks), backbone.blocks[0].attn.heads, backbone.image_size)
    return fresh.to(backbone.cls_token.device).eval()


def load_checkpoint(path):
    """The dictionary in a checkpoint file. Only tensors and plain values are read: no file can run code (weights_only=True).

    ValueError: missing, truncated or foreign files, with the reason.
    """
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {str(path)!r}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors' full checkpoints keep their args in one
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{str(path)!r} is not a readable checkpoint: {str(error).splitlines()[0] if str(error) else error!r}") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{str(path)!r} holds a {type(checkpoint).__name__}, not a dictionary of weights")
    return checkpoint


def load_backbone(source, network="teacher"):
    """A backbone in evaluation mode, and the arguments it was trained with ({} if the file has none).

    source: our checkpoint, or a bare backbone. Architecture, patch and size are read from the tensors. ValueError: not a whole ViT, with the keys.
    """
    checkpoint = load_checkpoint(source)
    args = checkpoint.get("args", {})
    state = checkpoint.get(network, checkpoint)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("backbone.") for key in state):
        state = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    backbone = vit_for(state, source)
    backbone.load_state_dict(state)
    return backbone.eval(), args if isinstance(args, dict) else vars(args)


def vit_for(state, source):
    """The ViT whose parameters have the names and shapes of state, in which a convolution's weight is flattened. ValueError: there is none."""
    try:
        if state["patch_embed.proj.weight"].ndim == 4:
            state["patch_embed.proj.weight"] = rearrange(state["patch_embed.proj.weight"], "d c p q -> d (c p q)")
        dim, pixels = state["patch_embed.proj.weight"].shape
        side, patch = math.isqrt(state["pos_embed"].shape[1] - 1), math.isqrt(pixels // 3)
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    except (KeyError, ValueError, AttributeError, IndexError):
        raise ValueError(f"{str(source)!r} is not a ViT backbone: its keys begin with {', '.join(list(map(str, state))[:4])}") from None
    heads = {a["dim"]: a["heads"] for a in ARCHITECTURES.values()}.get(dim, max(1, dim // 64))  # the one thing that no tensor tells
    backbone = ViT(patch, dim, depth, heads, side * patch)
    want = {key: value.shape for key, value in backbone.state_dict().items()}
    have = {key: getattr(value, "shape", None) for key, value in state.items()}
    wrong = sorted(key for key in want | have if want.get(key) != have.get(key))
    if wrong:
        raise ValueError(f"{str(source)!r} does not fit a ViT of width {dim} and depth {depth}: missing, unexpected or misshapen {', '.join(wrong[:4])}")
    return backbone
