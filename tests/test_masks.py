"""Masks in files: what their values mean, and the images that they belong to."""

import numpy as np
import pytest
import torch
from PIL import Image

import segment
from backbone import build_backbone
from data import load
from masks import (
    load_with_masks,
    read_mask,
    resize_mask,
    voc_palette,
    whole_palette,
    write_mask,
)

NUMBERS = torch.tensor([[0, 1, 1, 7], [0, 0, 255, 7]], dtype=torch.uint8)


def test_a_palette_png_keeps_its_numbers_and_its_palette(tmp_path):
    palette = [0, 0, 0, 9, 8, 7]
    write_mask(tmp_path / "a.png", NUMBERS, whole_palette(palette))
    mask, colors = read_mask(tmp_path / "a.png")
    assert torch.equal(mask, NUMBERS) and colors[:6] == palette
    first = [voc_palette()[3 * i : 3 * i + 3] for i in (0, 1, 2, 3, 20, 255)]
    known = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 64, 128], [224, 224, 192]]
    assert first == known


@pytest.mark.parametrize("mode, values, expected", [
    ("L", [0, 1, 3, 1], [0, 1, 3, 1]),
    ("L", [0, 50, 200, 50], [0, 50, 200, 50]),
    ("L", [0, 1, 255, 1], [0, 1, 255, 1]),  # 255 beside others is void
    ("L", [0, 255, 255, 0], [0, 1, 1, 0]),  # but alone it is the object
    ("1", [0, 255, 255, 0], [0, 1, 1, 0]),
    ("LA", [0, 255, 255, 0], [0, 1, 1, 0]),
    ("RGB", [0, 255, 255, 0], [0, 1, 1, 0]),
    ("RGBA", [0, 2, 0, 0], [0, 2, 0, 0]),
    ("P", [0, 255, 0, 0], [0, 255, 0, 0]),  # in a palette image 255 is void
    ("L", [0, 0, 0, 0], [0, 0, 0, 0]),
])  # fmt: skip
def test_what_grey_values_mean(tmp_path, mode, values, expected):
    image = Image.fromarray(np.array([values], np.uint8))
    if mode == "P":
        image.putpalette(voc_palette())
    image.convert(mode).save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png")[0].tolist() == [expected]


def test_of_a_drawing_with_soft_edges_the_brighter_half_is_the_object(tmp_path):
    ramp = np.arange(0, 256, 5, dtype=np.uint8)[None]
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert torch.equal(read_mask(tmp_path / "a.png")[0], torch.from_numpy(ramp > 127).byte())
    few = np.array([[0, 64, 191, 255]], np.uint8)
    Image.fromarray(few).save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png")[0].tolist() == [[0, 0, 1, 1]]
    Image.fromarray(few.repeat(9, 0).repeat(9, 1)).save(tmp_path / "a.jpg")
    assert read_mask(tmp_path / "a.jpg")[0][4, 4::9].tolist() == [0, 0, 1, 1]


def test_what_is_no_mask_is_said(tmp_path):
    Image.merge("RGB", [Image.effect_noise((4, 4), 90) for _ in "RGB"]).save(tmp_path / "a.png")
    Image.new("I;16", (4, 4), 3000).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    for name, message in (("a", "neither a palette"), ("b", "neither"), ("c", "cannot read the")):
        with pytest.raises(ValueError, match=message):
            read_mask(tmp_path / f"{name}.png")


def test_a_mask_is_resized_as_pillow_does_it():
    mask = torch.randint(256, (13, 17), dtype=torch.uint8)
    for size in ((7, 5), (40, 31), (13, 34)):
        wanted = Image.fromarray(mask.numpy()).resize(size[::-1], Image.NEAREST)
        assert torch.equal(resize_mask(mask, *size), torch.from_numpy(np.array(wanted)))


def voc(root, objects=True):
    """Two photographs with masks and one without, in Pascal VOC's layout."""
    for name in ("JPEGImages", "SegmentationClass", "SegmentationObject"):
        (root / name).mkdir(parents=True)
    for name in ("a", "b", "c"):
        Image.effect_noise((40, 32), 90).convert("RGB").save(root / "JPEGImages" / f"{name}.jpg")
    mask = torch.zeros(32, 40, dtype=torch.uint8)
    mask[4:20, 5:15], mask[4:20, 20:30], mask[4:20, 30:32] = 1, 2, 255
    for name in ("a", "b"):
        write_mask(root / "SegmentationClass" / f"{name}.png", (mask > 0).byte(), voc_palette())
        if objects:
            write_mask(root / "SegmentationObject" / f"{name}.png", mask, voc_palette())
    if not objects:
        (root / "SegmentationObject").rmdir()
    return mask


def test_a_folder_like_vocs(tmp_path):
    mask = voc(tmp_path / "VOC2007")
    images = load_with_masks(tmp_path / "VOC2007")
    assert images.paths == ["a.jpg", "b.jpg"] and torch.equal(images.mask(1), mask)
    assert len(load(str(tmp_path / "VOC2007"))) == 3  # to train on: photographs, no masks
    listed = tmp_path / "VOC2007" / "ImageSets" / "Segmentation"
    listed.mkdir(parents=True)
    (listed / "val.txt").write_text("b\nc\n")
    assert load_with_masks(tmp_path / "VOC2007").paths == ["b.jpg"]
    voc(tmp_path / "part", objects=False)
    assert load_with_masks(tmp_path / "part").mask(0).unique().tolist() == [0, 1]


def test_masks_of_the_same_names_in_another_folder_of_another_size(tmp_path):
    for name, size in (("x/1.jpg", (40, 30)), ("x/2.png", (40, 30)), ("3.png", (40, 30))):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / "images" / name)
    (tmp_path / "masks" / "x").mkdir(parents=True)
    box = Image.new("1", (20, 15))
    box.paste(1, (5, 5, 10, 10))
    box.save(tmp_path / "masks" / "x" / "1.png")
    images = load_with_masks(tmp_path / "images", tmp_path / "masks")
    assert images.paths == ["x/1.jpg"]
    _, objects, _ = segment.read_objects(images, 0, 30, 5)
    wanted = torch.zeros(1, 30, 40, dtype=torch.bool)
    wanted[0, 10:20, 10:20] = True
    assert torch.equal(objects, wanted)
    (tmp_path / "others").mkdir()
    box.save(tmp_path / "others" / "1.png")
    with pytest.raises(ValueError, match="no image below .*images' has a mask in .*others'"):
        load_with_masks(tmp_path / "images", tmp_path / "others")


def test_the_best_and_the_worst_are_drawn(tmp_path, capsys):
    voc(tmp_path / "VOC2007")
    torch.save(build_backbone("vit_micro", 8, 16).state_dict(), tmp_path / "bare.pth")
    flags = "--data", tmp_path / "VOC2007", "--output", tmp_path / "out", "--device", "cpu"
    segment.main(segment.parse_args(["masks", *map(str, [tmp_path / "bare.pth", *flags])]))
    assert "4 objects in 2 images" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "masks.png") as picture:
        assert picture.height > picture.width / 3
