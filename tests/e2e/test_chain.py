"""The whole chain on 8 x 8 pictures of three channels and ten classes, without an autoencoder."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from engine.checkpoint import read_facts
from engine.errors import InputError
from engine.sampling import ImageDraws
from engine.weight_files import read_file, read_weights
from families import FAMILIES
from pruning.patterns import candidate_masks, parse_pattern
from pruning.surgery import average_dropped, keep_layers

TRAIN = ["--epochs", "1", "--global-batch-size", "16", "--num-workers", "0", "--log-every", "2"]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_extraction(latents, pictures):
    """Every picture and its mirror, in the order of the files, with the label of its folder."""
    files = sorted(pictures.glob("*/*.png"))
    features, labels = np.load(latents / "features.npy"), np.load(latents / "labels.npy")
    assert features.shape == (64, 2, 3, 8, 8)
    for i, file in enumerate(files):
        pixels = np.asarray(Image.open(file)).transpose(2, 0, 1) / np.float32(127.5) - 1
        np.testing.assert_allclose(features[i, 0], pixels, atol=1e-6)
        assert labels[i] == int(file.parent.name)
    assert (features[:, 1] == features[:, 0, :, :, ::-1]).all()
    metadata = json.loads((latents / "metadata.json").read_text())
    told = {"images": 64, "shape": [3, 8, 8], "num_classes": 10, "image_size": 8, "vae": "none"}
    assert told.items() <= metadata.items()


def test_interrupted_extraction(latents, latents_copy, pictures, run_script):
    """A second call encodes what is missing, and leaves the rest alone."""
    features, status = (np.load(latents_copy / f"{name}.npy", mmap_mode="r+") for name in ("features", "status"))
    features[[5, 60]], status[[5, 60]] = 0, 0
    features[9] = 7
    flags = ["--vae", "none", "--image-size", 8, "--data-path", pictures, "--batch-size", 1]
    run_script("extract_features", *flags, "--features-path", latents_copy)
    found, whole = (np.load(folder / "features.npy") for folder in (latents_copy, latents))
    assert (found[9] == 7).all()
    assert (np.delete(found, 9, 0) == np.delete(whole, 9, 0)).all()


def test_run_folder(teacher):
    """config.json, log.txt, metrics.jsonl and checkpoints say what was run."""
    config = json.loads((teacher.folder / "config.json").read_text())
    told = {"model": "DiT-T/2", "image_size": 8, "num_classes": 10, "vae": "none", "global_batch_size": 16, "lr": 3e-3}
    assert told.items() <= config["settings"].items()
    origins = {name: config["origins"][name] for name in ("model", "image_size", "epochs", "weight_decay")}
    assert origins["image_size"].endswith("features/metadata.json")
    assert (origins["model"], origins["epochs"], origins["weight_decay"]) == ("typed", "typed", "default")
    assert {"command", "device", "precision", "processes", "commit", "versions"} == set(config["environment"])
    assert set(config["environment"]["versions"]) == {"python", "torch", "numpy", "timm", "diffusers"}
    # two states of 16 bytes for each of the network's weights but the table of positions, which is not trained
    assert config["sizes"] | {"state_bytes": 0} == {
        "images": 64,
        "steps": 8,
        "steps_per_epoch": 4,
        "parameters": {"network": sum(value.numel() for value in teacher.state.values())},
        "state_bytes": 0,
        "states": 2,
    }
    assert config["sizes"]["state_bytes"] == pytest.approx(teacher.checkpoint.stat().st_size, rel=0.02)
    rows = metrics(teacher.folder)
    assert [row["step"] for row in rows] == [3, 6, 8]
    for row in rows:
        assert {"loss", "mse", "vb", "lr", "grad_norm", "images_per_second"} <= set(row)
        assert row["loss"] == pytest.approx(row["mse"] + row["vb"], rel=1e-4)
    log = (teacher.folder / "log.txt").read_text()
    assert re.search(r"step 8/8 .*loss \d.* lr \S+ .*images/s .* GB .*left 0:00:00", log)
    assert "1 process(es), cpu, fp32" in log
    assert "saved" in log
    saved = sorted(f.name for f in (teacher.folder / "checkpoints").iterdir())
    assert saved == ["0000004.pt", "0000004.pt.json", "0000008.pt", "0000008.pt.json"]


def test_training_state(teacher):
    state = read_file(teacher.checkpoint, "--resume")
    assert {"model", "ema", "opt", "scaler", "train_steps", "args"} <= set(state)
    assert state["train_steps"] == 8
    assert read_facts(teacher.checkpoint)["model"] == "DiT-T/2"
    moved = [key for key in state["ema"] if not torch.equal(state["ema"][key], state["model"][key])]
    assert "blocks.3.attn.qkv.weight" in moved
    assert "pos_embed" not in moved


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision(family, latents, tmp_path, run_script, precision):
    """Training, learning and sampling in half precision; the weights stay in float32."""
    flags = ["--load-weight", family.weights, "--data-path", latents, "--precision", precision, *TRAIN]
    run_script("train", *flags, "--results-dir", tmp_path)
    run_script("prune_by_learning", *flags, "--pattern", "1:2", "--delta-w", "--results-dir", tmp_path)
    checkpoint = tmp_path / family.folder.name / "checkpoints/0000004.pt"
    state = read_weights(checkpoint, "--ckpt")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in state.values())
    flags = ["--precision", precision, *family.few_steps, "--output", tmp_path / "g.png"]
    run_script("sample", "--ckpt", checkpoint, *flags)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "g.png")))) > 2


def test_loader_processes(teacher, latents, tmp_path, run_script):
    """The data are the same whoever loads them."""
    flags = "--model DiT-T/2 --epochs 2 --global-batch-size 16 --lr 3e-3 --ema-decay 0.5 --num-workers 1"
    run_script("train", *flags.split(), "--data-path", latents, "--results-dir", tmp_path)
    state = read_weights(tmp_path / "DiT-T-2/checkpoints/0000008.pt", "--ckpt")
    assert all(torch.equal(state[key], value) for key, value in teacher.state.items())


@pytest.mark.parametrize(
    ("update", "pattern", "depths"),  # of one stack, of two
    [
        ("--delta-w --lora --lora-rank 4", "1:2", ("D6", "D6")),
        ("--delta-w", "2:4,1:2,3:4,1:2", ("D7", "D3+4")),
        ("", "2:4,2:2,4:4,1:2", ("D9", "D4+5")),
    ],
    ids=["lora", "full", "gates"],
)
def test_learning(family, latents, tmp_path, run_script, same_weights, update, pattern, depths):
    """The decision follows the pattern, and the kept layers are cut out of the original weights."""
    flags = ["--load-weight", family.weights, "--data-path", latents, "--results-dir", tmp_path, *TRAIN]
    out = tmp_path / "out" / "pruned.pt"
    flags += ["--save-model", out, "--gate-lr", 0.05, *update.split()]
    run_script("prune_by_learning", "--model", family.model, "--pattern", pattern, *flags)
    facts, groups, start = read_facts(out), parse_pattern(pattern, 12), 0
    assert facts["model"] == family.half.replace("D6", depths[family.name == "MAR"])
    assert parse_pattern(facts["pattern"], 12) == groups
    for n, m in groups:
        chosen = [float(layer in facts["kept"]) for layer in range(start, start + m)]
        assert chosen in candidate_masks(n, m).tolist()
        start += m
    assert len(facts["confidence"]) == len(groups)
    same_weights(read_weights(out, "--ckpt"), keep_layers(family.state, facts["kept"]))
    rows = metrics(tmp_path / f"learn_mask-{family.folder.name}")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[-1]["kept"] == facts["kept"]
    assert rows[-1]["confidence"] == facts["confidence"]
    assert (rows[0].get("tau", 4), rows[0].get("scaling", 100)) == (4, 100)
    assert rows[1]["scaling"] == 100
    assert rows[-1]["tau"] == pytest.approx(0.1)
    log = (tmp_path / f"learn_mask-{family.folder.name}" / "log.txt").read_text()
    assert f"Final Decision: {facts['kept']}" in log
    assert "Final Confidence" in log


@pytest.mark.parametrize(("target", "share"), [("teacher", 1.0), ("both", 0.5)])
def test_learning_from_the_output(family, latents, tmp_path, run_script, target, share):
    """With --target the loss compares with what the whole network predicts, in part or alone."""
    flags = ["--load-weight", family.weights, "--data-path", latents, "--results-dir", tmp_path, *TRAIN]
    run_script("prune_by_learning", "--model", family.gated, *flags, "--delta-w", "--target", target)
    for row in metrics(tmp_path / f"learn_mask-{family.gated}")[1:]:
        assert row["kd_loss"] > 0
        assert row["loss"] == pytest.approx(share * row["kd_loss"] + (1 - share) * row["gt"], rel=1e-4)
    config = json.loads((tmp_path / f"learn_mask-{family.gated}" / "config.json").read_text())
    assert config["sizes"]["parameters"].keys() == {"network", "teacher"}


@pytest.mark.parametrize("target", ["data", "both"])
def test_learning_from_pairs(family, latents, tmp_path, run_script, target):
    """--gate-gradient pairs moves gates and weights, and says what it does at --target."""
    flags = ["--load-weight", family.weights, "--data-path", latents, "--results-dir", tmp_path, *TRAIN]
    flags += [
        "--gate-gradient",
        "pairs",
        "--candidates",
        "contiguous",
        "--pattern",
        "2:4,1:2,2:4,1:2",
        "--target",
        target,
    ]
    run_script("prune_by_learning", "--model", family.model, *flags, "--delta-w")
    folder = tmp_path / f"learn_mask-{family.folder.name}"
    state = read_file(folder / "checkpoints" / "0000004.pt", "--resume")
    for g, candidates in enumerate((3, 2, 3, 2)):
        logits = state["model"][f"gumbel_gates.{g}"]
        assert logits.shape == (1, candidates)
        assert (logits != 0.02).all()
    weight = next(key for key in state["model"] if key.endswith("blocks.0.attn.qkv.weight"))
    assert not torch.equal(state["model"][weight], family.state[weight])
    for row in metrics(folder)[1:]:
        assert ("kd_loss" in row) == (target == "both")
        if target == "both":
            assert row["loss"] == pytest.approx((row["kd_loss"] + row["gt"]) / 2, rel=1e-4)
    for start in (0, 6):
        dropped = [layer for layer in range(start, start + 4) if layer not in read_facts(folder / "pruned.pt")["kept"]]
        assert dropped[1] == dropped[0] + 1


@pytest.mark.parametrize("update", ["--delta-w", "--delta-w --lora"])
def test_learning_keeps_its_update(family, latents, tmp_path, run_script, same_weights, update):
    """With --init learned the file holds what the gates were trained with, as plain weights."""
    out = tmp_path / "pruned.pt"
    flags = ["--load-weight", family.weights, "--data-path", latents, "--results-dir", tmp_path, *TRAIN]
    flags += ["--save-model", out, *update.split()]
    run_script("prune_by_learning", "--model", family.gated, *flags, "--init", "learned")
    facts, learned = read_facts(out), read_weights(out, "--ckpt")
    assert facts["init"] == "learned"
    plain = keep_layers(family.state, facts["kept"])
    assert learned.keys() == plain.keys()
    weight = next(key for key in plain if key.endswith("blocks.0.mlp.fc1.weight"))
    assert not torch.equal(learned[weight], plain[weight])
    folder = tmp_path / f"learn_mask-{family.gated}"
    if "--lora" not in update:
        trained = read_file(folder / "checkpoints" / "0000004.pt", "--resume")["model"]
        same_weights(learned, keep_layers(trained, facts["kept"]))
    run_script("prune_by_learning", "--model", family.gated, *flags)
    same_weights(read_weights(out, "--ckpt"), plain)  # a finished run, written again with another start


def test_finalists(family, latents, tmp_path, run_script, same_weights):
    """The most probable choices are written beside each other, each with its place and its own layers."""
    out = tmp_path / "out" / "pruned.safetensors"
    flags = ["--load-weight", family.weights, "--data-path", latents, "--results-dir", tmp_path, *TRAIN]
    run_script("prune_by_learning", "--model", family.gated, *flags, "--save-model", out, "--finalists", 3)
    paths = [out, out.with_stem("pruned-2"), out.with_stem("pruned-3")]
    facts = [read_facts(path) for path in paths]
    assert [each.get("place") for each in facts] == [None, 2, 3]
    assert len({tuple(each["kept"]) for each in facts}) == 3
    for path, each in zip(paths, facts, strict=True):
        assert each["model"] == family.half
        same_weights(read_weights(path, "--ckpt"), keep_layers(family.state, each["kept"]))
    assert sorted(f.name for f in out.parent.iterdir()) == sorted(f"{p.name}{s}" for p in paths for s in ("", ".json"))


def test_learning_moves_the_gates(family, latents, tmp_path, run_script):
    """A gated name needs no pattern; gates and their averages move, frozen weights do not."""
    flags = ["--load-weight", family.weights, "--data-path", latents, "--results-dir", tmp_path, *TRAIN]
    run_script("prune_by_learning", "--model", family.gated, *flags, "--delta-w", "--lora")
    state = read_file(tmp_path / f"learn_mask-{family.gated}" / "checkpoints" / "0000004.pt", "--resume")
    assert sorted(state["ema"]) == [str(g) for g in range(6)]
    for g in range(6):
        assert not torch.equal(state["model"][f"gumbel_gates.{g}"], torch.full((1, 2), 0.02))
    weight = next(key for key in state["model"] if key.endswith("blocks.0.attn.qkv.weight"))
    assert torch.equal(state["model"][weight], family.state[weight])
    assert (tmp_path / f"learn_mask-{family.gated}" / "pruned.pt").exists()


SOURCES = [(name, source) for name in FAMILIES if FAMILIES[name].models for source in ("latents", "pictures")]


@pytest.mark.parametrize(("family", "source"), [*SOURCES, ("DiT", "clean latents")], indirect=["family"])
def test_scores(request, family, tmp_path, run_script, same_weights, source):
    """Block influence from latents and from images; the last layer stays, and the lowest similarities with it."""
    out = tmp_path / "pruned.pt"
    flags = ["--ckpt", family.weights, "--n-pruned", 7, "--nsamples", 32, "--save-model", out]
    flags += ["--clean-latents"] if source == "clean latents" else []
    run_script("prune_by_score", *flags, "--data-path", request.getfixturevalue(source.split()[-1]))
    facts = read_facts(out)
    kept, scores = facts["kept"], facts["scores"]
    assert len(scores) == 12
    assert all(-1 <= score <= 1 for score in scores)
    assert len(kept) == 5
    assert 11 in kept
    removed = set(range(12)) - set(kept)
    assert min(scores[i] for i in removed) >= max(scores[i] for i in kept if i < 11)
    same_weights(read_weights(out, "--ckpt"), keep_layers(family.state, kept))


CRITERIA = ["sensitivity", "flux-lite", "output-change", "magnitude", "random"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria(family, latents, tmp_path, run_script, same_weights, criterion):
    """One of two layers by a criterion: facts say which and the scores; the lower score goes."""
    out, data = tmp_path / "pruned.pt", [] if criterion in ("magnitude", "random") else ["--data-path", latents]
    flags = ["--pattern", "1:2", "--criterion", criterion, "--nsamples", 16, *data, "--save-model", out]
    run_script("prune_by_score", "--ckpt", family.weights, *flags)
    facts = read_facts(out)
    assert (facts["criterion"], facts["pattern"], facts["model"]) == (criterion, "1:2x6", family.half)
    pairs = zip(facts["scores"][::2], facts["scores"][1::2], strict=True)
    assert facts["kept"] == [2 * i + (b >= a) for i, (a, b) in enumerate(pairs)]
    same_weights(read_weights(out, "--ckpt"), keep_layers(family.state, facts["kept"]))


@pytest.mark.parametrize("choice", ["--pattern 1:2 --search 5", "--n-pruned 10 --search all"])
def test_search(family, latents, tmp_path, run_script, capsys, choice):
    """The lowest, median and highest loss of the same choices, which leave layers in every stack."""
    flags = ["--ckpt", family.weights, *choice.split(), "--nsamples", 16, "--data-path", latents]
    taken, losses = [], []
    for which in ("lowest", "median", "highest"):
        out = tmp_path / f"{which}.pt"
        run_script("prune_by_score", *flags, "--save-model", out, "--search-for", which)
        facts = read_facts(out)
        assert facts["criterion"] == f"{which} loss"
        assert f"{which} loss {facts['losses'][which]:.6f}  kept layers {facts['kept']}" in capsys.readouterr().out
        assert "scores" not in facts
        taken.append(facts["kept"])
        losses.append(facts["losses"])
    assert losses[0] == losses[1] == losses[2]
    assert losses[0]["lowest"] < losses[0]["median"] < losses[0]["highest"]
    assert facts["choices"] == (5 if "5" in choice else 36 if family.name == "MAR" else 66)
    assert len({tuple(kept) for kept in taken}) == 3


def test_latents_and_pictures_give_the_same_scores(teacher, latents, pictures, tmp_path, run_script):
    for name, data in (("a", latents), ("b", pictures)):
        flags = ["--n-pruned", 6, "--nsamples", 32, "--data-path", data, "--save-model", tmp_path / name]
        run_script("prune_by_score", "--ckpt", teacher.weights, *flags)
    a, b = (read_facts(tmp_path / name) for name in "ab")
    assert a["kept"] == b["kept"]
    assert a["scores"] == pytest.approx(b["scores"], abs=1e-6)


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        (["--kept-indices", "[11, 0, 5]"], [0, 5, 11]),
        (["--scheme", "bk-sdm"], [0, 2, 4, 7, 9, 11]),
        (["--scheme", "bk-sdm", "--pattern", "2:4,1:2,3:4,1:2"], [0, 1, 4, 7, 8, 9, 11]),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_index(family, tmp_path, run_script, same_weights, choice, kept, suffix):
    out = tmp_path / f"pruned{suffix}"
    run_script("prune_by_index", "--ckpt", family.weights, *choice, "--save-model", out)
    assert read_facts(out)["kept"] == kept
    same_weights(read_weights(out, "--ckpt"), keep_layers(family.state, kept))
    assert sorted(f.name for f in tmp_path.iterdir()) == [out.name, f"{out.name}.json"]


def test_index_with_averages(family, tmp_path, run_script, same_weights):
    """With --init average the dropped layers go into the kept ones, and the facts say so."""
    out, kept = tmp_path / "pruned.pt", [0, 2, 5, 7, 8, 11]
    flags = ["--kept-indices", str(kept), "--init", "average", "--save-model", out]
    run_script("prune_by_index", "--ckpt", family.weights, *flags)
    assert read_facts(out)["init"] == "average"
    found, plain = read_weights(out, "--ckpt"), keep_layers(family.state, kept)
    same_weights(found, keep_layers(average_dropped(family.state, kept), kept))
    assert any(not torch.equal(found[key], plain[key]) for key in plain)


def test_preview_of_a_training_checkpoint(teacher, tmp_path, run_script, same_weights):
    """Pruning a run's checkpoint takes its averaged weights; --preview adds a grid of eight pictures."""
    out = tmp_path / "pruned.pt"
    flags = ["--scheme", "bk-sdm", "--preview", "--num-sampling-steps", 3]
    run_script("prune_by_index", "--ckpt", teacher.checkpoint, "--save-model", out, *flags)
    same_weights(read_weights(out, "--ckpt"), keep_layers(teacher.state, [0, 2, 4, 7, 9, 11]))
    assert Image.open(f"{out}.png").size == (4 * 10 + 2, 2 * 10 + 2)


