"""Self-distillation with no labels: Algorithm 1 of the paper (docs/tour.md, stops 1, 6 and 7).

    python train.py                                 built-in images, any machine, minutes
    python train.py --data path/to/images           any folder of images
    torchrun --nproc_per_node=8 train.py --arch vit_small --patch 16 --data path/to/imagenet/train

Every flag, with the paper's value and ours, is in util/config.py. Algorithm 1, line by line:

    the networks: teacher = student at first        build_networks()
    two random views x1, x2 of each image           MultiCrop, photometry()      augment.py
    student and teacher outputs                     Network.forward()
    t: sg (stop-gradient), centre and sharpen       teacher_probabilities()      loss.py
    loss: H(t1, s2) / 2 + H(t2, s1) / 2             dino_loss()                  loss.py
    update the student, then the teacher            train()
    C = m * C + (1 - m) * mean of t1, t2            update_center()              loss.py
"""

import copy
from contextlib import nullcontext
from functools import partial
from random import Random

import numpy as np
import torch
from einops import rearrange
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from augment import MultiCrop, photometry
from evaluate import log_knn
from head import DINOHead
from loss import batch_center, dino_loss, entropies, sinkhorn, teacher_probabilities, update_center
from util import config
from util.checkpoint import recompute_activations, start_from
from util.data import BatchSampler, load_splits, view_loader
from util.distributed import amp_dtype, grad_scaler, processes, rank0_first
from util.run import Run
from visualize import draw_run, watch_attention


class Network(nn.Module):
    """g = h o f: the backbone, then the projection head on its class token."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *views):
        """Views [v, b, 3, h, w], a tensor for each resolution -> logits [v, b, k] of all views."""
        b = views[0].shape[1]
        features = [self.backbone(rearrange(x, "v b c h w -> (v b) c h w")) for x in views]
        return rearrange(self.head(torch.cat(features)), "(v b) k -> v b k", b=b)


def build_networks(args, device, world):
    """Return student and teacher, alike at the start; no gradient reaches the teacher."""
    torch.manual_seed(args.seed)
    backbone = rank0_first(lambda: start_from(args))
    sizes = args.out_dim, args.hidden_dim, args.bottleneck_dim
    head = DINOHead(backbone.embed_dim, *sizes, args.norm_last_layer)
    student = Network(backbone, head).to(device)
    if world > 1 and device.type == "cuda":  # for ResNet-50; a ViT has no batch norm
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    teacher = copy.deepcopy(student).requires_grad_(False)
    # drop path is the student's alone; a convnet's teacher uses its batch's statistics
    teacher.train(args.arch == "resnet50")
    return student, teacher


def build_optimizer(name, student):
    """Return AdamW, or SGD for ResNet-50; biases and norms, of one dimension, do not decay."""
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "decays": True},
        {"params": [p for p in trained if p.ndim == 1], "decays": False},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
    for p in trained:  # made now: torch makes none for what has no gradient at its first step
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def cosine_schedule(steps, start, end, warmup=0):
    """Return a value a step: evenly from 0 to start, both included, then half a cosine to end."""
    rise = np.linspace(0, start, warmup)
    progress = np.arange(steps - warmup) / (steps - warmup)
    return np.concatenate([rise, end + (start - end) * (1 + np.cos(np.pi * progress)) / 2])


def schedules(args, steps_per_epoch, global_batch):
    """Return learning rate, weight decay, lambda and tau_t of each step, [steps, 4] (3.2)."""
    steps, warmup = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    lr = cosine_schedule(steps, args.lr * global_batch / 256, args.min_lr, warmup)
    weight_decay = cosine_schedule(steps, args.weight_decay, args.weight_decay_end)
    momentum = cosine_schedule(steps, args.momentum_teacher, 1.0)
    # tau_t changes once an epoch
    rise = np.linspace(args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs)
    teacher_temp = np.repeat([*rise, *[args.teacher_temp] * args.epochs], steps_per_epoch)[:steps]
    return np.stack([lr, weight_decay, momentum, teacher_temp], axis=1)


def clip_gradients(parameters, clip_grad):
    """Shorten each gradient by itself to a norm of clip_grad (0: any), as nn.utils.clip_grad_norm_.

    Return the norm of all of them together, before clipping. Most code clips that one instead.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if clip_grad:
        factors = (clip_grad / (norms + 1e-6)).clamp(max=1)
        torch._foreach_mul_(gradients, factors.unbind())
    return norms.norm()


