"""Whatever happens to a run, a whole checkpoint stands, and the run goes on from it as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY
from test_train import log, run

import train
from run import Run

FLAGS = ["--knn_every", "0", "--drop_path", "0.3", "--save_every", "3", "--workers", "1"]


def start(folder, steps, processes=1, *launch, script=ROOT / "train.py", flags=()):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *launch] if processes > 1 else []
    command = [sys.executable, *launcher, str(script), *TINY, *FLAGS, "--steps", str(steps), "--output", str(folder), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def processes_of(folder):
    """The process ids of a run, its launcher and its loaders first, oldest first."""
    return [int(pid) for pid in subprocess.run(["pgrep", "-f", "--", f"--output {folder}"], capture_output=True, text=True).stdout.split()]


def wait_for(folder, lines, process):
    path = folder / "log.jsonl"
    for _ in range(6000):
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    raise AssertionError("the run does not get on")


def finished(process, timeout=100):
    out, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, out
    return out


def checkpoint(folder):
    return torch.load(folder / "last.pth", weights_only=True)


@pytest.mark.parametrize("processes, tolerance", [(1, 0), (2, 1e-6)])
def test_killed_at_random_steps_it_ends_like_an_uninterrupted_run(tmp_path, processes, tolerance):
    """The last time, of two processes only one is killed, and torchrun starts the run again by itself."""
    for lines in (20, 60):
        process = start(tmp_path / "killed", 120, processes)
        wait_for(tmp_path / "killed", lines, process)
        for pid in processes_of(tmp_path / "killed"):
            os.kill(pid, signal.SIGKILL)
        process.communicate()
    assert len(log(tmp_path / "killed")) < 120  # it was killed in time
    process = start(tmp_path / "killed", 120, processes, "--max_restarts=1")
    if processes == 2:
        wait_for(tmp_path / "killed", 90, process)
        os.kill(min(set(processes_of(tmp_path / "killed")) - {process.pid}), signal.SIGKILL)
    assert finished(process).count("resumed from") == processes
    finished(start(tmp_path / "whole", 120, processes))  # with as many threads: the sums of a matrix product depend on them in the last bit
    whole, killed = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed")
    for part in ("student", "teacher"):
        for name, value in whole[part].items():
            torch.testing.assert_close(value, killed[part][name], rtol=0, atol=tolerance)
    torch.testing.assert_close(whole["center"], killed["center"], rtol=0, atol=tolerance)
    for one, two in zip(whole["optimizer"]["state"].values(), killed["optimizer"]["state"].values(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=tolerance)
    for line, other in zip(log(tmp_path / "whole"), log(tmp_path / "killed"), strict=True):
        assert line == pytest.approx(other, rel=tolerance, abs=tolerance)
    assert [line["step"] for line in log(tmp_path / "killed")] == list(range(1, 121))


def test_a_process_that_loads_images_and_dies_ends_the_run_with_one_line(tmp_path):
    process = start(tmp_path, 100_000)
    wait_for(tmp_path, 5, process)
    os.kill(max(processes_of(tmp_path)), signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in out and "train.py: a process that loads images was killed" in out
    assert checkpoint(tmp_path)["step"] > 0


@pytest.mark.parametrize("processes, number", [(1, signal.SIGUSR1), (2, signal.SIGTERM)])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(tmp_path, processes, number):
    process = start(tmp_path / "run", 100_000, processes)
    wait_for(tmp_path / "run", 10, process)
    os.killpg(process.pid, number)  # as a batch system does: to the loader's processes too
    out, _ = process.communicate(timeout=60)
    assert f"stopped by {number.name} after step" in out
    assert process.returncode == 128 + number if processes == 1 else process.returncode != 0
    step = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["step"]
    assert log(tmp_path / "run")[-1]["step"] == step >= 10
    process = start(tmp_path / "run", step + 2, processes)
    assert f"at step {step}" in process.communicate(timeout=60)[0] and process.returncode == 0
    assert [line["step"] for line in log(tmp_path / "run")] == list(range(1, step + 3))


@pytest.mark.parametrize("moment", ["opened", "half written", "not moved"])
def test_a_death_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch, moment):
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
    run(*FLAGS, "--steps", 3, "--output", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(*(os, "replace") if moment == "not moved" else (torch, "save"), die)
        with pytest.raises(Death):
            run(*FLAGS, "--steps", 6, "--output", tmp_path)
    assert torch.load(tmp_path / "last.pth", weights_only=True)["step"] == 3
    assert run(*FLAGS, "--steps", 6, "--output", tmp_path)["step"] == 6
    assert [line["step"] for line in log(tmp_path)] == list(range(1, 7))


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path):
    run(*FLAGS, "--steps", 3, "--output", tmp_path / "run")
    before = (tmp_path / "run" / "last.pth").read_bytes()
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *FLAGS, "--steps", "6", "--output", str(tmp_path / "run")]
    result = subprocess.run(["bash", "-c", 'ulimit -f 100; exec "$@"', "-", *command], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and (tmp_path / "run" / "last.pth").read_bytes() == before
    error = [line for line in result.stderr.splitlines() if "epoch" not in line]
    assert len(error) == 1 and error[0].startswith("train.py: cannot write") and "last.pth" in error[0]


def test_a_checkpoint_that_does_not_arrive_whole_leaves_the_one_before(tmp_path, monkeypatch):
    run(*FLAGS, "--steps", 3, "--output", tmp_path)
    before = (tmp_path / "last.pth").read_bytes()
    real = os.fsync

    def lose_some(number):  # a file system that reports what did not reach it as written
        real(number)
        if os.fstat(number).st_size > 50_000:
            os.truncate(number, 50_000)

    monkeypatch.setattr(os, "fsync", lose_some)
    with pytest.raises(OSError, match=r"cannot write .*last.pth .*50000 of \d+ bytes arrived"):
        run(*FLAGS, "--steps", 6, "--output", tmp_path)
    assert (tmp_path / "last.pth").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_a_crash_may_cut_the_log_and_leave_half_a_file(tmp_path):
    run(*FLAGS, "--steps", 3, "--output", tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "ep')
    (tmp_path / "last.pth.tmp").write_bytes(b"half")
    run(*FLAGS, "--steps", 6, "--output", tmp_path)
    assert [line["step"] for line in log(tmp_path)] == list(range(1, 7))


def test_epochs_and_processes_may_change_with_a_note_and_kept_checkpoints_are_few(folder, tmp_path, capsys):
    flags = "--data", folder, "--keep_every", 1, "--keep", 2, "--output", tmp_path / "run"
    run(*flags, "--epochs", 3)
    assert capsys.readouterr().out.count("note") == 0
    run(*flags, "--epochs", 4, "--batch", 2, "--accumulate", 2)
    out = capsys.readouterr().out
    assert "at step 9, with epochs 3 -> 4, batch 4 -> 2, accumulate 1 -> 2" in out and "schedules follow the new --epochs" in out
    assert sorted(path.name for path in (tmp_path / "run").glob("epoch-*")) == ["epoch-0003.pth", "epoch-0004.pth"]
    finished(start(tmp_path / "run", 13, 2, flags=("--data", str(folder), "--drop_path", "0", "--batch", "2", "--epochs", "5", "--save_every", "0", "--knn_every", "1")))
    assert checkpoint(tmp_path / "run")["args"]["world"] == 2 and [line["step"] for line in log(tmp_path / "run") if "loss" in line] == list(range(1, 14))


def test_overwriting_does_not_undo_a_restart(tmp_path, monkeypatch, capsys):
    run(*FLAGS, "--steps", 3, "--output", tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(*FLAGS, "--steps", 4, "--output", tmp_path, "--overwrite")
    assert "at step 3" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    run(*FLAGS, "--steps", 4, "--output", tmp_path, "--overwrite")
    assert "resumed" not in capsys.readouterr().out


POISON = """
import os, sys, train
from run import command
real, calls = train.dino_loss, []
def poisoned(*args):
    calls.append(args)
    return real(*args) * (float("nan") if len(calls) == 3 and os.environ.get("RANK", "0") == os.environ["POISON"] else 1)
