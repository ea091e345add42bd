"""Files of weights: what is read, what is refused, how they are written and fetched."""

import argparse
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

import engine.checkpoint
from engine.checkpoint import Weights, expected_shapes, read_facts, save_weights
from engine.errors import InputError
from engine.files import write_atomically
from engine.run import peak_memory
from engine.weight_files import open_weights, read_file, read_weights
from families import DIT, RELEASES, create_model, model_config
from families.family import Release


class Foreign:
    """A pickle of this makes a file when it is opened."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.fixture
def state():
    return {"blocks.0.w": torch.randn(300, generator=torch.Generator().manual_seed(0)), "b": torch.arange(3.0)}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_round_trip(tmp_path, state, same_weights, suffix):
    """Weights come back bit for bit, with their facts beside them, and nothing else lies in the folder."""
    path = tmp_path / "new" / f"weights{suffix}"
    save_weights(path, state, kept=[0, 2], pattern="1:2")
    same_weights(read_weights(path, "--ckpt"), state)
    assert read_facts(path) == {"kept": [0, 2], "pattern": "1:2"}
    assert sorted(f.name for f in path.parent.iterdir()) == [path.name, f"{path.name}.json"]


@pytest.mark.parametrize(
    ("entries", "average", "expected"),
    [
        (("model", "ema", "opt"), True, "ema"),
        (("model", "ema", "opt"), False, "model"),
        (("model", "model_ema"), True, "model_ema"),
        (("model",), True, "model"),
    ],
)
def test_published_training_checkpoint(tmp_path, entries, average, expected):
    """An argparse.Namespace inside is read; the averaged weights come first."""
    content = {name: {"w": torch.full((2,), float(i))} for i, name in enumerate(entries)}
    torch.save({**content, "args": argparse.Namespace(lr=1e-4), "train_steps": 5}, tmp_path / "c.pt")
    assert torch.equal(read_weights(tmp_path / "c.pt", "--ckpt", average)["w"], content[expected]["w"])
    opened = open_weights(tmp_path / "c.pt", "--ckpt", average)
    assert opened.averaged == (expected != "model")
    assert opened.checkpoint["train_steps"] == 5
    assert not {"ema", "model_ema", "model"} & opened.checkpoint.keys()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_memory_mapped(tmp_path, state):
    """Tensors of a file share its pages: they are read when they are needed."""
    save_weights(tmp_path / "w.pt", state)
    before = Path("/proc/self/maps").read_text()
    found = read_weights(tmp_path / "w.pt", "--ckpt")
    assert str(tmp_path / "w.pt") not in before
    assert str(tmp_path / "w.pt") in Path("/proc/self/maps").read_text()
    assert len(found) == 2


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_foreign_code_is_not_executed(tmp_path, write):
    write({"model": Foreign(tmp_path / "executed")}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"--ckpt .*evil.pt: refused.* foreign code"):
        read_file(tmp_path / "evil.pt", "--ckpt")
    assert not (tmp_path / "executed").exists()


def test_foreign_class_is_refused(tmp_path):
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "module.pt")
    with pytest.raises(InputError, match=r"refused.* foreign code"):
        read_file(tmp_path / "module.pt", "--ckpt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["half", "thousand", "empty", "text", "zeros", "noise"])
def test_damaged(tmp_path, state, suffix, kind):
    path = tmp_path / f"weights{suffix}"
    save_weights(path, state)
    whole = path.read_bytes()
    content = {"half": whole[: len(whole) // 2], "thousand": whole[:1000], "empty": b"", "text": b"no weights here\n"}
    path.write_bytes({**content, "zeros": bytes(100), "noise": bytes(range(129, 256)) * 8}[kind])
    with pytest.raises(InputError, match=r"--ckpt .*: truncated, or not a checkpoint"):
        read_weights(path, "--ckpt")


@pytest.mark.parametrize("path", ["absent.pt", "absent.safetensors", "."])
def test_missing(tmp_path, path):
    with pytest.raises(InputError, match=r"--teacher .*: no such file"):
        read_weights(tmp_path / path, "--teacher")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(2), {"ema": 1}, {3: torch.ones(1)}])
def test_no_weights(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(InputError, match="holds no weights; expected a state dict"):
        read_weights(tmp_path / "other.pt", "--ckpt")


def test_atomic_write(tmp_path):
    """A write that fails halfway leaves the old file and no rest."""
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail(path):
        path.write_text("ne")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_atomically(target, fail)
    assert [f.name for f in tmp_path.iterdir()] == ["file.txt"]
    assert target.read_text() == "old"
    write_atomically(target, lambda path: path.write_text("new"))
    assert target.read_text() == "new"


@pytest.mark.parametrize(
    ("made", "asked", "config", "message"),
    [
        ("DiT-T/2", "DiT-T-D6/2", {}, r"has 12 layers of width .* has 6 of width .*; take --model DiT-T/2"),
        ("DiT-T-D6/2", "DiT-T/2", {}, r"has 6 layers .* take --model DiT-T-D6/2"),
        ("DiT-T/2", "DiT-S/2", {}, r"12 layers of width .* of width 384; take --model DiT-T/2"),
        ("DiT-T/2", "DiT-T/2", {"num_classes": 11}, "num_classes 10, expected 11; change --num-classes"),
        ("DiT-T/2", "DiT-T/2", {"in_channels": 4}, "in_channels 3, expected 4; change --vae"),
        ("DiT-T/2", "DiT-T/2", {"input_size": 16}, "input_size 8, expected 16; change --image-size"),
        ("DiT-T/2", "DiT-T/4", {}, "take --model DiT-T/2|does not fit --model DiT-T/4"),
    ],
)
def test_check_fit(tmp_path, made, asked, config, message):
    given = {"input_size": 8, "in_channels": 3, "num_classes": 10}
    save_weights(tmp_path / "w.pt", {key: torch.zeros(shape) for key, shape in expected_shapes(made, given).items()})
    weights = Weights(tmp_path / "w.pt", "--ckpt")
    weights.check_fit(made, given)
    with pytest.raises(InputError, match=message) as caught:
        weights.check_fit(asked, {**given, **config})
    assert str(caught.value).startswith(f"--ckpt {tmp_path / 'w.pt'}: ")


def test_unknown_width(small_net, tmp_path):
    """Weights that no model name describes are refused without naming one."""
    save_weights(tmp_path / "w.pt", small_net().state_dict())
    weights = Weights(tmp_path / "w.pt", "--ckpt")
    with pytest.raises(InputError, match="width 16") as caught:
        weights.check_fit("DiT-T/2", {"input_size": 4, "in_channels": 3, "num_classes": 5})
    assert "None" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_build(tmp_path, suffix):
    """Half-precision weights become float32 copies; gates that the file lacks start at their initial value."""
    state = {key: value.half() for key, value in create_model("DiT-T/2", input_size=4).state_dict().items()}
    save_weights(tmp_path / f"w{suffix}", state)
    weights = Weights(tmp_path / f"w{suffix}", "--ckpt")
    net = weights.build("DiT-T-1-2", {"input_size": 4}, torch.device("cpu"))
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert all((p == 0.02).all() for p in net.gumbel_gates)
    assert torch.equal(net.pos_embed, state["pos_embed"].float())
    net.pos_embed.data.zero_()
    assert weights.state["pos_embed"].any()


def test_built_weights_are_copies(tmp_path):
    """Also of a file in float32, which is mapped into memory."""
    save_weights(tmp_path / "w.pt", create_model("DiT-T/2", input_size=4).state_dict())
    weights = Weights(tmp_path / "w.pt", "--ckpt")
    weights.build("DiT-T/2", {"input_size": 4}, torch.device("cpu")).pos_embed.data.zero_()
    assert weights.state["pos_embed"].any()


def test_gates_do_not_count(tmp_path):
    """Weights with gates are those of the network without them: they fit, and are counted, without."""
    net = create_model("DiT-T-1-2", input_size=4)
    save_weights(tmp_path / "w.pt", net.state_dict())
    weights = Weights(tmp_path / "w.pt", "--ckpt")
    weights.check_fit("DiT-T/2", {"input_size": 4})
    plain = create_model("DiT-T/2", input_size=4)
    assert weights.count_parameters() == sum(p.numel() for p in plain.parameters())
    assert expected_shapes("DiT-T-1-2", {"input_size": 4}) == expected_shapes("DiT-T/2", {"input_size": 4})
    weights.build("DiT-T/2", {"input_size": 4}, torch.device("cpu"))


def test_shapes_before_tensors(tmp_path, state, monkeypatch, same_weights):
    """The header of a safetensors file tells the shapes; tensors are read when they are asked for."""
    read, whole = [], engine.weight_files.safe_open

    class Recorded:
        def __init__(self, *words):
            self.file = whole(*words)
            self.keys, self.get_slice, self.metadata = self.file.keys, self.file.get_slice, self.file.metadata

        def get_tensor(self, key):
            read.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr(engine.weight_files, "safe_open", Recorded)
    save_weights(tmp_path / "w.safetensors", state)
    weights = Weights(tmp_path / "w.safetensors", "--ckpt")
    assert weights.file.shapes == {"blocks.0.w": (300,), "b": (3,)}
    assert weights.count_parameters() == 303
    assert read == []
    same_weights(weights.state, state)
    assert set(read) == set(state)


@pytest.fixture
def release(tmp_path, monkeypatch, state):
    """A published file that lies on this machine."""
    source = tmp_path / "web" / "tiny.pt"
    save_weights(source, state)
    monkeypatch.setitem(RELEASES, "tiny.pt", Release(source.as_uri(), {"model": "DiT-T/2"}))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "cache"))
    yield source
    torch.hub.set_dir(before)


def test_fetch_once(release, state, same_weights, tmp_path):
    """Into torch's cache, when the tensors are asked for; from there without the network."""
    weights = Weights("tiny.pt", "--ckpt")
    assert weights.facts == {"model": "DiT-T/2"}
    assert not (tmp_path / "cache").exists()
    same_weights(weights.state, state)
    assert weights.path == str(tmp_path / "cache" / "checkpoints" / "tiny.pt")
    release.unlink()
    again = Weights("tiny.pt", "--ckpt")
    same_weights(again.state, state)
    assert again.path == weights.path


