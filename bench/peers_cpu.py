"""Other ways to the same results on a CPU, timed beside fastmix.

    python bench/peers_cpu.py --seq 8192
    python bench/peers_cpu.py --seq 8192 --ops "gate_loop 8×64 real" --json peers.json

Each way gets its inputs in the layout it likes best, made beforehand, and once more in fastmix's,
whose turning is then part of its time. What is not installed, fails, or is wrong is printed as
such and has no time. Errors are those from fastmix's own result in float64, which tests hold
against the definitions.

    pip install jax numba philtorch      # none of them is needed
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass

import timing  # before torch: it quiets torch's profiler

# isort: split
import torch
import torch.nn.functional as F

import machine
import operators
import table
from fastmix import ops
from progress import Progress
from rows import MODES, Step, reason

SECONDS = 1.0
AGREE = 1e-3  # largest difference / largest value; float32 sums of 8192 numbers are far below


# ---- layouts: axes, in the order that a way likes

def same(axes):
    return axes


def time_first(axes):
    return sorted(axes, key=lambda axis: axis != "n")


def time_last(axes):
    return sorted(axes, key=lambda axis: axis == "n")


def heads_first(axes):
    return sorted(axes, key=lambda axis: {"b": 0, "h": 1, "n": 2}.get(axis, 3))


def turned(t, axes, layout):
    order = [axes.index(axis) for axis in layout]
    if order == sorted(order):
        return t
    return t.permute(order) if isinstance(t, torch.Tensor) else t.transpose(order)


# ---- what runs a way: forward(), forward_backward(), and results() → (result, gradients)

class Jax:
    surroundings = contextlib.nullcontext

    def __init__(self, function, tensors, incoming):
        import jax

        def pull(incoming, *arguments):
            out, vjp = jax.vjp(function, *arguments)
            # jax transposes where torch takes the adjoint
            return out, [gradient.conj() for gradient in vjp(incoming.conj())]

        self.arguments = [jax.numpy.asarray(t.detach().numpy()) for t in tensors]
        self.incoming = jax.numpy.asarray(incoming.numpy())
        self.function, self.pull, self.ready = jax.jit(function), jax.jit(pull), (
            jax.block_until_ready)

    def forward(self):
        self.ready(self.function(*self.arguments))

    def forward_backward(self):
        self.ready(self.pull(self.incoming, *self.arguments))

    def results(self):
        out, gradients = self.pull(self.incoming, *self.arguments)
        return from_numpy(out), [from_numpy(gradient) for gradient in gradients]


class Numpy:
    """Without gradients."""
    surroundings = contextlib.nullcontext
    forward_backward = None

    def __init__(self, function, tensors, incoming):
        self.function, self.arguments = function, [t.detach().numpy() for t in tensors]

    def forward(self):
        self.function(*self.arguments)

    def results(self):
        return from_numpy(self.function(*self.arguments)), None


def from_numpy(array):
    import numpy
    return torch.from_numpy(numpy.array(array))


class Torch(Step):
    def __init__(self, function, tensors, incoming):
        leaves = [t.detach().requires_grad_() for t in tensors]
        super().__init__(function, leaves, leaves, incoming)

    def results(self):
        return self.run(self.incoming)


@dataclass
class Way:
    name: str
    make: Callable              # make() → function(*inputs); an ImportError says what is missing
    layout: Callable = same
    runner: Callable = Torch


# ---- scans

def combine(left, right):
    return left[0] * right[0], right[0] * left[1] + right[1]


def torch_associative_scan():
    from torch._higher_order_ops.associative_scan import associative_scan
    return lambda gates, x: associative_scan(combine, (gates, x), dim=1, combine_mode="generic")[1]


def jax_scan():
    from jax import lax, numpy

    def scan(gates, x):  # (n, b, c)
        def step(state, now):
            state = now[0] * state + now[1]
            return state, state
        return lax.scan(step, numpy.zeros_like(x[0]), (gates, x))[1]
    return scan


def jax_associative_scan():
    from jax import lax
    return lambda gates, x: lax.associative_scan(combine, (gates, x))[1]  # (n, b, c)


def numba_scan():
    import numba
    import numpy

    @numba.njit(parallel=True)
    def scan(gates, x):  # (b, n, c)
        b, n, c = x.shape
        y, block = numpy.empty_like(x), 128
        blocks = (c + block - 1) // block
        for unit in numba.prange(b * blocks):
            i, first = unit // blocks, unit % blocks * block
            end = min(c, first + block)
            y[i, 0, first:end] = x[i, 0, first:end]
            for t in range(1, n):
                for j in range(first, end):
                    y[i, t, j] = gates[i, t, j] * y[i, t - 1, j] + x[i, t, j]
        return y
    return scan


def philtorch_scan():
    from philtorch.lpv import linear_recurrence

    def scan(gates, x):  # (b, c, n)
        rows = x.flatten(0, 1)
        return linear_recurrence(gates.flatten(0, 1), rows.new_zeros(len(rows)), rows).view_as(x)
    return scan


# ---- exponential averages and long convolutions

def scipy_lfilter():
    import numpy
    from scipy.signal import lfilter

    def average(x, decay, gain):  # (b, h, d, n)
        return numpy.stack([lfilter(gain[h:h + 1], numpy.stack([numpy.ones_like(decay[h]),
                                                                -decay[h]]), x[:, h])
                            for h in range(len(decay))], 1)
    return average


def philtorch_average():
    from philtorch.lti import linear_recurrence

    def average(x, decay, gain):  # (b, h, d, n)
        rows = (gain[:, None, None] * x).flatten(0, 2)
        each = decay[:, None].expand(x.shape[:3]).flatten()
        return linear_recurrence(each, rows.new_zeros(len(rows)), rows).view_as(x)
    return average


def jax_average():
    from jax import lax, numpy

    def average(x, decay, gain):  # (n, b, h, d)
        def step(state, now):
            state = decay[:, None] * state + gain[:, None] * now
            return state, state
        return lax.scan(step, numpy.zeros_like(x[0]), x)[1]
    return average


def through_fft(fft, x, kernel, axis):
    n = x.shape[axis]
    spectrum = fft.rfft(x, 2 * n, axis) * fft.rfft(kernel, 2 * n, axis)
    return fft.irfft(spectrum, 2 * n, axis)


def torch_fft_average():
    def average(x, decay, gain):  # (b, h, d, n)
        n = x.shape[-1]
        kernel = gain[:, None, None] * decay[:, None, None] ** torch.arange(n)
        return through_fft(torch.fft, x, kernel, -1)[..., :n]
    return average


def torch_fft():
    return lambda x, kernel: through_fft(torch.fft, x, kernel[:, :, None], -1)[..., :x.shape[-1]]


def torch_fft_axis_1():
    return lambda x, kernel: through_fft(torch.fft, x, kernel[..., None], 1)[:, :x.shape[1]]


def jax_fft():
    from jax import numpy
    return lambda x, kernel: through_fft(numpy.fft, x, kernel[:, :, None], -1)[..., :x.shape[-1]]


def scipy_fftconvolve():
    from scipy.signal import fftconvolve
    return lambda x, kernel: fftconvolve(x, kernel[:, :, None], axes=-1)[..., :x.shape[-1]]


# ---- gate_loop

def jax_gate_loop():
    from jax import lax, numpy

    def loop(q, k, v, gates):  # (n, b, h, d); gates (n, b, h), or logits (n, b, h, 2)
        if gates.ndim == 4:
            z = lax.complex(gates[..., 0], gates[..., 1])
            size = numpy.abs(z)
            gates = z / size / (1 + numpy.exp(-size))

        def step(state, now):
            q, k, v, gate = now
            state = gate[..., None, None] * state + k[..., None] * v[..., None, :]
            return state, (q[..., None] * state.real).sum(-2)
        empty = numpy.zeros(q.shape[1:] + v.shape[-1:], gates.dtype)
        return lax.scan(step, empty, (q, k, v, gates))[1]
    return loop


def one_by_one():
    """As flash-linear-attention writes its definitions: a state after the other."""
    def loop(q, k, v, gates):  # (b, h, n, d)
        state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
        for t in range(q.shape[2]):
            state = (gates[:, :, t, None, None] * state
                     + k[:, :, t, :, None] * v[:, :, t, None, :])
            out.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(out, 2)
    return loop


def chunks_of(size, t):
    """(b, h, n, …) → (b, h, chunks, size, …), with zeros behind the end."""
    missing = -t.shape[2] % size
    return F.pad(t, (0, 0) * (t.ndim - 3) + (0, missing)).unflatten(2, (-1, size))


def segments(logs):
    """The products of gates from each step to each later one, (…, steps, steps)."""
    total = logs.cumsum(-1)
    return (total[..., None] - total[..., None, :]).tril().exp().tril()


def chunked(size=64):
    """Products within chunks, and a state from each chunk to the next."""
    def loop(q, k, v, gates):  # (b, h, n, d)
        n = q.shape[2]
        q, k, v, logs = (chunks_of(size, t) for t in (q, k, v, gates.log()))
        total = logs.cumsum(-1)
        out = ((q @ k.mT) * segments(logs)) @ v
        added = (k * (total[..., -1:] - total).exp()[..., None]).mT @ v
        across = total[..., -1, None, None].exp()
        state, before = torch.zeros_like(added[:, :, 0]), []
        for i in range(added.shape[2]):
            before.append(state)
            state = across[:, :, i] * state + added[:, :, i]
        out = out + (q * total.exp()[..., None]) @ torch.stack(before, 2)
        return out.flatten(2, 3)[:, :, :n]
    return loop


def state_space_duality(size=256):
    """As Mamba-2 runs without its kernels: states of chunks are weighed by one more product."""
    def loop(q, k, v, gates):  # (b, h, n, d)
        n = q.shape[2]
        q, k, v, logs = (chunks_of(size, t) for t in (q, k, v, gates.log()))
        total = logs.cumsum(-1)
        within = torch.einsum("bhcid,bhcjd,bhcij,bhcjv->bhciv", q, k, segments(logs), v)
        added = torch.einsum("bhcjd,bhcj,bhcjv->bhcdv", k, (total[..., -1:] - total).exp(), v)
        entering = segments(F.pad(total[..., -1], (1, 0)))[..., :-1, 1:]
        entering = torch.einsum("bhij,bhjdv->bhidv", entering, added)
        return (within + torch.einsum("bhcid,bhcdv,bhci->bhciv", q, entering, total.exp())).flatten(
            2, 3)[:, :, :n]
    return loop


# ---- gating units and the mean

def sgu_parts(x, norm_weight, norm_bias, heads):
    res, gate = x.chunk(2, -1)
    gate = F.layer_norm(gate, gate.shape[-1:], norm_weight, norm_bias)
    return res, gate.unflatten(-1, (heads, -1))


def causal_sgu():
    def unit(x, weight, bias, norm_weight, norm_bias):
        res, gate = sgu_parts(x, norm_weight, norm_bias, len(weight))
        mixed = torch.einsum("hij,bjhd->bihd", weight.tril(), gate) + bias.T[..., None]
        return mixed.flatten(2) * res
    return unit


def windowed_sgu():
    def unit(x, weight, bias, norm_weight, norm_bias):
        n, w = x.shape[1], weight.shape[1]
        res, gate = sgu_parts(x, norm_weight, norm_bias, len(weight))
        now = F.pad(gate, (0, 0, 0, 0, 0, -n % w)).unflatten(1, (-1, w))
        before = F.pad(now, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        mixed = torch.einsum("hij,bcjhd->bcihd", weight.tril(w), torch.cat([before, now], 2))
        mixed = mixed + bias.T[..., None]
        return mixed.flatten(1, 2)[:, :n].flatten(2) * res
    return unit


def torch_mean():
    return lambda x: x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]


def jax_mean():
    from jax import numpy
    return lambda x: numpy.cumsum(x, 1) / numpy.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]


def compiled(make):
    return lambda: torch.compile(make(), fullgraph=True)


def real_scan(b, n, dim, heads):
    inputs = {"gates": ("b n c", operators.uniform(0.9, 1, b, n, dim)),
              "inputs": ("b n c", operators.normal(b, n, dim))}
    return dataclasses.replace(operators.linear_scan(b, 1, dim, heads), row="linear_scan real",
                               inputs=inputs)


SCANS = [Way("JAX lax.scan", jax_scan, time_first, Jax),
         Way("JAX associative_scan", jax_associative_scan, time_first, Jax),
         Way("torch associative_scan", torch_associative_scan),
         Way("numba, ten lines", numba_scan, same, Numpy)]
JAX_LOOP = Way("JAX lax.scan", jax_gate_loop, time_first, Jax)
WAYS = {
    real_scan: [*SCANS, Way("philtorch", philtorch_scan, time_last)],
    operators.linear_scan: SCANS,
    operators.gate_loop_diagonal: [JAX_LOOP],
    operators.gate_loop: [JAX_LOOP],
    operators.gate_loop_real: [
        JAX_LOOP, Way("torch in chunks of 64", chunked, heads_first),
        Way("Mamba-2's products in torch", state_space_duality, heads_first),
        Way("torch, a step at a time", one_by_one, heads_first)],
    operators.decay_conv: [
        Way("scipy lfilter", scipy_lfilter, time_last, Numpy),
        Way("philtorch", philtorch_average, time_last),
        Way("torch.fft", torch_fft_average, time_last),
        Way("JAX lax.scan", jax_average, time_first, Jax)],
    operators.fft_conv: [
        Way("torch.fft", torch_fft, time_last), Way("torch.fft along axis 1", torch_fft_axis_1),
        Way("scipy fftconvolve", scipy_fftconvolve, time_last, Numpy),
        Way("JAX fft", jax_fft, time_last, Jax)],
    operators.windowed_sgu: [Way("torch", windowed_sgu),
                             Way("torch.compile", compiled(windowed_sgu))],
    operators.causal_sgu: [Way("torch", causal_sgu), Way("torch.compile", compiled(causal_sgu))],
    operators.cumulative_mean: [Way("torch cumsum", torch_mean),
                                Way("torch.compile", compiled(torch_mean)),
                                Way("JAX cumsum", jax_mean, same, Jax)],
}


# ---- the table

class Contest:
    """One operator's inputs, and its true results."""

    def __init__(self, make, batch, n, dim, heads):
        if make is operators.causal_sgu:
            n = min(n, operators.CAUSAL_STEPS)
        torch.manual_seed(n)
        self.case = case = make(batch, n, dim, heads)
        self.inputs = [axes.split() for axes, _ in case.inputs.values()]
        self.leaves = case.tensors(torch.float32, torch.device("cpu"))
        self.incoming = torch.randn(case.output_shape(), dtype=self.leaves[0].dtype)
        self.ours = Torch(lambda *inputs: case.call(ops, *inputs), self.leaves, self.incoming)
        exact = case.tensors(torch.float64, torch.device("cpu"))
        exact = [one.detach().to(t.dtype) for t, one in zip(exact, self.leaves)]
        wide = self.incoming.to(exact[0].dtype)
        self.truth = Torch(lambda *inputs: case.call(ops, *inputs), exact, wide).results()

    def errors(self, step, back=lambda result: result):
        """{mode: error} of results and gradients."""
        out, gradients = back(step.results())
        true_out, true_gradients = self.truth
        errors = {"forward": off(out, true_out)}
        if gradients is not None:
            errors["forward_backward"] = max(map(off, gradients, true_gradients))
        return errors

    def theirs(self, way, turns):
        """(its step, back(result, gradients) to our layout). `turns`: its layout is part of it."""
        function, out = way.make(), self.case.output.split()
        layouts = [way.layout(axes) for axes in self.inputs]
        if turns:
            def whole(*inputs):
                result = function(*map(turned, inputs, self.inputs, layouts))
                return turned(result, way.layout(out), out)
            return way.runner(whole, self.leaves, self.incoming), lambda results: results
        tensors = [turned(t.detach(), axes, layout).contiguous()
                   for t, axes, layout in zip(self.leaves, self.inputs, layouts)]
        incoming = turned(self.incoming, out, way.layout(out)).contiguous()

        def back(results):
            result, gradients = results
            return turned(result, way.layout(out), out), gradients and [
                turned(*each) for each in zip(gradients, layouts, self.inputs)]
        return way.runner(function, tensors, incoming), back

    def rows(self, way):
        """One in the way's own layout, and one in ours if that is another."""
        row = self.row(way, False)
        if row["status"] == "not installed" or list(map(way.layout, self.inputs)) == self.inputs:
            return [row]
        return [row, self.row(way, True)]

    def row(self, way, turns):
        layout = self.inputs[0] if turns else way.layout(self.inputs[0])
        row = {"row": self.case.row, "n": self.case.steps(), "implementation": way.name,
               "layout": f"({', '.join(layout)})", "status": "failed", "reason": None}
        try:
            step, back = self.theirs(way, turns)
            row["peer_errors"] = self.errors(step, back)
        except ImportError as error:
            return row | {"status": "not installed", "reason": str(error)}
        except Exception as error:  # whatever a foreign function may raise
            return row | {"reason": f"{type(error).__name__}: {reason(error)}"}
        if not max(row["peer_errors"].values()) <= AGREE:
            return row | {"status": "disagrees"}
        row["errors"] = self.errors(self.ours)
        for mode in MODES:
            if getattr(step, mode) is not None:
                times = timing.side_by_side(
                    {who: (one.surroundings, getattr(one, mode))
                     for who, one in (("ours", self.ours), ("theirs", step))},
                    SECONDS, torch.device("cpu"))
                row[f"{mode}_ms"], row[f"peer_{mode}_ms"] = times["ours"], times["theirs"]
        return row | {"status": "ok"}


