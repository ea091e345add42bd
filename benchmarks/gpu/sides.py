"""Work at real sizes, with random weights: what is timed on a GPU. `tiny` makes all of it small enough for a processor.

Every function builds a Side of benchmarks.measure: a call of what the scripts do, in bf16.
"""

import runpy
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.extraction import make_vae
from benchmarks.measure import Side
from diffusion.objectives import TrainStep
from engine.run import DTYPES, Run, compile_blocks
from engine.trainer import Trainer, TrainingOptions
from engine.vae import AutoencoderCodec
from evaluation.inception import load_inception
from evaluation.metrics import FeatureStatistics
from families import create_model, family_of
from families.dit import SD_VAE
from pruning.distillation import DistillStep, layer_pairs
from pruning.gates import set_routing
from pruning.lora import weight_update

BF16 = torch.bfloat16
TINY = {"DiT": "DiT-T/2", "SiT": "SiT-T/2", "MAR": "MAR-T"}
GRAPH_MAKER = Path(__file__).parents[2] / "tests/golden/make_tiny_inception_graph.py"
TINY_GATED, TINY_HALF = "DiT-T-1-2", "DiT-T-D6/2"


def make_network(setup, name):
    """A registered network whose weights are nowhere zero, so that no shortcut is taken."""
    with setup.device:
        net = create_model(name, **({"input_size": 8} if setup.tiny else {}))
    for part, p in net.named_parameters():
        if "adaLN_modulation" in part or "final_layer" in part:
            torch.nn.init.normal_(p, std=0.02)
    return net.to(setup.device)


def make_objective(setup, name):
    """What a family trains on, with its usual flags."""
    family = family_of(name)
    return family.make_objective(**family.own_defaults("train")).to(setup.device)


def make_trainer(setup, step, compiled, averaged=None):
    """The Trainer of the scripts, over all that is trained."""
    run = Run(str(setup.device), "bf16")
    weights = [p for p in step.net.parameters() if p.requires_grad]
    options = TrainingOptions(compile=compiled and not setup.tiny)
    return Trainer(run, step, [{"params": weights, "lr": 1e-4}], averaged or step.net, options)


def make_batch(setup, net, n):
    """Latents and labels of n images."""
    shape = (n, net.in_channels, net.input_size, net.input_size)
    return torch.randn(shape, device=setup.device), torch.arange(n, device=setup.device) % net.num_classes


def learn(setup, update="lora", dense=True, compiled=False, n=16):
    """An optimizer step of gate learning, DiT-XL/2 under 1:2."""
    name, n = (TINY_GATED, 2) if setup.tiny else ("DiT-XL-1-2", n)
    net = make_network(setup, name).train()
    weight_update(net, True, 8 if update == "lora" else None)
    set_routing(net, dense, 1.0)
    trainer = make_trainer(setup, TrainStep(net, make_objective(setup, name)), compiled, net.gumbel_gates)
    batch = make_batch(setup, net, n)
    return Side(lambda: trainer.train_step(*batch), n, dtype=BF16)


def tune(setup, name="DiT-D14/2", compiled=False, n=32):
    """An optimizer step of fine-tuning."""
    name, n = (TINY[name[:3]], 2) if setup.tiny else (name, n)
    net = make_network(setup, name).train()
    trainer = make_trainer(setup, TrainStep(net, make_objective(setup, name)), compiled)
    batch = make_batch(setup, net, n)
    return Side(lambda: trainer.train_step(*batch), n, dtype=BF16)


def distil(setup, compiled=False, n=32):
    """An optimizer step of Masked KD, 14 layers from 28."""
    names, n = ((TINY_HALF, TINY["DiT"]), 2) if setup.tiny else (("DiT-D14/2", "DiT-XL/2"), n)
    student, teacher = (make_network(setup, name) for name in names)
    compiled = compiled and not setup.tiny
    teacher = Run(str(setup.device), "bf16").freeze(teacher)
    if compiled:
        compile_blocks(teacher)
    pairs = layer_pairs(len(student.blocks), len(teacher.blocks))
    step = DistillStep(student.train(), teacher, make_objective(setup, names[0]), pairs, compiled=compiled)
    trainer = make_trainer(setup, step, compiled)
    batch = make_batch(setup, student, n)
    return Side(lambda: trainer.train_step(*batch), n, dtype=BF16)


def draw(setup, name="DiT-XL/2", compiled=False, n=32, steps=10, **own):
    """Latents of n images, guided; a picture takes as many times longer as it has more steps."""
    name, n, steps = (TINY[name[:3]], 2, 2) if setup.tiny else (name, n, steps)
    family, run = family_of(name), Run(str(setup.device), "bf16")
    net = run.freeze(make_network(setup, name))
    if compiled and not setup.tiny:
        compile_blocks(net)
    sampler = family.make_sampler(steps, 1.5, **family.own_defaults("sample") | own).to(setup.device)
    noise, labels = make_batch(setup, net, n)

    def run_sampler():
        with torch.inference_mode(), run.autocast():
            return sampler(net, labels, noise)

    return Side(run_sampler, n, dtype=BF16)


def make_codec(setup, precision):
    """An autoencoder with the sizes of Stable Diffusion's."""
    torch.manual_seed(0)
    vae = make_vae((32, 32, 32, 32) if setup.tiny else (128, 256, 512, 512)).to(setup.device).eval()
    return AutoencoderCodec(vae.to(DTYPES[precision]).requires_grad_(False), SD_VAE, precision != "fp32")


def encode(setup, precision="bf16", n=32):
    """Latents of n pictures of 256 px."""
    codec, run = make_codec(setup, "fp32"), Run(str(setup.device), precision)
    n, size = (2, 32) if setup.tiny else (n, 256)
    pictures = torch.rand(n, 3, size, size, device=setup.device) * 2 - 1
    noise = torch.randn(n, *codec.noise_shape(size), device=setup.device)

    def run_encoder():
        with torch.inference_mode(), run.autocast():
            return codec.encode(pictures, noise)

    return Side(run_encoder, n, dtype=BF16)


def decode(setup, precision="bf16", n=32):
    """Pictures of 256 px from n latents."""
    codec = make_codec(setup, precision)
    n, size = (2, 4) if setup.tiny else (n, 32)
    latents = torch.randn(n, 4, size, size, device=setup.device)

    def run_decoder():
        with torch.inference_mode():
            return codec.decode(latents)

    return Side(run_decoder, n, dtype=BF16)


def evaluate(setup, on_device=True, n=64):
    """Features of n pictures of 256 px, and their sums for both distances."""
    kind = "tiny_graph" if setup.tiny else "full_graph"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.pb"
        path.write_bytes(runpy.run_path(str(GRAPH_MAKER))[kind](0))
        features = load_inception(path, setup.device)
    size = 32 if setup.tiny else 256
    images = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    sums = [FeatureStatistics(width) for width in (2048, 2023)]

    def run_evaluator():
        for total, rows in zip(sums, features(images), strict=True):
            total.update(rows if on_device else rows.cpu().numpy())

    return Side(run_evaluator, n, dtype=torch.float32)
