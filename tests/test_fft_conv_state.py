"""fft_conv in pieces, from state to state, against the definition at once."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastmix
from cases import distance
from fastmix import ops, reference
from fastmix.states import FFTConvRows, concatenate
from refusal import both_ways, check_refusal

KINDS = ["shared", "per sample", "short", "one lag", "revealed"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def draw(kind, n, dtype=torch.float64):
    m = {"short": 30, "one lag": 1}.get(kind, n)
    kernel = torch.randn(*(() if kind == "shared" else (2,)), m, 2, dtype=dtype) / m**0.5
    return torch.randn(2, n, 2, 3, dtype=dtype), kernel, torch.randn(2, 3, dtype=dtype)


def in_pieces(kind, x, kernel, skip, pieces, state=None, start=0):
    outputs = []
    for n in pieces:
        stop = start + n
        lags = kernel[:, start:stop] if kind == "revealed" else kernel
        y, state = ops.fft_conv(x[:, start:stop], lags, skip, revealed=kind == "revealed",
                                initial_state=state, return_state=True)
        outputs.append(y)
        start = stop
    return torch.cat(outputs, 1), state


def pieces_of(size, n):
    return [size] * (n // size) + [n % size] * (n % size > 0)


def at_random(n):
    pieces = []
    while sum(pieces) < n:
        pieces.append(min(random.choice([1, 1, 2, 5, 31, 64, 90]), n - sum(pieces)))
    return pieces


@every_kind
def test_any_pieces_are_the_whole(kind):
    n = 211
    tensors = draw(kind, n)
    expected = reference.fft_conv(*tensors)
    for pieces in (*(pieces_of(size, n) for size in (1, 2, 7, 97, n)), at_random(n)):
        y, state = in_pieces(kind, *tensors, pieces)
        assert distance(y, expected) < 1e-12, pieces
        assert sum(part.shape[1] for part in (state.x, *(b.x for b in state.blocks))) <= n


@pytest.mark.long
@every_kind
def test_blocks_merge_after_a_prompt(kind):
    """Of 800 steps: the epoch has 200, so blocks of 64 and 128."""
    n, prompt = 1030, 800
    tensors = draw(kind, n)
    y, _ = in_pieces(kind, *tensors, [prompt, *[1] * 70, *[20] * 6, *[1] * 40])
    expected = reference.fft_conv(*tensors)
    assert distance(y, expected) < 1e-12


@every_kind
def test_gradients_flow_through_states(kind):
    n = 150
    leaves = [t.requires_grad_() for t in draw(kind, n)]
    weight = torch.randn(2, n, 2, 3, dtype=torch.float64)
    y, _ = in_pieces(kind, *leaves, [3, 1, 1, 80, *[1] * 8, 57])
    actual = torch.autograd.grad((y * weight).sum(), leaves)
    expected = torch.autograd.grad((reference.fft_conv(*leaves) * weight).sum(), leaves)
    for f, e in zip(actual, expected, strict=True):
        assert distance(f, e) < 1e-11


@pytest.mark.parametrize("kind", ["shared", "revealed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_numbers(kind, dtype):
    n = 150
    tensors = draw(kind, n, dtype)
    y, state = in_pieces(kind, *tensors, [80, *[1] * 5, 65])
    expected = reference.fft_conv(*(t.double() for t in tensors))
    assert y.dtype == dtype and state.tail.dtype == torch.float32
    assert distance(y, expected) < 4 * torch.finfo(dtype).eps


def test_a_state_is_continued_twice_and_chosen_by_rows():
    x, kernel, skip = draw("revealed", 100)
    _, state = in_pieces("revealed", x, kernel, skip, [70, 3])
    once, _ = in_pieces("revealed", x, kernel, skip, [1] * 10, state, 73)
    again, _ = in_pieces("revealed", x, kernel, skip, [10], state, 73)
    assert distance(once, again) < 1e-12
    rows = [1, 1, 0]
    chosen, _ = in_pieces("revealed", x[rows], kernel[rows], skip, [2] * 5,
                          fastmix.select_rows(state, rows), 73)
    assert distance(chosen, once[rows]) < 1e-12


@every_kind
def test_rows_at_different_steps(kind, tmp_path):
    """Those of one length stay together, and None begins."""
    n, prompts, sizes = 140, (3, 70, 70, 0), (2, 1, 1, 1)
    tensors = [draw(kind, n) for _ in prompts]
    _, kernel, skip = tensors[0]
    kernels = [kernel if kind == "shared" else k for _, k, _ in tensors]
    xs = [x[:size] for (x, _, _), size in zip(tensors, sizes)]
    kernels = [k if k.ndim == 2 else k[:size] for k, size in zip(kernels, sizes)]
    whole = torch.cat([reference.fft_conv(x, k, skip) for x, k in zip(xs, kernels)])
    first = [in_pieces(kind, x, k, skip, [end])[1] if end else None
             for x, k, end in zip(xs, kernels, prompts)]
    state = concatenate(first, sizes)
    # One lag asks for one step: all prompts leave as much.
    assert [part.x.shape[0] for part in state.parts] == (
        [4, 1] if kind == "one lag" else [2, 2, 1])
    begins = [3, 3, 70, 70, 0]
    rows = list(zip(torch.cat(xs), [None] * 5 if kind == "shared" else torch.cat(kernels), begins))

    def steps(state, rows, sizes):
        """The outputs after `rows`, (x, kernel, begin) each, less the definition's."""
        rest = torch.stack([x[begin : begin + 70] for x, _, begin in rows])
        lags = kernel if kind == "shared" else torch.stack([
            k[begin : begin + 70] if kind == "revealed" else k for _, k, begin in rows])
        return in_pieces(kind, rest, lags, skip, sizes, state)[0]

    wanted = torch.stack([y[begin : begin + 70] for y, begin in zip(whole, begins)])
    for pieces in ([70], [1] * 70, [5, 1, 64]):
        assert distance(steps(state, rows, pieces), wanted) < 1e-12
    for chosen in ([4, 0, 0, 3, 1], [1], [2, 3], slice(1, None, 2)):
        picked = rows[chosen] if isinstance(chosen, slice) else [rows[i] for i in chosen]
        torch.save(fastmix.select_rows(state, chosen), tmp_path / "state")
        assert distance(steps(torch.load(tmp_path / "state"), picked, [3, 67]),
                        wanted[chosen]) < 1e-12
    again = concatenate([fastmix.select_rows(state, [2]), state, None], (1, 5, 1))
    assert [part.x.shape[0] for part in again.parts] == (
        [5, 2] if kind == "one lag" else [1, 2, 2, 2])
    assert fastmix.select_rows(state, slice(0)).x.shape[0] == 0


