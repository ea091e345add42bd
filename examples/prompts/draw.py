"""Draw prompts with a pipeline of diffusers, by diffusers alone: nothing of the project is imported.

Example:
  python -I examples/prompts/draw.py --pipeline student --prompts prompts.txt --pictures 400 --output student.npy

Picture i shows prompt i (modulo their number), from noise of the generator with seed i.
"""

import argparse
import inspect
from pathlib import Path

import diffusers
import numpy as np
import torch


def draw(pipeline, prompts, pictures, size, steps, guidance, batch=100):
    """Grey pictures (pictures, size, size), float32 from 0 to 1."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"use_resolution_binning": False, "clean_caption": False}  # of pipelines that would change what is asked
    options = {
        name: value for name, value in options.items() if name in inspect.signature(pipeline.__call__).parameters
    }
    drawn = []
    for start in range(0, pictures, batch):
        numbers = range(start, min(start + batch, pictures))
        out = pipeline(
            prompt=[prompts[i % len(prompts)] for i in numbers],
            generator=[torch.Generator().manual_seed(i) for i in numbers],
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
            **options,
        )
        drawn.append(out.images.mean(-1))
    return np.concatenate(drawn).astype(np.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="folder of the pipeline")
    parser.add_argument("--prompts", type=Path, required=True, help="file with a prompt in a line")
    parser.add_argument("--output", required=True, help="file for the pictures, .npy")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--size", type=int, default=8, help="height and width of a picture")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    asked = parser.parse_args()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(asked.pipeline)
    prompts = asked.prompts.read_text().splitlines()
    np.save(asked.output, draw(pipeline, prompts, asked.pictures, asked.size, asked.steps, asked.guidance))
    print(f"{asked.pictures} pictures of {len(prompts)} prompts in {asked.output}")


if __name__ == "__main__":
    main()
