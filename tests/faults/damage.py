"""What can be wrong with a file: small functions that take the path of a good one and damage it in place."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from faults.harness import MARKER

HTML = b"<!DOCTYPE html>\n<html><body>404: not found</body></html>\n"
DEEP = "[" * 100_000
HUGE = 10**30
NAN, INF = float("nan"), float("inf")


class Payload:
    """A pickle of this makes a folder where it is opened."""

    def __reduce__(self):
        return (os.mkdir, (MARKER,))


# Of any file: its bytes, or something else in its place.


def put(content):
    """The file holds these bytes."""
    return lambda path: Path(path).write_bytes(content)


def cut(share=None, last=0):
    """The file ends after a share of its bytes, or so many bytes too early."""

    def damage(path):
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: int(len(content) * share)] if share is not None else content[:-last])

    return damage


def add(content):
    """The file goes on after its end."""
    return lambda path: Path(path).write_bytes(Path(path).read_bytes() + content)


def zero(start, stop):
    """A run of bytes is zero."""

    def damage(path):
        content = bytearray(Path(path).read_bytes())
        content[start:stop] = bytes(len(content[start:stop]))
        Path(path).write_bytes(content)

    return damage


def flip(share, bit=6):
    """One bit is another, after a share of the bytes."""

    def damage(path):
        content = bytearray(Path(path).read_bytes())
        content[int(len(content) * share)] ^= 1 << bit
        Path(path).write_bytes(content)

    return damage


def remove(path):
    """The file or folder is missing."""
    path = Path(path)
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def to_fifo(path):
    """A FIFO is there instead, from which nothing ever comes."""
    remove(path)
    os.mkfifo(path)


def to_folder(path):
    """A folder is there instead."""
    remove(path)
    Path(path).mkdir()


def to_loop(path):
    """A link to itself is there instead."""
    remove(path)
    os.symlink(Path(path).name, path)


def to_dangling(path):
    """A link to nothing is there instead."""
    remove(path)
    os.symlink("nothing", path)


def copied(source):
    """The file holds what another one holds; `source`: relative to the case's folder, the parent of in/."""

    def damage(path):
        root = next(parent for parent in Path(path).parents if (parent / "in").is_dir())
        shutil.copy(root / source, path)

    return damage


BYTES = {
    "empty": put(b""),
    "of one byte": put(b"P"),
    "a page of HTML": put(HTML),
    "text": put(b"no weights here\n"),
    "cut to a tenth": cut(0.1),
    "cut in half": cut(0.5),
    "cut to 99 %": cut(0.99),
    "without its last byte": cut(last=1),
    "zeros at its beginning": zero(0, 512),
}
INSTEAD = {"a folder": to_folder, "a FIFO": to_fifo, "a link to itself": to_loop}
TEXTS = {  # contents of a JSON file
    "empty": b"",
    "cut": b'{"model": "DiT-T',
    "a list": b"[]",
    "a number": b"5",
    "text": b"model: DiT",
    "binary": bytes(range(256)),
    "UTF-16": '{"model": "DiT-T/2"}'.encode("utf-16"),
    "nested 100,000 deep": DEEP.encode(),
    "a number of 5,000 digits": b'{"num_classes": ' + b"9" * 5000 + b"}",
}


# JSON files


def edit_json(change):
    """Change the dict in a JSON file."""

    def damage(path):
        values = json.loads(Path(path).read_text())
        change(values)
        Path(path).write_text(json.dumps(values))

    return damage


def with_value(name, value):
    """A key of a JSON file has this value."""
    return edit_json(lambda values: values.update({name: value}))


def without(name):
    """A key of a JSON file is missing."""
    return edit_json(lambda values: values.pop(name))


# Files of weights


def read_tensors(path):
    """The content of a .pt or .safetensors file."""
    if str(path).endswith(".safetensors"):
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=False)


