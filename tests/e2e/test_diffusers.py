"""Weights that go to diffusers draw the same there, and come back as the same bits; so do folders of others."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from disturbed import without_times
from safetensors.torch import load_file, save_file

import export_diffusers
import sample
from engine.checkpoint import Weights, save_weights
from engine.errors import InputError
from engine.run import Run
from engine.sampling import ImageDraws, SamplingPlan
from engine.vae import LatentSpace
from engine.weight_files import read_weights
from families import create_model, depth_name, family_of
from families.dit_diffusers import OWN_KEYS

STEPS = 10


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A folder with a small AutoencoderKL that shrinks by 2."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, **blocks)
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    vae.save_pretrained(folder)
    return folder


def write_network(path, name, vae, **config):
    """Random weights of every parameter, in a file with facts."""
    torch.manual_seed(0)
    net = create_model(name, **config)
    for key, p in net.named_parameters():
        if key != "pos_embed":
            torch.nn.init.normal_(p, std=0.05)
    facts = {"model": depth_name(name, (config["depth"],)) if "depth" in config else name, "vae": str(vae)}
    save_weights(path, net.state_dict(), **facts, num_classes=config["num_classes"], kept=[0, 2])
    return path


@pytest.fixture(scope="module", params=["DiT-XL/2", "DiT-S/2"])
def exported(request, tmp_path_factory, autoencoder):
    """(weights, the pipeline's folder) of two layers: wide enough for a table of all times, and not."""
    folder = tmp_path_factory.mktemp("exported")
    config = {"depth": 2, "input_size": 8, "num_classes": 1000}
    path = write_network(folder / "cut.safetensors", request.param, autoencoder, **config)
    run(export_diffusers, ckpt=path, output=folder / "pipeline", num_sampling_steps=STEPS)
    return path, folder / "pipeline"


def run(script, **flags):
    """Run a script in this process."""
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    script.main(script.parse_args([word for word in words if word != "True"]))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_pipeline_draws_the_same(exported, scale, monkeypatch):
    """With DDIM, the same start noise and guidance of all channels."""
    path, folder = exported
    weights = Weights(path, "--ckpt")
    family = family_of("DiT-XL/2")
    space = LatentSpace(16, weights.facts["vae"], 1000, family.latents)
    own = {"sampler": "ddim", "cfg_channels": 4, "cfg_interval": [0.0, 1.0]}
    sampler = SamplingPlan(weights.facts["model"], weights, space, own, STEPS, scale).load(Run("cpu"))
    labels, noise = torch.tensor([3, 999]), ImageDraws(0, range(2), sampler.shape, "cpu").start_noise()
    ours = sampler.sample(ImageDraws(0, range(2), sampler.shape, "cpu"), labels) / 2 + 0.5

    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: noise)
    arguments = {"guidance_scale": scale, "num_inference_steps": STEPS, "output_type": "pt"}
    theirs = pipeline(class_labels=labels.tolist(), **arguments).images
    assert ours.std() > 0.05
    assert (theirs - ours.clamp(0, 1)).abs().max() <= 2e-3


def test_labels(exported):
    pipeline = DiTPipeline.from_pretrained(exported[1])
    assert len(pipeline.labels) >= 998  # two of ImageNet's words mean two classes each
    assert pipeline.get_label_ids(["golden retriever", "lesser panda"]) == [207, 387]


def test_comes_back_as_the_same_bits(exported):
    path, folder = exported
    for source in (folder, folder / "transformer"):
        weights = Weights(source, "--ckpt")
        state, expected = weights.state, read_weights(path, "--ckpt")
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
        assert weights.facts["kept"] == [0, 2]
        assert weights.facts["model"] == Weights(path, "--ckpt").facts["model"]


def test_folder_as_weights(exported, tmp_path):
    """A script takes the pipeline's folder, and finds autoencoder, classes and size in it."""
    run(sample, ckpt=exported[1], output=tmp_path / "a.png", num_sampling_steps=2, labels="1,2", cfg_scale=1)
    run(sample, ckpt=exported[0], output=tmp_path / "b.png", num_sampling_steps=2, labels="1,2", cfg_scale=1)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_transformer_of_any_classes(tmp_path):
    """A network of the digits, with another null class than the pipeline's."""
    path = write_network(tmp_path / "d.pt", "DiT-T/4", "none", input_size=8, in_channels=3, num_classes=10)
    run(export_diffusers, ckpt=path, output=tmp_path / "out", transformer_only=True)
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "out").eval()
    weights = Weights(path, "--ckpt")
    ours = weights.build("DiT-T/4", {**weights.read_config("DiT-T/4")}, "cpu").eval()
    t, y = torch.arange(0, 1000, 20), torch.arange(50) % 11
    x = torch.randn(50, 3, 8, 8)
    with torch.no_grad():
        expected, found = ours(x, t, y), theirs(x, timestep=t, class_labels=y).sample
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_saved_again_without_the_original(exported, tmp_path):
    """diffusers saves the table of times and not what it was made of: that is refused, not taken for weights."""
    DiTTransformer2DModel.from_pretrained(exported[1] / "transformer").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"embedding of the time is a table, and original\.safetensors"):
        Weights(tmp_path, "--ckpt").check_numbers()


