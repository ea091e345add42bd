"""The cases: each the plain form of some work, and the form that users run."""

from functools import partial

from benchmarks.gpu import sides
from benchmarks.measure import Case


def in_both_forms(build, **options):
    """Eager, and compiled as it is by default on a GPU."""
    return {form: partial(build, compiled=form == "compiled", **options) for form in ("eager", "compiled")}


def in_both_precisions(build):
    """float32 and bf16."""
    return {precision: partial(build, precision=precision) for precision in ("fp32", "bf16")}


def in_four_forms(update, n):
    """Gate learning: dense or sparse, eager or compiled."""
    forms = {}
    for routing in ("dense", "sparse"):
        found = in_both_forms(sides.learn, update=update, dense=routing == "dense", n=n)
        forms |= {f"{routing}, {form}": build for form, build in found.items()}
    return forms


CASES = [
    Case("fine-tuning, DiT-D14/2, 32 images", in_both_forms(sides.tune)),
    Case("Masked KD, DiT-D14/2, 32 images", in_both_forms(sides.distil)),
    Case("sampling, DiT-XL/2, 32 images, 10 steps", in_both_forms(sides.draw)),
    Case(
        "sampling, MAR-L, 16 images, 4 x 100 steps",
        {
            "head step by step": partial(sides.draw, name="MAR-L", n=16, steps=100, num_iter=4, head_graphs=False),
            "head as a graph": partial(sides.draw, name="MAR-L", n=16, steps=100, num_iter=4),
        },
    ),
    Case("extraction, 32 pictures of 256 px", in_both_precisions(sides.encode)),
    Case("decoding, 32 pictures of 256 px", in_both_precisions(sides.decode)),
    Case(
        "evaluator, 64 pictures of 256 px",
        {"sums on the processor": partial(sides.evaluate, on_device=False), "sums on the device": sides.evaluate},
    ),
    *(
        Case(f"learning, {update}, {n} images", in_four_forms(update, n))
        for update, n in (("lora", 16), ("lora", 64), ("full", 16), ("full", 64))
    ),
    Case("sampling, DiT-D14/2, 32 images, 10 steps", in_both_forms(sides.draw, name="DiT-D14/2")),
    Case("training, SiT-XL/2, 16 images", in_both_forms(sides.tune, name="SiT-XL/2", n=16)),
    Case("training, MAR-L, 16 images", in_both_forms(sides.tune, name="MAR-L", n=16)),
]
