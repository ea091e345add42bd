"""Wrong command lines: a good one of every script, and what is added to it to make it wrong.

Only what a person would expect to be refused is here; values that are merely unusual are not.
"""

import os
import stat
from functools import partial
from pathlib import Path

from faults.good import BASES, MODELS, RESUME, words_of
from faults.harness import EARLY_OUTPUT, SURVIVES, Case, base_words

LONG, FAR = "n" * 300, "/".join(["folder"] * 800)  # a name and a path that no file system takes
NOT_UTF8 = os.fsdecode(b"caf\xe9")
TRAINING, PRUNING = "train train_masked_kd prune_by_learning", "prune_by_learning prune_by_score prune_by_index"
SAMPLING, LOADING = "sample sample_ddp", "prune_by_index prune_by_score sample sample_ddp"
NETWORKS = f"{TRAINING} prune_by_score prune_by_index {SAMPLING}"

# (scripts, flag, values): every value for the first script, the first two for the others. '' is an empty word.
NUMBERS = [
    (TRAINING, "--lr", "nan inf -1 1e400 -0.1 fast 1,5 ''"),
    ("train train_masked_kd", "--min-lr", "inf nan -1 1e999 ''"),
    ("train", "--weight-decay", "nan inf -0.01 ''"),
    (TRAINING, "--clip-norm", "nan -1 '' off"),
    (TRAINING, "--ema-decay", "1.5 nan -0.1 inf ''"),
    (f"{TRAINING} prune_by_score", "--mirror", "2 nan -0.5 '' inf"),
    (TRAINING, "--epochs", "0 -1 1.5 1e3 nan '' ten 0x10"),
    (TRAINING, "--global-batch-size", "0 33 -16 1.5 '' 1000000000000000000000000000000 17,"),
    (TRAINING, "--global-seed", "-1 1.5 '' x"),
    (TRAINING, "--log-every", "0 -5 1.5 ''"),
    (TRAINING, "--ckpt-every", "0 -1 1e4 ''"),
    (f"{TRAINING} extract_features", "--num-workers", "-1 1.5 '' all"),
    (TRAINING, "--grad-accumulation", "0 3 -1 1.5 '' 1000000000000"),
    ("train", "--warmup-epochs", "-1 0.5 ''"),
    ("train_masked_kd", "--alpha", "1.1 nan -0.1 inf ''"),
    ("train_masked_kd", "--beta", "nan inf -1 1e400 ''"),
    ("train_masked_kd", "--relative-beta", "nan inf -1 1e400 ''"),
    ("train_masked_kd", "--mask-threshold", "nan -1 ''"),
    ("prune_by_learning", "--gate-lr", "inf nan -1 1e400 ''"),
    ("prune_by_learning", "--gate-samples", "0 1.5 nan -1 inf ''"),
    ("prune_by_score", "--n-pruned", "0 4 -1 5 1.5 nan '' all 1000000000000000000000000000000"),
    ("prune_by_score", "--search", "0 -1 1.5 nan '' some ALL 1000000000000000000000000000000"),
    ("prune_by_score", "--nsamples", "0 4 -1 41 1000000000000000000000000000000 1.5 ''"),
    ("prune_by_score extract_features sample_ddp", "--batch-size", "0 -1 1.5 ''"),
    ("sample_ddp", "--per-proc-batch-size", "0 -1 1.5 ''"),
    ("sample_ddp", "--num-fid-samples", "0 -1 1.5 nan ''"),
    ("evaluator", "--batch-size", "0 -1 1.5 '' many"),
    (SAMPLING, "--cfg-scale", "inf nan -1 1e400 '' high"),
    (SAMPLING, "--num-sampling-steps", "0 1001 -1 1.5 '' ddim50"),
    ("prune_by_score", "--num-sampling-steps", "0 -1 1.5 ''"),
    ("sample prune_by_score prune_by_index", "--seed", "-1 1.5 '' x"),
    ("sample_ddp extract_features", "--global-seed", "-1 0.5 ''"),
    ("extract_features", "--num-classes", "9 0 -1 1.5 ''"),
    ("extract_features", "--image-size", "0 -8 8.5 '' 8x8"),
    (NETWORKS, "--num-classes", "9 0 -1 1.5 nan '' 1000000000000000000000000000000"),
    (NETWORKS.replace("prune_by_index ", ""), "--image-size", "16 0 7 -8 8.5 '' 1000000000000000000000000000000"),
]
GATED_NUMBERS = [("prune_by_learning", "--lora-rank", "0 -1 1.5 '' 1000000000000000000000000000000")]
PAIRS = [  # flags of two numbers
    ("train", "--betas", ["1 1", "1 0.999", "0.9 1", "nan nan", "0.9 nan", "-0.1 0.9", "0.9 1.1", "0.9", "'' ''"]),
    ("prune_by_learning", "--tau-range", ["nan nan", "0 0", "4 0", "4 -1", "inf inf", "4 nan", "4", "'' 0.1", "4 inf"]),
    ("prune_by_learning", "--scaling-range", ["nan nan", "inf inf", "0 100", "-1 100", "1e400 1", "100", "''"]),
    ("sample", "--cfg-interval", ["0.8 0.2", "nan 1", "-0.1 1", "0 1.1", "inf inf", "0.5", "''"]),
    ("sample_ddp", "--cfg-interval", ["0.9 0.1", "nan nan"]),
]
# Words that are none of those expected.
CHOICES = [
    (NETWORKS, "--device", "cuda:99 gpu cuda:-1 cuda: cuda:x '' cpu:0 CPU mps"),
    ("extract_features evaluator", "--device", "cuda:99 gpu '' cuda:x"),
    (TRAINING, "--precision", "fp8 '' FP32 float32 bf-16"),
    (SAMPLING, "--precision", "fp64 '' half"),
    ("extract_features", "--precision", "int8 ''"),
    (NETWORKS, "--model", "UNet '' DiT DiT-T/3 DiT-T-D0/2 DiT-T-D-1/2 dit-t/2 DiT-T/2/2 MAR-T/2 MAR-T-D5 DiT-T-D1.5/2"),
    ("train_masked_kd", "--teacher", "UNet '' DiT DiT-T/3 DiT-T-D0/2 SiT-T/7"),
    ("prune_by_index", "--scheme", "best '' BK-SDM"),
    ("prune_by_score", "--criterion", "best '' Sensitivity loss"),
    ("prune_by_score", "--search-for", "best '' Lowest median"),
    (SAMPLING, "--sampler", "euler '' DDPM"),
    (SAMPLING, "--labels-typo", "1"),
    ("evaluator", "--backend", "jax '' Torch"),
    ("evaluator", "--pr-dtype", "float64 '' fp16"),
    ("evaluator", "--metrics", "fid,kid '' , fid;is FID,,IS all none"),
    ("prune_by_index", "--kept-indices", "4 '' [] 0,0 0,99 1.5 0;1 0,,1 one 1000000000000000000000000000000 0-3"),
    ("sample", "--labels", "10 '' [] 1.5 a 3,10 1;2 1000000000000000000000000000000"),
    (
        PRUNING[:17],
        "--pattern",
        "3:2 '' 0:2 2:4x2 2-4 1:2x3 1:2, :2 1: a:b 2:4,2:4,2:4 1:3 ４:２ 99999:99999 1:2x0 -1:2",
    ),
    ("train_masked_kd", "--pattern", "3:2 '' 1:4 2:4x9 1-2 0:1 1:2x1 x"),
]
EQUALS = [  # values that begin with a dash
    ("prune_by_index", "--kept-indices", "-1 -1,3"),
    ("sample", "--labels", "-1 0,-1"),
    ("sample_ddp", "--cfg-scale", "-inf -nan"),
    ("train", "--lr", "-inf -1e400"),
]
SIT = [
    (SAMPLING, "--num-sampling-steps", "1 0 -3"),
    (SAMPLING, "--sampling-method", "rungekutta '' Euler4 dopri99"),
    (SAMPLING, "--atol", "nan -1 ''"),
    (SAMPLING, "--rtol", "nan -1 ''"),
    (SAMPLING, "--path-type", "Cubic '' linear"),
    (SAMPLING, "--prediction", "data ''"),
    (SAMPLING, "--sample-eps", "2 nan -0.1 1"),
    (TRAINING, "--loss-weight", "uniform ''"),
    (TRAINING, "--train-eps", "1.5 nan -1 1 ''"),
    (TRAINING, "--path-type", "Quadratic ''"),
    (TRAINING, "--prediction", "x0 ''"),
    (SAMPLING, "--diffusion-form", "white ''"),
    (SAMPLING, "--diffusion-norm", "nan inf -1"),
    (SAMPLING, "--last-step", "None? ''"),
    (SAMPLING, "--last-step-size", "nan 2 -0.1"),
    (SAMPLING, "--cfg-scale", "inf nan"),
    (SAMPLING, "--cfg-channels", "0 -1 1.5 ''"),
]
MAR = [
    (SAMPLING, "--num-iter", "5 0 -1 1.5 '' 1000000000000000000000000000000"),
    (SAMPLING, "--cfg-schedule", "cosine '' Linear"),
    (SAMPLING, "--temperature", "inf nan -1 1e400 ''"),
    (SAMPLING, "--cfg-scale", "inf nan"),
    (SAMPLING, "--num-sampling-steps", "1001 0"),
    (f"{TRAINING} prune_by_score", "--mask-ratio-min", "0 1.5 nan -0.1 ''"),
    (f"{TRAINING} prune_by_score", "--diffusion-batch-mul", "0 -1 1.5 nan ''"),
    (PRUNING[:17], "--pattern", "1:4 3:4 2:3,1:1 1:1,1:2,1:1"),
    ("prune_by_index", "--kept-indices", "0,1 2,3 0 3 0,4"),
    ("prune_by_score", "--n-pruned", "4 3"),
    (NETWORKS, "--model", "MAR-T-D3 MAR-T-D1+1+1 MAR-T-D0+2 MAR-T-D2+ MAR-T/2"),
    ("train prune_by_learning", "--image-size", "16 6"),
]
OF_OTHERS = {  # flags that a family does not have: family, (scripts, words)
    "DiT": [
        (SAMPLING, "--num-iter 2"), (SAMPLING, "--temperature 0.9"), (SAMPLING, "--clip-denoised"),
        (SAMPLING, "--atol 1e-3"), (SAMPLING, "--sampling-method euler"), (SAMPLING, "SDE"),
        (TRAINING, "--mask-ratio-min 0.5"), (TRAINING, "--path-type GVP"), ("prune_by_index", "--reverse"),
    ],
    "SiT": [
        (SAMPLING, "--sampler ddim"), (SAMPLING, "--cfg-interval 0 0.5"), (SAMPLING, "--num-iter 2"),
        (TRAINING, "--diffusion-batch-mul 2"), ("prune_by_score", "--clean-latents"), (SAMPLING, "XDE"),
    ],
    "MAR": [
        (SAMPLING, "--sampler ddim"), (SAMPLING, "--cfg-channels 3"), (SAMPLING, "--rtol 1e-3"), (SAMPLING, "ODE"),
        (TRAINING, "--train-eps 0.1"), ("prune_by_score", "--clean-latents"), ("prune_by_index", "--last-step Mean"),
    ],
}  # fmt: skip

