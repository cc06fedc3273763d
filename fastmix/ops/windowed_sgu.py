"""The spatial gating unit of gMLP, causal, over a window and the one before it."""

from fastmix.checks import (check_divides, check_length, check_shape, check_tensor, match_dtypes,
                            match_parameter)
from fastmix.fallback import windowed_sgu as fallback
from fastmix.ops._register import Operator

ACTIVATIONS = ("identity", "tanh", "sigmoid", "gelu", "silu")
ARGUMENTS = ("Tensor x, Tensor weight, Tensor bias, Tensor? norm_weight, Tensor? norm_bias, "
             "float eps, Tensor? gate_residual, str activation")


def fake(x, weight, bias, norm_weight, norm_bias, eps, gate_residual, activation):
    b, n, width = x.shape
    return x.new_empty(b, n, width // 2)


_operator = Operator("windowed_sgu", ARGUMENTS, outputs="out", fallback=fallback, fake=fake,
                     batched={"x": 3, "gate_residual": 3})


def windowed_sgu(x, weight, bias, *, norm_weight=None, norm_bias=None, eps=1e-5,
                 gate_residual=None, activation=None):
    """out = activation(mix(norm(gate)) + bias + gate_residual) · res, with x = [res, gate]

    Time is cut into windows of w steps. Row r of a window mixes the 2w gate vectors of the
    window before it and its own by weight[:, r], up to its own time step (j ≤ r + w).
    Linear in n; neither the doubled gate nor a padded copy is made.

    Args:
        x: (b, n, 2c), real, any strides
        weight: (h, w, 2w) with h dividing c; its entries beyond j = r + w have no effect
        bias: (h, w)
        norm_weight, norm_bias: (c,), the affine part of the layer norm; none if None
        eps: of the layer norm
        gate_residual: (b, n, c), the dtype of x
        activation: None, "identity", "tanh", "sigmoid", "gelu", "silu", or any callable,
            which is then applied outside the operator

    Parameters have the dtype of x or float32.

    Returns:
        (b, n, c) in the dtype of x; sums are kept in float32 at least.

    Differentiable in every tensor, to any order. Raises TypeError and ValueError for
    arguments that do not fit.

    CausalLocalSGU of g-mlp-gpt, after gMLP (arXiv:2105.08050).
    """
    return gate("windowed_sgu", _operator, "w", x, weight, bias, norm_weight, norm_bias, eps,
                gate_residual, activation)


def gate(where, operator, window, x, weight, bias, norm_weight, norm_bias, eps, gate_residual,
         activation):
    """What windowed_sgu and causal_sgu check and do alike; `window` is weight's axis w or s."""
    check_tensor(where, "x", x)
    sizes = check_shape(where, "x", x, "b n 2c")
    check_length(where, "x", sizes["n"])
    if sizes["2c"] % 2:
        raise ValueError(f"{where}: x must have an even last axis [res, gate], got {sizes['2c']}")
    sizes["c"] = sizes["2c"] // 2
    check_tensor(where, "weight", weight, like=("x", x))
    columns = "2w" if window == "w" else "s"
    sizes = check_shape(where, "weight", weight, f"h {window} {columns}", sizes)
    if window == "w" and sizes["2w"] != 2 * sizes["w"]:
        raise ValueError(f"{where}: weight must have shape (h, w, 2w), got {tuple(weight.shape)}")
    if window == "s":
        check_length(where, "x", sizes["n"], sizes["s"])
    check_divides(where, "weight's h", sizes["h"], "c", sizes["c"])
    parameters = {"weight": weight, "bias": bias, "norm_weight": norm_weight,
                  "norm_bias": norm_bias}
    for name, layout in (("bias", f"h {window}"), ("norm_weight", "c"), ("norm_bias", "c")):
        if parameters[name] is not None:
            check_tensor(where, name, parameters[name], like=("x", x))
            check_shape(where, name, parameters[name], layout, sizes)
    if gate_residual is not None:
        check_tensor(where, "gate_residual", gate_residual, like=("x", x))
        check_shape(where, "gate_residual", gate_residual, "b n c", sizes)
        x, gate_residual = match_dtypes(where, x=x, gate_residual=gate_residual)
    weight, bias, norm_weight, norm_bias = (
        None if value is None else match_parameter(where, name, value, ("x", x))
        for name, value in parameters.items())
    outside = callable(activation)
    if not outside and activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"{where}: activation must be None, a callable or one of {ACTIVATIONS}, "
                         f"got {activation!r}")
    out = operator(x, weight, bias, norm_weight, norm_bias, eps, gate_residual,
                   "none" if outside else activation or "identity")
    return activation(out) * x[..., : sizes["c"]] if outside else out
