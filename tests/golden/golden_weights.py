"""Arrays that anyone can rebuild from a name, a shape and a seed.

The golden files in this folder hold inputs and expected results but no model
weights.  Weights (and any other large pseudo-random array) are rebuilt with the
functions below, which need nothing but numpy:

    rng    = numpy.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xffffffff)
    values = (rng.standard_normal(shape) * std).astype(float32)

`numpy.random.RandomState` is numpy's frozen legacy generator, so the same name,
shape and seed give the same bits on every numpy version and platform.

Names are state-dict keys, for example ``blocks.0.attn.qkv.weight``.
"""

from __future__ import annotations

import zlib
from typing import Dict, Iterable, Mapping, Sequence, Tuple, Union

import numpy as np

NamedShapes = Union[Mapping[str, Sequence[int]], Iterable[Tuple[str, Sequence[int]]]]

# Parameters that are never random: the model keeps the table it computes itself.
FIXED_PARAMETERS = ("pos_embed",)
# Parameters whose names contain this are the per-group choice logits.
GATE_MARKER = "gumbel_gates"


def rng_for(name: str, seed: int) -> np.random.RandomState:
    """The generator that belongs to one (name, seed) pair."""
    return np.random.RandomState((zlib.crc32(name.encode("utf-8")) ^ int(seed)) & 0xFFFFFFFF)


def normal(name: str, shape: Sequence[int], seed: int, std: float = 1.0) -> np.ndarray:
    """float32 normal values; the scaling is done in float64 before rounding."""
    values = rng_for(name, seed).standard_normal(tuple(int(n) for n in shape))
    return np.asarray(np.asarray(values) * float(std), dtype=np.float32)


def uniform(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """float64 values in [0, 1)."""
    return np.asarray(rng_for(name, seed).random_sample(tuple(int(n) for n in shape)))


def exponential(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """float64 unit-rate exponential values; ``-log`` of them is standard Gumbel noise."""
    return np.asarray(rng_for(name, seed).standard_exponential(tuple(int(n) for n in shape)))


def integers(name: str, low: int, high: int, shape: Sequence[int], seed: int) -> np.ndarray:
    """int64 values in [low, high)."""
    return np.asarray(rng_for(name, seed).randint(low, high, size=tuple(int(n) for n in shape)), dtype=np.int64)


def _pairs(named_shapes: NamedShapes):
    return named_shapes.items() if isinstance(named_shapes, Mapping) else named_shapes


def fill_state_dict(named_shapes: NamedShapes, seed: int, std: float = 0.02) -> Dict[str, np.ndarray]:
    """One float32 array per (name, shape), each drawn from its own generator.

    Every name given is filled, with no exceptions; the order of the names has no
    influence on the values.
    """
    return {name: normal(name, shape, seed, std) for name, shape in _pairs(named_shapes)}


def fill_model(named_shapes: NamedShapes, seed: int, std: float, gate_std: float = 0.02) -> Dict[str, np.ndarray]:
    """What the golden files use for a whole model.

    `pos_embed` is left out (keep the model's own table), parameters whose name
    contains `gumbel_gates` use `gate_std`, and all others use `std`.
    """
    named = [(name, tuple(shape)) for name, shape in _pairs(named_shapes) if name not in FIXED_PARAMETERS]
    out = fill_state_dict([p for p in named if GATE_MARKER not in p[0]], seed, std)
    out.update(fill_state_dict([p for p in named if GATE_MARKER in p[0]], seed, gate_std))
    return out