# What files and folders can be instead of what is expected: word -> (path, what makes it).
NO_FILE = ["''", "absent.pt", "in/latents", "/dev/null", "FIFO", "LOOP", LONG, FAR, NOT_UTF8, "дом.pt", "in/ref.npz/x"]
NO_FOLDER = ["''", "absent", "in/ref.npz", "/dev/null", "FIFO", "LOOP", LONG, FAR, NOT_UTF8, "данные", "EMPTY"]
NO_OUTPUT_FILE = ["''", "in/latents", "in/ref.npz/x.pt", "FIFO", "NODE", "LOOP", LONG, FAR, ".", "/proc/x.pt", "LINKED"]
NO_OUTPUT_FOLDER = ["''", "in/ref.npz", "in/ref.npz/x", "FIFO", "NODE", "LOOP", LONG, FAR, "/proc/x", "/dev/null/x"]
PATHS = [  # (script, flag, what is wrong with it)
    ("train", "--load-weight", NO_FILE),
    ("train", "--resume", NO_FILE),
    ("train_masked_kd", "--load-weight", NO_FILE[:5]),
    ("train_masked_kd", "--load-teacher", NO_FILE),
    ("train_masked_kd", "--resume", NO_FILE[:3]),
    ("prune_by_learning", "--load-weight", NO_FILE),
    ("prune_by_learning", "--resume", NO_FILE[:7]),
    ("prune_by_score", "--ckpt", NO_FILE[:7]),
    ("prune_by_index", "--ckpt", NO_FILE),
    ("sample", "--ckpt", NO_FILE),
    ("sample_ddp", "--ckpt", NO_FILE[:7]),
    ("evaluator", "--inception", NO_FILE[1:]),
    ("train", "--data-path", [*NO_FOLDER, "in/pictures", "in/DiT"]),
    ("train_masked_kd", "--data-path", NO_FOLDER[:5]),
    ("prune_by_learning", "--data-path", NO_FOLDER[:7]),
    ("prune_by_score", "--data-path", [*NO_FOLDER, "in/DiT"]),
    ("extract_features", "--data-path", [*NO_FOLDER, "in/latents", "in/pictures/0"]),
    ("sample_ddp", "--pack", [*NO_FOLDER, "in/latents"]),
    ("extract_features", "--vae", [*NO_FOLDER, "in/latents", "kl16", "EMA"]),
    ("sample", "--vae", [*NO_FOLDER[:8], "in/latents", "in/vae"]),
    ("sample_ddp", "--vae", [*NO_FOLDER[:6], "in/vae"]),
    ("train", "--vae", [*NO_FOLDER[:6], "in/vae", "ema"]),
    ("prune_by_learning", "--vae", NO_FOLDER[:4]),
    ("prune_by_index", "--vae", NO_FOLDER[:4]),
    ("prune_by_score", "--vae", [*NO_FOLDER[:4], "in/vae"]),
    ("train", "--results-dir", NO_OUTPUT_FOLDER),
    ("train_masked_kd", "--results-dir", NO_OUTPUT_FOLDER[:4]),
    ("prune_by_learning", "--results-dir", NO_OUTPUT_FOLDER[:6]),
    ("prune_by_learning", "--save-model", NO_OUTPUT_FILE),
    ("prune_by_score", "--save-model", NO_OUTPUT_FILE),
    ("prune_by_index", "--save-model", NO_OUTPUT_FILE),
    ("extract_features", "--features-path", NO_OUTPUT_FOLDER),
    ("sample", "--output", NO_OUTPUT_FILE),
    ("sample_ddp", "--sample-dir", NO_OUTPUT_FOLDER),
    ("sample_ddp", "--evaluate", NO_FILE[:8]),
    ("evaluator", "--json", NO_OUTPUT_FILE),
    ("evaluator", "--save-stats", NO_OUTPUT_FILE),
    ("evaluator", "--cache-dir", NO_OUTPUT_FOLDER),
    ("train", "--prefix", [LONG, FAR]),
    ("train_masked_kd", "--prefix", [LONG]),
    ("evaluator", "REF", [*NO_FILE[:3], "/dev/zero", *NO_FILE[3:], ",", "*.nothing", "in/DiT", "in/ref.npz,absent"]),
    ("evaluator", "SAMPLE", [*NO_FILE, "in/tiny.pb", "in/latents/labels.npy"]),
]

