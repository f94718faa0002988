"""The cross-entropy between views, with centring and sharpening of the teacher (section 3.1, Eq. 1-4).

Student logits [v, b, k] and teacher logits [t, b, k] go in; the first t of the v views are the teacher's. All of it is float32, whatever the precision of
the networks. Eq. 3 sums over the pairs of different views; like the reference code we take the mean, so that ln K means "knows nothing" for any number of crops.
"""

import torch
import torch.distributed as dist
from einops import reduce


def teacher_probabilities(teacher, center, teacher_temp):
    """Eq. 1 for the teacher: P_t = softmax((g_t - C) / tau_t), [t, b, k]. Centring fights one winning output, the low tau_t the uniform one."""
    return ((teacher.detach().float() - center) / teacher_temp).softmax(-1)


def dino_loss(student, teacher, center, student_temp, teacher_temp):
    """Eq. 3: the mean of H(P_t(x), P_s(x')) over a teacher view x, a student view x' != x, and the batch. No gradient reaches the teacher.

    The cross-entropy -<q, log P_s> is linear in q, so a student view's targets are summed over the teacher views that it faces: one log-softmax a view, not one a pair.
    """
    with torch.autocast(student.device.type, enabled=False):
        q = teacher_probabilities(teacher, center, teacher_temp)
        everyone, cross = q.sum(0), 0.0
        for v, logits in enumerate(student.unbind()):
            target = everyone - q[v] if v < len(q) else everyone
            cross = cross - (target * (logits.float() / student_temp).log_softmax(-1)).sum()
        return cross / (q.shape[0] * q.shape[1] * (len(student) - 1))


def batch_center(teacher):
    """[k]: the mean of the teacher's logits over the batch, its views and all processes; the last term of Eq. 4."""
    mean = reduce(teacher.detach().float(), "t b k -> k", "mean")
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean


def update_center(center, mean, center_momentum):
    """Eq. 4, in place: c <- m c + (1 - m) mean."""
    center.lerp_(mean, 1 - center_momentum)


def teacher_temp_at(epoch, start, end, warmup_epochs):
    """tau_t at a (fractional) epoch: linear from start to end over the warm-up, then constant (section 3.2: 0.04 -> 0.07 over 30)."""
    return end if epoch >= warmup_epochs else start + (end - start) * epoch / warmup_epochs


def entropies(teacher, center, teacher_temp):
    """[2], to watch, in nats: the mean entropy of P_t, and the entropy of its mean over the batch (this process's).

    Collapse to one output sends both to 0; collapse to the uniform output sends both to ln K, with KL(P_t, P_s) = loss - entropy near 0 (Figure 7).
    """
    q = teacher_probabilities(teacher, center, teacher_temp)
    return torch.stack([torch.special.entr(q).sum(-1).mean(), torch.special.entr(reduce(q, "t b k -> k", "mean")).sum()])
