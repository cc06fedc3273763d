"""The words in which operators and modules refuse bad input.

`where` names the operator or module. Shapes are written as in the docstrings,
"b n h d": sizes that an earlier argument fixed are held against it, the others are
learned. Integers stand for themselves.
"""

import torch

REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex128, torch.complex64)
INTEGER = (torch.int64, torch.int32)


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def check_tensor(where, name, value, dtypes=REAL, like=None):
    """A tensor of one of `dtypes`, on the device of `like`, a (name, tensor) pair."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{where}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(_name(d) for d in dtypes)
        raise TypeError(f"{where}: {name} must be {expected}, got {_name(value.dtype)}")
    if like is not None and value.device != like[1].device:
        raise ValueError(
            f"{where}: {name} must be on {like[1].device} like {like[0]}, got {value.device}")


def check_shape(where, name, value, layout, sizes=None):
    """Holds `value` against `layout` and returns `sizes` with the newly learned ones."""
    axes, shape = layout.split(), tuple(value.shape)
    known = sizes or {}
    found = dict(known)
    fits = len(shape) == len(axes)
    for axis, size in zip(axes, shape):
        fits = fits and size == (int(axis) if axis.isdigit() else found.setdefault(axis, size))
    if not fits:
        names = f"({', '.join(axes)})"
        numbers = f"({', '.join(str(known.get(axis, axis)) for axis in axes)})"
        expected = names if numbers == names else f"{names} = {numbers}"
        raise ValueError(f"{where}: {name} must have shape {expected}, got {shape}")
    if 0 in [size for axis, size in zip(axes, shape) if axis not in "bnm"]:
        raise ValueError(f"{where}: {name} must have sizes of at least 1, got {shape}")
    return found


def check_divides(where, heads_name, heads, dim_name, dim):
    if heads < 1 or dim % heads != 0:
        raise ValueError(
            f"{where}: {heads_name} must divide {dim_name}, got {heads_name}={heads} "
            f"and {dim_name}={dim}")


def check_tokens(where, name, value, embedding, max_length=None):
    """Token ids (b, n), integers, 1 ≤ n ≤ max_length, on the device of the embedding."""
    check_tensor(where, name, value, INTEGER, like=("the token embedding", embedding.weight))
    n = check_shape(where, name, value, "b n")["n"]
    check_length(where, name, n, max_length)


def check_length(where, name, n, max_length=None):
    if n < 1:
        raise ValueError(f"{where}: {name} must have at least one time step, got n=0")
    if max_length is not None and n > max_length:
        raise ValueError(f"{where}: {name} must have at most {max_length} time steps, got n={n}")


def wide(dtype):
    """The dtype in which sums, states and spectra of `dtype` data are kept."""
    return torch.promote_types(dtype, torch.float32)


def wide_complex(dtype):
    return torch.promote_types(dtype, torch.complex64)


def match_dtypes(where, **tensors):
    """The tensors with one common dtype.

    Under autocast they are promoted to the widest of theirs; elsewhere a difference is
    an error, never a silent copy. None passes through.
    """
    given = {name: t for name, t in tensors.items() if t is not None}
    (first, reference), *others = given.items()
    if all(t.dtype == reference.dtype for _, t in others):
        return tuple(tensors.values())
    if torch.is_autocast_enabled(reference.device.type):
        dtype = reference.dtype
        for _, t in others:
            dtype = torch.promote_types(dtype, t.dtype)
        return tuple(t if t is None else t.to(dtype) for t in tensors.values())
    for name, t in others:
        if t.dtype != reference.dtype:
            raise TypeError(f"{where}: {name} must be {_name(reference.dtype)} like {first}, "
                            f"got {_name(t.dtype)}")


def match_parameter(where, name, value, data):
    """A parameter in the dtype of `data`, a (name, tensor) pair, or wider within float32."""
    allowed = (data[1].dtype, wide(data[1].dtype))
    if value.dtype in allowed:
        return value
    if torch.is_autocast_enabled(value.device.type) and value.dtype in REAL:
        return value.to(allowed[1])
    expected = " or ".join(dict.fromkeys(_name(d) for d in allowed))
    raise TypeError(f"{where}: {name} must be {expected} for {_name(data[1].dtype)} {data[0]}, "
                    f"got {_name(value.dtype)}")
