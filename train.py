"""Self-distillation with no labels: Algorithm 1 of the paper (docs/tour.md, stops 1 and 6).

    python train.py                                 built-in images, any machine, minutes
    python train.py --data path/to/images           any folder of images
    torchrun --nproc_per_node=8 train.py --arch vit_small --patch 16 --data path/to/imagenet/train

Algorithm 1, line by line                           here
    the networks: teacher = student at first        build_networks()
    two random views x1, x2 of each image           MultiCrop, photometry()      augment.py
    student and teacher outputs                     Network.forward()
    t: stop the gradient, centre and sharpen        teacher_probabilities()      loss.py
    loss: H(t1, s2) / 2 + H(t2, s1) / 2             dino_loss()                  loss.py
    back-propagate, update the student              train_step()
    teacher = l * teacher + (1 - l) * student       update_teacher()
    C = m * C + (1 - m) * mean of t1, t2            update_center()              loss.py
The schedules are in recipe.py; what surrounds a step (log, checkpoints, tests) in report.py.
"""

import copy
import math
from random import Random
from typing import NamedTuple

import torch
from einops import rearrange
from torch import nn

import recipe
from augment import MultiCrop
from backbone import build_backbone, recompute_activations
from checkpoint import start_from
from data import Order, Samples, load_both, load_views, reduced
from distributed import amp_dtype, autocast, in_turn, parallel, processes, synchronised
from head import DINOHead
from loss import batch_center, dino_loss, entropies, sinkhorn, teacher_probabilities, update_center
from optimizer import build_optimizer, set_rates
from recipe import check, crop_settings, schedules, summary, with_length
from report import after_step, before_training, finish
from run import Run
from terminal import listen, run_command, say
from vit import ViT


class Network(nn.Module):
    """g = h o f: the backbone, then the projection head on its class token."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *crops):
        """Views [v, b, 3, h, w], a tensor for each resolution -> logits [v, b, k] of all views."""
        b = crops[0].shape[1]
        features = [self.backbone(rearrange(crop, "v b c h w -> (v b) c h w")) for crop in crops]
        return rearrange(self.head(torch.cat(features)), "(v b) k -> v b k", b=b)


class State(NamedTuple):
    """What training changes; all of it goes into a checkpoint."""

    student: Network
    teacher: Network
    center: torch.Tensor  # C, [k]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def train_step(state, forward, loader, schedule, args, precision):
    """Take one step of Algorithm 1.

    forward: the student, as DDP or torch.compile has wrapped it. loader: yields the views of the
    next images, [2, b, 3, g, g] and [v - 2, b, 3, l, l]; a step takes args.accumulate of them.
    Returns [loss, two entropies], as in loss.entropies(), and the gradient's norm before clipping.
    """
    student, teacher, center, optimizer, scaler = state
    figures, batch_mean = 0.0, 0.0

    for micro in range(args.accumulate):
        views = next(loader)
        with synchronised(forward, now=micro + 1 == args.accumulate):
            # The teacher sees the two global views, the student all views.
            with precision:
                with torch.inference_mode():
                    t = teacher(views[0])
                s = forward(*views)

            # The teacher's answers (Eq. 1), the loss (Eq. 3) and its gradient.
            if args.centering == "sinkhorn":
                p_t = sinkhorn(t, schedule.teacher_temp)
            else:
                p_t = teacher_probabilities(t, center, schedule.teacher_temp)
            loss = dino_loss(s, p_t, args.student_temp)
            del s  # backward does not need it, and for a large K it is large
            scaler.scale(loss / args.accumulate).backward()

        batch_mean += batch_center(t) / args.accumulate
        figures += torch.stack([loss.detach(), *entropies(p_t)]) / args.accumulate

    # Update the student; while it is frozen, its last layer stays as it is.
    scaler.unscale_(optimizer)
    if schedule.frozen:
        for p in student.head.last_layer.parameters():
            p.grad = None
    grad_norm = nn.utils.clip_grad_norm_(student.parameters(), args.clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()

    # Update the teacher, then the centre (Eq. 4).
    update_teacher(teacher, student, schedule.momentum)
    if args.centering == "mean":
        update_center(center, batch_mean, args.center_momentum)
    return figures, grad_norm


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """theta_t <- lambda theta_t + (1 - lambda) theta_s, where momentum is lambda."""
    for t, s in zip(teacher.parameters(), student.parameters()):
        t.lerp_(s, 1 - momentum)


def build_networks(args, device, world):
    """Return student and teacher, alike at the start; no gradient reaches the teacher."""
    torch.manual_seed(args.seed)
    if args.init:
        wanted = args.arch, args.patch, args.drop_path, args.global_size
        backbone = in_turn(lambda: start_from(args.init, *wanted))
    else:
        backbone = build_backbone(args.arch, args.patch, args.global_size, args.drop_path)
    sizes = args.out_dim, args.hidden_dim, args.bottleneck_dim
    head = DINOHead(backbone.dim, *sizes, args.norm_last_layer)
    student = Network(backbone, head).to(device)
    if world > 1 and device.type == "cuda":  # for ResNet-50; a ViT has no batch norm
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    teacher = copy.deepcopy(student).requires_grad_(False)
    # drop path is the student's alone; a convnet's teacher uses its batch's statistics
    teacher.train(not isinstance(backbone, ViT))
    if args.recompute and isinstance(backbone, ViT):
        recompute_activations(backbone, args.recompute)
    return student, teacher


def train(args, device, rank, world):
    # Images, and in what order the processes see them.
    images, val = in_turn(lambda: load_both(args.data))
    args = with_length(args, len(images))
    order = Order(len(images), args.batch, args.accumulate, rank, world, args.seed)

    # Student, teacher, centre and optimiser; a run that was stopped goes on from its checkpoint.
    dtype = amp_dtype(args.amp, device)
    student, teacher = build_networks(args, device, world)
    center = torch.zeros(args.out_dim, device=device)
    optimizer, scaler = build_optimizer(args.optimizer, student, device, dtype)
    state = State(student, teacher, center, optimizer, scaler)
    run = Run(args, images, val, state, order, dtype)
    run.resume()
    forward = torch.compile(student) if args.compile else student
    forward = parallel(forward, device, world)

    crop = MultiCrop(*crop_settings(args))
    samples = Samples(reduced(images, crop.least), crop, args.seed)
    loader = load_views(samples, order.batches(run.first, run.last), args.workers, device, run.bad)
    before_training(run)
    listen()
    for step in range(run.first, run.last):
        # What drop path draws follows from the step and the process alone.
        torch.manual_seed(Random(f"{args.seed} {step} {rank}").getrandbits(63))
        schedule = schedules(step, args, order.steps_per_epoch, order.global_batch)
        set_rates(optimizer, schedule.lr, schedule.weight_decay)
        precision = autocast(device, dtype)
        figures, grad_norm = train_step(state, forward, loader, schedule, args, precision)
        after_step(run, step + 1, schedule, figures, grad_norm)
    finish(run)


def parse_args(argv=None):
    return recipe.parse_args(__doc__, argv)


def main(args):
    check(args)
    with processes(args.device) as (device, rank, world):
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        say(summary(args))
        train(args, device, rank, world)


if __name__ == "__main__":
    run_command(main, parse_args)
