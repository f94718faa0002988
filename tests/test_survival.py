"""Whatever happens to a run, a whole checkpoint stands, and the run goes on as if nothing had."""

import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch

import train
from conftest import ROOT, TINY, command_here
from test_train import arguments, log, run
from util.data import BatchSampler
from util.misc import atomic_write
from util.run import Run
from util.shapes import Shapes

# three steps are an epoch of the twelve images of `folder`; drop path needs several blocks
FLAGS = "--arch vit_mini --drop_path_rate 0.3 --epochs 50000 --knn_every 0 --saveckp_freq 0 --data"
STARTED = []  # processes


def start(output, flags, processes=1, launch=(), script=ROOT / "train.py"):
    """Start a run in processes of its own, with one thread each, and a process that loads."""
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *launch]
    command = [sys.executable, *launcher, str(script), *TINY, "--workers", "1", *flags.split()]
    process = subprocess.Popen(
        [*command, "--output", str(output)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:  # the test has failed
            process.terminate()
            process.communicate()


def processes_of(output):
    """The process ids of a run, its launcher and its loaders too, oldest first."""
    command = ["pgrep", "-f", "--", f"--output {output}"]
    found = subprocess.run(command, capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def wait_for(output, step, process):
    """Wait until a run has logged a step."""
    path = output / "log.jsonl"
    for _ in range(60_000):
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    raise AssertionError("the run does not get on")


def checkpoint(output, name="last.pth"):
    return torch.load(output / name, weights_only=True)


def steps_of(output):
    return [line["step"] for line in log(output) if "loss" in line]


@pytest.fixture
def one_thread():
    """As the processes that start() starts: a product's last bit depends on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same_end(whole, killed, tolerance):
    """Assert that two runs' checkpoints and logs agree."""
    one, two = checkpoint(whole), checkpoint(killed)
    for part in ("student", "teacher"):
        for name, value in one[part].items():
            torch.testing.assert_close(value, two[part][name], rtol=0, atol=tolerance)
    torch.testing.assert_close(one["center"], two["center"], rtol=0, atol=tolerance)
    states = one["optimizer"]["state"].values(), two["optimizer"]["state"].values()
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    for line, other in zip(log(whole), log(killed), strict=True):
        assert line == pytest.approx(other, rel=tolerance, abs=tolerance)
    assert steps_of(killed) == list(range(1, 1 + one["step"]))


def test_killed_at_random_steps_it_ends_like_an_uninterrupted_run(
    folder, tmp_path, one_thread, capsys
):
    """Bit for bit. First a run is killed, then one's process that loads the images.

    A second run in the same folder is refused until the first is gone, whose own loading process
    may outlive it for some seconds.
    """
    killed, flags = tmp_path / "killed", f"{FLAGS} {folder}"
    first = start(killed, flags)
    wait_for(killed, 10, first)
    with pytest.raises(ValueError, match=f"another run is writing to {killed}: wait for it"):
        run(f"{flags} --steps 3", killed)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = start(killed, flags)
    wait_for(killed, steps_of(killed)[-1] + 10, second)
    os.kill(max(processes_of(killed)), signal.SIGKILL)
    out, _ = second.communicate(timeout=600)
    assert second.returncode == 1 and out.count("resumed from") == 1
    first.communicate()

    flags = f"{flags} --steps {steps_of(killed)[-1] + 5}"
    capsys.readouterr()
    run(flags, killed)
    assert capsys.readouterr().out.count("resumed from") == 1
    run(flags, tmp_path / "whole")
    assert_same_end(tmp_path / "whole", killed, 0)


DIES = """
import os, pathlib, signal, time, train
import torch.distributed as dist
from util.config import run_command
loss, join, calls = train.dino_loss, dist.init_process_group, []
here = pathlib.Path(__file__).with_suffix(".here")
rank, restarted = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"

def fatal(*args):
    calls.append(args)
    if len(calls) == 8 and rank == os.environ["DIES"] and not restarted:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(*args)

def join_late(*args, **names):
    if restarted and rank == "1":
        here.touch()
    while restarted and rank == "0":
        time.sleep(0.3)
        if here.exists():
            break
    join(*args, **names)

train.dino_loss, dist.init_process_group = fatal, join_late
train.draw_run = lambda run: None
run_command(train.main, train.parse_args)
"""


def test_two_processes_killed_end_like_an_uninterrupted_run(folder, tmp_path, monkeypatch):
    """One of them is killed at step 8, and torchrun starts the run again by itself.

    Then that one comes first, and must not find the former address of the other.
    """
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    flags = f"{FLAGS} {folder} --steps 14 --batch 2 --workers 0 --knn_every 1"
    for output, dies in (("whole", "none"), ("killed", "1")):
        monkeypatch.setenv("DIES", dies)
        process = start(tmp_path / output, flags, 2, ["--max_restarts=1"], script)
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0, out
        assert out.count("resumed from") == (dies == "1")
    assert_same_end(tmp_path / "whole", tmp_path / "killed", 1e-6)
    tests = [line["step"] for line in log(tmp_path / "whole") if "knn" in line]
    assert tests == [0, 3, 6, 9, 12]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(
    folder, tmp_path, temporary_files, processes
):
    """The number of processes may change, with the same global batch."""
    output, flags = tmp_path / "run", f"{FLAGS} {folder}"
    run(f"{flags} --steps 1", output)
    process = start(output, f"{flags} --batch {4 // processes}", processes)
    wait_for(output, 5, process)
    os.killpg(process.pid, signal.SIGTERM)  # as a batch system does: to the loader's process too
    if processes == 1:
        os.killpg(process.pid, signal.SIGTERM)  # and may do so twice
    out, _ = process.communicate(timeout=600)
    assert "stopped by SIGTERM after step" in out
    if processes == 1:
        assert process.returncode == 128 + signal.SIGTERM
    else:
        assert process.returncode != 0
    assert not list(temporary_files.glob("pymp-*"))
    step = checkpoint(output)["step"]
    assert log(output)[-1]["step"] == step >= 5
    run(f"{flags} --steps {step + 2}", output)
    assert steps_of(output) == list(range(1, step + 3))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_second_interrupt_ends_the_run_at_once(tmp_path, monkeypatch, capsys, number):
    """Other signals may come twice."""

    def send(run, step):
        for _ in range(times if step == 4 else 0):
            signal.raise_signal(number)

    monkeypatch.setattr(train, "watch_attention", send)
    flags, times = "--knn_every 0 --steps 9", 1 if number == signal.SIGINT else 2
    assert train.main(arguments(flags, tmp_path)) == 128 + number
    assert f"stopped by {number.name} after step" in capsys.readouterr().out
    step = checkpoint(tmp_path)["step"]
    assert steps_of(tmp_path) == list(range(1, step + 1)) and step in (4, 5)
    if number == signal.SIGINT:
        times = 2
        with pytest.raises(SystemExit) as end:
            train.main(arguments(f"{flags} --overwrite", tmp_path))
        assert end.value.code == 130 and not (tmp_path / "last.pth").exists()


@pytest.mark.parametrize("moment", ["opened", "half written", "not moved"])
def test_a_death_while_a_checkpoint_is_written_leaves_the_one_before(
    folder, tmp_path, monkeypatch, moment
):
    class Death(BaseException):
        pass

    def die(source, file):
        if moment == "half written":
            file.write(b"PK half a checkpoint")
            file.flush()
        if moment != "not moved" or str(file).endswith("last.pth"):
            raise Death
        move(source, file)

    move = os.replace
    output, flags = tmp_path / "run", f"{FLAGS} {folder}"
    run(f"{flags} --steps 3", output)
    with monkeypatch.context() as patch:
        if moment == "not moved":
            patch.setattr(os, "replace", die)
        else:
            patch.setattr(torch, "save", die)
        with pytest.raises(Death):
            run(f"{flags} --steps 6", output)
    assert checkpoint(output)["step"] == 3
    assert run(f"{flags} --steps 6", output)["step"] == 6
    assert steps_of(output) == list(range(1, 7))


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(folder, tmp_path):
    output, flags = tmp_path / "run", f"{FLAGS} {folder}"
    run(f"{flags} --steps 3", output)
    before = (output / "last.pth").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        command = [*TINY, *flags.split(), "--steps", "6", "--output", str(output)]
        status, (error,) = command_here("train.py", *command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert status == 1 and (output / "last.pth").read_bytes() == before
    assert error.startswith("train.py: cannot write") and "last.pth" in error
    assert not list(output.glob("*.tmp"))


def test_an_interrupted_file_leaves_nothing_beside_it(tmp_path):
    def interrupted(file):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "film.gif", interrupted)
    assert not list(tmp_path.iterdir())


def test_a_crash_may_cut_the_log_and_leave_half_a_file(tmp_path):
    run("--steps 3 --knn_every 0", tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "ep')
    (tmp_path / "last.pth.tmp").write_bytes(b"half")
    run("--steps 6 --knn_every 0", tmp_path)
    assert steps_of(tmp_path) == list(range(1, 7))
    assert not list(tmp_path.glob("*.tmp"))


def test_the_batch_may_be_split_otherwise_and_some_checkpoints_are_kept(folder, tmp_path):
    flags = f"--data {folder} --knn_every 0 --saveckp_freq 2"
    run(f"{flags} --epochs 5 --steps 7", tmp_path / "run")
    run(f"{flags} --epochs 5 --batch 2 --accumulate 2", tmp_path / "run")
    kept = {path.name: checkpoint(tmp_path / "run", path.name)["step"]
            for path in (tmp_path / "run").glob("epoch-*")}  # fmt: skip
    assert kept == {"epoch-0002.pth": 6, "epoch-0004.pth": 12}
    assert steps_of(tmp_path / "run") == list(range(1, 16))
    with pytest.raises(ValueError, match="global_batch 4 -> 2.*--overwrite"):
        run(f"{flags} --epochs 5 --batch 2", tmp_path / "run")
    with pytest.raises(ValueError, match="epochs 5 -> 6.*--overwrite"):
        run(f"{flags} --epochs 6", tmp_path / "run")


def test_a_kept_checkpoint_is_not_lost_with_what_comes_after_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "log_knn", mock.Mock(side_effect=[None, OSError("no space left")]))
    with pytest.raises(OSError, match="no space left"):
        train.main(arguments(f"--data {folder} --saveckp_freq 1 --epochs 2", tmp_path / "run"))
    for name in ("epoch-0001.pth", "last.pth"):
        assert checkpoint(tmp_path / "run", name)["step"] == 3


def test_a_run_goes_on_where_its_images_have_moved_but_not_with_others(folder, tmp_path, capsys):
    flags = "--steps {} --knn_every 0 --data {}"
    run(flags.format(1, folder), tmp_path / "run")
    moved = folder.rename(tmp_path / "moved")
    end = run(flags.format(2, moved), tmp_path / "run")
    assert "at step 1\n" in capsys.readouterr().out
    assert end["step"] == 2 and end["args"]["data_path"] == str(moved)
    before = (tmp_path / "run" / "last.pth").read_bytes()
    new = moved / "train" / "größe" / "new.png"
    (moved / "train" / "größe" / "0.png").rename(new)
    with pytest.raises(ValueError, match="images of other names, 12 -> 12 .*--overwrite"):
        run(flags.format(3, moved), tmp_path / "run")
    new.unlink()
    with pytest.raises(ValueError, match="images of other names, 12 -> 11 .*--overwrite"):
        run(flags.format(3, moved), tmp_path / "run")
    assert (tmp_path / "run" / "last.pth").read_bytes() == before


def test_overwriting_does_not_undo_a_restart(tmp_path, monkeypatch, capsys):
    run("--knn_every 0 --steps 3", tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run("--knn_every 0 --steps 4 --overwrite", tmp_path)
    assert "at step 3" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    run("--knn_every 0 --steps 4 --overwrite", tmp_path)
    assert "resumed" not in capsys.readouterr().out


POISON = """
import os, train
from util.config import run_command

def poison(patch, me, wrong):
    real, check, calls = train.dino_loss, train.Run.check, []

    def poisoned(*args):
        calls.append(args)
        return real(*args) * (float("nan") if len(calls) == 5 and me == wrong else 1)

    def snoop(self, step, metrics):
        assert all(p.isfinite().all() for p in self.state["student"].parameters())
        return check(self, step, metrics)

    patch(train, "dino_loss", poisoned)
    patch(train.Run, "check", snoop)

if __name__ == "__main__":
    poison(setattr, os.environ["RANK"], "1")
    run_command(train.main, train.parse_args)
"""


def test_a_gradient_that_is_not_finite_is_never_stepped_along(folder, tmp_path, monkeypatch):
    """It comes from one process, at step 5; the log is written at step 6."""
    script = tmp_path / "poison.py"
    script.write_text(POISON)
    flags = f"{FLAGS} {folder} --log_every 100 --steps 9"
    out, _ = start(tmp_path / "two", f"{flags} --batch 2", 2, script=script).communicate()
    error = "the gradient was not finite at step 5, and no step was taken from it"
    assert out.count(f"poison.py: {error}") == 2
    assert checkpoint(tmp_path / "two")["step"] == 3

    runpy.run_path(str(script))["poison"](monkeypatch.setattr, "0", "0")
    with pytest.raises(ValueError, match=error):
        run(flags, tmp_path / "one")
    assert checkpoint(tmp_path / "one")["step"] == 3


def test_what_fp16_skips_is_counted_and_no_reason_to_stop(tmp_path, monkeypatch):
    real, calls = train.dino_loss, []

    def overflowing(*args):
        calls.append(args)
        return real(*args) * (1e30 if len(calls) in (2, 3) else 1)

    monkeypatch.setattr(train, "dino_loss", overflowing)
    end = run("--amp fp16 --steps 10 --knn_every 0 --log_every 5", tmp_path)
    # the scale starts too high by design, and these are skipped besides
    skipped = [line["skipped"] for line in log(tmp_path)]
    assert skipped[1] >= 2 and end["optimizer"]["state"][0]["step"] == 10 - sum(skipped)
    assert end["scaler"]["scale"] == 2 ** (16 - sum(skipped))


def test_a_rate_that_rises_and_a_warm_up_longer_than_the_run_are_said(tmp_path, capsys):
    flags = "--steps 1 --warmup_epochs 0 --knn_every 0 --epochs 2 --warmup_teacher_temp_epochs 3"
    run(f"{flags} --lr 1e-5 --min_lr 1e-6", tmp_path)
    out = capsys.readouterr().out
    assert "warning: the learning rate rises from 1.5625e-07 to --min_lr 1e-06" in out
    assert "warning: tau_t does not reach --teacher_temp before the run ends" in out


def test_overwriting_leaves_a_users_own_copies(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "epoch-best.pth").write_bytes(b"mine")
    (tmp_path / "epoch-0003.pth").write_bytes(b"old")
    run("--steps 1 --knn_every 0 --overwrite", tmp_path)
    assert (tmp_path / "epoch-best.pth").read_bytes() == b"mine"
    assert not (tmp_path / "epoch-0003.pth").exists()


def test_what_a_run_began_from_is_not_needed_to_go_on(tmp_path):
    run("--steps 1 --knn_every 0", tmp_path / "first")
    flags = f"--knn_every 0 --init {tmp_path / 'w.pth'}"
    (tmp_path / "first" / "last.pth").rename(tmp_path / "w.pth")
    run(f"{flags} --steps 1", tmp_path / "run")
    (tmp_path / "w.pth").rename(tmp_path / "moved.pth")
    assert run(f"{flags} --steps 2", tmp_path / "run")["step"] == 2
    inside = f"--knn_every 0 --steps 1 --overwrite --init {tmp_path / 'run' / 'last.pth'}"
    with pytest.raises(ValueError, match="lies in --output, where this run would replace it"):
        run(inside, tmp_path / "run")
    assert (tmp_path / "run" / "last.pth").exists()


@pytest.mark.parametrize(
    "entropy, mean_entropy, kl, kind",
    [
        (4.15, 4.15, 0.001, "uniform"),
        (0.001, 0.001, 0.3, "one-dimensional"),
        (2, 2.001, 0.3, "constant"),
        (1, 3, 0.5, None),
    ],
)
def test_collapse_is_told_apart_and_said_once(tmp_path, capsys, entropy, mean_entropy, kl, kind):
    args, images = arguments("", tmp_path), Shapes(length=36)
    watcher = Run(args, images, None, BatchSampler(36, 4), {}, torch.zeros(1), None)
    for epoch in [0.5] * 50 + [1.5] * 19:  # the warm-up does not count
        watcher.watch(epoch, entropy, mean_entropy, kl)
    assert capsys.readouterr().out == ""
    watcher.watch(1.5, entropy, mean_entropy, kl)
    watcher.watch(1.5, entropy, mean_entropy, kl)
    out = capsys.readouterr().out
    if kind is None:
        assert out == ""
        return
    assert out.count(f"warning: the output has collapsed to the {kind} solution: ") == 1
    assert "--teacher_temp" in out and len(out.splitlines()) == 1
