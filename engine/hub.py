"""Weights on the Hugging Face Hub: hf://OWNER/NAME/FILE, or hf://OWNER/NAME for a folder of diffusers.

A revision goes behind the name: hf://OWNER/NAME@REVISION. Cache, tokens and HF_HUB_OFFLINE are huggingface_hub's.
"""

from contextlib import contextmanager
from pathlib import Path

from engine.errors import one_line
from engine.files import load_json
from families.names import HUB

# Of a network in a folder of diffusers, the first that is there; an index names the parts of large weights.
WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
)


def parse_name(name):
    """(repository, revision, file) of a name, None for what it does not say. Raises ValueError for another name."""
    parts = name.removeprefix(HUB).split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise ValueError("expected hf://OWNER/NAME, or hf://OWNER/NAME/FILE")
    title, _, revision = parts[1].partition("@")
    return f"{parts[0]}/{title}", revision or None, parts[2] if len(parts) == 3 else None


def fetch(name):
    """Where a file or folder of the Hub is on this machine, after it was fetched. Raises ValueError if it cannot be."""
    repository, revision, file = parse_name(name)
    try:
        if not file:
            return fetch_folder(repository, revision)
        found = fetch_file(repository, file, revision)
        with if_there():
            fetch_file(repository, f"{file}.json", revision)  # facts about the weights
        return found
    except Exception as error:  # it may be any: of the network, of the Hub, of its names
        raise ValueError(f"cannot be fetched from the Hub ({one_line(error):.300})") from None


def fetch_pipeline(name):
    """Where a whole pipeline of the Hub is on this machine, text encoders and all; fetched as diffusers does it.

    Raises ValueError if it cannot be.
    """
    from diffusers import DiffusionPipeline

    repository, revision, _ = parse_name(name)
    try:
        return DiffusionPipeline.download(repository, revision=revision)
    except Exception as error:  # it may be any: of the network, of the Hub, of its names
        raise ValueError(f"cannot be fetched from the Hub as a pipeline ({one_line(error):.300})") from None


@contextmanager
def if_there():
    """Pass over a file that is not there, or not in the cache of a machine that is meant to be offline.

    The library's error for the second is also that of a network that fails, which is not passed over.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError:
        if not constants.HF_HUB_OFFLINE:
            raise
    except EntryNotFoundError:
        pass


def fetch_file(repository, file, revision):
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repository, file, revision=revision)


def fetch_folder(repository, revision):
    """Fetch what `engine.diffusers_folder` reads of a pipeline or a transformer, and its autoencoder."""
    config, part = None, "transformer/"
    with if_there():
        config = fetch_file(repository, "transformer/config.json", revision)
    if not config:
        config, part = fetch_file(repository, "config.json", revision), ""
    fetch_weights(repository, part, revision)
    with if_there():
        if part and fetch_file(repository, "vae/config.json", revision):
            fetch_weights(repository, "vae/", revision)
    folder = Path(config).parent
    return str(folder.parent if part else folder)


def fetch_weights(repository, part, revision):
    """Fetch the first of WEIGHT_FILES that is in the folder `part`, and the files that it names."""
    for file in WEIGHT_FILES:
        with if_there():
            path = fetch_file(repository, part + file, revision)
            if file.endswith(".index.json"):
                for shard in list_shards(path):
                    fetch_file(repository, part + shard, revision)
            return


def list_shards(path):
    """Names of the files that an index names. Raises ValueError for another file."""
    named = load_json(path).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) and "/" not in name for name in named.values()):
        raise ValueError(f"{path}: weight_map does not name files")
    return sorted(set(named.values()))
