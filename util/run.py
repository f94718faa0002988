"""A run's folder, so that nothing is lost: config.json, log.jsonl, last.pth, epoch-NNNN.pth.

Rank 0 alone writes it, each file but the log beside its place and then moved there, so that a kill
or a full disk leaves the one before. A run goes on from last.pth as if nothing had happened.
Its watch for collapse is stop 10 of docs/tour.md.
"""

import contextlib
import json
import math
import shlex
import signal
import sys
from pathlib import Path

import torch

from util.checkpoint import load_checkpoint
from util.config import starts_anew, summary
from util.data import evenly, fingerprint, unreadable
from util.distributed import all_reduce_max, all_reduce_sum
from util.misc import STOP_SIGNALS, Progress, append_json, atomic_write, minutes, say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 7  # of last.pth
FREE = set(  # the arguments that resuming may change, if precision and global batch stay
    "init data_path device amp batch_size_per_gpu accumulate steps compile recompute num_workers "
    "output_dir overwrite log_every saveckp_freq knn_every knn_bank".split()
)
INSTEAD = ": choose another --output, or --overwrite it"
FEW = 3  # images that cannot be read may be left out of any folder
PATIENCE = 20  # lines of the log after which a collapse is reported


def read_log(path):
    """Return what has been logged, one dict a line; a line cut short by a crash is left out."""
    lines = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


