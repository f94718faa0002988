"""Checkpoints from everywhere: ours, the authors', timm's; and those that are none."""

import argparse
import os
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models import resnet

import evaluate
import train
import vit
import visualize
from conftest import TINY, backbone_of
from evaluation.features import Crops
from head import DINOHead
from test_train import run
from util import checkpoint
from util.checkpoint import export, load_backbone
from util.shapes import Shapes
from vit import ViT

pytestmark = pytest.mark.usefixtures("several_blocks")

IMAGES = torch.randn(2, 3, 16, 16)


def authors_full_checkpoint(path):
    """Write what the authors' code writes.

    That is a Namespace of arguments, numpy scalars, and the student under DDP's prefix.
    """
    backbone = backbone_of("vit_micro", 8, 16)
    state = train.Network(backbone, DINOHead(64, 32, 16, 8)).state_dict()
    state["backbone.patch_embed.proj.weight"] = export(backbone)["patch_embed.proj.weight"]
    saved = {
        "student": {f"module.{key}": value for key, value in state.items()},
        "teacher": state | {"backbone.norm.bias": state["backbone.norm.bias"] + 1},
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.1), "step": np.int64(3)}]},
        "epoch": 7,
        "args": argparse.Namespace(arch="vit_micro", patch_size=8, lr=np.float64(5e-4)),
        "dino_loss": {"center": torch.zeros(1, 32)},
    }
    torch.save(saved, path)
    return backbone.eval()


def output(source, network="teacher"):
    """What a loaded backbone makes of IMAGES."""
    return load_backbone(source, network).backbone(IMAGES)


def test_the_authors_full_checkpoint_loads_everywhere(tmp_path, folder, capsys):
    path = tmp_path / "checkpoint.pth"
    backbone = authors_full_checkpoint(path)
    torch.testing.assert_close(output(path, "student"), backbone(IMAGES))
    torch.testing.assert_close(output(path), backbone(IMAGES) + 1)
    assert load_backbone(path).trained_with["patch_size"] == 8

    run(f"--init {path} --data {folder} --batch 12 --steps 1", tmp_path / "run")
    ours = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    torch.testing.assert_close(ours["teacher"]["backbone.norm.bias"], torch.ones(64))
    assert "before training" in capsys.readouterr().out
    here = ["--device", "cpu"]
    flags = ["knn", str(path), "--data", str(folder), "--workers", "0", *here]
    evaluate.main(evaluate.parse_args(flags))
    image = str(folder / "val" / "größe" / "0.png")
    visualize.main(visualize.parse_args([str(path), image, "--output", str(tmp_path), *here]))
    said = "ViT of width 64, 4 blocks, 4 heads, patch 8, for 16 pixels"
    assert capsys.readouterr().out.count(said) == 2
    assert (tmp_path / "0_attention.png").exists()
    with pytest.raises(ValueError, match="4 heads.*--arch and --patch say ViT of width 192"):
        run(f"--arch vit_tiny --patch 8 --warmup_epochs 0 --init {path}", tmp_path / "b")


def test_the_number_of_heads_is_saved_and_read_back(tmp_path, monkeypatch):
    """Of a width that the architectures' table has, with another number of heads."""
    wide = dict(embed_dim=192, depth=2, num_heads=12)
    monkeypatch.setitem(vit.ARCHITECTURES, "vit_micro", wide)
    run("--steps 1 --knn_every 0 --patch 8", tmp_path)
    saved = torch.load(tmp_path / "last.pth", weights_only=True)
    assert saved["num_heads"] == 12
    monkeypatch.undo()
    loaded = load_backbone(tmp_path / "last.pth")
    assert [block.attn.num_heads for block in loaded.backbone.blocks] == [12, 12]
    assert "12 heads" in loaded.description and "assumption" not in loaded.description
    with pytest.raises(ValueError, match="says 12 heads: leave --num_heads 5 out"):
        load_backbone(tmp_path / "last.pth", num_heads=5)
    with pytest.raises(ValueError, match="12 heads.*--arch and --patch say ViT.* 3 heads"):
        run(f"--arch vit_tiny --init {tmp_path / 'last.pth'}", tmp_path / "other")


def test_another_number_of_heads_than_the_files_is_refused(tmp_path):
    state = backbone_of("vit_micro", 8, 16).state_dict()
    torch.save({"teacher": state, "num_heads": 4}, tmp_path / "full.pth")
    assert load_backbone(tmp_path / "full.pth", num_heads=4).backbone.num_heads == 4
    with pytest.raises(ValueError, match="4 heads.*--num_heads 2"):
        load_backbone(tmp_path / "full.pth", num_heads=2)


@pytest.mark.parametrize(
    "dim, heads, assumed", [(384, 6, 6), (384, 12, 6), (160, 4, 2), (24, 2, 1)]
)
def test_for_a_foreign_file_the_number_of_heads_is_an_assumption_and_said(
    tmp_path, dim, heads, assumed
):
    torch.save(ViT(8, dim, 1, heads, 16).state_dict(), tmp_path / "bare.pth")
    loaded = load_backbone(tmp_path / "bare.pth")
    assert loaded.backbone.num_heads == assumed
    assert f"{assumed} heads, patch 8" in loaded.description
    assert "(the number of heads is an assumption: --num_heads sets it)" in loaded.description
    told = load_backbone(tmp_path / "bare.pth", num_heads=heads)
    assert told.backbone.num_heads == heads and "assumption" not in told.description


