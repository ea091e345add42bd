"""Reads the constants of a frozen TensorFlow graph: a small reader of the protobuf wire format, without TensorFlow.

The fields used: GraphDef.node = 1; NodeDef.name = 1, op = 2, attr = 5 (key = 1, value = 2); AttrValue.tensor = 8;
TensorProto.dtype = 1, tensor_shape = 2, tensor_content = 4, float_val = 5, double_val = 6, int_val = 7, int64_val = 10.
"""

import math
import struct

import numpy as np

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
WIDTHS = {FIXED64: 8, FIXED32: 4}
DTYPES = {1: np.float32, 2: np.float64, 3: np.int32, 4: np.uint8, 9: np.int64}
VALUES = {5: "<f", 6: "<d", 7: None, 10: None}  # lists of single values: format of each, or varints
SIGNED = 1 << 63
MAX_DIMS = 8
MAX_REPEATED = 1 << 22  # numbers of a graph that its file need not hold, as they repeat the last one of their tensor


def read_graph(path):
    """{name of a Const node: array} of a frozen GraphDef; ValueError if the file is damaged or something else."""
    try:
        with open(path, "rb") as file:
            data = memoryview(file.read())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        found = _constants(data)
    except (ValueError, TypeError, KeyError, OverflowError, struct.error) as error:
        raise ValueError(f"{path}: not a frozen TensorFlow graph, or damaged ({error})") from None
    if not found:
        raise ValueError(f"{path}: not a frozen TensorFlow graph (no constants in it)")
    return found


def _constants(data):
    """{name: array} of a GraphDef; ValueError if its arrays hold far more numbers than its bytes can."""
    found, room = {}, len(data) + MAX_REPEATED
    for name, tensor in (_node(value) for number, value in _fields(data) if number == 1):
        array = None if tensor is None else _tensor(tensor)
        if array is not None:
            found[name], room = array, room - array.size
        if room < 0:
            raise ValueError("its constants hold more numbers than the file can")
    return found


def _varint(data, at):
    """(value, next position) of the variable-length integer at `at`."""
    value = 0
    for i in range(10):
        if at + i >= len(data):
            raise ValueError("the file ends inside a number")
        value |= (data[at + i] & 0x7F) << 7 * i
        if data[at + i] < 0x80:
            return value & (2 * SIGNED - 1), at + i + 1
    raise ValueError("a number is too long")


def _fields(data):
    """(field number, value) of a message; the value is an integer for varints and a memoryview otherwise."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise ValueError("a field has the number 0")
        if wire == VARINT:
            value, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if wire == BYTES else (WIDTHS.get(wire), at)
            if size is None:
                raise ValueError(f"unknown field {number} of kind {wire}")
            if at + size > len(data):
                raise ValueError(f"the file ends {at + size - len(data)} bytes too early")
            value, at = data[at : at + size], at + size
        yield number, value


def _bytes(value):
    """The bytes of a field; a number would make as many zeros."""
    if isinstance(value, int):
        raise ValueError("a number where a name belongs")
    return bytes(value)


def _node(data):
    """(name, TensorProto) of a node; the second is None unless it is a Const."""
    fields = dict(_fields(data))
    name, op = (_bytes(fields.get(number, b"")).decode() for number in (1, 2))
    attributes = [dict(_fields(value)) for number, value in _fields(data) if number == 5]
    tensors = [dict(_fields(each[2])).get(8) for each in attributes if _bytes(each[1]) == b"value"]
    if op != "Const":
        return name, None
    if not tensors or tensors[-1] is None:
        raise ValueError(f"constant {name} has no value")
    return name, tensors[-1]


def _tensor(data):
    """Array of a TensorProto; None for text and other kinds without numbers."""
    fields = dict(_fields(data))
    dtype, content = DTYPES.get(fields.get(1)), fields.get(4)
    shape = tuple(dict(_fields(dim)).get(1, 0) for number, dim in _fields(fields.get(2, b"")) if number == 2)
    values = [each for number, value in _fields(data) if number in VALUES for each in _values(value, VALUES[number])]
    if dtype is None:
        return None
    if len(shape) > MAX_DIMS:
        raise ValueError(f"a tensor has {len(shape)} dimensions")
    count = math.prod(shape)
    flat = np.frombuffer(content, np.dtype(dtype).newbyteorder("<")) if content else _spread(values, count)
    if len(flat) != count:
        raise ValueError(f"a tensor of shape {shape} holds {len(flat)} values")
    return flat.astype(dtype).reshape(shape)


def _values(value, form):
    """List of the numbers of one field: single or packed, `form` of struct or None for varints."""
    if isinstance(value, int):
        numbers = [value]
    elif form:
        return [number for (number,) in struct.iter_unpack(form, value)]
    else:
        numbers, at = [], 0
        while at < len(value):
            number, at = _varint(value, at)
            numbers.append(number)
    return [number - 2 * SIGNED if number >= SIGNED else number for number in numbers]


def _spread(values, count):
    """(count,) from a list that may leave out repetitions of its last value."""
    if count > len(values) + MAX_REPEATED or len(values) > count:
        raise ValueError(f"{len(values)} values for a tensor of {count}")
    numbers = np.array(values or [0])
    return np.pad(numbers, (0, max(0, count - len(numbers))), "edge")[:count]
