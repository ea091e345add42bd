"""The example for one's own pictures, as it is called."""

import os
import subprocess
import sys

from PIL import Image

from engine.checkpoint import read_facts
from engine.weight_files import read_weights

SIZES = {
    "MODEL": "DiT-T/2",
    "IMAGE_SIZE": 8,
    "BATCH": 16,
    "EPOCHS": 1,
    "LEARN_EPOCHS": 1,
    "RECOVERY_EPOCHS": 1,
    "SAMPLING_STEPS": 3,
    "PYTHON": sys.executable,
    "OMP_NUM_THREADS": 1,
}


def call(root, *words, **variables):
    env = {**os.environ, **{name: str(value) for name, value in {**SIZES, **variables}.items()}}
    command = [root / "examples/own_data/run.sh", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_from_pictures_to_a_pruned_network(root, pictures, tmp_path):
    """Half of the layers are left, in the student too; a folder may have a space in its name."""
    out = tmp_path / "my output"
    done = call(root, pictures, out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ python")] == [
        "extract_features.py",
        "train.py",
        "prune_by_learning.py",
        "train_masked_kd.py",
        "sample.py",
    ]
    facts = read_facts(out / "pruned.safetensors")
    assert (facts["model"], facts["pattern"], len(facts["kept"])) == ("DiT-T-D6/2", "1:2x6", 6)
    (state,) = (out / "runs" / "student-DiT-T-D6-2" / "checkpoints").glob("*.pt")
    assert len({key.split(".")[1] for key in read_weights(state, "--ckpt") if key.startswith("blocks.")}) == 6
    assert Image.open(out / "student.png").size[0] > 8


def test_wrong_calls(root, tmp_path):
    """It ends at the first command that fails, with that command's message, and makes nothing up."""
    assert call(root, tmp_path).stderr.startswith("usage:")
    done = call(root, tmp_path / "nothing here", tmp_path / "out")
    assert done.returncode == 1
    assert "extract_features.py: error: --data-path" in done.stderr
    assert "train.py" not in done.stdout
