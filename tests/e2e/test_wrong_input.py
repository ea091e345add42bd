"""Wrong input is answered with the flag, the value and what to do; nothing is written, and no code is run."""

import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.checkpoint import save_weights
from engine.errors import InputError, RunError
from families import FAMILIES

TRAIN = "--data-path {latents} --global-batch-size 16 --num-workers 0"
INDEX = "prune_by_index --ckpt {teacher} --save-model p.pt"
SCORE = "prune_by_score --ckpt {teacher} --data-path {latents} --save-model p.pt --nsamples 16"
LEARN = f"prune_by_learning --model DiT-T/2 --load-weight {{teacher}} {TRAIN}"
PAIRS = f"{LEARN} --pattern 1:2 --gate-gradient pairs"
KD = f"train_masked_kd --load-weight {{student}} --teacher DiT-T/2 {TRAIN}"
EXTRACT = "extract_features --data-path {pictures} --vae none --image-size 8"

CASES = {
    # layers and patterns
    "index too high": (f"{INDEX} --kept-indices 0,30", "--kept-indices", "30", r"0\.\.11"),
    "index negative": (f"{INDEX} --kept-indices=-1,3", "--kept-indices", "-1", r"0\.\.11"),
    "index repeated": (f"{INDEX} --kept-indices [1,4,4]", "--kept-indices", "layer 4 2 times", "once"),
    "index malformed": (f"{INDEX} --kept-indices [1,x]", "--kept-indices", "1,x", "list of integers"),
    "index fraction": (f"{INDEX} --kept-indices 1.5", "--kept-indices", "1.5", "list of integers"),
    "index none": (f"{INDEX} --kept-indices []", "--kept-indices", "list of integers|at least one"),
    "index and scheme": (f"{INDEX} --kept-indices 1 --scheme bk-sdm", "--scheme", "give one of them"),
    "neither": (INDEX, "--kept-indices", "--scheme", "give one of them"),
    "scheme unknown": (f"{INDEX} --scheme best", "--scheme", "best", "bk-sdm"),
    "scheme pattern": (f"{INDEX} --scheme bk-sdm --pattern 2:5", "--pattern 2:5", "10 layers", "12"),
    "index no output": ("prune_by_index --ckpt {teacher} --scheme bk-sdm", "--save-model", "missing"),
    "n-pruned = depth": (f"{SCORE} --n-pruned 12", "--n-pruned 12", r"expected 1\.\.11"),
    "n-pruned 0": (f"{SCORE} --n-pruned 0", "--n-pruned", "0: expected 1"),
    "n-pruned text": (f"{SCORE} --n-pruned half", "--n-pruned", "half"),
    "n-pruned and pattern": (f"{SCORE} --n-pruned 2 --pattern 1:2", "--n-pruned", "--pattern", "give one of them"),
    "neither of them": (SCORE, "--n-pruned", "--pattern", "give one of them"),
    "score pattern": (f"{SCORE} --pattern 2:5", "--pattern 2:5", "10 layers", "12"),
    "score N > M": (f"{SCORE} --pattern 3:2", "--pattern 3:2", "N <= M"),
    "criterion unknown": (f"{SCORE} --n-pruned 2 --criterion best", "--criterion", "best", "block-influence"),
    "search 0": (f"{SCORE} --n-pruned 2 --search 0", "--search", "0: expected 1"),
    "search text": (f"{SCORE} --n-pruned 2 --search some", "--search", "some"),
    "search too many": (f"{SCORE} --pattern 1:2 --search 10 --search-for best", "--search-for", "best", "median"),
    "search and criterion": (
        f"{SCORE} --n-pruned 2 --search 5 --criterion random",
        "--criterion random",
        "no meaning with --search",
    ),
    "search-for alone": (f"{SCORE} --n-pruned 2 --search-for median", "--search-for median", "needs --search"),
    "clean criterion": (
        f"{SCORE} --n-pruned 2 --clean-latents --criterion sensitivity",
        "--clean-latents",
        "--criterion sensitivity|is for DiT",
    ),
    "clean search": (f"{SCORE} --n-pruned 2 --clean-latents --search 2", "--clean-latents", "--search 2|is for DiT"),
    "N > M": (f"{LEARN} --pattern 3:2", "--pattern 3:2", "N <= M"),
    "N < 1": (f"{LEARN} --pattern 0:2", "--pattern 0:2", "1 <= N"),
    "not covered": (f"{LEARN} --pattern 2:4x2", "--pattern 2:4x2", "covers 8 layers, but there are 12"),
    "malformed pattern": (f"{LEARN} --pattern 2-4", "--pattern 2-4", "expected N:M"),
    "no pattern": (LEARN, "--model DiT-T/2", "no gates", "--pattern"),
    "pairs do not fit": (f"{KD} --load-teacher {{teacher}} --pattern 1:4", "--pattern 1:4", "keeps 3 of 12"),
    "pairs and gate-samples": (
        f"{PAIRS} --gate-samples 0.5",
        "--gate-samples",
        "no meaning with --gate-gradient pairs",
    ),
    "pairs and dense": (f"{PAIRS} --dense", "--dense", "no meaning with --gate-gradient pairs"),
    "pairs and tau": (f"{PAIRS} --tau-range 2 1", "--tau-range", "no meaning with --gate-gradient pairs"),
    "only intervals": (
        f"{KD} --load-teacher {{teacher}} --epochs 1 --interval-steps 4",
        "--interval-steps 4",
        "has 4 steps",
    ),
    "learned start": (f"{LEARN} --pattern 1:2 --init learned", "--init learned", "needs --delta-w"),
    "tau": (f"{LEARN} --pattern 1:2 --tau-range 4", "--tau-range", "expected 2 arguments"),
    "tau 0": (f"{LEARN} --pattern 1:2 --tau-range 4 0", "--tau-range", "0: expected a number above 0"),
    # weights
    "deeper": (f"train --model DiT-T/2 --load-weight {{student}} {TRAIN}", "--load-weight", "6 layers", "DiT-T-D6/2"),
    "wider": (f"train --model DiT-S/2 --load-weight {{teacher}} {TRAIN}", "of width 384", "take --model DiT-T/2"),
    "learning depth": (
        f"prune_by_learning --model DiT-T-1-2 --load-weight {{student}} {TRAIN}",
        "--load-weight",
        "take --model DiT-T-D6/2",
    ),
    "teacher depth": (f"{KD} --load-teacher {{student}}", "--load-teacher", "6 layers", "take --teacher DiT-T-D6/2"),
    "index depth": (f"{INDEX} --scheme bk-sdm --model DiT-S/2", "--ckpt", "take --model DiT-T/2"),
    "sample depth": ("sample --model DiT-T/2 --ckpt {student}", "--ckpt", "take --model DiT-T-D6/2"),
    "sample_ddp depth": ("sample_ddp --model DiT-T/2 --ckpt {student}", "--ckpt", "take --model DiT-T-D6/2"),
    "sample classes": ("sample --ckpt {student} --num-classes 11", "num_classes 10", "--num-classes"),
    "sample size": ("sample --ckpt {student} --image-size 16", "--image-size"),
    "sample_ddp size": ("sample_ddp --ckpt {student} --image-size 16", "--image-size"),
    "no teacher": (KD, "--load-teacher", "missing"),
    "no weights": (f"prune_by_learning --model DiT-T-1-2 {TRAIN}", "--load-weight", "missing"),
    "gated name": (f"train --model DiT-T-1-2 {TRAIN}", "--model DiT-T-1-2", "gates", "plain name"),
    "missing": (f"train --load-weight absent.pt {TRAIN}", "--load-weight absent.pt", "no such file"),
    "missing teacher": (f"{KD} --load-teacher absent.pt", "--load-teacher absent.pt", "no such file"),
    "missing ckpt": ("sample --model DiT-T/2 --ckpt absent.pt", "--ckpt absent.pt", "no such file"),
    "missing ckpt ddp": ("sample_ddp --model DiT-T/2 --ckpt absent.pt", "--ckpt absent.pt", "no such file"),
    "missing resume": (f"train --model DiT-T/2 {TRAIN} --resume absent.pt", "--resume absent.pt", "no such file"),
    "wrong resume": (f"train --model DiT-T/2 {TRAIN} --resume {{teacher}}", "--resume", "not a training state"),
    "truncated": (f"train --load-weight {{truncated}} {TRAIN}", "--load-weight", "truncated"),
    "truncated ckpt": ("prune_by_index --ckpt {truncated} --scheme bk-sdm --save-model p.pt", "--ckpt", "truncated"),
    "text": ("sample --ckpt {text}", "--ckpt", "not a checkpoint"),
    "other tensors": ("sample --ckpt {tensors}", "--ckpt", "not the weights of a DiT"),
    "foreign code": (f"train --load-weight {{foreign}} {TRAIN}", "--load-weight", "refused", "foreign code"),
    "foreign ckpt": ("sample_ddp --ckpt {foreign}", "--ckpt", "refused", "foreign code"),
    # data
    "empty latents": ("train --model DiT-T/2 --data-path {empty}", "--data-path", "no latents", "extract_features"),
    "no folder": ("train --model DiT-T/2 --data-path absent", "--data-path absent", "no latents"),
    "pending": ("train --model DiT-T/2 --data-path {pending}", "--data-path", "3 of 64", "not encoded"),
    "unpaired": ("train --model DiT-T/2 --data-path {unpaired}", "--data-path", "7.npy", "extract_features"),
    "mismatched": (
        "train --model DiT-T/2 --data-path {mismatched} --global-batch-size 16",
        "--data-path",
        "extract_features",
    ),
    "no shape": (
        "train --model DiT-T/2 --data-path {no_shape} --global-batch-size 16",
        "--data-path",
        "extract_features",
    ),
    "published label": (
        "train --model DiT-T/2 --data-path {bad_label} --global-batch-size 4",
        "--data-path",
        "3.npy|damaged",
    ),
    "published shape": (
        "train --model DiT-T/2 --data-path {flat} --vae none --image-size 8 --global-batch-size 4",
        "--data-path|--image-size",
    ),
    "latents size": (f"train --model DiT-T/2 {TRAIN} --image-size 16", "--image-size 16", "16x16", "8x8"),
    "latents channels": (f"train --load-weight {{four}} {TRAIN}", "in_channels|channels", "--vae"),
    "label too high": (f"train --model DiT-T/2 {TRAIN} --num-classes 9", "--num-classes 9", r"0\.\.9", "give"),
    "small data": (
        "train --model DiT-T/2 --data-path {latents} --global-batch-size 65",
        "--global-batch-size 65",
        "64 images",
        "take 64 or less",
    ),
    "score without data": (
        "prune_by_score --ckpt {teacher} --save-model p.pt --n-pruned 2",
        "--data-path data/imagenet/train",
        "no latents|no images",
    ),
    "score corrupt": (
        "prune_by_score --ckpt {teacher} --save-model p.pt --n-pruned 2 --nsamples 4 --batch-size 2 --data-path {bad}",
        "--data-path",
        "b.png",
    ),
    "few samples": (f"{SCORE} --n-pruned 2 --nsamples 8", "--nsamples 8", "take 16"),
    "many samples": (f"{SCORE} --n-pruned 2 --nsamples 80", "--nsamples 80", "64 images"),
    "no pictures": ("extract_features --data-path {empty} --vae none --image-size 8", "--data-path", "subfolder"),
    "many classes": (f"{EXTRACT} --num-classes 9", "--num-classes 9", "10 classes"),
    "image size": ("extract_features --data-path {pictures} --image-size 30", "--image-size 30", "multiple of 8"),
    "label": ("sample --ckpt {student} --labels 3,10", "--labels", "10", r"0\.\.9"),
    # names and values
    "model": (f"train --model DiT-Q/2 {TRAIN}", "--model", "DiT-Q/2", "expected one of"),
    "teacher model": (f"{KD} --teacher DiT-X", "--teacher", "DiT-X", "expected one of"),
    "device": (f"train --model DiT-T/2 {TRAIN} --device gpu", "--device gpu", "cpu"),
    "other device": (f"train --model DiT-T/2 {TRAIN} --device mps", "--device mps", "cpu"),
    "absent gpu": (f"train --model DiT-T/2 {TRAIN} --device cuda", "--device cuda", "--device cpu"),
    "extract device": (f"{EXTRACT} --device gpu", "--device gpu", "cpu"),
    "sample device": ("sample --ckpt {student} --device gpu", "--device gpu", "cpu"),
    "vae": ("extract_features --data-path {pictures} --vae best", "--vae best", "ema, mse, none", "folder"),
    "vae of sample": ("sample_ddp --ckpt {student} --vae best", "--vae best", "(ema, mse|kl16), none"),
    "vae folder": ("extract_features --data-path {pictures} --vae {empty}", "--vae", "cannot load|no config.json"),
    "preview vae": (f"{INDEX} --scheme bk-sdm --preview --image-size 64 --vae {{empty}}", "--vae|--image-size"),
    "steps": ("sample --ckpt {student} --num-sampling-steps 2000", "--num-sampling-steps", "2000"),
    "ddim steps": (
        "sample_ddp --ckpt {student} --num-sampling-steps 300 --sampler ddim",
        "--num-sampling-steps",
        "300",
    ),
    "preview steps": (f"{INDEX} --scheme bk-sdm --preview --num-sampling-steps 1001", "--num-sampling-steps", "1001"),
    "epochs": (f"train --model DiT-T/2 {TRAIN} --epochs 0", "--epochs", "expected 1"),
    "rate": (f"train --model DiT-T/2 {TRAIN} --lr -1", "--lr", "expected 0"),
    "nan": (f"train --model DiT-T/2 {TRAIN} --ema-decay nan", "--ema-decay", "nan"),
    "alpha": (f"{KD} --alpha 1.5", "--alpha", "expected 0 to 1"),
    # outputs
    "features-path": (f"{EXTRACT} --features-path {{text}}/f", "--features-path", "cannot be written", "another path"),
    "results-dir": (f"train --model DiT-T/2 {TRAIN} --results-dir {{text}}/r", "--results-dir", "cannot be written"),
    "results-dir kd": (
        f"{KD} --load-teacher {{teacher}} --results-dir {{text}}/r",
        "--results-dir",
        "cannot be written",
    ),
    "run folder": (f"train --model DiT-T/2 {TRAIN} --results-dir {{runs}}", "--results-dir|--prefix", "DiT-T-2"),
    "save-model": (f"{LEARN} --pattern 1:2 --save-model {{text}}/p.pt", "--save-model", "cannot be written"),
    "save-model folder": (f"{SCORE} --n-pruned 2 --save-model {{empty}}", "--save-model", "is a folder"),
    "index output": (f"{INDEX} --scheme bk-sdm --save-model {{text}}/p.pt", "--save-model", "cannot be written"),
    "output": ("sample --ckpt {student} --output {text}/g.png", "--output", "cannot be written"),
    "sample-dir": ("sample_ddp --ckpt {student} --sample-dir {text}/s", "--sample-dir", "cannot be written"),
    "pack": ("sample_ddp --pack absent", "--pack absent", "no such folder"),
    "pack empty": ("sample_ddp --pack {empty}", "--pack", "no images"),
}
ONLY = {  # cases that not all families know
    "ddim steps": ["DiT"],
    "latents channels": ["DiT", "SiT"],
    "steps": ["DiT", "MAR"],
    "preview steps": ["DiT", "MAR"],
}
NAMED = [name for name, family in FAMILIES.items() if family.models]
ALL = [(name, case) for name in NAMED for case in CASES if name in ONLY.get(case, FAMILIES)]
OTHER_WORDS = {"MAR": {"of width 384": "of width 768", "keeps 3 of 12": "crosses from layer 5 to 6"}}


