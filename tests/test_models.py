"""What holds in all files: signatures and attributes of the originals, refusals, and what
most of the originals cannot do: compile and export."""

import copy
import inspect
import pickle

import gated_state_spaces_pytorch.dsconv
import gated_state_spaces_pytorch.gss
import gated_state_spaces_pytorch.mhesa
import metaformer_gpt.metaformer_gpt
import pytest
import torch
from g_mlp_gpt import g_mlp_gpt
from gateloop_transformer import gateloop_transformer, simplified_gate_loop
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import Linear

from cases import distance
from fastmix import nn
from refusal import both_ways, check_refusal
from twins import assert_near

PUBLISHED = {
    nn.dsconv: gated_state_spaces_pytorch.dsconv, nn.g_mlp_gpt: g_mlp_gpt,
    nn.gateloop_transformer: gateloop_transformer, nn.mhesa: gated_state_spaces_pytorch.mhesa,
    nn.metaformer_gpt: metaformer_gpt.metaformer_gpt, nn.gss: gated_state_spaces_pytorch.gss,
    nn.gateloop_transformer.simplified_gate_loop: simplified_gate_loop}


def pairs(linears):
    return torch.nn.ModuleList([torch.nn.ModuleList(linears)])


# Per file, modules for x (b, n, 6), from the published file as from ours.
SEQUENCE_MODULES = {
    nn.dsconv: [
        lambda m: m.EfficientDsConv(dim=6, heads=3),
        lambda m: m.GatedDsConv(dim=6, heads=2, dim_dsconv=4)],
    nn.gss: [
        lambda m: m.DSS(dim=6, kernel_N=4),
        lambda m: m.GSS(dim=6, dss_kernel_N=4, dss_kernel_H=5, reverse_seq=True)],
    nn.mhesa: [
        lambda m: m.MHESA(dim=6, heads=3),
        lambda m: m.GatedMHESA(dim=6, heads=2, dim_mhesa=4)],
    nn.metaformer_gpt: [
        lambda m: m.MeanCenteringPool(6),
        lambda m: m.MultiheadExponentialTimeDecay(6, heads=2, dim_head=3)],
    nn.g_mlp_gpt: [
        lambda m: m.Attention(6, 4, 5),
        lambda m: m.LocalAttention(6, 4, 5, window=2),
        lambda m: m.CausalSGU(6, 5, heads=3),
        lambda m: m.CausalLocalSGU(6, 5, heads=3, window=2),
        lambda m: m.AxiallyFold(6, 0, Linear(6, 6)),
        lambda m: m.AxiallyFold(6, 1, Linear(6, 6)),
        lambda m: m.AxiallyFold(6, 2, Linear(6, 6)),
        lambda m: m.gMLPBlock(dim=6, seq_len=5, dim_ff=8, attn_dim=3),
        lambda m: m.gMLPBlock(dim=6, seq_len=5, dim_ff=8, attn_dim=3, window=2)],
    nn.gateloop_transformer: [
        lambda m: m.CausalFullAttention(6, heads=2, dim_head=4),
        lambda m: m.CausalFullAttention(6, heads=2, dim_head=4, rotary_emb=True,
                                        add_swish_gating=True, data_dependent_rel_pos=True),
        lambda m: m.GateLoopedAttention(6, heads=2, sub_ln=True),
        lambda m: m.GateLoopedAttention(6, add_swish_gating=False)],
    nn.gateloop_transformer.simplified_gate_loop: [
        lambda m: m.SimpleGateLoopLayer(6),
        lambda m: m.SimpleGateLoopLayer(6, False, True, post_ln=True, reverse=True)],
}
# For x (…, 6).
FEATURE_MODULES = {
    nn.metaformer_gpt: [lambda m: m.FeedForward(6)],
    nn.g_mlp_gpt: [lambda m: m.PreNorm(6, Linear(6, 6)), lambda m: m.FeedForward(6)],
    nn.gateloop_transformer: [
        lambda m: m.RMSNorm(6), lambda m: m.PreNorm(6, Linear(6, 6)),
        lambda m: m.PostNorm(6, Linear(6, 6)), lambda m: m.FeedForward(6)],
}
# For x of any width.
OTHER_MODULES = {
    nn.g_mlp_gpt: [
        lambda m: m.GEGLU(), lambda m: m.Residual(Linear(6, 6)),
        lambda m: m.SequentialSequence(pairs([Linear(6, 6)])),
        lambda m: m.ReversibleSequence(pairs([Linear(6, 6), Linear(6, 6)]))],
}


def every(*tables):
    """A parametrization by file and factory, named after what the factory makes."""
    cases = [(file, make) for table in tables for file, makers in table.items() for make in makers]
    return pytest.mark.parametrize("file, make", [
        pytest.param(file, make, id=f"{file.__name__.split('.')[-1]}-{name_of(make(file))}")
        for file, make in cases])


