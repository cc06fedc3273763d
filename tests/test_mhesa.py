"""fastmix.nn.mhesa beside the published gated-state-spaces-pytorch 0.1.0."""

import functools

import gated_state_spaces_pytorch.mhesa as published
import pytest
import torch
from torch import nn

from fastmix.nn import mhesa
from twins import (
    assert_autocast_near,
    assert_loads_both_ways,
    assert_near,
    assert_same_modules,
    assert_twins,
    build_from,
    dtypes,
)

build = functools.partial(build_from, mhesa, published)


def dims(x_shape, weight_shape, dim=-2, weight_dim=-1):
    return pytest.param(x_shape, weight_shape, dim, weight_dim)


conv_cases = [
    dims((2, 3, 7, 4), (3, 7)),
    dims((2, 3, 7, 4), (2, 3, 7)),
    dims((2, 3, 7, 4), (2, 1, 7)),
    dims((2, 3, 7, 4), (7,)),
    dims((7, 4), (7,)),
    dims((7, 4), (3, 7)),
    dims((3, 1, 7, 4), (5, 7)),
    dims((2, 7, 3, 4), (7, 3), -3, -2),
    dims((2, 7, 3, 4), (2, 7, 3), -3, -2),
    dims((2, 7, 1, 4), (2, 7, 3), -3, -2),
    dims((2, 7, 3, 4), (1, 7, 1), -3, -2),
    dims((2, 7, 3, 4), (7,), -3, -1),
    dims((2, 5, 7, 3, 2, 4), (5, 7, 3, 2), -4, -3),
    dims((2, 5, 7, 3, 2, 4), (2, 1, 7, 3), -4, -2),
    dims((7, 3, 4), (5, 7, 3), -3, -2),
    dims((2, 7), (7,), -1, -1),
    dims((7,), (7,), 0, 0),
    dims((2, 7, 3), (2, 7, 3), 1, 1),
    dims((2, 7, 3), (1, 7, 3), -2, -2),
    dims((2, 7, 3), (4, 2, 7, 3), -2, -2),
    # more weights than steps
    dims((2, 3, 5, 4), (3, 8)),
    dims((2, 5, 3, 4), (2, 9, 3), -3, -2),
    dims((2, 5, 3, 4), (17, 3), -3, -2),
    dims((1, 4), (2,)),
    dims((2, 1, 3, 4), (6, 3), -3, -2),
    # fewer
    dims((2, 3, 8, 4), (3, 5)),
    dims((2, 11, 3, 4), (2, 3, 3), -3, -2),
    dims((2, 13, 3, 4), (11, 3), -3, -2),
    dims((2, 30, 4), (7,)),
    dims((5, 2), (1,)),
    # as many
    dims((1, 1), (1,)),
    dims((2, 2, 3, 4), (2, 3), -3, -2),
    dims((2, 13, 3, 4), (13, 3), -3, -2),
]


@dtypes
@pytest.mark.parametrize("x_shape, weight_shape, dim, weight_dim", conv_cases)
def test_conv1d_fft(x_shape, weight_shape, dim, weight_dim, dtype):
    x = torch.randn(x_shape, dtype=dtype, requires_grad=True)
    weights = torch.randn(weight_shape, dtype=dtype, requires_grad=True)
    runs = []
    for module in (mhesa, published):
        out = module.conv1d_fft(x, weights, dim, weight_dim)
        torch.manual_seed(1)
        loss = (out * torch.randn(out.shape, dtype=dtype)).sum()
        runs.append((out, *torch.autograd.grad(loss, (x, weights))))
    for what, ours, theirs in zip(("output", "x", "weights"), *runs):
        assert_near(ours, theirs, what)


def test_conv1d_fft_strides_and_mixed_dtypes():
    x = torch.randn(4, 6, 3, 2, dtype=torch.float64).transpose(0, 3)[:, ::2]
    weights = torch.randn(3, 3).T
    ours, theirs = (module.conv1d_fft(x, weights, -3, -2) for module in (mhesa, published))
    assert ours.dtype == theirs.dtype
    assert_near(ours.float(), theirs.float(), "output")


