"""What a call launched, kept for the next one like it.

Between a call of an operator and its first kernel lie a hundred microseconds of Python and more:
views, strides, tiles and flags of each launch, and in Triton the key of its compiled kernel. All of
it follows from how the tensors lie in memory, so the second call of a kind is noted, and later
ones are launched from the notes: which tensors are made, torch's operations between kernels, and of
each kernel what was compiled, its grid, and its arguments, of which only the pointers are new.
Scratch memory, which no result and no operation of torch's lies in, is made in one piece, and kept
until the call ends.

A kind is the operator and all that Triton compiles kernels apart for, and more: sizes, strides,
dtypes and devices of all tensors, whether they begin at a multiple of 16 bytes, and the other
arguments. Launch choices belong to the process: whoever changes a LAUNCH table calls `forget`.
Streams are the callers', and so are the hooks of Triton's profiler. While a CUDA graph is captured
calls are launched from notes, but none are taken, as kernels are neither compiled nor tried then.
On GPUs that are not NVIDIA's, and with a version of Triton that is not in VERSIONS, every call
takes the long way; `python -m fastmix.env` says so of the latter.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmix._triton import trial

# Of Triton: their CompiledKernel[grid] launches a kernel with a value for every parameter of its
# function, constants too, and takes pointers as integers.
VERSIONS = ("3.6", "3.7", "3.9")
MULTIPLYING = ("gate_loop", "windowed_sgu")  # operators: how, torch's switch of precision says
MOST = 256  # plans, and kinds of calls that were seen

plans: dict[tuple, "Plan | None"] = {}  # None: there can be none for calls of this kind
_seen: dict[tuple, None] = {}
_lock = threading.Lock()
_thread = threading.local()  # notes: those that are being taken

_aten = torch.ops.aten
_EMPTY = {_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default,
          _aten.new_empty.default, _aten.new_empty_strided.default}


def kind_of(operator: str, direction: str, args: Sequence[Any]) -> tuple:
    """What decides how a call is launched."""
    tf32 = operator in MULTIPLYING and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return (operator, direction, tf32,
            *[(a.shape, a.stride(), a.dtype, a.device, a.data_ptr() % 16, a.storage_offset() % 16)
              if isinstance(a, Tensor) else a for a in args])


def forget() -> None:
    """Has calls take the long way again, with launch choices that have changed."""
    with _lock:
        plans.clear()
        _seen.clear()


@functools.cache
def why_not() -> str | None:
    """Why this version of Triton gets no plans, or None."""
    import triton  # with the first kernel, not before

    if ".".join(triton.__version__.split(".")[:2]) in VERSIONS:
        return None
    return (f"how Triton {triton.__version__} launches kernels is not known, but only that of "
            f"{', '.join(VERSIONS)}: every call finds its kernels anew, in 0.1 to 1 ms")


def launch(kernel: Any, grid: tuple[int], *args: Any, **options: Any) -> None:
    """Launches a kernel of @triton.jit."""
    compiled = kernel[grid](*args, **options)
    notes = getattr(_thread, "notes", None)
    if notes is not None:
        notes.launched(kernel, grid, compiled, args, options)


def noted(kind: tuple, args: Sequence[Any], run: Callable[..., Any]) -> Any:
    """Returns run(*args), which is a call of this kind on the current device. After the second one
    there is a plan.
    """
    if kind in plans or not _may_note(args[0].device):
        return run(*args)
    with _lock:
        first = kind not in _seen
        _keep(_seen, kind, None)
    if first:
        return run(*args)
    # One tensor in two places is two tensors in another call of this kind.
    args = [a.detach() if isinstance(a, Tensor) else a for a in args]
    notes = _Notes(args)
    _thread.notes = notes
    try:
        with notes:
            results = run(*args)
    finally:
        _thread.notes = None
    if notes.compiled:
        plan = notes.plan(results)
        with _lock:
            _keep(plans, kind, plan)
    return results


def _may_note(device: torch.device) -> bool:
    from fastmix._triton import target  # with Triton

    return target.is_cuda() and why_not() is None and not trial._captures(device)


def _keep(found: dict, kind: tuple, value: Any) -> None:
    """Keeps it, in the place of the oldest where there are many."""
    if len(found) >= MOST and kind not in found:
        del found[next(iter(found))]
    found[kind] = value


class Plan:
    """What calls of one kind launch. `tensors` are those of the call, then those that are made."""

    def __init__(self, steps: list[Any], results: Any, hooks: list[list]) -> None:
        import triton

        self.steps, self.results, self.hooks = steps, _made_from(results), hooks
        self.knobs, self.driver = triton.knobs, triton.runtime.driver
        self.device = self.driver.active.get_current_device()
        self.state = self._state()

    def _state(self) -> tuple:
        """What Triton looks at when a kernel is launched, beside its arguments."""
        runtime, compilation = self.knobs.runtime, self.knobs.compilation
        return (runtime.debug, runtime.add_stages_inspection_hook,
                compilation.instrumentation_mode,
                getattr(compilation, "fpsan_homomorphic_casts", None))  # from 3.9 on

    def run(self, args: Sequence[Any]) -> Any:
        """Returns the results, or None if this call has to take the long way: Triton is to do more
        at a launch than when the plan was made, or new memory does not begin where it did.
        """
        if any(self.hooks) or self._state() != self.state:
            return None
        active = self.driver.active
        device = active.get_current_device()
        if device != self.device:
            with torch.cuda.device(args[0].device):
                return self.run(args)
        stream = active.get_current_stream(device)
        tensors = [a for a in args if isinstance(a, Tensor)]
        pointers = [t.data_ptr() for t in tensors]
        for step in self.steps:
            if not step(tensors, pointers, stream):
                return None
        return self.results(tensors)


# ---- where a tensor is: in which of a call's, and where there


class _Pointer(NamedTuple):
    place: int
    offset: int  # bytes

    def source(self, kept: list) -> str:
        return f"those[{self.place}] + {self.offset}"


class _View(NamedTuple):
    place: int
    layout: tuple | None  # sizes, strides and offset; None: whole

    def source(self, kept: list) -> str:
        if self.layout is None:
            return f"those[{self.place}]"
        kept.append(self._of)
        return f"kept[{len(kept) - 1}](those[{self.place}])"

    def _of(self, whole: Tensor) -> Tensor:
        assert self.layout is not None
        sizes, strides, offset = self.layout
        return whole.as_strided(sizes, strides, whole.storage_offset() + offset)


def _mapped(value: Any, kind: Any, function: Callable[[Any], Any]) -> Any:
    """A value, with function(part) for each part of a kind in its lists and tuples."""
    if isinstance(value, kind):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)([_mapped(part, kind, function) for part in value])
    return value


def _made_from(value: Any) -> Callable[[list], Any]:
    """Returns a function of the tensors of a call, or of pointers: a value, in whose lists and
    tuples there are those instead of references. It is compiled, as one call has a hundred.
    """
    kept: list[Any] = []

    def source(part: Any) -> str:
        if isinstance(part, (_Pointer, _View)):
            return part.source(kept)
        if type(part) in (list, tuple):
            inner = "".join(f"{source(one)}, " for one in part)
            return f"({inner})" if type(part) is tuple else f"[{inner}]"
        kept.append(part)
        return f"kept[{len(kept) - 1}]"

    return eval(f"lambda those: {source(value)}", {"kept": kept})


# ---- steps: each takes the tensors so far, their pointers, and the stream. False if memory does
# not begin at the multiple of 16 bytes that it did, for which other kernels would be compiled.


class _Make:
    """Makes a tensor."""

    def __init__(self, sizes: Sequence[int], strides: Sequence[int], apart: int | None,
                 **options: Any) -> None:
        self.sizes, self.strides, self.apart, self.options = sizes, strides, apart, options

    def __call__(self, tensors: list[Tensor], pointers: list[int], stream: int) -> bool:
        made = torch.empty_strided(self.sizes, self.strides, **self.options)
        pointer = made.data_ptr()
        tensors.append(made)
        pointers.append(pointer)
        return pointer % 16 == self.apart


class _Do:
    """Runs an operation of torch's, which makes a tensor or writes into one."""

    def __init__(self, function: Any, args: Any, options: dict[str, Any],
                 apart: int | None) -> None:
        self.function, self.args, self.options = function, _made_from(args), options
        self.apart = apart  # None: it makes none

    def __call__(self, tensors: list[Tensor], pointers: list[int], stream: int) -> bool:
        made = self.function(*self.args(tensors), **self.options)
        if self.apart is None:
            return True
        tensors.append(made)
        pointers.append(made.data_ptr())
        return pointers[-1] % 16 == self.apart


