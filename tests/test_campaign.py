"""A minute of random calls, other ones every time, and the same under sanitizers."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map_only

import campaign_judge
import fastmix
from campaign_calls import TUPLES, spoiled
from campaign_judge import Definition, OperatorCall
from cases import CASES, distance, largest
from fastmix import reference
from fastmix.native import build

CAMPAIGN = Path(__file__).parent / "campaign.py"
OPERATORS = ("linear_scan gate_loop decay_conv fft_conv windowed_sgu causal_sgu "
             "cumulative_mean").split()


@pytest.fixture
def run(pytestconfig):
    """run(*options) → what the campaign prints; it draws from the run's --seed."""
    return functools.partial(campaign, "--seed", str(pytestconfig.option.seed))


def campaign(*options, instruction_sets=None):
    # Which instruction sets it compiles it chooses itself: under sanitizers only this machine's.
    environment = {name: value for name, value in os.environ.items()
                   if name != "FASTMIX_INSTRUCTION_SETS"}
    if instruction_sets:
        environment["FASTMIX_INSTRUCTION_SETS"] = instruction_sets
    ran = subprocess.run([sys.executable, CAMPAIGN, *options], capture_output=True, text=True,
                         env=environment)
    if "the compiler has no lib" in ran.stderr:
        pytest.skip(ran.stderr.strip())
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    print(ran.stdout)  # the seed, and what was counted
    return ran.stdout


def test_small_parts_of_exact_gradients_have_their_digits():
    """Those of a gate whose logit is almost on an axis, in steps of torch's, lose them."""
    logits = torch.tensor([[2**31, 2.0**35 + 3], [3 * 2.0**-101, -(2.0**-96)]], dtype=torch.float64)
    grads = torch.tensor([[3.0, 0.1], [-0.7, 5.0]], dtype=torch.float64)
    expected = []
    for z, grad in zip(logits.tolist(), grads.tolist()):
        (x, y), (re, im) = map(Fraction, z), map(Fraction, grad)
        with localcontext() as context:
            context.prec = 60
            squared = x * x + y * y
            length = (Decimal(squared.numerator) / squared.denominator).sqrt()
            less = (-length).exp()
            across, along = ((y * re - x * im) / squared, (x * re + y * im) / squared)
            across, along = (Decimal(f.numerator) / f.denominator for f in (across, along))
            across, along = across / (1 + less) / length, along * less / (1 + less) ** 2
            x, y = map(Decimal, z)
            expected.append([float(x * along + y * across), float(y * along - x * across)])
    expected = torch.tensor(expected, dtype=torch.float64)
    logits.requires_grad_()
    gate = campaign_judge._gate(logits)
    assert torch.equal(gate, reference.gate_from_logits(logits))
    (exact,) = torch.autograd.grad(torch.view_as_real(gate), logits, grads)
    assert ((exact - expected).abs() / expected.abs()).max() < 8 * torch.finfo(exact.dtype).eps


def test_exact_gates_at_0_at_infinity_and_of_nan_are_the_definition_s():
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0, 0], [inf, 5], [-inf, inf], [nan, 1], [3, -4]],
                          dtype=torch.float64, requires_grad=True)
    made = []
    for function in (campaign_judge._gate, reference.gate_from_logits):
        gate = torch.view_as_real(function(logits))
        made.append((gate, *torch.autograd.grad(gate, logits, torch.ones_like(gate))))
    assert torch.equal(made[0][0][:3], made[1][0][:3]) and made[0][0][3].isnan().all()
    assert largest(made[0][1][:3]) == 0 and made[0][1][3].isnan().any()
    for ours, defined in zip(*made):
        assert distance(ours[4], defined[4]) < 1e-15


def test_what_may_be_off_beyond_the_range_may_be_infinite():
    """A transform rounds 1e50, and all steps after it, by 1e43. What no such number is beside
    must be finite."""
    def judged(large):
        x, kernel = torch.linspace(1, 2, 20).reshape(1, 20, 1, 1), torch.tensor([[1.0], [large]])
        x[:, 1] *= large
        call = OperatorCall("fft_conv", torch.float32, {"x": x, "kernel": kernel, "skip": None}, {},
                            mode="no_grad", uneven=True)
        definition = Definition(call)
        results = {"output 0": definition.exact["output 0"].float()}
        assert campaign_judge.wrong(call, results, definition) is None
        results["output 0"][:, 5] = float("inf")
        return campaign_judge.wrong(call, results, definition)

    assert judged(1e25) is None
    assert "not finite where the definition is, 1 of 20" in judged(1e15)