def name_of(module):
    return "FeedForward" if type(module) is torch.nn.Sequential else type(module).__name__

MODELS = {
    "MetaformerGPT": lambda: nn.MetaformerGPT(
        num_tokens=32, dim=16, depth=2, heads=2, dim_head=8, max_seq_len=200),
    "GatedExponentialSmoothingLM": lambda: nn.GatedExponentialSmoothingLM(
        num_tokens=32, dim=16, depth=2, heads=2, dim_mhesa=16),
    "GatedDsConvLM": lambda: nn.GatedDsConvLM(
        num_tokens=32, dim=16, depth=2, heads=2, dim_dsconv=16),
    "GatedStateSpacesLM": lambda: nn.GatedStateSpacesLM(
        num_tokens=32, dim=16, depth=2, dss_kernel_N=8, dss_kernel_H=16),
    "gMLPGPT": lambda: nn.gMLPGPT(
        num_tokens=32, dim=16, depth=2, seq_len=200, window=(8, 200), heads=2),
    "GateLoopTransformer": lambda: nn.GateLoopTransformer(
        num_tokens=32, dim=16, depth=2, gate_loop_heads=4, sub_ln=True),
    "GateLoopTransformer ablated": lambda: nn.GateLoopTransformer(
        num_tokens=32, dim=16, depth=2, gate_loop_heads=4, ablate_complex=True),
}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name):
    """In float64, with gMLP's mixing weights away from the zeros they start at."""
    model = MODELS[name]().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def gradients(run, model, tokens):
    loss = run(tokens).square().mean()
    return loss, torch.autograd.grad(loss, [p for p in model.parameters()])


@pytest.mark.long
@every_model
def test_trains_compiled_whole_with_dynamic_length(name):
    model = build(name)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (40, 97):
        tokens = torch.randint(0, 32, (2, n))
        loss, grads = gradients(model, model, tokens)
        compiled_loss, compiled_grads = gradients(compiled, model, tokens)
        assert distance(compiled_loss, loss) < 1e-12
        largest = max(g.abs().max() for g in grads)
        for c, g in zip(compiled_grads, grads):
            assert (c - g).abs().max() < 1e-10 * largest


@every_model
@pytest.mark.parametrize("place", [lambda: torch.device("meta"), FakeTensorMode],
                         ids=["meta", "fake"])
def test_runs_without_memory(name, place):
    """Shapes and dtypes, forward and backward: what planners of memory and of shards run."""
    with place():
        model = MODELS[name]()
        tokens = torch.zeros(2, 9, dtype=torch.int64)
        loss, grads = gradients(model, model, tokens)
        assert model(tokens).shape == (2, 9, 32)
    assert loss.is_meta or isinstance(loss, FakeTensor)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert grad.shape == p.shape and grad.dtype == p.dtype and grad.device == p.device


@every_model
def test_exports(name):
    model = build(name).eval()
    tokens = torch.randint(0, 32, (2, 40))
    program = torch.export.export(
        model, (tokens,), dynamic_shapes=({1: torch.export.Dim("n", min=2, max=190)},))
    for n in (40, 133):
        tokens = torch.randint(0, 32, (2, n))
        assert distance(program.module()(tokens), model(tokens)) < 1e-12


