"""Pictures: what is in them, not only that they are there."""

import json
import math
import sys
import weakref

import pytest
import torch
from conftest import TINY
from PIL import Image, ImageSequence

import run
import train
import visualize
from augment import normalize
from data import Shapes, to_tensor
from vit import ViT, build_backbone, resnet50

pytestmark = pytest.mark.usefixtures("several_blocks")


def bright(patch=8):
    """A network of one block and two heads whose class token attends to bright patches: the first head strongly, the second not at all."""
    backbone = ViT(patch, dim=4, depth=1, heads=2, image_size=4 * patch).eval().requires_grad_(False)
    for parameter in backbone.parameters():
        parameter.zero_()
    backbone.patch_embed.proj.weight[0] = 1 / (3 * patch**2)  # the first channel of a patch is its brightness
    backbone.cls_token[..., 2] = 1
    block = backbone.blocks[0]
    block.norm1 = torch.nn.Identity()
    block.attn.qkv.weight[0, 2] = 8.0  # the class token's query, in the first head
    block.attn.qkv.weight[4, 0] = 1.0  # a patch's key
    return backbone


def square(height, width, top, left, side):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, top : top + side, left : left + side] = 255
    return image


def save(image, path):
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def drawn(argv):
    visualize.main(visualize.parse_args([*map(str, argv), "--device", "cpu"]))


@pytest.fixture
def rows(monkeypatch):
    """What draw_panels is given, rather than its picture."""
    calls = []
    monkeypatch.setattr(visualize, "draw_panels", lambda rows, path, note: calls.append(rows))
    return calls


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(build_backbone("vit_micro", 8, 16).state_dict(), tmp_path / "c.pth")
    return tmp_path / "c.pth"


def test_maps_are_the_class_tokens_softmax_in_float64():
    backbone, images = build_backbone("vit_micro", 8, 32).eval(), torch.randn(2, 3, 24, 40)
    got = visualize.attention_maps(backbone, images)
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
            for row in range(3):
                for column in range(5):
                    assert abs(got[b, head, row, column] - weights[1 + 5 * row + column]) < 1e-5 * weights.max()


def test_the_mask_keeps_the_fewest_patches_with_the_mass():
    maps = torch.tensor([[0.05, 0.4, 0.05], [0.1, 0.3, 0.1]])
    assert visualize.keep_mass(maps, 0.6).tolist() == [[False, True, False], [False, True, False]]
    assert visualize.keep_mass(maps, 0.75).sum() == 3
    assert visualize.keep_mass(torch.stack([maps, maps.flip(0)]), 1.0).all()
    assert visualize.keep_mass(torch.full((2, 5), 0.1), 0.6).sum() == 6  # ties
    assert visualize.keep_mass(torch.tensor([[0.5, 0.25, 0.25, 0.0]]), 0.5).sum() == 1  # the mass to the digit
    maps = torch.rand(50, 6, 7)
    kept, total = visualize.keep_mass(maps), maps.sum((1, 2))
    assert ((maps * kept).sum((1, 2)) >= 0.6 * total).all() and ((maps * kept).sum((1, 2)) - maps.where(kept, 2.0).amin((1, 2)) < 0.6 * total).all()


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("top, left", [(48, 8), (480, 312), (0, 300)])
def test_a_bright_square_is_found_where_it_is(smooth, top, left):
    """The last of its places reaches the edge of an image whose sides the patch does not divide."""
    image = square(517, 333, top, left, 40)
    maps, covered = visualize.attend(bright(), image, 333)
    assert maps.shape == (2, 65, 42) and covered == (517 / 520, 333 / 336)
    heat = visualize.upsample(maps, covered, 517, 333, smooth)
    y, x = divmod(heat[0].argmax().item(), 333)
    inside = torch.zeros(517, 333, dtype=torch.bool)
    inside[top : top + 40, left : left + 40] = True
    assert inside[y, x] and heat[0][inside].mean() > 5 * heat[0][~inside].mean()
    assert heat[1].std() < 1e-6  # the second head does not look
    panels = visualize.panels(image, maps[:1], covered, 0.999, smooth)
    assert list(panels) == ["image", "head 1", "mean of heads", "mask"] and all(panel.shape == (517, 333, 3) for panel in panels.values())
    cut = panels["mask"][top + 10 : top + 30, left + 10 : min(left + 30, 333)]
    assert (cut == 255).all() and (panels["mask"] == visualize.OUTLINE).all(-1).any()
    assert torch.equal(panels["mask"][200:203, :5], torch.zeros(3, 5, 3, dtype=torch.uint8))
    light = panels["head 1"].float().mean(-1)
    assert light[inside].mean() > 3 * light[~inside].mean()