# Whole command lines: (kind, script, family, words added to the base or, after "=", all of them, names).
SCORE_BASE = "--ckpt in/DiT/teacher.pt --data-path in/latents --save-model p.pt"
MISFIT, GRAMMAR, OVER = "what does not fit together", "grammar of the command line", "outputs that are inputs"
OTHERS = [
    # weights of another model or family, and depths that do not fit
    (MISFIT, "train", "DiT", "--model SiT-T-D2/2", "--model --load-weight"),
    (MISFIT, "train", "DiT", "--model MAR-T-D2", "--model --load-weight"),
    (MISFIT, "train", "DiT", "--model DiT-T-D3/2", "--model --load-weight"),
    (MISFIT, "train", "DiT", "--model DiT-T-D999999999/2", "--model --load-weight"),
    (MISFIT, "train", "DiT", "--model DiT-T-D2/4", "--model --load-weight"),
    (MISFIT, "train", "DiT", "--model DiT-S/2", "--model --load-weight"),
    (MISFIT, "train", "DiT", "--model DiT-T-1-2", "--model"),
    (MISFIT, "train", "DiT", "--load-weight in/SiT/student.pt", "--model --load-weight"),
    (MISFIT, "train", "DiT", "--load-weight in/MAR/student.pt", "--model --load-weight"),
    (MISFIT, "train", "DiT", "--load-weight in/DiT/teacher.pt", "--model --load-weight"),
    (MISFIT, "train", "DiT", "--load-weight in/encoded.pt", "--vae --load-weight --data-path --image-size"),
    (MISFIT, "train", "DiT", "--load-weight in/tiny.pth", "--load-weight"),
    (MISFIT, "train", "DiT", "--data-path in/encoded", "--vae --load-weight --data-path --image-size"),
    (MISFIT, "train", "SiT", "--model DiT-T-D2/2", "--model --load-weight"),
    (MISFIT, "train", "MAR", "--load-weight in/MAR/teacher.pt", "--model --load-weight"),
    (MISFIT, "train", "MAR", "--model MAR-T-D2 --load-weight in/SiT/student.pt", "--model --load-weight"),
    (MISFIT, "train", "DiT", "--resume in/DiT/student.pt", "--resume"),
    (MISFIT, "train", "DiT", "--resume in/SiT/run/SiT-T-D2-2/checkpoints/0000004.pt", "--resume"),
    (MISFIT, "train", "DiT", "--resume in/MAR/run/MAR-T-D2/checkpoints/0000004.pt", "--resume"),
    (MISFIT, "train", "DiT", "--resume in/latents/features.npy", "--resume"),
    (MISFIT, "prune_by_learning", "DiT", "--resume in/DiT/run/DiT-T-D2-2/checkpoints/0000004.pt", "--resume"),
    (MISFIT, "train_masked_kd", "DiT", "--load-teacher in/DiT/student.pt", "--load-teacher --teacher"),
    (MISFIT, "train_masked_kd", "DiT", "--load-teacher in/SiT/teacher.pt", "--load-teacher --teacher"),
    (MISFIT, "train_masked_kd", "DiT", "--teacher SiT-T-D4/2 --load-teacher in/SiT/teacher.pt", "--teacher"),
    (MISFIT, "train_masked_kd", "DiT", "--teacher MAR-T-D4 --load-teacher in/MAR/teacher.pt", "--teacher"),
    (MISFIT, "train_masked_kd", "DiT", "--teacher DiT-T-D3/2", "--teacher --load-teacher"),
    (MISFIT, "train_masked_kd", "DiT",
     "--load-weight in/DiT/teacher.pt --teacher DiT-T-D2/2 --load-teacher in/DiT/student.pt", "--teacher --pattern"),
    (MISFIT, "train_masked_kd", "SiT",
     "--load-weight in/SiT/teacher.pt --teacher SiT-T-D2/2 --load-teacher in/SiT/student.pt", "--teacher --pattern"),
    (MISFIT, "train_masked_kd", "MAR",
     "--load-weight in/MAR/teacher.pt --teacher MAR-T-D2 --load-teacher in/MAR/student.pt", "--teacher --pattern"),
    (MISFIT, "train_masked_kd", "MAR", "--load-teacher in/DiT/teacher.pt", "--teacher --load-teacher"),
    (MISFIT, "train_masked_kd", "MAR", "--pattern 1:4", "--pattern"),
    (MISFIT, "train_masked_kd", "DiT", "--load-weight in/encoded.pt", "--load-weight --vae --image-size"),
    (MISFIT, "train_masked_kd", "DiT", "--load-teacher in/encoded.pt", "--load-teacher --teacher"),
    (MISFIT, "train_masked_kd", "DiT", "--model DiT-T-D4/2", "--model --load-weight"),
    (MISFIT, "prune_by_learning", "DiT", "--load-weight in/DiT/student.pt", "--load-weight --model"),
    (MISFIT, "prune_by_learning", "DiT", "--model DiT-T-1-2", "--load-weight --model"),
    (MISFIT, "prune_by_learning", "DiT", "--model MAR-T-1-2", "--load-weight --model"),
    (MISFIT, "prune_by_learning", "SiT", "--load-weight in/DiT/teacher.pt", "--load-weight --model"),
    (MISFIT, "prune_by_learning", "MAR", "--load-weight in/DiT/teacher.pt", "--load-weight --model"),
    (MISFIT, "train_masked_kd", "DiT", "--relative-beta 1 --beta 0.1", "--relative-beta --beta"),
    (MISFIT, "prune_by_learning", "DiT", "--lora", "--lora"),
    (MISFIT, "prune_by_learning", "DiT", "--dense --gate-samples 0.5", "--gate-samples --dense"),
    (MISFIT, "prune_by_index", "DiT", "--scheme bk-sdm", "--scheme"),
    (MISFIT, "prune_by_index", "DiT", "--model DiT-T-D3/2", "--model --ckpt --kept-indices"),
    (MISFIT, "prune_by_index", "DiT", "--model SiT-T-D4/2", "--model --ckpt"),
    (MISFIT, "prune_by_index", "DiT", "--model MAR-T-D4", "--model --ckpt"),
    (MISFIT, "prune_by_index", "DiT", "--model DiT-T-1-2", "--model --ckpt"),
    (MISFIT, "prune_by_index", "DiT", "--ckpt in/latents/features.npy", "--ckpt"),
    (MISFIT, "prune_by_index", "DiT", "--preview --image-size 16", "--image-size --ckpt"),
    (MISFIT, "prune_by_index", "DiT", "--preview --num-sampling-steps 1001", "--num-sampling-steps"),
    (MISFIT, "prune_by_index", "DiT", "--preview --cfg-scale inf", "--cfg-scale"),
    (MISFIT, "prune_by_index", "DiT", "--preview --cfg-scale nan", "--cfg-scale"),
    (MISFIT, "prune_by_index", "SiT", "--preview --num-sampling-steps 1", "--num-sampling-steps"),
    (MISFIT, "prune_by_index", "MAR", "--preview --num-iter 5", "--num-iter --model num_iter"),
    (MISFIT, "prune_by_index", "DiT", "= --ckpt in/DiT/teacher.pt --scheme bk-sdm --pattern 1:3 --save-model p.pt",
     "--pattern"),
    (MISFIT, "prune_by_index", "DiT", "= --ckpt in/DiT/teacher.pt --scheme bk-sdm --pattern 3:2 --save-model p.pt",
     "--pattern"),
    (MISFIT, "prune_by_index", "DiT", "= --ckpt in/DiT/teacher.pt --scheme bk-sdm --pattern '' --save-model p.pt",
     "--pattern"),
    (MISFIT, "prune_by_index", "DiT", "= --ckpt in/DiT/teacher.pt --scheme bk-sdm --pattern 2:4x3 --save-model p.pt",
     "--pattern"),
    (MISFIT, "prune_by_index", "MAR", "= --ckpt in/MAR/teacher.pt --scheme bk-sdm --pattern 1:4 --save-model p.pt",
     "--pattern"),
    (MISFIT, "prune_by_index", "DiT", "= --ckpt in/DiT/teacher.pt --save-model p.pt", "--kept-indices"),
    (MISFIT, "prune_by_index", "DiT", "= --ckpt in/DiT/teacher.pt --scheme bk-sdm", "--save-model"),
    (MISFIT, "prune_by_score", "DiT", "--data-path in/encoded", "--data-path --vae --image-size --ckpt"),
    (MISFIT, "prune_by_score", "DiT", "--model SiT-T-D4/2", "--model --ckpt"),
    (MISFIT, "prune_by_score", "DiT", "--model DiT-T-D5/2", "--model --ckpt"),
    (MISFIT, "prune_by_score", "DiT", "--batch-size 17", "--nsamples --batch-size"),
    (MISFIT, "prune_by_score", "DiT", "--ckpt in/encoded.pt", "--ckpt --vae --image-size --data-path"),
    (MISFIT, "prune_by_score", "DiT", "--clean-latents --num-sampling-steps 2000", "--num-sampling-steps"),
    (MISFIT, "prune_by_score", "DiT", "--preview --num-sampling-steps 2000", "--num-sampling-steps"),
    (MISFIT, "prune_by_score", "DiT", "= --ckpt in/DiT/teacher.pt --data-path in/latents --n-pruned 1", "--save-model"),
    (MISFIT, "prune_by_score", "DiT", "= --ckpt in/DiT/teacher.pt --save-model p.pt", "--n-pruned"),
    *((MISFIT, "prune_by_score", "DiT", f"= {SCORE_BASE} --pattern {groups}", "--pattern")
      for groups in ("3:2", "''", "0:2", "2:4x2", "1:3", "2-4", "1:2 --n-pruned 2")),
    (MISFIT, "prune_by_score", "MAR", "= --ckpt in/MAR/teacher.pt --save-model p.pt --pattern 1:4", "--pattern"),
    (MISFIT, "prune_by_score", "DiT", "--search 2 --criterion sensitivity", "--criterion"),
    (MISFIT, "prune_by_score", "DiT", "--search 2 --clean-latents", "--clean-latents"),
    (MISFIT, "prune_by_score", "DiT", "--criterion magnitude --clean-latents", "--clean-latents"),
    (MISFIT, "prune_by_score", "MAR", "--n-pruned 3 --search all", "--search"),
    (MISFIT, "sample", "DiT", "--model SiT-T-D2/2", "--model --ckpt"),
    (MISFIT, "sample", "DiT", "--model MAR-T-D2", "--model --ckpt"),
    (MISFIT, "sample", "DiT", "--model DiT-T-D4/2", "--model --ckpt"),
    (MISFIT, "sample", "DiT", "--model DiT-T-1-2", "--model --ckpt"),
    (MISFIT, "sample", "DiT", "--model DiT-T-D999999999/2", "--model --ckpt"),
    (MISFIT, "sample", "DiT", "--num-classes 11", "--num-classes"),
    (MISFIT, "sample", "DiT", "--sampler ddim --num-sampling-steps 300", "--num-sampling-steps"),
    (MISFIT, "sample", "DiT", "--sampler dpmpp --num-sampling-steps 1001", "--num-sampling-steps"),
    (MISFIT, "sample", "DiT", "--ckpt in/tiny.pth", "--ckpt"),
    (MISFIT, "sample", "DiT", "--ckpt in/vae/diffusion_pytorch_model.safetensors", "--ckpt"),
    (MISFIT, "sample", "DiT", "--ckpt in/encoded.pt --vae none", "--vae --ckpt --image-size"),
    (MISFIT, "sample", "SiT", "SDE --sampling-method dopri5", "--sampling-method"),
    (MISFIT, "sample", "SiT", "--sampling-method Heun", "--sampling-method"),
    (MISFIT, "sample", "SiT", "--sampling-method dopri5 --atol 0 --rtol 0", "--atol --rtol"),
    (MISFIT, "sample", "SiT", "SDE --sampling-method Euler --diffusion-norm inf", "--diffusion-norm"),
    (MISFIT, "sample", "MAR", "--num-iter 100", "--num-iter num_iter"),
    (MISFIT, "sample", "MAR", "--image-size 16", "--image-size"),
    (MISFIT, "sample_ddp", "DiT", "--model DiT-T-D4/2", "--model --ckpt"),
    (MISFIT, "sample_ddp", "SiT", "--model DiT-T-D2/2", "--model --ckpt"),
    (MISFIT, "sample_ddp", "DiT", "--num-classes 11", "--num-classes"),
    (MISFIT, "sample_ddp", "DiT", "--sampler ddim --num-sampling-steps 300", "--num-sampling-steps"),
    (MISFIT, "sample_ddp", "SiT", "--sampling-method dopri5 --atol 0 --rtol 0", "--atol --rtol"),
    (MISFIT, "sample_ddp", "DiT", "--evaluate in/ref.npz --inception in/tiny.pb", "--num-fid-samples"),
    (MISFIT, "sample_ddp", "DiT", "--evaluate in/ref.npz --inception absent.pb --num-fid-samples 4", "--inception"),
    (MISFIT, "sample_ddp", "DiT", "--evaluate in/ref.npz --inception in/ref.npz --num-fid-samples 4", "--inception"),
    (MISFIT, "sample_ddp", "DiT", "--evaluate in/stats.npz --inception in/tiny.pb --num-fid-samples 4", "--evaluate"),
    (MISFIT, "sample_ddp", "DiT", "--evaluate in/pictures,in/ref.npz,absent --num-fid-samples 4", "--evaluate"),
    (MISFIT, "evaluator", "DiT", "= in/ref.npz", "SAMPLE"),
    (MISFIT, "evaluator", "DiT", "= in/ref.npz --json j.json --save-stats s.npz", "SAMPLE"),
    (MISFIT, "evaluator", "DiT", "= in/stats.npz --save-stats s.npz --offline", "--save-stats"),
    (MISFIT, "evaluator", "DiT", "= in/stats.npz in/sample.npz --metrics pr --offline", "REF"),
    (MISFIT, "evaluator", "DiT", "= in/ref.npz in/stats.npz --metrics is --offline", "SAMPLE"),
    (MISFIT, "evaluator", "DiT", "= in/ref.npz in/sample.npz --offline", "--inception"),
    (MISFIT, "evaluator", "DiT", "--inception in/DiT/student.pt", "--inception"),
    (MISFIT, "evaluator", "DiT", "--inception in/sample.npz", "--inception"),
    (MISFIT, "evaluator", "DiT", "= in/ref.npz,in/stats.npz in/sample.npz --offline", "REF"),
    (MISFIT, "evaluator", "DiT", "= in/latents in/sample.npz --offline", "REF"),
    (MISFIT, "evaluator", "DiT", "--json out/same.npz --save-stats out/same.npz", "--json --save-stats"),
    (MISFIT, "extract_features", "DiT", "= --data-path in/pictures --vae in/vae --image-size 12", "--image-size"),
    (MISFIT, "extract_features", "MAR", "--model MAR-T --vae in/vae --image-size 20", "--image-size"),
    (MISFIT, "extract_features", "DiT", "--vae in/DiT/student.pt", "--vae"),
    (MISFIT, "extract_features", "MAR", "--model MAR-T --vae in/DiT/student.pt --image-size 16", "--vae"),
    (MISFIT, "extract_features", "DiT", "--features-path in/encoded", "--features-path"),
    (MISFIT, "extract_features", "DiT", "--features-path in/latents --global-seed 1", "--features-path"),
    (MISFIT, "extract_features", "DiT", "--features-path in/latents --image-size 16", "--features-path"),
    (MISFIT, "extract_features", "DiT", "--image-size 1000000000000000000000000000000", "--image-size"),
    (MISFIT, "train", "DiT", "= --model DiT-T/2 --data-path in/latents --num-classes 1000000000000000 "
     "--global-batch-size 16 --epochs 1", "--num-classes"),
    (MISFIT, "train", "DiT", "= --model DiT-T/8 --data-path in/encoded --global-batch-size 16 --epochs 1",
     "--model --image-size --data-path"),
    (MISFIT, "train", "DiT", "= --model DiT-T-D999999999/2 --data-path in/latents --global-batch-size 16", "--model"),
    (MISFIT, "train", "MAR", "= --model MAR-T --data-path in/encoded --global-batch-size 16 --epochs 1",
     "--model --image-size --data-path"),
    (MISFIT, "train", "DiT", "= --model DiT-T/2 --global-batch-size 16", "--data-path"),
    (MISFIT, "train_masked_kd", "DiT", "= --load-weight in/DiT/student.pt --data-path in/latents", "--load-teacher"),
    (MISFIT, "train_masked_kd", "DiT", "= --load-weight '' --load-teacher '' --data-path in/latents", "--load-"),
    (MISFIT, "prune_by_learning", "DiT", "= --model DiT-T-1-2 --data-path in/latents --global-batch-size 16",
     "--load-weight"),
    # outputs that are inputs
    (OVER, "prune_by_index", "DiT", "--save-model in/DiT/teacher.pt", "--save-model"),
    (OVER, "prune_by_index", "DiT", "--save-model ./in/../in/DiT/teacher.pt", "--save-model"),
    (OVER, "prune_by_index", "DiT", "--save-model ABS/in/DiT/teacher.pt", "--save-model"),
    (OVER, "prune_by_index", "DiT", "--save-model LINK:in/DiT/teacher.pt", "--save-model"),
    (OVER, "prune_by_index", "DiT", "--ckpt LINK:in/DiT/teacher.pt --save-model in/DiT/teacher.pt", "--save-model"),
    (OVER, "prune_by_index", "DiT", "--save-model in/DiT/teacher.pt.json", "--save-model"),
    (OVER, "prune_by_index", "SiT", "--save-model in/SiT/teacher.pt", "--save-model"),
    (OVER, "prune_by_index", "MAR", "--ckpt in/MAR/teacher.safetensors --save-model in/MAR/teacher.safetensors",
     "--save-model"),
    (OVER, "prune_by_score", "DiT", "--save-model in/DiT/teacher.pt", "--save-model"),
    (OVER, "prune_by_score", "DiT", "--save-model in/./DiT//teacher.pt", "--save-model"),
    (OVER, "prune_by_score", "DiT", "--save-model LINK:in/DiT/teacher.pt", "--save-model"),
    (OVER, "prune_by_score", "DiT", "--save-model in/latents/features.npy", "--save-model"),
    (OVER, "prune_by_score", "DiT", "--save-model in/latents/metadata.json", "--save-model"),
    (OVER, "prune_by_learning", "DiT", "--save-model in/DiT/teacher.pt", "--save-model"),
    (OVER, "prune_by_learning", "DiT", "--save-model in/DiT/../DiT/teacher.pt", "--save-model"),
    (OVER, "prune_by_learning", "DiT", "--save-model LINK:in/DiT/teacher.pt", "--save-model"),
    (OVER, "prune_by_learning", "DiT", "--save-model in/latents/labels.npy", "--save-model"),
    (OVER, "prune_by_learning", "MAR", "--save-model in/MAR/teacher.pt", "--save-model"),
    (OVER, "sample", "DiT", "--output in/DiT/student.pt", "--output"),
    (OVER, "sample", "DiT", "--output in/../in/DiT/student.pt", "--output"),
    (OVER, "sample", "DiT", "--output LINK:in/DiT/student.pt", "--output"),
    (OVER, "sample", "DiT", "--output in/DiT/student.pt.json", "--output"),
    (OVER, "sample", "MAR", "--output in/MAR/student.pt", "--output"),
    (OVER, "sample", "DiT", "= --ckpt in/encoded.pt --num-sampling-steps 2 --output in/vae/config.json", "--output"),
    (OVER, "sample_ddp", "DiT", "--evaluate DDP --num-fid-samples 4 --inception in/tiny.pb", "--evaluate --sample-dir"),
    (OVER, "sample_ddp", "DiT", "--pack in/packed --evaluate in/packed.npz", "--pack --evaluate"),
    (OVER, "evaluator", "DiT", "--json in/ref.npz", "--json"),
    (OVER, "evaluator", "DiT", "--json in/sample.npz", "--json"),
    (OVER, "evaluator", "DiT", "--json ./in/./sample.npz", "--json"),
    (OVER, "evaluator", "DiT", "--json LINK:in/sample.npz", "--json"),
    (OVER, "evaluator", "DiT", "--json in/tiny.pb", "--json"),
    (OVER, "evaluator", "DiT", "--save-stats in/ref.npz", "--save-stats"),
    (OVER, "evaluator", "DiT", "--save-stats in/sample.npz", "--save-stats"),
    (OVER, "evaluator", "DiT", "--save-stats ABS/in/sample.npz", "--save-stats"),
    (OVER, "evaluator", "DiT", "--save-stats LINK:in/ref.npz", "--save-stats"),
    (OVER, "evaluator", "DiT", "--save-stats in/tiny.pb", "--save-stats"),
    (OVER, "evaluator", "DiT", "= in/ref.npz --inception in/tiny.pb --offline --save-stats in/ref.npz", "--save-stats"),
    (OVER, "evaluator", "DiT", "= in/pictures in/sample.npz --inception in/tiny.pb --offline --metrics fid "
     "--json in/pictures/0/000.png", "--json"),
    # words that are no command line
    (GRAMMAR, "train", "DiT", "--lr", "--lr"),
    (GRAMMAR, "train", "DiT", "--load-weight", "--load-weight"),
    (GRAMMAR, "train", "DiT", "--betas 0.9", "--betas"),
    (GRAMMAR, "train", "DiT", "--learning-rate 0.1", "--learning-rate"),
    (GRAMMAR, "train", "DiT", "--global 16", "--global"),
    (GRAMMAR, "train", "DiT", "--l 1", "--l"),
    (GRAMMAR, "train", "DiT", "stray", "stray"),
    (GRAMMAR, "train", "DiT", "-lr 0.1", "-lr"),
    (GRAMMAR, "train", "DiT", "--compile=yes", "--compile"),
    (GRAMMAR, "train", "DiT", "--dry-run true", "true"),
    (GRAMMAR, "train", "DiT", "=", "--data-path"),
    (GRAMMAR, "train_masked_kd", "DiT", "--load x.pt", "--load"),
    (GRAMMAR, "train_masked_kd", "DiT", "--alpha", "--alpha"),
    (GRAMMAR, "train_masked_kd", "DiT", "--load-teacher", "--load-teacher"),
    (GRAMMAR, "train_masked_kd", "DiT", "--weight-decay 0.1", "--weight-decay"),
    (GRAMMAR, "prune_by_learning", "DiT", "--tau-range 4", "--tau-range"),
    (GRAMMAR, "prune_by_learning", "DiT", "--deltaw", "--deltaw"),
    (GRAMMAR, "prune_by_learning", "DiT", "--lora 8", "8"),
    (GRAMMAR, "prune_by_learning", "DiT", "--ckpt in/DiT/teacher.pt", "--ckpt"),
    (GRAMMAR, "prune_by_score", "DiT", "--n-pruned", "--n-pruned"),
    (GRAMMAR, "prune_by_score", "DiT", "--load-weight x", "--load-weight"),
    (GRAMMAR, "prune_by_score", "DiT", "--n 3", "--n"),
    (GRAMMAR, "prune_by_index", "DiT", "--kept-indices", "--kept-indices"),
    (GRAMMAR, "prune_by_index", "DiT", "--kept-indices 0 1 2", "1 2"),
    (GRAMMAR, "prune_by_index", "DiT", "--kept 0 --scheme", "--scheme"),
    (GRAMMAR, "prune_by_index", "DiT", "--pruner wanda2", "--pruner"),
    (GRAMMAR, "extract_features", "DiT", "=", "--data-path"),
    (GRAMMAR, "extract_features", "DiT", "in/pictures", "in/pictures"),
    (GRAMMAR, "extract_features", "DiT", "--vae", "--vae"),
    (GRAMMAR, "extract_features", "DiT", "--feature-path x", "--feature-path"),
    (GRAMMAR, "sample", "DiT", "--steps 10", "--steps"),
    (GRAMMAR, "sample", "DiT", "--output", "--output"),
    (GRAMMAR, "sample", "DiT", "--labels 1 2 3", "2 3"),
    (GRAMMAR, "sample", "DiT", "--cfg 4", "--cfg"),
    (GRAMMAR, "sample", "SiT", "ODE SDE", "SDE"),
    (GRAMMAR, "sample_ddp", "DiT", "--num 4", "--num"),
    (GRAMMAR, "sample_ddp", "DiT", "--tf32=no", "--tf32"),
    (GRAMMAR, "sample_ddp", "DiT", "--pack", "--pack"),
    (GRAMMAR, "sample_ddp", "DiT", "--seed 1", "--seed"),
    (GRAMMAR, "evaluator", "DiT", "in/third.npz", "in/third.npz"),
    (GRAMMAR, "evaluator", "DiT", "=", "REF"),
    (GRAMMAR, "evaluator", "DiT", "--metrics", "--metrics"),
    (GRAMMAR, "evaluator", "DiT", "--jsn x", "--jsn"),
]  # fmt: skip


