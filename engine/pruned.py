"""Writing what a pruning script has decided: the cut weights, the facts about them, and a look at what they draw."""

import math
from dataclasses import replace

from engine.checkpoint import Weights, save_weights
from engine.sampling import preview_labels
from families import depth_name, describe_shapes


def save_pruned(run, path, state, model, space, **facts):
    """Write pruned weights of `model` with their facts; returns the name of the pruned model.

    space: the engine.vae.LatentSpace they work on. facts: where they come from, and which layers were kept.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    depths = describe_shapes(shapes, model)["depths"]
    name = depth_name(model, depths)
    save_weights(path, state, **facts, model=name, num_classes=space.num_classes, vae=space.vae)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    run.print(f"saved {path}: {sum(depths)} layers, {parameters:,} parameters")
    return name


def save_preview(run, plan, path, model, seed):
    """Sample a grid from the pruned weights at `path`, as the SamplingPlan of the whole network says."""
    pruned = replace(plan, model=model, weights=Weights(path, "--save-model"))
    labels = preview_labels(plan.space.num_classes)
    pruned.load(run).save_grid(f"{path}.png", labels, seed)
    run.print(f"wrote {path}.png")