def test_rows_at_different_steps_under_autocast():
    """Torch's own cat refuses float16 there."""
    x, kernel, skip = draw("shared", 20, torch.float16)
    state = concatenate([in_pieces("shared", x, kernel, skip, [n])[1] for n in (4, 9)], (2, 2))
    given = torch.cat([x, x])[:, 9:12], kernel, skip
    plain = ops.fft_conv(*given, initial_state=state)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.fft_conv(*given, initial_state=state), plain)


@both_ways
def test_rows_at_different_steps_refuse_in_words(way):
    x, kernel, skip = draw("revealed", 20)
    parts = [in_pieces("revealed", x, kernel, skip, [n])[1] for n in (4, 9)]
    state, (x, kernel) = concatenate(parts, (2, 2)), (x[:, :1], kernel[:, :1])

    check_refusal(way, ops.fft_conv, (x, kernel), {"revealed": True, "initial_state": state},
                  ValueError, "initial_state must be of b = 2 rows like x, got 4")
    check_refusal(way, ops.fft_conv, (x, kernel),
                  {"revealed": True, "initial_state": FFTConvRows((None,))},
                  TypeError, r"initial_state.parts\[0\] must be an FFTConvState, got NoneType")
    with pytest.raises(IndexError, match=r"select_rows: rows must be from 0 to 3, got \[4\]"):
        fastmix.select_rows(state, [4])
    known = in_pieces("shared", *draw("shared", 5), [5])[1]
    with pytest.raises(ValueError, match="^concatenate: states must be of one module or operator"):
        concatenate([state, known], (4, 2))