def make_fifo(folder):
    """A FIFO, from which nothing ever comes."""
    os.mkfifo(folder / "in" / "fifo")


def make_node(folder):
    """A device node like /dev/null, which may be lost."""
    os.mknod(folder / "in" / "node", stat.S_IFCHR | 0o666, os.makedev(1, 3))


def make_loop(folder):
    """A link to itself."""
    os.symlink("loop", folder / "in" / "loop")


def make_empty(folder):
    """A folder without anything."""
    (folder / "in" / "empty").mkdir()


def make_linked(folder):
    """A link to a folder."""
    (folder / "in" / "behind").mkdir()
    os.symlink("behind", folder / "in" / "linked")


def make_link(name, folder):
    """A link to a file of the inputs."""
    os.symlink(os.path.relpath(name, "in"), folder / "in" / "link.pt")


def make_packed(folder):
    """A folder of pictures, and beside it the reference of the same name."""
    from PIL import Image

    (folder / "in" / "packed").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / "in" / "packed" / f"{i}.png")
    (folder / "in" / "packed.npz").write_bytes(b"the reference")


def make_ddp(folder):
    """A reference with the name that the samples will get."""
    import shutil

    (folder / "out").mkdir()
    shutil.copy(folder / "in" / "ref.npz", folder / DDP)


