"""What the same call leaves behind in memory, a hundred thousand times, forward and backward."""

import ctypes

import torch

from cases import CASES, as_tuple, leaves

SHOWN = 10  # measurements of each operator
LEFT = 4    # bytes that a call may leave behind: 100,000 of them half a megabyte


LIBRARY = ctypes.CDLL(None)  # one: each is garbage that only a collection finds


class Allocated(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "in_maps", "usmblks", "fsmblks", "in_use",
        "fordblks", "keepcost")]


def allocated():
    """Bytes that are allocated and not freed."""
    LIBRARY.mallinfo2.restype = Allocated
    now = LIBRARY.mallinfo2()
    return now.in_use + now.in_maps


def resident():
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def call_of(operator, n=5):
    """A call with its gradients, of the first of the operator's cases."""
    case = next(case for case in CASES.values() if case.operator == operator)
    tensors = leaves(case.make(n, torch.float32))
    weights = [torch.randn_like(o) for o in as_tuple(case.run(tensors))]

    def call():
        torch.autograd.grad(case.run(tensors), tuple(tensors.values()), weights)

    return call


def left_behind(call, calls, tell):
    """Bytes that each of so many calls leaves, the median of SHOWN stretches of them."""
    for _ in range(calls // SHOWN):
        call()
    grown = []
    for _ in range(SHOWN):
        before = allocated()
        for _ in range(calls // SHOWN):
            call()
        now = allocated()
        grown.append((now - before) / (calls // SHOWN))
        tell(f"{now / 2**20:.2f} MB allocated, {resident() / 2**20:.1f} resident")
    return sorted(grown)[SHOWN // 2]


def constant(operators, implementations, running_on, calls):
    """The number of those that leave more than LEFT bytes a call; says what each of them does."""
    leaking = 0
    for operator in operators:
        for implementation in implementations:
            with running_on(implementation):
                call = call_of(operator)
                said = []
                left = left_behind(call, calls, said.append)
            print(f"{operator} on {implementation}: {left:.2f} bytes a call; first {said[0]}, "
                  f"last {said[-1]}", flush=True)
            leaking += left > LEFT
    return leaking
