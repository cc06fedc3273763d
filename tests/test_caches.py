"""Modules and models that go on from a cache: any pieces equal the whole."""

import copy
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastmix
from fastmix import nn
from twins import TOLERANCE, dtypes

N = 19
CAUSAL = dict(num_tokens=5, depth=2, use_gate_looped_attn=False, heads=2, dim_head=4)
GATED = dict(num_tokens=5, depth=2)
GMLP = dict(num_tokens=5, dim=4, depth=2)
MODELS = {
    "metaformer": lambda: nn.MetaformerGPT(
        num_tokens=5, dim=8, depth=2, heads=2, dim_head=3, max_seq_len=N),
    "smoothing": lambda: nn.GatedExponentialSmoothingLM(
        num_tokens=5, dim=8, depth=2, heads=2, dim_mhesa=4),
    "spaces": lambda: nn.GatedStateSpacesLM(
        num_tokens=5, dim=8, depth=2, dss_kernel_N=3, dss_kernel_H=4),
    "dsconv": lambda: nn.GatedDsConvLM(
        num_tokens=5, dim=8, depth=2, heads=2, dim_dsconv=4, max_seq_len=N),
    "gateloop": lambda: nn.GateLoopTransformer(8, **GATED),
    "gateloop heads": lambda: nn.GateLoopTransformer(8, gate_loop_heads=2, sub_ln=True, **GATED),
    "gateloop real": lambda: nn.GateLoopTransformer(
        8, ablate_complex=True, attn_add_swish_gating=False, dim_gate_looped_attn=6, **GATED),
    "gateloop ablated": lambda: nn.GateLoopTransformer(
        8, ablate_state_transition=True, post_ln_norm=True, **GATED),
    "attention": lambda: nn.GateLoopTransformer(8, **CAUSAL),
    "attention rotary": lambda: nn.GateLoopTransformer(8, rotary_emb=True, **CAUSAL),
    "attention decayed": lambda: nn.GateLoopTransformer(8, data_dependent_rel_pos=True, **CAUSAL),
    "attention all": lambda: nn.GateLoopTransformer(
        8, data_dependent_rel_pos=True, rotary_emb=True, attn_softmax_normalize=True, **CAUSAL),
    "attention sums": lambda: nn.GateLoopTransformer(8, attn_softmax_normalize=False, **CAUSAL),
    "gmlp": lambda: nn.gMLPGPT(seq_len=N, heads=2, act=torch.nn.Tanh(), **GMLP),
    "gmlp attention": lambda: nn.gMLPGPT(seq_len=30, attn_dim=3, **GMLP),
    "gmlp local": lambda: nn.gMLPGPT(seq_len=30, window=4, attn_dim=3, **GMLP),
    "gmlp window of 1": lambda: nn.gMLPGPT(seq_len=30, window=1, attn_dim=3, **GMLP),
    "gmlp folded": lambda: nn.gMLPGPT(
        seq_len=10, window=((2, 3), (10, 2)), attn_dim=(2, 3), **GMLP),
    "gmlp reversible": lambda: nn.gMLPGPT(
        seq_len=N, window=((3, 3), (N, 1)), reversible=True, prob_survival=0.5, **GMLP),
    "gmlp own norm": lambda: own_norms(nn.gMLPGPT(seq_len=N, window=((3, 2), (N, 1)), **GMLP)),
}
every_model = pytest.mark.parametrize("name", MODELS)
FAMILIES = ["metaformer", "smoothing", "dsconv", "gateloop", "gmlp", "spaces", "gmlp folded",
            "attention rotary", "gmlp own norm"]


class OwnNorm(torch.nn.LayerNorm):
    """One that operators do not know."""


def own_norms(model):
    for module in model.modules():
        if isinstance(module, (nn.CausalSGU, nn.CausalLocalSGU)):
            module.norm = OwnNorm(8)
    return model


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def in_pieces(model, x, cuts, cache=None):
    outs = []
    for piece in x.split(cuts, dim=1):
        out, cache = model(piece, cache=cache, return_cache=True)
        outs.append(out)
    return torch.cat(outs, dim=1), cache