@pytest.mark.parametrize("x_shape, weight_shape, dim, weight_dim", conv_cases[:4] + [
    dims((2, 7, 3, 4), (7, 3), -3, -2), dims((2, 7, 3, 4), (2, 7, 3), -3, -2)])
def test_conv1d_fft_hands_x_over_uncopied(x_shape, weight_shape, dim, weight_dim, monkeypatch):
    handed = []
    fft_conv = mhesa.ops.fft_conv
    monkeypatch.setattr(mhesa.ops, "fft_conv", lambda x, k: handed.append((x, k)) or fft_conv(x, k))
    x, weights = torch.randn(x_shape), torch.randn(weight_shape)
    mhesa.conv1d_fft(x, weights, dim, weight_dim)
    [(data, kernel)] = handed
    assert data.data_ptr() == x.data_ptr()
    assert kernel.numel() == max(weights.numel(), 7 * data.shape[2])


def test_conv1d_fft_refuses():
    x, weights = torch.randn(2, 7, 3, 4), torch.randn(7, 3)
    conv = mhesa.conv1d_fft
    with pytest.raises(TypeError, match="conv1d_fft: x must be float64 .*, got int64"):
        conv(x.long(), weights, -3, -2)
    with pytest.raises(TypeError, match="conv1d_fft: weights must be float64 .*, got complex64"):
        conv(x, weights + 0j, -3, -2)
    with pytest.raises(TypeError, match="conv1d_fft: weights must be a tensor, got list"):
        conv(x, weights.tolist(), -3, -2)
    with pytest.raises(ValueError, match="weights must be on cpu like x, got meta"):
        conv(x, weights.to("meta"), -3, -2)
    with pytest.raises(ValueError, match="must be at least dim.* dim=-2 .*weight_dim=-3"):
        conv(x, torch.randn(7, 3, 4), -2, -3)
    with pytest.raises(ValueError, match="meet it once weights has.*dim=-3 .*weight_dim=0"):
        conv(x, weights, -3, 0)
    with pytest.raises(ValueError, match="meet it once weights has.*dim=1 .*weight_dim=1"):
        conv(x, torch.randn(2, 7), 1, 1)
    with pytest.raises(ValueError, match=r"no more than x, if dim ≥ 0.*\(1, 2, 7, 3\)"):
        conv(x, torch.randn(1, 2, 7, 3), 1, 2)
    with pytest.raises(ValueError, match=r"dim must be an axis of x, got dim=-5 .*\(2, 7, 3, 4\)"):
        conv(x, weights, -5, -2)
    with pytest.raises(ValueError, match="weight_dim must be an axis of weights, got weight_dim=2"):
        conv(x, weights, -3, 2)
    with pytest.raises(ValueError, match=r"must broadcast against x .*weights of shape \(7, 5\)"):
        conv(x, torch.randn(7, 5), -3, -2)
    with pytest.raises(ValueError, match="x must have at least one time step, got n=0"):
        conv(x[:, :0], weights, -3, -2)
    with pytest.raises(ValueError, match="weights must have at least one time step, got n=0"):
        conv(x, weights[:0], -3, -2)


@dtypes
@pytest.mark.parametrize("reverse_seq", [False, True])
@pytest.mark.parametrize("n", [1, 2, 13])
@pytest.mark.parametrize("dim, heads", [(6, 1), (6, 3), (5, 5)])
def test_mhesa(dim, heads, n, reverse_seq, dtype):
    pair = build("MHESA", dim=dim, heads=heads, reverse_seq=reverse_seq)
    assert pair[0].heads == heads and pair[0].reverse_seq is reverse_seq
    assert_twins(*pair, dtype, torch.randn(2, n, dim))


