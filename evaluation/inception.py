"""The Inception network of 2015 that published FID, IS and precision come from, with both of its taps, on PyTorch.

The blocks are torchvision's; only what the 2015 graph does otherwise is here: average pools that leave the padding
out of the mean, a max pool in the last block, 1008 classes, its way of resizing. Batch norms are folded into the
convolutions.
"""

import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import inception as blocks

from engine.files import download
from evaluation.batches import digest
from evaluation.graph import read_graph

SIZE = 299  # pixels that the network sees
CHANNELS = 7  # of the spatial tap
CPU_BATCH = 8  # images that go through the network at a time without a GPU
VARIABLE = "TINYFUSION_INCEPTION"
GRAPH_NAME = "classify_image_graph_def.pb"
GRAPH_URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{GRAPH_NAME}"
WEIGHTS_DIGEST = "6726825d"  # the first digits of its SHA-256
WEIGHTS_NAME = f"weights-inception-2015-12-05-{WEIGHTS_DIGEST}.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_NAME}"

CONV = ".conv.weight"  # end of the name of a convolution in the .pth
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
FOREIGN = "not the weights of the Inception network of 2015"


class ConvReLU(nn.Conv2d):
    """Convolution with a bias, the folded batch norm, and ReLU."""

    def forward(self, x):
        return F.relu_(super().forward(x))


def mean_pool(x):
    """(N, C, H, W) -> the same shape: means of 3 x 3 pixels, at the border of those that are inside."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    """(N, C, H, W) -> the same shape: maxima of 3 x 3 pixels."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


class BlockA(blocks.InceptionA):
    """Mixed_5*."""

    def _forward(self, x):
        wide = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch1x1(x), wide, double, self.branch_pool(mean_pool(x))]


class BlockC(blocks.InceptionC):
    """Mixed_6b to Mixed_6e."""

    def _forward(self, x):
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return [self.branch1x1(x), single, double, self.branch_pool(mean_pool(x))]


class BlockE(blocks.InceptionE):
    """Mixed_7b and, with the other pool, Mixed_7c."""

    pool = staticmethod(mean_pool)

    def _forward(self, x):
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        single = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        double = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return [self.branch1x1(x), *single, *double, self.branch_pool(self.pool(x))]


class Inception(blocks.Inception3):
    """All 94 convolutions, under torchvision's names: (N, 3, 299, 299) -> (N, 2048, 8, 8) and (N, 192, 17, 17)."""

    def __init__(self):
        kinds = [BlockA, blocks.InceptionB, BlockC, blocks.InceptionD, BlockE]
        kinds = [ConvReLU, *(partial(kind, conv_block=ConvReLU) for kind in kinds), None]
        super().__init__(1, aux_logits=False, inception_blocks=kinds, init_weights=False)
        del self.avgpool, self.dropout, self.fc
        self.Mixed_7c.pool = max_pool

    def forward(self, x):
        for name, layer in self.named_children():
            x = layer(x)
            if name == "Mixed_6d":
                tap = x[:, :192]
        return x, tap


class SmallInception(nn.ModuleDict):
    """Eight convolutions between the same end points, under the graph's names: a stand-in to try things offline."""

    def __init__(self):
        shapes = {"conv": (3, 8), "conv_1": (8, 16), "conv_2": (16, 48), "mixed_8/tower/conv": (64, 96)}
        layers = {name: ConvReLU(*shape, kernel_size=3, stride=2) for name, shape in shapes.items()}
        shapes = {"mixed_6/conv": (48, 16), "mixed_6/tower_2/conv": (48, 48)}
        shapes |= {"mixed_10/conv": (96, 1024), "mixed_10/tower_2/conv": (96, 1024)}
        super().__init__(layers | {name: ConvReLU(*shape, kernel_size=1) for name, shape in shapes.items()})

    def forward(self, x):
        x = F.max_pool2d(self["conv_1"](self["conv"](x)), 3, stride=2)
        x = self["conv_2"](x)
        tap = self["mixed_6/conv"](x)
        x = self["mixed_8/tower/conv"](torch.cat([tap, self["mixed_6/tower_2/conv"](mean_pool(x))], 1))
        return torch.cat([self["mixed_10/conv"](x), self["mixed_10/tower_2/conv"](max_pool(x))], 1), tap


