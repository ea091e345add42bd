"""All recordings were made with one thread, and networks this small are slower with more."""

import math

import pytest
import torch
from machine import DEVICE

from models import FREQUENCIES, TimestepEmbedder


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="package")
def rates_of_the_recordings():
    """Exponentials in float32 differ in their last bit from one processor to another, and 999 steps multiply that.

    On the one of the recordings all are rounded correctly but two, which are one bit higher.
    """
    half = FREQUENCIES // 2
    rates = (-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).double().exp().float()
    higher = torch.nextafter(rates, torch.full_like(rates, torch.inf))
    rates[[12, 106]] = higher[[12, 106]]
    sinusoid = TimestepEmbedder.sinusoid.__func__

    def on_cpu(cls, t):
        """Its sines, too, are in float32 in every network, and a GPU's have other last bits."""
        return sinusoid(cls, t.cpu()).to(t.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TimestepEmbedder, "rates", staticmethod(lambda device: rates.to(device)))
        if DEVICE.type != "cpu":
            patch.setattr(TimestepEmbedder, "sinusoid", classmethod(on_cpu))
        yield
