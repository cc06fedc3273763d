"""fastmix.nn.gateloop_transformer beside the published gateloop-transformer 0.2.5."""

import io

import pytest
import torch
from gateloop_transformer import associative_scan as published_scan
from gateloop_transformer import gateloop_transformer as published
from gateloop_transformer import simplified_gate_loop as published_simple

from fastmix.nn import gateloop_transformer as ours
from twins import assert_near, dtypes

pytestmark = pytest.mark.filterwarnings("ignore:.*use_reentrant")

ABLATIONS = [
    {}, {"ablate_complex": True}, {"ablate_state_transition": True},
    {"ablate_complex": True, "ablate_state_transition": True}]


def twins(name, dtype=torch.float64, /, **kwargs):
    """The published module and ours from one seed, held to the same weights in the same order."""
    pair = []
    for module in (published, ours):
        torch.manual_seed(7)
        pair.append(getattr(module, name)(**kwargs))
    theirs, mine = (m.state_dict() for m in pair)
    assert list(theirs) == list(mine)
    assert [n for n, _ in pair[0].named_parameters()] == [n for n, _ in pair[1].named_parameters()]
    for key in theirs:
        assert torch.equal(theirs[key], mine[key]), key
    return [m.to(dtype) for m in pair]


def assert_near_or_unused(mine, theirs, what, floor=0.0):
    if theirs is not None:
        assert_near(mine, theirs, what, floor)
    elif mine is not None:  # gates at n = 1, which nothing follows: zeros serve
        assert ("to_a." in what or what == "a") and not mine.any(), what


def assert_twins(pair, x, **call):
    """Same outputs and the same gradients to every parameter and to x."""
    results = []
    for module in pair:
        module.zero_grad()
        if x.is_floating_point():
            x = x.detach().requires_grad_()
        out = module(x, **call)
        torch.manual_seed(11)
        out.backward(torch.randn(out.shape, dtype=out.dtype))
        grads = {name: p.grad for name, p in module.named_parameters()}
        results.append({"out": out, "x": x.grad if x.is_floating_point() else None, **grads})
    qkv = [g.abs().max().item() for key, g in results[0].items() if "to_qkv" in key]
    for key, reference in results[0].items():
        # Decays can cancel: a gradient of mere rounding is held against one that is not.
        floor = 1e-3 * max(qkv) if "to_a." in key else 0.0
        assert_near_or_unused(results[1][key], reference, key, floor)


@dtypes
@pytest.mark.parametrize("n", [1, 2, 7, 13])
@pytest.mark.parametrize("config", [
    dict(dim=6),
    dict(dim=6, heads=1),
    dict(dim=10, heads=5),
    dict(dim=7, heads=3, dim_inner=9),
    dict(dim=6, heads=2, dim_inner=10, sub_ln=True),
    dict(dim=5, add_swish_gating=False),
    dict(dim=5, heads=2, dim_inner=6, add_swish_gating=False, sub_ln=True),
    dict(dim=6, heads=3, checkpoint_gate_looped_attn=False),
    dict(dim=6, heads=3, frac_gradient_state_transition=0),
    dict(dim=6, heads=3, frac_gradient_state_transition=0.5),
    dict(dim=6, heads=3, frac_gradient_state_transition=1.0),
], ids=str)
def test_gate_looped_attention(config, n, dtype):
    pair = twins("GateLoopedAttention", dtype, **config)
    for attribute in ("heads", "frac_gradient_state_transition", "checkpoint_gate_looped_attn"):
        assert getattr(pair[0], attribute) == getattr(pair[1], attribute)
    x = torch.randn(2, n, config["dim"], dtype=dtype)
    for call in ABLATIONS:
        assert_twins(pair, x, **call)


@dtypes
@pytest.mark.parametrize("call", ABLATIONS[:2], ids=["complex", "real"])
def test_gates_at_exactly_zero_are_one_half(call, dtype):
    pair = twins("GateLoopedAttention", dtype, dim=6, heads=3)
    for module in pair:
        torch.nn.init.zeros_(module.to_a[0].weight)
        torch.nn.init.zeros_(module.to_a[0].bias)
    assert_twins(pair, torch.randn(2, 5, 6, dtype=dtype), **call)


