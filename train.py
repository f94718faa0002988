"""Algorithm 1: self-distillation with no labels.

    python train.py                                                                  built-in data, any machine, minutes
    python train.py --data path/to/images                                            any folder of images
    torchrun --nproc_per_node=8 train.py --arch vit_small --patch 16 --data path/to/imagenet/train

A student is trained to give, for every crop of an image, the output that a teacher gives for the other global crops; the teacher is the
student's exponential moving average. train() is the algorithm; what stands above it is the recipe, the schedules and the run's folder.
"""

import argparse
import copy
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
from einops import rearrange
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from augment import MultiCrop, views
from data import Batches, Shapes, Views, load
from evaluate import attention_masks, knn_of
from features import features
from head import DINOHead
from loss import batch_center, dino_loss, entropies, teacher_temp_at, update_center
from run import Run, command, in_turn, join, listen, minutes, outlive_signals, say
from visualize import attend, draw_attention, draw_curves, draw_emergence, usual_size
from vit import ARCHITECTURES, ViT, amp_dtype, build_backbone, describe, load_backbone, untrained

RECIPE = {  # flag: (the paper's value, the laptop's, what it is)
    "patch": (16, 4, "side of a patch in pixels"),
    "drop_path": (0.1, 0.0, "stochastic depth in the student's last block"),
    "global_size": (224, 32, "side of the two global crops"),
    "local_size": (96, 16, "side of the local crops"),
    "local_crops": (8, 4, "number of local crops"),
    "global_scale": ((0.4, 1.0), (0.4, 1.0), "area of a global crop, as a share of the image's"),
    "local_scale": ((0.05, 0.4), (0.1, 0.4), "area of a local crop"),
    "out_dim": (65536, 256, "K, the outputs of the head"),
    "hidden_dim": (2048, 256, "width of the head's hidden layers"),
    "bottleneck_dim": (256, 64, "width of the head's bottleneck"),
    "norm_last_layer": (True, True, "fix the norm g of the last layer's rows at 1 (the 300-epoch runs: --no-norm_last_layer)"),
    "student_temp": (0.1, 0.1, "tau_s"),
    "teacher_temp": (0.04, 0.02, "tau_t after its warm-up (the 300-epoch runs: 0.07)"),
    "warmup_teacher_temp": (0.04, 0.02, "tau_t at the start"),
    "warmup_teacher_temp_epochs": (30, 0, "epochs over which tau_t rises"),
    "center_momentum": (0.9, 0.9, "m of Eq. 4"),
    "momentum": (0.996, 0.99, "the teacher's lambda at the start; it ends at 1"),
    "epochs": (100, 12, "passes over the data"),
    "batch": (64, 32, "images a process a step"),
    "accumulate": (1, 1, "batches a step, for a larger global batch on the same memory"),
    "optimizer": ("adamw", "adamw", "adamw or sgd"),
    "lr": (5e-4, 1.6e-2, "peak learning rate for a global batch of 256; it scales with the batch"),
    "min_lr": (1e-6, 1e-5, "learning rate at the end"),
    "warmup_epochs": (10, 1, "epochs over which the learning rate rises"),
    "weight_decay": (0.04, 0.04, "weight decay at the start"),
    "weight_decay_end": (0.4, 0.04, "weight decay at the end"),
    "clip": (3.0, 3.0, "largest norm of the gradient, 0 for any"),
    "freeze_last_layer": (1, 0, "epochs during which the head's last layer stays as it is"),
}
RESNET = {  # where the paper's recipe for ResNet-50 differs
    "optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4, "weight_decay_end": 1e-4, "drop_path": 0.0, "global_scale": (0.14, 1.0), "local_scale": (0.05, 0.14)
}  # fmt: skip
BOUNDS = (  # flags, the least and the most that make sense
    ("patch global_size local_size hidden_dim bottleneck_dim epochs batch accumulate log_every knn_bank", 1, 1e9),
    ("local_crops warmup_epochs warmup_teacher_temp_epochs freeze_last_layer workers steps save_every keep_every keep knn_every", 0, 1e9),
    ("lr min_lr weight_decay weight_decay_end clip", 0, 1e9),
    ("student_temp teacher_temp warmup_teacher_temp", 1e-3, 1),
    ("momentum center_momentum", 0, 1),
    ("drop_path", 0, 0.99),
    ("out_dim", 2, 1e9),
)


