"""What the Triton kernels must move and multiply, beside the floor of their operator.

    python bench/dry.py --ops gate_loop --batch 8 --seq 4096 --dim 1024 --heads 16
    python bench/dry.py            # the shapes of bench/on_gpu.sh, into results/triton-dry.json
    python bench/dry.py --check    # none moves or multiplies more than that says

Nothing runs on a device. Operators are called on tensors without memory; of every kernel that
they launch a few programs run in Triton's interpreter, which counts what they load, store and
multiply, and stand for all: a few percent off where tiles are not whole. Loads give zeros:
where a kernel goes never depends on data. MB are what a training step in float32 holds at its
peak beside its inputs, and what the published original's does.
"""

import argparse
import contextlib
import json
import os
import sys
import weakref
from pathlib import Path
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import operators
import rows
import table
from fastmix import _triton
from fastmix._triton import windowed_sgu

TABLE = Path(__file__).parent / "results" / "triton-dry.json"
# (batch, steps, width, heads, operators): those of on_gpu.sh, but for heads over 65536 steps,
# which take long here; and shorter ones for --check.
SHAPES = [
    (8, 4096, 1024, 16, ("gate_loop", "linear_scan")), (1, 65536, 1024, 1024, ("gate_loop",)),
    (8, 8192, 512, 8, ("decay_conv", "windowed_sgu", "cumulative_mean")),
]
SHORT = [
    (8, 256, 1024, 16, ("gate_loop", "linear_scan")), (1, 4096, 1024, 1024, ("gate_loop",)),
    (8, 1024, 512, 8, ("decay_conv", "windowed_sgu", "cumulative_mean")),
]
PROGRAMS = 2      # of a kernel that are run; more of those that leave out the last of 8 chunks
MORE = {"_ends": 8, "_totals": 8}
REGION = 1 << 44  # bytes of addresses for each tensor
COUNTS = ("read", "written", "asked", "flops")


class Count(TorchDispatchMode):
    """What is done while it is active. work: {kernel: {programs, read, written, asked, flops}}.

    read and written are bytes, every tensor's at most once; asked are the bytes of all loads
    and stores. flops are of matrix products. Torch's own kernels are there as "torch.…".
    """

    def __init__(self):
        super().__init__()
        self.work = {}

    def add(self, kernel, programs, **counts):
        sums = self.work.setdefault(kernel, dict.fromkeys(("programs", *COUNTS), 0))
        for key, count in dict(counts, programs=programs).items():
            sums[key] += round(count)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if not function.is_view and "empty" not in function.__name__:
            inplace = function._schema.is_mutable
            read = sum(map(held, tensors(args[1:] if inplace else args)))
            written = sum(map(held, tensors(args[:1] if inplace else (out,))))
            if read + written:
                self.add(f"torch.{function._schema.name.partition('::')[2]}", 1, read=read,
                         written=written, asked=read + written)
        return out

    def launch(self, executor, run, args, options):
        """Runs some programs of a kernel: `executor` is the interpreter's, `run` how it goes."""
        builder = interpreter.interpreter_builder
        touched = {"read": {}, "written": {}}
        sizes, flops = [], 0
        count, = executor.grid
        some = min(MORE.get(executor.fn.__name__, PROGRAMS), count)

        def address(arg):
            if isinstance(arg, tuple):
                return tuple(map(address, arg))
            if not isinstance(arg, torch.Tensor):
                return arg
            sizes.append(held(arg))
            return Address(arg.dtype, len(sizes) * REGION)

        def touch(kind, pointers, mask):
            at = np.unique(pointers.data[mask.data.astype(bool)])
            if at.size:
                tensor = (int(at[0]) + REGION // 2) // REGION - 1
                width = pointers.get_element_ty().primitive_bitwidth // 8
                touched[kind][tensor] = touched[kind].get(tensor, 0) + at.size * width

        def load(pointers, mask, *_):
            touch("read", pointers, mask)
            kind = pointers.get_element_ty()
            return interpreter.TensorHandle(
                np.zeros(pointers.data.shape, interpreter._get_np_dtype(kind)), kind)

        def store(pointers, values, mask, *_):
            touch("written", pointers, mask)

        def dot(a, b, total, *_):
            nonlocal flops
            flops += 2 * a.data.size * b.data.shape[-1]
            return total

        def choose(i, *_):
            # Spread so that they do not fall into step with how a launcher cuts its tensors.
            builder.grid_idx = (i if some == count else int((i + 0.5) * 0.618034 % 1 * count), 0, 0)

        executor.grid = (some,)
        executor._init_args_hst = lambda args, options: (
            [address(arg) for arg in args], {k: address(arg) for k, arg in options.items()})
        executor._restore_args_dev = lambda *_: None
        with patch.multiple(builder, create_masked_load=load, create_masked_store=store,
                            create_dot=dot, set_grid_idx=choose,
                            set_grid_dim=lambda *_: setattr(builder, "grid_dim", (count, 1, 1))):
            run(executor, *args, **options)
        all_of = count / some
        self.add(executor.fn.__name__, count, flops=flops * all_of,
                 asked=sum(sum(each.values()) for each in touched.values()) * all_of,
                 **{kind: sum(min(moved * all_of, sizes[tensor]) for tensor, moved in each.items())
                    for kind, each in touched.items()})


class Held(TorchDispatchMode):
    """The most bytes that tensors made while it is active held at once."""

    def __init__(self, inputs):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for storage in (tensor.untyped_storage() for tensor in tensors((out,))):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())
        return out

    def remove(self, storage, size):
        self.known.remove(storage)
        self.now -= size


