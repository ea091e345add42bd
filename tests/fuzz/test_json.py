"""What stands in JSON: facts beside weights, metadata of latents, config.json, sampling.json, metrics.jsonl."""

import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from engine.checkpoint import Weights, facts_path, read_facts
from engine.file_settings import read_latents, read_told
from engine.run_folder import RunFolder, find_difference, read_record
from engine.sample_folder import SampleFolder

from .inputs import EDITS, NUMBERS, ODD_JSON, changed, edit_bytes, json_files
from .limits import read_or_refuse

FACTS = {"model": "DiT-T-D6/2", "num_classes": 10, "vae": "none", "kept": [0, 2], "pattern": "1:2x6", "source": "a.pt"}
METADATA = {"image_size": 256, "vae": "ema", "num_classes": 1000, "shape": [4, 32, 32]}
SETTINGS = {"model": "DiT-T/2", "lr": 0.1, "betas": [0.9, 0.999], "clip_norm": "inf", "resume": None, "pattern": "1:2"}
CONFIG = {"settings": SETTINGS, "origins": {"lr": "typed"}, "environment": {"device": "cpu"}}
ODD_SETTINGS = st.sampled_from(["DiT-XL/2", "DiT-D99999999999/2", "MAR-D6+10", "kl16", 10, 10**30, True, 1.0, [], {}])
METRICS = st.lists(
    changed({"step": 1, "loss": 0.5}, {"step": 2, "loss": "inf"}, {"step": 40}, special=NUMBERS).map(json.dumps),
    max_size=5,
).map(lambda rows: "".join(row + "\n" for row in rows).encode())


@pytest.fixture(scope="module")
def weights(folder):
    """A file of weights, beside which facts may lie."""
    torch.save({"a": torch.zeros(1)}, folder / "a.pt")
    return folder / "a.pt"


def read_both(path):
    """All facts, and those of them that are settings."""
    return read_facts(path), read_told(Weights(path, "--ckpt"))


@given(data=json_files(FACTS, special=ODD_SETTINGS))
@example(data=b"[" * 100_000)
@example(data=b'{"model": "DiT-D99999999999/2"}')
@example(data=b'{"num_classes": true}')
def test_facts(part, weights, data):
    facts_path(weights).write_bytes(data)
    accepted, found = read_or_refuse("facts", read_both, weights)
    if accepted:
        facts, told = found
        assert isinstance(facts, dict)
        assert told.keys() <= {"model", "num_classes", "vae", "kept", "pattern"}
        assert type(told.get("num_classes", 1)) is int
        assert told.get("num_classes", 1) > 0
        assert all(isinstance(told.get(name, "a"), str) and told.get(name, "a") for name in ("model", "vae"))


@given(data=json_files(METADATA, special=ODD_SETTINGS))
@example(data=b"[" * 100_000)
def test_metadata(part, folder, data):
    (folder / "metadata.json").write_bytes(data)
    accepted, told = read_or_refuse("metadata", read_latents, folder)
    if accepted and told:
        assert told.keys() <= {"image_size", "vae", "num_classes"}
        assert isinstance(told.get("vae", ""), str)
        assert all(type(told[name]) is int and told[name] > 0 for name in told.keys() - {"vae"})


@given(data=json_files(CONFIG, SETTINGS, special=ODD_SETTINGS))
@example(data=b"[]")
@example(data=b'{"settings": null}')
@example(data=b"[" * 100_000)
def test_config(part, folder, data):
    path = folder / "config.json"
    path.write_bytes(data)
    accepted, found = read_or_refuse("config.json", read_record, path)
    assert accepted or str(path) in found
    if accepted:
        about = {"settings": SETTINGS, "origins": {}, "inputs": {"data_path": "0123"}}
        different = find_difference(folder, found, about)
        assert different is None or str(folder) in different
        same = all(found["settings"][name] == SETTINGS[name] for name in SETTINGS.keys() & found["settings"].keys())
        assert different or same or found["settings"]["resume"] != SETTINGS["resume"]


@given(data=json_files({"model": "DiT-T/2", "seed": 0, "vae": "none", "cfg_scale": 1.5}, special=ODD_SETTINGS))
@example(data=b"[]")
@example(data=b"[" * 100_000)
def test_sample_folder(part, folder, weights, data):
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "samples" / "sampling.json").write_bytes(data)
    samples = SampleFolder(folder, "samples", {"model": "DiT-T/2", "seed": 0}, 8)
    accepted, message = read_or_refuse("sampling.json", samples.prepare)
    samples.close()
    assert accepted or "sampl" in message
    if accepted:
        recorded = json.loads(data)
        assert all(recorded.get(name, value) == value for name, value in samples.settings.items())


def test_sample_folder_that_fits(folder):
    for _ in range(2):
        samples = SampleFolder(folder, "same", {"model": "DiT-T/2", "seed": 0}, 8)
        samples.prepare()
        samples.close()


@given(data=METRICS | st.builds(edit_bytes, METRICS, EDITS) | st.sampled_from(ODD_JSON), step=st.integers(-1, 50))
@example(data=b'{"step": 1}\n{"step": 3}\n', step=2)
@example(data=b'{"step": 1}\n{"st', step=2)
@example(data=b"[" * 100_000, step=2)
def test_metrics(part, folder, data, step):
    path = folder / "run" / "metrics.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    run = RunFolder(path.parent, {"settings": {}}, {})
    accepted, found = read_or_refuse("metrics.jsonl", run.drop_metrics_after, step)
    assert accepted or str(path) in found
    if accepted:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert all(row["step"] <= step for row in rows)
