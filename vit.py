"""The backbone f: a Vision Transformer written in einops (section 3.2 and Table 1 of the paper).

Images [b, 3, h, w] go in, the class token [b, d] comes out. Parameter names are the reference code's, so released weights fit; the
patch embedding is a linear layer on flattened patches, whose weight is the reference convolution's, flattened. There is no batch normalisation anywhere.
"""

import argparse
import math
from pathlib import Path

import numpy as np  # torchvision needs it, so it is there
import torch
import torch.nn.functional as F
import torchvision
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

ARCHITECTURES = {  # the head width is 64 in the paper's; vit_micro is ours, for a laptop's CPU: the README says why one block
    "vit_micro": dict(dim=96, depth=1, heads=2),
    "vit_tiny": dict(dim=192, depth=12, heads=3),
    "vit_small": dict(dim=384, depth=12, heads=6),
    "vit_base": dict(dim=768, depth=12, heads=12),
}
RELEASED_AT = "https://dl.fbaipublicfiles.com/dino/"
RELEASED = {
    "dino_vits16": "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "dino_vits8": "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    "dino_vitb16": "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "dino_vitb8": "dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
    "dino_resnet50": "dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
}
SCALAR = np.float64(0).__reduce__()[0]  # what rebuilds a numpy scalar; its module's name changed with numpy 2
SAFE = [  # what a checkpoint may hold besides tensors and plain values: the authors' full checkpoints keep their arguments so
    argparse.Namespace, np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8")),
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]  # fmt: skip


def init_std(width):
    """Standard deviation of a layer's first weights: the paper's 0.02; 1 / sqrt(width) where that is far too small, or all images' tokens would look alike."""
    return 0.02 if width >= 192 else width**-0.5


class PatchEmbed(nn.Module):
    """[b, 3, h, w] -> [b, n, d]: every patch, flattened as a convolution flattens it, through one linear layer."""

    def __init__(self, patch, dim):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(3 * patch * patch, dim)

    def forward(self, images):
        return self.proj(rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch))