@dtypes
@pytest.mark.parametrize("n", [1, 2, 17])
@pytest.mark.parametrize("arguments", [
    dict(dim=6, heads=1, dim_mhesa=10),
    dict(dim=5, heads=7, dim_mhesa=7, dim_expansion_factor=1.5),
    dict(dim=3),
], ids=str)
def test_gated_mhesa(arguments, n, dtype):
    assert_twins(*build("GatedMHESA", **arguments), dtype, torch.randn(2, n, arguments["dim"]))


LM = dict(num_tokens=11, dim=6, depth=2, heads=3, dim_mhesa=9, dim_expansion_factor=2)


@dtypes
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("n", [1, 2, 19])
def test_language_model(n, with_labels, dtype):
    x, labels = torch.randint(0, 11, (2, 3, n))
    labels[0, 1:2] = -100
    assert_twins(*build("GatedExponentialSmoothingLM", **LM), dtype, x, *[labels] * with_labels)


def test_language_model_defaults_and_short_ids():
    ours, theirs = build("GatedExponentialSmoothingLM", num_tokens=9, dim=5, depth=1)
    x = torch.randint(0, 9, (2, 7))
    assert_near(ours(x.int()), theirs(x), "output")


@pytest.mark.parametrize("training", [False, True])
def test_checkpoints_load_both_ways(training):
    ours, theirs = build("GatedExponentialSmoothingLM", **LM)
    assert_loads_both_ways(ours, theirs, torch.randint(0, 11, (2, 7)), training)


def test_attributes():
    ours, theirs = build("GatedExponentialSmoothingLM", **LM)
    assert_same_modules(ours, theirs)
    assert isinstance(ours.layers, nn.ModuleList) and len(ours.layers) == 2
    assert ours.layers[1].mhesa.heads == theirs.layers[1].mhesa.heads == 3
    assert ours.layers[1].mhesa.reverse_seq is theirs.layers[1].mhesa.reverse_seq is False


def test_autocast_stays_near_float32():
    model, _ = build("GatedMHESA", dim=6, heads=3, dim_mhesa=9)
    assert_autocast_near(model, torch.randn(2, 13, 6), torch.float32, 0.05)


def test_refused_arguments():
    with pytest.raises(ValueError, match="MHESA: heads must divide dim, got heads=4 and dim=6"):
        mhesa.MHESA(dim=6, heads=4)
    with pytest.raises(ValueError, match="GatedMHESA: heads must divide dim_mhesa, got heads=8"):
        mhesa.GatedMHESA(dim=8, dim_mhesa=9)
    with pytest.raises(ValueError, match="heads must divide dim_mhesa, got heads=5"):
        mhesa.GatedExponentialSmoothingLM(num_tokens=3, dim=6, depth=1, heads=5, dim_mhesa=6)


def test_refused_tokens_and_labels():
    model = mhesa.GatedExponentialSmoothingLM(**LM)
    x = torch.randint(0, 11, (2, 7))
    name = "^GatedExponentialSmoothingLM: "
    with pytest.raises(TypeError, match=name + "x must be int64 or int32, got float32"):
        model(x.float())
    with pytest.raises(ValueError, match=name + r"x must have shape \(b, n\), got \(7,\)"):
        model(x[0])
    with pytest.raises(ValueError, match=name + "x must have at least one time step"):
        model(x[:, :0])
    with pytest.raises(ValueError, match=name + r"labels .*\(b, n\) = \(2, 7\), got \(2, 6\)"):
        model(x, x[:, 1:])
    with pytest.raises(ValueError, match=name + r"labels .*\(b, n\) = \(2, 7\), got \(14,\)"):
        model(x, x.flatten())
    with pytest.raises(TypeError, match=name + "labels must be int64, got int32"):
        model(x, x.int())
    with pytest.raises(ValueError, match=name + "labels must be on cpu like x, got meta"):
        model(x, x.to("meta"))
    with pytest.raises(ValueError, match=name + "x must hold token ids, got one on meta"):
        model(x.to("meta"))
    with pytest.raises(IndexError, match=name + "x must hold token ids .*, got 3 to 11"):
        model(torch.tensor([[3, 11]]))
