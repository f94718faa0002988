"""What a command prints, and files that are never half written.

Of several processes that torchrun has started, the first alone prints.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # not every system has every signal
STOP_SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
INPUTS = set()  # the files that a command reads, none of which it replaces: see run_command()
PROGRESS_EVERY = 10  # seconds between lines of progress, where there is no terminal


def is_main_process():
    return os.environ.get("RANK", "0") == "0"


def say(line, file=None):
    """Print a line, in the first process alone, in the place of the progress on a terminal."""
    if is_main_process():
        clear_progress()
        print(line, file=file, flush=True)


def clear_progress():
    """Take the line of progress off a terminal."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def minutes(seconds):
    """Format a duration: 75 -> '1:15', 7200 -> '2:00:00'."""
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


class Progress:
    """How far a piece of work is: in place on a terminal, elsewhere a line now and then."""

    def __init__(self, total):
        self.total = total
        self.start = self.shown = time.monotonic()

    def seconds(self):
        """Return how long the work has taken."""
        return time.monotonic() - self.start

    def show(self, done, text):
        """Print text and the time left, now that `done` of the total are done."""
        if not is_main_process():
            return
        now = time.monotonic()
        left = f", {minutes((now - self.start) * (self.total / done - 1))} left"
        if sys.stderr.isatty():
            text = text[: shutil.get_terminal_size().columns - 1 - len(left)]  # on a single line
            print(f"\r\033[K{text}{left}", end="", file=sys.stderr, flush=True)
        elif now - self.shown > PROGRESS_EVERY:
            self.shown = now
            print(f"{text}{left}", file=sys.stderr, flush=True)


def track(iterable, what, total):
    """Yield what is in an iterable, and show the progress."""
    progress = Progress(total)
    for i, item in enumerate(iterable):
        yield item
        progress.show(i + 1, f"{what} {i + 1}/{total}")


def append_json(path, values):
    with open(path, "a") as file:
        file.write(json.dumps(values) + "\n")


def atomic_write(path, write):
    """Call write(file) on a file beside path, which then takes its place.

    OSError: it could not be written, or is a file that the command reads; path is as it was before.
    """
    if os.path.realpath(path) in INPUTS:
        raise OSError(f"{path} is what this command reads: choose another name or --output")
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save() raises a RuntimeError on a full disk
        raise OSError(f"cannot write {path}, which stays as it was: {first_line(error)}") from None
    finally:
        beside.unlink(missing_ok=True)


def first_line(error):
    """Return the first line of an error's text; if it has none, the name of its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]
