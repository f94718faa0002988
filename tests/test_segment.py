"""Attention as masks, against numbers by hand and a plain rewriting."""

import numpy as np
import pytest
import torch
from PIL import Image

from augment import normalize
from backbone import build_backbone
from data import Folder, load
from segment import attention_maps, attention_masks, jaccard, keep_mass
from shapes import Shapes

pytestmark = pytest.mark.usefixtures("several_blocks")

CPU = torch.device("cpu")


def test_maps_are_the_class_tokens_softmax_in_float64():
    backbone, images = build_backbone("vit_micro", 8, 32).eval(), torch.randn(2, 3, 24, 40)
    got = attention_maps(backbone, images)
    backbone.double()
    x = backbone.embed(images.double())
    for block in backbone.blocks[:-1]:
        x = block(x)
    last = backbone.blocks[-1]
    q, k, _ = last.attn.qkv(last.norm1(x)).chunk(3, -1)
    for b in range(2):
        for head in range(4):
            part = slice(16 * head, 16 * head + 16)
            weights = (k[b, :, part] @ q[b, 0, part] / 16**0.5).softmax(0)
            expected = weights[1:].view(3, 5)
            assert (got[b, head] - expected).abs().max() < 1e-5 * weights.max()


def test_the_mask_keeps_the_fewest_patches_with_the_mass():
    maps = torch.tensor([[0.05, 0.4, 0.05], [0.1, 0.3, 0.1]])
    assert keep_mass(maps, 0.6).tolist() == [[False, True, False], [False, True, False]]
    assert keep_mass(maps, 0.75).sum() == 3
    assert keep_mass(torch.stack([maps, maps.flip(0)]), 1.0).all()
    assert keep_mass(torch.full((2, 5), 0.1), 0.6).sum() == 6  # ties
    assert keep_mass(torch.tensor([[0.5, 0.25, 0.25, 0.0]]), 0.5).sum() == 1  # to the digit
    maps = torch.rand(50, 6, 7)
    kept, wanted = keep_mass(maps), 0.6 * maps.sum((1, 2))
    inside = (maps * kept).sum((1, 2))
    smallest = maps.where(kept, 2.0).amin((1, 2))
    assert (inside >= wanted).all() and (inside - smallest < wanted).all()


def test_jaccard_by_hand():
    """60 % of each map's mass.

    Of the even map that is three of four patches, the first three of those equal; of the other the
    two largest.
    """
    maps = torch.tensor([[[0.2, 0.2], [0.2, 0.2]], [[0.1, 0.3], [0.1, 0.2]]])
    kept = keep_mass(maps, 0.6)
    assert kept.tolist() == [[[True, True], [True, False]], [[False, True], [False, True]]]
    numbers = torch.tensor([[1, 2], [1, 2]])
    objects = torch.stack([numbers == 1, numbers == 2, numbers == 3])
    none = torch.zeros(2, 2, dtype=torch.bool)
    close = torch.testing.assert_close
    close(jaccard(kept, objects, none), torch.tensor([[2 / 3, 0], [1 / 4, 1]]))
    corner = torch.tensor([[False, False], [False, True]])
    close(jaccard(kept, objects, corner), torch.tensor([[2 / 3, 0], [1 / 3, 1]]))
    # the second object has no pixel left
    close(jaccard(kept, objects, numbers == 2), torch.tensor([[1.0, 0]]))


class Fixed(torch.nn.Module):
    """A network whose two heads attend to given patches of 4 x 4."""

    patch, heads = 4, 2

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def attention(self, images, queries=None):
        assert images.shape == (1, 3, 8, 8)
        rows = torch.cat([torch.zeros(2, 1), self.maps.flatten(1)], 1)
        return rows[None, :, None].expand(1, 2, 5, 5)


class Two:
    """An image with two objects, one without any, one that cannot be read."""

    def __init__(self, scale=1):
        self.scale = scale

    def __len__(self):
        return 3

    def __getitem__(self, i):
        if i == 2:
            raise OSError
        return torch.zeros(3, 8 * self.scale, 8 * self.scale, dtype=torch.uint8)

    def name(self, i):
        return str(i)

    def mask(self, i):
        if i != 0:
            return None
        objects = torch.zeros(8, 8, dtype=torch.uint8)
        objects[:, :4], objects[:4, 4:], objects[0, 0] = 1, 2, 255
        return objects.repeat_interleave(self.scale, 0).repeat_interleave(self.scale, 1)


