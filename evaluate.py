"""What frozen features are worth: k-NN, linear probe (3.2, 4.1; docs/tour.md, stop 8).

    python evaluate.py knn    runs/laptop/last.pth       data: what the checkpoint was trained on
    python evaluate.py linear runs/laptop/last.pth       the paper's protocol, on random crops
    python evaluate.py linear runs/laptop/last.pth --cached     on central crops, in seconds
    python evaluate.py COMMAND --help                    other commands: the table COMMANDS
    torchrun --nproc_per_node=8 evaluate.py ...          each process with its share of the images

Each evaluation adds a line to evaluate.jsonl in the checkpoint's folder. The linear protocol
differs from the reference code's: its random crops are bicubic, its learning rates are tried all at
once, an epoch's last, smaller batch is left out, and the last epoch counts, not the best.
"""

import importlib
import math
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from evaluation.features import (
    Crops,
    Extraction,
    RawPixels,
    add_extraction_flags,
    add_token_flags,
    add_untrained_flag,
    choose_labelled,
    describe_tokens,
    extraction,
    features_of,
    labelled_features,
    made_by,
    open_subject,
    probe_tokens,
)
from util import config
from util.checkpoint import RELEASED
from util.data import BatchSampler, load_labelled
from util.distributed import all_reduce_sum, processes, rank0_first
from util.misc import append_json, atomic_write, is_main_process, say, track

COMMANDS = {  # name: (the module that has its add_flags() and evaluate(), what it is)
    "knn": ("evaluate", "weighted k-NN (Table 2)"),
    "linear": ("evaluate", "a linear classifier on frozen features (Table 2)"),
    "predict": ("evaluation.predict", "the likeliest classes of images, by a linear classifier"),
    "export": ("evaluation.predict", "the backbone as timm and the authors' code load it"),
    "logistic": ("evaluation.lowshot", "logistic regression with few of the labels"),
    "search": ("evaluation.retrieval", "the images of a folder that are nearest to others"),
    "copies": ("evaluation.retrieval", "groups of near-duplicates in a folder"),
    "features": ("evaluation.retrieval", "the features of a folder, for other tools"),
    "oxford": ("evaluation.revisitop", "image retrieval, revisited Oxford (Table 3)"),
    "paris": ("evaluation.revisitop", "image retrieval, revisited Paris (Table 3)"),
    "copydays": ("evaluation.copydays", "copy detection (Table 4)"),
    "davis": ("evaluation.davis", "video object segmentation (Table 5)"),
    "masks": ("evaluation.masks", "attention compared with objects (Figure 4)"),
}

# ---- weighted k-NN ----


