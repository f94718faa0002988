"""Folders, images of every kind, and the order of batches."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from util.data import (
    BatchSampler,
    Folder,
    MultiCropDataset,
    describe_images,
    load,
    load_splits,
    split_folder,
)
from util.images import read_image
from util.shapes import Shapes


def test_images_of_every_mode_become_rgb(folder):
    images = load(folder)
    assert images.classes == ["cats and dogs", "größe"] and images.labels == [0] * 6 + [1] * 6
    for i in range(12):
        assert images[i].dtype == torch.uint8 and images[i].shape[0] == 3
    assert images[5].float().mean() == pytest.approx(30_000 / 257, abs=1)


def test_imagenettes_classes_have_one_name_each(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for name in ("n01440764", "n02102040"):
        path = tmp_path / "datasets" / "imagenette2-160" / "train" / name / "0.JPEG"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(path)
    images = load("imagenette")
    assert describe_images(images) == "2 images of 2 classes (tench, English springer)"


def test_transparency_is_white_and_exif_turns(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()
    image, exif = Image.new("RGB", (8, 4)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 8, 4)


def test_splits_are_found_from_the_root_and_from_train(folder, tmp_path):
    for start in (folder, folder / "train"):
        assert (
            split_folder(start, "train") == folder / "train"
            and split_folder(start, "val") == folder / "val"
        )
    assert (
        split_folder(folder / "val", "train") == folder / "val"
        and split_folder(folder / "val", "val") is None
    )
    (folder / "val").rename(folder / "valid")
    assert split_folder(folder, "val") == folder / "valid"
    (folder / "valid").rename(tmp_path / "elsewhere")
    assert (
        load(folder).classes == ["cats and dogs", "größe"] and split_folder(folder, "val") is None
    )


@pytest.mark.parametrize(
    "training, held_out",
    [("Training", "Testing"), ("train", "Val"), ("TRAIN", "validation"), ("training", "Eval")],
)
def test_splits_are_found_in_any_case_and_by_their_other_names(folder, training, held_out):
    (folder / "train").rename(folder / "moving")
    (folder / "moving").rename(folder / training)
    (folder / "val").rename(folder / "moving")
    (folder / "moving").rename(folder / held_out)
    for start in (folder, folder / training):
        assert split_folder(start, "train") == folder / training
        assert split_folder(start, "val") == folder / held_out
        assert load(start).classes == ["cats and dogs", "größe"] and len(load(start, "val")) == 12


def test_hidden_names_are_passed_over_and_other_files_counted(folder):
    train = folder / "train"
    image = Image.new("RGB", (4, 4))
    hidden = ".ipynb_checkpoints/a.png __MACOSX/a.png größe/._photo.png größe/.b.jpg"
    for name in hidden.split():
        (train / name).parent.mkdir(exist_ok=True)
        image.save(train / name)
    images = load(train)
    assert images.classes == ["cats and dogs", "größe"] and len(images) == 12
    assert images.note is None
    for name in ("a.txt", "b.txt", "c.mp4", "README"):
        (train / "größe" / name).write_text("no image")
    said = load(train).note.removeprefix("passed over ").split(", ")
    assert sorted(said) == ["1 .mp4", "1 without a suffix", "2 .txt"]


def put(folder, *names):
    """Put an image at each of these places, in a color of its own."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40), (i, 90, 0)).save(folder / name)


def test_a_class_may_be_called_like_a_split(tmp_path):
    put(tmp_path, "bus/1.png", "car/1.png", "train/1.png", "truck/1.png")
    images = load(tmp_path)
    assert images.classes == ["bus", "car", "train", "truck"] and load(tmp_path, "val") is None
    place = tmp_path / "train"
    assert f"'train' is taken for ordinary images, not for a split (for that: --data {place})" in (
        describe_images(images)
    )
    assert split_folder(place, "train") == place and split_folder(place, "val") is None
    (tmp_path / "systems" / "docs").mkdir(parents=True)  # without images it is no class
    put(tmp_path / "systems", "runs/x/curves.png")
    (tmp_path / "systems" / "runs" / "x" / "log.jsonl").touch()
    put(tmp_path / "systems", "train/a/1.png", "val/a/1.png", "@eaDir/1.png", "lost+found/1.png")
    assert split_folder(tmp_path / "systems", "val") == tmp_path / "systems" / "val"


def test_splits_in_an_unusual_place_are_said(tmp_path):
    put(tmp_path, "images/train/a/1.png", "images/train/b/1.png", "images/val/a/1.png")
    images = load(tmp_path)
    place = tmp_path / "images" / "train"
    assert len(images) == 3 and f"--data {place})" in images.note
    assert len(load(place)) == 2 and len(load(place, "val")) == 1


def test_links_are_followed_but_for_those_that_lead_back_up(tmp_path):
    put(tmp_path, "d/cat/small/1.png", "d/dog/1.png", "elsewhere/2.png")
    os.symlink("cat/small", tmp_path / "d" / "kitten")
    os.symlink(tmp_path, tmp_path / "d" / "dog" / "up")
    os.symlink(tmp_path / "elsewhere", tmp_path / "d" / "cow")
    os.symlink(tmp_path / "d" / "cow", tmp_path / "elsewhere" / "again")
    images = load(tmp_path / "d")
    assert images.classes == ["cat", "cow", "dog", "kitten"]
    assert images.paths == ["cat/small/1.png", "cow/2.png", "dog/1.png", "kitten/1.png"]
    assert images.note == "passed over 2 links back up"


