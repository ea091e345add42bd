"""Any transformer of diffusers: a model's name is a folder of diffusers, of a pipeline or a transformer, or hf://...

What the network takes besides latents and time is recorded from the pipeline (`diffusion/prompts.py`) when pictures and
captions are encoded. Objective and sampler follow the pipeline's scheduler.
"""

import importlib
import os
import shutil
from functools import lru_cache
from pathlib import Path

from families.dit import DIT
from families.family import Family, Latents
from families.flags import FAMILY, above_zero, amount, own, path_flag, share
from families.names import is_hub_name

NETWORK = "models_diffusers"  # module of the networks; imported when it is needed, as torch comes with it
TOKENS = ("img_ids", "img_shapes")  # arguments of networks that take latents as tokens of 2 x 2, made by the pipeline


def find_folder(name):
    """The folder of a transformer: `transformer` in that of a pipeline, or this one; None if it is neither."""
    folders = (Path(name) / "transformer", Path(name))
    return next((folder for folder in folders if os.path.isfile(folder / "config.json")), None)


def is_place(name):
    """Whether a model's name is a folder of diffusers, or one on the Hub."""
    return is_hub_name(name) or (len(name) < 4000 and find_folder(name) is not None)


@lru_cache
def locate(name):
    """Where the folder called `name` is on this machine; one of the Hub is fetched."""
    from engine.hub import fetch

    return fetch(name) if is_hub_name(name) else name


@lru_cache
def locate_pipeline(name):
    """The same of a whole pipeline, with its text encoders, which are needed for prompts alone."""
    from engine.hub import fetch_pipeline

    return fetch_pipeline(name) if is_hub_name(name) else name


def find_model(name):
    """Constructor arguments of the network in a folder. Raises ValueError for none, and for one of DiT's own family."""
    from engine.files import load_json

    folder = find_folder(locate(name))
    if folder is None:
        raise ValueError(f"{name!r} has no config.json in it or in its folder transformer; expected such a folder")
    config = load_json(folder / "config.json")
    class_name = config.get("_class_name")
    if class_name in DIT.exchange.classes:
        raise ValueError(f"{name} holds a {class_name}; take --model DiT-XL/2 and give the folder as weights")
    return {"class_name": class_name, "config": {key: value for key, value in config.items() if key[0] != "_"}}


def network_module():
    return importlib.import_module(NETWORK)


def find_stacks(config):
    from families import diffusers_stacks

    return diffusers_stacks.find_stacks(config["class_name"], config["config"])


def find_fixed_layers(config):
    from families.diffusers_stacks import fixed_layers

    return fixed_layers(find_stacks(config))


def describe(shapes, name):
    """What {key: shape} of a state dict of the network `name` tells: depths of its stacks, channels of its latents."""
    from pruning.surgery import stack_depths

    config = find_model(name)
    depths = tuple(stack_depths(shapes, stack_names(config)).values())
    return {"model": name, "depths": depths, "in_channels": count_channels(config)}


def count_channels(config):
    """Channels of the latents; a network that takes tokens has four times as many."""
    channels = config["config"].get("in_channels")
    if type(channels) is not int or channels < 1:
        raise ValueError(f"config.json has in_channels {channels!r:.100}; expected a whole number")
    return channels // 4 if takes_tokens(config) else channels


def takes_tokens(config):
    """Whether the pipeline packs 2 x 2 latents into a token."""
    from families.diffusers_stacks import list_arguments

    return any(name in TOKENS for name in list_arguments(config["class_name"]))


def stack_names(config):
    return tuple(stack.name for stack in find_stacks(config))


def find_own_weights(name):
    """The model's name, if its folder holds weights too."""
    from engine.hub import WEIGHT_FILES

    folder = find_folder(locate(name))
    return name if any((folder / file).is_file() for file in WEIGHT_FILES) else None


def find_pipeline(name):
    """The folder of a pipeline that a model belongs to: its own, or that of the model it was cut out of; else None."""
    seen = set()
    while name and name not in seen:
        seen.add(name)
        if is_hub_name(name) or (Path(name) / "model_index.json").is_file():
            return name
        name = read_source(Path(f"{Path(name)}.json"))
    return None


def read_source(path):
    """What the facts in a file say that weights were made from; None where there are no facts of ours."""
    from engine.files import load_json

    try:
        facts = load_json(path) if path.is_file() else {}
        source = facts.get("pipeline") or facts.get("source")
    except (ValueError, AttributeError):
        return None
    return source if isinstance(source, str) else None


