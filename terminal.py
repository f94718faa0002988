"""The life of a command: what it prints, how it ends, and the signals it gets.

A command ends in one line on stderr and a status that is not 0 for whatever a user can get wrong.
Of several processes that torchrun has started, the first alone prints.
"""

import atexit
import contextlib
import errno
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

# From batch systems, Ctrl-C and a closed terminal; not every system has every signal.
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
STOP_SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
RECEIVED = []  # the signals that have asked this process to stop
LOADER_DIED = "a process that loads images was killed (often for its memory: lower --workers)"
GOES_ON = "; the same command goes on from the last checkpoint"  # said of train.py
REASONS = {  # what torch's errors say -> what that means here
    r"shared memory|\bshm\b|/torch_\d+": "the shared memory (/dev/shm) that loading processes need "
    "is full: lower --workers (0 needs none), or enlarge it (docker run --shm-size)",
    "[Tt]oo many open files": "too many open files: lower --workers, or allow more (ulimit -n)",
    r"DataLoader worker \(pid|Pin memory thread": LOADER_DIED,
    r"C\+\+ compiler|[Cc]ompiler: .* not found": "--compile needs a C++ compiler, and finds none",
    "[Cc]onnection (was likely )?(closed|reset)|Socket closed|Timed out waiting|gloo/transport":
    "another process of this run died or hangs",
}
OUT_OF_MEMORY = "allocate memory|out of memory"
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
    if not first_process():
        return
    clear_status()
    try:
        print_line(line, file)
    except BrokenPipeError:  # nobody reads on, as in `command | head`
        silence(sys.stdout.fileno())
        sys.exit(1)


def print_line(line, file, end="\n"):
    """Print; once the terminal has been closed, to nowhere."""
    try:
        print(line, file=file, end=end, flush=True)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        silence(1, 2)


def silence(*descriptors):
    """From here on, what is written to these goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)


def status(line, every=10):
    """Show progress: on a terminal one line in place, elsewhere a line every so many seconds."""
    if not first_process():
        return
    if sys.stderr.isatty():
        print_line(f"\r\033[K{line}", sys.stderr, end="")
    elif time.monotonic() - _last_status[0] > every:
        _last_status[0] = time.monotonic()
        print_line(line, sys.stderr)


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
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name need not be printable
            stream.reconfigure(errors="backslashreplace")
    args = None
    try:
        args = parse_quietly(parse_args)
        main(args)
    except KeyboardInterrupt:
        end_quietly(128 + signal.SIGINT)
    except (ValueError, OSError, RuntimeError, EOFError) as error:
        line = explain(error, args)
        if line is None:
            raise
        end_quietly(f"{Path(sys.argv[0]).name}: {line}")


def end_quietly(status):
    """Exit. What else goes wrong then, as in a loader whose processes are gone, is not told."""
    clear_status()
    sys.unraisablehook = lambda unraisable: None
    sys.exit(status)


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


def explain(error, args):
    """Say in one line what an error means for the user; None: it is a defect, show the traceback.

    A loader's process that died shows as a RuntimeError of torch's, or as a broken connection.
    """
    goes_on = GOES_ON if hasattr(args, "overwrite") else ""
    if isinstance(error, (ConnectionError, EOFError)):
        return LOADER_DIED + goes_on
    text = f"{error} {error.__context__}"
    if isinstance(error, RuntimeError) and re.search(OUT_OF_MEMORY, text):
        return f"out of memory: {less_memory(args)}"
    if isinstance(error, RuntimeError):
        found = [why for pattern, why in REASONS.items() if re.search(pattern, text)]
        return found[0] + goes_on if found else None
    lines = str(error).splitlines() or [repr(error)]
    return re.sub(r"^[A-Za-z]+Error: ", "", lines[-1])  # an error in a loader ends its traceback


def first_line(error):
    """Return the first line of an error's text; if it has none, the name of its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def less_memory(args):
    """Say which of the command's own flags lowers what it takes."""
    if hasattr(args, "accumulate"):
        return "lower --batch (and raise --accumulate as much, for the same global batch)"
    flags = [f"--{flag}" for flag in ("batch", "size") if hasattr(args, flag)]
    return f"lower {' or '.join(flags)}" if flags else "it needs a machine with more memory"


def json_line(values):
    """Return a line of JSON, which knows neither NaN nor infinity: null stands in their place."""
    return json.dumps(finite(values), allow_nan=False) + "\n"


def finite(value):
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- signals ----


def on_signal(number, frame):
    """Let the step end and a checkpoint be written; at a second Ctrl-C end at once.

    Other signals may come twice: from a batch system, and from torchrun, which passes its own on.
    """
    RECEIVED.append(number)
    if number != signal.SIGINT:
        return
    interrupts = RECEIVED.count(number)
    if interrupts == 2:
        sys.exit(128 + number)
    if interrupts > 2:  # the exit hangs
        os._exit(128 + number)


def listen():
    """From here on, let signals end a step, not the process. Before, there is nothing to save."""
    RECEIVED.clear()
    for number in STOP_SIGNALS:
        ignored = signal.getsignal(number) == signal.SIG_IGN
        if not (ignored and signal.Signals(number).name == "SIGHUP"):  # as it is under nohup
            signal.signal(number, on_signal)


def end_children():
    """At the process's end, kill the loader's processes: they ignore a polite request."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


def outlive_signals(worker):
    """In a loader's process, ignore signals sent to the whole group: it ends with its parent."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
