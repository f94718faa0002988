import pytest
import torch

from data import Shapes
from evaluate import features, knn, some
from vit import build_backbone


def loop(bank, bank_labels, queries, labels, k, leave_one_out=False):
    """Weighted k-NN, one query at a time, in float64."""
    right = 0
    for i, (query, label) in enumerate(zip(queries.double(), labels.tolist())):
        similar = [(torch.dot(query, b) / query.norm() / b.norm()).item() for b in bank.double()]
        order = sorted((j for j in range(len(bank)) if not (leave_one_out and i == j)), key=lambda j: -similar[j])[:k]
        votes = {}
        for j in order:
            votes[bank_labels[j].item()] = votes.get(bank_labels[j].item(), 0) + torch.tensor(similar[j] / 0.07).double().exp().item()
        right += max(votes, key=lambda c: (votes[c], -c)) == label
    return 100 * right / len(queries)


@pytest.mark.parametrize("n, m, classes", [(50, 1, 3), (50, 37, 3), (7, 37, 3), (230, 60, 12)])
def test_knn_is_the_loop(n, m, classes):
    bank_labels, labels = torch.randint(classes, (n,)), torch.randint(classes, (m,))
    centers = torch.randn(classes, 8)
    bank, queries = centers[bank_labels] + torch.randn(n, 8), centers[labels] + torch.randn(m, 8)
    got = knn(bank, bank_labels, queries, labels)
    assert list(got) == [10, 20, 100, 200]
    for k, top1 in got.items():
        assert top1 == pytest.approx(loop(bank, bank_labels, queries, labels, k))
    alone = knn(bank, bank_labels, bank, bank_labels, (5,), leave_one_out=True)
    assert alone[5] == pytest.approx(loop(bank, bank_labels, bank, bank_labels, 5, leave_one_out=True))


def test_features_skip_what_cannot_be_read(capsys):
    class Torn(Shapes):
        def __getitem__(self, i):
            if i == 3:
                raise OSError("torn")
            return super().__getitem__(i)

    backbone = build_backbone("vit_micro", 8, 16).eval()
    tokens, read = features(backbone, Torn("val"), [1, 3, 5], torch.device("cpu"))
    whole, _ = features(backbone, Shapes("val"), [5, 1], torch.device("cpu"))
    assert read == [1, 5] and tokens.shape == (2, backbone.dim)
    torch.testing.assert_close(tokens, whole.flip(0))
    assert "1 images cannot be read and are left out, the first 'blue disc 3'" in capsys.readouterr().err


def test_a_part_of_the_images_has_every_class():
    labels = [i % 10 for i in range(10_000)]
    chosen = some(labels, 1000)
    assert len(set(chosen)) == 1000 and chosen == some(labels, 1000)
    assert min([labels[i] for i in chosen].count(c) for c in range(10)) > 70
    assert some([0, -1, 1], 5) == [0, 2]
