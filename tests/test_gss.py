"""fastmix.nn.gss beside the published gated-state-spaces-pytorch 0.1.0."""

import functools
import math

import gated_state_spaces_pytorch.gss as published
import pytest
import torch

from fastmix import _torch_private
from fastmix.nn import gss
from twins import assert_loads_both_ways, assert_near, assert_twins, build_from, dtypes

build = functools.partial(build_from, gss, published)


@dtypes
@pytest.mark.parametrize("n", [1, 13, gss.BLOCK + 1])
@pytest.mark.parametrize("exponentiate", [True, False])
def test_dss(exponentiate, n, dtype):
    pair = build("DSS", dim=4, kernel_N=6, dss_kernel_lambda_imag_exp=exponentiate)
    assert_twins(*pair, dtype, torch.randn(2, n, 4))


def rates_and_gains():
    """Of numbers that die out in a later block, never, and in the first one."""
    re = torch.tensor([-0.5, -1e-4, -3.0], dtype=torch.float64, requires_grad=True)
    im = torch.tensor([1.0, 20.0, 0.1], dtype=torch.float64, requires_grad=True)
    return re, im, torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("frozen", [(), (0, 1), (2,)])
def test_kernels_in_one_product_and_in_turns_are_one(monkeypatch, frozen):
    """And so are their gradients, and the gradients of these."""
    given = rates_and_gains()
    re, im, c = given
    for i in frozen:
        given[i].requires_grad_(False)
    leaves = [t for t in given if t.requires_grad]
    n = 4 * gss.BLOCK + 3
    results = []
    for plain in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(gss, "_is_plain", lambda x, plain=plain: plain)
            kernel = gss._kernel(re, im, gss._gains(re, im, c), n)
            first = torch.autograd.grad(kernel.sin().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append((kernel, *first, *second))
    for one, other in zip(*results, strict=True):
        assert_near(one, other)
    powers = torch.exp(torch.complex(re, im) * torch.arange(n)[:, None])
    rates = torch.complex(re, im)
    exact = (powers @ (torch.complex(*c) * (rates.exp() - 1) / rates).T).real
    assert_near(results[0][0][:n], exact)


def test_gradients_of_kernels_do_not_know_autocast():
    re, im, c = (t.detach().float().requires_grad_() for t in rates_and_gains())
    kernel = gss._kernel(re, im, gss._gains(re, im, c), 2 * gss.BLOCK)
    expected = torch.autograd.grad(kernel.sum(), (re, im, c), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(kernel.sum(), (re, im, c))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(actual, expected))


def test_long_pieces_go_on_from_a_state():
    """Of several blocks each, at rates that some of the state outlives them."""
    torch.manual_seed(1)
    module = gss.DSS(dim=3, kernel_N=4).double()
    with torch.no_grad():
        module.Lambda_real.copy_(torch.tensor([-9.0, -6.0, -3.0, 0.0]))
    x = torch.randn(2, 3 * gss.BLOCK + 5, 3, dtype=torch.float64)
    whole, outs, cache = module(x), [], None
    for piece in x.split([gss.BLOCK + 7, 1, 1, 2 * gss.BLOCK - 4], dim=1):
        out, cache = module(piece, cache=cache, return_cache=True)
        outs.append(out)
    assert_near(torch.cat(outs, dim=1), whole)
    for change, message in ((cache[:1], r"\(b, dim, kernel_N\) = \(2, 3, 4\), got \(1, 3, 4\)"),
                            (cache.mT, r"\(b, dim, kernel_N\) = \(2, 3, 4\), got \(2, 4, 3\)")):
        with pytest.raises(ValueError, match=f"^DSS: cache must have shape {message}"):
            module(x, cache=change)
    for change in (cache.real, cache.to(torch.complex64)):
        with pytest.raises(TypeError, match="^DSS: cache must be complex128, got"):
            module(x, cache=change)


def test_a_state_is_that_of_the_numbers_that_are_left():
    """Of those that die out within the sequence too, and of the gradients; a NaN stays one."""
    re, im, _ = rates_and_gains()
    u = torch.randn(2, 4 * gss.BLOCK + 9, 4, dtype=torch.float64, requires_grad=True)
    before = torch.randn(2, 4, 3, dtype=torch.complex128, requires_grad=True)
    power, defined = torch.complex(re, im).exp(), before
    for step in u.unbind(1):
        defined = power * defined + step[..., None]
    leaves = (re, im, u, before)
    assert [gss._exponential(re * n, im * n)[0].count_nonzero()
            for n in (gss.BLOCK, 3 * gss.BLOCK)] == [2, 1]
    after = gss._state_after(*leaves)
    assert_near(after, defined)
    weight = torch.randn_like(defined)
    for actual, expected in zip(torch.autograd.grad(after, leaves, weight),
                                torch.autograd.grad(defined, leaves, weight), strict=True):
        assert_near(actual, expected)
    with torch.no_grad():
        u[0, 3, 1], before[1, 2, 0] = math.nan, math.inf
        lost = gss._state_after(*leaves).isfinite().logical_not()
    assert lost.nonzero()[:, :2].unique(dim=0).tolist() == [[0, 1], [1, 2]]


def test_transforms_get_one_product():
    """They would not see what goes by in turns."""
    seen = []
    torch.vmap(lambda x: seen.append(gss._is_plain(x)) or x)(torch.ones(2, 3))
    with torch.autograd.forward_ad.dual_level():
        seen.append(gss._is_plain(torch.ones(3)))
    assert seen == [False, False] and gss._is_plain(torch.ones(3))
    assert not _torch_private.transforms_active()


@dtypes
@pytest.mark.parametrize("arguments", [
    dict(dim=6, dss_kernel_N=5, dss_kernel_H=7),
    dict(dim=5, dss_kernel_N=3, dss_kernel_H=4, dim_expansion_factor=1.5, reverse_seq=True,
         dss_kernel_lambda_imag_exp=False),
], ids=str)
def test_gss(arguments, dtype):
    assert_twins(*build("GSS", **arguments), dtype, torch.randn(2, 17, arguments["dim"]))


LM = dict(num_tokens=11, dim=6, depth=2, dss_kernel_N=5, dss_kernel_H=4)


@dtypes
def test_language_model(dtype):
    tokens = torch.randint(0, 11, (2, 9))
    assert_twins(*build("GatedStateSpacesLM", **LM), dtype, tokens)
    ours, theirs = (model.to(dtype) for model in build("GatedStateSpacesLM", **LM))
    assert_near(ours(tokens, labels=tokens), theirs(tokens, labels=tokens))


def test_checkpoints_load_both_ways():
    pair = build("GatedStateSpacesLM", **LM)
    assert_loads_both_ways(*(m.double() for m in pair), torch.randint(0, 11, (2, 9)), False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_are_never_subnormal(dtype):
    """Products with subnormal numbers take some hundred times as long: a prompt took six times as
    long as a forward."""
    limits = torch.finfo(dtype)
    re = torch.rand(5000, dtype=dtype) * 2 * math.log(limits.tiny)
    im = torch.randn(5000, dtype=dtype)
    powers = gss._exponential(re, im)
    exact = torch.polar(re.exp(), im)
    assert not ((powers != 0) & (powers.abs() < limits.tiny)).any() and (powers == 0).any()
    assert torch.allclose(torch.complex(*powers), exact, 4 * limits.eps, limits.tiny / limits.eps)