DDP = "out/DiT-T-D2-2-student-size-8-vae-none-cfg-1.5-ddpm-3-seed-0.npz"
SPECIAL = {  # a word in the tables -> the path on the command line, and what makes it
    "FIFO": ("in/fifo", make_fifo),
    "NODE": ("in/node", make_node),
    "LOOP": ("in/loop", make_loop),
    "EMPTY": ("in/empty", make_empty),
    "LINKED": ("in/linked", make_linked),
    "DDP": (DDP, make_ddp),
}


def translate(word):
    """(word of the command line, what has to be made for it or None, inputs that this needs)."""
    if word in SPECIAL:
        return *SPECIAL[word], ("in/ref.npz",) if word == "DDP" else ()
    if word.startswith("LINK:"):
        target = word.removeprefix("LINK:")
        return "in/link.pt", partial(make_link, target), (target,)
    if word.startswith("ABS/"):
        return f"../place/{word.removeprefix('ABS/')}", None, (word.removeprefix("ABS/"),)
    if word in ("in/packed", "in/packed.npz"):
        return word, make_packed if word == "in/packed" else None, ()
    return "" if word == "''" else word, None, ()


def build(kind, script, family, text, names, base=None):
    """The case of words added to a base."""
    words, makes, needs = [], [], []
    for word in text if isinstance(text, list) else text.split():
        shown, make, needed = translate(word)
        words.append(shown)
        makes += [make] if make else []
        needs += needed
    base = base_words(script, family) if base is None else base
    title = " ".join(text if isinstance(text, list) else text.split())
    name = f"{script} [{family}] {shorten(title)}"
    make = makes[0] if makes else None
    allowed = EARLY_OUTPUT if kind == MISFIT and "--resume" in words else ()
    return Case(name, kind, script, (*base, *words), tuple(names), make, may_write=allowed, needs=tuple(needs))


