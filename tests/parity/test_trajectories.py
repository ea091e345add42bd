"""The training scripts on recorded batches and draws: every step's numbers, final and averaged weights, decisions."""

import importlib
import json
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from machine import DEVICE

import diffusion.objectives
import engine.data
import engine.networks
import engine.start
import engine.trainer
import pruning.lora
from engine.optim import Ema
from engine.trainer import Trainer
from families.dit import DIT
from pruning.lora import LoRALinear
from pruning.surgery import keep_layers

from .golden import DTYPES, Golden, Replay, gw, names, network

FILES = [Golden(name) for name in names("traj_*.npz")]


def parameters(files):
    found = {f"{z.name}-{dtype}": (z.name, DTYPES[dtype]) for z in files for dtype in DTYPES}
    return pytest.mark.parametrize("key", found.values(), ids=found)


all_files = parameters(FILES)
with_weights = parameters([z for z in FILES if z.has("final:")])
with_gates = parameters([z for z in FILES if z.has("gate_0")])


class Recorder(Trainer):
    """A trainer that notes what it used and found at every step, and averages the whole network besides."""

    def __init__(self, run, step, *args, **options):
        super().__init__(run, step, *args, **options)
        self.whole, self.rows = Ema(self.net, self.ema.decay), []
        Recorder.latest = self

    def train_step(self, x, y):
        terms = super().train_step(x, y)
        self.whole.update(self.steps - 1)
        gates = getattr(self.net, "gumbel_gates", None)
        row = {"lr": [group["lr"] for group in self.optimizer.param_groups], "beta_feat": getattr(self.step, "beta", 0)}
        row |= {"tau": gates.tau, "scaling": gates.scaling} if gates else {}
        row = {name: torch.tensor(value, dtype=torch.float64) for name, value in row.items()}
        self.rows.append({**row, "grad_norm": self.grad_norm, **terms})
        return terms


def original(z, meta):
    return network(meta["config"], meta["weight_seed"], z.meta["weight_std"], gate_std=z.meta["gate_std"])


def command_line(z, folder):
    """The recorded flags, with weights rebuilt in files."""
    flags = [*z.meta["flags"], "--data-path", str(folder), "--results-dir", str(folder), "--device", DEVICE.type]
    if DEVICE.type != "cpu":  # where that is the default
        flags += ["--precision", "fp32", "--no-compile"]
    for flag, meta in (("--load-weight", z.meta), ("--load-teacher", z.meta.get("teacher"))):
        if meta:
            path = str(folder / f"{flag}.pt")
            torch.save(original(z, meta).state_dict(), path)
            flags += [flag, path]
    return flags + (["--save-model", str(folder / "pruned.pt")] if z.has("final_decision") else [])


def prepare(z, net):
    """Recorded gates, Gumbel noise and precision for a network that a script has built."""
    if hasattr(net, "gumbel_gates"):
        net.gumbel_gates.load_state_dict(original(z, z.meta).gumbel_gates.state_dict())
        steps = zip(*(z[f"gumbel_{g}"] for g in range(len(net.gumbel_gates))), strict=True)
        net.gumbel_gates.draw_gumbel = lambda n: list(next(steps))
    return net.to(z.dtype)


def set_first_factors(z, net):
    """Give the adapters of a network the recorded first LoRA factors."""
    facts, own = z.meta["lora"], {name: p for name, p in net.named_parameters() if ".lora_" in name}
    assert [[name, list(p.shape)] for name, p in own.items()] == facts["names"], f"{z.name}: names of the adapters"
    for name in [name for name in own if ".lora_a." in name]:
        own[name].data = torch.as_tensor(gw.normal(name, own[name].shape, facts["a_seed"], facts["a_std"])).to(z.dtype)
    scales = {module.scale for module in net.modules() if isinstance(module, LoRALinear)}
    assert scales == {facts["alpha"] / facts["rank"]}, f"{z.name}: alpha of the adapters"


class RecordedLatents:
    """The recorded batches in place of a folder of latents, of which only the number counts."""

    mapped = True

    def __init__(self, images, config):
        self.images, self.metadata = images, {"shape": [config["in_channels"], *[config["input_size"]] * 2]}

    def __len__(self):
        return self.images

    def digest(self):
        return "recorded"


