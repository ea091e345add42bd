"""The MAR network (arXiv 2406.11838), a masked autoencoder with a diffusion head.

Its named sizes are in families/mar.py.
"""

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import nn

from families.mar import MAR as FAMILY
from models import FinalLayer, LabelDropper, TimestepEmbedder, initialize_ends, initialize_linears, modulate
from pruning.gates import BlockStack, LayerGates, choose_layers
from pruning.patterns import check_borders


class HeadBlock(nn.Module):
    """Residual MLP on single tokens, modulated by the conditioning vector c (adaLN-Zero)."""

    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, c):  # x (M, 1, width), c (M, width)
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, dim=1)
        return torch.addcmul(x, gate.unsqueeze(1), self.mlp(modulate(self.in_ln(x), shift, scale)))


class HeadMLP(nn.Module):
    """The denoising network of the head (section 3.3): noise and variance of each token by itself.

    Tokens are given the sequence axis (M, 1, width) that `modulate` and `FinalLayer` expect.
    """

    def __init__(self, token_width, condition_width, width, depth):
        super().__init__()
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(condition_width, width)
        self.input_proj = nn.Linear(token_width, width)
        self.res_blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 1, 2 * token_width)

    def forward(self, x, t, z):
        """Noised tokens x (M, token width), steps t (M,) in 0..999, conditions z (M, D) -> (M, 2 * token width)."""
        c = self.time_embed(t) + self.cond_embed(z)
        x = self.input_proj(x).unsqueeze(1)
        for block in self.res_blocks:
            x = block(x, c)
        return self.final_layer(x, c).squeeze(1)