def test_blocks_are_the_map_itself_and_smooth_lies_between():
    maps = torch.rand(3, 4, 6)
    assert torch.equal(visualize.upsample(maps, (1.0, 1.0), 32, 48), maps.repeat_interleave(8, 1).repeat_interleave(8, 2))
    assert torch.equal(visualize.upsample(maps, (29 / 32, 43 / 48), 29, 43), maps.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :29, :43])
    smooth = visualize.upsample(maps, (1.0, 1.0), 4 * 9, 6 * 9, True)
    torch.testing.assert_close(smooth[:, 4::9, 4::9], maps)
    torch.testing.assert_close(smooth[:, 4, 5:40:9], (8 * maps[:, 0, :4] + maps[:, 0, 1:5]) / 9)


def test_nothing_is_distorted_or_cropped_on_the_way_to_the_network(monkeypatch):
    seen = []
    monkeypatch.setattr(visualize, "attention_maps", lambda backbone, images: seen.append(images) or torch.ones(1, 2, 5, 5))
    image = torch.randint(256, (3, 30, 21), dtype=torch.uint8)
    assert visualize.attend(bright(), image, 21)[1] == (30 / 32, 21 / 24)
    assert seen[0].shape == (1, 3, 32, 24)
    torch.testing.assert_close(seen[0][0, :, :30, :21], normalize(image[None].float() / 255)[0])
    torch.testing.assert_close(seen[0][0, :, 30:, 21:], seen[0][0, :, 29:30, 20:21].expand(3, 2, 3))


def test_a_figure_has_a_panel_for_each_head_and_a_row_for_each_size(checkpoint, tmp_path, rows):
    save(Shapes()[0], tmp_path / "a.png")
    drawn([checkpoint, tmp_path / "a.png", "--size", 16, 40])
    assert [list(row) for row in rows[0]] == [[f"seen at {n} pixels", *(f"head {i}" for i in (1, 2, 3, 4)), "mean of heads", "mask"] for n in (16, 40)]
    assert not torch.equal(rows[0][0]["head 1"], rows[0][1]["head 1"])


def test_a_png_of_333_by_517_comes_back_at_its_size(checkpoint, tmp_path, capsys):
    Image.effect_noise((333, 517), 90).convert("RGB").save(tmp_path / "a.png")
    Image.effect_noise((333, 517), 90).save(tmp_path / "a.jpg")
    drawn([checkpoint, tmp_path / "a.png", tmp_path / "a.jpg", "--panels", "--output", tmp_path / "out", "--size", 60])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    ends = ["", "_image", "_head_1", "_head_2", "_head_3", "_head_4", "_mean_of_heads", "_mask"]
    assert names == {f"a_attention{again}{end}.png" for end in ends for again in ("", "_")}
    for end in ends[1:]:
        assert Image.open(tmp_path / "out" / f"a_attention{end}.png").size == (333, 517)
    assert to_tensor(Image.open(tmp_path / "out" / "a_attention_image.png")).equal(to_tensor(Image.open(tmp_path / "a.png")))
    assert f"a.png -> {tmp_path / 'out' / 'a_attention.png'}" in capsys.readouterr().out


def test_a_folders_pictures_lie_beside_it_not_in_it(checkpoint, tmp_path, rows, capsys):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("10.png", "2.png", "sub/3.png"):
        save(Shapes()[0], tmp_path / "in" / name)
    (tmp_path / "in" / "bad.jpg").write_text("no image")
    drawn([checkpoint, tmp_path / "in"])
    out, err = capsys.readouterr()
    assert [line.split("/")[-1] for line in out.splitlines()[1:]] == ["2_attention.png", "10_attention.png", "3_attention.png"]
    assert f"{tmp_path}/in_attention/sub/3_attention.png" in out and f"cannot read '{tmp_path / 'in' / 'bad.jpg'}': left out" in err and len(rows) == 3


