"""What a script says at its end: the command that goes on from what it wrote."""

import shlex


def write_command(script, *words, **flags):
    """A command line as it can be typed; flags by the names of their settings, True for those without a value."""
    for name, value in flags.items():
        option = "--" + name.replace("_", "-")
        words += (option,) if value is True else (option, str(value))
    return shlex.join(["python", f"{script}.py", *map(str, words)])


def say_next(run, script, *words, **flags):
    """Print the next command from the main process."""
    run.print(f"next: {write_command(script, *words, **flags)}")


def say_recovery(run, pruned, original, model, data_path):
    """Print the command that recovers the pruned weights in a file from the original ones, of the network `model`."""
    flags = {"load_weight": pruned, "load_teacher": original, "teacher": model, "data_path": data_path}
    say_next(run, "train_masked_kd", **flags)
