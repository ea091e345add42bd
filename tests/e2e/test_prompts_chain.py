"""The whole chain for pipelines of diffusers that draw what a prompt says: six tiny ones, on 24 captioned pictures."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from disturbed import same, without_times
from PIL import Image
from safetensors.torch import load_file

import sample
from diffusion.prompts import to_layout
from engine.checkpoint import read_facts
from engine.cli import run_script as run_as_script
from engine.errors import InputError
from engine.sampling import ImageDraws
from engine.weight_files import read_file
from families import fixed_layers, model_config, stack_names
from models_diffusers import make_network
from pruning.surgery import keep_layers

reason = "needs the packages of requirements-prompts.txt, and tests/diffusers_classes.py is for a newer diffusers"
tiny_pipelines = pytest.importorskip("tiny_pipelines", reason=reason, exc_type=ImportError)
PIPELINES, SIZES, draw, open_pipeline = (
    getattr(tiny_pipelines, name) for name in ("PIPELINES", "SIZES", "draw", "open_pipeline")
)

TRAIN = ["--epochs", "1", "--global-batch-size", "6", "--num-workers", "0", "--log-every", "1"]  # 4 steps
BOTH = ["pixart", "flux"]  # one stack and noise prediction; two stacks and flow matching
STACKS = "transformer_blocks=1:2,single_transformer_blocks=1:2"
PROMPTS = ["a red cat", "two dogs"]


CAPTIONS = [f"{('red', 'blue')[i % 2]} cat {'x' * (i % 5)}".strip() for i in range(24)]  # of ten kinds


def write_pictures(folder, size):
    """24 pictures of noise; captions in metadata.jsonl for some, in a file beside them for the others."""
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for i, caption in enumerate(CAPTIONS):
        path = folder / f"{i:02d}.png"
        Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(path)
        if i % 3:
            lines.append(json.dumps({"file_name": path.name, "text": caption}))
        else:
            path.with_suffix(".txt").write_text(caption)
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def make_chain(tmp_path_factory, run_script):
    """A pipeline of a name, captioned pictures and their latents, and what was cut out of it by learning."""

    @cache
    def make(name):
        folder, size = tmp_path_factory.mktemp(name), SIZES[name]
        pipeline = tiny_pipelines.make_pipeline(name, folder / "pipeline")
        pictures = write_pictures(folder / "pictures", size)
        latents, pruned, whole = folder / "latents", folder / "pruned", folder / "whole"
        words = ["--model", pipeline, "--data-path", pictures, "--features-path", latents, "--image-size", size]
        run_script("extract_features", *words, "--num-workers", 0)
        pattern = STACKS if name == "flux" else "1:2"
        learn = ["--model", pipeline, "--pattern", pattern, "--data-path", latents, "--delta-w", "--lora", *TRAIN]
        words = [*learn, "--gate-lr", 0.05, "--results-dir", folder / "runs", "--save-model", pruned]
        run_script("prune_by_learning", *words, "--export-pipeline", whole)
        state = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
        made = {"name": name, "size": size, "pattern": pattern, "learn": learn, "state": state}
        files = {"pipeline": pipeline, "pictures": pictures, "latents": latents, "pruned": pruned, "whole": whole}
        return SimpleNamespace(**made, **files, runs=folder / "runs", names=stack_names(str(pipeline)))

    return make


@pytest.fixture(scope="session", params=list(PIPELINES))
def chain(request, make_chain):
    """Every pipeline in turn."""
    return make_chain(request.param)


def depth_of(chain):
    return 8 if chain.name == "flux" else 4


def read_cut(folder):
    """The state dict in the folder of a pruned transformer."""
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def open_cut(folder):
    """What diffusers opens in it."""
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder).eval()


def check_cut(chain, folder, same_weights, kept=None):
    """A folder holds the layers that the facts beside it say, `kept` if given; returns the facts."""
    facts = read_facts(folder)
    assert kept is None or facts["kept"] == kept
    assert facts["source"] == str(chain.pipeline)
    assert facts["model"] == str(folder)
    same_weights(read_cut(folder), keep_layers(chain.state, facts["kept"], chain.names))
    same_weights(open_cut(folder).state_dict(), read_cut(folder))
    return facts


def rows_of(folder):
    return without_times(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def learn(run_script, chain, results, *words):
    """Learn gates with more words; returns the run folder."""
    run_script("prune_by_learning", *chain.learn, "--results-dir", results, "--save-model", results / "out", *words)
    (folder,) = (f for f in results.iterdir() if (f / "metrics.jsonl").is_file())
    return folder


def read_last(folder, step=4):
    return read_file(folder / "checkpoints" / f"{step:07d}.pt", "--resume")


def test_extraction(chain):
    """Latents of all pictures in the order of their names, and the captions as classes, each once."""
    metadata = json.loads((chain.latents / "metadata.json").read_text())
    features, labels = (np.load(chain.latents / f"{name}.npy") for name in ("features", "labels"))
    assert features.shape == (24, 2, *metadata["shape"])
    assert len(np.unique(features[:, 0])) > 24
    assert [metadata["classes"][label] for label in labels] == CAPTIONS
    assert len(metadata["classes"]) == metadata["num_classes"] == 10
    call = json.loads((chain.latents / "prompts" / "call.json").read_text())
    assert call["count"] == 10
    assert call["network"] == model_config(str(chain.pipeline))["class_name"]


@pytest.mark.parametrize("name", BOTH)
def test_extraction_again(make_chain, run_script, name):
    """A second call leaves all files alone."""
    chain = make_chain(name)
    before = {f: f.stat().st_mtime_ns for f in chain.latents.rglob("*.npy")}
    words = ["--model", chain.pipeline, "--data-path", chain.pictures, "--features-path", chain.latents]
    run_script("extract_features", *words, "--image-size", chain.size, "--num-workers", 0)
    assert {f: f.stat().st_mtime_ns for f in chain.latents.rglob("*.npy")} == before
    assert len(before) > 4


def test_learning(chain, same_weights):
    """A layer of every pair stays, cut out of the original; diffusers opens the folder as the same class."""
    facts = check_cut(chain, chain.pruned, same_weights)
    assert [layer // 2 for layer in facts["kept"]] == list(range(depth_of(chain) // 2))
    assert set(fixed_layers(str(chain.pipeline))) <= set(facts["kept"])
    opened = open_cut(chain.pruned)
    assert type(opened).__name__ == model_config(str(chain.pipeline))["class_name"]
    assert [len(getattr(opened, name)) for name in chain.names] == [2] * len(chain.names)
    (folder,) = (f for f in chain.runs.iterdir() if f.name.startswith("learn_mask"))
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(5))
    assert all(np.isfinite(row["loss"]) for row in rows[1:])
    assert rows[-1]["kept"] == facts["kept"]


def with_gates(chain, kept):
    """Our network with all layers, whose gates keep these ones alone, in place of diffusers'."""
    config = model_config(str(chain.pipeline))
    net = make_network(**config, groups=[(1, 2)] * (depth_of(chain) // 2))
    net.load_state_dict({**net.state_dict(), **chain.state})
    with torch.no_grad():
        for g, logits in enumerate(net.gumbel_gates):
            table = net.gumbel_gates.get_buffer(f"candidates_{g}")
            chosen = [2 * g + row.argmax().item() in kept for row in table]
            logits[0, chosen.index(True)] = 1.0
    return net.eval()


def test_pictures_are_the_same(chain):
    """Of the pipeline with our masked network, with what diffusers opens, and of the exported pipeline."""
    kept = read_facts(chain.pruned)["kept"]
    pipeline = open_pipeline(chain.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    whole = draw(pipeline, PROMPTS, chain.size)
    pipeline.transformer = with_gates(chain, kept)
    masked = draw(pipeline, PROMPTS, chain.size)
    pipeline.transformer = open_cut(chain.pruned)
    cut = draw(pipeline, PROMPTS, chain.size)
    assert masked.std() > 0.01
    assert (masked - whole).abs().max() > 1e-3
    assert (masked - cut).abs().max() <= 1e-6
    exported = open_pipeline(chain.whole)
    exported.set_progress_bar_config(disable=True)
    assert (draw(exported, PROMPTS, chain.size) - cut).abs().max() <= 1e-6


def test_exported_pipeline(chain):
    """Is opened by its own class from the folder alone, and has every other file of the original."""
    kind = type(open_pipeline(chain.pipeline))
    opened = kind.from_pretrained(chain.whole)
    assert [len(getattr(opened.transformer, name)) for name in chain.names] == [2] * len(chain.names)

    def others(folder):
        paths = (path for path in folder.rglob("*") if path.is_file() and "transformer" not in path.parts)
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    assert others(chain.whole) == others(chain.pipeline)


SCORES = ["--criterion block-influence", "--criterion sensitivity", "--search 4", "--search 4 --search-for highest"]


@pytest.mark.parametrize("choice", SCORES)
def test_scores(chain, tmp_path, run_script, same_weights, choice):
    """Halves of every pair by a criterion, and the lowest or highest loss of a few choices."""
    out = tmp_path / "cut"
    words = ["--ckpt", chain.pipeline, "--pattern", chain.pattern, "--nsamples", 16, "--batch-size", 8]
    run_script("prune_by_score", *words, "--data-path", chain.latents, "--save-model", out, *choice.split())
    facts = check_cut(chain, out, same_weights)
    assert [layer // 2 for layer in facts["kept"]] == list(range(depth_of(chain) // 2))
    assert set(fixed_layers(str(chain.pipeline))) <= set(facts["kept"])
    if "search" in choice:
        assert facts["losses"]["lowest"] <= facts["losses"]["median"] <= facts["losses"]["highest"]
        assert facts["losses"]["lowest"] < facts["losses"]["highest"]
        assert facts["choices"] == (2 if chain.name == "sd3" else 4)  # its last layer stays
    else:
        assert len(facts["scores"]) == depth_of(chain)
        assert len(set(facts["scores"])) == depth_of(chain)


def test_scores_of_any_layers(chain, tmp_path, run_script, same_weights):
    """Without a pattern the lowest score goes; never a layer that has to stay."""
    out = tmp_path / "cut"
    words = ["--ckpt", chain.pipeline, "--n-pruned", 1, "--nsamples", 8, "--batch-size", 8]
    run_script("prune_by_score", *words, "--data-path", chain.latents, "--save-model", out)
    facts = check_cut(chain, out, same_weights)
    (gone,) = set(range(depth_of(chain))) - set(facts["kept"])
    candidates = {layer: score for layer, score in enumerate(facts["scores"]) if layer in facts["kept"]}
    others = set(candidates) - set(fixed_layers(str(chain.pipeline))) - {depth_of(chain) - 1}
    assert facts["scores"][gone] >= max(candidates[layer] for layer in others)  # similarity of input and output


def test_index(chain, tmp_path, run_script, same_weights):
    """The fixed scheme under the same pattern, and any layers that are named."""
    out = tmp_path / "cut"
    for choice, kept in (
        (["--scheme", "bk-sdm", "--pattern", chain.pattern], [0, 2, 5, 7] if chain.name == "flux" else [0, 3]),
        (["--kept-indices", "1,6,7" if chain.name == "flux" else "1,3"], [1, 6, 7] if chain.name == "flux" else [1, 3]),
    ):
        run_script("prune_by_index", "--ckpt", chain.pipeline, *choice, "--save-model", out)
        check_cut(chain, out, same_weights, kept)


def test_training(chain, tmp_path, run_script):
    """Of the pruned folder, which tells model, autoencoder and pipeline: every weight that is used moves."""
    words = ["--data-path", chain.latents, "--results-dir", tmp_path, *TRAIN]
    args = run_script("train", "--load-weight", chain.pruned, *words)
    assert args.model == str(chain.pruned)
    assert args.vae == str(chain.pipeline / "vae")
    (folder,) = tmp_path.iterdir()
    assert all(np.isfinite(row["loss"]) for row in rows_of(folder))
    start, state = read_cut(chain.pruned), read_last(folder)["model"]
    assert start.keys() == state.keys()
    moved = [key for key in start if not torch.equal(start[key], state[key])]
    weights = [key for key in start if "attn" in key and key.endswith("to_q.weight")]
    assert weights
    assert set(weights) <= set(moved)


def test_masked_kd(chain, tmp_path, run_script):
    """Layers are paired by groups, in every stack; features count in what streams they have."""
    words = ["--load-weight", chain.pruned, "--load-teacher", chain.pipeline, "--data-path", chain.latents]
    args = run_script("train_masked_kd", *words, "--results-dir", tmp_path, *TRAIN)
    assert args.teacher == str(chain.pipeline)
    (folder,) = tmp_path.iterdir()
    rows = [row for row in rows_of(folder) if "loss" in row]
    assert len(rows) == 4
    for row in rows:
        assert row["feat_loss"] > 0
        assert row["kd_loss"] > 0
        parts = 0.9 * row["kd_loss"] + 0.1 * row["gt"] + row["beta"] * row["feat_loss"]
        assert row["loss"] == pytest.approx(parts, rel=1e-4)
    pairs = [(i, 2 * i + 1) for i in range(depth_of(chain) // 2)]
    assert f"layer pairs (student, teacher): {pairs}" in (folder / "log.txt").read_text()


def as_pictures(grid, size):
    """Pictures (n, 3, size, size) from 0 to 1 in one row of a grid."""
    pixels = torch.from_numpy(np.array(Image.open(grid))).permute(2, 0, 1) / 255
    assert pixels.shape[1] == size + 4
    return torch.stack([pixels[:, 2:-2, start : start + size] for start in range(2, pixels.shape[2], size + 2)])


def ask_pipeline(chain, transformer, prompts, steps, guidance, seed):
    """What the pipeline itself makes of prompts and of our noise."""
    pipeline = open_pipeline(chain.pipeline)
    pipeline.transformer = transformer
    pipeline.set_progress_bar_config(disable=True)
    shape = json.loads((chain.latents / "metadata.json").read_text())["shape"]
    noise = ImageDraws(seed, range(len(prompts)), shape, "cpu").start_noise()
    layout = {"flux": "tokens", "qwen": "tokens", "wan": "frames"}.get(chain.name, "grid")
    if chain.name == "qwen":
        asked = {"true_cfg_scale": guidance, "negative_prompt": [""] * len(prompts)}
    else:
        asked = {"guidance_scale": guidance}
    accepted = inspect.signature(type(pipeline).__call__).parameters
    asked |= {key: value for key, value in tiny_pipelines.EXTRAS.items() if key in accepted}
    pictures = pipeline(
        prompt=prompts,
        latents=to_layout(noise, layout),
        height=chain.size,
        width=chain.size,
        num_inference_steps=steps,
        output_type="pt",
        **asked,
    )[0]
    return pictures[:, 0] if pictures.ndim == 5 else pictures


def test_sample(chain, tmp_path, run_script):
    """Pictures of prompts, which are those of the pipeline with the pruned network and the same noise."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["--ckpt", chain.pruned, "--prompts", tmp_path / "prompts.txt", "--image-size", chain.size]
    words += ["--num-sampling-steps", 3, "--cfg-scale", 3, "--seed", 5, "--output", tmp_path / "grid.png"]
    run_script("sample", *words, "--labels", "0,1")
    found = as_pictures(tmp_path / "grid.png", chain.size)
    expected = ask_pipeline(chain, open_cut(chain.pruned), PROMPTS, 3, 3.0, 5)
    assert found.std() > 0.01
    assert (found - expected).abs().max() <= 1.01 / 255
    words[3] = "a red cat"
    run_script("sample", *words[:-1], tmp_path / "one.png", "--labels", "0")
    assert (as_pictures(tmp_path / "one.png", chain.size)[0] - found[0]).abs().max() <= 1.01 / 255


@pytest.mark.parametrize("name", BOTH)
def test_sample_of_a_training_state(make_chain, tmp_path, run_script, name):
    """A checkpoint knows the folder it was trained from, and that the pipeline."""
    chain = make_chain(name)
    words = ["--data-path", chain.latents, "--results-dir", tmp_path, *TRAIN]
    run_script("train", "--load-weight", chain.pruned, *words)
    (state,) = tmp_path.glob("*/checkpoints/*.pt")
    out = tmp_path / "grid.png"
    words = ["--ckpt", state, "--prompts", "a red cat", "--num-sampling-steps", 2, "--image-size", chain.size]
    run_script("sample", *words, "--output", out)
    assert len(np.unique(np.asarray(Image.open(out)))) > 2


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("script", ["prune_by_learning", "train", "train_masked_kd"])
def test_resume(make_chain, tmp_path, run_script, script, name):
    """Four steps are two steps and two more, to the bit: weights, averages, optimizer and metrics."""
    chain = make_chain(name)
    words = {
        "prune_by_learning": [*chain.learn, "--save-model", tmp_path / "out"],
        "train": ["--load-weight", chain.pruned, "--data-path", chain.latents, *TRAIN],
        "train_masked_kd": [
            *("--load-weight", chain.pruned, "--load-teacher", chain.pipeline, "--data-path", chain.latents, *TRAIN)
        ],
    }[script]
    words += ["--results-dir", tmp_path, "--ckpt-every", 2]
    run_script(script, *words)
    (folder,) = (f for f in tmp_path.iterdir() if (f / "metrics.jsonl").is_file())
    whole, rows = read_last(folder), rows_of(folder)
    (folder / "checkpoints" / "0000004.pt").unlink()
    run_script(script, *words)
    again = read_last(folder)
    assert "resumed from" in (folder / "log.txt").read_text()
    assert rows_of(folder) == rows
    for part in ("model", "ema", "opt", "train_steps"):
        assert same(again[part], whole[part]), part
    assert not same(read_last(folder, 2)["model"], whole["model"])


def compare_states(found, expected, limit):
    """Largest difference of gates and adapters, relative to how far these have moved."""
    assert found.keys() == expected.keys()
    trained = [key for key in expected if "gumbel_gates" in key or "lora" in key]
    assert any("gumbel_gates" in key for key in trained)
    for key in trained:
        gap = (found[key] - expected[key]).abs().max().item()
        assert gap <= limit, (key, gap)


@pytest.mark.parametrize("name", BOTH)
def test_sparse_form_learns_the_same(make_chain, tmp_path, run_script, name):
    """As blending all samples, in a few steps; and they do move."""
    chain, found = make_chain(name), {}
    for form in ("--dense", "--no-dense"):
        folder = learn(run_script, chain, tmp_path / form, form, "--gate-lr", 0.01)
        found[form] = read_last(folder)["model"], rows_of(folder)
        assert form.removeprefix("--").replace("no-dense", "sparse") in (folder / "log.txt").read_text()
    (sparse, few), (dense, all_rows) = found["--no-dense"], found["--dense"]
    compare_states(sparse, dense, 1e-4)
    assert (dense["gumbel_gates.0"] - 0.02).abs().max() > 1e-2
    for a, b in zip(few[1:], all_rows[1:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("name", BOTH)
def test_grad_checkpointing_learns_the_same(make_chain, tmp_path, run_script, name):
    chain = make_chain(name)
    plain = learn(run_script, chain, tmp_path / "plain")
    again = learn(run_script, chain, tmp_path / "again", "--grad-checkpointing")
    assert rows_of(again) == rows_of(plain)
    compare_states(read_last(again)["model"], read_last(plain)["model"], 1e-7)


def check_half(chain, folder, run_script, same_weights, learn):
    """Losses in bfloat16 near those of float32, and weights that are as they were.

    Flux and Qwen round the time to that precision, as their pipelines do, which a network of random weights notices.
    """
    words = ["--precision", "bf16", "--results-dir", folder, "--save-model", folder / "out"]
    run_script("prune_by_learning", *learn, *words)
    check_cut(chain, folder / "out", same_weights)
    (mine,) = (f for f in folder.iterdir() if (f / "metrics.jsonl").is_file())
    (usual,) = (f for f in chain.runs.iterdir() if f.name.startswith("learn_mask"))
    first, expected = rows_of(mine)[1], rows_of(usual)[1]
    assert first["loss"] == pytest.approx(expected["loss"], rel=0.15 if chain.name in ("flux", "qwen") else 0.01)
    assert first["grad_norm"] != expected["grad_norm"]


def test_half_precision(chain, tmp_path, run_script, same_weights):
    check_half(chain, tmp_path, run_script, same_weights, chain.learn)


@pytest.mark.parametrize("name", BOTH)
def test_half_precision_of_a_full_update(make_chain, tmp_path, run_script, same_weights, name):
    chain = make_chain(name)
    check_half(chain, tmp_path, run_script, same_weights, [word for word in chain.learn if word != "--lora"])


@pytest.mark.parametrize("name", BOTH)
def test_target_of_the_whole_network(make_chain, tmp_path, run_script, name):
    """Gates learn from pairs of choices what the whole network predicts."""
    folder = learn(run_script, make_chain(name), tmp_path, "--gate-gradient", "pairs", "--target", "teacher")
    rows = rows_of(folder)[1:]
    assert all(row["kd_loss"] > 0 for row in rows)
    assert all(row["loss"] == pytest.approx(row["kd_loss"], rel=1e-4) for row in rows)


@pytest.mark.parametrize("name", ["pixart", "qwen"])
def test_pictures_while_it_trains(make_chain, tmp_path, run_script, name):
    """--sample-every draws the captions of the data, and held-out losses are measured."""
    chain = make_chain(name)
    words = ["--load-weight", chain.pruned, "--data-path", chain.latents, "--results-dir", tmp_path, *TRAIN]
    words += ["--sample-every", 2, "--num-sampling-steps", 2, "--eval-split", 6, "--eval-every", 2]
    run_script("train", *words)
    (folder,) = tmp_path.iterdir()
    pictures = sorted(path.name for path in (folder / "samples").iterdir())
    assert pictures == ["0000000.png", "0000002.png", "0000003.png"]
    assert Image.open(folder / "samples" / "0000002.png").size == (4 * (chain.size + 2) + 2, 2 * (chain.size + 2) + 2)
    log = (folder / "log.txt").read_text()
    assert "no picture" not in log
    assert log.count("held-out loss") == 3


BOTH_RUNS = """
import json, sys
from pathlib import Path
sys.path[:0] = {paths}
import torch
from in_turn import main
from engine.cli import launch
from engine.trainer import Trainer

gather = Trainer.gather_weights

def gather_and_write(self):
    state = {{name: p.detach().clone() for name, p in self.net.named_parameters()}}
    torch.save(state, Path({folder!r}) / f"{{len(state)}}-{{self.run.rank}}.pt")
    return gather(self)

Trainer.gather_weights = gather_and_write
launch(main, lambda: json.loads(Path(sys.argv[1]).read_text()))
"""


def test_two_processes(launch, make_chain, tmp_path, root, same_weights):
    """Both end with the same weights, in one launch for two pipelines; blocks that no sample needs hold nobody up."""
    commands, chains = [], [make_chain(name) for name in BOTH]
    for chain in chains:
        words = [*chain.learn, "--results-dir", tmp_path / chain.name, "--save-model", tmp_path / chain.name / "out"]
        commands.append(["prune_by_learning", *map(str, words)])
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    paths = [str(root), str(root / "tests" / "e2e")]
    (tmp_path / "both.py").write_text(BOTH_RUNS.format(paths=paths, folder=str(tmp_path)))
    result = launch(2, tmp_path / "both", tmp_path / "commands.json")
    assert result.returncode == 0, result.stderr[-3000:]
    written = sorted(tmp_path.glob("*.pt"))
    assert len(written) == 4
    for first, second in zip(written[::2], written[1::2], strict=True):
        assert first.name.replace("-0", "-1") == second.name
        same_weights(torch.load(first), torch.load(second))
    for chain in chains:
        check_cut(chain, tmp_path / chain.name / "out", same_weights)
        (folder,) = (f for f in (tmp_path / chain.name).iterdir() if (f / "log.txt").is_file())
        assert "2 process(es)" in (folder / "log.txt").read_text()
        assert all(np.isfinite(row["loss"]) for row in rows_of(folder)[1:])
        trained = read_last(folder)["model"]
        assert any(torch.any(value) for key, value in trained.items() if key.endswith("lora_b.weight"))


def refuse(capsys, script, words):
    """What a script answers: one line, no traceback."""
    import importlib

    module = importlib.import_module(script)
    capsys.readouterr()
    status = run_as_script(module.main, lambda: module.parse_args([str(word) for word in words]))
    shown = capsys.readouterr().err.strip().splitlines()
    assert status == 1
    lines = [line for line in shown if ": error: " in line]
    assert len(lines) == 1, shown
    assert not [line for line in shown if "Traceback" in line]
    return lines[0].partition(": error: ")[2]


def test_refused_prompts_of_another_pipeline(make_chain, tmp_path, capsys):
    pixart, sana = make_chain("pixart"), make_chain("sana")
    words = [*pixart.learn, "--results-dir", tmp_path, "--save-model", tmp_path / "out"]
    words[words.index(pixart.latents)] = sana.latents
    told = refuse(capsys, "prune_by_learning", words)
    assert told.startswith(f"--data-path {sana.latents}")
    assert "SanaTransformer2DModel" in told
    assert "PixArtTransformer2DModel" in told
    assert not list(tmp_path.iterdir())


def test_refused_latents_without_prompts(make_chain, tmp_path, capsys):
    chain = make_chain("pixart")
    latents = shutil.copytree(chain.latents, tmp_path / "latents")
    words = [*chain.learn, "--results-dir", tmp_path / "runs", "--save-model", tmp_path / "out"]
    words[words.index(chain.latents)] = latents
    (latents / "prompts" / "call.json").write_text("{")
    assert f"--data-path {latents}" in refuse(capsys, "prune_by_learning", words)
    shutil.rmtree(latents / "prompts")
    told = refuse(capsys, "prune_by_learning", words)
    assert f"--data-path {latents}" in told
    assert "no prompts" in told
    assert not (tmp_path / "runs").exists()


def test_refused_transformer_alone(make_chain, tmp_path, capsys):
    """Of which nobody knows the encoders: latents cannot be made with it."""
    chain = make_chain("pixart")
    alone = shutil.copytree(chain.pipeline / "transformer", tmp_path / "alone")
    words = ["--model", alone, "--data-path", chain.pictures, "--features-path", tmp_path / "latents"]
    words += ["--vae", chain.pipeline / "vae", "--image-size", chain.size, "--num-workers", 0]
    told = refuse(capsys, "extract_features", words)
    assert told.startswith(f"--model {alone}: ")
    assert "transformer alone" in told


def test_refused_class(make_chain, tmp_path, capsys):
    """Latte has two lists of blocks of one depth: refused with that reason, whatever is asked."""
    latte = tiny_pipelines.build("LatteTransformer3DModel")
    latte.save_pretrained(tmp_path / "latte")
    chain = make_chain("pixart")
    for script, words in (
        ("prune_by_index", ["--ckpt", tmp_path / "latte", "--scheme", "bk-sdm", "--save-model", tmp_path / "out"]),
        ("prune_by_learning", ["--model", tmp_path / "latte", *chain.learn[2:], "--results-dir", tmp_path / "runs"]),
    ):
        told = refuse(capsys, script, words)
        assert "LatteTransformer3DModel cannot be cut" in told
        assert "transformer_blocks and temporal_transformer_blocks have one depth, num_layers" in told
    assert [path.name for path in tmp_path.iterdir()] == ["latte"]


def test_refused_stacks(make_chain, tmp_path, capsys):
    """--pattern for a stack that is not there names those that are."""
    chain = make_chain("flux")
    words = [*chain.learn, "--results-dir", tmp_path, "--save-model", tmp_path / "out"]
    words[words.index(STACKS)] = "blocks=1:2"
    told = refuse(capsys, "prune_by_learning", words)
    assert told.startswith("--pattern blocks=1:2: ")
    assert "transformer_blocks, single_transformer_blocks" in told
    words = ["--ckpt", chain.pipeline, "--scheme", "bk-sdm", "--pattern", "blocks=1:2", "--save-model", tmp_path / "o"]
    assert refuse(capsys, "prune_by_index", words).startswith("--pattern blocks=1:2: ")
    words = ["--ckpt", chain.pipeline, "--n-pruned", 1, "--data-path", chain.latents, "--save-model", tmp_path / "o"]
    words[2:4] = ["--pattern", "blocks=1:2"]
    assert refuse(capsys, "prune_by_score", words).startswith("--pattern blocks=1:2: ")
    assert not list(tmp_path.iterdir())


def test_refused_cuts(make_chain, tmp_path, run_script):
    """SD3's last layer stays, and no stack may be left empty."""
    sd3, flux = make_chain("sd3"), make_chain("flux")
    with pytest.raises(InputError, match="layer 3 is unlike the others and has to stay"):
        run_script("prune_by_index", "--ckpt", sd3.pipeline, "--kept-indices", "0,1", "--save-model", tmp_path / "out")
    with pytest.raises(InputError, match=r"--kept-indices .*no layer of single_transformer_blocks \(4\.\.7\)"):
        run_script("prune_by_index", "--ckpt", flux.pipeline, "--kept-indices", "0,1", "--save-model", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_refused_folders(make_chain, tmp_path, run_script):
    """What a pruned network is not written to: a folder of something else, the pipeline itself."""
    chain = make_chain("pixart")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("mine")
    words = ["--ckpt", chain.pipeline, "--scheme", "bk-sdm", "--save-model"]
    with pytest.raises(InputError, match=r"--save-model .*mine: that, or .* is there, and not written here"):
        run_script("prune_by_index", *words, tmp_path / "mine")
    before = {path: path.read_bytes() for path in chain.pipeline.rglob("*") if path.is_file()}
    for target in (chain.pipeline, chain.pipeline / "transformer"):
        with pytest.raises(InputError, match=r"--save-model .*: (belongs to --|is not empty)"):
            run_script("prune_by_index", *words, target)
    assert {path: path.read_bytes() for path in chain.pipeline.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_criteria_without_data(make_chain, tmp_path, run_script, same_weights, criterion):
    """Those that read no images need none."""
    chain, out = make_chain("pixart"), tmp_path / "cut"
    words = ["--ckpt", chain.pipeline, "--n-pruned", 1, "--criterion", criterion, "--save-model", out]
    run_script("prune_by_score", *words, "--image-size", chain.size)
    assert len(check_cut(chain, out, same_weights)["kept"]) == 3


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_average_of_dropped_layers(make_chain, tmp_path, run_script, name):
    """Diffusers opens the folder; or the reason is told, before anything is learnt, where layers are not alike."""
    chain, out = make_chain(name), tmp_path / "cut"
    words = ["--ckpt", chain.pipeline, "--scheme", "bk-sdm", "--init", "average", "--save-model", out]
    if name == "sd3":
        with pytest.raises(InputError, match="average"):
            run_script("prune_by_index", *words)
        return
    run_script("prune_by_index", *words)
    plain, averaged = keep_layers(chain.state, [0, 3], chain.names), open_cut(out).state_dict()
    moved = {key for key in plain if not torch.equal(plain[key], averaged[key])}
    assert moved == {key for key in plain if key.startswith("transformer_blocks.")}


def test_refused_exports(make_chain, tmp_path, capsys):
    """Before anything is learnt or written: of a transformer alone, to a file, and to the pipeline itself."""
    chain = make_chain("pixart")
    alone = shutil.copytree(chain.pipeline / "transformer", tmp_path / "alone")
    (tmp_path / "file").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for model, target in ((alone, tmp_path / "whole"), (chain.pipeline, tmp_path / "file"), (chain.pipeline,) * 2):
        words = [*chain.learn, "--vae", chain.pipeline / "vae", "--results-dir", tmp_path / "runs"]
        words += ["--save-model", tmp_path / "out", "--export-pipeline", target]
        words[1] = model
        assert "--export-pipeline" in refuse(capsys, "prune_by_learning", words)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_folder_with_a_slash_at_its_end(make_chain, tmp_path, run_script):
    """As a shell completes it: the facts are found, and the pipeline by them."""
    chain = make_chain("pixart")
    run_script(
        "prune_by_index", "--ckpt", f"{chain.pipeline}/", "--scheme", "bk-sdm", "--save-model", f"{tmp_path}/cut/"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "cut.json"]
    words = ["--ckpt", f"{tmp_path}/cut/", "--prompts", "a cat", "--num-sampling-steps", 2, "--image-size", chain.size]
    run_script("sample", *words, "--output", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").is_file()


def test_pipeline_of_the_hub(make_chain, tmp_path, root):
    """As it lies in the library's cache, without a network: prompts are encoded by the whole pipeline in it."""
    chain, cache_of = make_chain("pixart"), tmp_path / "home" / "hub" / "models--me--tiny"
    shutil.copytree(chain.pipeline, cache_of / "snapshots" / "abc123")
    (cache_of / "refs").mkdir()
    (cache_of / "refs" / "main").write_text("abc123")
    words = ["--model", "hf://me/tiny", "--data-path", chain.pictures, "--features-path", tmp_path / "latents"]
    words += ["--image-size", chain.size, "--num-workers", 0]
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, root / "extract_features.py", *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    made, expected = (folder / "prompts" for folder in (tmp_path / "latents", chain.latents))
    assert json.loads((made / "call.json").read_text())["pipeline"] == "hf://me/tiny"
    for path in expected.glob("*.npy"):
        assert np.array_equal(np.load(made / path.name), np.load(path)), path.name


def test_new_folders_are_made_and_others_stay(make_chain, tmp_path, run_script, capsys):
    """A nested folder is made, and written again; a network that was not written here, or a file of facts, stays."""
    chain = make_chain("pixart")
    words = ["--ckpt", chain.pipeline, "--scheme", "bk-sdm"]
    for _ in range(2):
        run_script("prune_by_index", *words, "--save-model", tmp_path / "new" / "sub" / "cut")
    told = read_facts(tmp_path / "new" / "sub" / "cut")
    assert told["pipeline"] == str(chain.pipeline)
    assert told["image_size"] == chain.size
    mine = shutil.copytree(chain.pipeline / "transformer", tmp_path / "mine")
    (tmp_path / "other.json").write_text('{"mine": 1}')
    for target in (mine, tmp_path / "other"):
        assert "not written here" in refuse(capsys, "prune_by_index", [*words, "--save-model", target])
    assert (tmp_path / "other.json").read_text() == '{"mine": 1}'


def test_size_of_pictures_is_known(make_chain):
    """By the network's config and its autoencoder, where nothing else tells it."""
    chain = make_chain("pixart")
    settings = sample.parse_args(["--model", str(chain.pipeline), "--prompts", "a cat"])
    assert settings.image_size == chain.size
    assert settings.vae == str(chain.pipeline / "vae")
