"""What a trained network is used for: the likeliest classes of images, its weights in other code.

    python evaluate.py predict CKPT runs/laptop/linear.pth img.jpg     by a linear classifier
    python evaluate.py export  CKPT backbone.pth                       for timm, the authors' code
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from evaluation.features import Extraction, features_of, made_by
from util.checkpoint import export, load_checkpoint
from util.config import count
from util.images import stills
from util.misc import atomic_write, say


def add_flags(parser, command):
    add = parser.add_argument
    if command == "export":
        add("file", type=Path, help="where the state dict goes")
        return
    add("head", type=Path, help="linear.pth, as evaluate.py linear writes it")
    add("images", nargs="+", type=Path, help="images, or folders of images")
    add("--top", type=count, default=3, help="how many classes")


def evaluate(args, subject):
    if args.command == "predict":
        predict(args, subject)
        return
    if args.file.exists():
        raise ValueError(f"{args.file} is there already: choose another name")
    state = export(subject.backbone.cpu())
    atomic_write(args.file, lambda file: torch.save(state, file))
    say(f"-> {args.file}")


def predict(args, subject):
    """Print the likeliest classes of images, with the probability that linear.pth gives them.

    ValueError: it is another network's, or none of the images can be read.
    """
    saved, backbone = load_checkpoint(args.head), subject.backbone
    kind = {name: saved.get(name) for name in ("n_last_blocks", "avgpool_patchtokens", "size")}
    if "made_by" not in saved:
        raise ValueError(f"{str(args.head)!r} is no linear.pth: evaluate.py linear writes one")
    how = Extraction(subject.device, **kind)
    if saved["made_by"] != made_by(backbone, how):
        raise ValueError(f"{str(args.head)!r} belongs to another network than {args.checkpoint}")
    weight, bias = (saved["head"][name].to(subject.device) for name in ("weight", "bias"))
    for path, image in stills(*args.images):
        crop = how.fit(image, how.size_for(backbone))[None]
        logits = F.linear(features_of(backbone, crop, how), weight, bias)[0]
        probability, order = logits.softmax(0).topk(min(args.top, len(logits)))
        likeliest = []
        for share, number in zip(probability.tolist(), order.tolist()):
            likeliest.append(f"{100 * share:.1f} % {saved['classes'][number]}")
        say(f"{path}: {', '.join(likeliest)}")