def test_trained_on_in_diffusers(exported, tmp_path):
    """What lies beside an export is taken for what the table in it was made of, and for nothing else."""
    folder = tmp_path / "export"
    shutil.copytree(exported[1] / "transformer", folder)
    digest = Weights(folder, "--ckpt").digest
    original = load_file(folder / "original.safetensors")
    assert sorted(original) == sorted(OWN_KEYS)
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for key in state:
        if key.endswith("timestep_embedder.linear_2.weight"):
            state[key] += 1e-3
    save_file(state, path, {"format": "pt"})
    assert Weights(folder, "--ckpt").digest != digest
    with pytest.raises(InputError, match="its embedding of the time is no more the table"):
        Weights(folder, "--ckpt").check_numbers()


def test_what_is_there_stays(exported, tmp_path):
    """A folder with something else is no place for an export; an earlier export is."""
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(InputError, match="is not empty, and no earlier export"):
        run(export_diffusers, ckpt=exported[0], output=tmp_path)
    with pytest.raises(InputError, match="belongs to --ckpt"):
        run(export_diffusers, ckpt=exported[1] / "transformer", output=exported[1])
    for _ in range(2):
        run(
            export_diffusers, ckpt=exported[0], output=tmp_path / "new", transformer_only=True, num_sampling_steps=STEPS
        )


def write_foreign(folder, **config):
    """A folder that diffusers made; all blocks share one embedding."""
    torch.manual_seed(0)
    usual = {"num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 2, "sample_size": 8, "norm_eps": 1e-6}
    net = DiTTransformer2DModel(**{**usual, "num_embeds_ada_norm": 1000, "out_channels": 8, **config})
    first = net.transformer_blocks[0].norm1.emb.state_dict()
    for block in net.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    net.save_pretrained(folder)
    return net


@pytest.mark.parametrize("layout", ["whole", "shards", "pickle"])
def test_folder_of_others(tmp_path, layout):
    net = write_foreign(tmp_path)
    whole = tmp_path / "diffusion_pytorch_model.safetensors"
    if layout == "shards":
        whole.unlink()
        net.save_pretrained(tmp_path, max_shard_size="300KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    if layout == "pickle":
        torch.save(load_file(whole), whole.with_suffix(".bin"))
        whole.unlink()
    weights = Weights(tmp_path, "--ckpt")
    assert weights.describe()["model"] == "DiT-T-D2/2"
    state, theirs = weights.state, net.state_dict()
    assert torch.equal(state["blocks.1.attn.qkv.weight"][96:192], theirs["transformer_blocks.1.attn1.to_k.weight"])
    weights.check_fit("DiT-T-D2/2", weights.read_config("DiT-T-D2/2"))
    assert len(weights.digest) == 16


def test_wrong_folders(tmp_path):
    def reject(match, folder=tmp_path):
        with pytest.raises(InputError, match=match):
            Weights(folder, "--ckpt").check_numbers()

    reject("no config.json in it or in its folder transformer")
    write_foreign(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def change(**changed):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))

    change(_class_name="UNet2DModel")
    reject("is of the class UNet2DModel; diffusers .* has no such transformer")
    change(num_layers=3)
    reject("transformer_blocks.2.* is in one of config.json and the weights only")
    change(norm_type="layer_norm")
    reject("norm_type is 'layer_norm'; a DiT has ada_norm_zero")
    change(num_attention_heads="many")
    reject("num_attention_heads is 'many'; expected a whole number")
    change(num_attention_heads=8, attention_head_dim=12)
    reject("8 heads of 12, expected 4 heads of 24")
    change()
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"] += 1
    save_file(state, path, {"format": "pt"})
    reject("is not that of block 0; in a DiT all blocks share one embedding")
    path.unlink()
    reject("no weights in it; expected diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("name", "config", "flags", "message"),
    [
        ("DiT-T/2", {"num_classes": 10}, {}, "takes class 1000 for no class"),
        ("DiT-T/4", {"num_classes": 1000, "in_channels": 3}, {"vae": "none"}, "this network works on pixels"),
        ("SiT-T/2", {"num_classes": 1000}, {"model": "SiT-T/2"}, "diffusers has no class for a SiT"),
        (
            "DiT-T/2",
            {"num_classes": 1000},
            {"transformer_only": True, "num_sampling_steps": 250},
            "--num-sampling-steps 250: a network of width 96 can be exported for up to 96 steps",
        ),
    ],
)
def test_refused(tmp_path, name, config, flags, message):
    path = write_network(tmp_path / "w.pt", name, flags.get("vae", "ema"), **{"input_size": 8, **config})
    with pytest.raises(InputError, match=message):
        run(export_diffusers, ckpt=path, output=tmp_path / "out", **flags)


def test_model_card(exported, tmp_path):
    """Whose weights these are, what was kept, and the licence of what they were made from."""
    path, _ = exported
    cut = tmp_path / "cut.safetensors"
    shutil.copy(path, cut)
    facts = json.loads((path.parent / f"{path.name}.json").read_text())
    source = "pretrained/DiT-XL-2-256x256.pt"
    (tmp_path / "cut.safetensors.json").write_text(json.dumps({**facts, "source": source, "pattern": "1:2"}))
    numbers = {"is": 200.123, "fid": 2.5, "precision": 0.8, "recall": 0.6, "samples": 50000, "reference_images": 10000}
    (tmp_path / "numbers.json").write_text(json.dumps({**numbers, "ref": "ref.npz"}))
    more = {"data": "imagenet-1k", "metrics": tmp_path / "numbers.json", "transformer_only": True}
    run(export_diffusers, ckpt=cut, output=tmp_path / "out", num_sampling_steps=STEPS, **more)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("it knows the times: 10" in card) == ("S" in facts["model"])
    for text in (
        '---\nlicense: "cc-by-nc-4.0"\nlibrary_name: "diffusers"\nbase_model: "facebook/DiT-XL-2-256"\n',
        'datasets: ["imagenet-1k"]',
        "cut.safetensors, made from DiT-XL-2-256x256.pt",
        "kept of the original: [0, 2]",
        "pattern of the cut: 1:2",
        "| is | fid | precision | recall |",
        "| 200.1 | 2.5 | 0.8 | 0.6 |",
        "50,000 samples against 10,000 images of ref.npz",
    ):
        assert text in card
    lines = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "out"))
    exec(lines, {})