def shorten(text):
    """Text for a name of a case: long runs are told by their length, what is not ASCII is spelled out."""
    for run, told in ((LONG, "NAME-OF-300"), (FAR, "PATH-OF-5599")):
        text = text.replace(run, told)
    return text.encode("unicode_escape", errors="backslashreplace").decode()


def values_of(rows, kind, family, base_of=lambda script, family: None, joined=False):
    """Cases of rows (scripts, flag, values)."""
    for scripts, flag, values in rows:
        values = values.split() if isinstance(values, str) else values
        for position, script in enumerate(scripts.split()):
            for value in values if not position else values[:2]:
                words = [f"{flag}={value}"] if joined else [flag, *value.split()]
                yield build(kind, script, family, words, [flag], base_of(script, family))


def gated_base(script, family):
    """A base that learns with LoRA."""
    return [*base_words(script, family), "--delta-w", "--lora"]


def path_cases():
    """Cases of flags that name files and folders."""
    for script, flag, values in PATHS:
        for value in values:
            if flag in ("REF", "SAMPLE"):
                good = base_words(script)
                words = [value, good[1]] if flag == "REF" else [good[0], value]
                yield build("paths", script, "DiT", words + good[2:], [flag], [])
            else:
                base = base_words(script)
                base += ["--num-fid-samples", "4"] if flag == "--evaluate" else []
                base = base[1:] if flag == "--save-stats" else base
                yield build("paths", script, "DiT", [flag, value], [flag, short_name(value)], base)


