"""Settings: in which order what is known of them counts, what is said of their origins, and what is refused."""

import importlib
import json
import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

import engine.checkpoint
from engine.checkpoint import save_weights
from engine.errors import InputError
from engine.settings import DEFAULT, TYPED
from families import create_model

TEACHERS = {"DiT": "DiT-T/2", "SiT": "SiT-T/2", "MAR": "MAR-T"}
STUDENTS = {"DiT": "DiT-T-D6/2", "SiT": "SiT-T-D6/2", "MAR": "MAR-T-D6"}


def resolve(script, *words):
    return importlib.import_module(script).COMMAND.resolve([str(word) for word in words])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of every family, <name>.pt with facts, <name>-bare.pt without, and latents of 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("files")
    for family in TEACHERS:
        for word, names in (("", STUDENTS), ("-teacher", TEACHERS)):
            state = create_model(names[family], input_size=16, in_channels=3, num_classes=10).state_dict()
            save_weights(folder / f"{family}{word}.pt", state, model=names[family], num_classes=10, vae="mse")
            torch.save(state, folder / f"{family}{word}-bare.pt")
    latents = folder / "latents"
    latents.mkdir()
    metadata = {"shape": [3, 8, 8], "num_classes": 7, "image_size": 8, "vae": "none"}
    (latents / "metadata.json").write_text(json.dumps(metadata))
    np.save(latents / "features.npy", np.zeros((4, 2, 3, 8, 8), np.float32))
    np.save(latents / "labels.npy", np.arange(4))
    np.save(latents / "status.npy", np.ones(4, np.uint8))
    return folder


def told(settings, *names):
    """(value, origin) of settings."""
    return [(getattr(settings, name), settings.origins[name]) for name in names]


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to fetch a file fails the test."""

    def fail(url, target, check=None):
        pytest.fail(f"fetches {url}")

    monkeypatch.setattr(engine.checkpoint, "download", fail)
    monkeypatch.setattr("engine.vae.download", fail)


def test_typed_beats_files(files):
    words = ["--num-classes", "12", "--image-size", "32", "--vae", "ema", "--lr", "0.5", "--model", "DiT-T/2"]
    found = resolve("train", "--load-weight", files / "DiT.pt", "--data-path", files / "latents", *words)
    names = ("num_classes", "image_size", "vae", "lr", "model")
    assert told(found, *names) == [(value, TYPED) for value in (12, 32, "ema", 0.5, "DiT-T/2")]


def test_files_beat_defaults(files):
    """Latents tell their size and autoencoder before the weights do, but their classes after them."""
    latents, weights = files / "latents", files / "DiT.pt"
    of_latents, of_facts = f"from {latents}/metadata.json", f"from {weights}.json"
    found = resolve("train", "--load-weight", weights, "--data-path", latents)
    assert told(found, "image_size", "vae") == [(8, of_latents), ("none", of_latents)]
    assert told(found, "num_classes", "model") == [(10, of_facts), ("DiT-T-D6/2", of_facts)]
    found = resolve("train", "--data-path", latents)
    assert told(found, "num_classes", "model") == [(7, of_latents), ("DiT-XL/2", DEFAULT)]
    found = resolve("train", "--load-weight", weights, "--data-path", files / "published")
    assert told(found, "vae", "image_size") == [("mse", of_facts), (128, f"from the shapes of {weights}")]


def test_family_beats_script(files):
    """MAR trained from scratch has rates of its own, and with weights to start from the script's."""
    data = ("--data-path", files / "latents")
    of_scratch = "MAR trained from scratch"
    found = resolve("train", "--model", "MAR-T", *data, "--epochs", 3)
    assert told(found, "lr", "clip_norm", "epochs") == [(8e-4, of_scratch), (3.0, of_scratch), (3, TYPED)]
    assert told(found, "mirror", "mask_ratio_min") == [(0.5, DEFAULT), (0.7, DEFAULT)]
    found = resolve("train", "--load-weight", files / "MAR.pt", "--vae", "kl16", *data)
    assert told(found, "lr", "clip_norm", "epochs") == [(2e-4, DEFAULT), (1.0, DEFAULT), (1400, DEFAULT)]
    found = resolve("train_masked_kd", "--model", "SiT-D14/2", *data)
    assert told(found, "beta", "teacher") == [(2e-4, "default of SiT"), ("SiT-XL/2", "default of SiT")]
    assert told(resolve("train_masked_kd", "--model", "SiT-D14/2", "--beta", 1, *data), "beta") == [(1.0, TYPED)]
    assert told(resolve("train_masked_kd", *data), "beta", "teacher") == [(1e-2, DEFAULT), ("DiT-XL/2", DEFAULT)]


