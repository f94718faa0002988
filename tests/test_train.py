"""The algorithm as a whole."""

import inspect
import json
import math
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate
from torchvision.transforms.functional import to_pil_image

import train
from augment import MultiCrop, photometry
from conftest import TINY, backbone_of, without_keys
from head import DINOHead
from evaluation.features import Extraction, attention_maps, features_of, keep_mass
from evaluation.video import Propagation, mix_labels
from util import config
from util.data import BatchSampler, MultiCropDataset
from util.run import Run, what_views_tell
from util.shapes import Shapes


def arguments(flags, output):
    return train.parse_args([*TINY, *flags.split(), "--output", str(output)])


def run(flags, output):
    """Train as the flags say, without the pictures at the end."""
    with mock.patch.object(train, "draw_run"):
        train.main(arguments(flags, output))
    return torch.load(output / "last.pth", weights_only=True)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def tiny_network():
    backbone = backbone_of("vit_micro", 8, 16)
    return train.Network(backbone, DINOHead(backbone.embed_dim, 8, 8, 4, norm_last_layer=False))


def test_weight_decay_spares_biases_and_norms():
    network = tiny_network()
    groups = train.build_optimizer("sgd", network).param_groups
    assert [group["decays"] for group in groups] == [True, False]
    decayed, spared = ({id(p) for p in group["params"]} for group in groups)
    for name, p in network.named_parameters():
        assert (id(p) in spared) == (name.endswith("bias") or "norm" in name)
        assert (id(p) in decayed) != (id(p) in spared)


