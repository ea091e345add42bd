"""Scores that rank layers without learning: ShortGPT's block influence (arXiv 2403.03853)."""

import torch
from torch.nn import functional as F


class BlockInfluence:
    """Mean cosine similarity of every block's input and output tokens; a high value means the block changes little.

    Used as the `observe` argument of a network; the mean runs over tokens, samples and calls.
    """

    def __init__(self, depth):
        self.sums, self.calls = torch.zeros(depth, dtype=torch.float64), [0] * depth

    def __call__(self, layer, before, after):
        self.sums[layer] += F.cosine_similarity(before, after, dim=-1).mean().item()
        self.calls[layer] += 1

    def scores(self):
        """Similarity per layer, (L,) float64."""
        return self.sums / torch.tensor(self.calls).clamp(min=1)


@torch.inference_mode()
def measure_influence(net, depth, objective, batches, clean_steps=None):
    """Block influence (L,) over batches (x, y), noised as in training, or clean at steps below `clean_steps`."""
    influence = BlockInfluence(depth)
    for x, y in batches:
        if clean_steps:
            net(x, torch.randint(clean_steps, (len(x),), device=x.device), y, observe=influence)
        else:
            objective.predict(net, x, y, objective.draw(net, x, y), observe=influence)
    return influence.scores()


def least_influential(scores, n_pruned):
    """The `n_pruned` layers of highest similarity, ascending; the last layer always stays, of equals the earlier goes.

    Raises ValueError unless 1 <= n_pruned < number of layers.
    """
    depth = len(scores)
    if not 1 <= n_pruned < depth:
        raise ValueError(f"{n_pruned} of {depth} layers cannot be pruned: expected 1..{depth - 1}")
    order = sorted(range(depth - 1), key=lambda layer: (-float(scores[layer]), layer))
    return sorted(order[:n_pruned])