def snoop(self, step, loss, norms, scale):
    assert all(p.isfinite().all() for p in self.state["student"].parameters())
    return check(self, step, loss, norms, scale)
train.dino_loss, check, train.Run.check_finite = poisoned, train.Run.check_finite, snoop
command(train.main, train.parse_args)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_gradient_that_is_not_finite_is_never_stepped_along(tmp_path, monkeypatch, processes):
    """It comes from one process, at step 3; the log is written at step 5."""
    (tmp_path / "poison.py").write_text(POISON)
    monkeypatch.setenv("POISON", str(processes - 1))
    process = start(tmp_path / "run", 10, processes, script=tmp_path / "poison.py", flags=("--log_every", "5", "--save_every", "2"))
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and out.count("poison.py: the gradient was not finite at step 3, and no step was taken from it") == processes
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_what_fp16_skips_is_counted_and_no_reason_to_stop(tmp_path, monkeypatch):
    real, calls = train.dino_loss, []

    def overflowing(*args):
        calls.append(args)
        return real(*args) * (1e30 if len(calls) in (2, 3) else 1)

    monkeypatch.setattr(train, "dino_loss", overflowing)
    end = run("--amp", "fp16", "--steps", 10, "--knn_every", 0, "--log_every", 5, "--output", tmp_path)
    skipped = [line["skipped"] for line in log(tmp_path)]  # the scale starts too high by design, and these are skipped besides
    assert skipped[1] >= 2 and end["optimizer"]["state"][0]["step"] == 10 - sum(skipped) and end["scaler"]["scale"] == 2 ** (16 - sum(skipped))


@pytest.mark.parametrize("entropy, mean_entropy, kl, kind", [(4.15, 4.15, 0.001, "uniform"), (0.001, 0.001, 0.3, "one-dimensional"), (1, 3, 0.5, None)])
def test_collapse_is_told_apart_and_stops_if_asked(tmp_path, capsys, entropy, mean_entropy, kl, kind):
    args = train.parse_args([*TINY, "--output", str(tmp_path), "--stop_on_collapse"])
    watcher = Run(args, None, {}, None, 4)
    for epoch in [0.5] * 50 + [1.5] * 19:
        watcher.watch(epoch, entropy, mean_entropy, kl)
    if kind is None:
        return watcher.watch(1.5, entropy, mean_entropy, kl)
    with pytest.raises(ValueError, match=f"collapsed to the {kind} solution: .*--teacher_temp"):
        watcher.watch(1.5, entropy, mean_entropy, kl)
    args.stop_on_collapse, watcher.collapsed = False, 19
    watcher.watch(1.5, entropy, mean_entropy, kl)
    assert f"warning: the output has collapsed to the {kind} solution" in capsys.readouterr().out
