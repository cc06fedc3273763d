"""Random calls of every operator for tests/campaign.py: how they are drawn, run and judged.

A call is drawn from a seed and an index alone. Most are valid: their values and gradients are held
against the definition in float64. The others have something wrong, and must be refused in words.
"""

import contextlib
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from cases import as_tuple, complex_dtype, randn, random_decays, state_dtype, weigh
from fastmix import ops, states

F64 = torch.float64
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REFUSALS = (TypeError, ValueError, RuntimeError)


@dataclass
class Call:
    """One call of `operator`; `wrong` says what was made wrong with it, if anything was."""

    operator: str
    dtype: torch.dtype
    tensors: dict
    options: dict
    mode: str = "plain"
    wrong: str | None = None
    odd: list = field(default_factory=list)  # tensors with unusual values
    uneven: bool = False  # numbers of very different sizes, or some that are not finite
    seed: int = 0
    pieces: tuple | None = None  # where the second and further pieces begin, if it is done in any
    between: Callable | None = None  # what is done to each state on its way to the next piece
    huge: tuple = ()  # tensors whose elements lie gigabytes apart
    wanted: tuple = ()  # tensors whose gradient is asked for
    move: Callable | None = None  # changes the gradients that come back

    def __str__(self):
        given = [f"{name}={_described(t)}" for name, t in self.tensors.items() if t is not None]
        given += [f"{name}={value!r}" for name, value in self.options.items()]
        about = [self.mode, *self.odd, *([self.wrong] if self.wrong else [])]
        if self.pieces is not None:
            about += [f"in pieces from {self.pieces}", *(
                [self.between.__name__] if self.between else [])]
        return f"{self.operator}({', '.join(given)}) {', '.join(about)}"


def _described(value):
    if not isinstance(value, torch.Tensor) or value.is_nested:
        return repr(value)[:40]
    about = f"{str(value.dtype)[6:]}{list(value.shape)}"
    return about + f"/{list(value.stride())}" if value.layout == torch.strided and not (
        value.is_contiguous()) else about


# ---- arguments


def size(most):
    if zero_sizes and random.random() < 0.3:
        return 0
    most = max(most, 1)
    return random.choice([1, 2, 3, random.randint(1, most), random.randint(1, most)])


zero_sizes: list = []  # has an element while sizes may be 0


def maybe(make):
    return make() if random.random() < 0.5 else None


def scan_arguments(b, n, dtype):
    rest = [size(6) for _ in range(random.randrange(4))]
    gates_of = [1 if random.random() < 0.2 else r for r in rest[: random.randint(0, len(rest))]]
    real = (dtype, dtype) if random.random() < 0.5 else random.choice(
        [(dtype, complex_dtype(dtype)), (complex_dtype(dtype), dtype), (complex_dtype(dtype),) * 2])
    states = torch.promote_types(*real)
    return {"gates": 0.9 * randn(b, n, *gates_of, dtype=real[0]).sgn(),
            "inputs": randn(b, n, *rest, dtype=real[1]),
            "initial_state": maybe(lambda: randn(b, *rest, dtype=states))}, {
                "reverse": random.random() < 0.5}


def gate_loop_arguments(b, n, dtype):
    dk, dv = (1, 1) if random.random() < 0.4 else (size(20), size(20))
    h = size(20) if dk * dv == 1 else size(3)
    made = {"q": randn(b, n, h, dk, dtype=dtype), "k": randn(b, n, h, dk, dtype=dtype),
            "v": randn(b, n, h, dv, dtype=dtype)}
    wide = random.choice([dtype, state_dtype(dtype)])
    kind = random.choice(["complex", "logits", "real", "decays", "real logits"])
    if kind == "complex":
        made["gates"] = 0.9 * randn(b, n, h, dtype=complex_dtype(dtype)).sgn()
    elif kind == "logits":
        # Not near 0, where the gradient has a pole.
        angle = 6.3 * torch.rand(b, n, h, dtype=F64)
        logits = torch.view_as_real(torch.polar(0.3 + 3 * torch.rand(b, n, h, dtype=F64), angle))
        made["gate_logits"] = logits.to(wide)
    elif kind == "real logits":
        made["gate_logits"] = 3 * randn(b, n, h, dtype=wide)
    else:
        made["gates"] = random_decays(*(b, n, h) if kind == "real" else (h,), dtype=wide)
    states = (complex_dtype if kind in ("complex", "logits") else state_dtype)(dtype)
    made["initial_state"] = maybe(lambda: randn(b, h, dk, dv, dtype=states))
    return made, {"return_state": random.random() < 0.5}


