"""Masked KD: distil outputs and hidden states, leaving out extreme activations (paper, section 3.4)."""

import torch
from torch import nn

from pruning.patterns import check_groups, group_ends


def layer_pairs(student_depth, teacher_depth, groups=None):
    """Pairs (student layer, teacher layer): the ends of every group, in the pruned and in the full network.

    Without `groups` the teacher's depth must be a multiple of the student's. Raises ValueError when nothing fits.
    """
    if groups is None:
        if teacher_depth % student_depth:
            raise ValueError(
                f"{student_depth} student and {teacher_depth} teacher layers do not pair up evenly: give the pattern"
            )
        groups = [[1, teacher_depth // student_depth]] * student_depth
    check_groups(groups, teacher_depth)
    kept = sum(n for n, _ in groups)
    if kept != student_depth:
        raise ValueError(f"the pattern keeps {kept} of {teacher_depth} layers, but the student has {student_depth}")
    return list(zip(*group_ends(groups), strict=True))


def mask_extremes(hidden, k=2.0):
    """Hidden states (N, T, D) with every entry at least k standard deviations from its sample's mean set to zero."""
    flat = hidden.flatten(1)
    mean, std = flat.mean(1), flat.std(1)  # over tokens and channels together, unbiased
    shape = (-1, *[1] * (hidden.ndim - 1))
    return hidden.masked_fill((hidden - mean.view(shape)).abs() >= k * std.view(shape), 0.0)


def masked_feature_loss(student, teacher, k=2.0):
    """Mean squared difference (N,) of hidden states, each masked by its own statistics (paper, equation 9).

    The mean is over all entries; one that is masked on one side only is compared with zero.
    """
    return (mask_extremes(student, k) - mask_extremes(teacher, k)).square().flatten(1).mean(1)


class DistillStep(nn.Module):
    """One Masked KD step: alpha * output distillation + (1 - alpha) * original loss + beta * masked feature loss.

    `pairs` may be empty (no feature loss). The teacher stays out of the module tree: neither broadcast nor saved.
    """

    def __init__(self, net, teacher, objective, pairs, alpha=0.9, beta=1e-2, k=2.0):
        super().__init__()
        self.net, self.objective, self.pairs = net, objective, list(pairs)
        self.alpha, self.beta, self.k = alpha, beta, k
        self._teacher = (teacher.eval().requires_grad_(False),)

    def forward(self, x, y):
        """Latents x (N, C, H, W), labels y (N,) -> dict of per-sample terms (N,): loss, gt, kd_loss, feat_loss, ..."""
        draw = self.objective.draw(self.net, x, y)
        targets, losses = {}, []
        teacher_layers = {teacher: student for student, teacher in self.pairs}

        def keep_target(layer, before, after):
            if layer in teacher_layers:
                targets[teacher_layers[layer]] = after

        def compare(layer, before, after):
            if layer in targets:
                losses.append(masked_feature_loss(after, targets.pop(layer), self.k))

        with torch.no_grad():
            goal = self.objective.predict(self._teacher[0], x, y, draw, observe=keep_target)
        prediction = self.objective.predict(self.net, x, y, draw, observe=compare)
        terms = self.objective.loss(prediction, x, draw)
        gt = terms.pop("loss")
        terms |= self.objective.match(prediction, goal, x, draw)
        feat = torch.stack(losses).mean(0) if losses else torch.zeros_like(gt)
        loss = self.alpha * terms["kd_loss"] + (1 - self.alpha) * gt + self.beta * feat
        return {"loss": loss, "gt": gt, "feat_loss": feat, **terms}


def feature_weight(beta, epoch, epochs):
    """Weight of the feature loss: linear from `beta` in the first epoch to 0 in the last; `beta` in a single epoch."""
    return beta * (1 - epoch / (epochs - 1)) if epochs > 1 else beta
