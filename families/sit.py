"""SiT (arXiv 2401.08740): DiT's network as an interpolant, with paths, ODE and SDE samplers."""

from dataclasses import replace

from families.dit import CFG_CHANNELS, DIT, SD_VAE, name_sizes, read_shapes, stacks, with_stacks
from families.family import Family
from families.flags import FAMILY, amount, expect, number, own, path_text, share, switch

PATHS = ("Linear", "GVP", "VP")
PREDICTIONS = ("velocity", "score", "noise")
LOSS_WEIGHTS = ("velocity", "likelihood")
NOISE_FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
LAST_STEPS = ("None", "Mean", "Tweedie", "Euler")


def make_objective(*, path_type, prediction, loss_weight, train_eps):
    """Predict velocity, noise or score on a path between noise and data."""
    from diffusion.flow import FlowObjective

    return FlowObjective(path_type, prediction, loss_weight, train_eps)


def make_sampler(num_sampling_steps, cfg_scale, *, mode, sampling_method, **options):
    """The ODE or the SDE, which each take some of the options."""
    from diffusion.flow import OdeSampler, SdeSampler

    options = {"path": options.pop("path_type"), "cfg_scale": cfg_scale, "num_steps": num_sampling_steps, **options}
    ode = {name: options.pop(name) for name in ("atol", "rtol", "reverse")}
    sde = {name: options.pop(name) for name in ("diffusion_form", "diffusion_norm", "last_step", "last_step_size")}
    expect(num_sampling_steps > 1, "num-sampling-steps", num_sampling_steps, "2 or more: a step lies between two")
    expect(ode["atol"] + ode["rtol"] > 0, "atol 0 --rtol", 0, "one of them to be above 0")
    try:
        if mode == "ODE":
            return OdeSampler(method=sampling_method or "dopri5", **options, **ode)
        sampler = SdeSampler(method=sampling_method or "Euler", **options, **sde)
    except ValueError as error:
        raise ValueError(f"--sampling-method {sampling_method}: {error}") from None
    first, last = sampler.limits
    expect(first < last, "last-step-size", sde["last_step_size"], "less than the time that --sample-eps leaves")
    return sampler


def sampler_label(num_sampling_steps, *, mode, sampling_method, **_):
    """Word for the names of samples."""
    return f"{mode}-{sampling_method or 'default'}-{num_sampling_steps}"


PATH_FLAGS = (
    own("path-type", "path between noise and data", "Linear", choices=PATHS),
    own("prediction", "what the network predicts", "velocity", choices=PREDICTIONS),
)
BELOW_HALF = number(float, 0, 0.499)
AS_NEEDED = "0 where the ends of time are regular, else a small distance"
SIT = Family(
    name="SiT",
    network="models.SiT",
    models=name_sizes("SiT"),
    base="XL",
    latents=SD_VAE,
    make_objective=make_objective,
    make_sampler=make_sampler,
    sampler_label=sampler_label,
    stacks=stacks,
    with_stacks=with_stacks,
    read_shapes=read_shapes,
    flags={
        "train": (
            *PATH_FLAGS,
            own("loss-weight", "weight of the loss over time", None, choices=LOSS_WEIGHTS, shown="none"),
            own("train-eps", "distance to the ends of time", None, type=BELOW_HALF, shown=AS_NEEDED),
        ),
        "sample": (
            replace(own("mode", "what is solved", "ODE", choices=("ODE", "SDE"), nargs="?"), positional=True),
            *PATH_FLAGS,
            CFG_CHANNELS,
            own(
                "sampling-method",
                "Euler or Heun for SDE; for ODE one of torchdiffeq's",
                None,
                type=path_text,
                shown="Euler for SDE, dopri5 for ODE",
            ),
            own("atol", "absolute tolerance of an adaptive ODE solver", 1e-6, type=amount),
            own("rtol", "relative tolerance of an adaptive ODE solver", 1e-3, type=amount),
            switch("reverse", "ODE: from data to noise", group=FAMILY),
            own("sample-eps", "distance to the ends of time", None, type=BELOW_HALF, shown=AS_NEEDED),
            own("diffusion-form", "SDE: noise over time", "sigma", choices=NOISE_FORMS),
            own("diffusion-norm", "SDE: amount of noise", 1.0, type=amount),
            own("last-step", "SDE: kind of the last step", "Mean", choices=LAST_STEPS),
            own("last-step-size", "SDE: length of the last step, in time", 0.04, type=share),
        ),
    },
    defaults={"sample_ddp": {"cfg_scale": 1.0}, "train_masked_kd": {"teacher": "SiT-XL/2", "beta": 2e-4}},
    scratch={"lr": 1e-4, "min_lr": 1e-4, "clip_norm": float("inf")},
    patterns={"SiT-D19/2": DIT.patterns["DiT-D19/2"]},
)
