"""What a family's network, objective, sampler and autoencoder have to offer, with shapes.

N images of C channels and h x w latents, L layers through all stacks, T tokens of width D.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Network(Protocol):
    """A diffusion transformer whose blocks are in one or more `pruning.gates.BlockStack`s; a torch Module.

    Built with `groups=[[N, M], ...]` it owns `gumbel_gates`, of the kind that `candidates` says (see there). Its
    inputs are the family's own, between its objective and its sampler; `mask`, `observe` and `drop` are common to all.
    """

    in_channels: int
    input_size: int  # latents per side
    num_classes: int  # also the null label

    def blocks_to_compile(self) -> list:
        """Modules that torch.compile takes one by one: the blocks of all stacks, and what else takes time."""

    def draw_drop(self, n: int, device) -> Tensor | None:
        """Which of n labels become null: (n,) bool in training mode with label dropout, else None, nothing drawn."""

    def forward(self, *inputs, drop: Tensor | None = None, mask: Tensor | None = None, observe=None) -> Tensor:
        """drop: (N,) bool. mask: (N, L) of 0/1, the layers each sample runs. observe(layer, before, after): tokens."""


class Objective(Protocol):
    """What a family trains on: a schedule and no parameters; a torch Module."""

    def draw(self, net: Network, x: Tensor, y: Tensor):
        """All random numbers of a step but the gates', for latents x (N, C, h, w) and labels y (N,)."""

    def predict(self, net: Network, x: Tensor, y: Tensor, draw, observe=None, mask: Tensor | None = None) -> Tensor:
        """Output of the network on noised latents, (rows, ...); `observe` and `mask` as for the network."""

    def noise_share(self, draw) -> Tensor:
        """Share of noise in the variance of what each row of the output was predicted from: (rows,), 0 to 1."""

    def loss(self, prediction: Tensor, x: Tensor, draw) -> dict[str, Tensor]:
        """Per-sample terms (N,), `loss` among them."""

    def match(self, student: Tensor, teacher: Tensor, x: Tensor, draw) -> dict[str, Tensor]:
        """Per-sample terms (N,) of output distillation, `kd_loss` among them."""


class Sampler(Protocol):
    """From noise to latents, guided; a torch Module."""

    def __call__(self, net: Network, y: Tensor, noise: Tensor, step_noise=None, progress: bool = False) -> Tensor:
        """Labels y (N,) and start noise (N, C, h, w) -> latents (N, C, h, w).

        step_noise(k, shape) gives the k-th standard normal tensor (N, *shape), and step_noise(k, shape, count) `count`
        of them, (count, N, *shape); without it noise is drawn where needed.
        """


class Codec(Protocol):
    """Between pictures (N, 3, H, W) in [-1, 1] and latents."""

    channels: int  # of what the network works on
    stored_channels: int  # of what `encode` gives: twice as many if these are moments
    scale: float  # latents are multiplied by it

    def noise_shape(self, size: int) -> tuple[int, ...]:
        """Shape of the noise that encoding one picture of size x size pixels takes."""

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Pictures and standard normal noise (N, *noise_shape) -> (N, stored_channels, h, w)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, channels, h, w) -> pictures."""