def replace_inputs(z, epochs, patch):
    """Let a script train on the recorded batches and draws, in the precision of `z`."""
    build, weight_update = engine.networks.NetworkStart.build, pruning.lora.weight_update

    def update(net, *details):
        trained = weight_update(net, *details)
        is_sketch = any(p.is_meta for p in net.parameters())
        if "lora" in z.meta and not is_sketch:
            set_first_factors(z, net)
        return trained

    def objective(process):
        return Replay(process, zip(z["t"], z["noise"], z["drop_uniform"], strict=True))

    steps, batch = z["t"].shape
    latents = RecordedLatents(steps // epochs * batch, z.meta["config"])
    patch.setattr(engine.start, "open_latents", lambda folder, space: latents)
    patch.setattr(engine.data.TrainingData, "batches", lambda *details, **options: zip(z["x"], z["y"], strict=True))
    patch.setattr(engine.networks.NetworkStart, "build", lambda start, *how: prepare(z, build(start, *how)))
    patch.setattr(pruning.lora, "weight_update", update)
    patch.setattr(engine.trainer, "Trainer", Recorder)
    patch.setattr(diffusion.objectives, "GaussianObjective", objective)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(file, dtype) -> a run of the recorded script, made once: z, trainer, rows (per step), log, folder."""

    @cache
    def run(key):
        z, folder = Golden(*key), tmp_path_factory.mktemp("run")
        script = importlib.import_module(z.meta["script"].removesuffix(".py"))
        given = dict(zip(z.meta["flags"], z.meta["flags"][1:], strict=False))
        with pytest.MonkeyPatch.context() as patch:
            for flag, meta in (("--model", z.meta), ("--teacher", z.meta.get("teacher"))):
                if meta:  # the recorded runs gave small networks the names of large ones
                    patch.setitem(DIT.models, given[flag], meta["config"])
            settings = script.parse_args(command_line(z, folder))
            replace_inputs(z, settings.epochs, patch)
            script.main(settings)
        trainer = Recorder.latest
        rows = {name: torch.stack([row[name] for row in trainer.rows]) for name in trainer.rows[0]}
        (metrics,) = folder.glob("*/metrics.jsonl")
        log = [json.loads(line) for line in metrics.read_text().splitlines()]
        log = [row for row in log if row["step"] % settings.log_every == 0]
        return SimpleNamespace(z=z, trainer=trainer, rows=rows, log=log, folder=folder)

    return run


@all_files
def test_every_step(finished, key):
    done = finished(key)
    z, rows = done.z, done.rows
    assert len(done.trainer.rows) == z.meta["steps"] == z.meta["train_steps"], f"{z.name}: number of steps"
    z.check_terms("terms", rows, z["t"], "trajectory")
    for name in {"lr", "grad_norm", "tau", "scaling", "beta_feat"} & set(z.arrays):
        z.check(name, rows[name], "trajectory")


def comparable(name, tensor):
    """All of a parameter but the key bias: its true gradient is zero, and Adam turns rounding noise into steps."""
    q, _, v = tensor.chunk(3) if name.endswith("attn.qkv.bias") else (tensor, None, tensor[:0])
    return torch.cat([q, v])


@with_weights
@pytest.mark.parametrize("which", ["final", "ema"])
def test_weights(finished, key, which):
    z, trainer = finished(key).z, finished(key).trainer
    own = dict((trainer.net if which == "final" else trainer.whole.module).named_parameters())
    for name in z.keys(f"{which}:"):
        kind = "trajectory of lora_b" if ".lora_b." in name else "trajectory"
        z.check(f"{which}:{name}", comparable(name, own[name]), kind, partial(comparable, name))
    if "norm_names" in z.meta:
        assert sorted(own) == sorted(z.meta["norm_names"]), f"{z.name}: norm_names"
        shown = [i for i, name in enumerate(z.meta["norm_names"]) if not name.endswith("attn.qkv.bias")]
        norms = torch.stack([own[z.meta["norm_names"][i]].norm() for i in shown])
        z.check(f"norms.{which}", norms, "trajectory", lambda array: array[shown])


@with_gates
def test_gates(finished, key):
    z, trainer = finished(key).z, finished(key).trainer
    for g, (gate, average) in enumerate(zip(trainer.net.gumbel_gates, trainer.ema.module, strict=True)):
        z.check(f"gate_{g}", gate, "trajectory")
        z.check(f"ema_gate_{g}", average, "trajectory")


@with_gates
def test_decisions(finished, key):
    done = finished(key)
    final = json.loads((done.folder / "pruned.pt.json").read_text())
    done.z.check("logged_decisions", [row["kept"] for row in done.log], "exact")
    done.z.check("logged_confidence", [row["confidence"] for row in done.log], "trajectory")
    done.z.check("final_decision", final["kept"], "exact")
    done.z.check("final_confidence", final["confidence"], "trajectory")


@with_gates
def test_pruned_weights_are_the_original_ones(finished, key):
    z, pruned = finished(key).z, torch.load(finished(key).folder / "pruned.pt")
    assert z.meta["pruned_equals_original_weights"], f"{z.name}: pruned_equals_original_weights"
    shapes = [[name, list(value.shape)] for name, value in pruned.items()]
    assert shapes == z.meta["pruned_keys"], f"{z.name}: pruned_keys"
    expected = keep_layers(original(z, z.meta).state_dict(), z["final_decision"].tolist())
    assert all(torch.equal(pruned[name], expected[name].cpu()) for name in expected), f"{z.name}: pruned weights"
