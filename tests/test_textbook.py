"""The whole against a textbook: the backbone in float64, and thirty steps of training."""

import math

import pytest
import torch

import textbook
import train
from augment import MultiCrop, photometry
from conftest import backbone_of, without_keys
from head import DINOHead
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


def textbook_step(student, teacher, center, optimizer, views, schedule):
    """Take a step of Algorithm 1 on state dicts of four heads and patch 8: (loss, the new centre).

    schedule: learning rate, weight decay and momentum.
    """
    lr, weight_decay, momentum = schedule
    big, small = views
    t = [textbook.network(teacher, view, 4, 8).detach() for view in big]
    s = [textbook.network(student, view, 4, 8) for view in [*big, *small]]
    loss = textbook.loss(s, t, center, 0.1, 0.04)
    optimizer.zero_grad()
    loss.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.sqrt(sum((p.grad**2).sum() for p in trained)).item()
    for p in trained:
        p.grad *= min(1, 3 / (norm + 1e-6))
    for group, decay in zip(optimizer.param_groups, (weight_decay, 0)):
        group.update(lr=lr, weight_decay=decay)
    optimizer.step()
    with torch.no_grad():
        for name in teacher:
            teacher[name] = momentum * teacher[name] + (1 - momentum) * student[name]
    return loss.item(), 0.9 * center + 0.1 * torch.cat(t).mean(0)


def textbook_adamw(student):
    trained = {name: p for name, p in student.items() if p.requires_grad}
    spared = [name for name in trained if name.endswith("bias") or "norm" in name]
    decayed = [name for name in trained if name not in spared]
    return torch.optim.AdamW(
        [
            {"params": [trained[name] for name in decayed]},
            {"params": [trained[name] for name in spared], "weight_decay": 0.0},
        ]
    )


def test_thirty_steps_are_a_textbook_dinos(tmp_path):
    """From the same weights and crops: the same losses and parameters.

    The textbook has naive attention, a loss over pairs, AdamW, and an average parameter by
    parameter.
    """
    steps, total, batch = 30, 12 * (10_000 // 4), 4
    flags = (
        "--warmup_epochs 0 --lr 0.01 --freeze_last_layer 0 --knn_every 0 "
        "--teacher_temp 0.04 --warmup_teacher_temp 0.04 --momentum_teacher 0.9"
    )
    end = run(f"{flags} --steps {steps}", tmp_path)
    args = arguments(flags, tmp_path)

    torch.manual_seed(args.seed)
    backbone = backbone_of("vit_micro", args.patch_size, args.global_crops_size)
    start = train.Network(backbone, DINOHead(backbone.embed_dim, 64, 32, 16)).state_dict()
    student, teacher = {}, {}
    for name, value in start.items():
        student[name] = value.clone().requires_grad_(not name.endswith("weight_g"))
        teacher[name] = value.clone()
    center, optimizer = torch.zeros(64), textbook_adamw(student)
    crops = MultiCropDataset(Shapes(), MultiCrop(*crop_settings(args)), args.seed)
    for step, keys in enumerate(BatchSampler(10_000, batch, seed=args.seed).batches(0, steps)):
        batches, _ = torch.utils.data.default_collate([crops[key] for key in keys])
        views = [photometry(*both) for both in batches]
        cosine = (1 + math.cos(math.pi * step / total)) / 2
        schedule = 1e-5 + (0.01 * batch / 256 - 1e-5) * cosine, 0.04, 1 - 0.1 * cosine
        loss, center = textbook_step(student, teacher, center, optimizer, views, schedule)
        assert loss == pytest.approx(log(tmp_path)[step]["loss"], abs=1e-4)

    torch.testing.assert_close(end["center"], center, rtol=0, atol=1e-4)
    moved = 0
    for name in start:
        assert_same(name, end["student"][name], student[name].detach())
        assert_same(name, end["teacher"][name], teacher[name])
        moved = max(moved, (end["student"][name] - start[name]).abs().max())
    assert moved > 1e-3


def assert_same(name, a, b):
    if name.endswith("qkv.bias"):
        a, b = without_keys(a), without_keys(b)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=lambda text: f"{name}: {text}")
