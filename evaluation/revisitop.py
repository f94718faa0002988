"""Image retrieval on the revisited Oxford and Paris benchmarks (section 4.2.1, Table 3).

    python evaluate.py oxford CKPT --data DATA      DATA/roxford5k/{jpg/, gnd_roxford5k.pkl}
    python evaluate.py paris  CKPT --data DATA      DATA/rparis6k/{jpg/, gnd_rparis6k.pkl}

An image is shrunk to 224 pixels on its long side, and its class token is compared by cosine
similarity. Medium: easy and hard images count, junk is taken out of the ranking. Hard: hard images
count, easy ones and junk are taken out. A query is not cropped to its box.
"""

import pickle
from dataclasses import replace
from pathlib import Path

from evaluation.features import add_extraction_flags, extract_features, extraction, shrink
from evaluation.ranking import average_precision, precision_at, rankings, ranks_of
from util.data import Files
from util.distributed import rank0_first
from util.misc import say

BENCHMARKS = {"oxford": "roxford5k", "paris": "rparis6k"}
SCALES = (1.0, 2**-0.5, 0.5)  # --multiscale
PLAIN = {  # what builds numpy's arrays and numbers; numpy 2 renamed its modules
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


class PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings, numbers and numpy's arrays, and nothing that could run code."""

    def find_class(self, module, name):
        if (module, name) not in PLAIN:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is never loaded")
        return super().find_class(module, name)


def read_ground_truth(path):
    """Return a benchmark's {"imlist": [...], "qimlist": [...], "gnd": [...]}.

    ValueError: the file is missing, of another kind, or holds code.
    """
    try:
        with open(path, "rb") as file:
            truth = PlainUnpickler(file, encoding="latin1").load()
        images, queries, answers = truth["imlist"], truth["qimlist"], truth["gnd"]
        if len(queries) != len(answers):
            raise ValueError("as many queries as answers are needed")
        for answer in answers:
            for kind in ("easy", "hard", "junk"):
                answer[kind] = [int(i) for i in answer[kind]]
                if not all(0 <= i < len(images) for i in answer[kind]):
                    raise ValueError(f"an index outside its {len(images)} images")
    except Exception as error:  # a foreign file may be wrong in any way
        reason = str(error) or type(error).__name__
        raise ValueError(f"cannot read the ground truth {str(path)!r}: {reason}") from None
    return truth


def open_benchmark(data, name):
    """Return (ground truth, database images, query images). ValueError: something is missing."""
    folder = Path(data)
    if (folder / name).is_dir():
        folder = folder / name
    truth = read_ground_truth(folder / f"gnd_{name}.pkl")
    database, queries = ([f"{name}.jpg" for name in truth[key]] for key in ("imlist", "qimlist"))
    missing = [path for path in database + queries if not (folder / "jpg" / path).exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} images of the ground truth are not in {str(folder / 'jpg')!r}, "
            f"the first of them {', '.join(missing[:3])}"
        )
    return truth, Files(folder / "jpg", database), Files(folder / "jpg", queries)


def measure(orders, truth):
    """Return {"medium": figures, "hard": figures}: mAP and mean precision at 1, 5, 10, in per cent.

    orders: for each query all images, the nearest first. A query without a positive is left out.
    """
    rows = {"medium": [], "hard": []}
    for order, query in zip(orders, truth["gnd"]):
        easy, hard, junk = query["easy"], query["hard"], query["junk"]
        for name, positives, left_out in (
            ("medium", easy + hard, junk),
            ("hard", hard, junk + easy),
        ):
            if positives:
                ranks = ranks_of(order, positives, left_out)
                at = [precision_at(ranks, k) for k in (1, 5, 10)]
                rows[name].append([average_precision(ranks), *at])
    figures = {}
    for name, values in rows.items():
        if not values:
            raise ValueError(f"no query of the ground truth has a positive ({name})")
        figures[name] = [100 * sum(column) / len(values) for column in zip(*values)]
    return figures


def add_flags(parser, command):
    add_extraction_flags(parser, "long side in pixels, at most (the paper's: 224)", 224)
    parser.add_argument("--multiscale", action="store_true",
                        help="mean over three sizes: 1, 1/sqrt 2, 1/2")  # fmt: skip


def evaluate(args, subject):
    """Print the benchmark's table, and return its figures."""
    name = BENCHMARKS[args.command]
    truth, database, queries = rank0_first(lambda: open_benchmark(subject.data, name))
    scales = SCALES if args.multiscale else (1.0,)
    how = extraction(args, subject, fit=shrink, scales=scales)
    how = replace(how, batch_size=1)  # images of many shapes: one at a time
    features = []
    for images in (database, queries):
        x, read = extract_features(subject.backbone, images, how)
        if len(read) < len(images):
            raise ValueError("the benchmark needs all of its images: mend what is named above")
        features.append(x)
    figures = measure(rankings(features[1], features[0]), truth)
    say(f"{subject.data}: {len(queries)} queries, {len(database)} images, in %")
    say(f"{'':8}     mAP    mP@1    mP@5   mP@10")
    for difficulty, row in figures.items():
        say(f"{difficulty:8}" + "".join(f"{value:8.1f}" for value in row))
    settings = {"multiscale": args.multiscale, "dtype": str(how.dtype)}
    return settings | figures
