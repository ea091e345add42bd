"""`--compile`: everything that takes time is compiled, and no network reaches torch's limit of recompilations."""

import pytest
import torch
from torch._dynamo.utils import counters

from diffusion.objectives import TrainStep
from engine.run import checkpoint_blocks, compile_blocks
from families import create_model, family_of
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