@pytest.mark.parametrize("scale", [1, 3])
def test_masks_by_hand(scale):
    """The first head keeps 47 pixels, one is void: object 1 has 31 of them, object 2 has 16.

    The second keeps 32, with none and 16.
    """
    maps = torch.tensor([[[0.2, 0.2], [0.2, 0.2]], [[0.1, 0.3], [0.1, 0.2]]])
    networks = [Fixed(maps), Fixed(maps.flip(0))]
    means, objects, images = attention_masks(networks, Two(scale), CPU, 8)
    first, second = [31 / 47, 16 / 47], [0, 16 / 32]
    best = first[0] + second[1]
    expected = [[best, sum(first), sum(second)], [best, sum(second), sum(first)]]
    tolerance = 1 if scale > 1 else 1e-4  # resizing blurs the one void pixel
    close = torch.testing.assert_close
    close(means.float(), 50 * torch.tensor(expected), rtol=0, atol=tolerance)
    assert (objects, images) == (2, 1)


class Odd(Shapes):
    """Images whose sides the patch does not divide."""

    def __getitem__(self, i):
        return super().__getitem__(i)[:, :51, :37]

    def mask(self, i):
        return super().mask(i)[:51, :37]


def test_masks_of_a_real_network_on_images_that_the_patch_does_not_divide():
    backbone = build_backbone("vit_micro", 8, 16).eval()
    means, objects, images = attention_masks([backbone], Odd("val", 6), CPU, 37)
    assert means.shape == (1, 5) and 0 < means[0, 1:].max() <= means[0, 0] < 100
    assert images == 6 and objects == 6
    one = Shapes("val", 1)
    image, kept = normalize(one[0][None] / 255), []
    for head in attention_maps(backbone, image)[0]:
        kept.append(np.kron(keep_mass(head).numpy(), np.ones((8, 8))) > 0)
    truth, best = one.mask(0).numpy(), []
    for number in range(1, truth.max() + 1):
        found = truth == number
        best.append(max((k & found).sum() / (k | found).sum() for k in kept))
    got = attention_masks([backbone], one, CPU, 64)[0][0, 0].item()
    assert got == pytest.approx(100 * np.mean(best), rel=1e-5)


def test_alpha_channels_say_where_objects_are(folder, tmp_path):
    pixels = np.zeros((6, 4, 4), np.uint8)
    pixels[:2, :, 3], pixels[2, :, 3] = 255, 127
    (tmp_path / "alpha").mkdir()
    Image.fromarray(pixels, "RGBA").save(tmp_path / "alpha" / "object.png")
    opaque = np.full((6, 4, 4), 255, np.uint8)
    Image.fromarray(opaque, "RGBA").save(tmp_path / "alpha" / "opaque.png")
    alpha = Folder(tmp_path / "alpha")
    assert alpha.paths == ["object.png", "opaque.png"]
    assert alpha.mask(0).tolist() == [[1] * 4] * 2 + [[0] * 4] * 4 and alpha.mask(1) is None
    whole = Folder(folder / "train")
    assert all(whole.mask(i) is None for i in range(len(whole)))


def test_vocs_objects_are_read_with_their_numbers(tmp_path, monkeypatch):
    voc = tmp_path / "hub" / ".." / "datasets" / "VOCdevkit" / "VOC2012"
    folders = ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass", "SegmentationObject")
    for name in folders:
        (voc / name).mkdir(parents=True)
    (voc / "ImageSets/Segmentation/val.txt").write_text("a\n")
    (voc / "ImageSets/Segmentation/train.txt").write_text("")
    Image.new("RGB", (8, 6)).save(voc / "JPEGImages/a.jpg")
    numbers = Image.new("P", (8, 6))
    numbers.putpalette([i % 256 for i in range(768)])
    numbers.paste(2, (0, 0, 4, 6))
    numbers.paste(255, (4, 0, 5, 6))
    numbers.save(voc / "SegmentationObject/a.png")
    numbers.point(lambda number: 7 * (number > 0)).save(voc / "SegmentationClass/a.png")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    images = load("voc2012", "val")
    assert images.labels is None and images.classes is None and images[0].shape == (3, 6, 8)
    assert images.mask(0)[0].tolist() == [2, 2, 2, 2, 255, 0, 0, 0]
