"""The DiT and SiT networks (arXiv 2212.09748, 2401.08740), plain or with gates over layers.

Their named sizes are in families/dit.py.
"""

import math
from functools import partial

import torch
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import nn

from families.dit import DIT
from families.sit import SIT
from pruning.gates import BlockStack, LayerGates, choose_layers

FREQUENCIES = 256  # values of the sinusoidal time embedding


def modulate(x, shift, scale):
    """x (N, T, D) times 1 + scale plus shift, both (N, D)."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def initialize_linears(net):
    """Xavier-uniform weights and zero biases."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def initialize_ends(embeddings, blocks, final_layer):
    """Normal(0.02) for tensors of embeddings, zero for modulations of blocks and final layer and for the output."""
    for weight in embeddings:
        nn.init.normal_(weight, std=0.02)
    for zero in [block.adaLN_modulation[1] for block in (*blocks, final_layer)] + [final_layer.linear]:
        nn.init.zeros_(zero.weight)
        nn.init.zeros_(zero.bias)


class LabelDropper(nn.Module):
    """A network that loses labels in training, each with probability `class_dropout_prob`."""

    def draw_drop(self, n, device):
        """Which of n labels become null: (n,) bool in training mode, else None, and nothing is drawn."""
        if not self.training or self.class_dropout_prob == 0:
            return None
        return torch.rand(n, device=device) < self.class_dropout_prob


class TimestepEmbedder(nn.Module):
    """Time t (N,), integer or real, -> (N, D): sinusoid of 128 cosines and 128 sines, then a small MLP."""

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    @staticmethod
    def rates(device):
        """Angles per step (FREQUENCIES / 2,), float32. Their last bits are those of the device's exponential."""
        half = FREQUENCIES // 2
        return torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=device) / half)

    @classmethod
    def sinusoid(cls, t):
        # float32 also in float64 networks, as the published weights saw it
        angles = t[:, None].float() * cls.rates(t.device)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, t):
        return self.mlp(self.sinusoid(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels (N,) -> (N, D). With dropout there is one extra row, the null label `num_classes`."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes

    def forward(self, labels, drop=None):
        if drop is not None:
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)


class DiTBlock(nn.Module):
    """Attention and MLP, both residual, modulated by the conditioning vector c (adaLN-Zero)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):  # x (N, T, D), c (N, D)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = torch.addcmul(x, gate_a.unsqueeze(1), self.attn(modulate(self.norm1(x), shift_a, scale_a)))
        return torch.addcmul(x, gate_m.unsqueeze(1), self.mlp(modulate(self.norm2(x), shift_m, scale_m)))


class FinalLayer(nn.Module):
    """Tokens (N, T, D) -> patches (N, T, patch * patch * channels)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def position_table(hidden_size, grid_size):
    """Fixed 2-d sine-cosine table (1, T, D): the first half of the channels encodes the column, the second the row."""
    rates = 10000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64, device="cpu") / (hidden_size / 4))
    angles = torch.arange(grid_size, dtype=torch.float64, device="cpu")[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D / 2)
    columns, rows = axis.repeat(grid_size, 1), axis.repeat_interleave(grid_size, 0)
    return torch.cat([columns, rows], dim=1).float()[None]


class DiT(LabelDropper):
    """Diffusion transformer over latents (N, C, H, W), conditioned on time and class.

    With `groups` ([[N, M], ...], see pruning.patterns) it also owns `gumbel_gates`: in training mode every sample runs
    the layers drawn for it, in eval mode all samples run the layers that the gates currently choose. candidates: see
    pruning.gates.LayerGates.
    Raises ValueError for groups that do not cover the depth.
    """

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        num_classes=1000,
        learn_sigma=True,
        groups=None,
        candidates="all",
    ):
        super().__init__()
        self.in_channels, self.patch_size, self.num_classes = in_channels, patch_size, num_classes
        self.class_dropout_prob = class_dropout_prob
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.input_size, self.grid_size = input_size, input_size // patch_size
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(position_table(hidden_size, self.grid_size), requires_grad=False)
        self.blocks = BlockStack(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        if groups is not None:
            self.gumbel_gates = LayerGates(groups, depth, candidates)
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier for all linear maps, normal(0.02) for the embeddings, zero for modulations and output (adaLN-Zero)."""
        initialize_linears(self)
        patches, times = self.x_embedder.proj, self.t_embedder.mlp
        nn.init.xavier_uniform_(patches.weight.flatten(1))
        nn.init.zeros_(patches.bias)
        embeddings = [self.y_embedder.embedding_table.weight, times[0].weight, times[2].weight]
        initialize_ends(embeddings, self.blocks, self.final_layer)

    def unpatchify(self, x):
        """(N, T, patch * patch * C) -> (N, C, H, W); inside a token: row, column, channel."""
        g, p = self.grid_size, self.patch_size
        x = x.view(-1, g, g, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, g * p, g * p)

    def blocks_to_compile(self):
        """Modules that torch.compile takes one by one."""
        return list(self.blocks)

    def forward(self, x, t, y, drop=None, mask=None, observe=None):
        """Latents x (N, C, H, W), time t (N,), labels y (N,) -> (N, C or 2C, H, W).

        drop: (N,) bool, labels to replace by the null label; drawn here in training mode if not given.
        mask: (N, L) of 0/1, layers each sample runs; drawn here from the gates, if there are any, in training mode.
        observe: called as observe(layer, tokens_before, tokens_after) after every layer that runs.
        """
        mask, kept = choose_layers(self, len(x), mask)
        if drop is None:
            drop = self.draw_drop(len(x), x.device)
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y, drop)  # (N, D)
        x = self.blocks(x, c, mask=mask, kept=kept, observe=observe)
        return self.unpatchify(self.final_layer(x, c))

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_channels=3):
        """Classifier-free guidance on a doubled batch: x (2N, ...), labels y = [classes, null labels].

        The second half of x is ignored. Only the first `cfg_channels` output channels are guided: three, whatever
        the number of latent channels, is what all published numbers were made with. Both halves share the guided part.
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        guided, rest = out[:, :cfg_channels], out[:, cfg_channels:]
        cond, uncond = guided.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


class SiT(DiT):
    """The same network as an interpolant: t in [0, 1] from noise to data, and an output without the variance half."""

    def forward(self, x, t, y, drop=None, mask=None, observe=None):
        """Latents x (N, C, H, W), time t (N,), labels y (N,) -> (N, C, H, W); options as in DiT."""
        return super().forward(x, t, y, drop, mask, observe)[:, : self.in_channels]


DiT_models = {name: partial(DiT, **config) for name, config in DIT.models.items()}
SiT_models = {name: partial(SiT, **config) for name, config in SIT.models.items()}
