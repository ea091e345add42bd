"""Writing what a pruning script has decided: the cut weights, the facts about them, and a look at what they draw."""

import math
import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from engine.checkpoint import Weights, facts_path, read_facts, save_weights
from engine.errors import InputError, check_apart, check_folder, check_writable, flag_errors
from engine.files import plain
from engine.model_card import trace_source
from engine.networks import describe_space
from engine.profile import Profiler, describe_profile
from engine.sampling import preview_labels
from families import depth_name, describe_shapes, family_of, full_name, stack_names
from pruning.surgery import check_alike


def check_target(settings, path, **inputs):
    """Raise InputError unless a pruning script can write its weights to `path`, and its pipeline, apart from inputs."""
    family, model = settings.family, settings.model
    export = settings.own("prune").get("export_pipeline")
    if not family.save:
        check_writable("--save-model", path, **inputs)
        return
    check_network_folder("--save-model", path, {**inputs, "model": model, "SOURCES": trace_source(model, {})})
    if export:
        family.check_export(export, model, {**inputs, "save_model": path})


def check_network_folder(flag, path, inputs):
    """Raise InputError unless a network of diffusers can be written to a folder: a new one, or in place of another.

    inputs: {setting: path} of what must stay.
    """
    if not path:
        raise InputError(f"{flag}: missing; name the folder to write")
    check_folder(flag, path)
    for part in (Path(path) / "config.json", facts_path(path)):
        check_apart(flag, part, inputs)
    is_there = [os.path.lexists(part) for part in (path, facts_path(path))]
    is_empty = os.path.isdir(path) and not os.listdir(path) and not is_there[1]
    if any(is_there) and not is_empty and not is_own_network(path):
        raise InputError(
            f"{flag} {path}: that, or {facts_path(path)}, is there, and not written here; name a new folder"
        )


def is_own_network(path):
    """Whether a folder holds the files of one network and nothing else, and our facts lie beside it."""
    if not os.path.isdir(path) or os.path.islink(path):
        return False
    with suppress(InputError):
        names = os.listdir(path)
        is_network = all(re.fullmatch(r"config\.json|README\.md|diffusion_pytorch_model.*", name) for name in names)
        return is_network and "model" in read_facts(path)
    return False


def check_start(init, weights, model):
    """Raise InputError if kept layers cannot start from what --init says; weights are not fetched for it."""
    if init == "average" and weights.opened:
        with flag_errors("--init", init):
            check_alike(weights.opened.shapes, stack_names(model))


def save_pruned(run, path, state, model, space, profiler=None, own=None, **facts):
    """Write pruned weights of `model` with their facts; returns the name of the pruned model.

    space: the engine.vae.LatentSpace they work on. profiler: an engine.profile.Profiler, whose numbers are shown and
    recorded; None measures nothing. own: the family's own flags of kind "prune". facts: where they come from, and which
    layers were kept.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    depths, family = describe_shapes(shapes, model)["depths"], family_of(model)
    name = os.path.abspath(path) if family.save else depth_name(model, depths)
    if family.save and isinstance(facts.get("source"), str):
        facts["source"] = full_name(facts["source"])
        facts["pipeline"] = full_name(family.find_pipeline(model) or "") or None
    facts |= {"model": name, **describe_space(model, space)}
    if profiler:
        facts["profile"] = find_profile(path, facts, profiler) or profiler.compare(state)
    if family.save:
        with flag_errors("--save-model", path):
            family.save(path, state, model, facts, **(own or {}))
    else:
        save_weights(path, state, **facts)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    run.print(f"saved {path}: {sum(depths)} layers, {parameters:,} parameters")
    for line in describe_profile(facts["profile"]) if profiler else ():
        run.print(line)
    return name


def write_choice(run, settings, whole, pruned, space, **facts):
    """save_pruned as the settings of a pruning script say; whole: the state dict before the cut."""
    profiler = Profiler(run, settings.model, whole) if settings.profile else None
    own = settings.own("prune")
    return save_pruned(run, settings.save_model, pruned, settings.model, space, profiler, own, **facts)


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
    picture = f"{Path(path)}.png"
    pruned.load(run).save_grid(picture, labels, seed)
    run.print(f"wrote {picture}")
