"""What is typed: patterns, lists of layers, numbers and names of models."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from families import FAMILIES, family_of, model_config, model_name
from families.flags import above_zero, amount, count, integer_list, share, whole
from pruning.patterns import format_pattern, parse_pattern

from .inputs import NUMBERS
from .limits import read_or_refuse

DIGITS = (
    st.integers(0, 30).map(str)
    | st.integers(0, 10**5).map(str)
    | st.sampled_from(["٣", "²", "1_0", "-1", "", "+2", "01", "9" * 5000])
)
MAX_LAYERS = 9999  # that a name or a group may ask for
TYPES = {"count": count, "whole": whole, "share": share, "amount": amount, "above zero": above_zero}


def mixed(*strategies):
    """Texts put together from these pieces, or anything."""
    return st.lists(st.one_of(*strategies), max_size=6).map("".join) | st.text(max_size=30)


GROUPS = st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(0, 30)).map("{0[0]}:{0[1]}x{0[2]}".format)
PATTERNS = st.lists(GROUPS, max_size=9).map(",".join) | mixed(DIGITS, GROUPS, st.sampled_from(":x, ;"), GROUPS)


@given(text=PATTERNS, depth=st.none() | st.integers(0, 40))
@example(text="2:4x2,1:2", depth=10)
@example(text=[[1, 2]], depth=2)
@example(text=5, depth=None)
@example(text="1:2", depth=28)
@example(text="9999:9999x9999", depth=None)
@example(text="5000:9999", depth=None)
@example(text="1:2x0", depth=None)
@example(text="1:٣", depth=None)
def test_patterns(part, text, depth):
    accepted, groups = read_or_refuse("patterns", parse_pattern, text, depth)
    if accepted:
        assert text.isascii()
        assert groups
        assert all(1 <= n <= m <= MAX_LAYERS for n, m in groups)
        assert depth is None or sum(m for _, m in groups) == depth
        assert parse_pattern(format_pattern(groups)) == groups
    else:
        assert "there are None" not in groups
        assert len(groups) < 200 + 2 * len(repr(text)), "a message that nobody can read"


@pytest.mark.parametrize("text", ["2:4x2,1:2", " 1 : 2 ", "9999:9999", "1:9999x2"])
def test_patterns_that_fit(text):
    assert parse_pattern(text)


@given(text=st.lists(NUMBERS).map(str) | mixed(DIGITS, st.sampled_from("[], \n")))
@example(text="[0, 2, 4]")
@example(text="9" * 5000)
def test_integer_lists(part, text):
    accepted, found = read_or_refuse("index lists", integer_list, text)
    if accepted:
        assert found
        assert all(type(value) is int for value in found)
        assert integer_list(str(found)) == found


@given(
    name=st.sampled_from(sorted(TYPES)),
    text=NUMBERS.map(str) | st.floats().map(str) | mixed(DIGITS, st.sampled_from(".e-")),
)
@example(name="count", text="0")
@example(name="share", text="nan")
@example(name="above zero", text="nan")
def test_numbers(part, name, text):
    accepted, found = read_or_refuse("numbers", TYPES[name], text)
    if accepted:
        lowest, highest = {"count": (1, None), "share": (0, 1)}.get(name, (0, None))
        assert found >= lowest
        assert highest is None or found <= highest
        assert name != "above zero" or found > 0


NAMES = sorted(name for family in FAMILIES.values() for name in family.models)
SIZES = st.sampled_from(["DiT", "SiT", "MAR", "DiT-T", "MAR-B", "X"])
PATCHES = st.sampled_from(["", "/2", "/4", "/"])
DEPTHS = st.builds("{}-D{}{}{}".format, SIZES, DIGITS, PATCHES | DIGITS.map("+{}".format), PATCHES)


@given(text=st.sampled_from(NAMES) | DEPTHS | mixed(st.sampled_from(NAMES), DIGITS, st.sampled_from("-D+/\n")))
@example(text="DiT-D9999/2")
@example(text="DiT-D99999999999/2")
@example(text="DiT-D1٣/2")
@example(text="MAR-D6+10")
def test_names(part, text):
    accepted, name = read_or_refuse("names", model_name, text)
    if accepted:
        layers = family_of(name).stacks(model_config(name))
        assert name.isascii()
        assert all(0 < depth <= MAX_LAYERS for depth in layers)


@pytest.mark.parametrize("text", [*NAMES, "DiT-D16/2", "MAR-D6+10", "SiT-T-D9999/2"])
def test_names_that_fit(text):
    assert model_name(text) == text
