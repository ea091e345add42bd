"""Strategies: valid files with something changed, in their bytes or in their JSON."""

import copy
import json

from hypothesis import strategies as st

SIZES = st.integers(0, 9) | st.sampled_from(
    [255, 2**16, 2**28, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64]
)
NUMBERS = st.integers() | SIZES | SIZES.map(lambda size: -size)
ODD_VALUES = [None, True, False, 0, 1, -1, 2, 10**30, 2**63, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "a", "1"]
ODD_VALUES += ["\0", "\n", "\ud800", "٣", "a" * 300, [], [1], [[]], [None, "a"], {}, {"a": 1}, {"": {}}, [[[[1]]]]]
VALUES = st.sampled_from(ODD_VALUES) | st.sampled_from(ODD_VALUES) | NUMBERS | st.text(max_size=8)
ODD_JSON = [  # texts that JSON readers know, or should know, to be wary of
    b"", b"{", b"[]", b"null", b"0", b'""', b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"-1e999", b"NaN",
    b'\xef\xbb\xbf{"a": 1}', "{}".encode("utf-16"), b'{"\\ud800": "\\udfff"}', b'{"a": 1, "a": 2}',
    b"\x00" * 9, b"\xff",
]  # fmt: skip
KINDS = ("flip", "set", "cut", "drop", "insert", "double")


def read_edits(plan):
    """[(kind, place, bytes), ...], eight bytes of the plan for each: one draw is quicker than many."""
    pieces = [plan[at : at + 8] for at in range(0, len(plan) - 3, 8)]
    return [(KINDS[piece[0] % 6], piece[1] << 8 | piece[2], piece[4 : 4 + piece[3] % 5]) for piece in pieces]


EDITS = st.binary(max_size=32).map(read_edits)


def edit_bytes(data, edits):
    """The bytes after a list of changes, see EDITS: where each is, and what it brings."""
    data = bytearray(data)
    for kind, place, new in edits:
        at = place % (len(data) + 1)
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << (len(new) % 8)
        elif kind == "set":
            data[at : at + len(new)] = new
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + len(new)]
        elif kind == "insert":
            data[at:at] = new
        elif kind == "double":
            data[at:at] = data[at : at + 64]
    return bytes(data)


def places(value, path=()):
    """Paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, child in inner for place in places(child, (*path, key))]


def change(value, path, new, kind):
    """A copy of a JSON value with the part at `path` replaced, taken out, renamed or wrapped."""
    if not path:
        return new
    value = copy.deepcopy(value)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    old = parent[path[-1]]
    if kind == "replace":
        parent[path[-1]] = new
    elif kind == "wrap":
        parent[path[-1]] = [old]
    elif kind == "drop":
        del parent[path[-1]]
    elif kind == "rename" and isinstance(parent, dict):
        parent[str(new)] = parent.pop(path[-1])
    return value


def change_all(value, plan):
    """A JSON value after a list of changes (number that says where and how, what it brings)."""
    for place, new in plan:
        kind = ("replace", "replace", "drop", "rename", "wrap")[place % 5]
        paths = places(value)
        value = change(value, paths[place // 5 % len(paths)], new, kind)
    return value


def changed(*valid, special=VALUES):
    """One of some JSON values after up to three changes; `special`: values of which some may fit."""
    plans = st.lists(st.tuples(st.integers(0, 999), special | VALUES), max_size=3)
    return st.builds(change_all, st.sampled_from(valid), plans)


def json_files(*valid, special=VALUES):
    """The bytes of JSON files: changed values, also with changed bytes, odd ones, and anything."""
    texts = changed(*valid, special=special).map(lambda value: json.dumps(value).encode())
    return st.one_of(
        texts, texts, st.builds(edit_bytes, texts, EDITS), st.sampled_from(ODD_JSON), st.binary(max_size=40)
    )
