"""A published module and ours, side by side: the same weights, outputs and gradients."""

import copy

import pytest
import torch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


def build_from(ours, published, name, seed=0, **arguments):
    """Both from one seed, which must have drawn the same weights."""
    pair = []
    for module in (ours, published):
        torch.manual_seed(seed)
        pair.append(getattr(module, name)(**arguments))
    mine, theirs = (model.state_dict() for model in pair)
    assert list(mine) == list(theirs)
    for key, value in theirs.items():
        assert value.dtype == mine[key].dtype and torch.equal(value, mine[key]), key
    return pair


def assert_near(ours, theirs, what="", floor=0.0):
    """Held against the largest entry of `theirs`, or against `floor` if that is larger."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, what
    if theirs.numel():
        error = (ours - theirs).abs().max().item()
        limit = TOLERANCE[theirs.real.dtype] * max(theirs.abs().max().item(), floor)
        assert error <= limit, (what, error)


def assert_twins(ours, theirs, dtype, x, *rest, floor=1e-3):
    """Equal outputs and gradients, at weights away from their initial ones.

    Gradients below `floor` times the largest are held against that: they can cancel, as that
    of the bias in front of a mean centering does.
    """
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    ours.load_state_dict(theirs.state_dict())
    runs = []
    for model in (ours.to(dtype), theirs.to(dtype)):
        leaf = x.detach().clone()
        if x.is_floating_point():
            leaf = leaf.to(dtype).requires_grad_()
        out = model(leaf, *rest)
        torch.manual_seed(1)
        (out * torch.randn(out.shape, dtype=dtype)).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        if leaf.requires_grad:
            gradients["x"] = leaf.grad
        runs.append((out, gradients))
    (out, gradients), (their_out, their_gradients) = runs
    assert_near(out, their_out, "output")
    assert gradients.keys() == their_gradients.keys()
    least = floor * max(g.abs().max().item() for g in their_gradients.values())
    for name, gradient in their_gradients.items():
        assert_near(gradients[name], gradient, name, least)


def assert_same_modules(ours, theirs):
    """Submodules of the same names in the same order: what checkpoints and hooks go by."""
    assert list(dict(ours.named_modules())) == list(dict(theirs.named_modules()))


def assert_autocast_near(model, x, dtype, share):
    """Under autocast outputs have `dtype`, and differ by that share of the largest at most."""
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == dtype
    assert 0 < (out - exact).abs().max() < share * exact.abs().max()


def assert_loads_both_ways(ours, theirs, x, training):
    """Each takes the other's checkpoint, and then gives the other's outputs."""
    for source, target in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for p in source.parameters():
                p.normal_()
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        assert_near(ours.train(training)(x), theirs.train(training)(x), "output")
