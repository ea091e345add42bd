"""`--compile`: everything that takes time is compiled, and no network reaches torch's limit of recompilations."""

import logging

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import compile_fx, metrics

from diffusion.objectives import TrainStep
from engine.run import checkpoint_blocks, compile_blocks
from families import create_model, family_of
from models import DiTBlock
from pruning.distillation import masked_feature_loss
from pruning.lora import weight_update

UPDATES = {"gates": (False, None), "full": (True, None), "lora": (True, 4)}
LIMIT = torch._dynamo.config.recompile_limit  # graphs of one function
STEPS, IMAGES = 12, 8


@pytest.fixture
def fresh_compiler():
    """No graphs from before, none left behind; beyond the limit is an error."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


CASES = [(name, update) for name in ("DiT-T-1-2", "MAR-T-1-2") for update in UPDATES] + [("SiT-T-1-2", "lora")]


@pytest.mark.parametrize(("name", "update"), CASES)
def test_graphs_of_gated_networks(fresh_compiler, name, update):
    """Checkpointed, since that is where a wrong graph shows; gradients stay those of the plain network."""
    torch.manual_seed(0)
    net, family = create_model(name, input_size=8, in_channels=3, num_classes=5).train(), family_of(name)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    weight_update(net, *UPDATES[update])
    step = TrainStep(net, family.make_objective(**family.own_defaults("train")))
    checkpoint_blocks(net)

    def gradient(k):
        torch.manual_seed(k)
        net.zero_grad()
        step(torch.randn(IMAGES, 3, 8, 8), torch.arange(IMAGES) % 5)["loss"].mean().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    expected = gradient(0)
    compile_blocks(net, backend="aot_eager")
    torch.testing.assert_close(gradient(0), expected, rtol=1e-3, atol=1e-6)
    for k in range(1, STEPS):
        gradient(k)
    functions = 2 if name.startswith("MAR") else 1  # a block; and MAR's head
    assert 0 < counters["stats"]["unique_graphs"] <= LIMIT * functions
    assert not counters["graph_break"]


def test_head_is_compiled():
    net = create_model("MAR-T", input_size=8, in_channels=3, num_classes=5)
    compile_blocks(net, backend="aot_eager")
    parts = [*net.encoder_blocks, *net.decoder_blocks, net.diffloss.net]
    assert all(part._compiled_call_impl is not None for part in parts)


@pytest.fixture
def count_bytes(fresh_compiler):
    """count_bytes(work): bytes that the compiled graphs of work() move, matrix products and attention left out."""
    logger = compile_fx.inductor_metrics_log
    level = logger.level
    logger.setLevel(logging.INFO)  # else nothing is counted, nor is a graph that comes from a cache

    def count(work):
        torch._dynamo.reset()
        metrics.reset()
        with torch._inductor.config.patch(force_disable_caches=True):
            work()
        fused = [n for node, n in metrics.nodes_num_elem if not type(node).__name__.startswith("Extern")]
        assert fused
        return 4 * sum(fused)

    yield count
    logger.setLevel(level)


def per_element(count, work, tokens, width):
    """Bytes per element of (N, tokens, width): what two samples more cost, so that weights do not count."""
    four, six = count(lambda: work(4)), count(lambda: work(6))
    return (six - four) / (2 * tokens * width)


def test_bytes_of_the_feature_loss(count_bytes):
    """Forward and backward; a GPU makes two passes over both tensors where this processor makes one: 8 bytes more."""

    def work(n):
        student, teacher = torch.randn(n, 64, 96, requires_grad=True), torch.randn(n, 64, 96)
        masked_feature_loss(student, teacher, 2.0, compiled=True).sum().backward()

    assert per_element(count_bytes, work, 64, 96) <= 32


def test_bytes_of_a_block(count_bytes):
    """Forward in bf16, with tokens in float32."""

    def work(n):
        block = DiTBlock(96, 4, 4.0)
        block.compile()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            block(torch.randn(n, 256, 96), torch.randn(n, 96))

    assert per_element(count_bytes, work, 256, 96) <= 60


def test_compiled_feature_loss(fresh_compiler):
    """The same loss and gradient as the plain one."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 8, 16)
    student[0, 0, 0] = teacher[2, 1, 1] = 30.0
    found = []
    for compiled in (False, True):
        x = student.clone().requires_grad_()
        loss = masked_feature_loss(x, teacher, 2.0, compiled)
        (loss * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        found.append((loss.detach(), x.grad))
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain)
