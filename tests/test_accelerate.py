"""fastmix.accelerate on the published classes: the same numbers from faster forwards, in place."""

import copy
import functools
import importlib
import importlib.metadata
import io
import subprocess
import sys
import types

import pytest
import torch
from gateloop_transformer import simplified_gate_loop
from torch import nn

import fastmix
import test_treatments as treatments
from fastmix.nn._published import REPLACEMENTS, VERSIONS
from test_models import PUBLISHED
from test_treatments import CLASSES, assert_same_steps, example, step
from twins import assert_near

pytestmark = treatments.pytestmark


def published(name):
    """In float64, away from its initial weights, and an input."""
    file, build = CLASSES[name]
    torch.manual_seed(5)
    model = build(PUBLISHED[file]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model, example(model)


def accelerated(name):
    model, _ = published(name)
    report = fastmix.accelerate(model)
    assert report.replaced and not report.left
    return model


# Those with something to replace in them.
KNOWN = [name for name in CLASSES if fastmix.accelerate(published(name)[0]).replaced]
LEAVES = [name for name in KNOWN if fastmix.accelerate(published(name)[0]).replaced[0][0]
          == "(model)"]
MODELS = [name for name in KNOWN if "GPT" in name or "LM" in name or "Transformer" in name]
every_known = pytest.mark.parametrize("name", KNOWN)


def steps(name, *models):
    x = published(name)[1]
    results = []
    for model in models:
        torch.manual_seed(9)
        results.append(step(model, model, x))
    return results


def test_every_replacement_is_tested():
    kinds = {type(published(name)[0]).__name__ for name in LEAVES}
    assert kinds == {kind for _, kind in REPLACEMENTS}
    for module, kind in REPLACEMENTS:
        assert hasattr(importlib.import_module(module), kind)


@every_known
def test_trains_as_before(name):
    model, x = published(name)
    mine = accelerated(name)
    assert list(mine.state_dict()) == list(model.state_dict())
    assert [type(m) for m in mine.modules()] == [type(m) for m in model.modules()]
    assert_same_steps(*steps(name, model, mine))


OTHER_WAYS = {
    "GateLoopedAttention": [dict(ablate_complex=True), dict(ablate_state_transition=True)],
    "CausalFullAttention": [dict(ablate_complex=True), dict(ablate_state_transition=True)],
    "CausalSGU": [dict(gate_res=True)], "CausalLocalSGU": [dict(gate_res=True)],
}


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_arguments_of_forward(name):
    model, x = published(name)
    for arguments in OTHER_WAYS[name]:
        if "gate_res" in arguments:
            arguments = dict(gate_res=torch.randn(1, x.shape[1], 4, dtype=x.dtype))
        assert_near(accelerated(name)(x, **arguments), model(x, **arguments))


@pytest.mark.parametrize("build", [
    lambda m: m.CausalFullAttention(8, dim_head=4, heads=2, rotary_emb=True),
    lambda m: m.CausalFullAttention(8, dim_head=4, heads=2, data_dependent_rel_pos=True),
    lambda m: m.CausalFullAttention(8, dim_head=4, heads=2, data_dependent_rel_pos=True,
                                    softmax_normalize=True),
    lambda m: m.GateLoopedAttention(8, add_swish_gating=False),
])
def test_other_gateloop_modules(build):
    model = build(PUBLISHED[fastmix.nn.gateloop_transformer]).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    expected = model(x)
    fastmix.accelerate(model)
    assert_near(model(x), expected)


def test_caches_of_simple_gate_loops():
    model, x = published("SimpleGateLoopLayer")
    whole = model(x)
    fastmix.accelerate(model)
    start, cache = model(x[:, :3], return_cache=True)
    assert_near(torch.cat((start, model(x[:, 3:], cache)), dim=1), whole)


def halves(q, kv, a, cache=None):
    """Some other gate loop."""
    out = q * (a * kv).cumsum(dim=1) / 2
    return out, (a[:, -1], out[:, -1])


@pytest.mark.parametrize("reverse", [False, True])
def test_a_gate_loop_fn_that_was_put_there_is_called(reverse):
    theirs, mine = (
        file.SimpleGateLoopLayer(8, post_ln=True, reverse=reverse).double()
        for file in (simplified_gate_loop, fastmix.nn.gateloop_transformer))
    mine.load_state_dict(theirs.state_dict())
    theirs.gate_loop_fn = mine.gate_loop_fn = halves
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    expected = theirs(x)
    caches = [] if reverse else [theirs(x, return_cache=True), mine(x, return_cache=True)]
    assert_near(mine(x), expected)
    fastmix.accelerate(theirs)
    assert_near(theirs(x), expected)
    caches += [] if reverse else [theirs(x, return_cache=True)]
    for out, cache in caches:
        assert_near(out, expected)
        assert torch.equal(cache[0], caches[0][1][0]) and torch.equal(cache[1], caches[0][1][1])


def jaxlike(fn):
    """What jax2torch makes of what jax's jit makes of fn: both show its names."""
    jitted = types.SimpleNamespace(__name__=fn.__name__, __module__=fn.__module__, __wrapped__=fn)
    code = "def inner(*args, **kwargs):\n    return fn(*args, **kwargs)"
    made = {"__name__": "jax2torch.jax2torch", "fn": fn}
    exec(code, made)
    return functools.wraps(jitted)(made["inner"])


def published_jax_loop():
    """A stand-in for it, as it is where jax is installed."""
    made = {"__name__": simplified_gate_loop.__name__, "halves": halves}
    exec("def jax_gate_loop_operator(q, kv, a, cache = None):\n    return halves(q, kv, a)", made)
    return jaxlike(made["jax_gate_loop_operator"])


def test_jax_loop_of_the_published_layer_is_known_and_no_other():
    """By its code, not by names that decorators copy."""
    published = simplified_gate_loop.gate_loop_operator
    is_known = fastmix.nn.gateloop_transformer.simplified_gate_loop._is_known
    known = [published, published_jax_loop(), functools.partial(published, heinsen=True),
             fastmix.nn.gateloop_transformer.simplified_gate_loop.gate_loop_operator]
    others = [halves, jaxlike(halves), functools.wraps(published)(lambda *a, **k: halves(*a, **k)),
              functools.partial(published, cache=(1, 2)), torch.nn.Identity(),
              simplified_gate_loop.heinsen_associative_scan]
    assert [is_known(f) for f in known + others] == [True] * 4 + [False] * 6


def test_heinsen_sequences_are_scanned(monkeypatch):
    layer = simplified_gate_loop.SimpleGateLoopLayer(8, use_heinsen=True)
    expected = layer(torch.ones(2, 7, 8))
    fastmix.accelerate(layer)
    monkeypatch.setattr(simplified_gate_loop, "heinsen_associative_scan", None)  # not called
    assert_near(layer(torch.ones(2, 7, 8)), expected)


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("treat", treatments.TREATMENTS, ids=lambda t: t.__name__)
def test_treated_afterwards(treat, name):
    if treat is treatments.other_weights and "evers" in name:
        return  # the published backward takes the weights that are there then
    results = []
    for model in (published(name)[0], accelerated(name)):
        torch.manual_seed(9)
        run = treat(model)
        trained = run if isinstance(run, nn.Module) else model
        results.append(step(trained, run or model, published(name)[1]))
    assert_same_steps(*results)


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("treat", [
    treatments.adapters, treatments.parametrized, treatments.forward_hooks, treatments.rms_norms,
    treatments.hooks_on_split_heads, treatments.copied, treatments.saved_whole,
    treatments.from_meta], ids=lambda t: t.__name__)
def test_treated_before(treat, name):
    results = []
    for change in (lambda model: None, fastmix.accelerate):
        model, x = published(name)
        torch.manual_seed(9)
        model = treat(model) or model
        change(model)
        results.append(step(model, model, x))
    assert_same_steps(*results)


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("check", treatments.CHECKS, ids=lambda check: check.__name__[6:])
def test_other_treatment(check, name):
    check(published(name)[0], accelerated(name), published(name)[1])


@pytest.mark.long
@pytest.mark.parametrize("name", LEAVES)
def test_built_on_meta(name):
    theirs, x = published(name)
    file, build = CLASSES[name]
    with torch.device("meta"):
        model = build(PUBLISHED[file]).double()
    assert fastmix.accelerate(model).replaced
    model.load_state_dict(copy.deepcopy(theirs.state_dict()), assign=True)
    assert_same_steps(step(theirs, theirs, x), step(model, model, x))


@every_known
def test_restored(name):
    model, x = published(name)
    before = [dict(module.__dict__) for module in model.modules()]
    fastmix.accelerate(model)
    assert fastmix.restore(model) is model
    assert [module.__dict__ for module in model.modules()] == before
    assert_same_steps(*steps(name, published(name)[0], model))


@every_known
def test_twice_is_once(name):
    model = accelerated(name)
    before = [dict(module.__dict__) for module in model.modules()]
    report = fastmix.accelerate(model)
    assert not report.replaced and {why for *_, why in report.left} == {"accelerated before"}
    assert [module.__dict__ for module in model.modules()] == before


def test_optimisers_hooks_and_training_state_stay():
    model, x = published("Transformer")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    attention = model.layers[0][0].fn
    attention.register_forward_hook(lambda *_: seen.append("called"))
    model.eval()
    attention.train()
    fastmix.accelerate(model.float())
    model.double()
    before = model(x)
    assert seen == ["called"] and attention.training and not model.training
    before.square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(x), before)


