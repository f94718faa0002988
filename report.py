"""What surrounds a training step: the log, checkpoints, k-NN tests, the pictures at the end."""

import signal
import sys
import time

import torch

from backbone import trained_at, untrained
from data import are_constant, describe_images, evenly, read_or_next
from distributed import in_turn, mean_over_processes, part
from evaluate import knn_of
from features import Extraction, usual_size
from segment import attend, attention_masks
from shapes import Shapes
from terminal import minutes, say
from visualize import draw_attention, draw_curves, draw_emergence
from vit import ViT

MASKS = 200  # images whose objects a finished run compares with attention


def before_training(run):
    """Say what is about to be trained; test and keep what the networks are at the start."""
    args = run.args
    peak = args.lr * run.global_batch / 256
    say(describe_images(run.images))
    if run.val is not None:
        say(f"held out: {describe_images(run.val)}")
    if run.main and are_constant(run.images):
        say("warning: the first images are each of one colour throughout: are they read rightly?")
    if args.freeze_last_layer >= args.epochs:
        say("warning: --freeze_last_layer keeps the last layer as it is for the whole run")
    say(
        f"{len(run.images)} images, {run.world} x {args.batch} x {args.accumulate} a step, "
        f"{run.total} steps in {args.epochs} epochs, "
        f"learning rate {args.lr:g} x {run.global_batch} / 256 = {peak:g}, "
        f"{run.state.center.device}, {run.dtype or 'float32'}"
    )
    if run.first == 0:
        test_knn(run, 0)
        keep_attention(run, 0)


def after_step(run, done, schedule, figures, grad_norm):
    """Log, watch, test, save and stop, as the run's arguments say, after `done` steps.

    figures, grad_norm: what train_step() returns. Only where something is logged or saved does the
    host wait for the device.
    """
    args, output = run.args, run.args.output
    run.norms.append(grad_norm)
    keep_attention(run, done)

    epoch, ended = done / run.steps_per_epoch, done % run.steps_per_epoch == 0
    stop = run.stop_signal()
    logs = done == 1 or done % args.log_every == 0
    saves = ended or stop or done == run.last
    saves = saves or (args.save_every and done % args.save_every == 0)
    if logs or saves:
        run.check_images()
        loss, entropy, mean_entropy = mean_over_processes(figures, run.world).tolist()
        norms = torch.stack(run.norms).tolist()
        skipped = run.check_finite(done, loss, norms)
    if logs:
        kl = loss - entropy
        watched = dict(loss=loss, entropy=entropy, mean_entropy=mean_entropy, kl=kl)
        gradient = dict(grad_norm=norms[-1], skipped=len(skipped))
        run.log(step=done, epoch=epoch, **watched, **schedule._asdict(), **gradient)
        run.watch(epoch, entropy, mean_entropy, kl)
        run.progress(done, loss, entropy)
        run.norms.clear()
    if ended and args.keep_every and round(epoch) % args.keep_every == 0:
        run.save(f"epoch-{round(epoch):04d}.pth", done)  # before last.pth, from which a run goes on
    if saves:
        run.save("last.pth", done)
    if ended and args.knn_every and (round(epoch) % args.knn_every == 0 or done == run.total):
        test_knn(run, done)
    if ended and run.main:
        draw_curves(run.lines(), output / "curves.png", args.out_dim)
    if stop:
        name = signal.Signals(stop).name
        say(f"stopped by {name} after step {done}: the same command goes on from there")
        part()
        sys.exit(128 + stop)


def affordable(run, size, count):
    """Whether the backbone sees so many images of a size within what a run may spend on its own.

    That is ten seconds, or a tenth of the run's time so far. It is measured on blank images; on a
    GPU it is taken to be so.
    """
    device = run.state.center.device
    backbone = run.state.teacher.backbone
    if device.type != "cpu":
        return True
    training = backbone.training
    backbone.eval()
    with torch.inference_mode():
        backbone(torch.zeros(1, 3, size, size))  # the first time is slower
        start = time.monotonic()
        backbone(torch.zeros(4, 3, size, size))
    expected = count / 4 * (time.monotonic() - start)
    backbone.train(training)
    return expected <= max(10, (start - run.start) / 10)


def test_knn(run, step):
    """Log the k-NN accuracy (k = 20) of teacher and student, on a part of the labelled images."""
    if run.images.labels and run.args.knn_every:
        in_turn(lambda: compare_neighbours(run, step) if run.main else None)


