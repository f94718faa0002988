"""Folders, images of every kind, and the order of batches."""

import os

import pytest
import torch
from PIL import Image

from util.data import BatchSampler, Folder, MultiCropDataset, describe_images, load, split_folder
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
    said = "passed over 4 files that are no images: 2 .txt, 1 .mp4, 1 without a suffix"
    assert load(train).note == said or sorted(load(train).note) == sorted(said)


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
