"""Weights of others: each name, prefix and layer that loads, and what does not load at all.

Files are made from networks of ours by renaming, and the outputs compared with ours.
"""

import argparse
import datetime
import json
import random
import re
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import command_here
from evaluation.features import Extraction, extract_features
from util.checkpoint import export, load_backbone, resnet50
from util.data import Folder
from util.safetensors import DTYPES
from vit import PatchEmbed, ViT

IMAGES = torch.randn(2, 3, 16, 16)
DEPTH, HEADS = 3, 4


def network():
    """A small ViT in which no weight is 0, 1 or another's."""
    vit = ViT(8, 64, DEPTH, HEADS, 16).eval()
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return vit


@torch.no_grad()
def outputs(vit):
    """The class token, all tokens of all blocks, the attention."""
    tokens = vit.get_intermediate_layers(IMAGES, DEPTH)
    return vit(IMAGES), tokens, vit.get_last_selfattention(IMAGES)


# ---- what loads ----

HUGGING_FACE = {
    r"^blocks": "encoder.layer",
    r"^norm": "layernorm",
    r"\.norm1": ".layernorm_before",
    r"\.norm2": ".layernorm_after",
    r"attn\.proj": "attention.output.dense",
    r"attn\.(query|key|value)": r"attention.attention.\1",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
    r"^cls_token": "embeddings.cls_token",
    r"^pos_embed": "embeddings.position_embeddings",
    r"^patch_embed\.proj": "embeddings.patch_embeddings.projection",
}
OF_LATE = {  # as Hugging Face's have them in memory
    r"^blocks": "layers",
    r"attn\.(q|k|v)[a-z]+": r"attention.\1_proj",
    r"attn\.proj": "attention.o_proj",
    r"mlp": "mlp",
}
DINOV2 = {
    r"\.norm": ".norm",
    r"mlp": "mlp",
    r"ls(\d)\.gamma": r"layer_scale\1.lambda1",
}
TORCHVISION = {
    r"^blocks\.": "encoder.layers.encoder_layer_",
    r"^norm": "encoder.ln",
    r"\.norm(\d)": r".ln_\1",
    r"attn\.qkv\.": "self_attention.in_proj_",
    r"attn\.proj": "self_attention.out_proj",
    r"mlp\.fc1": "mlp.0",
    r"mlp\.fc2": "mlp.3",
    r"^cls": "class",
    r"^pos_embed": "encoder.pos_embedding",
    r"^patch_embed\.proj": "conv_proj",
}
BEFORE = {r"mlp\.fc": "mlp.linear_"}
MMSELFSUP = {
    r"^blocks": "layers",
    r"norm(\d)": r"ln\1",
    r"^norm": "ln1",
    r"mlp\.fc1": "ffn.layers.0.0",
    r"mlp\.fc2": "ffn.layers.1",
    r"embed\.proj": "embed.projection",
}
CHUNKS = {r"^blocks\.2": "blocks.1.2", r"^blocks\.(0|1)\.(?!2)": r"blocks.0.\1."}

ROWS = {  # of whom: (names, prefix, the student's prefix, what else is there, what is said of it)
    "Hugging Face": (HUGGING_FACE, "", None, "pooler.dense.weight", "pooler"),
    "Hugging Face, named": (HUGGING_FACE, "vit.", None, "classifier.bias", "classifier"),
    "Hugging Face, model": (HUGGING_FACE, "model.", None, "", ""),
    "Hugging Face, of late": (OF_LATE | HUGGING_FACE, "", None, "", ""),
    "Hugging Face, DINOv2": (DINOV2 | HUGGING_FACE, "dinov2.", None, "classifier.bias mask_token",
                             "classifier, mask_token"),
    "DINOv2": ({}, "", None, "mask_token", "mask_token"),
    "DINOv2, a run's": (CHUNKS, "teacher.backbone.", None, "teacher.dino_head.mlp.0.bias",
                        "dino_head"),
    "torchvision": (TORCHVISION, "", None, "heads.head.weight heads.head.bias", "heads"),
    "torchvision, before": (BEFORE | TORCHVISION, "", None, "", ""),
    "timm, DeiT": ({}, "", None, "head.weight head.bias", "head"),
    "solo-learn": ({}, "momentum_backbone.", "backbone.", "momentum_head.last_layer.weight "
                   "classifier.weight dino_loss_func.center", "head, student"),
    "lightly": ({}, "teacher_backbone.vit.", "student_backbone.vit.", "teacher_backbone.mask_token "
                "teacher_head.layers.0.weight criterion.center", "head, mask_token, student"),
    "Lightning": ({}, "model.backbone.", None, "model.projector.0.weight", "projector"),
    "MMSelfSup": (MMSELFSUP, "backbone.", None, "neck.fc0.weight head.predictor.bias",
                  "head, neck"),
    "MoCo v3": ({}, "module.momentum_encoder.", "module.base_encoder.", "module.predictor.0.weight "
                "module.momentum_encoder.head.0.weight", "head, student"),
    "compiled": ({r"^blocks\.(\d)": r"blocks.\1._orig_mod"}, "_orig_mod.module.", None, "", ""),
}  # fmt: skip


