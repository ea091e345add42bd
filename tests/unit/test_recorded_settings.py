"""What every script makes of its command line and files: settings recorded before they were resolved in one place.

Since then `compile` and `dense` depend on the device where they are not given: None.
"""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.checkpoint import save_state, save_weights
from families import create_model

RECORDED = Path(__file__).parent.parent / "golden" / "settings.json"
MODELS = {  # family -> teacher, gated, student, and an autoencoder that is not the family's usual one
    "DiT": ("DiT-T/2", "DiT-T-1-2", "DiT-T-D6/2", "mse"),
    "SiT": ("SiT-T/2", "SiT-T-1-2", "SiT-T-D6/2", "mse"),
    "MAR": ("MAR-T", "MAR-T-1-2", "MAR-T-D6", "none"),
}
KINDS = ("facts", "bare", "state", "latent-facts", "other-facts")
DATA = ("latents", "published")


def make_weights(folder, family):
    """Files of random weights of a teacher and a student, of every kind."""
    for role, name in zip(("teacher", "student"), MODELS[family][:3:2], strict=True):
        torch.manual_seed(0)
        net = create_model(name, input_size=8, in_channels=3, num_classes=10)
        state, facts = net.state_dict(), {"model": name, "num_classes": 10, "vae": "none", "source": None}
        save_weights(folder / f"{role}-facts.pt", state, **facts)
        torch.save(state, folder / f"{role}-bare.pt")
        save_state(folder / f"{role}-state.pt", {"model": state, "ema": state, "train_steps": 5}, **facts)
        encoded = create_model(name, num_classes=7).state_dict()
        save_weights(folder / f"{role}-latent-facts.safetensors", encoded, model=name, kept=[0, 1], pattern="1:2x6")
        save_weights(
            folder / f"{role}-other-facts.pt", encoded, **{**facts, "num_classes": 7, "vae": MODELS[family][3]}
        )


def make_data(folder):
    """Latents of 8 x 8 pixels: ours, which say what they are, and the published layout, which does not."""
    ours = folder / "latents"
    ours.mkdir()
    metadata = {"shape": [3, 8, 8], "images": 4, "num_classes": 9, "image_size": 8, "vae": "none", "scale": 1.0}
    (ours / "metadata.json").write_text(json.dumps(metadata))
    np.save(ours / "features.npy", np.zeros((4, 2, 3, 8, 8), np.float32))
    np.save(ours / "labels.npy", np.arange(4))
    np.save(ours / "status.npy", np.ones(4, np.uint8))
    for kind, array in (("features", np.zeros((2, 3, 8, 8), np.float32)), ("labels", np.array([1]))):
        (folder / "published" / f"x_{kind}").mkdir(parents=True)
        np.save(folder / "published" / f"x_{kind}" / "0.npy", array)


def command_lines():
    """{name of the case: (script, words)}: scripts x families x files, with and without --model; @ is the folder."""
    cases = {}
    for family, (teacher, gated, student, _) in MODELS.items():
        cases[f"extract_features {family}"] = f"--data-path @/pictures --model {teacher}"
        cases[f"extract_features {family} flags"] = (
            f"--data-path @/pictures --model {teacher} --vae none --image-size 8"
        )
        for script in ("train", "prune_by_learning"):
            name = gated if script == "prune_by_learning" else student
            cases[f"{script} {family} no file"] = f"--model {name} --data-path @/latents"
            cases[f"{script} {family} no file published"] = f"--model {name} --data-path @/published --vae none"
        for kind in KINDS:
            suffix = "safetensors" if kind == "latent-facts" else "pt"
            files = {role: f"@/{family}/{role}-{kind}.{suffix}" for role in ("teacher", "student")}
            for data in DATA:
                for model in ("", f"--model {student}"):
                    told = f"{family} {kind} {data}{' model' if model else ''}"
                    cases[f"train {told}"] = f"--load-weight {files['student']} --data-path @/{data} {model}"
                    cases[f"train_masked_kd {told}"] = (
                        f"--load-weight {files['student']} --data-path @/{data} {model} "
                        f"--load-teacher {files['teacher']} --teacher {teacher}"
                    )
            learn = f"--load-weight {files['teacher']} --data-path @/latents"
            cases[f"prune_by_learning {family} {kind}"] = f"{learn} --pattern 1:2"
            cases[f"prune_by_learning {family} {kind} model"] = f"{learn} --model {gated} --tau-range 3 1 --lr 0.5"
            for model in ("", f"--model {teacher}"):
                told = f"{family} {kind}{' model' if model else ''}"
                ckpt = f"--ckpt {files['teacher']} {model}"
                cases[f"prune_by_score {told}"] = f"{ckpt} --n-pruned 6 --data-path @/latents"
                cases[f"prune_by_score {told} published"] = f"{ckpt} --n-pruned 6 --data-path @/published"
                cases[f"prune_by_index {told}"] = f"{ckpt} --scheme bk-sdm"
                cases[f"sample {told}"] = f"{ckpt} --seed 3"
                cases[f"sample_ddp {told}"] = ckpt
                cases[f"sample_ddp {told} no-ema"] = f"{ckpt} --no-ema --vae none --num-classes 12"
    return {name: (name.split()[0], words) for name, words in cases.items()}


CASES = command_lines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    for family in MODELS:
        (folder / family).mkdir()
        make_weights(folder / family, family)
    make_data(folder)
    return folder


def resolve(folder, script, words):
    """Settings as JSON holds them, with @ for the folder."""
    settings = importlib.import_module(script).COMMAND.resolve(words.replace("@", str(folder)).split())
    return json.loads(json.dumps(settings.values).replace(str(folder), "@"))


@pytest.mark.parametrize("case", CASES)
def test_same_settings(folder, case):
    script, words = CASES[case]
    recorded = json.loads(RECORDED.read_text())[script]
    expected = recorded["usual"] | recorded["cases"][case]
    found = resolve(folder, script, words)
    assert {name: found[name] for name in expected} == expected
