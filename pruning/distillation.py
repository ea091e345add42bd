"""Masked KD: distil outputs and hidden states, leaving out extreme activations (paper, section 3.4)."""

from functools import cache

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from pruning.patterns import check_groups, group_ends


def even_groups(student, teacher):
    """Groups of equal size in every stack, given the layers of the student's stacks and of the teacher's.

    Raises ValueError unless the latter are multiples of the former.
    """
    groups = []
    for s, t in zip(student, teacher, strict=True):
        if t % s:
            raise ValueError(f"{s} student and {t} teacher layers do not pair up evenly: give the pattern")
        groups += [[1, t // s]] * s
    return groups


def layer_pairs(student_depth, teacher_depth, groups=None):
    """Pairs (student layer, teacher layer): the ends of every group, in the pruned and in the full network.

    Without `groups` the teacher's depth must be a multiple of the student's. Raises ValueError when nothing fits.
    """
    groups = groups or even_groups([student_depth], [teacher_depth])
    check_groups(groups, teacher_depth)
    kept = sum(n for n, _ in groups)
    if kept != student_depth:
        raise ValueError(f"the pattern keeps {kept} of {teacher_depth} layers, but the student has {student_depth}")
    return list(zip(*group_ends(groups), strict=True))


def extremes(hidden, k=2.0):
    """Where hidden states (N, T, D) are k standard deviations or more from their sample's mean: bool, (N, T, D)."""
    flat = hidden.flatten(1)
    std, mean = torch.std_mean(flat, 1, keepdim=True)  # over tokens and channels together, unbiased
    return ((flat - mean).abs_() >= k * std).view(hidden.shape)


def mask_extremes(hidden, k=2.0):
    """Hidden states (N, T, D) with their extreme entries set to zero."""
    return hidden.masked_fill(extremes(hidden, k), 0.0)


def _compare(student, teacher, k):
    """The loss (N,), and the masked differences (N, T, D), zero also where the student alone is masked."""
    masked = extremes(student, k)
    difference = student.masked_fill(masked, 0.0).sub_(mask_extremes(teacher, k))
    return difference.square().flatten(1).mean(1), difference.masked_fill_(masked, 0.0)


def _slope(difference, g):
    """The gradient (N, T, D) from these differences and from that of the loss, g (N,)."""
    scale = g * (2 / difference[0].numel())
    return difference * scale.view(-1, *[1] * (difference.ndim - 1))


@cache
def _compiled(function):
    """A function fused into few passes over memory, for tensors of any size."""
    return torch.compile(function, dynamic=True)


class _MaskedFeatureLoss(torch.autograd.Function):
    """One tensor is kept for the backward, where autograd on the plain expression would keep several."""

    @staticmethod
    def forward(ctx, student, teacher, k, compiled):
        ctx.compiled = compiled
        loss, difference = (_compiled(_compare) if compiled else _compare)(student, teacher, k)
        ctx.save_for_backward(difference)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return (_compiled(_slope) if ctx.compiled else _slope)(*ctx.saved_tensors, g), None, None, None


def masked_feature_loss(student, teacher, k=2.0, compiled=False):
    """Mean squared difference (N,) of hidden states, each masked by its own statistics (paper, equation 9).

    The mean is over all entries; one that is masked on one side only is compared with zero. The masks and the teacher
    get no gradients. compiled: by torch.compile, in fewer passes over memory.
    """
    return _MaskedFeatureLoss.apply(student, teacher, k, compiled)


class DistillStep(nn.Module):
    """One Masked KD step: alpha * output distillation + (1 - alpha) * original loss + beta * masked feature loss.

    `pairs` may be empty (no feature loss). relative: beta is relative to the output distillation, to whose mean over
    the batch, as this process sees it, every pair's loss is scaled; published betas differ 50 times between networks.
    intervals: while it is set, the student goes on from the teacher's tokens after every pair, so that each part of it
    learns the teacher's map over its own interval, apart from the others; the original loss and beta then play no part.
    compiled: see masked_feature_loss.
    The teacher stays out of the module tree: neither broadcast nor saved.
    """

    def __init__(self, net, teacher, objective, pairs, alpha=0.9, beta=1e-2, k=2.0, relative=False, compiled=False):
        super().__init__()
        self.net, self.objective, self.pairs = net, objective, list(pairs)
        self.alpha, self.beta, self.k, self.relative, self.compiled = alpha, beta, k, relative, compiled
        self.intervals = False
        self._teacher = (teacher.eval().requires_grad_(False),)

    @property
    def teacher(self):
        return self._teacher[0]

    def _compare_features(self, student, teacher):
        """The feature loss (N,) of hidden states; of several streams the mean of theirs, each masked by itself."""
        if isinstance(student, tuple | list):
            pairs = zip(student, teacher, strict=True)
            return torch.stack([self._compare_features(*pair) for pair in pairs]).mean(0)
        return masked_feature_loss(student, teacher, self.k, self.compiled)

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
                target = targets.pop(layer)
                losses.append(self._compare_features(after, target))
                return target if self.intervals else None

        with torch.no_grad():
            goal = self.objective.predict(self.teacher, x, y, draw, observe=keep_target)
        prediction = self.objective.predict(self.net, x, y, draw, observe=compare)
        terms = self.objective.loss(prediction, x, draw)
        gt = terms.pop("loss")
        terms |= self.objective.match(prediction, goal, x, draw)
        features = torch.stack(losses) if losses else torch.zeros_like(gt)[None]  # (pairs, N)
        if self.intervals:
            return {"loss": terms["kd_loss"] + features.mean(0), "gt": gt, "feat_loss": features.mean(0), **terms}
        weights = scales_to(terms["kd_loss"], features) if self.relative else 1.0
        loss = self.alpha * terms["kd_loss"] + (1 - self.alpha) * gt + self.beta * (features * weights).mean(0)
        return {"loss": loss, "gt": gt, "feat_loss": features.mean(0), **terms}


def scales_to(goal, terms):
    """Factors (K, 1) that bring the mean of each of the terms (K, N) to that of `goal` (N,), without gradients.

    Means over these N samples, in float32. Terms that are all zero have nothing to scale, and stay so.
    """
    means = terms.detach().float().mean(1, keepdim=True)
    factors = goal.detach().float().mean() / means
    return torch.where(factors.isfinite(), factors, 0.0)


def feature_weight(beta, epoch, epochs):
    """Weight of the feature loss: linear from `beta` in the first epoch to 0 in the last; `beta` in a single epoch."""
    return beta * (1 - epoch / (epochs - 1)) if epochs > 1 else beta
