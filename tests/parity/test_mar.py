"""MAR against its recordings: network, head, layer masks, losses, distillation, sampling, autoencoder."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from machine import DEVICE
from torch.nn.functional import unfold

from diffusion import create_diffusion
from diffusion.gaussian_diffusion import mean_flat
from diffusion.masked import (
    MaskedDraw,
    MaskedObjective,
    MaskedSampler,
    guide_head,
    mask_first,
    masking_ratio,
    plan_steps,
    sample_latents,
)
from engine.kl16 import build_kl16, make_kl16, rename_key
from engine.optim import cosine_schedule, decay_groups
from families import family_of
from models_mar import MAR, MAR_models
from pruning.distillation import DistillStep, layer_pairs, masked_feature_loss
from pruning.gates import decide
from pruning.scores import BlockInfluence
from pruning.surgery import keep_layers

from . import golden
from .golden import SHRINK, WEAK_STD, check_close, given_uniforms, gw, precisions

ARGUMENTS = {  # recorded name -> ours
    "patch_size": "patch_size",
    "vae_embed_dim": "in_channels",
    "encoder_embed_dim": "hidden_size",
    "encoder_depth": "encoder_depth",
    "decoder_depth": "decoder_depth",
    "encoder_num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "label_drop_prob": "class_dropout_prob",
    "class_num": "num_classes",
    "buffer_size": "buffer_size",
    "attn_dropout": "attn_dropout",
    "proj_dropout": "proj_dropout",
    "diffloss_d": "head_depth",
    "diffloss_w": "head_width",
}
NO_DROPOUT = {"attn_dropout": 0.0, "proj_dropout": 0.0}
cosine = partial(create_diffusion, noise_schedule="squaredcos_cap_v2")


class Recording(golden.Recording):
    """A recorded file of MAR, and networks with its weights."""

    family = "mar"

    def __init__(self, part, dtype=torch.float32):
        super().__init__(part, dtype)
        self.config = {ours: self.facts[theirs] for theirs, ours in ARGUMENTS.items()}
        self.config["input_size"] = self.facts["img_size"] // self.facts["vae_stride"]
        self.objective = MaskedObjective(cosine(), self.facts["mask_ratio_min"], self.facts["diffusion_batch_mul"])

    def network(self, seed="seed", std=None, small=(), **options):
        """MAR in eval mode with the rebuilt weights; names that start with one of `small` are shrunk."""
        net = MAR(**self.config | options).to(DEVICE)
        for name, weight in net.state_dict().items():
            own = self.arrays["head_std" if name.startswith("diffloss.") else "weight_std"]
            weight.copy_(torch.as_tensor(gw.normal(name, weight.shape, self.arrays[seed], std or own)))
            weight *= SHRINK if name.startswith(tuple(small)) else 1
        return net.to(self.dtype).eval()

    def draw(self, net, drop=None):
        """The recorded draws of a step; steps and noise of visible tokens, recorded too, are left out."""
        tokens, order = net.patchify(self["imgs"]), self["orders"]
        masked = mask_first(order, math.ceil(order.shape[1] * self.arrays["mask_rate"]))
        shape = (self.objective.batch_mul, *masked.shape)
        t, noise = self["t"].view(shape)[:, masked], self["noise"].view(*shape, -1)[:, masked]
        shape = (*shape[:2], -1)
        return MaskedDraw(tokens, masked, t.view(shape), noise.view(*shape, noise.shape[-1]), drop)

    def head_outputs(self, net, z, draw):
        """Data, noised data, and outputs of the head for all tokens, visible ones too, in the recorded order."""
        start, z = (a.flatten(0, 1).repeat(self.objective.batch_mul, 1) for a in (draw.tokens, z))
        x_t = self.objective.diffusion.q_sample(start, self["t"], self["noise"])
        return start, x_t, self.objective.diffusion.run(net.diffloss.net, x_t, self["t"], {"z": z})


def replay(objective, draw):
    """`objective`, drawing what was recorded."""
    objective.draw = lambda net, x, y: draw
    return objective


class Trace(list):
    """Hidden states in the order of the layers, for `observe`."""

    def __call__(self, layer, before, after):
        assert layer == len(self)
        self.append(after)


def pruned(z, net):
    kept = [*z.arrays["kept_encoder"], *(len(net.encoder_blocks) + z.arrays["kept_decoder"])]
    small = z.network(encoder_depth=len(z.arrays["kept_encoder"]), decoder_depth=len(z.arrays["kept_decoder"]))
    small.load_state_dict(keep_layers(net.state_dict(), kept))
    return small


SMALL = ("z_proj_ln.", "decoder_embed.", "mask_token", "decoder_pos_embed_learned")
VARIANTS = {  # prefix -> network, arguments of its forward pass and of the objective's
    "": lambda z: (z.network(), {}),
    "weak_": lambda z: (z.network(std=WEAK_STD), {}),
    "train_": lambda z: (z.network(**NO_DROPOUT).train(), {}),
    "small_": lambda z: (z.network(small=SMALL), {}),
    "masked_": lambda z: (z.network(), {"mask": z["layer_masks"]}),
    "pruned_": lambda z: (pruned(z, z.network()), {}),
}


@pytest.mark.parametrize("prefix", Recording("forward").keys(suffix="encoder_out"))
@precisions
def test_network_and_loss(prefix, dtype):
    z = Recording("forward", dtype)
    net, options = VARIANTS[prefix](z)
    with given_uniforms(z["train_u"]):
        draw = z.draw(net, net.draw_drop(len(z["labels"]), "cpu"))
    net.encoder_norm.register_forward_hook(lambda module, args, out: z.check(f"{prefix}encoder_out", out))
    conditions = net(draw.tokens, draw.masked, z["labels"], drop=draw.drop, **options)
    z.check(f"{prefix}z", conditions)
    if f"{prefix}loss" not in z.arrays:
        return
    start, x_t, out = z.head_outputs(net, conditions, draw)
    terms = z.objective.diffusion.loss_terms(out, start, x_t, z["t"], z["noise"])
    z.check(f"{prefix}token_mse", terms["mse"])
    z.check(f"{prefix}token_vb", terms["vb"])
    losses = z.objective.loss(z.objective.predict(net, z["imgs"], z["labels"], draw, **options), z["imgs"], draw)
    assert {len(values) for values in losses.values()} == {len(z["labels"])}
    check_close("parts of the loss", losses["loss"], losses["mse"] + losses["vb"], 1e-6)
    z.check(f"{prefix}loss", losses["loss"].mean())


@precisions
def test_gradients_hidden_states_and_influence(dtype):
    z = Recording("forward", dtype)
    net = z.network()
    draw, trace, influence = z.draw(net), Trace(), BlockInfluence(net.depth)
    z.check("mask", draw.masked, 0)
    loss = z.objective.loss(z.objective.predict(net, z["imgs"], z["labels"], draw, observe=trace), z["imgs"], draw)
    loss["loss"].mean().backward()
    norms = [net.get_parameter(name).grad.norm() for name in z.arrays["grad_names"]]
    z.check("grad_norms", torch.stack(norms), 1e-4)
    z.check("encoder_hidden", torch.stack(trace[: len(net.encoder_blocks)]))
    z.check("decoder_hidden", torch.stack(trace[len(net.encoder_blocks) :]))
    net(draw.tokens, draw.masked, z["labels"], observe=influence)
    z.check("block_influence", influence.scores())


def test_tokens_and_keys():
    z = Recording("forward")
    net = z.network()
    z.check("patches", net.patchify(z["imgs"]), 0)
    z.check("unpatched", net.unpatchify(z["patches"]), 0)
    assert list(net.state_dict()) == z.arrays["state_keys"].tolist()
    double = {key: 2 * z.config[key] for key in ("input_size", "patch_size")}
    net, patch = MAR(**z.config | double), double["patch_size"]
    images = torch.randn(len(z["imgs"]), net.in_channels, net.input_size, net.input_size)
    assert torch.equal(net.patchify(images), unfold(images, patch, stride=patch).mT)
    assert torch.equal(net.unpatchify(net.patchify(images)), images)


@precisions
@torch.no_grad()
def test_head(dtype):
    z = Recording("diffloss", dtype)
    head, x, t, c, half = z.network().diffloss.net, z["x"], z["t"], z["c"], len(z["x"]) // 2
    z.check("net", head(x, t, c))
    # The recorded steps of the two halves differ, which no sampler asks for: they are put in after the doubling.
    for scale in z.keys("net_cfg_"):
        guided = guide_head(lambda x, _, c: head(x, t, c), x[:half], t[:half], c[:half], c[half:], float(scale))
        z.check(f"net_cfg_{scale}", guided, pick=lambda array: array[:half])
        z.check(f"net_cfg_{scale}", guided[:, : x.shape[1]], pick=lambda array: array[half:, : x.shape[1]])
    z.check("small_input_net", z.network(small=["diffloss.net.input_proj."]).diffloss.net(x, t, c))
    terms = cosine().training_losses(head, x, t, {"z": c}, z["noise"])
    for name, values in terms.items():
        z.check(f"terms_{name}", values)
    z.check("masked_loss", (terms["loss"] * z["mask"]).sum() / z["mask"].sum())
    z.check("unmasked_loss", terms["loss"].mean())


@pytest.mark.parametrize("step", Recording("diffloss").keys("step", "_mean"))
@precisions
@torch.no_grad()
def test_steps_of_the_head(step, dtype):
    z = Recording("diffloss", dtype)
    chain, t = cosine(z.facts["num_sampling_steps"]), torch.full((len(z["x"]),), int(step))
    args = (z.network().diffloss.net, z["x"], t, False)
    out = chain.p_mean_variance(*args, model_kwargs={"z": z["c"]})
    for name in ("mean", "log_variance", "pred_xstart"):
        z.check(f"step{step}_{name}", out[name])
    for key in z.keys(f"step{step}_sample_temperature_"):
        sample = chain.p_sample(*args, model_kwargs={"z": z["c"]}, noise=z["noise"], temperature=float(key))
        z.check(f"step{step}_sample_temperature_{key}", sample["sample"])


@pytest.mark.parametrize("run", Recording("diffloss").keys("sample", "_out"))
@precisions
def test_loops_of_the_head(run, dtype):
    """Under guidance the second half of the recorded batch only repeats the first one's guided noise: not compared."""
    z = Recording("diffloss", dtype)
    cfg_scale, temperature = (float(z.arrays[f"sample{run}_{key}"]) for key in ("cfg", "temperature"))
    model, start, c = z.network().diffloss.net, z[f"sample{run}_init"], z["c"]
    n, conditions = len(start), {"z": c[: len(start)]}
    if cfg_scale != 1:
        model, conditions["null"] = partial(guide_head, model, scale=cfg_scale), c[n:]
    sample = cosine(z.facts["num_sampling_steps"]).p_sample_loop(
        model,
        start.shape,
        noise=start,
        step_noise=lambda k: z[f"sample{run}_noise"][k, :n],
        clip_denoised=False,
        temperature=temperature,
        model_kwargs=conditions,
    )
    z.check(f"sample{run}_out", sample, pick=lambda array: array[:n])


