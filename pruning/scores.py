"""Scores that rank layers without learning: one number per layer, and which layers go by it.

A criterion is a function of a network, its objective and batches (x, y): scores (L,) float64 over the layers of all
stacks. `CRITERIA` says what its number means. The convention: layers of lowest importance go first, where importance is
the score, or minus the score for a criterion whose high scores mean that a layer does little.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from pruning.gates import block_stacks


def join_streams(before, after):
    """Two tensors (N, T, D) of what went into a block and came out: of several streams, the tokens of all together.

    So every token counts as much, whichever stream it belongs to: a mean over tokens is that of the streams, weighted
    by their lengths.
    """
    return tuple(torch.cat(each, dim=1) if isinstance(each, tuple | list) else each for each in (before, after))


class TokenObserver:
    """Mean of `compare` for every layer, over calls; used as the `observe` argument of a network.

    select: (before, after) -> the two tensors (..., D) to look at, for blocks that pass on several streams of tokens.
    """

    def __init__(self, depth, select=join_streams):
        self.sums, self.calls = torch.zeros(depth, dtype=torch.float64), [0] * depth
        self.select = select

    def __call__(self, layer, before, after):
        before, after = self.select(before, after)
        self.sums[layer] += self.compare(before, after).item()
        self.calls[layer] += 1

    def scores(self):
        """The mean per layer, (L,) float64."""
        return self.sums / torch.tensor(self.calls).clamp(min=1)


class BlockInfluence(TokenObserver):
    """Mean cosine similarity of every block's input and output tokens; a high value means the block changes little.

    The mean runs over tokens, samples and calls.
    """

    @staticmethod
    def compare(before, after):
        """Mean over tokens (..., D) of their similarity."""
        return F.cosine_similarity(before, after, dim=-1).mean()


class BlockChange(TokenObserver):
    """Mean squared difference of every block's input and output, over channels, tokens, samples and calls."""

    @staticmethod
    def compare(before, after):
        """Mean over all entries of two tensors of one shape."""
        return F.mse_loss(after, before)


def count_layers(net):
    """Number of layers of a network, through all its stacks."""
    return sum(len(stack) for stack in block_stacks(net))


@torch.inference_mode()
def measure_influence(net, objective, batches, clean_steps=None, select=join_streams):
    """Block influence (ShortGPT, arXiv 2403.03853): similarity (L,) of what goes into a block and what comes out.

    Batches are noised as in training, or clean at steps below `clean_steps`. select: see TokenObserver.
    """
    influence = BlockInfluence(count_layers(net), select)
    for x, y in batches:
        if clean_steps:
            net(x, torch.randint(clean_steps, (len(x),), device=x.device), y, observe=influence)
        else:
            objective.predict(net, x, y, objective.draw(net, x, y), observe=influence)
    return influence.scores()


@torch.inference_mode()
def measure_change(net, objective, batches, select=join_streams):
    """Squared change (L,) by which Flux.1 Lite chose its layers (model card of Freepik/flux.1-lite-8B).

    The card says: mean squared error between a block's input and its output. Here the mean is over channels, tokens and
    samples, at the random noise levels of training; a layer of small change goes first. select: see TokenObserver.
    """
    change = BlockChange(count_layers(net), select)
    for x, y in batches:
        objective.predict(net, x, y, objective.draw(net, x, y), observe=change)
    return change.scores()


@torch.inference_mode()
def measure_losses(net, objective, batches, masks, tell=None):
    """Mean training loss (C,) float64 of the network under each of the masks (C, L) of 0/1.

    Every mask meets the same random draws, one per batch, so losses can be compared. tell: called after every pass.
    """
    sums, count = torch.zeros(len(masks), dtype=torch.float64), 0
    for x, y in batches:
        draw = objective.draw(net, x, y)
        for i, mask in enumerate(masks):
            prediction = objective.predict(net, x, y, draw, mask=mask.to(x.device).expand(len(x), -1))
            sums[i] += objective.loss(prediction, x, draw)["loss"].double().sum().item()
            if tell:
                tell()
        count += len(x)
    return sums / max(count, 1)


def measure_sensitivity(net, objective, batches):
    """Rise (L,) of the training loss when a layer is left out, on the same draws with and without it.

    Sensitivity analysis, among the ways to minimize the loss after pruning that the paper (arXiv 2412.01199) argues
    against. A rise may be negative.
    """
    depth = count_layers(net)
    masks = torch.cat([torch.ones(1, depth), 1 - torch.eye(depth)])
    losses = measure_losses(net, objective, batches, masks)
    return losses[1:] - losses[0]


