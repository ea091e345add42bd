"""Prompts: how pipelines call their transformers, what is stored of captions, and what training makes of both."""

import json
import shutil
from functools import cache
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image

import engine.prompts
from diffusion.pipeline_call import (
    Recording,
    check_noise,
    describe_argument,
    find_layout,
    find_names,
    find_output,
    find_unguided,
)
from diffusion.prompts import Call, PromptDraw, PromptObjective, find_shift, from_layout, list_parts, to_layout
from engine.errors import InputError
from engine.prompts import encode_prompts, list_captioned, to_array
from engine.run import Run
from engine.vae import LatentSpace
from families import model_config
from families.of_diffusers import DIFFUSERS, make_objective, make_recorder
from models_diffusers import first_output

reason = "needs the packages of requirements-prompts.txt, and tests/diffusers_classes.py is for a newer diffusers"
tiny_pipelines = pytest.importorskip("tiny_pipelines", reason=reason, exc_type=ImportError)
PIPELINES, SIZES, FLUX, QWEN = (getattr(tiny_pipelines, name) for name in ("PIPELINES", "SIZES", "FLUX", "QWEN"))
pytestmark = pytest.mark.own_device

CALLS = {  # what is found: factor of the time, layout, output, latents of a picture, arrays with rows, constants
    "pixart": (1.0, "grid", "half", (4, 8, 8), {"encoder_hidden_states", "encoder_attention_mask"}, set()),
    "sd3": (1.0, "grid", "whole", (4, 8, 8), {"encoder_hidden_states", "pooled_projections"}, set()),
    "flux": (
        *(1e-3, "tokens", "whole", (1, 8, 8)),
        *({"encoder_hidden_states", "pooled_projections", "guidance"}, {"img_ids", "txt_ids"}),
    ),
    "sana": (1.0, "grid", "whole", (4, 8, 8), {"encoder_hidden_states", "encoder_attention_mask"}, set()),
    "qwen": (1e-3, "tokens", "whole", (4, 8, 8), {"encoder_hidden_states", "encoder_hidden_states_mask"}, set()),
    "wan": (1.0, "frames", "whole", (4, 8, 8), {"encoder_hidden_states"}, set()),
}
TEXTS = [f"a {'very ' * (i % 7)}red cat {i}" for i in range(18)]  # more than are encoded together


@pytest.fixture(scope="session")
def make_encoded(tmp_path_factory):
    """A pipeline of a name, and its prompts encoded in a precision."""

    @cache
    def make_folder(name):
        return tiny_pipelines.make_pipeline(name, tmp_path_factory.mktemp(name) / "pipeline")

    @cache
    def make(name, precision="fp32"):
        pipeline, data = str(make_folder(name)), tmp_path_factory.mktemp(f"{name}-{precision}")
        space = LatentSpace(SIZES[name], f"{pipeline}/vae", len(TEXTS), DIFFUSERS.latents)
        encode_prompts(data, pipeline, TEXTS, space, Run("cpu", precision))
        return SimpleNamespace(
            name=name, pipeline=pipeline, data=data, space=space, call=Call.read(data / "prompts"), size=SIZES[name]
        )

    return make


@pytest.fixture(params=list(PIPELINES))
def encoded(request, make_encoded):
    """Every pipeline in turn."""
    return make_encoded(request.param)


def latents_of(encoded, n, seed=0):
    return torch.randn(n, *CALLS[encoded.name][3], generator=torch.Generator().manual_seed(seed))


# Layouts


@pytest.mark.parametrize("layout", ["grid", "frames", "tokens"])
def test_layouts_and_back(layout):
    x = torch.randn(3, 5, 6, 8)
    there = to_layout(x, layout)
    assert there.shape == {"grid": (3, 5, 6, 8), "frames": (3, 5, 1, 6, 8), "tokens": (3, 12, 20)}[layout]
    assert torch.equal(from_layout(there, layout, (6, 8)), x)
    assert find_layout(there.shape, x.shape[1:]) == layout


def test_tokens_are_those_of_the_pipelines():
    """The same order of tokens, and inside a token; also on the way back, of other channels."""
    x, factor = torch.randn(2, 4, 6, 10), 8
    tokens = to_layout(x, "tokens")
    pixels = {"height": 6 * factor, "width": 10 * factor, "vae_scale_factor": factor}
    for pipeline in (diffusers.FluxPipeline, diffusers.QwenImagePipeline):
        assert torch.equal(pipeline._pack_latents(x, 2, 4, 6, 10), tokens)
        back = pipeline._unpack_latents(tokens, **pixels)
        assert torch.equal(back.view(2, 4, 6, 10), from_layout(tokens, "tokens", (6, 10)))
    assert from_layout(tokens[..., :8], "tokens", (6, 10)).shape == (2, 2, 6, 10)