def test_the_report():
    model, _ = published("Transformer")

    class Own(type(model.layers[0][0].fn)):
        def forward(self, x, **kwargs):
            return 2 * super().forward(x, **kwargs)

    class Heir(type(model.layers[0][0].fn)):
        pass

    class Copied(nn.Linear):
        __module__, __qualname__ = "unknown.package", "MHESA"

    layers = [Own(8), Heir(8), published("MHESA")[0], Copied(2, 2)]
    layers[2].forward = layers[2].forward
    report = fastmix.accelerate(nn.Sequential(*layers))
    assert report.replaced == [("1", "Heir", "ops.gate_loop")]
    assert str(report) == repr(report) == """\
1 accelerated, 2 left alone
  1  Heir   → ops.gate_loop
  0  Own    left alone: a subclass of GateLoopedAttention with a forward of its own
  2  MHESA  left alone: its forward was replaced on the instance"""
    assert "nothing to accelerate" in str(fastmix.accelerate(nn.Linear(2, 2)))
    assert "(model)" in str(fastmix.accelerate(published("MHESA")[0]))


def test_other_versions_are_left_alone(monkeypatch):
    model, _ = published("MHESA")
    monkeypatch.setitem(VERSIONS, "gated_state_spaces_pytorch", (
        "gated-state-spaces-pytorch", "9.9"))
    report = fastmix.accelerate(model)
    assert not report.replaced and "fastmix knows 9.9" in report.left[0][2]
    monkeypatch.setitem(VERSIONS, "gated_state_spaces_pytorch", ("no-such-package", "9.9"))
    assert "has no version" in fastmix.accelerate(model).left[0][2]