def test_checkpoints_of_other_formats_still_load_but_are_no_run_to_resume(tmp_path):
    run("--steps 1 --knn_every 0", tmp_path)
    saved = torch.load(tmp_path / "last.pth", weights_only=True)
    del saved["num_heads"]
    torch.save(saved | {"format": 2}, tmp_path / "old.pth")
    old, new = load_backbone(tmp_path / "old.pth"), load_backbone(tmp_path / "last.pth")
    assert "assumption" in old.description and "assumption" not in new.description
    assert torch.equal(old.backbone(IMAGES), new.backbone(IMAGES))
    os.replace(tmp_path / "old.pth", tmp_path / "last.pth")
    with pytest.raises(ValueError, match="no run to resume, or of another version: choose"):
        run("--steps 2 --knn_every 0", tmp_path)


def test_the_size_that_a_network_was_trained_at_is_saved_and_read_back(tmp_path):
    """That of the position embeddings, which --init interpolates: the outputs stay the same."""
    run("--steps 1 --knn_every 0", tmp_path / "small")
    first = tmp_path / "small" / "last.pth"
    flags = f"--steps 1 --knn_every 0 --init {first} --global_crops_size 32"
    run(flags, tmp_path / "large")
    loaded = load_backbone(tmp_path / "large" / "last.pth")
    small = load_backbone(first).backbone
    assert (loaded.backbone.img_size, small.img_size) == (32, 16)
    assert loaded.backbone.pos_embed.shape == (1, 17, 64) and small.pos_embed.shape == (1, 5, 64)
    assert "for 32 pixels" in loaded.description
    sizes = [Crops(Shapes(), [0], net.img_size)[0, 0][1].shape[1] for net in
             (loaded.backbone, small)]  # fmt: skip
    assert sizes == [32, 16]
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.backbone(images), small(images))


def test_weights_that_torch_compile_has_renamed_load(tmp_path):
    backbone = backbone_of("vit_micro", 8, 16).eval()
    compiled = {f"_orig_mod.{name}": value for name, value in backbone.state_dict().items()}
    torch.save(compiled, tmp_path / "bare.pth")
    network = {f"module._orig_mod.backbone.{name}": v for name, v in backbone.state_dict().items()}
    torch.save({"teacher": network}, tmp_path / "full.pth")
    for name in ("bare", "full"):
        assert torch.equal(output(tmp_path / f"{name}.pth"), backbone(IMAGES))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error_that_names_them(tmp_path, value):
    state = backbone_of("vit_micro", 8, 16).state_dict()
    state["blocks.1.mlp.fc1.weight"][3, 2] = value
    torch.save(state, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="blocks.1.mlp.fc1.weight holds values that are not"):
        load_backbone(tmp_path / "bare.pth")


def test_export_is_what_others_load_and_comes_back(tmp_path):
    authors_full_checkpoint(tmp_path / "c.pth")
    flags = ["export", str(tmp_path / "c.pth"), str(tmp_path / "bare.pth"), "--device", "cpu"]
    evaluate.main(evaluate.parse_args(flags))
    state = torch.load(tmp_path / "bare.pth", weights_only=True)
    assert state["patch_embed.proj.weight"].shape == (64, 3, 8, 8)
    assert not any(key.startswith(("backbone", "head")) for key in state)
    for wrapped in (state, {"state_dict": state}, {"model": state}):
        torch.save(wrapped, tmp_path / "again.pth")
        torch.testing.assert_close(output(tmp_path / "again.pth"), output(tmp_path / "c.pth"))


def test_released_names_are_downloaded_once(tmp_path, monkeypatch):
    server, hub = tmp_path / "server", tmp_path / "hub"
    (server / "dino_deitsmall8_pretrain").mkdir(parents=True)
    backbone = backbone_of("vit_tiny", 8, 16).eval()
    torch.save(export(backbone), server / checkpoint.RELEASED["dino_vits8"])
    monkeypatch.setattr(checkpoint, "RELEASED_AT", f"file://{server}/")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    torch.testing.assert_close(output("dino_vits8"), backbone(IMAGES))
    (server / checkpoint.RELEASED["dino_vits8"]).unlink()
    torch.testing.assert_close(output("dino_vits8"), backbone(IMAGES))  # from the cache
    with pytest.raises(ValueError, match=f"cannot load file://{server}/dino_vitbase8.*{hub}"):
        load_backbone("dino_vitb8")
    assert not list(hub.rglob("*vitbase8*"))


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_released_file_put_there_by_hand_and_cut_short_is_one_error(tmp_path, monkeypatch, size):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    authors_full_checkpoint(tmp_path / "whole.pth")
    name = checkpoint.RELEASED["dino_vits8"].split("/")[-1]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    part = (tmp_path / "whole.pth").read_bytes()[:size]
    (tmp_path / "hub" / "checkpoints" / name).write_bytes(part)
    with pytest.raises(ValueError, match=name):
        load_backbone("dino_vits8")