def renamed(state, names, prefix):
    """Split and rename a state dict of ours."""
    out = {}
    for key, value in state.items():
        parts = {key: value}
        if r"attn\.(query|key|value)" in names and ".qkv." in key:
            kinds = ("query", "key", "value")
            parts = {key.replace("qkv", kind): x for kind, x in zip(kinds, value.chunk(3))}
        for name, part in parts.items():
            for pattern, replacement in names.items():
                name = re.sub(pattern, replacement, name)
            out[prefix + name] = part
    return out


def file_of(row, teacher, student):
    """The weights that are in the file of a row, {name: tensor}, in a random order."""
    names, prefix, students_prefix, beside, _ = ROWS[row]
    content = renamed(teacher, names, prefix) | {key: torch.ones(1) for key in beside.split()}
    if students_prefix:
        content |= renamed(student, names, students_prefix)
    return dict(random.Random(row).sample(list(content.items()), len(content)))


def with_layer_scale(row, vit):
    """Return a network's state dict; in DINOv2's rows with LayerScale, which the network gains."""
    state = export(vit)
    for i, block in enumerate(vit.blocks if "DINOv2" in row else []):
        for name, layer in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
            gamma = state[f"blocks.{i}.{name}.gamma"] = torch.rand(64)
            layer.register_forward_hook(lambda layer, x, y, gamma=gamma: y * gamma)
    return state


def same(vit, expected, tolerance=1e-6):
    for got, wanted in zip(outputs(vit), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("row", ROWS)
def test_what_others_have_loads_as_it_is(row, tmp_path):
    """Bare, or in what different programs wrap around it."""
    teacher, student = network(), network()
    content = file_of(row, with_layer_scale(row, teacher), with_layer_scale(row, student))
    inner = {"state_dict": content, "epoch": 3}
    for wrapped in (content, inner, {"model": content}, {"model": inner}):
        torch.save(wrapped, tmp_path / "a.pth")
        loaded = load_backbone(tmp_path / "a.pth", num_heads=HEADS)
        same(loaded.backbone, outputs(teacher), 1e-5 if "DINOv2" in row else 1e-6)
    _, prefix, students_prefix, _, left_out = ROWS[row]
    which = "teacher" if re.search("teacher|momentum", prefix) else "backbone"
    note = f" (left out: {left_out})" if left_out else ""
    said = "ViT of width 64, 3 blocks, 4 heads, patch 8, for 16 pixels"
    assert loaded.description == f"{tmp_path / 'a.pth'}: {which}, {said}{note}"
    if students_prefix:
        loaded = load_backbone(tmp_path / "a.pth", "student", HEADS)
        same(loaded.backbone, outputs(student))
        assert ": student, ViT" in loaded.description and "teacher)" in loaded.description
    elif which == "teacher":
        with pytest.raises(ValueError, match="has no student, only"):
            load_backbone(tmp_path / "a.pth", "student")


@pytest.mark.parametrize("row", ROWS)
def test_a_key_too_few_or_too_many_is_named_and_nothing_loads(row, tmp_path):
    state, student = with_layer_scale(row, network()), export(network())
    drawn = random.Random(row).sample(sorted(state), 6)
    for key in [*drawn, "cls_token", "blocks.1.attn.qkv.bias"]:
        less = {name: value for name, value in state.items() if name != key}
        torch.save(file_of(row, less, student), tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"a\.pth'") as error:
            load_backbone(tmp_path / "a.pth", num_heads=HEADS)
        named = key, key.replace("qkv", "q"), key.replace("cls_", "class ")
        assert any(name in str(error.value) for name in named), (key, error.value)
    for key in ("blocks.1.attn.scale", "extra.weight", "blocks.2.ls3.gamma"):
        torch.save(file_of(row, state | {key: torch.ones(64)}, student), tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"a\.pth'.*(scale|extra|ls3)"):
            load_backbone(tmp_path / "a.pth", num_heads=HEADS)


@pytest.mark.parametrize("scaled", [False, True])
def test_timms_own_networks_load(scaled, tmp_path):
    timm = pytest.importorskip("timm")
    options = {"init_values": 0.1} if scaled else {}
    theirs = timm.models.vision_transformer.VisionTransformer(
        16, 8, embed_dim=64, depth=DEPTH, num_heads=HEADS, num_classes=5, **options
    ).eval()
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    vit = load_backbone(tmp_path / "a.pth", num_heads=HEADS).backbone
    with torch.no_grad():
        torch.testing.assert_close(outputs(vit)[1][-1], theirs.forward_features(IMAGES))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_precision_loads_as_float32(dtype, tmp_path):
    state = {key: value.to(dtype) for key, value in export(network()).items()}
    torch.save(state, tmp_path / "a.pth")
    random_state = torch.get_rng_state()
    loaded = export(load_backbone(tmp_path / "a.pth", num_heads=HEADS).backbone)
    for key, value in state.items():
        assert torch.equal(loaded[key], value.float()) and loaded[key].dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), random_state)  # no weights are drawn first


