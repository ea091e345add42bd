"""Files of weights: what is read, what is refused, how they are written and fetched."""

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch

from engine.checkpoint import (
    build_network,
    check_fit,
    fetch,
    read_facts,
    read_file,
    read_weights,
    save_weights,
    write_atomically,
)
from engine.errors import InputError
from families import FAMILIES, create_model


class Foreign:
    """A pickle of this makes a file when it is opened."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.fixture
def state():
    return {"blocks.0.w": torch.randn(300, generator=torch.Generator().manual_seed(0)), "b": torch.arange(3)}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_round_trip(tmp_path, state, same_weights, suffix):
    """Weights come back bit for bit, with their facts beside them, and nothing else lies in the folder."""
    path = tmp_path / "new" / f"weights{suffix}"
    save_weights(path, state, kept=[0, 2], pattern="1:2")
    same_weights(read_weights(path, "--ckpt"), state)
    assert read_facts(path) == {"kept": [0, 2], "pattern": "1:2"}
    assert sorted(f.name for f in path.parent.iterdir()) == [path.name, f"{path.name}.json"]


@pytest.mark.parametrize(
    ("entries", "prefer_ema", "expected"),
    [
        (("model", "ema", "opt"), True, "ema"),
        (("model", "ema", "opt"), False, "model"),
        (("model", "model_ema"), True, "model_ema"),
        (("model",), True, "model"),
    ],
)
def test_published_training_checkpoint(tmp_path, entries, prefer_ema, expected):
    """An argparse.Namespace inside is read; the averaged weights come first."""
    content = {name: {"w": torch.full((2,), float(i))} for i, name in enumerate(entries)}
    torch.save({**content, "args": argparse.Namespace(lr=1e-4), "train_steps": 5}, tmp_path / "c.pt")
    assert torch.equal(read_weights(tmp_path / "c.pt", "--ckpt", prefer_ema)["w"], content[expected]["w"])


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
    with pytest.raises(InputError, match=r"--ckpt .*: no checkpoint, or a truncated one"):
        read_file(path, "--ckpt")


@pytest.mark.parametrize("path", ["absent.pt", "absent.safetensors", "."])
def test_missing(tmp_path, path):
    with pytest.raises(InputError, match=r"--teacher .*: no such file"):
        read_file(tmp_path / path, "--teacher")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(2), {"ema": 1}])
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
def test_check_fit(made, asked, config, message):
    given = {"input_size": 8, "in_channels": 3, "num_classes": 10}
    with torch.device("meta"):
        state = create_model(made, **given).state_dict()
    check_fit(state, "--ckpt", "w.pt", made, **given)
    with pytest.raises(InputError, match=message):
        check_fit(state, "--ckpt", "w.pt", asked, **{**given, **config})


def test_unknown_width(small_net):
    """Weights that no model name describes are refused without naming one."""
    with pytest.raises(InputError, match="width 16") as caught:
        check_fit(small_net().state_dict(), "--ckpt", "w.pt", "DiT-T/2", input_size=4, in_channels=3, num_classes=5)
    assert "None" not in str(caught.value)


def test_build_network(small_net):
    """Half-precision weights become float32 copies; gates that the file lacks start at their initial value."""
    state = {key: value.half() for key, value in create_model("DiT-T/2", input_size=4).state_dict().items()}
    net = build_network("DiT-T-1-2", state, torch.device("cpu"), input_size=4)
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert all((p == 0.02).all() for p in net.gumbel_gates)
    assert torch.equal(net.pos_embed, state["pos_embed"].float())
    net.pos_embed.data.zero_()
    assert state["pos_embed"].any()


@pytest.fixture
def release(tmp_path, monkeypatch, state):
    """A published file that lies on this machine."""
    source = tmp_path / "web" / "tiny.pt"
    save_weights(source, state)
    monkeypatch.setitem(FAMILIES["DiT"].releases, "tiny.pt", source.as_uri())
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "cache"))
    yield source
    torch.hub.set_dir(before)


def test_fetch_once(release, state, same_weights):
    path = fetch("tiny.pt", "--ckpt", FAMILIES["DiT"])
    same_weights(read_weights(path, "--ckpt"), state)
    release.unlink()
    assert fetch("tiny.pt", "--ckpt", FAMILIES["DiT"]) == path
    same_weights(read_weights(path, "--ckpt"), state)


def test_fetch_prefers_local_files(release, tmp_path, state):
    save_weights(tmp_path / "tiny.pt", state)
    assert fetch("tiny.pt", "--ckpt", FAMILIES["DiT"]) == "tiny.pt"
    assert fetch("other.pt", "--ckpt", FAMILIES["DiT"]) == "other.pt"
    assert not (tmp_path / "cache").exists()


def test_fetch_fails(release):
    release.unlink()
    with pytest.raises(InputError, match=r"--ckpt tiny\.pt: cannot be fetched from file:"):
        fetch("tiny.pt", "--ckpt", FAMILIES["DiT"])


def test_fetched_foreign_code_is_refused(release, tmp_path):
    torch.save({"model": Foreign(tmp_path / "executed")}, release)
    with pytest.raises(InputError, match="--ckpt"):
        read_file(fetch("tiny.pt", "--ckpt", FAMILIES["DiT"]), "--ckpt")
    assert not (tmp_path / "executed").exists()