@torch.inference_mode()
def measure_output_change(net, objective, batches):
    """Weighted mean (L,) of the squared change of the network's output when a layer is left out, on the same draws.

    sum_i w_i d_i / sum_i w_i over all rows of the output (samples; for MAR noised tokens): d_i is the mean squared
    difference of row i with and without the layer, over all channels, and w_i the share of noise in the variance of
    what the row was predicted from (the objective's `noise_share`: 0 for data, 1 for noise). So the noisy steps count
    most, which come first in sampling and whose errors all others carry on; OBS-Diff (arXiv 2510.06751) weights early
    steps more for this reason, by another formula.
    """
    depth = count_layers(net)
    sums, total = torch.zeros(depth, dtype=torch.float64), 0.0
    for x, y in batches:
        draw = objective.draw(net, x, y)
        whole, weights = objective.predict(net, x, y, draw), objective.noise_share(draw).double()
        for layer, mask in enumerate(1 - torch.eye(depth, device=x.device)):
            without = objective.predict(net, x, y, draw, mask=mask.expand(len(x), -1))
            difference = (without - whole).square().flatten(1).mean(1)
            sums[layer] += (weights * difference).sum().item()
        total += weights.sum().item()
    return sums / max(total, 1e-12)


@torch.no_grad()
def measure_magnitude(net, objective=None, batches=()):
    """Mean absolute weight (L,) of each block's matrices; as for single weights in arXiv 1506.02626, small ones go."""
    scores = []
    for block in (block for stack in block_stacks(net) for block in stack):
        matrices = [p.double().abs() for p in block.parameters() if p.ndim > 1]
        scores.append(sum(p.sum().item() for p in matrices) / sum(p.numel() for p in matrices))
    return torch.tensor(scores, dtype=torch.float64)


def draw_scores(net, objective=None, batches=()):
    """Random numbers (L,) in [0, 1), the baseline of all others; `torch.manual_seed` before it decides on them."""
    return torch.rand(count_layers(net), dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Criterion:
    """What a score is for.

    measure: (net, objective, batches) -> scores (L,). word, form: what a score is called and how it is printed.
    high_goes: layers of high scores do little and go first; else those of low scores. keeps_last: the last layer always
    stays, as block influence was published, under a pattern too; other criteria rank it like any layer. reads_data:
    whether batches are needed.
    """

    measure: Callable
    word: str
    form: str = ".6g"
    high_goes: bool = False
    keeps_last: bool = False
    reads_data: bool = True

    def removed(self, scores, groups, fixed=()):
        """Layers that go, ascending, under N:M groups; see least_important."""
        return least_important(-scores if self.high_goes else scores, groups, self.keeps_last, fixed)


CRITERIA = {
    "block-influence": Criterion(measure_influence, "similarity", ".6f", high_goes=True, keeps_last=True),
    "sensitivity": Criterion(measure_sensitivity, "rise of the loss"),
    "flux-lite": Criterion(measure_change, "change"),
    "output-change": Criterion(measure_output_change, "change of the output"),
    "magnitude": Criterion(measure_magnitude, "mean weight", reads_data=False),
    "random": Criterion(draw_scores, "number", reads_data=False),
}


def least_important(importance, groups, keeps_last=False, fixed=()):
    """Layers to drop, ascending: of every group N:M the M - N of lowest importance, of equals the earlier.

    importance: (L,). groups: as in pruning.patterns, covering L; [[L - n, L]] drops any n layers. keeps_last: the last
    of all layers stays whatever its importance. fixed: layers that stay too.
    """
    removed, start = [], 0
    for n, m in groups:
        layers = range(start, start + m)
        order = sorted(layers, key=lambda layer: (float(importance[layer]), layer))
        staying = {*fixed, len(importance) - 1} if keeps_last else {*fixed}
        order = [layer for layer in order if layer not in staying]
        if len(order) < m - n:
            raise ValueError(f"group {n}:{m} from layer {start}: more layers have to stay than it keeps")
        removed += order[: m - n]
        start += m
    return sorted(removed)


def least_influential(scores, n_pruned):
    """The `n_pruned` layers of highest similarity, ascending; the last layer always stays, of equals the earlier goes.

    Raises ValueError unless 1 <= n_pruned < number of layers.
    """
    depth = len(scores)
    if not 1 <= n_pruned < depth:
        raise ValueError(f"{n_pruned} of {depth} layers cannot be pruned: expected 1..{depth - 1}")
    return CRITERIA["block-influence"].removed(scores, [[depth - n_pruned, depth]])