def test_fine_tuning(family, latents, tmp_path, run_script):
    """The pruned weights tell the model, the image size and the classes; training starts from them."""
    args = run_script(
        "train", "--load-weight", family.student, "--data-path", latents, "--results-dir", tmp_path, *TRAIN
    )
    assert (args.model, args.image_size, args.num_classes, args.vae) == (family.half, 8, 10, "none")
    state = read_file(tmp_path / family.half.replace("/", "-") / "checkpoints" / "0000004.pt", "--resume")
    start = read_weights(family.student, "--ckpt")
    weight = next(key for key in start if key.endswith("blocks.2.attn.qkv.weight"))
    assert 0 < (state["model"][weight] - start[weight]).abs().max() < 1e-2


@pytest.mark.parametrize("epochs", [1, 2])
def test_masked_kd(family, latents, tmp_path, run_script, epochs):
    """The weight of the feature loss falls to 0 over the epochs, and is kept in a single one."""
    flags = ["--load-weight", family.student, "--data-path", latents, "--results-dir", tmp_path, "--load-teacher"]
    run_script("train_masked_kd", *flags, family.weights, "--teacher", family.model, *TRAIN, "--epochs", epochs)
    folder = tmp_path / family.half.replace("/", "-")
    rows, beta = [row for row in metrics(folder) if "loss" in row], {"SiT": 2e-4}.get(family.name, 1e-2)
    assert [row["step"] for row in rows] == list(range(2, 4 * epochs + 1, 2))
    assert rows[0]["beta"] == pytest.approx(beta)
    assert rows[-1]["beta"] == pytest.approx(beta if epochs == 1 else 0)
    assert rows[0]["feat_loss"] > 0
    row = rows[0]
    parts = 0.9 * row["kd_loss"] + 0.1 * row["gt"] + row["beta"] * row["feat_loss"]
    assert row["loss"] == pytest.approx(parts, rel=1e-4)
    assert f"{[(i, 2 * i + 1) for i in range(6)]}" in (folder / "log.txt").read_text()
    start = read_weights(family.student, "--ckpt")
    state = read_file(max((folder / "checkpoints").glob("*.pt")), "--resume")
    assert state["model"].keys() == state["ema"].keys() == start.keys()