def decay_arguments(b, n, dtype):
    h, d = size(6), size(20)
    wide = random.choice([dtype, state_dtype(dtype)])
    return {"x": randn(b, n, h, d, dtype=dtype), "decay": (2 * torch.rand(h) - 1).to(wide),
            "gain": maybe(lambda: randn(h, dtype=wide)),
            "initial_state": maybe(lambda: randn(b, h, d, dtype=state_dtype(dtype)))}, {
                "return_state": random.random() < 0.5}


def fft_arguments(b, n, dtype):
    h, d, m = size(4), size(20), size(2 * n)
    revealed = random.random() < 0.3
    shape = (b, n, h) if revealed else (m, h) if random.random() < 0.5 else (b, m, h)
    wide = random.choice([dtype, state_dtype(dtype)])
    return {"x": randn(b, n, h, d, dtype=dtype), "kernel": randn(*shape, dtype=wide),
            "skip": maybe(lambda: randn(h, d, dtype=wide))}, {"revealed": True} if revealed else {}


def sgu_arguments(b, n, dtype, whole):
    h, d = size(4), 2 + size(12)  # a norm of two channels has no gradient but rounding
    c = h * d
    w = n + random.randrange(3) if whole else size(12)
    wide = random.choice([dtype, state_dtype(dtype)])
    return {"x": randn(b, n, 2 * c, dtype=dtype),
            "weight": randn(h, w, w if whole else 2 * w, dtype=wide) / w,
            "bias": randn(h, w, dtype=wide),
            "norm_weight": maybe(lambda: randn(c, dtype=wide)),
            "norm_bias": maybe(lambda: randn(c, dtype=wide)),
            "gate_residual": maybe(lambda: randn(b, n, c, dtype=dtype))}, {
                # A callable is applied to what was rounded already.
                "activation": random.choice([None, "tanh", "sigmoid", "gelu", "silu", *(
                    [torch.sin] if wide == dtype in (F64, torch.float32) else [])]),
                "eps": random.choice([1e-5, 1e-5, 1e-3, 1.0])}


ARGUMENTS = {
    "linear_scan": scan_arguments, "gate_loop": gate_loop_arguments,
    "decay_conv": decay_arguments, "fft_conv": fft_arguments,
    "windowed_sgu": lambda *a: sgu_arguments(*a, whole=False),
    "causal_sgu": lambda *a: sgu_arguments(*a, whole=True),
    "cumulative_mean": lambda b, n, dtype: (
        {"x": randn(b, n, *[size(12) for _ in range(random.randrange(4))], dtype=dtype)}, {})}


def restride(t):
    """The same values with other strides: slices, stride 0, other orders of axes, odd offsets, and
    of axes of one element any number."""
    kind = random.randrange(8)
    if kind < 2 or t.ndim == 0:
        return t
    axis = random.randrange(t.ndim)
    if kind == 2:
        pad = torch.full_like(t.narrow(axis, 0, min(1, t.shape[axis])), float("nan"))
        return torch.cat([pad, t, pad], dim=axis).narrow(axis, pad.shape[axis], t.shape[axis])
    if kind == 3:
        return torch.stack([t, torch.full_like(t, float("nan"))], dim=-1)[..., 0]
    if kind == 4:
        return t.narrow(axis, 0, 1).expand_as(t) if t.shape[axis] else t
    if kind == 5:
        return torch.cat([t.new_ones(1), t.flatten()])[1:].view_as(t)
    if kind == 6:
        return t.as_strided(t.shape, [random.choice([0, 1, 2**31 + 1, 2**58]) if size == 1 else
                                      stride for size, stride in zip(t.shape, t.stride())])
    return other_order(t, axis)


