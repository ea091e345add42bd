"""Resolving settings, once: what was typed, what the files tell, and defaults, each with its origin.

The order, strongest first:
    1. what was typed;
    2. what the encoded latents tell (metadata.json): image size and autoencoder;
    3. what the weights tell, by the facts beside them or else by their shapes: model, classes, autoencoder, image size;
    4. the latents' number of classes, which may be fewer than the network knows;
    5. without weights to start from, the family's settings of training from scratch (train.py alone);
    6. the family's defaults: for the script, for all scripts, of its own flags;
    7. the script's defaults, which are those of the table of flags where it has none of its own.
"""

import copy

from engine.settings import DEFAULT, TYPED, Layers, Settings


def resolve(command, typed):
    """Settings of a command from what was `typed`, {setting: value}; command: an engine.cli.Command.

    Opens the files of weights that are named, but loads no tensors of them and fetches nothing. Raises InputError for
    files and flags that do not fit together.
    """
    layers, weights = Layers(), {}
    layers.add(typed, TYPED)
    if command.kinds is not None:
        from engine.file_settings import add_models  # torch comes with it

        weights = add_models(layers, command, typed)
    layers.add(command.defaults(), DEFAULT)
    names = [flag.dest for flag in command.flags()]
    return Settings(
        values=copy.deepcopy({name: layers.values.get(name) for name in names}),  # lists belong to the tables
        origins={name: layers.origins.get(name, DEFAULT) for name in names},
        weights=weights,
        unused=tuple(flag.option for flag in command.unused if flag.dest in typed),
    )
