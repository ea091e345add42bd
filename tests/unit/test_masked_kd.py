"""Masked KD: layer pairs, masked features, the step, and the step numbers that networks see under respacing."""

import pytest
import torch

from diffusion import create_diffusion
from diffusion.objectives import Draw, GaussianObjective
from pruning.distillation import DistillStep, feature_weight, layer_pairs, mask_extremes, masked_feature_loss, scales_to
from pruning.patterns import parse_pattern

D19 = "3:4x2,2:4,3:4,2:4,3:4x2"


@pytest.mark.parametrize(
    ("student", "teacher", "pattern", "pairs"),
    [
        (14, 28, None, [(i, 2 * i + 1) for i in range(14)]),
        (7, 14, None, [(i, 2 * i + 1) for i in range(7)]),
        (7, 28, None, [(i, 4 * i + 3) for i in range(7)]),
        (14, 28, "2:4x7", [(2 * i + 1, 4 * i + 3) for i in range(7)]),
        (19, 28, D19, list(zip([2, 5, 7, 10, 12, 15, 18], [3, 7, 11, 15, 19, 23, 27], strict=True))),
        (6, 6, None, [(i, i) for i in range(6)]),
    ],
)
def test_layer_pairs(student, teacher, pattern, pairs):
    assert layer_pairs(student, teacher, pattern and parse_pattern(pattern, teacher)) == pairs


@pytest.mark.parametrize(
    ("student", "teacher", "pattern", "message"),
    [
        (19, 28, None, "19 student and 28 teacher layers"),
        (14, 28, "1:4x7", "keeps 7 of 28 layers, but the student has 14"),
        (14, 28, "1:2x7", "covers 14 layers, but there are 28"),
        (28, 14, None, "28 student and 14 teacher"),
    ],
)
def test_no_layer_pairs(student, teacher, pattern, message):
    with pytest.raises(ValueError, match=message):
        layer_pairs(student, teacher, pattern and parse_pattern(pattern))


def test_mask_extremes():
    """Entries two standard deviations off their own sample's mean become zero; others stay."""
    hidden = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    hidden[0, 1, 2], hidden[1] = 50.0, hidden[1] * 100
    masked = mask_extremes(hidden)
    assert masked[0, 1, 2] == 0
    assert (masked == 0).sum() == 1
    assert torch.equal(masked[1], hidden[1])


def test_masked_feature_loss_counts_one_sided_masks():
    teacher = torch.ones(1, 4, 8)
    teacher[..., ::2] = -1.0  # mean 0, deviation 1: nothing here is extreme
    student = teacher.clone()
    student[0, 0, 1] = 100.0
    assert masked_feature_loss(student, teacher).item() == pytest.approx(1 / 32)  # masked there, 1 here
    assert masked_feature_loss(teacher, teacher).item() == 0


@pytest.mark.parametrize(
    ("epoch", "epochs", "weight"), [(0, 1, 0.01), (0, 10, 0.01), (9, 10, 0.0), (5, 11, 0.005), (0, 2, 0.01), (1, 2, 0)]
)
def test_feature_weight(epoch, epochs, weight):
    assert feature_weight(0.01, epoch, epochs) == pytest.approx(weight)


class Recorder(torch.nn.Module):
    """Passes calls on to a network and keeps the steps and outputs."""

    def __init__(self, net):
        super().__init__()
        self.net, self.y_embedder, self.steps = net, net.y_embedder, []

    def forward(self, x, t, y, **options):
        self.steps.append(t)
        self.out = self.net(x, t, y, **options)
        return self.out


@pytest.fixture
def fixed_draw(batch):
    """An objective over a chain, whose draw is given."""

    def make(respacing="", t=(1, 2, 3, 4)):
        objective = GaussianObjective(create_diffusion(respacing))
        noise = torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(5))
        objective.draw = lambda net, x, y: Draw(torch.tensor(t), noise)
        return objective

    return make


def test_teacher_stays_out(small_net, fixed_draw):
    """The teacher is neither saved, nor trained, nor moved with the step's parameters."""
    student, teacher = small_net(3), small_net(6, seed=1).train()
    step = DistillStep(student, teacher, fixed_draw(), [(0, 1)])
    assert all(key.startswith("net.") for key in step.state_dict())
    assert {id(p) for p in step.parameters()} == {id(p) for p in student.parameters()}
    step.train()
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_same_network_has_nothing_to_learn(small_net, fixed_draw, batch):
    step = DistillStep(small_net(4), small_net(4), fixed_draw(), [(0, 0), (3, 3)])
    terms = step(batch[0], batch[2])
    assert torch.equal(terms["feat_loss"], torch.zeros(4))
    torch.testing.assert_close(terms["kd_loss"], torch.zeros(4))
    torch.testing.assert_close(terms["loss"], 0.1 * terms["gt"])