def short_name(value):
    """What a message may name instead of the flag."""
    return Path(translate(value)[0]).name or "--"


def other_cases():
    """Cases of whole command lines."""
    for kind, script, family, text, names in OTHERS:
        if text.startswith("="):
            yield build(kind, script, family, text[1:], names.split(), [])
        else:
            yield build(kind, script, family, text, names.split())


def foreign_cases():
    """Cases of flags that belong to other families."""
    for family, rows in OF_OTHERS.items():
        for scripts, text in rows:
            for script in scripts.split():
                yield build("flags of other families", script, family, text, [text.split()[0]])


def good_cases():
    """The good command lines, which go through: or the wrong ones would be refused for another reason."""
    bases = [(script, family, base_words(script, family)) for script in BASES for family in MODELS]
    bases += [("train", family, words_of(RESUME, family)) for family in MODELS]
    for script, family, words in bases:
        name = f"{script} [{family}] {'resumes' if '--ckpt-every' in words else 'goes through'}"
        if family == "DiT" or script not in ("extract_features", "evaluator"):
            yield Case(name, "good command lines", script, tuple(words), (), expected=SURVIVES, may_write=("*",))


def cases():
    """All of them; names are unique."""
    found = [
        *values_of(NUMBERS, "numbers", "DiT"),
        *values_of(GATED_NUMBERS, "numbers", "DiT", gated_base),
        *values_of(PAIRS, "numbers", "DiT"),
        *values_of(EQUALS, "numbers", "DiT", joined=True),
        *values_of(CHOICES, "choices and names", "DiT"),
        *values_of(SIT, "numbers and choices of SiT", "SiT"),
        *values_of(MAR, "numbers and choices of MAR", "MAR"),
        *path_cases(),
        *foreign_cases(),
        *other_cases(),
        *good_cases(),
    ]
    return list({case.name: case for case in found}.values())
