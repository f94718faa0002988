"""The loss against a double loop written from Eq. 1-4."""

import math
import os
import subprocess
import sys

import pytest
import torch

from loss import (
    batch_center,
    dino_loss,
    entropies,
    sinkhorn,
    teacher_probabilities,
    update_center,
)


def double_loop(student, teacher, center, student_temp, teacher_temp):
    total, pairs = 0.0, 0
    for i, t in enumerate(teacher.double()):
        p_t = torch.softmax((t - center.double()) / teacher_temp, -1)
        for j, s in enumerate(student.double()):
            if i != j:
                p_s = torch.softmax(s / student_temp, -1)
                total = total - (p_t * torch.log(p_s)).sum(-1).mean()
                pairs += 1
    return total / pairs


def centred_loss(student, teacher, center, student_temp, teacher_temp):
    p_t = teacher_probabilities(teacher, center, teacher_temp)
    return dino_loss(student, p_t, student_temp)


@pytest.mark.parametrize("v, t, b, k", [(2, 2, 3, 7), (10, 2, 4, 33), (3, 2, 1, 5), (5, 3, 2, 8)])
@pytest.mark.parametrize("student_temp, teacher_temp", [(0.1, 0.04), (0.2, 0.07)])
def test_loss_and_gradient_are_the_double_loops(v, t, b, k, student_temp, teacher_temp):
    student, teacher = torch.randn(v, b, k, requires_grad=True), torch.randn(t, b, k)
    rest = teacher, torch.randn(k), student_temp, teacher_temp
    loss, expected = centred_loss(student, *rest), double_loop(student, *rest)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, student)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_shifting_logits_and_center_together_changes_nothing():
    student, teacher, center, shift = (
        torch.randn(4, 3, 9),
        torch.randn(2, 3, 9),
        torch.randn(9),
        torch.randn(9),
    )
    torch.testing.assert_close(
        centred_loss(student, teacher + shift, center + shift, 0.1, 0.04),
        centred_loss(student, teacher, center, 0.1, 0.04),
    )


def test_same_view_pairs_do_not_count():
    """With two views, what the student says of one meets only what the teacher says of the other.

    A student that agrees with the teacher on the same view alone gains nothing.
    """
    teacher = torch.tensor([[[9.0, 0, 0]], [[0, 9.0, 0]]])
    loss = centred_loss(teacher.flip(0), teacher, torch.zeros(3), 0.1, 0.1)
    assert loss < 1e-3 and centred_loss(teacher, teacher, torch.zeros(3), 0.1, 0.1) > 50


def test_no_gradient_reaches_the_teacher():
    student, teacher = (
        torch.randn(4, 3, 9, requires_grad=True),
        torch.randn(2, 3, 9, requires_grad=True),
    )
    centred_loss(student, teacher, torch.zeros(9), 0.1, 0.04).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert not sinkhorn(teacher, 0.04).requires_grad
    assert not batch_center(teacher).requires_grad


def test_half_precision_logits_lose_nothing_in_the_loss():
    student, teacher = torch.randn(4, 3, 9).bfloat16(), torch.randn(2, 3, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = centred_loss(student, teacher, torch.zeros(9), 0.1, 0.04)
    torch.testing.assert_close(
        loss.double(),
        double_loop(student, teacher, torch.zeros(9), 0.1, 0.04),
        rtol=1e-5,
        atol=1e-6,
    )


def test_center_is_a_moving_average_of_the_teachers_mean():
    center, teacher = (
        torch.tensor([1.0, 2.0]),
        torch.tensor([[[1.0, 4.0], [3.0, 0.0]], [[5.0, 2.0], [7.0, -2.0]]]),
    )
    update_center(center, batch_center(teacher), 0.9)
    torch.testing.assert_close(center, torch.tensor([0.9 * 1 + 0.1 * 4, 0.9 * 2 + 0.1 * 1]))


def test_entropies_tell_both_collapses():
    k = 16
    uniform, one = torch.zeros(2, 5, k), torch.zeros(2, 5, k)
    one[..., 3] = 100
    apart = torch.zeros(2, 4, k)
    apart[:, range(4), range(4)] = 100
    for logits, expected in (
        (uniform, (math.log(k), math.log(k))),
        (one, (0, 0)),
        (apart, (0, math.log(4))),
    ):
        p_t = teacher_probabilities(logits, torch.zeros(k), 0.04)
        assert entropies(p_t).tolist() == pytest.approx(expected, abs=1e-5)


def plain_sinkhorn(logits):
    """Three rounds on the matrix itself, in float64: [n, k], rows that sum to 1."""
    q = torch.exp(logits.double() - logits.max())
    n, k = q.shape
    for _ in range(3):
        for j in range(k):
            q[:, j] /= q[:, j].sum() * k
        for i in range(n):
            q[i] /= q[i].sum() * n
    return q * n


def test_sinkhorn_is_the_plain_rewriting():
    logits = torch.randn(2, 12, 7)
    got = sinkhorn(logits, 0.1)
    wanted = plain_sinkhorn((logits / 0.1).flatten(0, 1))
    torch.testing.assert_close(got.flatten(0, 1).double(), wanted, rtol=1e-4, atol=1e-6)
    balanced = sinkhorn(logits, 1, rounds=100)
    torch.testing.assert_close(balanced.sum(-1), torch.ones(2, 12), rtol=1e-4, atol=0)
    torch.testing.assert_close(balanced.sum((0, 1)), torch.full((7,), 24 / 7), rtol=1e-4, atol=0)
    assert sinkhorn(1000 * logits, 1).isfinite().all()


def test_sinkhorn_in_the_centres_place():
    student, teacher = torch.randn(4, 3, 9), torch.randn(2, 3, 9)
    p_t = plain_sinkhorn((teacher / 0.04).flatten(0, 1)).view(2, 3, 9)
    log_p_s = (student.double() / 0.1).log_softmax(-1)
    pairs = [-(p_t[i] * log_p_s[j]).sum(-1).mean() for i in (0, 1) for j in range(4) if i != j]
    loss = dino_loss(student, sinkhorn(teacher, 0.04), 0.1)
    torch.testing.assert_close(loss.double(), sum(pairs) / len(pairs), rtol=1e-4, atol=1e-6)


PROCESSES = """
import sys, torch, torch.distributed as dist
from loss import batch_center, sinkhorn
rank, meet = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=2)
whole = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
share = slice(4 * rank, 4 * rank + 4)
part, mean = sinkhorn(whole[:, share], 0.1), batch_center(whole[:, share])
dist.destroy_process_group()
torch.testing.assert_close(mean, batch_center(whole))
torch.testing.assert_close(part, sinkhorn(whole, 0.1)[:, share], rtol=1e-4, atol=1e-6)
alone = sinkhorn(whole[:, share], 0.1)
assert (part - alone).abs().max() > 1e-3
"""


def test_two_processes_balance_their_batches_and_center_them_together(tmp_path):
    command = [sys.executable, "-c", PROCESSES]
    how = dict(env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    children = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], **how) for rank in (0, 1)
    ]
    try:
        for child in children:
            _, said = child.communicate(timeout=600)
            assert child.returncode == 0, said
    finally:
        for child in children:
            child.kill()
