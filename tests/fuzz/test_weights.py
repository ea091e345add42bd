"""Files of weights and training states: .pt, of which the pickle inside is changed too, and .safetensors."""

import argparse
import io
import itertools
import json
import pickle
import pickletools
import zipfile

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from engine.checkpoint import read_state
from engine.weight_files import open_weights

from .inputs import EDITS, SIZES, changed, edit_bytes
from .limits import read_or_refuse

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}
STATE = {
    "model": WEIGHTS,
    "ema": WEIGHTS,
    "train_steps": 7,
    "args": argparse.Namespace(lr=0.1),
    "opt": {"step": [1, 2.0]},
}


def saved(value, **options):
    """The bytes of torch.save."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def opcodes(data):
    """The bytes of every opcode of a pickle."""
    starts = [at for _, _, at in pickletools.genops(data)] + [len(data)]
    return [data[a:b] for a, b in itertools.pairwise(starts)]


def pickle_of(data):
    """The pickle inside an archive that torch.save wrote."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


def packed(pickled, like):
    """An archive as torch.save writes it, with another pickle inside."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(like)) as old, zipfile.ZipFile(file, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, pickled if info.filename.endswith("data.pkl") else old.read(info))
    return file.getvalue()


def number(value):
    """The opcode of an integer."""
    return pickle.dumps(value, 2)[2:-1]


def named(name):
    """The opcode of a global."""
    return b"c" + name.rpartition(".")[0].encode() + b"\n" + name.rpartition(".")[2].encode() + b"\n"


VALID = {"new": saved(STATE), "plain": saved(WEIGHTS), "old": saved(STATE, _use_new_zipfile_serialization=False)}
PICKLES = {name: pickle_of(VALID[name]) for name in ("new", "plain")}
MADE = "made-by-a-pickle"
REBUILD = ["_tensor", "_tensor_v2", "_tensor_v3", "_parameter", "_sparse_tensor", "_nested_tensor", "_qtensor"]
REBUILD += ["_meta_tensor_no_storage", "_wrapper_subclass", "_device_tensor_from_numpy"]
GLOBALS = ["os.mkdir", "os.system", "builtins.eval", "builtins.bytearray", "builtins.set", "builtins.complex"]
GLOBALS += ["collections.OrderedDict", "collections.Counter", "argparse.Namespace", "_codecs.encode", "torch.Size"]
GLOBALS += ["torch.FloatStorage", "torch.ByteStorage", "torch.Tensor", "torch.device", "torch.float32"]
GLOBALS += ["torch.nn.Parameter", "torch.serialization._get_layout"]
GLOBALS += [f"torch._utils._rebuild{name}" for name in REBUILD] + ["torch._tensor._rebuild_from_type_v2"]
WORDS = ["a.weight", "model", "storage", "cpu", "cuda", "meta", "0", "1", "9", "train_steps", MADE]
SIMPLE = [bytes([code]) for code in b"()}]N.0121etlsuaRbQ\x81\x85\x86\x87\x88\x89\x8f\x90\x94"]
OPCODES = st.one_of(
    st.sampled_from(SIMPLE),
    (SIZES | st.integers(-9, 9)).map(number),
    st.sampled_from(GLOBALS).map(named),
    st.sampled_from(WORDS).map(number),
    st.integers(0, 40).map(lambda slot: b"h" + bytes([slot])),
    st.builds(lambda code, data: bytes([code]) + data, st.integers(0, 255), st.binary(max_size=6)),
)
STEPS = st.lists(
    st.tuples(st.sampled_from(["replace", "replace", "insert", "drop", "call"]), st.integers(0, 200), OPCODES),
    max_size=4,
)


def change_opcodes(data, steps):
    """A pickle with some opcodes replaced, put in, or taken out, or with calls of a global."""
    codes = opcodes(data)
    for kind, place, code in steps:
        at = place % len(codes)
        if kind == "drop":
            del codes[at]
        elif kind == "call":
            codes[at:at] = [named(GLOBALS[place % len(GLOBALS)]), code, b"\x85", b"R"]
        else:
            codes[at : at + (kind == "replace")] = [code]
        codes = codes or [b"."]
    return b"".join(codes)


def repacked(name, steps):
    """A valid file with other opcodes inside."""
    return packed(change_opcodes(PICKLES[name], steps), VALID[name])


PICKLED = st.builds(
    lambda name, steps: packed(change_opcodes(PICKLES[name], steps), VALID[name]),
    st.sampled_from(sorted(PICKLES)),
    STEPS,
)
TORCH_FILES = st.one_of(
    PICKLED,
    st.builds(edit_bytes, st.sampled_from(sorted(VALID.values())), EDITS),
    STEPS.map(lambda steps: change_opcodes(PICKLES["plain"], steps)),
    st.binary(max_size=60),
)


def program(*codes):
    """A file whose pickle is this program."""
    return packed(b"\x80\x02" + b"".join(codes) + b".", VALID["plain"])


def resized(steps):
    """A valid file whose first tensor claims `steps` rows."""
    codes = opcodes(PICKLES["plain"])
    at = next(i for i, code in enumerate(codes) if code == number(2))
    codes[at] = number(steps)
    return packed(b"".join(codes), VALID["plain"])


FOREIGN = program(named("os.mkdir"), number(MADE), b"\x85R")
BYTEARRAY = program(named("builtins.bytearray"), number(2**30), b"\x85R")
NAMESPACE = program(named("argparse.Namespace"), number(1), b"\x85R")


def read_weights(path):
    """What a file of weights tells, and its tensors."""
    opened = open_weights(path, "--ckpt")
    return opened, opened.read()


def check_weights(accepted, found, path):
    """Shapes are those of the tensors; a refusal names the file."""
    if accepted:
        opened, state = found
        assert opened.shapes == {key: tuple(value.shape) for key, value in state.items()}
    else:
        assert str(path) in found


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder, in which foreign code would leave something."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@given(data=TORCH_FILES)
@example(data=VALID["new"])
@example(data=FOREIGN)
@example(data=BYTEARRAY)
@example(data=NAMESPACE)
@example(data=resized(2**30))
@example(data=resized(2**62))
@example(data=program(b"(" * 200_000))
@example(data=program(b"]" * 5 + b"a" * 9))
def test_weights(part, folder, elsewhere, data):
    path = folder / "weights.pt"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    check_weights(*read_or_refuse("weights .pt", read_weights, path), path)
    assert not (elsewhere / MADE).exists(), "foreign code was run"


@given(data=TORCH_FILES)
@example(data=VALID["new"])
@example(data=FOREIGN)
@example(data=saved({"train_steps": True}))
def test_state(part, folder, elsewhere, data):
    path = folder / "state.pt"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    accepted, found = read_or_refuse("training state", read_state, path)
    assert str(path) in found if not accepted else isinstance(found["train_steps"], int)
    assert not (elsewhere / MADE).exists(), "foreign code was run"


@pytest.mark.parametrize("name", VALID)
def test_weights_that_fit(folder, name):
    (folder / "valid.pt").write_bytes(VALID[name])
    _, state = read_weights(folder / "valid.pt")
    assert torch.equal(state["a.weight"], WEIGHTS["a.weight"])


def split(data):
    """Header and body of a .safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


SAFE = save(WEIGHTS)
HEADER, BODY = split(SAFE)
PARTS = SIZES | st.sampled_from(
    ["F32", "F16", "F64", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", [0, 24], [24, 28]]
)


def joined(header, body, length=None):
    """A .safetensors file; length: what it says of its header, if that is a lie."""
    text = json.dumps(header).encode()
    return ((len(text) if length is None else length) % 2**64).to_bytes(8, "little") + text + body


SAFE_FILES = st.one_of(
    st.builds(joined, changed(HEADER, special=PARTS), st.just(BODY) | st.binary(max_size=40), st.none()),
    st.builds(joined, changed(HEADER, special=PARTS), st.just(BODY), SIZES),
    st.builds(edit_bytes, st.just(SAFE), EDITS),
    st.binary(max_size=40),
)


@given(data=SAFE_FILES)
@example(data=SAFE)
@example(data=(2**40).to_bytes(8, "little") + b"{}")
@example(data=joined({"a": {"dtype": "F4", "shape": [2, 2], "data_offsets": [0, 2]}}, b"ab"))
def test_safetensors(part, folder, data):
    path = folder / "weights.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    check_weights(*read_or_refuse("weights .safetensors", read_weights, path), path)
