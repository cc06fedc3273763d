"""The operators of the report, in the order of its table.

Each function below makes one case: random inputs, the call of the operator, and the same
step in the published original's own code. Axes: b batch, n time steps, h heads, d channels
of a head, c channels, w window.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange

CAUSAL_STEPS = 2048  # of causal_sgu, whose weight is n × n, unless more are asked for


@dataclass
class Case:
    operator: str       # its name in fastmix.ops
    row: str            # what the table calls it
    inputs: dict        # name → (axes, float64 or complex128 tensor)
    output: str         # axes of the result
    call: Callable      # call(ops, *inputs), on fastmix.ops or on fastmix.reference
    package: str        # whose published code `original` is
    original: Callable  # original(*inputs) → (function, its arguments)
    sample: dict        # axis → how many, counted from the end, are held against float64
    value_steps: int    # time steps whose values are held against float64, at most
    gradient_steps: int             # and whose gradients are
    flops: int = 0                  # of the forward's matrix products, as few as any algorithm's
    masked: int = 0                 # elements of the inputs that never count
    keeps_inputs: bool = True       # backward reads them
    compile_seconds: int = 0        # of torch.compile of the original, cold, two cores
    original_bytes: int = 0         # what the original's forward+backward needs at its peak

    def steps(self):
        """n, the time steps of the inputs."""
        return next(iter(self.inputs.values()))[1].shape[1]

    def tensors(self, dtype, device):
        """The inputs as leaves, complex ones in complex64 (complex128 for float64)."""
        wide = torch.complex128 if dtype == torch.float64 else torch.complex64
        return [t.to(device, wide if t.is_complex() else dtype).requires_grad_()
                for _, t in self.inputs.values()]

    def output_shape(self):
        sizes = {axis: size for axes, t in self.inputs.values()
                 for axis, size in zip(axes.split(), t.shape)}
        return tuple(sizes[axis] for axis in self.output.split())

    def necessary(self, inputs):
        """{mode: (bytes, flops)}. Forward reads the inputs and writes the output; backward
        reads the inputs, if it needs them, and the output's gradient, and writes the inputs'
        gradients."""
        read = sum(t.numel() * t.element_size() for t in inputs)
        read -= self.masked * inputs[0].element_size()
        written = math.prod(self.output_shape()) * inputs[0].element_size()
        return {"forward": (read + written, self.flops),
                "forward_backward": ((2 + self.keeps_inputs) * read + 2 * written, 3 * self.flops)}


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def uniform(low, high, *shape):
    return torch.empty(*shape, dtype=torch.float64).uniform_(low, high)


def hold(module, **tensors):
    """Puts our leaves in the place of a module's parameters."""
    for name, tensor in tensors.items():
        owner = module.get_submodule(name.rpartition(".")[0])
        delattr(owner, name.rpartition(".")[2])
        setattr(owner, name.rpartition(".")[2], tensor)
    return module.to(tensor.device)


def linear_scan(b, n, dim, heads):
    def original(gates, inputs):
        from gateloop_transformer.associative_scan import associative_scan

        def combine(left, right):
            return right[0] * left[0], right[0] * left[1] + right[1]

        return lambda gates, inputs: associative_scan(combine, (gates, inputs))[1], (gates, inputs)

    gates = torch.polar(uniform(0.9, 1, b, n, dim), uniform(-math.pi, math.pi, b, n, dim))
    inputs = torch.complex(normal(b, n, dim), normal(b, n, dim))
    return Case(
        "linear_scan", "linear_scan complex",
        {"gates": ("b n c", gates), "inputs": ("b n c", inputs)}, "b n c",
        lambda ops, gates, inputs: ops.linear_scan(gates, inputs),
        "gateloop_transformer", original, {"b": 1, "c": 8}, 65536, 2048, compile_seconds=60)