def cuts_of(size, n):
    return [size] * (n // size) + [1] * (n % size)


def assert_equal(ours, whole):
    error = (ours - whole).abs().max() / whole.abs().max()
    assert error <= TOLERANCE[whole.dtype], error


def tensors_of(cache):
    if isinstance(cache, torch.Tensor):
        return [cache]
    return [] if cache is None else list(itertools.chain(*map(tensors_of, cache)))


@dtypes
@every_model
def test_pieces_equal_the_whole(name, dtype):
    model, tokens = build(name, dtype), torch.randint(0, 5, (2, N))
    with torch.no_grad():
        whole = model(tokens)
        for cuts in (*(cuts_of(size, N) for size in (1, 2, 7)), [1, 13, 5], [N]):
            assert_equal(in_pieces(model, tokens, cuts)[0], whole)


@every_model
def test_rows_at_different_times(name):
    """Caches after different prompts, one of them none, go on as one batch."""
    model, tokens = build(name), torch.randint(0, 5, (3, N))
    prompts, count = (5, 11, 0), 6
    with torch.no_grad():
        caches = [model(row[None, :end], return_cache=True)[1] if end else None
                  for row, end in zip(tokens, prompts)]
        cache = fastmix.states.concatenate(caches, [1, 1, 1])
        rest = torch.stack([row[end : end + count] for row, end in zip(tokens, prompts)])
        out, after = in_pieces(model, rest, [1, 1, 3, 1], cache)
        for row, end, ours in zip(tokens, prompts, out):
            assert_equal(ours, model(row[None])[0, end : end + count])
    assert after.steps.tolist() == [end + count for end in prompts]


@every_model
def test_a_cache_is_not_changed(name):
    model, tokens = build(name), torch.randint(0, 5, (2, 15))
    with torch.no_grad():
        _, cache = in_pieces(model, tokens[:, :9], [9])
        before = [t.clone() for t in tensors_of(cache)]
        for rest in (tokens[:, 9:], 4 - tokens[:, 9:]):
            whole = model(torch.cat((tokens[:, :9], rest), dim=1))
            assert_equal(in_pieces(model, rest, [1, 4, 1], cache)[0], whole[:, 9:])
        assert all(map(torch.equal, before, tensors_of(cache)))


@pytest.mark.parametrize("name, b, pieces", [
    ("gmlp", 1, [1, 3, *[1] * 6]), ("gmlp", 2, [1, 3, *[1] * 6]), ("gmlp folded", 1, [1] * 10)])
def test_caches_are_written_in_place_where_that_is_allowed(name, b, pieces):
    """That of a fold, too, by single steps: each is one of its subsequences' alone."""
    model, tokens = build(name), torch.randint(0, 5, (b, N))
    with torch.no_grad(), fastmix.states.in_place():
        first, cache = model(tokens[:, :9], return_cache=True)
        places = {t.data_ptr() for t in tensors_of(cache) if t.shape[2:] == (8,)}  # of gates
        rest, cache = in_pieces(model, tokens[:, 9:], pieces, cache)
        assert_equal(torch.cat((first, rest), dim=1), model(tokens))
    assert places and places <= {t.data_ptr() for t in tensors_of(cache)}
    _, cache = model(tokens[:, :9], return_cache=True)
    before = [t.clone() for t in tensors_of(cache)]
    with fastmix.states.in_place():  # but not with gradients
        model(tokens[:, 9:10], cache=cache, return_cache=True)
    assert all(map(torch.equal, before, tensors_of(cache)))


@pytest.mark.parametrize("name", ["gmlp", "gmlp local", "spaces"])
def test_a_cache_of_inference_mode_goes_on_outside_of_it(name):
    """There it cannot be written into, and is not."""
    model, tokens = build(name), torch.randint(0, 5, (2, 9))
    with torch.inference_mode():
        _, cache = model(tokens[:, :8], return_cache=True)
    with torch.no_grad(), fastmix.states.in_place():
        out, _ = model(tokens[:, 8:], cache=cache, return_cache=True)
        assert_equal(out, model(tokens)[:, 8:])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_that_was_written_into_is_refused(name):
    model, tokens = build(name), torch.randint(0, 5, (2, N))
    with torch.no_grad(), fastmix.states.in_place():
        for returned in (True, False):
            _, cache = model(tokens[:, :9], return_cache=True)
            out = model(tokens[:, 9:10], cache=cache, return_cache=returned)
            for step in (tokens[:, 9:10], tokens[:, 10:13]):
                with pytest.raises(ValueError, match="cache must be one that no call has used up, "
                                                     "got .*: go on from the cache that"):
                    model(step, cache=cache)
            if returned:
                assert_equal(model(tokens[:, 10:11], cache=out[1]), model(tokens[:, :11])[:, 10:])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_that_a_call_wrote_into_before_it_failed_is_refused(name):
    model, tokens = build(name), torch.randint(0, 5, (2, N))

    def fail(*_):
        raise KeyboardInterrupt

    with torch.no_grad(), fastmix.states.in_place():
        _, cache = model(tokens[:, :9], return_cache=True)
        hook = model.to_logits.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(tokens[:, 9:10], cache=cache, return_cache=True)
        hook.remove()
        with pytest.raises(ValueError, match="cache must be one that no call has used up"):
            model(tokens[:, 9:10], cache=cache)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_reordered_and_copied(name):
    model, tokens = build(name), torch.randint(0, 5, (3, 14))
    with torch.no_grad():
        _, cache = in_pieces(model, tokens[:, :9], [7, 2])
        rows = [2, 0, 0]
        out, _ = in_pieces(model, tokens[rows, 9:], [1, 4], fastmix.select_rows(cache, rows))
        assert_equal(out, model(tokens[rows])[:, 9:])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_is_saved_and_loaded(name, tmp_path):
    model, tokens = build(name), torch.randint(0, 5, (2, 14))
    with torch.no_grad():
        _, cache = in_pieces(model, tokens[:, :9], [8, 1])
        torch.save(cache, tmp_path / "cache.pt")
        loaded = torch.load(tmp_path / "cache.pt", weights_only=True)
        assert_equal(in_pieces(model, tokens[:, 9:], [1, 4], loaded)[0], model(tokens)[:, 9:])


@pytest.mark.parametrize("name", ["metaformer", "dsconv", "spaces", "gateloop", "gmlp attention",
                                  "gmlp folded", "gmlp reversible", "gmlp own norm"])
def test_gradients_pass_through_the_cache(name):
    model, tokens = build(name), torch.randint(0, 5, (2, N))
    gradients = []
    for cuts in ([N], [9, *[1] * (N - 9)]):
        out, _ = in_pieces(model, tokens, cuts)
        model.zero_grad()
        out.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for whole, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-8, atol=1e-8)


