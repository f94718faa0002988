"""A run's folder, so that nothing is lost: config.json, log.jsonl, last.pth, epoch-NNNN.pth.

Rank 0 alone writes it, each file beside its place and then moved there, so that a kill or a full
disk at any moment leaves the one before. A run goes on from last.pth as if nothing had happened.
Its watch for collapse is stop 10 of docs/tour.md.
"""

import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from backbone import architecture
from checkpoint import load_checkpoint
from data import fingerprint, unreadable
from distributed import agree, hold_folder
from files import write_whole
from terminal import RECEIVED, json_line, minutes, say, status

FORMAT = 4  # of last.pth
FREE = set(  # the arguments that resuming may change; the rest is the configuration
    "steps compile recompute workers device output overwrite accept_data stop_on_collapse "
    "log_every save_every keep_every keep knn_every knn_bank".split()
)
PARTS = ("student", "teacher", "optimizer", "scaler")  # of the state, each with a state dict
# May change too, and the run says so; the global batch, in steps, must stay.
NOTED = ("data", "epochs", "world", "batch", "accumulate")


def read_log(path):
    """Return what has been logged, one dict a line; a line cut short by a crash is left out."""
    lines = []
    if path.exists():
        for line in path.read_text().splitlines():
            with suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


def epoch_of(path):
    """The number in epoch-NNNN.pth."""
    return int(path.stem.split("-")[1])


