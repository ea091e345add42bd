"""SiT against its recordings: network, paths, losses, ODE, SDE, likelihood, distillation."""

import pytest
import torch
from machine import DEVICE

from diffusion.flow import (
    LOSS_WEIGHTS,
    PATHS,
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
from families.sit import NOISE_FORMS
from models import SiT
from pruning.distillation import DistillStep, masked_feature_loss
from pruning.scores import BlockInfluence
from pruning.surgery import keep_layers

from . import golden
from .golden import SHRINK, WEAK_STD, given_uniforms, gw, precisions

SBDM_START = 1e-3  # deliberate difference: recorded as 0, where the noise of this form is infinite


class Recording(golden.Recording):
    """A recorded file of SiT, and networks with its weights."""

    family = "sit"

    def network(self, seed="seed", std=None, **options):
        """SiT in eval mode with the rebuilt weights; the position table stays its own."""
        net = SiT(**self.facts | options).to(DEVICE)
        for name, weight in net.state_dict().items():
            if name != "pos_embed":
                values = gw.normal(name, weight.shape, self.arrays[seed], std or self.arrays["weight_std"])
                weight.copy_(torch.as_tensor(values))
        return net.to(self.dtype).eval()


OUTPUTS = [weak + kind for kind in ("sigma", "plain") for weak in Recording("forward").keys(suffix=f"{kind}_out")]


@pytest.mark.parametrize("name", OUTPUTS)
@precisions
@torch.no_grad()
def test_network(name, dtype):
    z = Recording("forward", dtype)
    net = z.network(std=WEAK_STD if name.startswith("weak_") else None, learn_sigma=name.endswith("sigma"))
    z.check(f"{name}_out", net(z["x"], z["t"], z["y"]))
    twice = [torch.cat([z[key], z[key]]) for key in ("x", "t")]
    labels = torch.cat([z["y"], torch.full_like(z["y"], net.num_classes)])
    for scale in z.keys(f"{name}_cfg_"):
        z.check(f"{name}_cfg_{scale}", net.forward_with_cfg(*twice, labels, float(scale)))


@precisions
@torch.no_grad()
def test_small_inputs(dtype):
    """Inputs so small that another epsilon of the layer norms would show."""
    z = Recording("forward", dtype)
    for key, std in (("weak_no_pos_out", WEAK_STD), ("small_input_out", None)):
        net = z.network(std=std)
        net.pos_embed.zero_()
        if std is None:
            for p in net.x_embedder.proj.parameters():
                p *= SHRINK
        z.check(key, net(z["x"], z["t"], z["y"]))


@precisions
@torch.no_grad()
def test_layers(dtype):
    z = Recording("forward", dtype)
    net, states, influence = z.network(), [], BlockInfluence(z.facts["depth"])
    inputs = z["x"], z["t"], z["y"]
    assert sorted(net.state_dict()) == sorted(z.arrays["state_keys"].tolist())

    def observe(*seen):
        influence(*seen)
        states.append(seen[2])

    net(*inputs, observe=observe)
    z.check("hidden_states", torch.stack(states))
    z.check("block_influence", influence.scores())
    z.check("masked_out", net(*inputs, mask=z["layer_masks"]))
    pruned = SiT(**z.facts | {"depth": len(z["kept_indices"])})
    pruned.load_state_dict(keep_layers(net.state_dict(), z["kept_indices"].tolist()))
    z.check("pruned_out", pruned.to(DEVICE, dtype).eval()(*inputs))
    with given_uniforms(z["train_u"]):
        z.check("train_out", net.train()(*inputs))


@pytest.mark.parametrize("path", Recording("paths").keys(suffix="_score_weight"))
def test_paths(path):
    z = Recording("paths", torch.float64)
    t, x, v = z["t"], z["x"], z["v"]
    c, wide = PATHS[path](t), at(path, t, x.ndim)
    names = ("alpha", "d_alpha", "sigma", "d_sigma", "d_alpha_over_alpha", "score_weight")
    for name, value in zip(names, c, strict=True):
        z.check(f"{path}_{name}", value, 1e-10)
    z.check(f"{path}_minus_drift_of_ones", -c.ratio, 1e-10)
    for key in z.keys(f"{path}_w_"):
        form, norm = key.split("_")
        z.check(f"{path}_w_{key}", diffusion_coefficient(form, float(norm), t, c), 1e-10)
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
        if (options.get("form"), prediction, expected[0]) == ("SBDM", "velocity", 0) and path != "VP":
            expected[0] = SBDM_START
        assert (first, last) == pytest.approx(tuple(expected), abs=1e-12), row


def test_given_distance_to_the_ends():
    """Each use takes its own flag, also where the usual distance is zero."""
    assert time_limits("Linear", "velocity", "train", 0.01) == (0.01, 0.99)
    assert time_limits("VP", "noise", "ode", 0.02) == (0.0, 0.98)
    assert time_limits("GVP", "velocity", "sde", 0.02, "sigma", 0.0) == (0.02, 0.98)


@pytest.mark.parametrize("name", Recording("loss").keys(suffix="_loss"))
@precisions
def test_loss(name, dtype):
    z, (path, prediction, weight) = Recording("loss", dtype), name.split("_")
    net, objective = z.network(), FlowObjective(path, prediction, None if weight == "None" else weight)
    first, last = objective.limits
    draw = Draw(z["u"] * (last - first) + first, z["x0"])
    output = objective.predict(net, z["x1"], z["y"], draw)
    loss = objective.loss(output, z["x1"], draw)["loss"]
    z.check(f"{name}_loss", loss)
    z.check(f"{path}_{prediction}_xt", objective._point(z["x1"], draw)[0])
    if weight == "None":
        z.check(f"{name}_t", draw.t)
        z.check(f"{name}_pred", output)
        loss.mean().backward()
        norms = [net.get_parameter(str(key)).grad.norm() for key in z.arrays["grad_names"]]
        z.check(f"{name}_grad_norms", torch.stack(norms), 1e-4)
    if prediction == "velocity":
        c = at(path, draw.t, z["x1"].ndim)
        z.check(f"{path}_ut", c.d_alpha * z["x1"] + c.d_sigma * z["x0"])
        for other in LOSS_WEIGHTS:  # without effect here
            assert torch.equal(FlowObjective(path, prediction, other).loss(output, z["x1"], draw)["loss"], loss)


def test_draws_follow_torch():
    """Noise first, then times, then label drops, all from the global generator."""
    z = Recording("loss")
    net, x = z.network().train(), z["x1"]
    torch.manual_seed(3)
    draw = FlowObjective("VP").draw(net, x, z["y"])
    torch.manual_seed(3)
    assert torch.equal(draw.noise, torch.randn_like(x))
    assert torch.equal(draw.t, torch.rand(len(x)) * (1 - 1e-5))
    assert torch.equal(draw.drop, torch.rand(len(x)) < z.facts["class_dropout_prob"])


def fixed_step_rows():
    """Recorded trajectories, which have one axis more than their start; dopri5 has a test of its own."""
    arrays = Recording("ode").arrays
    found = [key for key in arrays if arrays[key].ndim > arrays["z"].ndim and "dopri5" not in key]
    assert found, "sit_ode.npz: no trajectory of a fixed-step method"
    return found


@pytest.mark.parametrize("row", fixed_step_rows())
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
    z.check("cfg_dopri5_default_last", guided(net, z["y"], z["z"]), 1e-3, lambda array: array[: len(z["z"])])
    double = Recording("ode", torch.float64)
    tight = OdeSampler(num_steps=steps, atol=1e-8, rtol=1e-7)
    double.check("dopri5_tight_last", tight(double.network(), double["y"], double["z"]), 1e-4)


@pytest.mark.parametrize("i", range(len(Recording("sde").arrays["rows"])))
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
    states = sampler.trajectory(z.network(), z["y"], z["z"], lambda k, shape: noise[k, :n])
    z.check(f"run{i}_xs", torch.stack(states), pick=lambda array: array[:, :n])


@pytest.mark.parametrize("method", ["Euler", "Heun"])
@pytest.mark.parametrize("form", NOISE_FORMS)
@torch.no_grad()
def test_every_form_of_noise(form, method):
    """Also the three that the original cannot run; one network call a drift."""
    z = Recording("sde")
    net, calls, steps = z.network(), [], int(z.arrays["num_steps"])
    net.x_embedder.register_forward_pre_hook(lambda *seen: calls.append(1))
    sampler = SdeSampler(num_steps=steps, method=method, diffusion_form=form)
    assert sampler(net, z["y"], z["z"]).isfinite().all()
    assert len(calls) == (steps - 1) * (2 if method == "Heun" else 1) + 1


@pytest.mark.parametrize("path", Recording("likelihood").keys(suffix="_logp"))
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