class Foreign:
    """A pickle of this makes the folder `executed` where it is opened."""

    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.fixture(scope="module")
def places(tmp_path_factory, latents, pictures, family):
    """Good and bad files by name."""
    folder = tmp_path_factory.mktemp("places")
    files = {name: folder / f"{name}.pt" for name in ("truncated", "text", "tensors", "foreign", "four")}
    content = family.weights.read_bytes()
    files["truncated"].write_bytes(content[: len(content) // 2])
    files["text"].write_text("no weights here\n")
    save_weights(files["tensors"], {"weight": torch.zeros(3)})
    torch.save({"model": Foreign()}, files["foreign"])
    key = "x_embedder.proj.weight"
    four = {**family.state, key: torch.zeros(len(family.state.get(key, [])), 4, 2, 2)}
    save_weights(files["four"], four, model=family.model, num_classes=10, vae="none")
    names = "empty pending mismatched no_shape unpaired bad_label flat bad runs"
    folders = {name: folder / name for name in names.split()}
    folders["empty"].mkdir()
    shutil.copytree(latents, folders["pending"])
    np.load(folders["pending"] / "status.npy", mmap_mode="r+")[[1, 5, 6]] = 0
    for name in ("mismatched", "no_shape"):
        shutil.copytree(latents, folders[name])
    np.save(folders["mismatched"] / "features.npy", np.zeros((64, 2, 4, 8, 8), np.float32))
    (folders["no_shape"] / "metadata.json").write_text('{"image_size": 8, "num_classes": 10, "vae": "none"}')
    for name, shape in (("unpaired", (2, 3, 8, 8)), ("bad_label", (2, 3, 8, 8)), ("flat", (3, 8, 8))):
        for kind, value in (("features", np.zeros(shape, np.float32)), ("labels", np.zeros(1, np.int64))):
            (folders[name] / f"i_{kind}").mkdir(parents=True)
            for i in range(8):
                np.save(folders[name] / f"i_{kind}" / f"{i}.npy", value)
    (folders["unpaired"] / "i_labels" / "7.npy").unlink()
    (folders["bad_label"] / "i_labels" / "3.npy").write_bytes(b"no array")
    for i in range(10):  # as many classes as the teacher has
        (folders["bad"] / str(i)).mkdir(parents=True)
    for i in range(4):
        (folders["bad"] / "0" / f"{i}b.png").write_text("no picture")
    folders["runs"].mkdir()
    (folders["runs"] / family.folder.name).touch()
    made = {**files, **folders, "latents": latents, "pictures": pictures}
    names = {**made, "teacher": family.weights, "student": family.student}
    return SimpleNamespace(folder=folder, names=names, family=family)


def command_line(text, places):
    """Words of a command, with the family's names and files."""
    return [word.format(**places.names) for word in places.family.translate(text).split()]


def listing(*folders):
    """Names of all files and folders; of files also the time and size."""
    found = [f for folder in folders for f in folder.rglob("*")]
    return {(f, f.is_file() and (f.stat().st_mtime_ns, f.stat().st_size)) for f in found}


def message_of(run_script, capsys, words):
    """What a script says and ends with; any other error than that for wrong input fails the test."""
    with pytest.raises((InputError, SystemExit)) as caught:
        run_script(*words)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code not in (0, None)
        return capsys.readouterr().err
    return str(caught.value)


@pytest.mark.parametrize(("family", "case"), ALL, indirect=["family"])
def test_wrong_input(family, case, places, tmp_path, run_script, capsys, monkeypatch):
    """Named, explained, and without a trace on the disk."""
    command, *expected = CASES[case]
    monkeypatch.chdir(tmp_path)
    watched = (tmp_path, places.folder)
    before = listing(*watched)
    message = message_of(run_script, capsys, command_line(command, places))
    others = OTHER_WORDS.get(family.name, {})
    missing = [part for part in expected if not re.search(others.get(part) or family.translate(part), message)]
    assert not missing, message
    assert not {name for name, _ in listing(*watched) ^ before}


@pytest.mark.parametrize("name", ["train", "train_masked_kd", "prune_by_learning"])
def test_batch_not_divisible(name, places, tmp_path, run_script, capsys, monkeypatch):
    """Found from the launcher's environment, before any process group or file."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.chdir(tmp_path)
    command = {"train": f"train --model DiT-T/2 {TRAIN}", "train_masked_kd": f"{KD} --load-teacher {{teacher}}"}
    command = command.get(name, f"{LEARN} --pattern 1:2")
    message = message_of(run_script, capsys, command_line(command, places))
    assert "--global-batch-size 16: not divisible by 3 processes; take a multiple" in message
    assert not list(tmp_path.iterdir())


@pytest.fixture
def with_corrupt(pictures, tmp_path):
    """The pictures, two of them damaged."""
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    files = sorted(folder.glob("*/*.png"))
    files[3].write_bytes(files[3].read_bytes()[:40])
    files[40].write_text("no picture")
    return SimpleNamespace(folder=folder, files=files)


def test_corrupt_image(with_corrupt, latents, tmp_path, run_script):
    """Named at the end, the rest kept; training takes the good ones; a mended image is encoded by a second call."""
    words = ["--data-path", with_corrupt.folder, "--vae", "none", "--image-size", 8]
    words += ["--features-path", tmp_path / "f"]
    with pytest.raises(RunError, match="2 corrupt") as caught:
        run_script("extract_features", *words)
    assert all(str(with_corrupt.files[i]) in str(caught.value) for i in (3, 40))
    good = [i for i in range(64) if i not in (3, 40)]
    made, whole = (np.load(folder / "features.npy") for folder in (tmp_path / "f", latents))
    assert (made[good] == whole[good]).all()
    flags = ["--model", "DiT-T/2", "--epochs", "1", "--global-batch-size", "62", "--num-workers", "0", "--results-dir"]
    run_script("train", *flags, tmp_path / "r", "--data-path", tmp_path / "f")
    for i in (3, 40):
        shutil.copy(with_corrupt.files[0], with_corrupt.files[i])
    run_script("extract_features", *words)
    assert (np.load(tmp_path / "f" / "status.npy") == 1).all()
    assert (np.load(tmp_path / "f" / "features.npy")[3] == whole[0]).all()


def test_other_data_in_the_same_folder(pictures, latents_copy, run_script):
    """Latents of other settings are not overwritten."""
    before = listing(latents_copy)
    words = ["--data-path", pictures, "--vae", "none", "--image-size", 16, "--features-path", latents_copy]
    with pytest.raises(InputError, match=r"--features-path .*holds latents of other data .*take another"):
        run_script("extract_features", *words)
    assert listing(latents_copy) == before


@pytest.mark.parametrize("name", ["features.npy", "metadata.json"])
def test_extraction_into_a_damaged_folder(pictures, latents_copy, run_script, name):
    (latents_copy / name).write_bytes((latents_copy / name).read_bytes()[:20])
    words = ["--data-path", pictures, "--vae", "none", "--image-size", 8, "--features-path", latents_copy]
    with pytest.raises(InputError, match="--features-path"):
        run_script("extract_features", *words)


def test_exploding_loss(teacher, latents, tmp_path, run_script):
    """A loss that is not finite ends the run, naming the step, and no state is saved."""
    state = {**teacher.state, "final_layer.linear.bias": torch.full((24,), 1e30)}
    bad = tmp_path / "bad.pt"
    save_weights(bad, state, model="DiT-T/2", num_classes=10, vae="none")
    words = ["--load-weight", bad, "--data-path", latents, "--results-dir", tmp_path, "--global-batch-size", 16]
    with pytest.raises(RunError, match="not finite at step 1"):
        run_script("train", *words, "--epochs", 1, "--num-workers", 0, "--log-every", 2)
    assert not list(tmp_path.glob("*/checkpoints/*"))


@pytest.mark.parametrize("case", ["index too high", "truncated"])
def test_exit_status(case, places, tmp_path, launch, monkeypatch):
    """In a process of its own: a message and a status, no traceback."""
    monkeypatch.chdir(tmp_path)
    result = launch(0, *command_line(CASES[case][0], places))
    assert result.returncode != 0
    assert "error:" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
