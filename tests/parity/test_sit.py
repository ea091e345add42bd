"""SiT against its recordings: network, paths, losses, ODE, SDE, likelihood, distillation."""

import json

import numpy as np
import pytest
import torch

from diffusion.flow import (
    FORMS,
    LOSS_WEIGHTS,
    PATHS,
    PREDICTIONS,
    FlowObjective,
    OdeSampler,
    SdeSampler,
    at,
    diffusion_coefficient,
    log_likelihood,
    score_of,
    time_limits,
    velocity_of,
)
from diffusion.objectives import Draw
from models import SiT
from pruning.distillation import DistillStep, masked_feature_loss
from pruning.scores import BlockInfluence
from pruning.surgery import keep_layers

from .golden import FOLDER, check_close, given_uniforms, gw, precisions


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
        check_close(f"sit_{self.name}: {key}", value, pick(self.arrays[key]), tolerance)

    def network(self, seed="seed", std=None, **options):
        """SiT in eval mode with the rebuilt weights; the position table stays its own."""
        net = SiT(**self.config | options)
        for name, weight in net.state_dict().items():
            if name != "pos_embed":
                values = gw.normal(name, weight.shape, self.arrays[seed], std or self.arrays["weight_std"])
                weight.copy_(torch.as_tensor(values))
        return net.to(self.dtype).eval()


@pytest.mark.parametrize("sigma", [True, False])
@pytest.mark.parametrize("std", [None, 0.02])
@precisions
@torch.no_grad()
def test_network(sigma, std, dtype):
    z = Recording("forward", dtype)
    net, prefix = z.network(std=std, learn_sigma=sigma), ("weak_" if std else "") + ("sigma" if sigma else "plain")
    z.check(f"{prefix}_out", net(z["x"], z["t"], z["y"]))
    twice = [torch.cat([z[key], z[key]]) for key in ("x", "t")]
    labels = torch.cat([z["y"], torch.full_like(z["y"], net.num_classes)])
    for scale in (1.0, 1.5, 4.0):
        z.check(f"{prefix}_cfg_{scale}", net.forward_with_cfg(*twice, labels, scale))


@precisions
@torch.no_grad()
def test_small_inputs(dtype):
    """Inputs so small that another epsilon of the layer norms would show."""
    z = Recording("forward", dtype)
    for key, std in (("weak_no_pos_out", 0.02), ("small_input_out", None)):
        net = z.network(std=std)
        net.pos_embed.zero_()
        if std is None:
            for p in net.x_embedder.proj.parameters():
                p *= 2**-10
        z.check(key, net(z["x"], z["t"], z["y"]))


@precisions
@torch.no_grad()
def test_layers(dtype):
    z = Recording("forward", dtype)
    net, states, influence = z.network(), [], BlockInfluence(z.config["depth"])
    inputs = z["x"], z["t"], z["y"]
    assert sorted(net.state_dict()) == sorted(z.arrays["state_keys"].tolist())

    def observe(*seen):
        influence(*seen)
        states.append(seen[2])

    net(*inputs, observe=observe)
    z.check("hidden_states", torch.stack(states))
    z.check("block_influence", influence.scores())
    z.check("masked_out", net(*inputs, mask=z["layer_masks"]))
    pruned = SiT(**z.config | {"depth": len(z["kept_indices"])})
    pruned.load_state_dict(keep_layers(net.state_dict(), z["kept_indices"].tolist()))
    z.check("pruned_out", pruned.to(dtype).eval()(*inputs))
    with given_uniforms(z["train_u"]):
        z.check("train_out", net.train()(*inputs))