def test_interval_start(family, latents, tmp_path, run_script):
    """Two steps apart, two joined: the loss is put together in two ways."""
    flags = ["--load-weight", family.student, "--data-path", latents, "--results-dir", tmp_path, *TRAIN]
    flags += ["--teacher", family.model, "--load-teacher", family.weights, "--interval-steps", 2]
    run_script("train_masked_kd", *flags)
    rows = [row for row in metrics(tmp_path / family.half.replace("/", "-")) if "loss" in row]
    apart, joined = rows
    assert apart["loss"] == pytest.approx(apart["kd_loss"] + apart["feat_loss"], rel=1e-4)
    parts = 0.9 * joined["kd_loss"] + 0.1 * joined["gt"] + joined["beta"] * joined["feat_loss"]
    assert joined["loss"] == pytest.approx(parts, rel=1e-4)


def test_hybrid_pattern_to_masked_kd(family, latents, tmp_path, run_script):
    """Seven layers learnt by a hybrid pattern: the pattern travels with the weights to the layer pairs."""
    common = ["--data-path", latents, "--results-dir", tmp_path, *TRAIN]
    out = tmp_path / "seven.pt"
    flags = ["--load-weight", family.weights, "--pattern", "2:4,1:2,3:4,1:2", "--save-model", out]
    run_script("prune_by_learning", "--model", family.model, *flags, *common)
    flags = ["--load-weight", out, "--teacher", family.model, "--load-teacher", family.weights]
    args = run_script("train_masked_kd", *flags, *common)
    assert args.model == {"MAR": "MAR-T-D3+4"}.get(family.name, f"{family.name}-T-D7/2")
    log = (tmp_path / args.model.replace("/", "-") / "log.txt").read_text()
    assert "[(1, 3), (2, 5), (5, 9), (6, 11)]" in log


