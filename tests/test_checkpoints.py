"""Checkpoints from everywhere: ours, the authors', timm's; and those that are none."""

import argparse
import os

import numpy as np
import pytest
import torch
from conftest import TINY

import evaluate
import train
import visualize
import vit
from head import DINOHead
from vit import build_backbone, export, load_backbone

pytestmark = pytest.mark.usefixtures("several_blocks")

IMAGES = torch.randn(2, 3, 16, 16)


def authors_full_checkpoint(path, **more):
    """As the authors' code writes it: a Namespace of arguments, numpy scalars, the student under DDP's prefix."""
    backbone = build_backbone("vit_micro", 8, 16)
    state = train.Network(backbone, DINOHead(64, 32, 16, 8)).state_dict()
    state["backbone.patch_embed.proj.weight"] = export(backbone)["patch_embed.proj.weight"]
    checkpoint = {
        "student": {f"module.{key}": value for key, value in state.items()},
        "teacher": {key: value + 1 if key == "backbone.norm.bias" else value for key, value in state.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.1), "step": np.int64(3)}]},
        "epoch": 7,
        "args": argparse.Namespace(arch="vit_micro", patch_size=8, lr=np.float64(5e-4)),
        "dino_loss": {"center": torch.zeros(1, 32)},
    }
    torch.save(checkpoint | more, path)
    return backbone.eval()


def test_the_authors_full_checkpoint_loads_everywhere(tmp_path, folder, capsys):
    path = tmp_path / "checkpoint.pth"
    backbone = authors_full_checkpoint(path)
    student, args = load_backbone(path, "student")
    torch.testing.assert_close(student(IMAGES), backbone(IMAGES))
    torch.testing.assert_close(load_backbone(path)[0](IMAGES), backbone(IMAGES) + 1)
    assert args["patch_size"] == 8

    train.main(train.parse_args([*TINY, "--init", str(path), "--data", str(folder), "--steps", "1", "--output", str(tmp_path / "run")]))
    ours = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    torch.testing.assert_close(ours["teacher"]["backbone.norm.bias"], torch.ones(64))
    assert "before training" in capsys.readouterr().out
    evaluate.main(evaluate.parse_args(["knn", str(path), "--data", str(folder), "--device", "cpu", "--workers", "0"]))
    visualize.main(visualize.parse_args([str(path), str(folder / "val" / "größe" / "0.png"), "--output", str(tmp_path), "--device", "cpu"]))
    assert "ViT of width 64, 4 blocks, 4 heads, patch 8, trained at 16 pixels" in capsys.readouterr().out and (tmp_path / "0_attention.png").exists()
    with pytest.raises(ValueError, match="--arch vit_tiny --patch 8 must say so"):
        train.main(train.parse_args([*TINY, "--arch", "vit_tiny", "--patch", "8", "--warmup_epochs", "0", "--init", str(path), "--output", str(tmp_path / "b")]))


def test_export_is_what_others_load_and_comes_back(tmp_path):
    authors_full_checkpoint(tmp_path / "c.pth")
    vit.main(vit.parse_args([str(tmp_path / "c.pth"), str(tmp_path / "bare.pth")]))
    state = torch.load(tmp_path / "bare.pth", weights_only=True)
    assert state["patch_embed.proj.weight"].shape == (64, 3, 8, 8) and not any(key.startswith(("backbone", "head")) for key in state)
    for wrapped in (state, {"state_dict": state}, {"model": state}):
        torch.save(wrapped, tmp_path / "again.pth")
        torch.testing.assert_close(load_backbone(tmp_path / "again.pth")[0](IMAGES), load_backbone(tmp_path / "c.pth")[0](IMAGES))