@pytest.mark.parametrize("path", PATHS)
def test_paths(path):
    z = Recording("paths", torch.float64)
    t, x, v = z["t"], z["x"], z["v"]
    c, wide = PATHS[path](t), at(path, t, 2)
    names = ("alpha", "d_alpha", "sigma", "d_sigma", "d_alpha_over_alpha", "score_weight")
    for name, value in zip(names, c, strict=True):
        z.check(f"{path}_{name}", value, 1e-10)
    for form in FORMS:
        for norm in (1.0, 0.7):
            if f"{path}_w_{form}_{norm}" in z.arrays:
                z.check(f"{path}_w_{form}_{norm}", diffusion_coefficient(form, norm, t, c), 1e-10)
    z.check(f"{path}_score_from_velocity", score_of(v, "velocity", x, wide), 1e-10)
    z.check(f"{path}_noise_from_velocity", -wide.sigma * score_of(v, "velocity", x, wide), 1e-10)
    z.check(f"{path}_velocity_from_score", velocity_of(v, "score", x, wide), 1e-10)


def test_time_limits():
    z = Recording("paths")
    for row, *expected in zip(*(z.arrays[f"interval_{key}"] for key in ("rows", "t0", "t1")), strict=True):
        path, prediction, use, *sde = row.split("|")
        options = dict(zip(("form", "last_step_size"), sde, strict=False))
        options["last_step_size"] = float(options.get("last_step_size", 0))
        first, last = time_limits(path, prediction, use.split("_")[0], reverse="reverse" in use, **options)
        if options.get("form") == "SBDM" and path != "VP" and prediction == "velocity":
            expected[0] = 1e-3  # recorded 0, where the noise is infinite: a fault that is not repeated
        assert (first, last) == pytest.approx(tuple(expected), abs=1e-12), row


def test_given_distance_to_the_ends():
    """Each use takes its own flag, also where the usual distance is zero."""
    assert time_limits("Linear", "velocity", "train", 0.01) == (0.01, 0.99)
    assert time_limits("VP", "noise", "ode", 0.02) == (0.0, 0.98)
    assert time_limits("GVP", "velocity", "sde", 0.02, "sigma", 0.0) == (0.02, 0.98)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
@precisions
def test_loss(path, prediction, dtype):
    z = Recording("loss", dtype)
    net, name = z.network(), f"{path}_{prediction}"
    for weight in LOSS_WEIGHTS:
        objective = FlowObjective(path, prediction, weight)
        first, last = objective.limits
        draw = Draw(z["u"] * (last - first) + first, z["x0"])
        output = objective.predict(net, z["x1"], z["y"], draw)
        loss = objective.loss(output, z["x1"], draw)["loss"]
        plain = f"{name}_None_loss" if prediction == "velocity" else f"{name}_{weight}_loss"
        z.check(plain, loss)
        if weight is None:
            z.check(f"{name}_None_t", draw.t)
            z.check(f"{name}_None_pred", output)
            z.check(f"{name}_xt", objective._point(z["x1"], draw)[0])
            loss.mean().backward()
            norms = [net.get_parameter(str(key)).grad.norm() for key in z.arrays["grad_names"]]
            z.check(f"{name}_None_grad_norms", torch.stack(norms), 1e-4)


def test_draws_follow_torch():
    """Noise first, then times, then label drops, all from the global generator."""
    z = Recording("loss")
    net, x = z.network().train(), z["x1"]
    torch.manual_seed(3)
    draw = FlowObjective("VP").draw(net, x, z["y"])
    torch.manual_seed(3)
    assert torch.equal(draw.noise, torch.randn_like(x))
    assert torch.equal(draw.t, torch.rand(len(x)) * (1 - 1e-5))
    assert torch.equal(draw.drop, torch.rand(len(x)) < 0.1)


ODE_ROWS = [row for row in Recording("ode").arrays if row.split("_")[-1] in ("euler", "heun2", "midpoint", "rk4")]


@pytest.mark.parametrize("row", ODE_ROWS)
@precisions
def test_fixed_step_ode(row, dtype):
    z = Recording("ode", dtype)
    *settings, method = row.split("_")
    path, prediction = settings if len(settings) == 2 else ("Linear", "velocity")
    scale = float(z.arrays["cfg_scale"]) if settings == ["cfg"] else 1.0
    options = {"reverse": settings == ["reverse"], "num_steps": int(z.arrays["num_steps"])}
    sampler = OdeSampler(path, prediction, scale, method=method, **options)
    with torch.no_grad():
        z.check(row, sampler.trajectory(z.network(), z["y"], z["z"]))


