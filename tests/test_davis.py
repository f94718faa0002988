"""J and F against a plain rewriting, and the benchmark's layout, list and figures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import evaluate
from conftest import backbone_of
from evaluation import davis
from evaluation.masks import voc_palette, write_mask
from evaluation.video import carry_mask
from tests import textbook
from util.checkpoint import load_backbone
from util.shapes import ShapesFilm


def boxes(*places, h=30, w=40):
    """A mask with object i + 1 in the i-th box (top, bottom, left, right)."""
    mask = torch.zeros(h, w, dtype=torch.uint8)
    for i, (top, bottom, left, right) in enumerate(places):
        mask[top:bottom, left:right] = i + 1
    return mask


def with_void(mask, top, bottom, left, right):
    mask = mask.clone()
    mask[top:bottom, left:right] = 255
    return mask


EMPTY, BOX = boxes(), boxes((5, 15, 8, 20))
PAIRS = [  # result, truth
    (BOX, BOX),
    (boxes((6, 17, 5, 21)), BOX),
    (EMPTY, EMPTY),
    (EMPTY, BOX),
    (BOX, EMPTY),
    (boxes((5, 6, 8, 9)), boxes((5, 6, 8, 9))),  # one pixel
    (boxes((5, 6, 8, 9)), boxes((6, 7, 8, 9))),
    (boxes((29, 30, 39, 40)), boxes((29, 30, 39, 40))),  # in the last corner
    (boxes((0, 30, 0, 40)), BOX),  # everywhere
    (boxes((0, 10, 30, 40)), boxes((0, 12, 28, 40))),  # at the border
    (boxes((20, 30, 0, 12)), boxes((18, 30, 0, 10))),
    (BOX, with_void(BOX, 5, 10, 0, 40)),
    (BOX, with_void(EMPTY, 0, 30, 0, 40)),  # nothing but void
    (boxes((2, 9, 3, 30)), with_void(boxes((3, 9, 3, 28)), 4, 6, 20, 30)),
]


@pytest.mark.parametrize("number", range(len(PAIRS)))
def test_j_and_f_are_the_plain_rewritings(number):
    result, truth = PAIRS[number]
    got = davis.compare(result, truth, [1])[0]
    lists = [(mask == value).tolist() for mask, value in ((result, 1), (truth, 1), (truth, 255))]
    wanted = torch.tensor(textbook.region_and_contour(*lists), dtype=torch.double)
    assert (got - wanted).abs().max() < 1e-9


def test_j_and_f_of_random_masks_of_three_objects():
    """Large enough for a tolerance of two pixels; the third object is absent from the truth."""
    coarse = torch.randint(4, (2, 16, 22), dtype=torch.uint8)
    result, truth = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    result, truth = result[:126, :173].contiguous(), truth[:126, :173].contiguous()
    truth[truth == 3] = 255
    got = davis.compare(result, truth, [1, 2, 3])
    for number, row in zip((1, 2, 3), got):
        lists = [(result == number).tolist(), (truth == number).tolist(), (truth == 255).tolist()]
        wanted = torch.tensor(textbook.region_and_contour(*lists), dtype=torch.double)
        assert (row - wanted).abs().max() < 1e-9


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 8, 48, 58])
def test_mean_recall_and_decay(frames):
    values = torch.rand(frames, 3, 2, dtype=torch.double)
    got = davis.summarize(values).numpy()
    cuts = (np.round(np.linspace(1, frames, 5) + 1e-10) - 1).astype(int)
    for o in range(3):
        for m in range(2):
            one = values[:, o, m].numpy()
            first, last = one[cuts[0] : cuts[1] + 1], one[cuts[3] : cuts[4] + 1]
            wanted = one.mean(), (one > 0.5).mean(), first.mean() - last.mean()
            assert np.abs(got[o, m] - wanted).max() < 1e-12


def test_the_first_and_the_last_frame_do_not_count():
    film = ShapesFilm(1, length=6)
    masks = [film.mask(t) for t in range(6)]
    assert torch.equal(davis.score(film, masks)[:, :, 0], torch.ones(2, 2, dtype=torch.double))
    masks[0] = masks[5] = torch.zeros_like(masks[0])
    assert torch.equal(davis.score(film, masks)[:, :, 0], torch.ones(2, 2, dtype=torch.double))
    masks[4] = torch.zeros_like(masks[0])
    assert (davis.score(film, masks)[:, :, 0] < 0.9).all()


# ---- sequences ----

KINDS = "JPEGImages", "Annotations"


@pytest.fixture
def dataset(tmp_path):
    """Two sequences of five frames in DAVIS's layout, one with two objects, and a checkpoint."""
    root = tmp_path / "DAVIS"
    for film, name in enumerate(("cow", "two-dogs")):
        film = ShapesFilm(film, length=5, size=32)
        for kind in KINDS:
            (root / kind / "480p" / name).mkdir(parents=True)
        for t in range(5):
            to_pil_image(film[t]).save(root / "JPEGImages" / "480p" / name / f"{t:05}.jpg")
            path = root / "Annotations" / "480p" / name / f"{t:05}.png"
            write_mask(path, film.mask(t), voc_palette())
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("cow\ntwo-dogs\n")
    torch.save(backbone_of("vit_micro", 4, 16).state_dict(), tmp_path / "bare.pth")
    return tmp_path