SAMPLE, SCHEDULE = Recording("sample"), Recording("schedule", torch.float64)
# Recorded runs and plans -> tokens, steps.
RUNS = {
    run: (SAMPLE.arrays[f"run{run}_orders"].shape[1], int(row.split("|")[0]))
    for run, row in enumerate(SAMPLE.arrays["rows"])
}
PLANS = {key: tuple(map(int, key.split("_"))) for key in SCHEDULE.keys("order_", "_n_pred")}


def possible(sizes):
    found = [key for key, (length, num_iter) in sizes.items() if num_iter <= length]
    assert found, "every recording has more steps than tokens"
    return found


def test_more_steps_than_tokens_are_refused():
    """Recorded for them are steps that predict nothing: a fault that is not repeated."""
    for z, sizes, name in ((SAMPLE, RUNS, "run{}_n_pred"), (SCHEDULE, PLANS, "order_{}_n_pred")):
        for key in sizes.keys() - possible(sizes):
            length, num_iter = sizes[key]
            assert 0 in z.arrays[name.format(key)], f"{z.name}: {name.format(key)}"
            with pytest.raises(ValueError, match=f"num_iter is {num_iter}: expected at most {length}"):
                plan_steps(length, num_iter)


class Run:
    """One recorded sampling run: network, sampler, labels, and the recorded normals as step_noise."""

    def __init__(self, run, dtype):
        self.z, self.name = Recording("sample", dtype), f"run{run}_"
        num_iter, cfg_scale, schedule, temperature, kind, steps = self.z.arrays["rows"][run].split("|")
        self.net, self.num_iter, chain = self.z.network(), int(num_iter), cosine(steps)
        self.steps, settings = chain.num_timesteps, (float(cfg_scale), schedule, float(temperature))
        # Graphs of the head are compared with the plain loop elsewhere; the sines of these tests cannot be recorded.
        self.sampler = MaskedSampler(chain, self.num_iter, *settings, head_graphs=False)
        self.labels = self.z["labels"] if kind == "cond" else torch.full_like(self.z["labels"], self.net.num_classes)

    def __getitem__(self, key):
        return self.z[self.name + key]

    def step_noise(self, k, shape, count):
        step, begun = divmod(k, self.steps + 1)
        assert (begun, count) == (0, self.steps + 1)
        given = torch.cat([self[f"init{step}"][None, : len(self.labels) * shape[0]], self.head_noise(step, shape)])
        return given.view(count, -1, *shape)

    def head_noise(self, step, shape):
        return self[f"noise{step}"][:, : len(self.labels) * shape[0]]


