"""fastmix.nn.metaformer_gpt beside the published metaformer-gpt 0.0.5."""

import functools

import metaformer_gpt.metaformer_gpt as published
import pytest
import torch
from torch import nn

from fastmix.nn import metaformer_gpt
from twins import (
    assert_autocast_near,
    assert_loads_both_ways,
    assert_near,
    assert_same_modules,
    assert_twins,
    build_from,
    dtypes,
)

build = functools.partial(build_from, metaformer_gpt, published)
assert_twins_of = functools.partial(assert_twins, floor=1e-2)


@dtypes
@pytest.mark.parametrize("shape, dim", [
    ((2, 7, 3), 1), ((2, 7, 3), -2), ((2, 1, 3), 1), ((1, 13, 1), 1), ((5, 5), 0),
    ((2, 4, 4, 3), 2), ((2, 4, 5, 4, 3), -2)])
def test_cummean(shape, dim, dtype):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    runs = []
    for module in (metaformer_gpt, published):
        out = module.cummean(x, dim=dim)
        torch.manual_seed(1)
        (gradient,) = torch.autograd.grad((out * torch.randn(shape, dtype=dtype)).sum(), x)
        runs.append((out, gradient))
    for what, ours, theirs in zip(("output", "x"), *runs):
        assert_near(ours, theirs, what)


@pytest.mark.parametrize("dtype", [
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool], ids=str)
def test_cummean_of_counts(dtype):
    x = torch.randint(0, 100, (2, 11, 3)).to(dtype)
    assert_near(metaformer_gpt.cummean(x, dim=1), published.cummean(x, dim=1), "output")


def test_cummean_of_large_counts_is_exact():
    x = torch.randint(2**30, 2**31, (1, 50, 2))
    ours, theirs = (module.cummean(x, dim=1) for module in (metaformer_gpt, published))
    torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0)


@pytest.mark.parametrize("shape, dim", [
    ((2, 7, 3), 0), ((2, 7, 3), 2), ((2, 7, 3), -1), ((2, 7, 7), 2), ((7, 3), 0), ((7, 3), 1),
    ((5, 5), 1), ((2, 4, 4, 3), 1), ((2, 1, 4, 3), 2), ((2, 4, 1, 3), 1), ((7,), 0),
    ((2, 7, 3), -5)])
def test_cummean_refuses_what_would_be_no_mean(shape, dim):
    with pytest.raises(ValueError, match="cummean: dim must be the last axis but one") as error:
        metaformer_gpt.cummean(torch.randn(shape), dim=dim)
    assert str(error.value).endswith(f"got dim={dim} and x of shape {shape}")


def test_cummean_refuses_types():
    with pytest.raises(TypeError, match="cummean: x must be float64 .*, got complex64"):
        metaformer_gpt.cummean(torch.randn(2, 7, 3) + 0j, dim=1)
    with pytest.raises(TypeError, match="cummean: x must be a tensor, got list"):
        metaformer_gpt.cummean([1.0], dim=0)
    with pytest.raises(ValueError, match="cummean: x must have at least one time step, got n=0"):
        metaformer_gpt.cummean(torch.randn(2, 0, 3), dim=1)


@dtypes
@pytest.mark.parametrize("x_shape, weight_shape, dim, weight_dim", [
    ((2, 3, 7, 4), (3, 7), -2, -1),
    ((2, 3, 1, 4), (3, 1), -2, -1),
    ((2, 3, 7, 4), (3, 7), 2, 1),
    ((2, 3, 7, 4), (3, 7), -2, 1),
    ((2, 3, 7, 4), (3, 7), 2, -1),
    ((2, 3, 7, 4), (7,), -2, -1),
    ((7, 4), (3, 7), -2, -1),
    ((2, 7, 3, 4), (2, 7, 3), -3, -2),
    ((2, 7, 3, 4), (7, 3), 1, 0),
    ((2, 3, 5, 4), (3, 8), -2, -1),
    ((2, 3, 8, 4), (3, 5), -2, -1),
    ((2, 3, 13, 4), (2, 3, 2), -2, -1),
])
def test_conv1d_fft(x_shape, weight_shape, dim, weight_dim, dtype):
    x = torch.randn(x_shape, dtype=dtype, requires_grad=True)
    weights = torch.randn(weight_shape, dtype=dtype, requires_grad=True)
    runs = []
    for module in (metaformer_gpt, published):
        out = module.conv1d_fft(x, weights, dim, weight_dim)
        torch.manual_seed(1)
        loss = (out * torch.randn(out.shape, dtype=dtype)).sum()
        runs.append((out, *torch.autograd.grad(loss, (x, weights))))
    for what, ours, theirs in zip(("output", "x", "weights"), *runs):
        assert_near(ours, theirs, what)


@pytest.mark.parametrize("x_shape, weight_shape, dim, weight_dim", [
    ((2, 7), (7,), -1, -1), ((2, 7, 3, 4), (7,), -3, -1), ((2, 7, 3), (7, 3), -2, -2),
    ((2, 3, 7, 4), (2, 2, 3, 7), 2, 3)])
def test_conv1d_fft_refuses_time_axes_that_do_not_meet(x_shape, weight_shape, dim, weight_dim):
    with pytest.raises(ValueError, match="conv1d_fft: weight_dim must meet dim") as error:
        metaformer_gpt.conv1d_fft(torch.randn(x_shape), torch.randn(weight_shape), dim, weight_dim)
    assert str(error.value).endswith(
        f"got x of shape {x_shape} with dim={dim} and weights of shape {weight_shape} with "
        f"weight_dim={weight_dim}")


