"""What the recipe costs is counted right: operations, bytes that are alive, and training states."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import costs
from engine.networks import StateSketch
from engine.run import Run
from engine.trainer import Trainer, TrainingOptions
from families import create_model


def test_operations_of_the_published_network():
    """DiT-XL/2 is known to take 118.6 thousand million multiply-adds for an image of 256 pixels."""
    with FakeTensorMode():
        net = create_model("DiT-XL/2").eval()
        assert sum(p.numel() for p in net.parameters()) == 675_129_632
        assert costs.count_flops(lambda: costs.run_forward(net, 1)) == pytest.approx(2 * 118.6e9, rel=1e-3)


def test_operations_of_a_product_and_its_backward():
    x, w = torch.ones(4, 8), torch.ones(8, 16, requires_grad=True)
    assert costs.count_flops(lambda: x @ w) == 2 * 4 * 8 * 16
    assert costs.count_flops(lambda: (x @ w).sum().backward()) == 2 * 2 * 4 * 8 * 16  # x needs no gradient


def test_peak_of_what_is_alive():
    """Views and operations in place take nothing, and what is dropped makes room."""

    def run():
        a = torch.zeros(100)
        b = a + 1
        a = b.view(10, 10).mul_(2)
        return a.exp(), torch.zeros(50)

    assert costs.count_peak(run) == 4 * 250


@pytest.mark.parametrize("keeps_gradients", [False, True])
def test_shapes_alone_need_what_numbers_need(keeps_gradients, monkeypatch):
    monkeypatch.setattr(costs, "LATENT", (4, 8, 8))

    def count():
        step = costs.make_step(create_model("DiT-T/2", depth=2, input_size=8).train())
        return costs.count_step(step, 2, keeps_gradients)

    with FakeTensorMode():
        expected = count()
    assert count() == expected


def test_state_is_that_of_a_real_trainer():
    """Weights, average and AdamW's averages, less its step counters."""
    step = costs.make_step(create_model("DiT-T/2", depth=2).train())
    trained = costs.trained_parameters(step.net)
    trainer = Trainer(Run("cpu", "fp32"), step, [{"params": trained, "lr": 1e-4}], step.net, TrainingOptions())
    trainer.train_step(torch.randn(2, 4, 32, 32), torch.zeros(2, dtype=torch.long))
    state = trainer.state_dict()
    moments = [entry[name] for entry in state["opt"]["state"].values() for name in ("exp_avg", "exp_avg_sq")]
    real = sum(t.nbytes for t in (*state["model"].values(), *state["ema"].values(), *moments))
    assert StateSketch(step.net, step.net).count_bytes() == real
    assert costs.parameter_bytes(step.net) == sum(p.nbytes for p in step.net.parameters())


def test_table():
    """Cards share the images, and float32 has its own rate."""
    rows = [costs.Cost("a", 3600, 1e12, {1: 2e9, 8: 1e9}, "d"), costs.Cost("b", 3600, 1e12, {1: 2e9, 8: 2e9}, "", True)]
    assert costs.write_table(rows, [1, 8], 1e12, 1e11)[2:] == [
        "| a | 1 | 1.0 h, 8 min | 2, 1 GB | d |",
        "| b | 1 | 10 h, 1.2 h | 2 GB |  |",
    ]
