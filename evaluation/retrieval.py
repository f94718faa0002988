"""Nearest neighbours of one's own images by their features: search, copies, features (4.2.1).

    python evaluate.py search   CKPT query.jpg --data FOLDER    the nearest images of a folder
    python evaluate.py copies   CKPT --data FOLDER              groups of near-duplicates in it
    python evaluate.py features CKPT --data FOLDER              features for other tools

The feature of an image is the class token of the last block, of the image's central crop as in
evaluate.py; similarity is the cosine. Features of a folder are kept with --cache, and only those of
new or changed files are computed again. The benchmarks are in revisitop.py and copydays.py.
"""

import io
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes

from evaluation.features import add_extraction_flags, extract_features, extraction, features_of
from util.config import count, share
from util.data import Files, Folder
from util.distributed import rank0_first
from util.images import read_image, stills, to_tensor
from util.misc import Progress, atomic_write, is_main_process, say
from util.plot import BLUE, ORANGE, draw_panels, shown

ROWS, COLUMNS = 10, 8  # of a picture, at most
SAMPLE = 200  # images, copies of which say how near copies are
BLOCK = (1024, 4096)  # similarities computed at once: 16 MB


def index_folder(args, subject):
    """Return (Extraction, images, features [n, d]) of the folder --data, normalised, on the host.

    What cannot be read is left out. ValueError: it is not a folder, or holds no image.
    """
    if not Path(subject.data).is_dir():
        raise ValueError(f"{subject.data!r} is no folder of images: name one with --data")
    images = rank0_first(lambda: Folder(subject.data))
    if images.note:
        say(f"note: {images.note}")
    how = extraction(args, subject)
    features, read = extract_features(subject.backbone, images, how)
    images = Files(images.root, [images.paths[i] for i in read])
    return how, images, F.normalize(features, dim=-1).cpu()


# ---- search ----


def search(args, subject):
    """Print the images of the folder that are nearest to each query, and draw them."""
    missing = [str(path) for path in args.query if not path.exists()]
    if missing:  # said before the folder is read, which may take long
        raise ValueError(f"there is no {missing[0]!r}")
    how, images, features = index_folder(args, subject)
    rows, queries, frames = [], 0, ""
    labels = {Path(path).parent.name for path in images.paths}  # the names of their folders
    for path, image in stills(*args.query):
        crop = how.fit(image, how.size_for(subject.backbone))[None]
        query = F.normalize(features_of(subject.backbone, crop, how), dim=-1)[0].cpu()
        neighbours = nearest(query, images, features, args.top, path)
        queries += 1
        say(str(path))
        for cosine, name in neighbours:
            say(f"  {cosine:6.3f}  {name}")
        if len(rows) < ROWS and is_main_process():
            label = path.absolute().parent.name
            row = {f"query\n{path.name}": shown(image)}
            for n, (cosine, name) in enumerate(neighbours[:COLUMNS]):
                found = shown(read_image(name))
                if label in labels:
                    frames = "; blue: in a folder named like the query's, orange: in another"
                    color = BLUE if Path(name).parent.name == label else ORANGE
                    box = torch.tensor([[0, 0, found.shape[2] - 1, found.shape[1] - 1]])
                    found = draw_bounding_boxes(found, box, colors=color, width=6)
                row[f"{n + 1}\n{Path(name).name}\n{cosine:.3f}"] = found
            rows.append(row)
    if is_main_process():
        draw_panels(rows, subject.folder / "search.png", f"the nearest images, by cosine{frames}")
        say(f"-> {subject.folder / 'search.png'}")
    return {"queries": queries, "images": len(images), "top": args.top}


def nearest(query, images, features, top, path):
    """Return [(cosine, name), ...] of the images nearest to a query [d], but not of itself."""
    value, order = (features @ query).topk(min(top + 10, len(images)))  # some may be links to it
    found = []
    for cosine, i in zip(value.tolist(), order.tolist()):
        place = Path(images.name(i))
        if not (place.exists() and path.exists() and place.samefile(path)):
            found.append((cosine, images.name(i)))
    return found[:top]


# ---- copies ----


class Recompressed(Files):
    """Image files, compressed by JPEG at quality 10."""

    def __getitem__(self, i):
        file = io.BytesIO()
        to_pil_image(super().__getitem__(i)).save(file, "JPEG", quality=10)
        return to_tensor(Image.open(file))