@pytest.mark.parametrize("kind", ["gif", "webp", "folder"])
def test_a_film_keeps_its_length_its_times_and_what_moves(tmp_path, monkeypatch, kind):
    """A bright square moves to the right; so do the map and the mask."""
    pictures = [Image.fromarray(square(32, 64, 8, 8 * i, 8).permute(1, 2, 0).numpy()) for i in range(8)]
    source, durations = tmp_path / f"film.{kind}", [40 + 20 * i for i in range(8)]
    if kind == "folder":
        source, durations = tmp_path / "film", [200] * 8
        source.mkdir()
        for i, picture in enumerate(pictures):
            picture.save(source / f"{i + 5}.png")  # 10.png comes after 9.png
    else:
        pictures[0].save(source, save_all=True, append_images=pictures[1:], duration=durations, lossless=True)
    monkeypatch.setattr(visualize, "load_backbone", lambda *args: (bright(), {}))
    drawn(["any", source, "--size", 32, "--mass", 0.5, "--fps", 5])
    with Image.open(tmp_path / "film_attention.gif") as film:
        assert film.n_frames == 8 and film.size == (3 * 64, 32) and film.info["loop"] == 0
        for i, frame in enumerate(ImageSequence.Iterator(film)):
            assert frame.info["duration"] == durations[i]
            image, mean, mask = to_tensor(frame.copy()).float().mean(0).split(64, 1)
            for part in (image, mask):
                assert part[8:16, 8 * i : 8 * i + 8].min() > 240
            light = mean.unfold(0, 8, 8).unfold(1, 8, 8).mean((-1, -2))
            assert divmod(light.argmax().item(), 8) == (1, i)


def test_a_film_is_written_frame_by_frame(tmp_path, monkeypatch):
    made, alive, real = [], [], Image.Image.quantize

    def quantize(picture):
        result = real(picture)
        made.append(weakref.ref(result))
        alive.append(sum(one() is not None for one in made))
        return result

    monkeypatch.setattr(Image.Image, "quantize", quantize)
    visualize.write_gif(((Image.effect_noise((30, 20), 50).convert("RGB"), 40) for _ in range(50)), tmp_path / "a.gif")
    assert len(alive) == 50 and max(alive) <= 2
    assert Image.open(tmp_path / "a.gif").n_frames == 50


