"""How a pipeline of diffusers calls its transformer, recorded from the pipeline itself.

A stand-in takes the transformer's place: it notes with which arguments it is called, and what the pipeline makes of
its output on the way to the scheduler. So prompts are encoded as the pipeline encodes them, with any number of
encoders, and nothing about a pipeline is assumed: what training would do otherwise than the pipeline is refused.
"""

import inspect
import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

LAYOUTS, OUTPUTS = ("grid", "frames", "tokens"), ("whole", "half")  # see find_layout and find_output
FACTORS = (1.0, 1e-3)  # of the scheduler's time, as networks take it
USUAL = {  # arguments of pipelines, where they have them: no guidance, no other sizes than asked for, one frame
    "guidance_scale": 1.0,
    "true_cfg_scale": 1.0,
    "use_resolution_binning": False,
    "clean_caption": False,
    "num_frames": 1,
}


class PipelineError(ValueError):
    """A pipeline does not do what it is asked for, with the reason that it gives."""


class StopCalling(Exception):
    """All has been seen."""


@dataclass
class Recording:
    """What was seen of a pipeline's two steps: arguments of the transformer and its outputs, and what the scheduler got
    of both."""

    arguments: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    steps: list = field(default_factory=list)  # (model output, time, latents)
    mu: float | None = None  # that the pipeline gives a scheduler which shifts by the size of pictures


class PipelineRecorder:
    """A pipeline in a folder, without its transformer; device and dtype: of its text encoders.

    class_name, config: of the transformer. Raises ValueError for a pipeline that cannot be recorded.
    """

    def __init__(self, folder, class_name, config, device="cpu", dtype=torch.float32):
        from diffusers.models import transformers

        self.class_name, self.seen = class_name, Recording()
        self.stand_in = make_stand_in(getattr(transformers, class_name), config, self.seen, device, dtype)
        with plain_errors(f"{folder} cannot be opened as a pipeline"):
            pipeline = self.pipeline = open_pipeline(folder, self.stand_in, dtype).to(device)
        if getattr(pipeline, "transformer_2", None) is not None:
            raise ValueError(f"{folder} has two transformers; only pipelines of one are known")
        self.pipeline.set_progress_bar_config(disable=True)
        self.options = inspect.signature(type(pipeline).__call__).parameters
        if "prompt" not in self.options:
            raise ValueError(f"{type(pipeline).__name__} takes no prompt")
        pipeline.scheduler.step = self._note_step
        self.set_timesteps, pipeline.scheduler.set_timesteps = pipeline.scheduler.set_timesteps, self._note_schedule

    def _note_step(self, output, time, latents, *_, **__):
        self.seen.steps.append((output, time, latents))
        if len(self.seen.steps) == 2:
            raise StopCalling
        return (latents,)

    # A pipeline looks at what its scheduler takes; so this has the arguments that schedulers have.
    def _note_schedule(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        self.seen.mu = mu if mu is None else float(mu)
        given = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps}
        given = {name: value for name, value in given.items() if value is not None}
        return self.set_timesteps(num_inference_steps, device=device, **given)

    def record(self, texts, size, guided=False):
        """The Recording of two steps for these prompts, of pictures of `size` pixels; guided: by the empty prompt."""
        self.seen.arguments.clear(), self.seen.outputs.clear(), self.seen.steps.clear()
        usual = {name: value for name, value in USUAL.items() if name in self.options}
        if "true_cfg_scale" in usual and not self.stand_in.config.get("guidance_embeds"):
            usual.pop("guidance_scale", None)  # which pipelines remark on, where the transformer is not told
        if guided:
            is_true = "true_cfg_scale" in usual  # beside a guidance that the transformer is told
            usual["true_cfg_scale" if is_true else "guidance_scale"] = 2.0
            usual |= {"negative_prompt": [""] * len(texts)} if "negative_prompt" in self.options else {}
        with plain_errors(f"{type(self.pipeline).__name__} fails"), torch.no_grad():
            try:
                asked = {"prompt": list(texts), "height": size, "width": size, "num_inference_steps": 2}
                self.pipeline(**asked, output_type="latent", **usual)
            except StopCalling:
                return self.seen
        raise ValueError(f"{type(self.pipeline).__name__} does not take its two steps with its scheduler")


def open_pipeline(folder, transformer, dtype=torch.float32):
    """The pipeline in a folder with another transformer, or none, in it."""
    import diffusers

    index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
    # The class itself may leave its transformer out, where DiffusionPipeline loads it.
    kind = getattr(diffusers, index["_class_name"])
    return kind.from_pretrained(folder, transformer=transformer, torch_dtype=dtype, low_cpu_mem_usage=False)


