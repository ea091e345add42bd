"""A tiny network and inputs for each transformer class of diffusers, for tests.

Sample i of the inputs is the same for every batch size, so inputs(1) holds the first sample of inputs(3). No sample of
an output depends on the other samples of the batch, except where a comment says so. Text has 5 tokens and no image has
as few; no tensor without a batch dimension has a first size of 3.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.models import transformers
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

TEXT = 5  # text tokens


@dataclass(frozen=True)
class Tiny:
    """Keyword arguments of the constructor, and a function of the batch size that makes those of forward."""

    config: dict
    inputs: Callable


def normal(n, *shape, key=0):
    """Normal values of n samples; equal shapes with unequal keys differ."""
    seeds = (hash((i, key, *shape)) % 2**31 for i in range(n))
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def times(n):
    """Whole steps from 0 to 999, another for each sample."""
    return (torch.arange(n) * 237 + 611) % 1000


def parts(n):
    """Times from 0 to 1, another for each sample."""
    return times(n) / 1000


def mask(n, tokens=TEXT):
    """True for the text tokens that count: one fewer in every second sample."""
    return torch.arange(tokens) < tokens - torch.arange(n)[:, None] % 2


def ids(axes, height=4, width=4):
    """Positions of the image's tokens, row by row, in the last two of the axes."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.zeros(height * width, axes)
    positions[:, -2], positions[:, -1] = rows.flatten(), columns.flatten()
    return positions


def image(n, **others):
    """A latent image of 16 tokens, text and times, and the other inputs."""
    return {"hidden_states": normal(n, 4, 8, 8), **text(n), "timestep": times(n), **others}


def video(n, **others):
    """The same for a video of 2 frames of 16 tokens each."""
    return image(n) | {"hidden_states": normal(n, 4, 2, 8, 8), **others}


def tokens(n, channels=4, **others):
    """The same for 16 tokens of an image."""
    return image(n) | {"hidden_states": normal(n, 16, channels), **others}


def text(n):
    return {"encoder_hidden_states": normal(n, TEXT, 24)}


def masked(n):
    return {"encoder_attention_mask": mask(n)}


def frames(n):
    """A time for each of two frames."""
    return times(n)[:, None] - torch.arange(2) * 100


def sizes(n):
    return {"target_size": 16 + normal(n, 2), "crop_coords": normal(n, 2, key=1)}


def cameras(n):
    """A camera for each of two frames: its pose, focal lengths and center."""
    poses = torch.eye(4).repeat(n, 2, 1, 1)
    poses[..., :3, 3] = normal(n, 2, 3)
    return torch.cat([poses.flatten(2), torch.tensor([4.0, 4.0, 2.0, 2.0]).expand(n, 2, 4)], dim=-1)


def whole(n, below, *shape):
    """Whole numbers below a bound."""
    return (normal(n, *shape) * 1000).long() % below


def places(n, start, stop):
    return torch.arange(start, stop).expand(n, -1)


def line(axes):
    """Positions of the text's and then the image's tokens, the same in all axes."""
    return torch.arange(TEXT + 16)[:, None].repeat(1, axes)


def kinds(first, second):
    """One number for each token of the text, another for each of the image."""
    return torch.tensor([first] * TEXT + [second] * 16)


def packed(n):
    """Text and then n images of 4 tokens each in one sequence."""
    places = TEXT + torch.arange(4 * n)
    return {
        "input_ids": torch.arange(TEXT) * 3,
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.arange(TEXT + 4 * n),
        "und_len": TEXT,
        "sequence_length": TEXT + 4 * n,
        "vision_tokens": list(normal(n, 1, 4, 1, 4, 4)),
        "vision_token_shapes": [(1, 2, 2)] * n,
        "vision_sequence_indexes": places,
        "vision_mse_loss_indexes": places,
        "vision_timesteps": times(n).repeat_interleave(4),
        "vision_noisy_frame_indexes": [torch.zeros(1, dtype=torch.long)] * n,
    }