def test_a_classifier_on_a_resnet_is_left_out(tmp_path):
    theirs = resnet50().state_dict() | {"fc.weight": torch.zeros(10, 2048)}
    torch.save(theirs, tmp_path / "a.pth")
    loaded = load_backbone(tmp_path / "a.pth")
    assert loaded.description.endswith(": backbone, ResNet-50, for 224 pixels (left out: fc)")
    assert all(torch.equal(value, theirs[key]) for key, value in export(loaded.backbone).items())


# ---- what does not ----

NEW = {  # what more there is in a file: what the error says that it is
    "rope_embed.periods": "DINOv3",
    "storage_tokens": "DINOv3",
    "register_tokens": "a ViT with registers",
    "embeddings.register_tokens": "a ViT with registers",
    "reg_token": "a ViT with registers",
    "blocks.0.mlp.w12.weight": "a ViT with SwiGLU",
    "encoder.layer.0.mlp.weights_in.bias": "a ViT with SwiGLU",
    "dist_token": "a distilled DeiT",
    "embeddings.distillation_token": "a distilled DeiT",
    "decoder_embed.weight": "an MAE",
    "model.decoder.decoder_norm.bias": "an MAE",
    "visual.conv1.weight": "a CLIP",
    "vision_model.embeddings.class_embedding": "a CLIP",
    "norm_pre.weight": "a CLIP",
    "ln_pre.bias": "a CLIP",
    "fc_norm.weight": "a ViT that pools patch tokens, with fc_norm",
}


