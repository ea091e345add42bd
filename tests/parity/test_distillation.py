"""Masked distillation: output terms alone, whole steps of a student and a teacher, planted extreme activations."""

import pytest
import torch

from diffusion import create_diffusion
from pruning.distillation import DistillStep, mask_extremes, masked_feature_loss

from .golden import Golden, Replay, network, precisions, read_json

MATH = Golden("diffusion_math.npz")
VARIANTS = [variant for variant in MATH.meta["variants"] if f"{variant}.kd.loss" in MATH.arrays]
ALPHA = read_json("script_flags.json")["_constants"]["train_masked_kd"]["alpha_kd"]


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
    """File, student and teacher, and an objective that replays the recorded draws of `mode` ("eval" or "train")."""
    z = Golden("kd_masked.npz", dtype)
    student, teacher = (
        network(z.meta[who], z.meta[f"{who}_seed"], z.meta["weight_std"], dtype) for who in ("student", "teacher")
    )
    drop = z["drop_flags"].bool() if mode == "train" else None
    return z, student.train(mode == "train"), teacher, Replay(create_diffusion(), [(z["t"], z["noise"], drop)])


def layer_pairs(z):
    return {int(student): teacher for student, teacher in z.meta["targets"].items()}


@pytest.mark.parametrize("mode", ["eval", "train"])
@precisions
def test_step(mode, dtype):
    z, student, teacher, objective = load(dtype, mode)
    meta = z.meta
    options = {"alpha": meta["alpha_kd"], "beta": meta["beta_feat"], "k": meta["mask_k"]}
    terms = DistillStep(student, teacher, objective, layer_pairs(z).items(), **options)(z["x_start"], z["y"])
    z.check_terms(mode, terms, z["t"])
    if dtype == torch.float64:
        terms["loss"].mean().backward()
        for name in z.keys(f"{mode}.grad:"):
            z.check(f"{mode}.grad:{name}", student.get_parameter(name).grad, "loss")


def test_drop_flags(monkeypatch):
    z, student, _, _ = load(torch.float32, "train")
    monkeypatch.setattr(torch, "rand", lambda *size, **options: z["drop_uniform"].reshape(*size))
    z.check("drop_flags", student.y_embedder.draw_drop(len(z["y"]), "cpu"), "exact")


@torch.no_grad()
def test_masks_of_hidden_states():
    z, student, teacher, objective = load(torch.float64, "eval")
    draw = objective.draw(student, z["x_start"], z["y"])
    for who, net, layers in (
        ("student", student, layer_pairs(z).keys()),
        ("teacher", teacher, layer_pairs(z).values()),
    ):
        hidden = {}
        observe = lambda layer, before, after, hidden=hidden: hidden.update({layer: after})  # noqa: E731
        objective.predict(net, z["x_start"], z["y"], draw, observe=observe)
        for layer in layers:
            flat, prefix = hidden[layer].flatten(1), f"eval.{who}_layer{layer}"
            z.check(f"{prefix}.mean", flat.mean(1), "loss")
            z.check(f"{prefix}.std_unbiased", flat.std(1), "loss")
            kept = mask_extremes(hidden[layer], z.meta["mask_k"]).flatten(1) != 0
            z.check(f"{prefix}.kept_fraction", kept.double().mean(1), "exact")


@precisions
def test_planted_extreme_activations(dtype):
    z = Golden("kd_masked.npz", dtype)
    case = {key: z[f"features.{key}"] for key in z.keys("features.")}
    hidden = case["student"].requires_grad_()
    feat = masked_feature_loss(hidden, case["teacher"], z.meta["mask_k"])
    outputs = case["student_output"], case["teacher_output"]
    draws = case["x_start"], case["t"], case["noise"]
    terms = all_terms(create_diffusion(), *outputs, *draws, z.meta["alpha_kd"], z.meta["beta_feat"] * feat)
    z.check_terms("features", {**terms, "feat_loss": feat}, case["t"])
    (gradient,) = torch.autograd.grad(feat.mean(), hidden)
    z.check("features.feat_grad_wrt_student", gradient, "loss")
