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

FLAGS = ["--knn_every", "0", "--drop_path", "0.3", "--save_every", "3", "--workers", "1"]


def start(folder, steps, processes=1):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *TINY, *FLAGS, "--steps", str(steps), "--output", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_for(folder, lines, process):
    path = folder / "log.jsonl"
    for _ in range(6000):
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    raise AssertionError("the run does not get on")


def test_killed_at_random_steps_it_ends_bit_for_bit_like_an_uninterrupted_run(tmp_path):
    for lines in (20, 60):
        process = start(tmp_path / "killed", 120)
        wait_for(tmp_path / "killed", lines, process)
        process.kill()
        process.wait()
    assert len(log(tmp_path / "killed")) < 120  # it was killed in time
    process = start(tmp_path / "killed", 120)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and "resumed from" in out
    process = start(tmp_path / "whole", 120)  # with as many threads: the sums of a matrix product depend on them in the last bit
    assert process.communicate(timeout=100) and process.returncode == 0
    whole, killed = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("whole", "killed"))
    for part in ("student", "teacher"):
        assert all(torch.equal(value, killed[part][name]) for name, value in whole[part].items())
    assert torch.equal(whole["center"], killed["center"])
    for one, two in zip(whole["optimizer"]["state"].values(), killed["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert log(tmp_path / "whole") == log(tmp_path / "killed") and [line["step"] for line in log(tmp_path / "killed")] == list(range(1, 121))


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

    def die(*args):
        if moment == "half written":
            args[1].write(b"PK half a checkpoint")
            args[1].flush()
        raise Death

    run(*FLAGS, "--steps", 3, "--output", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(*(train.os, "replace") if moment == "not moved" else (train.torch, "save"), die)
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


@pytest.mark.parametrize("entropy, mean_entropy, kl, kind", [(4.15, 4.15, 0.001, "uniform"), (0.001, 0.001, 0.3, "one-dimensional"), (1, 3, 0.5, None)])
def test_collapse_is_told_apart_and_stops_if_asked(tmp_path, capsys, entropy, mean_entropy, kl, kind):
    args = train.parse_args([*TINY, "--output", str(tmp_path), "--stop_on_collapse"])
    watcher = train.Run(args, 4, None, None, {}, None, 0)
    for epoch in [0.5] * 50 + [1.5] * 19:
        watcher.watch(epoch, entropy, mean_entropy, kl)
    if kind is None:
        return watcher.watch(1.5, entropy, mean_entropy, kl)
    with pytest.raises(ValueError, match=f"collapsed to the {kind} solution: .*--teacher_temp"):
        watcher.watch(1.5, entropy, mean_entropy, kl)
    args.stop_on_collapse, watcher.collapsed = False, 19
    watcher.watch(1.5, entropy, mean_entropy, kl)
    assert f"warning: the output has collapsed to the {kind} solution" in capsys.readouterr().out