def test_fetch_prefers_local_files(release, tmp_path, state, same_weights):
    other = {key: value + 1 for key, value in state.items()}
    save_weights(tmp_path / "tiny.pt", other, kept=[1])
    weights = Weights("tiny.pt", "--ckpt")
    assert (weights.path, weights.facts) == ("tiny.pt", {"kept": [1]})
    same_weights(weights.state, other)
    with pytest.raises(InputError, match=r"--ckpt other\.pt: no such file"):
        Weights("other.pt", "--ckpt")
    assert not (tmp_path / "cache").exists()


def test_fetch_fails(release):
    release.unlink()
    with pytest.raises(InputError, match=r"--ckpt tiny\.pt: file:.*tiny\.pt cannot be fetched"):
        Weights("tiny.pt", "--ckpt").path  # noqa: B018


def test_fetched_foreign_code_is_refused(release, tmp_path):
    torch.save({"model": Foreign(tmp_path / "executed")}, release)
    with pytest.raises(InputError, match=r"--ckpt .*refused.* foreign code"):
        Weights("tiny.pt", "--ckpt").state  # noqa: B018
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", DIT.releases)
def test_releases_are_known_without_fetching(name, tmp_path, monkeypatch):
    def fail(url, target):
        raise ValueError(f"{url} cannot be fetched (no network)")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine.checkpoint, "download", fail)
    weights = Weights(name, "--ckpt")
    assert weights.facts.keys() == {"model", "image_size", "num_classes", "vae"}
    model_config(weights.facts["model"])
    weights.facts["vae"] = "none"  # of this copy only
    assert RELEASES[name].settings["vae"] == "ema"
    with pytest.raises(InputError, match=rf"--ckpt {name}: https://.*/{name} cannot be fetched \(no network\)"):
        weights.state  # noqa: B018


def test_unit_of_memory(monkeypatch):
    """The largest memory is told in bytes on a Mac, elsewhere in kilobytes, and not at all on Windows."""
    pytest.importorskip("resource")
    cpu, found = torch.device("cpu"), {}
    for platform in ("linux", "darwin"):
        monkeypatch.setattr(sys, "platform", platform)
        found[platform] = peak_memory(cpu)
    assert found["linux"] == pytest.approx(1024 * found["darwin"], rel=0.01)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory(cpu) is None
