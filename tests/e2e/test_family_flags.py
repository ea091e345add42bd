"""What is particular to families: their flags, their stacks, what does not go together."""

import numpy as np
import pytest
from PIL import Image

from engine.checkpoint import read_facts
from engine.errors import InputError
from families import FAMILIES, stack_layers

TRAIN = ["--global-batch-size", "16", "--num-workers", "0", "--epochs", "1"]


@pytest.mark.parametrize("pruned", [5, 6])
def test_layers_of_any_place(family, latents, tmp_path, run_script, pruned):
    """Scores may cut the stacks unevenly; the name tells, and a second script reads it."""
    words = [
        "--n-pruned",
        pruned,
        "--nsamples",
        32,
        "--data-path",
        latents,
        "--save-model",
        tmp_path / "out.safetensors",
    ]
    run_script("prune_by_score", "--ckpt", family.weights, *words)
    model, kept = (read_facts(tmp_path / "out.safetensors")[name] for name in ("model", "kept"))
    border = stack_layers(family.model)[0]
    stacks = [sum(layer < border for layer in kept), sum(layer >= border for layer in kept)]
    assert [*stack_layers(model), 0][:2] == stacks
    pictures = ["--ckpt", tmp_path / "out.safetensors", *family.few_steps, "--labels", "1"]
    run_script("sample", *pictures, "--output", tmp_path / "one.png")


def test_pictures(family, run_script, tmp_path):
    flags = ["--ckpt", family.student, *family.few_steps, "--cfg-scale", "2"]
    run_script("sample", *flags, "--labels", "1,2", "--output", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (22, 12)
    found = {}
    for size in ("4", "2"):  # image i does not depend on the batch but for solvers that adapt their steps
        sizes = ["--num-fid-samples", "4", "--per-proc-batch-size", size, "--sample-dir", tmp_path / size]
        run_script("sample_ddp", *flags, *sizes)
        (packed,) = (tmp_path / size).glob("*.npz")
        found[size] = np.load(packed)["arr_0"].astype(int)
    assert found["4"].shape == (4, 8, 8, 3)
    assert abs(found["4"] - found["2"]).max() <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "DiT-T/2", "--num-iter", "4"], "--num-iter: is for MAR, but --model DiT-T/2 is a DiT"),
        (["--model", "MAR-T", "--sampler", "ddim"], "--sampler: is for DiT, but --model MAR-T is a MAR"),
        (["SDE", "--model", "DiT-T/2"], "SDE: is for SiT, but --model DiT-T/2 is a DiT"),
        (["--model", "DiT-T/2", "--cfg-channels", "0"], "--cfg-channels: 0: expected 1 or more"),
        (["--model", "DiT-T/2", "--cfg-interval", "0", "2"], "--cfg-interval: 2: expected 0 to 1"),
        (["--model", "MAR-T", "--num-iter", "0"], "--num-iter: 0: expected 1 or more"),
        (["--model", "SiT-T/2", "--temperature", "0.9"], "--temperature: is for MAR, but --model SiT-T/2 is a SiT"),
    ],
)
def test_wrong_flags_of_families(make_family, run_script, capsys, words, message):
    weights = make_family(words[words.index("--model") + 1][:3]).weights
    with pytest.raises((SystemExit, InputError)) as caught:
        run_script("sample", *words, "--ckpt", weights)
    assert message in capsys.readouterr().err + str(caught.value)


def test_wrong_flag_of_scores(make_family, latents, run_script):
    words = ["--ckpt", make_family("SiT").weights, "--data-path", latents, "--n-pruned", 6, "--save-model", "p.pt"]
    with pytest.raises(InputError, match="--clean-latents: is for DiT, but --model SiT-T/2 is a SiT"):
        run_script("prune_by_score", *words, "--clean-latents")


def test_wrong_combinations(family, latents, run_script, tmp_path):
    """A teacher of another family; for MAR a pattern across its stacks, too many steps; nothing is written."""
    data = ["--data-path", latents, "--results-dir", tmp_path, *TRAIN]
    other = {"DiT": "SiT-XL/2"}.get(family.name, "DiT-XL/2")
    distil = [*data, "--load-weight", family.student, "--load-teacher", family.weights, "--teacher", other]
    with pytest.raises(InputError, match=rf"--teacher {other}: is a .*, but .* (take a|holds a) {family.name}"):
        run_script("train_masked_kd", *distil)
    if family.name == "MAR":
        learn = [*data, "--load-weight", family.weights, "--save-model", tmp_path / "out.pt"]
        with pytest.raises(InputError, match=r"--pattern 4:4,3:8: .*crosses from layer 5 to 6"):
            run_script("prune_by_learning", *learn, "--pattern", "4:4,3:8")
        score = ["--data-path", latents, "--ckpt", family.weights, "--save-model", tmp_path / "out.pt"]
        with pytest.raises(InputError, match=r"--pattern 4:4,3:8: .*crosses from layer 5 to 6"):
            run_script("prune_by_score", *score, "--pattern", "4:4,3:8")
        with pytest.raises(InputError, match=r"--search 3: every choice leaves one of the stacks of .* empty"):
            run_script("prune_by_score", *score, "--n-pruned", "11", "--search", "3")
        with pytest.raises(InputError, match=r"--num-iter 5: expected at most 4"):
            run_script("sample", "--ckpt", family.student, "--num-iter", "5")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["ODE", "SDE"])
def test_first_word(make_family, run_script, tmp_path, mode):
    words = ["--ckpt", make_family("SiT").student, "--num-sampling-steps", "3", "--cfg-scale", "1", "--labels", "1"]
    run_script("sample", mode, *words, "--output", tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()


def test_plain_training_has_settings_of_its_own(family, latents):
    """Without weights to start from the family's own settings are the defaults; flags win."""
    import train

    args = train.parse_args(["--model", family.model, "--data-path", str(latents), "--epochs", "7"])
    assert args.epochs == 7
    assert args.lr == FAMILIES[family.name].scratch.get("lr", 2e-4)
    recovery = train.parse_args(["--load-weight", str(family.student), "--data-path", str(latents)])
    assert (recovery.model, recovery.lr, recovery.weight_decay) == (family.half, 2e-4, 0.0)


def test_no_stack_may_be_empty(make_family, tmp_path, run_script):
    words = ["--ckpt", make_family("MAR").weights, "--kept-indices", "0,1", "--save-model", tmp_path / "out.pt"]
    with pytest.raises(InputError, match=r"--kept-indices \[0, 1\]: no layer of decoder_blocks"):
        run_script("prune_by_index", *words, "--dry-run")
