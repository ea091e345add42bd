"""The frozen graph, a file of protobuf's wire format, and the weights of Inception in it or in a .pth."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from evaluation.graph import read_graph
from evaluation.inception import SmallInception, load_inception

from .inputs import EDITS, SIZES, VALUES, edit_bytes
from .limits import read_or_refuse

KINDS = (np.float32, np.float64, np.int32, np.uint8, np.int64)


def varint(value):
    """The variable-length form of a number."""
    parts = bytearray()
    value %= 1 << 70
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def field(number, value):
    """One field: a number as a varint, bytes with their length, a pair (wire kind, bytes) as it is."""
    if isinstance(value, tuple):
        return varint(number << 3 | value[0]) + value[1]
    return (
        varint(number << 3) + varint(value)
        if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(value)) + value
    )


def message(*fields):
    """Fields (number, value) one after the other."""
    return b"".join(field(number, value) for number, value in fields)


def constant(name, *tensor):
    """A node of a constant from the fields of its tensor."""
    attr = message((1, b"value"), (2, message((8, message(*tensor)))))
    return message((1, message((1, name), (2, b"Const"), (5, attr))))


def shape(*dims):
    """The field of a shape."""
    return 2, message(*((2, message((1, dim))) for dim in dims))


VALID = [
    constant(b"a", (1, 1), shape(2, 3), (4, struct.pack("<6f", *range(6)))),
    constant(b"b", (1, 1), shape(4), (5, (5, struct.pack("<f", 0.5)))),
    constant(b"c", (1, 3), shape(3), (7, varint(1) + varint(2**64 - 2))),
    constant(b"d", (1, 2), shape(), (6, struct.pack("<d", 1.5))),
    message((1, message((1, b"e"), (2, b"Relu"), (3, b"a"))), (4, 7)),
    constant(b"f", (1, 7), (8, b"text")),
]
CONTENTS = st.integers(0, 9).map(lambda n: bytes(4 * n)) | st.binary(max_size=9)
WIRED = st.tuples(st.integers(0, 7), st.binary(max_size=9)) | st.builds(lambda n: (2, varint(n)), SIZES)
TENSOR_FIELDS = st.one_of(
    st.tuples(st.just(1), st.sampled_from([1, 2, 3, 4, 9, 7, 0, 99])),
    st.lists(st.integers(0, 4) | SIZES, max_size=4).map(lambda dims: shape(*dims)),
    st.tuples(st.just(4), CONTENTS),
    st.tuples(st.sampled_from([5, 6, 7, 10]), CONTENTS | WIRED | SIZES),
    st.tuples(st.integers(0, 12), SIZES | CONTENTS | WIRED),
)
TENSORS = st.lists(TENSOR_FIELDS, max_size=4).map(lambda fields: constant(b"g", (1, 1), *fields))
NODES = st.lists(st.tuples(st.sampled_from([1, 2, 5, 5]), SIZES | st.binary(max_size=9) | WIRED), max_size=4).map(
    lambda fields: message((1, message(*fields)))
)
ATTRS = st.lists(st.tuples(st.integers(1, 2), SIZES | CONTENTS | WIRED), max_size=3).map(
    lambda fields: message((1, message((2, b"Const"), (5, message(*fields)))))
)
GRAPHS = st.lists(st.sampled_from(VALID) | TENSORS | NODES | ATTRS, max_size=4).map(b"".join)
MANY_DIMS = constant(b"a", (1, 1), shape(*[2**62] * 200_000))
MANY_REPEATED = b"".join(constant(b"%d" % i, (1, 1), shape(1 << 22), (5, (5, bytes(4)))) for i in range(64))


def check_arrays(consts):
    """What a graph may tell: names and arrays of the known kinds."""
    assert consts
    assert all(isinstance(name, str) and array.dtype in KINDS for name, array in consts.items())


@given(data=GRAPHS | st.builds(edit_bytes, GRAPHS, EDITS) | st.binary(max_size=60))
@example(data=b"".join(VALID))
@example(data=message((1, message((1, 2**40)))))
@example(data=message((1, message((2, 2**63)))))
@example(data=constant(b"a", (1, 1), shape(1 << 28), (5, (5, bytes(4)))))
@example(data=constant(b"a", (1, 1), shape(2**63 - 1, 2**63 - 1, 0)))
@example(data=MANY_DIMS)
@example(data=MANY_REPEATED)
def test_graph(part, folder, data):
    path = folder / "graph.pb"
    path.write_bytes(data)
    accepted, found = read_or_refuse("graph", read_graph, path)
    if accepted:
        check_arrays(found)
    else:
        assert str(path) in found
        assert len(found) < 500 + len(str(path)), "a message that nobody can read"


def test_graph_that_fits(folder):
    (folder / "valid.pb").write_bytes(b"".join(VALID))
    found = read_graph(folder / "valid.pb")
    np.testing.assert_array_equal(found["a"], np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(found["b"], [0.5] * 4)
    np.testing.assert_array_equal(found["c"], [1, -2, -2])
    assert found["d"] == 1.5
    assert "e" not in found
    assert "f" not in found


@pytest.fixture(scope="module")
def inception_state():
    """The state of a small Inception file, of which every tensor takes one number on disk."""
    state = {"fc.weight": (1008, 2048)}
    for name, layer in SmallInception().items():
        channels = layer.weight.shape[0]
        state[f"{name}.conv.weight"] = tuple(layer.weight.shape)
        state |= {f"{name}.bn.{key}": (channels,) for key in ("weight", "bias", "running_mean", "running_var")}
    return {name: torch.ones(1).expand(size) for name, size in state.items()}


TENSOR_LIKE = st.sampled_from([
    torch.tensor(1.0), torch.ones(3), torch.ones(2, 2), torch.ones(0), torch.ones(8, dtype=torch.int8),
    torch.ones(8, dtype=torch.complex64), torch.ones(8, dtype=torch.bool), torch.ones(8).to_sparse(),
    torch.ones(8, device="meta"), torch.full((8,), float("nan")), torch.full((8,), -1.0),
    torch.ones(1008, 2048).to_sparse(), torch.ones(1).expand(1 << 40), torch.ones(1, 1).expand(1 << 20, 1 << 20),
    torch.ones(1).expand(8, 3, 3, 3), torch.ones(1, dtype=torch.float16).expand(2048, 1008),
])  # fmt: skip
CHANGES = st.lists(
    st.tuples(st.integers(0, 99), st.sampled_from(["drop", "replace", "number", "add"]), TENSOR_LIKE | VALUES),
    max_size=3,
)


def changed_state(state, changes):
    """The state with some entries taken out, replaced, or under another key."""
    state = dict(state)
    for place, kind, new in changes:
        name = sorted(state, key=str)[place % len(state)] if state else "fc.weight"
        if kind == "drop":
            state.pop(name, None)
        else:
            state[{"number": place, "add": f"extra{place}.conv.weight"}.get(kind, name)] = new
    return state


@given(changes=CHANGES, edits=st.just([]) | EDITS)
@example(changes=[(0, "number", torch.ones(1))], edits=[])
@example(changes=[(0, "replace", 3)], edits=[])
@example(changes=[(0, "replace", torch.ones(1).expand(1 << 40))], edits=[])
@example(changes=[(0, "replace", torch.ones(8).to_sparse())], edits=[])
def test_inception(part, folder, inception_state, changes, edits):
    path = folder / "inception.pth"
    torch.save(changed_state(inception_state, changes), path)
    if edits:
        path.write_bytes(edit_bytes(path.read_bytes(), edits))
    accepted, found = read_or_refuse("inception", load_inception, path)
    assert accepted or str(path) in found
    assert accepted or changes or edits
