"""A folder of diffusers, read as weights or written from them: of a transformer, or a pipeline with one."""

import hashlib
from importlib.metadata import version

import torch

from engine.errors import InputError, flag_errors, one_line
from engine.files import digest_file, load_json, write_errors, write_json
from engine.hub import WEIGHT_FILES, list_shards
from engine.weight_files import Opened, open_weights, write_safetensors
from families import find_exchange
from families.diffusers_stacks import find_class
from families.of_diffusers import find_folder


def open_folder(path, flag):
    """The weights of the transformer in a folder; see engine.weight_files.Opened.

    Of a class that a family of ours has, they are those of a network of ours; of others, as they are. Raises InputError
    for a folder without any, and for one that is no network of ours.
    """
    with flag_errors(flag, path):
        folder = find_transformer(path)
        config = load_json(folder / "config.json")
        exchange = find_exchange(config.get("_class_name"))
        if not exchange:
            find_class(config.get("_class_name"))
    files = [open_weights(file, flag) for file in list_files(folder, flag)]
    if not exchange:
        shapes = {key: shape for file in files for key, shape in file.shapes.items()}
        return Opened(shapes, lambda: join_states(files), {}, averaged=False, model=str(path))
    original = open_weights(folder / exchange.ORIGINAL, flag) if (folder / exchange.ORIGINAL).is_file() else None

    def convert(get):
        theirs = {key: value for file in files for key, value in get(file).items()}
        with flag_errors(flag, path):
            try:
                own, table = (get(original), (original.facts or {}).get("table")) if original else (None, None)
                return exchange.from_diffusers(theirs, config, own, table)
            except (RuntimeError, IndexError, KeyError) as error:  # of torch, for shapes that do not belong together
                raise ValueError(f"damaged, or not a network of ours ({one_line(error):.200})") from None

    ours = convert(lambda file: {key: torch.empty(shape, device="meta") for key, shape in file.shapes.items()})
    shapes = {key: tuple(value.shape) for key, value in ours.items()}
    facts = dict(files[0].facts or {})
    is_pipeline = folder.name == "transformer" and (folder.parent / "model_index.json").is_file()
    if is_pipeline and (folder.parent / "vae" / "config.json").is_file():
        facts["vae"] = str(folder.parent / "vae")
    return Opened(shapes, lambda: convert(lambda file: file.read()), {}, averaged=False, facts=facts)


def join_states(files):
    """The state dict of the network whose parts are in these opened files."""
    return {key: value for file in files for key, value in file.read().items()}


def find_transformer(path):
    """The folder of a transformer: `transformer` in that of a pipeline, or this one. Raises ValueError for another."""
    if folder := find_folder(path):
        return folder
    raise ValueError("no config.json in it or in its folder transformer; expected a file, or a folder of diffusers")


def list_files(folder, flag="--ckpt"):
    """The files with the weights in the folder of a transformer. Raises InputError if there are none."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            with flag_errors(flag, folder):
                names = list_shards(folder / name) if name.endswith(".index.json") else [name]
            return [folder / each for each in names]
    raise InputError(f"{flag} {folder}: no weights in it; expected {WEIGHT_FILES[0]}")


def digest_folder(path):
    """A short digest of all weights and the config.json in the folder of a transformer."""
    folder = find_transformer(path)
    files = sorted({folder / "config.json", *list_files(folder), *folder.glob("*.safetensors")})
    digests = [digest_file(file) for file in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def write_transformer(folder, exchange, exported, facts):
    """Write the folder of a transformer; returns lines of Python that open it.

    exported: what the `to_diffusers` of an exchange gives. facts: about the weights, which the file will hold.
    """
    state, config, original, about = exported
    write_json(folder / "config.json", {**config, "_diffusers_version": version("diffusers")})
    write_safetensors(folder / exchange.load().ORIGINAL, original, about)
    write_safetensors(folder / WEIGHT_FILES[0], state, facts)
    return [
        f"from diffusers import {config['_class_name']}",
        f'net = {config["_class_name"]}.from_pretrained("FOLDER")',
    ]


def write_pipeline(folder, exchange, exported, facts, space, steps):
    """Write the folder of a pipeline: transformer, noise schedule, autoencoder of an engine.vae.LatentSpace, labels.

    Returns lines of Python that open it and take so many steps.
    """
    scheduler = exchange.load().SCHEDULER
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    codec = space.load_codec("cpu")
    with write_errors(folder / "vae"):
        codec.vae.save_pretrained(folder / "vae")
    write_transformer(folder / "transformer", exchange, exported, facts)
    index = {
        "_class_name": exchange.pipeline,
        "_diffusers_version": version("diffusers"),
        "id2label": dict(enumerate(list_labels())),
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "transformer": ["diffusers", exported[1]["_class_name"]],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)
    return [
        f"from diffusers import {exchange.pipeline}",
        f'pipeline = {exchange.pipeline}.from_pretrained("FOLDER")',
        f"pictures = pipeline(class_labels=[207, 360], num_inference_steps={steps}).images",
    ]


def list_labels():
    """ImageNet's 1,000 labels in the order of its classes."""
    from torchvision.models import ResNet18_Weights

    return ResNet18_Weights.DEFAULT.meta["categories"]