def test_script_beats_table(files):
    data = ("--data-path", files / "latents")
    assert told(resolve("train", *data), "num_workers") == [(4, DEFAULT)]
    assert told(resolve("train_masked_kd", *data), "num_workers") == [(8, DEFAULT)]


def test_notable(files):
    """What is not a plain default is shown, in the order of the flags, and nothing else."""
    latents = files / "latents"
    of_latents = f"from {latents}/metadata.json"
    found = resolve("train", "--data-path", latents, "--lr", 0.5, "--model", "SiT-T/2", "--strict")
    assert found.notable() == [
        ("data_path", str(latents), TYPED),
        ("model", "SiT-T/2", TYPED),
        ("vae", "none", of_latents),
        ("image_size", 8, of_latents),
        ("num_classes", 7, of_latents),
        ("clip_norm", float("inf"), "SiT trained from scratch"),
        ("lr", 0.5, TYPED),
        ("min_lr", 1e-4, "SiT trained from scratch"),
        ("strict", True, TYPED),
    ]
    assert found.unused == ("--strict",)


def test_nobody_writes_into_settings(files):
    found = resolve("train", "--data-path", files / "latents")
    with pytest.raises(FrozenInstanceError):
        found.lr = 1
    with pytest.raises(FrozenInstanceError):
        found.unheard_of = 1
    with pytest.raises(AttributeError, match="no setting is called 'unheard_of'"):
        found.unheard_of  # noqa: B018
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize(
    ("held", "named"), [("DiT", "SiT"), ("SiT", "DiT"), ("MAR", "DiT"), ("DiT", "MAR"), ("SiT", "MAR")]
)
def test_facts_of_another_family(files, held, named):
    """The message names both models, and both flags."""
    data, other = ("--data-path", files / "latents"), STUDENTS[named]
    words = rf"--model {other}: is a {named}, but %s .*{held}\.pt holds a {held} \({STUDENTS[held]}, .*take a model of"
    with pytest.raises(InputError, match=words % "--load-weight"):
        resolve("train", "--load-weight", files / f"{held}.pt", "--model", other, *data)
    with pytest.raises(InputError, match=words % "--ckpt"):
        resolve("sample", "--ckpt", files / f"{held}.pt", "--model", other)
    teacher = TEACHERS[named]
    words = rf"--teacher {teacher}: is a {named}, but --load-teacher .* holds a {held} \({TEACHERS[held]}, "
    with pytest.raises(InputError, match=words):
        resolve("train_masked_kd", "--load-teacher", files / f"{held}-teacher.pt", "--teacher", teacher, *data)


def test_another_model_of_the_family(files):
    """Facts do not refuse it: whether the weights fit is seen when the network is known."""
    found = resolve("sample", "--ckpt", files / "SiT.pt", "--model", "SiT-S/2")
    assert told(found, "model") == [("SiT-S/2", TYPED)]


@pytest.mark.parametrize("recorded", ["DiT-Q/2", 3, ["DiT-T/2"]])
def test_facts_with_no_model(tmp_path, files, recorded):
    path = tmp_path / "w.pt"
    path.write_bytes((files / "DiT-bare.pt").read_bytes())
    (tmp_path / "w.pt.json").write_text(json.dumps({"model": recorded}))
    with pytest.raises(InputError, match=r"--ckpt .*w\.pt\.json: .*(is not a model name|expected a name)"):
        resolve("sample", "--ckpt", path)


def test_weights_without_facts(files):
    """The shapes of a DiT and of a SiT are the same: the origin says which was assumed, and what to do."""
    of_shapes = f"from the shapes of {files / 'SiT-bare.pt'}"
    found = resolve("sample", "--ckpt", files / "SiT-bare.pt")
    assumed = f"{of_shapes}, assumed to be a DiT's; for a SiT say --model"
    assert told(found, "model", "num_classes") == [("DiT-T-D6/2", assumed), (10, of_shapes)]
    found = resolve("sample", "--ckpt", files / "SiT-bare.pt", "--model", "SiT-T-D6/2")
    assert told(found, "model", "image_size") == [("SiT-T-D6/2", TYPED), (128, of_shapes)]
    found = resolve("sample", "--ckpt", files / "MAR-bare.pt")
    ((model, origin),) = told(found, "model")
    assert model == "MAR-T-D6"
    assert origin.startswith(f"from the shapes of {files / 'MAR-bare.pt'}")
    assert "DiT" not in origin
    assert "SiT" not in origin


@pytest.mark.parametrize("family", TEACHERS)
def test_teacher_from_its_weights(files, family):
    """Without --teacher; what else these weights tell does not count."""
    data = ("--data-path", files / "latents")
    model = ("--model", STUDENTS[family])
    facts, bare = files / f"{family}-teacher.pt", files / f"{family}-teacher-bare.pt"
    found = resolve("train_masked_kd", "--load-teacher", facts, *model, *data)
    assert told(found, "teacher") == [(TEACHERS[family], f"from {facts}.json")]
    assert told(found, "num_classes", "vae") == [
        (value, f"from {files}/latents/metadata.json") for value in (7, "none")
    ]
    assert found.weights.keys() == {"load_teacher"}
    found = resolve("train_masked_kd", "--load-teacher", bare, *model, *data, "--teacher", TEACHERS[family])
    assert told(found, "teacher") == [(TEACHERS[family], TYPED)]


