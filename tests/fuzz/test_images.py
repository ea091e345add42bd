"""Images and statistics of the evaluator: .npz files with the .npy members in them, and folders of pictures."""

import io
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from evaluation.batches import STATISTICS, open_images

from .inputs import EDITS, SIZES, VALUES, edit_bytes
from .limits import read_or_refuse

PIXELS = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
RAW = PIXELS.tobytes()
USUAL = "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 3, 4, 3), }"
MAGIC = b"\x93NUMPY"
HEADERS = [  # texts of which ast or numpy are known to make something else than a ValueError
    USUAL, "(" * 9000, "{'a': (1,", "{" * 300, "'''", "{'descr': '|u1'", "{1: 2, 'a': 3}", "{}", "0L", "(2L, 3",
    " {", "\\\n",
    "-" * 9000 + "1", "[" * 3000 + "]" * 3000, "{'a': 1" + "0" * 5000 + "}", "{b'a': 1, 'b': 2}", "{[]: 1}", "\x00", "",
]  # fmt: skip
DESCRS = ["|u1", "|u1", "|u1", "<f4", ">f8", "|O", "|V0", "|S0", "<U1", "<M8", "(2,)u1", "u1,u1", "|b1", "|V2147483647"]
DESCRS += [[], {}, None, 3, ("|u1", (3,)), [("a", "|u1")], [("a", "|O")], [("a", "|u1", (2**40,))]]
DESCRS = st.sampled_from(DESCRS)
FITTING = [(2, 3, 4, 3), (2, 3, 4, 3), (-2, -3, 4, 3), (2**62, 4, 1, 3), (2, 3, 4, 4), (0, 3, 4, 3), (2048,), (2, 3, 4)]
ENDING = st.lists(SIZES, min_size=3, max_size=3).map(lambda sizes: (*sizes, 3))
SHAPES = st.sampled_from(FITTING) | st.lists(SIZES | st.integers(-3, 5), max_size=5).map(tuple) | ENDING


def header(descr, fortran, shape):
    """The text of a header."""
    return repr({"descr": descr, "fortran_order": fortran, "shape": shape})


TEXTS = st.builds(header, DESCRS | VALUES, st.booleans() | VALUES, SHAPES | VALUES)
TEXTS |= st.sampled_from(HEADERS) | st.text(max_size=20)
TEXTS |= st.builds(header, st.just("|u1"), st.booleans(), SHAPES)


def member(text, version, length, data):
    """A .npy file with this text as header; length: what it says of it, if that is a lie."""
    text = text.encode("utf-8", "replace")
    width = 2 if version == (1, 0) else 4
    said = (len(text) if length is None else length) % 256**width
    return MAGIC + bytes(version) + said.to_bytes(width, "little") + text + data


VERSIONS = st.sampled_from([(1, 0), (1, 0), (2, 0), (3, 0), (3, 0), (0, 0), (9, 9)])
DATA = st.sampled_from([RAW, RAW[:-1], RAW + b"\0", b"", bytes(2048 * 4)])
MEMBERS = st.builds(member, TEXTS, VERSIONS, st.none() | st.none() | SIZES, DATA) | st.binary(max_size=30)
MEMBERS |= st.builds(edit_bytes, MEMBERS, EDITS)
VALID_TEXTS = st.builds(header, st.just("|u1"), st.booleans(), st.just(PIXELS.shape))
VALID_MEMBERS = st.builds(member, VALID_TEXTS, st.sampled_from([(1, 0), (2, 0), (3, 0)]), st.none(), st.just(RAW))
NAMES = st.sampled_from(
    ["arr_0.npy", "arr_0.npy", "mu.npy", "sigma.npy", "mu_s.npy", "arr_1.npy", "arr_0", "../arr_0.npy"]
)
COMPRESSIONS = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])