class Attention(nn.Module):
    """Multi-head self-attention, [b, n, d] -> [b, n, d], or its first rows alone."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x, rows=None):
        """q of the first rows, k and v of all, each [b, heads, n, d]."""
        if rows is None:
            return rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        sizes = x.shape[-1], 2 * x.shape[-1]
        (wq, wkv), (bq, bkv) = self.qkv.weight.split(sizes), self.qkv.bias.split(sizes)
        q = rearrange(F.linear(x[:, :rows], wq, bq), "b n (heads d) -> b heads n d", heads=self.heads)
        return q, *rearrange(F.linear(x, wkv, bkv), "b n (two heads d) -> two b heads n d", two=2, heads=self.heads)

    def forward(self, x, rows=None):
        q, k, v = self.split(x, rows)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)"))

    def weights(self, x, rows=None):
        """softmax(q k^T / sqrt(d)), [b, heads, n, n], or its first rows alone: computed only where somebody wants to look at it."""
        q, k, _ = self.split(x, rows)
        return (q @ rearrange(k, "b heads n d -> b heads d n") * q.shape[-1] ** -0.5).softmax(-1)


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block, [b, n, d] -> [b, n, d] or its first rows alone. drop_path skips a branch for a whole image, in training only (stochastic depth)."""

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
        return branch * (branch.new_empty(len(branch), 1, 1).bernoulli_(keep) / keep)

    def forward(self, x, rows=None):
        x = x[:, :rows] + self.drop(self.attn(self.norm1(x), rows))
        return x + self.drop(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision Transformer with a class token and learned position embeddings.

    image_size: the side, in pixels, that the position embeddings are made for; any other size divisible by patch works too.
    drop_path: the last block's rate; it grows linearly from 0 at the first.
    recompute: if set, training keeps each block's input alone and computes the rest again on the way back: less memory, a third more time.
    """

    recompute = False

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
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=init_std(dim))
                nn.init.zeros_(layer.bias)
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

    def tokens(self, images, last=1, rows=None):
        """[last, b, 1 + n, d]: what the last blocks put out, each through the final norm; the class token comes first.

        rows: the first rows alone, for which the last block need not compute the others.
        """
        x, outputs = self.embed(images), []
        for i, block in enumerate(self.blocks):
            wanted = rows if block is self.blocks[-1] else None
            x = checkpoint(block, x, wanted, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else block(x, wanted)
            if i >= len(self.blocks) - last:
                outputs.append(self.norm(x[:, :rows]))
        return torch.stack(outputs)

    def forward(self, images):
        return self.tokens(images, rows=1)[-1][:, 0]

    def attention(self, images, rows=None):
        """[b, heads, 1 + n, 1 + n]: the last block's attention, or its first rows alone. Row 0 is the class token's, which Figures 1 and 4 show."""
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].attn.weights(self.blocks[-1].norm1(x), rows)


def resnet50(image_size=224):
    """The paper's convnet: torchvision's ResNet-50 without its classifier, untrained. Features [b, 2048]."""
    backbone = torchvision.models.resnet50()
    backbone.fc = nn.Identity()
    backbone.dim, backbone.image_size = 2048, image_size
    return backbone


def build_backbone(arch, patch, image_size, drop_path=0.0):
    """An untrained backbone. ValueError: an unknown name, or a size that the patch does not divide."""
    if arch == "resnet50":
        return resnet50(image_size)
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}: choose from {', '.join(ARCHITECTURES)}, resnet50")
    return ViT(patch, image_size=image_size, drop_path=drop_path, **ARCHITECTURES[arch])


def untrained(backbone, seed=0):
    """A backbone of the same architecture with fresh weights, in evaluation mode on the same device."""
    torch.manual_seed(seed)
    fresh = like(backbone.state_dict()) if isinstance(backbone, ViT) else resnet50(backbone.image_size)
    return fresh.to(next(backbone.parameters()).device).eval()


def like(state):
    """An untrained ViT whose parameters have the shapes of state's, as far as the few that tell the architecture go. KeyError or the like: they do not."""
    dim, pixels = state["patch_embed.proj.weight"].shape
    side, patch = math.isqrt(state["pos_embed"].shape[1] - 1), math.isqrt(pixels // 3)
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    heads = {a["dim"]: a["heads"] for a in ARCHITECTURES.values()}.get(dim, max(1, dim // 64))  # the one thing that no tensor tells
    return ViT(patch, dim, depth, heads, side * patch)


def download(name):
    """The released weights of that name, from torch.hub's cache or the authors' server. ValueError: neither, with the URL and the cache's folder."""
    url, folder = RELEASED_AT + RELEASED[name], Path(torch.hub.get_dir(), "checkpoints")
    try:
        path = folder / url.split("/")[-1]
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path)
    except OSError as error:
        raise ValueError(f"cannot download {url} ({error}): put the file into {folder}") from None
    return path


def load_checkpoint(path):
    """The dictionary in a checkpoint file. Only tensors and plain values are read: no file can run code (weights_only=True).

    ValueError: missing, truncated or foreign files, with the reason.
    """
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {str(path)!r}")
    try:
        with torch.serialization.safe_globals(SAFE):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file may be wrong in any way
        reason = "it holds code or objects, which are never loaded"
        if "Weights only" not in str(error):
            reason = f"cut short or of another kind ({(str(error).splitlines() or [repr(error)])[0]})"
        raise ValueError(f"{str(path)!r} is not a readable checkpoint: {reason}") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{str(path)!r} holds a {type(checkpoint).__name__}, not a dictionary of weights")
    return checkpoint


def load_backbone(source, network="teacher"):
    """A backbone in evaluation mode, and the arguments it was trained with ({} if the file has none).

    source: a released name (RELEASED), our checkpoint, the authors' full checkpoint, or a bare backbone of ours, theirs or timm's. The architecture is
    read from the tensors. ValueError: anything that does not fit as a whole, with the keys that do not.
    """
    path = download(source) if source in RELEASED else source
    state = checkpoint = load_checkpoint(path)
    if "teacher" in checkpoint or "student" in checkpoint:
        if network not in checkpoint:
            raise ValueError(f"{str(path)!r} has no {network}, only {', '.join(map(str, checkpoint))}")
        state = checkpoint[network]
    for wrapper in ("state_dict", "model"):
        state = state[wrapper] if isinstance(state, dict) and isinstance(state.get(wrapper), dict) else state
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()):
        raise ValueError(f"{str(path)!r} has no weights where a backbone should be: {list(state)[:4] if isinstance(state, dict) else type(state).__name__}")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("backbone.") for key in state):
        state = {key.removeprefix("backbone."): value for key, value in state.items() if not key.startswith("head.")}
    if (kernel := state.get("patch_embed.proj.weight", torch.empty(0))).ndim == 4:
        state["patch_embed.proj.weight"] = rearrange(kernel, "d c p q -> d (c p q)")
    args = checkpoint.get("args", {})
    args = args if isinstance(args, dict) else vars(args)
    try:
        backbone = resnet50(args.get("global_size", 224)) if "layer4.0.conv1.weight" in state else like(state)
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        raise ValueError(f"{str(path)!r} is not a DINO backbone: its keys begin with {', '.join(list(state)[:4])}") from None
    want = {key: value.shape for key, value in backbone.state_dict().items()}
    wrong = sorted(key for key in want | state if key not in want or key not in state or want[key] != state[key].shape)
    if wrong:
        raise ValueError(f"{str(path)!r} does not fit the backbone that it resembles: missing, unexpected or misshapen {', '.join(wrong[:4])}")
    backbone.load_state_dict(state)
    return backbone.eval(), args


def usable_device(name):
    """torch.device(name), if tensors can be put there. ValueError: they cannot."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None


def amp_dtype(amp, device):
    """--amp -> the dtype of autocast, or None for float32. auto: bf16 where the GPU has it, else fp16; off on a CPU."""
    if amp == "auto":
        amp = "off" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def describe(backbone):
    if not isinstance(backbone, ViT):
        return "ResNet-50"
    depth = len(backbone.blocks)
    name = f"ViT of width {backbone.dim}, {depth} block{'s' * (depth > 1)}, {backbone.blocks[0].attn.heads} heads"
    return f"{name}, patch {backbone.patch}, trained at {backbone.image_size} pixels"


def export(backbone):
    """The backbone's state dict with the patch embedding as a convolution's: timm's and the authors' models load it strictly."""
    state = backbone.state_dict()
    if isinstance(backbone, ViT):
        kernel = state["patch_embed.proj.weight"]
        state["patch_embed.proj.weight"] = rearrange(kernel, "d (c p q) -> d c p q", c=3, p=backbone.patch)
    return state


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Writes a checkpoint's backbone as a bare state dict, which timm and the authors' code load.")
    parser.add_argument("checkpoint", help=f"a checkpoint, or {', '.join(RELEASED)}")
    parser.add_argument("file", help="where the state dict goes")
    parser.add_argument("--network", choices=("teacher", "student"), default="teacher", help="which of a checkpoint's two networks")
    return parser.parse_args(argv)


def main(args):
    from run import write_whole

    backbone, _ = load_backbone(args.checkpoint, args.network)
    write_whole(args.file, lambda file: torch.save(export(backbone), file))
    print(f"{args.checkpoint}: {describe(backbone)} -> {args.file}")


if __name__ == "__main__":
    from run import command

    command(main, parse_args)