def test_requirements_name_the_versions():
    lines = (treatments.__file__.replace("tests/test_treatments.py", "requirements-originals.txt"))
    with open(lines) as file:
        text = file.read()
    for package, version in VERSIONS.values():
        assert f"{package}=={version}" in text


@pytest.mark.long
def test_of_a_package_that_is_not_imported_nothing_is_imported():
    code = f"""
import sys, torch, fastmix
print(fastmix.accelerate(torch.nn.Sequential(torch.nn.Linear(2, 2))))
assert not {set(VERSIONS)!r} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_copies_are_their_own():
    model = accelerated("MHESA")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            other.param_D.zero_()
        assert other.forward.args == (other,) and model.param_D.any()
        fastmix.restore(other)
        assert "forward" in vars(model) and "forward" not in vars(other)


@pytest.mark.long
def test_saved_and_loaded_in_a_fresh_process(tmp_path):
    model = accelerated("Transformer")
    x = published("Transformer")[1]
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    code = f"""
import torch
model, x, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
assert torch.equal(model(x), expected) and "forward" in vars(model.layers[0][0].fn)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.long
@pytest.mark.parametrize("name", [*LEAVES, *MODELS])
def test_compiles_whole(name):
    model = accelerated(name)
    x = published(name)[1]
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x), model(x))


@pytest.mark.parametrize("called", [False, pytest.param(True, marks=pytest.mark.long)])
def test_compiled_before(called):
    """A compiled model that has run already is compiled anew, and restored it runs as it did."""
    model, x = published("MetaformerGPT")
    expected = model(x)
    ran = set()

    def backend(graph, inputs):
        ours = any("fastmix" in str(node.target) for node in graph.graph.nodes)

        def run(*args):
            ran.add(ours)
            return graph(*args)

        return run

    compiled = torch.compile(model, backend=backend)
    if called:
        assert_near(compiled(x), expected)
        assert ran == {False}
    assert fastmix.accelerate(compiled).replaced
    ran.clear()
    assert_near(compiled(x), expected)
    assert True in ran
    fastmix.restore(compiled)
    ran.clear()
    assert_near(compiled(x), expected)
    assert ran == {False}