class _Launch:
    """Launches a compiled kernel."""

    def __init__(self, compiled: Any, grid: tuple[int], args: list[Any]) -> None:
        whole_grid = (*grid, 1, 1)
        self.run, self.args = compiled[whole_grid], _made_from(args)

    def __call__(self, tensors: list[Tensor], pointers: list[int], stream: int) -> bool:
        self.run(*self.args(pointers), stream=stream)
        return True


# ---- notes of a call


def _places(value: Any) -> set[int]:
    """The places of all references in a value's lists and tuples."""
    found: set[int] = set()
    _mapped(value, (_Pointer, _View), lambda reference: found.add(reference.place))
    return found


class _Unknown(Exception):
    """Calls of this kind can have no plan."""


class _Notes(TorchDispatchMode):
    """Notes what a call makes, what torch does for it, and what it launches. Where a tensor is, the
    one that a view was taken of tells, and how many bytes further on the view begins.
    """

    def __init__(self, args: Sequence[Any]) -> None:
        super().__init__()
        self.roots: list[Tensor] = []
        self.place: dict[int, int] = {}  # of tensors, by id
        self.kept: list[Tensor] = []  # so that ids stay theirs
        self.steps: list[tuple] = []
        self.hooks: list[list] = []
        self.unknown = False
        self.compiled = True
        for a in args:
            if isinstance(a, Tensor):
                self._add(a)
        self.given = len(self.roots)

    def _add(self, made: Tensor) -> int:
        self._keep(made, len(self.roots))
        self.roots.append(made)
        return len(self.roots) - 1

    def _keep(self, tensor: Tensor, place: int) -> None:
        if tensor.is_conj() or tensor.is_neg():
            self.unknown = True
        self.place[id(tensor)] = place
        self.kept.append(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        try:
            self._note(function, args, kwargs or {}, made)
        except _Unknown:
            self.unknown = True
        return made

    def _note(self, function: Any, args: Any, options: dict[str, Any], made: Any) -> None:
        several = made if isinstance(made, (list, tuple)) else [made]
        if not all(isinstance(t, Tensor) for t in several):
            if any(isinstance(a, Tensor) for a in args):
                raise _Unknown  # what follows may depend on its numbers
            return  # a dtype, of others
        if function.is_view:
            for t in several:
                self._keep(t, self._place_of(args[0]))
        elif function in _EMPTY:
            self.steps.append(("make", self._add(made)))
        elif len(several) == 1 and not any(isinstance(o, Tensor) for o in options.values()):
            args = _mapped(args, Tensor, self._view)
            place = None if id(made) in self.place else self._add(made)
            self.steps.append(("do", place, function, args, options))
        else:
            raise _Unknown

    def launched(self, kernel: Any, grid: tuple[int], compiled: Any, args: Any,
                 options: dict[str, Any]) -> None:
        from triton.compiler import CompiledKernel

        if not isinstance(compiled, CompiledKernel):  # it was not launched, but looked at
            self.compiled = False
            return
        parameters = kernel.signature
        bound = parameters.bind(*args, **{name: value for name, value in options.items()
                                          if name in parameters.parameters})
        bound.apply_defaults()
        self.hooks.append(kernel.pre_run_hooks)
        try:
            values = _mapped(list(bound.arguments.values()), Tensor, self._pointer)
            self.steps.append(("launch", None, compiled, grid, values))
        except _Unknown:
            self.unknown = True

    def _place_of(self, tensor: Tensor) -> int:
        if id(tensor) not in self.place:
            raise _Unknown
        return self.place[id(tensor)]

    def _pointer(self, tensor: Tensor) -> _Pointer:
        place = self._place_of(tensor)
        root = self.roots[place]
        return _Pointer(place, int(tensor.storage_offset()) * tensor.itemsize
                        - int(root.storage_offset()) * root.itemsize)

    def _view(self, tensor: Tensor) -> _View:
        place = self._place_of(tensor)
        root = self.roots[place]
        if tensor.dtype != root.dtype:
            raise _Unknown
        layout = (tensor.shape, tensor.stride(), tensor.storage_offset() - root.storage_offset())
        return _View(place, None if layout == (root.shape, root.stride(), 0) else layout)

    def plan(self, results: Any) -> Plan | None:
        """The plan of calls like the one that was noted and gave these results, or None."""
        if self.unknown:
            return None
        try:
            results = _mapped(results, Tensor, self._view)
        except _Unknown:
            return None
        looked_at = _places([results, [step[2:] for step in self.steps if step[0] == "do"]])
        scratch = [step[1] for step in self.steps if step[0] == "make"
                   and step[1] not in looked_at and self._apart(step[1]) == 0]
        now, size = {}, 0  # place → that in the plan, and how many bytes further on
        for place in scratch:
            now[place] = self.given, size
            size += -(-self.roots[place].untyped_storage().nbytes() // 256) * 256
        for place in range(len(self.roots)):
            if place not in now:
                now[place] = place - sum(other < place for other in scratch) + (
                    place >= self.given and size > 0), 0
        steps: list[Callable] = []
        if size > 0:
            steps.append(_Make((size,), (1,), 0, dtype=torch.uint8, device=self.roots[0].device))
        steps += [self._step(step, now) for step in self.steps
                  if step[0] != "make" or step[1] not in scratch]
        return Plan(steps, _moved(results, now), self.hooks)

    def _apart(self, place: int | None) -> int | None:
        return None if place is None else self.roots[place].data_ptr() % 16

    def _step(self, step: tuple, now: dict[int, tuple[int, int]]) -> Callable:
        kind, place, *rest = step
        if kind == "make":
            made = self.roots[place]
            return _Make(made.shape, made.stride(), self._apart(place), dtype=made.dtype,
                         device=made.device)
        if kind == "do":
            function, args, options = rest
            return _Do(function, _moved(args, now), options, self._apart(place))
        compiled, grid, values = rest
        return _Launch(compiled, grid, _moved(values, now))


def _moved(value: Any, now: dict[int, tuple[int, int]]) -> Any:
    """A value, whose references are to where tensors are in the plan."""
    value = _mapped(value, _View, lambda view: view._replace(place=now[view.place][0]))
    return _mapped(value, _Pointer, lambda at: _Pointer(now[at.place][0],
                                                        at.offset + now[at.place][1]))