def test_each_step_sets_the_rate_and_the_decay_of_each_group(tmp_path):
    end = run("--steps 2 --warmup_epochs 0 --weight_decay 0.3 --weight_decay_end 0.3", tmp_path)
    decayed, spared = end["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0)
    assert decayed["lr"] == spared["lr"] == log(tmp_path)[-1]["lr"] > 0


def test_network_puts_views_through_backbone_and_head():
    network = tiny_network()
    big, small = torch.randn(2, 3, 3, 16, 16), torch.randn(4, 3, 3, 8, 8)
    logits = network(big, small)
    assert logits.shape == (6, 3, 8)
    torch.testing.assert_close(logits[4, 1], network.head(network.backbone(small[2, 1:2]))[0])
    torch.testing.assert_close(network(big), logits[:2])


@pytest.mark.parametrize("momentum", [0, 0.75, 1])
def test_teacher_is_the_student_at_momentum_0_and_stays_at_1(tmp_path, momentum):
    """After the very step: an average taken before it would miss the step at 0."""
    flags = f"--steps 1 --knn_every 0 --momentum_teacher {momentum}"
    start = run(f"{flags} --warmup_epochs 1", tmp_path / "a")  # at step 0 the learning rate is 0
    end = run(f"{flags} --warmup_epochs 0 --lr 1 --freeze_last_layer 0", tmp_path / "b")
    for name, value in end["teacher"].items():
        before, after = start["teacher"][name], end["student"][name]
        mean = momentum * before + (1 - momentum) * after
        torch.testing.assert_close(value, mean, rtol=0, atol=1e-6 if momentum else 0)
        assert not torch.equal(after, before) or name.endswith("weight_g")
    assert end["center"].any()


def test_last_layer_is_frozen_at_first(tmp_path):
    start = run("--steps 1 --knn_every 0", tmp_path / "start")["student"]
    for epochs, moves in ((1, False), (0, True)):
        flags = f"--freeze_last_layer {epochs} --warmup_epochs 0 --lr 1 --steps 2 --knn_every 0"
        end = run(flags, tmp_path / str(epochs))["student"]
        name = "head.last_layer.weight_v"
        assert torch.equal(start[name], end[name]) != moves
        assert not torch.equal(start["head.mlp.0.weight"], end["head.mlp.0.weight"])


def test_the_run_cuts_its_crops_as_configured(tmp_path, monkeypatch):
    seen = {}

    class Recorder(train.MultiCrop):
        def __init__(self, *args, **names):
            super().__init__(*args, **names)
            seen.update(views=self.views, blur_sigma=self.blur_sigma)

    monkeypatch.setattr(train, "MultiCrop", Recorder)
    run("--steps 1 --knn_every 0 --blur_sigma 0.7", tmp_path)
    first, second = (16, [0.4, 1.0], 1.0, 0.0), (16, [0.4, 1.0], 0.1, 0.2)
    local = (8, train.parse_args([]).local_crops_scale, 0.5, 0.0)
    views = [(view.size, view.scale, view.blur, view.solarize) for view in seen["views"]]
    assert views == [first, second, local, local] and seen["blur_sigma"] == 0.7


def compare(one, two, tolerance):
    """Assert that two checkpoints agree."""
    assert one["step"] == two["step"]
    for part in ("student", "teacher"):
        for name, a in one[part].items():
            b = two[part][name]
            if name.endswith("attn.qkv.bias"):
                a, b = without_keys(a), without_keys(b)
            close = torch.testing.assert_close
            close(a, b, rtol=0, atol=tolerance, msg=lambda text: f"{part} {name}: {text}")
    torch.testing.assert_close(one["center"], two["center"], rtol=0, atol=tolerance)


STOPPED = """
import os, signal, torch, train
import torch.distributed as dist
from util.config import run_command
stop_signal, stopped, calls = train.Run.stop_signal, train.Run.stopped, []

def signalled(self):
    calls.append(self)
    if len(calls) == 4 and self.rank == 5:
        signal.raise_signal(signal.SIGTERM)
    return stop_signal(self)

def compared(self, step, number):
    for network in self.state["student"], self.state["teacher"]:
        for value in network.state_dict().values():
            first = value.clone()
            dist.broadcast(first, 0)
            assert torch.equal(value, first), self.rank
    return stopped(self, step, number)

train.Run.stop_signal, train.Run.stopped = signalled, compared
run_command(train.main, train.parse_args)
"""


def test_eight_processes_and_accumulation_give_what_one_process_gives(tmp_path):
    """The same global batch of 8: crops, losses, centre and parameters agree, in all processes.

    Every draw follows from the sample. SGD, since Adam turns what rounding leaves of a gradient
    near zero into a whole step. The eight end when one of them is told to, at its fourth step.
    """
    flags = "--warmup_epochs 0 --knn_every 0 --freeze_last_layer 0 --optimizer sgd --lr 3 --batch"
    one = run(f"{flags} 8 --steps 4", tmp_path / "one")
    accumulated = run(f"{flags} 4 --accumulate 2 --steps 4", tmp_path / "accumulated")
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=8", str(script)]
    command = [*launch, *TINY, *flags.split(), "1", "--output", str(tmp_path / "eight")]
    how = dict(env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    result = subprocess.run(command, **how, timeout=600)
    assert result.stdout.count("stopped by SIGTERM after step 4: ") == 1, result.stderr
    assert "AssertionError" not in result.stderr and result.returncode != 0
    compare(one, torch.load(tmp_path / "eight" / "last.pth", weights_only=True), 1e-5)
    compare(one, accumulated, 1e-5)
    logs = [log(tmp_path / name) for name in ("one", "eight", "accumulated")]
    for line, other, third in zip(*logs, strict=True):
        expected = other["loss"], other["grad_norm"]
        assert (line["loss"], line["grad_norm"]) == pytest.approx(expected, rel=1e-5)
        assert line["loss"] == pytest.approx(third["loss"], abs=1e-5)


def test_sgd_goes_on_when_the_last_layer_is_no_longer_frozen(folder, tmp_path):
    """Three steps are an epoch; the layer's momentum starts at the fourth."""
    flags = f"--data {folder} --optimizer sgd --lr 3 --warmup_epochs 0 --epochs 2 --knn_every 0"
    flags = f"{flags} --freeze_last_layer 1"
    ends = [run(f"{flags} --steps {steps}", tmp_path / "run") for steps in (1, 3, 4)]
    first, frozen, moved = (end["student"]["head.last_layer.weight_v"] for end in ends)
    assert torch.equal(first, frozen) and not torch.equal(frozen, moved)


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(tmp_path, several_blocks):
    flags = "--drop_path_rate 0.3 --knn_every 0"
    whole = run(f"--steps 6 {flags}", tmp_path / "whole")
    run(f"--steps 2 {flags}", tmp_path / "parts")
    parts = run(f"--steps 6 {flags}", tmp_path / "parts")
    compare(whole, parts, 0)
    assert whole["optimizer"]["state"][0]["step"] == parts["optimizer"]["state"][0]["step"] == 6
    assert log(tmp_path / "whole") == log(tmp_path / "parts") and len(log(tmp_path / "whole")) == 6
    without = run("--steps 6 --knn_every 0", tmp_path / "without")
    assert not torch.equal(whole["center"], without["center"])  # drop path had its effect


def test_a_term_beside_the_loss_is_not_taken_for_kl(tmp_path):
    """A variant of one line, where train() says that it belongs."""
    flags = "--steps 2 --knn_every 0"
    run(flags, tmp_path / "plain")
    source, place = inspect.getsource(train.train), "loss = cross_entropy  # a variant"
    assert place in source
    names = vars(train).copy()
    exec(source.replace(place, "loss = cross_entropy + 7  # a variant"), names)
    with mock.patch.object(train, "train", names["train"]):
        run(flags, tmp_path / "variant")
    for plain, variant in zip(log(tmp_path / "plain"), log(tmp_path / "variant"), strict=True):
        assert plain["loss"] == pytest.approx(plain["entropy"] + plain["kl"], abs=1e-5)
        assert variant["loss"] == pytest.approx(plain["loss"] + 7, abs=1e-5)
        assert variant["kl"] == pytest.approx(plain["kl"], abs=1e-5)


def test_each_gradient_is_clipped_by_itself():
    long, short, without = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    long.grad, short.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8])
    assert train.clip_gradients([long, short, without], 2) == pytest.approx(26**0.5)
    torch.testing.assert_close(long.grad, torch.tensor([1.2, 1.6]))
    assert torch.equal(short.grad, torch.tensor([0.6, 0.8]))
    assert train.clip_gradients([long, short, without], 0) == pytest.approx(5**0.5)
    torch.testing.assert_close(long.grad, torch.tensor([1.2, 1.6]))


