"""Choices of layers to compare by their loss: all of them or a random sample, free or under an N:M pattern.

The paper (arXiv 2412.01199) draws 100,000 and compares those of the lowest, median and highest loss after fine-tuning.
"""

import math
import random
from itertools import accumulate, chain, combinations, product

import torch

from pruning.patterns import fixed_places

MAX_CHOICES = 100_000  # that are measured


def count_choices(groups, stacks, fixed=()):
    """Number of ways to keep N of the M layers of every group so that no stack is left empty.

    groups: as in pruning.patterns; either none crosses from one stack to another, or there is a single one. fixed:
    layers that every choice keeps.
    """
    free = [
        (n - len(places), m - len(places)) for (n, m), places in zip(groups, fixed_places(groups, fixed), strict=True)
    ]
    if len(groups) > 1:
        return math.prod(math.comb(m, n) for n, m in free)
    ((n, depth),), ends = free, [*accumulate(stacks)]
    may_be_empty = [m for m, end in zip(stacks, ends, strict=True) if not any(end - m <= f < end for f in fixed)]
    ways = 0
    for k in range(len(stacks)):  # inclusion and exclusion: less those that leave a stack empty, and so on
        ways += (-1) ** k * sum(math.comb(depth - sum(empty), n) for empty in combinations(may_be_empty, k))
    return ways


def leaves_all(kept, stacks):
    """Whether layers `kept` are left in every one of the stacks, whose sizes are given."""
    start = 0
    for size in stacks:
        if not any(start <= layer < start + size for layer in kept):
            return False
        start += size
    return True


def group_layers(groups):
    """[(N, layers)] of N:M groups: [[1, 2], [1, 2]] -> [(1, range(0, 2)), (1, range(2, 4))]."""
    found, start = [], 0
    for n, m in groups:
        found.append((n, range(start, start + m)))
        start += m
    return found


def all_choices(groups, stacks, fixed=()):
    """Yield every choice once, as a tuple of kept layers, ascending."""
    for parts in product(*(combinations(layers, n) for n, layers in group_layers(groups))):
        kept = tuple(chain(*parts))
        if leaves_all(kept, stacks) and set(fixed) <= set(kept):
            yield kept


def draw_choices(groups, stacks, how_many, seed=0, fixed=()):
    """`how_many` different choices at random, or all of them for "all" and where there are no more: [(layer, ...)].

    groups, stacks, fixed: see count_choices. Raises ValueError if that would be more than MAX_CHOICES, or none.
    """
    total = count_choices(groups, stacks, fixed)
    number = total if how_many == "all" else min(how_many, total)
    if number > MAX_CHOICES:
        raise ValueError(f"at most {MAX_CHOICES:,} choices are measured, and there are more; take a smaller number")
    if not number:
        raise ValueError(f"every choice leaves one of the stacks of {stacks} layers empty; keep more layers")
    rng = random.Random(seed)
    if total <= MAX_CHOICES:
        choices = list(all_choices(groups, stacks, fixed))
        return choices if number == total else rng.sample(choices, number)
    found = {}  # in the order they are drawn
    while len(found) < number:
        kept = tuple(chain(*(sorted(rng.sample(layers, n)) for n, layers in group_layers(groups))))
        if leaves_all(kept, stacks) and set(fixed) <= set(kept):
            found[kept] = True
    return list(found)


def choice_masks(choices, depth):
    """Masks (C, L) of 0/1 of the layers that each choice keeps."""
    masks = torch.zeros(len(choices), depth)
    for mask, kept in zip(masks, choices, strict=True):
        mask[list(kept)] = 1.0
    return masks


def find_loss(losses, which):
    """Index of the "lowest", "median" or "highest" of the losses (C,); of equals the first.

    The median is one of them: the lower of the two in the middle.
    """
    order = losses.argsort(stable=True, descending=which == "highest").tolist()
    return order[(len(order) - 1) // 2 if which == "median" else 0]
