"""Video object segmentation as DAVIS measures it (section 4.2.2, Table 5): the figures J and F.

    python segment.py davis CKPT --data path/to/DAVIS            each object from its first mask
    python segment.py davis --data path/to/DAVIS --results DIR   what another tool has written
    python segment.py davis CKPT --data shapes                   built-in films

J is the Jaccard index of a result and the truth, F the harmonic mean of precision and recall of
their boundaries, each over the frames without the first and the last, where void pixels (255) do
not count. Of each, the mean, the recall (share of frames above 0.5) and the decay (mean of the
first quarter less that of the last) are averaged over the objects of all sequences. They stand
beside those of the first mask copied to every frame, which needs no network.

Masks are uint8 [h, w].
"""

import math
import time
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F

from backbone import require_vit
from distributed import combine, in_turn
from features import usual_size
from film import names_in, stills
from masks import VOID, numbers_in, read_mask, voc_palette, write_mask
from propagation import carry_mask, propagation_of
from shapes import ShapesFilm
from terminal import progress, say

SHAPES_FILMS = 20
LISTS = {  # the benchmark's year -> where the names of its sequences stand
    2017: ("ImageSets/2017/val.txt",),
    2016: ("ImageSets/2016/val.txt", "ImageSets/480p/val.txt"),
}


# ---- the figures ----


def region_similarity(result, truth, void):
    """J, the Jaccard index outside void: masks bool [o, h, w] -> [o]; 1 where both are empty."""
    result, truth = result & ~void, truth & ~void
    intersection = (result & truth).sum((1, 2)).double()
    union = (result | truth).sum((1, 2)).double()
    return torch.where(union > 0, intersection / union, 1.0)


def boundary(masks):
    """The pixels of bool [o, h, w] that differ from the one to the right, below, or right below.

    In the last row only the right one counts, in the last column only the one below.
    """
    around = F.pad(masks.byte(), (0, 1, 0, 1))  # reads past the edge; set below
    right, below = around[:, :-1, 1:] > 0, around[:, 1:, :-1] > 0
    corner = around[:, 1:, 1:] > 0
    edges = (masks ^ right) | (masks ^ below) | (masks ^ corner)
    edges[:, -1] = masks[:, -1] ^ right[:, -1]
    edges[:, :, -1] = masks[:, :, -1] ^ below[:, :, -1]
    edges[:, -1, -1] = False
    return edges


def dilate(edges, radius):
    """Grow bool [o, h, w] by a disk, x^2 + y^2 <= radius^2: row by row of the disk."""
    h, w = edges.shape[1:]
    grown = torch.zeros_like(edges)
    so_far = F.pad(edges, (radius + 1, radius)).cumsum(2, dtype=torch.int32)
    reach = min(radius, h - 1)
    for y in range(-reach, reach + 1):
        x = math.isqrt(radius**2 - y**2)
        last, before = radius + 1 + x, radius - x
        row = so_far[:, :, last : last + w] > so_far[:, :, before : before + w]  # 2 x + 1 wide
        grown[:, max(0, y) : h + min(0, y)] |= row[:, max(0, -y) : h + min(0, -y)]
    return grown


def contour_accuracy(result, truth, void):
    """F, how well boundaries agree within 0.8 % of the diagonal: masks bool [o, h, w] -> [o]."""
    radius = math.ceil(0.008 * math.hypot(*truth.shape[1:]))
    result, truth = boundary(result & ~void), boundary(truth & ~void)
    in_result, in_truth = result.sum((1, 2)).double(), truth.sum((1, 2)).double()
    precision = (result & dilate(truth, radius)).sum((1, 2)) / in_result
    recall = (truth & dilate(result, radius)).sum((1, 2)) / in_truth
    precision = torch.where(in_result > 0, precision, 1.0)  # no boundary: nothing is wrong
    recall = torch.where(in_truth > 0, recall, 1.0)
    both = precision + recall
    return torch.where(both > 0, 2 * precision * recall / both, 0.0)


def compare(result, truth, numbers):
    """J and F of each numbered object: masks [h, w] -> [o, 2]. ValueError: the sizes differ."""
    if result.shape != truth.shape:
        (h, w), (height, width) = result.shape, truth.shape
        raise ValueError(f"a mask of {w} x {h} pixels, the truth of {width} x {height}")
    void = truth == VOID
    result = torch.stack([result == number for number in numbers])
    truth = torch.stack([truth == number for number in numbers])
    both = region_similarity(result, truth, void), contour_accuracy(result, truth, void)
    return torch.stack(both, 1)