class Run:
    """One training run: its arguments, its images, its state, and the folder args.output.

    images, val: the training images, and held-out ones with the same labels, or None.
    state: train.State, what training changes. order: data.Order. dtype: of autocast, or None.
    """

    def __init__(self, args, images, val, state, order, dtype=None):
        self.args, self.images, self.val = args, images, val
        self.state, self.dtype = state, dtype
        self.world, self.main = order.world, order.rank == 0
        self.steps_per_epoch, self.global_batch = order.steps_per_epoch, order.global_batch
        self.total = args.epochs * self.steps_per_epoch  # steps in all
        self.first = self.last = 0  # the steps from and to which to train: set by resume()
        self.bad, self.named = set(), set()  # images that cannot be read; those already named
        self.norms = []  # of the gradients since the last line of the log
        self.untested = False  # whether a k-NN test was left out, since it would take too long
        self.collapsed = 0  # lines of the log since the output collapsed
        self.attention = {}  # {step: what the teacher attends to in a few images}
        self.start = time.monotonic()
        self.log_path = args.output / "log.jsonl"
        self.config = {name: value for name, value in vars(args).items() if name not in FREE}
        if Path(args.data).is_dir():
            self.config["data"] = str(Path(args.data).resolve())
        self.config |= {
            "global_batch": self.global_batch,
            "precision": str(dtype),
            "world": self.world,
        }
        # what the data is, wherever it lies
        self.content = {"images": len(images), "names": fingerprint(images)} if images else {}

    # ---- going on, and writing down ----

    def resume(self):
        """Load last.pth, if there is one, and set the first and the last step of this process.

        ValueError: it is of another configuration, with the differences.
        """
        if self.main:
            hold_folder(self.args.output)
        path = self.args.output / "last.pth"
        # --overwrite starts anew, but a restart by torchrun goes on
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        anew = self.args.overwrite and not restarted
        if path.exists() and not anew:
            self.load(path)
        latest, earliest = agree(self.first), -agree(-self.first)
        if latest != earliest:
            raise ValueError(
                f"the processes find different checkpoints at {path}: "
                "--output must lie on a file system that all machines share"
            )
        self.last = max(self.first, min(self.total, self.args.steps or self.total))
        if self.main:
            self.open_folder(anew)

    def load(self, path):
        """Load a checkpoint of this very configuration."""
        checkpoint = load_checkpoint(path)
        if checkpoint.get("format") != FORMAT:
            raise ValueError(
                f"{path} is no run to resume, or of another version of this code: "
                "choose another --output, or --overwrite it"
            )
        theirs = checkpoint["args"]
        changed = {
            name: f"{name} {theirs.get(name)} -> {value}"
            for name, value in self.config.items()
            if theirs.get(name) != value and name != "amp"  # amp shows in the precision
        }
        self.check_content(path, checkpoint["content"])
        differ = [text for name, text in changed.items() if name not in NOTED]
        if differ:
            raise ValueError(
                f"{path} was made with another configuration ({', '.join(differ)}): "
                "choose another --output, or --overwrite it"
            )
        for name in PARTS:
            getattr(self.state, name).load_state_dict(checkpoint[name])
        self.state.center.copy_(checkpoint["center"])
        self.first, self.attention = checkpoint["step"], checkpoint["attention"]
        noted = f", with {', '.join(changed.values())}" if changed else ""
        say(f"resumed from {path} at step {self.first}{noted}")
        if "epochs" in changed:
            say("note: the schedules follow the new --epochs from here on")

    def check_content(self, path, theirs):
        """ValueError: the images, wherever they lie, are not those that it was trained on."""
        if theirs == self.content:
            return
        as_many = theirs["images"] == self.content["images"]
        counts = f"{theirs['images']} images then, {self.content['images']} now"
        if self.args.accept_data:
            if not as_many:
                say(f"note: {counts}; epochs and schedules follow the new number from here on")
            return
        if as_many:
            counts += ", of other names"
        raise ValueError(
            f"{path} was trained on other data ({counts}): --accept_data goes on with it all the "
            "same, --overwrite starts anew"
        )

    def open_folder(self, anew):
        """Make the folder ready: write the configuration, cut the log at the first step."""
        folder = self.args.output
        if anew:
            for old in [folder / "last.pth", *folder.glob("epoch-*.pth")]:
                old.unlink(missing_ok=True)
        config = json.dumps(self.config, indent=1) + "\n"
        write_whole(folder / "config.json", lambda file: file.write(config.encode()))
        kept = [line for line in self.lines() if self.first and line["step"] <= self.first]
        log = "".join(json_line(line) for line in kept)
        write_whole(self.log_path, lambda file: file.write(log.encode()))

    def lines(self):
        return read_log(self.log_path)

    def log(self, **values):
        if self.main:
            with open(self.log_path, "a") as file:
                file.write(json_line(values))

    def save(self, name, step):
        """Write a checkpoint; of those kept at an interval, the newest --keep stay."""
        if not self.main:
            return
        checkpoint = {
            "format": FORMAT,
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "args": self.config,
            "architecture": architecture(self.state.teacher.backbone),
            "classes": self.images.classes,
            "content": self.content,
            "center": self.state.center,
            "attention": self.attention,
        }
        checkpoint |= {name: getattr(self.state, name).state_dict() for name in PARTS}
        write_whole(self.args.output / name, lambda file: torch.save(checkpoint, file))
        if self.args.keep and name != "last.pth":
            # what is left of a longer run, from after this epoch, does not count as newest
            now = epoch_of(Path(name))
            kept = [old for old in self.args.output.glob("epoch-*.pth") if epoch_of(old) <= now]
            for old in sorted(kept, key=epoch_of)[: -self.args.keep]:
                old.unlink()

    # ---- watching ----

    def stop_signal(self):
        """Return the signal that has asked some process to stop, or 0; all processes agree."""
        return agree(RECEIVED[0] if RECEIVED else 0)

    def check_finite(self, step, loss, norms):
        """Return the steps among the last ones that were skipped for a gradient not finite.

        The scaler has skipped them in all processes alike. fp16 has some, and each halves the
        scale. ValueError: the loss is not finite, or the scale has fallen below 1: in fp16 after
        many skips, else at the first.
        """
        first = step - len(norms) + 1
        skipped = [first + i for i, norm in enumerate(norms) if not math.isfinite(norm)]
        if math.isfinite(loss) and self.state.scaler.get_scale() >= 1:
            return skipped
        where = f"the loss is {loss} at step {step}"
        if skipped:
            where = f"the gradient was not finite at step {skipped[0]}"
        raise ValueError(
            f"{where}, and no step was taken from it: the checkpoint in {self.args.output} is from "
            "before; --init a run from it in another --output, with a lower --lr, a smaller "
            "--clip, a higher --teacher_temp, or --amp off"
        )

    def check_images(self):
        """Name the images that any process found bad since the last time.

        ValueError: they are more than 1 % of all.
        """
        if not agree(len(self.bad - self.named)):
            return
        marks = torch.zeros(len(self.images), dtype=torch.uint8)
        marks[list(self.bad)] = 1
        self.bad.update(agree(marks).nonzero().flatten().tolist())
        for index in sorted(self.bad - self.named):
            name = self.images.name(index)
            say(f"cannot read {name!r}: its place is taken by the next image", sys.stderr)
        self.named |= self.bad
        if len(self.bad) > 0.01 * len(self.images):
            reason = unreadable(self.images, min(self.bad))
            raise ValueError(
                f"{len(self.bad)} of {len(self.images)} images cannot be read, more than 1 %: "
                f"mend or remove them (the first: {reason})"
            )

    def watch(self, epoch, entropy, mean_entropy, kl, patience=20):
        """Warn when the output has been collapsed for `patience` lines of the log in a row.

        Lines from the warm-up do not count. The signs are those of section 5.3 and Figure 7.
        ValueError: --stop_on_collapse.
        """
        uniform = math.log(self.args.out_dim)
        if entropy > 0.99 * uniform and kl < 0.01 * uniform:
            kind = "uniform"
            remedy = "lower --teacher_temp and --warmup_teacher_temp, or raise --lr"
        elif mean_entropy < 0.01 * uniform:
            kind = "one-dimensional"
            remedy = "raise --teacher_temp, lower --lr, or check that --center_momentum is below 1"
        else:
            kind = None
        if kind is None or epoch <= self.args.warmup_epochs:
            self.collapsed = 0
            return
        self.collapsed += 1
        if self.collapsed == patience:
            message = f"the output has collapsed to the {kind} solution: {remedy}"
            if self.args.stop_on_collapse:
                raise ValueError(message)
            say(f"warning: {message}")

    def progress(self, done, loss, entropy):
        rate = (done - self.first) / (time.monotonic() - self.start)  # steps a second
        status(
            f"epoch {done / self.steps_per_epoch:.2f}/{self.args.epochs}  step {done}  "
            f"loss {loss:.3f}  entropy {entropy:.3f}  KL {loss - entropy:.3f}  "
            f"{rate * self.global_batch:.0f} images/s, {minutes((self.last - done) / rate)} left"
        )
