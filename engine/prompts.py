"""Captions of pictures: found in a folder, and encoded once as the pipeline of a transformer encodes them."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffusion.pipeline_call import check_noise, describe_argument, find_layout, find_names, find_output, find_unguided
from diffusion.prompts import Call, is_flow, list_parts
from engine.data import write_array
from engine.errors import InputError, flag_errors
from engine.files import is_picture, read_json, write_atomically, write_errors, write_json
from engine.images import PictureList, is_hidden
from engine.run import DTYPES
from families import family_of, full_name

BATCH = 16  # prompts that are encoded together
CAPTION_FILE = "metadata.jsonl"


def list_captioned(folder):
    """The PictureList of a folder of captioned pictures, in sorted order; its classes are the captions.

    A caption is the `text` of a line of metadata.jsonl, whose `file_name` is the picture, or a .txt of its name beside
    it. Raises InputError for a folder without pictures, and for a picture without a caption.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if is_picture(path) and not is_hidden(path, folder))
    if not paths:
        raise InputError(f"--data-path {folder}: no images; expected pictures with captions")
    told, numbers, labels = read_captions(folder), {}, []
    for path in paths:
        text = told.get(path)
        if text is None and path.with_suffix(".txt").is_file():
            with flag_errors("--data-path", path.with_suffix(".txt")):
                text = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        if text is None:
            raise InputError(
                f"--data-path {folder}: {path.relative_to(folder)} has no caption; expected a line of {CAPTION_FILE} "
                f"with its file_name and text, or {path.with_suffix('.txt').name} beside it"
            )
        labels.append(numbers.setdefault(text, len(numbers)))
    return PictureList(paths, labels, list(numbers))


def read_captions(folder):
    """{path: caption} of all metadata.jsonl files below a folder."""
    told = {}
    for file in sorted(folder.rglob(CAPTION_FILE)):
        with flag_errors("--data-path", file):
            lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if line.strip():
                with flag_errors("--data-path", f"{file}, line {number}"):
                    name, text = read_caption(line)
                told[file.parent / name] = text
    return told


def read_caption(line):
    """(file name, caption) of a line of metadata.jsonl. Raises ValueError for another line."""
    try:
        row = json.loads(line)
        name, text = row["file_name"], row["text"]
        if isinstance(name, str) and isinstance(text, str):
            return name, text
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError("expected a JSON object with file_name and text")


def encode_prompts(folder, model, texts, space, run):
    """Write the folder `prompts` of encoded pictures: how the transformer is called, and what prompts give it.

    model: a pipeline. space: the engine.vae.LatentSpace of the pictures. An empty prompt follows the `texts`.
    Embeddings are computed in the run's precision; those of half precision are kept in float16. Nothing is done where
    all is there already. Raises InputError for a pipeline that training could not follow.
    """
    target, half = Path(folder) / "prompts", run.precision != "fp32"
    if (target / "call.json").is_file():
        encoded_by = read_json("--features-path", target / "call.json").get("pipeline")
        if encoded_by != full_name(model):
            raise InputError(
                f"--features-path {folder}: its prompts are of {encoded_by}, not of --model {model}; take another "
                "folder"
            )
        return
    with flag_errors("--model", model):
        recorder = family_of(model).make_recorder(model, run.device, DTYPES[run.precision])
        call = describe_call(recorder, texts, space, full_name(model))
    with flag_errors("--model", model), write_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        for path, part in list_parts(call.template):
            if "constant" in part:
                write_array(target / f"{path}.npy", to_array(part["constant"], half=False))
                part["constant"] = None
        write_rows(target, call, recorder, texts, space, half)
        about = asdict(call)
        del about["folder"]
        write_json(target / "call.json", about)


def describe_call(recorder, texts, space, pipeline):
    """The Call of a pipeline, with tensors for constants. Raises ValueError for what training could not follow."""
    longest, scheduler = max(texts, key=len, default=""), recorder.pipeline.scheduler
    seen = recorder.record([longest], space.image_size)
    one, names, output, mu = seen.arguments[0], find_names(seen), find_output(seen), seen.mu
    if is_flow(scheduler.config, type(scheduler).__name__):
        check_noise(seen, scheduler)
    layout = find_layout(one[names["latents"]].shape, (space.channels, space.size, space.size))
    two = recorder.record([longest, ""], space.image_size).arguments[0]
    template = {}
    for name in two:
        if name not in (names["latents"], names["time"]):
            try:
                template[name] = describe_argument(one.get(name), two[name])
            except ValueError as error:
                raise ValueError(f"the argument {name} of its transformer {error}") from None
    config = {**json.loads(scheduler.to_json_string()), "_class_name": type(scheduler).__name__}
    known = {"layout": layout, "output": output, "template": template, "scheduler": config}
    return Call(recorder.class_name, **names, **known, count=len(texts), cut=[], pipeline=pipeline, mu=mu)