def summarize(values):
    """Mean, recall and decay over frames: [frames, o, 2] -> [o, 2, 3]."""
    cuts = torch.linspace(1, len(values), 5, dtype=torch.double)
    cuts = ((cuts + 1e-10).round().long() - 1).tolist()
    first, last = values[: cuts[1] + 1], values[cuts[3] :]
    figures = values.mean(0), (values > 0.5).double().mean(0), first.mean(0) - last.mean(0)
    return torch.stack(figures, -1)


def score(sequence, masks):
    """Compare a mask for each frame with the truth: [o, 2, 3], of J and F mean, recall, decay.

    masks: an iterable of masks from the first frame on; the first and the last are not looked at.
    """
    values = []
    for t, mask in enumerate(masks):
        if 0 < t < len(sequence) - 1:
            values.append(compare(mask, sequence.mask(t), sequence.numbers))
    return summarize(torch.stack(values))


# ---- the sequences ----


class Sequence:
    """A video with a mask for each frame: sequence[t] is uint8 [3, h, w].

    numbers: those of the objects in its first mask. merged: all objects are one, as in DAVIS 2016.
    ValueError: fewer than three frames, a frame without a mask, or a first mask without an object.
    """

    def __init__(self, frames, masks, merged=False):
        self.title = frames.name
        self.frames, self.masks = frames, masks
        self.merged = merged
        for folder in (frames, masks):
            if not folder.is_dir():
                raise ValueError(f"there is no folder {str(folder)!r}")
        self.paths = names_in(frames)
        if len(self) < 3:
            raise ValueError("it has fewer than three frames")
        for t in range(len(self)):
            path = masks / self.mask_name(t)
            if not path.exists():
                raise ValueError(f"there is no mask {str(path)!r}")
        self.numbers = numbers_in(self.mask(0))
        if not self.numbers:
            raise ValueError("its first mask shows no object (255 is void)")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, t):
        return next(stills(self.frames / self.paths[t]))[1]

    def mask_name(self, t):
        return Path(self.paths[t]).stem + ".png"

    def mask(self, t):
        return read_numbers(self.masks / self.mask_name(t), self.merged)


def read_numbers(path, merged):
    """Read a mask, with all its objects as one if they are merged."""
    mask, _ = read_mask(path)
    return torch.where((mask > 0) & (mask < VOID), 1, mask) if merged else mask


def open_sequences(data, year=2017):
    """Open the validation sequences of a folder in DAVIS's layout, or the built-in films.

    ValueError: no such folder, list or sequence.
    """
    if data == "shapes":
        return [ShapesFilm(film) for film in range(SHAPES_FILMS)]
    root = Path(data)
    if not root.is_dir():
        raise ValueError(f"no folder {data!r}")
    found = [root / path for path in LISTS[year] if (root / path).exists()]
    if not found:
        raise ValueError(f"{data!r} is not in DAVIS's layout: no {' or '.join(LISTS[year])} in it")
    sequences = {}
    for line in found[0].read_text().splitlines():
        name = line.strip()
        if "/" in name:  # DAVIS 2016 lists the files of each frame
            name = Path(name.split()[0]).parent.name
        if name and name not in sequences:
            folders = root / "JPEGImages/480p" / name, root / "Annotations/480p" / name
            with naming(name):
                sequences[name] = Sequence(*folders, merged=year == 2016)
    if not sequences:
        raise ValueError(f"{str(found[0])!r} names no sequence")
    return list(sequences.values())


@contextmanager
def naming(title):
    """Say in errors which sequence they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"sequence {title!r}: {error}") from None


# ---- the command ----


def copy_first(sequence):
    """Yield the first mask for each frame."""
    yield from repeat(sequence.mask(0), len(sequence))


def carry_first(sequence, backbone, short, how, folder=None):
    """Yield each frame's mask as the backbone carries it. folder: where it is also written."""
    images = (sequence[t] for t in range(len(sequence)))
    for t, mask in enumerate(carry_mask(backbone, images, sequence.mask(0), short, how)):
        if folder:
            place = folder / sequence.title
            place.mkdir(parents=True, exist_ok=True)
            write_mask(place / sequence.mask_name(t), mask, voc_palette())
        yield mask


