"""The whole against a textbook: the backbone in float64, and thirty steps of training."""

import pytest
import torch

import textbook
import train
from augment import MultiCrop, photometry
from conftest import backbone_of, without_keys
from test_train import arguments, log, run
from util.config import crop_settings
from util.data import BatchSampler, MultiCropDataset
from util.shapes import Shapes

pytestmark = pytest.mark.usefixtures("several_blocks")


@pytest.mark.parametrize("arch, heads", [("vit_tiny", 3), ("vit_small", 6), ("vit_base", 12)])
@pytest.mark.parametrize("patch", [16, 8])
def test_backbone_agrees_with_a_textbook_vit_in_float64(arch, heads, patch):
    # the full size once: the formulas are the same
    size = 224 if (arch, patch) == ("vit_tiny", 16) else 6 * patch
    backbone, images = backbone_of(arch, patch, size).eval(), torch.randn(1, 3, size, size)
    state = {name: value.double() for name, value in backbone.state_dict().items()}
    for inputs in (images, images[:, :, patch:]):
        tokens, attention = textbook.vit(state, inputs.double(), heads, patch)
        with torch.no_grad():
            for got, expected in (
                (backbone.get_intermediate_layers(inputs, 4), torch.stack(tokens[-4:])),
                (backbone.get_last_selfattention(inputs), attention),
            ):
                assert (got - expected).abs().max() / expected.abs().max() < 1e-5
            torch.testing.assert_close(
                backbone(inputs).double(), tokens[-1][:, 0], rtol=1e-5, atol=1e-5
            )


def textbook_optimizer(name, student):
    """Two groups, of which the second, biases and norms, has no weight decay."""
    trained = {name: p for name, p in student.items() if p.requires_grad}
    spared = [name for name in trained if name.endswith("bias") or "norm" in name]
    decayed = [name for name in trained if name not in spared]
    groups = [{"params": [trained[name] for name in names]} for names in (decayed, spared)]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0, momentum=0.9)
    return torch.optim.AdamW(groups)


def textbook_steps(student, teacher, views, optimizer, schedules):
    """Take Algorithm 1's steps on state dicts of four heads and patch 8: (the losses, the centre).

    views: each step's. schedules: four lists. The first ten steps are an epoch.
    """
    center, losses = torch.zeros(64), []
    last_layer = [p for name, p in student.items() if "last_layer" in name]
    for (big, small), *values in zip(views, *schedules):
        lr, weight_decay, momentum, teacher_temp = values
        t = [textbook.network(teacher, view, 4, 8).detach() for view in big]
        s = [textbook.network(student, view, 4, 8) for view in [*big, *small]]
        loss = textbook.loss(s, t, center, 0.1, teacher_temp)
        optimizer.zero_grad()
        loss.backward()
        for group, decay in zip(optimizer.param_groups, (weight_decay, 0)):
            group.update(lr=lr, weight_decay=decay)
        networks = student.values(), teacher.values()
        frozen = last_layer if len(losses) < 10 else []
        textbook.update(*networks, optimizer, 0.3, momentum, frozen)
        center = 0.9 * center + 0.1 * torch.cat(t).mean(0)
        losses.append(loss.item())
    return losses, center


@pytest.mark.parametrize(
    "optimizer, lr, norm_last_layer", [("adamw", 0.01, "true"), ("sgd", 3.0, "false")]
)
def test_thirty_steps_are_a_textbook_dinos(optimizer, lr, norm_last_layer, tmp_path, monkeypatch):
    """From the same weights and crops: the same losses, parameters and centre.

    Three epochs of ten steps, with all that the reference code does: gradients clipped each by
    itself, the last layer frozen for an epoch, two groups, four schedules, teacher and centre.
    """
    images = Shapes(length=40)
    monkeypatch.setattr(train, "load_splits", lambda path: (images, None))
    flags = (
        f"--optimizer {optimizer} --lr {lr} --norm_last_layer {norm_last_layer} --epochs 3 "
        "--warmup_epochs 1 --freeze_last_layer 1 --warmup_teacher_temp 0.03 --teacher_temp 0.04 "
        "--warmup_teacher_temp_epochs 2 --weight_decay_end 0.4 --momentum_teacher 0.9 "
        "--clip_grad 0.3 --knn_every 0"
    )
    end = run(flags, tmp_path)
    args = arguments(flags, tmp_path)

    networks, _ = train.build_networks(args, torch.device("cpu"), world=1)
    start = networks.state_dict()
    learned = norm_last_layer == "false"
    student, teacher = {}, {}
    for name, value in start.items():
        trained = learned or not name.endswith("weight_g")
        student[name] = value.clone().requires_grad_(trained)
        teacher[name] = value.clone()
    crops = MultiCropDataset(images, MultiCrop(*crop_settings(args)), args.seed)
    views = []
    for keys in BatchSampler(40, 4, seed=args.seed).batches(0, 30):
        batches, _ = torch.utils.data.default_collate([crops[key] for key in keys])
        views.append([photometry(*both) for both in batches])
    schedules = (
        textbook.cosine(lr * 4 / 256, 1e-5, 3, 10, 1),
        textbook.cosine(0.04, 0.4, 3, 10),
        textbook.cosine(0.9, 1, 3, 10),
        textbook.temperature(0.03, 0.04, 3, 10, 2),
    )
    losses, center = textbook_steps(
        student, teacher, views, textbook_optimizer(optimizer, student), schedules
    )

    lines = log(tmp_path)
    assert losses == pytest.approx([line["loss"] for line in lines], abs=1e-5)
    assert sum(line["grad_norm"] > 0.3 for line in lines) > 10
    torch.testing.assert_close(end["center"], center, rtol=0, atol=1e-5)
    for name in start:
        assert_same(name, end["student"][name], student[name].detach())
        assert_same(name, end["teacher"][name], teacher[name])
        if student[name].requires_grad:
            assert (end["student"][name] - start[name]).abs().max() > 1e-4, name


def assert_same(name, a, b):
    if name.endswith("qkv.bias"):
        a, b = without_keys(a), without_keys(b)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=lambda text: f"{name}: {text}")