def test_teacher_without_facts(files):
    data = ("--model", "DiT-T-D6/2", "--data-path", files / "latents")
    found = resolve("train_masked_kd", "--load-teacher", files / "DiT-teacher-bare.pt", *data)
    ((teacher, origin),) = told(found, "teacher")
    assert teacher == "DiT-T/2"
    assert origin.startswith(f"from the shapes of {files / 'DiT-teacher-bare.pt'}, assumed to be a DiT's")


def test_weights_are_opened_once(files, monkeypatch, no_network):
    opened, load = [], torch.load

    def count(path, **options):
        opened.append(str(path))
        return load(path, **options)

    monkeypatch.setattr(torch, "load", count)
    student, teacher = files / "DiT.pt", files / "DiT-teacher-bare.pt"
    words = ("--load-weight", student, "--load-teacher", teacher, "--data-path", files / "latents")
    found = resolve("train_masked_kd", *words)
    assert opened == [str(student), str(teacher)]
    assert found.weights["load_weight"].state.keys() == found.weights["load_weight"].file.shapes.keys()
    found.weights["load_teacher"].check_fit("DiT-T/2", {"input_size": 16, "in_channels": 3, "num_classes": 10})
    assert opened == [str(student), str(teacher)]


def test_nothing_is_fetched(tmp_path, monkeypatch, no_network):
    """A published file tells its settings by its name."""
    monkeypatch.chdir(tmp_path)
    found = resolve("sample", "--image-size", 512)
    origin = "the published DiT-XL-2-512x512.pt"
    assert told(found, "model", "image_size") == [("DiT-XL/2", origin), (512, TYPED)]
    found = resolve("sample", "--ckpt", "TinyDiT-D14-MaskedKD-500K.pt")
    origin = "the published TinyDiT-D14-MaskedKD-500K.pt"
    assert told(found, "model", "image_size", "vae") == [("DiT-D14/2", origin), (256, origin), ("ema", origin)]
    with pytest.raises(InputError, match=r"--ckpt: missing; give weights of --model SiT-XL/2"):
        resolve("sample", "--model", "SiT-XL/2")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"model": 3}, "model is 3; expected a name"),
        ({"model": "DiT-Q/2"}, "'DiT-Q/2' is not a model name"),
        ({"model": "DiT-T/2", "num_classes": "ten"}, "num_classes is 'ten'; expected a whole number from 1"),
        ({"model": "DiT-T/2", "num_classes": 0}, "num_classes is 0; expected a whole number from 1"),
        ({"model": "DiT-T/2", "num_classes": True}, "num_classes is True; expected a whole number from 1"),
        ({"model": "DiT-T/2", "num_classes": -5}, "num_classes is -5; expected a whole number from 1"),
        ({"model": "DiT-T/2", "vae": ["none"]}, r"vae is \['none'\]; expected a name"),
    ],
)
def test_impossible_facts(tmp_path, facts, message):
    save_weights(tmp_path / "w.pt", {"weight": torch.zeros(1)}, **facts)
    with pytest.raises(InputError, match=rf"--ckpt {tmp_path}/w\.pt\.json: .*{message}"):
        importlib.import_module("sample").COMMAND.resolve(["--ckpt", str(tmp_path / "w.pt")])


def test_assumption_about_a_teacher(tmp_path):
    """It names the flag that would settle it."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in create_model("SiT-T/2", input_size=8).state_dict().items()}
    torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "bare.pt")
    words = ["--load-teacher", str(tmp_path / "bare.pt"), "--data-path", str(tmp_path)]
    origin = importlib.import_module("train_masked_kd").COMMAND.resolve(words).origins["teacher"]
    assert origin.endswith("assumed to be a DiT's; for a SiT say --teacher")


@pytest.mark.parametrize(("name", "value"), [("image_size", "8"), ("vae", 3), ("num_classes", 0)])
def test_impossible_metadata(tmp_path, name, value):
    metadata = {"image_size": 8, "vae": "none", "num_classes": 3, name: value}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(InputError, match=rf"--data-path {tmp_path}/metadata\.json: {name} is {value!r}; expected a"):
        resolve("train", "--data-path", tmp_path)


def test_lists_are_copies(tmp_path):
    settings = resolve("train", "--data-path", tmp_path)
    settings.betas[0] = 5
    assert resolve("train", "--data-path", tmp_path).betas == [0.9, 0.999]