@pytest.mark.parametrize("run", possible(RUNS))
@precisions
def test_sampling_step_by_step(run, dtype):
    r = Run(run, dtype)
    steps = list(r.sampler.trajectory(r.net, r.labels, r["orders"], r.step_noise))
    assert len(steps) == r.num_iter
    for k, step in enumerate(steps):
        r.z.check(f"{r.name}z{k}", step.z)
        r.z.check(f"{r.name}sampled{k}", step.sampled)
        assert len(step.sampled) == r["n_pred"][k]
    tokens, masks = [step.tokens for step in steps], [step.masked for step in steps]
    r.z.check(f"{r.name}tokens", torch.stack([torch.zeros_like(tokens[0]), *tokens[:-1]]))
    r.z.check(f"{r.name}mask", torch.stack([torch.ones_like(masks[0]), *masks[:-1]]), 0)
    assert not masks[-1].any()
    r.z.check(f"{r.name}cfg_iter", [step.cfg_scale for step in steps], 1e-6)
    r.z.check(f"{r.name}latents", r.net.unpatchify(tokens[-1]))


@pytest.mark.parametrize("run", possible(RUNS))
def test_sampling_in_one_call(run):
    """The start noise gives the order: here every channel of a position holds its place in the recorded order."""
    r = Run(run, torch.float32)
    places = r["orders"].argsort(1).float()
    noise = r.net.unpatchify(places.unsqueeze(-1).expand(-1, -1, r.net.token_width))
    r.z.check(f"{r.name}latents", r.sampler(r.net, r.labels, noise, r.step_noise))


