"""fastmix.nn.g_mlp_gpt against g-mlp-gpt==0.0.15: same seed, same weights, same results."""

import copy
import random
import re

import pytest
import torch
from g_mlp_gpt import g_mlp_gpt as published
from g_mlp_gpt.autoregressive_wrapper import AutoregressiveWrapper
from torch import nn

from fastmix.nn.g_mlp_gpt import g_mlp_gpt as fast
from twins import assert_near, dtypes


class Scaled(nn.Module):
    """An activation that learns."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return torch.sin(self.scale * x)


ACTS = [nn.Identity, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, lambda: nn.GELU("tanh"), Scaled,
        lambda: torch.tanh]


def assert_same_state(ours, theirs):
    assert [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()] == \
        [(k, v.shape, v.dtype) for k, v in theirs.state_dict().items()]
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def build(name, *args, act=None, seed=0, **kwargs):
    """The published class and ours from one seed; `act` is a factory."""
    made, draws = [], []
    for module in (published, fast):
        torch.manual_seed(seed)
        extra = {} if act is None else {"act": act()}
        made.append(getattr(module, name)(*copy.deepcopy(args), **kwargs, **extra))
        draws.append(torch.rand(3))
    assert_same_state(made[1], made[0])
    assert torch.equal(*draws), "another number of random draws"
    return made


def randomised(theirs, ours, dtype, seed=1):
    """Weights that make every part matter, carried over by checkpoints in both directions."""
    torch.manual_seed(seed)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    with torch.no_grad():
        for parameter in ours.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn_like(parameter) / fan_in ** 0.5)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.fill_(float("nan"))
    ours.load_state_dict(theirs.state_dict())
    assert_same_state(ours, theirs)
    return theirs, ours


def results(module, inputs, forward_seed, **kwargs):
    """Output, input gradients and parameter gradients; the loss weighs every element anew."""
    module.zero_grad()
    inputs = [i.clone().requires_grad_(i.is_floating_point()) for i in inputs]
    torch.manual_seed(forward_seed)
    random.seed(forward_seed)
    out = module(*inputs, **kwargs)
    torch.manual_seed(99)
    (out * torch.randn(out.shape, dtype=out.dtype, device=out.device)).sum().backward()
    actual = {"out": out.detach()}
    actual.update((f"input {i}", x.grad) for i, x in enumerate(inputs) if x.requires_grad)
    actual.update((name, p.grad) for name, p in module.named_parameters())
    return actual


def compare(theirs, ours, inputs, dtype, forward_seed=5, **kwargs):
    want = results(theirs, inputs, forward_seed, **kwargs)
    got = results(ours, inputs, forward_seed, **kwargs)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            assert_near(got[name], value, name)
    return got


# functions


@pytest.mark.parametrize("size", [1, 2, 6, 7, 12])
@pytest.mark.parametrize("multiple", [1, 2, 3, 7, 20])
def test_pad_to_multiple(size, multiple):
    for dim in (-1, -2, -3):
        shape = [2, 3, 4]
        shape[dim] = size
        x = torch.randn(shape)
        want = published.pad_to_multiple(x, multiple, dim=dim, value=0.5)
        assert torch.equal(fast.pad_to_multiple(x, multiple, dim=dim, value=0.5), want)
        assert torch.equal(fast.pad_to_multiple(x, multiple, dim=dim % 3, value=0.5), want)


def test_dropout_layers():
    layers = list(range(7))
    assert fast.dropout_layers(layers, 1) is layers
    kept = set()
    for seed in range(20):
        for prob_survival in (0., 0.3, 0.9):
            actual = []
            for module in (published, fast):
                torch.manual_seed(seed)
                random.seed(seed)
                actual.append((module.dropout_layers(layers, prob_survival),
                              torch.rand(1).item(), random.random()))
            assert actual[0] == actual[1]
            kept.add(len(actual[1][0]))
    assert {1, 7} <= kept and layers == list(range(7))


# layers


@dtypes
def test_small_layers(dtype):
    x = torch.randn(2, 5, 6, dtype=dtype)
    for name, args in (("Residual", (nn.Linear(6, 6),)), ("GEGLU", ())):
        compare(*randomised(*build(name, *args), dtype), [x], dtype)
    theirs, ours = randomised(*build("PreNorm", 6, nn.Bilinear(6, 6, 3)), dtype)
    compare(theirs, ours, [x], dtype, input2=torch.randn_like(x))
    for dim, mult in ((6, 4), (5, 3), (7, 2.5), (1, 2)):
        theirs, ours = randomised(*build("FeedForward", dim, mult=mult), dtype)
        compare(theirs, ours, [torch.randn(3, dim, dtype=dtype)], dtype)


@dtypes
@pytest.mark.parametrize("n", [1, 2, 13])
@pytest.mark.parametrize("widths", [(6, 4, 5), (3, 1, 1), (7, 5, 16)])
def test_attention(n, widths, dtype):
    dim_in, dim_out, dim_inner = widths
    theirs, ours = randomised(*build("Attention", dim_in, dim_out, dim_inner), dtype)
    compare(theirs, ours, [torch.randn(3, n, dim_in, dtype=dtype)], dtype)


@dtypes
@pytest.mark.parametrize("n", [1, 2, 13, 15])
@pytest.mark.parametrize("window", [1, 2, 5, 16])
@pytest.mark.parametrize("widths", [(6, 4, 5), (3, 1, 1)])
def test_local_attention(n, window, widths, dtype):
    dim_in, dim_inner, dim_out = widths
    theirs, ours = randomised(
        *build("LocalAttention", dim_in, dim_inner, dim_out, window=window), dtype)
    compare(theirs, ours, [torch.randn(3, n, dim_in, dtype=dtype)], dtype)


def test_local_attention_quirks():
    """Keys are values, and `window` zero keys share the softmax of the first window."""
    layer = fast.LocalAttention(4, 3, 2, window=3).double()
    x = torch.randn(2, 1, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.to_qkv.weight[:3] = 0
        key = layer.to_qkv(x)[..., 3:6]
        torch.testing.assert_close(layer(x), layer.to_out(key / 4))


SGU_SIZES = [(1, 5), (6, 6), (3, 9), (2, 8)]  # heads, channels


@dtypes
@pytest.mark.parametrize("heads,channels", SGU_SIZES)
@pytest.mark.parametrize("n", [1, 2, 7, 13])
def test_causal_sgu(heads, channels, n, dtype):
    for dim_seq in {n, 13}:
        theirs, ours = build("CausalSGU", 2 * channels, dim_seq, heads=heads)
        randomised(theirs, ours, dtype)
        x = torch.randn(2, n, 2 * channels, dtype=dtype)
        compare(theirs, ours, [x], dtype)
        compare(theirs, ours, [x], dtype, gate_res=torch.randn(2, n, channels, dtype=dtype))


@dtypes
@pytest.mark.parametrize("heads,channels", SGU_SIZES)
@pytest.mark.parametrize("window", [1, 3, 5, 32])
def test_causal_local_sgu(heads, channels, window, dtype):
    theirs, ours = build("CausalLocalSGU", 2 * channels, 8, heads=heads, window=window)
    randomised(theirs, ours, dtype)
    for n in (1, 2, 13):
        x = torch.randn(2, n, 2 * channels, dtype=dtype)
        gate_res = torch.randn(2, n, channels, dtype=dtype)
        compare(theirs, ours, [x, gate_res], dtype)
        compare(theirs, ours, [x], dtype)


SGUS = [("CausalSGU", {}), ("CausalLocalSGU", {"window": 3})]


@dtypes
@pytest.mark.parametrize("shape", [(2, 7, 4), (1, 7, 4), (7, 4), (2, 1, 4), (2, 7, 1), (4,), ()])
@pytest.mark.parametrize("name, options", SGUS)
def test_gate_res_broadcasts(name, options, shape, dtype):
    theirs, ours = randomised(*build(name, 8, 7, heads=2, **options), dtype)
    inputs = torch.randn(2, 7, 8, dtype=dtype), torch.randn(shape, dtype=dtype)
    compare(theirs, ours, inputs, dtype)


@dtypes
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", ["CausalSGU", "CausalLocalSGU"])
def test_sgu_act(name, act, dtype):
    kwargs = {"window": 3} if name == "CausalLocalSGU" else {}
    theirs, ours = randomised(*build(name, 8, 7, heads=2, act=act, **kwargs), dtype)
    x, gate_res = torch.randn(2, 7, 8, dtype=dtype), torch.randn(2, 7, 4, dtype=dtype)
    got = compare(theirs, ours, [x, gate_res], dtype)
    assert ("act.scale" in got) == (act is Scaled)


@pytest.mark.parametrize("act,handed_over", [
    (nn.Identity(), "identity"), (nn.Tanh(), "tanh"), (nn.Sigmoid(), "sigmoid"),
    (nn.SiLU(), "silu"), (nn.GELU(), "gelu")])
def test_fused_act_reaches_the_operator_by_name(act, handed_over, monkeypatch):
    seen = []
    for name in ("causal_sgu", "windowed_sgu"):
        monkeypatch.setattr(fast.ops, name, lambda *_, activation, **__: seen.append(activation))
    x, subclass = torch.randn(1, 3, 4), type("Own", (type(act),), {})()
    for chosen in (act, subclass):
        fast.CausalSGU(4, 3, act=chosen, heads=1)(x)
        fast.CausalLocalSGU(4, 3, act=chosen, heads=1, window=2)(x)
    assert seen == [handed_over, handed_over, subclass, subclass]


@dtypes
@pytest.mark.parametrize("every", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_axially_fold(every, n, dtype):
    theirs, ours = randomised(*build("AxiallyFold", 5, every, nn.Linear(5, 5)), dtype)
    compare(theirs, ours, [torch.randn(2, n, 5, dtype=dtype)], dtype)


@dtypes
@pytest.mark.parametrize("options", [
    dict(heads=1), dict(heads=9, window=4), dict(heads=3, window=4, attn_dim=3),
    dict(heads=1, attn_dim=5, act=nn.Tanh), dict(heads=3, window=7, causal=True),
    dict(heads=3, window=11, act=Scaled, causal=True)], ids=str)
def test_block(options, dtype):
    theirs, ours = build("gMLPBlock", dim=6, seq_len=7, dim_ff=18, **options)
    randomised(theirs, ours, dtype)
    for n in (1, 2, 7):
        compare(theirs, ours, [torch.randn(2, n, 6, dtype=dtype)], dtype)


def test_causal_is_the_initial_bound():
    options = dict(dim=4, seq_len=6, dim_ff=8, heads=2)
    assert torch.all(fast.gMLPBlock(**options).sgu.weight == 0)
    weight = fast.gMLPBlock(**options, causal=True).sgu.weight
    assert 0.1 / 6 < weight.abs().max() <= 1 / 6


# the language model

MODELS = {
    "one head": dict(dim=5, ff_mult=2, depth=2, seq_len=7),
    "head per channel": dict(dim=5, ff_mult=2, depth=1, seq_len=7, heads=5),
    "tanh": dict(dim=6, depth=2, seq_len=7, heads=3, act=nn.Tanh),
    "learned act": dict(dim=6, depth=2, seq_len=7, heads=3, window=3, act=Scaled),
    "window": dict(dim=6, depth=2, seq_len=7, heads=2, window=3),
    "attention, no window": dict(dim=6, depth=2, seq_len=7, attn_dim=4),
    "mixed": dict(dim=6, ff_mult=3, depth=5, seq_len=9, heads=3, attn_dim=(None, 3, 5, 2, None),
                  window=(2, (4, 3), None, (30, 2), (None, 2)), act=nn.GELU),
    "reversible": dict(dim=6, depth=3, seq_len=7, heads=2, reversible=True),
    "reversible mixed": dict(dim=5, ff_mult=2, depth=3, seq_len=7, window=(3, (2, 2), 20),
                             attn_dim=(2, None, 3), reversible=True, act=Scaled),
    "survival has no effect": dict(dim=4, depth=3, seq_len=7, prob_survival=0.3),
    "no layers": dict(dim=4, depth=0, seq_len=7),
    "no layers, reversible": dict(dim=4, depth=0, seq_len=7, reversible=True),
}


@dtypes
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_model(options, dtype):
    theirs, ours = randomised(*build("gMLPGPT", num_tokens=11, **options), dtype)
    for attribute in ("seq_len", "prob_survival"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    for n in (1, 2, 7):
        tokens = [torch.randint(11, (2, n))]
        compare(theirs.train(), ours.train(), tokens, dtype)
        compare(theirs.eval(), ours.eval(), tokens, dtype)
    losses = [AutoregressiveWrapper(m)(tokens[0]) for m in (ours, theirs)]
    assert_near(*losses)


@pytest.mark.parametrize("seed", range(6))
def test_reversible_model_drops_the_same_layers(seed):
    options = dict(num_tokens=7, dim=4, depth=4, seq_len=5, heads=2, reversible=True)
    tokens = [torch.randint(7, (2, 5))]
    for prob_survival in (0.5, 0.):
        theirs, ours = randomised(
            *build("gMLPGPT", prob_survival=prob_survival, **options), torch.float64)
        got = compare(theirs, ours, tokens, torch.float64, forward_seed=seed)
        without = sum(v is None for k, v in got.items() if k.endswith("proj_out.weight"))
        assert without == 3 if prob_survival == 0 else without < 4
        assert torch.equal(ours.eval()(*tokens), ours(*tokens))


@pytest.mark.parametrize("window,longest", [
    (3, None), ((3, (2, 4)), None), (None, 6), (9, 6), ((3, (None, 2)), 12), (((6, 3), 2), 18)])
def test_lengths_beyond_seq_len(window, longest):
    theirs, ours = randomised(
        *build("gMLPGPT", num_tokens=5, dim=4, depth=2, seq_len=6, window=window), torch.float64)
    accepted = longest or 31
    compare(theirs, ours, [torch.randint(5, (1, accepted))], torch.float64)
    if longest:
        tokens = torch.randint(5, (1, longest + 1))
        with pytest.raises(ValueError, match=f"gMLPGPT: x .* at most {longest} .* n={longest + 1}"):
            ours(tokens)
        with pytest.raises(RuntimeError):
            theirs(tokens)


def test_short_attn_dim_builds_fewer_layers_and_says_so():
    options = dict(num_tokens=5, dim=4, depth=3, seq_len=6, attn_dim=(2, 3))
    with pytest.warns(UserWarning, match="attn_dim has 2 entries for depth=3.* gets 2 layers"):
        theirs, ours = randomised(*build("gMLPGPT", **options), torch.float64)
    assert len(ours.net.layers) == 2
    compare(theirs, ours, [torch.randint(5, (2, 6))], torch.float64)


def test_empty_batch():
    options = dict(num_tokens=5, dim=4, depth=2, seq_len=6, window=((3, 2), None), attn_dim=3)
    for reversible in (False, True):
        model = fast.gMLPGPT(**options, reversible=reversible)
        assert model(torch.zeros(0, 5, dtype=torch.long)).shape == (0, 5, 5)


# sequences


def layer(dim, dropout=0.):
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Dropout(dropout), nn.Tanh())


def reversible_twins(depth, dim=4, dropout=0., dtype=torch.float64, **kwargs):
    torch.manual_seed(3)
    blocks = nn.ModuleList([
        nn.ModuleList([layer(dim, dropout), layer(dim, dropout)]) for _ in range(depth)]).to(dtype)
    theirs = published.ReversibleSequence(copy.deepcopy(blocks), **kwargs)
    ours = fast.ReversibleSequence(blocks, **kwargs)
    assert_same_state(ours, theirs)
    return theirs, ours


def two_streams(sequence, x):
    """What a reversible sequence computes, left to plain autograd."""
    x1 = x2 = x
    for block in sequence.blocks:
        x1 = x1 + block.f.net(x2)
        x2 = x2 + block.g.net(x1)
    return x1 + x2


def gradients(sequence, x, out):
    return torch.autograd.grad(out.square().sum(), (x, *sequence.parameters()))


@pytest.mark.parametrize("dropout", [0., 0.5])
@pytest.mark.parametrize("device", [
    "cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU")])])
def test_reversible_replays_dropout(device, dropout):
    theirs, ours = (m.to(device) for m in reversible_twins(3, dropout=dropout))
    x = torch.randn(2, 5, 4, dtype=torch.float64, device=device)
    compare(theirs, ours, [x], torch.float64)

    x.requires_grad_()
    torch.manual_seed(8)
    out = ours(x)
    state = torch.get_rng_state()
    got = gradients(ours, x, out)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    plain = two_streams(ours, x)
    assert_near(out, plain)
    for value, want in zip(got, gradients(ours, x, plain), strict=True):
        assert_near(value, want)


def test_reversible_forwards_twice_before_backward():
    _, ours = reversible_twins(2, dropout=0.5)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    actual = []
    for run in (ours, lambda x: two_streams(ours, x)):
        torch.manual_seed(4)
        actual.append(gradients(ours, x, run(x) * run(2 * x)))
    for value, want in zip(*actual, strict=True):
        assert_near(value, want)


def test_reversible_learns_behind_a_frozen_input():
    _, ours = reversible_twins(2)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    ours.blocks[0].g.requires_grad_(False)
    learning = [p for p in ours.parameters() if p.requires_grad]
    got = torch.autograd.grad(ours(x).square().sum(), learning)
    want = torch.autograd.grad(two_streams(ours, x).square().sum(), learning)
    for value, expected in zip(got, want, strict=True):
        assert_near(value, expected)


def test_reversible_with_a_module_shared_by_layers():
    torch.manual_seed(0)
    shared = layer(4).double()
    ours = fast.ReversibleSequence([(shared, layer(4).double()), (shared, shared)])
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    got, want = (gradients(ours, x, out) for out in (ours(x), two_streams(ours, x)))
    for value, expected in zip(got, want, strict=True):
        assert_near(value, expected)


class WithContext(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x, context=None):
        y = self.linear(x)
        return y if context is None else y * context


def test_reversible_routes_arguments():
    routes = {"context": ((True, False), (True, True), (False, False))}
    torch.manual_seed(0)
    blocks = [(WithContext(4).double(), WithContext(4).double()) for _ in range(3)]
    actual = []
    for module in (published, fast):
        sequence = module.ReversibleSequence(copy.deepcopy(blocks), args_route=routes)
        torch.manual_seed(1)
        x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
        context = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        out = sequence(x, context=context, unrouted=3)
        out.square().sum().backward()
        actual.append([out, x.grad, context.grad, *(p.grad for p in sequence.parameters())])
    for want, got in zip(*actual, strict=True):
        assert_near(got, want)

    # a routed tensor that is itself computed, which the published package cannot serve
    source = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    got, = torch.autograd.grad(sequence(x, context=source.exp()).sum(), source)
    leaf = source.exp().detach().requires_grad_()
    want, = torch.autograd.grad(sequence(x, context=leaf).sum(), leaf)
    assert_near(got, want * leaf)


@pytest.mark.parametrize("seed", range(4))
def test_layer_dropout(seed):
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    theirs, ours = reversible_twins(4, layer_dropout=0.9)
    compare(theirs, ours, [x], torch.float64, forward_seed=seed)
    dropped = compare(theirs, ours, [x], torch.float64, forward_seed=seed, layer_dropout=0.9)
    assert any(value is None for value in dropped.values())
    compare(theirs.eval(), ours.eval(), [x], torch.float64, forward_seed=seed, layer_dropout=0.9)

    layers = nn.ModuleList([nn.ModuleList([WithContext(4)]) for _ in range(4)]).double()
    routes = {"context": ((True, False), (False, False)) * 2}
    theirs, ours = (m.SequentialSequence(copy.deepcopy(layers), routes, layer_dropout=0.6)
                    for m in (published, fast))
    kwargs = dict(context=torch.randn_like(x), layer_dropout=0.)
    compare(theirs, ours, [x], torch.float64, forward_seed=seed, **kwargs)
    compare(theirs.eval(), ours.eval(), [x], torch.float64, forward_seed=seed, **kwargs)


def test_reversible_memory_does_not_grow_with_depth():
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    sizes = []
    for depth in (1, 6):
        _, ours = reversible_twins(depth)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            ours(x)
        sizes.append(sum(saved))
    assert sizes == [2 * x.numel(), 2 * x.numel()]


class DtypeProbe(nn.Module):
    def __init__(self, dim, seen):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.seen = seen

    def forward(self, x):
        y = self.linear(x)
        self.seen.append(y.dtype)
        return y


@pytest.mark.parametrize("backward_inside", [False, True])
def test_reversible_reruns_under_the_autocast_of_the_forward(backward_inside):
    torch.manual_seed(0)
    seen = []
    ours = fast.ReversibleSequence([(DtypeProbe(8, seen), DtypeProbe(8, seen))])
    x = torch.randn(2, 5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x)
        if backward_inside:
            got = gradients(ours, x, out)
    if not backward_inside:
        got = gradients(ours, x, out)
    assert seen == [torch.bfloat16] * 4
    with torch.autocast("cpu", torch.bfloat16):
        plain = two_streams(ours, x)
    assert torch.equal(out, plain)
    for value, want in zip(got, gradients(ours, x, plain), strict=True):
        assert (value - want).abs().max() <= 2e-2 * want.abs().max()

    del seen[:]
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            out = ours(x)
        gradients(ours, x, out)
    assert seen == [torch.float32] * 4


def test_reversible_with_weights_of_a_call():
    """functional_call has taken them out again when backward runs."""
    _, ours = reversible_twins(2)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    scaled = copy.deepcopy(ours)
    with torch.no_grad():
        for p in scaled.parameters():
            p.mul_(1.5)
    weights = {name: 1.5 * p for name, p in ours.named_parameters()}
    torch.func.functional_call(ours, weights, x).square().sum().backward()
    scaled(x).square().sum().backward()
    for value, want in zip(ours.parameters(), scaled.parameters(), strict=True):
        assert_near(value.grad, 1.5 * want.grad)


def test_reversible_learns_through_what_hooks_put_in():
    """As FSDP does: the parameters that are there when f runs are not those it registered."""
    _, ours = reversible_twins(2)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    used = {}

    def put(module, args):
        for name, p in module._parameters.items():
            used.setdefault((module, name), (p, p.detach().clone().requires_grad_()))
            module._parameters[name] = used[module, name][1]

    def take(module, args, out):
        for name in module._parameters:
            module._parameters[name] = used[module, name][0]

    want = torch.autograd.grad(two_streams(ours, x).square().sum(), list(ours.parameters()))
    for module in ours.modules():
        module.register_forward_pre_hook(put)
        module.register_forward_hook(take)
    ours(x).square().sum().backward()
    got = {p: stand_in.grad for p, stand_in in used.values()}
    for p, expected in zip(ours.parameters(), want, strict=True):
        assert_near(got[p], expected)


def test_reversible_second_derivatives():
    _, ours = reversible_twins(3)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    actual = []
    for out in (ours(x), two_streams(ours, x)):
        first = torch.autograd.grad(out.square().sum(), (x, *ours.parameters()), create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        actual.append(torch.autograd.grad(penalty, (x, *ours.parameters())))
    for value, want in zip(*actual, strict=True):
        assert_near(value, want)


def test_reversible_backward_twice_and_for_few():
    """Any order in which autograd asks: again, and for the parameters of one layer alone."""
    _, ours = reversible_twins(3)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    runs = ours(x).square().sum(), two_streams(ours, x).square().sum()
    for layer in (2, 0, 1):
        learned = list(ours.blocks[layer].g.parameters())
        got, want = (torch.autograd.grad(run, learned, retain_graph=True) for run in runs)
        for value, expected in zip(got, want, strict=True):
            assert_near(value, expected)


def test_reversible_compiles_whole():
    _, ours = reversible_twins(2)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(ours, x, compiled(x)), gradients(ours, x, ours(x)), strict=True):
        assert_near(got, want)


def test_reversible_says_when_the_second_run_differs():
    _, ours = reversible_twins(2, dropout=0.5)
    out = ours(torch.randn(2, 5, 4, dtype=torch.float64))
    ours.eval()
    with pytest.raises(RuntimeError, match="ReversibleSequence: step 3 saved .* must do the same"):
        out.sum().backward()


@pytest.mark.parametrize("bias", [False, True])
def test_reversible_takes_any_layout_of_its_input(bias):
    """Linear saves its tensors in an order that the layout decides: where the second run had
    another than the first, gradients were wrong, and nothing said so."""
    torch.manual_seed(3)
    layers = nn.ModuleList([nn.ModuleList([nn.Linear(6, 6, bias), nn.Linear(6, 6, bias)])
                            for _ in range(2)]).double()
    sequence = fast.ReversibleSequence(layers)
    wide = torch.randn(8, 8, 8, dtype=torch.float64)
    for x in (wide[:3, :1, :6], wide[:3, :2, 1:7], wide[::2, ::2, :6], wide[:, :1, :6].expand(
            -1, 6, -1), wide[:6].transpose(0, 2), wide[:6, :1].transpose(0, 2)):
        x = x.detach().requires_grad_()
        expected = gradients(sequence, x, two_streams(sequence, x))
        for got, want in zip(gradients(sequence, x, sequence(x)), expected, strict=True):
            assert_near(got, want)


def test_reversible_leaves_inputs_alone():
    _, ours = reversible_twins(2)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    out = ours(x)
    first = gradients(ours, x, out.clone())
    assert torch.equal(x, before) and x.grad is None
    assert all(p.grad is None for p in ours.parameters())
    assert all(torch.equal(*pair) for pair in zip(first, gradients(ours, x, ours(x)), strict=True))


# refused input

MODEL = dict(num_tokens=5, dim=4, depth=2, seq_len=6)
BLOCK = dict(dim=4, seq_len=6, dim_ff=8)


@pytest.mark.parametrize("construct,message", [
    (lambda: fast.CausalSGU(7, 5), "CausalSGU: dim must be even, got 7"),
    (lambda: fast.CausalLocalSGU(7, 5), "CausalLocalSGU: dim must be even, got 7"),
    (lambda: fast.CausalSGU(12, 5), "CausalSGU: heads must divide dim // 2, got heads=4 .*=6"),
    (lambda: fast.CausalLocalSGU(8, 5, heads=0), "CausalLocalSGU: heads must divide dim // 2"),
    (lambda: fast.CausalLocalSGU(8, 5, window=0), "SGU: window must be at least 1, got 0"),
    (lambda: fast.LocalAttention(4, 3, 2, window=0), "Attention: window must be at least 1, got 0"),
    (lambda: fast.gMLPBlock(dim=4, seq_len=6, dim_ff=9), "gMLPBlock: dim_ff must be even, got 9"),
    (lambda: fast.gMLPBlock(**BLOCK, heads=3), "gMLPBlock: heads must divide dim_ff // 2"),
    (lambda: fast.gMLPBlock(**BLOCK, window=0), "CausalLocalSGU: window must be at least 1"),
    (lambda: fast.gMLPGPT(**{**MODEL, "dim": 3}, ff_mult=1), r"dim \* ff_mult must be even, got 3"),
    (lambda: fast.gMLPGPT(**MODEL, heads=3), r"heads must divide dim \* ff_mult // 2"),
    (lambda: fast.gMLPGPT(**MODEL, window=(3,)), "window .* one entry .* depth=2 layers, got 1"),
    (lambda: fast.gMLPGPT(**MODEL, window=(3, 3, 3)), "window .* depth=2 layers, got 3"),
    (lambda: fast.SequentialSequence(nn.ModuleList(), {"mask": ((True, False),)}),
     r"args_route\['mask'\] must have one entry for each of the 0 layers, got 1"),
])
def test_refused_construction(construct, message):
    with pytest.raises(ValueError, match=message):
        construct()


@pytest.mark.parametrize("tokens,error,message", [
    (torch.zeros(2, 3), TypeError, "gMLPGPT: x must be int64 or int32, got float32"),
    ([[1, 2]], TypeError, "gMLPGPT: x must be a tensor, got list"),
    (torch.zeros(3, dtype=torch.long), ValueError, r"x must have shape \(b, n\), got \(3,\)"),
    (torch.zeros(1, 2, 3, dtype=torch.long), ValueError, r"shape \(b, n\), got \(1, 2, 3\)"),
    (torch.zeros(2, 0, dtype=torch.long), ValueError, "at least one time step, got n=0"),
    (torch.zeros(2, 7, dtype=torch.long), ValueError, "at most 6 time steps, got n=7"),
    (torch.zeros(2, 3, dtype=torch.long, device="meta"), ValueError,
     "x must hold token ids, got one on meta"),
    (torch.tensor([[1, -100]]), IndexError, r"x must hold token ids from 0 to \d+, got -100 to 1"),
])
def test_refused_tokens(tokens, error, message):
    for reversible in (False, True):
        with pytest.raises(error, match=message):
            fast.gMLPGPT(**MODEL, reversible=reversible)(tokens)


@pytest.mark.parametrize("gate_res, error, message", [
    ([1.0], TypeError, "must be a tensor, got list"),
    (torch.ones(2, 3, 2).long(), TypeError, "must be float32, got int64"),
    (torch.ones(2, 3, 2).cfloat(), TypeError, "must be float32, got complex64"),
    (torch.ones(2, 3, 2).double(), TypeError, "must be float32 like x, got float64"),
    (torch.ones(2, 3, 2, device="meta"), ValueError, "must be on cpu like x, got meta"),
    *[(torch.ones(shape), ValueError,
       rf"must broadcast to \(b, n, dim // 2\) = \(2, 3, 2\), got {re.escape(str(shape))}")
      for shape in [(2, 3, 4), (3, 3, 2), (2, 2, 2), (3,), (1, 2, 3, 2)]]])
@pytest.mark.parametrize("name, options", SGUS)
def test_refused_gate_res(name, options, gate_res, error, message):
    module = getattr(fast, name)(4, 6, heads=1, **options)
    for call in (module, torch.compile(module, backend="eager")):
        with pytest.raises(error, match=f"^{name}: gate_res {message}"):
            call(torch.ones(2, 3, 4), gate_res=gate_res)


def test_refused_length():
    with pytest.raises(ValueError, match="CausalSGU: x must have at most 6 time steps, got n=7"):
        fast.CausalSGU(4, 6, heads=1)(torch.zeros(2, 7, 4))


def test_longer_weights_of_a_gating_unit_take_longer_sequences():
    ours, theirs = (file.CausalSGU(4, 5, heads=2) for file in (fast, published))
    weight, bias = torch.randn(2, 9, 9), torch.randn(2, 9)
    for unit in ours, theirs:
        unit.weight, unit.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        unit.mask = torch.ones(9, 9, dtype=torch.bool).tril()
    x = torch.randn(2, 9, 4)
    assert_near(ours(x), theirs(x))
    with pytest.raises(ValueError, match="^CausalSGU: x must have at most 9 time steps"):
        ours(torch.randn(2, 10, 4))