def other_order(t, axis=-1):
    """The same values, with two axes the other way round in memory."""
    return t.transpose(0, axis).contiguous().transpose(0, axis) if t.ndim else t


def far_apart(t, axis):
    """The same values, neighbours on an axis more than 2³¹ elements from one another: a file that
    has nothing between them."""
    stride = 2**31 + 3
    with tempfile.NamedTemporaryFile() as file:
        memory = torch.from_file(file.name, shared=True, dtype=t.dtype,
                                 size=stride * (t.shape[axis] - 1) + t.numel())
    strides = list(t.select(axis, 0).contiguous().stride())
    strides.insert(axis, stride)
    return memory.as_strided(t.shape, strides).copy_(t)


def conjugate(t):
    return t.conj() if t.is_complex() else (1j * t.to(torch.promote_types(
        t.dtype, torch.float32))).conj().imag if t.dtype in (F64, torch.float32) else t


ODD = {
    "large": lambda t, i: t.mul_(10.0 ** random.choice([4, 10, 20, 30])),
    "small": lambda t, i: t.mul_(10.0 ** -random.choice([4, 10, 20, 30, 37, 40])),
    "zero": lambda t, i: t.zero_(),
    "ones": lambda t, i: t.fill_(1),
    "one zero": lambda t, i: t[i].zero_(),
    "one large": lambda t, i: t[i].mul_(10.0 ** random.choice([4, 10, 20, 30])),
    "one small": lambda t, i: t[i].mul_(10.0 ** -random.choice([10, 20, 30, 40])),
    "nan": lambda t, i: t[i].fill_(float("nan")),
    "inf": lambda t, i: t[i].fill_(float("inf")),
    "-inf": lambda t, i: t[i].fill_(-float("inf")),
}


def make_odd(call):
    """Unusual values in one or two tensors, at a step or everywhere."""
    names = [name for name, t in call.tensors.items() if t is not None and t.numel()]
    for name in random.sample(names, min(len(names), random.choice([1, 1, 2]))):
        t = call.tensors[name] = call.tensors[name].clone()
        kind = random.choice(list(ODD))
        call.odd.append(f"{kind} {name}")
        call.uneven |= kind not in ("zero", "ones", "one zero")
        index = (slice(None),) * (t.ndim > 2) + (random.randrange(t.shape[1 if t.ndim > 2 else 0]),)
        ODD[kind](t, index)


# ---- what is wrong


def _another_type(t):
    return random.choice([None, 1, 2.5, "x", t.tolist, t.shape, [t], object()])


def _another_dtype(t):
    return t.to(random.choice([torch.int64, torch.bool, torch.int8, torch.complex64,
                               torch.complex128, torch.complex32, *DTYPES, torch.float8_e5m2]))


def _another_shape(t, axis=None):
    axis = random.randrange(t.ndim) if axis is None else axis
    return random.choice([
        lambda: t[..., None], lambda: t[None], lambda: t.select(axis, 0), lambda: t.flatten(),
        lambda: torch.cat([t, t], dim=axis), lambda: t.narrow(axis, 0, 0), lambda: t.sum(),
        lambda: t.narrow(axis, 0, t.shape[axis] - 1)])()


def _another_layout(t):
    return random.choice([
        lambda: t.to_sparse(), lambda: t.flatten(1).to_sparse_csr(),
        lambda: torch.nested.nested_tensor([t, t]), lambda: t.float().to_mkldnn(),
        lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        lambda: t.to("meta"), lambda: t.to("meta")])()


def _another_state(call):
    """A state that another call left, of another operator, or of this one and of more rows."""
    operator = random.choice([call.operator, *ARGUMENTS])
    tensors, options = ARGUMENTS[operator](4, size(6), call.dtype)
    _, state = getattr(ops, operator)(**tensors, **options | {"return_state": True})
    parts = state if isinstance(state, tuple) else (state,)
    return random.choice([state, parts, parts[0], list(parts), [state]])


