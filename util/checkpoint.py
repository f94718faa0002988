"""Backbones by name, and weights in and out: any DINO checkpoint is read, none in part.

Wherever a checkpoint is asked for, these work: ours, the authors', the names in RELEASED, and files
of the same network by other names (NAMES), with more on top (LEFT_OUT). A file that does not fit as
a whole is an error that says which keys, and no file can run code.
"""

import argparse
import math
import re
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from einops import einsum, rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from util.config import starts_anew
from util.misc import first_line
from util.safetensors import is_plain, read_safetensors
from vit import ARCHITECTURES, ViT

RELEASED_AT = "https://dl.fbaipublicfiles.com/dino/"
RELEASED = {
    "dino_vits16": "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "dino_vits8": "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    "dino_vitb16": "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "dino_vitb8": "dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
    "dino_resnet50": "dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
    "dino_vits16_landmarks": "dino_vitsmall16_googlelandmark_pretrain/"  # for retrieval (Table 3)
    "dino_vitsmall16_googlelandmark_pretrain.pth",
}
WRAPPER = re.compile(r"\b(teacher|student|state_dict|model)$")  # dictionaries of weights in a file
NAMES = {  # how others call the parts of the same network, and we, replaced in this order
    r"_orig_mod\.": "",  # torch.compile's
    r"^((module|state_dict|model|backbone|vit|dinov2|encoder|embeddings|"
    r"teacher|student|momentum|base)[._])*": "",  # what may stand before
    r"^class_token$": "cls_token",
    r"^(position_embeddings|pos_embedding)$": "pos_embed",
    r"^(patch_embeddings\.projection|patch_embed\.projection|conv_proj)\.": "patch_embed.proj.",
    r"^(layers?\.(encoder_layer_)?|blocks\.\d+\.(?=\d))": "blocks.",
    r"\.(layernorm_before|ln_?1)\.": ".norm1.",
    r"\.(layernorm_after|ln_?2)\.": ".norm2.",
    r"^(layernorm|ln1?)\.": "norm.",
    r"\.(self_attention|attention(\.attention)?)\.": ".attn.",
    r"\.(q|k|v)(uery|ey|alue|_proj)\.": r".\1.",
    r"\.in_proj_": ".qkv.",
    r"\.attn\.(output\.dense|out_proj|o_proj)\.": ".attn.proj.",
    r"\.(intermediate\.dense|mlp\.(0|linear_1)|ffn\.layers\.0\.0)\.": ".mlp.fc1.",
    r"\.(output\.dense|mlp\.(3|linear_2)|ffn\.layers\.1)\.": ".mlp.fc2.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
}
LEFT_OUT = re.compile(  # what in a file is no part of the backbone
    r"(\w+_)?(heads?|classifier|projector|predictor|loss\w*|criterion|fc|pooler|neck)\."
    r"|mask_token$|center$"
)
OTHERS = {  # what among the names in a file tells that it is something else
    r"\brope_|storage_token|^(?!.*pos\w*_embed).*\breg(ister)?_token": "DINOv3",
    r"\breg(ister)?_token": "a ViT with registers",
    r"\.w12\.|weights_in": "a ViT with SwiGLU",
    r"\bdist_token|distillation_token": "a distilled DeiT, with a second token",
    r"\bdecoder": "an MAE with its decoder",
    r"\bvisual\.|class_embedding|\bln_pre|\bnorm_pre": "a CLIP",
    r"\bfc_norm\.": "a ViT that pools patch tokens, with fc_norm in place of norm",
    r"target_encoder|^(?!.*cl\w*s_token).*pos\w*_embed": "a ViT without a class token (I-JEPA)",
}


class PassedOver:
    """Stands for an object in a file that is no tensor and no plain value: it keeps nothing."""

    __init__ = __setstate__ = lambda self, *parts: None


OBJECTS = (
    "datetime.datetime datetime.date datetime.timedelta datetime.timezone pathlib.PosixPath "
    "pathlib.WindowsPath pathlib._local.PosixPath pathlib._local.WindowsPath numpy.ndarray "
    "numpy.dtype numpy.core.multiarray.scalar numpy.core.multiarray._reconstruct "
    "numpy._core.multiarray.scalar numpy._core.multiarray._reconstruct"
)
SAFE = [argparse.Namespace, *((PassedOver, name) for name in OBJECTS.split())]


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(backbone, ViT):
            sizes = backbone.patch_size, backbone.embed_dim, len(backbone.blocks)
            fresh = ViT(*sizes, backbone.num_heads, backbone.img_size)
        else:
            fresh = resnet50(backbone.img_size)
    return fresh.to(next(backbone.parameters()).device).eval()