def test_resnet50_trains_evaluates_and_has_no_attention(tmp_path, folder, monkeypatch):
    """A shallow and narrow one stands in its place, which is quicker."""
    with torch.device("meta"):
        whole = checkpoint.resnet50()
    assert sum(p.numel() for p in whole.parameters()) / 1e6 == pytest.approx(23.5, abs=0.06)
    less = partial(resnet.ResNet, resnet.Bottleneck, [1, 1, 1, 1], width_per_group=8)
    monkeypatch.setattr(torchvision.models, "resnet50", less)
    flags = f"--arch resnet50 --data {folder} --steps 2 --warmup_epochs 0"
    args = train.parse_args([*TINY, *flags.split()])
    assert (args.optimizer, args.lr, args.weight_decay_end) == ("sgd", 0.03, 1e-4)
    assert (args.global_crops_scale, args.local_crops_scale) == ([0.14, 1.0], [0.05, 0.14])
    saved = run(flags, tmp_path / "run")
    assert saved["teacher"]["backbone.bn1.running_mean"].abs().sum() > 0
    last = tmp_path / "run" / "last.pth"
    backbone = load_backbone(last).backbone
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, 2048) and backbone.img_size == 16
    torch.save(export(backbone), tmp_path / "bare.pth")
    torch.testing.assert_close(output(tmp_path / "bare.pth"), backbone(IMAGES))
    flags = ["knn", str(last), "--device", "cpu", "--workers", "0"]
    evaluate.main(evaluate.parse_args(flags))
    with pytest.raises(ValueError, match="convnet has no attention"):
        flags = [str(tmp_path / "bare.pth"), "x.png", "--device", "cpu"]
        visualize.main(visualize.parse_args(flags))
    again = run(f"--arch resnet50 --init {last} --steps 1 --knn_every 0", tmp_path / "again")
    assert again["num_heads"] is saved["num_heads"] is None
    assert load_backbone(tmp_path / "again" / "last.pth").backbone.img_size == 16


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def wrong_checkpoints(path):
    """(name, what is in the file, what the error says)."""
    state = export(backbone_of("vit_micro", 8, 16))
    full = torch.load(path, weights_only=False)
    without = {key: value for key, value in state.items() if key != "blocks.1.norm2.bias"}
    return [
        ("code", full | {"args": Evil()}, "holds code"),
        ("missing", without, "blocks.1.norm2.bias"),
        ("unexpected", state | {"blocks.0.gamma": torch.zeros(1)}, "blocks.0.gamma"),
        ("misshapen", state | {"norm.weight": torch.zeros(3)}, "norm.weight"),
        ("other", {"weight": torch.zeros(1)}, "begin with weight"),
        ("plain", {"a": 1}, "no weights where a backbone"),
        ("tensor", torch.zeros(3), "holds a Tensor"),
        ("no teacher", {"student": full["student"]}, "has no teacher, only student"),
        ("flat", state | {"pos_embed": torch.zeros(())}, "not a DINO backbone"),
        ("heads", {"teacher": state, "num_heads": 5}, "not a DINO backbone.* must divide"),
        ("what", {"teacher": state, "num_heads": "four"}, "not a DINO backbone"),
    ]


@pytest.mark.parametrize("said", [{"args": None}, {"args": "vit"}])
def test_a_foreign_file_may_say_other_things_where_we_look(tmp_path, said):
    backbone = backbone_of("vit_micro", 8, 16).eval()
    torch.save({"model": backbone.state_dict()} | said, tmp_path / "a.pth")
    loaded = load_backbone(tmp_path / "a.pth")
    torch.testing.assert_close(loaded.backbone(IMAGES), backbone(IMAGES))
    assert loaded.trained_with == {}


def test_a_file_of_numbered_tensors_is_no_backbone(tmp_path):
    torch.save({0: torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth' has no weights where a backbone"):
        load_backbone(tmp_path / "a.pth")


def test_wrong_checkpoints_are_one_error_and_load_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    authors_full_checkpoint("good.pth")
    for name, content, message in wrong_checkpoints("good.pth"):
        torch.save(content, f"{name}.pth")
        with pytest.raises(ValueError, match=message) as error:
            load_backbone(f"{name}.pth")
        assert f"{name}.pth" in str(error.value) and "\n" not in str(error.value)
    whole = (tmp_path / "good.pth").read_bytes()
    for name, content in (("cut", whole[:5000]), ("empty", b""), ("text", b"no weights")):
        (tmp_path / f"{name}.pth").write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.pth' is not a readable checkpoint"):
            load_backbone(f"{name}.pth")
    with pytest.raises(ValueError, match="no checkpoint at 'none.pth'; released are dino_vits16, "):
        load_backbone("none.pth")
    assert not (tmp_path / "evil").exists()
