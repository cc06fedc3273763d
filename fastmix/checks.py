"""The words in which operators and modules refuse bad input.

`where` names the operator or module. Shapes are written as in the docstrings,
"b n h d": sizes that an earlier argument fixed are held against it, the others are
learned. Integers stand for themselves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastmix import _torch_private
from fastmix.dtypes import autocast_enabled, wide

REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex128, torch.complex64)
INTEGER = (torch.int64, torch.int32)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(where: str, name: str, value: Any, dtypes: Sequence[torch.dtype] = REAL,
                 like: tuple[str, Tensor] | None = None, *, wider: bool = True) -> None:
    """Checks that `value` is a dense tensor of one of `dtypes`, on the device of `like`, a (name,
    tensor) pair.

    Where any real dtype would do, the error names those that are used as they come: that of
    `like` and, if `wider`, that of its sums."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{where}: {name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{where}: {name} must be a dense tensor, got one of layout {layout}: "
                        "convert it, by to_dense or to_padded_tensor")
    if value.dtype not in dtypes:
        if dtypes is REAL and like is not None and like[1].dtype in REAL and not autocast_enabled(
                like[1].device.type):
            dtypes = tuple(dict.fromkeys((like[1].dtype, wide(like[1].dtype))))[: 1 + wider]
        expected = " or ".join(dtype_name(d) for d in dtypes)
        raise TypeError(f"{where}: {name} must be {expected}, got {dtype_name(value.dtype)}")
    if like is not None and value.device != like[1].device:
        raise ValueError(
            f"{where}: {name} must be on {like[1].device} like {like[0]}, got {value.device}: "
            f"move it, by .to({str(like[1].device)!r})")


def is_plain_real(value: Any) -> bool:
    """Whether `value` is sure to pass check_tensor without `like`. False leaves it open."""
    return (type(value) is Tensor and value.dtype in REAL and value.layout == torch.strided
            and not value.is_nested)


class Passed:
    """The calls of an operator that have passed its checks, by all that checks look at.

    Text is written by calls of the same layout, whose checks take longer than a step's
    arithmetic. It keeps shapes, dtypes and devices, no tensors. The caller must still check
    everything else: classes of states, flags, numbers.
    """

    def __init__(self, most: int = 1024) -> None:
        self.most = most
        self.keys: set[tuple] = set()

    def key(self, *tensors: Tensor | None) -> tuple | None:
        """The key of these arguments. None, so that nothing is remembered, where they are not
        plain dense tensors, where dtypes may be changed, or where sizes may be symbols."""
        if torch.compiler.is_compiling() or _torch_private.traced_or_autocast():
            return None
        key: list = []
        for t in tensors:
            if t is None:
                key.append(None)
            elif (type(t) is Tensor or type(t) is Parameter) and (
                    t.layout is torch.strided and not t.is_nested):
                key += (t.shape, t.dtype, t.device)
            else:
                return None
        return tuple(key)

    def has(self, key: tuple | None) -> bool:
        return key is not None and key in self.keys

    def add(self, key: tuple | None) -> None:
        if key is not None:
            if len(self.keys) >= self.most:
                self.keys.clear()
            self.keys.add(key)


def is_like(value: Any, model: Tensor) -> bool:
    """Whether `value` is sure to pass every check that `model`, a tensor, passed. This costs less
    than the checks."""
    return (isinstance(value, torch.Tensor) and not value.is_nested
            and value.layout == model.layout and value.shape == model.shape
            and value.dtype == model.dtype and value.device == model.device)


def check_shape(where: str, name: str, value: Tensor, layout: str,
                sizes: dict[str, int] | None = None) -> dict[str, int]:
    """Holds `value` against `layout` and returns `sizes` with the newly learned ones."""
    axes, shape = layout.split(), value.shape
    learned = {} if sizes is None else dict(sizes)
    fits = len(shape) == len(axes)
    if fits:
        for axis, size in zip(axes, shape):
            if (int(axis) if axis.isdigit() else learned.setdefault(axis, size)) != size:
                fits = False
    if not fits:
        known = sizes or {}
        names = f"({', '.join(axes)})"
        numbers = f"({', '.join(str(known.get(axis, axis)) for axis in axes)})"
        expected = names if numbers == names else f"{names} = {numbers}"
        advice = ""
        if axes[-2:-1] == ["h"] and len(shape) == len(axes) - 1:  # channels (…, h · d)
            advice = f": {name}.unflatten(-1, (h, {axes[-1]})) has an axis of heads"
        raise ValueError(
            f"{where}: {name} must have shape {expected}, got {tuple(shape)}{advice}")
    if 0 in shape and 0 in [size for axis, size in zip(axes, shape) if axis not in "bnm"]:
        raise ValueError(f"{where}: {name} must have sizes of at least 1, got {tuple(shape)}")
    return learned


def check_flag(where: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be True or False, got {value!r}")


def check_number(where: str, name: str, value: Any) -> None:
    """Checks for a real number, of any library: it refuses only what is commonly passed by
    mistake."""
    if value is None or isinstance(value, (str, bytes, complex)):
        raise TypeError(f"{where}: {name} must be a number, got {value!r}")


def check_divides(where: str, heads_name: str, heads: int, dim_name: str, dim: int) -> None:
    if heads < 1 or dim % heads != 0:
        raise ValueError(
            f"{where}: {heads_name} must divide {dim_name}, got {heads_name}={heads} "
            f"and {dim_name}={dim}")


def check_length(where: str, name: str, n: int, max_length: int | None = None) -> None:
    if n < 1:
        raise ValueError(f"{where}: {name} must have at least one time step, got n=0: "
                         "leave empty sequences out")
    if max_length is not None and n > max_length:
        raise ValueError(f"{where}: {name} must have at most {max_length} time steps, got n={n}: "
                         f"{name}[:, -{max_length}:] has the last ones")


def match_dtypes(where: str, **tensors: Tensor | None) -> Any:
    """The tensors with one common dtype.

    Under autocast they are promoted to the widest of their dtypes; elsewhere a difference is
    an error, never a silent copy. None stays None.
    """
    if len({t.dtype for t in tensors.values() if t is not None}) == 1:
        return tuple(tensors.values())
    given = {name: t for name, t in tensors.items() if t is not None}
    (first, reference), *others = given.items()
    if autocast_enabled(reference.device.type):
        dtype = reference.dtype
        for _, t in others:
            dtype = torch.promote_types(dtype, t.dtype)
        return tuple(t if t is None else t.to(dtype) for t in tensors.values())
    for name, t in others:
        if t.dtype != reference.dtype:
            raise TypeError(f"{where}: {name} must be {dtype_name(reference.dtype)} like {first}, "
                            f"got {dtype_name(t.dtype)}: convert it, by .to({reference.dtype})")


def match_parameter(where: str, name: str, value: Tensor, data: tuple[str, Tensor]) -> Tensor:
    """Checks a parameter, which may have the dtype of `data`, a (name, tensor) pair, or that of
    its sums, and returns it."""
    if value.dtype == data[1].dtype:
        return value
    allowed = (data[1].dtype, wide(data[1].dtype))
    if value.dtype in allowed:
        return value
    if autocast_enabled(value.device.type) and value.dtype in REAL:
        return value.to(allowed[1])
    expected = " or ".join(dict.fromkeys(dtype_name(d) for d in allowed))
    raise TypeError(f"{where}: {name} must be {expected} for {dtype_name(data[1].dtype)} "
                    f"{data[0]}, got {dtype_name(value.dtype)}: convert it, by .to({allowed[1]})")