def compare_neighbours(run, step):
    how = Extraction(run.state.center.device, workers=run.args.workers)
    limits = run.args.knn_bank, 1000
    networks = 2 if step else 1
    seen = min(len(run.images), limits[0]) + min(len(run.val or ()), limits[1])
    if not affordable(run, trained_at(run.state.teacher.backbone), networks * seen):
        if not run.untested:
            say("no k-NN test, for it would take more than ten seconds and a tenth of the run")
        run.untested = True
        return

    def top1(name):
        backbone = getattr(run.state, name).backbone
        return knn_of(backbone, run.images, run.val, how, (20,), limits)[0][20]

    teacher = top1("teacher")
    student = top1("student") if step else teacher  # they begin alike
    run.log(step=step, epoch=round(step / run.steps_per_epoch), knn=teacher, knn_student=student)
    note = f" ({starting_point(run)})" if step == 0 else ""
    say(f"epoch {round(step / run.steps_per_epoch)}: k-NN {teacher:.1f} %{note}")


def starting_point(run):
    return "before training" if run.args.init else "untrained"


def few_images(images, count=4):
    """Return a few of the images, spread evenly, always the same; of a long strip, a part.

    In the place of one that cannot be read stands the next that can.
    """
    few = []
    for i in evenly(len(images), count):
        image, _ = read_or_next(images, i)
        h, w = image.shape[1:]
        few.append(image[:, : 3 * w, : 3 * h])
    return few


def keep_attention(run, step):
    """At steps 0, 1, 2, 4, 8, ... keep what the teacher attends to in a few images.

    It goes with the checkpoint, and in the end into emergence.png.
    """
    power_of_two = step & (step - 1) == 0
    if run.main and power_of_two and isinstance(run.state.teacher.backbone, ViT):
        run.attention[step] = attend_to_few(run)


def attend_to_few(run):
    backbone = run.state.teacher.backbone
    return [attend(backbone, image) for image in few_images(run.val or run.images)]


def finish(run):
    """Draw the pictures, and say where everything is and what came of it."""
    if not run.main:
        return
    backbone = run.state.teacher.backbone
    output = run.args.output
    is_vit = isinstance(backbone, ViT)
    draw_curves(run.lines(), output / "curves.png", run.args.out_dim)
    files = ["last.pth", "curves.png"]
    if is_vit:
        images = few_images(run.val or run.images)
        draw_attention(backbone, images, output / "attention.png")
        kept = run.attention | {run.last: attend_to_few(run)}
        draw_emergence(images, kept, output / "emergence.png")
        files += ["attention.png", "emergence.png"]
    say(f"done in {minutes(time.monotonic() - run.start)}")
    for name in files:
        say(f"  {output / name}")
    tests = [line for line in run.lines() if "knn" in line]
    if len(tests) > 1 and tests[0]["step"] == 0 and tests[-1]["step"] == run.last:
        say(
            f"  k-NN: teacher {tests[-1]['knn']:.1f} %, student {tests[-1]['knn_student']:.1f} %, "
            f"{starting_point(run)} {tests[0]['knn']:.1f} %"
        )
    has_objects = is_vit and isinstance(run.images, Shapes)
    compares = has_objects and affordable(run, usual_size(backbone), 3 * MASKS)
    if compares:
        say_jaccard(run)
    if run.bad:
        say(f"  {len(run.bad)} images could not be read")
    say("next:")
    if run.untested:
        say(f"  python evaluate.py knn {output / 'last.pth'}")
    if has_objects and not compares:
        say(f"  python segment.py masks {output / 'last.pth'}")
    if run.images.labels:
        say(f"  python evaluate.py linear {output / 'last.pth'} --cached")
    if is_vit:
        say(f"  python visualize.py {output / 'last.pth'} img.jpg")


def say_jaccard(run):
    """Compare attention with the built-in images' objects (Figure 4)."""
    teacher, student = run.state.teacher.backbone, run.state.student.backbone.eval()
    networks = [teacher, student, untrained(teacher)]
    images = Shapes("val", MASKS)
    device = run.state.center.device
    means, *_ = attention_masks(networks, images, device, usual_size(teacher))
    teacher, student, fresh = means[:, 0].tolist()
    say(
        "  best head's attention on objects (Jaccard index): "
        f"teacher {teacher:.1f} %, student {student:.1f} %, untrained {fresh:.1f} %"
    )
