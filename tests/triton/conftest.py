import os

import pytest
import torch

from fastmix._triton import plans
from fastmix.ops._carries import HEADS_CARRY_EVERY


def convert(values, have, want, rounding):
    """Converts between bfloat16, kept as integers, and wider numbers, rounding to the nearest."""
    values = torch.from_numpy(values.copy())
    if want.name == "bf16":
        return values.bfloat16().view(torch.int16).numpy().view("uint16")
    wide = {"fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}[want.name]
    return values.view(torch.int16).view(torch.bfloat16).to(wide).numpy()


@pytest.fixture(autouse=True)
def rounding_as_on_hardware(monkeypatch):
    """The interpreter cuts digits off where GPUs round."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr("triton.runtime.interpreter._convert_float", convert)


@pytest.fixture(autouse=True)
def carries_as_on_hardware(monkeypatch):
    """Tensors lie on a CPU here, but carries are as far apart as on a GPU."""
    monkeypatch.delitem(HEADS_CARRY_EVERY, "cpu")


@pytest.fixture
def filled(monkeypatch):
    """However few channels there are, they fill the GPU."""
    from fastmix._triton import scan, target

    monkeypatch.setattr(scan, "LAUNCH", target.Table(*scan.LAUNCH.rows, target.Row(
        "tile segments", "*", "*", "*", dict(enough=0), "for a test")))


@pytest.fixture(autouse=True)
def launch_choices_of_the_test():
    """Of kinds of calls with plans, other choices would not be looked at."""
    plans.forget()
    yield
    plans.forget()


@pytest.fixture(params=["segments", "one walk"])
def cut(request, monkeypatch):
    """Has the `kernels` of the test's file cut time into 3 segments, or not at all."""
    pieces = 3 if request.param == "segments" else 1

    def segments(n, programs, steps, dtype):
        length = -(-n // (pieces * steps)) * steps
        return -(-n // length), length

    monkeypatch.setattr(request.module.kernels, "segments", segments)