@pytest.mark.parametrize("shape", [(2, 8, 8, 4), (2, 4, 2, 8, 8), (2, 64, 4), (2, 16, 15), (2, 4, 8)])
def test_other_layouts_are_refused(shape):
    with pytest.raises(ValueError, match=r"gives the transformer \(.*\) for latents \(4, 8, 8\)"):
        find_layout(shape, (4, 8, 8))


# What a recording tells


def fake(times=(900.0, 450.0), given=lambda t: t, name="timestep", latents=lambda x: x, used=lambda out: out):
    """A Recording of two steps of a pipeline that does to time, latents and output what these functions do."""
    recording = Recording()
    for time in times:
        x, out = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8, 8)
        arguments = {"hidden_states": latents(x), name: torch.full((2,), float(given(time))), "scale": torch.ones(2)}
        recording.arguments.append(arguments)
        recording.outputs.append(out)
        recording.steps.append((used(out), torch.tensor(time), x))
    return recording


@pytest.mark.parametrize(("given", "factor"), [(lambda t: t, 1.0), (lambda t: t / 1000, 1e-3)])
@pytest.mark.parametrize("name", ["timestep", "t", "time"])
def test_names(given, factor, name):
    assert find_names(fake(given=given, name=name)) == {"latents": "hidden_states", "time": name, "factor": factor}


def test_latents_in_half_precision_are_found():
    """As a pipeline in bfloat16 gives them."""
    recording = fake(latents=lambda x: x.bfloat16())
    assert find_names(recording)["latents"] == "hidden_states"


@pytest.mark.parametrize("change", [lambda x: x * 0.5, lambda x: -x, lambda x: torch.cat([x, x])])
def test_changed_latents_are_refused(change):
    with pytest.raises(ValueError, match="the pipeline changes the latents before the transformer sees them"):
        find_names(fake(latents=change))


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (lambda t: 1000 - t, "timestep 100"),
        (lambda t: 1 - t / 1000, r"timestep 0\.1"),
        (lambda t: t / 2, "timestep 450"),
        (lambda t: 900.0, "timestep 900"),  # right in the first step, and in no other
    ],
)
def test_other_times_are_refused(given, shown):
    with pytest.raises(ValueError, match=f"at the scheduler's time 900 the pipeline gives the transformer {shown}"):
        find_names(fake(given=given))


def test_reversed_time_is_noticed_where_it_starts_in_the_middle():
    with pytest.raises(ValueError, match="at the scheduler's time 500"):
        find_names(fake(times=(500.0, 100.0), given=lambda t: 1000 - t))


def test_no_time_is_refused():
    with pytest.raises(ValueError, match="gives the transformer no time"):
        find_names(fake(name="level"))


def test_outputs():
    assert find_output(fake()) == "whole"
    assert find_output(fake(used=lambda out: out[:, :4])) == "half"


@pytest.mark.parametrize(
    ("used", "told"),
    [
        (lambda out: -out, "turns the sign"),
        (lambda out: out[:, 4:], "makes something else"),
        (lambda out: out * 2, "makes something else"),
        (lambda out: out[:1], "makes something else"),
    ],
)
def test_changed_outputs_are_refused(used, told):
    with pytest.raises(ValueError, match=f"the pipeline {told}"):
        find_output(fake(used=used))


ONE, TWO = torch.ones(1, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("one", "two", "found"),
    [
        (ONE, TWO, {"rows": None}),
        (None, TWO, {"rows": None}),  # a mask that is not given where all tokens count
        (torch.arange(5), torch.arange(5), {"constant": torch.arange(5)}),
        (torch.arange(2), torch.arange(2), {"constant": torch.arange(2)}),  # of two, whatever the prompts
        ([(1, 4, 4)], [(1, 4, 4)] * 2, {"each": (1, 4, 4)}),
        (None, None, {"value": None}),
        (3.5, 3.5, {"value": 3.5}),
        ({"a": ONE, "b": {}}, {"a": TWO, "b": {}}, {"dict": {"a": {"rows": None}, "b": {"dict": {}}}}),
    ],
)
def test_arguments(one, two, found):
    told = describe_argument(one, two)
    assert told.keys() == found.keys()
    if "constant" in found:
        assert torch.equal(told["constant"], found["constant"])
    else:
        assert told == found


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (torch.arange(5), torch.arange(5) + 1),
        (torch.ones(3), torch.ones(4)),
        (torch.tensor(1.0), torch.tensor(2.0)),
        ([ONE], [ONE, ONE]),
        ([torch.ones(5, 3)], [torch.ones(5, 3), torch.ones(2, 3)]),  # of unequal lengths, as Z-Image has them
        ([1], [1, 2]),
        (1.0, 2.0),
        ({"a": 1}, {"b": 1}),
        ({"a": 1.0}, {"a": 2.0}),
        (ONE, None),
    ],
)
def test_other_arguments_are_refused(one, two):
    with pytest.raises(ValueError, match="differs between calls in another way than by the number of prompts"):
        describe_argument(one, two)


