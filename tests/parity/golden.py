"""The recorded numbers: where they are, how close a result has to come, and networks with the recorded weights."""

import importlib.util
import json
import os
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from machine import DEVICE

from diffusion.objectives import Draw, GaussianObjective
from models import DiT

FOLDER = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent.parent / "golden")

TOLERANCES = {  # largest max|a - b| / max|b| over one array: float32, float64
    "exact": (0.0, 0.0),
    "network": (1e-5, 1e-9),
    "loss": (1e-5, 5e-6),
    "gate gradient": (1e-4, 1e-8),
    "bound at t = 0": (5e-2, 1e-5),
    "clipped": (2e-4, 5e-5),
    "trajectory": (1e-4, 1e-6),
    "trajectory of lora_b": (1e-3, 1e-6),
}
BOUND_TERMS = ("vb", "vb_kd", "kd_loss", "gt", "loss")  # badly conditioned at t = 0
TERMS = (*BOUND_TERMS, "mse", "feat_loss")

WEAK_STD, SHRINK = 0.02, 2**-10  # of SiT's and MAR's arrays weak_* and small_*: by their format, not in their files

DTYPES = {"float32": torch.float32, "float64": torch.float64}
precisions = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def names(pattern):
    """Recorded files that match; there has to be one."""
    found = sorted(path.name for path in FOLDER.glob(pattern))
    assert found, f"no {pattern} in {FOLDER}"
    return found


def read_json(name):
    return json.loads((FOLDER / name).read_text())


def _weights_module():
    spec = importlib.util.spec_from_file_location("golden_weights", FOLDER / "golden_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gw = _weights_module()


@cache
def _arrays(name):
    with np.load(FOLDER / name) as archive:
        return dict(archive)


class Recorded:
    """One recorded file, read for a run in `dtype`: inputs are cast to it."""

    def __init__(self, name, dtype):
        self.name, self.dtype, self.arrays = name, dtype, _arrays(name)

    def __getitem__(self, key):
        tensor = torch.as_tensor(self.arrays[key])
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def keys(self, prefix="", suffix=""):
        """What recorded names have between `prefix` and `suffix`, at least one; the float64 arrays are left out."""
        found = [key for key in self.arrays if key.startswith(prefix) and key.endswith(suffix)]
        assert found, f"{self.name}: no {prefix}*{suffix}"
        return [key.removeprefix(prefix).removesuffix(suffix) for key in found if not key.endswith("_f64")]


class Golden(Recorded):
    """A file of DiT, whose `meta` has the settings: results are compared with its recording."""

    def __init__(self, name, dtype=torch.float64):
        super().__init__(name, dtype)
        self.meta = json.loads(str(self.arrays["meta"]))

    def has(self, prefix):
        return any(key.startswith(prefix) for key in self.arrays)

    def check(self, key, value, kind, pick=lambda array: array, note=""):
        """Compare with a recording: with all of it, or with what `pick` takes from it."""
        double = self.dtype == torch.float64 and f"{key}_f64" in self.arrays
        array = self.arrays[f"{key}_f64" if double else key]
        single = self.dtype == torch.float32 or (not double and array.dtype == np.float32)
        what, limit = f"{self.name}: {key}{note}", TOLERANCES[kind][0 if single else 1]
        value, expected = torch.as_tensor(value).detach().double(), pick(torch.as_tensor(array)).double()
        assert value.shape == expected.shape, f"{what}: shape {tuple(value.shape)}, recorded {tuple(expected.shape)}"
        if expected.numel():
            error, scale = (value - expected).abs().max().item(), expected.abs().max().item()
            assert error <= limit * scale, f"{what}: off by {error:.3g}, allowed {limit:g} of {scale:.3g}"

    def check_terms(self, prefix, terms, t, kind="loss"):
        """Compare every recorded per-sample term `<prefix>.<term>`; those of the bound are looser where t = 0."""
        recorded = [name for name in TERMS if f"{prefix}.{name}" in self.arrays]
        assert recorded, f"{self.name}: no terms {prefix}.*"
        for name in recorded:
            first = "bound at t = 0" if name in BOUND_TERMS else kind
            for part, part_kind, note in ((t == 0, first, " at t = 0"), (t != 0, kind, " at t > 0")):
                self.check(f"{prefix}.{name}", terms[name][part], part_kind, lambda a, part=part: a[part], note)


def network(config, seed, std, dtype=torch.float32, gate_std=0.02, **options):
    """A DiT in eval mode with the rebuilt weights; the position table stays the network's own."""
    net = DiT(**config, **options).to(DEVICE)
    state = net.state_dict()
    weights = gw.fill_model([(name, tuple(value.shape)) for name, value in state.items()], seed, std, gate_std)
    net.load_state_dict(state | {name: torch.as_tensor(value) for name, value in weights.items()})
    return net.to(dtype).eval()


def recorded_network(z, **options):
    """The network of a file whose `meta` has config, weight_seed and weight_std."""
    return network(z.meta["config"], z.meta["weight_seed"], z.meta["weight_std"], z.dtype, **options)


def stream(z, pattern, shape, seed):
    """The draws named `<pattern with k>` as step_noise(k)."""
    return lambda k: torch.as_tensor(gw.normal(pattern.replace("<k>", str(k)), shape, seed)).to(z.dtype)


def given_uniforms(uniform):
    """A context in which torch.rand returns `uniform`, the recorded draws of a label drop."""
    return mock.patch.object(torch, "rand", lambda *size, **options: uniform.reshape(*size))


class Recording(Recorded):
    """A file of SiT or MAR, <family>_<part>.npz: `facts` are the arguments of the recorded network."""

    family = None

    def __init__(self, part, dtype=torch.float32):
        super().__init__(f"{self.family}_{part}.npz", dtype)
        self.facts = json.loads(str(self.arrays["config"]))

    def check(self, key, value, tolerance=2e-5, pick=lambda array: array):
        check_close(f"{self.name}: {key}", value, pick(self.arrays[key]), tolerance)


def check_close(what, value, expected, tolerance=2e-5):
    """The rule of SiT and MAR: the largest difference against the largest recorded value."""
    value, expected = (torch.as_tensor(array).detach().double() for array in (value, expected))
    assert value.shape == expected.shape, f"{what}: shape {tuple(value.shape)}, recorded {tuple(expected.shape)}"
    error, scale = (value - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * scale, f"{what}: off by {error:.3g}, allowed {tolerance:g} of {scale:.3g}"


class Replay(GaussianObjective):
    """An objective that uses given draws, one (t, noise, uniforms of the label drop) a step."""

    def __init__(self, diffusion, draws):
        super().__init__(diffusion)
        self.draws = iter(draws)

    def draw(self, net, x, y):
        t, noise, uniform = next(self.draws)
        with given_uniforms(uniform):
            return Draw(t, noise, net.draw_drop(len(x), x.device))
