"""Sequential and reversible execution of residual layers: the twin of
`g_mlp_gpt.reversible` (g-mlp-gpt==0.0.15).

A reversible sequence keeps two streams and takes turns: (a, b) becomes (b, a + fn(b)).
Such a step is undone by running fn once more, so the backward pass rebuilds every
activation from the final pair, and memory does not grow with depth. Autograd itself knows
nothing of it: the graph is that of the plain steps.
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from fastmix import _torch_private
from fastmix.checks import check_shape, check_tensor
from fastmix.nn._cache import Cache, call, split_cache


def route_args(router: dict, args: dict, depth: int) -> list[tuple[dict, dict]]:
    """Of the keywords `args`, those of each layer's f and of its g, as `router` says."""
    routed: list[tuple[dict, dict]] = [({}, {}) for _ in range(depth)]
    for name in router.keys() & args.keys():
        for layer, takes in zip(routed, router[name]):
            for function_kwargs, taken in zip(layer, takes):
                if taken:
                    function_kwargs[name] = args[name]
    return routed


def layer_drop(layers: list, prob: float) -> list:
    """Each layer stays unless drawn; the first one stays where all were drawn."""
    drawn = torch.empty(len(layers)).uniform_(0, 1) < prob
    return [layer for layer, gone in zip(layers, drawn.tolist()) if not gone] or layers[:1]


def _rng_state(x: Tensor) -> tuple:
    return torch.get_rng_state(), *get_device_states(x)


@contextmanager
def _as_in_forward(
    rng_state: tuple, device_type: str, autocasts: list[dict]
) -> Iterator[None]:
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


def _weights(fn: nn.Module) -> dict[str, Tensor]:
    return {**dict(fn.named_parameters()), **dict(fn.named_buffers())}


