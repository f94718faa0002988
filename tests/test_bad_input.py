"""What a user can get wrong.

Each ends in one line that says so and a status that is not 0, and nothing is left half done.
"""

import io
import json
import os
import random
import shutil
import struct
import zlib

import pytest
import torch
from PIL import Image

import train
from conftest import TINY, backbone_of, command_here, errors
from head import DINOHead
from util.checkpoint import export, resnet50
from util.data import BatchSampler, Folder, MultiCropDataset
from util.images import read_image
from util.shapes import Shapes


def png(width, height):
    """A PNG that claims a size, in a few bytes."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" * 1000)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data sets, checkpoints and runs, good and bad, for the commands to run in."""
    place = tmp_path_factory.mktemp("place")
    put_images(place)
    put_checkpoints(place)
    whole = (place / "bare.pth").read_bytes()
    put_run(place / "run-foreign", {"weight": torch.zeros(3)})
    put_run(place / "run-old", {"format": 1, "args": {}})
    put_run(place / "run-cut", {})
    (place / "run-cut" / "last.pth").write_bytes(whole[:5000])
    put_run(place / "run-folder", {})
    (place / "run-folder" / "last.pth").unlink()
    (place / "run-folder" / "last.pth").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        flags = "--data good --steps 1 --output run --knn_every 0"
        train.main(train.parse_args([*TINY, *flags.split()]))
    return place


def put_images(place):
    image = Image.fromarray(Shapes()[0].permute(1, 2, 0).numpy())

    def folder(name, count, spoil=lambda i: False):
        (place / name).mkdir(parents=True)
        for i in range(count):
            image.save(place / name / f"{i}.png")
            if spoil(i):
                (place / name / f"{i}.png").write_bytes(b"no image")

    good = "good/train/a good/train/b good/val/a good/val/b "
    differ = "differ/train/a differ/train/b differ/val/c differ/val/d "
    others = "onlyone/train/a onlyone/train/b onlyone/val/a nothing/train/a nothing/train/b one/a"
    for name in (good + differ + others).split():
        folder(name, 4)
    folder("few", 3)
    folder("half", 20, lambda i: i % 2)
    folder("bad/a", 11, lambda i: True)
    folder("bad/b", 11, lambda i: True)
    for name in ("text", "empty", "split/train", "nothing/val/a"):
        (place / name).mkdir(parents=True)
    (place / "unreadable").mkdir()
    (place / "unreadable" / "a.png").write_text("no image")
    (place / "text" / "readme.txt").write_text("no image")
    image.save(place / "image.png")
    folder("sizes", 3)
    image.resize((60, 64)).save(place / "sizes" / "2.png")
    for name, size in (("mask", 64), ("small-mask", 32), ("no-mask", 64)):
        mask = Image.new("L", (size, size))
        if name != "no-mask":
            mask.paste(1, (8, 8, 24, 24))
        mask.save(place / f"{name}.png")
    (place / "text.jpg").write_text("no image")
    (place / "film.mp4").write_text("no image")
    (place / "bomb.png").write_bytes(png(100_000, 100_000))
    (place / "cut.png").write_bytes((place / "image.png").read_bytes()[:400])


