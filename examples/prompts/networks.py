"""Write a small pipeline of diffusers for scikit-learn's digits, whose transformer is still untrained.

Example:
  python examples/prompts/networks.py --name sd3 --output sd3

The tokenizers know the words of the captions. The text encoders have random weights, which stay. The autoencoder is
trained here on the digits, for some seconds.
"""

import argparse
from pathlib import Path

import diffusers
import torch
import transformers
from sklearn.datasets import load_digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPELLINGS = (  # two captions of every digit
    [f"a handwritten {word}" for word in WORDS],
    [f"the digit {digit}" for digit in range(10)],
)
PROMPTS = [caption for spelling in SPELLINGS for caption in spelling]
TOKENS = 5  # of the longest caption, with its two ends
TEXT_WIDTH = 16
SIZE = 8  # pixels per side
LATENTS = {"in_channels": 4, "sample_size": SIZE // 2, "patch_size": 2}  # the network sees four tokens
WIDTH = {"num_attention_heads": 2, "attention_head_dim": 32}
CLIP = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": TEXT_WIDTH // 2, "intermediate_size": 32}


def train_autoencoder(steps=400, batch=64, **options):
    """An autoencoder of the digits, of factor 2, whose latents are scaled to deviation 1; and its mean error.

    options: of its class. Latents are also shifted to mean 0 where the options have a shift_factor.
    """
    net = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[12, 12],
        mid_block_add_attention=False,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=LATENTS["in_channels"],
        sample_size=SIZE,
        **options,
    )
    pictures = torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    for _ in range(steps):
        x = pictures[torch.randint(len(pictures), (batch,))]
        posterior = net.encode(x).latent_dist
        error = (net.decode(posterior.sample()).sample - x).square().mean()
        optimizer.zero_grad()
        (error + 1e-4 * posterior.kl().mean() / LATENTS["in_channels"]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        latents = net.encode(pictures).latent_dist.mean
        error = (net.decode(latents).sample - pictures).abs().mean()
    known = {"scaling_factor": 1 / float(latents.std())}
    if "shift_factor" in options:
        known["shift_factor"] = float(latents.mean())
    net.register_to_config(**known)
    return net.eval(), float(error)


def make_t5_tokenizer():
    """One token for every word of the captions."""
    words = sorted({f"▁{word}" for caption in PROMPTS for word in caption.split()})
    pieces = [(word, 0.0) for word in ("<pad>", "</s>", "<unk>")] + [(word, -1.0) for word in words]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=300)


def make_clip_tokenizer():
    """One token for every word of the captions, and no more tokens for a prompt than the longest of them needs."""
    return transformers.CLIPTokenizer(model_max_length=TOKENS).train_new_from_iterator(PROMPTS, 1000)


def make_clip(tokenizer):
    """A text encoder of random weights; its words are as far apart as trained ones."""
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=TOKENS,
        projection_dim=CLIP["hidden_size"],
        pad_token_id=tokenizer.pad_token_id,
        **marks,
        **CLIP,
    )
    net = transformers.CLIPTextModelWithProjection(config)
    with torch.no_grad():
        net.get_input_embeddings().weight.mul_(50)
    return net


def make_pixart():
    """A PixArt-Sigma with a T5, and its autoencoder's options.

    Two things save time: the transformer reads the text without a projection, as all of its 300 places are computed;
    and it predicts the velocity, by which it learns what prompts mean in a third of the steps.
    """
    tokenizer = make_t5_tokenizer()
    sizes = {"d_model": TEXT_WIDTH, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2}
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(tokenizer), **sizes)),
        vae=None,
        transformer=diffusers.PixArtTransformer2DModel(
            num_layers=12, out_channels=8, cross_attention_dim=TEXT_WIDTH, **LATENTS, **WIDTH
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear", prediction_type="v_prediction"
        ),
    ), {}


def make_sd3():
    """A Stable Diffusion 3 with two CLIPs and a Funnel transformer in place of the T5, and its autoencoder's options.

    The pipeline always makes 256 tokens for the third encoder, or as many zeros for none, and the network attends to
    all that come out: with a T5, a step on a CPU would take twenty times as long. A Funnel transformer pools its
    tokens, here to one.
    """
    tokenizers = [make_clip_tokenizer(), make_clip_tokenizer(), make_t5_tokenizer()]
    funnel = transformers.FunnelConfig(
        vocab_size=len(tokenizers[2]),
        block_sizes=[1] * 9,
        d_model=TEXT_WIDTH,
        n_head=2,
        d_head=8,
        d_inner=32,
        separate_cls=False,
        truncate_seq=False,
    )
    return diffusers.StableDiffusion3Pipeline(
        tokenizer=tokenizers[0],
        text_encoder=make_clip(tokenizers[0]),
        tokenizer_2=tokenizers[1],
        text_encoder_2=make_clip(tokenizers[1]),
        tokenizer_3=tokenizers[2],
        text_encoder_3=transformers.FunnelBaseModel(funnel),
        vae=None,
        transformer=diffusers.SD3Transformer2DModel(
            num_layers=12,
            out_channels=4,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=64,
            pooled_projection_dim=TEXT_WIDTH,
            pos_embed_max_size=2,
            **LATENTS,
            **WIDTH,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
    ), {"shift_factor": 0.0, "use_quant_conv": False, "use_post_quant_conv": False}


PIPELINES = {"pixart": make_pixart, "sd3": make_sd3}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=PIPELINES, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    asked = parser.parse_args()
    torch.manual_seed(0)
    pipeline, options = PIPELINES[asked.name]()
    autoencoder, error = train_autoencoder(**options)
    pipeline.register_modules(vae=autoencoder)
    pipeline.save_pretrained(asked.output)
    weights = sum(value.numel() for value in pipeline.transformer.parameters())
    print(f"{asked.output}: {weights:,} weights; the autoencoder's pixels are off by {error / 2:.2%} of the contrast")


if __name__ == "__main__":
    main()