def test_a_film_that_is_cut_short_ends_where_it_is_cut(checkpoint, tmp_path, capsys):
    pictures = [Image.effect_noise((60, 40), 90) for _ in range(6)]
    pictures[0].save(tmp_path / "film.gif", save_all=True, append_images=pictures[1:], duration=40)
    content = (tmp_path / "film.gif").read_bytes()
    (tmp_path / "film.gif").write_bytes(content[: len(content) * 2 // 3])
    drawn([checkpoint, tmp_path / "film.gif", "--size", 16])
    assert 2 <= Image.open(tmp_path / "film_attention.gif").n_frames <= 5


def axes_of(draw, monkeypatch, path):
    """The axes of what draw() saves, {title: axis}."""
    figures, real = [], visualize.Figure
    monkeypatch.setattr(visualize, "Figure", lambda *args, **flags: figures.append(real(*args, **flags)) or figures[-1])
    draw()
    assert Image.open(path).size[0] > 500 and path.stat().st_size < 500_000
    return {axis.get_title(): axis for axis in figures[0].axes}


def test_curves_show_what_the_log_says(tmp_path, monkeypatch):
    names = "loss entropy mean_entropy kl lr weight_decay momentum teacher_temp".split()
    lines = [{"step": i, "epoch": i / 5} | {name: i + 10 * j for j, name in enumerate(names)} for i in range(1, 31)]
    lines[10:10] = [{"step": 10, "epoch": 2, "knn": 40.0, "knn_student": 35.0}]
    lines.insert(0, {"step": 0, "epoch": 0, "knn": 30.0})  # of a run from before the student's was logged
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 31, "ep')
    (tmp_path / "config.json").write_text('{"out_dim": 64}')
    axes = axes_of(lambda: drawn([tmp_path]), monkeypatch, tmp_path / "curves.png")
    assert len(axes) == 8
    data = {title: [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()] for title, axis in axes.items()}
    for title, curve in zip(("loss", "KL(teacher, student), nats", "learning rate", "weight decay", "momentum of the teacher", "temperature of the teacher"), (0, 3, 4, 5, 6, 7)):
        assert data[title][0][1:] == ([i / 5 for i in range(1, 31)], [i + 10 * curve for i in range(1, 31)])
    entropy = data["entropy of the teacher, nats"]
    assert entropy[0][2][0] == 11 and entropy[1][2][0] == 21 and entropy[2][2] == [math.log(64)] * 2 and entropy[3][2] == [0, 0]
    assert data["k-NN top-1, %"] == [("teacher", [0, 2], [30.0, 40.0]), ("student", [2], [35.0])]


def test_training_keeps_attention_at_log_spaced_steps_through_a_resume_and_draws_it(tmp_path, rows):
    def go(name, *steps):
        for last in steps:
            flags = "--steps", last, "--epochs", 3, "--out_dim", 16, "--knn_every", 1, "--output", tmp_path / name
            train.main(train.parse_args([*TINY, "--data", str(tmp_path / "in"), *map(str, flags)]))
        return torch.load(tmp_path / name / "last.pth", weights_only=True)["attention"]

    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "b").mkdir()
    for i in range(20):
        save(Shapes()[i], tmp_path / "in" / "ab"[i % 2] / f"{i}.png")
    whole, resumed = go("whole", 11), go("resumed", 5, 11)
    assert list(whole) == list(resumed) == [0, 1, 2, 4, 8]
    for step in whole:
        for (maps, covered), (others, _) in zip(whole[step], resumed[step], strict=True):
            assert torch.equal(maps, others) and maps.shape == (4, 4, 4) and covered == (1, 1)
    assert not torch.equal(whole[0][0][0], whole[8][0][0])
    strip = rows[1]  # after attention.png of the first run
    assert len(strip) == 4 and list(strip[0]) == ["image", "before training", *(f"step {i}" for i in (1, 2, 4, 8, 11))]
    maps, covered = whole[8][2]
    image = visualize.shown(train.some_images(train.load(str(tmp_path / "in")))[2])
    assert torch.equal(strip[2]["step 8"], visualize.overlay(image, visualize.upsample(maps.mean(0, keepdim=True), covered, *image.shape[1:])[0]))
    tests = [line for line in run.read_log(tmp_path / "whole" / "log.jsonl") if "knn" in line]
    assert [line["step"] for line in tests] == [0, 5, 10] and tests[0]["knn"] == tests[0]["knn_student"] and all("knn_student" in line for line in tests)
    assert (tmp_path / "whole" / "curves.png").exists()


def test_the_pictures_are_small_whole_and_have_their_panels(tmp_path, monkeypatch):
    images = [Shapes()[i] for i in range(3)] + [Shapes()[3][:, :20], Shapes()[4][:, :, :1], Shapes()[5][:, :1]]
    backbone, path = build_backbone("vit_base", 16, 32).eval(), tmp_path / "a.png"
    axes = axes_of(lambda: visualize.draw_attention(backbone, images[:2], path), monkeypatch, path)
    assert set(axes) == {"image", *(f"head {i}" for i in range(1, 13)), "mean of heads", "mask", ""}  # twelve heads: two lines a row, the last place empty
    visualize.draw_attention(build_backbone("vit_micro", 8, 32).eval(), images, path)
    assert path.stat().st_size < 500_000


def test_a_film_strip_of_many_steps_keeps_the_first_and_the_last(tmp_path, rows):
    kept = {step: [(torch.rand(2, 4, 4), (1.0, 1.0))] for step in (0, *(2**i for i in range(10)), 1000)}
    visualize.draw_emergence([Shapes()[0]], kept, tmp_path / "a.png")
    assert list(rows[0][0]) == ["image", "before training", *(f"step {i}" for i in (16, 32, 64, 128, 256, 512, 1000))]


def test_a_strip_among_the_watched_images_does_not_end_a_training():
    few = train.some_images([torch.zeros(3, 1, 90_000, dtype=torch.uint8), torch.zeros(3, 500, 2, dtype=torch.uint8), Shapes()[0]])
    assert [tuple(image.shape[1:]) for image in few] == [(1, 3), (6, 2), (64, 64)]


def test_a_convnet_has_no_attention(tmp_path):
    torch.save(resnet50().state_dict(), tmp_path / "r.pth")
    with pytest.raises(ValueError, match="convnet has no attention"):
        drawn([tmp_path / "r.pth", "a.png"])


def test_drawing_needs_no_display():
    assert "matplotlib.pyplot" not in sys.modules
