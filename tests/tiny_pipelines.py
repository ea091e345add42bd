"""Small working pipelines of diffusers with random weights, made without a network, for tests.

All parts are of the classes that the published pipelines have, and the transformers are those of diffusers_classes.
Tokenizers know small letters and digits, one token each; that of Qwen also knows the words around its prompts.
"""

import inspect
import json
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers_classes import build
from safetensors.torch import load_file

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WIDTH = 24  # of the text that the transformers read
SIZES = {"pixart": 16, "sd3": 16, "flux": 16, "sana": 32, "qwen": 16, "wan": 32}  # height and width of the pictures
EXTRAS = {"use_resolution_binning": False, "clean_caption": False, "num_frames": 1}  # for the pipelines that have them


def numbered(words):
    return {word: number for number, word in enumerate(words)}


def t5_tokenizer():
    pieces = [(word, 0.0) for word in ("<pad>", "</s>", "<unk>")] + [(letter, -2.0) for letter in "▁" + LETTERS]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def clip_tokenizer():
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab=numbered(words), merges=[], model_max_length=77)


def gemma_tokenizer():
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    return transformers.GemmaTokenizer(vocab=numbered(words), merges=[], add_bos_token=True)


def qwen_tokenizer():
    """The words before a prompt are 34 tokens, which the pipeline cuts off, as for the published tokenizer."""
    around = diffusers.QwenImagePipeline(None, None, None, None, None).prompt_template_encode.format("")
    marks = ["<|im_start|>", "<|im_end|>"]
    return transformers.Qwen2Tokenizer().train_new_from_iterator([around], 2000, new_special_tokens=marks)


def t5(tokenizer, kind="T5"):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, num_heads=2, d_ff=32, num_layers=2, dropout_rate=0.0
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def clip(tokenizer, pooled=None):
    """A text encoder of width 12, whose pooled output is projected to another width if that is given."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=pooled or 12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (transformers.CLIPTextModelWithProjection if pooled else transformers.CLIPTextModel)(config)


DECODER = {"num_hidden_layers": 2, "hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2}
DECODER |= {"num_key_value_heads": 1}


def gemma(tokenizer):
    config = transformers.Gemma2Config(vocab_size=len(tokenizer), head_dim=12, query_pre_attn_scalar=12, **DECODER)
    return transformers.Gemma2Model(config)


def qwen(tokenizer):
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    vision |= {"patch_size": 2, "fullatt_block_indexes": [0]}
    text = {**DECODER, "vocab_size": len(tokenizer), "rope_parameters": rope, "bos_token_id": None}
    text["eos_token_id"] = tokenizer.eos_token_id
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def autoencoder(channels, scale, shift=None):
    """Of factor 2; one without a shift has quantization layers, as for PixArt."""
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


def deep_autoencoder():
    """Of factor 4."""
    blocks = {"block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8, 8)}
    blocks |= {"layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), (5,))}
    both = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in blocks.items()}
    return diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.41407, **both)


def video_autoencoder(kind, halvings, **others):
    """Of factor 2 per halving, in space and in time; its pictures have about the contrast of the others'."""
    net = getattr(diffusers, kind)(
        base_dim=8,
        z_dim=4,
        dim_mult=[1] * (halvings + 1),
        num_res_blocks=1,
        temperal_downsample=[True] * halvings,
        latents_mean=[-0.2, 0.1, 0.3, -0.1],
        latents_std=[1.1, 0.9, 1.2, 0.8],
        **others,
    )
    with torch.no_grad():
        net.decoder.conv_out.weight.mul_(3)
    return net


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
FLUX = {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 4096}
FLUX |= {"base_shift": 0.5, "max_shift": 1.15}
QWEN = {**FLUX, "shift": 1.0, "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02}


def pixart():
    tokenizer = t5_tokenizer()
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer),
        vae=autoencoder(4, 0.13025),
        transformer=build("PixArtTransformer2DModel"),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )


def flux():
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return diffusers.FluxPipeline(
        tokenizer=tokenizer,
        text_encoder=clip(tokenizer),
        tokenizer_2=tokenizer_2,
        text_encoder_2=t5(tokenizer_2),
        vae=autoencoder(1, 0.3611, 0.1159),
        transformer=build("FluxTransformer2DModel"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLUX),
    )


def sd3():
    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        tokenizer=tokenizer,
        text_encoder=clip(tokenizer, pooled=6),
        tokenizer_2=tokenizer_2,
        text_encoder_2=clip(tokenizer_2, pooled=6),
        tokenizer_3=tokenizer_3,
        text_encoder_3=t5(tokenizer_3),
        vae=autoencoder(4, 1.5305, 0.0609),
        transformer=build("SD3Transformer2DModel"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sana():
    tokenizer = gemma_tokenizer()
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma(tokenizer),
        vae=deep_autoencoder(),
        transformer=build("SanaTransformer2DModel"),
        scheduler=diffusers.DPMSolverMultistepScheduler(**FLOW),
    )


def qwen_image():
    tokenizer = qwen_tokenizer()
    return diffusers.QwenImagePipeline(
        tokenizer=tokenizer,
        text_encoder=qwen(tokenizer),
        vae=video_autoencoder("AutoencoderKLQwenImage", 1),
        transformer=build("QwenImageTransformer2DModel"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**QWEN),
    )


def wan():
    tokenizer = t5_tokenizer()
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer, "UMT5"),
        vae=video_autoencoder("AutoencoderKLWan", 2, scale_factor_temporal=4, scale_factor_spatial=4),
        transformer=build("WanTransformer3DModel"),
        scheduler=diffusers.UniPCMultistepScheduler(**FLOW),
    )


PIPELINES = {"pixart": pixart, "sd3": sd3, "flux": flux, "sana": sana, "qwen": qwen_image, "wan": wan}


def make_pipeline(name, folder):
    """Save the whole pipeline of a name and return the folder."""
    torch.manual_seed(0)
    PIPELINES[name]().save_pretrained(folder)
    return folder


def open_pipeline(folder):
    """The pipeline in a folder.

    Without accelerate, diffusers cannot open the transformer of Wan, so all are opened here; and DiffusionPipeline
    ignores a transformer given to it for Wan, so the pipeline's own class opens the rest.
    """
    folder = Path(folder)
    files = folder / "model_index.json", folder / "transformer" / "config.json"
    index, config = (json.loads(file.read_text()) for file in files)
    net = getattr(diffusers, config["_class_name"]).from_config(config)
    net.load_state_dict(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    kind = getattr(diffusers, index["_class_name"])
    return kind.from_pretrained(folder, transformer=net.eval(), low_cpu_mem_usage=False)


def draw(pipeline, prompts, size, steps=2, seed=0):
    """Square pictures of the prompts, (n, 3, size, size) from 0 to 1; prompt i has noise of the seed plus i."""
    accepted = inspect.signature(pipeline.__call__).parameters
    pictures = pipeline(
        prompt=list(prompts),
        height=size,
        width=size,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        output_type="pt",
        **{key: value for key, value in EXTRAS.items() if key in accepted},
    )[0].float()
    return pictures[:, 0] if pictures.ndim == 5 else pictures