def find_copies(args, subject):
    """Print groups of images that are copies of one another, the largest first, and draw them."""
    how, images, features = index_folder(args, subject)
    threshold = args.threshold
    if threshold is None:
        threshold = usual_threshold(subject.backbone, how, images, features)
    groups = near_duplicates(features, threshold)
    grouped = sum(map(len, groups))
    say(
        f"{subject.data}: {grouped} of {len(images)} images are in {len(groups)} groups "
        f"linked by cosines of {threshold:.3f} or more"
    )
    for n, group in enumerate(groups):
        x = features[group]
        least = min((part @ x.T).min().item() for part in x.split(BLOCK[0]))
        say(f"group {n + 1}, {len(group)} images, the least cosine of two of them {least:.3f}")
        for i in group:
            say(f"  {images.name(i)}")
    if groups and is_main_process():
        rows = []
        for group in groups[:ROWS]:
            few = enumerate(group[: COLUMNS + 1], 1)
            rows.append({f"{m}\n{Path(images.name(i)).name}": shown(images[i]) for m, i in few})
        draw_panels(rows, subject.folder / "copies.png", "a group of near-duplicates in each row")
        say(f"-> {subject.folder / 'copies.png'}")
    figures = {"images": len(images), "groups": len(groups), "copies": grouped}
    return {"threshold": threshold, **figures}


def usual_threshold(backbone, how, images, features):
    """Choose the cosine that nine in ten copies of these images reach, made here by JPEG.

    How near two images are depends on the network. If more than 1 % of pairs of different images
    are as near, it is said that the network does not tell copies.
    """
    sample = Random(0).sample(range(len(images)), min(SAMPLE, len(images)))
    copies = Recompressed(images.root, [images.paths[i] for i in sample])
    x, read = extract_features(backbone, copies, replace(how, cache=None))
    cosines = F.normalize(x, dim=-1).cpu() @ features[[sample[n] for n in read]].T
    threshold = cosines.diagonal().quantile(0.1).item()
    others = cosines[~torch.eye(len(read), dtype=torch.bool)]
    share = (others >= threshold).float().mean().item() if len(others) else 0
    say(
        f"--threshold {threshold:.3f}: so near are nine in ten copies made here by JPEG at quality "
        f"10, and {100 * share:.3g} % of pairs of different images"
    )
    if share > 0.01:
        say("note: this network does not tell copies of these images from others")
    return threshold


def near_duplicates(features, threshold):
    """Group normalised features [n, d] that are linked by cosines of at least threshold.

    Returns lists of indices, the largest group first. Pairs are looked at in blocks.
    """
    n, (height, width) = len(features), BLOCK
    group = torch.arange(n)  # of each image; in the end the lowest index in its group
    progress = Progress(n)
    for top in range(0, n, height):
        rows = features[top : top + height]
        for left in range(top, n, width):
            similarity = rows @ features[left : left + width].T
            near = (similarity > threshold - 1e-6).nonzero()  # a copy's cosine may be 1 - 1e-7
            group = link(group, near[:, 0] + top, near[:, 1] + left)
        done = min(top + height, n)
        progress.show(done, f"images {done}/{n}")
    order = group.argsort(stable=True)
    _, counts = group[order].unique_consecutive(return_counts=True)
    groups = [part.tolist() for part in order.split(counts.tolist()) if len(part) > 1]
    return sorted(groups, key=len, reverse=True)


def link(group, first, second):
    """Put the groups of first [m] and second [m] together, pair by pair: the new groups [n].

    This is union-find by the lowest label, for all pairs at once.
    """
    while True:
        a, b = group[first], group[second]
        if torch.equal(a, b):
            return group
        lower = torch.minimum(a, b)
        group = group.scatter_reduce(0, a, lower, "amin").scatter_reduce(0, b, lower, "amin")
        while not torch.equal(group[group], group):
            group = group[group]


# ---- features for other tools ----


def write_features(args, subject):
    """Write the folder's features [n, d] and their images' names as numpy's .npz."""
    _, images, features = index_folder(args, subject)
    path = args.file or subject.folder / "features.npz"
    arrays = {"features": features.numpy(), "names": np.array(images.paths)}
    if is_main_process():
        atomic_write(path, lambda file: np.savez(file, **arrays))
    n, width = features.shape
    say(f"{subject.data}: {n} features of {width} numbers, normalised -> {path}")
    return {"images": n, "width": width, "file": str(path)}


# ---- the commands ----


def add_flags(parser, command):
    add_extraction_flags(parser)
    add = parser.add_argument
    if command == "search":
        add("query", nargs="+", type=Path, help="images, or folders of images")
        add("--top", type=count, default=8, help="how many neighbours of each")
    elif command == "copies":
        add("--threshold", type=share, help="the least cosine of a pair (default: what nine in ten "
            "copies by JPEG of a sample of these images reach)")  # fmt: skip
    else:
        add("--file", type=Path, help="where they go (default: features.npz in the output folder)")


def evaluate(args, subject):
    file = getattr(args, "file", None)
    if file and (file.exists() or not file.absolute().parent.is_dir()):
        raise ValueError(f"--file {file} is there already, or its folder is not: choose another")
    functions = {"search": search, "copies": find_copies, "features": write_features}
    return functions[args.command](args, subject)