@pytest.mark.parametrize("key", NEW)
def test_another_architecture_is_named(key, tmp_path):
    torch.save(export(network()) | {key: torch.ones(64)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth' is {NEW[key]}.*: another architecture"):
        load_backbone(tmp_path / "a.pth")


@pytest.mark.parametrize("less, more, kind", [
    ("cls_token", "", "a ViT without a class token (I-JEPA)"),
    ("pos_embed", "reg_token", "DINOv3"),
    ("", "target_encoder", "a ViT without a class token (I-JEPA)"),
])  # fmt: skip
def test_another_architecture_is_named_by_what_it_lacks(less, more, kind, tmp_path):
    state = {key: value for key, value in export(network()).items() if key != less}
    torch.save(state | ({more: {}} if more else {}), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth' is {re.escape(kind)}: another architecture"):
        load_backbone(tmp_path / "a.pth")


def changed(key, value):
    return export(network()) | {key: value}


QUERY = {f"blocks.0.attn.{kind}.weight": torch.ones(size, 64) for kind, size in
         (("query", 32), ("key", 64), ("value", 96))}  # fmt: skip
WRONG = {  # what the error says: what is in the file
    "float8": changed("norm.bias", torch.zeros(64).to(torch.float8_e4m3fn)),
    "complex": changed("norm.bias", torch.zeros(64, dtype=torch.complex64)),
    "meta": changed("norm.bias", torch.zeros(64, device="meta")),
    "sparse": changed("norm.bias", torch.zeros(64).to_sparse()),
    **{
        re.escape(f"{[64, *shape]} in place of [d, 3, p, p]"):
        changed("patch_embed.proj.weight", torch.ones(64, *shape))
        for shape in ((12, 4, 4), (3, 4, 16), (1, 8, 8), (3, 2, 8, 8), (3, 0, 0), (256,))
    },
    "no positions": changed("pos_embed", torch.ones(1, 1, 64)),
    "no blocks": {k: v for k, v in export(network()).items() if "block" not in k},
    "norm.bias twice": changed("vit.norm.bias", torch.ones(64)),
    "blocks.70000000.norm1": changed("blocks.70000000.norm1.bias", torch.ones(64)),
    "mlp.fc1.bias": changed("blocks.0.mlp.fc1.bias", torch.ones(256, dtype=torch.int8)),
    "equal size": {k: v for k, v in (export(network()) | QUERY).items() if "qkv" not in k},
    "expanded size": with_layer_scale("DINOv2", network()) | {"blocks.1.ls1.gamma": torch.ones(3)},
    "no weights where": changed("norm.\nbias", torch.ones(64)),
    "no backbone, only head": {"head.weight": torch.ones(3)},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_one_error(message, tmp_path):
    torch.save(WRONG[message], tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"a\.pth'.*{message}") as error:
        load_backbone(tmp_path / "a.pth", num_heads=HEADS)
    assert len(str(error.value).splitlines()) == 1
    if message in ("float8", "complex", "meta", "sparse"):
        assert "norm.bias" in str(error.value)


def write_zip(path, *names):
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "2\n")


def test_files_that_are_no_weights_are_told_by_their_first_bytes(tmp_path, recwarn):
    path = tmp_path / "a.pth"
    for start, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html>", "a web page"),
        (b"<html><body>404</body></html>", "a web page"),
        (b'{"abcd":{"a": 1}}', "cut short or of another kind"),
    ):
        path.write_bytes(start)
        with pytest.raises(ValueError, match=f"is not a readable checkpoint: .*{message}"):
            load_backbone(path)
    write_zip(path, "word/document.xml")
    with pytest.raises(ValueError, match="is not a readable checkpoint: another tool's zip"):
        load_backbone(path)
    write_zip(path, "a/version", "a/data.pkl", "a/constants.pkl")  # TorchScript's
    with pytest.raises(ValueError, match="holds code, which is never loaded"):
        load_backbone(path)
    assert not recwarn.list


# ---- arguments ----

OBJECTS = {
    "path": Path("a"),
    "device": torch.device("cpu"),
    "array": np.arange(3.0),
    "number": np.float32(2),
    "names": np.array(["a"]),
    "at": datetime.datetime(2021, 4, 29, tzinfo=datetime.timezone.utc),
    "day": datetime.date(2021, 4, 29),
    "timeout": datetime.timedelta(seconds=1),
}
PLAIN = {"data_path": "a", "lr": 0.1, "epochs": 100, "scale": [0.4, 1.0], "fp16": True}


def test_arguments_that_are_no_plain_values_are_passed_over(tmp_path):
    for args in (argparse.Namespace(**OBJECTS, **PLAIN), OBJECTS | PLAIN | {0: None}):
        torch.save({"teacher": export(network()), "args": args}, tmp_path / "a.pth")
        assert load_backbone(tmp_path / "a.pth").trained_with == PLAIN
    torch.save({"teacher": export(network()), "args": Path("a")}, tmp_path / "a.pth")
    assert load_backbone(tmp_path / "a.pth").trained_with == {}


@pytest.mark.parametrize("name, elsewhere", [
    ("PosixPath", "pathlib WindowsPath"),
    ("PosixPath", "pathlib._local PosixPath"),
    ("PosixPath", "pathlib._local WindowsPath"),
    ("_reconstruct", "numpy.core.multiarray _reconstruct"),
    ("scalar", "numpy.core.multiarray scalar"),
])  # fmt: skip
def test_arguments_of_other_systems_and_versions_load(name, elsewhere, tmp_path):
    content = {"teacher": export(network()), "args": OBJECTS | PLAIN}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    saved = (tmp_path / "a.pth").read_bytes()
    theirs = "\n".join(elsewhere.split()).encode()
    changed, count = re.subn(rb"(?<=c)[a-z_.]+\n" + name.encode() + rb"(?=\n)", theirs, saved)
    assert count
    (tmp_path / "a.pth").write_bytes(changed)
    assert load_backbone(tmp_path / "a.pth").trained_with == PLAIN


# ---- .safetensors ----


def safetensors(state, header=None):
    """The bytes of a file, with the header given in place of the right one."""
    entries, numbers = {"__metadata__": {"note": 300 * "x"}}, b""
    names = {dtype: name for name, dtype in DTYPES.items()}
    for key, value in state.items():
        data = bytes(value.contiguous().flatten().view(torch.uint8).tolist())
        offsets = [len(numbers), len(numbers) + len(data)]
        entries[key] = dict(dtype=names[value.dtype], shape=list(value.shape), data_offsets=offsets)
        numbers += data
    text = json.dumps(header(entries) if header else entries).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def tiny():
    return ViT(1, 4, 2, 1, 2).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_safetensors_load_in_any_order(dtype, tmp_path):
    state = {key: value.to(dtype) for key, value in export(network()).items()}
    for seed in range(3):
        (tmp_path / "a.safetensors").write_bytes(safetensors(state, lambda entries: dict(
            random.Random(seed).sample(list(entries.items()), len(entries)))))  # fmt: skip
        loaded = export(load_backbone(tmp_path / "a.safetensors", num_heads=HEADS).backbone)
        assert all(torch.equal(loaded[key], value.float()) for key, value in state.items())


def test_a_header_that_is_damaged_is_one_line_and_never_other_weights(tmp_path):
    path, state = tmp_path / "a.safetensors", export(tiny())
    whole = safetensors(state)
    length = 8 + int.from_bytes(whole[:8], "little")
    rng, loads = random.Random(0), 0
    for n in range(600):
        damaged = bytearray(whole)
        if n % 6 == 0:
            del damaged[rng.randrange(len(whole)) :]
        else:
            for _ in range(rng.choice((1, 1, 2))):
                damaged[rng.randrange(length)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = export(load_backbone(path).backbone)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1 and "a.safetensors'" in str(error)
            continue
        loads += 1
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert 0 < loads < 60


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


MANY = 2**26
LIES = [  # the entries of a header above 32 bytes of numbers
    {"a": entry()},
    {"a": entry(), "b": entry(offsets=(0, 16))},
    {"a": entry(), "b": entry(offsets=(8, 24))},
    {"a": entry(), "b": entry(offsets=(8, 32), shape=[6])},
    {"a": entry(offsets=(0, 8), shape=[2]), "b": entry(offsets=(16, 32))},
    {"a": entry(), "b": entry(offsets=(16, 36), shape=[5])},
    {"a": entry(shape=[MANY], offsets=(0, 4 * MANY))},
    {"a": entry(shape=[MANY], offsets=(0, 32))},
    {"a": entry(shape=[-2, -4], offsets=(0, 32))},
    {"a": entry(shape=[-8], offsets=(0, -32))},
    {"a": entry(shape=[-1], offsets=(0, 32))},
    {"a": entry(shape=[8.0], offsets=(0, 32))},
    {"a": entry(shape="8", offsets=(0, 32))},
    {"a": entry(shape=8, offsets=(0, 32))},
    {"a": entry(shape=[8], offsets=(0.0, 32.0))},
    {"a": entry(shape=[8], offsets=(32, 0))},
    {"a": entry(shape=[8], offsets=[32])},
    {"a": entry(dtype="F8_E4M3", shape=[32], offsets=(0, 32))},
    {"a": entry(dtype="C64", shape=[4], offsets=(0, 32))},
    {"a": entry(dtype=None, shape=[8], offsets=(0, 32))},
    {"a": {"dtype": "F32"}},
    {"a": 7},
    [],
    {},
]


@pytest.mark.parametrize("lie", [*LIES, "nested", "length"])
def test_a_header_that_lies_is_one_line_and_nothing_is_allocated_for_it(lie, tmp_path):
    if lie == "nested":  # deeper than Python's stack
        header = b"{" + 50_000 * b'"a":['
        content = len(header).to_bytes(8, "little") + header
    elif lie == "length":
        content = MANY.to_bytes(8, "little") + safetensors({"a": torch.ones(8)})[8:]
    else:
        content = safetensors({"a": torch.ones(8)}, lambda entries: lie)
    (tmp_path / "a.safetensors").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="a.safetensors' is not a readable") as error:
            load_backbone(tmp_path / "a.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(error.value).splitlines()) == 1 and peak < MANY / 8
    if "F8_" in str(lie) or "C64" in str(lie):
        assert re.search("a is of type (F8_E4M3|C64), which is not read", str(error.value))


# ---- the size at which images are shown to a network ----


@pytest.fixture
def shown(monkeypatch):
    """The shapes of the images that networks are shown, as a set that fills."""
    shapes, embed = set(), PatchEmbed.forward

    def watched(self, images):
        shapes.add(tuple(images.shape[2:]))
        return embed(self, images)

    monkeypatch.setattr(PatchEmbed, "forward", watched)
    return shapes


SHOWING = (
    "knn; linear --epochs 1; linear --cached --epochs 1; logistic --fraction 0.5; search 0.png; "
    "copies; features"
)


@pytest.mark.parametrize("command", SHOWING.split("; "))
def test_images_are_shown_at_the_size_that_is_asked_for(command, folder, tmp_path, shown):
    torch.save(export(network()), tmp_path / "a.pth")
    image, cpu = str(folder / "val" / "größe" / "0.png"), ("--device", "cpu")
    name, *flags = command.replace("0.png", image).split(" ")
    line = [name, str(tmp_path / "a.pth"), *flags, "--data", str(folder), *cpu, "--workers", "0"]
    refused = "evaluate.py: --size 20 must be divisible by the patch, 8"
    assert command_here("evaluate.py", *line, "--size", "20") == (1, [refused])
    for size, expected in (([], 16), (["--size", "32"], 32)):
        shown.clear()
        assert command_here("evaluate.py", *line, *size) == (0, [])
        assert shown == {(expected, expected)}
        last = (tmp_path / "evaluate.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["size"] == expected
        (tmp_path / "features.pth").unlink(missing_ok=True)
    if name == "linear":  # the last one's size is in linear.pth
        shown.clear()
        line = ["predict", str(tmp_path / "a.pth"), str(tmp_path / "linear.pth"), image]
        assert command_here("evaluate.py", *line, *cpu) == (0, [])
        assert shown == {(32, 32)}


def test_the_cache_keeps_each_size_apart(folder, tmp_path):
    torch.save(export(network()), tmp_path / "a.pth")
    line = ["features", str(tmp_path / "a.pth"), "--data", str(folder), "--device", "cpu"]
    vit, images = load_backbone(tmp_path / "a.pth").backbone, Folder(folder)
    for n, size in enumerate((16, 32, 16, 32)):
        file = tmp_path / f"{n}.npz"
        flags = ["--workers", "0", "--cache", "--size", str(size), "--file", str(file)]
        assert command_here("evaluate.py", *line, *flags) == (0, [])
        expected, _ = extract_features(vit, images, Extraction(torch.device("cpu"), size=size))
        got = torch.from_numpy(np.load(file)["features"])
        torch.testing.assert_close(got, torch.nn.functional.normalize(expected, dim=-1))
    assert len(list(tmp_path.glob("features-*.pth"))) == 2


def test_no_weights_are_replaced_or_dropped_unsaid(tmp_path):
    """Of another network's beside the right ones, which used to win."""
    state, other = network().state_dict(), network().state_dict()
    apart = {f"blocks.0.attn.{part}_proj.{kind}": torch.zeros(x.shape[0] // 3, *x.shape[1:])
             for kind in ("weight", "bias") for part in "qkv"
             for x in [state[f"blocks.0.attn.qkv.{kind}"]]}  # fmt: skip
    apart |= {key.replace("blocks.0", "blocks.1"): x for key, x in apart.items()}
    integer = {"blocks.0.attn.proj.bias": state["blocks.0.attn.proj.bias"].to(torch.int8)}
    expanded = {"norm.bias": torch.zeros(1).expand(10**12)}
    wrong = {
        "twice, apart and together": state | apart,
        "has .* twice": {**state, "model": other},
        "junk": {"model": state, "junk.weight": torch.zeros(2)},
        "of a kind that is not read, torch.int8": state | integer,
        "of a kind that is not read, torch.float32": state | expanded,
        "--num_heads -4 must divide": {"model": state, "num_heads": -4},
        "--num_heads True must divide": {"model": state, "num_heads": True},
    }
    for message, content in wrong.items():
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=message) as error:
            load_backbone(tmp_path / "a.pth")
        assert len(str(error.value).splitlines()) == 1
    torch.save({"model": state, "model_ema": other}, tmp_path / "a.pth")
    assert "(left out: model_ema)" in load_backbone(tmp_path / "a.pth").description