@pytest.mark.parametrize("b", [2, 3])
def test_a_state_that_nothing_mapped_reaches_is_judged(b):
    """gate_loop's, where q alone is mapped over its last axis."""
    shape = b, 4, 2, 2
    call = OperatorCall("gate_loop", torch.float64, {
        **{name: torch.randn(shape, dtype=torch.float64) for name in "qkv"},
        "gate_logits": torch.randn(b, 4, 2, dtype=torch.float64),
        "initial_state": torch.randn(b, 2, 2, 2, dtype=torch.float64)},
        {"return_state": True}, mode="vmap over the last", wanted=("q",))
    definition, results = call.define(), call.perform()
    assert call.judge(results, definition) is None
    state = torch.vmap(lambda q: reference.gate_loop(**call.tensors | {"q": q}, return_state=True),
                       in_dims=-1)(torch.stack([call.tensors["q"]] * 2, -1))[1]
    assert torch.equal(definition.exact["output 1"], state)


@pytest.mark.parametrize("operator", OPERATORS)
def test_pieces_are_judged(operator):
    """From state to state; and a state that loses what it holds is found."""
    case = next(case for case in CASES.values() if case.operator == operator)
    call = OperatorCall(operator, torch.float64, case.make(7, torch.float64), case.options,
                        mode="no_grad", pieces=(3, 4))
    assert call.judge(call.perform(), call.define()) is None
    call.between = lambda state: tree_map_only(torch.Tensor, torch.zeros_like, state)
    assert "off" in call.judge(call.perform(), call.define())


@pytest.mark.parametrize("operator", TUPLES)
def test_spoiled_states_are_refused_in_words(operator):
    case = next(case for case in CASES.values() if case.operator == operator)
    call = OperatorCall(operator, torch.float64, case.make(7, torch.float64), case.options,
                        wrong="spoiled state", pieces=(3, 4))
    call.between = spoiled(call)
    refused = 0
    for call.seed in range(20):
        said = call.perform()
        refused += isinstance(said, Exception)
        assert call.clear(said) if isinstance(said, Exception) else call.judge(
            said, call.define()) is None, said
    assert refused > 10


@pytest.mark.parametrize("threads", [1, 2])
def test_callers_of_transforms_have_as_many_threads(threads):
    """New threads have a number of threads that is the machine's at first: torch's transform of 32
    real numbers has other bits then."""
    before = torch.get_num_threads()
    call = OperatorCall("fft_conv", torch.float64, {
        "x": torch.randn(2, 22, 3, 2, dtype=torch.float64),
        "kernel": torch.randn(2, 11, 3, dtype=torch.float64)}, {}, mode="threads", wanted=("x",))
    try:
        torch.set_num_threads(threads)
        with fastmix.force("fallback"):
            assert call.judge(call.perform(), call.define()) is None
    finally:
        torch.set_num_threads(before)


@pytest.mark.long
def test_a_minute_of_random_calls(run):
    """None kills its process, hangs, writes to its arguments, is wrong or refused unclearly."""
    assert ": 0 calls" not in run("--minutes", "1", "--processes", "2")


@pytest.mark.long
def test_equal_calls_leave_no_memory_behind(run):
    """With their gradients. `python tests/campaign.py --same 100000` makes more of them."""
    said = run("--same", "2000")
    assert all(f"{name} on fallback: " in said for name in OPERATORS)


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                    reason="Triton is not installed: there are no wheels for it here")
def test_random_calls_of_interpreted_kernels(run):
    counted = run("--minutes", "5", "--calls", "6", "--processes", "2",
                  "--operators", "cumulative_mean", "--implementations", "triton",
                  "--fatal", "crash", "hang", "modified")
    assert ": 6 calls" in counted and "cumulative_mean triton" in counted


@pytest.mark.long
@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name, kind", [
    *((name, "address") for name in build.INSTRUCTION_SETS), ("own", "thread")])
def test_sanitizers_find_nothing_in_random_calls(run, monkeypatch, name, kind):
    """`address` has UBSan with it; under `thread` three callers call at once."""
    if name != "own":
        monkeypatch.setenv("FASTMIX_INSTRUCTION_SETS", name)
        try:
            build.own_instruction_sets()
        except RuntimeError as reason:
            pytest.skip(str(reason))
    said = run("--sanitize", kind, "--minutes", "1", "--calls", "290", "--processes", "2",
               "--operators", *OPERATORS, "--implementations", *build.INSTRUCTION_SETS,
               "--fatal", "crash", "hang", "modified",
               instruction_sets=None if name == "own" else name)
    assert all(re.search(rf"{operator} (portable|avx2|avx512) ", said) for operator in OPERATORS)
