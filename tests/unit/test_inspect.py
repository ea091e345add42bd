"""What is said of files of weights: of every layout and family, of states, of wrong files; and that commands work."""

import argparse
import importlib
import json
import pickle
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.checkpoint
import engine.inspection
import engine.weight_files
import inspect_weights
from engine import hub
from engine.checkpoint import read_facts, save_weights
from engine.files import plain
from engine.profile import count_macs
from engine.run_folder import comparable
from engine.weight_files import read_file
from families import create_model

CONFIG = {"input_size": 8, "in_channels": 3, "num_classes": 10}
BARE = {  # model -> family and model of weights about which nothing is recorded
    "DiT-T/2": ("DiT or SiT", "DiT-T/2 or SiT-T/2", [12]),
    "SiT-T/2": ("DiT or SiT", "DiT-T/2 or SiT-T/2", [12]),
    "MAR-T": ("MAR", "MAR-T", [6, 6]),
}
LAYOUTS = {  # of published code: the file around a state dict
    "plain": lambda state: state,
    "ema": lambda state: {"model": state, "ema": state, "opt": {}, "args": argparse.Namespace(lr=1e-4)},
    "model_ema": lambda state: {"model": state, "model_ema": state, "optimizer": {}, "epoch": 399},
    "model": lambda state: {"model": state},
}


def tell(*words):
    """The objects that --json writes, and the exit status."""
    settings = inspect_weights.parse_args([*map(str, words), "--json"])
    try:
        inspect_weights.main(settings)
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture
def inspect(capsys):
    """Inspects one file: {what: value}."""

    def run(*words):
        capsys.readouterr()
        assert tell(*words) == 0
        (found,) = json.loads(capsys.readouterr().out)
        return found

    return run


def read_command(found, **names):
    """(script, words) of a command that was proposed, with values in place of words that people have to replace."""
    words = [names.get(word, word) for word in shlex.split(found["continue"])]
    start = words.index(next(word for word in words if word.endswith(".py")))
    return words[start].removesuffix(".py"), words[start + 1 :]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", BARE)
def test_published_layouts(tmp_path, inspect, model, layout):
    state = create_model(model, **CONFIG).state_dict()
    torch.save(LAYOUTS[layout](state), tmp_path / "w.pt")
    found = inspect(tmp_path / "w.pt")
    family, name, layers = BARE[model]
    told = {
        "file": str(tmp_path / "w.pt"),
        "family": family,
        "model": name,
        "layers": layers,
        "width": 96,
        "parameters": sum(value.numel() for value in state.values()),
        "gmacs": count_macs(model, CONFIG) / 1e9,
        "num_classes": 10,
        "latents": [3, 8, 8],
        "gates": False,
        "dtype": "float32",
        "bytes": (tmp_path / "w.pt").stat().st_size,
        "averaged": True if "ema" in layout else None,  # what a bare state dict is of, nobody knows
        "kind": "training checkpoint of another program" if "ema" in layout else "weights",
    }
    assert told.items() <= found.items()
    unknown = ["kept", "pattern", "source", "vae", "image_size", "step", "script", "url"]  # no usual one has 3 channels
    assert [name for name in unknown if found[name] is not None] == []
    words = f"python prune_by_learning.py --model {name.split()[0]} --pattern 1:2 --load-weight {tmp_path}/w.pt"
    assert found["continue"] == f"{words} --data-path FOLDER --delta-w"


@pytest.mark.parametrize("model", BARE)
def test_numbers_of_a_half(tmp_path, inspect, model, monkeypatch):
    """A .safetensors file says its type in its header, and no tensor of it is read."""
    state = create_model(model, **CONFIG).state_dict()
    save_file({key: value.bfloat16() for key, value in state.items()}, tmp_path / "w.safetensors")
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "w.pt")
    opened = engine.weight_files.open_safetensors

    def refuse():
        pytest.fail("reads tensors")

    monkeypatch.setattr(engine.weight_files, "open_safetensors", lambda *words: opened(*words)._replace(read=refuse))
    found = inspect(tmp_path / "w.safetensors")
    assert (found["dtype"], found["family"]) == ("bfloat16", BARE[model][0])
    assert inspect(tmp_path / "w.pt")["dtype"] == "float16"


