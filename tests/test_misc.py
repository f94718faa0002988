"""How a command ends, what it prints on the way, and files that are whole or not there."""

import importlib
import io
import signal
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from conftest import errors
from util import config, misc

LOADER = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent):\n"


def end_of(error, monkeypatch):
    """What a command in which an error is raised ends with: a status or a line."""

    def fail(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["some/where/train.py"])
    with pytest.raises(SystemExit) as end:
        config.run_command(fail, Namespace)
    return end.value.code


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("no images below 'a'"), "no images below 'a'"),
        (ValueError(f"{LOADER}ValueError: ten images in a row"), "ten images in a row"),
        (ConnectionResetError(104, "reset by peer"), "[Errno 104] reset by peer"),
        (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory."),
        (ValueError(), "ValueError()"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(error, line, monkeypatch):
    assert end_of(error, monkeypatch) == f"train.py: {line}"


def test_an_interrupt_has_a_status_of_its_own(monkeypatch):
    assert end_of(KeyboardInterrupt(), monkeypatch) == 128 + signal.SIGINT


def test_any_other_error_keeps_its_traceback():
    def fail(args):
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nours")

    with pytest.raises(RuntimeError, match="ours"):
        config.run_command(fail, Namespace)


def test_a_missing_folder_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(OSError, match="No such file") as error:
        misc.atomic_write(tmp_path / "none" / "a.pth", lambda file: None)
    assert "disk" not in str(error.value)


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    """torch's writer raises a RuntimeError, with lines of C++ after the first."""

    def write(file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos\nframe #0")

    path = tmp_path / "a.pth"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="cannot write .*a.pth, which stays .* unexpected pos$"):
        misc.atomic_write(path, write)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_not_utf8_can_be_printed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    with pytest.raises(SystemExit) as end:
        config.run_command(lambda args: misc.say("caf\udce9.png"), Namespace)
    assert not end.value.code and sys.stdout.buffer.getvalue() == b"caf\\udce9.png\n"


def test_nobody_reading_on_is_no_traceback(tmp_path):
    script = tmp_path / "say.py"
    script.write_text(
        "from argparse import Namespace\n"
        "from util.config import run_command\nfrom util.misc import say\n"
        "run_command(lambda args: [say('x' * 999) for _ in range(999)], Namespace)"
    )
    pipe = ["bash", "-c", f"{sys.executable} {script} | head -1"]
    result = subprocess.run(pipe, capture_output=True, text=True, timeout=600)
    assert result.stdout == "x" * 999 + "\n"
    assert result.stderr == "say.py: [Errno 32] Broken pipe\n"


def test_a_system_without_sigusr1_has_the_other_signals(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")
    monkeypatch.delattr(signal, "SIGCHLD")
    there = importlib.util.module_from_spec(importlib.util.find_spec("util.misc"))
    there.__spec__.loader.exec_module(there)
    assert there.STOP_SIGNALS == [signal.SIGTERM, signal.SIGINT]
    config.kill_children()


def test_progress_is_a_line_now_and_then_or_in_place_on_a_terminal(monkeypatch, capsys):
    """A terminal's line is gone before the next thing is said."""
    for every, lines in ((0, 3), (10**9, 0)):
        monkeypatch.setattr(misc, "PROGRESS_EVERY", every)
        clock = SimpleNamespace(monotonic=iter(range(100)).__next__)
        monkeypatch.setattr(misc, "time", clock)
        assert list(misc.track("abc", "letters", 3)) == ["a", "b", "c"]
        printed = capsys.readouterr().err.splitlines()
        assert len(printed) == lines and not errors(printed)
        assert not lines or printed[0] == "letters 1/3, 0:02 left"

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = misc.Progress(2)
    progress.show(1, "half")
    misc.say("said")
    assert sys.stderr.getvalue() == "\r\033[Khalf, 0:01 left\r\033[K"
    assert capsys.readouterr().out == "said\n"
    monkeypatch.setenv("COLUMNS", "14")
    progress.show(1, "longer")
    assert sys.stderr.getvalue().endswith("\r\033[Klo, 0:02 left")  # 13 of 14 columns
    monkeypatch.setenv("RANK", "1")
    progress.show(2, "whole")
    misc.say("twice")
    assert "whole" not in sys.stderr.getvalue() and capsys.readouterr().out == ""


def test_durations_are_short():
    assert [misc.minutes(s) for s in (0, 75.9, 3599, 7200)] == ["0:00", "1:15", "59:59", "2:00:00"]