def test_loss_and_cache_come_together():
    tokens = torch.randint(0, 5, (2, 6))
    for name in ("smoothing", "dsconv", "spaces"):
        model = build(name)
        loss, cache = model(tokens, labels=tokens, return_cache=True)
        assert_equal(loss, model(tokens, tokens))
        assert cache.steps.tolist() == [6, 6]
    model = build("gateloop")
    loss, cache = model(tokens, return_loss=True, return_cache=True)
    assert_equal(loss, model(tokens, return_loss=True))
    assert cache.steps.tolist() == [5, 5]


def bytes_of(cache):
    """Of the memory that it holds, views' included."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tensors_of(cache)}
    return sum(storages.values())


# numbers of 4 bytes per row and layer after n steps of width 32
NEEDED = {
    "metaformer": (lambda n: nn.MetaformerGPT(num_tokens=5, dim=32, depth=2, heads=4, dim_head=8),
                   lambda n: 32 + 32),
    "smoothing": (lambda n: nn.GatedExponentialSmoothingLM(
        num_tokens=5, dim=32, depth=2, dim_mhesa=48), lambda n: 48),
    "spaces": (lambda n: nn.GatedStateSpacesLM(
        num_tokens=5, dim=32, depth=2, dss_kernel_N=16, dss_kernel_H=24), lambda n: 2 * 16 * 24),
    "dsconv": (lambda n: nn.GatedDsConvLM(num_tokens=5, dim=32, depth=2, heads=8, dim_dsconv=32),
               lambda n: n * (32 + 8) + n // 4 * 32),  # steps, lags, and the epoch's tail
    "gateloop": (lambda n: nn.GateLoopTransformer(32, num_tokens=5, depth=2), lambda n: 2 * 32),
    "gateloop heads": (lambda n: nn.GateLoopTransformer(32, num_tokens=5, depth=2,
                                                        gate_loop_heads=2),
                       lambda n: 2 * 2 * 16 * 16),
    "attention": (lambda n: nn.GateLoopTransformer(
        32, num_tokens=5, depth=2, use_gate_looped_attn=False, heads=4, dim_head=16),
        lambda n: n * 2 * 4 * 16),
    "gmlp": (lambda n: nn.gMLPGPT(num_tokens=5, dim=32, depth=2, seq_len=600),
             lambda n: 600 * 64),
    "gmlp windows": (lambda n: nn.gMLPGPT(num_tokens=5, dim=32, depth=2, seq_len=600, window=64),
                     lambda n: 2 * 64 * 64),
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_cache_holds_what_it_needs_and_a_tenth_at_most(name):
    make, numbers = NEEDED[name]
    b, n = 3, 512
    with torch.no_grad(), fastmix.states.in_place():
        model = make(n).eval()
        tokens = torch.randint(0, 5, (b, n + 1))
        _, cache = model(tokens[:, :n], return_cache=True)
        assert bytes_of(cache) <= 1.1 * 2 * b * 4 * numbers(n)
        _, cache = model(tokens[:, n:], cache=cache, return_cache=True)
        assert bytes_of(cache) <= 1.1 * 2 * b * 4 * numbers(n + 1)


@every_model
def test_a_step_reads_nothing_on_the_host(name):
    """On meta there are no values to read. Where no shape depends on time either, a CUDA graph
    can hold any step."""
    model = build(name).to("meta")
    tokens = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    with torch.no_grad():
        _, cache = model(tokens[:, :7], return_cache=True)
        out, after = model(tokens[:, 7:8], cache=cache, return_cache=True)
    assert out.is_meta and out.shape == (2, 1, 5)
    grows = name == "dsconv" or name.startswith("attention") or name == "gmlp attention"
    same = [t.shape for t in tensors_of(cache)] == [t.shape for t in tensors_of(after)]
    assert same != grows or "folded" in name


def test_a_step_of_a_state_space_makes_little_that_is_as_large_as_its_state():
    class Large(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and "view" not in str(function):
                made.append(out.numel())
            return out

    made, layer, x = [], nn.DSS(dim=40, kernel_N=50), torch.randn(1, 3, 40)
    with torch.no_grad():
        _, cache = layer(x, return_cache=True)
        with Large():
            layer(x[:, :1], cache=cache, return_cache=True)
    # The state after, its product before, the gains, and their product with the state.
    assert sum(count >= 40 * 50 for count in made) <= 4


def test_memory_of_a_cache_does_not_grow_where_the_state_does_not():
    for name in ("metaformer", "smoothing", "spaces", "gateloop", "gmlp", "gmlp local"):
        model = build(name)
        sizes = []
        for n in (9, 18):
            _, cache = model(torch.randint(0, 5, (1, n)), return_cache=True)
            sizes.append(sum(t.untyped_storage().nbytes() for t in tensors_of(cache)))
        assert sizes[0] == sizes[1], name


def refused(name, message, change=lambda cache: cache, tokens=None, error=ValueError):
    model = build(name)
    _, cache = model(torch.zeros(2, 6, dtype=torch.long), return_cache=True)
    tokens = torch.zeros(2, 1, dtype=torch.long) if tokens is None else tokens
    with pytest.raises(error, match=message):
        model(tokens, cache=change(cache), return_cache=True)


def test_caches_of_others_are_refused():
    names = list(MODELS)
    tokens = torch.zeros(2, 6, dtype=torch.long)
    caches = {name: build(name)(tokens, return_cache=True)[1] for name in names}
    for name, other in zip(names, names[5:] + names[:5]):
        if [t.shape for t in tensors_of(caches[name])] != [
                t.shape for t in tensors_of(caches[other])]:
            with pytest.raises((TypeError, ValueError), match=r"\b(must|expected)\b.*\bgot\b"):
                build(name)(tokens[:, :1], cache=caches[other], return_cache=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_caches_of_another_batch_or_dtype_are_refused(name):
    refused(name, "got ", lambda cache: fastmix.select_rows(cache, [0]))
    refused(name, "got list", lambda cache: [cache])
    refused(name, "got ", lambda cache: cache._replace(layers=cache.layers * 2))
    refused(name, "must be .*got ", lambda cache: cast(cache, torch.float16), error=TypeError)
    refused(name, r"must be on cpu like [\w.]+, got meta", lambda cache: cache._replace(
        layers=mapped(cache.layers, lambda t: t.to("meta"))))


def mapped(cache, function):
    if isinstance(cache, torch.Tensor):
        return function(cache)
    if cache is None:
        return None
    parts = [mapped(part, function) for part in cache]
    return type(cache)(*parts) if hasattr(cache, "_fields") else tuple(parts)


def cast(cache, dtype):
    return mapped(cache, lambda t: t if t.dtype == torch.int64 else t.to(dtype))


@pytest.mark.parametrize("window", [3, 6])
def test_caches_of_another_window_are_refused(window):
    x = torch.randn(2, 30, 8)
    for kind, arguments in ((nn.LocalAttention, (8, 3, 4)), (nn.CausalLocalSGU, (8, 30))):
        module, other = (kind(*arguments, window=w) for w in (4, window))
        if kind is nn.CausalLocalSGU:
            module.norm = other.norm = OwnNorm(4)
        _, cache = other(x, return_cache=True)
        with pytest.raises(ValueError, match=rf"cache must hold rows \(2, 7, \d\), got "
                                             rf"\(2, {2 * window - 1}, \d\)"):
            module(x[:, :1], cache=cache)


def test_steps_beyond_the_longest_sequence_are_refused():
    for name in ("metaformer", "dsconv", "gmlp", "gmlp folded", "gmlp own norm"):
        model = build(name)
        longest = model.max_seq_len
        _, cache = model(torch.zeros(2, longest - 1, dtype=torch.long), return_cache=True)
        _, cache = model(torch.zeros(2, 1, dtype=torch.long), cache=cache, return_cache=True)
        with pytest.raises(ValueError, match=f"x must have at most {longest} time steps together "
                                             f"with those in cache, got {longest + 1}"):
            model(torch.zeros(2, 1, dtype=torch.long), cache=cache)
    assert build("gmlp local").max_seq_len is None


def test_reversed_and_dropped_layers_are_refused():
    x = torch.randn(2, 3, 8)
    for module in (nn.MHESA(dim=8, heads=2, reverse_seq=True),
                   nn.GatedDsConv(dim=8, heads=2, dim_dsconv=4, reverse_seq=True),
                   nn.GSS(dim=8, dss_kernel_H=4, dss_kernel_N=2, reverse_seq=True)):
        with pytest.raises(ValueError, match="must be left out with reverse_seq=True"):
            module(x, return_cache=True)
        assert module(x).shape == x.shape
    model = build("gmlp reversible").train()
    with pytest.raises(ValueError, match="must be left out while training skips layers.*0.5"):
        model(torch.zeros(1, 3, dtype=torch.long), return_cache=True)
    layers = torch.nn.ModuleList([torch.nn.ModuleList([nn.gMLPBlock(dim=8, seq_len=3, dim_ff=8)])])
    with pytest.raises(ValueError, match="SequentialSequence: .* while training skips layers"):
        nn.SequentialSequence(layers, layer_dropout=0.1)(x, return_cache=True)


def test_children_are_called():
    """A hook on a mixer changes what is streamed as it changes the whole."""
    for name in FAMILIES:
        model, tokens = build(name), torch.randint(0, 5, (2, 9))
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda module, args, out: 1.5 * out)
        model = copy.deepcopy(model)
        with torch.no_grad():
            assert_equal(in_pieces(model, tokens, [5, 1, 1, 2])[0], model(tokens))


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES[:6])
def test_a_step_compiles_whole(name):
    model, tokens = build(name), torch.randint(0, 5, (2, N))
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        whole = model(tokens)
        _, cache = model(tokens[:, :12], return_cache=True)
        for t in range(12, 15):
            out, cache = step(tokens[:, t:t + 1], cache=cache, return_cache=True)
            assert_equal(out, whole[:, t:t + 1])