def train(args, device, rank, world):
    # data: a step's crops depend on (seed, step) alone, so that no sampler's state is saved
    images, val = rank0_first(lambda: load_splits(args.data_path))
    args = config.fit_to_data(args, len(images), world)
    batch = args.batch_size_per_gpu
    sampler = BatchSampler(len(images), batch, args.accumulate, rank, world, args.seed)
    crop = MultiCrop(*config.crop_settings(args))

    # student, teacher, centre, optimiser, mixed precision
    student, teacher = build_networks(args, device, world)
    center = torch.zeros(args.out_dim, device=device)
    optimizer = build_optimizer(args.optimizer, student)
    dtype = amp_dtype(args.amp, device)
    scaler = grad_scaler(device, dtype)  # also skips a step whose gradient is not finite

    # a run that was stopped goes on from its last.pth
    state = dict(student=student, teacher=teacher, optimizer=optimizer, scaler=scaler)
    run = Run(args, images, val, sampler, state, center, dtype)
    run.resume()
    if args.recompute:
        recompute_activations(student.backbone)
    model = torch.compile(student) if args.compile else student
    if world > 1:
        model = DDP(model, [device.index] if device.type == "cuda" else None)

    schedule = schedules(args, sampler.steps_per_epoch, sampler.global_batch)
    loader = view_loader(images, crop, sampler, run, args.num_workers)
    if run.first == 0:
        log_knn(run, 0)
        watch_attention(run, 0)
    for step in range(run.first, run.last):
        torch.manual_seed(Random(f"{args.seed} {step} {rank}").getrandbits(63))  # for drop path
        done = step + 1
        epoch_ends = done % sampler.steps_per_epoch == 0

        # schedules
        lr, weight_decay, momentum, teacher_temp = schedule[step].tolist()
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decays"] else 0.0

        metrics, batch_mean = 0.0, 0.0
        for micro in range(args.accumulate):
            # the views: [2, b, 3, g, g] global and [v - 2, b, 3, l, l] local
            views = [photometry(crops.to(device, non_blocking=True), drawn)
                     for crops, drawn in next(loader)]  # fmt: skip
            # DDP averages gradients in the last backward alone
            synced = world == 1 or micro + 1 == args.accumulate
            with nullcontext() if synced else model.no_sync():
                # the teacher sees the two global views, the student all views
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    with torch.inference_mode():
                        t = teacher(views[0])
                    s = model(*views)

                # the teacher's answers (Eq. 1), the loss (Eq. 3) and its gradient
                if args.centering == "sinkhorn":
                    p_t = sinkhorn(t, teacher_temp)
                else:
                    p_t = teacher_probabilities(t, center, teacher_temp)
                cross_entropy = dino_loss(s, p_t, args.student_temp)
                loss = cross_entropy  # a variant adds its terms here
                del s  # backward does not need it, and for a large K it is large
                scaler.scale(loss / args.accumulate).backward()
            batch_mean += batch_center(t) / args.accumulate
            watched = torch.stack([loss, cross_entropy, *entropies(p_t)])
            metrics += watched.detach() / args.accumulate

        # update the student; its last layer is frozen at first
        scaler.unscale_(optimizer)
        grad_norm = clip_gradients(student.parameters(), args.clip_grad)
        if step < args.freeze_last_layer * sampler.steps_per_epoch:
            for p in student.head.last_layer.parameters():
                p.grad = None
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # theta_t <- lambda theta_t + (1 - lambda) theta_s, lambda = momentum; the centre (Eq. 4)
        with torch.no_grad():
            torch._foreach_lerp_([*teacher.parameters()], [*student.parameters()], 1 - momentum)
        update_center(center, batch_mean, args.center_momentum)

        # log, save, test, stop: only here does the CPU wait for the GPU
        stop = run.stop_signal()
        saves = epoch_ends or stop or done == run.last
        run.grad_norms.append(grad_norm)
        watch_attention(run, done)
        if saves or done == 1 or done % args.log_every == 0:
            run.log_step(done, metrics, lr=lr, weight_decay=weight_decay, momentum=momentum,
                         teacher_temp=teacher_temp)  # fmt: skip
        if saves:
            run.save(done)
        if epoch_ends:
            log_knn(run, done)
        if stop:
            return run.stopped(done, stop)
    draw_run(run)
    run.finish()


parse_args = partial(config.parse_args, __doc__)


def main(args):
    with processes(args.device) as (device, rank, world):
        return train(args, device, rank, world)


if __name__ == "__main__":
    config.run_command(main, parse_args)
