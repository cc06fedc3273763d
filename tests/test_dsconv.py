"""fastmix.nn.dsconv beside the published gated-state-spaces-pytorch 0.1.0."""

import functools

import gated_state_spaces_pytorch.dsconv as published
import pytest
import torch
from torch import nn

from fastmix.nn import dsconv, mhesa
from twins import (
    assert_autocast_near,
    assert_loads_both_ways,
    assert_near,
    assert_same_modules,
    assert_twins,
    build_from,
    dtypes,
)

build = functools.partial(build_from, dsconv, published)


@dtypes
@pytest.mark.parametrize("n, m", [(1, 1), (7, 7), (5, 9), (9, 5), (13, 2)])
def test_conv1d_fft_is_that_of_mhesa(n, m, dtype):
    assert dsconv.conv1d_fft is mhesa.conv1d_fft
    x, weights = torch.randn(2, n, 3, 4, dtype=dtype), torch.randn(2, m, 3, dtype=dtype)
    ours, theirs = (module.conv1d_fft(x, weights, -3, -2) for module in (dsconv, published))
    assert_near(ours, theirs, "output")


@dtypes
@pytest.mark.parametrize("n", [1, 2, 13])
@pytest.mark.parametrize("dim, heads", [(6, 1), (6, 3), (5, 5)])
def test_efficient_dsconv(dim, heads, n, dtype):
    pair = build("EfficientDsConv", dim=dim, heads=heads)
    assert pair[0].heads == heads
    assert_twins(*pair, dtype, torch.randn(2, n, dim))


@dtypes
@pytest.mark.parametrize("n", [1, 2, 17])
@pytest.mark.parametrize("arguments", [
    dict(dim=6, heads=1, dim_dsconv=10),
    dict(dim=6, heads=2, dim_dsconv=10, reverse_seq=True),
    dict(dim=5, heads=7, dim_dsconv=7, dim_expansion_factor=1.5),
    dict(dim=3, reverse_seq=True),
], ids=str)
def test_gated_dsconv(arguments, n, dtype):
    pair = build("GatedDsConv", **arguments)
    assert pair[0].reverse_seq is arguments.get("reverse_seq", False)
    assert_twins(*pair, dtype, torch.randn(2, n, arguments["dim"]))


def test_no_step_sees_later_ones():
    """But the kernel's lag l is computed from step l: outputs at t see all of 0 … t."""
    model = dsconv.EfficientDsConv(dim=6, heads=3).double()
    x = torch.randn(1, 11, 6, dtype=torch.float64, requires_grad=True)
    for t in (0, 4, 10):
        (gradient,) = torch.autograd.grad(model(x)[:, t].sum(), x)
        reach = gradient.abs().sum(dim=(0, 2))
        assert (reach[: t + 1] > 1e-6).all() and (reach[t + 1:] < 1e-12).all()


LM = dict(num_tokens=11, dim=6, depth=2, heads=3, dim_dsconv=9, max_seq_len=19,
          dim_expansion_factor=2)


@dtypes
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("n", [1, 2, 19])
def test_language_model(n, with_labels, dtype):
    x, labels = torch.randint(0, 11, (2, 3, n))
    labels[0, 1:2] = -100
    assert_twins(*build("GatedDsConvLM", **LM), dtype, x, *[labels] * with_labels)


def test_language_model_defaults_and_short_ids():
    ours, theirs = build("GatedDsConvLM", num_tokens=9, dim=5, depth=1)
    assert ours.max_seq_len == theirs.max_seq_len
    x = torch.randint(0, 9, (2, 7))
    assert_near(ours(x.int()), theirs(x), "output")


@pytest.mark.parametrize("training", [False, True])
def test_checkpoints_load_both_ways(training):
    ours, theirs = build("GatedDsConvLM", **LM)
    assert_loads_both_ways(ours, theirs, torch.randint(0, 11, (2, 7)), training)


def test_attributes():
    ours, theirs = build("GatedDsConvLM", **LM)
    assert_same_modules(ours, theirs)
    assert isinstance(ours.layers, nn.ModuleList) and len(ours.layers) == 2
    assert ours.layers[1].dsconv.heads == theirs.layers[1].dsconv.heads == 3
    assert ours.layers[1].reverse_seq is theirs.layers[1].reverse_seq is False


def test_autocast_stays_near_float32():
    model, _ = build("GatedDsConv", dim=6, heads=3, dim_dsconv=9)
    assert_autocast_near(model, torch.randn(2, 13, 6), torch.float32, 0.05)


def test_refused_arguments():
    with pytest.raises(ValueError, match="EfficientDsConv: heads must divide dim, got heads=4"):
        dsconv.EfficientDsConv(dim=6, heads=4)
    with pytest.raises(ValueError, match="GatedDsConv: heads must divide dim_dsconv, got heads=8"):
        dsconv.GatedDsConv(dim=8, dim_dsconv=9)
    with pytest.raises(ValueError, match="heads must divide dim_dsconv, got heads=0"):
        dsconv.GatedDsConvLM(num_tokens=3, dim=6, depth=1, heads=0, dim_dsconv=6)


def test_refused_tokens_and_labels():
    model = dsconv.GatedDsConvLM(**LM)
    x = torch.randint(0, 11, (2, 20))
    name = "^GatedDsConvLM: "
    with pytest.raises(ValueError, match=name + "x must have at most 19 time steps, got n=20"):
        model(x)
    x = x[:, :7]
    with pytest.raises(TypeError, match=name + "x must be int64 or int32, got bool"):
        model(x > 0)
    with pytest.raises(ValueError, match=name + r"x must have shape \(b, n\), got \(7,\)"):
        model(x[0])
    with pytest.raises(ValueError, match=name + "x must have at least one time step"):
        model(x[:, :0])
    with pytest.raises(ValueError, match=name + r"labels .*\(b, n\) = \(2, 7\), got \(1, 7\)"):
        model(x, x[:1])
    with pytest.raises(TypeError, match=name + "labels must be int64, got float32"):
        model(x, x.float())
    with pytest.raises(ValueError, match=name + "x must hold token ids, got one on meta"):
        model(x.to("meta"))
    with pytest.raises(IndexError, match=name + "x must hold token ids .*, got 3 to 11"):
        model(torch.tensor([[3, 11]]))