class Run:
    """One training run: its arguments, its images, what training changes, and its folder.

    val: held-out images, or None. sampler: data.BatchSampler. state: {"student": ...,
    "teacher": ..., "optimizer": ..., "scaler": ...}, all of which have a state dict; center: C.
    dtype: of autocast, or None.
    """

    def __init__(self, args, images, val, sampler, state, center, dtype):
        self.args, self.folder, self.images, self.val = args, args.output_dir, images, val
        self.state, self.center, self.dtype = state, center, dtype
        self.rank, self.world, self.is_main = sampler.rank, sampler.world, sampler.rank == 0
        self.steps_per_epoch, self.global_batch = sampler.steps_per_epoch, sampler.global_batch
        self.first = self.last = 0  # the steps from and to which to train: set by resume()
        self.bad, self.named = set(), set()  # images that cannot be read; those already named
        self.grad_norms = []  # since the last line of the log
        self.collapsed = 0  # lines of the log since the output collapsed
        self.attention = {}  # {step: what the teacher attends to in a few images}
        self.signal = 0  # the one that has asked this process to stop
        self.log_path = self.folder / "log.jsonl"
        self.config = {name: value for name, value in vars(args).items() if name != "output_dir"}
        if Path(args.data_path).is_dir():
            self.config["data_path"] = str(Path(args.data_path).resolve())
        self.config |= {"global_batch": self.global_batch, "precision": str(dtype)}
        self.content = {"images": len(images), "names": fingerprint(images)}

    # ---- going on, and writing down ----

    def resume(self):
        """Go on from last.pth, if there is one. ValueError: it is not of this very run."""
        path = self.folder / "last.pth"
        if self.is_main:
            self.lock = hold_folder(self.folder)
        anew = starts_anew(self.args)
        if path.exists() and not anew:
            self.load(path)
        if all_reduce_max(self.first) != -all_reduce_max(-self.first):
            raise ValueError(f"the processes find different files at {path}: share a disk")
        total = self.args.epochs * self.steps_per_epoch
        self.last = max(self.first, min(total, self.args.steps or total))
        self.progress = Progress(self.last - self.first)
        if self.is_main:
            self.open_folder(anew)
        args = self.args
        peak = args.lr * self.global_batch / 256
        say(summary(args))
        say(
            f"{self.world} x {args.batch_size_per_gpu} x {args.accumulate} images a step, "
            f"{total} steps in {args.epochs} epochs, "
            f"learning rate {args.lr:g} x {self.global_batch} / 256 = {peak:g}, "
            f"{self.center.device}, {self.dtype or 'float32'}"
        )
        if args.data_path == "shapes" and args.arch != "vit_micro":
            say("note: these are built-in drawings of 64 pixels; --data path/to/imagenet/train "
                "trains on ImageNet")  # fmt: skip
        if peak < args.min_lr:
            say(f"warning: the learning rate rises from {peak:g} to --min_lr {args.min_lr:g}")
        if args.warmup_teacher_temp_epochs > args.epochs:
            say("warning: tau_t does not reach --teacher_temp before the run ends")
        if args.freeze_last_layer >= args.epochs:
            say("warning: --freeze_last_layer keeps the last layer as it is for the whole run")
        if self.first:
            say(f"resumed from {path} at step {self.first}")
        # from here on signals end a step, not the process
        self.handlers = {number: signal.signal(number, self.on_signal) for number in STOP_SIGNALS}

    def load(self, path):
        """Load a checkpoint of this very configuration and these images."""
        checkpoint = load_checkpoint(path)
        if checkpoint.get("format") != FORMAT:
            raise ValueError(f"{path} is no run to resume, or of another version{INSTEAD}")
        then, now = checkpoint["args"], self.config
        changed = [
            f"{name} {then.get(name)} -> {value}"
            for name, value in now.items()
            if name not in FREE and then.get(name, value) != value
        ]
        if checkpoint["content"] != self.content:
            counts = checkpoint["content"]["images"], len(self.images)
            changed.append("images of other names, {} -> {} of them".format(*counts))
        if changed:
            raise ValueError(f"{path} is of another run ({', '.join(changed)}){INSTEAD}")
        for name, part in self.state.items():
            part.load_state_dict(checkpoint[name])
        self.center.copy_(checkpoint["center"])
        self.first, self.attention = checkpoint["step"], checkpoint["attention"]

    def open_folder(self, anew):
        """Make the folder ready: write the configuration, cut the log at the first step."""
        if anew:
            kept = self.folder.glob("epoch-[0-9][0-9][0-9][0-9].pth")
            for old in [self.folder / "last.pth", *kept]:
                old.unlink(missing_ok=True)
        known = read_log(self.log_path) if self.first else []
        log = "".join(json.dumps(line) + "\n" for line in known if line["step"] <= self.first)
        config = json.dumps(self.config, indent=1) + "\n"
        atomic_write(self.folder / "config.json", lambda file: file.write(config.encode()))
        atomic_write(self.log_path, lambda file: file.write(log.encode()))

    def log(self, **values):
        if self.is_main:
            append_json(self.log_path, values)

    def log_step(self, step, metrics, **schedules):
        """Check and log a step, watch for collapse, and show how far the run is.

        metrics: [loss, Eq. 3 alone, and what entropies() gives]. Raises what check() does.
        """
        epoch, done = step / self.steps_per_epoch, step - self.first
        values = self.check(step, metrics)
        self.log(step=step, epoch=epoch, **values, **schedules)
        self.grad_norms.clear()
        self.watch(epoch, values["entropy"], values["mean_entropy"], values["kl"])
        self.progress.show(
            done,
            f"epoch {epoch:.2f}/{self.args.epochs}  step {step}  loss {values['loss']:.3f}  "
            f"entropy {values['entropy']:.3f}  KL {values['kl']:.3f}  "
            f"{done * self.global_batch / self.progress.seconds():.1f} images/s",
        )

    def save(self, step):
        """Write a checkpoint: all that training changes, and what it is of.

        At the end of each --saveckp_freq-th epoch it is also kept as epoch-NNNN.pth.
        """
        if not self.is_main:
            return
        checkpoint = {
            "format": FORMAT,
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "args": self.config,
            "num_heads": getattr(self.state["teacher"].backbone, "num_heads", None),
            "content": self.content,
            "center": self.center,
            "attention": self.attention,
        }
        checkpoint |= {name: part.state_dict() for name, part in self.state.items()}
        names = ["last.pth"]
        epoch, rest = divmod(step, self.steps_per_epoch)
        if rest == 0 and self.args.saveckp_freq and epoch % self.args.saveckp_freq == 0:
            names.insert(0, f"epoch-{epoch:04d}.pth")  # first: a run goes on from last.pth
        for name in names:
            atomic_write(self.folder / name, lambda file: torch.save(checkpoint, file))

    # ---- signals ----

    def on_signal(self, number, frame):
        if number == self.signal == signal.SIGINT:
            sys.exit(128 + number)  # a second Ctrl-C
        self.signal = number

    def stop_signal(self):
        """Return the signal that has asked some process to stop, or 0; all processes agree."""
        return all_reduce_max(self.signal)

    # ---- watching ----

    def check(self, step, metrics):
        """Return the metrics of all processes as numbers, and the gradient's norm.

        ValueError: a loss or a gradient is not finite (the scaler has skipped that step; fp16 has
        some, and each halves the scale), or too many images cannot be read.
        """
        self.check_images()
        mean = all_reduce_sum(metrics) / self.world
        loss, cross_entropy, entropy, mean_entropy = mean.tolist()
        norms = torch.stack(self.grad_norms).tolist()
        skipped = [norm for norm in norms if not math.isfinite(norm)]
        if not math.isfinite(loss) or self.state["scaler"].get_scale() < 1:
            first = step - len(norms) + 1
            bad = [first + i for i, norm in enumerate(norms) if not math.isfinite(norm)]
            where = f"the loss is {loss}"
            if bad:
                where = f"the gradient was not finite at step {bad[0]}"
            raise ValueError(
                f"{where}, and no step was taken from it: the checkpoint in {self.folder} is from "
                "before; --init a run from it in another --output, with a lower --lr, a smaller "
                "--clip_grad, a higher --teacher_temp, or --amp off"
            )
        kl = cross_entropy - entropy
        return dict(loss=loss, entropy=entropy, mean_entropy=mean_entropy, kl=kl,
                    grad_norm=norms[-1], skipped=len(skipped))  # fmt: skip

    def check_images(self):
        """Name the images that any process found bad since the last time.

        ValueError: they are more than 1 % of all, and more than FEW.
        """
        if not all_reduce_max(len(self.bad - self.named)):
            return
        marks = torch.zeros(len(self.images), dtype=torch.uint8)
        marks[list(self.bad)] = 1
        self.bad.update(all_reduce_max(marks).nonzero().flatten().tolist())
        too_many = len(self.bad) > max(FEW, 0.01 * len(self.images))
        if too_many:  # those that no step has come to are named at once
            looked_at = evenly(len(self.images), 1000)
            self.bad.update(i for i in looked_at if unreadable(self.images, i))
        for index in sorted(self.bad - self.named):
            name = self.images.name(index)
            say(f"cannot read {name!r}: its place is taken by the next image", sys.stderr)
        self.named |= self.bad
        if too_many:
            reason = unreadable(self.images, min(self.bad))
            raise ValueError(
                f"{len(self.bad)} of {len(self.images)} images cannot be read, more than 1 %: "
                f"mend or remove them (the first: {reason})"
            )

    def watch(self, epoch, entropy, mean_entropy, kl):
        """Warn when the output has been collapsed for PATIENCE lines of the log in a row.

        Lines from the warm-up do not count. The first two kinds are section 5.3's (Figure 7).
        """
        uniform = math.log(self.args.out_dim)
        if entropy > 0.99 * uniform and kl < 0.01 * uniform:
            kind = "uniform"
            remedy = "lower --teacher_temp and --warmup_teacher_temp, or raise --lr"
        elif mean_entropy < 0.01 * uniform:
            kind = "one-dimensional"
            remedy = "raise --teacher_temp, lower --lr, or check that --center_momentum is below 1"
        elif mean_entropy - entropy < 0.001 * uniform:
            kind = "constant"  # between the two, but the same for every image
            remedy = "lower --lr, raise --momentum_teacher, or change --teacher_temp"
        else:
            kind = None
        if kind is None or epoch <= self.args.warmup_epochs:
            self.collapsed = 0
            return
        self.collapsed += 1
        if self.collapsed == PATIENCE:
            say(f"warning: the output has collapsed to the {kind} solution: {remedy}")

    def stopped(self, step, number):
        """Say by which signal the run was stopped, and return the status to exit with."""
        name = signal.Signals(number).name
        without = " (without --overwrite)" if self.args.overwrite else ""
        say(f"stopped by {name} after step {step}: the same command{without} goes on from there")
        self.close()
        return 128 + number

    def close(self):
        """Let go of the folder, and of the signals."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.is_main:
            self.lock.close()

    def finish(self):
        """Say where everything is, what came of it, and what to do next."""
        self.close()
        if not self.is_main:
            return
        last = self.folder / "last.pth"
        say(f"done in {minutes(self.progress.seconds())}; in {self.folder}:")
        say("  " + ", ".join(sorted(path.name for path in self.folder.glob("[!.]*"))))
        lines = read_log(self.log_path)
        steps = [line for line in lines if "loss" in line]
        if steps:
            say(what_views_tell(steps))
        tests = [line for line in lines if "knn" in line]
        if len(tests) > 1:
            start = "before training" if self.args.init else "untrained"
            first, end = tests[0], tests[-1]
            say(
                f"k-NN: teacher {end['knn']:.1f} %, student {end['knn_student']:.1f} %, "
                f"{start} {first['knn']:.1f} %"
            )
        if self.bad:
            say(f"{len(self.bad)} images could not be read")
        last = shlex.quote(str(last))
        say("next:")
        if self.images.labels:
            say(f"  python evaluate.py knn {last}")
        elif Path(self.args.data_path).is_dir():
            say(f"  python evaluate.py search {last} img.jpg")
            say(f"  python evaluate.py copies {last}")
        if self.args.data_path == "shapes" and self.args.arch != "resnet50":
            say(f"  python evaluate.py masks {last}")
        if self.args.arch != "resnet50":
            say(f"  python visualize.py {last} img.jpg")


def what_views_tell(lines):
    """Say in one line what a run has learned without labels, from the steps in its log.

    A student that did not look at the image could at best answer with the teacher's mean answer.
    By how much its loss is below the entropy of that is a lower bound of the information, in nats,
    that one view has of the teacher's answer to another.
    """
    names = "mean_entropy", "entropy", "kl"
    mean, each, kl = (sum(line[name] for line in lines[-10:]) / len(lines[-10:]) for name in names)
    first = max(0, lines[0]["mean_entropy"] - lines[0]["entropy"] - lines[0]["kl"])
    known = max(0, mean - each - kl)
    almost_nothing = "almost nothing: " if known < 0.1 else ""
    return (
        f"what was learned: {almost_nothing}the student knows {known:.2f} nats from another view "
        f"(at the start {first:.2f}) of the {mean - each:.2f} by which the teacher's answers tell "
        f"images apart (entropy {each:.2f} each, {mean:.2f} of their mean)"
    )


def hold_folder(folder):
    """Make a folder, and hold it as long as this process lives and keeps what is returned.

    ValueError: another process holds it, or files of others lie there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    is_run = (folder / ".lock").exists() or (folder / "last.pth").exists()
    if any(folder.iterdir()) and not is_run:
        raise ValueError(f"{folder} holds files that are no run's: choose another --output")
    lock = open(folder / ".lock", "w")
    try:
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another run is writing to {folder}: wait for it, or choose another --output"
        ) from None
    except OSError:  # a file system without locks
        pass
    return lock