def read_prompts(prompts, data_path=None):
    """The list of prompts that --prompts gives: lines of a file, or one prompt; else the captions of encoded data."""
    from engine.files import load_json

    if prompts and os.path.isfile(prompts):
        return read_lines(prompts)
    if prompts and prompts.endswith(".txt"):
        raise ValueError(f"--prompts {prompts}: no such file; expected one, or a prompt")
    if prompts:
        return [prompts]
    metadata = Path(data_path or "") / "metadata.json"
    return load_json(metadata).get("classes", []) if data_path and metadata.is_file() else []


def read_lines(path):
    """Lines of a file of prompts that are not blank. Raises ValueError for a file without any, or that is no text."""
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {path}: is not text in UTF-8") from None
    if not lines:
        raise ValueError(f"--prompts {path}: holds no prompt; expected one in a line")
    return lines


def tell_settings(name, typed):
    """Settings that typed flags tell, {setting: value}, and those that the model's folder tells: autoencoder and size.

    typed: {setting: value} of the command line. What it tells is stronger than what is recorded with latents and
    weights, the folder is weaker. A transformer alone works without an autoencoder.
    """
    pipeline = typed.get("pipeline") or find_pipeline(name)
    folder = Path(os.path.abspath(locate(pipeline))) if pipeline else None
    has_vae = folder and (folder / "vae" / "config.json").is_file()
    vae = {"vae": str(folder / "vae") if has_vae else "none", **tell_size(name, folder / "vae" if has_vae else None)}
    told = {"num_classes": len(read_prompts(typed["prompts"]))} if typed.get("prompts") else {}
    return (told | vae, {}) if typed.get("pipeline") else (told, vae)


def tell_size(name, vae):
    """The size of pictures that a network's config and its autoencoder tell, {"image_size": pixels} or {}."""
    from engine.vae import read_autoencoder

    size = find_model(name)["config"].get("sample_size")
    if vae is None or type(size) is not int or size < 1:
        return {}
    return {"image_size": size * read_autoencoder(str(vae), DIFFUSERS.latents)[0]}


def make_recorder(name, device, dtype):
    """What records how a pipeline calls its transformer; device and dtype: of its text encoders."""
    from diffusion.pipeline_call import PipelineRecorder

    place = find_pipeline(name)
    if not place:
        raise ValueError(
            "is a transformer alone; give the pipeline that it is for, whose encoders and autoencoder it has"
        )
    return PipelineRecorder(locate_pipeline(place), **find_model(name), device=device, dtype=dtype)


def make_objective(*, model, data_path, prompt_dropout, time_sampling, shift, guidance):
    """Flow matching or noise prediction, as the pipeline's scheduler says, on the prompts encoded with the latents."""
    from diffusion.prompts import Call, PromptObjective

    call = Call.read(Path(data_path) / "prompts")
    expected = find_model(model)["class_name"]
    if call.network != expected:
        raise ValueError(f"--data-path {data_path}: prompts are for a {call.network}, --model {model} is a {expected}")
    return PromptObjective(call, prompt_dropout, time_sampling, shift, guidance)


def make_sampler(num_sampling_steps, cfg_scale, *, model, pipeline, prompts, data_path=None):
    """The model's pipeline, with its scheduler and text encoders."""
    from diffusion.prompts import PipelineSampler

    place = pipeline or find_pipeline(model)
    if not place:
        raise ValueError(f"--pipeline: missing; {model} has only a transformer, give the pipeline that it is for")
    texts = read_prompts(prompts, data_path)
    if not texts:
        raise ValueError("--prompts: missing; give a prompt, or a file with one in a line")
    config = find_model(model)
    return PipelineSampler(locate_pipeline(place), texts, num_sampling_steps, cfg_scale, takes_tokens(config))


def save(path, state, model, facts, export_pipeline=None):
    """Write the transformer that is left of `model` as a folder of diffusers, facts beside it; and the whole pipeline.

    state: of the cut network. facts: `kept` among them, the layers of `model` that it has.
    """
    config = find_model(model)
    write_network(path, config, state, facts["kept"], facts)
    if export_pipeline:
        copy_pipeline(locate_pipeline(find_pipeline(model)), export_pipeline, path)


def export(output, state, model, facts, with_pipeline):
    """Write trained weights of `model` as a folder of diffusers, or its whole pipeline with them.

    Returns lines of Python that open it. Raises ValueError if the pipeline is not known.
    """
    from engine.files import load_json

    pipeline, config = find_pipeline(model), find_model(model)
    if with_pipeline and not pipeline:
        raise ValueError(f"--model {model}: belongs to no pipeline that is known; take --transformer-only")
    folder, class_name = Path(output) / "transformer" if with_pipeline else Path(output), config["class_name"]
    depth = sum(stack.depth for stack in find_stacks(config))
    if with_pipeline:
        copy_pipeline(locate_pipeline(pipeline), output)
        class_name = load_json(Path(output) / "model_index.json")["_class_name"]
    write_network(folder, config, state, range(depth), facts)
    return [f"from diffusers import {class_name}", f'{class_name}.from_pretrained("FOLDER")']


