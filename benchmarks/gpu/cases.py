"""The cases: each the plain form of some work, and the form that users run."""

from functools import partial

from benchmarks.gpu import sides
from benchmarks.measure import Case


def in_both_forms(build, **options):
    """Eager, and compiled as it is by default on a GPU."""
    return {form: partial(build, compiled=form == "compiled", **options) for form in ("eager", "compiled")}


def in_four_forms(update, n):
    """Gate learning: dense or sparse, eager or compiled."""
    forms = {}
    for routing in ("dense", "sparse"):
        found = in_both_forms(sides.learn, update=update, dense=routing == "dense", n=n)
        forms |= {f"{routing}, {form}": build for form, build in found.items()}
    return forms


CASES = [
    *(
        Case(f"learning, {update}, {n} images", in_four_forms(update, n))
        for update, n in (("lora", 16), ("lora", 64), ("full", 16), ("full", 64))
    ),
    Case("fine-tuning, DiT-D14/2, 32 images", in_both_forms(sides.tune)),
    Case("training, SiT-XL/2, 16 images", in_both_forms(sides.tune, name="SiT-XL/2", n=16)),
    Case("training, MAR-L, 16 images", in_both_forms(sides.tune, name="MAR-L", n=16)),
    Case("Masked KD, DiT-D14/2, 32 images", in_both_forms(sides.distil)),
    Case("sampling, DiT-XL/2, 32 images, 10 steps", in_both_forms(sides.draw)),
    Case("sampling, DiT-D14/2, 32 images, 10 steps", in_both_forms(sides.draw, name="DiT-D14/2")),
]
