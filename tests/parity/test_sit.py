"""SiT against its recordings: network, paths, losses, ODE and SDE trajectories, likelihood, distillation."""

import json

import numpy as np
import pytest
import torch

from diffusion import flow
from diffusion.flow import velocity_of
from models import SiT, SiT_models
from pruning.scores import BlockInfluence
from pruning.surgery import keep_layers

from .golden import FOLDER, given_uniforms, gw, precisions


class Recording:
    """One sit_*.npz read for a run in `dtype`, and networks with its weights."""

    def __init__(self, name, dtype=torch.float32):
        with np.load(FOLDER / f"sit_{name}.npz") as archive:
            self.name, self.dtype, self.arrays = name, dtype, dict(archive)
        self.config = json.loads(str(self.arrays["config"]))

    def __getitem__(self, key):
        tensor = torch.as_tensor(self.arrays[key])
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def check(self, key, value, tolerance=2e-5, pick=lambda array: array):
        value, expected = torch.as_tensor(value).detach().double(), pick(torch.as_tensor(self.arrays[key])).double()
        assert value.shape == expected.shape, f"{key}: shape {tuple(value.shape)}, recorded {tuple(expected.shape)}"
        error, scale = (value - expected).abs().max().item(), expected.abs().max().item()
        assert error <= tolerance * scale, f"{key}: off by {error:.3g}, allowed {tolerance:g} of {scale:.3g}"

    def network(self, seed="seed", std=None, **options):
        """SiT in eval mode with the rebuilt weights; the position table stays the network's own."""
        net = SiT(**self.config | options)
        shapes = [(name, value.shape) for name, value in net.state_dict().items()]
        weights = gw.fill_model(shapes, int(self.arrays[seed]), std or float(self.arrays["weight_std"]))
        net.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()}, strict=False)
        return net.to(self.dtype).eval()


def guided_inputs(z, net, x, t=None):
    double = [torch.cat([a, a]) for a in ((x,) if t is None else (x, t))]
    return *double, torch.cat([z["y"], torch.full_like(z["y"], net.num_classes)])


# Network


@precisions
@pytest.mark.parametrize("strength", ["", "weak_"])
@pytest.mark.parametrize("variance", ["sigma", "plain"])
@torch.no_grad()
def test_output_and_guidance(dtype, strength, variance):
    z = Recording("forward", dtype)
    net = z.network(std=0.02 if strength else None, learn_sigma=variance == "sigma")
    z.check(f"{strength}{variance}_out", net(z["x"], z["t"], z["y"]))
    for scale in (1.0, 1.5, 4.0):
        found = net.forward_with_cfg(*guided_inputs(z, net, z["x"], z["t"]), scale)
        z.check(f"{strength}{variance}_cfg_{scale}", found)


@precisions
@torch.no_grad()
def test_layer_norm_epsilon(dtype):
    z = Recording("forward", dtype)
    for key, std, factor in (("weak_no_pos_out", 0.02, 1.0), ("small_input_out", None, 2.0**-10)):
        net = z.network(std=std)
        net.pos_embed.zero_()
        for p in net.x_embedder.proj.parameters():
            p.mul_(factor)
        z.check(key, net(z["x"], z["t"], z["y"]))


@precisions
@torch.no_grad()
def test_layers(dtype):
    z = Recording("forward", dtype)
    net, influence, hidden = z.network(), BlockInfluence(z.config["depth"]), []

    def observe(layer, before, after):
        influence(layer, before, after)
        hidden.append(after)

    net(z["x"], z["t"], z["y"], observe=observe)
    z.check("hidden_states", torch.stack(hidden))
    z.check("block_influence", influence.scores())
    z.check("masked_out", net(z["x"], z["t"], z["y"], mask=z["layer_masks"]))
    kept = z.arrays["kept_indices"].tolist()
    pruned = z.network(depth=len(kept))
    pruned.load_state_dict(keep_layers(net.state_dict(), kept))
    z.check("pruned_out", pruned(z["x"], z["t"], z["y"]))
    with given_uniforms(z["train_u"]):
        z.check("train_out", net.train()(z["x"], z["t"], z["y"]))
    assert list(net.state_dict()) == z.arrays["state_keys"].tolist()


@pytest.mark.parametrize(
    ("size", "count"), [("XL", 675_129_632), ("L", 458_102_816), ("B", 130_512_416), ("S", 32_963_360)]
)
def test_published_sizes(size, count):
    with torch.device("meta"):
        net = SiT_models[f"SiT-{size}/2"]()
    assert isinstance(net, SiT)
    assert sum(p.numel() for p in net.parameters()) == count


def test_gated_network_runs_its_decision():
    with torch.device("meta"):
        net = SiT_models["SiT-D14-2-4"]()
    assert [tuple(group) for group in net.gumbel_gates.groups] == [(2, 4)] * 3 + [(1, 2)]


# Paths


@pytest.mark.parametrize("name", flow.PATHS)
def test_path(name):
    z = Recording("paths", torch.float64)
    path, t, tolerance = flow.PATHS[name], z["t"], 1e-10
    for part, ours in {part: part for part in ("alpha", "d_alpha", "sigma", "d_sigma", "score_weight")}.items() | {
        ("d_alpha_over_alpha", "ratio")
    }:
        z.check(f"{name}_{part}", getattr(path, ours)(t), tolerance)
    z.check(f"{name}_minus_drift_of_ones", -velocity_of(name, "score", torch.zeros_like(t), torch.ones_like(t), t), 1)
    forms = [key.removeprefix(f"{name}_w_").rsplit("_", 1) for key in z.arrays if key.startswith(f"{name}_w_")]
    assert {form for form, _ in forms} == flow.DIFFUSION_FORMS.keys() - {"constant"}
    for form, norm in forms:
        z.check(f"{name}_w_{form}_{norm}", flow.DIFFUSION_FORMS[form](path, t, float(norm)), tolerance)
