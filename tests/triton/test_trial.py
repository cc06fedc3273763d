"""Kernels that the compiler has made wrong code of are found at their first use, and not used."""

import pytest
import torch

import fastmix
from cases import random_gates
from fastmix import _triton, env, reference
from fastmix._triton import decay_conv, gate_loop, linear_scan, trial, windowed_sgu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def first_use(monkeypatch):
    monkeypatch.setattr(trial, "_possible", lambda device: True)
    monkeypatch.setattr(trial, "failures", {})
    trial._why_not_trusted.cache_clear()
    yield
    trial._why_not_trusted.cache_clear()


def arguments(d, dtype=torch.float32, logits=True, initial=False, real=False):
    q, k, v = torch.randn(3, 2, 5, 3, d, dtype=dtype, device=DEVICE)
    state = torch.randn(2, 3, d, d, dtype=torch.complex64, device=DEVICE) if initial else None
    if real:
        gates = torch.rand(2, 5, 3, device=DEVICE).to(dtype)
        return q, k, v, gates, None, state if state is None else state.real, 0
    if logits:
        return q, k, v, None, torch.randn(2, 5, 3, 2, dtype=dtype, device=DEVICE), state, 0
    return q, k, v, random_gates(2, 5, 3, dtype=dtype).to(DEVICE), None, state, 0


def gradients(args):
    args = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in args]
    out = fastmix.ops.gate_loop(args[0], args[1], args[2], args[3], gate_logits=args[4])
    return torch.autograd.grad(out.square().sum(), args[:3])


@pytest.mark.long
@pytest.mark.parametrize("d, dtype, logits, initial, real", [
    (16, torch.float32, True, False, False), (5, torch.bfloat16, True, False, False),
    (3, torch.float16, False, True, False), (5, torch.bfloat16, False, True, True),
    (3, torch.float32, False, False, True)])
def test_right_kernels_pass(d, dtype, logits, initial, real):
    args = arguments(d, dtype, logits, initial, real)
    for direction in "forward", "backward":
        assert trial.why_not("gate_loop", direction, gate_loop, *args) is None
    assert trial._why_not_trusted.cache_info().currsize == 2


def test_real_gates_are_tried_with_real_gates_and_states():
    args = arguments(3, torch.bfloat16, initial=True, real=True)
    description, draw, *configuration = trial._of_gate_loop("forward", *args)
    assert description == "heads of 3 and 3 in bfloat16 with real gates"
    drawn = draw(lambda *shape, dtype: torch.randn(shape).to(dtype), *configuration)
    assert [t.dtype if isinstance(t, torch.Tensor) else t for t in drawn[3:6]] == [
        torch.bfloat16, None, torch.float32]
    drawn = draw(lambda *shape, dtype: torch.randn(shape).to(dtype),
                 *trial._of_gate_loop("forward", *arguments(3, torch.bfloat16, False))[2:])
    assert drawn[3].is_complex() and drawn[5] is None


def sgu_arguments(dtype=torch.float32, norm=True, residual=False, parameters=None,
                  activation="identity"):
    shapes = (2, 7, 20), (2, 6, 12), (2, 6), (10,), (10,), (2, 7, 10)
    x, weight, bias, norm_weight, norm_bias, residuals = (
        torch.randn(shape, device=DEVICE).to(kind or dtype)
        for shape, kind in zip(shapes, (None, *[parameters] * 4, None)))
    if not norm:
        norm_weight = norm_bias = None
    return (x, weight, bias, norm_weight, norm_bias, 1e-5, residuals if residual else None,
            activation)


@pytest.mark.long
@pytest.mark.parametrize("options", [
    {}, dict(norm=False, residual=True, activation="gelu"), dict(activation="outside"),
    dict(dtype=torch.bfloat16, parameters=torch.float32), dict(dtype=torch.float16)])
def test_right_sgu_kernels_pass(options):
    args = sgu_arguments(**options)
    for direction in "forward", "backward":
        assert trial.why_not("windowed_sgu", direction, windowed_sgu, *args) is None
    assert trial._why_not_trusted.cache_info().currsize == 2


@pytest.mark.long
@pytest.mark.parametrize("direction, which", [
    ("forward", 0), *(("backward", i) for i in range(6))])