def gate_loop(b, n, dim, heads):
    """From gate logits. The original's step is GateLoopedAttention's between its two
    projections, without the checkpointing that would slow its backward."""
    d = dim // heads

    def original(q, k, v, gate_logits):
        from gateloop_transformer.gateloop_transformer import gate_loop_operator

        def step(q, k, v, gate_logits):
            b = q.shape[0]
            q, k, v = (rearrange(t, "b n h d -> (b h) n d") for t in (q, k, v))
            z = torch.view_as_complex(gate_logits)
            a = rearrange(torch.polar(z.abs().sigmoid(), z.angle()), "b n h -> (b h) n 1 1")
            out = gate_loop_operator(q, k, v, a)
            return rearrange(out, "(b h) n d -> b n h d", b=b).contiguous()

        return step, (q, k, v, gate_logits)

    inputs = {name: ("b n h d", normal(b, n, heads, d)) for name in "qkv"}
    inputs["gate_logits"] = ("b n h 2", 4 * normal(b, n, heads, 2))
    # d = 1 needs no matrix product. Otherwise: add k vᵀ to Re S and Im S, and q · Re S of both.
    # The original holds eleven (measured) complex arrays of (b n h d d).
    return Case(
        "gate_loop", f"gate_loop {heads}×{d}", inputs, "b n h d",
        lambda ops, q, k, v, z: ops.gate_loop(q, k, v, gate_logits=z),
        "gateloop_transformer", original, {"b": 1, "h": 8 if d == 1 else 2},
        65536 if d == 1 else 2048, 2048 if d == 1 else 512,
        flops=0 if d == 1 else 8 * b * n * heads * d * d,
        original_bytes=11 * 8 * b * n * heads * d * d, compile_seconds=45)


def gate_loop_diagonal(b, n, dim, heads):
    return gate_loop(b, n, dim, dim)


def gate_loop_real(b, n, dim, heads):
    """From real gates, which the original's operator takes too."""
    d = dim // heads

    def original(q, k, v, gates):
        from gateloop_transformer.gateloop_transformer import gate_loop_operator

        def step(q, k, v, gates):
            b = q.shape[0]
            q, k, v = (rearrange(t, "b n h d -> (b h) n d") for t in (q, k, v))
            out = gate_loop_operator(q, k, v, rearrange(gates, "b n h -> (b h) n 1 1"))
            return rearrange(out, "(b h) n d -> b n h d", b=b).contiguous()

        return step, (q, k, v, gates)

    inputs = {name: ("b n h d", normal(b, n, heads, d)) for name in "qkv"}
    inputs["gates"] = ("b n h", uniform(0.9, 1, b, n, heads))
    # Add k vᵀ to S, and q · S. The original makes k vᵀ complex, whatever the gates are.
    return Case(
        "gate_loop", f"gate_loop {heads}×{d} real", inputs, "b n h d",
        lambda ops, q, k, v, gates: ops.gate_loop(q, k, v, gates),
        "gateloop_transformer", original, {"b": 1, "h": 2}, 2048, 512,
        flops=0 if d == 1 else 4 * b * n * heads * d * d,
        original_bytes=11 * 8 * b * n * heads * d * d, compile_seconds=45)