def describe(backbone):
    """Say in a few words what a backbone is."""
    if not isinstance(backbone, ViT):
        return "ResNet-50"
    depth = len(backbone.blocks)
    blocks = "1 block" if depth == 1 else f"{depth} blocks"
    size = f"width {backbone.embed_dim}, {blocks}, {backbone.num_heads} heads"
    return f"ViT of {size}, patch {backbone.patch_size}"


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
        raise ValueError(f"no checkpoint at {str(path)!r}; released are {', '.join(RELEASED)}")
    with open(path, "rb") as file:
        start = file.read(64)
    try:
        if start[8:9] == b"{":
            return read_safetensors(path)
        with torch.serialization.safe_globals(SAFE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript's: an error follows
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file may be wrong in any way
        kind = "another tool's zip" if zipfile.is_zipfile(path) else "cut short or of another kind"
        reason = f"{kind} ({first_line(error)})"
        if start.startswith(b"version https://git-lfs"):
            reason = "a pointer in the place of the file, which git lfs pull fetches"
        elif start.lstrip().startswith(b"<"):
            reason = "a web page"
        elif "weights_only" in str(error):
            reason = "it holds code, which is never loaded" if start[:1] in b"P\x80" else kind
        raise ValueError(f"{str(path)!r} is not a readable checkpoint: {reason}") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{str(path)!r} holds a {type(checkpoint).__name__}, not weights by name")
    return checkpoint


def download(name):
    """Return released weights, from torch.hub's cache or the authors' server. ValueError: none."""
    url = RELEASED_AT + RELEASED[name]
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except Exception as error:  # of the network, or of a file that was put there
        place = Path(torch.hub.get_dir(), "checkpoints")
        raise ValueError(f"cannot load {url} ({first_line(error)}): put it into {place}") from None


def load_backbone(source, network="teacher", num_heads=None):
    """Load a backbone: source is a path or a name in RELEASED. Returns Loaded.

    network: which of a checkpoint's two networks. num_heads: of a ViT, for a file that does not
    say. ValueError: what does not fit as a whole or is not finite, with the keys.
    """
    checkpoint = download(source) if source in RELEASED else load_checkpoint(source)
    args = getattr(checkpoint.get("args"), "__dict__", checkpoint.get("args"))  # of a Namespace
    items = args.items() if isinstance(args, dict) else ()
    trained_with = {k: v for k, v in items if isinstance(v, (bool, int, float, str, list))}
    state, which, note = backbone_state(checkpoint, network, source)
    try:
        with torch.device("meta"):  # the file's tensors take the place of the parameters
            if "layer4.0.conv1.weight" in state:
                backbone = resnet50(int(trained_with.get("global_crops_size", 224)))
            else:
                saved = checkpoint.get("num_heads")
                if num_heads and saved and num_heads != saved:
                    raise ValueError(f"it says {saved} heads: leave --num_heads {num_heads} out")
                if not (num_heads or saved):
                    note += " (the number of heads is an assumption: --num_heads sets it)"
                backbone = vit_from_shapes(state, num_heads or saved)
                state = fold(state, len(backbone.blocks))
    except Exception as error:  # a foreign file may be wrong in any way
        keys = f"its keys begin with {', '.join(list(state)[:4])} ({first_line(error)})"
        raise ValueError(f"{str(source)!r} is not a DINO backbone, {keys}") from None
    load_strictly(backbone, state, source)
    what = f"{describe(backbone)}, for {backbone.img_size} pixels{note}"
    return Loaded(backbone.eval(), trained_with, f"{source}: {which}, {what}")


def backbone_state(checkpoint, network, source):
    """Find a backbone's weights in a checkpoint: (state dict by our names, which, a note).

    which: "teacher", "student" or "backbone". ValueError: another architecture, or no weights.
    """
    weights, left_out = checkpoint, set()
    for _ in range(3):  # one dictionary may be in another
        parts = [k for k in weights if isinstance(weights[k], dict) and WRAPPER.search(str(k))]
        if parts:
            others = {k: x for k, x in weights.items() if k not in parts and isinstance(x, dict)}
            left_out |= {str(k) for k, x in others.items() if any(map(torch.is_tensor, x.values()))}
            beside = {k: x for k, x in weights.items() if torch.is_tensor(x)}
            weights = beside | {f"{k}.{name}": x for k in parts for name, x in weights[k].items()}
    names = " ".join(map(str, weights))
    for pattern, kind in OTHERS.items():
        if re.search(pattern, names):
            raise ValueError(f"{str(source)!r} is {kind}: another architecture")

    named = re.search("teacher|momentum|student", names)
    which, usual = (network, "student") if named else ("backbone", "backbone")
    state = {}
    for key, value in weights.items():
        if not (isinstance(key, str) and key.isprintable() and torch.is_tensor(value)):
            raise ValueError(f"{str(source)!r} has no weights where a backbone should be: {key!r}")
        name = key
        for pattern, ours in NAMES.items():
            name = re.sub(pattern, ours, name)
        owner = "teacher" if re.search("teacher|momentum", key) else usual
        if owner != which or LEFT_OUT.match(name):
            left_out.add(name.split(".")[0] if owner == which else owner)
        elif not is_plain(value) or value.is_floating_point() == name.endswith("_tracked"):
            kind = f"{value.dtype}, {value.layout}, {value.device}"
            raise ValueError(f"{str(source)!r}: {key} is of a kind that is not read, {kind}")
        elif name in state:
            raise ValueError(f"{str(source)!r} has {name} twice")
        else:
            state[name] = value.float() if value.is_floating_point() else value
    rest = ", ".join(sorted(left_out))
    if not state:
        raise ValueError(f"{str(source)!r} has no {which}, only {rest or 'nothing'}")
    return state, which, f" (left out: {rest})" if rest else ""


def vit_from_shapes(state, num_heads):
    """Build a ViT from the shapes in a state dict. KeyError or the like: it is not a ViT's."""
    kernel = state["patch_embed.proj.weight"]
    dim, p = len(kernel), math.isqrt(kernel[0].numel() // 3)
    by_width = {a["embed_dim"]: a["num_heads"] for a in ARCHITECTURES.values()}
    num_heads = num_heads or by_width.get(dim, max(1, dim // 64))  # as in the paper
    if type(num_heads) is not int or num_heads < 1 or dim % num_heads:
        raise ValueError(f"--num_heads {num_heads} must divide the width, {dim}")
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    if not p * side * depth or kernel.shape[1:] not in ((3, p, p), (3 * p * p,)):
        raise ValueError(f"no blocks, no positions, or {[*kernel.shape]} in place of [d, 3, p, p]")
    return ViT(p, dim, depth, num_heads, side * p)


def fold(state, depth):
    """Return a ViT's weights with q, k and v in one layer, and LayerScale in the layer before it.

    KeyError or the like: one of them is missing, or does not fit.
    """
    state = state | {"patch_embed.proj.weight": state["patch_embed.proj.weight"].flatten(1)}
    separate, scaled = ".attn.q." in " ".join(state), ".ls1." in " ".join(state)
    for i in range(depth):
        if separate:
            for kind in ("weight", "bias"):
                parts = [state.pop(f"blocks.{i}.attn.{part}.{kind}") for part in "qkv"]
                if f"blocks.{i}.attn.qkv.{kind}" in state:
                    raise ValueError(f"block {i} has q, k and v twice, apart and together")
                state[f"blocks.{i}.attn.qkv.{kind}"] = rearrange(parts, "qkv d ... -> (qkv d) ...")
        if scaled:
            for scale, layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
                gamma = state.pop(f"blocks.{i}.{scale}.gamma")
                for key in (f"blocks.{i}.{layer}.weight", f"blocks.{i}.{layer}.bias"):
                    weight = state[key]
                    state[key] = einsum(gamma.expand(len(weight)), weight, "d, d ... -> d ...")
    return state


def load_strictly(module, state, source):
    """Load a state dict. ValueError: keys, shapes or values do not fit, with their names."""
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{str(source)!r}: {key} holds values that are not finite")
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(source)!r} does not fit the network: {reason[:1000]}") from None


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
        said = f"--arch and --patch say {describe(backbone)}"
        raise ValueError(f"--init {args.init} is a {describe(loaded)}, {said}")
    backbone.load_state_dict(state)
    return backbone


def export(backbone):
    """Return a state dict as timm and the authors have it: a convolution embeds the patches."""
    state = backbone.state_dict()
    if isinstance(backbone, ViT):
        kernel, p = state["patch_embed.proj.weight"], backbone.patch_size
        state["patch_embed.proj.weight"] = rearrange(kernel, "d (c p q) -> d c p q", p=p, q=p)
    return state
