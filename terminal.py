"""The life of a command: what it prints, how it ends, and the signals it gets.

A command ends in one line on stderr and a status that is not 0 for whatever a user can get wrong.
Of several processes that torchrun has started, the first alone prints.
"""

import atexit
import contextlib
import io
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # from batch systems and Ctrl-C
RECEIVED = []  # the signals that have asked this process to stop
LOADER_DIED = (
    "a process that loads images was killed (often for its memory: lower --workers); "
    "the same command goes on from the last checkpoint"
)
REASONS = {  # what torch's errors say -> what that means here
    "allocate memory|out of memory": "out of memory: lower --batch "
    "(and raise --accumulate as much, for the same global batch)",
    r"DataLoader worker \(pid": LOADER_DIED,
    "peer|gloo|NCCL": "another process of this run died or hangs; "
    "the same command goes on from the last checkpoint",
}
_last_status = [0.0]


# ---- printing ----


def first_process():
    return os.environ.get("RANK", "0") == "0"


def clear_status():
    """Take the status line off a terminal, so that something else can be printed."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def say(line, file=None):
    """Print a line, in the first process alone."""
    if first_process():
        clear_status()
        print(line, file=file, flush=True)


def status(line, every=10):
    """Show progress: on a terminal one line in place, elsewhere a line every so many seconds."""
    if not first_process():
        return
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    elif time.monotonic() - _last_status[0] > every:
        _last_status[0] = time.monotonic()
        print(line, file=sys.stderr, flush=True)


def minutes(seconds):
    """Format a duration: 75 -> '1:15', 7200 -> '2.0 h'."""
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def progress(what, done, total, start):
    """Show how far something is that began at `start` (time.monotonic()), and the time left."""
    left = (time.monotonic() - start) * (total / max(1, done) - 1)
    status(f"{what} {done}/{total}, {minutes(left)} left")


# ---- how a command ends ----


def run_command(main, parse_args):
    """Run main(parse_args()), and end in one line if it fails in a way that is not our defect."""
    atexit.register(end_children)
    try:
        main(parse_quietly(parse_args))
    except KeyboardInterrupt:
        clear_status()
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, RuntimeError, EOFError) as error:
        line = explain(error)
        if line is None:
            raise
        clear_status()
        sys.exit(f"{Path(sys.argv[0]).name}: {line}")


def parse_quietly(parse_args):
    """parse_args(), without the usage that argparse prints before what is wrong."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse_args()
    except SystemExit as stop:
        if stop.code:
            print(said.getvalue().splitlines()[-1], "(--help lists the flags)", file=sys.stderr)
        raise


def explain(error):
    """Say in one line what an error means for the user; None: it is a defect, show the traceback.

    A loader's process that died shows as a RuntimeError of torch's, or as a broken connection.
    """
    if isinstance(error, (ConnectionError, EOFError)):
        return LOADER_DIED
    if isinstance(error, RuntimeError):
        text = f"{error} {error.__context__}"
        return next((why for pattern, why in REASONS.items() if re.search(pattern, text)), None)
    lines = str(error).splitlines() or [repr(error)]
    return re.sub(r"^[A-Za-z]+Error: ", "", lines[-1])  # an error in a loader ends its traceback


# ---- signals ----


def on_signal(number, frame):
    """Let the step end and a checkpoint be written; at the second signal end at once."""
    if RECEIVED:
        os._exit(128 + number)
    RECEIVED.append(number)


def listen():
    """From here on, let signals end a step, not the process. Before, there is nothing to save."""
    RECEIVED.clear()
    for number in STOP_SIGNALS:
        signal.signal(number, on_signal)


def end_children():
    """At the process's end, kill the loader's processes: they ignore a polite request."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


def outlive_signals(worker):
    """In a loader's process, ignore signals sent to the whole group: it ends with its parent."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
