"""Labels carried through a film, against a plain rewriting and by the command."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageSequence

import visualize
from augment import normalize, resize
from conftest import backbone_of
from evaluation import video
from evaluation.masks import read_mask, voc_palette, write_mask
from evaluation.video import Propagation, carry_mask, harden, mix_labels
from tests import textbook
from util.images import to_tensor

pytestmark = pytest.mark.usefixtures("several_blocks")


def moving_film(length, h=24, w=32, step=2):
    """Frames that move by so many pixels over one random pattern."""
    pattern = torch.randint(256, (3, h, w + step * length), dtype=torch.uint8)
    return [pattern[:, :, step * t : step * t + w].contiguous() for t in range(length)]


def mask_of(numbers, h=24, w=32):
    """A mask with a box for each number."""
    mask = torch.zeros(h, w, dtype=torch.uint8)
    for i, number in enumerate(numbers):
        mask[4 + 4 * i : 12 + 4 * i, 6 * i + 2 : 6 * i + 12] = number
    return mask


SETTINGS = [
    Propagation(),
    Propagation(n_last_frames=2, size_mask_neighborhood=1),
    Propagation(size_mask_neighborhood=0, topk=3),
    Propagation(size_mask_neighborhood=2, topk=100, temperature=0.5),
]


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("most", [2**24, 1])
def test_soft_labels_are_the_plain_rewritings(how, most, monkeypatch):
    """In one block, and in blocks of one row."""
    monkeypatch.setattr(video, "MOST_AFFINITIES", most)
    h, w = 5, 7
    features = F.normalize(torch.randn(4, h, w, 16, dtype=torch.double), dim=-1)
    labels = [torch.rand(h, w, 3, dtype=torch.double).softmax(-1)]
    flat = list(rearrange(features, "s h w d -> s (h w) d"))
    first = rearrange(labels[0], "h w c -> (h w) c")
    wanted = textbook.carry_labels(flat, first, (h, w), *how)
    for t in range(1, 4):
        sources = [0, *range(max(1, t - how.n_last_frames), t)]
        keys = torch.stack([features[s] for s in sources]).float()
        known = torch.stack([labels[s] for s in sources]).float()
        got = mix_labels(features[t].float(), keys, known, how)
        labels.append(got.double())
        wanted_now = rearrange(wanted[t - 1], "(h w) c -> h w c", h=h)
        assert (got - wanted_now).abs().max() < 1e-5


def plain_masks(backbone, frames, first, size, how):
    """Each further frame's mask in float64, and where two labels are so close that either will do.
    """
    p = backbone.patch_size
    h, w = (side // p for side in size)
    backbone = backbone.double()
    features = []
    for frame in frames:
        x = normalize(resize(frame, *size)[None].double() / 255)
        features.append(F.normalize(backbone.get_intermediate_layers(x)[0, 0, 1:], dim=-1).detach())
    backbone.float()
    numbers = sorted({0, *first.flatten().tolist()} - {255})
    small = Image.fromarray(first.numpy()).resize((w, h), Image.NEAREST)
    small = torch.from_numpy(np.array(small)).flatten()
    small[small == 255] = 0
    start = torch.stack([small == number for number in numbers], 1).double()
    masks = []
    for soft in textbook.carry_labels(features, start, (h, w), *how):
        maps = F.interpolate(soft.T.reshape(1, -1, h, w), scale_factor=p, mode="bilinear")[0]
        for one in maps:
            if one.max() > one.min():
                one.copy_((one - one.min()) / (one.max() - one.min()))
        best = maps.topk(2, 0).values
        found = []
        for pixels in (maps.argmax(0), best[0] - best[1] < 1e-4):
            pixels = Image.fromarray(pixels.numpy().astype(np.uint8))
            pixels = np.array(pixels.resize(first.shape[::-1], Image.NEAREST))
            found.append(torch.from_numpy(pixels).long())
        masks.append((torch.tensor(numbers, dtype=torch.uint8)[found[0]], found[1] > 0))
    return masks


@pytest.mark.parametrize("numbers", [[1], [1, 2, 3], [3, 7, 200], [2, 255]])
@pytest.mark.parametrize("how", SETTINGS[:2])
def test_masks_are_the_plain_rewritings(numbers, how):
    """One object and three, a gap in their numbers, void pixels; a film shorter than the context.

    24 x 34 pixels at a short side of 24, patch 4, are seen as 24 x 32.
    """
    backbone = backbone_of("vit_micro", 4, 16).eval()
    frames, first = moving_film(4, w=34), mask_of(numbers, w=34)
    got = list(carry_mask(backbone, frames, first, 24, how))
    assert torch.equal(got[0], first)
    for one, (wanted, tied) in zip(got[1:], plain_masks(backbone, frames, first, (24, 32), how)):
        assert tied.float().mean() < 0.1 and torch.equal(one[~tied], wanted[~tied])
    assert set(got[-1].unique().tolist()) <= {0, *numbers} - {255}


def test_a_mask_follows_what_moves():
    """The pattern moves by a patch a frame, and no position tells where a patch was."""
    backbone = backbone_of("vit_micro", 4, 16).eval()
    torch.nn.init.zeros_(backbone.pos_embed)
    frames, first = moving_film(4, step=4), torch.zeros(24, 32, dtype=torch.uint8)
    first[8:16, 16:28] = 1
    *_, last = carry_mask(backbone, frames, first, 24)
    moved = first.roll(-12, 1)
    assert (last == moved).float().mean() > 0.9 > 0.8 > (first == moved).float().mean()


def test_a_label_that_fills_the_frame_stays():
    full = torch.zeros(3, 4, 2)
    full[..., 1] = 1
    assert (harden(full, 4, (12, 16)) == 1).all()


def test_frames_are_whole_patches_and_at_480_as_the_reference_code_has_them():
    image = torch.zeros(3, 480, 854, dtype=torch.uint8)
    assert video.frame_size(image, 480, 16) == (480, 832)
    assert video.frame_size(image, 480, 8) == (480, 832)
    assert video.frame_size(image.mT, 480, 16) == (832, 480)
    assert video.frame_size(image, 68, 4) == (68, 120)
    assert video.frame_size(image, 70, 4) == (68, 124)
    wide = torch.zeros(3, 1080, 2015, dtype=torch.uint8)
    assert video.frame_size(wide, 480, 8) == (480, 832)  # 895.6, rounded down


def test_only_the_first_frame_and_the_context_are_sources(monkeypatch):
    backbone, used = backbone_of("vit_micro", 8, 16).eval(), []

    def spy(query, keys, labels, how):
        used.append(len(keys))
        return mix_labels(query, keys, labels, how)

    monkeypatch.setattr(video, "mix_labels", spy)
    frames = (torch.randint(256, (3, 16, 16), dtype=torch.uint8) for _ in range(12))
    assert sum(1 for _ in carry_mask(backbone, frames, mask_of([1], 16, 16), 16)) == 12
    assert used == [1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8]


# ---- the command ----


@pytest.fixture
def film(tmp_path):
    """A folder of frames, its first mask with a palette of its own, and a checkpoint."""
    (tmp_path / "frames").mkdir()
    frames = [Image.fromarray(rearrange(f, "c h w -> h w c").numpy()) for f in moving_film(5)]
    for t, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"{t + 7}.png")
    palette = [0, 0, 0, 10, 20, 30, 40, 50, 60]
    write_mask(tmp_path / "first.png", mask_of([1, 2]), palette + voc_palette()[9:])
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:], duration=80)
    torch.save(backbone_of("vit_micro", 4, 16).state_dict(), tmp_path / "bare.pth")
    return tmp_path


def run(film, *flags):
    flags = [str(flag) for flag in flags]
    flags = ["video", str(film / "bare.pth"), *flags, "--device", "cpu"]
    visualize.main(visualize.parse_args(flags))


def test_a_film_gets_a_palette_png_a_frame_and_a_gif(film, capsys):
    flags = "--mask", film / "first.png", "--num_heads", 4
    run(film, film / "frames", *flags)
    out = film / "frames_masks"
    names = [f"{t + 7}.png" for t in range(5)]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "film.gif", "strip.png"])
    for name in names:
        mask, palette = read_mask(out / name)
        assert mask.shape == (24, 32) and palette[:9] == [0, 0, 0, 10, 20, 30, 40, 50, 60]
    assert torch.equal(read_mask(out / "7.png")[0], mask_of([1, 2]))
    with Image.open(out / "film.gif") as outlined:
        assert sum(1 for _ in ImageSequence.Iterator(outlined)) == 5
        assert outlined.size == (224, 168)  # a small film is enlarged
    assert Image.open(out / "strip.png").width > 500
    assert "5 frames, 2 objects" in capsys.readouterr().out

    run(film, film / "film.gif", *flags, "--output", film / "out")
    names = [f"{t:05}.png" for t in range(5)] + ["film.gif", "strip.png"]
    assert sorted(path.name for path in (film / "out").iterdir()) == names


def test_the_film_and_the_strip_show_outlines_at_their_own_sizes(film, monkeypatch):
    gifs, strips = [], []
    monkeypatch.setattr(video, "write_gif", lambda pictures, path: gifs.append([*pictures]))
    monkeypatch.setattr(video, "draw_panels", lambda rows, path, note: strips.append(rows))
    (film / "large").mkdir()
    for path in (film / "frames").iterdir():
        Image.open(path).resize((640, 480)).save(film / "large" / path.name)
    with Image.open(film / "first.png") as mask:
        mask.resize((640, 480), Image.NEAREST).save(film / "mask.png")
    run(film, film / "large", "--mask", film / "mask.png", "--size", 24)
    (picture, duration), *_ = gifs[0]
    assert picture.size == (640, 480) and duration == 100
    left = to_tensor(picture)[:, 160, 32:40]  # of the first object, which begins at 40
    assert left.tolist() == [[0, 0, 0, 0, 255, 255, 255, 255]] * 3
    (row,) = strips[0]
    assert [*row] == [f"frame {t}" for t in range(1, 6)]
    panel = row["frame 1"]
    assert panel.shape == (3, 168, 224) and panel[:, 56, 12:14].tolist() == [[0, 255]] * 3


def test_a_mask_that_lies_among_the_frames_is_no_frame(film):
    (film / "first.png").rename(film / "frames" / "first.png")
    run(film, f"{film / 'frames'}/", "--mask", film / "frames" / "first.png")
    assert len(list((film / "frames_masks").glob("*.png"))) == 5 + 1  # and the strip


def test_two_frames_of_one_name_are_an_error(film):
    Image.new("RGB", (32, 24)).save(film / "frames" / "9.jpg")
    with pytest.raises(ValueError, match="two frames are called '9'"):
        run(film, film / "frames", "--mask", film / "first.png")
    assert not (film / "frames_masks").exists()


def test_an_object_that_is_lost_is_said(capsys):
    first = mask_of([1], 16, 16)
    first[0, 0] = 5
    backbone = backbone_of("vit_micro", 8, 16).eval()
    frames = [torch.randint(256, (3, 16, 16), dtype=torch.uint8) for _ in range(2)]
    assert len(list(carry_mask(backbone, frames, first, 16))) == 2
    assert "object 5 is in the middle of no patch, and is lost" in capsys.readouterr().err


def test_the_built_in_film_needs_no_mask(film, monkeypatch):
    monkeypatch.chdir(film)
    run(film, "shapes", "--size", 16, "--n_last_frames", 1)
    assert len(list((film / "shapes_masks").iterdir())) == 24 + 2


def test_an_error_on_the_way_leaves_nothing(film):
    Image.new("RGB", (30, 24)).save(film / "frames" / "9.png")
    with pytest.raises(ValueError, match="frame 3 is of 30 x 24 pixels, the first mask of 32 x 24"):
        run(film, film / "frames", "--mask", film / "first.png")
    assert not (film / "frames_masks").exists()
