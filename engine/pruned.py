"""Writing what a pruning script has decided: the cut weights, the facts about them, and a look at what they draw."""

import math
from contextlib import suppress
from dataclasses import replace

from engine.checkpoint import Weights, read_facts, save_weights
from engine.errors import InputError
from engine.files import plain
from engine.profile import describe_profile
from engine.sampling import preview_labels
from families import depth_name, describe_shapes


def save_pruned(run, path, state, model, space, profiler=None, **facts):
    """Write pruned weights of `model` with their facts; returns the name of the pruned model.

    space: the engine.vae.LatentSpace they work on. profiler: an engine.profile.Profiler, whose numbers are shown and
    recorded; None measures nothing. facts: where they come from, and which layers were kept.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    depths = describe_shapes(shapes, model)["depths"]
    name = depth_name(model, depths)
    facts |= {"model": name, "num_classes": space.num_classes, "vae": space.vae}
    if profiler:
        facts["profile"] = find_profile(path, facts, profiler) or profiler.compare(state)
    save_weights(path, state, **facts)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    run.print(f"saved {path}: {sum(depths)} layers, {parameters:,} parameters")
    for line in describe_profile(facts["profile"]) if profiler else ():
        run.print(line)
    return name


def find_profile(path, facts, profiler):
    """What was measured at the same place for a file with the same facts, which is written again; else None."""
    with suppress(InputError, KeyError, TypeError, ValueError):  # it will be replaced, whatever it holds
        recorded = read_facts(path)
        profile = recorded.pop("profile")
        describe_profile(profile)
        if profiler.place.items() <= profile.items() and recorded == plain(facts):
            return profile
    return None


def save_preview(run, plan, path, model, seed):
    """Sample a grid from the pruned weights at `path`, as the SamplingPlan of the whole network says."""
    pruned = replace(plan, model=model, weights=Weights(path, "--save-model"))
    labels = preview_labels(plan.space.num_classes)
    pruned.load(run).save_grid(f"{path}.png", labels, seed)
    run.print(f"wrote {path}.png")
