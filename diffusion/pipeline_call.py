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

FACTORS = (1.0, 1e-3)  # of the scheduler's time, as networks take it
USUAL = {  # arguments of pipelines, where they have them: no guidance, no other sizes than asked for, one frame
    "guidance_scale": 1.0,
    "true_cfg_scale": 1.0,
    "use_resolution_binning": False,
    "clean_caption": False,
    "num_frames": 1,
}


class StopCalling(Exception):
    """All has been seen."""


@dataclass
class Recording:
    """What was seen of a pipeline's two steps: arguments of the transformer and its outputs, and what the scheduler got
    of both."""

    arguments: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    steps: list = field(default_factory=list)  # (model output, time, latents)


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

    def _note_step(self, output, time, latents, *_, **__):
        self.seen.steps.append((output, time, latents))
        if len(self.seen.steps) == 2:
            raise StopCalling
        return (latents,)

    def record(self, texts, size):
        """The Recording of two steps for these prompts, of pictures of `size` pixels."""
        self.seen.arguments.clear(), self.seen.outputs.clear(), self.seen.steps.clear()
        usual = {name: value for name, value in USUAL.items() if name in self.options}
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
    kind = getattr(
        diffusers, index["_class_name"]
    )  # which may leave its transformer out, where DiffusionPipeline loads it
    return kind.from_pretrained(folder, transformer=transformer, torch_dtype=dtype, low_cpu_mem_usage=False)


@contextmanager
def plain_errors(what):
    """Turn what libraries raise into a ValueError."""
    try:
        yield
    except StopCalling:
        raise
    except Exception as error:  # it may be any: of a pipeline, a tokenizer, a text encoder
        raise ValueError(f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from None


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