@dtypes
@pytest.mark.parametrize("n", [1, 2, 11])
@pytest.mark.parametrize("config", [
    dict(dim=6, dim_head=4, heads=3),
    dict(dim=5, dim_head=3, heads=1, add_swish_gating=True),
    dict(dim=7, dim_head=6, heads=2, rotary_emb=True),
    dict(dim=7, dim_head=5, heads=2, softmax_normalize=False),
    dict(dim=5, dim_head=2, heads=1, data_dependent_rel_pos=True),
    dict(dim=6, dim_head=4, heads=3, data_dependent_rel_pos=True, rotary_emb=True,
         add_swish_gating=True),
    dict(dim=6, dim_head=4, heads=2, data_dependent_rel_pos=True, softmax_normalize=True),
    dict(dim=6, dim_head=4, heads=2, data_dependent_rel_pos=True,
         frac_gradient_data_dependent_rel_pos=0),
    dict(dim=6, dim_head=4, heads=2, data_dependent_rel_pos=True,
         frac_gradient_data_dependent_rel_pos=1.0),
], ids=str)
def test_causal_full_attention(config, n, dtype):
    pair = twins("CausalFullAttention", dtype, **config)
    assert pair[0].scale == pair[1].scale
    assert pair[0].softmax_normalize == pair[1].softmax_normalize
    x = torch.randn(2, n, config["dim"], dtype=dtype)
    for call in ABLATIONS:
        assert_twins(pair, x, **call)


@dtypes
@pytest.mark.parametrize("config", [
    dict(dim=6, depth=2),
    dict(dim=9, depth=1, gate_loop_heads=1, ff_mult=2),
    dict(dim=7, depth=2, gate_loop_heads=4, dim_gate_looped_attn=12, sub_ln=True),
    dict(dim=6, depth=2, post_ln_norm=True, checkpoint_gate_looped_attn=False),
    dict(dim=6, depth=1, attn_add_swish_gating=False, frac_gradient_state_transition=0.5),
    dict(dim=6, depth=1, ablate_complex=True),
    dict(dim=6, depth=1, ablate_state_transition=True),
    dict(dim=6, depth=2, use_gate_looped_attn=False, dim_head=4, heads=3),
    dict(dim=6, depth=1, use_gate_looped_attn=False, dim_head=4, heads=1, rotary_emb=True,
         attn_add_swish_gating=False, post_ln_norm=True),
    dict(dim=6, depth=1, use_gate_looped_attn=False, dim_head=4, heads=2,
         data_dependent_rel_pos=True, frac_gradient_state_transition=0.7),
    dict(dim=6, depth=1, use_gate_looped_attn=False, dim_head=4, heads=2,
         attn_softmax_normalize=False, ablate_state_transition=True),
], ids=str)
def test_transformer(config, dtype):
    pair = twins("Transformer", dtype, num_tokens=17, **config)
    for n in (1, 2, 7):
        assert_twins(pair, torch.randint(17, (2, n)))
    for n in (2, 12):
        assert_twins(pair, torch.randint(17, (3, n)), return_loss=True)
    for call in (*ABLATIONS[1:], {"ablate_complex": False, "ablate_state_transition": False}):
        assert_twins(pair, torch.randint(17, (2, 5)), **call)


def test_eval_mode_without_gradients():
    theirs, mine = twins("Transformer", dim=6, num_tokens=17, depth=2, gate_loop_heads=2)
    tokens = torch.randint(17, (2, 9))
    with torch.no_grad():
        expected, got = theirs.eval()(tokens), mine.eval()(tokens)
    assert_near(got, expected, "logits")
    assert torch.equal(got, mine.train()(tokens))


def test_tokens_that_are_no_part_of_the_loss():
    model = ours.Transformer(8, num_tokens=5, depth=1, dim_head=4, heads=2)
    x = torch.randint(0, 5, (2, 7))
    logits = model(x[:, :-1].index_fill(1, torch.tensor([3, 5]), 0))
    x[:, [3, 5, 6]] = -1
    counted = torch.nn.functional.cross_entropy(logits[:, [0, 1, 3]].mT, x[:, [1, 2, 4]])
    assert torch.allclose(model(x, return_loss=True, ignore_index=-1), counted)
    with pytest.raises(ValueError, match="Transformer: ignore_index=-1 .* return_loss must be"):
        model(x, ignore_index=-1)
    with pytest.raises(IndexError, match=r"got -1 to \d+ \(ignore_index=… names the token"):
        model(x, return_loss=True)
    with pytest.raises(IndexError, match=r"got -1 to \d+$"):
        model(x)