def test_sample(student, tmp_path, run_script, monkeypatch):
    """A grid of the asked classes; by default eight, in a file named after the weights; the seed decides."""
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", student, "--num-sampling-steps", 3]
    run_script("sample", *flags)
    (default,) = (tmp_path / "outputs" / "samples").iterdir()
    assert Image.open(default).size == (42, 22)
    made = {}
    for seed, method in ((1, "ddpm"), (1, "ddim"), (2, "ddpm"), (1, "ddpm")):
        out = tmp_path / f"{seed}{method}.png"
        run_script("sample", *flags, "--labels", "3,9", "--seed", seed, "--sampler", method, "--output", out)
        assert made.setdefault((seed, method), out.read_bytes()) == out.read_bytes()
        assert Image.open(out).size == (22, 12)
    assert len(set(made.values())) == 3


SAMPLE = ["--num-fid-samples", "11", "--per-proc-batch-size", "4", "--cfg-scale", "1.5"]


def test_sample_ddp(family, tmp_path, run_script):
    """Images by index and an .npz in their order; a second call makes only what is missing, with the same bytes."""
    flags = ["--ckpt", family.student, "--sample-dir", tmp_path, *family.few_steps, *SAMPLE]
    run_script("sample_ddp", *flags)
    (folder,) = (f for f in tmp_path.iterdir() if f.is_dir())
    files = sorted(folder.glob("*.png"))
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(11)]
    packed, labels = np.load(f"{folder}.npz").values()
    assert labels.tolist() == ImageDraws(0, range(11), (), "cpu").labels(10).tolist()
    assert packed.shape == (11, 8, 8, 3)
    assert all((np.asarray(Image.open(f)) == packed[i]).all() for i, f in enumerate(files))
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}
    removed = [files[2], files[9]]
    for file in removed:
        file.unlink()
    run_script("sample_ddp", *flags)
    assert {f: f.read_bytes() for f in files} == {f: content for f, (_, content) in before.items()}
    assert {f for f in files if f.stat().st_mtime_ns != before[f][0]} == set(removed)
    assert (np.load(f"{folder}.npz")["arr_0"] == packed).all()