def placed(axes):
    return {"img_ids": ids(axes), "txt_ids": torch.zeros(TEXT, axes)}


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
DEPTH = {"num_layers": 4}
STACK = {**HEADS, **DEPTH}
STACKS = {**STACK, "num_single_layers": 4}
INPUTS = {"in_channels": 4}
BOTH = {**INPUTS, "out_channels": 4}
ROPE = {"axes_dims_rope": (4, 6, 6)}
WAN = {**STACK, **BOTH, "text_dim": 24, "freq_dim": 32, "ffn_dim": 48}
KANDINSKY = {"in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": 32, "ff_dim": 48}
KANDINSKY |= {"num_visual_blocks": 4, "axes_dims": (4, 6, 6)}
LTX2 = {**STACK, **BOTH, "cross_attention_dim": 32, "caption_channels": 24, "audio_in_channels": 4}
LTX2 |= {"audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 8}
LTX2 |= {"audio_cross_attention_dim": 16}
HUNYUAN = {"text_embed_dim": 24, "num_refiner_layers": 4}
CLASSES = {
    "DiTTransformer2DModel": Tiny(  # also reads blocks[0].norm1 after the last block
        {**STACK, **INPUTS, "sample_size": 8, "num_embeds_ada_norm": 10},
        lambda n: {"hidden_states": normal(n, 4, 8, 8), "timestep": times(n), "class_labels": torch.arange(n) % 10},
    ),
    "PixArtTransformer2DModel": Tiny(
        {**STACK, "sample_size": 8, "cross_attention_dim": 32, "caption_channels": 24},
        lambda n: image(n, **masked(n), added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
    "SD3Transformer2DModel": Tiny(
        {**STACK, **BOTH, "sample_size": 8, "pos_embed_max_size": 8, "joint_attention_dim": 24}
        | {"caption_projection_dim": 32, "pooled_projection_dim": 12}
        | {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        lambda n: image(n, pooled_projections=normal(n, 12)),
    ),
    "FluxTransformer2DModel": Tiny(
        {**STACKS, **INPUTS, **ROPE, "joint_attention_dim": 24, "pooled_projection_dim": 12, "guidance_embeds": True},
        lambda n: tokens(n, timestep=parts(n), guidance=2 + parts(n), pooled_projections=normal(n, 12), **placed(3)),
    ),
    "Flux2Transformer2DModel": Tiny(
        {**STACKS, **INPUTS, "axes_dims_rope": (4, 4, 4, 4), "joint_attention_dim": 24}
        | {"timestep_guidance_channels": 32},
        lambda n: tokens(n, timestep=parts(n), guidance=2 + parts(n), **placed(4)),
    ),
    "SanaTransformer2DModel": Tiny(
        {**STACK, **BOTH, "sample_size": 8, "caption_channels": 24, "cross_attention_dim": 32}
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16},
        lambda n: image(n, hidden_states=normal(n, 4, 4, 4), **masked(n)),
    ),
    "QwenImageTransformer2DModel": Tiny(
        {**STACK, **ROPE, "in_channels": 16, "out_channels": 4, "joint_attention_dim": 24},
        lambda n: tokens(n, 16, timestep=parts(n), encoder_hidden_states_mask=mask(n), img_shapes=[[(1, 4, 4)]] * n),
    ),
    "WanTransformer3DModel": Tiny(WAN, video),
    "AceStepTransformer1DModel": Tiny(
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
        | {"num_key_value_heads": 1, "head_dim": 16, "in_channels": 12, "audio_acoustic_hidden_dim": 4}
        | {"encoder_hidden_size": 24, "sliding_window": 2},
        lambda n: tokens(n, timestep=parts(n), timestep_r=parts(n) / 2, context_latents=normal(n, 16, 8)),
    ),
    "AllegroTransformer3DModel": Tiny(
        {**STACK, **BOTH, "sample_height": 8, "sample_width": 8, "sample_frames": 2, "caption_channels": 24}
        | {"cross_attention_dim": 32},
        lambda n: video(n, **masked(n)),
    ),
    "AnyFlowTransformer3DModel": Tiny(
        WAN, lambda n: video(n, hidden_states=normal(n, 2, 4, 8, 8), timestep=frames(n), r_timestep=frames(n) / 2)
    ),
    "AnyFlowFARTransformer3DModel": Tiny(
        {**WAN, "chunk_partition": (1, 1)},
        lambda n: (
            video(n, hidden_states=normal(n, 2, 4, 8, 8), timestep=frames(n), r_timestep=frames(n) / 2)
            | {"chunk_partition": [1, 1]}
        ),
    ),
    "AuraFlowTransformer2DModel": Tiny(
        {**HEADS, **BOTH, "num_mmdit_layers": 4, "num_single_dit_layers": 4, "sample_size": 8}
        | {"joint_attention_dim": 24, "caption_projection_dim": 32, "pos_embed_max_size": 16},
        lambda n: image(n, timestep=parts(n)),
    ),
    "BriaTransformer2DModel": Tiny(
        {**STACKS, **INPUTS, **ROPE, "joint_attention_dim": 24}, lambda n: tokens(n, **placed(3))
    ),
    "BriaFiboTransformer2DModel": Tiny(
        {**STACKS, **INPUTS, **ROPE, "joint_attention_dim": 24, "text_encoder_dim": 20},
        lambda n: tokens(n, **placed(3), text_encoder_layers=[normal(n, TEXT, 20, key=key) for key in range(8)]),
    ),
    "BriaFibo2Transformer2DModel": Tiny(
        {**INPUTS, "dim": 32, "n_layers": 4, "n_refiner_layers": 4, "n_heads": 2, "cap_feat_dim": 24}
        | {"injection_layer_ids": (1, 3), "perceiver_num_layers": 4, "min_num_gist_tokens": 4}
        | {"max_num_gist_tokens": 8, "gist_step": 4, "gist_min_text_len": 4, "gist_max_text_len": 12}
        | {"axes_dims": (4, 6, 6), "axes_lens": (32, 16, 16)},
        lambda n: image(n, encoder_hidden_states=normal(n, 4, TEXT, 24), timestep=parts(n), **masked(n)),
    ),
    "ChromaTransformer2DModel": Tiny(
        {**STACKS, **INPUTS, **ROPE, "joint_attention_dim": 24, "approximator_num_channels": 16}
        | {"approximator_hidden_dim": 32, "approximator_layers": 4},
        lambda n: tokens(n, timestep=parts(n), **placed(3)),
    ),
    "ChronoEditTransformer3DModel": Tiny(WAN, video),
    "CogVideoXTransformer3DModel": Tiny(
        {**STACK, **BOTH, "time_embed_dim": 16, "text_embed_dim": 24, "max_text_seq_length": TEXT}
        | {"sample_width": 8, "sample_height": 8, "sample_frames": 5},
        lambda n: image(n, hidden_states=normal(n, 2, 4, 8, 8)),
    ),
    "CogView3PlusTransformer2DModel": Tiny(
        {**STACK, **BOTH, "time_embed_dim": 16, "text_embed_dim": 24, "condition_dim": 8}
        | {"sample_size": 8, "pos_embed_max_size": 8},
        lambda n: image(n, **sizes(n), original_size=16 + normal(n, 2, key=2)),
    ),
    "CogView4Transformer2DModel": Tiny(
        {**STACK, **BOTH, "time_embed_dim": 16, "text_embed_dim": 24, "condition_dim": 8}
        | {"sample_size": 8, "pos_embed_max_size": 8, "rope_axes_dim": (16, 16)},
        lambda n: image(n, **sizes(n), original_size=16 + normal(n, 2, key=2)),
    ),
    "ConsisIDTransformer3DModel": Tiny(
        {**STACK, **BOTH, "num_attention_heads": 3, "time_embed_dim": 16, "text_embed_dim": 24}
        | {"max_text_seq_length": TEXT, "sample_width": 8, "sample_height": 8, "sample_frames": 5}
        | {"is_train_face": True, "cross_attn_interval": 2, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2}
        | {"LFE_id_dim": 20, "LFE_vit_dim": 16, "LFE_depth": 4, "LFE_dim_head": 8, "LFE_num_heads": 2}
        | {"LFE_num_id_token": 2, "LFE_num_querie": 4, "LFE_output_dim": 32, "LFE_ff_mult": 2, "LFE_num_scale": 2},
        lambda n: (
            image(n, hidden_states=normal(n, 2, 4, 8, 8), id_cond=normal(n, 20))
            | {"id_vit_hidden": [normal(n, 7, 16, key=key) for key in range(2)]}
        ),
    ),
    "CosmosTransformer3DModel": Tiny(
        {**STACK, **BOTH, "text_embed_dim": 24, "adaln_lora_dim": 8, "max_size": (4, 8, 8)},
        lambda n: video(n, timestep=parts(n), padding_mask=torch.zeros(1, 1, 8, 8)),
    ),
    "Cosmos3OmniTransformer": Tiny(  # one sequence holds the text and all samples, which attend to one another
        {"hidden_size": 32, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 20, "latent_channel": 4}
        | {"patch_latent_dim": 16, "rope_axes_dim": (4, 2, 2)},
        packed,
    ),
    "DreamLiteTransformer2DModel": Tiny(
        {**STACK, "in_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 24},
        lambda n: {"hidden_states": normal(n, 8, 4, 4), **text(n), **masked(n)},
    ),
    "DualTransformer2DModel": Tiny(  # two whole networks, for the first 77 and the other 257 tokens of the text
        {**STACK, "in_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 24},
        lambda n: {"hidden_states": normal(n, 8, 4, 4), "encoder_hidden_states": normal(n, 334, 24)},
    ),
    "EasyAnimateTransformer3DModel": Tiny(
        {**STACK, **BOTH, "patch_size": 2, "time_embed_dim": 16, "text_embed_dim": 24}, video
    ),
    "ErnieImageTransformer2DModel": Tiny(
        {**DEPTH, **BOTH, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 48, "text_in_dim": 24}
        | {"rope_axes_dim": (4, 6, 6)},
        lambda n: (
            {"hidden_states": normal(n, 4, 4, 4), "timestep": times(n)}
            | {"text_bth": normal(n, TEXT, 24), "text_lens": mask(n).sum(1)}
        ),
    ),
    "Flux3Transformer2DModel": Tiny(
        {**STACKS, **INPUTS, "cond_in_channels": 6, "axes_dims_rope": (4, 4, 4, 4), "joint_attention_dim": 24}
        | {"timestep_channels": 32},
        lambda n: (
            tokens(n, timestep=parts(n), **placed(4))
            | {"image_cond_hidden_states": normal(n, 6, 6), "image_cond_ids": 5 + ids(4, 2, 3)}
        ),
    ),
    "GlmImageTransformer2DModel": Tiny(
        {**STACK, **BOTH, "time_embed_dim": 16, "text_embed_dim": 24, "condition_dim": 8}
        | {"prior_vq_quantizer_codebook_size": 20},
        lambda n: (
            image(n, **sizes(n), prior_token_id=whole(n, 20, 16))
            | {"prior_token_drop": torch.zeros(n, 16, dtype=torch.bool)}
        ),
    ),
    "HeliosTransformer3DModel": Tiny(
        {**WAN, "rope_dim": (8, 4, 4)},
        lambda n: (
            video(n, indices_hidden_states=places(n, 7, 9))
            | {"latents_history_short": normal(n, 4, 1, 8, 8), "indices_latents_history_short": places(n, 6, 7)}
            | {"latents_history_mid": normal(n, 4, 2, 8, 8, key=1), "indices_latents_history_mid": places(n, 4, 6)}
            | {"latents_history_long": normal(n, 4, 4, 8, 8), "indices_latents_history_long": places(n, 0, 4)}
        ),
    ),
    "HiDreamImageTransformer2DModel": Tiny(  # keeps texts for the blocks by number
        {**STACKS, **INPUTS, **ROPE, "patch_size": 2, "caption_channels": (20, 24), "text_emb_dim": 12}
        | {"num_routed_experts": 4, "num_activated_experts": 2, "max_resolution": (8, 8)}
        | {"llama_layers": tuple(range(8)), "force_inference_output": True},
        lambda n: (
            {"hidden_states": normal(n, 4, 8, 8), "timesteps": times(n), "pooled_embeds": normal(n, 12)}
            | {"encoder_hidden_states_t5": normal(n, 7, 20)}
            | {"encoder_hidden_states_llama3": [normal(n, TEXT, 24, key=key) for key in range(8)]}
        ),
    ),
    "HunyuanDiT2DModel": Tiny(  # the last block also takes the output of the first
        {**STACK, **INPUTS, "patch_size": 2, "sample_size": 8, "hidden_size": 32, "cross_attention_dim": 24}
        | {"cross_attention_dim_t5": 24, "pooled_projection_dim": 12, "text_len": TEXT, "text_len_t5": 6}
        | {"use_style_cond_and_image_meta_size": False},
        lambda n: (
            image(n, timestep=times(n).float(), text_embedding_mask=mask(n))
            | {"encoder_hidden_states_t5": normal(n, 6, 24), "text_embedding_mask_t5": mask(n, 6)}
        ),
    ),
    "HunyuanImageTransformer2DModel": Tiny(
        {**STACKS, **BOTH, **HUNYUAN, "rope_axes_dim": (8, 8)},
        lambda n: image(n, hidden_states=normal(n, 4, 4, 4), timestep=times(n).float(), **masked(n)),
    ),
    "HunyuanVideoTransformer3DModel": Tiny(
        {**STACKS, **BOTH, **HUNYUAN, "rope_axes_dim": (4, 6, 6), "pooled_projection_dim": 12},
        lambda n: video(n, **masked(n), pooled_projections=normal(n, 12), guidance=2 + parts(n)),
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        {**STACK, **BOTH, **HUNYUAN, "rope_axes_dim": (4, 6, 6), "text_embed_2_dim": 20, "image_embed_dim": 20},
        lambda n: (
            video(n, hidden_states=normal(n, 4, 2, 4, 4), timestep=times(n).float(), **masked(n))
            | {"image_embeds": normal(n, 7, 20)}
            | {"encoder_hidden_states_2": normal(n, 6, 20), "encoder_attention_mask_2": mask(n, 6)}
        ),
    ),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(
        {**STACKS, **BOTH, **HUNYUAN, "rope_axes_dim": (4, 6, 6), "pooled_projection_dim": 12}
        | {"has_image_proj": True, "image_proj_dim": 20, "has_clean_x_embedder": True},
        lambda n: (
            video(n, **masked(n), pooled_projections=normal(n, 12), guidance=2 + parts(n))
            | {"image_embeds": normal(n, 7, 20), "indices_latents": torch.arange(8, 10)}
            | {"latents_clean": normal(n, 4, 2, 8, 8, key=1), "indices_latents_clean": torch.arange(6, 8)}
            | {"latents_history_2x": normal(n, 4, 2, 8, 8, key=2), "indices_latents_history_2x": torch.arange(4, 6)}
            | {"latents_history_4x": normal(n, 4, 4, 8, 8), "indices_latents_history_4x": torch.arange(4)}
        ),
    ),
    "Ideogram4Transformer2DModel": Tiny(
        {**STACK, **INPUTS, "intermediate_size": 48, "adaln_dim": 16, "llm_features_dim": 24}
        | {"mrope_section": (4, 2, 2)},
        lambda n: (
            {"hidden_states": normal(n, TEXT + 16, 4), "encoder_hidden_states": normal(n, TEXT + 16, 24)}
            | {"timestep": parts(n), "position_ids": line(3).expand(n, -1, -1)}
            | {"indicator": kinds(3, 2).expand(n, -1), "segment_ids": kinds(1, 1).expand(n, -1)}
        ),
    ),
    "JoyImageEditTransformer3DModel": Tiny(
        {**DEPTH, **BOTH, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 24, "rope_dim_list": (4, 6, 6)},
        video,
    ),
    "JoyImageEditPlusTransformer3DModel": Tiny(
        {**DEPTH, **BOTH, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 24, "rope_dim_list": (4, 6, 6)},
        lambda n: (
            image(n, hidden_states=normal(n, 16, 4, 1, 2, 2), encoder_hidden_states_mask=mask(n).float())
            | {"shape_list": [[(1, 4, 4)]] * n}
        ),
    ),
    "Kandinsky5Transformer3DModel": Tiny(
        {**KANDINSKY, "num_text_blocks": 4, "in_text_dim": 24, "in_text_dim2": 12},
        lambda n: (
            image(n, hidden_states=normal(n, 2, 8, 8, 4), pooled_projections=normal(n, 12))
            | {"visual_rope_pos": [torch.arange(size) for size in (2, 4, 4)], "text_rope_pos": torch.arange(TEXT)}
        ),
    ),
    "Kandinsky6Transformer3DModel": Tiny(
        {**KANDINSKY, "num_text_blocks": 4, "in_text_dim": 24, "in_text_dim2": 12, "visual_cond": False}
        | {"in_audio_dim": 6, "out_audio_dim": 6},
        lambda n: (
            image(n, hidden_states=normal(n, 2, 8, 8, 4), pooled_projections=normal(n, 12))
            | {"audio_hidden_states": normal(n, 7, 6)}
        ),
    ),
    "Kandinsky6SRTransformer3DModel": Tiny(
        {**KANDINSKY, "patch_size": (1, 1, 1), "nabla_window": (1, 1, 1)},
        lambda n: {"hidden_states": normal(n, 2, 8, 16, 9), "timestep": times(n)},
    ),
    "Krea2Transformer2DModel": Tiny(
        {**STACK, **INPUTS, **ROPE, "num_key_value_heads": 1, "intermediate_size": 48, "timestep_embed_dim": 32}
        | {"text_hidden_dim": 24, "num_text_layers": 6, "text_num_attention_heads": 2}
        | {"text_num_key_value_heads": 1, "text_intermediate_size": 40}
        | {"num_layerwise_text_blocks": 4, "num_refiner_text_blocks": 4},
        lambda n: (
            tokens(n, encoder_hidden_states=normal(n, TEXT, 6, 24), timestep=parts(n), **masked(n))
            | {"position_ids": line(3)}
        ),
    ),
    "LTXVideoTransformer3DModel": Tiny(
        {**STACK, **BOTH, "cross_attention_dim": 32, "caption_channels": 24},
        lambda n: tokens(n, **masked(n), num_frames=2, height=2, width=4),
    ),
    "LTX2VideoTransformer3DModel": Tiny(
        LTX2,
        lambda n: (
            tokens(n, **masked(n), num_frames=2, height=2, width=4, audio_hidden_states=normal(n, 7, 4))
            | {"audio_encoder_hidden_states": normal(n, 6, 24), "audio_num_frames": 7}
        ),
    ),
    "LatteTransformer3DModel": Tiny(
        {**STACK, **INPUTS, "patch_size": 2, "sample_size": 8, "video_length": 2, "caption_channels": 24}
        | {"cross_attention_dim": 32, "norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000}
        | {"norm_elementwise_affine": False},
        video,
    ),
    "LongCatAudioDiTTransformer": Tiny(
        {"dit_dim": 32, "dit_depth": 4, "dit_heads": 2, "dit_text_dim": 24, "latent_dim": 4},
        lambda n: tokens(n, timestep=parts(n), **masked(n), latent_cond=normal(n, 16, 4, key=1)),
    ),
    "LongCatImageTransformer2DModel": Tiny(
        {**STACKS, **INPUTS, **ROPE, "joint_attention_dim": 24, "pooled_projection_dim": 12},
        lambda n: tokens(n, timestep=parts(n), **placed(3)),
    ),
    "Lumina2Transformer2DModel": Tiny(
        {**DEPTH, **INPUTS, "sample_size": 8, "hidden_size": 32, "num_refiner_layers": 4, "num_attention_heads": 2}
        | {"num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (4, 6, 6), "axes_lens": (30, 20, 20)}
        | {"cap_feat_dim": 24},
        lambda n: image(n, timestep=parts(n), **masked(n)),
    ),
    "LuminaNextDiT2DModel": Tiny(
        {**DEPTH, "sample_size": 8, "hidden_size": 32, "num_attention_heads": 2, "num_kv_heads": 1}
        | {"multiple_of": 8, "cross_attention_dim": 24},
        lambda n: (
            image(n, timestep=parts(n), encoder_mask=mask(n))
            | {"image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 4, 4), "cross_attention_kwargs": {}}
        ),
    ),
    "MiniMaxH3Transformer3DModel": Tiny(  # the times are the same for all samples
        {**STACK, **INPUTS, "hidden_size": 32, "num_refiner_layers": 4, "ffn_dim": 48, "audio_in_channels": 6}
        | {"text_dim": 24, "freq_dim": 32, "time_embed_hidden_dim": 24, "time_embed_dim": 16, "rope_freq_dim": 2},
        lambda n: (
            tokens(n, 16, audio_hidden_states=normal(n, 7, 6), timestep=torch.tensor([0.0, 611.0]))
            | {
                "position_ids": torch.arange(28)[:, None] * torch.ones(3),
                "timestep_indices": (torch.arange(28) > 4).long(),
            }
            | {"token_tags": torch.tensor([0] * 5 + [1] * 16 + [2] * 7), "text_indices": torch.arange(5)}
            | {"video_indices": torch.arange(5, 21), "audio_indices": torch.arange(21, 28)}
        ),
    ),
    "MiniMaxMusic3RVQDepthDecoder": Tiny(  # forward leaves out audio_heads
        {**DEPTH, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "audio_vocab_size": 20},
        lambda n: {"inputs_embeds": normal(n, 7, 32)},
    ),
    "MiniMaxMusic3Transformer1DModel": Tiny(
        {**STACK, **INPUTS, "condition_dim": 24, "ff_inner_dim": 48, "rotary_dim": 8, "fourier_embedding_dim": 16},
        lambda n: {"hidden_states": normal(n, 4, 10), "encoder_hidden_states": normal(n, 10, 24), "timestep": parts(n)},
    ),
    "MochiTransformer3DModel": Tiny(
        {**STACK, **INPUTS, "pooled_projection_dim": 12, "text_embed_dim": 24, "time_embed_dim": 32},
        lambda n: video(n, **masked(n)),
    ),
    "MotifVideoTransformer3DModel": Tiny(  # the last two single blocks read the first ones' output as text
        {**STACKS, **BOTH, "num_decoder_layers": 2, "text_embed_dim": 24, "rope_axes_dim": (4, 6, 6)},
        lambda n: video(n, **masked(n)),
    ),
    "NucleusMoEImageTransformer2DModel": Tiny(  # blocks 3 and 4 of 6 hold experts
        {**STACK, **ROPE, "num_layers": 6, "in_channels": 16, "out_channels": 4, "joint_attention_dim": 24}
        | {"num_experts": 4, "moe_intermediate_dim": 12, "capacity_factors": 2.0},
        lambda n: tokens(n, 16, timestep=parts(n), encoder_hidden_states_mask=mask(n), img_shapes=[(1, 4, 4)] * n),
    ),
    "OmniGenTransformer2DModel": Tiny(
        {**DEPTH, **INPUTS, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        | {"intermediate_size": 48, "pad_token_id": 0, "vocab_size": 20, "pos_embed_max_size": 8, "time_step_dim": 32}
        | {"rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "type": "su"}},
        lambda n: (
            {"hidden_states": normal(n, 4, 8, 8), "timestep": parts(n), "input_ids": whole(n, 20, TEXT)}
            | {"input_img_latents": [], "input_image_sizes": {}, "position_ids": places(n, 0, 22)}
            | {"attention_mask": torch.ones(n, 22, 22)}
        ),
    ),
    "OvisImageTransformer2DModel": Tiny(
        {**STACKS, **BOTH, **ROPE, "joint_attention_dim": 24}, lambda n: tokens(n, timestep=parts(n), **placed(3))
    ),
    "PRXTransformer2DModel": Tiny(
        {**INPUTS, "context_in_dim": 24, "hidden_size": 32, "num_heads": 2, "depth": 4, "axes_dim": (8, 8)},
        lambda n: image(n, timestep=parts(n), attention_mask=mask(n)),
    ),
    "PriorTransformer": Tiny(
        {**STACK, "embedding_dim": 24, "num_embeddings": TEXT},
        lambda n: (
            {"hidden_states": normal(n, 24), "proj_embedding": normal(n, 24, key=1), "timestep": times(n)}
            | {**text(n), "attention_mask": mask(n)}
        ),
    ),
    "QwenImage21Transformer2DModel": Tiny(
        {**STACK, **BOTH, **ROPE, "context_in_dim": 24},
        lambda n: (
            tokens(n, timestep=parts(n), encoder_hidden_states_mask=mask(n), img_shapes=[[(1, 4, 4)]] * n)
            | {"img_mask": (torch.arange(TEXT + 4) >= TEXT).expand(n, -1)}
        ),
    ),
    "RFD4ProteinaTransformer": Tiny(
        {"nlayers": 4, "token_dim": 32, "nheads": 2, "dim_cond": 16, "pair_repr_dim": 12, "latent_dim": 6}
        | {"t_emb_dim": 16, "tri_mult_c": 8, "feats_seq": ("xt_bb_ca", "xt_local_latents")}
        | {"feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"), "num_sequence_classes": 20}
        | {"feats_pair_repr": ("xt_bb_ca_pair_dists",)},
        lambda n: (
            {"bb_ca": normal(n, 7, 3), "local_latents": normal(n, 7, 6), "padding_mask": mask(n, 7)}
            | {"bb_ca_time": parts(n), "local_latents_time": parts(n) / 2}
            | {"conditioning": {"is_in_context_conditioning": ~mask(n, 7), "supports_local_latent": mask(n, 7)}}
        ),
    ),
    "SanaVideoTransformer3DModel": Tiny(
        {**STACK, **BOTH, "sample_size": 8, "caption_channels": 24, "cross_attention_dim": 32}
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16},
        lambda n: video(n, **masked(n)),
    ),
    "SanaWMTransformer3DModel": Tiny(
        {**DEPTH, **INPUTS, "hidden_size": 32, "num_attention_heads": 2, "linear_head_dim": 16}
        | {"chunk_plucker_channels": 6, "chunk_plucker_post_attn_blocks": 4, "caption_channels": 24},
        lambda n: (
            video(n, hidden_states=normal(n, 4, 2, 4, 4), encoder_hidden_states=normal(n, 1, TEXT, 24))
            | {"encoder_attention_mask": mask(n), "chunk_plucker": normal(n, 6, 2, 4, 4)}
            | {"timestep": frames(n)[:, None], "camera_conditions": cameras(n)}
        ),
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Tiny(
        LTX2, lambda n: tokens(n, **masked(n), video_rotary_emb=(torch.ones(1, 16, 32), torch.zeros(1, 16, 32)))
    ),
    "SkyReelsV2Transformer3DModel": Tiny(WAN, video),
    "StableAudioDiTModel": Tiny(
        {**STACK, **BOTH, "sample_size": 10, "num_key_value_attention_heads": 1, "cross_attention_dim": 16}
        | {"time_proj_dim": 32, "global_states_input_dim": 12, "cross_attention_input_dim": 24},
        lambda n: (
            {"hidden_states": normal(n, 4, 10), **text(n), "timestep": parts(n)}
            | {"global_hidden_states": normal(n, 1, 12)}
        ),
    ),
    "StableAudio3DiTModel": Tiny(
        {"io_channels": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "cond_token_dim": 24, "global_cond_dim": 12}
        | {"local_add_cond_dim": 6, "timestep_features_dim": 32, "num_memory_tokens": 4},
        lambda n: (
            {"hidden_states": normal(n, 4, 10), **text(n), **masked(n), "timestep": parts(n)}
            | {"global_hidden_states": normal(n, 12), "local_add_cond": normal(n, 6, 10)}
        ),
    ),
    "T5FilmDecoder": Tiny(
        {"input_dims": 4, "targets_length": 16, "d_model": 32, "num_layers": 4, "num_heads": 2, "d_kv": 16, "d_ff": 48},
        lambda n: (
            {"encodings_and_masks": [(normal(n, TEXT, 32), mask(n).float())]}
            | {"decoder_input_tokens": normal(n, 16, 4), "decoder_noise_time": parts(n)}
        ),
    ),
    "Transformer2DModel": Tiny(
        {**STACK, "in_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 24},
        lambda n: {"hidden_states": normal(n, 8, 4, 4), **text(n), **masked(n)},
    ),
    "TransformerTemporalModel": Tiny(  # the first size is that of all frames, two for each sample
        {**STACK, "in_channels": 8, "norm_num_groups": 4},
        lambda n: {"hidden_states": normal(n, 2, 8, 4, 4).flatten(0, 1), "num_frames": 2},
    ),
    "WanAnimateTransformer3DModel": Tiny(
        {**WAN, "in_channels": 12, "latent_channels": 4, "image_dim": None, "motion_encoder_size": 16}
        | {"motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_style_dim": 8, "motion_dim": 4}
        | {"motion_encoder_dim": 8, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2}
        | {"inject_face_latents_blocks": 2},
        lambda n: (
            video(n, hidden_states=normal(n, 12, 2, 8, 8), pose_hidden_states=normal(n, 4, 1, 8, 8))
            | {"face_pixel_values": normal(n, 3, 4, 16, 16)}
        ),
    ),
    "WanAnimate2Transformer3DModel": Tiny(  # the pass over the reference, which takes every time for 1
        {**DEPTH, "in_dim": 8, "dim": 32, "ffn_dim": 48, "freq_dim": 32, "text_dim": 24, "text_len": 6, "out_dim": 4}
        | {"num_heads": 2, "use_img_emb": False},
        lambda n: (
            {"hidden_states": list(normal(n, 4, 2, 8, 8)), "condition_latents": list(normal(n, 4, 2, 8, 8, key=1))}
            | {"encoder_hidden_states": list(normal(n, TEXT, 24)), "timestep": times(n), "seq_len": 32}
            | {"kv_cache": WanAnimate2KVCache(4), "kv_cache_mode": "extract"}
            | {"offset_grid_sizes": torch.tensor([[2, 4, 4]])}
        ),
    ),
    "WanVACETransformer3DModel": Tiny(
        {**WAN, "vace_layers": (0, 1, 2, 3), "vace_in_channels": 6},
        lambda n: video(n, control_hidden_states=normal(n, 6, 2, 8, 8)),
    ),
    "ZImageTransformer2DModel": Tiny(
        {**INPUTS, "dim": 32, "n_layers": 4, "n_refiner_layers": 4, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 24}
        | {"axes_dims": (4, 6, 6), "axes_lens": (64, 16, 16)},
        lambda n: {"x": list(normal(n, 4, 1, 8, 8)), "t": parts(n), "cap_feats": list(normal(n, TEXT, 24))},
    ),
}
NOT_BUILT = {}


def build(name):
    """The tiny network of a class, in float32, all of whose weights are random: no gate and no output layer is zero."""
    torch.manual_seed(0)
    net = getattr(transformers, name)(**CLASSES[name].config).float().eval()
    with torch.no_grad():
        for key, weight in net.named_parameters():
            weight.normal_(std=0.1)
            if weight.ndim == 1 and key.endswith("weight"):  # of a norm
                weight.add_(1)
    return net


def run(net, inputs):
    """The network's first output as one tensor, also where it is a list of the samples."""
    tuples = {"return_dict": False} if "return_dict" in inspect.signature(net.forward).parameters else {}
    output = net(**inputs, **tuples)
    first = output if isinstance(output, torch.Tensor) else output[0]
    return torch.stack(first) if isinstance(first, list) else first
