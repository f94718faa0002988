"""Copy detection on Copydays (section 4.2.1, Table 4).

    python evaluate.py copydays CKPT --data COPYDAYS [--distractors FOLDER] [--whitening FOLDER]

COPYDAYS holds original/ and blocks of copies: strong/, jpegqual/3, ..., crops/10, .... A copy
belongs to the original whose name has the same first four characters; it is looked for among the
originals and the distractors. The feature is the class token and the patch tokens pooled by GeM, of
the image resized to a square, whitened if asked for. Mean average precision is over all ranks,
where the reference code stops at 20, and whitening takes the covariance around the mean, where the
reference code takes it around 0.
"""

from pathlib import Path

import torch

from evaluation.features import (
    add_extraction_flags,
    add_untrained_flag,
    extract_features,
    extraction,
    square,
)
from evaluation.ranking import mean_average_precision
from util.data import Files, Folder
from util.distributed import rank0_first
from util.misc import say
from vit import ViT


def open_copydays(data):
    """Open a folder in Copydays' layout: (originals, {block: (copies, their originals' numbers)}).

    ValueError: there are no originals or no copies, two originals begin alike, or a copy has none.
    """
    root = Path(data)
    originals = Folder(root / "original")
    number = {}
    for i, path in enumerate(originals.paths):
        start = Path(path).name[:4]
        if start in number:
            raise ValueError(
                f"{originals.paths[number[start]]!r} and {path!r} begin with the same four "
                "characters, which say what a copy's original is"
            )
        number[start] = i
    blocks = {}
    for path in Folder(root).paths:
        block, name = Path(path).parent.as_posix(), Path(path).name
        if block.split("/")[0] == "original":
            continue
        if name[:4] not in number:
            raise ValueError(f"{str(root / path)!r} is a copy of no image in original/")
        copies, numbers = blocks.setdefault(block, (Files(root, []), []))
        copies.paths.append(path)
        numbers.append(number[name[:4]])
    if not blocks:
        raise ValueError(f"{str(data)!r} holds originals, but no copies of them")
    return originals, blocks


def whitening(features):
    """Learn a whitening from features [n, d]: a function of features [m, d].

    Each principal component is divided by the root of its eigenvalue, at least 1e-5 of the largest.
    ValueError: all features are the same.
    """
    x = features.double()
    mean = x.mean(0)
    value, vector = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    if value.max() <= 0:
        raise ValueError("a whitening needs images whose features differ")
    scaled = vector / value.clamp_min(1e-5 * value.max()).sqrt()
    return lambda features: ((features.double() - mean) @ scaled).float()


def detect_copies(backbone, originals, blocks, distractors, learned_from, how):
    """Look for each copy's original, and return each block's mAP in per cent: {name: mAP}.

    distractors, and the images that a whitening is learned from, may be None.
    """
    database, read = extract_features(backbone, originals, how)
    place = {number: [n] for n, number in enumerate(read)}  # of an original in the database
    if distractors:
        database = torch.cat([database, extract_features(backbone, distractors, how)[0]])
    if learned_from:
        whiten = whitening(extract_features(backbone, learned_from, how)[0])
        database = whiten(database)
    figures = {}
    for name, (copies, numbers) in blocks.items():
        queries, read = extract_features(backbone, copies, how)
        if learned_from:
            queries = whiten(queries)
        positives = [place.get(numbers[i], []) for i in read]
        figures[name] = mean_average_precision(queries, database, positives)
    return figures


def add_flags(parser, command):
    add_extraction_flags(parser, "side in pixels (default: the training size; the paper's: 224, or "
                         "320 for ViT-B/8)")  # fmt: skip
    add_untrained_flag(parser, "no")
    add = parser.add_argument
    add("--distractors", type=Path, help="a folder of images that are no originals")
    add("--whitening", type=Path, help="a folder of other images to learn a whitening from")


def evaluate(args, subject):
    """Print each block's mean average precision, and return them."""
    backbone, is_vit = subject.backbone, isinstance(subject.backbone, ViT)
    how = extraction(args, subject, fit=square, gem=is_vit)
    width = how.width(backbone)
    distractors = rank0_first(lambda: Folder(args.distractors)) if args.distractors else None
    learned_from = rank0_first(lambda: Folder(args.whitening)) if args.whitening else None
    originals, blocks = rank0_first(lambda: open_copydays(subject.data))
    if learned_from and len(learned_from) < width:
        say(f"note: a whitening of {width} dimensions is learned from {len(learned_from)} images")
    columns = {}
    for name, network in subject.networks(args.untrained).items():
        columns[name] = detect_copies(network, originals, blocks, distractors, learned_from, how)

    others = f" among {len(distractors)} distractors" if distractors else ""
    say(f"{subject.data}: {len(originals)} originals{others}; mean average precision in %")
    say(f"{'':16}  copies" + "".join(f"  {name:>10}" for name in columns))
    for name, (copies, _) in blocks.items():
        row = "".join(f"  {column[name]:10.1f}" for column in columns.values())
        say(f"{name:16}  {len(copies):6}{row}")
    settings = {"gem": is_vit, "dtype": str(how.dtype), "originals": len(originals)}
    settings["whitening"] = args.whitening and str(args.whitening)
    return settings | {"distractors": len(distractors or ()), **columns}