def test_released_names_are_downloaded_once(tmp_path, monkeypatch):
    server, hub = tmp_path / "server", tmp_path / "hub"
    (server / "dino_deitsmall8_pretrain").mkdir(parents=True)
    backbone = build_backbone("vit_tiny", 8, 16).eval()
    torch.save(export(backbone), server / vit.RELEASED["dino_vits8"])
    monkeypatch.setattr(vit, "RELEASED_AT", f"file://{server}/")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    torch.testing.assert_close(load_backbone("dino_vits8")[0](IMAGES), backbone(IMAGES))
    (server / vit.RELEASED["dino_vits8"]).unlink()
    torch.testing.assert_close(load_backbone("dino_vits8")[0](IMAGES), backbone(IMAGES))  # from the cache
    with pytest.raises(ValueError, match=f"cannot download file://{server}/dino_vitbase8.*{hub}"):
        load_backbone("dino_vitb8")
    assert not list(hub.rglob("*vitbase8*"))


def test_resnet50_trains_evaluates_and_has_no_attention(tmp_path, folder):
    flags = ["--arch", "resnet50", "--data", str(folder), "--steps", "2", "--warmup_epochs", "0", "--output", str(tmp_path / "run")]
    args = train.parse_args([*TINY, *flags])
    assert (args.optimizer, args.lr, args.weight_decay_end, args.global_scale, args.local_scale) == ("sgd", 0.03, 1e-4, [0.14, 1.0], [0.05, 0.14])
    train.main(args)
    checkpoint = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert checkpoint["teacher"]["backbone.bn1.running_mean"].abs().sum() > 0
    backbone, _ = load_backbone(tmp_path / "run" / "last.pth")
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, 2048) and backbone.image_size == 16
    torch.save(export(backbone), tmp_path / "bare.pth")
    torch.testing.assert_close(load_backbone(tmp_path / "bare.pth")[0](IMAGES), backbone(IMAGES))
    evaluate.main(evaluate.parse_args(["knn", str(tmp_path / "run" / "last.pth"), "--device", "cpu", "--workers", "0"]))
    with pytest.raises(ValueError, match="convnet has no attention"):
        visualize.main(visualize.parse_args([str(tmp_path / "bare.pth"), "x.png", "--device", "cpu"]))


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def wrong_checkpoints(path):
    """(name, what is in the file, what the error says)."""
    state = export(build_backbone("vit_micro", 8, 16))
    full = torch.load(path, weights_only=False)
    return [
        ("code", full | {"args": Evil()}, "holds code"),
        ("missing", {key: value for key, value in state.items() if key != "blocks.1.norm2.bias"}, "blocks.1.norm2.bias"),
        ("unexpected", state | {"blocks.0.gamma": torch.zeros(1)}, "blocks.0.gamma"),
        ("misshapen", state | {"norm.weight": torch.zeros(3)}, "norm.weight"),
        ("other", {"weight": torch.zeros(1)}, "begin with weight"),
        ("plain", {"a": 1}, "no weights.*a"),
        ("tensor", torch.zeros(3), "holds a Tensor"),
        ("no teacher", {"student": full["student"]}, "has no teacher, only student"),
        ("flat", state | {"pos_embed": torch.zeros(())}, "not a DINO backbone"),
    ]


def test_wrong_checkpoints_are_one_error_and_load_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    authors_full_checkpoint("good.pth")
    for name, content, message in wrong_checkpoints("good.pth"):
        torch.save(content, f"{name}.pth")
        with pytest.raises(ValueError, match=message) as error:
            load_backbone(f"{name}.pth")
        assert f"{name}.pth" in str(error.value) and "\n" not in str(error.value)
    for name, content in (("cut", (tmp_path / "good.pth").read_bytes()[:5000]), ("empty", b""), ("text", b"no weights")):
        (tmp_path / f"{name}.pth").write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.pth' is not a readable checkpoint"):
            load_backbone(f"{name}.pth")
    with pytest.raises(ValueError, match="no checkpoint at 'none.pth'"):
        load_backbone("none.pth")
    assert not (tmp_path / "evil").exists()