# What pipelines do


def test_calls(encoded):
    """Names, time, layout and output of six pipelines, and which arguments depend on the prompt."""
    call, (factor, layout, output, _, rows, constants) = encoded.call, CALLS[encoded.name]
    assert (call.latents, call.time, call.factor) == ("hidden_states", "timestep", factor)
    assert (call.layout, call.output, call.count) == (layout, output, len(TEXTS))
    kinds = {path: next(iter(part)) for path, part in list_parts(call.template)}
    assert {path for path, kind in kinds.items() if kind == "rows"} == rows
    assert {path for path, kind in kinds.items() if kind == "constant"} == constants
    assert set(call.cut) == (rows if any("mask" in path for path in rows) else set())
    assert call.scheduler["_class_name"] == type(tiny_pipelines.open_pipeline(encoded.pipeline).scheduler).__name__


def expect_same(found, expected, path):
    """Arguments of a transformer, from the objective and from the pipeline; tensors to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            expect_same(found[key], expected[key], f"{path}.{key}")
    elif torch.is_tensor(expected):
        assert found.shape == expected.shape, path
        assert torch.allclose(found.float(), expected.float(), rtol=1e-5, atol=1e-6), path
    else:
        assert found == expected, path


def test_training_calls_the_transformer_as_the_pipeline_does(encoded):
    """With the same latents, time and prompts all arguments are the same, at both recorded steps."""
    texts, rows = [TEXTS[6], TEXTS[13], TEXTS[0]], np.array([6, 13, 0])
    recorder = make_recorder(encoded.pipeline, "cpu", torch.float32)
    seen = recorder.record(texts, encoded.size)
    objective = PromptObjective(encoded.call, guidance=1.0)
    for arguments, (_, time, latents) in zip(seen.arguments, seen.steps, strict=True):
        x = from_layout(latents, encoded.call.layout, CALLS[encoded.name][3][1:])
        state = objective._state(x, torch.full((3,), float(time)))
        found = {**state, **objective._inputs(rows, "cpu")}
        for name, value in arguments.items():
            if name == "img_shapes":  # JSON has lists
                value = json.loads(json.dumps(value))
            given = found.pop(name)
            if name in encoded.call.cut:  # what is left out is masked
                assert not arguments[next(key for key in arguments if "mask" in key)][:, given.shape[1] :].any()
                value = value[:, : given.shape[1]]
            expect_same(given, value, name)
        assert not found
    assert seen.steps[0][1] > seen.steps[1][1]


def test_empty_prompt_is_that_of_guidance(encoded):
    """The last row is what the pipeline gives for an empty negative prompt; Sana's has no instruction before it."""
    recorder = make_recorder(encoded.pipeline, "cpu", torch.float32)
    seen = recorder.record([TEXTS[2]], encoded.size, guided=True)
    given, row = find_unguided(seen, encoded.call.latents)
    found = encoded.call.inputs(np.array([len(TEXTS)]), "cpu")
    other = encoded.call.inputs(np.array([2]), "cpu")
    tokens = found["encoder_hidden_states"]
    assert torch.equal(tokens[0], given["encoder_hidden_states"][row, : tokens.shape[1]].float())
    assert tokens.shape != other["encoder_hidden_states"].shape or not torch.equal(
        tokens, other["encoder_hidden_states"]
    )
    if torch.is_tensor(found.get("guidance")):
        assert found["guidance"].tolist() == [1.0]


def test_objective_tells_the_guidance(make_encoded):
    """What networks with an embedding of it are told is what was asked for, and not what was recorded."""
    call = make_encoded("flux").call
    assert PromptObjective(call, guidance=7.0)._inputs(np.array([0, 3]), "cpu")["guidance"].tolist() == [7.0, 7.0]
    assert call.inputs(np.array([0]), "cpu")["guidance"].tolist() == [1.0]


def with_scheduler(encoded, folder, scheduler):
    """A copy of a pipeline with another scheduler."""
    shutil.copytree(encoded.pipeline, folder)
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_scheduler_that_scales_latents_is_refused(make_encoded, tmp_path):
    """Euler's for noise prediction divides what the network sees."""
    encoded = make_encoded("pixart")
    folder = with_scheduler(encoded, tmp_path / "pipeline", diffusers.EulerDiscreteScheduler())
    with pytest.raises(InputError, match=rf"--model {folder}: .*changes the latents before the transformer sees them"):
        encode_prompts(tmp_path / "data", str(folder), TEXTS[:1], encoded.space, Run("cpu"))
    assert not (tmp_path / "data").exists()