def archive(members, compression=zipfile.ZIP_STORED, lie=None):
    """An .npz of (name, bytes); lie: the size that the list of members says the first one has."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as file:
        for name, content in dict(members).items():
            file.writestr(name, content)
        if lie is not None and file.filelist:
            file.filelist[0].file_size = min(lie, 2**32 - 2)
    return data.getvalue()


CONTENTS = st.lists(st.tuples(NAMES, MEMBERS | VALID_MEMBERS), min_size=1, max_size=3)
ARCHIVES = st.builds(archive, CONTENTS, COMPRESSIONS, st.none() | st.none() | SIZES)
VALID = st.builds(lambda content, way: archive([("arr_0.npy", content)], way), VALID_MEMBERS, COMPRESSIONS)
ZEROS = bytes(200 << 20)


def one(text, version=(1, 0), name="arr_0.npy", data=RAW, **options):
    """An archive with one member."""
    return archive([(name, member(text, version, None, data))], **options)


def huge(**options):
    """An archive that says it has images of 128 MB, in the order that is read as a whole."""
    return one(header("|u1", True, (1 << 20, 1, 128, 3)), data=ZEROS[: 1 << 10], **options)


def read_all(path):
    """Number of images and size, statistics, and all pixels."""
    images = open_images(path)
    return images, list(images.batches(2))


@given(data=ARCHIVES | st.builds(edit_bytes, ARCHIVES | VALID, EDITS) | st.binary(max_size=60))
@example(data=one(USUAL))
@example(data=one(USUAL, (3, 0)))
@example(data=one(header("|u1", True, (2, 3, 4, 3))))
@example(data=one("(" * 9000))
@example(data=one("{'a': (1,"))
@example(data=one("{'descr': 1, 2: 3}"))
@example(data=one(header("|u1", True, (2**40, 1, 1, 3))))
@example(data=one(header("<f8", False, (2**40,)), name="mu.npy"))
@example(data=one(header("|u1", False, (-2, -3, 4, 3))))
@example(data=huge())
@example(data=huge(lie=(128 << 20) * 3))
@example(data=one(header("<f8", False, (2048,)), name="mu.npy", data=ZEROS, compression=zipfile.ZIP_DEFLATED))
@example(data=one(header("|u1", True, (1 << 19, 1, 128, 3)), data=ZEROS, compression=zipfile.ZIP_BZIP2))
def test_npz(part, folder, data):
    path = folder / "images.npz"
    path.write_bytes(data)
    accepted, found = read_or_refuse("npz", read_all, path)
    if accepted:
        images, batches = found
        assert sum(map(len, batches)) == images.n
        assert all(batch.dtype == np.uint8 and batch.shape[1:] == (*images.parts[0].size, 3) for batch in batches)
    else:
        assert str(path) in found


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("fortran", [False, True])
def test_npz_that_fits(folder, version, fortran):
    data = PIXELS.tobytes("F" if fortran else "C")
    (folder / "valid.npz").write_bytes(one(header("|u1", fortran, PIXELS.shape), version, data=data))
    _images, batches = read_all(folder / "valid.npz")
    np.testing.assert_array_equal(np.concatenate(batches), PIXELS)


@pytest.mark.parametrize("key", STATISTICS)
def test_statistics_that_lie(folder, key):
    """Arrays larger than what is expected are refused before memory is taken for them."""
    lying = member(header("<f8", False, (2**26,)), (1, 0), None, ZEROS[: 1 << 20])
    partner = {"mu": "sigma", "sigma": "mu", "mu_s": "sigma_s", "sigma_s": "mu_s"}[key]
    shape = STATISTICS[partner]
    fits = member(header("<f8", False, shape), (1, 0), None, bytes(8 * int(np.prod(shape))))
    path = folder / "statistics.npz"
    path.write_bytes(
        archive([("mu.npy", lying), ("sigma.npy", lying), (f"{key}.npy", lying), (f"{partner}.npy", fits)])
    )
    accepted, found = read_or_refuse("statistics", open_images, path)
    assert not accepted
    assert str(path) in found


def picture(kind, size=(5, 4), mode="RGB"):
    """The bytes of a picture."""
    file = io.BytesIO()
    Image.new(mode, size, 7).save(file, kind)
    return file.getvalue()


def wide_png(width, height):
    """A PNG whose header claims another size, with a check sum that fits."""
    data = bytearray(picture("PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


PICTURES = [picture(kind) for kind in ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF", "GIF", "ICO", "TGA", "SGI", "PCX")]
PICTURES += [picture("PNG", mode=mode) for mode in ("L", "P", "1", "I;16", "RGBA", "LA")]
PICTURE_FILES = st.builds(edit_bytes, st.sampled_from(PICTURES), EDITS)
PICTURE_FILES |= st.builds(wide_png, SIZES.map(lambda n: n % 2**31), SIZES.map(lambda n: n % 2**31))


@given(data=PICTURE_FILES | st.binary(max_size=60))
@example(data=PICTURES[0])
@example(data=edit_bytes(picture("TIFF"), [("flip", 72, b"")]))
@example(data=wide_png(2**17, 2**17))
@example(data=wide_png(2**13, 2**14))
@example(data=wide_png(2**31 - 1, 1))
@example(data=edit_bytes(PICTURES[0], [("set", 33, b"\x7f")]))
@example(data=b"")
def test_pictures(part, folder, data):
    path = folder / "pictures" / "0.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    accepted, found = read_or_refuse("pictures", read_all, path.parent)
    if accepted:
        images, batches = found
        assert batches[0].shape == (1, images.height, images.width, 3)
    else:
        assert str(path) in found
