"""What networks cost: multiply-adds are counted right, time and memory measured, and nothing else changes by it."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import engine.profile
from engine.checkpoint import read_facts
from engine.profile import Profiler, count_flops, count_macs, describe_profile, make_forward
from engine.run import Run
from families import create_model
from pruning.surgery import keep_layers

TINY = {"input_size": 8, "in_channels": 3, "num_classes": 10}
NAMES = {"DiT-T/2": "DiT-T-D6/2", "SiT-T/2": "SiT-T-D6/2", "MAR-T": "MAR-T-D6"}


@pytest.fixture(scope="module")
def cut():
    """{name: (weights of the whole network, of its half)}."""
    states = {name: create_model(name, **TINY).state_dict() for name in NAMES}
    return {name: (state, keep_layers(state, range(0, 12, 2))) for name, state in states.items()}


def test_published_network():
    """DiT-XL/2 is known to take 118.6 thousand million multiply-adds for an image of 256 pixels."""
    assert count_macs("DiT-XL/2", {}) == pytest.approx(118.6e9, rel=1e-3)


def test_by_hand():
    """Patches, embedders, blocks and the final layer of a DiT of width 96 with 16 tokens."""
    width, tokens, depth = 96, 16, 6
    block = tokens * (4 + 8) * width**2 + 2 * tokens**2 * width + 6 * width**2
    ends = tokens * 3 * 2**2 * width + 256 * width + width**2 + 2 * width**2 + tokens * width * 2 * 3 * 2**2
    assert count_macs("DiT-T-D6/2", TINY) == depth * block + ends


@pytest.mark.parametrize("name", NAMES)
def test_same_as_a_real_pass(name):
    """Nothing of a network that runs for real is missed by the one that multiplies nothing."""
    cpu = torch.device("cpu")
    net = create_model(name, **TINY).eval()
    with engine.profile.own_draws(cpu), torch.no_grad():
        forward = make_forward(name, net, cpu)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            assert forward().isfinite().all()
    assert 2 * count_macs(name, TINY) == counter.get_total_flops() > 0


def test_attention_counts():
    """Also where the processor's own kernel would run, for which torch has no formula."""
    q = torch.randn(1, 2, 5, 8)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * 2 * (2 * 5 * 5 * 8)


def fail():
    raise NotImplementedError("no such operation here")


@pytest.mark.parametrize(
    "function",
    [
        lambda: torch.ones(3, 3) @ torch.ones(3, 3) @ torch.ones(3),  # the second is of another kind
        lambda: torch.ones(3) @ torch.ones(3),
        lambda: torch.ones(3) + 1,
        fail,
    ],
    ids=["matrix and vector", "vectors", "no product", "error"],
)
def test_what_cannot_be_counted(function):
    """Nothing is said, rather than a number that leaves something out."""
    assert count_flops(function) is None


@pytest.mark.own_device
@pytest.mark.parametrize("name", NAMES)
def test_before_and_after(name, cut):
    """Numbers of both networks; on a CPU memory is that of the weights."""
    whole, pruned = cut[name]
    found = Profiler(Run("cpu"), name, whole).compare(pruned)
    assert (found["device"], found["precision"]) == ("cpu", "fp32")
    for when, state, model in (("before", whole, name), ("after", pruned, NAMES[name])):
        size = sum(value.numel() for value in state.values())
        told = found[when]
        assert told["latency_ms"] > 0
        assert told | {"latency_ms": 0} == {
            "parameters": size,
            "gmacs": count_macs(model, TINY) / 1e9,
            "latency_ms": 0,
            "memory_gb": 4 * size / 1e9,
        }


@pytest.mark.own_device
@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_changes(name, cut):
    """Random numbers go on as if nothing had been measured, and weights stay what they are."""
    whole, pruned = cut[name]
    before = {key: value.clone() for key, value in whole.items()}
    run = Run("cpu", "bf16", seed=3)
    generator = torch.get_rng_state()
    Profiler(run, name, whole).compare(pruned)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(value.dtype == torch.float32 and torch.equal(value, before[key]) for key, value in whole.items())


@pytest.mark.own_device
def test_precision(cut):
    """In half precision matrices take half of the memory."""
    whole, pruned = cut["DiT-T/2"]
    full, half = (Profiler(Run("cpu", precision), "DiT-T/2", whole).compare(pruned) for precision in ("fp32", "bf16"))
    assert half["precision"] == "bf16"
    assert 0.5 < half["before"]["memory_gb"] / full["before"]["memory_gb"] < 0.6