def test_transformer_alone_is_refused(make_encoded, tmp_path):
    encoded = make_encoded("pixart")
    with pytest.raises(InputError, match="is a transformer alone; give the pipeline"):
        encode_prompts(tmp_path, f"{encoded.pipeline}/transformer", TEXTS[:1], encoded.space, Run("cpu"))


def test_pipeline_that_fails_is_refused(make_encoded, tmp_path, monkeypatch):
    """With what it says, in one line."""
    encoded = make_encoded("pixart")

    def fail(*_, **__):
        raise RuntimeError("no\nmemory")

    monkeypatch.setattr(diffusers.PixArtSigmaPipeline, "encode_prompt", fail)
    with pytest.raises(InputError, match=r"PixArtSigmaPipeline fails \(RuntimeError: no memory\)"):
        encode_prompts(tmp_path, encoded.pipeline, TEXTS[:1], encoded.space, Run("cpu"))


# Schedules and objectives


def shifted(u, shift):
    return shift * u / (1 + (shift - 1) * u)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_static_shift(shift):
    """The scheduler's own sigmas, of its thousand training steps."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    u = torch.arange(1000, 0, -1) / 1000
    assert torch.allclose(scheduler.sigmas, shifted(u, find_shift(dict(scheduler.config), 77)), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "ends"),
    [(diffusers.DPMSolverMultistepScheduler, (0.999, 0)), (diffusers.UniPCMultistepScheduler, (1, 0.001))],
)
def test_shift_of_solvers(kind, ends):
    """The sigmas of twenty steps between the ends that a solver has before the shift."""
    scheduler = kind(**tiny_pipelines.FLOW)
    scheduler.set_timesteps(20)
    u = torch.linspace(*ends, 21)[:-1]
    assert torch.allclose(scheduler.sigmas[:-1], shifted(u, find_shift(dict(scheduler.config), 77)), atol=1e-5)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("mu", [0.4375, 0.5, 1.15])
def test_dynamic_shift(kind, mu):
    """As the scheduler applies what a pipeline gives it for the size of its pictures."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**{**FLUX, "time_shift_type": kind})
    u = torch.linspace(0.01, 1, 50)
    expected = scheduler.time_shift(mu, 1.0, u)
    assert torch.allclose(shifted(u, find_shift(dict(scheduler.config), mu)), expected, atol=1e-6)


