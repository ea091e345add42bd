"""Damaged and hostile files: which good one is damaged how, the command that reads it, and the expected answer."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from faults import damage as d
from faults.good import CLASSES, RESUME, run_folder, words_of
from faults.harness import EARLY_OUTPUT, EITHER, REFUSED, SURVIVES, Case, base_words

TRAINS = ("train", "train_masked_kd", "prune_by_learning")
ANY_OUTPUT = ("out", "out/*")  # of a run that ends by what it computes

# (script, family, the file of weights that its base command line names)
WEIGHTS = [
    ("train", "DiT", "student"),
    ("sample", "DiT", "student"),
    ("prune_by_index", "DiT", "teacher"),
    ("train_masked_kd", "DiT", "teacher"),
    ("prune_by_learning", "SiT", "teacher"),
    ("sample_ddp", "MAR", "student"),
    ("prune_by_score", "DiT", "teacher"),
    ("train_masked_kd", "SiT", "student"),
    ("train", "MAR", "student"),
    ("prune_by_index", "MAR", "teacher"),
    ("sample", "SiT", "student"),
]
FACTS = {  # key of the facts beside weights -> values that it cannot have
    "model": [5, "", "UNet", ["DiT-T-D2/2"], {}, True, "DiT-T-D9/2", "MAR-T-D2", "DiT-T-D999999999/2", "DiT-T-1-2"],
    "num_classes": ["10", 10.5, -1, 0, d.HUGE, True, [10], d.NAN, 9, "many"],
    "vae": [5, "", ["none"], {}, "absent-folder", True, "in/DiT", "kl17"],
}
PATTERNS = [5, [], {"1:2": 3}, "x", "9:9", "1:2", True, [["1", "2"]]]
METADATA = {  # key of the latents' metadata -> values that it cannot have
    "shape": [
        None, 5, "3,8,8", [3, 8], [3, 8, 8, 8], [3, 8, "8"], [3, -8, 8], [0, 8, 8], [3, 8, d.HUGE], [3.0, 8, 8],
        [[3], [8], [8]], [3, 8, d.NAN], {}, [4, 8, 8], [8, 3, 8], [],
    ],
    "image_size": [16, 0, -8, "8", 8.5, True, d.HUGE, [8], d.NAN, 1],
    "num_classes": [9, 0, -1, "10", 1.5, True, [10], d.NAN, 1],
    "vae": [5, "", "absent", [], True, {}, "in/pictures"],
}  # fmt: skip
ARRAYS = {  # array of the latents -> what is wrong with it
    "features": {
        **d.ARRAY_BYTES, **d.NPY_HEADERS,
        "cut in its header": d.cut(0.001),
        "longer than it says": d.add(bytes(1000)),
        "float64": d.edit_array(lambda a: a.astype(np.float64)),
        "float16": d.edit_array(lambda a: a.astype(np.float16)),
        "whole numbers": d.edit_array(lambda a: a.astype(np.int32)),
        "complex numbers": d.edit_array(lambda a: a.astype(np.complex64)),
        "booleans": d.edit_array(lambda a: a > 0),
        "objects with code": d.save_objects,
        "one image short": d.edit_array(lambda a: a[:-1]),
        "one image too many": d.edit_array(lambda a: np.concatenate([a, a[:1]])),
        "no mirrors": d.edit_array(lambda a: a[:, :1]),
        "four dimensions": d.edit_array(lambda a: a[:, 0]),
        "other channels": d.edit_array(lambda a: a[:, :, :2]),
        "no image": d.edit_array(lambda a: a[:0]),
    },
    "labels": {
        **d.ARRAY_BYTES,
        "one short": d.edit_array(lambda a: a[:-1]),
        "one too many": d.edit_array(lambda a: np.append(a, 0)),
        "none": d.edit_array(lambda a: a[:0]),
        "a negative one": d.set_to(3, -1),
        "one too large": d.set_to(3, CLASSES),
        "one of 10**18": d.set_to(3, 10**18),
        "broken numbers": d.edit_array(lambda a: a + 0.5),
        "NaN": d.edit_array(lambda a: np.full(len(a), d.NAN)),
        "text": d.edit_array(lambda a: a.astype(str)),
        "complex numbers": d.edit_array(lambda a: a.astype(np.complex128)),
        "two dimensions": d.edit_array(lambda a: np.stack([a, a], 1)),
        "a single number": d.edit_array(lambda a: np.int64(3)),
        "objects with code": d.save_objects,
    },
    "status": {
        **{name: d.ARRAY_BYTES[name] for name in ("empty", "text", "cut in half")},
        "one short": d.edit_array(lambda a: a[:-1]),
        "one too many": d.edit_array(lambda a: np.append(a, a[:1])),
        "a 7": d.set_to(5, 7),
        "sevens alone": d.edit_array(lambda a: a * 0 + 7),
        "pending alone": d.edit_array(lambda a: a * 0),
        "corrupt alone": d.edit_array(lambda a: a * 0 + 2),
        "half numbers": d.edit_array(lambda a: a + 0.5),
        "text": d.edit_array(lambda a: a.astype(str)),
        "two dimensions": d.edit_array(lambda a: a[:, None]),
        "objects with code": d.save_objects,
    },
}  # fmt: skip
NUMBERS_IN_LATENTS = {
    "a NaN": d.set_to((3, slice(None), 0, 0, 0), d.NAN),
    "an infinity": d.set_to((3, slice(None), 0, 0, 0), -d.INF),
    "NaN alone": d.edit_array(lambda a: a * d.NAN),
}
LATENT_SCRIPTS = ("train", "prune_by_score", "extract_features", "prune_by_learning", "train", "train_masked_kd")
PUBLISHED = {  # file of the published layout -> what is wrong with it
    "i_features/3.npy": {
        **{name: d.ARRAY_BYTES[name] for name in ("empty", "text", "cut in half", "without its last byte")},
        "missing": d.remove, "a FIFO": d.to_fifo, "a folder": d.to_folder, "a link to nothing": d.to_dangling,
        "another shape": d.edit_array(lambda a: a[:, :, :4]),
        "three dimensions": d.edit_array(lambda a: a[0]),
        "other channels": d.edit_array(lambda a: a[:, :2]),
        "no image": d.edit_array(lambda a: a[:0]),
        "whole numbers": d.edit_array(lambda a: (a * 100).astype(np.int32)),
        "complex numbers": d.edit_array(lambda a: a.astype(np.complex64)),
        "text inside": d.edit_array(lambda a: a.astype(str)),
        "objects with code": d.save_objects,
    },
    "i_labels/3.npy": {
        **{name: d.ARRAY_BYTES[name] for name in ("empty", "text", "cut in half")},
        "missing": d.remove, "a FIFO": d.to_fifo, "a folder": d.to_folder,
        "no number": d.edit_array(lambda a: a[:0]),
        "negative": d.edit_array(lambda a: a * 0 - 1),
        "too large": d.edit_array(lambda a: a * 0 + CLASSES),
        "a half": d.edit_array(lambda a: a + 0.5),
        "NaN": d.edit_array(lambda a: a * d.NAN),
        "infinite": d.edit_array(lambda a: np.full(1, d.INF)),
        "two numbers": d.edit_array(lambda a: np.array([1, 2])),
        "text inside": d.edit_array(lambda a: np.array(["three"])),
        "objects with code": d.save_objects,
    },
    "i_labels": {"missing": d.remove, "a file": lambda path: (d.remove(path), d.put(b"")(path))},
    "i_features": {"missing": d.remove, "a FIFO": d.to_fifo, "empty": lambda path: (d.remove(path), path.mkdir())},
}  # fmt: skip
VAE_CONFIG = {  # key of an autoencoder's config.json -> values that it cannot have
    "_class_name": ["UNet2DModel", "VQModel", 5],
    "block_out_channels": [5, [], "8888", [8, 8, 8], [8] * 40, [-8] * 4, [0] * 4, ["8"] * 4, {}, [6] * 4, [16] * 4],
    "latent_channels": [0, "4", 5, -1, d.HUGE],
    "scaling_factor": [d.NAN, 0, "x", d.INF, []],
    "norm_num_groups": [3, 0, "4"],
    "down_block_types": [["NoBlock"] * 4, [], 5],
    "act_fn": ["square", 5],
    "layers_per_block": [0, -1, "1"],
}
VAE_FILE = {
    **d.BYTES, **d.INSTEAD, **d.HEADERS,
    "missing": d.remove,
    **{name: d.STATES[name] for name in (
        "a NaN inside", "NaN alone", "a key missing", "a matrix transposed", "no tensors", "one tensor alone"
    )},
    "code in a .bin instead": lambda path: d.save_payload(path.rename(path.with_name("diffusion_pytorch_model.bin"))),
}  # fmt: skip
VAE_COMMANDS = {
    "extract_features": "--data-path in/pictures --vae in/vae --image-size 16 --features-path out/f --num-workers 0",
    "sample": "--ckpt in/encoded.pt --num-sampling-steps 2 --labels 1 --output out/g.png",
}
RUN_CONFIG = {
    **{name: d.put(content) for name, content in d.TEXTS.items()},
    **{name: d.INSTEAD[name] for name in ("a folder", "a FIFO", "a link to itself")},
    "settings that are a number": d.with_value("settings", 5),
    "settings that are a list": d.with_value("settings", ["lr"]),
    "no number but null": d.put(b"null"),
}
SAMPLED = "in/samples/DiT-T-D2-2-student-size-8-vae-none-cfg-1.5-ddpm-3-seed-0"
SAMPLE_AGAIN = "--ckpt in/DiT/student.pt --sample-dir in/samples --num-fid-samples 5 --num-sampling-steps 3"
SAMPLED_PICTURES = {
    **{name: d.PICTURES[name] for name in (
        "empty", "text", "a PNG cut in half", "a PNG that says 30000x30000", "a PNG with broken data", "a FIFO",
        "a link to nothing", "a PNG of width 0",
    )},
    "another size": d.save_picture((16, 16)),
    "a folder": d.to_folder,
}  # fmt: skip
LOG_FILES = {"metrics.jsonl": d.INSTEAD, "log.txt": d.INSTEAD}


def case(kind, script, words, target, what, damage, **options):
    """A case of one damaged file; names: it, its folder, or a flag."""
    make = partial(do, damage, target)
    title = f"{script}: {target} {what}"
    names = options.pop("names", None) or (Path(target).name, Path(target).parent.name)
    needs = (*options.pop("needs", ()), target)
    return Case(title, kind, script, tuple(words), tuple(names), make, needs=needs, **options)


def do(damage, target, folder):
    damage(folder / target)


def weights_of(position, count, suffix):
    """`count` uses of weights for the damage number `position`: (script, words, file, its flag)."""
    for k in range(count):
        script, family, role = WEIGHTS[(position + k * 4) % len(WEIGHTS)]
        target = f"in/{family}/{role}.pt"
        words = [word.replace(target, f"in/{family}/{role}.{suffix}") for word in base_words(script, family)]
        yield script, words, f"in/{family}/{role}.{suffix}"


def may_train(script, name):
    """What a training run may write before it meets a number that is none."""
    return ANY_OUTPUT if script in TRAINS and name in (*d.NUMBERS_INSIDE, *d.FLIPPED) else ()


def weight_cases():
    """Files of weights."""
    for suffix, count, tables in (
        ("pt", 3, {**d.BYTES, **d.INSTEAD, **d.HOSTILE_PT, **d.STATES, **d.ONLY_PT}),
        ("pt", 1, d.FLIPPED),
        ("safetensors", 2, {**d.BYTES, **d.INSTEAD, **d.HEADERS, **d.STATES}),
    ):
        for position, (name, damage) in enumerate(tables.items()):
            for script, words, target in weights_of(position, count, suffix):
                names = (Path(target).name, "--load-weight", "--ckpt", "--load-teacher")
                names += ("the loss is not finite",) if name in d.NUMBERS_INSIDE and script in TRAINS else ()
                allowed = may_train(script, name)
                yield case(f"weights .{suffix}", script, words, target, name, damage, names=names, may_write=allowed)


def facts_cases():
    """Facts beside weights."""
    texts = {name: d.put(content) for name, content in (*d.TEXTS.items(), ("HTML", d.HTML), ("null", b"null"))}
    values = {f"{key} {describe(value)}": d.with_value(key, value) for key, found in FACTS.items() for value in found}
    for position, (name, damage) in enumerate({**texts, **d.INSTEAD, **values}.items()):
        for script, words, target in weights_of(position, 2, "pt"):
            if is_in_order(name, script, target):
                continue
            names = (Path(target).name, "--load-weight", "--ckpt", "--load-teacher", "--model", "--teacher", "--vae")
            names += ("--num-classes", "--image-size")
            yield case(
                "facts beside weights", script, words, f"{target}.json", name, damage, names=names, needs=(target,)
            )
    for value in PATTERNS:
        name, target = f"pattern {describe(value)}", "in/DiT/uneven.pt.json"
        words = [word.replace("student.pt", "uneven.pt") for word in base_words("train_masked_kd")]
        make = partial(make_uneven, value)
        yield Case(
            f"train_masked_kd: {target} {name}", "facts beside weights", "train_masked_kd", tuple(words),
            ("pattern", "uneven.pt"), make, needs=("in/DiT/teacher.pt",),
        )  # fmt: skip


def is_in_order(name, script, target):
    """Whether facts are no fault here: of the right family, or overruled by what is typed, or of a teacher."""
    is_name = name.startswith(("model 'DiT-T", "model 'MAR-T"))
    types_model = script in ("train", "prune_by_learning") or (script == "train_masked_kd" and "teacher" in target)
    if is_name and (types_model or ("MAR" in name and "/MAR/" in target)):
        return not ("MAR" in name and "/MAR/" not in target)
    return "teacher" in target and script == "train_masked_kd" and name in ("num_classes 9", "num_classes 10**30")


def make_uneven(pattern, folder):
    """Weights of three layers, with this pattern in their facts."""
    from engine.checkpoint import save_weights
    from pruning.surgery import keep_layers

    teacher = d.read_tensors(folder / "in/DiT/teacher.pt")
    facts = {"model": "DiT-T-D3/2", "num_classes": CLASSES, "vae": "none", "pattern": pattern}
    save_weights(folder / "in/DiT/uneven.pt", keep_layers(teacher, [0, 1, 3]), **facts)


def describe(value):
    """A value for the name of a case."""
    return repr(value) if len(repr(value)) < 40 else "10**30" if value == d.HUGE else f"{repr(value)[:36]}..."


def latent_words(script, key=""):
    """A command line that reads latents; into latents for extract_features; from scratch for the number of classes."""
    if script == "extract_features":
        return words_of("--data-path in/pictures --vae none --image-size 8 --features-path in/latents --num-workers 0")
    words = base_words(script)
    if script == "train" and key in ("num_classes", "vae", "image_size"):
        at = words.index("--load-weight")
        del words[at : at + 2]
    return words


def latent_cases():
    """The folder of latents."""
    options = {"names": ("--data-path", "--features-path", "--image-size", "--num-classes", "--vae")}
    texts = {name: d.put(content) for name, content in d.TEXTS.items()}
    rows = [("metadata.json", "", name, damage) for name, damage in {**texts, **d.INSTEAD}.items()]
    rows += [("metadata.json", "", f"without {key}", d.without(key)) for key in ("shape",)]
    rows += [
        ("metadata.json", key, f"{key} {describe(value)}", d.with_value(key, value))
        for key, values in METADATA.items()
        for value in values
    ]
    for array, table in ARRAYS.items():
        damages = {**table, **d.INSTEAD, "missing": d.remove}
        rows += [(f"{array}.npy", "", name, damage) for name, damage in damages.items()]
    for position, (file, key, name, damage) in enumerate(rows):
        second = LATENT_SCRIPTS[1 + position % 5]
        if second == "extract_features" and (file == "status.npy" or name == "longer than it says"):
            second = "train_masked_kd"  # it would mend them
        for script in dict.fromkeys(("train", second)):
            if script != "train" and key == "num_classes":
                continue  # that of the weights counts
            words = latent_words(script, key)
            yield case(
                f"latents {file}", script, words, f"in/latents/{file}", name, damage, needs=("in/latents",), **options
            )
    for name, damage in NUMBERS_IN_LATENTS.items():
        for script in ("train", "prune_by_score", "prune_by_learning", "train_masked_kd"):
            words = [
                *base_words(script),
                "--mirror",
                "0.5",
                *(["--nsamples", "32"] if script == "prune_by_score" else []),
            ]
            words += ["--epochs", "3"] if script != "prune_by_score" else []
            allowed = ANY_OUTPUT if script in TRAINS else ()
            target = "in/latents/features.npy"
            names = ("--data-path", "loss", "latents")
            yield case(
                "latents features.npy",
                script,
                words,
                target,
                name,
                damage,
                needs=("in/latents",),
                names=names,
                may_write=allowed,
            )


def published_cases():
    """The published layout of latents."""
    for file, table in PUBLISHED.items():
        for name, damage in table.items():
            words = [*base_words("train"), "--data-path", "in/published"]
            names = ("--data-path", "--num-classes")
            yield case(
                "published latents",
                "train",
                words,
                f"in/published/{file}",
                name,
                damage,
                needs=("in/published",),
                names=names,
            )
    stray = {"i_features/readme.npy": "too many", "i_labels/40.npy": "too many"}
    for file, name in stray.items():
        words = [*base_words("train"), "--data-path", "in/published"]
        damage = partial(np.save, arr=np.zeros(3))
        yield case("published latents", "train", words, f"in/published/{file}", name, damage, names=("--data-path",))


def picture_cases():
    """Pictures to encode, to measure on, to pack and to evaluate."""
    target = "in/pictures/3/003.png"
    for name, damage in d.PICTURES.items():
        options = {"needs": ("in/pictures",), "names": ("003.png",)}
        extract = base_words("extract_features")
        yield case("pictures", "extract_features", extract, target, name, damage, may_write=ANY_OUTPUT, **options)
        score = [*base_words("prune_by_score"), *["--data-path", "in/pictures", "--nsamples", "32"]]
        yield case("pictures", "prune_by_score", score, target, name, damage, **options)
        evaluate = words_of("in/pictures in/sample.npz --inception in/tiny.pb --offline --metrics fid --device cpu")
        yield case("pictures", "evaluator", evaluate, target, name, damage, **options)
    for name, damage in SAMPLED_PICTURES.items():
        pack = ["--pack", SAMPLED]
        yield case("pictures", "sample_ddp", pack, f"{SAMPLED}/000001.png", f"{name}, to pack", damage,
                   needs=(SAMPLED,), names=("000001.png", "--pack"))  # fmt: skip
    others = {
        "of another size": d.save_picture((9, 8)),
        "with transparency": d.save_picture(mode="RGBA"),
        "of 16 bits": d.save_picture(mode="I;16"),
        "of floats": d.save_picture(kind="TIFF", mode="F"),
    }
    for name, damage in others.items():
        words = words_of("in/sample.npz in/pictures --inception in/tiny.pb --offline --metrics fid --device cpu")
        yield case("pictures", "evaluator", words, target, name, damage, needs=("in/pictures",), names=("003.png",))
    stray = partial(shutil_copy, "in/sample.npz")
    words = words_of("in/sample.npz in/pictures --inception in/tiny.pb --offline --metrics fid --device cpu")
    yield case("pictures", "evaluator", words, "in/pictures/stray.npz", "among pictures", stray,
               needs=("in/pictures",), names=("in/pictures", "stray.npz"))  # fmt: skip


def shutil_copy(source, target):
    """Copy a good input."""
    d.copied(source)(target)


def beside(*parts, kind="picture"):
    """Make a folder or a file of this name beside the classes, with something in it."""

    def damage(path):
        path.mkdir(parents=True, exist_ok=True)
        for name in parts:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path / name) if kind == "picture" else (path / name).write_bytes(
                b"\0\5\x16\7"
            )

    return damage


def check_labels(folder):
    """The encoded labels are those of the folders that hold classes."""
    labels = np.load(folder / "out/f/labels.npy").tolist()
    classes = sorted(entry.name for entry in (folder / "in/pictures").iterdir() if entry.name.isdigit())
    files = [[f for f in (folder / "in/pictures" / name).glob("*.png") if f.name[0] != "."] for name in classes]
    expected = [label for label, found in enumerate(files) for _ in found]
    return "" if labels == expected else f"labels of {len(labels)} pictures, not of {len(expected)}, or others"


def hidden_cases():
    """Hidden folders and files that systems leave among pictures: they are no class and no picture."""
    rows = [
        ("in/pictures/.cache", "beside the classes", beside("a.png")),
        ("in/pictures/.ipynb_checkpoints", "beside the classes", beside("a.png", "b.png")),
        ("in/pictures/.cache", "beside the classes, of ten folders", beside(*(f"{i}/a.png" for i in range(10)))),
        ("in/pictures/3", "with .ipynb_checkpoints in it", beside(".ipynb_checkpoints/003-checkpoint.png")),
        ("in/pictures/3", "with ._003.png in it", beside("._003.png", kind="bytes")),
        ("in/pictures/3", "with a hidden picture in it", beside(".hidden.png")),
    ]
    for target, name, damage in rows:
        yield case("hidden files", "extract_features", base_words("extract_features"), target, name, damage,
                   needs=("in/pictures",), expected=SURVIVES, check=check_labels, may_write=ANY_OUTPUT)  # fmt: skip


def autoencoder_cases():
    """Folders of autoencoders."""
    configs = {name: d.put(content) for name, content in d.TEXTS.items()} | d.INSTEAD | {"missing": d.remove}
    configs |= {f"{key} {describe(v)}": d.with_value(key, v) for key, values in VAE_CONFIG.items() for v in values}
    configs |= {f"without {key}": d.without(key) for key in ("block_out_channels",)}
    tables = {"config.json": configs, "diffusion_pytorch_model.safetensors": VAE_FILE}
    for file, table in tables.items():
        for position, (name, damage) in enumerate(table.items()):
            script = list(VAE_COMMANDS)[position % 2]
            yield case("autoencoders", script, VAE_COMMANDS[script].split(), f"in/vae/{file}", name, damage,
                       needs=("in/vae",), names=("--vae", "in/vae"))  # fmt: skip
    extract = base_words("extract_features")
    for name in ("empty", "text", "cut in half", "a page of HTML"):
        words = [*extract, *["--model", "MAR-T", "--vae", "in/DiT/student.pt", "--image-size", "16"]]
        yield case("autoencoders", "extract_features", words, "in/DiT/student.pt", f"{name}, as KL-16", d.BYTES[name],
                   names=("--vae",))  # fmt: skip
    for name in ("code in it", "a pickle with code", "half of its tensors lost"):
        words = [*extract, *["--model", "MAR-T", "--vae", "in/DiT/student.pt", "--image-size", "16"]]
        damage = d.HOSTILE_PT[name]
        yield case("autoencoders", "extract_features", words, "in/DiT/student.pt", f"{name}, as KL-16", damage,
                   names=("--vae",))  # fmt: skip


def state_cases():
    """Training states: given by --resume, and the newest of a run folder."""
    state = f"{run_folder('DiT')}/checkpoints/0000004.pt"
    words = [*words_of(RESUME), "--results-dir", "out", "--resume", state]
    for name, damage in {**d.TRAINING_STATES, **d.INSTEAD}.items():
        is_number = "NaN" in name or "infinity" in name or "negative" in name or name in d.FLIPPED
        yield case("training states", "train", words, state, name, damage, names=("--resume", "0000004", "loss"),
                   may_write=ANY_OUTPUT if is_number else EARLY_OUTPUT)  # fmt: skip
    again, folder = words_of(RESUME), run_folder("DiT")
    for name, damage in {**d.BYTES, **d.INSTEAD, "half of its tensors lost": d.lose_records}.items():
        ends = EITHER if name == "a folder" else SURVIVES  # a state cannot be written over a folder
        yield case("newest of several states", "train", again, state, f"{name}, the newest", damage, needs=(folder,),
                   expected=ends, says="0000004", may_write=(f"{folder}*",), check=check_finished)  # fmt: skip
    for name in ("cut in half", "empty", "text"):
        both = partial(damage_both, d.BYTES[name])
        yield case("newest of several states", "train", again, f"{folder}/checkpoints", f"{name}, both states", both,
                   needs=(folder,), names=("0000004", "0000002", "--resume"),
                   may_write=(f"{folder}/log.txt",))  # fmt: skip
    note = [*base_words("sample"), "--ckpt", state]
    values = {"a text": "text", "a list": [1], "a text in it": {"ema_decay": "x"}, "NaN in it": {"ema_decay": d.NAN},
              "a list in it": {"ema_decay": [1]}, "a 2 in it": {"ema_decay": 2.0}, "None": None}  # fmt: skip
    for name, value in values.items():
        damage = d.on_entry("args", lambda old, value=value: value)
        yield case("training states", "sample", note, state, f"args are {name}", damage, expected=EITHER,
                   may_write=ANY_OUTPUT)  # fmt: skip
    for name in ("model missing", "ema is None", "ema with a NaN", "model is a list", "cut in half", "code in it"):
        yield case("training states", "sample", note, state, f"{name}, to sample from", d.TRAINING_STATES[name],
                   expected=REFUSED if name in ("ema with a NaN", "cut in half", "code in it") else EITHER,
                   may_write=ANY_OUTPUT if "is" in name else (),
                   names=("--ckpt", "0000004"))  # fmt: skip


def damage_both(damage, checkpoints):
    """Damage both states of a run."""
    for name in ("0000002.pt", "0000004.pt"):
        damage(checkpoints / name)


def check_finished(folder):
    """The run has its last state, and one row of metrics per step."""
    path = folder / run_folder("DiT")
    rows = [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    if not (path / "checkpoints/0000006.pt").is_file():
        return "no last state"
    return "" if rows == [1, 2, 3, 4, 5, 6] else f"metrics of steps {rows}"


def run_folder_cases():
    """The other files of a run folder."""
    words, folder = words_of(RESUME), run_folder("DiT")
    options = {"needs": (folder,)}
    for name, damage in RUN_CONFIG.items():
        yield case("run folders", "train", words, f"{folder}/config.json", name, damage,
                   may_write=(f"{folder}/log.txt",), names=("config.json", "--results-dir"), **options)  # fmt: skip
    for file, table in LOG_FILES.items():
        for name, damage in table.items():
            yield case("run folders", "train", words, f"{folder}/{file}", name, damage, names=(file, "--results-dir"),
                       may_write=(f"{folder}/log.txt",), **options)  # fmt: skip
    yield case("run folders", "train", words, f"{folder}/checkpoints", "a file", to_file, names=("--results-dir",),
               may_write=(f"{folder}/log.txt",), **options)  # fmt: skip
    survivors = {
        ("metrics.jsonl", "with a torn last line"): d.cut(last=20),
        ("metrics.jsonl", "torn after an empty line"): d.add(b'\n{"step": 9, "lo'),
        ("metrics.jsonl", "missing"): d.remove,
        ("metrics.jsonl", "empty"): d.put(b""),
        ("checkpoints/.0000006.pt.99.part", "left over"): d.put(b"half a state"),
        ("checkpoints/0000004.pt.json", "cut in half"): d.cut(0.5),
        ("log.txt", "missing"): d.remove,
        ("log.txt", "binary"): d.put(bytes(range(256))),
        ("checkpoints/notes.pt", "too many"): d.put(b"text"),
    }
    for (file, name), damage in survivors.items():
        check = check_last if file == "metrics.jsonl" else check_finished
        yield case("run folders", "train", words, f"{folder}/{file}", name, damage, expected=SURVIVES, check=check,
                   may_write=(f"{folder}*",), **options)  # fmt: skip
    either = {
        "binary": d.put(bytes(range(256)) * 4),
        "with a torn line between": d.zero(100, 160),
        "rows without a step": d.put(b'{"loss": 1.0}\n'),
        "rows that are lists": d.put(b"[1, 2]\n"),
        "a step that is a text": d.put(b'{"step": "1"}\n'),
        "a step that is NaN": d.put(b'{"step": NaN}\n'),
        "nested 100,000 deep": d.put(d.DEEP.encode()),
    }
    for name, damage in either.items():
        yield case("run folders", "train", words, f"{folder}/metrics.jsonl", name, damage, expected=EITHER,
                   names=("metrics.jsonl", "--results-dir"), may_write=(f"{folder}*",), **options)  # fmt: skip


def to_file(path):
    """A file is there instead of a folder."""
    d.remove(path)
    path.write_bytes(b"")


def check_last(folder):
    """The run has its last state."""
    return "" if (folder / run_folder("DiT") / "checkpoints/0000006.pt").is_file() else "no last state"


def sample_folder_cases():
    """A folder of samples that a second call fills up."""
    words = SAMPLE_AGAIN.split()
    for name, damage in {**{n: d.put(content) for n, content in d.TEXTS.items()}, **d.INSTEAD}.items():
        yield case("sample folders", "sample_ddp", words, f"{SAMPLED}/sampling.json", name, damage,
                   needs=("in/samples",), names=("sampling.json", "--sample-dir"))  # fmt: skip
    for key in ("num_sampling_steps", "weights", "cfg_scale", "model"):
        for value in (None, [7], "x"):
            yield case("sample folders", "sample_ddp", words, f"{SAMPLED}/sampling.json", f"{key} {value!r}",
                       d.with_value(key, value), needs=("in/samples",), names=("--sample-dir",))  # fmt: skip
    for name, damage in SAMPLED_PICTURES.items():
        for number in (0, 1) if name == "another size" else (1,):
            yield case("sample folders", "sample_ddp", words, f"{SAMPLED}/00000{number}.png", name, damage,
                       needs=("in/samples",), expected=EITHER, names=(f"00000{number}.png", "--sample-dir"),
                       check=check_packed, may_write=("in/samples*",))  # fmt: skip
    yield case("sample folders", "sample_ddp", words, f"{SAMPLED}.npz", "a folder", d.to_folder,
               needs=("in/samples",), expected=REFUSED, names=("--sample-dir", ".npz"),
               may_write=("in/samples*",))  # fmt: skip


def check_packed(folder):
    """If there is an archive, it holds five pictures of 8 x 8."""
    with np.load(folder / f"{SAMPLED}.npz") as archive:
        shape = archive["arr_0"].shape
    return "" if shape == (5, 8, 8, 3) else f"packed {shape}"


def evaluator_cases():
    """Archives of images, stored statistics, Inception weights, kept features."""
    usual, images = base_words("evaluator"), ("REF", "SAMPLE")
    for position, (name, damage) in enumerate(d.ARCHIVES.items()):
        target = ("in/sample.npz", "in/ref.npz")[position % 2]
        yield case("archives of images", "evaluator", usual, target, name, damage, names=images,
                   needs=("in/ref.npz", "in/sample.npz"))  # fmt: skip
        if position % 5 == 0:
            words = [
                *base_words("sample_ddp"),
                *["--num-fid-samples", "4", "--inception", "in/tiny.pb", "--evaluate", "in/ref.npz"],
            ]
            yield case("archives of images", "sample_ddp", words, "in/ref.npz", f"{name}, for --evaluate", damage,
                       names=("--evaluate",))  # fmt: skip
    stored = ["in/stats.npz", *usual[1:]]
    for name, damage in d.STATISTICS.items():
        yield case("stored statistics", "evaluator", stored, "in/stats.npz", name, damage, names=("REF",))
    for name, damage in d.INCEPTION_PB.items():
        yield case(
            "Inception weights", "evaluator", usual, "in/tiny.pb", name, damage, names=("--inception", "tiny.pb")
        )
    published = [word.replace("tiny.pb", "tiny.pth") for word in usual]
    for name, damage in d.INCEPTION_PTH.items():
        yield case("Inception weights", "evaluator", published, "in/tiny.pth", name, damage,
                   names=("--inception", "tiny.pth"))  # fmt: skip


def unusual_cases():
    """Names that are unusual and in order: nothing is refused, or it is said why."""
    long, odd = "n" * 250, os.fsdecode(b"caf\xe9")
    rows = [
        ("sample", ["--output", f"out/{long}.png"], "an output of 254 characters", None),
        ("prune_by_index", ["--save-model", f"out/{long[:240]}.pt"], "an output of 243 characters", None),
        ("evaluator", ["--json", f"out/{long}"], "an output of 250 characters", None),
        ("extract_features", ["--data-path", f"in/{odd}"], "a folder that is not UTF-8", partial(rename_to, odd)),
        ("sample", ["--output", f"out/{odd}.png"], "an output that is not UTF-8", None),
        ("prune_by_index", ["--save-model", f"out/{odd}.pt"], "an output that is not UTF-8", None),
        ("train", ["--prefix", "é ü"], "a prefix that is not ASCII", None),
        ("train", ["--prefix", odd], "a prefix that is not UTF-8", None),
        ("evaluator", ["--json", f"out/{odd}.json"], "an output that is not UTF-8", None),
    ]
    for script, words, name, make in rows:
        yield Case(f"{script}: {name}", "unusual names", script, (*base_words(script), *words), ("--", odd), make,
                   expected=EITHER, may_write=ANY_OUTPUT, needs=("in/pictures",))  # fmt: skip


def rename_to(name, folder):
    """Give the folder of pictures another name."""
    shutil.move(folder / "in/pictures", folder / "in" / name)


def cases():
    """All of them; names are unique."""
    parts = (
        *(weight_cases, facts_cases, latent_cases, published_cases, picture_cases, hidden_cases, autoencoder_cases),
        *(state_cases, run_folder_cases, sample_folder_cases, evaluator_cases, unusual_cases),
    )
    found = [one for part in parts for one in part()]
    assert len({one.name for one in found}) == len(found)
    return found