def _swapped(before: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that `functional_call` put in for the forward pass and has taken out since.

    Others that differ are left to whoever moves them about, shards or offloads them: their
    hooks run again with the step.
    """
    return {
        name: t for name, t in before.items()
        if now.get(name) is not t and t.device.type != "meta" and not hasattr(t, "placements")}


def _let_go(step: int, kinds: list[tuple], t: Tensor) -> tuple[int, int]:
    """Stands for a saved tensor: the step that saves it, and its number among that step's."""
    kinds.append(_kind(t))
    return step, len(kinds) - 1


def _kind(t: Tensor) -> tuple:
    return t.shape, t.dtype


def _refuse_dropped(where: str, training: bool, layer_dropout: float) -> None:
    if training and layer_dropout > 0:
        raise ValueError(
            f"{where}: cache and return_cache must be left out while training skips layers, each "
            f"call others, got layer_dropout={layer_dropout}: call eval() first")


class _Replay:
    """The steps of one call: plain autograd, but it computes again what it would save for backward.

    A step takes the streams (a, b) to (b, a + fn(b)). Each tensor that autograd saves in a step
    is let go, with its step and number kept; when backward asks for the first of a step, the
    step is run again from what the next one left, and undone: a = b' - fn(a').
    """

    def __init__(self, steps: list[tuple[nn.Module, dict]]) -> None:
        self.steps = steps
        self.records: list[tuple] = []  # per step, what a second run needs to be the first again

    def run(self, x: Tensor) -> Tensor:
        # No weight cache: tensors saved by a cast must be those of this step.
        self.autocasts = [
            dict(device_type=kind, dtype=torch.get_autocast_dtype(kind),
                 enabled=torch.is_autocast_enabled(kind), cache_enabled=False)
            for kind in {"cpu", x.device.type} if kind != "meta"]
        a = b = x.contiguous()  # as the second run has them: torch's layers save by the layout
        for step, (fn, kwargs) in enumerate(self.steps):
            rng_state, weights = _rng_state(x), _weights(fn)
            kinds: list[tuple] = []
            let_go = functools.partial(_let_go, step, kinds)
            with torch.autograd.graph.saved_tensors_hooks(let_go, self.saved):
                y = fn(b, **kwargs)
            self.records.append((rng_state, weights, b.requires_grad, kinds))
            a, b = b, a + y
        return _Sum.apply(a, b, self)

    def start(self, a: Tensor, b: Tensor) -> None:
        """Backward begins: the streams after the last step."""
        self.last = a.detach(), b.detach()
        self.done = len(self.steps)  # the streams are those before this step

    def saved(self, key: tuple[int, int]) -> Tensor:
        step, number = key
        if self.done < step or self.done == len(self.steps):
            self.done, self.streams = len(self.steps), self.last
        while self.done > step:
            self.done -= 1
            self.undo(self.done)
        return self.tensors[number]

    def undo(self, step: int) -> None:
        fn, kwargs = self.steps[step]
        rng_state, weights, requires_grad, kinds = self.records[step]
        b, sum_of_both = self.streams
        self.tensors: list[Tensor] = []
        x = b.detach().requires_grad_(requires_grad)
        swapped = _swapped(weights, _weights(fn))
        with _as_in_forward(rng_state, b.device.type, self.autocasts), \
                torch.autograd.graph.saved_tensors_hooks(
                    lambda t: self.tensors.append(t.detach()), lambda packed: packed):
            y = torch.func.functional_call(fn, swapped, (x,), kwargs) if swapped else (
                fn(x, **kwargs))
        if [_kind(t) for t in self.tensors] != kinds:
            raise RuntimeError(
                f"ReversibleSequence: step {step} saved {len(kinds)} tensors in the forward pass "
                f"and {len(self.tensors)}, or others, when backward ran it again: f and g must do "
                "the same twice (train and eval, for one, must not change in between)")
        with torch.no_grad():
            self.streams = sum_of_both - y, b


class _Sum(torch.autograd.Function):
    """a + b, which keeps a and b for the way back."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, replay: _Replay) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.replay = replay
        return a + b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.replay.start(*ctx.saved_tensors)
        return grad, grad, None


class _Function(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


class ReversibleBlock(nn.Module):
    """Holds f and g of one reversible layer, under the names that checkpoints use."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f = _Function(f)
        self.g = _Function(g)


class SequentialSequence(nn.Module):
    """x + f(x), layer after layer; twin of `g_mlp_gpt.reversible.SequentialSequence`.

    layers: ModuleList of one-element layers (f,). args_route: per keyword argument, one
    (f takes it, g takes it) pair per layer. layer_dropout: probability with which training
    skips a layer. Called with x (b, n, d) and keyword arguments, of which those without a
    route are ignored, `layer_dropout` among them. With `cache` or `return_cache` each f gets
    and returns its own. ValueError for a route of another depth.
    """

    layers: Any  # a ModuleList of ModuleLists

    def __init__(
        self, layers: nn.ModuleList, args_route: dict = {},  # noqa: B006 (the published signature)
        layer_dropout: float = 0.,
    ) -> None:
        super().__init__()
        for name, route in args_route.items():
            if len(route) != len(layers):
                raise ValueError(
                    f"SequentialSequence: args_route[{name!r}] must have one entry for each of "
                    f"the {len(layers)} layers, got {len(route)}")
        self.layers = layers
        self.args_route = args_route
        self.layer_dropout = layer_dropout

    def forward(
        self, x: Tensor, *, cache: Cache = None, return_cache: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Cache]:
        check_tensor("SequentialSequence", "x", x)
        caches = split_cache("SequentialSequence", cache, len(self.layers))
        if cache is not None or return_cache:
            _refuse_dropped("SequentialSequence", self.training, self.layer_dropout)
        routed = route_args(self.args_route, kwargs, len(self.layers))
        layers = list(zip(self.layers, routed, caches))
        if self.training and self.layer_dropout > 0:
            layers = layer_drop(layers, self.layer_dropout)
        kept = []
        for (f,), (f_kwargs, _), cache in layers:
            out, cache = call(f, x, cache, return_cache, **f_kwargs)
            x = x + out
            kept.append(cache)
        return (x, tuple(kept)) if return_cache else x


def _go_on(
    x: Tensor, layers: list, cache: Cache, return_cache: bool
) -> Tensor | tuple[Tensor, Cache]:
    """Does what ReversibleSequence does, from a cache on."""
    caches, kept = split_cache("ReversibleSequence", cache, len(layers)), []
    a = b = x
    for (block, (f_kwargs, g_kwargs)), cache in zip(layers, caches):
        out, cache = block.f(b, cache=cache, return_cache=True, **f_kwargs)
        a = a + out
        b = b + block.g(a, **g_kwargs)
        kept.append(cache)
    return (a + b, tuple(kept)) if return_cache else a + b


class ReversibleSequence(nn.Module):
    """Two streams y1 = x1 + f(x2), y2 = x2 + g(y1), layer after layer, both starting at x and
    summed at the end; twin of `g_mlp_gpt.reversible.ReversibleSequence`.

    blocks: pairs of modules (f, g). args_route: as in SequentialSequence. Called with x
    (b, n, d) and the `layer_dropout` of this call: the constructor's is kept, not used.

    The backward pass runs every f and g again, with the random numbers (CPU and the device
    of x) and the autocast settings of the forward pass. Gradients reach x, tensors routed to
    f and g, and whatever else these use, as in plain autograd, to any order.
    `.train()` / `.eval()` must not change between forward and backward. Memory grows with
    depth in two cases: compiled, where each step is a checkpoint and keeps its input, and under
    transforms of torch.func, which keep all activations. With `cache` or `return_cache`, which
    each f gets and returns and no g, it is plain autograd too.
    """

    blocks: Any  # a ModuleList of ReversibleBlocks

    def __init__(
        self, blocks: Iterable, args_route: dict = {},  # noqa: B006 (the published signature)
        layer_dropout: float = 0.,
    ) -> None:
        super().__init__()
        self.args_route = args_route
        self.layer_dropout = layer_dropout
        self.blocks = nn.ModuleList([ReversibleBlock(f, g) for f, g in blocks])

    def forward(
        self, x: Tensor, layer_dropout: float = 0., *, cache: Cache = None,
        return_cache: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Cache]:
        check_tensor("ReversibleSequence", "x", x)
        check_shape("ReversibleSequence", "x", x, "b n d")
        layers = list(zip(self.blocks, route_args(self.args_route, kwargs, len(self.blocks))))
        if cache is not None or return_cache:
            _refuse_dropped("ReversibleSequence", self.training, layer_dropout)
            return _go_on(x, layers, cache, return_cache)
        if self.training and layer_dropout > 0:
            layers = layer_drop(layers, layer_dropout)
        steps = [
            (fn, fn_kwargs) for block, routed in layers
            for fn, fn_kwargs in zip((block.f, block.g), routed)]
        compiling = torch.compiler.is_compiling()
        # Transforms of torch.func know no hooks on saved tensors: there, plain autograd.
        transformed = _torch_private.transforms_active()
        if torch.is_grad_enabled() and not compiling and not transformed:
            return _Replay(steps).run(x)
        a = b = x
        for fn, fn_kwargs in steps:
            y = (checkpoint(fn, b, use_reentrant=False, **fn_kwargs) if compiling
                 else fn(b, **fn_kwargs))
            a, b = b, a + y
        return a + b