def write_rows(target, call, recorder, texts, space, half):
    """Write the arrays with a row for every prompt and one for the empty prompt, batch after batch, and join these.

    What a mask leaves out at the end of prompts is filled up with zeros here, and `call.cut` tells that it need not be
    given. Raises ValueError where prompts differ in length and no mask says so to the transformer.
    """
    paths = [path for path, part in list_parts(call.template) if "rows" in part]
    masks = [path for path in paths if is_mask(path)]
    starts, lengths, sizes, is_end = [], [], {path: set() for path in paths}, True
    for batch in encode_batches(call, recorder, texts, space.image_size, paths, half):
        starts.append(len(lengths))
        for path, rows in batch.items():
            np.save(target / f"{path}-{starts[-1]}.npy", rows)
            sizes[path].add(rows.shape[1:])
        mask = batch[masks[0]].astype(bool) if masks else np.ones((len(next(iter(batch.values()), ())), 1), bool)
        lengths += list(np.maximum(mask.sum(1), 1))
        is_end &= bool((np.sort(mask, axis=1)[:, ::-1] == mask).all())
    shapes = {path: tuple(max(each) for each in zip(*sizes[path], strict=True)) for path in paths}
    if len(masks) == 1 and is_end:
        of_tokens = [path for path in paths if len(shapes[path]) > 1 and shapes[path][0] == shapes[masks[0]][0]]
        call.cut = [*masks, *of_tokens]
    if any(len(each) > 1 and path not in call.cut for path, each in sizes.items()):
        raise ValueError("the pipeline gives prompts of different lengths, and no mask that says so alone")
    for path in paths:
        join_rows(target, path, starts, len(texts) + 1, shapes[path])
    write_array(target / "lengths.npy", np.array(lengths))


def encode_batches(call, recorder, texts, size, paths, half):
    """Yield {path: rows} for batches of the prompts, and last for the empty prompt, as it is used to guide."""
    for start in tqdm(range(0, len(texts), BATCH), desc="encoding prompts"):
        batch = texts[start : start + BATCH]
        yield to_rows(recorder.record(batch, size).arguments[0], paths, slice(0, len(batch)), half)
    given, row = find_unguided(recorder.record([""], size, guided=True), call.latents)
    given = given or recorder.record([""], size).arguments[0]
    yield to_rows(given, paths, slice(row, row + 1), half)


def to_rows(given, paths, rows, half):
    """{path: array} of these rows of a call's arguments; a mask that is left out is one of ones."""
    found = {path: to_array(find_value(given, path), half) for path in paths}
    tokens = max((each.shape[1] for each in found.values() if each is not None and each.ndim == 3), default=0)
    ones = np.ones((rows.stop, tokens), np.int64)
    return {path: (ones if each is None and is_mask(path) else each)[rows] for path, each in found.items()}


def join_rows(target, path, starts, count, shape):
    """Write <path>.npy of `count` rows of a shape out of the files of its batches, which are removed."""
    parts = [target / f"{path}-{start}.npy" for start in starts]
    first = np.load(parts[0], mmap_mode="r")

    def write(temporary):
        joined = np.lib.format.open_memmap(temporary, "w+", first.dtype, (count, *shape))
        for start, part in zip(starts, parts, strict=True):
            rows = np.load(part, mmap_mode="r")
            joined[(slice(start, start + len(rows)), *(slice(size) for size in rows.shape[1:]))] = rows
        joined.flush()

    write_atomically(target / f"{path}.npy", write, make_folder=False)
    for part in parts:
        os.unlink(part)


def is_mask(path):
    return "mask" in path


def find_value(given, path):
    """The value at a path such as added_cond_kwargs.resolution of nested dicts."""
    for name in path.split("."):
        given = given[name]
    return given


def to_array(value, half):
    """A tensor of a pipeline as an array: whole numbers as they are, others in float32, or float16.

    Raises ValueError for numbers that are not finite there.
    """
    if value is None:
        return None
    array = value.float().cpu().numpy() if value.is_floating_point() else value.cpu().numpy()
    with np.errstate(over="ignore"):
        array = array.astype(np.float16) if half and array.dtype == np.float32 and array.ndim > 1 else array
    if not np.isfinite(array).all():
        raise ValueError("an embedding of a prompt is not finite, or too large for float16; take --precision fp32")
    return array
