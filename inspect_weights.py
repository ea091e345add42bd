r"""Say what files of weights hold, and which command goes on from there. No tensors are loaded.

FILE: weights or a training state, a folder of diffusers, hf://OWNER/NAME, or the name of a published file, which is not
fetched. Sizes are those of the network, without what is trained along with it. GMACs are thousand million multiply-adds
of a forward pass in training.

Example:
  python inspect_weights.py pretrained/DiT-XL-2-256x256.pt outputs/D14-kd-DiT-D14-2/checkpoints/0500000.pt
"""

import json
import sys

from engine.cli import Command, launch, say
from engine.errors import InputError
from engine.flags import shared
from families.flags import NEEDED, Flag, path_text, switch

COMMAND = Command(
    "inspect_weights",
    __doc__,
    own=(
        Flag(
            "files",
            "files, folders or names of weights",
            nargs="+",
            positional=True,
            required=True,
            type=path_text,
            metavar="FILE",
            group=NEEDED,
        ),
        switch("json", "write a list of objects, one for every FILE", group=NEEDED),
    ),
    shared=shared("no-ema"),
    kinds=None,
)
parse_args = COMMAND.resolve


def yes_or_no(value):
    return "yes" if value else "no"


ROWS = {  # what is known -> its title and how it is shown to people
    "kind": ("kind", str),
    "family": ("family", str),
    "model": ("model", str),
    "layers": ("layers", lambda depths: " + ".join(map(str, depths))),
    "width": ("width", str),
    "parameters": ("parameters", "{:,}".format),
    "gmacs": ("GMACs an image", "{:,.4g}".format),
    "kept": ("kept layers", str),
    "pattern": ("pattern", str),
    "source": ("made from", str),
    "vae": ("autoencoder", str),
    "num_classes": ("classes", str),
    "latents": ("latents", lambda sizes: " x ".join(map(str, sizes))),
    "image_size": ("image size", str),
    "averaged": ("averaged", yes_or_no),
    "step": ("steps done", "{:,}".format),
    "script": ("script", str),
    "gates": ("gates inside", yes_or_no),
    "dtype": ("numbers", str),
    "bytes": ("bytes on disk", "{:,}".format),
    "url": ("published at", str),
    "continue": ("go on with", str),
}


def show(found):
    """The block of lines of one file, for people."""
    rows = [(title, form(found[name])) for name, (title, form) in ROWS.items() if found[name] is not None]
    lines = [found["file"], *(f"  {title:14}  {text}" for title, text in rows)]
    return "\n".join(line if line.isprintable() else ascii(line) for line in lines)


def main(settings):
    from engine.inspection import describe

    found, is_failed = [], False
    for name in settings.files:
        try:
            found.append(describe(name, average=not settings.no_ema))
        except InputError as error:
            say(error)
            is_failed = True
    if found or settings.json:
        print(json.dumps(found, indent=1) if settings.json else "\n\n".join(map(show, found)))
    if is_failed:
        sys.exit(1)


if __name__ == "__main__":
    launch(main, parse_args)