def test_works_as_models_of_diffusers_do(exported, tmp_path):
    """Saved and loaded again, in half precision, with activations recomputed: what its own tests ask of a model."""
    folder = exported[1] / "transformer"
    net = DiTTransformer2DModel.from_pretrained(folder)
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([0, 900])}
    inputs["class_labels"] = torch.tensor([1, 1000])
    net.eval()
    with torch.no_grad():
        expected = net(**inputs).sample
        net.save_pretrained(tmp_path)
        again = DiTTransformer2DModel.from_pretrained(tmp_path).eval()
        assert torch.equal(again(**inputs).sample, expected)
        half = DiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float16).eval()
        assert {p.dtype for p in half.parameters()} == {torch.float16}
        found = half(**{**inputs, "hidden_states": inputs["hidden_states"].half()}).sample.float()
        assert ((found - expected).norm() / expected.norm()).item() < 2e-2

    def gradients():
        net.zero_grad()
        net(**inputs).sample.square().mean().backward()
        return [p.grad.clone() for p in net.parameters()]

    plain = gradients()
    net.enable_gradient_checkpointing()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, gradients(), strict=True))


def test_folders_in_training(run_script, teacher, latents, tmp_path):
    """A student and its teacher, both as folders of diffusers: the same losses as with the files."""

    def train(student, whole, name):
        words = ["--load-weight", student, "--load-teacher", whole, "--teacher", teacher.model]
        words += ["--data-path", latents, "--results-dir", tmp_path / name, "--global-batch-size", 16, "--epochs", 1]
        run_script("train_masked_kd", *words, "--num-workers", 0, "--log-every", 2)
        (path,) = (tmp_path / name).glob("*/metrics.jsonl")
        return without_times(map(json.loads, path.read_text().splitlines()))

    for source in (teacher.student, teacher.weights):
        run(export_diffusers, ckpt=source, output=tmp_path / source.stem, transformer_only=True)
    rows = train(tmp_path / teacher.student.stem, tmp_path / teacher.weights.stem, "folders")
    assert rows == train(teacher.student, teacher.weights, "files")
    assert len(rows) > 2
