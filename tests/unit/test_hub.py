"""Weights on the Hub: names, and files and folders as they lie in its cache, without a network."""

import os
import shutil
import subprocess
import sys

import pytest
from huggingface_hub.errors import EntryNotFoundError

from engine import hub
from engine.checkpoint import Weights, save_weights
from engine.errors import InputError
from families import create_model


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hf://me/tiny/a.pt", ("me/tiny", None, "a.pt")),
        ("hf://me/tiny/sub/a.pt", ("me/tiny", None, "sub/a.pt")),
        ("hf://me/tiny@v1.0/a.pt", ("me/tiny", "v1.0", "a.pt")),
        ("hf://me/tiny", ("me/tiny", None, None)),
    ],
)
def test_names(name, parts):
    assert hub.parse_name(name) == parts


@pytest.mark.parametrize("name", ["hf://", "hf://me", "hf:///tiny", "hf://me//a.pt"])
def test_wrong_names(name):
    with pytest.raises(InputError, match=f"--ckpt {name}: .*expected hf://OWNER/NAME"):
        Weights(name, "--ckpt")


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A folder whose files stand for those of a repository; returns it and the names that were asked for."""
    folder, asked = tmp_path / "repository", []
    folder.mkdir()

    def fetch(repository, file, revision):
        asked.append(file)
        if not (folder / file).is_file():
            raise EntryNotFoundError(file)
        return str(folder / file)

    monkeypatch.setattr(hub, "fetch_file", fetch)
    return folder, asked


def write_weights(path):
    net = create_model("DiT-T/2", input_size=4, num_classes=5)
    save_weights(path, net.state_dict(), model="DiT-T/2", num_classes=5, vae="none")


def test_file_and_its_facts(stored):
    folder, _ = stored
    write_weights(folder / "a.pt")
    assert Weights("hf://me/tiny/a.pt", "--ckpt").facts["model"] == "DiT-T/2"
    (folder / "a.pt.json").unlink()
    weights = Weights("hf://me/tiny/a.pt", "--ckpt")
    assert not weights.facts
    assert weights.describe()["model"] == "DiT-T/2"
    assert weights.name == "hf://me/tiny/a.pt"


def test_safetensors_carry_their_facts(stored):
    folder, _ = stored
    write_weights(folder / "a.safetensors")
    (folder / "a.safetensors.json").unlink()
    assert Weights("hf://me/tiny/a.safetensors", "--ckpt").facts["model"] == "DiT-T/2"


def test_what_is_fetched_of_a_pipeline(stored):
    """Configuration and weights of the transformer, the autoencoder, and nothing else."""
    folder, asked = stored
    for name in ("transformer/config.json", "vae/config.json", "transformer/diffusion_pytorch_model.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert hub.fetch("hf://me/tiny") == str(folder)
    assert asked[0] == "transformer/config.json"
    assert "transformer/diffusion_pytorch_model.bin" in asked
    assert {name.split("/")[0] for name in asked} == {"transformer", "vae"}


def test_shards_are_fetched(stored):
    folder, asked = stored
    (folder / "config.json").write_text("{}")
    index = '{"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}'
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    for part in ("part-1.safetensors", "part-2.safetensors"):
        (folder / part).write_bytes(b"")
    assert hub.fetch("hf://me/tiny") == str(folder)
    assert asked[-2:] == ["part-1.safetensors", "part-2.safetensors"]


def test_cache_of_an_offline_machine(tmp_path):
    """The library's own cache is read, and what is not there is refused in one line."""
    write_weights(tmp_path / "a.pt")
    snapshot = tmp_path / "hub" / "models--me--tiny" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    for name in ("a.pt", "a.pt.json"):
        shutil.copy(tmp_path / name, snapshot / name)
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def prune(name):
        words = ["--ckpt", name, "--scheme", "bk-sdm", "--save-model", tmp_path / "out.pt"]
        command = [sys.executable, "prune_by_index.py", *words]
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)

    done = prune("hf://me/tiny/a.pt")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.pt").is_file()
    missing = prune("hf://me/tiny/b.pt")
    assert missing.returncode == 1
    assert "--ckpt hf://me/tiny/b.pt: cannot be fetched from the Hub" in missing.stderr
    assert "Traceback" not in missing.stderr
