import os

import pytest
import torch
from PIL import Image

from data import Batches, Folder, Shapes, Views, load, read_image, split_folder


def test_shapes_are_deterministic_labelled_and_masked():
    train, val = Shapes("train"), Shapes("val")
    assert len(train) == 10_000 and len(val) == 1_000 and train.classes == val.classes
    assert (train[7] == Shapes("train")[7]).all() and not (train[7] == val[7]).all()
    for i in range(20):
        image, mask = train[i], train.mask(i)
        assert image.shape == (3, 64, 64) and image.dtype == torch.uint8 and mask.shape == (64, 64)
        assert mask.unique().tolist() == [0, 1] and 0.1 < mask.float().mean() < 0.3


def test_position_size_and_mean_color_do_not_tell_the_class_but_the_step_in_hue_does():
    def simple(shapes):
        """Position, size and mean colour of the object in each image."""
        rows = []
        for i in range(len(shapes)):
            inside = shapes.mask(i).nonzero().float()
            color = shapes[i][:, shapes.mask(i) == 1].float().mean(1)
            rows.append(torch.cat([inside.mean(0), inside.std(0), torch.tensor([len(inside) ** 0.5]), color / 4]))
        rows = torch.stack(rows)
        return (rows - rows.mean(0)) / rows.std(0), torch.tensor(shapes.labels)

    (x, y), (x2, y2) = simple(Shapes("train", 2000)), simple(Shapes("val", 500))
    probe = torch.nn.Linear(x.shape[1], 10)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(probe(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (probe(x2).argmax(1) == y2).float().mean() < 0.25

    shapes, turn, right = Shapes("val", 100), torch.exp(2j * torch.pi * torch.arange(3) / 3), 0
    for i in range(100):
        image, mask = shapes[i].float(), shapes.mask(i).float()
        inside = mask.nonzero().float()
        far = torch.cdist(torch.cartesian_prod(torch.arange(64.0), torch.arange(64.0)), inside.mean(0, keepdim=True)).view(64, 64) / (len(inside) / torch.pi) ** 0.5
        inner = torch.nn.functional.avg_pool2d(mask[None], 3, 1, 1)[0] == 1
        core, rim = ((turn @ image[:, where].mean(1).cfloat()).angle() for where in (far < 0.45, inner & (far > 0.8)))
        right += round(((core - rim) / (2 * torch.pi) * 10).item()) % 10 == shapes.labels[i]
    assert right > 80


def test_images_of_every_mode_become_rgb(folder):
    images = load(folder)
    assert images.classes == ["cats and dogs", "größe"] and images.labels == [0] * 6 + [1] * 6
    for i in range(12):
        assert images[i].dtype == torch.uint8 and images[i].shape[0] == 3
    assert images[5].float().mean() == pytest.approx(30_000 / 257, abs=1)


def test_transparency_is_white_and_exif_turns(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()
    image, exif = Image.new("RGB", (8, 4)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 8, 4)


def test_splits_are_found_from_the_root_and_from_train(folder, tmp_path):
    for start in (folder, folder / "train"):
        assert split_folder(start, "train") == folder / "train" and split_folder(start, "val") == folder / "val"
    assert split_folder(folder / "val", "train") == folder / "val" and split_folder(folder / "val", "val") is None
    (folder / "val").rename(folder / "valid")
    assert split_folder(folder, "val") == folder / "valid"
    (folder / "valid").rename(tmp_path / "elsewhere")
    assert load(folder).classes == ["cats and dogs", "größe"] and split_folder(folder, "val") is None


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
        ranks = [list(Batches(26, batch, accumulate, rank, world, seed=3, first=first, last=9)) for rank in range(world)]
        return [[key for group in zip(*ranks) for part in group for key in part][i : i + 8] for i in range(0, (9 - first) * 8, 8)]

    whole = order(1, 8)
    assert len(set(sum(whole[:3], []))) == 24 and {epoch for epoch, _ in sum(whole[:3], [])} == {0}
    assert [i for _, i in sum(whole[:3], [])] != [i for _, i in sum(whole[3:6], [])]
    assert order(1, 8, first=4) == whole[4:]
    for world, batch, accumulate in ((2, 4, 1), (2, 2, 2), (1, 4, 2)):
        assert [set(step) for step in order(world, batch, accumulate)] == [set(step) for step in whole]
    with pytest.raises(ValueError, match="26 images are fewer than a global batch of 32"):
        Batches(26, 8, 2, 0, 2)


def test_a_bad_image_is_replaced_and_reported(folder):
    bad = sorted((folder / "train" / "größe").iterdir())[2]
    bad.write_bytes(b"no image")
    images = load(folder)
    index = images.paths.index(os.path.join("größe", bad.name))
    views = Views(images, lambda image, rng: (image, rng.random()))
    image, draw, replaced = views[4, index]
    assert replaced == index and (image == images[index + 1]).all()
    assert draw == views[4, index][1] != views[5, index][1]
    assert views[4, index + 1][2] == -1
