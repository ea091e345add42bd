"""The diffusion process: schedules, respacing, posteriors, predictions, losses and the full bound."""

import re

import numpy as np
import pytest
import torch

from diffusion import beta_schedule, create_diffusion, space_timesteps
from diffusion.schedules import raw_beta_schedule

from .golden import TERMS, Golden, precisions, recorded_network, stream

SCHEDULE, RESPACING, MATH = (Golden(f"diffusion_{part}.npz") for part in ("schedule", "respacing", "math"))
VARIANTS = MATH.meta["variants"]
KINDS = {"EPSILON": "noise", "START_X": "x_start", "LEARNED_RANGE": "learned_range", "MSE": "mse"}


def assert_table(z, key, value):
    """Tables are float64 and agree entry by entry, up to the last bits."""
    np.testing.assert_allclose(value, z.arrays[key], rtol=1e-12, atol=0, err_msg=f"{z.name}: {key}")


def schedule(key):
    """A table by its recorded name: of the default process, of a schedule by name, or between two given values."""
    if ":" not in key:
        return create_diffusion().get_buffer(key).cpu().numpy()
    kind, name, steps = key.split(":")
    if kind == "named":
        return beta_schedule(name, int(steps))
    ends = SCHEDULE.arrays[f"raw:linear:{steps}"]
    return raw_beta_schedule(name, ends[0], ends[-1], int(steps))


def test_default_process():
    diffusion, meta = create_diffusion(), SCHEDULE.meta
    found = [diffusion.num_timesteps, diffusion.loss, diffusion.mean, diffusion.variance]
    expected = [meta["num_timesteps"], *(KINDS[meta[key]] for key in ("loss_type", "mean_type", "var_type"))]
    assert found == expected, f"{SCHEDULE.name}: meta"


@pytest.mark.parametrize("key", [key for key in SCHEDULE.arrays if key != "meta"])
def test_schedule(key):
    assert_table(SCHEDULE, key, schedule(key))


@pytest.mark.parametrize("case", RESPACING.meta["specs"], ids=lambda case: case["spec"] or "all")
def test_respaced_process(case):
    z, diffusion, prefix = RESPACING, create_diffusion(case["spec"]), f"{case['index']}."
    z.check(f"{prefix}timestep_map", diffusion.timestep_map, "exact")
    assert diffusion.num_timesteps == case["n"], f"{z.name}: number of steps of {case['spec']}"
    for key in set(z.keys(prefix)) - {"timestep_map"}:
        if not z.arrays[prefix + key].size:  # known fault: in a chain of one step the clipped table came out empty
            assert (key, case["n"]) == ("posterior_log_variance_clipped", 1), f"{z.name}: {prefix}{key}"
            continue
        assert_table(z, prefix + key, diffusion.get_buffer(key).cpu().numpy())


@pytest.mark.parametrize("key", RESPACING.keys("list_"))
def test_section_counts_as_list(key):
    steps, *counts = map(int, key.split("_"))
    RESPACING.check(f"list_{key}", sorted(space_timesteps(steps, counts)), "exact")


@pytest.mark.parametrize(("case", "facts"), RESPACING.meta["edge_cases"].items())
def test_respacing_edge_case(case, facts):
    steps, spec = case.split("|")
    if facts["ok"]:
        found, first, last = sorted(space_timesteps(int(steps), spec)), facts["first"], facts["last"]
        found = [len(found), found[: len(first)], found[-len(last) :]]
        assert found == [facts["n"], first, last], f"{RESPACING.name}: {case}"
    else:
        assert facts["error"] == "ValueError", f"{RESPACING.name}: {case}"
        with pytest.raises(ValueError, match=r"respacing|stride"):
            space_timesteps(int(steps), spec)


def load(variant, dtype):
    """A setting without a network: file, process, t, x_t, and the model output cut to what the setting predicts."""
    z, diffusion = Golden(MATH.name, dtype), create_diffusion(**VARIANTS[variant])
    t, output = z[f"{variant}.t"], z["model_output"]
    if diffusion.variance != "learned_range":
        output = output[:, : z["x_start"].shape[1]]
    return z, diffusion, t, diffusion.q_sample(z["x_start"], t, z["noise"]), output