def write_tensors(path, state):
    """Write it again."""
    if str(path).endswith(".safetensors"):
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)


def edit_state(change):
    """Change a state dict; `change` returns another one, or None for the same."""

    def damage(path):
        state = read_tensors(path)
        changed = change(state)
        write_tensors(path, state if changed is None else changed)

    return damage


def matrix_key(state):
    """A key of a matrix in a block."""
    keys = [key for key, value in state.items() if hasattr(value, "ndim") and value.ndim == 2]
    return next((key for key in keys if "blocks" in key), keys[0])


def on_matrix(change):
    """Replace one matrix by change(matrix)."""

    def edit(state):
        key = matrix_key(state)
        state[key] = change(state[key])

    return edit_state(edit)


def on_all(change):
    """Replace every tensor."""
    return edit_state(lambda state: {key: change(value) for key, value in state.items()})


def with_number(number):
    """One number of a matrix is another."""

    def change(matrix):
        matrix = matrix.clone()
        matrix[0, 0] = number
        return matrix

    return on_matrix(change)


def on_keys(change):
    """Rename every key."""
    return edit_state(lambda state: {change(key): value for key, value in state.items()})


def drop_key(state):
    state.pop(matrix_key(state))


def add_key(state):
    state["another.weight"] = torch.zeros(2)


NUMBERS_INSIDE = {
    "a NaN inside": with_number(NAN),
    "an infinity inside": with_number(INF),
    "NaN alone": on_all(lambda value: torch.full_like(value, NAN)),
}
STATES = {  # of .pt and of .safetensors
    **NUMBERS_INSIDE,
    "integers": on_all(lambda value: value.long()),
    "a matrix of integers": on_matrix(lambda value: value.int()),
    "booleans": on_all(lambda value: value > 0),
    "a key missing": edit_state(drop_key),
    "a key too many": edit_state(add_key),
    "a matrix transposed": on_matrix(lambda value: value.T[:5].contiguous()),
    "a matrix without rows": on_matrix(lambda value: value[:0]),
    "a number instead of a matrix": on_matrix(lambda value: torch.tensor(1.0)),
    "another dimension": on_matrix(lambda value: value[None]),
    "keys that begin with module.": on_keys(lambda key: f"module.{key}"),
    "no tensors": edit_state(lambda state: {}),
    "a block of number 99999999": on_keys(lambda key: key.replace("blocks.1.", "blocks.99999999.")),
    "a block without a number": on_keys(lambda key: key.replace("blocks.1.", "blocks.x.")),
    "a block of number -1": on_keys(lambda key: key.replace("blocks.1.", "blocks.-1.")),
    "no blocks": edit_state(lambda state: {key: value for key, value in state.items() if "blocks" not in key}),
    "one tensor alone": edit_state(lambda state: {"weight": torch.zeros(3)}),
}
ONLY_PT = {
    "complex numbers": on_matrix(lambda value: value.to(torch.complex64)),
    "sparse": on_matrix(lambda value: value.to_sparse()),
    "a tensor without data": on_matrix(lambda value: value.to("meta")),
    "a list of tensors": edit_state(lambda state: list(state.values())),
    "a tensor": edit_state(lambda state: torch.zeros(3)),
    "a number": edit_state(lambda state: 5),
    "nothing": edit_state(lambda state: {"model": None}),
    "numbers as keys": edit_state(lambda state: dict(enumerate(state.values()))),
    "lists instead of tensors": edit_state(lambda state: {key: [1.0] for key in state}),
    "a value of None": on_matrix(lambda value: None),
    "a text as a value": on_matrix(lambda value: "text"),
    "an entry model without tensors": edit_state(lambda state: {"model": {}, "train_steps": 3}),
    "an entry ema that is a text": edit_state(lambda state: {"ema": "text"}),
    "numpy arrays": edit_state(lambda state: {key: value.numpy() for key, value in state.items()}),
}


