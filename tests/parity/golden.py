"""The recorded numbers: where they are, how close a result has to come, and networks with the recorded weights."""

import importlib.util
import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.objectives import Draw, GaussianObjective
from models import DiT

FOLDER = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent.parent / "golden")

TOLERANCES = {  # largest max|a - b| / max|b| over one array: float32, float64
    "exact": (0.0, 0.0),
    "table": (1e-6, 1e-12),
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

precisions = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, id="float32"), pytest.param(torch.float64, id="float64")]
)


def names(pattern):
    """Recorded files that match, as pytest parameters; there has to be one."""
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


def assert_close(value, expected, limit, what):
    """Equal shapes, and max|value - expected| <= limit * max|expected|."""
    value, expected = (torch.as_tensor(array).detach().double() for array in (value, expected))
    assert value.shape == expected.shape, f"{what}: shape {tuple(value.shape)}, recorded {tuple(expected.shape)}"
    if expected.numel():
        error, scale = (value - expected).abs().max().item(), expected.abs().max().item()
        assert error <= limit * scale, f"{what}: off by {error:.3g}, allowed {limit:g} of {scale:.3g}"


class Golden:
    """One recorded file, read for a run in `dtype`: inputs are cast to it, results compared with its recording."""

    def __init__(self, name, dtype=torch.float64):
        self.name, self.dtype, self.arrays = name, dtype, _arrays(name)
        self.meta = json.loads(str(self.arrays["meta"]))

    def __getitem__(self, key):
        tensor = torch.as_tensor(self.arrays[key])
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def has(self, prefix):
        return any(key.startswith(prefix) for key in self.arrays)

    def keys(self, prefix):
        """Recorded names behind `prefix`, at least one, without the suffix of the float64 arrays."""
        assert self.has(prefix), f"{self.name}: no {prefix}*"
        return [k.removeprefix(prefix) for k in self.arrays if k.startswith(prefix) and not k.endswith("_f64")]

    def recorded(self, key):
        """The recording for this precision (where there is only one, that one) and whether it is a float32 one."""
        both = self.dtype == torch.float64 and f"{key}_f64" in self.arrays
        array = self.arrays[f"{key}_f64" if both else key]
        return torch.as_tensor(array), self.dtype == torch.float32 or (not both and array.dtype == np.float32)

    def check(self, key, value, kind):
        expected, single = self.recorded(key)
        assert_close(value, expected, TOLERANCES[kind][0 if single else 1], f"{self.name}: {key}")

    def check_terms(self, prefix, terms, t, kind="loss"):
        """Compare every recorded per-sample term `<prefix>.<term>`; those of the bound are looser where t = 0."""
        recorded = [name for name in TERMS if f"{prefix}.{name}" in self.arrays]
        assert recorded, f"{self.name}: no terms {prefix}.*"
        for name in recorded:
            expected, single = self.recorded(f"{prefix}.{name}")
            for part in (t == 0, t != 0):
                loose = name in BOUND_TERMS and bool((t[part] == 0).any())
                limit = TOLERANCES["bound at t = 0" if loose else kind][0 if single else 1]
                what = f"{self.name}: {prefix}.{name} at t {'=' if loose else '!='} 0"
                assert_close(terms[name][part], expected[part], limit, what)


def network(config, seed, std, dtype=torch.float32, gate_std=0.02, **options):
    """A DiT in eval mode with the rebuilt weights; the position table stays the network's own."""
    net = DiT(**config, **options)
    state = net.state_dict()
    weights = gw.fill_model([(name, tuple(value.shape)) for name, value in state.items()], seed, std, gate_std)
    net.load_state_dict(state | {name: torch.as_tensor(value) for name, value in weights.items()})
    return net.to(dtype).eval()


def recorded_network(z, **options):
    """The network of a file whose `meta` has config, weight_seed and weight_std."""
    meta = z.meta
    return network(meta["config"], meta["weight_seed"], meta["weight_std"], z.dtype, **options)


def stream(z, pattern, shape, seed):
    """The draws `<pattern with k>` of a file as step_noise(k)."""
    return lambda k: torch.as_tensor(gw.normal(pattern.replace("<k>", str(k)), shape, seed)).to(z.dtype)


class Replay(GaussianObjective):
    """An objective that returns given draws, one (t, noise, drop) a step."""

    def __init__(self, diffusion, draws):
        super().__init__(diffusion)
        self.draws = iter(draws)

    def draw(self, net, x, y):
        return Draw(*next(self.draws))