def test_wrong_sgu_kernels_are_not_used(monkeypatch, direction, which):
    right = getattr(windowed_sgu, direction)

    def wrong(*args):
        out = right(*args)
        out = list(out) if isinstance(out, tuple) else [out]
        out[which] = 1.1 * out[which]
        return tuple(out) if direction == "backward" else out[0]

    monkeypatch.setattr(windowed_sgu, direction, wrong)
    args = sgu_arguments(residual=True)
    message = f"its {direction} kernels for 2 heads and windows of 6 in float32 are wrong, off by"
    with pytest.warns(RuntimeWarning, match=message):
        assert message in trial.why_not("windowed_sgu", direction, windowed_sgu, *args)
    assert "wrong" in fastmix.implementations("windowed_sgu", DEVICE)["triton"]


@pytest.mark.parametrize("direction, factor", [("forward", torch.nan), ("backward", 1.1)])
def test_wrong_kernels_are_not_used(monkeypatch, direction, factor):
    right = getattr(gate_loop, direction)

    def wrong(*args):
        first, *others = right(*args)
        return factor * first, *others

    monkeypatch.setattr(gate_loop, direction, wrong)
    message = f"its {direction} kernels for heads of 5 and 5 in float32 are wrong, off by"
    args = arguments(5)
    with fastmix.force("triton"), pytest.warns(RuntimeWarning, match=message), \
            pytest.raises(RuntimeError, match=message):
        gradients(args)
    actual = fastmix.implementations("gate_loop", DEVICE)
    assert "wrong" in actual["triton"] and actual["fallback"] is None
    assert any("wrong" in line and "(gate_loop)" in line
               for line in env.lines(env.report(quick=True)))
    with fastmix.force("triton"), pytest.raises(RuntimeError, match=message):
        fastmix.ops.gate_loop(*args[:3], gate_logits=args[4])

    # Not forced, the fallback runs.
    out, *_ = _triton._run("gate_loop", "forward", False, *args)
    expected = reference.gate_loop(*(t.double() for t in args[:3]), gate_logits=args[4].double())
    assert (out - expected).abs().max() < 1e-4


def test_kernels_that_do_not_compile_are_not_used(monkeypatch):
    def fail(*args):
        raise ValueError("no registers left")

    monkeypatch.setattr(gate_loop, "forward", fail)
    args = arguments(5)
    with pytest.warns(RuntimeWarning, match="does not run on its Triton kernels"):
        out, *_ = _triton._run("gate_loop", "forward", False, *args)
    assert out.isfinite().all()
    assert "ValueError: no registers" in fastmix.implementations("gate_loop", DEVICE)["triton"]


def test_scans_and_norms_of_few_channels_have_no_trial():
    assert trial.why_not("gate_loop", "forward", gate_loop, *arguments(1)) is None
    x, decay = torch.randn(2, 5, 3, 4, device=DEVICE), torch.rand(3, device=DEVICE)
    assert trial.why_not("decay_conv", "forward", decay_conv, x, decay, None, None, 0) is None
    sgu = (torch.randn(1, 3, 2), torch.randn(1, 4, 8), torch.randn(1, 4), None, None, 1e-5, None,
           "identity")
    sgu = (t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in sgu)
    assert trial.why_not("windowed_sgu", "backward", windowed_sgu, *sgu) is None
    assert trial._why_not_trusted.cache_info().currsize == 0


def scan_arguments(gates=torch.float32, inputs=torch.float32, shared=False, reverse=False,
                   initial=False, carry_every=64):
    a = torch.rand(2, 7, 1 if shared else 5, device=DEVICE).to(gates)
    x = torch.randn(2, 7, 5, dtype=inputs, device=DEVICE)
    dtype = torch.promote_types(torch.promote_types(gates, inputs), torch.float32)
    state = torch.randn(2, 5, dtype=dtype, device=DEVICE) if initial else None
    return a, x, state, reverse, carry_every


@pytest.mark.parametrize("options", [
    {}, dict(gates=torch.bfloat16, inputs=torch.bfloat16, reverse=True),
    dict(gates=torch.complex64, shared=True, initial=True),
    dict(gates=torch.complex64, inputs=torch.complex64, carry_every=0)])
def test_right_scans_pass(options, filled):
    args = scan_arguments(**options)
    for direction in ("forward", "backward")[: 2 if args[-1] else 1]:
        assert trial.why_not("linear_scan", direction, linear_scan, *args) is None
    assert trial._why_not_trusted.cache_info().currsize == (2 if args[-1] else 1)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("b, n, gates, channels, dtype", [
    (1, 1000, (), 64, torch.float32), (96, 1000, (), 3, torch.float32),
    (48, 1000, (), 33, torch.float32), (1, 250, (), 64, torch.float32),
    (1, 100, (), 5, torch.complex64), (1, 1000, (1,), 64, torch.bfloat16),
    (96, 300, (1,), 20, torch.bfloat16), (1, 1000, (2, 1), 6, torch.float32),
    (3, 300, (2, 1), 128, torch.float32)])