def spoiled(call):
    """A function that makes something wrong with one tensor of a state, or with how many steps of
    causal_sgu there were."""
    def spoil(state):
        random.seed(call.seed)
        return spoil_in(state)

    def spoil_in(state):
        places = [i for i, part in enumerate(state) if part is not None and len(part)]
        if not places:  # a batch of 0
            return state
        i = random.choice(places)
        part = state[i]
        if isinstance(part, tuple):
            part = spoil_in(part) if random.random() < 0.9 else [part]
        elif call.operator == "causal_sgu" and random.random() < 0.2:
            i, part = 1, state.steps + call.tensors["weight"].shape[-1]
        else:  # the batch: how many steps a state of fft_conv holds it says itself
            make = random.choice([_another_type, _another_dtype, _another_layout,
                                  lambda t: _another_shape(t, 0)])
            with contextlib.suppress(RuntimeError, IndexError, NotImplementedError):
                part = make(part)
        parts = [*state[:i], part, *state[i + 1 :]]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)

    return spoil


OPTIONS = {
    "reverse": [None, 2, "x", 0.5, torch.tensor(True)], "return_state": [None, "x", 2],
    "revealed": [None, "x", 2], "in_place": [None, "x", 2],
    "eps": [None, "x", -1.0, float("nan"), float("inf"), 0, 0.0, torch.tensor(1e-5), True, 1j],
    "activation": ["relu", 3, "none", b"gelu", torch.relu, ["gelu"]],
    "initial_state": [1.0, torch.tensor(1.0), (), object()], "surprise": [1]}
# States that no tensor argument stands for
OBJECTS = {"fft_conv": ("initial_state", "return_state", "revealed"),
           **dict.fromkeys(("windowed_sgu", "causal_sgu"),
                           ("initial_state", "return_state", "in_place")),
           "cumulative_mean": ("initial_state", "return_state"), "linear_scan": ("return_state",)}
TUPLES = tuple(name for name, options in OBJECTS.items() if "initial_state" in options)


def make_wrong(call):
    """Something that does not fit, in one place."""
    name = random.choice([name for name, t in call.tensors.items() if t is not None])
    t = call.tensors[name]
    kind = random.randrange(9)
    if kind == 8 and call.operator in TUPLES and call.tensors["x"].shape[1] > 1 and not call.uneven:
        call.pieces = call.pieces or (random.randrange(1, call.tensors["x"].shape[1]),)
        call.wrong, call.between = "spoiled state", spoiled(call)
        return
    call.pieces, kind = None, kind % 8
    if kind == 7:
        call.wrong = "sizes of 0"
        zero_sizes.append(True)
        call.tensors, call.options = ARGUMENTS[call.operator](size(3), size(6), call.dtype)
        zero_sizes.clear()
        return
    if kind == 6:
        call.wrong = "another state"
        call.tensors.pop("initial_state", None)
        call.options["initial_state"] = _another_state(call)
        return
    if kind == 5:
        name = random.choice([*call.options, *OBJECTS.get(call.operator, ()), "surprise"])
        call.options[name] = random.choice(OPTIONS[name])
        call.wrong = f"option {name}"
        return
    if kind == 4:
        call.wrong = f"without {name}"
        del call.tensors[name]
        return
    make = (_another_type, _another_dtype, _another_shape, _another_layout)[kind]
    with contextlib.suppress(RuntimeError, IndexError, NotImplementedError):
        call.tensors[name] = make(t)
    call.wrong = f"{make.__name__[1:]} of {name}"


# ---- drawing


MODES = ("plain",) * 20 + (
    "no_grad", "inference", "vmap", "vmap", "grad", "jvp", "vmap of grad", "checkpoint", "second",
    "autocast", "fake", "meta", "threads", "saved on cpu", "backward twice", "hooks", "vjp",
    "vmap of vmap", "vmap over the last", "grad of vmap", "forward mode")
AS_PLAIN = ("checkpoint", "autocast", "threads", "saved on cpu", "backward twice", "hooks")
WITHOUT_GRADIENTS = ("no_grad", "inference")
# The arguments with a time axis, of calls in pieces
TIMED = {"linear_scan": ("gates", "inputs"), "gate_loop": ("q", "k", "v", "gates", "gate_logits"),
         "decay_conv": ("x",), "cumulative_mean": ("x",), "windowed_sgu": ("x", "gate_residual"),
         "causal_sgu": ("x", "gate_residual"), "fft_conv": ("x", "kernel")}