def test_what_systems_and_this_software_leave_is_no_data(tmp_path):
    put(tmp_path, "a/1.png", "b/1.png", "@eaDir/1.png", "$RECYCLE.BIN/1.png", "run/curves.png")
    (tmp_path / "run" / "log.jsonl").touch()
    put(tmp_path, "a/1_attention.png", "search.png", "a/research.png")
    images = load(tmp_path)
    assert images.paths == ["a/1.png", "a/research.png", "b/1.png"]
    assert images.classes == ["a", "b"]
    assert images.note == "passed over 2 pictures of ours, 1 runs of ours"


def test_an_empty_held_out_split_is_left_out(tmp_path, capsys):
    put(tmp_path, "train/a/1.png", "train/b/1.png")
    (tmp_path / "val" / "a").mkdir(parents=True)
    train, val = load_splits(tmp_path)
    assert len(train) == 2 and val is None
    assert "val' holds no image, and is left out" in capsys.readouterr().out


def test_images_that_are_nearly_black_are_said(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    twelve_bits = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(twelve_bits).save(tmp_path / "a" / "1.png")
    load_splits(tmp_path)
    assert "1.png' uses less than a tenth of its range" in capsys.readouterr().out
    Image.fromarray(twelve_bits * 16).save(tmp_path / "a" / "1.png")
    load_splits(tmp_path)
    assert "range" not in capsys.readouterr().out
    Image.fromarray(twelve_bits.astype(np.int32) * 100).save(tmp_path / "a" / "2.tif")
    with pytest.raises(ValueError, match="more than 16 bits"):
        read_image(tmp_path / "a" / "2.tif")


def test_a_large_photograph_is_read(tmp_path):
    Image.new("1", (9800, 9700)).save(tmp_path / "95 megapixels.png")
    assert read_image(tmp_path / "95 megapixels.png").shape == (3, 9700, 9800)


def test_a_stray_image_beside_the_classes_is_named(folder):
    Image.new("RGB", (4, 4)).save(folder / "train" / "stray.png")
    images = load(folder)
    assert images.labels is None
    assert "no labels, since 'stray.png' lies beside the 2 folders" in describe_images(images)


def test_what_was_found_is_said(folder):
    found = f"'{folder / 'train'}': 12 images of 2 classes (cats and dogs, größe)"
    assert describe_images(load(folder)) == found
    text = describe_images(Shapes())
    assert text.startswith("10000 images of 10 classes (core 0 degrees from rim, ")
    assert text.endswith(", ...)")


def test_a_folder_without_classes_has_no_labels(folder, tmp_path):
    (tmp_path / "loose" / "deep" / "deeper").mkdir(parents=True)
    for name in ("a.png", "deep/b.PNG", "deep/deeper/c\nd.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "loose" / name, format="png")
    os.symlink(tmp_path / "loose", tmp_path / "loose" / "deep" / "loop")
    images = load(tmp_path / "loose")
    assert images.labels is None and len(images) == 3 and load(tmp_path / "loose", "val") is None
    with pytest.raises(ValueError, match="no images below"):
        (tmp_path / "empty").mkdir()
        Folder(tmp_path / "empty")
    with pytest.raises(ValueError, match="no folder 'nowhere'"):
        load("nowhere")


def test_batches_cover_each_epoch_once_whatever_the_number_of_processes():
    def order(world, batch, accumulate=1, first=0):
        ranks = [
            list(BatchSampler(26, batch, accumulate, rank, world, seed=3).batches(first, 9))
            for rank in range(world)
        ]
        return [
            [key for group in zip(*ranks) for part in group for key in part][i : i + 8]
            for i in range(0, (9 - first) * 8, 8)
        ]

    whole = order(1, 8)
    assert len(set(sum(whole[:3], []))) == 24 and {epoch for epoch, _ in sum(whole[:3], [])} == {0}
    assert [i for _, i in sum(whole[:3], [])] != [i for _, i in sum(whole[3:6], [])]
    assert order(1, 8, first=4) == whole[4:]
    for world, batch, accumulate in ((2, 4, 1), (2, 2, 2), (1, 4, 2)):
        assert [set(step) for step in order(world, batch, accumulate)] == [
            set(step) for step in whole
        ]
    with pytest.raises(ValueError, match="26 images are fewer than a global batch of 32"):
        BatchSampler(26, 8, 2, 0, 2)


class Whole:
    """In MultiCrop's place: the image as it is, and a number that was drawn for it."""

    least = None

    def __call__(self, image, rng):
        return image, rng.random()


def test_a_bad_image_is_replaced_and_reported(folder):
    bad = sorted((folder / "train" / "größe").iterdir())[2]
    bad.write_bytes(b"no image")
    images = load(folder)
    index = images.paths.index(os.path.join("größe", bad.name))
    views = MultiCropDataset(images, Whole())
    (image, draw), replaced = views[4, index]
    assert replaced == index and (image == images[index + 1]).all()
    assert draw == views[4, index][0][1] != views[5, index][0][1]
    assert draw != MultiCropDataset(images, Whole(), seed=1)[4, index][0][1]
    assert views[4, index + 1][1] == -1