def test_dynamic_shift_that_nobody_tells():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**FLUX)
    with pytest.raises(ValueError, match="the pipeline does not say how; give --shift"):
        find_shift(dict(scheduler.config), None)


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_shift_is_the_pipelines(make_encoded, name):
    """What the pipeline gives its scheduler for pictures of this size is recorded, and no size is counted here."""
    encoded, config = make_encoded(name), FLUX if name == "flux" else QWEN
    tokens = (encoded.size // 4) ** 2  # an autoencoder of factor 2, and packing
    sizes = [config[key] for key in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")]
    assert encoded.call.mu == pytest.approx(calculate_shift(tokens, *sizes))


def test_noise_that_is_not_the_time_is_refused():
    """As of CogView4, whose network is given a time that the scheduler has not shifted."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(2)
    output = latents = torch.zeros(1)
    times = list(scheduler.timesteps)
    check_noise(Recording(steps=[(output, time, latents) for time in times]), scheduler)
    with pytest.raises(ValueError, match="the scheduler has a noise of"):
        check_noise(Recording(steps=[(output, times[0], latents), (output, times[1] + 300, latents)]), scheduler)
    backwards = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(ValueError, match="from data to noise"):
        check_noise(Recording(), backwards)


class Predictor(torch.nn.Module):
    """A network that notes what it is given and predicts what it is told to, in the layout of tokens or not."""

    prepared = True

    def __init__(self, output=None):
        super().__init__()
        self.seen, self.output = None, output

    def forward(self, return_dict, mask, observe, **given):
        self.seen = given
        return (given["hidden_states"] if self.output is None else self.output,)


def draw_at(objective, x, spread):
    """A PromptDraw of flow matching with this share of noise, of the first prompt."""
    spread, rows = torch.full((len(x),), float(spread)), np.zeros(len(x), int)
    return PromptDraw(spread * 1000, 1 - spread, spread, torch.randn_like(x), rows, objective._inputs(rows, "cpu"))


@pytest.mark.parametrize("name", ["flux", "qwen", "sd3", "sana", "wan"])
def test_flow_objective(make_encoded, name):
    """All data at time 0 and all noise at time 1, between them on a line; the target is noise less data."""
    encoded = make_encoded(name)
    call, objective = encoded.call, PromptObjective(encoded.call)
    assert objective.kind == "flow"
    x, net = latents_of(encoded, 3), Predictor()
    for spread in (0.0, 0.25, 1.0):
        draw = draw_at(objective, x, spread)
        prediction = objective.predict(net, x, None, draw)
        expected = (1 - spread) * x + spread * draw.noise
        assert torch.allclose(prediction, expected)
        assert torch.allclose(net.seen["hidden_states"], to_layout(expected, call.layout))
        assert torch.allclose(net.seen["timestep"], torch.full((3,), spread * 1000 * call.factor))
        target = draw.noise - x
        assert objective.loss(target, x, draw)["loss"].abs().max() == 0
        for other in (x - draw.noise, draw.noise, x):
            assert objective.loss(other, x, draw)["loss"].min() > 0.1
        zero = objective.loss(torch.zeros_like(x), x, draw)["loss"]
        assert torch.allclose(zero, target.square().mean((1, 2, 3)))
        assert torch.allclose(
            objective.noise_share(draw), torch.full((3,), spread**2 / (spread**2 + (1 - spread) ** 2))
        )


@pytest.mark.parametrize("shift", [None, 5.0])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_flow_times(make_encoded, name, shift):
    """Uniform times are shifted as the scheduler does for a picture of this size, or as asked for."""
    encoded = make_encoded(name)
    objective = PromptObjective(encoded.call, time_sampling="uniform", shift=shift)
    x = latents_of(encoded, 2000)
    torch.manual_seed(5)
    draw = objective.draw(Predictor().eval(), x, torch.zeros(2000, dtype=torch.long))
    torch.manual_seed(5)
    u = torch.rand(2000)
    tokens = 16 if name == "flux" else 64
    if name == "flux" and shift is None:
        mu = calculate_shift(tokens, *(FLUX[key] for key in ("base_image_seq_len", "max_image_seq_len", "base_shift")))
        expected = diffusers.FlowMatchEulerDiscreteScheduler(**FLUX).time_shift(mu, 1.0, u)
    else:
        expected = shifted(u, shift or 3.0)
    assert torch.allclose(draw.spread, expected, atol=1e-5)
    assert torch.allclose(draw.t, draw.spread * 1000)
    assert torch.allclose(draw.signal, 1 - draw.spread)
    assert not torch.equal(draw.noise[0], draw.noise[1])


def test_logit_normal_times(make_encoded):
    """The logits of unshifted times are standard normal."""
    objective = PromptObjective(make_encoded("sd3").call, shift=1.0)
    torch.manual_seed(0)
    draw = objective.draw(Predictor(), torch.zeros(4000, 4, 2, 2), torch.zeros(4000, dtype=torch.long))
    logits = draw.spread.double().logit()
    assert abs(logits.mean()) < 0.06
    assert abs(logits.std() - 1) < 0.05


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", [{}, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}])
def test_noise_objective(make_encoded, kind, betas):
    """What the network sees and has to predict is what diffusers' scheduler makes of the same noise and steps."""
    encoded = make_encoded("pixart")
    scheduler = diffusers.DDPMScheduler(prediction_type=kind, **betas)
    config = {**scheduler.config, "_class_name": "DDPMScheduler"}
    call = Call(**{**vars_of(encoded.call), "scheduler": config, "output": "whole"}, folder=encoded.call.folder).open()
    objective = PromptObjective(call)
    x, net = latents_of(encoded, 200), Predictor()
    torch.manual_seed(0)
    draw = objective.draw(net.eval(), x, torch.zeros(200, dtype=torch.long))
    assert draw.t.min() < 50
    assert draw.t.max() > 950
    objective.predict(net, x, None, draw)
    noisy = scheduler.add_noise(x, draw.noise, draw.t)
    assert torch.allclose(net.seen["hidden_states"], noisy, atol=1e-6)
    assert torch.equal(net.seen["timestep"], draw.t)
    targets = {"epsilon": draw.noise, "sample": x, "v_prediction": scheduler.get_velocity(x, draw.noise, draw.t)}
    for name, target in targets.items():
        loss = objective.loss(target, x, draw)["loss"]
        assert (loss.max() < 1e-10) == (name == kind)


def vars_of(call):
    """The fields of a Call that its file holds."""
    fields = ("network", "latents", "time", "factor", "layout", "output", "template", "scheduler", "count", "cut")
    return {name: getattr(call, name) for name in fields}


def test_half_of_the_output_counts(make_encoded):
    """PixArt also predicts variances, which pipelines leave out."""
    encoded = make_encoded("pixart")
    objective, x = PromptObjective(encoded.call), latents_of(encoded, 2)
    out = torch.randn(2, 8, 8, 8)
    draw = objective.draw(Predictor(), x, torch.zeros(2, dtype=torch.long))
    assert torch.equal(objective.predict(Predictor(out), x, None, draw), out[:, :4])


def test_other_predictions_are_refused(make_encoded):
    call = make_encoded("pixart").call
    for config, told in (
        ({"_class_name": "DDPMScheduler", "prediction_type": "score"}, "prediction score"),
        ({"_class_name": "NoScheduler"}, "NoScheduler has no noise schedule"),
    ):
        with pytest.raises(ValueError, match=told):
            PromptObjective(Call(**{**vars_of(call), "scheduler": config}))


@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
def test_prompt_dropout(make_encoded, dropout):
    """The empty prompt's row, as often as asked for and in training mode alone; and its embedding is passed on."""
    call = make_encoded("sd3").call
    objective, n = PromptObjective(call, dropout), 4000
    x, y = torch.zeros(n, 4, 2, 2), torch.arange(n) % len(TEXTS)
    torch.manual_seed(0)
    draw = objective.draw(Predictor().train(), x, y)
    is_empty = draw.prompts == len(TEXTS)
    assert abs(is_empty.mean() - dropout) <= 4 * (dropout * (1 - dropout) / n) ** 0.5
    assert (draw.prompts[~is_empty] == y.numpy()[~is_empty]).all()
    whole = np.load(call.folder / "pooled_projections.npy")
    assert np.array_equal(draw.inputs["pooled_projections"].numpy(), whole[draw.prompts])
    assert not np.array_equal(whole[-1], whole[0])
    assert (objective.draw(Predictor().eval(), x, y).prompts == y.numpy()).all()


# Captions


def add_picture(folder, name, text=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)
    if text is not None:
        path.with_suffix(".txt").write_text(text)


def test_captions(tmp_path):
    """Of metadata.jsonl in any folder, which wins, and of files beside pictures; each caption once, in sorted order."""
    add_picture(tmp_path, "b.png", " two dogs\n")
    add_picture(tmp_path, "a/1.png", "unheard")
    add_picture(tmp_path, "a/2.jpg")
    add_picture(tmp_path, "c.png", "")
    add_picture(tmp_path, ".hidden/x.png")
    lines = [{"file_name": "1.png", "text": "a cat"}, {"file_name": "2.jpg", "text": "two dogs", "more": 1}]
    (tmp_path / "a" / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    found = list_captioned(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found.paths] == ["a/1.png", "a/2.jpg", "b.png", "c.png"]
    assert found.classes == ["a cat", "two dogs", ""]
    assert found.labels == [0, 1, 1, 2]


def test_missing_captions(tmp_path):
    with pytest.raises(InputError, match=rf"--data-path {tmp_path}: no images"):
        list_captioned(tmp_path)
    add_picture(tmp_path, "a.png", "told")
    add_picture(tmp_path, "sub/b.png")
    with pytest.raises(InputError, match=r"--data-path .*: sub/b\.png has no caption; .*metadata\.jsonl.*b\.txt"):
        list_captioned(tmp_path)


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '"text"', '{"file_name": "a.png"}', '{"file_name": 3, "text": "x"}', '{"text": "x"}', "[" * 10000],
)
def test_damaged_captions(tmp_path, line):
    add_picture(tmp_path, "a.png", "told")
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "x"}}\n{line}\n')
    with pytest.raises(InputError, match=r"--data-path .*metadata\.jsonl, line 2: "):
        list_captioned(tmp_path)


