"""Masked distillation: output terms alone, whole steps of a student and a teacher, planted extreme activations."""

import pytest
import torch

from diffusion import create_diffusion
from pruning.distillation import DistillStep, mask_extremes, masked_feature_loss

from .golden import Golden, Replay, network, precisions, read_json

MATH, KD = Golden("diffusion_math.npz"), Golden("kd_masked.npz")
VARIANTS = [variant for variant in MATH.meta["variants"] if MATH.has(f"{variant}.kd.")]
ALPHA = read_json("script_flags.json")["_constants"]["train_masked_kd"]["alpha_kd"]
PAIRS = {int(student): teacher for student, teacher in KD.meta["targets"].items()}


def all_terms(diffusion, student, teacher, x_start, t, noise, alpha, feature_term=0.0):
    """Every term of a distillation step, from two network outputs and the weighted feature loss."""
    x_t = diffusion.q_sample(x_start, t, noise)
    terms = diffusion.loss_terms(student, x_start, x_t, t, noise)
    gt = terms.pop("loss")
    terms |= diffusion.distillation_terms(student, teacher, x_start, x_t, t)
    return {**terms, "gt": gt, "loss": alpha * terms["kd_loss"] + (1 - alpha) * gt + feature_term}


@pytest.mark.parametrize("variant", VARIANTS)
@precisions
def test_output_terms(variant, dtype):
    z = Golden(MATH.name, dtype)
    diffusion, t = create_diffusion(**z.meta["variants"][variant]), z[f"{variant}.t"]
    outputs = z["model_output"], z["teacher_output"]
    terms = all_terms(diffusion, *outputs, z["x_start"], t, z["noise"], ALPHA)
    assert set(terms) == set(z.keys(f"{variant}.kd.")), f"{z.name}: names of {variant}.kd.*"
    z.check_terms(f"{variant}.kd", terms, t)


def load(dtype, mode):
    """File, student in `mode` ("eval" or "train") and teacher, and an objective that replays the recorded draws."""
    z, std = Golden(KD.name, dtype), KD.meta["weight_std"]
    student, teacher = (network(z.meta[who], z.meta[f"{who}_seed"], std, dtype) for who in ("student", "teacher"))
    draws = [(z["t"], z["noise"], z["drop_uniform"])]
    return z, student.train(mode == "train"), teacher, Replay(create_diffusion(), draws)


@pytest.mark.parametrize("mode", ["eval", "train"])
@precisions
def test_step(mode, dtype):
    z, student, teacher, objective = load(dtype, mode)
    options = {"alpha": z.meta["alpha_kd"], "beta": z.meta["beta_feat"], "k": z.meta["mask_k"]}
    terms = DistillStep(student, teacher, objective, PAIRS.items(), **options)(z["x_start"], z["y"])
    z.check_terms(mode, terms, z["t"])
    if dtype == torch.float64:
        terms["loss"].mean().backward()
        for name in z.keys(f"{mode}.grad:"):
            z.check(f"{mode}.grad:{name}", student.get_parameter(name).grad, "loss")


def test_drop_flags():
    z, student, _, objective = load(torch.float32, "train")
    z.check("drop_flags", objective.draw(student, z["x_start"], z["y"]).drop, "exact")


@torch.no_grad()
def test_masks_of_hidden_states():
    z, student, teacher, objective = load(torch.float64, "eval")
    draw = objective.draw(student, z["x_start"], z["y"])
    for who, net, layers in (("student", student, PAIRS.keys()), ("teacher", teacher, PAIRS.values())):
        hidden = []
        objective.predict(net, z["x_start"], z["y"], draw, observe=lambda *step, hidden=hidden: hidden.append(step[2]))
        for layer in layers:
            prefix, tokens = f"eval.{who}_layer{layer}", hidden[layer]
            z.check(f"{prefix}.mean", tokens.flatten(1).mean(1), "loss")
            z.check(f"{prefix}.std_unbiased", tokens.flatten(1).std(1), "loss")
            kept = mask_extremes(tokens, z.meta["mask_k"]).flatten(1) != 0
            z.check(f"{prefix}.kept_fraction", kept.double().mean(1), "exact")


@precisions
def test_planted_extreme_activations(dtype):
    z = Golden(KD.name, dtype)
    case = {key: z[f"features.{key}"] for key in z.keys("features.")}
    hidden = case["student"].requires_grad_()
    feat = masked_feature_loss(hidden, case["teacher"], z.meta["mask_k"])
    inputs = (case[key] for key in ("student_output", "teacher_output", "x_start", "t", "noise"))
    terms = all_terms(create_diffusion(), *inputs, z.meta["alpha_kd"], z.meta["beta_feat"] * feat)
    z.check_terms("features", {**terms, "feat_loss": feat}, case["t"])
    (gradient,) = torch.autograd.grad(feat.mean(), hidden)
    z.check("features.feat_grad_wrt_student", gradient, "loss")