@contextmanager
def plain_errors(what):
    """Turn what libraries raise into a PipelineError."""
    try:
        yield
    except StopCalling:
        raise
    except Exception as error:  # it may be any: of a pipeline, a tokenizer, a text encoder
        raise PipelineError(f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from None


def make_stand_in(network, config, seen, device, dtype):
    """An object of a class of networks without weights, which notes its calls in the Recording `seen`."""

    class StandIn(network):
        def __init__(self):
            nn.Module.__init__(self)
            self.register_to_config(**config)

        device = property(lambda self: torch.device(device))
        dtype = property(lambda self: dtype)

        def to(self, *_, **__):
            return self

        def forward(self, *inputs, **options):
            bound = inspect.signature(inspect.unwrap(network.forward)).bind(self, *inputs, **options).arguments
            given = {name: value for name, value in list(bound.items())[1:] if name != "return_dict"}
            given |= given.pop("kwargs", {})
            latents = next(value for value in given.values() if torch.is_tensor(value))
            output = torch.randn(output_shape(latents.shape, config), device=latents.device).to(latents.dtype)
            seen.arguments.append(given)
            seen.outputs.append(output)
            return Output((output,))

    StandIn.__name__ = network.__name__
    return StandIn()


class Output(tuple):
    """What transformers return, as a tuple or as an object with `sample`."""

    @property
    def sample(self):
        return self[0]


def output_shape(shape, config):
    """Shape of a transformer's output for latents of a shape: other channels if the config says so, not of tokens."""
    channels = config.get("out_channels")
    if len(shape) < 4 or not channels:
        return shape
    return (shape[0], channels, *shape[2:])


def find_names(recording):
    """{"latents": argument, "time": argument, "factor": of the scheduler's time} of a Recording.

    Raises ValueError if the pipeline changes the latents before, or gives the network another time.
    """
    (_, time, latents), given = recording.steps[0], recording.arguments[0]
    same = [name for name, value in given.items() if torch.is_tensor(value) and is_same(value, latents)]
    if not same:
        raise ValueError("the pipeline changes the latents before the transformer sees them")
    times = [name for name, value in given.items() if torch.is_tensor(value) and (name == "t" or name[:4] == "time")]
    for name in times:
        for factor in FACTORS:
            pairs = zip(recording.arguments, recording.steps, strict=True)
            if all(is_close(each[name], factor * step[1]) for each, step in pairs):
                return {"latents": same[0], "time": name, "factor": factor}
    told = ", ".join(f"{name} {float(given[name].flatten()[0]):g}" for name in times) or "no time"
    raise ValueError(f"at the scheduler's time {float(time):g} the pipeline gives the transformer {told}")


def find_unguided(recording, latents):
    """What the transformer is given for the empty prompt: (arguments of a call, the row in it), of a guided Recording.

    latents: name of the argument. Pipelines call it twice, the empty prompt second, or once with that prompt's rows
    first. A pipeline that does neither is not guided by an empty prompt: its rows are those of any prompt.
    """
    first, rows = recording.arguments[0], len(recording.steps[0][2])
    if len(first[latents]) == 2 * rows:
        return first, 0
    is_second = len(recording.arguments) > len(recording.steps)
    return (recording.arguments[1], 0) if is_second else (None, 0)


def check_noise(recording, scheduler):
    """Raise ValueError unless the noise of a scheduler of flow matching is what its times say."""
    sigmas, steps = getattr(scheduler, "sigmas", None), scheduler.config.get("num_train_timesteps", 1000)
    if scheduler.config.get("invert_sigmas"):
        raise ValueError("the scheduler counts time from data to noise")
    for place, (_, time, _) in enumerate(recording.steps if sigmas is not None else ()):
        told, found = float(time) / steps, float(sigmas[place])
        if abs(found - told) > 1e-2:
            raise ValueError(f"at time {float(time):g} the scheduler has a noise of {found:.3g}, not of {told:.3g}")


def find_output(recording):
    """Which part of the transformer's output the scheduler gets: "whole" or "half", the first half of the channels.

    Raises ValueError for anything else, such as the output with another sign.
    """
    used, output = recording.steps[0][0], recording.outputs[0]
    if is_same(used, output):
        return "whole"
    if output.shape[1] % 2 == 0 and is_same(used, output.chunk(2, dim=1)[0]):
        return "half"
    if is_same(used, -output):
        raise ValueError("the pipeline turns the sign of the transformer's output")
    raise ValueError("the pipeline makes something else of the transformer's output before the scheduler gets it")


def is_same(a, b):
    return a.shape == b.shape and torch.equal(a.float(), b.to(a.dtype).float())


def is_close(time, expected):
    return torch.allclose(time.float().flatten(), torch.as_tensor(expected).float().to(time.device), rtol=1e-2)


def find_layout(shape, latents):
    """How a transformer takes latents of shape (C, h, w): "grid" as they are, "frames" of one, or "tokens" of 2 x 2.

    shape: of its argument, with the batch. Raises ValueError for another one.
    """
    c, h, w = latents
    layouts = {(c, h, w): "grid", (c, 1, h, w): "frames", (h * w // 4, 4 * c): "tokens"}
    if tuple(shape[1:]) not in layouts:
        raise ValueError(f"the pipeline gives the transformer {tuple(shape[1:])} for latents {tuple(latents)}")
    return layouts[tuple(shape[1:])]


def describe_argument(one, two):
    """What an argument is, as JSON with tensors for what does not depend on the prompt; seen with one and two prompts.

    {"rows": None}: a tensor with a row for every prompt; {"constant": tensor}; {"each": value}: a list with the same
    for every prompt; {"dict": ...}; {"value": ...}. Raises ValueError for anything else.
    """
    if torch.is_tensor(two) and two.ndim and len(two) == 2 and (one is None or len(one) == 1):
        return {"rows": None}
    if torch.is_tensor(one) and torch.is_tensor(two) and is_same(one, two):
        return {"constant": one}
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return {"dict": {name: describe_argument(one[name], two[name]) for name in one}}
    is_plain = not any(torch.is_tensor(leaf) for leaf in tree_leaves((one, two)))
    if is_plain and isinstance(one, list) and len(one) == 1 and two == one * 2:
        return {"each": one[0]}
    if is_plain and one == two:
        return {"value": one}
    raise ValueError("differs between calls in another way than by the number of prompts")