@pytest.mark.parametrize("name", ["metadata.jsonl", "a.txt"])
def test_captions_of_another_encoding(tmp_path, name):
    add_picture(tmp_path, "a.png")
    (tmp_path / name).write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=rf"--data-path .*{name}"):
        list_captioned(tmp_path)


# What is stored


def encode_with(pipeline, name, texts, instruction="usual"):
    """{argument: embeddings} as the pipeline's own encode_prompt makes them; instruction: of Sana."""
    if name == "pixart":
        embeds, mask, *_ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
    if name == "sd3":
        embeds, _, pooled, _ = pipeline.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
    if name == "flux":
        embeds, pooled, ids = pipeline.encode_prompt(texts, None)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "txt_ids": ids}
    if name == "sana":
        usual = type(pipeline).__call__.__wrapped__.__defaults__
        usual = next(value for value in usual if isinstance(value, list) and len(value) > 3)
        instruction = usual if instruction == "usual" else instruction
        embeds, mask, *_ = pipeline.encode_prompt(texts, False, complex_human_instruction=instruction)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
    if name == "qwen":
        embeds, mask = pipeline.encode_prompt(texts)
        return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}
    embeds, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=512)
    return {"encoder_hidden_states": embeds}


@torch.no_grad()
def test_embeddings_are_the_pipelines(encoded):
    """Every prompt's row, also of the second batch, and the empty prompt's as the last."""
    pipeline = tiny_pipelines.open_pipeline(encoded.pipeline)
    for row, text in ((0, TEXTS[0]), (5, TEXTS[5]), (17, TEXTS[17]), (18, "")):
        plain = {"instruction": None} if not text else {}  # Sana guides by the empty prompt alone
        for path, expected in encode_with(pipeline, encoded.name, [text], **plain).items():
            stored = np.load(encoded.data / "prompts" / f"{path}.npy")
            stored = stored if path == "txt_ids" else stored[row : row + 1]
            if expected is None:  # of Qwen's single prompt, all of whose tokens count
                assert stored.sum() == encoded.call.lengths[row]
                continue
            if encoded.name == "qwen":
                assert (stored[:, expected.shape[1] :] == 0).all()
                stored = stored[:, : expected.shape[1]]
            assert np.allclose(stored, expected.float().numpy(), rtol=1e-5, atol=1e-6), (path, row)
    assert len(np.load(encoded.data / "prompts" / "encoder_hidden_states.npy")) == 19