def put_checkpoints(place):
    backbone = backbone_of("vit_micro", 8, 16)
    torch.save(export(backbone), place / "bare.pth")
    torch.save(export(backbone), place / "good" / "linear.pth")  # a name that we write, too
    teacher = train.Network(backbone, DINOHead(backbone.embed_dim, 8, 8, 4)).state_dict()
    torch.save({"teacher": teacher, "args": {"data_path": "gone"}}, place / "gone.pth")
    torch.save(resnet50().state_dict(), place / "resnet.pth")
    torch.save({"weight": torch.zeros(3)}, place / "foreign.pth")
    (place / "text.pth").write_text("no weights")
    (place / "empty.pth").write_bytes(b"")
    whole = (place / "bare.pth").read_bytes()
    (place / "cut.pth").write_bytes(whole[: len(whole) // 2])


def put_run(folder, content):
    folder.mkdir()
    (folder / ".lock").touch()  # as each run does
    torch.save(content, folder / "last.pth")


POSITIVE = (
    "patch_size 0, patch_size -8, global_crops_size 0, local_crops_size -1, hidden_dim 0, "
    "bottleneck_dim 0, epochs 0, batch_size_per_gpu 0, accumulate -1, log_every 0, knn_bank 0, "
    "lr -0.1, lr nan, lr inf, student_temp 0.0, teacher_temp nan, warmup_teacher_temp 0.0"
)
NOT_NEGATIVE = (
    "local_crops_number -1, warmup_epochs -1, freeze_last_layer -1, num_workers -1, steps -5, "
    "saveckp_freq -1, knn_every -1, min_lr nan, weight_decay -1.0, weight_decay_end nan, "
    "clip_grad nan, momentum_teacher nan, center_momentum -0.1"
)
AT_MOST_1 = "momentum_teacher 1.1, center_momentum 2.0, drop_path_rate 1.5"
TRAIN = [  # flags of train.py, what the line says; --data good --output out come first
    *((f"--{flag}", f": {flag.split()[1]} must be above 0") for flag in POSITIVE.split(", ")),
    *((f"--{flag}", f": {flag.split()[1]} must be 0 or more") for flag in NOT_NEGATIVE.split(", ")),
    *((f"--{flag}", f": {flag.split()[1]} must be") for flag in AT_MOST_1.split(", ")),
    ("--out_dim 1", "--out_dim 1 must be"),
    (f"--seed {10**30}", "must be 0 or more, and at most 2147483647"),
    ("--data=", "no folder ''"),
    ("--init=", "no checkpoint at ''"),
    ("--output good", "good holds files that are no run's: choose another --output"),
    ("--epochs many", "argument --epochs: invalid int value: 'many'"),
    ("--lr", "argument --lr: expected one argument"),
    ("--learning_rate 1", "unrecognized arguments: --learning_rate 1"),
    ("--arch vit_giant", "invalid choice: 'vit_giant'"),
    ("--amp fp8", "invalid choice: 'fp8'"),
    ("--optimizer lars", "--optimizer lars: adamw or sgd"),
    ("--norm_last_layer maybe", "argument --norm_last_layer: true or false, not 'maybe'"),
    ("--global_crops_scale 0.5 0.2", "--global_crops_scale 0.5 0.2 must be two shares"),
    ("--local_crops_scale 0 0.2", "--local_crops_scale 0 0.2 must be two shares"),
    ("--global_crops_scale nan 1", "--global_crops_scale: nan must be"),
    ("--global_crops_scale 0.5", "argument --global_crops_scale: expected 2 arguments"),
    ("--patch 7", "--patch 7 must divide --global_crops_size 16"),
    ("--local_crops_size 12", "--patch 8 must divide --local_crops_size 12"),
    ("--warmup_epochs 99", "--warmup_epochs 99: more than --epochs 7"),
    ("--batch 9", "8 images are fewer than a global batch of 9"),
    ("--batch 4 --accumulate 3", "8 images are fewer than a global batch of 12"),
    ("--device cuda:99", "--device cuda:99 cannot be used here"),
    ("--device abacus", "--device abacus cannot be used here"),
    ("--data nowhere", "no folder 'nowhere'; the built-in data sets are shapes"),
    ("--data image.png", "no folder 'image.png'"),
    ("--data empty", "no images below"),
    ("--data text", "no images below"),
    ("--data split", "no images below"),
    ("--data few", "3 images are fewer than a global batch of 4"),
    ("--data bad --knn_every 0", "images in a row cannot be read"),
    ("--data half --knn_every 0", "of 20 images cannot be read, more than 1 %"),
    ("--data half --knn_every 0", "mend or remove them (the first: cannot identify image file"),
    ("--init nowhere.pth", "no checkpoint at 'nowhere.pth'"),
    ("--init empty", "no checkpoint at 'empty'"),
    ("--init text.pth", "'text.pth' is not a readable checkpoint"),
    ("--init foreign.pth", "'foreign.pth' is not a DINO backbone"),
    ("--init bare.pth --patch 16 --local_crops_size 16", "--init bare.pth is a ViT of width 96, "
     "1 block, 2 heads, patch 8, --arch and --patch say ViT"),
    ("--init resnet.pth", "--init resnet.pth is a ResNet-50, --arch and --patch say ViT"),
    ("--output image.png", "image.png"),
    ("--output image.png/run", "image.png"),
    ("--output run --data good --seed 5", "seed 0 -> 5): choose another --output"),
    ("--output run --data good --lr 0.5",
     "lr 0.03 -> 0.5): choose another --output, or --overwrite it"),
    ("--output run --data good --epochs 5", "epochs 7 -> 5): choose another --output"),
    ("--output run --data few --batch 3", "images of other names, 8 -> 3 of them): choose another"),
    ("--output run-foreign", "run-foreign/last.pth is no run to resume"),
    ("--output run-old", "run-old/last.pth is no run to resume, or of another version"),
    ("--output run-cut", "run-cut/last.pth' is not a readable checkpoint: cut short"),
    ("--output run-folder", "no checkpoint at 'run-folder/last.pth'"),
]  # fmt: skip
OTHERS = [
    ("evaluate.py knn", "the following arguments are required: checkpoint"),
    ("evaluate.py guess bare.pth", "invalid choice: 'guess'"),
    ("evaluate.py knn nowhere.pth", "no checkpoint at 'nowhere.pth'"),
    ("evaluate.py knn text.pth --data good", "checkpoint: cut short or of another kind"),
    ("evaluate.py knn image.png --data good", "checkpoint: cut short or of another kind"),
    ("evaluate.py knn empty.pth --data good", "'empty.pth' is not a readable checkpoint"),
    ("evaluate.py knn cut.pth --data good", "'cut.pth' is not a readable checkpoint"),
    ("evaluate.py knn foreign.pth --data good", "'foreign.pth' is not a DINO backbone"),
    ("evaluate.py knn bare.pth", "'bare.pth' does not say what it was trained on: give --data"),
    ("evaluate.py knn gone.pth", "no folder 'gone'"),
    ("evaluate.py knn bare.pth --network student --data few", "'few' has no labels"),
    ("evaluate.py knn gone.pth --network student --data good", "has no student, only teacher"),
    ("evaluate.py knn bare.pth --data one", "'one' has no labels"),
    ("evaluate.py knn run", "no checkpoint at 'run'"),
    ("evaluate.py knn bare.pth --data differ",
     "the training split of 'differ' lacks classes of the held-out: 'c', 'd'"),
    ("evaluate.py knn bare.pth --data onlyone", "the held-out split of 'onlyone' has no labels"),
    ("evaluate.py linear bare.pth --data nothing", "'nothing' has no held-out split"),
    ("evaluate.py linear bare.pth --data few", "'few' has no labels"),
    ("evaluate.py linear bare.pth --data differ/val",
     "'differ/val' has no held-out split"),
    ("evaluate.py linear bare.pth --data good --lr 0.1 nan", "argument --lr: nan must be above 0"),
    ("evaluate.py linear bare.pth --data good --epochs 0", "argument --epochs: 0 must be above 0"),
    ("evaluate.py linear bare.pth --data good --n_last_blocks 0",
     "argument --n_last_blocks: 0 must be above 0"),
    ("evaluate.py logistic bare.pth --data differ/val", "'differ/val' has no held-out split"),
    ("evaluate.py logistic bare.pth --data few", "'few' has no labels"),
    ("evaluate.py logistic bare.pth --data good --fraction 0", "--fraction: 0 must be above 0"),
    ("evaluate.py logistic bare.pth --data good --fraction 1.5", "and at most 1 ("),
    ("evaluate.py logistic bare.pth --data good --fraction 0.01", "is no image of any class"),
    ("evaluate.py predict bare.pth bare.pth image.png", "'bare.pth' is no linear.pth"),
    ("evaluate.py predict bare.pth nowhere.pth image.png", "no checkpoint at 'nowhere.pth'"),
    ("evaluate.py masks bare.pth --data good", "none of 8 images says where its objects are"),
    ("evaluate.py masks bare.pth --data good --masks good", "'good/train/a/0.png': 'good/"),
    ("evaluate.py masks bare.pth --data good --size 0", "--size: 0 must be above 0"),
    ("evaluate.py masks bare.pth --data good --mass 1.5", "1.5 must be above 0, and at most 1"),
    ("evaluate.py masks resnet.pth --data good", "a convnet has no attention"),
    ("evaluate.py masks bare.pth --data good --masks nowhere", "no images below 'nowhere'"),
    ("evaluate.py masks bare.pth --data few --masks good/train", "no image below 'few' has a mask"),
    ("visualize.py video bare.pth few", "give the first frame's mask with --mask"),
    ("visualize.py video bare.pth few --mask nowhere.png", "cannot read the mask 'nowhere.png'"),
    ("visualize.py video bare.pth few --mask image.png", "'image.png' is no mask"),
    ("visualize.py video bare.pth few --mask no-mask.png", "the first mask shows no object"),
    ("visualize.py video bare.pth few --mask small-mask.png",
     "frame 1 is of 64 x 64 pixels, the first mask of 32 x 32"),
    ("visualize.py video bare.pth sizes --mask mask.png",
     "frame 3 is of 60 x 64 pixels, the first mask of 64 x 64"),
    ("visualize.py video bare.pth image.png --mask mask.png", "'image.png' has one frame"),
    ("visualize.py video bare.pth film.mp4 --mask mask.png", "cannot read 'film.mp4'"),
    ("visualize.py video bare.pth empty --mask mask.png", "no image below 'empty' can be read"),
    ("visualize.py video bare.pth bad --mask mask.png", "cannot read 'bad/a/0.png'"),
    ("visualize.py video bare.pth few --mask mask.png --topk 0", "--topk: 0 must be above 0"),
    ("visualize.py video bare.pth few --mask mask.png --fps 0", "--fps: 0 must be above 0"),
    ("visualize.py video bare.pth few --mask mask.png --output image.png", "image.png"),
    ("visualize.py video bare.pth few --mask mask.png --output few/out", "these must stay"),
    ("visualize.py video bare.pth few --mask mask.png --output .", "holds the film or its mask"),
    ("visualize.py video resnet.pth few --mask mask.png",
     "a convnet has no attention and no patch"),
    ("evaluate.py davis resnet.pth --data shapes", "a convnet has no attention and no patch"),
    ("evaluate.py davis bare.pth --data good", "'good' is not in DAVIS's layout"),
    ("evaluate.py davis bare.pth --data nowhere", "'nowhere' is not in DAVIS's layout"),
    ("evaluate.py knn bare.pth --data good --output text.jpg", "text.jpg"),
    ("evaluate.py knn bare.pth --data bad", "22 of 22 images cannot be read, the first "),
    ("evaluate.py knn bare.pth --data good --k 0", "--nb_knn/--k: 0 must be above 0"),
    ("evaluate.py knn bare.pth --data good --batch 0", "0 must be above 0"),
    ("evaluate.py knn bare.pth --data good --workers -1",
     "argument --num_workers/--workers: -1 must be 0 or more"),
    ("evaluate.py knn bare.pth --data good --device cuda:99",
     "--device cuda:99 cannot be used here"),
    ("visualize.py crops unreadable", "no image below 'unreadable' can be read"),
    ("visualize.py bare.pth", "'bare.pth' is no run's folder, and no image is named"),
    ("visualize.py nowhere.pth image.png", "no checkpoint at 'nowhere.pth'"),
    ("visualize.py bare.pth nowhere.png", "cannot read 'nowhere.png'"),
    ("visualize.py bare.pth text.jpg", "cannot read 'text.jpg'"),
    ("visualize.py bare.pth cut.png", "cannot read 'cut.png'"),
    ("visualize.py bare.pth bomb.png",
     "cannot read 'bomb.png': Image size (10000000000 pixels) exceeds limit"),
    ("visualize.py bare.pth film.mp4", "cannot read 'film.mp4'"),
    ("visualize.py bare.pth empty", "no image below 'empty' can be read"),
    ("visualize.py bare.pth image.png --mass 0", "--mass: 0 must be above 0"),
    ("visualize.py bare.pth image.png --size 0", "--size: 0 must be above 0"),
    ("visualize.py bare.pth image.png --size 100000", "more than 65536 patches: lower --size"),
    ("visualize.py bare.pth half --fps 0", "--fps: 0 must be above 0"),
    ("visualize.py bare.pth bad --fps 5", "no image below 'bad' can be read"),
    ("visualize.py bare.pth image.png --output text.jpg", "text.jpg"),
    ("visualize.py resnet.pth image.png", "a convnet has no attention"),
    ("visualize.py bare.pth image.png --num_heads 5", "--num_heads 5 must divide the width, 96"),
    ("visualize.py run image.png", "name the run's checkpoint, run/last.pth"),
    ("visualize.py crops", "the following arguments are required: image"),
    ("visualize.py schedules --arch vit_mini", "give --epochs"),
    ("visualize.py targets bare.pth", "'bare.pth' has no head and no centre: name a last.pth"),
    ("evaluate.py search bare.pth image.png --data shapes", "'shapes' is no folder of images"),
    ("evaluate.py search bare.pth nowhere.png --data good", "there is no 'nowhere.png'"),
    ("evaluate.py search bare.pth image.png --data bad", "22 of 22 images cannot be read"),
    ("evaluate.py search bare.pth image.png --data good --top 0", "--top: 0 must be above 0"),
    ("evaluate.py copies bare.pth --data good --threshold 2", "and at most 1 ("),
    ("evaluate.py features bare.pth --data good --file nowhere/x.pth", "nowhere/x.pth is there"),
    ("evaluate.py oxford bare.pth --data good", "cannot read the ground truth 'good/gnd_roxford"),
    ("evaluate.py copydays bare.pth --data good", "no images below 'good/original'"),
    ("evaluate.py copydays bare.pth --data good --size 7", "--size 7 must be divisible by"),
    ("tests/bench.py --data nowhere", "no images below 'nowhere'"),
    ("util/shapes.py image.png", "image.png"),
    ("evaluate.py export nowhere.pth out.pth", "no checkpoint at 'nowhere.pth'"),
    ("evaluate.py export bare.pth nowhere/out.pth", "nowhere/out.pth"),
    ("evaluate.py export bare.pth empty", "empty"),
    ("evaluate.py export bare.pth foreign.pth", "foreign.pth is there already"),
    ("evaluate.py features bare.pth --data good --file bare.pth", "bare.pth is there already"),
    ("evaluate.py linear good/linear.pth --data good --cached --epochs 1", "this command reads"),
    ("evaluate.py knn bare.pth --data good --num_heads 0", "--num_heads: 0 must be above 0"),
    ("evaluate.py knn bare.pth --data good --num_heads -2", "--num_heads: -2 must be above 0"),
]  # fmt: skip
ENVIRONMENTS = [
    ("WORLD_SIZE=many", "'many'"),
    ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=0", "MASTER_ADDR"),
    ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=many", "'many'"),
    ("WORLD_SIZE=2 RANK=first LOCAL_RANK=0", "'first'"),
]


# The run has begun: its folder has settings and a log.
MET_ON_THE_WAY = "more than 1 %", "mend or remove them"


def state_of(place):
    """What is there, and when it changed, but for the empty .lock of a run's folder."""
    found = {path: path.stat() for path in place.rglob("*") if path.name != ".lock"}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def check(place, monkeypatch, line, message):
    monkeypatch.chdir(place)
    before = state_of(place)
    try:
        status, lines = command_here(*line)
        checkpoints = list((place / "out").glob("*.pth"))
    finally:
        begun = (place / "out").exists()
        shutil.rmtree(place / "out", ignore_errors=True)
    # a bad image is named once
    ends = [text for text in lines if not text.startswith("cannot read")]
    assert status in (1, 2) and len(ends) == 1, (status, lines)
    file = line[0].split("/")[-1]
    assert ends[0].startswith((f"{file}: ", f"{file} {line[1]}: "))
    assert message in ends[0]
    assert begun == any(text in message for text in MET_ON_THE_WAY) and not checkpoints
    assert state_of(place) == before


@pytest.mark.parametrize("flags, message", TRAIN)
def test_train(place, monkeypatch, flags, message):
    line = ["train.py", *TINY, "--data", "good", "--output", "out", *flags.split()]
    check(place, monkeypatch, line, message)


@pytest.mark.parametrize("line, message", OTHERS)
def test_other_commands(place, monkeypatch, line, message):
    check(place, monkeypatch, line.split(), message)


def test_a_folder_that_is_refused_gains_no_file(tmp_path):
    (tmp_path / "run").mkdir()
    torch.save({"weight": torch.zeros(3)}, tmp_path / "run" / "last.pth")
    status, lines = command_here("train.py", *TINY, "--output", str(tmp_path / "run"))
    assert status == 1 and len(lines) == 1 and "is no run to resume" in lines[0]
    assert [path.name for path in (tmp_path / "run").glob("[!.]*")] == ["last.pth"]  # but its lock


@pytest.mark.parametrize("variables, message", ENVIRONMENTS)
def test_environments(place, monkeypatch, variables, message):
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    check(place, monkeypatch, ["train.py", *TINY, "--data", "good", "--output", "out"], message)


KINDS = (
    ".png PNG RGBA, .jpg JPEG RGB, .gif GIF P, .webp WEBP RGB, .bmp BMP RGB, .tif TIFF CMYK, "
    ".ppm PPM RGB, .png PNG P, .tif TIFF I;16"
)


def mutants(count):
    """(bytes, extension): images cut short, with flipped bits, or named as what they are not."""
    rng, images = random.Random(0), []
    for kind in KINDS.split(", "):
        extension, format, mode = kind.split()
        image = Image.effect_noise((40, 30), 80).convert("RGB")
        if mode == "I;16":
            image = Image.new(mode, image.size, 9000)
        file = io.BytesIO()
        image.convert(mode).save(file, format)
        images.append((extension, file.getvalue()))
    for i in range(count):
        extension, content = rng.choice(images)
        content = bytearray(content)
        if i % 3 == 0:
            del content[rng.randrange(len(content)) :]
        elif i % 3 == 1:
            for _ in range(rng.choice((1, 3, 30))):
                end = min(len(content), rng.choice((64, 10**6)))  # often in the header
                where = rng.randrange(end)
                content[where] ^= 1 << rng.randrange(8)
        else:
            extension = rng.choice([other for other, _ in images if other != extension])
        yield bytes(content), extension


class Whole:
    """A crop that leaves an image as it is."""

    least = None

    def __call__(self, image, rng):
        return image


@pytest.mark.filterwarnings("ignore")
def test_500_mutated_images_load_as_rgb_or_are_reported(tmp_path):
    for i, (content, extension) in enumerate(mutants(500)):
        (tmp_path / f"{i:03d}{extension}").write_bytes(content)
    Image.new("RGB", (5, 5)).save(tmp_path / "999.png")
    images, loaded = Folder(tmp_path), 0
    for i in range(500):
        try:
            image = images[i]
        except Exception:  # MultiCropDataset puts the next image in its place
            continue
        assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.numel()
        loaded += 1
    views = MultiCropDataset(images, Whole())
    replaced = []
    for i in range(500):
        try:
            replaced.append(views[0, i][1] != -1)
        except ValueError as error:  # ten in a row
            assert images.name(i) in str(error)
            replaced.append(True)
    assert 100 < loaded < 450 and sum(replaced) == 500 - loaded


def test_decompression_bombs_are_refused_by_size(tmp_path):
    for width, height in ((20_000, 20_000), (2_000_000, 2_000_000)):
        (tmp_path / "bomb.png").write_bytes(png(width, height))
        with pytest.raises(Exception, match="exceeds limit"):
            read_image(tmp_path / "bomb.png")
    Image.new("RGB", (7_000, 5_000)).save(tmp_path / "large.png")
    assert read_image(tmp_path / "large.png").shape == (3, 5_000, 7_000)


def test_images_that_vanish_during_training_are_replaced_and_counted(tmp_path, monkeypatch, capsys):
    for i in range(301):
        Image.new("RGB", (20, 20), (i % 256, 0, 0)).save(tmp_path / f"{i}\né.png")
    order, images = list(BatchSampler(301, 100).batches(0, 3)), Folder(tmp_path)
    bad, vanishing = (images.name(order[batch][7][1]) for batch in (0, 2))
    with open(bad, "wb") as file:
        file.write(b"no image")
    real = train.photometry

    def photometry(*args):
        if os.path.exists(vanishing):
            os.unlink(vanishing)
        return real(*args)

    monkeypatch.setattr(train, "photometry", photometry)
    flags = f"--data {tmp_path} --epochs 1 --batch 100 --output {tmp_path / 'run'}"
    train.main(train.parse_args([*TINY, *flags.split()]))
    out, err = capsys.readouterr()
    note = "its place is taken by the next image"
    named = errors(err.splitlines())
    assert named == [f"cannot read {name!r}: {note}" for name in (bad, vanishing)]
    assert "2 images could not be read" in out
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"] == 3
