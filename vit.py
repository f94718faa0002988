"""The Vision Transformer f (section 3.2, "Vision Transformer", and Table 1; tour, stops 2 and 11).

    images [b, 3, h, w]                     h and w are multiples of the patch's side p
      -> patches [b, n, 3 p p] -> linear    n = (h / p) (w / p)
      -> tokens  [b, 1 + n, d]              the class token first, plus position embeddings
      -> blocks  x + attention(norm(x)), then x + mlp(norm(x))
      -> norm    -> the class token [b, d]

Parameter names are the reference code's. The patch embedding, a convolution there, is a linear
layer here with the same weights, flattened. Axes: c channel, p q within a patch, n patches,
t tokens, d width.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import nn
from torchvision.ops import stochastic_depth

ARCHITECTURES = {
    "vit_micro": dict(embed_dim=96, depth=1, num_heads=2),  # ours, for a laptop's CPU
    "vit_mini": dict(embed_dim=128, depth=4, num_heads=4),  # ours, for photographs there
    "vit_tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "vit_small": dict(embed_dim=384, depth=12, num_heads=6),
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),
}


class PatchEmbed(nn.Module):
    """Flatten each patch and map it to a token: [b, 3, h, w] -> [b, n, d]."""

    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(3 * patch_size**2, embed_dim)

    def forward(self, images):
        p = self.patch_size
        return self.proj(rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))


class Attention(nn.Module):
    """Multi-head self-attention: tokens [b, t, d] -> [b, queries, d].

    queries: how many of the first tokens ask (default: all t). Keys and values come from all.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x, queries):
        """Return q [b, heads, queries, d / heads], and k and v [b, heads, t, d / heads]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        by_head = "b t (heads d) -> b heads t d"
        return [rearrange(z, by_head, heads=self.num_heads) for z in (q[:, :queries], k, v)]

    def forward(self, x, queries=None):
        q, k, v = self.split(x, queries)
        x = F.scaled_dot_product_attention(q, k, v)  # weights() @ v, but the weights are not stored
        return self.proj(rearrange(x, "b heads t d -> b t (heads d)"))

    def weights(self, x, queries=None):
        """Return softmax(q k^T / sqrt(d / heads)), [b, heads, queries, t], to be looked at."""
        q, k, _ = self.split(x, queries)
        products = einsum(q, k, "b heads query d, b heads key d -> b heads query key")
        return (products * q.shape[-1] ** -0.5).softmax(-1)


class Mlp(nn.Module):
    """Two linear layers with GELU between, four times as wide there: [b, t, d] -> [b, t, d]."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block: [b, t, d] -> [b, queries, d], by default all t tokens."""

    def __init__(self, dim, num_heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = drop_path

    def drop(self, branch):
        """Skip a branch for a whole image, with probability drop_path (stochastic depth)."""
        return stochastic_depth(branch, self.drop_path, "row", self.training)

    def forward(self, x, queries=None):
        x = x[:, :queries] + self.drop(self.attn(self.norm1(x), queries))
        return x + self.drop(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision Transformer with a class token and learned position embeddings.

    img_size: the side in pixels that the position embeddings are made for; others work too.
    drop_path_rate: it grows linearly from 0 in the first block to this in the last.
    """

    def __init__(self, patch_size=16, embed_dim=384, depth=12, num_heads=6, img_size=224,
                 drop_path_rate=0.0):  # fmt: skip
        super().__init__()
        self.patch_size, self.img_size = patch_size, img_size
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.init_weights()

    def prepare_tokens(self, images):
        """Turn images [b, 3, h, w] into the first block's tokens [b, 1 + n, d]."""
        h, w = (side // self.patch_size for side in images.shape[2:])
        cls_token = self.cls_token.expand(len(images), 1, -1)
        x = torch.cat([cls_token, self.patch_embed(images)], 1)
        return x + self.interpolate_pos_encoding(h, w)

    def before_last_block(self, images):
        x = self.prepare_tokens(images)
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    def forward(self, images):
        """Return the class token after the last block and the final norm, [b, d]."""
        x = self.before_last_block(images)
        x = self.blocks[-1](x, queries=1)  # only the class token is needed from here on
        return self.norm(x[:, 0])

    def get_intermediate_layers(self, images, n=1):
        """Return all tokens after each of the last n blocks, normed: [n, b, t, d]."""
        x = self.prepare_tokens(images)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n:
                outputs.append(self.norm(x))
        return torch.stack(outputs)

    def get_last_selfattention(self, images, queries=None):
        """Return the last block's attention, [b, heads, queries, t] (queries: default all).

        Row 0 is the class token's, which Figures 1, 3 and 4 show.
        """
        x = self.before_last_block(images)
        last = self.blocks[-1]
        return last.attn.weights(last.norm1(x), queries)

    def interpolate_pos_encoding(self, h, w):
        """Return the embeddings [1, 1 + h w, d] for h x w patches, bicubic from the native grid.

        The scale is (h + 0.1) / native, as in the reference code: that shifts the sampling grid a
        little, and the released attention maps were made so.
        """
        native = self.img_size // self.patch_size
        if h == w == native:
            return self.pos_embed
        scale = (h + 0.1) / native, (w + 0.1) / native
        grid = rearrange(self.pos_embed[:, 1:], "1 (h w) d -> 1 d h w", h=native)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], rearrange(grid, "1 d h w -> 1 (h w) d")], 1)

    def init_weights(self):
        """Draw weights from a truncated normal distribution, of deviation 0.02; biases are 0."""
        # In a ViT narrower than ViT-Ti, 0.02 would make all images' tokens look alike.
        std = 0.02 if self.embed_dim >= 192 else self.embed_dim**-0.5
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
