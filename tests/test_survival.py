"""Whatever happens to a run, a whole checkpoint stands, and the run goes on as if nothing had."""

import os
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch

import train
from backbone import build_backbone
from conftest import ROOT, TINY
from files import write_whole
from optimizer import build_optimizer
from run import Run
from shapes import Shapes
from test_train import arguments, log, run

FLAGS = "--knn_every 0 --drop_path 0.3 --save_every 3 --workers 1"


def start(
    folder, steps, processes=1, launch=(), script=ROOT / "train.py", flags="", out=subprocess.PIPE
):
    """Start a run in processes of its own, with one thread each."""
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *launch]
    command = [sys.executable, *launcher, str(script), *TINY, *FLAGS.split(), *flags.split()]
    return subprocess.Popen(
        [*command, "--steps", str(steps), "--output", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=out,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def processes_of(folder):
    """The process ids of a run, its launcher and its loaders too, oldest first."""
    command = ["pgrep", "-f", "--", f"--output {folder}"]
    found = subprocess.run(command, capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def wait_for(folder, lines, process):
    """Wait until a run has written so many lines of its log."""
    path = folder / "log.jsonl"
    for _ in range(6000):
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    raise AssertionError("the run does not get on")


def finished(process):
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out
    return out


def checkpoint(folder, name="last.pth"):
    return torch.load(folder / name, weights_only=True)


def steps_of(folder):
    return [line["step"] for line in log(folder)]


@pytest.fixture
def one_thread():
    """As the processes that start() starts: a product's last bit depends on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def kill_at(folder, steps, lines):
    """Start a run, and kill all its processes once it has written so many lines."""
    process = start(folder, steps)
    wait_for(folder, lines, process)
    for pid in processes_of(folder):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert len(log(folder)) < steps  # it was killed in time


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


def test_killed_at_random_steps_it_ends_like_an_uninterrupted_run(tmp_path, one_thread, capsys):
    """Bit for bit."""
    for lines in (20, 60):
        kill_at(tmp_path / "killed", 120, lines)
    run(f"{FLAGS} --steps 120", tmp_path / "killed")
    assert capsys.readouterr().out.count("resumed from") == 1
    run(f"{FLAGS} --steps 120", tmp_path / "whole")
    assert_same_end(tmp_path / "whole", tmp_path / "killed", 0)


def test_two_processes_killed_end_like_an_uninterrupted_run(tmp_path):
    """One of them is killed, and torchrun starts the run again by itself."""
    folder = tmp_path / "killed"
    process = start(folder, 60, processes=2, launch=["--max_restarts=1"])
    wait_for(folder, 20, process)
    os.kill(min(set(processes_of(folder)) - {process.pid}), signal.SIGKILL)
    assert finished(process).count("resumed from") == 1
    finished(start(tmp_path / "whole", 60, processes=2))
    assert_same_end(tmp_path / "whole", folder, 1e-6)


def test_a_process_that_loads_images_and_dies_ends_the_run_with_one_line(tmp_path):
    process = start(tmp_path, 100_000)
    wait_for(tmp_path, 5, process)
    os.kill(max(processes_of(tmp_path)), signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in out
    assert "train.py: a process that loads images was killed" in out
    assert checkpoint(tmp_path)["step"] > 0


@pytest.mark.parametrize(
    "processes, number", [(1, signal.SIGUSR1), (1, signal.SIGHUP), (2, signal.SIGTERM)]
)
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(
    tmp_path, temporary_files, processes, number
):
    process = start(tmp_path, 100_000, processes)
    wait_for(tmp_path, 10, process)
    os.killpg(process.pid, number)  # as a batch system does: to the loader's processes too
    if processes == 1:
        os.killpg(process.pid, number)  # and may do so twice
    out, _ = process.communicate(timeout=60)
    assert f"stopped by {number.name} after step" in out
    if processes == 1:
        assert process.returncode == 128 + number
    else:
        assert process.returncode != 0
    assert not list(temporary_files.glob("pymp-*"))
    step = checkpoint(tmp_path)["step"]
    assert log(tmp_path)[-1]["step"] == step >= 10
    run(f"{FLAGS} --steps {step + 2} --batch {4 * processes}", tmp_path)  # the same global batch
    assert steps_of(tmp_path) == list(range(1, step + 3))


def test_a_closed_terminal_ends_the_step_and_leaves_a_checkpoint(tmp_path):
    terminal, slave = os.openpty()
    process = start(tmp_path, 100_000, out=slave)
    os.close(slave)
    wait_for(tmp_path, 10, process)
    os.close(terminal)  # from here on nothing can be printed
    os.kill(process.pid, signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert log(tmp_path)[-1]["step"] == checkpoint(tmp_path)["step"] >= 10


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
    run(f"{FLAGS} --steps 3", tmp_path)
    with monkeypatch.context() as patch:
        if moment == "not moved":
            patch.setattr(os, "replace", die)
        else:
            patch.setattr(torch, "save", die)
        with pytest.raises(Death):
            run(f"{FLAGS} --steps 6", tmp_path)
    assert checkpoint(tmp_path)["step"] == 3
    assert run(f"{FLAGS} --steps 6", tmp_path)["step"] == 6
    assert steps_of(tmp_path) == list(range(1, 7))


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path):
    run(f"{FLAGS} --steps 3", tmp_path)
    before = (tmp_path / "last.pth").read_bytes()
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *FLAGS.split(), "--steps", "6"]
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "-", *command, "--output", str(tmp_path)]
    result = subprocess.run(limited, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and (tmp_path / "last.pth").read_bytes() == before
    error = [line for line in result.stderr.splitlines() if "epoch" not in line]
    assert len(error) == 1
    assert error[0].startswith("train.py: cannot write") and "last.pth" in error[0]


def test_a_checkpoint_that_does_not_arrive_whole_leaves_the_one_before(tmp_path, monkeypatch):
    run(f"{FLAGS} --steps 3", tmp_path)
    before = (tmp_path / "last.pth").read_bytes()
    real = os.fsync

    def lose_some(number):  # a file system that reports what did not reach it as written
        real(number)
        if os.fstat(number).st_size > 50_000:
            os.truncate(number, 50_000)

    monkeypatch.setattr(os, "fsync", lose_some)
    with pytest.raises(OSError, match=r"cannot write .*last.pth .*50000 of \d+ bytes arrived"):
        run(f"{FLAGS} --steps 6", tmp_path)
    assert (tmp_path / "last.pth").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_an_interrupted_file_leaves_nothing_beside_it(tmp_path):
    def interrupted(file):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "film.gif", interrupted)
    assert not list(tmp_path.iterdir())


def test_a_crash_may_cut_the_log_and_leave_half_a_file(tmp_path):
    run(f"{FLAGS} --steps 3", tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "ep')
    (tmp_path / "last.pth.tmp").write_bytes(b"half")
    run(f"{FLAGS} --steps 6", tmp_path)
    assert steps_of(tmp_path) == list(range(1, 7))


def test_epochs_and_processes_may_change_with_a_note_and_kept_checkpoints_are_few(
    folder, tmp_path, capsys
):
    flags = f"--data {folder} --keep_every 1 --keep 2"
    run(f"{flags} --epochs 3", tmp_path / "run")
    assert capsys.readouterr().out.count("note") == 0
    run(f"{flags} --epochs 4 --batch 2 --accumulate 2", tmp_path / "run")
    out = capsys.readouterr().out
    assert "at step 9, with epochs 3 -> 4, batch 4 -> 2, accumulate 1 -> 2" in out
    assert "schedules follow the new --epochs" in out
    kept = sorted(path.name for path in (tmp_path / "run").glob("epoch-*"))
    assert kept == ["epoch-0003.pth", "epoch-0004.pth"]
    flags = f"--data {folder} --drop_path 0 --batch 2 --epochs 5 --save_every 0 --knn_every 1"
    finished(start(tmp_path / "run", 13, 2, flags=flags))
    assert checkpoint(tmp_path / "run")["args"]["world"] == 2
    steps = [line["step"] for line in log(tmp_path / "run") if "loss" in line]
    assert steps == list(range(1, 14))


def test_a_kept_checkpoint_is_not_lost_with_what_is_drawn_after_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "lines", mock.Mock(side_effect=[[], OSError("no space left")]))
    with pytest.raises(OSError, match="no space left"):
        train.main(arguments(f"--data {folder} --keep_every 1 --epochs 2 --knn_every 0", tmp_path))
    assert [checkpoint(tmp_path, name)["step"] for name in ("epoch-0001.pth", "last.pth")] == [3, 3]


def test_a_run_goes_on_where_its_images_have_moved_but_not_with_others(folder, tmp_path, capsys):
    flags = "--steps {} --knn_every 0 --data {}"
    run(flags.format(1, folder), tmp_path / "run")
    moved = folder.rename(tmp_path / "moved")
    run(flags.format(2, moved), tmp_path / "run")
    assert f"at step 1, with data {folder} -> {moved}" in capsys.readouterr().out
    (moved / "train" / "größe" / "0.png").rename(moved / "train" / "größe" / "new.png")
    with pytest.raises(ValueError, match="12 images then, 12 now, of other names.: --accept_data"):
        run(flags.format(3, moved), tmp_path / "run")
    (moved / "train" / "größe" / "new.png").unlink()
    before = (tmp_path / "run" / "last.pth").read_bytes()
    with pytest.raises(ValueError, match="trained on other data .12 images then, 11 now"):
        run(flags.format(3, moved), tmp_path / "run")
    assert (tmp_path / "run" / "last.pth").read_bytes() == before
    end = run(flags.format(3, moved) + " --accept_data", tmp_path / "run")
    assert end["step"] == 3 and end["content"]["images"] == 11
    assert "note: 12 images then, 11 now; epochs and schedules" in capsys.readouterr().out


def test_a_second_run_in_the_same_folder_ends_in_one_line_until_the_first_is_gone(tmp_path):
    """A kill ends the first, whose loading process may outlive it for some seconds."""
    first = start(tmp_path, 100_000)
    wait_for(tmp_path, 5, first)
    with pytest.raises(ValueError, match=f"another run is writing to {tmp_path}: wait for it"):
        run("--steps 3 --knn_every 0", tmp_path)
    before = steps_of(tmp_path)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    run(f"{FLAGS} --steps {before[-1] + 40}", tmp_path)
    assert steps_of(tmp_path) == list(range(1, before[-1] + 41))
    first.communicate()


def test_kept_checkpoints_are_rotated_by_number_and_from_the_epoch_that_was_reached(tmp_path):
    batches = mock.Mock(rank=0, world=1, steps_per_epoch=1, global_batch=4)
    args = arguments("--keep 2", tmp_path)
    network = train.Network(build_backbone("vit_micro", 8, 16), torch.nn.Identity())
    _, scaler = build_optimizer("sgd", network, torch.device("cpu"), None)
    state = train.State(network, network, torch.zeros(1), scaler, scaler)
    kept = Run(args, Shapes(length=3), None, state, batches)
    (tmp_path / "epoch-20000.pth").write_bytes(b"of a longer run")
    for epoch in (9998, 9999, 10000, 10001):
        kept.save(f"epoch-{epoch:04d}.pth", epoch)
    names = {path.name for path in tmp_path.glob("epoch-*.pth")}
    assert names == {"epoch-10000.pth", "epoch-10001.pth", "epoch-20000.pth"}


def test_few_file_descriptors_end_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--workers", "1"]
    limited = ["bash", "-c", 'ulimit -n 24; exec "$@"', "-", *command, "--output", str(tmp_path)]
    result = subprocess.run(limited, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    error = "train.py: only 24 files may be open at once: allow 256 (ulimit -n)\n"
    assert result.stderr == error


def test_overwriting_does_not_undo_a_restart(tmp_path, monkeypatch, capsys):
    run(f"{FLAGS} --steps 3", tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(f"{FLAGS} --steps 4 --overwrite", tmp_path)
    assert "at step 3" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    run(f"{FLAGS} --steps 4 --overwrite", tmp_path)
    assert "resumed" not in capsys.readouterr().out


POISON = """
import os, train
from terminal import run_command
real, calls, me = train.dino_loss, [], os.environ.get("RANK", "0")
def poisoned(*args):
    calls.append(args)
    wrong = len(calls) == 3 and me == os.environ["POISON"]
    return real(*args) * (float("nan") if wrong else 1)
def snoop(self, step, loss, norms):
    assert all(p.isfinite().all() for p in self.state.student.parameters())
    return check(self, step, loss, norms)
train.dino_loss, check, train.Run.check_finite = poisoned, train.Run.check_finite, snoop
run_command(train.main, train.parse_args)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_gradient_that_is_not_finite_is_never_stepped_along(tmp_path, monkeypatch, processes):
    """It comes from one process, at step 3; the log is written at step 5."""
    script = tmp_path / "poison.py"
    script.write_text(POISON)
    monkeypatch.setenv("POISON", str(processes - 1))
    flags = "--log_every 5 --save_every 2"
    process = start(tmp_path / "run", 10, processes, script=script, flags=flags)
    out, _ = process.communicate(timeout=100)
    error = "poison.py: the gradient was not finite at step 3, and no step was taken from it"
    assert process.returncode == 1 and out.count(error) == processes
    assert checkpoint(tmp_path / "run")["step"] == 2


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


@pytest.mark.parametrize(
    "entropy, mean_entropy, kl, kind",
    [(4.15, 4.15, 0.001, "uniform"), (0.001, 0.001, 0.3, "one-dimensional"), (1, 3, 0.5, None)],
)
def test_collapse_is_told_apart_and_stops_if_asked(
    tmp_path, capsys, entropy, mean_entropy, kl, kind
):
    args = arguments("--stop_on_collapse", tmp_path)
    batches = mock.Mock(rank=0, world=1, steps_per_epoch=9, global_batch=4)
    watcher = Run(args, None, None, None, batches)
    for epoch in [0.5] * 50 + [1.5] * 19:
        watcher.watch(epoch, entropy, mean_entropy, kl)
    if kind is None:
        watcher.watch(1.5, entropy, mean_entropy, kl)
        return
    with pytest.raises(ValueError, match=f"collapsed to the {kind} solution: .*--teacher_temp"):
        watcher.watch(1.5, entropy, mean_entropy, kl)
    args.stop_on_collapse, watcher.collapsed = False, 19
    watcher.watch(1.5, entropy, mean_entropy, kl)
    assert f"warning: the output has collapsed to the {kind} solution" in capsys.readouterr().out