@pytest.mark.parametrize("given", [5, -1])
def test_a_last_token_out_of_range_is_refused_in_words(given):
    model = ours.Transformer(8, num_tokens=5, depth=1, dim_head=4, heads=2)
    with pytest.raises(IndexError, match="Transformer: x must hold token ids from 0 to 4.*, got"):
        model(torch.tensor([[1, 2, given]]), return_loss=True)


def test_int32_tokens_give_the_loss_of_int64_tokens():
    model = ours.Transformer(6, num_tokens=17, depth=1)
    tokens = torch.randint(17, (2, 9))
    assert torch.equal(model(tokens, return_loss=True), model(tokens.int(), return_loss=True))


@dtypes
def test_norms_and_feed_forward(dtype):
    torch.manual_seed(3)
    x = torch.randn(2, 5, 7, dtype=dtype)
    x[0, 0] = 0
    x[0, 1] *= 1e-13  # below the eps of the norm
    assert_twins(twins("RMSNorm", dtype, dim=7), x)
    assert_twins(twins("FeedForward", dtype, dim=7), x)
    assert_twins(twins("FeedForward", dtype, dim=7, mult=2), x)
    for name in ("PreNorm", "PostNorm"):
        pair = []
        for module in (published, ours):
            torch.manual_seed(5)
            wrapped = module.GateLoopedAttention(7, sub_ln=True)
            pair.append(getattr(module, name)(7, wrapped).to(dtype))
        assert list(pair[0].state_dict()) == list(pair[1].state_dict())
        x = torch.randn(2, 5, 7, dtype=dtype)
        assert_twins(pair, x)
        assert_twins(pair, x, ablate_state_transition=True)  # keywords reach the mixer


@pytest.mark.parametrize("config", [
    dict(gate_loop_heads=3, sub_ln=True),
    dict(post_ln_norm=True, attn_add_swish_gating=False),
    dict(use_gate_looped_attn=False, dim_head=4, heads=2, rotary_emb=True,
         data_dependent_rel_pos=True),
], ids=str)
def test_checkpoints_load_both_ways(config):
    tokens = torch.randint(17, (2, 9))
    for source, target in ((published, ours), (ours, published)):
        trained = source.Transformer(6, num_tokens=17, depth=2, **config).double()
        fresh = target.Transformer(6, num_tokens=17, depth=2, **config).double()
        file = io.BytesIO()
        torch.save(trained.state_dict(), file)
        file.seek(0)
        assert not torch.allclose(trained(tokens), fresh(tokens))
        fresh.load_state_dict(torch.load(file))
        assert_near(fresh(tokens), trained(tokens), "logits")


@dtypes
@pytest.mark.parametrize("real", [False, True], ids=["complex", "real"])
@pytest.mark.parametrize("n", [1, 2, 13])
@pytest.mark.parametrize("batch, state", [
    (2, (1, 1)), (1, (1, 1)), (2, (3, 1)), (2, (1, 5)), (2, (3, 5)), (1, (3, 5))])
def test_gate_loop_operator(batch, state, n, real, dtype):
    a = torch.polar(torch.rand(batch, n, *state, dtype=dtype),
                    6 * torch.rand(batch, n, *state, dtype=dtype))
    inputs = [torch.randn(2, n, d, dtype=dtype) for d in (3, 3, 5)] + [a.real if real else a]
    if n == 1 and batch == 1:
        inputs[:3] = [t[:1] for t in inputs[:3]]
    weight = torch.randn(inputs[0].shape[0], n, 5, dtype=dtype)
    results = []
    for module in (published, ours):
        args = [t.clone().requires_grad_() for t in inputs]
        out = module.gate_loop_operator(*args)
        (out * weight).sum().backward()
        results.append([out, *(t.grad for t in args)])
    for name, mine, theirs in zip(("out", "q", "k", "v", "a"), results[1], results[0]):
        assert_near_or_unused(mine, theirs, name)


def affine(earlier, later):
    (a, x), (b, y) = earlier, later
    return a * b, b * x + y


def matrices(earlier, later):
    return [later[0] @ earlier[0]]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 13, 31, 64])
