"""One step at a time, the state handed on: values and gradients through the states, in float64."""

import pytest
import torch

import fastmix
from cases import distance, random_decays, random_gates, weigh
from fastmix import ops, reference

F64 = torch.float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shape):
    return torch.randn(*shape, dtype=F64)


# Operator → its arguments that have a time axis, those that have none, and the state.
DRAW = {
    "linear_scan": lambda n: (
        dict(gates=torch.rand(1, n, 3, dtype=F64), inputs=drawn(1, n, 3)), {}, drawn(1, 3)),
    "decay_conv": lambda n: (
        dict(x=drawn(1, n, 2, 3)), dict(decay=torch.rand(2, dtype=F64), gain=drawn(2)),
        drawn(1, 2, 3)),
    "gate_loop": lambda n: (
        dict(q=drawn(1, n, 2, 1), k=drawn(1, n, 2, 1), v=drawn(1, n, 2, 1),
             gates=random_gates(1, n, 2, dtype=F64)), {},
        torch.complex(drawn(1, 2, 1, 1), drawn(1, 2, 1, 1))),
    "gate_loop-heads": lambda n: (
        dict(q=drawn(1, n, 1, 4), k=drawn(1, n, 1, 4), v=drawn(1, n, 1, 4),
             gates=random_gates(1, n, 1, dtype=F64)), {},
        torch.complex(drawn(1, 1, 4, 4), drawn(1, 1, 4, 4))),
    "gate_loop-real": lambda n: (
        dict(q=drawn(1, n, 2, 1), k=drawn(1, n, 2, 1), v=drawn(1, n, 2, 1),
             gates=random_decays(1, n, 2, dtype=F64)), {}, drawn(1, 2, 1, 1)),
    "gate_loop-heads-real": lambda n: (
        dict(q=drawn(1, n, 1, 4), k=drawn(1, n, 1, 4), v=drawn(1, n, 1, 4),
             gates=random_decays(1, n, 1, dtype=F64)), {}, drawn(1, 1, 4, 4)),
}


@pytest.mark.parametrize("name", DRAW)
def test_steps_one_by_one_are_all_at_once(name, n=2):
    operator = name.partition("-")[0]
    timed, others, state = DRAW[name](n)
    timed, others = ({k: t.to(DEVICE).requires_grad_() for k, t in group.items()}
                     for group in (timed, others))
    state = state.to(DEVICE).requires_grad_()
    tensors = *timed.values(), *others.values(), state

    def step_by_step():
        entering, steps = state, []
        for i in range(n):
            out, entering = getattr(ops, operator)(
                **{k: t[:, i : i + 1] for k, t in timed.items()}, **others,
                initial_state=entering, return_state=True)
            steps.append(out)
        return torch.cat(steps, dim=1), entering

    with fastmix.force("triton"):
        outputs = step_by_step()
        weights = [torch.randn_like(o) for o in outputs]
        grads = torch.autograd.grad(weigh(outputs, weights), tensors)
    if operator == "linear_scan":
        states = reference.linear_scan(**timed, initial_state=state)
        defined = states, states[:, -1]
    else:
        defined = getattr(reference, operator)(
            **timed, **others, initial_state=state, return_state=True)
    for actual, expected in zip(
            (*outputs, *grads),
            (*defined, *torch.autograd.grad(weigh(defined, weights), tensors)), strict=True):
        assert distance(actual, expected) < 1e-11