def test_another_configuration_is_refused_by_name(tmp_path):
    run("--steps 1 --knn_every 0", tmp_path)
    with pytest.raises(ValueError, match=r"lr 0.\d+ -> 0.5.*--overwrite"):
        run("--steps 1 --knn_every 0 --lr 0.5", tmp_path)
    end = run("--steps 1 --knn_every 0 --lr 0.5 --overwrite", tmp_path)
    assert end["args"]["lr"] == 0.5


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_and_keeps_float32_weights(tmp_path, amp):
    flags = "--steps 2 --warmup_epochs 0 --knn_every 0"
    end = run(f"{flags} --amp {amp}", tmp_path)
    assert all(value.dtype == torch.float32 for value in end["student"].values())
    assert all(math.isfinite(line["loss"]) for line in log(tmp_path))
    assert (end["scaler"]["scale"] > 1) == (amp == "fp16")
    full = run(flags, tmp_path / "full")
    # other sums than in float32, but not far
    assert 0 < (end["center"] - full["center"]).abs().max() < 0.02


def test_overwriting_leaves_nothing_to_resume_from(tmp_path):
    run("--steps 1 --knn_every 0", tmp_path)
    (tmp_path / "epoch-0001.pth").write_bytes(b"old")
    sampler = BatchSampler(36, 4)
    args = arguments("--overwrite", tmp_path)
    anew = Run(args, Shapes(length=36), None, sampler, {}, torch.zeros(1), None)
    anew.resume()
    assert anew.first == 0 and not list(tmp_path.glob("*.pth"))


def test_the_end_of_a_run_says_what_came_of_it(tmp_path, capsys):
    train.main(arguments("--steps 1", tmp_path))
    lines = capsys.readouterr().out.splitlines()
    names = ["attention.png", "config.json", "curves.png", "emergence.png", "last.pth"]
    files = next(line for line in lines if ", curves.png, " in line).strip().split(", ")
    assert files == sorted(path.name for path in tmp_path.glob("[!.]*"))
    assert set(names) < set(files)
    assert lines[-4:] == [
        "next:",
        f"  python evaluate.py knn {tmp_path / 'last.pth'}",
        f"  python evaluate.py masks {tmp_path / 'last.pth'}",
        f"  python visualize.py {tmp_path / 'last.pth'} img.jpg",
    ]


