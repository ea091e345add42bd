"""The device that tests run on: TEST_DEVICE, by default the processor, also where there is a GPU."""

import os

import torch

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
if DEVICE.type == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