def test_conv1d_fft_refuses():
    x, weights = torch.randn(2, 3, 7, 4), torch.randn(3, 7)
    with pytest.raises(TypeError, match="conv1d_fft: x must be float64 .*, got complex64"):
        metaformer_gpt.conv1d_fft(x + 0j, weights)
    with pytest.raises(TypeError, match="conv1d_fft: weights must be float64 .*, got int64"):
        metaformer_gpt.conv1d_fft(x, weights.long())
    with pytest.raises(ValueError, match="weight_dim must be an axis of weights, got weight_dim=2"):
        metaformer_gpt.conv1d_fft(x, weights, -2, 2)
    with pytest.raises(ValueError, match=r"must broadcast against x .*weights of shape \(2, 7\)"):
        metaformer_gpt.conv1d_fft(x, weights[:2])


@dtypes
@pytest.mark.parametrize("n", [1, 2, 13])
@pytest.mark.parametrize("dim", [3, 6])
def test_mean_centering_pool(dim, n, dtype):
    assert_twins_of(*build("MeanCenteringPool", dim=dim), dtype, torch.randn(2, n, dim))


@dtypes
@pytest.mark.parametrize("n", [1, 2, 13])
@pytest.mark.parametrize("arguments", [
    dict(dim=6, heads=1, dim_head=5), dict(dim=5, heads=7, dim_head=1), dict(dim=3)], ids=str)
def test_exponential_time_decay(arguments, n, dtype):
    pair = build("MultiheadExponentialTimeDecay", **arguments)
    assert pair[0].heads == pair[1].heads
    assert_twins_of(*pair, dtype, torch.randn(2, n, arguments["dim"]))


@dtypes
@pytest.mark.parametrize("arguments", [dict(dim=5), dict(dim=6, mult=1.5)], ids=str)
def test_feedforward(arguments, dtype):
    assert_twins_of(*build("FeedForward", **arguments), dtype, torch.randn(2, 7, arguments["dim"]))


LM = dict(num_tokens=11, dim=6, depth=2, heads=3, dim_head=5, max_seq_len=19, ff_mult=2)


@dtypes
@pytest.mark.parametrize("n", [1, 2, 19])
@pytest.mark.parametrize("heads, dim_head", [(1, 5), (3, 2), (6, 1)])
def test_language_model(heads, dim_head, n, dtype):
    pair = build("MetaformerGPT", **{**LM, "heads": heads, "dim_head": dim_head})
    assert_twins_of(*pair, dtype, torch.randint(0, 11, (3, n)))


def test_language_model_defaults_and_short_ids():
    ours, theirs = build("MetaformerGPT", num_tokens=9, dim=5, depth=1)
    x = torch.randint(0, 9, (2, 7))
    assert_near(ours(x.int()), theirs(x), "output")


@pytest.mark.parametrize("training", [False, True])
def test_checkpoints_load_both_ways(training):
    ours, theirs = build("MetaformerGPT", **LM)
    assert_loads_both_ways(ours, theirs, torch.randint(0, 11, (2, 7)), training)


def test_attributes():
    ours, theirs = build("MetaformerGPT", **LM)
    assert_same_modules(ours, theirs)
    assert isinstance(ours.layers, nn.ModuleList) and len(ours.layers) == 2
    assert ours.layers[1][0].heads == theirs.layers[1][0].heads == 3


def test_autocast_stays_near_float32():
    model, _ = build("MetaformerGPT", **LM)
    assert_autocast_near(model, torch.randint(0, 11, (2, 13)), torch.bfloat16, 0.1)


def test_refused_tokens():
    model = metaformer_gpt.MetaformerGPT(**LM)
    x = torch.randint(0, 11, (2, 20))
    name = "^MetaformerGPT: "
    with pytest.raises(ValueError, match=name + "x must have at most 19 time steps, got n=20"):
        model(x)
    x = x[:, :7]
    with pytest.raises(TypeError, match=name + "x must be int64 or int32, got float32"):
        model(x.float())
    with pytest.raises(ValueError, match=name + r"x must have shape \(b, n\), got \(2, 7, 1\)"):
        model(x[..., None])
    with pytest.raises(ValueError, match=name + "x must have at least one time step"):
        model(x[:, :0])
    with pytest.raises(ValueError, match=name + "x must hold token ids, got one on meta"):
        model(x.to("meta"))
    with pytest.raises(IndexError, match=name + "x must hold token ids .*, got 3 to 11"):
        model(torch.tensor([[3, 11]]))


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: torch.nn.Sequential(e, torch.nn.Tanh())])
def test_a_longer_embedding_of_positions_takes_longer_sequences(wrap):
    ours, theirs = build("MetaformerGPT", num_tokens=5, dim=4, depth=1, max_seq_len=6)
    for model in ours, theirs:
        torch.manual_seed(1)
        model.pos_emb = wrap(torch.nn.Embedding(9, 4))
    tokens = torch.randint(0, 5, (2, 9))
    assert_near(ours(tokens), theirs(tokens))
    _, cache = ours(tokens[:, :8], return_cache=True)
    assert_near(ours(tokens[:, 8:], cache=cache), theirs(tokens)[:, 8:])
    with pytest.raises((ValueError, IndexError), match="^MetaformerGPT: x must have "):
        ours(torch.cat((tokens, tokens), dim=1))