def test_a_trial_is_of_the_kernels_of_the_call(b, n, gates, channels, dtype, direction,
                                               monkeypatch):
    """Time is cut in one where it is in the other, programs have as many channels, and a gate for
    all of them in one where they do in the other: many sequences of few channels, or short ones,
    are not cut.
    """
    found, plan = [], linear_scan._plan

    def noted(*args):
        grid, cut, sizes, limit = plan(*args)
        found.append((cut[2] > 1, sizes["COLS"], sizes["SHARED"], sizes["num_warps"]))
        return grid, cut, sizes, limit

    monkeypatch.setattr(linear_scan, "_plan", noted)
    monkeypatch.setattr(linear_scan, "launch", lambda *_, **__: None)
    shape = (b, n, *gates[:-1], channels // max(1, *gates[:-1], 1))
    a = torch.empty(b, n, *(gates or shape[2:]), dtype=dtype, device=DEVICE)
    x = torch.empty(shape, dtype=dtype, device=DEVICE)

    def launched(*args):
        if direction == "backward":
            out = torch.empty_like(args[1])
            args = out, out[:, :1].expand(-1, 5, *out.shape[2:]), *args
        getattr(linear_scan, direction)(*args)

    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    launched(a, x, None, False, 64)
    _, draw, *configuration = trial._of_linear_scan(direction, a, x, None, False, 64)
    launched(*draw(empty, *configuration))
    assert found[0] == found[1], found


@pytest.mark.parametrize("direction, which", [("forward", 0), ("backward", 0), ("backward", 1)])
def test_wrong_scans_are_not_used(monkeypatch, direction, which, filled):
    right = getattr(linear_scan, direction)

    def wrong(*args):
        out = list(right(*args))
        out[which] = 1.1 * out[which]
        return tuple(out)

    monkeypatch.setattr(linear_scan, direction, wrong)
    message = f"its {direction} kernels for gates in float32 and inputs in float32 are wrong, off"
    with pytest.warns(RuntimeWarning, match=message):
        assert message in trial.why_not("linear_scan", direction, linear_scan, *scan_arguments())
    assert "wrong" in fastmix.implementations("linear_scan", DEVICE)["triton"]


@pytest.mark.parametrize("error", [torch.AcceleratorError, RuntimeError])
def test_errors_that_come_late_are_the_kernels(monkeypatch, error):
    """A launch returns before its kernel has run. Triton's own launcher raises RuntimeError."""
    errors = [error("CUDA error: misaligned address")]
    monkeypatch.setattr(trial, "_synchronize", lambda device: [_raise(e) for e in errors[:1]
                                                               if errors.pop()])
    with pytest.warns(RuntimeWarning, match="does not run on its Triton kernels"):
        reason = trial.why_not("gate_loop", "forward", gate_loop, *arguments(5))
    assert "misaligned address" in reason


def _raise(error):
    raise error


@pytest.mark.parametrize("error", [torch.AcceleratorError, RuntimeError])
def test_a_device_that_fails_at_everything_is_not_fallen_back_on(monkeypatch, error):
    monkeypatch.setattr(trial, "_synchronize", lambda device: _raise(
        error("CUDA error: an illegal memory access was encountered")))
    with pytest.raises(RuntimeError, match="gate_loop: .*illegal memory access.* start it again"):
        trial.why_not("gate_loop", "forward", gate_loop, *arguments(5))
    assert not trial.failures


def test_nothing_is_tried_for_sequences_that_are_none():
    from fastmix._triton import scan
    for shape in (0, 8, 4), (2, 8, 0):
        empty = torch.empty(shape)
        assert trial.CONFIGURATIONS["linear_scan"](
            "forward", empty, empty, None, False, 0) is None
    assert scan.segments(8, 0, 4, torch.float32)[1] >= 4


def test_each_device_is_asked_for_its_own_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    _triton._why_not_on.cache_clear()
    try:
        assert _triton._why_not_on("cuda", 0) is None
        assert "has 7.5" in _triton._why_not_on("cuda", 1)
    finally:
        _triton._why_not_on.cache_clear()
