"""What modules ask of their sizes and of their input x."""

from functools import partial

from fastmix.checks import check_length, check_shape, check_tensor


def check_sizes(where, **sizes):
    """Each at least 1; None passes."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{where}: {name} must be at least 1, got {size}")


def check_floating(module, x, where=None):
    """A real tensor on the device of the module's first parameter. Returns the name to blame."""
    where = where or type(module).__name__
    check_tensor(where, "x", x, like=next(module.named_parameters(), None))
    return where


def check_sequence(module, x, dim):
    """x (b, n, dim) with n ≥ 1. Returns n."""
    where = check_floating(module, x)
    n = check_shape(where, "x", x, "b n dim", {"dim": dim})["n"]
    check_length(where, "x", n)
    return n


def check_features(module, x, dim, where=None):
    """x (…, dim)."""
    where = check_floating(module, x, where)
    if x.shape[-1:] != (dim,):
        raise ValueError(
            f"{where}: x must have shape (…, dim) = (…, {dim}), got {tuple(x.shape)}")


def with_checked_features(where, dim, net):
    """`net`, which from now on takes x (…, dim) only. A hook, so that it stays what it is."""
    net.register_forward_pre_hook(partial(_check_features_of_call, where, dim))
    return net


def _check_features_of_call(where, dim, net, args):
    for x in args:
        check_features(net, x, dim, where)