def test_terms_and_pairs(small_net, fixed_draw, batch):
    """The loss is put together from its weighted terms, and hidden states of the right layers are compared."""
    student, teacher, pairs = Recorder(small_net(3)), Recorder(small_net(6, seed=1)), [(0, 1), (2, 5)]
    objective = fixed_draw()
    terms = DistillStep(student, teacher, objective, pairs, alpha=0.7, beta=0.3, k=1.5)(batch[0], batch[2])
    torch.testing.assert_close(terms["loss"], 0.7 * terms["kd_loss"] + 0.3 * terms["gt"] + 0.3 * terms["feat_loss"])
    hidden = [{}, {}]
    x_t = objective.diffusion.q_sample(batch[0], student.steps[0], objective.draw(None, None, None).noise)
    for found, net in zip(hidden, (student, teacher), strict=True):
        net(x_t, net.steps[0], batch[2], observe=lambda layer, _, after, found=found: found.update({layer: after}))
    expected = [masked_feature_loss(hidden[0][s], hidden[1][t], 1.5) for s, t in pairs]
    torch.testing.assert_close(terms["feat_loss"], sum(expected) / 2)
    terms["loss"].mean().backward()
    assert student.net.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_relative_weight(small_net, fixed_draw, batch):
    """Each layer's feature loss weighs `beta` times as much as the output's, whatever its size; it passes gradients."""
    student, teacher = small_net(3), small_net(6, seed=1)
    teacher.blocks[1].mlp.fc2.weight.data *= 1000  # of one layer the hidden states are much larger
    step = DistillStep(student, teacher, fixed_draw(), [(0, 1), (2, 5)], alpha=0.7, beta=0.5, relative=True)
    terms = step(batch[0], batch[2])
    features = terms["loss"] - 0.7 * terms["kd_loss"] - 0.3 * terms["gt"]
    torch.testing.assert_close(features.mean(), 0.5 * terms["kd_loss"].mean())
    assert terms["feat_loss"].mean() > 1000 * terms["kd_loss"].mean()
    terms["loss"].mean().backward()
    assert student.blocks[2].mlp.fc2.weight.grad.abs().sum() > 0


def test_intervals_are_learnt_apart(small_net, fixed_draw, batch):
    """A part between two pairs starts from the teacher's tokens: its gradients know nothing of the parts before it."""
    student, teacher, pairs = small_net(4), small_net(6, seed=1), [(1, 1), (2, 4), (3, 5)]
    step = DistillStep(student, teacher, fixed_draw(), pairs, k=float("inf"))
    step.intervals = True

    def part_gradients():
        student.zero_grad()
        terms = step(batch[0], batch[2])
        terms["loss"].mean().backward()
        return terms, [block.mlp.fc2.weight.grad.clone() for block in student.blocks]

    terms, before = part_gradients()
    assert all(gradient.abs().sum() > 0 for gradient in before)
    torch.testing.assert_close(terms["loss"], terms["kd_loss"] + terms["feat_loss"])
    student.blocks[1].mlp.fc2.bias.data += 1.0  # of the first part
    _, after = part_gradients()
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [False, False, True, True]


def test_interval_of_equal_layers_has_nothing_to_learn(small_net, fixed_draw, batch):
    """The teacher's own layers over one interval, with another layer before them."""
    teacher, other = small_net(4), small_net(4, seed=1)
    student = small_net(4)
    student.blocks[0] = other.blocks[0]
    losses = []
    for pairs in ([(0, 0), (3, 3)], [(3, 3)]):
        step = DistillStep(student, teacher, fixed_draw(), pairs)
        step.intervals = True
        losses.append(step(batch[0], batch[2])["feat_loss"] * len(pairs))
    alone = DistillStep(student, teacher, fixed_draw(), [(0, 0)])(batch[0], batch[2])["feat_loss"]
    torch.testing.assert_close(losses[0], alone)  # nothing but the other layer's part
    assert (losses[1] > 0).all()


def test_scales_of_zero():
    """Whatever the goal, what is zero stays zero."""
    factors = scales_to(torch.tensor([9.0, 1.0]), torch.tensor([[0.0, 0.0], [1.0, 4.0]], dtype=torch.bfloat16))
    assert factors.tolist() == [[0.0], [2.0]]


def test_relative_weight_of_equal_hidden_states(small_net, fixed_draw, batch):
    """There is nothing to scale, and nothing that is not finite."""
    step = DistillStep(small_net(4), small_net(4), fixed_draw(), [(0, 0), (3, 3)], relative=True)
    assert step(batch[0], batch[2])["loss"].isfinite().all()


@pytest.mark.parametrize("respacing", ["10", "ddim25", "4,3,2"])
def test_original_steps_under_respacing(small_net, fixed_draw, batch, respacing):
    """Losses, distillation and samplers all hand the network the step numbers of the full chain."""
    objective = fixed_draw(respacing, t=(1, 2, 3, 5))
    original = objective.diffusion.timestep_map[[1, 2, 3, 5]]
    assert original.tolist() != [1, 2, 3, 5]
    student, teacher = Recorder(small_net(3)), Recorder(small_net(6, seed=1))
    DistillStep(student, teacher, objective, [(0, 1)])(batch[0], batch[2])
    objective.diffusion.training_losses(student, batch[0], torch.tensor([1, 2, 3, 5]), {"y": batch[2]})
    assert torch.equal(student.steps[0], original)
    assert torch.equal(teacher.steps[0], original)
    assert torch.equal(student.steps[1], original)
    seen = Recorder(small_net(3))
    objective.diffusion.p_sample_loop(seen, batch[0].shape, model_kwargs={"y": batch[2]})
    assert [t[0].item() for t in seen.steps] == objective.diffusion.timestep_map.tolist()[::-1]


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize("variance", [{}, {"learn_sigma": False}, {"learn_sigma": False, "sigma_small": True}])
def test_chain_of_one_step(small_net, batch, loop, variance):
    diffusion = create_diffusion("1", **variance)
    net = small_net(2, learn_sigma=variance.get("learn_sigma", True))
    noise = torch.randn(4, 3, 4, 4)
    out = getattr(diffusion, loop)(net, noise.shape, noise=noise, model_kwargs={"y": batch[2]})
    assert diffusion.num_timesteps == 1
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("respacing", "message"), [("1001", "1001 of the 1000"), ("ddim300", "ddim300"), ("5,600", "600")]
)
def test_impossible_respacing(respacing, message):
    with pytest.raises(ValueError, match=message):
        create_diffusion(respacing)