def test_prompts_are_encoded_once(make_encoded, monkeypatch):
    """What is there stays; without call.json, which is written last, all is made again."""
    encoded = make_encoded("pixart")
    before = {path: path.stat().st_mtime_ns for path in (encoded.data / "prompts").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(engine.prompts, "describe_call", pytest.fail)
        encode_prompts(encoded.data, encoded.pipeline, TEXTS, encoded.space, Run("cpu"))
    assert {path: path.stat().st_mtime_ns for path in (encoded.data / "prompts").iterdir()} == before


def test_interrupted_encoding_is_repeated(make_encoded, tmp_path):
    encoded = make_encoded("qwen")
    folder = shutil.copytree(encoded.data, tmp_path / "data")
    kept = {path.name: path.read_bytes() for path in (folder / "prompts").iterdir()}
    (folder / "prompts" / "call.json").unlink()
    (folder / "prompts" / "encoder_hidden_states.npy").write_bytes(b"half")
    encode_prompts(folder, encoded.pipeline, TEXTS, encoded.space, Run("cpu"))
    assert {path.name: path.read_bytes() for path in (folder / "prompts").iterdir()} == kept


@pytest.mark.parametrize("rows", [[0], [0, 7], [6, 0, 13], [18, 0, 6], [17, 18]])
@torch.no_grad()
def test_prompts_of_different_lengths(make_encoded, rows):
    """Are cut to the longest of a batch, masked, and give the network what each gives it alone."""
    encoded = make_encoded("qwen")
    call, rows = encoded.call, np.array(rows)
    pipeline = tiny_pipelines.open_pipeline(encoded.pipeline)
    own = [encode_with(pipeline, "qwen", [[*TEXTS, ""][row]])["encoder_hidden_states"] for row in rows]
    lengths = [embeds.shape[1] for embeds in own]
    assert call.lengths[rows].tolist() == lengths
    inputs = call.inputs(rows, "cpu")
    assert inputs["encoder_hidden_states"].shape[1] == max(lengths)
    assert inputs["encoder_hidden_states_mask"].sum(1).tolist() == lengths
    x, t = torch.randn(len(rows), 16, 16), torch.linspace(0.1, 0.9, len(rows))
    net = pipeline.transformer
    together = first_output(net, {"hidden_states": x, "timestep": t, **inputs})
    for i, embeds in enumerate(own):
        given = {"hidden_states": x[i : i + 1], "timestep": t[i : i + 1], "encoder_hidden_states": embeds}
        alone = first_output(net, {**given, "encoder_hidden_states_mask": None, "img_shapes": [[(1, 4, 4)]]})
        assert (together[i] - alone[0]).abs().max() <= 1e-5
    assert len(np.unique(call.lengths)) > 3


def test_lengths_without_a_mask_are_refused(make_encoded, tmp_path, monkeypatch):
    """Where a network could not know which tokens count."""
    encoded = make_encoded("qwen")
    describe = engine.prompts.describe_call

    def without_mask(*given):
        call = describe(*given)
        del call.template["encoder_hidden_states_mask"]
        return call

    monkeypatch.setattr(engine.prompts, "describe_call", without_mask)
    with pytest.raises(InputError, match="prompts of different lengths, and no mask"):
        encode_prompts(tmp_path, encoded.pipeline, TEXTS, encoded.space, Run("cpu"))
    assert not (tmp_path / "prompts" / "call.json").exists()


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_half_precision_is_stored(make_encoded, name):
    """In float16, computed in bfloat16; masks and places stay, and training gets float32 of all."""
    encoded, whole = make_encoded(name, "bf16"), make_encoded(name)
    dtypes = {path.stem: np.load(path).dtype for path in (encoded.data / "prompts").glob("*.npy")}
    assert dtypes["encoder_hidden_states"] == np.float16
    for path in dtypes.keys() & {"txt_ids", "img_ids", "guidance", "encoder_hidden_states_mask", "lengths"}:
        assert dtypes[path] == np.load(whole.data / "prompts" / f"{path}.npy").dtype
    found, expected = (each.call.inputs(np.array([2, 18]), "cpu")["encoder_hidden_states"] for each in (encoded, whole))
    assert found.dtype == torch.float32
    assert 1e-6 < (found - expected).norm() / expected.norm() < 3e-2


def test_embeddings_that_cannot_be_stored():
    assert to_array(None, half=True) is None
    assert to_array(torch.arange(4).view(2, 2), half=True).dtype == np.int64
    assert to_array(torch.full((2, 2), 1e5), half=False).dtype == np.float32
    assert to_array(torch.full((2, 2), 1e-3, dtype=torch.bfloat16), half=True).dtype == np.float16
    for value, half in ((1e5, True), (float("nan"), False), (float("inf"), False)):
        with pytest.raises(ValueError, match="not finite, or too large for float16; take --precision fp32"):
            to_array(torch.full((2, 2), value), half)


# What is read


def change_json(path, **changed):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


DAMAGE = {
    "no folder": shutil.rmtree,
    "no call": lambda folder: (folder / "call.json").unlink(),
    "half a call": lambda folder: (folder / "call.json").write_text('{"network": '),
    "a list": lambda folder: (folder / "call.json").write_text("[]"),
    "no fields": lambda folder: (folder / "call.json").write_text("{}"),
    "more fields": lambda folder: change_json(folder / "call.json", other=1),
    "binary": lambda folder: (folder / "call.json").write_bytes(b"\xff\xfe"),
    "other count": lambda folder: change_json(folder / "call.json", count=5),
    "no template": lambda folder: change_json(folder / "call.json", template=None),
    "odd template": lambda folder: change_json(folder / "call.json", template={"encoder_hidden_states": 3}),
    "no array": lambda folder: (folder / "encoder_hidden_states.npy").unlink(),
    "empty array": lambda folder: (folder / "encoder_hidden_states.npy").write_bytes(b""),
    "half an array": lambda folder: (folder / "encoder_hidden_states.npy").write_bytes(
        (folder / "encoder_hidden_states.npy").read_bytes()[:5000]
    ),
    "text": lambda folder: (folder / "encoder_hidden_states.npy").write_text("text"),
    "a pickle": lambda folder: np.save(folder / "encoder_hidden_states.npy", np.array([{}]), allow_pickle=True),
    "no lengths": lambda folder: (folder / "lengths.npy").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_prompts(make_encoded, tmp_path, damage):
    """Are refused when a run starts, with the flag and what to do."""
    encoded = make_encoded("qwen")
    folder = shutil.copytree(encoded.data, tmp_path / "data")
    how = {"prompt_dropout": 0.1, "time_sampling": "uniform", "shift": None, "guidance": 3.5}
    assert make_objective(model=encoded.pipeline, data_path=folder, **how).kind == "flow"
    DAMAGE[damage](folder / "prompts")
    with pytest.raises(ValueError, match=rf"--data-path {folder}.*extract_features\.py"):
        make_objective(model=encoded.pipeline, data_path=folder, **how)


def test_prompts_of_another_network(make_encoded):
    pixart, sd3 = make_encoded("pixart"), make_encoded("sd3")
    how = {"prompt_dropout": 0.1, "time_sampling": "uniform", "shift": None, "guidance": 3.5}
    with pytest.raises(ValueError, match=r"--data-path .*: prompts are for a SD3.*, --model .* is a PixArt"):
        make_objective(model=pixart.pipeline, data_path=sd3.data, **how)


def test_network_is_prepared_with_the_first_batch(make_encoded):
    """Before layers are left out of it, with samples of that batch; one without gates and masks is not."""
    encoded = make_encoded("sd3")
    objective, x = PromptObjective(encoded.call), latents_of(encoded, 2)
    net = Predictor()
    net.prepared, asked = False, []

    def prepare(make_inputs):
        asked.extend(make_inputs(n) for n in (2, 3))
        net.prepared = True

    net.prepare = prepare
    draw = objective.draw(net, x, torch.tensor([3, 4]))
    objective.predict(net, x, None, draw)
    assert not asked
    objective.predict(net, x, None, draw, mask=torch.ones(2, 4))
    two, three = asked
    assert torch.equal(two["hidden_states"], net.seen["hidden_states"])
    assert torch.equal(two["timestep"], net.seen["timestep"])
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"):
        assert torch.equal(three[name], two[name][[0, 1, 0]])
    assert model_config(encoded.pipeline)["class_name"] == encoded.call.network