def test_usual_autoencoder(tmp_path, inspect):
    """Pictures are 8 times as large as latents of four channels, and what is recorded counts before."""
    config = {"input_size": 16, "in_channels": 4, "num_classes": 10}
    state = create_model("SiT-T/2", **config).state_dict()
    torch.save(state, tmp_path / "bare.pt")
    save_weights(tmp_path / "told.pt", state, model="SiT-T/2", vae="none")
    found = inspect(tmp_path / "bare.pt")
    assert (found["vae"], found["image_size"], found["family"]) == (None, 128, "DiT or SiT")
    found = inspect(tmp_path / "told.pt")
    assert (found["vae"], found["image_size"], found["family"]) == ("none", 16, "SiT")


def test_no_name(tmp_path, small_net, inspect):
    """Of a width that no model has, what the shapes tell is said."""
    net = small_net()
    save_weights(tmp_path / "w.pt", net.state_dict())
    found = inspect(tmp_path / "w.pt")
    assert (found["model"], found["gmacs"], found["width"], found["layers"]) == (None, None, 16, [6])
    assert found["parameters"] == sum(p.numel() for p in net.parameters())


def test_published_name(inspect, monkeypatch, tmp_path):
    """What a release stands for is said without fetching it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine.checkpoint, "download", lambda *words: pytest.fail("fetches"))
    found = inspect("DiT-XL-2-512x512.pt")
    told = {
        "family": "DiT",
        "model": "DiT-XL/2",
        "vae": "ema",
        "image_size": 512,
        "latents": [4, 64, 64],
        "bytes": None,
    }
    assert told.items() <= found.items()
    assert found["gmacs"] == pytest.approx(524.6, rel=1e-3)
    assert found["url"].endswith("/DiT-XL-2-512x512.pt")
    found = inspect("TinyDiT-D19-MaskedKD-500K.pt")
    assert (found["layers"], found["pattern"]) == ([19], "3:4x2,2:4,3:4,2:4,3:4x2")


def test_name_on_the_hub(teacher, inspect, monkeypatch):
    """The file that was fetched is read, and the command names it as it was named."""
    monkeypatch.setattr(hub, "fetch_file", lambda repository, file, revision: str(teacher.student.parent / file))
    found = inspect("hf://me/tiny/student.pt")
    assert (found["model"], found["kept"]) == (teacher.half, [0, 2, 4, 7, 9, 11])
    assert " --load-weight hf://me/tiny/student.pt " in found["continue"]


def test_pruned_file(family, latents, inspect):
    """All of its facts, what was measured when it was cut, and the command that recovers it."""
    found, facts = inspect(family.student), read_facts(family.student)
    told = {name: facts[name] for name in ("kept", "pattern", "source", "vae", "num_classes")}
    assert found | told == found
    assert (found["kind"], found["family"], found["model"]) == ("pruned weights", family.name, family.half)
    after = facts["profile"]["after"]
    assert (found["parameters"], found["gmacs"]) == (after["parameters"], after["gmacs"])
    script, words = read_command(found, FOLDER=str(latents))
    assert script == "train_masked_kd"
    settings = importlib.import_module(script).COMMAND.resolve(words)
    assert (settings.model, settings.teacher) == (family.half, family.model)
    assert (settings.load_weight, settings.load_teacher) == (str(family.student), str(family.weights))
    assert "--no-ema" in inspect(family.student, "--no-ema")["continue"]


def test_whole_file(family, latents, inspect):
    """The command that learns its layers has a family for sure, where that is recorded."""
    found = inspect(family.weights)
    assert (found["kind"], found["model"], found["kept"]) == ("weights", family.model, None)
    script, words = read_command(found, FOLDER=str(latents))
    settings = importlib.import_module(script).parse_args(words)
    assert (script, settings.model, settings.pattern) == ("prune_by_learning", family.model, "1:2")


def resumes(found, state):
    """Asserts that the command that was proposed has the settings in a training state, and resumes from it."""
    script, words = read_command(found)
    settings = importlib.import_module(script).parse_args(words)
    assert comparable(plain(settings.values)) == read_file(state, "--resume")["args"]
    assert settings.resume == str(state)


def test_training_state(family, tmp_path, inspect):
    """One that lies alone tells the whole command by its settings."""
    state = tmp_path / "alone.pt"
    shutil.copy(family.checkpoint, state)
    found = inspect(state)
    told = {"kind": "training state", "step": 8, "script": "train.py", "averaged": True, "gates": False}
    assert told.items() <= found.items()
    assert (found["family"], found["model"]) == (family.name, family.model)
    assert found["parameters"] == sum(value.numel() for value in family.state.values())
    assert found["continue"].startswith("python train.py ")
    resumes(found, state)
    assert inspect(state, "--no-ema")["averaged"] is False


def test_state_in_its_run_folder(teacher, tmp_path, inspect):
    """There the command is the recorded one; an older state, or one of another branch, is named."""
    folder = shutil.copytree(teacher.folder, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["environment"]["command"] = "train.py --model DiT-T/2 --prefix 'a b'"
    (folder / "config.json").write_text(json.dumps(config))
    newest, older = (folder / "checkpoints" / f"{step:07d}.pt" for step in (8, 4))
    assert inspect(newest)["continue"] == "python train.py --model DiT-T/2 --prefix 'a b'"
    assert inspect(older)["continue"] == f"python train.py --model DiT-T/2 --prefix 'a b' --resume {older}"
    for change in ({"branch": "1234"}, {"settings": {**config["settings"], "lr": 0.5}}, {"environment": 3}):
        (folder / "config.json").write_text(json.dumps(config | change))
        resumes(inspect(newest), newest)


@pytest.mark.parametrize("update", [[], ["--delta-w"], ["--delta-w", "--lora"]], ids=["gates", "full", "lora"])
def test_state_of_gate_learning(teacher, latents, tmp_path, run_script, inspect, update):
    """Its averages are of the gates; sizes are those of the network alone."""
    words = ["--load-weight", teacher.weights, "--data-path", latents, "--results-dir", tmp_path, "--epochs", 1]
    words += ["--global-batch-size", 32, "--num-workers", 0, "--no-profile", *update]
    for name, pattern in ((teacher.gated, []), (teacher.model, ["--pattern", "2:4x3"])):
        run_script("prune_by_learning", "--model", name, *pattern, *words)
        state = tmp_path / f"learn_mask-{name.replace('/', '-')}" / "checkpoints" / "0000002.pt"
        found = inspect(state)
        told = {"kind": "state of gate learning", "step": 2, "gates": True, "averaged": False, "model": teacher.model}
        assert told.items() <= found.items()
        assert found["pattern"] == (pattern[1] if pattern else "1:2x6")
        assert found["parameters"] == sum(value.numel() for value in teacher.state.values())
        assert found["script"] == "prune_by_learning.py"
        resumes(found, state)


def test_processes(teacher, tmp_path, inspect):
    """A state of several processes is continued by as many."""
    state = read_file(teacher.checkpoint, "--resume")
    torch.save({**state, "world": 8}, tmp_path / "s.pt")
    assert inspect(tmp_path / "s.pt")["continue"].startswith("torchrun --nproc_per_node=8 train.py --data-path ")


def test_zeros_are_typed():
    settings = {"global_seed": 0, "weight_decay": 0.0, "betas": [0.9, 0.999], "prefix": "", "resume": None}
    settings |= {"lora": True, "no_ema": False, "compile": False, "log_to": []}
    assert engine.inspection.type_settings(settings) == [
        *["--global-seed", "0", "--weight-decay", "0.0", "--betas", "0.9", "0.999", "--prefix", ""],
        *["--lora", "--no-compile"],
    ]


def test_folder_of_diffusers(tmp_path, run_script, inspect):
    """Its class names the family, also where nothing is recorded."""
    state = create_model("DiT-T/4", **CONFIG).state_dict()
    save_weights(tmp_path / "w.pt", state, model="DiT-T/4", num_classes=10, vae="none", kept=[0, 3])
    folder = tmp_path / "folder"
    run_script("export_diffusers", "--ckpt", tmp_path / "w.pt", "--output", folder, "--transformer-only")
    file = folder / "diffusion_pytorch_model.safetensors"
    told = {"family": "DiT", "model": "DiT-T/4", "layers": [12], "dtype": "float32", "latents": [3, 8, 8]}
    told["parameters"] = sum(value.numel() for value in state.values())
    assert (told | {"kept": [0, 3], "bytes": file.stat().st_size}).items() <= inspect(folder).items()
    save_file(load_file(file), file)
    assert (told | {"kept": None, "vae": None}).items() <= inspect(folder).items()


class Foreign:
    """A pickle of something that is no tensor."""


@pytest.fixture
def wrong_files(tmp_path):
    """{what is wrong: file}."""
    state = create_model("DiT-T-D6/2", **CONFIG).state_dict()
    files = {name: tmp_path / f"{name}.pt" for name in ("absent", "truncated", "empty", "tensors", "foreign", "lacks")}
    save_weights(files["truncated"], state)
    files["truncated"].write_bytes(files["truncated"].read_bytes()[:5000])
    torch.save({"epoch": 3}, files["empty"])
    torch.save({"weight": torch.zeros(3)}, files["tensors"])
    files["foreign"].write_bytes(pickle.dumps({"model": Foreign()}, 2))
    torch.save({key: value for key, value in state.items() if key != "blocks.2.mlp.fc1.bias"}, files["lacks"])
    files["folder"] = tmp_path / "no weights"
    files["folder"].mkdir()
    return files


REASONS = {
    "absent": "no such file",
    "truncated": "truncated, or not a checkpoint",
    "empty": "holds no weights",
    "tensors": "not the weights of a DiT",
    "foreign": "refused, since opening it would run foreign code",
    "lacks": "does not fit a DiT-T-D6/2",
    "folder": "no config.json in it",
}


def test_wrong_files(wrong_files, teacher, capsys):
    """One line for each, the others are shown, and the status is 1."""
    assert tell(*wrong_files.values(), teacher.student) == 1
    shown = capsys.readouterr()
    assert [found["model"] for found in json.loads(shown.out)] == [teacher.half]
    lines = shown.err.splitlines()
    assert len(lines) == len(wrong_files)
    for (name, path), line in zip(wrong_files.items(), lines, strict=True):
        assert f"error: FILE {path}: " in line
        assert REASONS[name] in line


def test_nothing_to_show(wrong_files, capsys):
    with pytest.raises(SystemExit) as end:
        inspect_weights.main(inspect_weights.parse_args([str(wrong_files["empty"])]))
    assert (end.value.code, capsys.readouterr().out) == (1, "")


def test_for_people(teacher, tmp_path, capsys):
    """A block of lines for every file, without what is not known; what a file says cannot steer the screen."""
    save_weights(tmp_path / "w.pt", teacher.state, model="DiT-T/2", num_classes=10, vae="none", source="a\x1b[2Jb\nc")
    inspect_weights.main(inspect_weights.parse_args([str(teacher.student), str(tmp_path / "w.pt")]))
    shown = capsys.readouterr().out
    first, second = shown.split("\n\n")
    assert first.splitlines()[:5] == [
        str(teacher.student),
        "  kind            pruned weights",
        "  family          DiT",
        "  model           DiT-T-D6/2",
        "  layers          6",
    ]
    assert "\n  kept layers     [0, 2, 4, 7, 9, 11]\n  pattern         1:2x6\n" in first
    assert "\n  latents         3 x 8 x 8\n  image size      8\n" in first
    assert "\n  gates inside    no\n  numbers         float32\n" in first
    assert "published" not in shown
    assert "\x1b" not in second
    assert "a\\x1b[2Jb\\nc" in second