def run(capsys, *flags):
    flags = [str(flag) for flag in flags]
    evaluate.main(evaluate.parse_args(["davis", *flags, "--device", "cpu"]))
    return capsys.readouterr().out.splitlines()


def test_the_figures_are_means_over_objects(dataset, capsys):
    """By hand: the mean over the three objects, not over the two sequences."""
    flags = "--data", dataset / "DAVIS", "--output", dataset, "--size", 32
    rows = run(capsys, dataset / "bare.pth", *flags)
    assert "2 sequences, 3 objects, 10 frames" in rows[1]
    assert [row.split()[-8] for row in rows[3:]] == 3 * ["copied", "trained"]
    line = json.loads((dataset / "evaluate.jsonl").read_text())
    assert (line["command"], line["sequences"], line["size"]) == ("davis", 2, 32)

    backbone, sequences = load_backbone(dataset / "bare.pth").backbone, []
    for name in ("cow", "two-dogs"):
        folders = (dataset / "DAVIS" / kind / "480p" / name for kind in KINDS)
        sequences.append(davis.Sequence(*folders))
    for i, method in enumerate(("copied", "trained")):
        by_hand = []
        for film, sequence in enumerate(sequences):
            masks = [sequence.mask(0)] * 5
            if method == "trained":
                masks = list(carry_mask(backbone, sequence, sequence.mask(0), 32))
            film = ShapesFilm(film, length=5, size=32)
            for number in film.numbers:
                of_frames = [davis.compare(masks[t], film.mask(t), [number])[0] for t in (1, 2, 3)]
                by_hand.append(torch.stack(of_frames).mean(0))
        mean = 100 * torch.stack(by_hand).mean(0)
        assert line[method]["J"] == pytest.approx(mean[0].item())
        assert line[method]["F"] == pytest.approx(mean[1].item())
        assert line[method]["J&F"] == pytest.approx(mean.mean().item())
        printed = [float(value) for value in rows[-2 + i].split()[-7:]]
        assert printed == pytest.approx(list(line[method].values()), abs=0.051)


def test_the_truth_as_a_result_is_perfect(dataset, capsys):
    def truth(sequence):
        return (sequence.mask(t) for t in range(len(sequence)))

    sequences = davis.open_sequences(dataset / "DAVIS")
    sums = 100 * davis.score_all(sequences, {"truth": truth})
    davis.say_rows("mean over objects", {"truth": truth}, sums.sum(0) / 3)
    perfect = "mean over objects truth 100.0 100.0 100.0 0.0 100.0 100.0 0.0"
    assert capsys.readouterr().out.split() == perfect.split()


def spoil(dataset, how):
    root = dataset / "DAVIS"
    frames, masks = root / "JPEGImages" / "480p" / "cow", root / "Annotations" / "480p" / "cow"
    if how == "no masks":
        masks.rename(root / "elsewhere")
    elif how == "no mask":
        (masks / "00002.png").unlink()
    elif how == "no object":
        write_mask(masks / "00000.png", boxes(h=32, w=32), voc_palette())
    elif how == "short":
        for t in (2, 3, 4):
            (frames / f"{t:05}.jpg").unlink()
    elif how == "sizes":
        Image.new("RGB", (40, 32)).save(frames / "00003.jpg")
    elif how == "mask sizes":
        write_mask(masks / "00003.png", boxes(h=16, w=16), voc_palette())
    elif how == "no list":
        (root / "ImageSets" / "2017" / "val.txt").unlink()
    elif how == "photograph":
        channels = [Image.effect_noise((32, 32), 90) for _ in "RGB"]
        Image.merge("RGB", channels).save(masks / "00000.png")


@pytest.mark.parametrize("how, message", [
    ("no masks", "sequence 'cow': no images below '.*cow'"),
    ("no mask", "sequence 'cow': '00002.jpg' has no mask"),
    ("no object", "sequence 'cow': its first mask shows no object"),
    ("short", "sequence 'cow': it has fewer than three frames"),
    ("sizes", "frame 4 is of 40 x 32 pixels, the first mask of 32 x 32"),
    ("mask sizes", "a mask of 32 x 32 pixels, the truth of 16 x 16"),
    ("no list", "not in DAVIS's layout"),
    ("photograph", "is no mask: neither a palette image nor a gray one"),
])  # fmt: skip
def test_bad_sequences_are_named(dataset, how, message, capsys):
    spoil(dataset, how)
    with pytest.raises(ValueError, match=message):
        run(capsys, dataset / "bare.pth", "--data", dataset / "DAVIS", "--size", 32)
    assert not (dataset / "evaluate.jsonl").exists()


# ---- the built-in films ----


def test_built_in_films_are_deterministic_and_move():
    film, same = ShapesFilm(1), ShapesFilm(1)
    assert len(film) == 24 and film.numbers == [1, 2] and ShapesFilm(0).numbers == [1]
    assert torch.equal(film[5], same[5]) and torch.equal(film.mask(5), same.mask(5))
    for t in (0, 9, 23):
        mask = film.mask(t)
        assert set(mask.unique().tolist()) <= {0, 1, 2} and 0.05 < (mask > 0).float().mean() < 0.4
        background = film[t][:, mask == 0]
        assert (background[0] == background[1]).float().mean() > 0.9  # noise without color
    assert (film.mask(0) != film.mask(12)).float().mean() > 0.05