class MAR(LabelDropper):
    """Masked autoencoder over latent tokens, whose outputs condition a small diffusion head, `diffloss.net`.

    input_size: latents per side. buffer_size: copies of the class vector in front of the tokens.
    Layers are numbered through both stacks: encoder 0.., then decoder. With `groups` ([[N, M], ...] over that list) it
    also owns `gumbel_gates`, which act as in models.DiT, as does `candidates`.
    Raises ValueError for groups that do not cover the depth or cross from encoder to decoder.
    """

    def __init__(
        self,
        input_size=16,
        patch_size=1,
        in_channels=16,
        hidden_size=1024,
        encoder_depth=16,
        decoder_depth=16,
        num_heads=16,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        num_classes=1000,
        buffer_size=64,
        attn_dropout=0.1,
        proj_dropout=0.1,
        head_depth=8,
        head_width=1280,
        groups=None,
        candidates="all",
    ):
        super().__init__()
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.buffer_size, self.depth = buffer_size, encoder_depth + decoder_depth
        self.grid_size, self.token_width = input_size // patch_size, in_channels * patch_size**2
        length, norm = self.grid_size**2, partial(nn.LayerNorm, hidden_size, eps=1e-6)
        # Plain ViT blocks: layer norms with weights, exact GELU, no time and no class in them.
        options = {"attn_drop": attn_dropout, "proj_drop": proj_dropout, "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
        block = partial(Block, hidden_size, num_heads, mlp_ratio, qkv_bias=True, **options)
        self.class_emb = nn.Embedding(num_classes, hidden_size)
        self.fake_latent = nn.Parameter(torch.empty(1, hidden_size))
        self.z_proj, self.z_proj_ln = nn.Linear(self.token_width, hidden_size), norm()
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, buffer_size + length, hidden_size))
        self.encoder_blocks, self.encoder_norm = BlockStack(block() for _ in range(encoder_depth)), norm()
        self.decoder_embed = nn.Linear(hidden_size, hidden_size)
        self.mask_token = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, buffer_size + length, hidden_size))
        self.decoder_blocks, self.decoder_norm = BlockStack(block() for _ in range(decoder_depth)), norm()
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, length, hidden_size))
        if groups is not None:
            self.gumbel_gates = LayerGates(groups, self.depth, candidates)
            check_borders(groups, (encoder_depth, decoder_depth))
        # A level of the published keys; the diffusion itself belongs to objectives and samplers.
        self.diffloss = nn.ModuleDict({"net": HeadMLP(self.token_width, hidden_size, head_width, head_depth)})
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier for all linear maps, normal(0.02) for embeddings, zero for modulations and output of the head."""
        initialize_linears(self)
        head = self.diffloss.net
        embeddings = [self.class_emb.weight, head.time_embed.mlp[0].weight, head.time_embed.mlp[2].weight]
        initialize_ends(embeddings + list(self.parameters(recurse=False)), head.res_blocks, head.final_layer)

    def patchify(self, x):
        """Latents (N, C, H, W) -> tokens (N, L, C * patch * patch); inside a token: channel, row, column."""
        g, p = self.grid_size, self.patch_size
        x = x.reshape(len(x), self.in_channels, g, p, g, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(len(x), g * g, self.token_width)

    def unpatchify(self, tokens):
        """Tokens (N, L, C * patch * patch) -> latents (N, C, H, W)."""
        g, p = self.grid_size, self.patch_size
        x = tokens.reshape(-1, g, g, self.in_channels, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, self.in_channels, g * p, g * p)

    def blocks_to_compile(self):
        """Modules that torch.compile takes one by one."""
        return [*self.encoder_blocks, *self.decoder_blocks, self.diffloss.net]

    def embed_class(self, y, drop=None):
        """Labels (N,), where `num_classes` means none, -> class vectors (N, D); `drop` (N,) bool takes labels away."""
        absent = y == self.num_classes
        if drop is not None:
            absent = absent | drop
        # Both sides are always computed, so that every rank of DDP has the same parameters in its graph.
        return torch.where(absent[:, None], self.fake_latent, self.class_emb(y.masked_fill(absent, 0)))

    def forward(self, tokens, masked, y, drop=None, mask=None, observe=None):
        """Tokens (N, L, token width), of which `masked` (N, L) bool are hidden, labels y (N,) -> conditions (N, L, D).

        The label `num_classes` is the unconditional one. ValueError unless all samples hide as many tokens.
        drop: (N,) bool, labels to take away; drawn here in training mode if not given.
        mask: (N, encoder + decoder layers) of 0/1, as in models.DiT. observe: called as observe(layer, before, after);
        encoder layers see (N, buffer + visible, D), decoder layers (N, buffer + L, D).
        """
        mask, kept = choose_layers(self, len(tokens), mask)
        if drop is None:
            drop = self.draw_drop(len(tokens), tokens.device)
        encoder, decoder = self.split_layers(mask, kept, observe)
        visible = nn.functional.pad(~masked, (self.buffer_size, 0), value=True)  # the buffers are never hidden
        if (visible.sum(1) != visible[0].sum()).any():
            raise ValueError(f"masked has {masked.sum(1).tolist()} tokens per sample: expected as many in each")

        buffers = self.embed_class(y, drop).unsqueeze(1).expand(-1, self.buffer_size, -1)
        x = torch.cat([buffers, self.z_proj(tokens)], dim=1) + self.encoder_pos_embed_learned
        x = self.z_proj_ln(x)[visible].view(len(tokens), -1, x.shape[-1])
        x = self.decoder_embed(self.encoder_norm(self.encoder_blocks(x, **encoder)))

        hidden = self.mask_token.to(x.dtype).expand(*visible.shape, -1)
        x = hidden.masked_scatter(visible.unsqueeze(-1), x) + self.decoder_pos_embed_learned
        x = self.decoder_norm(self.decoder_blocks(x, **decoder))
        return x[:, self.buffer_size :] + self.diffusion_pos_embed_learned

    def split_layers(self, mask, kept, observe):
        """Keyword arguments of the encoder's and of the decoder's stack, from what is said of the joint list."""
        border = len(self.encoder_blocks)
        encoder, decoder = {"observe": observe}, {}
        if mask is not None:
            encoder["mask"], decoder["mask"] = mask[:, :border], mask[:, border:]
        if kept is not None:
            encoder["kept"], decoder["kept"] = kept, [layer - border for layer in kept]
        if observe is not None:
            decoder["observe"] = lambda layer, before, after: observe(border + layer, before, after)
        return encoder, decoder


MAR_models = {name: partial(MAR, **config) for name, config in FAMILY.models.items()}
