"""What the two spatial gating units share: layer norm, activation, product."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
}


def compute_dtype(x):
    return torch.promote_types(x.dtype, torch.float32)


def row_blocks(n, least):
    """(first row, end) of the blocks in which a lower triangle of n rows is multiplied.

    Up to eight, of at least `least` rows: what they save must outweigh the extra calls.
    """
    step = max(least, -(-n // 8))
    return [(i, min(i + step, n)) for i in range(0, n, step)]


def cast(tensor, dtype):
    return None if tensor is None else tensor.to(dtype)


def cast_like(gradient, parameter):
    return None if parameter is None else gradient.to(parameter.dtype)


def normalize(gate, weight, bias, eps):
    """gate (b, n, c), weight and bias (c,) or None → normed, mean, inverse deviation."""
    weight, bias = cast(weight, gate.dtype), cast(bias, gate.dtype)
    if not torch._C._are_functorch_transforms_active():
        return torch.native_layer_norm(gate, gate.shape[-1:], weight, bias, eps)
    # To be differentiated: PyTorch's third derivatives of its layer norm are wrong, and so are
    # tangents of a bias without a weight.
    mean = gate.mean(dim=-1, keepdim=True)
    normed = gate - mean
    inverse_deviation = (normed.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    normed = normed * inverse_deviation
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias, mean, inverse_deviation


def normalize_backward(grad, gate, mean, inverse_deviation, weight, bias):
    """→ gradients for gate, weight and bias, None where there is none."""
    # PyTorch reads the statistics as if they were contiguous, whatever their strides.
    return torch.ops.aten.native_layer_norm_backward(
        grad, gate, gate.shape[-1:], mean.contiguous(), inverse_deviation.contiguous(),
        cast(weight, gate.dtype), cast(bias, gate.dtype),
        [True, weight is not None, bias is not None])


def finish(mixed, res, activation):
    """What the unit returns: the mixed gate itself for activation "none"."""
    return mixed if activation == "none" else ACTIVATIONS[activation](mixed) * res


def finish_backward(grad, mixed, res, activation, dmixed, dres):
    """Writes the gradients for mixed and res to dmixed and dres. "none" needs no mixed."""
    if activation == "none":
        dmixed.copy_(grad)
        dres.zero_()
        return
    activated = ACTIVATIONS[activation](mixed)
    torch.mul(grad, activated, out=dres)
    torch.mul(grad, res, out=dmixed)
    if activation == "tanh":
        torch.ops.aten.tanh_backward(dmixed, activated, grad_input=dmixed)
    elif activation == "sigmoid":
        torch.ops.aten.sigmoid_backward(dmixed, activated, grad_input=dmixed)
    elif activation == "gelu":
        torch.ops.aten.gelu_backward(dmixed, mixed, grad_input=dmixed)
    elif activation == "silu":
        torch.ops.aten.silu_backward(dmixed, mixed, grad_input=dmixed)