def test_associative_scan(n):
    cases = [
        (affine, (torch.randn(2, n, 1, dtype=torch.float64), torch.randn(2, n, 3).double())),
        (affine, [torch.randn(2, n, 3, dtype=torch.complex128), torch.randn(2, n, 3).double()]),
        (matrices, (torch.randn(2, n, 3, 3, dtype=torch.float64),)),
    ]
    for operator, elems in cases:
        results = []
        for scan in (published_scan.associative_scan, ours.associative_scan):
            args = [e.clone().requires_grad_() for e in elems]
            out = scan(operator, tuple(args))
            sum((o * o).sum().abs() for o in out).backward()
            results.append([*out, *(a.grad for a in args)])
        for mine, theirs in zip(*reversed(results)):
            assert_near(mine, theirs, "scan")

    # against the definition, and in few calls
    operator, elems = cases[2]
    calls = []
    out = ours.associative_scan(lambda a, b: calls.append(1) or operator(a, b), elems)
    assert type(out) is list
    running = elems[0][:, 0]
    for t in range(n):
        running = elems[0][:, t] @ running if t else running
        torch.testing.assert_close(out[0][:, t], running)
    assert len(calls) <= 2 * (n - 1).bit_length()


@pytest.mark.parametrize("refused, error, message", [
    (lambda: ours.GateLoopedAttention(6, heads=4), ValueError,
     "GateLoopedAttention: heads must divide dim_inner, got heads=4 and dim_inner=6"),
    (lambda: ours.Transformer(6, num_tokens=5, depth=1, dim_gate_looped_attn=9, gate_loop_heads=2),
     ValueError, "heads=2 and dim_inner=9"),
    (lambda: ours.CausalFullAttention(6, dim_head=5, data_dependent_rel_pos=True), ValueError,
     "dim_head must be even with data_dependent_rel_pos, got 5"),
    (lambda: model()(torch.rand(2, 5)), TypeError,
     "Transformer: x must be int64 or int32, got float32"),
    (lambda: model()([1, 2]), TypeError, "Transformer: x must be a tensor, got list"),
    (lambda: model()(torch.ones(5).long()), ValueError, r"x must have shape \(b, n\), got \(5,\)"),
    (lambda: model()(torch.ones(2, 0).long()), ValueError,
     "x must have at least one time step, got n=0"),
    (lambda: model()(torch.ones(2, 1).long(), return_loss=True), ValueError,
     r"return_loss predicts each token .*at least 1 sequence of 2 tokens, got shape \(2, 1\)"),
    (lambda: model()(torch.ones(0, 4).long(), return_loss=True), ValueError,
     r"at least 1 sequence of 2 tokens, got shape \(0, 4\)"),
    (lambda: operator(q=torch.randn(2, 5)), ValueError,
     r"gate_loop_operator: q must have shape \(b, n, d\), got \(2, 5\)"),
    (lambda: operator(k=torch.randn(2, 5, 4)), ValueError,
     r"gate_loop_operator: k must have shape \(b, n, d\) = \(2, 5, 3\), got \(2, 5, 4\)"),
    (lambda: operator(v=torch.randn(2, 6, 4)), ValueError,
     r"gate_loop_operator: v must have shape .*got \(2, 6, 4\)"),
    (lambda: operator(v=torch.ones(2, 5, 4).long()), TypeError,
     "gate_loop_operator: v must be float32, got int64"),
    (lambda: operator(q=torch.randn(2, 5, 3, dtype=torch.complex64)), TypeError,
     "gate_loop_operator: q must be float64 .*got complex64"),
    (lambda: operator(a=torch.randn(2, 5)), ValueError,
     r"a must have shape \(b or 1, n, d or 1, e or 1\) .* = \(2, 5, 3, 4\), got \(2, 5\)"),
    (lambda: operator(a=torch.randn(2, 1, 1, 1)), ValueError, r"got \(2, 1, 1, 1\)"),
    (lambda: operator(a=torch.randn(2, 5, 2, 1)), ValueError, r"got \(2, 5, 2, 1\)"),
    (lambda: operator(a=torch.ones(2, 5, 1, 1).long()), TypeError, "a must be .*got int64"),
    (lambda: ours.associative_scan(affine, (torch.ones(2, 5), torch.ones(2, 4))), ValueError,
     r"of one length n, got \[\(2, 5\), \(2, 4\)\]"),
    (lambda: ours.associative_scan(affine, (torch.ones(5), torch.ones(5))), ValueError,
     r"got \[\(5,\), \(5,\)\]"),
    (lambda: ours.associative_scan(affine, ()), ValueError, r"got \[\]"),
])
def test_refused_input(refused, error, message):
    with pytest.raises(error, match=message):
        refused()


def model():
    return ours.Transformer(6, num_tokens=5, depth=1)