def off(result, true):
    return ((result - true).abs().max() / true.abs().max()).item()


def of_modes(value):
    """A column: value(row, mode) of each mode that the row has."""
    return lambda row, notes: " / ".join(
        value(row, mode) for mode in MODES if f"{mode}_ms" in row) or "–"


def times(prefix):
    return of_modes(lambda row, mode: table.significant(row[f"{prefix}{mode}_ms"]["median"]))


def gain(row, mode):
    return table.significant(row[f"peer_{mode}_ms"]["median"] / row[f"{mode}_ms"]["median"])


def errors(prefix):
    return of_modes(lambda row, mode: f"{row[f'{prefix}errors'][mode]:.0e}")


READING = """\
Forward without gradients / forward and backward, medians of calls in turns, caches flushed before
each. Error: max |difference| / max |truth| of the result / of all gradients, from fastmix's own in
float64."""
COLUMNS = [("operator", table.name), ("beside", lambda row, notes: row["implementation"]),
           ("its layout", lambda row, notes: row["layout"]), ("fastmix ms", times("")),
           ("its ms", times("peer_")), ("× as fast", of_modes(gain)),
           ("error", errors("")), ("its error", errors("peer_")),
           ("result", table.verdict)]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("--batch", 1), ("--seq", 8192), ("--dim", 512), ("--heads", 8)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--ops", nargs="+", metavar="ROW", help="rows, as the table calls them")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args(argv)
    refusal = table.why_not_written("json", options.json)
    if refusal:
        parser.error(f"--json{refusal}")
    sizes = options.batch, options.seq, options.dim, options.heads
    contests = [(make, ways) for make, ways in WAYS.items()
                if not options.ops or make(1, 1, *sizes[2:]).row in options.ops]
    if not contests:
        parser.error("--ops must be of "
                     + ", ".join(repr(make(1, 1, *sizes[2:]).row) for make in WAYS))
    measured, say = [], Progress(sum(map(len, dict(contests).values())))
    for make, ways in contests:
        contest = Contest(make, *sizes)
        for way in ways:
            say(f"{contest.case.row} beside {way.name}")
            measured += contest.rows(way)
    say.close()
    header = machine.header(torch.device("cpu"), torch.float32)
    report = {"header": header, "rows": measured,
              "settings": table.settings(options) | {"seq": [options.seq], "dtype": "float32"}}
    notes = table.Notes()
    print("\n\n".join([table.heading(header, report["settings"]),
                       table.grid(measured, COLUMNS, notes, False), READING, notes.lines()]))
    if options.json:
        table.write_json(report, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