# What a state goes through unharmed, on its way from piece to piece


def strided(state):
    return tree_map_only(torch.Tensor, other_order, state)


def chosen(state):
    return states.select_rows(state, slice(None))


def joined(state):
    parts = [states.select_rows(state, rows) for rows in (slice(1), slice(1, None))]
    b = len(tree_leaves(state)[0])
    return states.concatenate(parts, (min(b, 1), max(b - 1, 0)))


def in_rows(state):
    """Rows of fft_conv that are at one step, as if they were not."""
    return states.FFTConvRows(tuple(states.select_rows(state, rows) for rows in (
        slice(1), slice(1, None)))) if isinstance(state, states.FFTConvState) else state


def drawn(kind, operator, seed, index, most):
    """A call, of class `kind`."""
    random.seed(f"{seed}:{index}")
    torch.default_generator.manual_seed(random.getrandbits(62))
    dtype = random.choice(DTYPES)
    b, n = random.choice([0, 1, 1, 2, 2, 3]), size(most)
    if random.random() < 0.03:
        n = random.randint(64, 160)
    tensors, options = ARGUMENTS[operator](b, n, dtype)
    call = kind(operator, dtype, tensors, options, random.choice(MODES),
                seed=random.getrandbits(62))
    present = [name for name, t in tensors.items() if t is not None]
    call.wanted = tuple(present if random.random() < 0.6 else random.sample(
        present, random.randint(1, len(present))))
    if random.random() < 0.15:
        draw_pieces(call, n)
    if random.random() < 0.3:
        make_odd(call)
    if operator == "fft_conv" and not all(
            t is None or t.isfinite().all() for t in tensors.values()):
        call.pieces = None  # what lags beyond n make of x is in the state: 0 · NaN is NaN
    if call.uneven and callable(options.get("activation")):
        options["activation"] = None  # the sine of a large number is its rounding
    for name in present:
        t = restride(call.tensors[name])
        call.tensors[name] = conjugate(t) if random.random() < 0.05 else t
        axes = [axis for axis in range(t.ndim) if t.shape[axis] in (2, 3)]
        if axes and t.numel() and random.random() < 0.01:
            call.tensors[name] = far_apart(t, random.choice(axes))
            call.huge += (name,)
    if random.random() < 0.3:
        call.mode = "plain"
        make_wrong(call)
    return call


def draw_pieces(call, n):
    """Where the call is cut: into few pieces, or after every step."""
    call.pieces = tuple(sorted(random.sample(
        range(1, n), min(n - 1, random.choice([1, 1, 2, 4, n])))))
    call.between = random.choice([None, None, strided, chosen, joined, in_rows])
    if random.random() < 0.3:  # steps without gradients have kernels of their own
        call.mode = random.choice(WITHOUT_GRADIENTS)
    if call.mode in WITHOUT_GRADIENTS and call.operator.endswith("sgu"):
        call.options["in_place"] = random.random() < 0.5
    elif call.dtype != state_dtype(call.dtype):  # autograd adds up other gradients in 16 bits
        call.wanted = tuple(name for name in call.tensors if is_timed(call, name))
        if call.operator.endswith("sgu"):  # and that of x, which goes into outputs and the state
            call.pieces = None
        if call.operator == "linear_scan" and call.mode == "autocast":
            call.mode = "plain"  # its later pieces are promoted to the dtype of the state


# ---- running


def weights_of(call, outputs):
    """The gradients that come back: the same numbers for every implementation and dtype."""
    made = []
    for i, o in enumerate(outputs):
        phase = 1.7 * torch.arange(o.numel(), dtype=F64).reshape(o.shape) + call.seed % 1000 + i
        weight = torch.polar(1 + phase.sin() / 2, phase) if o.is_complex() else 1.4 * phase.sin()
        weight = settle(weight, call.dtype).to(o)
        made.append(call.move(weight) if call.move else weight)
    return made


def is_timed(call, name):
    """Decays, gates of one axis, have no time, nor have kernels that are known beforehand."""
    t = call.tensors[name]
    return name in TIMED[call.operator] and t is not None and t.ndim > 1 and (
        name != "kernel" or "revealed" in call.options)