def write_network(path, config, state, kept, facts):
    """Write the layers `kept` of a network as a folder of diffusers, and facts about them beside it."""
    from engine.files import write_errors, write_json

    with write_errors(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        network_module().save_network(path, config["class_name"], config["config"], state, kept)
    write_json(f"{Path(path)}.json", facts)


def check_export(target, model, inputs):
    """Raise InputError unless the pipeline of `model` can be written to a new or empty folder, apart from inputs."""
    from engine.errors import InputError, check_apart, check_folder

    flag, pipeline = "--export-pipeline", find_pipeline(model)
    if not pipeline:
        raise InputError(f"{flag} {target}: --model {model} belongs to no pipeline that is known; leave it out")
    check_apart(flag, Path(target) / "config.json", {**inputs, "model": locate_pipeline(pipeline)})
    if Path(target).absolute() in [
        Path(inputs["save_model"]).absolute(),
        *Path(inputs["save_model"]).absolute().parents,
    ]:
        raise InputError(f"{flag} {target}: has --save-model {inputs['save_model']} in it; name another folder")
    check_folder(flag, target)
    if os.path.lexists(target) and (not os.path.isdir(target) or os.listdir(target)):
        raise InputError(f"{flag} {target}: is there and not an empty folder; name a new one")


def copy_pipeline(pipeline, target, transformer=None):
    """Write a copy of the pipeline in a folder, with the transformer of another folder in it, or without any."""
    from engine.files import write_errors

    with write_errors(target):
        root = os.path.abspath(pipeline)

        def leave_out(folder, names):
            """Hidden files; at the root the transformer, and files of whole weights that no pipeline reads."""
            is_root = os.path.abspath(folder) == root
            large = [name for name in names if name.endswith((".safetensors", ".bin", ".ckpt"))] if is_root else []
            return [name for name in names if name[0] == "." or (is_root and name == "transformer")] + large

        shutil.copytree(pipeline, target, ignore=leave_out, dirs_exist_ok=True)
        if transformer:
            shutil.copytree(transformer, Path(target) / "transformer", dirs_exist_ok=True)


DIFFUSERS = Family(
    name="diffusers",
    network=f"{NETWORK}.make_network",
    models={},
    base="",
    latents=Latents(hub={}, factor=8, channels=4, scale=1.0),
    make_objective=make_objective,
    make_sampler=make_sampler,
    sampler_label=lambda num_sampling_steps, **_: f"pipeline-{num_sampling_steps}",
    stacks=lambda config: tuple(stack.depth for stack in find_stacks(config)),
    with_stacks=None,
    read_shapes=None,
    find_model=find_model,
    describe=describe,
    stack_names=stack_names,
    fixed_layers=find_fixed_layers,
    own_weights=find_own_weights,
    tell_settings=tell_settings,
    has_captions=True,
    make_recorder=make_recorder,
    save=save,
    export=export,
    check_export=check_export,
    find_pipeline=find_pipeline,
    sample_hint={"prompts": "PROMPTS"},
    pruned_file="pruned",
    asks={"train": ("model", "data_path"), "sample": ("model", "data_path")},
    flags={
        "train": (
            own("prompt-dropout", "share of captions that become the empty prompt", 0.1, type=share),
            own("time-sampling", "times of flow matching", "logit-normal", choices=("logit-normal", "uniform")),
            own("shift", "shift of these times towards noise", None, type=above_zero, shown="the scheduler's"),
            own("guidance", "what networks with an embedding of the guidance are told", 3.5, type=amount),
        ),
        "sample": (
            own("prompts", "a prompt, or a file with one in a line", None, shown="in training, the captions"),
            path_flag(
                "pipeline",
                "pipeline of the network",
                shown="that of --model, or of what it was cut out of",
                metavar="FOLDER",
                group=FAMILY,
            ),
        ),
        "prune": (
            path_flag(
                "export-pipeline",
                "also write the whole pipeline with the pruned network",
                shown="no",
                metavar="FOLDER",
                group=FAMILY,
            ),
        ),
    },
    defaults={"all": {"num_sampling_steps": 20, "cfg_scale": 3.5, "image_size": 1024}},
)
