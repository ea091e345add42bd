"""Which device a process takes, and what follows from it, on a machine that is said to have GPUs."""

import os

import pytest
import torch

import engine.run
import prune_by_learning
from diffusion.objectives import TrainStep
from engine.cli import launch
from engine.distributed import choose_device
from engine.errors import InputError
from engine.run import Run
from engine.settings import Settings
from engine.trainer import Trainer, TrainingOptions
from families import create_model


@pytest.fixture
def two_gpus(monkeypatch):
    """Says that there are two; nothing is asked of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return monkeypatch


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_one_process(two_gpus, name, index):
    assert choose_device(name) == torch.device("cuda", index)


def test_every_process_takes_its_own(two_gpus):
    two_gpus.setenv("WORLD_SIZE", "2")
    two_gpus.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "world", "local", "message"),
    [
        ("cuda:0", 2, 0, "--device cuda:0: 2 processes cannot share one GPU; take --device cuda"),
        ("cuda", 4, 2, r"--device cuda:2: this machine has 2 GPU\(s\), numbered from 0"),
        ("cuda:7", 1, 0, r"--device cuda:7: this machine has 2 GPU\(s\)"),
        ("gpu", 1, 0, "--device gpu: expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_refused_devices(two_gpus, name, world, local, message):
    two_gpus.setenv("WORLD_SIZE", str(world))
    two_gpus.setenv("LOCAL_RANK", str(local))
    with pytest.raises(InputError, match=message):
        choose_device(name)


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match="--device cuda: this machine has no usable GPU; take --device cpu"):
        choose_device("cuda")


COMPILED = [(None, True, True), (None, False, False), (False, True, False)]


@pytest.mark.parametrize(("asked", "compiler", "expected"), COMPILED)
def test_compiled_by_default_on_a_gpu(monkeypatch, asked, compiler, expected):
    """Where the compiler is there, and unless it is asked not to; on a processor only if asked to."""
    monkeypatch.setattr(engine.run, "has_triton", lambda: compiler)
    monkeypatch.setattr(engine.run.shutil, "which", lambda name: name)
    run = Run("cpu")
    assert run.compiles(asked) is False
    assert run.compiles(True) is True
    monkeypatch.setattr(Run, "on_gpu", True)
    assert run.compiles(asked) == expected
    run.sharded = True
    assert run.compiles(asked) is bool(asked)


@pytest.mark.parametrize(
    ("precision", "on_gpu", "is_fused"), [("bf16", False, False), ("fp32", False, True), ("bf16", True, True)]
)
def test_attention_of_training(monkeypatch, precision, on_gpu, is_fused):
    """On a processor in half precision by plain products, else by torch's fused form."""
    net = create_model("DiT-T/2", input_size=4, num_classes=5)
    step = TrainStep(net, objective=None)
    run = Run("cpu", precision)
    monkeypatch.setattr(Run, "on_gpu", on_gpu)
    Trainer(run, step, [{"params": list(net.parameters()), "lr": 0.0}], net, TrainingOptions(compile=False))
    assert {block.attn.fused_attn for block in net.blocks} == {is_fused}


USUAL = {"dense": None, "global_batch_size": 128, "grad_accumulation": 1, "gate_gradient": "straight-through"}
USUAL |= {"gate_samples": 1.0, "grad_checkpointing": False}


@pytest.mark.parametrize(
    ("changed", "world", "on_gpu", "dense"),
    [
        ({}, 8, True, True),  # the README's setting: 16 images a GPU
        ({}, 8, False, False),
        ({}, 1, True, False),
        ({"grad_accumulation": 8}, 1, True, True),
        ({"dense": False}, 8, True, False),
        ({"dense": True}, 1, False, True),
        ({"gate_samples": 0.25}, 8, True, False),
        ({"gate_gradient": "pairs"}, 8, True, False),
        ({"grad_checkpointing": True}, 8, True, False),
    ],
)
def test_dense_where_it_is_faster(monkeypatch, changed, world, on_gpu, dense):
    run = Run("cpu")
    run.world = world
    monkeypatch.setattr(Run, "on_gpu", on_gpu)
    assert prune_by_learning.runs_dense(Settings(USUAL | changed, {}, {}), run) == dense


def test_allocator(monkeypatch):
    """Every script lets the GPU's memory grow in segments, unless the user has said how, by either name."""
    old, new = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    for given, expected in (
        ({}, "expandable_segments:True"),
        ({old: "backend:native"}, "backend:native"),
        ({new: "x"}, None),
    ):
        for name in (old, new):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        seen = []
        with pytest.raises(SystemExit):
            launch(lambda settings, seen=seen: seen.append(os.environ.get(old)), lambda: None)
        assert seen == [expected]