@pytest.mark.parametrize("run", possible(RUNS))
def test_images_depend_on_their_own_draws_only(run):
    r = Run(run, torch.float64)

    def sample(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]

        def noise_of(k, shape, count):
            options = {"dtype": torch.float64, "device": "cpu"}
            drawn = [torch.randn(count, *shape, generator=g, **options) for g in generators]
            return torch.stack(drawn, dim=1).to(DEVICE)

        labels = r.labels[rows]
        return r.sampler(r.net, labels, noise_of(0, r["latents"].shape[1:], 1)[0], noise_of)

    rows = range(len(r.labels))
    together = sample([*rows])
    assert (together[1:] != together[0]).all()
    for row in rows:
        check_close(f"image {row}", sample([row])[0], together[row], 1e-9)


def test_sampling_without_given_noise_and_in_bfloat16():
    r, results = Run(possible(RUNS)[0], torch.float32), []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(r.sampler(r.net, r.labels, torch.randn(r["latents"].shape)))
    assert torch.equal(*results)
    with torch.autocast("cpu", torch.bfloat16):
        assert r.sampler(r.net, r.labels, torch.randn(r["latents"].shape)).dtype == torch.float32


@pytest.mark.parametrize("key", SCHEDULE.keys("cosine_"))
def test_chains(key):
    steps, table = key.split("_", 1)
    chain = cosine("" if int(steps) == cosine().num_timesteps else steps)
    SCHEDULE.check(f"cosine_{key}", chain.get_buffer(table), 1e-6)