class Address:
    """A tensor in the interpreter's eyes."""

    def __init__(self, dtype, at):
        self.dtype, self.at = dtype, at

    def data_ptr(self):
        return self.at


def tensors(values):
    for item in values:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from tensors(item)


def held(tensor):
    """Bytes of a tensor's elements in memory."""
    lengths = [length for length, stride in zip(tensor.shape, tensor.stride()) if stride]
    return int(np.prod(lengths, dtype=np.int64)) * tensor.element_size()


@contextlib.contextmanager
def launching(mode, launch):
    """Operators on meta tensors go to their Triton launchers, in `mode`; kernels to `launch`."""
    library = torch.library.Library("fastmix", "IMPL")

    def watched(launcher):
        def call(*args):
            with mode:
                return launcher(*args)

        return call

    for operator in _triton.KERNELS:
        for suffix, launcher in zip(("", "_backward"), _triton.forced(operator, "meta")):
            library.impl(f"{operator}{suffix}", watched(launcher), "Meta", allow_override=True)
    try:
        with patch.object(interpreter.GridExecutor, "__call__", launch):
            yield
    finally:
        library._destroy()


@contextlib.contextmanager
def counting():
    """Yields the Count of what Triton's kernels do on meta tensors."""
    count = Count()
    run = interpreter.GridExecutor.__call__
    # In one part: of a tensor that a kernel reads a part of, all of it would count as once.
    with launching(count, lambda executor, *args, **options:
                   count.launch(executor, run, args, options)), \
            patch.object(windowed_sgu, "SCRATCH", 1 << 62), \
            patch.object(interpreter.ScanOps, "apply_impl", lambda scan, x: x):
        yield count


def held_at_peak(build, *shape):
    """Bytes beside the inputs: ours, and the original's or None."""
    meta = torch.device("meta")
    with meta:
        contest = rows.Contest(build(*shape), torch.float32, meta)
    ours = Held((*contest.inputs, contest.incoming))
    with launching(ours, lambda *_, **__: None), ours:
        contest.ours(None).forward_backward()
    original = Held((*contest.inputs, contest.incoming))
    try:
        with meta, original:
            contest.original(torch.float32).forward_backward()
    except ImportError:  # the original is not installed
        return ours.peak, None
    return ours.peak, original.peak


def measure(build, batch, n, dim, heads, dtype):
    """A row for each of forward and forward with backward."""
    meta = torch.device("meta")
    with meta:
        case = build(batch, n, dim, heads)
        contest = rows.Contest(case, getattr(torch, dtype), meta)
    measured = []
    for mode, (floor_bytes, floor_flops) in case.necessary(contest.inputs).items():
        with counting() as count:
            getattr(contest.ours(None), mode)()
        measured.append(dict(
            row=case.row, batch=batch, n=n, dtype=dtype, mode=mode,
            elements=contest.incoming.numel(), floor_bytes=floor_bytes, floor_flops=floor_flops,
            moved=sum(work["read"] + work["written"] for work in count.work.values()),
            flops=sum(work["flops"] for work in count.work.values()), work=count.work))
    measured[-1]["held"], measured[-1]["original_held"] = held_at_peak(build, batch, n, dim, heads)
    return measured


def all_of(shapes, dtype):
    measured = []
    for *shape, names in shapes:
        for build in (build for name in names for build in operators.ROWS[name]):
            if build is operators.gate_loop and shape[2] == shape[3]:
                continue  # the diagonal row already
            print(build.__name__, *shape, file=sys.stderr, flush=True)
            measured += measure(build, *shape, dtype)
    return measured