def knn(bank, bank_labels, queries, labels, ks=(10, 20, 100, 200), temperature=0.07, alone=False):
    """Return weighted k-NN's top-1 accuracy, {k: per cent} ("Evaluation protocols").

    bank [n, d], queries [m, d]: features, normalised here; labels are class indices. alone: the
    queries are the bank, and none votes for itself. A k above the number of candidates counts them
    all. Of classes with as many votes the lower is taken; a class that the bank lacks is wrong.
    """
    most = min(max(ks), len(bank) - alone)
    if most < 1:
        raise ValueError("one image has no neighbours: k-NN needs two")
    bank, queries = F.normalize(bank, dim=-1), F.normalize(queries, dim=-1)
    classes = 1 + int(bank_labels.max())
    right = dict.fromkeys(ks, 0)
    chunk = max(1, min(1024, 2**26 // max(len(bank), classes)))  # 256 MB of similarities
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ bank.T
        if alone:
            similarity.diagonal(start).fill_(-2)
        similarity, nearest = similarity.topk(most)
        # float64 on the host: in float32 far votes vanish beside near ones
        weights = (similarity.cpu().double() / temperature).exp()
        voted, truth = bank_labels[nearest].cpu(), labels[start : start + chunk].cpu()
        for k in ks:
            votes = torch.zeros(len(weights), classes, dtype=torch.double)
            votes.scatter_add_(1, voted[:, :k], weights[:, :k])
            right[k] += (votes.argmax(1) == truth).sum().item()
    return {k: 100 * count / len(queries) for k, count in right.items()}


def bank_and_queries(backbone, train, val, how, limits=(None, None)):
    """Return the bank's features and labels, then the queries'; val None: the bank once more.

    limits: at most so many images of each.
    """
    bank = labelled_features(backbone, train, how, limits[0])
    queries = bank if val is None else labelled_features(backbone, val, how, limits[1])
    return *bank, *queries


def log_knn(run, step):
    """Log the k-NN accuracy (k = 20) of a run's networks, on a part of the labelled images."""
    args, epoch = run.args, round(step / run.steps_per_epoch)
    due = args.knn_every and (epoch % args.knn_every == 0 or epoch == args.epochs)
    if not (due and run.images.labels):
        return
    how = Extraction(run.center.device, 256, args.num_workers, rank=run.rank, world=run.world)
    top1 = {}
    for name in ("teacher", "student"):
        backbone = run.state[name].backbone
        features = bank_and_queries(backbone, run.images, run.val, how, (args.knn_bank, 1000))
        top1[name] = knn(*features, ks=(20,), alone=run.val is None)[20]
    run.log(step=step, epoch=epoch, knn=top1["teacher"], knn_student=top1["student"])
    say(f"epoch {epoch}: k-NN {top1['teacher']:.1f} %")


def evaluate_knn(args, subject):
    """The k-NN protocol: print its table, and return its figures."""
    train, val = rank0_first(lambda: load_labelled(subject.data))
    how = extraction(args, subject)
    columns = {}
    for name, network in subject.networks(args.untrained is not False).items():
        bank, bank_labels, x, labels = bank_and_queries(network, train, val, how)
        columns[name] = knn(bank, bank_labels, x, labels, args.nb_knn, alone=val is None)
    voters, queries = len(bank) - (val is None), len(x)
    if args.pixels:  # what a network must beat: central crops of 32 x 32 pixels
        small = replace(how, size=None, cache=None)
        bank, bank_labels, x, labels = bank_and_queries(RawPixels(), train, val, small)
        for name, mean in (("pixels", 0), ("less mean", bank.mean(0))):
            centred = bank - mean, bank_labels, x - mean, labels
            columns[name] = knn(*centred, args.nb_knn, alone=val is None)

    counts = Counter(label for label in (val or train).labels if label >= 0)
    commonest = 100 * max(counts.values()) / counts.total()
    say(
        f"{subject.data}: {queries} queries against {voters} images, {len(train.classes)} classes; "
        f"chance {100 / len(train.classes):.1f} %, always the commonest class {commonest:.1f} %; "
        "top-1 in %"
    )
    say("    k" + "".join(f"  {name:>9}" for name in columns))
    for k in args.nb_knn:
        every = f"  (all {voters} images)" if k > voters else ""
        say(f"{k:5}" + "".join(f"  {column[k]:9.1f}" for column in columns.values()) + every)
    return {"bank": voters, "queries": queries, **columns}


# ---- linear probe ----


def train_classifiers(batches, steps_per_epoch, epochs, rates, classes, dim, device, world=1):
    """Train a linear classifier for each learning rate: an nn.ModuleList of nn.Linear.

    batches: (features [b, d], labels [b], -1 for none). SGD with momentum 0.9, no weight decay; the
    rate falls to 0 on a cosine, epoch by epoch.
    """
    heads = nn.ModuleList(nn.Linear(dim, classes) for _ in rates).to(device)
    weight = 0.01 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    for head in heads:
        nn.init.zeros_(head.bias)
        head.weight.data.copy_(weight)
    groups = [{"params": head.parameters(), "lr": rate} for head, rate in zip(heads, rates)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for step, (x, labels) in enumerate(track(batches, "steps", epochs * steps_per_epoch)):
        left = (1 + math.cos(math.pi * (step // steps_per_epoch) / epochs)) / 2
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * left
        losses = [cross_entropy(head(x), labels) for head in heads]
        optimizer.zero_grad()
        (sum(losses) / world).backward()  # no head sees another's loss
        if world > 1:
            for p in heads.parameters():
                all_reduce_sum(p.grad)
        optimizer.step()
    return heads


def cross_entropy(logits, labels):
    """The mean over the batch; an image without a label (-1) counts as 0."""
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / len(labels)


@torch.no_grad()
def score(head, x, labels):
    """Return top-1 and top-5 accuracy in per cent and the mean loss of features [m, d]."""
    logits = head(x)
    best = logits.topk(min(5, head.out_features)).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels)
    top1, top5 = best[:, 0].double().mean(), best.any(1).double().mean()
    return 100 * top1.item(), 100 * top5.item(), loss.item()


def probe(backbone, train, val, how, args):
    """Train classifiers on one split and score them on the other: (heads, [score(), ...]).

    They are tested on central crops, and trained on random ones; with args.cached on the features
    of central ones.
    """
    x, labels = labelled_features(backbone, val, how)
    if args.cached:
        bank, targets = labelled_features(backbone, train, how)
    else:
        indices = choose_labelled(train.labels)
        targets = torch.tensor([train.labels[i] for i in indices], device=x.device)
    batch = max(1, min(args.batch_size_per_gpu, len(targets) // how.world))
    sampler = BatchSampler(len(targets), batch, 1, how.rank, how.world, args.seed)
    keys = sampler.batches(0, args.epochs * sampler.steps_per_epoch)
    if args.cached:
        batches = cached_batches(bank, targets, keys)
    else:
        crops = Crops(train, indices, how.size_for(backbone), args.seed)
        batches = random_batches(backbone, crops, targets, keys, how)
    rates = [rate * sampler.global_batch / 256 for rate in args.lr]
    sizes = len(train.classes), x.shape[1], x.device, how.world
    heads = train_classifiers(batches, sampler.steps_per_epoch, args.epochs, rates, *sizes)
    return heads, [score(head, x, labels) for head in heads]


def cached_batches(bank, targets, keys):
    """Yield batches of features that have been extracted once."""
    for batch in keys:
        n = torch.tensor([n for _, n in batch], device=bank.device)
        yield bank[n], targets[n]


def random_batches(backbone, crops, targets, keys, how):
    """Yield batches of features of random crops; an image that cannot be read has label -1."""
    pin = how.device.type == "cuda"
    loader = DataLoader(crops, batch_sampler=keys, num_workers=how.num_workers, pin_memory=pin)
    for n, crop in loader:
        n = n.to(how.device)
        yield features_of(backbone, crop, how), targets[n].where(n >= 0, -1)


def evaluate_linear(args, subject):
    """The linear protocol: print its table, save the best classifier, and return the figures."""
    train, val = rank0_first(lambda: load_labelled(subject.data, held_out=True))
    kind = probe_tokens(subject.backbone, args)
    how = extraction(args, subject, **kind)
    networks = subject.networks(args.cached if args.untrained is None else args.untrained)
    results = {name: probe(net, train, val, how, args) for name, net in networks.items()}
    heads, scores = results["trained"]
    beside = results["untrained"][1] if "untrained" in results else []

    crops = "random crops"
    if args.cached:
        crops = "central crops' features, extracted once: not the paper's protocol"
    say(
        f"{subject.data}: {len(train)} images to train on, {len(val)} to test on, "
        f"{len(train.classes)} classes; {describe_tokens(subject.backbone, **kind)}; "
        f"{args.epochs} epochs on {crops}"
    )
    say("     lr   top-1 %   top-5 %    loss" + ("  untrained %" if beside else ""))
    for i, (rate, (top1, top5, loss)) in enumerate(zip(args.lr, scores)):
        line = f"{rate:7g}  {top1:8.1f}  {top5:8.1f}  {loss:6.3f}"
        say(line + (f"  {beside[i][0]:11.1f}" if beside else ""))

    best = max(range(len(heads)), key=lambda i: scores[i][0])
    path = subject.folder / "linear.pth"
    made = made_by(subject.backbone, replace(how, dtype=None))
    saved = {"head": heads[best].cpu().state_dict(), "classes": train.classes, "made_by": made}
    saved |= {"size": how.size, **kind}
    if is_main_process():
        atomic_write(path, lambda file: torch.save(saved, file))
    say(f"the best, of learning rate {args.lr[best]:g} x batch / 256 -> {path}")
    figures = {"epochs": args.epochs, "cached": args.cached, **kind, "lr": args.lr}
    figures |= dict(zip(("top1", "top5", "loss"), zip(*scores)))
    return figures | ({"untrained": [top1 for top1, *_ in beside]} if beside else {})


# ---- the commands ----


def add_flags(parser, command):
    """Add the flags of the commands that are in this file."""
    add = parser.add_argument
    add_extraction_flags(parser)
    add_untrained_flag(parser, "yes, in linear only if --cached")
    if command == "knn":
        add("--nb_knn", "--k", type=config.count, nargs="+", default=[10, 20, 100, 200],
            help="neighbours (the paper's: 10 20 100 200, 20 is best)")  # fmt: skip
        add("--pixels", action="store_true", help="k-NN on the pixels themselves beside it")
    else:
        add("--cached", action="store_true", help="train on features extracted once, in seconds; "
            "not the paper's protocol")  # fmt: skip
        add("--epochs", type=config.count, default=100, help="passes over the data")
        rates = [3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3]
        add("--lr", type=config.positive, nargs="+", default=rates,
            help="learning rates for a batch of 256")  # fmt: skip
        add("--seed", type=config.natural, default=0, help="of the crops and their order")
        add_token_flags(parser)


def evaluate(args, subject):
    return {"knn": evaluate_knn, "linear": evaluate_linear}[args.command](args, subject)


def module_of(command):
    """Import the module that has a command; this file may run under another name."""
    name = COMMANDS[command][0]
    return sys.modules[__name__] if name == "evaluate" else importlib.import_module(name)


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = config.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if argv[:1] != [name]:
            continue  # its module is not loaded
        command.add_argument("checkpoint", help=f"a checkpoint, or one of {', '.join(RELEASED)}")
        config.add_flag(command, "data_path", help="a folder or a data set's name (default: what "
                        "the checkpoint was trained on)")  # fmt: skip
        config.add_flag(command, "output_dir", type=Path, help="folder for the results (default: "
                        "the checkpoint's)")  # fmt: skip
        config.add_network_flags(command)
        config.add_device_flag(command)
        module_of(name).add_flags(command, name)
    return parser.parse_args(argv)


def main(args):
    """Run a command in each process, and add what it returns to evaluate.jsonl."""
    with processes(args.device) as (device, rank, world):
        start = time.monotonic()
        subject = open_subject(args, device, rank, world)
        figures = module_of(args.command).evaluate(args, subject)
        if figures and is_main_process():
            line = dict(command=args.command, checkpoint=args.checkpoint, network=args.network)
            line |= {"data": subject.data, "size": args.size or subject.backbone.img_size}
            line |= {**figures, "seconds": round(time.monotonic() - start, 1)}
            append_json(subject.folder / "evaluate.jsonl", line)


if __name__ == "__main__":
    config.run_command(main, parse_args)
