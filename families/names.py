"""The grammar of model names. Without torch.

A name is registered (DiT-XL/2, gated DiT-XL-1-2, ...) or names another depth of a size: DiT-D16/2 is DiT-XL/2 with 16
layers, DiT-T-D6/2 is DiT-T/2 with 6, MAR-D6+10 has stacks of 6 and 10.
"""

import re

HUB = "hf://"  # begins the name of a folder or file on the Hugging Face Hub
DEPTH = "[1-9][0-9]{0,3}"  # layers of a stack: a name may come from a file, and no file may ask for millions


def is_hub_name(name):
    """Whether a name is one on the Hub."""
    return str(name).startswith(HUB)


def read_name(family, name):
    """Constructor arguments of a model of `family`. Raises ValueError for a name outside the grammar."""
    if name in family.models:
        return dict(family.models[name])
    match = re.fullmatch(rf"{family.name}(-[A-Z]+)?-D({DEPTH}(?:\+{DEPTH})?)((?:/[0-9]+)?)", name)
    base = match and f"{family.name}{match[1] or '-' + family.base}{match[3]}"
    depths = [int(part) for part in match[2].split("+")] if match else []
    if base not in family.models or len(depths) > len(family.stacks(family.models[base])):
        raise ValueError(
            f"{name!r} is not a model name: expected one of {', '.join(family.models)}, a depth as in DiT-D16/2, or a "
            f"folder of diffusers (./{name} if it is one)"
        )
    return {**family.models[base], **family.with_stacks(depths)}


def write_name(family, width, depths, patch):
    """The ungated name with this width, stacks and patch size; None if no size has that width and patch."""
    sizes = {name: config for name, config in family.models.items() if "groups" not in config}
    same_size = {
        name: config
        for name, config in sizes.items()
        if (config["hidden_size"], config["patch_size"]) == (width, patch)
    }
    for name, config in same_size.items():
        if family.stacks(config) == tuple(depths):
            return name
    if not same_size:
        return None
    size, slash, patch = next(iter(same_size)).partition("/")
    all_equal = len(set(depths)) == 1
    depth = str(sum(depths)) if all_equal else "+".join(map(str, depths))
    return f"{size.removesuffix('-' + family.base)}-D{depth}{slash}{patch}"
