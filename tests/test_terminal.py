"""How a command ends: the line says what happened, and to this command."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import terminal
from files import write_whole

LOADER = "Caught RuntimeError in DataLoader worker process 0.\n"
SHM = "unable to allocate shared memory(shm) for file </torch_7_1_0>: No space left on device (28)"
BUS = (
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory. Please try to raise your shared memory limit."
)


def line_for(error, monkeypatch, **flags):
    """The line in which a command with such flags ends."""

    def fail(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # run_command() changes it
    with pytest.raises(SystemExit) as end:
        terminal.run_command(fail, lambda: SimpleNamespace(**flags))
    return end.value.code


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        BrokenPipeError(32, "Broken pipe"),
        EOFError(),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
    ],
)
def test_every_way_in_which_a_dead_loader_shows_is_the_same_line(error, monkeypatch):
    assert line_for(error, monkeypatch) == f"train.py: {terminal.LOADER_DIED}"
    of_a_run = line_for(error, monkeypatch, overwrite=False)
    assert of_a_run == f"train.py: {terminal.LOADER_DIED}{terminal.GOES_ON}"


@pytest.mark.parametrize("text", [SHM, LOADER + SHM, BUS, LOADER + "Bus error: shared memory"])
def test_full_shared_memory_is_named_and_no_death(text, monkeypatch):
    line = line_for(RuntimeError(text), monkeypatch)
    assert "/dev/shm" in line and "--workers" in line and "killed" not in line


def test_an_error_of_our_own_in_a_loader_is_not_called_a_death():
    def fail(args):
        raise RuntimeError(LOADER + "ours")

    with pytest.raises(RuntimeError, match="ours"):
        terminal.run_command(fail, lambda: None)


def test_out_of_memory_names_the_commands_own_flags(monkeypatch):
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")
    assert "--accumulate" in line_for(error, monkeypatch, batch=1, accumulate=1)
    assert line_for(error, monkeypatch, batch=1) == "train.py: out of memory: lower --batch"
    assert line_for(error, monkeypatch, size=1) == "train.py: out of memory: lower --size"


def test_a_loader_that_fails_once_more_while_the_command_ends_is_not_told(tmp_path):
    script = tmp_path / "ends.py"
    script.write_text("""
from terminal import run_command

class Loader:
    def __del__(self):
        raise RuntimeError("its process is gone")

def main(args):
    loader = Loader()
    raise ConnectionResetError

run_command(main, lambda: None)
""")
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == f"ends.py: {terminal.LOADER_DIED}\n"


def test_compile_without_a_compiler_is_one_line(tmp_path):
    """As torch says it where there is none."""
    script = tmp_path / "compiled.py"
    script.write_text(
        "import torch\nfrom terminal import run_command\n"
        "run_command(lambda args: torch.compile(lambda x: x.sin())(torch.ones(9)), lambda: None)"
    )
    environment = os.environ | {"CXX": "no-such-compiler"}
    line = [sys.executable, str(script)]
    result = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    assert result.stderr == "compiled.py: --compile needs a C++ compiler, and finds none\n"


def test_a_missing_folder_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(OSError, match="No such file") as error:
        write_whole(tmp_path / "none" / "a.pth", lambda file: None)
    assert "disk" not in str(error.value)


def test_a_loader_that_dies_while_a_file_is_written_is_not_called_a_full_disk(
    tmp_path, monkeypatch
):
    """torch's writer then fails too, on its way out."""

    def write(file):
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 9 vs 8")

    with pytest.raises(RuntimeError) as error:
        write_whole(tmp_path / "a.pth", write)
    assert line_for(error.value, monkeypatch) == f"train.py: {terminal.LOADER_DIED}"
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_not_utf8_can_be_printed(tmp_path):
    script = tmp_path / "say.py"
    script.write_text(
        "from terminal import run_command, say\n"
        r"run_command(lambda args: say('caf\udce9.png'), lambda: None)"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, timeout=60)
    assert result.returncode == 0 and result.stdout == b"caf\\udce9.png\n"


def test_nobody_reading_on_is_no_error(tmp_path):
    script = tmp_path / "say.py"
    script.write_text(
        "from terminal import run_command, say\n"
        "run_command(lambda args: [say('x' * 999) for _ in range(999)], lambda: None)"
    )
    pipe = ["bash", "-c", f"{sys.executable} {script} | head -1"]
    result = subprocess.run(pipe, capture_output=True, text=True, timeout=60)
    assert result.stdout == "x" * 999 + "\n" and result.stderr == ""


def test_a_system_without_sigusr1_has_the_other_signals(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")
    monkeypatch.delattr(signal, "SIGCHLD")
    there = importlib.util.module_from_spec(importlib.util.find_spec("terminal"))
    there.__spec__.loader.exec_module(there)
    assert there.STOP_SIGNALS == [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    there.end_children()


def test_lines_are_always_json():
    line = terminal.json_line({"a": math.nan, "b": [1.5, math.inf, {"c": -math.inf}], "d": "x"})
    assert json.loads(line, parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, None, {"c": None}],
        "d": "x",
    }
    assert line.endswith("\n")