@pytest.mark.parametrize("variant", VARIANTS)
@precisions
def test_posterior_and_prediction(variant, dtype):
    z, diffusion, t, x_t, output = load(variant, dtype)
    forward, posterior = (("mean", "variance", "log_variance"), ("mean", "variance", "log_variance_clipped"))
    found = dict(zip((f"q_{name}" for name in forward), diffusion.q_mean_variance(z["x_start"], t), strict=True))
    values = diffusion.q_posterior_mean_variance(z["x_start"], x_t, t)
    found |= zip((f"q_posterior_{name}" for name in posterior), values, strict=True)
    for suffix in ("clip", "noclip"):
        out = diffusion.p_mean_variance(lambda x, t: output, x_t, t, clip_denoised=suffix == "clip")
        found |= {f"p_{name}_{suffix}": out[name] for name in ("mean", "pred_xstart")}
        found |= {"q_sample": x_t, "p_variance": out["variance"], "p_log_variance": out["log_variance"]}
    for key in (key for key in z.keys(f"{variant}.") if key.startswith(("q_", "p_"))):
        shape = z.arrays[f"{variant}.{key}"].shape  # recorded as expanded where ours broadcasts
        value = found[key].expand(shape) if key.startswith("q_") else found[key]
        z.check(f"{variant}.{key}", value, "clipped" if key.endswith("pred_xstart_clip") else "loss")


@pytest.mark.parametrize("variant", VARIANTS)
@precisions
def test_losses(variant, dtype):
    z, diffusion, t, _, output = load(variant, dtype)
    handed = []
    terms = diffusion.training_losses(lambda x, t: handed.append(t) or output, z["x_start"], t, noise=z["noise"])
    z.check(f"{variant}.model_t", handed[0], "exact")
    assert set(terms) == set(z.keys(f"{variant}.loss.")), f"{z.name}: names of {variant}.loss.*"
    z.check_terms(f"{variant}.loss", terms, t)


@precisions
def test_full_bound(dtype):
    z = Golden(MATH.name, dtype)
    x_start, output = z["x_start"], z["model_output"]
    z.check("prior_bpd", create_diffusion().prior_bits(x_start), "clipped")
    case = next(key.removesuffix("_noise") for key in z.meta if re.fullmatch(r"bpd\d+_noise", key))
    steps, pattern = z.arrays[f"{case}.vb"].shape[1], re.search(r"'([^']*<k>)'", z.meta[f"{case}_noise"])[1]
    options = {"clip_denoised": False, "step_noise": stream(z, pattern, x_start.shape, z.meta["profile_seed"])}
    found = create_diffusion(str(steps)).variational_bound(lambda x, t: output, x_start, **options)
    z.check_terms(case, found, torch.arange(steps).flip(0).expand(len(x_start), steps))
    kinds = {"total_bpd": "bound at t = 0", "prior_bpd": "clipped", "xstart_mse": "loss"}
    for key in set(z.keys(f"{case}.")) - set(TERMS):
        z.check(f"{case}.{key}", found[key], kinds[key])


@precisions
def test_losses_and_gradients_of_a_network(dtype):
    z = Golden("diffusion_model.npz", dtype)
    net = recorded_network(z)
    terms = create_diffusion().training_losses(net, z["x_start"], z["t"], {"y": z["y"]}, z["noise"])
    z.check_terms("loss", terms, z["t"])
    if dtype == torch.float64:
        terms["loss"].mean().backward()
        for name in z.keys("grad:"):
            z.check(f"grad:{name}", net.get_parameter(name).grad, "loss")


@precisions
@torch.no_grad()
def test_respaced_process_with_a_network(dtype):
    z = Golden("diffusion_model.npz", dtype)
    net, kwargs = recorded_network(z), {"y": z["y"]}
    case = next(key for key in z.arrays if key.endswith(".timestep_map")).split(".")[0]
    diffusion, t = create_diffusion(str(len(z[f"{case}.timestep_map"]))), z[f"{case}.t"]
    z.check(f"{case}.timestep_map", diffusion.timestep_map, "exact")
    z.check_terms(f"{case}.loss", diffusion.training_losses(net, z["x_start"], t, kwargs, z["noise"]), t)
    out = diffusion.p_mean_variance(net, z["noise"], t, clip_denoised=False, model_kwargs=kwargs)
    for key in z.keys(f"{case}.p_"):
        z.check(f"{case}.p_{key}", out[key], "loss")
    reverse = diffusion.ddim_reverse_sample(net, z["x_start"], t, clip_denoised=False, model_kwargs=kwargs)
    z.check(f"{case}.ddim_reverse", reverse["sample"], "loss")
