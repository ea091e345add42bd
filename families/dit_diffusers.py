"""DiT's weights in the form of diffusers' DiTTransformer2DModel, and back.

The two networks compute the same but for the time: diffusers takes the 128 rates of its sinusoid 10000^(-i / 127), DiT
10000^(-i / 128), which is another function of the time for most of them. Time only ever is one of 1,000 whole numbers,
so what is exported is DiT's embedding as a table over these (see `tabulate_times`), and the original weights beside it.
diffusers also computes the position table itself.
"""

import hashlib
import math

import torch

from families.dit import SIZES

ORIGINAL = "original.safetensors"  # beside exported weights: ours that theirs do not hold
TIMES = 1000
SCHEDULER = {  # DiT's noise schedule, and the steps of its DDIM
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": TIMES,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "clip_sample": False,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
}
ENDS = {  # ours -> theirs, outside of the blocks
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
IN_BLOCK = {  # ours -> theirs, one or several whose rows follow each other
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm1.linear",),
}
TIME_KEYS = [f"t_embedder.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
OWN_KEYS = (*TIME_KEYS, "pos_embed")  # of ours, which theirs do not hold
CONDITION = {  # ours -> theirs, of which every block has a copy
    **{key: key.replace("t_embedder.mlp.0", "timestep_embedder.linear_1") for key in TIME_KEYS[:2]},
    **{key: key.replace("t_embedder.mlp.2", "timestep_embedder.linear_2") for key in TIME_KEYS[2:]},
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}


def name_parts(depth):
    """(our key, their keys) of all tensors whose rows are theirs one after the other."""
    for ours, theirs in ENDS.items():
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", [f"{theirs}.{kind}"]
    for layer in range(depth):
        for ours, theirs in IN_BLOCK.items():
            for kind in ("weight", "bias"):
                yield f"blocks.{layer}.{ours}.{kind}", [f"transformer_blocks.{layer}.{each}.{kind}" for each in theirs]


def name_copies(depth):
    """(our key, their keys) of all tensors of which every block has a copy."""
    for ours, theirs in CONDITION.items():
        yield ours, [f"transformer_blocks.{layer}.norm1.emb.{theirs}" for layer in range(depth)]


def describe(config):
    """config.json of diffusers for a DiT with these constructor arguments."""
    channels, is_doubled = config["in_channels"], config.get("learn_sigma", True)
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["hidden_size"] // config["num_heads"],
        "in_channels": channels,
        "out_channels": channels * (2 if is_doubled else 1),
        "num_layers": config["depth"],
        "sample_size": config["input_size"],
        "patch_size": config["patch_size"],
        "num_embeds_ada_norm": config["num_classes"],
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,  # of the second norm of a block; the first always has that
    }


def to_diffusers(state, config, steps):
    """(their state dict, their config.json, what of ours they do not hold, facts) of a DiT's state dict.

    config: its constructor arguments. steps: of samplers that the weights are for, at times 0, 1000 / steps, ...; a
    network of width 1,000 or more knows every time, of a narrower one the facts tell the steps. They tell a digest of
    the table of times, too. Raises ValueError for a network that cannot tell so many times apart, and for positions
    that are not the usual ones.
    """
    from models import position_table

    depth, theirs = config["depth"], {}
    usual = position_table(config["hidden_size"], config["input_size"] // config["patch_size"])
    if (state["pos_embed"] - usual.to(state["pos_embed"].dtype)).abs().max() > 1e-4:
        raise ValueError("pos_embed is not the fixed table of a DiT, which diffusers takes")
    for key, parts in name_parts(depth):
        rows = state[key].chunk(len(parts))
        theirs |= {name: part.clone() for name, part in zip(parts, rows, strict=True)}
    table = tabulate_times(state, steps)
    condition = {key: state[key] for key, _ in name_copies(depth)} | table
    for key, copies in name_copies(depth):
        theirs |= {name: condition[key].clone() for name in copies}
    facts = {"table": digest_table(table)}
    if config["hidden_size"] < TIMES:
        facts["num_sampling_steps"] = steps
    return theirs, describe(config), {key: state[key].clone() for key in OWN_KEYS}, facts


def from_diffusers(state, config, original, table=None):
    """A DiT's state dict of theirs and of their config.json; tensors may be on the meta device.

    original: the tensors of ORIGINAL, if there are any. table: the digest of the table that was made of them. Raises
    ValueError for a network that no DiT is, and for a table that has changed since.
    """
    from models import position_table

    check_config(config)
    depth = config["num_layers"]
    expected = {name for _, names in (*name_parts(depth), *name_copies(depth)) for name in names}
    different = sorted(expected ^ state.keys())
    if different:
        raise ValueError(f"{different[0]} is in one of config.json and the weights only")
    ours = {key: torch.cat([state[name] for name in names]) for key, names in name_parts(depth)}
    for key, names in name_copies(depth):
        ours[key] = state[names[0]]
        for name in names[1:]:
            if not ours[key].is_meta and not torch.equal(state[name], ours[key]):
                raise ValueError(f"{name} is not that of block 0; in a DiT all blocks share one embedding")
    if original:
        own = {key: ours[key] for key in TIME_KEYS}
        if not own[TIME_KEYS[0]].is_meta and digest_table(own) != table:
            raise ValueError(f"its embedding of the time is no more the table that was made of {ORIGINAL}")
        return ours | {key: original[key] for key in OWN_KEYS}
    if is_table(ours[TIME_KEYS[1]]):
        raise ValueError(f"its embedding of the time is a table, and {ORIGINAL}, with what it was made of, is missing")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return ours | {"pos_embed": position_table(width, config["sample_size"] // config["patch_size"])}


def digest_table(table):
    """A short digest of the tensors of TIME_KEYS."""
    digest = hashlib.sha256()
    for key in TIME_KEYS:
        digest.update(table[key].float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_config(config):
    """Raise ValueError unless a config.json is that of a DiT."""
    sizes = ("num_attention_heads", "attention_head_dim", "num_layers", "sample_size", "patch_size")
    for name in sizes:
        if type(config.get(name)) is not int or not 0 < config[name] < 1 << 13:
            raise ValueError(f"config.json: {name} is {config.get(name)!r:.100}; expected a whole number")
    heads, size = config["num_attention_heads"], config["attention_head_dim"]
    for known in SIZES.values():
        if known["hidden_size"] == heads * size and known["num_heads"] != heads:
            expected = f"{known['num_heads']} heads of {heads * size // known['num_heads']}"
            raise ValueError(
                f"config.json: {heads} heads of {size}, expected {expected}, which a DiT of this width has"
            )
    usual = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True}
    for name, value in usual.items():
        if config.get(name, value) != value:
            raise ValueError(f"config.json: {name} is {config[name]!r:.100}; a DiT has {value}")


def is_table(bias):
    """Whether this is the bias of the first layer of `tabulate_times`: one number."""
    return not bias.is_meta and bool((bias == bias[0]).all() and bias[0] != 0)


def tabulate_times(state, steps):
    """{our key: tensor} of a time embedder for diffusers' sinusoid that gives what DiT's weights in `state` give.

    Hidden unit k is above zero at the k-th time alone: its input is a sum of cosines of the distance to that time,
    whose weights let it fall off as far as it can (`weigh_rates`). The second layer holds the embeddings, solved for so
    that what is left of the other units does not matter. Exact up to float32, at these times.
    """
    weight, bias, second, last = (state[key].double() for key in TIME_KEYS)
    width = len(bias)
    times = torch.arange(TIMES, dtype=torch.float64)
    if width < TIMES:
        if not 1 <= steps <= width:
            raise ValueError(f"a network of width {width} can be exported for up to {width} steps of a sampler")
        times = times[:: TIMES // steps][:steps]
    embedded = torch.nn.functional.silu(sinusoid(times, 128) @ weight.T + bias) @ second.T + last

    rates, gap = weigh_rates(times)
    height = 40 / gap  # so that a unit is 20 at its time and at most -20, where SiLU is 4e-8, at the others
    table = torch.zeros(width, 256, dtype=torch.float64)
    table[: len(times)] = height * rates.repeat(2) * sinusoid(times, 127)
    threshold = torch.full((width,), -height * (1 - gap / 2), dtype=torch.float64)
    table, threshold = table.float(), threshold.float()
    seen = sinusoid(times, 127).float().double()
    units = torch.nn.functional.silu(seen @ table.double().T + threshold.double())[:, : len(times)]
    solved = torch.zeros(width, width, dtype=torch.float64)
    solved[:, : len(times)] = torch.linalg.solve(units, embedded - last).T
    return dict(zip(TIME_KEYS, (table, threshold, solved.float(), last.float()), strict=True))


def sinusoid(times, divisor):
    """128 cosines and 128 sines of times (N,): (N, 256), at rates 10000^(-i / divisor)."""
    angles = times[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=times.dtype) / divisor)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def weigh_rates(times):
    """Weights (128,) of sum 1 for cosines of time, and by how much less than 1 their sum is between any two times.

    The largest such gap is a linear program: 0.355 for all of 1,000 times.
    """
    import numpy as np
    from scipy.optimize import linprog

    apart = (times[1:] - times[0]) if len(times) > 1 else times.new_tensor([1.0])
    cosines = sinusoid(apart, 127)[:, :128].numpy()
    limits = np.hstack([cosines, np.ones((len(apart), 1))])  # sum of cosines + gap <= 1
    found = linprog(
        np.append(np.zeros(128), -1.0),
        A_ub=limits,
        b_ub=np.ones(len(apart)),
        A_eq=[np.append(np.ones(128), 0.0)],
        b_eq=[1.0],
        bounds=[(0, None)] * 128 + [(None, None)],
    )
    return torch.from_numpy(found.x[:128]), found.x[128]