def save_payload(path):
    """A checkpoint that runs code."""
    torch.save({"model": Payload()}, path)


def save_old_payload(path):
    """The same in the format before zip archives."""
    torch.save({"model": Payload()}, path, _use_new_zipfile_serialization=False)


def save_beside_payload(path):
    """Good weights, and beside them an object that runs code."""
    torch.save({"model": read_tensors(path), "args": Payload()}, path)


def save_pickle(path):
    """A plain pickle that runs code."""
    Path(path).write_bytes(pickle.dumps(Payload()))


def rewrite_zip(path, change):
    """Write a zip archive again with change(name, content) -> content."""
    with zipfile.ZipFile(path) as archive:
        items = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in items:
            content = change(name, content)
            if content is not None:
                archive.writestr(name, content)


def swap_pickle(path):
    """The pickle in a good checkpoint is one that runs code."""
    rewrite_zip(path, lambda name, content: pickle.dumps(Payload()) if name.endswith("data.pkl") else content)


def lose_records(path):
    """The pickle is whole, and the numbers of half of the tensors are missing."""
    rewrite_zip(path, lambda name, content: None if re.search(r"/data/\d*[13579]$", name) else content)


def shorten_records(path):
    """The pickle is whole, and the numbers of all tensors end early."""
    rewrite_zip(path, lambda name, content: content[: len(content) // 2] if "/data/" in name else content)


def inflate(path):
    """A pickle of a gigabyte, in a megabyte of file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as member:
            member.write(b"\x80\x02")
            for _ in range(64):
                member.write(b"N0" * (1 << 19))
            member.write(b"N.")
        archive.writestr("archive/version", "3\n")


HOSTILE_PT = {
    "code in it": save_payload,
    "code in it, in the old format": save_old_payload,
    "code beside the weights": save_beside_payload,
    "a pickle with code": save_pickle,
    "its pickle changed to code": swap_pickle,
    "half of its tensors lost": lose_records,
    "tensors shorter than they say": shorten_records,
    "a pickle that unpacks to a hundred times its size": inflate,
    "a bit of its pickle flipped": flip(0.0008),
    "its directory zero": lambda path: zero(-700, -60)(path),
}
FLIPPED = {f"a bit flipped inside its tensors, at {share:.0%}": flip(share) for share in (0.3, 0.6)}


def header_of(path):
    """(header, data) of a .safetensors file."""
    content = Path(path).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def edit_header(change, size=None):
    """Change the header of a .safetensors file, or what it says of its own size."""

    def damage(path):
        header, data = header_of(path)
        changed = change(header, next(key for key in header if key != "__metadata__"))
        text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
        Path(path).write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)

    return damage


HEADERS = {
    "a header longer than the file": edit_header(lambda header, key: None, size=1 << 40),
    "a header of 2**63 bytes": edit_header(lambda header, key: None, size=1 << 63),
    "an empty header": edit_header(lambda header, key: b"", size=0),
    "a header that is no JSON": edit_header(lambda header, key: b"{" * 100),
    "a header that is a list": edit_header(lambda header, key: b"[]"),
    "offsets beyond the end": edit_header(lambda h, key: h[key].update(data_offsets=[1 << 40, (1 << 40) + 64])),
    "offsets that overlap": edit_header(lambda h, key: h[key].update(data_offsets=[8, 8 + span(h[key])])),
    "a shape that lies": edit_header(lambda header, key: header[key].update(shape=[10**9, 10**9])),
    "a negative shape": edit_header(lambda header, key: header[key].update(shape=[-1, 4])),
    "an unknown type of numbers": edit_header(lambda header, key: header[key].update(dtype="F7")),
    "another type of numbers": edit_header(lambda header, key: header[key].update(dtype="I32")),
    "a header nested 100,000 deep": edit_header(lambda header, key: DEEP.encode()),
}


def span(entry):
    return entry["data_offsets"][1] - entry["data_offsets"][0]


# Arrays


def edit_array(change):
    """Replace an array by change(array)."""

    def damage(path):
        array = np.load(path)
        np.save(path, change(array), allow_pickle=True)

    return damage


def set_to(index, value):
    """One element of an array is another."""

    def change(array):
        array = array.copy()
        array[index] = value
        return array

    return edit_array(change)


def save_objects(path):
    """An array of Python objects, which runs code when it is opened as one."""
    np.save(path, np.array([Payload()] * 4, dtype=object), allow_pickle=True)


def npy_header(path, text, version=(1, 0)):
    """The header of an array says something else; its data stay."""
    content = Path(path).read_bytes()
    size = struct.unpack("<H", content[8:10])[0]
    header = text.encode()
    header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    start = b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(header))
    Path(path).write_bytes(start + header + content[10 + size :])


def says(descr="<f4", shape="(32, 2, 3, 8, 8)", version=(1, 0), text=None):
    """An array whose header says this."""
    text = text or f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    return lambda path: npy_header(path, text, version)


NPY_HEADERS = {
    "a header of a shape beyond its end": says(shape="(1000000000, 2, 3, 8, 8)"),
    "a header of a negative shape": says(shape="(-32, 2, 3, 8, 8)"),
    "a header of an unknown type": says(descr="<q9"),
    "a header of objects": says(descr="|O"),
    "a header of a version to come": says(version=(9, 0)),
    "a header that is no dict": says(text="[1, 2, 3]"),
    "a header that is code": says(text=f"__import__('os').mkdir('{MARKER}')"),
    "a header nested deep": says(text="(" * 20_000),
}
ARRAY_BYTES = {name: BYTES[name] for name in ("empty", "of one byte", "text", "cut in half", "without its last byte")}


# Pictures


def save_picture(size=(8, 8), kind="PNG", mode="RGB", share=None, **options):
    """A picture of another size, kind or mode, perhaps cut."""

    def damage(path):
        buffer = io.BytesIO()
        Image.effect_noise(size, 80).convert(mode).save(buffer, kind, **options)
        content = buffer.getvalue()
        Path(path).write_bytes(content if share is None else content[: int(len(content) * share)])

    return damage


def png(width, height, data=b"", extra=()):
    """A PNG that says it has this size, with these compressed data and further chunks."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *extra, (b"IDAT", data), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return put(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


PICTURES = {
    "empty": put(b""),
    "text": put(b"no picture"),
    "HTML": put(HTML),
    "a PNG cut in half": save_picture((64, 64), share=0.5),
    "a PNG cut in its header": put(b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0"),
    "a JPEG cut in half": save_picture((64, 64), "JPEG", share=0.5),
    "a WebP cut in half": save_picture((64, 64), "WEBP", share=0.5),
    "a BMP cut in half": save_picture((64, 64), "BMP", share=0.5),
    "a TIFF cut in half": save_picture((64, 64), "TIFF", share=0.5),
    "a PNG that says 30000x30000": png(30_000, 30_000),
    "a PNG that says 2000000000x2": png(2_000_000_000, 2),
    "a PNG of width 0": png(0, 8, zlib.compress(b"")),
    "a PNG with broken data": png(8, 8, b"\0" * 40),
    "a PNG without data": png(8, 8),
    "a PNG with a text that unpacks to 200 MB": png(
        8, 8, zlib.compress(bytes(8 * 25)), [(b"zTXt", b"k\0\0" + zlib.compress(bytes(200 << 20)))]
    ),
    "a wrong check sum in a PNG": lambda path: zero(20, 24)(path),
    "a FIFO": to_fifo,
    "a link to nothing": to_dangling,
}


# Archives of images


def save_archive(**arrays):
    """An .npz of these arrays; a function is called with the images that were there."""

    def damage(path):
        with np.load(path) as archive:
            good = archive["arr_0"]
        found = {name: value(good) if callable(value) else value for name, value in arrays.items()}
        np.savez(path, **found)

    return damage


def edit_member(change, name="arr_0.npy"):
    """Change the bytes of an array in an .npz."""
    return lambda path: rewrite_zip(path, lambda found, content: change(content) if found == name else content)


def member_says(shape, descr="|u1"):
    """arr_0 has another header."""

    def change(content):
        size = struct.unpack("<H", content[8:10])[0]
        text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(size - 1) + "\n"
        return content[:10] + text.encode() + content[10 + size :]

    return edit_member(change)


def set_zip_bytes(signature, offset, value):
    """Bytes of a record of a zip archive are others."""

    def damage(path):
        content = bytearray(Path(path).read_bytes())
        at = content.rfind(signature) + offset
        content[at : at + len(value)] = value
        Path(path).write_bytes(content)

    return damage


def break_sum(path):
    """A pixel is another than its check sum says."""
    content = bytearray(Path(path).read_bytes())
    content[content.index(b"\x93NUMPY") + 300] ^= 255
    Path(path).write_bytes(content)


def objects(good):
    """An array of objects with code."""
    return np.array([Payload()] * 8, dtype=object)


ARCHIVES = {
    **{name: BYTES[name] for name in ("empty", "text", "a page of HTML", "cut in half", "without its last byte")},
    "cut before its directory": cut(last=100),
    "an archive of nothing": put(b"PK\x05\x06" + bytes(18)),
    "no arr_0": save_archive(images=lambda good: good),
    "floats": save_archive(arr_0=lambda good: good / 255.0),
    "whole floats": save_archive(arr_0=lambda good: good.astype(np.float32)),
    "NaN": save_archive(arr_0=lambda good: np.full(good.shape, NAN, np.float32)),
    "int32": save_archive(arr_0=lambda good: good.astype(np.int32)),
    "booleans": save_archive(arr_0=lambda good: good > 0),
    "signed bytes": save_archive(arr_0=lambda good: good.astype(np.int8)),
    "text inside": save_archive(arr_0=np.array(["a", "b"])),
    "objects with code": save_archive(arr_0=objects),
    "one image": save_archive(arr_0=lambda good: good[:1]),
    "no image": save_archive(arr_0=lambda good: good[:0]),
    "images without height": save_archive(arr_0=lambda good: good[:, :0]),
    "three dimensions": save_archive(arr_0=lambda good: good[..., 0]),
    "five dimensions": save_archive(arr_0=lambda good: good[None]),
    "a number": save_archive(arr_0=np.uint8(3)),
    "channels first": save_archive(arr_0=lambda good: good.transpose(0, 3, 1, 2)),
    "four channels": save_archive(arr_0=lambda good: np.concatenate([good, good[..., :1]], -1)),
    "one channel": save_archive(arr_0=lambda good: good[..., :1]),
    "a header of a billion images": member_says("(1000000000, 8, 8, 3)"),
    "a header of fewer images": member_says("(4, 8, 8, 3)"),
    "a header of a negative shape": member_says("(-8, 8, 8, 3)"),
    "a header of objects": member_says("(8, 8, 8, 3)", "|O"),
    "arr_0 that is no array": edit_member(lambda content: HTML),
    "arr_0 that is empty": edit_member(lambda content: b""),
    "arr_0 cut": edit_member(lambda content: content[:-200]),
    "a wrong check sum": break_sum,
    "a pass word": set_zip_bytes(b"PK\x01\x02", 8, b"\x01\x00"),
    "an unknown compression": set_zip_bytes(b"PK\x01\x02", 10, b"\x63\x00"),
    "a size that lies": set_zip_bytes(b"PK\x01\x02", 24, struct.pack("<I", 0x7FFFFFFF)),
    "an offset that lies": set_zip_bytes(b"PK\x01\x02", 42, struct.pack("<I", 0x7FFFFFFF)),
}


def save_statistics(**changed):
    """Stored statistics of which some are others; None: missing."""

    def damage(path):
        with np.load(path) as archive:
            arrays = dict(archive)
        for name, change in changed.items():
            value = change(arrays[name]) if callable(change) else change
            arrays.pop(name) if value is None else arrays.update({name: value})
        np.savez_compressed(path, **arrays)

    return damage


def first(value):
    """The first number of an array is another."""

    def change(array):
        array = array.copy()
        array.flat[0] = value
        return array

    return change


STATISTICS = {
    "mu with a NaN": save_statistics(mu=first(NAN)),
    "mu with an infinity": save_statistics(mu=first(INF)),
    "sigma with a NaN": save_statistics(sigma=first(NAN)),
    "mu of another length": save_statistics(mu=lambda array: array[:100]),
    "mu of two dimensions": save_statistics(mu=lambda array: array[None]),
    "sigma of another size": save_statistics(sigma=lambda array: array[:100, :100]),
    "sigma that is its diagonal": save_statistics(sigma=lambda array: np.diag(array)),
    "sigma missing": save_statistics(sigma=None),
    "mu missing": save_statistics(mu=None),
    "mu of whole numbers": save_statistics(mu=lambda array: array.astype(np.int64)),
    "mu of complex numbers": save_statistics(mu=lambda array: array.astype(np.complex64)),
    "mu of text": save_statistics(mu=lambda array: np.array(["a"] * 2048)),
    "mu of objects with code": save_statistics(mu=objects),
    "sigma with negative variances": save_statistics(sigma=lambda array: -array),
}


# Weights of Inception


def edit_constants(change):
    """Change the dict in a .pth of Inception."""
    return edit_state(change)


def set_entry(name, change):
    def edit(state):
        state[name] = change(state[name])

    return edit_state(edit)


LAYER = "conv.conv.weight"
INCEPTION_PTH = {
    **{name: BYTES[name] for name in ("empty", "text", "a page of HTML", "cut in half", "without its last byte")},
    "code in it": save_payload,
    "a pickle with code": save_pickle,
    "a list": edit_state(lambda state: list(state.values())),
    "a key missing": edit_state(lambda state: state.pop("conv.bn.bias") is None or None),
    "the classes missing": edit_state(lambda state: state.pop("fc.weight") is None or None),
    "another shape": set_entry(LAYER, lambda value: value[:4]),
    "a vector for a convolution": set_entry(LAYER, lambda value: value.flatten()),
    "a text for a convolution": set_entry(LAYER, lambda value: "text"),
    "a NaN": set_entry(LAYER, lambda value: value * NAN),
    "negative variances": set_entry("conv.bn.running_var", lambda value: -value - 1),
    "complex numbers": set_entry(LAYER, lambda value: value.to(torch.complex64)),
    "classes of NaN": set_entry("fc.weight", lambda value: value * NAN),
    "classes of one row": set_entry("fc.weight", lambda value: value[:1]),
    "classes of three dimensions": set_entry("fc.weight", lambda value: value[None]),
    "numbers as keys": edit_state(lambda state: dict(enumerate(state.values()))),
}
INCEPTION_PB = {
    **{name: BYTES[name] for name in ("empty", "of one byte", "text", "a page of HTML", "cut to a tenth")},
    "cut in half": cut(0.5),
    "without its last byte": cut(last=1),
    "zeros at its beginning": zero(0, 512),
    "zeros alone": put(bytes(1000)),
    "a number that does not end": put(b"\xff" * 1000),
    "a length beyond its end": put(b"\x0a" + b"\xff" * 8 + b"\x7f"),
    "groups nested deep": put(b"\x0a\x02" * 50_000),
    "bytes of 255": put(b"\x0a\xff\xff\xff\xff\x0f" + bytes(64)),
    "a NaN among its weights": lambda path: put(Path(path).read_bytes()[:-200_000] + b"\xff" * 200_000)(path),
}


# Training states


def on_entry(name, change):
    """Replace an entry of a training state by change(entry)."""

    def edit(state):
        state[name] = change(state[name])

    return edit_state(edit)


def drop_entry(name):
    return edit_state(lambda state: state.pop(name) is None or None)


def on_matrix_of(name, change):
    """Replace a matrix in an entry of a training state."""

    def edit(entry):
        key = matrix_key(entry)
        entry[key] = change(entry[key].clone())
        return entry

    return on_entry(name, edit)


def on_averages(change):
    """Change the first entry of the optimizer's state."""

    def edit(opt):
        change(opt["state"][0])
        return opt

    return on_entry("opt", edit)


def on_group(change):
    """Change the first group of the optimizer's parameters."""

    def edit(opt):
        change(opt["param_groups"][0])
        return opt

    return on_entry("opt", edit)


STEPS = {
    "-1": -1,
    "10**9": 10**9,
    "2.5": 2.5,
    "True": True,
    "NaN": NAN,
    "a text": "4",
    "None": None,
    "a list": [4],
    "10**30": HUGE,
}
TRAINING_STATES = {
    **BYTES,
    **{name: HOSTILE_PT[name] for name in ("code in it", "a pickle with code", "its pickle changed to code")},
    "code in its settings": on_entry("args", lambda value: Payload()),
    "half of its tensors lost": lose_records,
    **FLIPPED,
    **{f"train_steps is {name}": on_entry("train_steps", lambda _, v=value: v) for name, value in STEPS.items()},
    "train_steps missing": drop_entry("train_steps"),
    "model missing": drop_entry("model"),
    "model is None": on_entry("model", lambda value: None),
    "model is a list": on_entry("model", list),
    "model is empty": on_entry("model", lambda value: {}),
    "model with a NaN": on_matrix_of("model", lambda value: value * NAN),
    "model with an infinity": on_matrix_of("model", lambda value: value + INF),
    "model of other shapes": on_matrix_of("model", lambda value: value[:3]),
    "model of whole numbers": on_entry("model", lambda value: {key: t.long() for key, t in value.items()}),
    "model of complex numbers": on_matrix_of("model", lambda value: value.to(torch.complex64)),
    "ema missing": drop_entry("ema"),
    "ema is None": on_entry("ema", lambda value: None),
    "ema with a NaN": on_matrix_of("ema", lambda value: value * NAN),
    "ema of other shapes": on_matrix_of("ema", lambda value: value[:3]),
    "opt missing": drop_entry("opt"),
    "opt is None": on_entry("opt", lambda value: None),
    "opt is a text": on_entry("opt", lambda value: "text"),
    "opt without groups": on_entry("opt", lambda value: {"state": {}, "param_groups": []}),
    "opt without state": on_entry("opt", lambda value: {"param_groups": value["param_groups"]}),
    "opt without averages": on_entry("opt", lambda value: {**value, "state": {}}),
    "averages of other shapes": on_averages(lambda entry: entry.update(exp_avg=torch.zeros(3, 3))),
    "averages missing": on_averages(lambda entry: entry.pop("exp_avg")),
    "averages with a NaN": on_averages(lambda entry: entry["exp_avg"].fill_(NAN)),
    "averages that are negative": on_averages(lambda entry: entry["exp_avg_sq"].fill_(-1.0)),
    "averages that are a text": on_averages(lambda entry: entry.update(exp_avg="text")),
    "a group that is a parameter short": on_group(lambda group: group["params"].pop()),
    "a group without parameters": on_group(lambda group: group.pop("params")),
    "plain weights": edit_state(lambda state: state["model"]),
    "an empty dict": edit_state(lambda state: {}),
    "a list": edit_state(lambda state: [state["model"]]),
    "one number": edit_state(lambda state: 4),
}  # fmt: skip
