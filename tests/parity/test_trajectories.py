"""The training scripts on recorded batches and draws: every step's numbers, final and averaged weights, decisions."""

import importlib
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import engine.trainer
import families
import models
from models import DiT
from pruning.lora import LoRALinear
from pruning.surgery import keep_layers

from .golden import TOLERANCES, Golden, Replay, assert_close, gw, names, network

FILES = [Golden(name) for name in names("traj_*.npz")]


def parameters(files):
    dtypes = {"float32": torch.float32, "float64": torch.float64}
    return [pytest.param((z.name, dtypes[d]), id=f"{z.name}-{d}") for z in files for d in dtypes]


class Recorder(engine.trainer.Trainer):
    """A trainer that notes what it used and found at every step, and averages the whole network besides."""

    latest = None

    def __init__(self, run, step, *args, **options):
        super().__init__(run, step, *args, **options)
        self.whole = engine.trainer.Ema(self.net, self.ema.decay)
        self.rows, Recorder.latest = [], self

    def train_step(self, x, y):
        terms = super().train_step(x, y)
        self.whole.update()
        row = {"lr": torch.tensor([group["lr"] for group in self.optimizer.param_groups])}
        row |= {"grad_norm": self.grad_norm, **{f"terms.{name}": term for name, term in terms.items()}}
        if hasattr(self.net, "gumbel_gates"):
            row |= {name: torch.tensor(getattr(self.net.gumbel_gates, name)) for name in ("tau", "scaling")}
        if hasattr(self.step, "beta"):
            row["beta_feat"] = torch.tensor(self.step.beta)
        self.rows.append(row)
        return terms


def original(z, meta, **options):
    return network(meta["config"], meta["weight_seed"], z.meta["weight_std"], gate_std=z.meta["gate_std"], **options)


def command_line(z, folder):
    """The recorded flags, with weights rebuilt in files, on a CPU."""
    flags = [*z.meta["flags"], "--data-path", str(folder), "--results-dir", str(folder), "--device", "cpu"]
    torch.save(original(z, z.meta).state_dict(), folder / "weights.pt")
    flags += ["--load-weight", str(folder / "weights.pt")]
    if "teacher" in z.meta:
        torch.save(original(z, z.meta["teacher"]).state_dict(), folder / "teacher.pt")
        flags += ["--load-teacher", str(folder / "teacher.pt")]
    if "logged_decisions" in z.arrays:
        flags += ["--save-model", str(folder / "pruned.pt")]
    return flags


def prepare(z, net):
    """Recorded gates, Gumbel noise and precision for a network that a script has built."""
    if hasattr(net, "gumbel_gates"):
        gates, recorded = net.gumbel_gates, original(z, z.meta).gumbel_gates
        gates.load_state_dict(recorded.state_dict())
        noise = [z[f"gumbel_{g}"] for g in range(len(gates))]
        steps = iter(zip(*noise, strict=True))
        gates.draw_gumbel = lambda n: list(next(steps))
    return net.to(z.dtype)


def set_first_factors(z, net):
    """Give the adapters of a network the recorded first LoRA factors."""
    facts, own = z.meta["lora"], {name: p for name, p in net.named_parameters() if ".lora_" in name}
    assert [[name, list(p.shape)] for name, p in own.items()] == facts["names"], f"{z.name}: names of the adapters"
    for name, p in own.items():
        if ".lora_a." in name:
            p.data = torch.as_tensor(gw.normal(name, p.shape, facts["a_seed"], facts["a_std"])).to(z.dtype)
        else:
            assert not p.any(), f"{z.name}: {name} starts at zero"
    scales = {module.scale for module in net.modules() if isinstance(module, LoRALinear)}
    assert scales == {facts["alpha"] / facts["rank"]}, f"{z.name}: alpha of the adapters"