@pytest.mark.own_device
def test_every_size_is_measured_once(cut, monkeypatch):
    """Finalists are of one size, whatever layers they keep."""
    whole, pruned = cut["DiT-T/2"]
    timed, time_passes = [], engine.profile.time_passes
    monkeypatch.setattr(engine.profile, "time_passes", lambda *words: timed.append(1) or time_passes(*words))
    profiler = Profiler(Run("cpu"), "DiT-T-1-2", {**whole, "gumbel_gates.0": torch.ones(1, 2)})
    first = profiler.compare(pruned)
    assert profiler.compare(keep_layers(whole, range(6))) == first
    assert first["before"]["parameters"] == sum(value.numel() for value in whole.values())
    assert len(timed) == 2


@pytest.mark.own_device
def test_no_room(cut, monkeypatch, capsys):
    """What was decided is not lost where both networks do not fit: their times are not known then."""

    def fail(*words):
        raise torch.OutOfMemoryError("out of memory. Tried to allocate")

    monkeypatch.setattr(engine.profile, "time_passes", fail)
    whole, pruned = cut["DiT-T/2"]
    found = Profiler(Run("cpu"), "DiT-T/2", whole).compare(pruned)
    assert found["after"]["latency_ms"] is found["after"]["memory_gb"] is None
    assert found["after"]["gmacs"] > 0
    assert "note: DiT-T-D6/2 was not timed (out of memory." in capsys.readouterr().out
    lines = describe_profile(found)
    assert lines[0] == "for one image on cpu, fp32:"
    assert lines[1].split()[0] == "before"
    assert "ms" not in lines[1].split()


@pytest.mark.own_device
def test_memory_of_a_gpu(cut, monkeypatch):
    """It is that of the weights and of what a pass takes besides; of what others hold there nothing counts."""
    calls = []
    gpu = SimpleNamespace(
        get_device_name=lambda device: "a card",
        synchronize=lambda: calls.append("wait"),
        reset_peak_memory_stats=lambda device: calls.append("reset"),
        memory_allocated=lambda device: 7_000,
        max_memory_allocated=lambda device: 9_500,
    )
    monkeypatch.setattr(Run, "on_gpu", True)
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    whole, pruned = cut["DiT-T/2"]
    found = Profiler(Run("cpu", "fp32"), "DiT-T/2", whole).compare(pruned)
    assert found["device"] == "a card"
    assert found["before"]["memory_gb"] == (4 * sum(value.numel() for value in whole.values()) + 2_500) / 1e9
    assert calls == ["reset", *["wait"] * 10] * 2


@pytest.mark.own_device
def test_scripts_tell_and_record(make_family, latents, tmp_path, run_script, capsys):
    """All three, and not with --no-profile."""
    teacher = make_family("DiT")
    train = ["--data-path", latents, "--results-dir", tmp_path, "--epochs", 1, "--global-batch-size", 32]
    commands = {
        "prune_by_index": ["--ckpt", teacher.weights, "--scheme", "bk-sdm"],
        "prune_by_score": ["--ckpt", teacher.weights, "--n-pruned", 6, "--criterion", "random"],
        "prune_by_learning": ["--model", teacher.gated, "--load-weight", teacher.weights, "--num-workers", 0, *train],
    }
    for name, words in commands.items():
        out = tmp_path / f"{name}.pt"
        capsys.readouterr()
        run_script(name, *words, "--save-model", out)
        profile, shown = read_facts(out)["profile"], capsys.readouterr().out
        assert profile["before"]["parameters"] == sum(value.numel() for value in teacher.state.values())
        assert profile["after"]["gmacs"] == count_macs(teacher.half, TINY) / 1e9
        for line in describe_profile(profile):
            assert line in shown
        plain = tmp_path / f"{name}-plain.pt"
        run_script(name, *words, "--save-model", plain, "--no-profile")
        assert read_facts(plain) == {key: value for key, value in read_facts(out).items() if key != "profile"}
        assert "GMACs" not in capsys.readouterr().out


@pytest.mark.own_device
def test_written_again(teacher, tmp_path, run_script):
    """A file that is written again as it was keeps its numbers; with other layers, or without any, it is measured."""
    words = ["--ckpt", teacher.weights, "--save-model", tmp_path / "out.pt", "--kept-indices"]
    run_script("prune_by_index", *words, "0,1,2")
    first = read_facts(tmp_path / "out.pt")
    run_script("prune_by_index", *words, "0,1,2")
    assert read_facts(tmp_path / "out.pt") == first
    run_script("prune_by_index", *words, "0,1,3")
    second = read_facts(tmp_path / "out.pt")
    assert second["profile"]["after"]["latency_ms"] != first["profile"]["after"]["latency_ms"]
    (tmp_path / "out.pt.json").write_text('{"profile": ')
    run_script("prune_by_index", *words, "0,1,3")
    assert read_facts(tmp_path / "out.pt")["profile"]["after"]["latency_ms"] != second["profile"]["after"]["latency_ms"]