@torch.no_grad()
def test_adaptive_ode():
    z = Recording("ode")
    net, steps = z.network(), int(z.arrays["num_steps"])
    z.check("dopri5_default", OdeSampler(num_steps=steps).trajectory(net, z["y"], z["z"]), 1e-3)
    guided = OdeSampler(num_steps=steps, cfg_scale=float(z.arrays["cfg_scale"]))
    z.check("cfg_dopri5_default_last", guided.trajectory(net, z["y"], z["z"])[-1], 1e-3)
    z.check("cfg_dopri5_default_last", guided(net, z["y"], z["z"]), 1e-3, lambda array: array[:3])
    double = Recording("ode", torch.float64)
    tight = OdeSampler(num_steps=steps, atol=1e-8, rtol=1e-7)
    double.check("dopri5_tight_last", tight(double.network(), double["y"], double["z"]), 1e-4)


@pytest.mark.parametrize("i", range(12))
@precisions
@torch.no_grad()
def test_sde(i, dtype):
    """Every state; of guided runs the half that counts."""
    z = Recording("sde", dtype)
    path, prediction, method, form, norm, last, size, guidance = str(z.arrays["rows"][i]).split("|")
    scale, n = (float(z.arrays["cfg_scale"]) if guidance == "cfg" else 1.0), len(z["z"])
    noise, options = z[f"run{i}_noise"], {"num_steps": int(z.arrays["num_steps"]), "method": method}
    last = {"last_step": last, "last_step_size": float(size)}
    sampler = SdeSampler(path, prediction, scale, diffusion_form=form, diffusion_norm=float(norm), **last, **options)
    states = sampler.trajectory(z.network(), z["y"], z["z"], lambda k: noise[k, :n])
    z.check(f"run{i}_xs", torch.stack(states), pick=lambda array: array[:, :n])


@pytest.mark.parametrize("method", ["Euler", "Heun"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_every_form_of_noise(form, method):
    """Also the three that the original cannot run; one network call a drift."""
    z = Recording("sde")
    net, calls = z.network(), []
    net.x_embedder.register_forward_pre_hook(lambda *seen: calls.append(1))
    sampler = SdeSampler(num_steps=5, method=method, diffusion_form=form)
    assert sampler(net, z["y"], z["z"]).isfinite().all()
    assert len(calls) == 4 * (2 if method == "Heun" else 1) + 1


@pytest.mark.parametrize("path", ["Linear", "VP"])
def test_likelihood(path):
    z = Recording("likelihood")
    signs = z[f"{path}_probe_bits"].float() * 2 - 1
    sampler = OdeSampler(path, num_steps=int(z.arrays["num_steps"]))
    found, end = log_likelihood(z.network(), z["x"], z["y"], sampler, lambda k: signs[k])
    z.check(f"{path}_logp", found)
    z.check(f"{path}_end", end)


@precisions
def test_distillation(dtype):
    z = Recording("kd", dtype)
    teacher, student = z.network(), z.network("student_seed", depth=int(z.arrays["student_depth"]))
    objective, pairs = FlowObjective(), [tuple(pair) for pair in z.arrays["pairs"].tolist()]
    objective.draw = lambda net, x, y: Draw(z["t"], z["x0"])
    terms = DistillStep(student, teacher, objective, pairs, beta=float(z.arrays["beta"]))(z["x1"], z["y"])
    for name in ("gt", "kd_loss", "feat_loss", "loss"):
        z.check(name, terms[name])
    states = {student: {}, teacher: {}}
    for net, found in states.items():
        draw = objective.draw(net, None, None)
        objective.predict(net, z["x1"], z["y"], draw, lambda k, _, x, found=found: found.update({k: x}))
    losses = [masked_feature_loss(states[student][s], states[teacher][t]) for s, t in pairs]
    z.check("feat_per_layer", torch.stack(losses))