def replace_inputs(z, script, args, patch):
    """Let `script` train on the recorded batches and draws, in the precision of `z`."""
    steps, per_step = z["t"].shape
    start_network, weight_update = script.start_network, getattr(script, "weight_update", None)

    def start(*details):
        build, facts = start_network(*details)
        return lambda device: prepare(z, build(device)), facts

    def update(net, *details):
        trained = weight_update(net, *details)
        if "lora" in z.meta:
            set_first_factors(z, net)
        return trained

    def replay(diffusion):
        probability = DiT(**z.meta["config"]).y_embedder.dropout_prob
        drops = torch.as_tensor(z.arrays["drop_uniform"]) < probability
        return Replay(diffusion, zip(z["t"], z["noise"], drops, strict=True))

    data = range(steps // args.epochs * per_step)
    config = {key: z.meta["config"][key] for key in ("input_size", "in_channels", "num_classes")}
    patch.setattr(script, "open_latents", lambda args: (data, config))
    patch.setattr(script, "start_network", start)
    patch.setattr(script, "Trainer", Recorder)
    patch.setattr(families, "GaussianObjective", replay)
    patch.setattr(engine.trainer, "latent_loader", lambda *details: zip(z["x"], z["y"], strict=True))
    if weight_update:
        patch.setattr(script, "weight_update", update)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(file, dtype) -> a run of the recorded script: z, trainer, rows per step, log entries, folder. Each is run once."""
    runs = {}

    def run(name, dtype):
        z, folder = Golden(name, dtype), tmp_path_factory.mktemp("run")
        script = importlib.import_module(z.meta["script"].removesuffix(".py"))
        with pytest.MonkeyPatch.context() as patch:
            named = {flag: z.meta["flags"][i + 1] for i, flag in enumerate(z.meta["flags"]) if flag.startswith("--")}
            patch.setitem(models.DiT_models, named["--model"], partial(DiT, **z.meta["config"]))
            if "teacher" in z.meta:
                patch.setitem(models.DiT_models, named["--teacher"], partial(DiT, **z.meta["teacher"]["config"]))
            args = script.parse_args(command_line(z, folder))
            replace_inputs(z, script, args, patch)
            script.main(args)
        trainer = Recorder.latest
        rows = {key: torch.stack([row[key] for row in trainer.rows]) for key in trainer.rows[0]}
        log = [json.loads(line) for line in (trainer.run.folder / "metrics.jsonl").read_text().splitlines()]
        return SimpleNamespace(z=z, trainer=trainer, rows=rows, log=log, folder=folder)

    def once(key):
        if key not in runs:
            runs[key] = run(*key)
        return runs[key]

    return once


all_files = pytest.mark.parametrize("key", parameters(FILES))
with_weights = pytest.mark.parametrize("key", parameters([z for z in FILES if z.has("final:")]))
with_gates = pytest.mark.parametrize("key", parameters([z for z in FILES if z.has("gate_0")]))


@all_files
def test_every_step(finished, key):
    done = finished(key)
    z, rows = done.z, done.rows
    assert len(done.trainer.rows) == z.meta["steps"] == z.meta["train_steps"], f"{z.name}: number of steps"
    terms = {name.removeprefix("terms."): value for name, value in rows.items() if name.startswith("terms.")}
    z.check_terms("terms", terms, z["t"], "trajectory")
    for name in {"lr", "grad_norm", "tau", "scaling", "beta_feat"} & set(z.arrays):
        z.check(name, rows[name], "trajectory")


def comparable(name, tensor):
    """All of a parameter but the key bias: its true gradient is zero, and Adam turns rounding noise into steps."""
    q, _, v = tensor.chunk(3) if name.endswith("attn.qkv.bias") else (tensor, None, tensor[:0])
    return torch.cat([q, v])


@with_weights
@pytest.mark.parametrize("which", ["final", "ema"])
def test_weights(finished, key, which):
    done = finished(key)
    z, net = done.z, done.trainer.net if which == "final" else done.trainer.whole.module
    own = dict(net.named_parameters())
    for name in z.keys(f"{which}:"):
        expected, single = z.recorded(f"{which}:{name}")
        kind = "trajectory of lora_b" if ".lora_b." in name else "trajectory"
        what = f"{z.name}: {which}:{name}"
        limit = TOLERANCES[kind][0 if single else 1]
        assert_close(comparable(name, own[name]), comparable(name, expected), limit, what)
    if "norm_names" in z.meta:
        assert sorted(own) == sorted(z.meta["norm_names"]), f"{z.name}: norm_names"
        shown = [i for i, name in enumerate(z.meta["norm_names"]) if not name.endswith("attn.qkv.bias")]
        norms = torch.stack([own[z.meta["norm_names"][i]].norm() for i in shown])
        expected, single = z.recorded(f"norms.{which}")
        assert_close(norms, expected[shown], TOLERANCES["trajectory"][0 if single else 1], f"{z.name}: norms.{which}")


@with_gates
def test_gates(finished, key):
    done = finished(key)
    z, trainer = done.z, done.trainer
    for g, (gate, average) in enumerate(zip(trainer.net.gumbel_gates, trainer.ema.module, strict=True)):
        z.check(f"gate_{g}", gate, "trajectory")
        z.check(f"ema_gate_{g}", average, "trajectory")


@with_gates
def test_decisions(finished, key):
    done = finished(key)
    z, log = done.z, done.log
    z.check("logged_decisions", torch.tensor([row["kept"] for row in log]), "exact")
    z.check("logged_confidence", torch.tensor([row["confidence"] for row in log]).double(), "trajectory")
    facts = json.loads((done.folder / "pruned.pt.json").read_text())
    z.check("final_decision", torch.tensor(facts["kept"]), "exact")
    z.check("final_confidence", torch.tensor(facts["confidence"]).double(), "trajectory")


@with_gates
def test_pruned_weights_are_the_original_ones(finished, key):
    done = finished(key)
    z, pruned = done.z, torch.load(done.folder / "pruned.pt")
    assert z.meta["pruned_equals_original_weights"], f"{z.name}: pruned_equals_original_weights"
    shapes = [[name, list(value.shape)] for name, value in pruned.items()]
    assert shapes == z.meta["pruned_keys"], f"{z.name}: pruned_keys"
    expected = keep_layers(original(z, z.meta).state_dict(), z["final_decision"].tolist())
    assert all(torch.equal(pruned[name], expected[name]) for name in expected), f"{z.name}: pruned weights"