@pytest.mark.parametrize("key", possible(PLANS))
def test_plan(key):
    z, prefix, (length, num_iter) = SCHEDULE, f"order_{key}_", PLANS[key]
    for scale in z.keys(f"{prefix}cfg_"):
        before, after, scales = zip(*plan_steps(length, num_iter, float(scale)), strict=True)
        z.check(f"{prefix}cfg_{scale}", scales, 1e-6)
        constant = [(*pair, float(scale)) for pair in zip(before, after, strict=True)]
        assert plan_steps(length, num_iter, float(scale), "constant") == constant
    assert (*before, 0) == (length, *after)
    z.check(f"{prefix}n_pred", [b - a for b, a in zip(before, after, strict=True)], 0)
    z.check(f"{prefix}mask_len", [*after[:-1], 1], 0)  # the reference counts one token as hidden to the end


@pytest.mark.parametrize("low", SCHEDULE.keys("ratio_", "_quantile"))
def test_masking_ratio(low):
    z, smallest = SCHEDULE, float(low)
    ratio = masking_ratio(z["ratio_u"], smallest)
    z.check(f"ratio_{low}_quantile", ratio, 1e-6)
    for length in z.keys(f"ratio_{low}_n_masked_of_"):
        z.check(f"ratio_{low}_n_masked_of_{length}", (int(length) * ratio).ceil(), 0)
    middle = masking_ratio((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000, smallest)
    z.check(f"ratio_{low}_mean", middle.mean(), 1e-6)
    z.check(f"ratio_{low}_std", middle.std(), 1e-4)  # by the midpoint rule


@pytest.mark.parametrize("count", SCHEDULE.keys("mask_by_order_"))
def test_mask_by_order(count):
    SCHEDULE.check(f"mask_by_order_{count}", mask_first(SCHEDULE["orders"], int(count)), 0)


@precisions
def test_distillation(dtype):
    z = Recording("kd", dtype)
    depths = dict(zip(("encoder_depth", "decoder_depth"), z.arrays["student_depths"].tolist(), strict=True))
    student, teacher = z.network("student_seed", **depths), z.network()
    border = [len(net.encoder_blocks) for net in (student, teacher)]
    pairs = [tuple(pair) for pair in [*z.arrays["pairs_encoder"], *(z.arrays["pairs_decoder"] + border)]]
    groups = np.diff([(-1, -1), *pairs], axis=0).tolist()  # from the end of one to the end of the next
    assert pairs == layer_pairs(student.depth, teacher.depth, groups)
    draw = z.draw(teacher)
    objective = replay(z.objective, draw)
    terms = DistillStep(student, teacher, objective, pairs, beta=z.arrays["beta"].item())(z["imgs"], z["labels"])
    z.check("feat_loss", terms["feat_loss"])
    for name in ("gt", "kd_loss", "loss"):
        z.check(name, terms[name].mean())

    traces, outputs = (Trace(), Trace()), []
    for net, trace in zip((student, teacher), traces, strict=True):
        conditions = net(draw.tokens, draw.masked, z["labels"], observe=trace)
        start, x_t, out = z.head_outputs(net, conditions, draw)
        outputs.append(out)
    features = [masked_feature_loss(traces[0][s], traces[1][t]) for s, t in pairs]
    z.check("feat_per_layer", torch.stack(features))
    difference = (outputs[0] - outputs[1])[:, : x_t.shape[1]]
    z.check("token_kd_mse", mean_flat(difference**2))
    z.check("token_kd_vb", objective.diffusion.distillation_terms(*outputs, start, x_t, z["t"])["vb_kd"])


def tiny(name="MAR-T", **options):
    """A small registered network whose zero-initialised parts are not zero."""
    torch.manual_seed(0)
    net = MAR_models[name](
        **{"input_size": 4, "in_channels": 4, "patch_size": 1, "num_classes": 10, "hidden_size": 32} | options
    ).to(DEVICE)
    for parameter in net.diffloss.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def test_draws():
    net, y = tiny().eval(), torch.zeros(64, dtype=torch.long)
    objective, moments = MaskedObjective(cosine(), 0.7, 3), torch.randn(64, 8, 4, 4)
    moments[0, 4:] = 1e4  # clamped before the exponential
    torch.manual_seed(1)
    noise = torch.randn(64, 4, 4, 4)
    torch.manual_seed(1)
    draw = objective.draw(net, moments, y)
    mean, log_variance = moments.chunk(2, dim=1)
    expected = 0.2325 * (mean + (log_variance.clamp(max=20) / 2).exp() * noise)
    check_close("sampled latents", draw.tokens, net.patchify(expected), 1e-6)
    assert torch.equal(sample_latents(moments, noise, 2.0)[1], sample_latents(moments, noise, 1.0)[1] * 2)
    assert draw.drop is None
    counts = set()
    for _ in range(40):
        draw = objective.draw(net.train(), moments[:, :4], y)
        (count,) = set(draw.masked.sum(1).tolist())
        assert torch.equal(draw.tokens, net.patchify(moments[:, :4]))
        assert draw.t.shape == (3, 64, count)
        assert draw.noise.shape == (3, 64, count, 4)
        counts.add(count)
    assert counts == {12, 13, 14, 15, 16}  # ceil(16 * ratio)
    assert 0 <= draw.t.min() < 50
    assert 950 < draw.t.max() <= 999
    assert draw.masked.float().mean(0).std() > 0
    assert draw.drop.dtype == torch.bool


@pytest.mark.parametrize("count", [12, 16], ids=["some visible", "none visible"])
def test_every_parameter_is_used_in_training(count):
    """In every step, or DDP would wait for its gradient: also without a dropped label, without a visible token."""
    net, y = tiny("MAR-T-1-2").train(), torch.tensor([1, 2])
    objective, x = MaskedObjective(cosine()), torch.randn(2, 4, 4, 4)
    draw = objective.draw(net, x, y)
    draw.masked = mask_first(torch.rand(2, 16).argsort(1), count)
    draw.t, draw.drop = draw.t.new_full((4, 2, count), 500), torch.tensor([False, False])
    draw.noise = torch.randn(4, 2, count, 4)
    objective.loss(objective.predict(net, x, y, draw), x, draw)["loss"].mean().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []
    assert all(gate.grad.abs().max() > 0 for gate in net.gumbel_gates)
    assert net.fake_latent.grad.abs().max() == 0


@torch.no_grad()
def test_gates_choose_layers_of_both_stacks():
    net, y = tiny("MAR-T-1-2").eval(), torch.tensor([1, 2])
    for g, gate in enumerate(net.gumbel_gates):
        gate[0, g % 2] += 1
    kept = decide(net).kept
    small = tiny(encoder_depth=3, decoder_depth=3).eval()
    small.load_state_dict(keep_layers(net.state_dict(), kept))
    mask = torch.zeros(2, net.depth).index_fill(1, torch.tensor(kept), 1.0)
    tokens, masked = torch.randn(2, 16, 4), mask_first(torch.rand(2, 16).argsort(1), 12)
    seen, expected = [], small(tokens, masked, y)
    out = net(tokens, masked, y, observe=lambda layer, before, after: seen.append(layer))
    assert (seen, kept) == ([0, 3, 4, 7, 8, 11], seen)
    assert torch.equal(out, expected)
    check_close("blended", net(tokens, masked, y, mask=mask), expected, 1e-6)


@torch.no_grad()
def test_null_label_is_a_dropped_label():
    net, tokens = tiny(**NO_DROPOUT).train(), torch.randn(3, 16, 4)
    masked, drop = mask_first(torch.rand(3, 16).argsort(1), 12), torch.tensor([True, False, False])
    out = net(tokens, masked, torch.tensor([1, 10, 2]), drop=drop)
    assert torch.equal(out, net(tokens, masked, torch.tensor([10, 10, 2]), drop=torch.zeros_like(drop)))
    assert not torch.equal(out[0], net(tokens, masked, torch.tensor([1, 10, 2]), drop=torch.zeros_like(drop))[0])


WRONG = {
    "num_iter is 17: expected at most 16": lambda: list(
        MaskedSampler(cosine("6"), 17).trajectory(tiny(), torch.tensor([1]), torch.arange(16)[None], None)
    ),
    "num_iter is 0": lambda: MaskedSampler(cosine("6"), 0),
    "schedule is 'cosine': expected one of linear, constant": lambda: MaskedSampler(cosine("6"), schedule="cosine"),
    "mask_ratio_min is 0": lambda: MaskedObjective(cosine(), 0),
    "batch_mul is 0": lambda: MaskedObjective(cosine(), batch_mul=0),
    "x has 3 channels: expected latents with 4": lambda: MaskedObjective(cosine()).draw(
        tiny(), torch.zeros(1, 3, 4, 4), torch.tensor([1])
    ),
    r"masked has \[1, 2\] tokens": lambda: tiny()(
        torch.zeros(2, 16, 4), torch.arange(16) < torch.tensor([[1], [2]]), torch.tensor([1, 1])
    ),
    "a group crosses from layer 5 to 6": lambda: tiny(groups=[[2, 4], [4, 8]]),
    "covers 10 layers": lambda: tiny(groups=[[1, 2]] * 5),
    "not the weights of KL-16: decoder.conv_in.bias": lambda: build_kl16({}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


COUNTS = {"MAR-B": 207_924_768, "MAR-L": 478_326_304, "MAR-H": 942_403_104, "MAR-D16": 276_786_720}


@pytest.mark.parametrize("name", MAR_models)
def test_registered_sizes(name):
    with torch.device("meta"):
        net = MAR_models[name]()
    facts = MAR_models[name].keywords
    assert net.depth == facts["encoder_depth"] + facts["decoder_depth"]
    assert net.depth == sum(m for _, m in facts.get("groups", [[1, net.depth]]))
    if name in COUNTS:
        assert sum(parameter.numel() for parameter in net.parameters()) == COUNTS[name]


def test_initial_values():
    net = MAR_models["MAR-T"]()
    head = net.diffloss.net
    for zero in [head.res_blocks[0].adaLN_modulation[1], head.final_layer.adaLN_modulation[1], head.final_layer.linear]:
        assert not zero.weight.any()
        assert not zero.bias.any()
    tables = [net.class_emb.weight, net.fake_latent, net.mask_token, net.encoder_pos_embed_learned]
    tables += [net.decoder_pos_embed_learned, net.diffusion_pos_embed_learned, head.time_embed.mlp[0].weight]
    assert [round(table.std().item(), 2) for table in tables] == [0.02] * len(tables)
    xavier = math.sqrt(6 / (net.decoder_embed.in_features * 2))
    assert 0.99 * xavier < net.decoder_embed.weight.abs().max() <= xavier
    assert not net.decoder_embed.bias.any()


@torch.no_grad()
def test_autoencoder():
    z = Recording("vae")
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in make_kl16().state_dict().items()}
    seed, std, state = z.arrays["seed"], z.arrays["weight_std"], {}
    for key in z.arrays["state_keys"].tolist():
        shape = shapes[rename_key(key)]
        kernel = (1, 1) if ".attn" in key and len(shape) == 2 else ()  # recorded as 1x1 convolutions
        state[key] = torch.as_tensor(gw.normal(key, (*shape, *kernel), seed, std))
    assert sum(value.numel() for value in state.values()) == 66_456_019
    vae = build_kl16(state).eval()
    z.check("scale_factor", vae.config.scaling_factor, 1e-7)
    z.check("moments", vae.encode(z["image"]).latent_dist.parameters)
    z.check("decoded", vae.decode(z["z"]).sample)


LR, MIN_LR, WARM_UP, EPOCHS = 8e-4, 1e-5, 100, 400  # of the recorded lr_*: by their format, not in the file


def test_learning_rate():
    for name, last in (("constant", LR), ("cosine", MIN_LR)):
        rate = cosine_schedule(LR, last, EPOCHS, warmup_steps=WARM_UP)
        SCHEDULE.check(f"lr_{name}", [rate(epoch) for epoch in SCHEDULE.arrays["lr_epochs"]], 1e-6)


def test_weight_decay():
    """Which weights decay in training from scratch."""
    z = Recording("forward")
    net = z.network()
    names = {id(p): name for name, p in net.named_parameters()}
    groups = decay_groups(net, 0.02, family_of("MAR-L").no_decay)
    found = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert found == {0.02: set(z.arrays["decay_keys"].tolist()), 0.0: set(z.arrays["no_decay_keys"].tolist())}
