"""Low-shot classification (appendix): logistic regression on frozen features, with few labels.

    python evaluate.py logistic CKPT --fraction 0.01 0.1

That share of each class's training images is drawn. Features are standardised by the mean and the
deviation of all training images, which needs no label. On those that were drawn the logistic
regression with an L2 penalty is solved to its optimum, with LBFGS and all images at once, so that
no learning rate and no number of epochs are to be chosen. Several draws give a mean and a spread of
the accuracy on the held-out images. Axes: n images, d features, c classes.
"""

from collections import defaultdict
from random import Random

import torch
import torch.nn.functional as F

from evaluation.features import (
    add_extraction_flags,
    add_token_flags,
    add_untrained_flag,
    describe_tokens,
    extraction,
    labelled_features,
    probe_tokens,
)
from util.config import count, positive, positive_share
from util.data import load_labelled
from util.distributed import rank0_first
from util.misc import say

TOLERANCE = 1e-5  # of the gradient's norm at the optimum, as a share of that at the start


def draw(labels, fraction, seed):
    """Return the indices of a share of each class's images, drawn at random, sorted."""
    of_class = defaultdict(list)
    for i, label in enumerate(labels):
        of_class[label].append(i)
    rng = Random(f"{seed} {fraction}")
    drawn = []
    for _, indices in sorted(of_class.items()):
        drawn += rng.sample(indices, round(fraction * len(indices)))
    return sorted(drawn)


def logistic_regression(x, labels, classes, penalty):
    """Minimise the summed cross-entropy plus penalty / 2 times the squared norm of the weights.

    x [n, d], labels [n] -> weights [c, d + 1], float64; the last column, the biases, is not
    penalised. ValueError: features are not finite, or no optimum is found.
    """
    if not x.isfinite().all():
        raise ValueError("features are not finite: try --amp off")
    x = F.pad(x.double(), (0, 1), value=1.0)
    w = torch.zeros(classes, x.shape[1], dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=100, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ w.T, labels)  # both terms over n, which changes no optimum
        loss = loss + penalty / len(x) / 2 * w[:, :-1].square().sum()
        loss.backward()
        return loss

    objective()
    start = w.grad.norm()
    for _ in range(20):
        optimizer.step(objective)
        objective()
        if w.grad.norm() <= max(TOLERANCE * start, 1e-12):  # which rounding leaves of 0
            return w.detach()
    raise ValueError(f"--penalty {penalty}: logistic regression finds no optimum")


def accuracy(weights, x, labels):
    """Return the share in per cent of features [n, d] whose likeliest class is their label."""
    logits = F.pad(x.double(), (0, 1), value=1.0) @ weights.T
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def low_shot(backbone, train, val, how, args):
    """Return the accuracy in per cent of each draw, {fraction: [...]}, and how many were drawn.

    ValueError: a fraction of the labels is no image of any class.
    """
    x, labels = (part.cpu() for part in labelled_features(backbone, train, how))
    held_out, truth = (part.cpu() for part in labelled_features(backbone, val, how))
    mean, std = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)  # these need no label
    x, held_out = (x - mean) / std, (held_out - mean) / std
    results, counts = {}, {}
    for fraction in args.fraction:
        results[fraction] = []
        for seed in range(args.draws):
            drawn = draw(labels.tolist(), fraction, seed)
            if not drawn:
                raise ValueError(f"--fraction {fraction} of the labels is no image of any class")
            weights = logistic_regression(x[drawn], labels[drawn], len(train.classes), args.penalty)
            results[fraction].append(accuracy(weights, held_out, truth))
        counts[fraction] = len(drawn), len(train.classes) - len(labels[drawn].unique())
    return results, counts


def add_flags(parser, command):
    add_extraction_flags(parser)
    add_untrained_flag(parser)
    add_token_flags(parser)
    add = parser.add_argument
    add("--fraction", type=positive_share, nargs="+", default=[0.01, 0.1],
        help="shares of each class's labels (the paper's: 0.01 0.1)")  # fmt: skip
    add("--draws", type=count, default=5, help="how often the images are drawn")
    add("--penalty", type=positive, default=1.0, help="L2 penalty, for the sum over the images")


def evaluate(args, subject):
    """Print the table of fractions, and return its figures."""
    train, val = rank0_first(lambda: load_labelled(subject.data, held_out=True))
    kind = probe_tokens(subject.backbone, args)
    how = extraction(args, subject, **kind)
    columns = {}
    for name, network in subject.networks(args.untrained is not False).items():
        columns[name], counts = low_shot(network, train, val, how, args)
    say(
        f"{subject.data}: {len(val)} images to test on, {len(train.classes)} classes; "
        f"{describe_tokens(subject.backbone, **kind)}; mean and standard deviation of "
        f"{args.draws} draws, top-1 %"
    )
    say("labels  images" + "".join(f"  {name:>12}" for name in columns))
    for fraction, (images, missing) in counts.items():
        row = f"{100 * fraction:4g} %  {images:6}"
        for column in columns.values():
            values = torch.tensor(column[fraction], dtype=torch.double)
            row += f"  {values.mean():5.1f} +- {values.std(correction=0):3.1f}"
        say(row + (f"  ({missing} classes have none)" if missing else ""))
    return {"draws": args.draws, "penalty": args.penalty, **kind, **columns}
