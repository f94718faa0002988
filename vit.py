"""The Vision Transformer f (section 3.2, "Vision Transformer", and Table 1; tour, stops 2 and 11).

    images [b, 3, h, w]                     h and w are multiples of the patch's side p
      -> patches [b, n, 3 p p] -> linear    n = (h / p) (w / p)
      -> tokens  [b, 1 + n, d]              the class token first, plus position embeddings
      -> blocks  x + attention(norm(x)), then x + mlp(norm(x))
      -> norm    -> the class token [b, d]

Parameter names are the reference code's; the patch embedding, a convolution there, is a linear
layer here with the same weights, flattened. Axes: c channel, p q within a patch, n tokens, d width.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import nn

ARCHITECTURES = {
    "vit_micro": dict(dim=96, depth=1, heads=2),  # ours, for a laptop's CPU: see docs/laptop.md
    "vit_mini": dict(dim=128, depth=4, heads=4),  # ours, for photographs there
    "vit_tiny": dict(dim=192, depth=12, heads=3),
    "vit_small": dict(dim=384, depth=12, heads=6),
    "vit_base": dict(dim=768, depth=12, heads=12),
}


class PatchEmbed(nn.Module):
    """Flatten each patch and map it to a token: [b, 3, h, w] -> [b, n, d]."""

    def __init__(self, patch, dim):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(3 * patch * patch, dim)

    def forward(self, images):
        p = self.patch
        return self.proj(rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))


class Attention(nn.Module):
    """Multi-head self-attention: [b, n, d] -> [b, queries, d].

    queries: how many of the first tokens ask (default: all n). Keys and values come from all n.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x, queries):
        """Return q [b, heads, queries, d / heads], and k and v [b, heads, n, d / heads]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        parts = q[:, :queries], k, v
        by_head = "b n (heads d) -> b heads n d"
        return [rearrange(part, by_head, heads=self.heads) for part in parts]

    def forward(self, x, queries=None):
        q, k, v = self.split(x, queries)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b heads n d -> b n (heads d)"))

    def weights(self, x, queries=None):
        """Return softmax(q k^T / sqrt(d / heads)), [b, heads, queries, n], to be looked at."""
        q, k, _ = self.split(x, queries)
        products = einsum(q, k, "b heads query d, b heads key d -> b heads query key")
        return (products * q.shape[-1] ** -0.5).softmax(-1)


class Mlp(nn.Module):
    """Two linear layers with GELU between, four times as wide there: [b, n, d] -> [b, n, d]."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block: [b, n, d] -> [b, queries, d], by default all n tokens."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = drop_path

    def drop(self, branch):
        """Skip a branch for a whole image, with probability drop_path (stochastic depth)."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch * (branch.new_empty(len(branch), 1, 1).bernoulli_(keep) / keep)

    def forward(self, x, queries=None):
        x = x[:, :queries] + self.drop(self.attn(self.norm1(x), queries))
        return x + self.drop(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision Transformer with a class token and learned position embeddings.

    image_size: the side in pixels that the position embeddings are made for; others work too.
    drop_path: the rate of the last block; it grows linearly from 0 at the first.
    ValueError: the patch does not divide image_size, or the heads the width.
    """

    def __init__(self, patch=16, dim=384, depth=12, heads=6, image_size=224, drop_path=0.0):
        super().__init__()
        if image_size % patch or dim % heads:
            raise ValueError(f"patch {patch} / image {image_size}, {heads} heads / width {dim}")
        self.patch, self.dim, self.heads, self.image_size = patch, dim, heads, image_size
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image_size // patch) ** 2, dim))
        rates = [drop_path * i / (depth - 1) for i in range(depth - 1)] + [drop_path]
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        # With 0.02 the tokens of a ViT narrower than ViT-Ti would look alike for all images.
        std = 0.02 if dim >= 192 else dim**-0.5
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def position_embeddings(self, h, w):
        """Return the embeddings [1, 1 + h w, d] for h x w patches, bicubic from the native grid.

        The scale is (h + 0.1) / native, as in the reference code: that shifts the sampling grid a
        little, and the released attention maps were made so.
        """
        native = self.image_size // self.patch
        if h == w == native:
            return self.pos_embed
        scale = (h + 0.1) / native, (w + 0.1) / native
        grid = rearrange(self.pos_embed[:, 1:], "1 (h w) d -> 1 d h w", h=native)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], rearrange(grid, "1 d h w -> 1 (h w) d")], 1)

    def embed(self, images):
        """Turn images [b, 3, h, w] into the first block's tokens [b, 1 + n, d]."""
        b, _, h, w = images.shape
        h, w, p = int(h), int(w), self.patch  # in a trace the sizes are tensors
        if h % p or w % p:
            raise ValueError(f"image {h}x{w} is not divisible by patch {p}: crop or resize it")
        cls_token = repeat(self.cls_token, "1 1 d -> b 1 d", b=b)
        x = torch.cat([cls_token, self.patch_embed(images)], 1)
        return x + self.position_embeddings(h // p, w // p)

    def forward(self, images):
        """Return the class token after the last block and the final norm, [b, d]."""
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, queries=1)  # only the class token is needed from here on
        return self.norm(x[:, 0])

    def tokens(self, images, last=1):
        """Return all tokens after each of the last blocks, normed: [last, b, 1 + n, d]."""
        x = self.embed(images)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - last:
                outputs.append(self.norm(x))
        return torch.stack(outputs)

    def attention(self, images, queries=None):
        """Return the last block's attention, [b, heads, queries, 1 + n] (queries: default all).

        Row 0 is the class token's, which Figures 1, 3 and 4 show.
        """
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        return last.attn.weights(last.norm1(x), queries)
