"""N:M patterns, candidate masks and the BK-SDM scheme."""

from itertools import combinations

import pytest

from pruning.patterns import (
    bk_sdm_layers,
    candidate_masks,
    check_groups,
    fixed_places,
    format_pattern,
    group_ends,
    parse_groups,
    parse_pattern,
)


@pytest.mark.parametrize(
    ("text", "depth", "groups"),
    [
        ("2:4,3:4", None, [[2, 4], [3, 4]]),
        ("2:4x3,1:2", 14, [[2, 4]] * 3 + [[1, 2]]),
        (" 2:4 x 2 , 1:2 ", None, [[2, 4], [2, 4], [1, 2]]),
        ("1:2", 28, [[1, 2]] * 14),
        ("7:14", 28, [[7, 14]] * 2),
        ("3:4x2,2:4,3:4,2:4,3:4x2", 28, [[3, 4]] * 2 + [[2, 4], [3, 4], [2, 4]] + [[3, 4]] * 2),
        ("4:4", None, [[4, 4]]),
    ],
)
def test_parse(text, depth, groups):
    assert parse_pattern(text, depth) == groups
    assert parse_pattern(format_pattern(groups)) == groups


@pytest.mark.parametrize("text", ["", "2", "2:", ":4", "a:b", "2:4;2:4", "2:4,", "-1:2", "1.5:2", "2:4x", "2:4x-1"])
def test_malformed(text):
    with pytest.raises(ValueError, match="is not a pattern: expected N:M"):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("text", "depth", "message"),
    [
        ("3:2", None, "3:2.*1 <= N <= M"),
        ("0:2", None, "0:2.*1 <= N <= M"),
        ("1:0", 12, "1:0.*1 <= N <= M"),
        ("2:4", 14, "covers 12 layers, but there are 14"),
        ("2:4x3", 28, "covers 12 layers, but there are 28"),
        ("2:4x4", 12, "covers 16 layers, but there are 12"),
        ("5:13", 12, "covers 13 layers, but there are 12"),
        ("2:4x0", 12, "covers 0 layers"),
    ],
)
def test_impossible(text, depth, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(text, depth)


def test_no_groups():
    with pytest.raises(ValueError, match="covers 0 layers"):
        check_groups([], 4)


def test_format_is_shortest():
    assert format_pattern([[2, 4], [2, 4], [1, 2], [2, 4]]) == "2:4x2,1:2,2:4"


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (7, 14), (4, 4)])
def test_candidate_masks(n, m):
    """One row per combination, in the order of itertools."""
    table = candidate_masks(n, m)
    assert [tuple(i for i, keep in enumerate(row) if keep) for row in table.tolist()] == list(combinations(range(m), n))
    assert set(table.unique().tolist()) <= {0.0, 1.0}


def test_group_ends():
    assert group_ends([[2, 4], [1, 2], [3, 3]]) == ([1, 2, 5], [3, 5, 8])


@pytest.mark.parametrize(
    ("pattern", "depth", "kept"),
    [
        ("1:2", 28, [*range(0, 14, 2), *range(15, 28, 2)]),
        ("2:4", 28, [0, 1, 4, 5, 8, 9, 12, 13, 18, 19, 22, 23, 26, 27]),
        ("2:4", 12, [0, 1, 4, 5, 10, 11]),
    ],
)
def test_bk_sdm(pattern, depth, kept):
    assert bk_sdm_layers(parse_pattern(pattern, depth)) == kept


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("a=1:2,b=2:4", [[1, 2]] * 2 + [[2, 4]] * 2),
        ("b=2:4", [[1, 1]] * 4 + [[2, 4]] * 2),
        ("b=3:4,1:2x2, a=1:4", [[1, 4], [3, 4], [1, 2], [1, 2]]),
        ("1:2", [[1, 2]] * 6),
    ],
)
def test_patterns_of_stacks(text, groups):
    assert parse_groups(text, [4, 8], ["a", "b"]) == groups


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c=1:2", "has a pattern for 'c'; the stacks are a, b"),
        ("1:2,a=1:2", "has a pattern for None"),
        ("a=1:3", "covers 3 layers, but there are 4"),
        ("a=", "is not a pattern"),
    ],
)
def test_wrong_patterns_of_stacks(text, message):
    with pytest.raises(ValueError, match=message):
        parse_groups(text, [4, 8], ["a", "b"])


def test_fixed_layers_are_in_every_candidate():
    assert fixed_places([[1, 2], [2, 4]], [1, 5]) == [(1,), (3,)]
    assert candidate_masks(2, 4, fixed=(3,)).tolist() == [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]]
    assert candidate_masks(2, 4, contiguous=True, fixed=(3,)).tolist() == [[0, 0, 1, 1], [1, 0, 0, 1]]
