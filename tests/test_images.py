"""Image files and films, whatever is in them beside the pixels."""

import struct
import zlib
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features

from augment import MultiCrop, random_box, resize
from evaluation.features import Crops, center_crop
from util.data import Folder, reduced
from util.images import frames, image_paths, is_film, read_image, stills, suffixes, write_gif


def picture():
    return Image.effect_noise((30, 20), 80).convert("RGB")


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_a_png_with_huge_text_or_a_large_profile_is_its_pixels(tmp_path):
    image = picture()
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2_000_000, zip=True)
    image.save(tmp_path / "text.png", pnginfo=text)
    image.save(tmp_path / "plain.png")
    plain = (tmp_path / "plain.png").read_bytes()
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(70_000_000)))
    (tmp_path / "profile.png").write_bytes(plain[:33] + profile + plain[33:])
    for name in ("text", "profile"):
        assert torch.equal(read_image(tmp_path / f"{name}.png"), pixels(image)), name


def test_a_jpeg_with_odd_exif_is_its_pixels_and_is_turned(tmp_path):
    image = picture()
    image.save(tmp_path / "plain.jpg")
    # two fields: the orientation, 6, and a resolution that points beyond the end
    fields = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x011A, 5, 1, 9999)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + fields + struct.pack("<I", 0)
    image.save(tmp_path / "odd.jpg", exif=exif)
    image.save(tmp_path / "broken.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff rubbish")
    expected = read_image(tmp_path / "plain.jpg")
    assert torch.equal(read_image(tmp_path / "broken.jpg"), expected)
    assert torch.equal(read_image(tmp_path / "odd.jpg"), expected.rot90(-1, (1, 2)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_puts_the_image_upright(tmp_path, orientation):
    corners = torch.zeros(3, 16, 24, dtype=torch.uint8)
    corners[0, :8, :12], corners[1, :8, 12:], corners[2, 8:, :12] = 255, 255, 255
    stored = {
        1: corners,
        2: corners.flip(2),
        3: corners.flip((1, 2)),
        4: corners.flip(1),
        5: corners.transpose(1, 2),
        6: corners.rot90(1, (1, 2)),
        7: corners.transpose(1, 2).flip((1, 2)),
        8: corners.rot90(-1, (1, 2)),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored.permute(1, 2, 0).numpy()).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "a.png"), corners)


def test_sixteen_bits_become_eight_and_floats_are_an_error(tmp_path):
    values = np.arange(600, dtype=np.uint16).reshape(20, 30) * 109
    for name, deep in (("a.png", values), ("b.tif", values), ("c.tif", values.astype(np.int32))):
        Image.fromarray(deep).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image.shape == (3, 20, 30) and (image == image[:1]).all()
        assert abs(image[0].numpy() - values / 257).max() <= 0.5, name
    Image.fromarray(values.astype(np.int32) - 900).save(tmp_path / "below.tif")
    with pytest.raises(ValueError, match="more than 16 bits"):  # no deep value wraps round
        read_image(tmp_path / "below.tif")
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="floating-point pixels, which have no scale"):
        read_image(tmp_path / "float.tif")


def test_all_that_this_pillow_decodes_is_read(tmp_path):
    assert {".jpg", ".jfif", ".jpe", ".tga", ".png", ".webp", ".tiff"} <= suffixes()
    assert not {".pdf", ".mpg", ".h5", ".txt", ".mp4"} & suffixes()
    names = ["a.jfif", "b.jpe", "c.tga", "D.PNG"]
    names += ["e.avif"] if features.check("avif") else []
    names += ["f.jp2"] if features.check("jpg_2000") else []
    for name in names:
        picture().save(tmp_path / name)
    images = Folder(tmp_path)
    assert sorted(images.paths) == sorted(names) and images.note is None
    assert all(images[i].shape == (3, 20, 30) for i in range(len(images)))