@every_kind
def test_a_state_is_memory_of_its_own(kind):
    """Whatever later happens to what was handed in."""
    n = 150
    for prompt in (65, 80):  # of the block under way there is one step, or more
        x, kernel, skip = draw(kind, n)
        expected, _ = in_pieces(kind, x, kernel, skip, [64, prompt - 64, n - prompt])
        pieces = [64, *[1] * (prompt - 64)]
        mine, lags = x.clone(), kernel.clone()
        _, state = in_pieces(kind, mine, lags, skip, pieces)
        mine.zero_()
        if kind == "revealed":
            lags.zero_()
        for _ in range(2):
            y, after = in_pieces(kind, x, kernel, skip, [1] * 5, state, prompt)
            assert distance(y, expected[:, prompt : prompt + 5]) < 1e-12
            for t in (after.x, after.tail, *(part for block in after.blocks for part in block)):
                if t is not None:
                    t.zero_()
            state = in_pieces(kind, x, kernel, skip, pieces)[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_casts_no_more_lags_than_it_needs(dtype):
    x, kernel, _ = draw("shared", 4096, dtype)
    _, state = ops.fft_conv(x[:, :200], kernel, return_state=True)
    with MostBytes() as most:
        ops.fft_conv(x[:, 200:201], kernel, initial_state=state)
    assert most.bytes < kernel.nbytes


class MostBytes(TorchDispatchMode):
    """`bytes` of the largest tensor that any operator made, views left out."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not function.is_view:
            self.bytes = max(self.bytes, out.nbytes)
        return out


def refusals():
    x, kernel, _ = draw("revealed", 9)
    _, state = ops.fft_conv(x, kernel, revealed=True, return_state=True)
    _, state = ops.fft_conv(x[:, :1], kernel[:, :1], revealed=True, initial_state=state,
                            return_state=True)
    block, meta = state.blocks[0], torch.empty(2, 2, 2, 3, dtype=torch.float64, device="meta")
    more = {"initial_state": state, "revealed": True}
    return {
        "lags of other steps": ((x[:, :1], kernel), more, ValueError,
                                r"with revealed=True kernel must have shape \(b, n, h\) = \(2, 1,"),
        "one kernel for all": ((x, kernel[0]), more, ValueError, r".*got \(9, 2\)"),
        "another kind": ((x, kernel), {"initial_state": state}, ValueError,
                         "initial_state must come from a call with revealed=False .* got that of"),
        "another type": ((x, kernel), {"initial_state": x}, TypeError,
                         "initial_state must be an FFTConvState.*got Tensor"),
        "another batch": ((x[:1], kernel[:1]), more, ValueError, r"initial_state.x must have"),
        "another dtype": ((x.float(), kernel.float()), more, TypeError,
                          "initial_state.x must be.*got float64"),
        "a kernel of another batch": (
            (x, kernel), more | {"initial_state": state._replace(kernel=state.kernel[:1])},
            ValueError, r"initial_state.kernel must have shape \(b, p, h\)"),
        "a tail of another dtype": (
            (x, kernel), more | {"initial_state": state._replace(tail=state.tail.float())},
            TypeError, "initial_state.tail must be float64, got float32"),
        "a block on another device": (
            (x, kernel), more | {"initial_state": state._replace(
                blocks=(block._replace(ahead=meta),))},
            ValueError, r"initial_state.blocks\[0\].ahead must be on cpu like x, got meta"),
        "a block of another width": (
            (x, kernel), more | {"initial_state": state._replace(
                blocks=(block._replace(x=block.x[..., :2]),))},
            ValueError, r"initial_state.blocks\[0\].x must have shape \(b, m, h, d\) ="),
        "no steps": ((x, kernel), more | {"initial_state": state._replace(x=None)}, TypeError,
                     "initial_state.x must be a tensor, got NoneType"),
        "lags of fewer steps than x": (
            (x, kernel), more | {"initial_state": state._replace(kernel=state.kernel[:, 1:])},
            ValueError, r"initial_state.kernel must have shape \(b, p, h\) = \(2, 9, 2\), got"),
        "blocks without lags": (
            (x, kernel), more | {"initial_state": state._replace(
                blocks=(block._replace(kernel=None),))},
            TypeError, r"initial_state.blocks\[0\].kernel must be a tensor, got NoneType"),
        "a block that is none": (
            (x, kernel), more | {"initial_state": state._replace(blocks=(None,))}, TypeError,
            r"initial_state.blocks must be a tuple of FFTConvBlocks, got \(None,\)"),
        "no flag": ((x, kernel), {"revealed": 1}, TypeError, "revealed must be True or False"),
    }


@pytest.mark.parametrize("name", refusals())
@both_ways
def test_refuses(name, way):
    arguments, keywords, error, message = refusals()[name]
    check_refusal(way, ops.fft_conv, arguments, keywords, error, message)
