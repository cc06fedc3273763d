"""Sequential and reversible execution of residual layers: the twin of
`g_mlp_gpt.reversible` (g-mlp-gpt==0.0.15).

A reversible sequence keeps two streams and takes turns: (a, b) becomes (b, a + fn(b)).
Such a step is undone by running fn once more, so the backward pass rebuilds every
activation from the final pair, and memory does not grow with depth.
"""

from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from fastmix.checks import check_shape
from fastmix.nn._checks import check_floating


def _route(args_route, kwargs, depth):
    """Per layer, the keyword arguments of its f and those of its g."""
    routed = [({}, {}) for _ in range(depth)]
    for name in args_route.keys() & kwargs.keys():
        for layer, takes in zip(routed, args_route[name]):
            for function_kwargs, taken in zip(layer, takes):
                if taken:
                    function_kwargs[name] = kwargs[name]
    return routed


def _survivors(layers, drop_probability):
    """Each layer stays unless drawn; the first one stays where all were drawn."""
    drawn = torch.empty(len(layers)).uniform_(0, 1) < drop_probability
    return [layer for layer, gone in zip(layers, drawn.tolist()) if not gone] or layers[:1]


def _rng_state(x):
    return torch.get_rng_state(), *get_device_states(x)


@contextmanager
def _as_in_forward(rng_state, device_type, autocasts):
    """Random numbers and autocast as they were before a step; the generators keep their place."""
    cpu_state, devices, device_states = rng_state
    device_type = device_type if devices else "cpu"
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices, device_type=device_type))
        torch.set_rng_state(cpu_state)
        set_device_states(devices, device_states, device_type=device_type)
        for settings in autocasts:
            stack.enter_context(torch.autocast(**settings))
        stack.enter_context(torch.enable_grad())
        yield


class _Reversible(torch.autograd.Function):
    """x (b, n, d) -> a + b after all steps. A step is (fn, kwargs, tensors it learns through);
    `learned` is all of those tensors once: as inputs they get their gradients from autograd
    like any others, whether or not x asks for one."""

    @staticmethod
    def forward(ctx, x, steps, *learned):
        ctx.steps, ctx.learned, ctx.rng_states = steps, learned, []
        # No weight cache: the rerun must cast weights with gradients recorded.
        ctx.autocasts = [
            dict(device_type=kind, dtype=torch.get_autocast_dtype(kind),
                 enabled=torch.is_autocast_enabled(kind), cache_enabled=False)
            for kind in {"cpu", x.device.type} if torch.amp.is_autocast_available(kind)]
        a = b = x
        for fn, kwargs, _ in steps:
            ctx.rng_states.append(_rng_state(x))
            a, b = b, a + fn(b, **kwargs)
        ctx.save_for_backward(a, b)
        return a + b

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad_a = grad_b = grad
        grads = {}
        for (fn, kwargs, learned), rng_state in zip(ctx.steps[::-1], ctx.rng_states[::-1]):
            x = a.detach().requires_grad_()
            with _as_in_forward(rng_state, a.device.type, ctx.autocasts):
                y = fn(x, **kwargs)
            grad_x, *grad_learned = torch.autograd.grad(
                y, (x, *learned), grad_b.to(y.dtype), allow_unused=True)
            for tensor, grad_tensor in zip(learned, grad_learned):
                if grad_tensor is not None:
                    grads[tensor] = grads[tensor] + grad_tensor if tensor in grads else grad_tensor
            a, b = b - y.detach(), a
            grad_a, grad_b = grad_b, grad_a + grad_x
        return grad_a + grad_b, None, *map(grads.get, ctx.learned)


class _Function(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)


class ReversibleBlock(nn.Module):
    """Holds f and g of one reversible layer, under the names that checkpoints use."""

    def __init__(self, f, g):
        super().__init__()
        self.f = _Function(f)
        self.g = _Function(g)


class SequentialSequence(nn.Module):
    """x + f(x), layer after layer; twin of `g_mlp_gpt.reversible.SequentialSequence`.

    layers: ModuleList of one-element layers (f,). args_route: per keyword argument, one
    (f takes it, g takes it) pair per layer. layer_dropout: probability with which training
    skips a layer. Called with x (b, n, d) and keyword arguments, of which those without a
    route are ignored, `layer_dropout` among them. ValueError for a route of another depth.
    """

    def __init__(self, layers, args_route={}, layer_dropout=0.):
        super().__init__()
        for name, route in args_route.items():
            if len(route) != len(layers):
                raise ValueError(
                    f"SequentialSequence: args_route[{name!r}] must have one entry for each of "
                    f"the {len(layers)} layers, got {len(route)}")
        self.layers = layers
        self.args_route = args_route
        self.layer_dropout = layer_dropout

    def forward(self, x, **kwargs):
        check_floating(self, x)
        layers = list(zip(self.layers, _route(self.args_route, kwargs, len(self.layers))))
        if self.training and self.layer_dropout > 0:
            layers = _survivors(layers, self.layer_dropout)
        for (f,), (f_kwargs, _) in layers:
            x = x + f(x, **f_kwargs)
        return x


class ReversibleSequence(nn.Module):
    """Two streams y1 = x1 + f(x2), y2 = x2 + g(y1), layer after layer, both starting at x and
    summed at the end; twin of `g_mlp_gpt.reversible.ReversibleSequence`.

    blocks: pairs of modules (f, g). args_route: as in SequentialSequence. Called with x
    (b, n, d) and the `layer_dropout` of this call: the constructor's is kept, not used.

    The backward pass runs every f and g again, with the random numbers (CPU and the device
    of x) and the autocast settings of the forward pass. Gradients reach x, the parameters
    that f and g register, and tensors routed to them; they can be taken once (no second
    derivatives). `.train()` / `.eval()` must not change between forward and backward.
    """

    def __init__(self, blocks, args_route={}, layer_dropout=0.):
        super().__init__()
        self.args_route = args_route
        self.layer_dropout = layer_dropout
        self.blocks = nn.ModuleList([ReversibleBlock(f, g) for f, g in blocks])

    def forward(self, x, layer_dropout=0., **kwargs):
        check_shape(check_floating(self, x), "x", x, "b n d")
        layers = list(zip(self.blocks, _route(self.args_route, kwargs, len(self.blocks))))
        if self.training and layer_dropout > 0:
            layers = _survivors(layers, layer_dropout)
        steps = []
        for block, routed in layers:
            for fn, fn_kwargs in zip((block.f, block.g), routed):
                tensors = (*fn.parameters(), *fn_kwargs.values())
                learned = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
                steps.append((fn, fn_kwargs, learned))
        every = dict.fromkeys(t for _, _, learned in steps for t in learned)
        return _Reversible.apply(x, steps, *every)