def smooth_jpeg(path, height, width, **how):
    """Write a JPEG of soft random colors."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 40, width // 40, 3))
    image = Image.fromarray(noise.astype(np.uint8))
    image.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=95, **how)


def test_a_jpeg_is_decoded_smaller_but_never_below_what_is_asked_for(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    smooth_jpeg(tmp_path / "a.jpg", 400, 600, exif=exif)
    full = read_image(tmp_path / "a.jpg")
    assert full.shape == (3, 600, 400)
    parts = {None: 1, 400: 1, 201: 1, 200.5: 1, 200: 2, 101: 2, 100: 4, 51: 4, 50: 8, 1: 8}
    for least, part in parts.items():
        image = read_image(tmp_path / "a.jpg", least)
        assert image.shape == (3, 600 // part, 400 // part), least
        means = torch.nn.functional.avg_pool2d(full.float(), part)
        assert (image - means).abs().mean() < 1.5, least
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 1).shape == (3, 400, 600)


def test_crops_of_a_jpeg_decoded_smaller_are_those_of_the_whole(tmp_path):
    smooth_jpeg(tmp_path / "a.jpg", 1500, 2000)
    crop = MultiCrop()
    whole, small = read_image(tmp_path / "a.jpg"), read_image(tmp_path / "a.jpg", crop.least)
    assert small.shape == (3, 750, 1000)
    for top, left, height, width in [(0, 0, 1500, 2000), (400, 1000, 600, 500), (900, 2, 388, 388)]:
        full = resize(whole[:, top : top + height, left : left + width], 96, 96)
        top, left, height, width = (side // 2 for side in (top, left, height, width))
        half = resize(small[:, top : top + height, left : left + width], 96, 96)
        assert (full.float() - half).abs().mean() < 1.5


SIZES = {(375, 500): 1, (3000, 4000): 4, (300, 4000): 1, (900, 6000): 1, (4000, 4500): 8}


@pytest.mark.parametrize("sides, by", SIZES.items())
def test_no_crop_is_enlarged_for_it(tmp_path, sides, by):
    crop, rng = MultiCrop(), Random(0)
    Image.new("L", sides[::-1]).save(tmp_path / "a.jpg")
    height, width = read_image(tmp_path / "a.jpg", crop.least).shape[1:]
    assert (height, width) == tuple(-(-side // by) for side in sides)
    for view in crop.views:
        for _ in range(500):
            _, _, h, w = random_box(height, width, view.scale, rng)
            if by > 1:
                assert min(h, w) >= view.size


def test_a_folder_decodes_smaller_for_those_who_ask_alone(tmp_path):
    smooth_jpeg(tmp_path / "a.jpg", 800, 1000)
    images = Folder(tmp_path)
    assert reduced(images, 100)[0].shape == (3, 100, 125)
    assert images[0].shape == (3, 800, 1000)
    crops = Crops(images, [0], 80)  # 800 is more than 4 x 2 x 91
    assert crops.images[0].shape == (3, 200, 250)
    _, crop = crops[0, 0]
    assert (crop.float() - center_crop(images[0], 80)).abs().mean() < 1.5


def test_random_crops_for_the_probe_are_reduced_too_and_twice_as_large(tmp_path):
    smooth_jpeg(tmp_path / "a.jpg", 800, 1000)
    crops = Crops(Folder(tmp_path), [0], 20, seed=0)
    assert crops.images[0].shape == (3, 200, 250)  # 800 is more than 4 x 2 x 20 / 0.245


def test_numbers_in_names_count_as_numbers(tmp_path):
    for name in ("b/2.png", "b/10.png", "a10.png", "a2.png", "b/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture().save(tmp_path / name, "PNG")
    assert image_paths(tmp_path) == (["a2.png", "a10.png", "b/2.png", "b/10.png"], {".txt": 1})
    (tmp_path / "a2.png").write_bytes(b"no image")
    read = [str(path.relative_to(tmp_path)) for path, _ in stills(tmp_path)]
    assert read == ["a10.png", "b/2.png", "b/10.png"]
    with pytest.raises(ValueError, match="cannot read '.*a2.png': "):
        list(stills(tmp_path / "a2.png"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_animated_files_are_films_and_others_are_not(tmp_path, kind):
    """A phone's JPEG may hold more pictures, and so may a TIFF: the first is the photograph."""
    shades = [Image.new("RGB", (30, 20), (80 * i, 0, 0)) for i in range(3)]
    name = tmp_path / f"film.{kind.lower()}"
    how = dict(save_all=True, append_images=shades[1:])
    shades[0].save(name, duration=[50, 120, 300], lossless=True, **how)
    assert is_film(name)
    names, pictures, times = zip(*frames(name))
    assert names == ("00000", "00001", "00002") and times == (50, 120, 300)
    for shade, image in zip(shades, pictures):
        assert (image.float() - pixels(shade).float()).abs().max() <= 2
    shades[0].save(tmp_path / f"still.{kind.lower()}")
    shades[0].save(tmp_path / "pages.tif", **how)
    shades[0].save(tmp_path / "phone.jpg", "MPO", **how)
    for other in (f"still.{kind.lower()}", "phone.jpg", "pages.tif"):
        assert not is_film(tmp_path / other), other
        assert len(list(frames(tmp_path / other))) == 1


def test_a_gif_is_what_was_put_in(tmp_path):
    noise = [picture() for _ in range(3)]
    write_gif(zip(noise, (100, 204, 1_000_000)), tmp_path / "new" / "a.gif")
    with Image.open(tmp_path / "new" / "a.gif") as film:
        assert film.info["loop"] == 0
    _, pictures, times = zip(*frames(tmp_path / "new" / "a.gif"))
    assert times == (100, 200, 655350)
    for image, expected in zip(pictures, noise):
        assert (image.float() - pixels(expected)).abs().mean() < 12  # 256 colors
    with pytest.raises(ValueError, match="no frames for '.*b.gif'"):
        write_gif([], tmp_path / "b.gif")
    assert not (tmp_path / "b.gif").exists()