def test_sample_ddp_more_images(teacher, tmp_path, run_script):
    """Asking for more images later keeps the first ones as they are."""
    flags = ["--ckpt", teacher.student, "--sample-dir", tmp_path, *teacher.few_steps, *SAMPLE]
    run_script("sample_ddp", *flags)
    (folder,) = (f for f in tmp_path.iterdir() if f.is_dir())
    before = {f: f.read_bytes() for f in folder.glob("*.png")}
    with pytest.raises(InputError, match=r"images with cfg_channels 3, now 2; .*another --sample-dir"):
        run_script("sample_ddp", *flags, "--cfg-channels", 2)
    run_script("sample_ddp", *flags, "--num-fid-samples", 13)
    assert before.items() <= {f: f.read_bytes() for f in folder.glob("*.png")}.items()
    assert len(np.load(f"{folder}.npz")["arr_0"]) == 13


def test_pack(tmp_path, run_script):
    """--pack writes the pictures of any folder in the order of their numbers."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in (10, 9, 100):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"{i}.png")
    run_script("sample_ddp", "--pack", folder)
    assert np.load(tmp_path / "mine.npz")["arr_0"][:, 0, 0, 0].tolist() == [9, 10, 100]


def test_published_latents(teacher, latents, tmp_path, run_script):
    """The original's folders of one file per image train as well; what they do not tell is given by flags."""
    features, labels = np.load(latents / "features.npy"), np.load(latents / "labels.npy")
    for kind, values in (("features", features), ("labels", labels[:, None])):
        (tmp_path / f"imagenet8_{kind}").mkdir()
        for i, value in enumerate(values):
            np.save(tmp_path / f"imagenet8_{kind}" / f"{i}.npy", value)
    flags = "--model DiT-T/2 --vae none --image-size 8 --num-classes 10 --epochs 2 --global-batch-size 16 --lr 3e-3"
    flags = [*flags.split(), *["--num-workers", "0", "--ema-decay", "0.5", "--results-dir"], tmp_path]
    run_script("train", *flags, "--data-path", tmp_path)
    state = read_weights(tmp_path / "DiT-T-2" / "checkpoints" / "0000008.pt", "--ckpt")
    assert all(torch.equal(state[key], value) for key, value in teacher.state.items())
