"""N:M patterns: groups of M consecutive layers of which N stay (paper, section 3.2)."""

import math
import re
from itertools import accumulate, combinations, groupby

import torch

MAX_CANDIDATES = 1_000_000


def parse_pattern(text, depth=None):
    """Read "2:4x3,1:2" into groups [[2, 4], [2, 4], [2, 4], [1, 2]].

    With `depth`, a single "N:M" is repeated until it covers that many layers, and the groups are checked.
    Raises ValueError for anything that is not such a list.
    """
    groups, text = [], str(text)  # what a file holds may be anything
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})(?:x([0-9]{1,4}))?", part)
        if not match:
            raise ValueError(f"{text!r} is not a pattern: expected N:M groups such as 2:4,3:4 or 2:4x3,1:2")
        groups += [[int(match[1]), int(match[2])]] * int(match[3] or 1)
    if depth and len(groups) == 1 and "x" not in text:
        groups *= max(1, depth // max(1, groups[0][1]))
    check_groups(groups, depth)
    return groups


def format_pattern(groups):
    """The shortest text that `parse_pattern` reads back: [[2, 4], [2, 4], [1, 2]] -> "2:4x2,1:2"."""
    runs = [(n, m, len(list(run))) for (n, m), run in groupby(map(tuple, groups))]
    return ",".join(f"{n}:{m}" + (f"x{count}" if count > 1 else "") for n, m, count in runs)


def check_groups(groups, depth=None):
    """Raise ValueError unless 1 <= N <= M in every group and the groups cover exactly `depth` layers."""
    for n, m in groups:
        if not 1 <= n <= m:
            raise ValueError(f"group {n}:{m}: a group N:M keeps N of M layers, so 1 <= N <= M is needed")
    if not groups:
        raise ValueError("the pattern covers 0 layers: at least one has to stay")
    covered = sum(m for _, m in groups)
    if depth is not None and covered != depth:
        raise ValueError(f"pattern {format_pattern(groups)} covers {covered} layers, but there are {depth}")


def check_borders(groups, stacks):
    """Raise ValueError if a group holds layers of two stacks: they see different tokens, so none can replace another.

    stacks: number of layers in every stack, through which layers are numbered.
    """
    ends = set(accumulate(m for _, m in groups))
    for border in accumulate(stacks):
        if border not in ends:
            found = f"a group crosses from layer {border - 1} to {border}, which are of different stacks"
            raise ValueError(f"pattern {format_pattern(groups)}: {found}; end a group between them")


def parse_groups(text, stacks, names=()):
    """parse_pattern over all layers of these stacks; raises ValueError also for a group that crosses between two.

    Stacks with `names` can have patterns of their own: blocks=1:2,single_blocks=2:4; one without stays whole.
    """
    if "=" in str(text):
        return split_pattern(text, dict(zip(names, stacks, strict=True)))
    groups = parse_pattern(text, sum(stacks))
    check_borders(groups, stacks)
    return groups


def split_pattern(text, stacks):
    """Groups of a text with a pattern for every stack by its name; stacks: {name: depth}."""
    parts, name = {}, None
    for part in str(text).replace(" ", "").split(","):
        if "=" in part:
            name, _, part = part.partition("=")
        if name not in stacks:
            raise ValueError(f"{text!r} has a pattern for {name!r}; the stacks are {', '.join(stacks)}")
        parts.setdefault(name, []).append(part)
    groups = []
    for name, depth in stacks.items():
        groups += parse_pattern(",".join(parts.get(name, [f"1:1x{depth}"])), depth)
    return groups


def check_candidates(groups):
    """Raise ValueError if there are too many ways to keep N of the M layers of a group for gates over all of them."""
    for n, m in groups:
        if math.comb(m, n) > MAX_CANDIDATES:
            few = "split it into smaller groups, or take only contiguous ones"
            raise ValueError(f"group {n}:{m} has over {MAX_CANDIDATES:,} candidates: {few}")


def fixed_places(groups, fixed):
    """For every group, the places in it of the layers that have to stay, a tuple of (0..M - 1)."""
    ends = list(accumulate(m for _, m in groups))
    return [tuple(f - end + m for f in fixed if end - m <= f < end) for (_, m), end in zip(groups, ends, strict=True)]


def candidate_masks(n, m, contiguous=False, fixed=()):
    """All ways to keep n of m layers: (candidates, m) of 0/1 in the order of `itertools.combinations`.

    contiguous: only those that drop m - n layers in a row, the first ones first; 8 of the 3,432 of 7:14.
    fixed: only those that keep the layers at these places; at most n.
    """
    if contiguous:
        starts = range(n + 1) if n < m else (0,)
        kept = [[layer for layer in range(m) if not start <= layer < start + m - n] for start in starts]
    else:
        kept = list(combinations(range(m), n))
    kept = [layers for layers in kept if set(fixed) <= set(layers)]
    table = torch.zeros(len(kept), m, device="cpu")
    return table.scatter_(1, torch.tensor(kept, device="cpu"), 1.0)


def group_ends(groups):
    """Last layer of every group, counted in the pruned and in the full network: ([...], [...])."""
    return tuple([end - 1 for end in accumulate(sizes)] for sizes in zip(*groups, strict=True))


def bk_sdm_layers(groups):
    """BK-SDM's fixed scheme: the first N layers of each group in the first half, the last N in the second half."""
    kept, ends = [], list(accumulate(m for _, m in groups))
    for (n, m), end in zip(groups, ends, strict=True):
        first = end - m if end - m < ends[-1] / 2 else end - n
        kept += range(first, first + n)
    return kept
