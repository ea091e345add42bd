"""Cutting layers out of state dicts, and the scores that rank layers."""

import pytest
import torch

from pruning.scores import BlockInfluence, least_influential
from pruning.surgery import average_dropped, cut_layers, keep_layers, stack_depths


def fake_state(*keys):
    return {key: torch.full((1,), float(i)) for i, key in enumerate(keys)}


def test_renumbering():
    state = fake_state("x.weight", *(f"blocks.{i}.w" for i in range(12)), "gumbel_gates.0", "final.b")
    pruned = keep_layers(state, [11, 0, 2])
    assert list(pruned) == ["x.weight", "blocks.0.w", "blocks.1.w", "blocks.2.w", "final.b"]
    for new, old in enumerate([0, 2, 11]):
        assert pruned[f"blocks.{new}.w"] is state[f"blocks.{old}.w"]


def test_two_stacks():
    """Layers are numbered through the encoder and the decoder; each stack is renumbered for itself."""
    state = fake_state(
        *(f"encoder_blocks.{i}.attn.w" for i in range(3)),
        *(f"decoder_blocks.{i}.attn.w" for i in range(3)),
        "diffloss.net.res_blocks.0.w",
        "res_blocks.1.w",
    )
    assert stack_depths(state) == {"encoder_blocks": 3, "decoder_blocks": 3}
    pruned = keep_layers(state, [1, 3, 5])
    assert pruned["encoder_blocks.0.attn.w"] is state["encoder_blocks.1.attn.w"]
    assert pruned["decoder_blocks.0.attn.w"] is state["decoder_blocks.0.attn.w"]
    assert pruned["decoder_blocks.1.attn.w"] is state["decoder_blocks.2.attn.w"]
    assert {"diffloss.net.res_blocks.0.w", "res_blocks.1.w"} < set(pruned)
    assert len(pruned) == 5


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([0, 6], r"has 6, but the layers are 0\.\.5"),
        ([-1], r"has -1, but the layers are 0\.\.5"),
        ([1, 1, 4], "names layer 1 2 times"),
        ([], "no layer is kept"),
        ([0, 1, 2], r"no layer of decoder_blocks \(3\.\.5\)"),
    ],
)
def test_errors(kept, message):
    state = fake_state(*(f"encoder_blocks.{i}.w" for i in range(3)), *(f"decoder_blocks.{i}.w" for i in range(3)))
    with pytest.raises(ValueError, match=message):
        keep_layers(state, kept)


def test_average_of_dropped_layers():
    """Each dropped layer goes into the nearest kept one of its stack, the earlier of two; the rest stays."""
    state = fake_state(*(f"encoder_blocks.{i}.w" for i in range(5)), *(f"decoder_blocks.{i}.w" for i in range(3)), "x")
    merged = average_dropped(state, [1, 3, 6])
    assert merged["encoder_blocks.1.w"].item() == pytest.approx((0 + 1 + 2) / 3)
    assert merged["encoder_blocks.3.w"].item() == pytest.approx((3 + 4) / 2)
    assert merged["decoder_blocks.1.w"].item() == pytest.approx((5 + 6 + 7) / 3)
    assert merged["x"] is state["x"]
    assert merged["encoder_blocks.1.w"].dtype == torch.float32
    cut = cut_layers(state, [1, 3, 6], "average")
    assert {key: value.item() for key, value in cut.items()} == pytest.approx(
        {"encoder_blocks.0.w": 1, "encoder_blocks.1.w": 3.5, "decoder_blocks.0.w": 6, "x": 8}
    )
    assert cut_layers(state, [1, 3, 6])["encoder_blocks.0.w"] is state["encoder_blocks.1.w"]


def test_average_of_equal_layers_is_the_layer():
    """In half precision too."""
    state = {f"blocks.{i}.w": torch.full((3,), 0.1, dtype=torch.float16) for i in range(3)}
    assert torch.equal(average_dropped(state, [1])["blocks.1.w"], state["blocks.1.w"])


def test_cut_network_loads(small_net, batch):
    """All layers kept: the same network. Fewer kept: it loads into a shallower one."""
    net = small_net(6)
    same, shallow = small_net(6, seed=1), small_net(2, seed=1)
    same.load_state_dict(keep_layers(net.state_dict(), range(6)))
    assert torch.equal(same(*batch), net(*batch))
    shallow.load_state_dict(keep_layers(net.state_dict(), [0, 5]))
    assert torch.equal(shallow.blocks[1].mlp.fc1.weight, net.blocks[5].mlp.fc1.weight)


def test_block_influence(small_net, batch):
    """Mean cosine similarity of input and output tokens; layers that do nothing score 1."""
    net = small_net(4)
    torch.nn.init.zeros_(net.blocks[2].adaLN_modulation[1].weight)
    torch.nn.init.zeros_(net.blocks[2].adaLN_modulation[1].bias)
    seen, influence = {}, BlockInfluence(4)
    net(*batch, observe=lambda layer, before, after: seen.update({layer: (before, after)}))
    for _ in range(2):
        net(*batch, observe=influence)
    expected = [torch.nn.functional.cosine_similarity(*seen[i], dim=-1).mean().item() for i in range(4)]
    assert influence.scores().tolist() == pytest.approx(expected, abs=1e-6)
    assert influence.scores()[2].item() == pytest.approx(1.0)
    assert least_influential(influence.scores(), 1) == [2]


@pytest.mark.parametrize(
    ("scores", "n", "removed"),
    [
        ([0.1, 0.9, 0.5, 0.8, 0.99], 2, [1, 3]),  # the last layer always stays
        ([0.5, 0.5, 0.5, 0.5], 2, [0, 1]),  # of equals the earlier goes
        ([0.1, 0.2, 0.3], 2, [0, 1]),
    ],
)
def test_least_influential(scores, n, removed):
    assert least_influential(torch.tensor(scores), n) == removed


@pytest.mark.parametrize("n", [0, -1, 4, 5])
def test_least_influential_bounds(n):
    with pytest.raises(ValueError, match=r"expected 1\.\.3"):
        least_influential(torch.rand(4), n)