def in_pieces(function, call):
    """The same function of the whole sequence, done in pieces, from state to state."""
    n = call.tensors[TIMED[call.operator][0]].shape[1]
    reverse = call.options.get("reverse")

    def run(initial_state=None, return_state=False, **given):
        outs, state = [], initial_state
        for begin, end in pairwise((0, *call.pieces, n)):
            at = slice(n - end, n - begin) if reverse else slice(begin, end)
            piece = {name: t[:, at] if name in call.tensors and is_timed(call, name) else t
                     for name, t in given.items()}
            if begin and call.between:
                state = call.between(state)
            out, state = function(**piece, initial_state=state, return_state=True)
            outs.append(out)
        with torch.autocast("cpu", enabled=False):  # where torch joins no float16
            out = torch.cat(outs[::-1] if reverse else outs, 1)
        return (out, state) if return_state else out

    return run


def evaluate(function, call, tensors, mode):
    """{what: tensor}, of outputs, and of gradients or tangents in that mode."""
    call_with = {name: t for name, t in tensors.items() if t is not None}

    def run(*values):
        given = call_with | dict(zip(call.wanted, values))
        return as_tuple(function(**given, **call.options))

    values = [call_with[name] for name in call.wanted]
    results = transformed(run, call, values, mode)
    return backward(run, call, values, mode) if results is None else results


def transformed(run, call, values, mode):
    """The results in a mode that runs no backward of autograd's around the call; None in others."""
    def loss(*values):
        outputs = run(*values)
        return weigh(outputs, weights_of(call, outputs))

    argnums = tuple(range(len(values)))
    if mode == "no_grad":
        with torch.no_grad():
            return named(run(*values))
    if mode == "inference":
        with torch.inference_mode():
            return named(run(*values))
    if mode == "grad":
        return named((), torch.func.grad(loss, argnums)(*values), call.wanted)
    if mode == "jvp":
        tangents = weights_of(call, values)
        # Torch's forward mode wants no stride of 0, not even that of a single number.
        values = [v.clone(memory_format=torch.contiguous_format) for v in values]
        outputs, moved = torch.func.jvp(run, tuple(values), tuple(tangents))
        return named(outputs) | {f"tangent of {i}": t for i, t in enumerate(moved)}
    if mode == "vmap of grad":
        return named((), torch.vmap(torch.func.grad(loss, argnums))(*map(two_of, values)),
                     call.wanted)
    if mode == "grad of vmap":
        def total(*values):
            outputs = torch.vmap(run)(*values)
            return weigh(outputs, weights_of(call, outputs))

        return named((), torch.func.grad(total, argnums)(*map(two_of, values)), call.wanted)
    if mode == "vjp":
        outputs, pull = torch.func.vjp(run, *values)
        return named(outputs, pull(tuple(weights_of(call, outputs))), call.wanted)
    if mode == "forward mode":
        tangents = weights_of(call, values)
        with forward_ad.dual_level():
            outputs = run(*(forward_ad.make_dual(v.clone(memory_format=torch.contiguous_format), t)
                            for v, t in zip(values, tangents)))
            primals, moved = zip(*(forward_ad.unpack_dual(o) for o in outputs))
            return named(primals) | {f"tangent of {i}": torch.zeros_like(p) if t is None else t
                                     for i, (p, t) in enumerate(zip(primals, moved))}
    return None