@every_model
def test_bfloat16_autocast_stays_near_float32(name):
    model = build(name).float()
    tokens = torch.randint(0, 32, (2, 70))
    exact = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(tokens)
        mixed.float().square().mean().backward()
    if name.startswith("GateLoopTransformer"):
        # A gate whose logits are near 0 turns, or changes its sign, when they are rounded, and the
        # steps after it have another state.
        errors = (mixed.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert errors.median() < 0.02
    else:
        assert (mixed.float() - exact).norm() < 0.05 * exact.norm()
        assert distance(mixed.float(), exact) < 0.1
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every_model
def test_is_causal(name):
    """A changed token changes nothing before it."""
    model = build(name)
    tokens = torch.randint(0, 31, (1, 90))
    changed = tokens.clone()
    changed[:, 60:] = 31
    before, after = model(tokens)[:, :60], model(changed)[:, :60]
    if name in ("GatedDsConvLM", "GatedStateSpacesLM"):  # transforms carry rounding back
        assert distance(before, after) < 1e-12
    else:
        assert distance(before, after) < 1e-13
    assert distance(model(tokens)[:, 60:], model(changed)[:, 60:]) > 1e-3


# signatures and attributes


def described(function):
    return [(p.name, p.kind, repr(p.default))
            for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("file, name", [
    pytest.param(file, name, id=f"{file.__name__.split('.')[-1]}-{name}")
    for file in PUBLISHED for name in file.__all__ if file is not nn.gateloop_transformer
    or name != "SimpleGateLoopLayer"])  # which is of the package, not of this file of it
def test_signature(file, name):
    ours, theirs = getattr(file, name), getattr(PUBLISHED[file], name)
    assert inspect.isclass(ours) == inspect.isclass(theirs)
    assert described(ours) == described(theirs)
    if inspect.isclass(ours):
        added = [("cache", inspect.Parameter.KEYWORD_ONLY, "None"),
                 ("return_cache", inspect.Parameter.KEYWORD_ONLY, "False"),
                 ("ignore_index", inspect.Parameter.KEYWORD_ONLY, "None")]
        forward = [p for p in described(ours.forward) if p not in added]
        assert forward == described(theirs.forward)


LANGUAGE_MODELS = {
    nn.dsconv: [lambda m: m.GatedDsConvLM(
        num_tokens=5, dim=6, depth=1, heads=2, dim_dsconv=4, max_seq_len=7)],
    nn.gss: [lambda m: m.GatedStateSpacesLM(
        num_tokens=5, dim=6, depth=1, dss_kernel_N=4, dss_kernel_H=5)],
    nn.mhesa: [lambda m: m.GatedExponentialSmoothingLM(
        num_tokens=5, dim=6, depth=1, heads=2, dim_mhesa=4)],
    nn.metaformer_gpt: [lambda m: m.MetaformerGPT(
        num_tokens=5, dim=6, depth=1, heads=2, dim_head=3, max_seq_len=7)],
    nn.g_mlp_gpt: [
        lambda m: m.gMLPGPT(num_tokens=5, dim=6, depth=1, seq_len=7),
        lambda m: m.gMLPGPT(num_tokens=5, dim=6, depth=1, seq_len=7, reversible=True)],
    nn.gateloop_transformer: [
        lambda m: m.Transformer(6, num_tokens=5, depth=1),
        lambda m: m.Transformer(6, num_tokens=5, depth=1, post_ln_norm=True,
                                use_gate_looped_attn=False)],
}


@every(SEQUENCE_MODULES, FEATURE_MODULES, OTHER_MODULES, LANGUAGE_MODELS)
def test_attributes(file, make):
    ours, theirs = make(file), make(PUBLISHED[file])
    assert set(dir(theirs)) <= set(dir(ours))
    assert dict(ours.named_modules()).keys() == dict(theirs.named_modules()).keys()
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("file", [nn.metaformer_gpt, nn.gateloop_transformer])
def test_feed_forward_is_a_plain_sequential(file):
    ours = file.FeedForward(6)
    assert type(ours) is torch.nn.Sequential
    assert repr(ours) == repr(PUBLISHED[file].FeedForward(6))
    x, bad = torch.randn(2, 6), torch.randn(2, 5)
    for net in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(net(x), ours(x)) and torch.equal(net(input=x), ours(x))
        with pytest.raises(ValueError, match="FeedForward: x must have shape"):
            net(bad)


# refusals


def check_refused(way, module, x, error, message):
    check_refusal(way, module, (x,), {}, error, message, name_of(module))


@every(SEQUENCE_MODULES, FEATURE_MODULES, OTHER_MODULES)
@both_ways
def test_refused_type(file, make, way):
    module = make(file)
    check_refused(way, module, [1.0], TypeError, "x must be a tensor, got list")
    x = torch.ones(2, 3, 6)
    check_refused(way, module, x.long(), TypeError, "x must be float64 .*, got int64")
    check_refused(way, module, x.cfloat(), TypeError, "x must be float64 .*, got complex64")


@every(SEQUENCE_MODULES)
@both_ways
def test_refused_sequence(file, make, way):
    module, message = make(file), r"x must have shape \(b, n, dim\) = \(b, n, 6\), got "
    check_refused(way, module, torch.ones(3, 6), ValueError, message + r"\(3, 6\)")
    check_refused(way, module, torch.ones(2, 3, 5), ValueError, message + r"\(2, 3, 5\)")
    check_refused(way, module, torch.ones(2, 0, 6), ValueError,
                  "x must have at least one time step, got n=0")


@every(FEATURE_MODULES)
@both_ways
def test_refused_width(file, make, way):
    module, message = make(file), r"x must have shape \(…, dim\) = \(…, 6\), got "
    check_refused(way, module, torch.ones(2, 5), ValueError, message + r"\(2, 5\)")
    check_refused(way, module, torch.ones(()), ValueError, message + r"\(\)")
    assert module(torch.ones(2, 0, 6)).shape == (2, 0, 6)


@both_ways
def test_refused_gates_and_streams(way):
    message = "the last axis of x must be even, got shape "
    check_refused(way, nn.GEGLU(), torch.ones(2, 5), ValueError, message + r"\(2, 5\)")
    check_refused(way, nn.GEGLU(), torch.ones(()), ValueError, message + r"\(\)")
    check_refused(way, nn.ReversibleSequence([]), torch.ones(2, 5), ValueError,
                  r"x must have shape \(b, n, d\), got \(2, 5\)")


@pytest.mark.parametrize("construct, message", [
    (lambda: nn.MultiheadExponentialTimeDecay(4, heads=0), "heads must be at least 1, got 0"),
    (lambda: nn.MultiheadExponentialTimeDecay(4, dim_head=0), "dim_head must be at least 1, got 0"),
    (lambda: nn.MetaformerGPT(num_tokens=5, dim=4, depth=1, heads=0), "heads must be at least 1"),
    (lambda: nn.MHESA(dim=0, heads=1), "MHESA: dim must be at least 1, got 0"),
    (lambda: nn.GatedMHESA(dim=4, heads=1, dim_mhesa=0), "dim_mhesa must be at least 1, got 0"),
    (lambda: nn.EfficientDsConv(dim=0, heads=1), "DsConv: dim must be at least 1, got 0"),
    (lambda: nn.GatedDsConv(dim=4, heads=1, dim_dsconv=0), "dim_dsconv must be at least 1, got 0"),
    (lambda: nn.DSS(dim=4, kernel_N=0), "DSS: kernel_N must be at least 1, got 0"),
    (lambda: nn.GSS(dim=4, dss_kernel_H=0), "GSS: dss_kernel_H must be at least 1, got 0"),
    (lambda: nn.CausalFullAttention(4, heads=0), "CausalFullAttention: heads must be at least 1"),
    (lambda: nn.CausalFullAttention(4, dim_head=0), "dim_head must be at least 1, got 0"),
    (lambda: nn.GateLoopedAttention(4, dim_inner=0), "dim_inner must be at least 1, got 0"),
    (lambda: nn.GateLoopedAttention(4, heads=1, dim_inner=0), "dim_inner must be at least 1"),
    (lambda: nn.GateLoopedAttention(4, heads=0), "heads must divide dim_inner, got heads=0"),
    (lambda: nn.Attention(4, 4, 0), "Attention: dim_inner must be at least 1, got 0"),
    (lambda: nn.LocalAttention(4, 0, 4), "LocalAttention: dim_inner must be at least 1, got 0"),
    (lambda: nn.CausalSGU(0, 5), "CausalSGU: dim must be at least 1, got 0"),
    (lambda: nn.CausalSGU(8, 0), "CausalSGU: dim_seq must be at least 1, got 0"),
    (lambda: nn.AxiallyFold(4, -1, Linear(4, 4)), "AxiallyFold: every must be at least 0, got -1"),
    (lambda: nn.gMLPBlock(dim=4, seq_len=0, dim_ff=8), "seq_len must be at least 1, got 0"),
    (lambda: nn.gMLPBlock(dim=4, seq_len=5, dim_ff=8, attn_dim=0), "attn_dim must be at least 1"),
    (lambda: nn.gMLPGPT(num_tokens=5, dim=0, depth=1, seq_len=5), r"dim \* ff_mult must be at le"),
    (lambda: nn.gMLPGPT(num_tokens=5, dim=4, depth=1, seq_len=5, window=((2, -1),)),
     "AxiallyFold: every must be at least 0, got -1"),
])
def test_refused_sizes(construct, message):
    with pytest.raises(ValueError, match=message):
        construct()


@every(LANGUAGE_MODELS)
def test_weights_are_assigned_to_a_model_built_on_meta(file, make):
    theirs, tokens = make(PUBLISHED[file]), torch.randint(0, 5, (2, 6))
    with torch.device("meta"):
        ours = make(file)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    parameters = dict(theirs.named_parameters())
    assert all(p.data_ptr() == parameters[name].data_ptr() for name, p in ours.named_parameters())
    assert_near(ours(tokens), theirs(tokens))


@every(LANGUAGE_MODELS)
def test_built_under_other_defaults(file, make):
    tokens = torch.randint(0, 5, (2, 6))
    torch.set_default_dtype(torch.float64)
    try:
        assert make(file)(tokens).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    try:
        out = make(file)(torch.zeros(2, 6, dtype=torch.int64))
    finally:
        torch.set_default_device(None)
    assert out.is_meta and out.shape == (2, 6, 5)


@every(LANGUAGE_MODELS)
def test_empty_batch(file, make):
    model, nothing = make(file), torch.zeros(0, 4, dtype=torch.long)
    assert model(nothing).shape == (0, 4, 5)
    if "labels" in inspect.signature(model.forward).parameters:
        with pytest.raises(ValueError, match=f"^{name_of(model)}: labels must hold at least 1 "
                                             r"sequence, got shape \(0, 4\)"):
            model(nothing, nothing)