def decay_conv(b, n, dim, heads):
    def original(x, decay, gain):
        from metaformer_gpt.metaformer_gpt import conv1d_fft

        def step(x, decay, gain):
            powers = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
            weights = gain[:, None] * decay[:, None] ** powers
            y = conv1d_fft(rearrange(x, "b n h d -> b h n d"), weights)
            return rearrange(y, "b h n d -> b n h d").contiguous()

        return step, (x, decay, gain)

    gain = uniform(0.001, 0.1, heads)
    return Case(
        "decay_conv", "decay_conv",
        {"x": ("b n h d", normal(b, n, heads, dim // heads)),
         "decay": ("h", 1 - gain), "gain": ("h", gain)}, "b n h d",
        lambda ops, x, decay, gain: ops.decay_conv(x, decay, gain),
        "metaformer_gpt", original, {"b": 1, "h": 8, "d": 8}, 65536, 2048, compile_seconds=20)


def fft_conv(b, n, dim, heads):
    def original(x, kernel):
        from gated_state_spaces_pytorch.dsconv import conv1d_fft

        def step(x, kernel):
            return conv1d_fft(x, torch.flip(kernel, dims=(1,)), dim=-3, weight_dim=-2)

        return step, (x, kernel)

    return Case(
        "fft_conv", "fft_conv",
        {"x": ("b n h d", normal(b, n, heads, dim // heads)),
         "kernel": ("b n h", normal(b, n, heads) / math.sqrt(n))}, "b n h d",
        lambda ops, x, kernel: ops.fft_conv(x, kernel),
        "gated_state_spaces_pytorch", original, {"b": 1, "h": 1, "d": 2}, 8192, 2048,
        compile_seconds=20)


def sgu_inputs(b, n, dim, heads, rows, columns):
    axes = "h w v" if columns == 2 * rows else "h n n"
    return {"x": ("b n 2c", normal(b, n, 2 * dim)),
            "weight": (axes, normal(heads, rows, columns) / math.sqrt(columns)),
            "bias": (axes[:3], normal(heads, rows)),
            "norm_weight": ("c", normal(dim)), "norm_bias": ("c", normal(dim))}


def sgu_call(operator):
    def call(ops, x, weight, bias, norm_weight, norm_bias):
        return getattr(ops, operator)(x, weight, bias, norm_weight=norm_weight, norm_bias=norm_bias)
    return call


def windowed_sgu(b, n, dim, heads, window=128, sgu_heads=4):
    def original(x, weight, bias, norm_weight, norm_bias):
        from g_mlp_gpt.g_mlp_gpt import CausalLocalSGU

        module = CausalLocalSGU(2 * dim, n, heads=sgu_heads, window=window)
        names = {"weight": weight, "bias": bias, "norm.weight": norm_weight, "norm.bias": norm_bias}
        return hold(module, **names), (x,)

    products = sum(min(t, t % window + window) + 1 for t in range(n))
    return Case(
        "windowed_sgu", f"windowed_sgu w={window}",
        sgu_inputs(b, n, dim, sgu_heads, window, 2 * window), "b n c",
        sgu_call("windowed_sgu"), "g_mlp_gpt", original, {"b": 1}, 1024, 512,
        flops=2 * b * dim * products, masked=sgu_heads * window * (window - 1) // 2,
        compile_seconds=15)


def causal_sgu(b, n, dim, heads, sgu_heads=4):
    def original(x, weight, bias, norm_weight, norm_bias):
        from g_mlp_gpt.g_mlp_gpt import CausalSGU

        module = CausalSGU(2 * dim, n, heads=sgu_heads)
        names = {"weight": weight, "bias": bias, "norm.weight": norm_weight, "norm.bias": norm_bias}
        return hold(module, **names), (x,)

    return Case(
        "causal_sgu", "causal_sgu", sgu_inputs(b, n, dim, sgu_heads, n, n), "b n c",
        sgu_call("causal_sgu"), "g_mlp_gpt", original, {"b": 1}, 1024, 256,
        flops=b * dim * n * (n + 1), masked=sgu_heads * n * (n - 1) // 2, compile_seconds=10)


def cumulative_mean(b, n, dim, heads):
    def original(x):
        from metaformer_gpt.metaformer_gpt import cummean

        return lambda x: cummean(x, dim=1), (x,)

    return Case(
        "cumulative_mean", "cumulative_mean", {"x": ("b n c", normal(b, n, dim))}, "b n c",
        lambda ops, x: ops.cumulative_mean(x), "metaformer_gpt", original, {"b": 1, "c": 2},
        8192, 2048, keeps_inputs=False, compile_seconds=8)


# The rows of the table: those of one operator stand under its name.
ROWS = {
    "linear_scan": [linear_scan],
    "gate_loop": [gate_loop_diagonal, gate_loop, gate_loop_real],
    "decay_conv": [decay_conv],
    "fft_conv": [fft_conv],
    "windowed_sgu": [windowed_sgu],
    "causal_sgu": [causal_sgu],
    "cumulative_mean": [cumulative_mean],
}