def operator(**changed):
    args = dict(q=torch.randn(2, 5, 3), k=torch.randn(2, 5, 3), v=torch.randn(2, 5, 4),
                a=torch.randn(2, 5, 1, 1, dtype=torch.complex64))
    return ours.gate_loop_operator(**{**args, **changed})


# SimpleGateLoopLayer


def simple_twins(dtype, **kwargs):
    pair = []
    for module in (published_simple, ours):
        torch.manual_seed(7)
        pair.append(module.SimpleGateLoopLayer(6, **kwargs))
    theirs, mine = (m.state_dict() for m in pair)
    assert list(theirs) == list(mine) and all(torch.equal(theirs[k], mine[k]) for k in theirs)
    return [m.to(dtype) for m in pair]


@dtypes
@pytest.mark.parametrize("kwargs", [
    {}, {"prenorm": False, "post_ln": True}, {"reverse": True}, {"post_ln": True, "reverse": True},
], ids=str)
def test_simple_gate_loop(kwargs, dtype):
    assert_twins(simple_twins(dtype, **kwargs), torch.randn(2, 9, 6, dtype=dtype))


def test_simple_gate_loop_in_pieces():
    """Caches of each go on in the other; n steps at once are any pieces."""
    theirs, mine = simple_twins(torch.float64, post_ln=True)
    x = torch.randn(3, 9, 6, dtype=torch.float64)
    whole = theirs(x)
    for first, then in ((theirs, mine), (mine, theirs), (mine, mine)):
        start, cache = first(x[:, :4], return_cache=True)
        middle, cache = then(x[:, 4:5], cache=cache, return_cache=True)
        expected = theirs(x[:, :5], return_cache=True)[1]
        for got, want in zip(cache, expected):
            assert_near(got, want, "cache")
        assert_near(torch.cat((start, middle, then(x[:, 5:], cache)), dim=1), whole, "output")


def test_simple_gate_loop_takes_the_names_of_algorithms():
    x = torch.randn(2, 5, 6)
    plain = ours.SimpleGateLoopLayer(6)
    for name in ("use_heinsen", "use_jax_associative_scan"):
        other = ours.SimpleGateLoopLayer(6, **{name: True})
        other.load_state_dict(plain.state_dict())
        assert torch.equal(other(x), plain(x))
    with pytest.raises(ValueError, match="must not both be True"):
        ours.SimpleGateLoopLayer(6, use_heinsen=True, use_jax_associative_scan=True)
    with pytest.raises(ValueError, match="return_cache must be False with reverse"):
        ours.SimpleGateLoopLayer(6, reverse=True)(x, return_cache=True)
    with pytest.raises(ValueError, match=r"cache\[0\] must have shape \(b·dim, 1\) = \(12, 1\)"):
        plain(x, cache=(torch.ones(6, 1), torch.ones(6, 1)))
    numbers = torch.ones(12, 1)
    for cache, message in (((numbers,), "cache must be a tuple of two tensors, .* got tuple of 1"),
                           (numbers, "cache must be a tuple of two tensors, .* got Tensor"),
                           ((numbers, numbers.double()), r"cache\[1\] must be float32, got float"),
                           ((numbers.int(), numbers), r"cache\[0\] must be float32, got int32")):
        with pytest.raises(TypeError, match=f"^SimpleGateLoopLayer: {message}"):
            plain(x, cache=cache)


def test_caches_of_simple_gate_loops_in_half_precision():
    """Also that of the published layer, which comes in the dtype of x."""
    theirs, mine = simple_twins(torch.bfloat16)
    x = torch.randn(2, 5, 6, dtype=torch.bfloat16)
    for layer in (theirs, mine):
        _, cache = layer(x[:, :4], return_cache=True)
        torch.testing.assert_close(mine(x[:, 4:], cache), mine(x)[:, 4:], rtol=0.03, atol=0.03)


def test_simple_gate_loop_operator():
    q, kv, a = torch.rand(3, 2, 7, 4, dtype=torch.float64).unbind()
    state = torch.rand(2, 2, 4, dtype=torch.float64).unbind()
    for cache in (None, state):
        out, (product, last) = published_simple.gate_loop_operator(q, kv, a, cache)
        mine, (my_product, my_last) = ours.simplified_gate_loop.gate_loop_operator(q, kv, a, cache)
        assert_near(mine, out)
        assert_near(my_last, last)
        assert_near(my_product, product)
