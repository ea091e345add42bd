"""Training on encoded prompts for a transformer of diffusers, and sampling with its pipeline.

A folder `prompts` beside the latents holds `call.json` and arrays: how the pipeline calls its transformer (see
diffusion/pipeline_call.py), and what it gives it for every prompt; the last row is the empty prompt's.
"""

import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from diffusion.pipeline_call import FACTORS, LAYOUTS, OUTPUTS, USUAL, open_pipeline, plain_errors

EACH = (slice(None), None, None, None)  # a number for every sample, to multiply latents (N, C, h, w) with


def to_layout(x, layout):
    """Latents (N, C, h, w) as a transformer takes them; see pipeline_call.find_layout."""
    if layout == "frames":
        return x[:, :, None]
    if layout == "tokens":  # inside a token: channel, row, column
        n, c, h, w = x.shape
        return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)
    return x


def from_layout(out, layout, size):
    """The way back, to (N, C, h, w) with (h, w) the `size`."""
    if layout == "frames":
        return out[:, :, 0]
    if layout == "tokens":
        (h, w), n = size, len(out)
        return out.view(n, h // 2, w // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, -1, h, w)
    return out


@dataclass
class Call:
    """How a transformer is called, and the prompts; but for the folder, the fields are those of call.json.

    network: class name. latents, time: names of arguments. factor: of the scheduler's time. layout, output: see
    pipeline_call. template: the other arguments, see pipeline_call.describe_argument; arrays go by their path in it.
    scheduler: its config. count: of prompts without the empty one. cut: paths of arrays with as many tokens as the
    longest prompt of a batch has; how many every prompt has is in lengths.npy. pipeline: that encoded them. mu: what
    it gives a scheduler that shifts by the size of pictures.
    """

    network: str
    latents: str
    time: str
    factor: float
    layout: str
    output: str
    template: dict
    scheduler: dict
    count: int
    cut: list
    pipeline: str = ""
    mu: float | None = None
    folder: Path | None = None

    @classmethod
    def read(cls, folder):
        """The Call in a folder. Raises ValueError if there is none, or it is damaged."""
        folder = Path(folder)
        if not (folder / "call.json").is_file():
            raise ValueError(f"--data-path {folder.parent}: no prompts; run extract_features.py with --model")
        try:
            told = json.loads((folder / "call.json").read_text(encoding="utf-8"))
            return cls(**told, folder=folder).check().open()
        except (OSError, ValueError, TypeError, KeyError, EOFError, AttributeError) as error:
            raise ValueError(
                f"--data-path {folder}: damaged prompts ({error}); run extract_features.py again"
            ) from None

    def __post_init__(self):
        self.arrays, self.constants = {}, {}

    def check(self):
        """This, or a ValueError if a value cannot be."""
        fits = {
            "layout": self.layout in LAYOUTS,
            "output": self.output in OUTPUTS,
            "factor": self.factor in FACTORS,
            "template": isinstance(self.template, dict),
            "scheduler": isinstance(self.scheduler, dict) and isinstance(self.scheduler.get("_class_name"), str),
            "count": type(self.count) is int and self.count >= 0,
            "latents": isinstance(self.latents, str),
            "time": isinstance(self.time, str),
            "cut": isinstance(self.cut, list),
            "mu": self.mu is None or type(self.mu) in (int, float),
        }
        if wrong := [name for name, is_right in fits.items() if not is_right]:
            raise ValueError(f"{wrong[0]} is {getattr(self, wrong[0])!r:.100}")
        return self

    def open(self):
        """Map the arrays."""
        for path, part in list_parts(self.template):
            if "rows" in part or "constant" in part:
                self.arrays[path] = np.load(self.folder / f"{path}.npy", mmap_mode="r")
                if "rows" in part and len(self.arrays[path]) != self.count + 1:
                    raise ValueError(f"{path}.npy has {len(self.arrays[path])} rows, expected {self.count + 1}")
        self.lengths = np.load(self.folder / "lengths.npy") if self.cut else None
        if self.cut and len(self.lengths) != self.count + 1:
            raise ValueError(f"lengths.npy has {len(self.lengths)} numbers, expected {self.count + 1}")
        return self

    def inputs(self, rows, device):
        """The transformer's arguments but latents and time for prompts by number, (N,) on the CPU."""
        longest = self.lengths[rows].max() if self.cut else None
        return {name: self._make(part, name, rows, longest, device) for name, part in self.template.items()}

    def _make(self, part, path, rows, longest, device):
        if "rows" in part:
            values = self.arrays[path][rows]
            values = torch.from_numpy(values[:, :longest] if path in self.cut else values)
            return (values.float() if values.is_floating_point() else values).to(device)
        if "constant" in part:
            if path not in self.constants:
                self.constants[path] = torch.from_numpy(np.array(self.arrays[path])).to(device)
            return self.constants[path]
        if "each" in part:
            return [part["each"]] * len(rows)
        if "dict" in part:
            return {
                name: self._make(inner, f"{path}.{name}", rows, longest, device) for name, inner in part["dict"].items()
            }
        return part["value"]


def list_parts(template, parent=""):
    """Yield (path, part) of all leaves of a template."""
    for name, part in template.items():
        if "dict" in part:
            yield from list_parts(part["dict"], f"{parent}{name}.")
        else:
            yield f"{parent}{name}", part


class PromptDraw(NamedTuple):
    """The random numbers of a step, and what belongs to them."""

    t: torch.Tensor  # the scheduler's time, (N,)
    signal: torch.Tensor  # x_t = signal * x + spread * noise, both (N,)
    spread: torch.Tensor
    noise: torch.Tensor  # like x
    prompts: np.ndarray  # numbers of the prompts, (N,)
    inputs: dict  # of the transformer


class PromptObjective(nn.Module):
    """What a pipeline's scheduler says its transformer predicts, for latents x (N, C, h, w) and prompts by number y.

    dropout: share of prompts that become the empty one in training. time_sampling: "logit-normal" or "uniform", of flow
    matching (arXiv 2403.03206). shift: of these times; None: the scheduler's. guidance: what a transformer that embeds
    the guidance is told. Raises ValueError for a scheduler whose prediction is not known.
    """

    def __init__(self, call, dropout=0.1, time_sampling="logit-normal", shift=None, guidance=3.5):
        super().__init__()
        self.call, self.dropout, self.time_sampling, self.guidance = call, dropout, time_sampling, guidance
        config = call.scheduler
        self.steps = config.get("num_train_timesteps", 1000)
        self.is_flow = is_flow(config, config["_class_name"])
        self.kind = "flow" if self.is_flow else config.get("prediction_type", "epsilon")
        if self.kind not in ("flow", "epsilon", "v_prediction", "sample"):
            raise ValueError(f"the scheduler has the prediction {self.kind}; expected epsilon, v_prediction or sample")
        if self.is_flow:
            self.shift = shift or find_shift(config, call.mu)
        else:
            self.register_buffer("alphas", read_alphas(config), persistent=False)

    def draw(self, net, x, y):
        """Draw times, noise and, in training mode, which prompts are dropped, in this order."""
        n, device = len(x), x.device
        if self.is_flow:
            is_uniform = self.time_sampling == "uniform"
            u = torch.rand(n, device=device) if is_uniform else torch.randn(n, device=device).sigmoid()
            spread = self.shift * u / (1 + (self.shift - 1) * u)
            t, signal = spread * self.steps, 1 - spread
        else:
            t = torch.randint(0, self.steps, (n,), device=device)
            signal, spread = self.alphas[t].sqrt(), (1 - self.alphas[t]).sqrt()
        noise, rows = torch.randn_like(x), y
        if net.training and self.dropout:
            rows = torch.where(torch.rand(n, device=device) < self.dropout, self.call.count, rows)
        rows = rows.cpu().numpy()
        return PromptDraw(t, signal, spread, noise, rows, self._inputs(rows, device))

    def _inputs(self, rows, device):
        inputs = self.call.inputs(rows, device)
        if torch.is_tensor(inputs.get("guidance")):
            inputs["guidance"] = inputs["guidance"] * self.guidance  # recorded at a guidance of 1
        return inputs

    def predict(self, net, x, y, draw, observe=None, mask=None):
        """Run `net` on the noised latents -> (N, C, h, w); `observe` and `mask` as for the network."""
        x_t = draw.signal[EACH] * x + draw.spread[EACH] * draw.noise
        if (mask is not None or hasattr(net, "gumbel_gates")) and not net.prepared:
            net.prepare(lambda n: self._take_samples(x_t, draw, n))
        given = {**self._state(x_t, draw.t), **draw.inputs}
        out = net(**given, return_dict=False, mask=mask, observe=observe)[0]
        out = out.chunk(2, dim=1)[0] if self.call.output == "half" else out
        return from_layout(out, self.call.layout, x.shape[2:])

    def _state(self, x_t, t):
        """Latents and time as the transformer takes them."""
        return {self.call.latents: to_layout(x_t, self.call.layout), self.call.time: t * self.call.factor}

    def _take_samples(self, x_t, draw, n):
        """The transformer's arguments for n samples: the first and the last of a batch in turns."""
        places = [0, -1, 0][:n]
        return {**self._state(x_t[places].detach(), draw.t[places]), **self._inputs(draw.prompts[places], x_t.device)}

    def noise_share(self, draw):
        """Share of noise in the variance of what the network sees, (N,)."""
        return draw.spread**2 / (draw.signal**2 + draw.spread**2)

    def loss(self, prediction, x, draw):
        """Mean squared error of the prediction: dict of per-sample terms (N,)."""
        return {"loss": mean_square(prediction - self._target(x, draw))}

    def _target(self, x, draw):
        if self.kind == "flow":
            return draw.noise - x
        if self.kind == "v_prediction":
            return draw.signal[EACH] * draw.noise - draw.spread[EACH] * x
        return draw.noise if self.kind == "epsilon" else x

    def match(self, student, teacher, x, draw):
        """Mean squared difference of two predictions: dict of per-sample terms (N,)."""
        return {"kd_loss": mean_square(student - teacher)}


def is_flow(config, class_name):
    """Whether a scheduler of this class and config is for flow matching."""
    return "FlowMatch" in class_name or config.get("prediction_type") == "flow_prediction"


def mean_square(difference):
    """(N, ...) -> (N,), in at least float32."""
    return difference.float().square().flatten(1).mean(1)


def read_alphas(config):
    """Share of the signal in the variance at every step of a scheduler with this config, (steps,) float32."""
    import diffusers

    kind = getattr(diffusers, config["_class_name"], None)
    scheduler = kind and kind.from_config(config)
    if not torch.is_tensor(getattr(scheduler, "alphas_cumprod", None)):
        raise ValueError(f"the scheduler {config['_class_name']} has no noise schedule that is known")
    return scheduler.alphas_cumprod.float()


def find_shift(config, mu):
    """The factor by which a scheduler shifts the times of flow matching towards noise; mu: see Call.

    Raises ValueError for a scheduler that needs mu where the pipeline gives none.
    """
    if not config.get("use_dynamic_shifting"):
        return config.get("shift") or config.get("flow_shift") or 1.0
    if mu is None:
        raise ValueError(
            "the scheduler shifts by the size of pictures, and the pipeline does not say how; give --shift"
        )
    return mu if config.get("time_shift_type") == "linear" else float(np.exp(mu))


class PipelineSampler(nn.Module):
    """A pipeline of diffusers draws with the network that it is given; from noise and prompts by number to latents.

    folder: of the pipeline. takes_tokens: whether its latents are packed 2 x 2.
    """

    def __init__(self, folder, prompts, steps, guidance, takes_tokens):
        super().__init__()
        self.folder, self.prompts, self.steps, self.guidance = folder, list(prompts), steps, guidance
        self.takes_tokens, self.opened = takes_tokens, None

    @property
    def digest(self):
        """A short digest of what pictures depend on besides network and settings: the prompts, and the pipeline."""
        parts = "\n".join([str(self.folder), *self.prompts])
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def open(self, net, device):
        """The pipeline with this network in it."""
        if self.opened is None:
            with plain_errors(f"{self.folder} cannot be opened as a pipeline"):
                self.opened = open_pipeline(self.folder, None).to(device)
        self.opened.transformer = net
        return self.opened

    def forward(self, net, y, noise, step_noise=None, progress=False):
        pipeline = self.open(net, noise.device)
        pipeline.set_progress_bar_config(disable=not progress)
        options = inspect.signature(type(pipeline).__call__).parameters
        is_video = "num_frames" in options
        factor = pipeline.vae_scale_factor_spatial if is_video else pipeline.vae_scale_factor
        layout = "tokens" if self.takes_tokens else "frames" if is_video else "grid"
        asked = {name: value for name, value in USUAL.items() if name in options}
        asked["guidance_scale"] = max(self.guidance, 1.0)
        if "true_cfg_scale" in options and not getattr(net.config, "guidance_embeds", False):
            asked |= {"true_cfg_scale": max(self.guidance, 1.0), "negative_prompt": [""] * len(y)}
            asked.pop("guidance_scale")
        asked |= {"height": noise.shape[2] * factor, "width": noise.shape[3] * factor}
        with plain_errors(f"{type(pipeline).__name__} fails"):
            out = pipeline(
                prompt=[self.prompts[k] for k in y.tolist()],
                latents=to_layout(noise, layout),
                num_inference_steps=self.steps,
                output_type="latent",
                return_dict=False,
                **asked,
            )[0]
        return from_layout(out, layout, noise.shape[2:])
