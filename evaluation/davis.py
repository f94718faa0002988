"""Video object segmentation as DAVIS 2017 measures it (section 4.2.2, Table 5): J and F.

    python evaluate.py davis CKPT --data path/to/DAVIS           each object from its first mask
    python evaluate.py davis CKPT --data shapes                  built-in films

J is the Jaccard index of a result and the truth, F the harmonic mean of precision and recall of
their boundaries, each over the frames without the first and the last, where void pixels (255) do
not count. Of each, the mean, the recall (share of frames above 0.5) and the decay (mean of the
first quarter less that of the last) are averaged over the objects of all sequences. They stand
beside those of the first mask copied to every frame, which needs no network.

Masks are uint8 [h, w].
"""

import math
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F

from evaluation.features import add_untrained_flag, usual_size
from evaluation.masks import VOID, MaskedFolder, numbers_in
from evaluation.video import add_propagation_flags, carry_mask, propagation_of
from util.checkpoint import require_vit
from util.distributed import all_reduce_sum, rank0_first
from util.misc import Progress, say
from util.shapes import ShapesFilm

SHAPES_FILMS = 20
LIST = "ImageSets/2017/val.txt"  # the names of the sequences


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
    around = F.pad(masks.float(), (0, 1, 0, 1), mode="replicate") > 0  # equal past the edge
    right, below, corner = around[:, :-1, 1:], around[:, 1:, :-1], around[:, 1:, 1:]
    return (masks ^ right) | (masks ^ below) | (masks ^ corner)


def dilate(edges, radius):
    """Grow bool [o, h, w] by a disk, x^2 + y^2 <= radius^2."""
    places = torch.arange(-radius, radius + 1)
    disk = (places[:, None] ** 2 + places**2 <= radius**2).float()
    return F.conv2d(edges[:, None].float(), disk[None, None], padding=radius)[:, 0] > 0.5


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


class Sequence(MaskedFolder):
    """A video with a mask for each frame: sequence[t] is uint8 [3, h, w].

    numbers: those of the objects in its first mask. ValueError: fewer than three frames, a frame
    without a mask, or a first mask without an object.
    """

    def __init__(self, frames, masks):
        super().__init__(frames, masks)
        self.title = frames.name
        if self.unmasked:
            raise ValueError(f"{self.unmasked[0]!r} has no mask")
        if len(self) < 3:
            raise ValueError("it has fewer than three frames")
        self.numbers = numbers_in(self.mask(0))
        if not self.numbers:
            raise ValueError("its first mask shows no object (255 is void)")


def open_sequences(data):
    """Open the validation sequences of a folder in DAVIS's layout, or the built-in films.

    ValueError: no such folder, list or sequence.
    """
    if data == "shapes":
        return [ShapesFilm(film) for film in range(SHAPES_FILMS)]
    root = Path(data)
    if not (root / LIST).is_file():
        raise ValueError(f"{str(data)!r} is not in DAVIS's layout: there is no {LIST} in it")
    sequences = []
    for name in (root / LIST).read_text().split():
        try:
            folders = root / "JPEGImages/480p" / name, root / "Annotations/480p" / name
            sequences.append(Sequence(*folders))
        except ValueError as error:
            raise ValueError(f"sequence {name!r}: {error}") from None
    if not sequences:
        raise ValueError(f"{str(root / LIST)!r} names no sequence")
    return sequences


# ---- the command ----


def carry_first(sequence, backbone, short, how):
    """Yield each frame's mask as the backbone carries it."""
    images = (sequence[t] for t in range(len(sequence)))
    yield from carry_mask(backbone, images, sequence.mask(0), short, how)


def score_all(sequences, methods, rank=0, world=1):
    """Score each method on each sequence: sums over objects [sequences, methods, 2, 3].

    The processes share the sequences.
    """
    mine = range(rank, len(sequences), world)
    total = len(methods) * len(mine)
    progress, done = Progress(total), 0
    sums = torch.zeros(len(sequences), len(methods), 2, 3, dtype=torch.double)
    for i in mine:
        for m, masks_of in enumerate(methods.values()):
            try:
                sums[i, m] = score(sequences[i], masks_of(sequences[i])).sum(0)
            except ValueError as error:
                raise ValueError(f"sequence {sequences[i].title!r}: {error}") from None
            done += 1
            progress.show(done, f"sequences {done}/{total}")
    return all_reduce_sum(sums)


def named(mean):
    """Name what score() gives: [2, 3] -> {"J&F": ..., "J": ..., "J_recall": ..., ...}."""
    names = "J J_recall J_decay F F_recall F_decay".split()
    return {"J&F": mean[:, 0].mean().item()} | dict(zip(names, mean.flatten().tolist()))


def say_rows(title, methods, means):
    """Print a row of figures for each method."""
    for name, mean in zip(methods, means):
        row = "".join(f"{round(value, 1) + 0.0:8.1f}" for value in named(mean).values())
        say(f"{title:20}{name:10}{row}")  # + 0.0: no -0.0
        title = ""


def add_flags(parser, command):
    add_propagation_flags(parser)
    add_untrained_flag(parser, "no")


def evaluate(args, subject):
    """Carry the masks of all sequences: print their figures, and return the means."""
    backbone, how = require_vit(subject.backbone), propagation_of(args)
    short = args.size or usual_size(backbone)
    methods = {"copied": lambda sequence: repeat(sequence.mask(0), len(sequence))}
    for name, network in subject.networks(args.untrained).items():
        methods[name] = partial(carry_first, backbone=network, short=short, how=how)
    sequences = rank0_first(lambda: open_sequences(subject.data))
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
    settings = {"size": short, **how._asdict(), "sequences": len(sequences)}
    settings["objects"] = objects.sum().item()
    return settings | {name: named(mean) for name, mean in zip(methods, means)}
