"""The loss: cross-entropy between views, teacher centred and sharpened (Eq. 1-4; tour, stop 5).

Student logits [v, b, k] and teacher logits [t, b, k] come in; the teacher sees the first t = 2 of
the v views. Everything is float32, whatever the precision of the networks. Eq. 3 is a sum over
pairs of views; like the reference code we take the mean, so that ln K means "knows nothing".
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import reduce


def teacher_probabilities(teacher, center, teacher_temp):
    """Eq. 1 for the teacher, centred: P_t = softmax((g_t - C) / tau_t), [t, b, k].

    Centring keeps one output from winning everywhere; the low tau_t sharpens, against the uniform
    output. As in Algorithm 1, C is subtracted; section 3.1 adds it. No gradient reaches g_t.
    """
    return F.softmax((teacher.detach().float() - center) / teacher_temp, dim=-1)


def sinkhorn(teacher, teacher_temp, rounds=3):
    """Sinkhorn-Knopp in the centre's place (Table 7), over the views of all processes: P_t.

    Each round brings all outputs' sums over the (micro-)batch to the same, then each view's to 1.
    It is done on logarithms, where no factor overflows. No gradient reaches the teacher.
    """
    logits = teacher.detach().float() / teacher_temp
    for _ in range(rounds):
        total = logits.logsumexp((0, 1))
        if dist.is_initialized():
            totals = total.new_empty(dist.get_world_size(), len(total))
            dist.all_gather(list(totals), total)  # each fills a row
            total = totals.logsumexp(0)
        logits = F.log_softmax(logits - total, dim=-1)
    return logits.exp()


def dino_loss(student, p_t, student_temp):
    """Eq. 3: the mean over pairs of different views of H(P_t(x), P_s(x')), and over the batch.

    p_t [t, b, k]; H(a, b) = -sum_k a_k log b_k, Eq. 2. Returns a scalar, in nats.
    """
    log_p_s = F.log_softmax(student.float() / student_temp, dim=-1)  # Eq. 1 for the student
    total = 0.0
    for i, p in enumerate(p_t.unbind()):
        # Eq. 2 with each of the student's views, [v]; the same view of the image is skipped
        cross_entropies = -(p * log_p_s).sum(-1).mean(-1)
        total = total + cross_entropies.sum() - cross_entropies[i]
    return total / (len(p_t) * (len(student) - 1))


def batch_center(teacher):
    """Return the mean of the teacher's logits over views, batch and processes, [k] (in Eq. 4)."""
    mean = reduce(teacher.detach().float(), "t b k -> k", "mean")
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean


def update_center(center, mean, center_momentum):
    """Eq. 4, in place: C <- m C + (1 - m) mean."""
    center.mul_(center_momentum).add_(mean, alpha=1 - center_momentum)


def entropies(p_t):
    """Return, in nats, P_t's mean entropy and the entropy of its mean over the batch, [2].

    Collapse to one output sends both to 0, collapse to the uniform output both to ln K; in either,
    KL(P_t, P_s) = Eq. 3 - entropy goes to 0 (Figure 7). The mean is this process's own.
    """
    mean = reduce(p_t, "t b k -> k", "mean")
    return torch.stack([torch.special.entr(p_t).sum(-1).mean(), torch.special.entr(mean).sum()])