def read_results(sequence, folder):
    """Yield the masks that another tool has written, but of the first frame the true one.

    ValueError: one is missing, or has a number above those of the first frame's objects.
    """
    yield sequence.mask(0)
    for t in range(1, len(sequence) - 1):
        path = folder / sequence.title / sequence.mask_name(t)
        if not path.exists():
            raise ValueError(f"a result is missing: {str(path)!r}")
        mask = read_numbers(path, sequence.merged)
        if max(numbers_in(mask), default=0) > max(sequence.numbers):
            raise ValueError(f"{str(path)!r} numbers an object that the first frame does not have")
        yield mask


def choose_methods(args, subject):
    """Return what is compared, {name: function(sequence) -> its masks}, and the settings."""
    data = Path(subject.data).resolve()
    if args.write and data.is_dir() and args.write.resolve().is_relative_to(data):
        raise ValueError(f"--write {args.write} is in {subject.data!r}: its masks must stay")
    methods = {"copied": copy_first}
    if args.results:
        methods["results"] = partial(read_results, folder=args.results)
        return methods, {"folder": str(args.results)}
    require_vit(subject.backbone, args.checkpoint)
    short = args.size or usual_size(subject.backbone)
    how = propagation_of(args)
    for name, network in subject.networks(args.untrained).items():
        folder = args.write if name == "trained" else None
        methods[name] = partial(carry_first, backbone=network, short=short, how=how, folder=folder)
    return methods, {"size": short, **how._asdict()}


def evaluate_davis(args, subject):
    """Carry, or read, the masks of all sequences: print their figures, and return the means."""
    methods, settings = choose_methods(args, subject)
    sequences = in_turn(lambda: open_sequences(subject.data, args.year))
    sums = 100 * score_all(sequences, methods, subject.rank, subject.world)

    objects = torch.tensor([len(sequence.numbers) for sequence in sequences])
    frames = sum(len(sequence) for sequence in sequences)
    say(f"{subject.data}: {len(sequences)} sequences, {objects.sum()} objects, {frames} frames")
    header = "".join(f"{name:>8}" for name in "J&F J recall decay F recall decay".split())
    say(f"{'in %':30}{header}")
    for sequence, of_objects, number in zip(sequences, sums, objects):
        say_rows(sequence.title, methods, of_objects / number)
    means = sums.sum(0) / objects.sum()
    say_rows("mean over objects", methods, means)
    counts = {"year": args.year, "sequences": len(sequences), "objects": objects.sum().item()}
    return settings | counts | {name: figures(mean) for name, mean in zip(methods, means)}


def score_all(sequences, methods, rank, world):
    """Score each method on each sequence: sums over objects [sequences, methods, 2, 3].

    The processes share the sequences.
    """
    total = len(methods) * sum(len(sequence) for sequence in sequences[rank::world])
    start = time.monotonic()
    done = 0
    sums = torch.zeros(len(sequences), len(methods), 2, 3, dtype=torch.double)
    for i in range(rank, len(sequences), world):
        for m, masks_of in enumerate(methods.values()):
            masks = counted(masks_of(sequences[i]), done, total, start)
            with naming(sequences[i].title):
                sums[i, m] = score(sequences[i], masks).sum(0)
            done += len(sequences[i])
    return combine(sums, world)


def counted(masks, done, total, start):
    """Yield masks, and show the progress of all frames."""
    for t, mask in enumerate(masks):
        progress("frames", done + t + 1, total, start)
        yield mask


def figures(mean):
    """Name what score() gives: [2, 3] -> {"J&F": ..., "J": ..., "J_recall": ..., ...}."""
    names = "J J_recall J_decay F F_recall F_decay".split()
    return {"J&F": mean[:, 0].mean().item()} | dict(zip(names, mean.flatten().tolist()))


def say_rows(title, methods, means):
    """Print a row of figures for each method."""
    for name, mean in zip(methods, means):
        row = "".join(f"{round(value, 1) + 0.0:8.1f}" for value in figures(mean).values())
        say(f"{title:20}{name:10}{row}")  # + 0.0: no -0.0
        title = ""