def backward(run, call, values, mode):
    """The results in a mode that ends in autograd's backward."""
    called = []
    values, outputs = differentiable(run, [v.detach() for v in values], mode, called)
    weights = weights_of(call, outputs)
    reached = [i for i, o in enumerate(outputs) if o.requires_grad]
    if mode == "threads":
        # A new thread takes on torch's number of threads when something first asks for it. A
        # transform does not ask, and has other last bits on another number of threads.
        with ThreadPoolExecutor(3, initializer=torch.get_num_threads) as pool:
            for others in pool.map(lambda _: run(*values), range(3)):
                for o, other in zip(outputs, others):
                    assert torch.equal(bits(o), bits(other)), "three callers at once, other bits"
    if mode == "second":
        grads = torch.autograd.grad([outputs[i] for i in reached], values,
                                    [weights[i] for i in reached], create_graph=True)
        total = weigh(grads, weights_of(call, grads))
        # Linear in some tensors: nothing comes back to those.
        grads = torch.autograd.grad(total, values, allow_unused=True, materialize_grads=True) if (
            total.requires_grad) else [torch.zeros_like(v) for v in values]
        return named(outputs, grads, call.wanted)
    if mode == "backward twice":
        torch.autograd.grad(outputs, values, weights, retain_graph=True)
    if mode == "hooks":
        weights = [other_order(w) for w in weights]
    grads = torch.autograd.grad(
        [outputs[i] for i in reached], values, [weights[i] for i in reached])
    if mode == "hooks":
        assert len(called) == len(values), f"{len(called)} of {len(values)} hooks were called"
    return named(outputs, grads, call.wanted)


def differentiable(run, values, mode, called):
    """The values as leaves, and the outputs of that mode. Hooks of leaves note in `called` that
    they were."""
    if mode == "vmap":
        values = [two_of(v) for v in values]
        run = torch.vmap(run)
    elif mode == "vmap of vmap":
        values = [two_of(two_of(v)) for v in values]
        run = torch.vmap(torch.vmap(run))
    elif mode == "vmap over the last":
        # out_dims stays 0: an output that no mapped argument reaches, as gate_loop's state where
        # q alone is mapped, torch expands without the axis (its issue 178425).
        values = [torch.stack([v, -v], -1) for v in values]
        run = torch.vmap(run, in_dims=-1)
    values = [v.requires_grad_() for v in values]
    if mode == "hooks":
        for v in values:
            v.register_hook(lambda grad: called.append(grad.shape))
        with torch.autograd.graph.saved_tensors_hooks(other_order, lambda t: t):
            return values, run(*values)
    if mode == "checkpoint":
        return values, checkpoint(run, *values, use_reentrant=False)
    if mode == "saved on cpu":
        with torch.autograd.graph.save_on_cpu():
            return values, run(*values)
    if mode == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return values, run(*values)
    return values, run(*values)


def bits(t):
    # Cloned, because an axis of one number may have any stride, and be called contiguous.
    return t.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def two_of(t):
    return torch.stack([t, -t])


def named(outputs, grads=(), names=()):
    made = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return made | {f"gradient of {name}": g.detach() for name, g in zip(names, grads)}


def settle(t, dtype):
    """A plain copy in the precision of dtype."""
    return t.detach().resolve_conj().resolve_neg().to(
        complex_dtype(dtype) if t.is_complex() else dtype, copy=True).contiguous()


def storage(t):
    """A tensor that shows all bytes of the memory that t is part of."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def performed(call):
    """The call in fastmix: its results, or the error it raised. AssertionError for what it must
    not do whatever the implementation."""
    plain = {name: t for name, t in call.tensors.items()
             if isinstance(t, torch.Tensor) and type(t) is torch.Tensor
             and t.layout == torch.strided and t.device.type == "cpu" and not t.is_quantized
             and not t.is_nested}
    shown = {name: t if name in call.huge else storage(t) for name, t in plain.items()}
    before = {name: t.clone() for name, t in shown.items()}
    function = getattr(ops, call.operator)
    if call.pieces is not None:
        function = in_pieces(function, call)
    try:
        if call.wrong:
            return named(as_tuple(function(**call.tensors, **call.options)))
        if call.mode in ("fake", "meta"):
            return elsewhere(function, call)
        return evaluate(function, call, call.tensors, call.mode)
    except REFUSALS as error:
        return error
    finally:
        for name, t in shown.items():
            assert torch.equal(bits(t), bits(before[name])), f"{name} was modified"


def elsewhere(function, call):
    """Shapes and dtypes, forward and backward, of tensors without memory."""
    with FakeTensorMode() if call.mode == "fake" else contextlib.nullcontext() as fake:
        tensors = {name: t if t is None else fake.from_tensor(t) if fake else t.to("meta")
                   for name, t in call.tensors.items()}
        return evaluate(function, call, tensors, "plain")