# ---- what is printed

def per_element(*keys):
    return lambda row, _: f"{sum(row[key] for key in keys) / row['elements']:.2f}"


def over(ours, floor):
    return lambda row, _: f"{row[ours] / row[floor]:.2f}" if row[floor] else "–"


def megabytes(key):
    return lambda row, _: f"{row[key] / 1e6:.0f}" if row.get(key) else "–"


def text(measured, copy_gb_s, matmul_gflop_s):
    def time(moved, flops):
        return max(moved / copy_gb_s, flops / matmul_gflop_s) / 1e3

    kernels = [dict(row, kernel=kernel, **work) for row in measured
               for kernel, work in row["work"].items()]
    for row in kernels:
        row["us"] = time(row["read"] + row["written"], row["flops"])
    for row in measured:
        row["us"] = sum(kernel["us"] for kernel in kernels if kernel["work"] is row["work"])
        row["floor_us"] = time(row["floor_bytes"], row["floor_flops"])
    kernels = [row for row in kernels if row["us"] >= 0.05]
    who = [("operator", lambda row, _: row["row"]),
           ("shape", lambda row, _: f"{row['batch']}×{row['n']}"),
           ("", lambda row, _: {"forward": "fwd"}.get(row["mode"], "fwd+bwd"))]
    whole = [*who, ("B/element", per_element("moved")), ("floor", per_element("floor_bytes")),
             ("× floor", over("moved", "floor_bytes")),
             ("flops × floor", over("flops", "floor_flops")),
             ("µs", lambda row, _: f"{row['us']:.0f}"),
             ("floor µs", lambda row, _: f"{row['floor_us']:.0f}"),
             ("MB", megabytes("held")), ("original MB", megabytes("original_held"))]
    parts = [*who, ("kernel", lambda row, _: row["kernel"]),
             ("programs", lambda row, _: str(row["programs"])), ("read", per_element("read")),
             ("written", per_element("written")), ("asked", per_element("asked")),
             ("flops", per_element("flops")), ("µs", lambda row, _: f"{row['us']:.1f}")]
    return "\n\n".join([
        table.grid(measured, whole, None, False), table.grid(kernels, parts, None, False),
        f"{measured[0]['dtype']}; bytes and flops of matrix products, for each element of the "
        "result; every tensor of a kernel counts\nonce, `asked` are all loads and stores. Times "
        f"are at {copy_gb_s:.0f} GB/s and {matmul_gflop_s / 1e3:.0f} TFLOP/s, kernels one after "
        "another.\n"
        "MB are held at its peak, beside the inputs, by a training step in float32."])


def worse(measured, known):
    """Lines that say which of `measured` does more than the committed table."""
    who = ("row", "batch", "n", "dtype", "mode")
    known = {tuple(row[key] for key in who): row for row in known}
    lines = []
    for row in measured:
        before = known.get(tuple(row[key] for key in who))
        name = " ".join(str(row[key]) for key in who)
        if before is None:
            lines.append(f"{name}: not in the table, write it again")
        else:
            lines += [f"{name}: {key} {before[key]} -> {row[key]}"
                      for key in ("moved", "flops", "held")
                      if key in row and row[key] > 1.001 * before[key]]
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=_triton.KERNELS, help="at the shape of")
    for flag, default in (("--batch", 8), ("--seq", 4096), ("--dim", 1024), ("--heads", 16)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--check", action="store_true")
    # What an H200 copies and multiplies in bfloat16.
    parser.add_argument("--copy-gb-s", type=float, default=4300)
    parser.add_argument("--matmul-gflop-s", type=float, default=790e3)
    options = parser.parse_args(argv)
    if options.check:
        lines = worse(all_of(SHORT, "bfloat16"), json.loads(TABLE.read_text())["rows"])
        print("\n".join(lines) or "none moves or multiplies more than the table says")
        return bool(lines)
    if options.ops:
        shape = options.batch, options.seq, options.dim, options.heads, options.ops
        measured = all_of([shape], options.dtype)
    else:
        measured = all_of(SHAPES, "bfloat16")
        known = {"rows": measured + all_of(SHORT, "bfloat16")}
        TABLE.write_text(table.lines_of_json(known))
    print(text(measured, options.copy_gb_s, options.matmul_gflop_s))
    return 0


if __name__ == "__main__":
    sys.exit(main())