class Network(nn.Module):
    """g = h o f: the backbone, then the projection head on its class token."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *crops):
        """Tensors of views [v, b, 3, h, w], one for each resolution -> logits [v, b, k] of all views."""
        tokens = [self.backbone(rearrange(crop, "v b c h w -> (v b) c h w")) for crop in crops if len(crop)]
        return rearrange(self.head(torch.cat(tokens)), "(v b) k -> v b k", b=crops[0].shape[1])


def cosine(progress, start, end):
    """start at progress 0, end at 1, half a cosine between."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def schedules(step, args, steps_per_epoch, global_batch):
    """(learning rate, weight decay, momentum lambda, tau_t) at a step: pure functions of it (section 3.2, "Implementation details")."""
    total, warmup = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    peak = args.lr * global_batch / 256
    lr = peak * step / warmup if step < warmup else cosine((step - warmup) / (total - warmup), peak, args.min_lr)
    tau_t = teacher_temp_at(step / steps_per_epoch, args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs)
    tau_t = args.student_temp if args.no_sharpening else tau_t
    return lr, cosine(step / total, args.weight_decay, args.weight_decay_end), cosine(step / total, args.momentum, 1.0), tau_t


def parameter_groups(network):
    """AdamW's groups: weight decay for what has several dimensions, none for biases and norms."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}]


def train(args, device, rank, world):
    images, val = in_turn(lambda: open_data(args))
    batches = Batches(len(images), args.batch, args.accumulate, rank, world, args.seed)
    steps_per_epoch, global_batch = batches.steps_per_epoch, batches.total
    total = args.epochs * steps_per_epoch

    torch.manual_seed(args.seed)
    backbone = first_backbone(args)
    backbone.recompute = args.recompute
    head = DINOHead(backbone.dim, args.out_dim, args.hidden_dim, args.bottleneck_dim, args.norm_last_layer)
    student = Network(backbone, head).to(device)
    if world > 1 and device.type == "cuda":
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)  # ResNet-50's; a ViT has none
    teacher = copy.deepcopy(student).requires_grad_(False).train(not isinstance(backbone, ViT))  # as in the reference code, a convnet's uses its batch's statistics
    center = torch.zeros(args.out_dim, device=device)
    groups = parameter_groups(student)
    optimizer = torch.optim.AdamW(groups, fused=True) if args.optimizer == "adamw" else torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
    dtype = amp_dtype(args.amp, device)
    half = dtype is torch.float16
    scaler = torch.amp.GradScaler(device.type, 2.0**16 if half else 1.0, growth_interval=2000 if half else 2**31 - 1)  # always: it skips a step that is not finite
    state = dict(student=student, teacher=teacher, optimizer=optimizer, scaler=scaler)
    run = Run(args, images, state, center, global_batch, dtype, rank, world)

    first = run.resume()
    batches.first, batches.last = first, max(first, min(total, args.steps or total))
    forward = torch.compile(student) if args.compile else student
    if world > 1:
        forward = DistributedDataParallel(forward, device_ids=[device.index] if device.type == "cuda" else None)
    crop = MultiCrop(args.global_size, args.local_size, args.local_crops, args.global_scale, args.local_scale)
    loader = iter(DataLoader(
        Views(images, crop, args.seed), batch_sampler=batches, num_workers=args.workers, worker_init_fn=outlive_signals,
        pin_memory=device.type == "cuda", prefetch_factor=4 if args.workers else None,
    ))  # fmt: skip
    scaled = f"{args.lr:g} x {global_batch} / 256 = {args.lr * global_batch / 256:g}"
    say(f"{len(images)} images, {world} x {args.batch} x {args.accumulate} a step, {total} steps, learning rate {scaled}, {device}, {dtype or 'float32'}")
    if first == 0:
        in_turn(lambda: knn_test(run, images, val, device, 0, 0))

    listen()
    norms = []  # of the gradients since the last line of the log
    for step in range(first, batches.last):  # Algorithm 1
        keep_attention(run, teacher.backbone, val or images, step)
        lr, weight_decay, momentum, teacher_temp = schedules(step, args, steps_per_epoch, global_batch)
        for group, decay in zip(optimizer.param_groups, (weight_decay, 0.0)):
            group.update(lr=lr, weight_decay=decay)
        torch.manual_seed(Random(f"{args.seed} {step} {rank}").getrandbits(63))  # what drop path draws follows from the step alone

        done = step + 1
        log = done == 1 or done % args.log_every == 0
        loss, mean, spread = 0.0, 0.0, 0.0
        for micro in range(args.accumulate):
            *batch, replaced = next(loader)
            run.bad.update(replaced[replaced >= 0].tolist())
            crops = views(batch, device)
            wait = world > 1 and micro < args.accumulate - 1
            with forward.no_sync() if wait else nullcontext():
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    with torch.inference_mode():
                        t = teacher(crops[0])
                    s = forward(*crops)
                part = dino_loss(s, t, center, args.student_temp, teacher_temp) / args.accumulate
                del s  # backward does not need these: with K = 65536 they are large
                scaler.scale(part).backward()
            loss, mean = loss + part.detach(), mean + batch_center(t) / args.accumulate
            if log:
                spread = spread + entropies(t, center, teacher_temp) / args.accumulate

        scaler.unscale_(optimizer)
        if step < args.freeze_last_layer * steps_per_epoch:
            for p in student.head.last_layer.parameters():
                p.grad = None
        norms.append(nn.utils.clip_grad_norm_(student.parameters(), args.clip or math.inf))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        get_ema_multi_avg_fn(momentum)(list(teacher.parameters()), list(student.parameters()), None)

        epoch, ended = done / steps_per_epoch, done % steps_per_epoch == 0
        stop = run.stop()
        save = ended or stop or done == batches.last or (args.save_every and done % args.save_every == 0)
        if log or save:  # the only steps on which the host reads from the device
            run.check_images()
            values = torch.stack([loss, *(spread if log else ())])
            if world > 1:
                dist.all_reduce(values)
            loss, *spread = (values / world).tolist()
            norm = torch.stack(norms).tolist()
            skipped = run.check_finite(done, loss, norm, scaler.get_scale())
        update_center(center, mean, 1.0 if args.no_centering else args.center_momentum)
        if log:
            entropy, mean_entropy = spread
            run.log(step=done, epoch=epoch, loss=loss, entropy=entropy, mean_entropy=mean_entropy, kl=loss - entropy, lr=lr,
                    weight_decay=weight_decay, momentum=momentum, teacher_temp=teacher_temp, grad_norm=norm[-1], skipped=len(skipped))  # fmt: skip
            run.watch(epoch, entropy, mean_entropy, loss - entropy)
            run.progress(done, first, batches.last, epoch, loss, entropy)
            norms.clear()
        if ended and args.knn_every and (round(epoch) % args.knn_every == 0 or done == total):
            in_turn(lambda: knn_test(run, images, val, device, done, round(epoch)))
        if save:
            run.save("last.pth", done, epoch)
            if ended and run.main:
                draw_curves(run.lines(), args.output / "curves.png", args.out_dim)
            if ended and args.keep_every and round(epoch) % args.keep_every == 0:
                run.save(f"epoch-{round(epoch):04d}.pth", done, epoch)
        if stop:
            say(f"stopped by {signal.Signals(stop).name} after step {done}: the same command goes on from there")
            sys.exit(128 + stop)
    finish(run, teacher, val or images, batches.last)


def knn_test(run, images, val, device, step, epoch):
    """Logs the k-NN accuracy (k = 20) of the teacher and the student so far, on a part of the labelled images."""
    if run.main and images.labels and run.args.knn_every:
        extract, top1 = partial(features, device=device, workers=run.args.workers), {}  # alone: the other processes wait
        for name in ("teacher", "student") if step else ("teacher",):  # they begin alike
            top1[name] = knn_of(run.state[name].backbone, images, val, extract, ks=(20,), limits=(run.args.knn_bank, 1000))[0][20]
        run.log(step=step, epoch=epoch, knn=top1["teacher"], knn_student=top1.get("student", top1["teacher"]))
        say(f"epoch {epoch}: k-NN {top1['teacher']:.1f} %" + (f" ({before(run.args)})" if step == 0 else ""))


def before(args):
    return "before training" if args.init else "untrained"


def some_images(images, count=4):
    """A few of the images, spread evenly, the same each time; of a long strip, what is three times as long as wide."""
    views = Views(images, lambda image, rng: (image[:, : 3 * image.shape[2], : 3 * image.shape[1]],))  # the next readable one in a bad one's place
    count = min(count, len(images))
    return [views[0, i * len(images) // count][0] for i in range(count)]


def keep_attention(run, backbone, images, step):
    """At steps 0, 1, 2, 4, 8, ... keeps what the teacher attends to in a few images. It goes with the checkpoint, and in the end to emergence.png."""
    if run.main and isinstance(backbone, ViT) and step & (step - 1) == 0:
        run.attention[step] = [attend(backbone, image) for image in some_images(images)]


def finish(run, teacher, images, step):
    """Draws the pictures and says where everything is, and what came of it."""
    if not run.main:
        return
    output, lines, pictures = run.args.output, run.lines(), ["curves.png"]
    draw_curves(lines, output / "curves.png", run.args.out_dim)
    if isinstance(teacher.backbone, ViT):
        pictures += ["attention.png", "emergence.png"]
        few = some_images(images)
        draw_attention(teacher.backbone, few, output / "attention.png")
        draw_emergence(few, run.attention | {step: [attend(teacher.backbone, image) for image in few]}, output / "emergence.png")
    say(f"done in {minutes(time.monotonic() - run.start)}")
    for name in ("last.pth", *pictures):
        say(f"  {output / name}")
    knn = [line for line in lines if "knn" in line]
    if len(knn) > 1:
        say(f"  k-NN: teacher {knn[-1]['knn']:.1f} %, student {knn[-1]['knn_student']:.1f} %, {before(run.args)} {knn[0]['knn']:.1f} %")
    if isinstance(images, Shapes) and isinstance(teacher.backbone, ViT):
        networks = [teacher.backbone, run.state["student"].backbone.eval(), untrained(teacher.backbone)]
        means, *_ = attention_masks(networks, Shapes("val", 200), teacher.backbone.cls_token.device, usual_size(teacher.backbone))
        say("  best head's attention on objects (Jaccard index): teacher {:.1f} %, student {:.1f} %, untrained {:.1f} %".format(*means[:, 0].tolist()))
    if run.bad:
        say(f"  {len(run.bad)} images could not be read")
    say("next:")
    if images.labels:
        say(f"  python evaluate.py linear {output / 'last.pth'} --cached")
    if isinstance(teacher.backbone, ViT):
        say(f"  python visualize.py {output / 'last.pth'} img.jpg")


def open_data(args):
    """(images, held-out images with labels or None)."""
    images, val = load(args.data, "train"), load(args.data, "val")
    return images, val if val is not None and val.classes == images.classes else None


def first_backbone(args):
    """The student's backbone before training: fresh, or that of --init. ValueError: --init is of another architecture than --arch and --patch."""
    if not args.init:
        return build_backbone(args.arch, args.patch, args.global_size, args.drop_path)
    loaded, _ = load_backbone(args.init)
    backbone = build_backbone(args.arch, args.patch, loaded.image_size // args.patch * args.patch, args.drop_path)
    if {key: value.shape for key, value in backbone.state_dict().items()} != {key: value.shape for key, value in loaded.state_dict().items()}:
        raise ValueError(f"--init {args.init} is a {describe(loaded)}: --arch {args.arch} --patch {args.patch} must say so")
    backbone.load_state_dict(loaded.state_dict())
    return backbone


def parse_args(argv=None):
    """The resolved configuration: what the command line leaves open comes from the architecture's recipe."""
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--arch", default="vit_micro")
    arch = which.parse_known_args(argv)[0].arch
    paper = arch != "vit_micro"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes", help="a folder of images, or shapes, cifar10, cifar100, stl10, imagenette, flowers102, pets")
    parser.add_argument("--arch", default="vit_micro", choices=[*ARCHITECTURES, "resnet50"], help="vit_micro takes the laptop's recipe, the others the paper's")
    for name, (papers, laptops, text) in RECIPE.items():
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(papers, bool) else {"type": type(papers)}
        if isinstance(papers, tuple):
            kind = {"type": float, "nargs": 2, "metavar": ("MIN", "MAX")}
        shown = [" ".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in (papers, laptops)]
        default = RESNET.get(name, papers) if arch == "resnet50" else papers if paper else laptops
        parser.add_argument(f"--{name}", default=default, help=f"{text} (paper {shown[0]}, laptop {shown[1]})", **kind)
    parser.add_argument("--no_centering", action="store_true", help="leave C at 0, to see the collapse onto one dimension (Figure 7)")
    parser.add_argument("--no_sharpening", action="store_true", help="tau_t = tau_s, to see the collapse to the uniform output (Figure 7)")
    parser.add_argument("--init", help="a checkpoint or a released name whose backbone to start from, of this --arch and --patch")
    parser.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision (auto: on GPUs)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="stop after this many steps; changes no schedule (0: at the end)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the student")
    parser.add_argument("--recompute", action="store_true", help="compute a ViT's activations again on the way back: less memory, more time (ViT-B/8)")
    parser.add_argument("--workers", type=int, default=None, help="processes that load images (default: up to 10 on a GPU; on a CPU 1, or 0 where there are only two cores)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="the run's folder (default: runs/NAME, from architecture and data)")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds another run")
    parser.add_argument("--stop_on_collapse", action="store_true", help="end a run whose output has collapsed, rather than warn")
    parser.add_argument("--log_every", type=int, default=10, help="steps between lines of the log")
    parser.add_argument("--save_every", type=int, default=0, help="steps between writes of last.pth, besides each epoch's end")
    parser.add_argument("--keep_every", type=int, default=20, help="epochs between checkpoints that are kept (0: none)")
    parser.add_argument("--keep", type=int, default=0, help="how many of those to keep, the newest (0: all)")
    parser.add_argument("--knn_every", type=int, default=1, help="epochs between k-NN tests, where there are labels (0: never)")
    parser.add_argument("--knn_bank", type=int, default=10_000 if paper else 2_000, help="images that vote in those tests")
    args = parser.parse_args(argv)
    args.global_scale, args.local_scale = list(args.global_scale), list(args.local_scale)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.workers is None:
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = min(10, cores) if args.device.startswith("cuda") else int(cores > 2)  # on two cores a loader's process and the model's threads wait for one another
    if args.output is None:
        data = Path(args.data).absolute() if os.path.isdir(args.data) else Path(args.data)
        parts = [f"{args.arch}_{args.patch}" if paper else "laptop", data.parent.name if data.name == "train" else data.name]
        parts += [f"b{args.batch * args.accumulate * world}"] if world > 1 else []
        parts += [flag for flag in ("no_centering", "no_sharpening") if getattr(args, flag)]
        args.output = Path("runs", "-".join(part for part in parts if paper or part != "shapes"))
    return args


def check(args):
    """ValueError for what cannot be trained, naming the flag."""
    for flags, least, most in BOUNDS:
        for flag in flags.split():
            if not least <= getattr(args, flag) <= most:
                raise ValueError(f"--{flag} {getattr(args, flag)} must be at least {least:g}" + f" and at most {most:g}" * (most < 1e9))
    for flag in ("global_scale", "local_scale"):
        low, high = getattr(args, flag)
        if not 0 < low <= high <= 1:
            raise ValueError(f"--{flag} {low:g} {high:g} must be two shares of the image's area, the smaller first")
    if args.optimizer not in ("adamw", "sgd"):
        raise ValueError(f"--optimizer {args.optimizer}: adamw or sgd")
    if args.warmup_epochs > args.epochs:
        raise ValueError(f"--warmup_epochs {args.warmup_epochs} is more than --epochs {args.epochs}: the learning rate would never reach its peak")
    for flag in ("global_size", "local_size"):
        if args.arch != "resnet50" and getattr(args, flag) % args.patch:
            raise ValueError(f"--patch {args.patch} must divide --{flag} {getattr(args, flag)}")


def main(args):
    check(args)
    device, rank, world = join(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    say(" ".join(f"{name}={value}" for name, value in vars(args).items()))
    try:
        train(args, device, rank, world)
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    command(main, parse_args)