def resize(images):
    """(N, H, W, 3) uint8 -> (N, 299, 299, 3) float32: bilinear on TensorFlow 1's corner grid, the same to the bit."""
    images = images.float()
    for dim in (2, 1):
        size = images.shape[dim]
        place = torch.arange(SIZE, dtype=torch.float32) * torch.tensor(size / SIZE, dtype=torch.float32)
        low = place.floor()
        share = (place - low).to(images.device).view([-1 if i == dim else 1 for i in range(4)])
        low = low.long().to(images.device)
        left, right = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp_max(size - 1))
        images = right.sub_(left).mul_(share).add_(left)
    return images


class InceptionFeatures(nn.Module):
    """The network from pixels to both taps, and the weights of its classes (2048, 1008)."""

    def __init__(self, network, softmax):
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.register_buffer("softmax", softmax)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images):
        """(N, H, W, 3) uint8, RGB -> (N, 2048) pooled and (N, 2023) spatial features, the latter in NHWC order."""
        # a processor is fastest with few images at a time: what one layer writes is still near when the next reads it
        parts = torch.as_tensor(images, device=self.softmax.device)
        parts = parts.split(CPU_BATCH if parts.device.type == "cpu" else len(parts))
        pool, spatial = zip(*map(self._run, parts), strict=True)
        return torch.cat(pool), torch.cat(spatial)

    def _run(self, images):
        x = resize(images).sub_(128).mul_(1 / 128).permute(0, 3, 1, 2)
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            last, tap = self.network(x)
        return last.mean((2, 3)), tap[:, :CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def logits(self, pool):
        """(N, 2048) -> (N, 1008), without the bias: that is how the Inception Score was published."""
        return torch.as_tensor(pool, device=self.softmax.device) @ self.softmax


def _chain(scope, branch, length):
    return {f"{scope}/conv" + (f"_{i}" if i else ""): f"{branch}_{i + 1}" for i in range(length)}


def layer_names():
    """{scope in the graph: layer of Inception} of all 94 convolutions."""
    ends = {"conv": "branch1x1", "tower_2/conv": "branch_pool"}
    a = ends | _chain("tower", "branch5x5", 2) | _chain("tower_1", "branch3x3dbl", 3)
    c = ends | _chain("tower", "branch7x7", 3) | _chain("tower_1", "branch7x7dbl", 5)
    e = ends | {"tower/conv": "branch3x3_1"} | _chain("tower_1", "branch3x3dbl", 2)
    for tower, branch in (("tower", "branch3x3_2"), ("tower_1", "branch3x3dbl_3")):
        e |= {f"{tower}/mixed/conv": f"{branch}a", f"{tower}/mixed/conv_1": f"{branch}b"}
    d = _chain("tower", "branch3x3", 2) | _chain("tower_1", "branch7x7x3", 4)
    kinds = [a, a, a, {"conv": "branch3x3"} | _chain("tower", "branch3x3dbl", 3), c, c, c, c, d, e, e]
    names = {"conv": "Conv2d_1a_3x3", "conv_1": "Conv2d_2a_3x3", "conv_2": "Conv2d_2b_3x3"}
    names |= {"conv_3": "Conv2d_3b_1x1", "conv_4": "Conv2d_4a_3x3"}
    blocks_of = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
    for i, (block, table) in enumerate(zip(blocks_of, kinds, strict=True)):
        scope = f"mixed_{i}" if i else "mixed"
        names |= {f"{scope}/{inner}": f"Mixed_{block}.{branch}" for inner, branch in table.items()}
    return names


def _from_graph(consts):
    """Weights under the names of the `.pth`, from the constants of the graph."""
    full = "mixed/conv/conv2d_params" in consts
    scopes = [name.removesuffix("/conv2d_params") for name in consts if name.endswith("/conv2d_params")]
    names = layer_names() if full else {scope: scope for scope in scopes}
    inner = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    state = {"fc.weight": np.ascontiguousarray(consts["softmax/weights"].T)}
    for scope, layer in names.items():
        weight = consts[f"{scope}/conv2d_params"]
        state[f"{layer}.conv.weight"] = np.ascontiguousarray(weight.transpose(3, 2, 0, 1))
        state |= {f"{layer}.bn.{ours}": consts[f"{scope}/batchnorm/{theirs}"] for ours, theirs in inner.items()}
    return {name: torch.from_numpy(array) for name, array in state.items()}


def _fold(state):
    """{layer.weight, layer.bias} with the batch norm (eps 0.001) of every layer in them; computed in float64."""
    folded = {}
    for name in [key.removesuffix(CONV) for key in state if key.endswith(CONV)]:
        weight, gamma, beta, mean, variance = (
            state[f"{name}.{key}"].double() for key in ("conv.weight", *(f"bn.{key}" for key in BATCH_NORM))
        )
        scale = gamma / (variance + 0.001).sqrt()
        folded[f"{name}.weight"] = (weight * scale.view(-1, 1, 1, 1)).float()
        folded[f"{name}.bias"] = (beta - mean * scale).float()
    return folded


def _read_state(path):
    """Weights under the names of the `.pth`, from either kind of file, told apart by content."""
    try:
        with open(path, "rb") as file:
            head = file.read(2)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    claimed = re.search(r"-([0-9a-f]{8,64})\.pth$", Path(path).name)
    if claimed and not digest(path).startswith(claimed[1]):
        raise ValueError(f"{path}: damaged: its SHA-256 is not the one in its name; delete it and download it again")
    if head != b"PK" and head[:1] != b"\x80":
        consts = read_graph(path)
        try:
            return _from_graph(consts)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: {FOREIGN} ({error})") from None
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # of damaged files torch raises whatever the damage leads to
        raise ValueError(f"{path}: damaged, or not a file of weights") from None


def _is_dense(value):
    """Whether an entry of a state is a tensor of real numbers that are there."""
    is_usual = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return is_usual and value.is_floating_point()


def _check_state(path, state, network):
    """What the network needs of a state; ValueError unless it has just these convolutions, batch norms and classes."""
    expected = {"fc.weight": (1008, 2048)}
    for name, value in network.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight":
            expected[layer + CONV] = tuple(value.shape)
            expected |= {f"{layer}.bn.{key}": (len(value),) for key in BATCH_NORM}
    missing = sorted(expected.keys() - state.keys())
    if missing:
        raise ValueError(f"{path}: {FOREIGN} ({missing[0]!r} is missing)")
    more = {str(name) for name in state if name not in expected and str(name).endswith(CONV)}
    different = {name for name, shape in expected.items() if not _is_dense(state[name]) or state[name].shape != shape}
    if more or different:
        raise ValueError(f"{path}: {FOREIGN} ({min(more | different)} differs)")
    return {name: state[name] for name in expected}


def load_inception(path, device="cpu"):
    """InceptionFeatures from the public graph (`.pb`) or the public `.pth`, whichever `path` holds."""
    state = _read_state(path)
    with torch.device("meta"):
        network = SmallInception() if f"mixed_6/conv{CONV}" in state else Inception()
    state = _check_state(path, state, network)
    folded, classes = _fold(state), state["fc.weight"].float().T.contiguous()
    if not all(value.isfinite().all() for value in (*folded.values(), classes)):
        raise ValueError(f"{path}: damaged: not all weights are finite numbers")
    network.load_state_dict(folded, assign=True)
    return InceptionFeatures(network, classes).to(device)


def find_weights(path=None, offline=False, cache_dir=None, graph=False):
    """Path of the weights: `path`, else the first found in the usual places, else downloaded into `cache_dir`.

    The places: what the environment variable names, the working folder, `cache_dir`, torch's cache. With `graph` only
    the TensorFlow graph will do.
    """
    for source, given in (("--inception", path), (VARIABLE, os.environ.get(VARIABLE))):
        if given and not os.path.isfile(given):
            raise ValueError(f"{source} {given}: no such file; expected {GRAPH_NAME} or {WEIGHTS_NAME}")
        if given:
            return Path(given)
    cache = Path(cache_dir or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/tinyfusion").expanduser()
    places = [Path(GRAPH_NAME), cache / GRAPH_NAME]
    if not graph:
        hub = Path(torch.hub.get_dir()) / "checkpoints"
        places += [cache / WEIGHTS_NAME, *sorted(hub.glob(f"*-{WEIGHTS_DIGEST}.pth"))]
    for place in places:
        if place.is_file():
            return place
    url, name, check = (GRAPH_URL, GRAPH_NAME, check_graph) if graph else (WEIGHTS_URL, WEIGHTS_NAME, check_digest)
    if offline:
        raise ValueError(f"no Inception weights here; fetch {url} and give its path with --inception")
    try:
        return download(url, cache / name, check)
    except ValueError as error:
        raise ValueError(f"{error}; fetch it and give its path with --inception") from None


def check_graph(path):
    """Raise ValueError unless the file is the graph."""
    try:
        consts = read_graph(path)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), "the file")) from None
    if "softmax/weights" not in consts:
        raise ValueError("the file has no softmax/weights")


def check_digest(path):
    """Raise ValueError unless the file is the published .pth."""
    if not digest(path).startswith(WEIGHTS_DIGEST):
        raise ValueError(f"its SHA-256 is not {WEIGHTS_DIGEST}...")