def test_without_local_crops(tmp_path):
    run("--steps 2 --local_crops_number 0 --warmup_epochs 0 --knn_every 0", tmp_path)
    assert all(0 < line["loss"] < 20 for line in log(tmp_path))


def test_a_few_bad_images_are_left_out_and_of_more_all_are_named_at_once(folder, tmp_path, capsys):
    paths = sorted((folder / "train").rglob("*.png"))
    for path in paths[:3]:
        path.write_bytes(b"no image")
    assert run(f"--data {folder / 'train'} --epochs 2", tmp_path / "out")["step"] == 6
    assert "3 images could not be read" in capsys.readouterr().out
    for path in paths[3:]:
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"{len(paths)} of 12 images cannot be read"):
        run(f"--data {folder / 'train'} --steps 3 --knn_every 0", tmp_path / "again")
    named = capsys.readouterr().err
    assert all(named.count(f"cannot read {str(path)!r}") == 1 for path in paths)


def test_without_labels_the_end_of_a_run_names_search_and_says_what_views_tell(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(5):
        to_pil_image(Shapes()[i]).save(tmp_path / "images" / f"{i}.png")
    train.main(arguments(f"--data {tmp_path / 'images'} --epochs 2", tmp_path / "my run"))
    *_, told, head, search, copies, look = capsys.readouterr().out.splitlines()
    last = f"'{tmp_path / 'my run' / 'last.pth'}'"
    assert head == "next:" and look == f"  python visualize.py {last} img.jpg"
    assert search == f"  python evaluate.py search {last} img.jpg"
    assert copies == f"  python evaluate.py copies {last}"
    first, end = log(tmp_path / "my run")
    mean, each = ((first[name] + end[name]) / 2 for name in ("mean_entropy", "entropy"))
    known = mean - each - (first["kl"] + end["kl"]) / 2
    assert f"the student knows {max(0, known):.2f} nats from another view" in told
    assert f"of the {mean - each:.2f} by which the teacher's answers tell images apart" in told
    assert told.endswith(f"(entropy {each:.2f} each, {mean:.2f} of their mean)")
    lines = [dict(mean_entropy=5.0, entropy=2.0, kl=kl) for kl in (4.0, *[0.5] * 10)]
    well = "what was learned: the student knows 2.50 nats from another view (at the start 0.00)"
    assert what_views_tell(lines).startswith(well)
    assert "almost nothing" in what_views_tell(lines[:1])


class Calls(TorchDispatchMode):
    """Notes the names of torch's operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Reads(Calls):
    """Of these, what reads a device's value on the host, as .item(), a branch or a mask does."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal.default", "unique")

    @property
    def found(self):
        return [name for name in self.names if any(read in name for read in self.READS)]


def steps_on(batch, counted, monkeypatch):
    """Let train() take steps on one prepared batch: a list of how long counted() is at each."""
    before = []

    def same_batch(*args):
        while True:
            before.append(len(counted()))
            yield [(views, None) for views in batch]

    monkeypatch.setattr(train, "view_loader", same_batch)
    monkeypatch.setattr(train, "photometry", lambda crops, drawn: crops)
    monkeypatch.setattr(train, "watch_attention", lambda run, step: None)
    return before


def test_the_laptops_step_makes_no_more_calls_than_it_did(tmp_path, monkeypatch):
    """A small network waits for calls, not for arithmetic."""
    args = train.parse_args(["--device", "cpu"])
    dataset = MultiCropDataset(Shapes(), MultiCrop(*config.crop_settings(args)))
    keys = next(BatchSampler(len(dataset.images), args.batch_size_per_gpu).batches(0, 1))
    with Calls() as painting:
        for _, index in keys:
            dataset.images[index]
    assert len(painting.names) < 5 * len(keys)
    with Calls() as sampling:
        batch, _ = default_collate([dataset[key] for key in keys])
    with Calls() as coloring:
        views = [photometry(crops, drawn) for crops, drawn in batch]
    with Calls() as calls:
        before = steps_on(views, lambda: calls.names, monkeypatch)
        args.output_dir, args.steps, args.knn_every, args.log_every = tmp_path, 4, 0, 100
        with mock.patch.object(train, "draw_run"):
            train.main(args)
    step = before[3] - before[2]
    assert len(sampling.names) <= 600 and len(coloring.names) <= 320 and step <= 560


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("flags", ["", "--accumulate 2", "--centering sinkhorn --optimizer sgd"])
def test_a_step_reads_nothing_back_from_the_device(amp, flags, tmp_path, monkeypatch):
    """But for the first and the last, which are logged; the views are there from the start."""
    views = torch.randn(2, 4, 3, 16, 16), torch.randn(2, 4, 3, 8, 8)
    with Reads() as reads:
        before = steps_on(views, lambda: reads.found, monkeypatch)
        run(f"{flags} --amp {amp} --steps 5 --log_every 100 --knn_every 0", tmp_path)
    lines = log(tmp_path)
    assert [line["step"] for line in lines] == [1, 5] and lines[-1]["grad_norm"] > 0
    first, *others = before[:: len(before) // 5]  # at the start of each of five steps
    assert len(others) == 4 and first < others[0]  # step 1 ends with a line of the log
    assert others[0] == before[-1] < len(reads.found), reads.found


class Waits(Calls):
    """Of these, what takes tensors of two devices or copies between them, and is not non_blocking.

    There the host waits.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        devices = {x.device for x in tensors if x.ndim}  # a number may lie on the host
        if len(devices) > 1 and not kwargs.get("non_blocking"):
            self.names.append(str(function))
        return out


@pytest.mark.parametrize("flags", ["--amp bf16", "--amp off --accumulate 2 --centering sinkhorn"])
def test_a_step_stays_on_a_gpu_that_is_not_waited_for(flags, tmp_path, monkeypatch, several_blocks):
    """The GPU is torch's imitation, which knows shapes and devices, no values and no backward."""
    gpu, waits, images = torch.device("cuda:0"), Waits(), Shapes(length=36)
    args = arguments(f"{flags} --steps 3 --drop_path_rate 0.3 --recompute", tmp_path)
    dataset = MultiCropDataset(images, MultiCrop(*config.crop_settings(args)))
    views, _ = default_collate([dataset[0, i] for i in range(args.batch_size_per_gpu)])
    views = [(crops, mock.Mock(**{"numpy.return_value": d.numpy()})) for crops, d in views]
    networks = train.build_networks(args, torch.device("cpu"), world=1)

    def same_batch(*args):
        waits.names.clear()  # what comes before the first step may wait
        while True:
            yield views

    def backward(loss):
        assert loss.device == gpu
        for p in networks[0].parameters():
            p.grad = torch.empty_like(p)

    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(train, "load_splits", lambda path: (images, None))
    monkeypatch.setattr(train, "build_networks", lambda *args: [n.to(gpu) for n in networks])
    monkeypatch.setattr(train, "view_loader", same_batch)
    for place, name in (Run, "log_step"), (Run, "save"), (train, "log_knn"), (train, "draw_run"):
        monkeypatch.setattr(place, name, mock.Mock())
    monkeypatch.setattr(train, "watch_attention", mock.Mock())
    with FakeTensorMode(allow_non_fake_inputs=True), waits:
        train.train(args, gpu, rank=0, world=1)
    assert not waits.names


def test_features_are_made_on_the_gpu_that_has_the_network():
    """As above."""
    gpu, backbone = torch.device("cuda:0"), backbone_of("vit_mini", 8, 32).eval()
    crops = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone.to(gpu)
        for kind in {}, dict(n_last_blocks=4, avgpool_patchtokens=True, gem=True, scales=(1, 0.5)):
            assert features_of(backbone, crops, Extraction(gpu, **kind)).device == gpu
        images, query = (torch.empty(shape, device=gpu) for shape in ((2, 3, 32, 32), (4, 4, 8)))
        assert keep_mass(attention_maps(backbone, images)).device == gpu
        assert mix_labels(query, query[None], query[None], Propagation()).device == gpu
