"""PNG files as parts of a page."""

import base64
import struct
from pathlib import Path

from reporting.markup import element

START, END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
SMALL = 200  # pixels of a side up to which single pixels are to be seen


def embed_picture(path, text):
    """A PNG file as an <img> that holds it; text: what it shows, for those who do not see it.

    Raises ValueError for a file that cannot be read, is no PNG or is not whole.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    width, height = read_size(path, data)
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    classes = "pixels" if max(width, height) <= SMALL else None
    return element("img", src=source, alt=text, width=width, height=height, class_=classes)


def read_size(path, data):
    """(width, height) of a whole PNG. Raises ValueError for other data."""
    if not data.startswith(START) or not data.rstrip(b"\0").endswith(END) or data[12:16] != b"IHDR":
        raise ValueError(f"{path}: is no PNG, or not whole")
    return struct.unpack(">II", data[16:24])
