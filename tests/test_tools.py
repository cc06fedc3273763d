"""What exports and torch's own tools see: plain aten, counts of operations, names."""

import contextlib
import subprocess
import sys
import zipfile

import pytest
import torch
from g_mlp_gpt import g_mlp_gpt
from torch._dynamo.backends.common import aot_autograd
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import fastmix
from cases import distance, random_gates
from fastmix import fallback, ops
from fastmix.ops._flops import FORMULAS
from fastmix.ops._register import OPERATORS
from test_models import MODELS, build
from twins import assert_near


def targets(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.long
@pytest.mark.parametrize("exporting", [fastmix.decompose, contextlib.nullcontext])
@pytest.mark.parametrize("name", MODELS)
def test_decomposes_to_aten(name, exporting):
    model = build(name).eval()
    tokens = torch.randint(0, 32, (2, 19))
    with exporting():
        program = torch.export.export(model, (tokens,))
    program = program.run_decompositions()
    others = {t for t in targets(program) if not t.startswith("aten.") and "getitem" not in t}
    assert not others
    with torch.no_grad():
        assert distance(program.module()(tokens), model(tokens)) < 1e-12
    transforms = {node for node in program.graph.nodes if "_fft_" in str(node.target)}
    made = [node for node in program.graph.nodes if getattr(
        node.meta.get("val"), "is_complex", bool)() and node not in transforms]
    assert all("mul" in str(node.target) or set(node.users) <= transforms for node in made)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name, n", [
    *((name, 50) for name in (*MODELS, "odd heads", "attention", "positions", "reversible")),
    ("GatedDsConvLM", 19)])  # the convolution as a product of matrices
def test_onnx(name, n, tmp_path):
    """torch's exporter translates what decompose leaves, and another runtime has the values."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    others = {
        "odd heads": lambda: fastmix.nn.GatedDsConvLM(
            num_tokens=32, dim=12, depth=1, heads=4, dim_dsconv=12),
        "attention": lambda: fastmix.nn.GateLoopTransformer(
            num_tokens=32, dim=16, depth=1, use_gate_looped_attn=False, dim_head=8, heads=2),
        "positions": lambda: fastmix.nn.GateLoopTransformer(
            num_tokens=32, dim=16, depth=1, use_gate_looped_attn=False, dim_head=8, heads=2,
            data_dependent_rel_pos=True, attn_softmax_normalize=True),
        "reversible": lambda: fastmix.nn.gMLPGPT(
            num_tokens=32, dim=16, depth=1, seq_len=60, window=8, attn_dim=4, reversible=True)}
    model = (others[name]() if name in others else build(name)).float().eval()
    with fastmix.decompose():
        program = torch.onnx.export(
            model, (torch.randint(0, 32, (2, n)),), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    tokens = torch.randint(0, 32, (2, n))
    (out,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    with torch.no_grad():
        assert distance(torch.from_numpy(out), model(tokens)) < 1e-4


@pytest.mark.parametrize("n", [1, 2, 19, 50])
@pytest.mark.parametrize("width", [1, 3])
def test_real_arithmetic_gives_complex_values(n, width):
    """What decompose puts in the place of operators that work with complex numbers."""
    q, k, v = (torch.randn(2, n, 3, width, dtype=torch.float64) for _ in range(3))
    state = torch.randn(2, 3, width, width, dtype=torch.complex128)
    logits = torch.randn(2, n, 3, 2, dtype=torch.float64)
    logits[:, n // 2, 0] = torch.tensor([0.0, torch.inf])
    logits[:, n // 2, 1] = 0
    gates = random_gates(2, n, 3, dtype=torch.float64)
    huge = gates.clone()
    huge[:, :2] = 1e200  # the product of the two is beyond float64, no state is
    calls = [(None, logits, None), (None, logits, state), (gates, None, None), (gates, None, state),
             (gates.real, None, state.real), (huge, None, None)]
    for *given, entry in calls:
        expected = fallback.gate_loop.forward(q, k, v, *given, entry, 0)[:2]
        actual = fallback.gate_loop.decomposed(q, k, v, *given, entry, 0)[:2]
        for mine, theirs in zip(actual, expected):
            assert mine.isfinite().all() and distance(mine, theirs) < 1e-13
    kernel, skip = torch.randn(n, 3).double(), torch.randn(3, width).double()
    assert distance(fallback.fft_conv.decomposed(q, kernel, skip),
                    fallback.fft_conv.forward(q, kernel, skip)) < 1e-13


def test_exports_have_operators_otherwise():
    model, tokens = build("MetaformerGPT").eval(), torch.randint(0, 32, (1, 5))
    with fastmix.decompose():
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert any("fastmix" in t for t in targets(torch.export.export(model, (tokens,))))


def test_default_table_alone_decomposes():
    """Other tables, lengths that are not fixed, and torch.compile keep operators."""
    model, x = fastmix.nn.MeanCenteringPool(8).eval(), torch.randn(1, 5, 8)
    program = torch.export.export(model, (x,))
    table = torch.export.default_decompositions()
    decomposed = program.run_decompositions(dict(table))
    assert not any("fastmix" in t for t in targets(decomposed))
    assert_near(decomposed.module()(x), model(x))
    del table[torch.ops.fastmix.decompose.default]
    length = torch.export.Dim("length", min=2, max=99)
    dynamic = torch.export.export(model, (x,), dynamic_shapes=({1: length},)).run_decompositions()
    assert_near(dynamic.module()(x[:, :3]), model(x[:, :3]))
    compiled = []
    torch.compile(model, fullgraph=True, backend=aot_autograd(
        fw_compiler=lambda graph, _: compiled.append(graph) or graph.forward))(x)
    for kept in (program, program.run_decompositions({}), program.run_decompositions(table),
                 dynamic, *compiled):
        assert "fastmix.cumulative_mean.default" in targets(kept)


# counts

B, N, H, D, M, W = 2, 11, 3, 4, 6, 5


def leaf(*shape, dtype=None):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def pairs(window, before):
    """What the mask of a gating unit shows, counted one by one."""
    return sum(1 for t in range(N) for s in range(N)
               if s <= t and t // window - s // window <= before)


TRANSFORM = 2.5 * 16 * 4  # 11 + 6 - 1 numbers need 16
COUNTS = {  # operator: a call, its count and that of its backward
    "linear_scan": (lambda: ops.linear_scan(leaf(B, N, H), leaf(B, N, H)),
                    2 * B * N * H, 4 * B * N * H),
    "gate_loop": (lambda: ops.gate_loop(
        *(leaf(B, N, H, D) for _ in range(3)), gate_logits=leaf(B, N, H, 2)),
        10 * B * N * H * D * D, 22 * B * N * H * D * D),
    "decay_conv": (lambda: ops.decay_conv(leaf(B, N, H, D), torch.rand(H), leaf(H)),
                   3 * B * N * H * D, 7 * B * N * H * D),
    "cumulative_mean": (lambda: ops.cumulative_mean(leaf(B, N, D)), 2 * B * N * D, 2 * B * N * D),
    "fft_conv": (
        lambda: ops.fft_conv(leaf(B, N, H, D), leaf(M, H), leaf(H, D)),
        B * H * D * (2 * TRANSFORM + 3 * 16) + H * TRANSFORM + 2 * B * N * H * D,
        B * H * D * (3 * TRANSFORM + 6 * 16) + 2 * H * TRANSFORM + 4 * B * N * H * D),
    "windowed_sgu": (lambda: ops.windowed_sgu(leaf(B, N, 2 * H), leaf(1, W, 2 * W), leaf(1, W)),
                     2 * B * H * pairs(W, 1), 4 * B * H * pairs(W, 1)),
    "causal_sgu": (lambda: ops.causal_sgu(leaf(B, N, 2 * H), leaf(1, 13, 13), leaf(1, 13)),
                   2 * B * H * pairs(N, 0), 4 * B * H * pairs(N, 0)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operations_are_counted(name):
    call, forward, backward = COUNTS[name]
    with FlopCounterMode(display=False) as counter:
        out = call()
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == backward
    assert {name, f"{name}_backward"} <= FORMULAS.keys()


@pytest.mark.parametrize("accelerated", [False, True])
def test_operations_are_counted_inside_models(accelerated):
    """The counter's own hooks do not take gating units off their operators, others' do."""
    model = (g_mlp_gpt.gMLPGPT if accelerated else fastmix.nn.gMLPGPT)(
        num_tokens=32, dim=8, depth=2, seq_len=20, window=(4, 20))
    if accelerated:
        assert fastmix.accelerate(model).replaced
    tokens = torch.randint(0, 32, (2, 11))
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    counts = counter.get_flop_counts()
    mixed = {name: 2 * 2 * 16 * sum(1 for t in range(11) for s in range(t + 1)
                                    if t // w - s // w <= 1) for name, w in (
        ("windowed_sgu", 4), ("causal_sgu", 20))}
    for name, count in mixed.items():
        for operator, expected in ((name, count), (f"{name}_backward", 2 * count)):
            assert counts["Global"][getattr(torch.ops.fastmix, operator)] == expected
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: None)
    try:
        with FlopCounterMode(display=False) as counter:
            model(tokens)
    finally:
        handle.remove()
    assert torch.ops.fastmix.causal_sgu not in counter.get_flop_counts()["Global"]


def test_complex_scans_are_counted():
    for gates, inputs, count in ((None, torch.cfloat, 4), (torch.cfloat, torch.cfloat, 8)):
        with FlopCounterMode(display=False) as counter:
            ops.linear_scan(leaf(B, N, H, dtype=gates), leaf(B, N, H, dtype=inputs))
        assert counter.get_total_flops() == count * B * N * H


def test_real_gates_are_counted():
    """Six operations per number of the state instead of ten, and backward twice that."""
    with FlopCounterMode(display=False) as counter:
        out = ops.gate_loop(*(leaf(B, N, H, D) for _ in range(3)), torch.ones(H))
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 6 * B * N * H * D * D
    assert counter.get_total_flops() - forward == 12 * B * N * H * D * D


@pytest.mark.long
def test_counters_imported_later_count_and_import_waits_for_none():
    code = """
import sys, torch, fastmix
assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fastmix.ops.cumulative_mean(torch.ones(1, 2, 3))
assert counter.get_total_flops() == 12
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def compiled(name, backend, monkeypatch):
    """The operator's call of COUNTS, compiled, its first run done."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(ops, name, lambda *args, **kwargs: seen.append((args, kwargs)))
        COUNTS[name][0]()
    (args, kwargs), = seen
    function = torch.compile(getattr(ops, name), fullgraph=True, backend=backend)
    function(*args, **kwargs).sum().backward()
    return lambda: function(*args, **kwargs)


@pytest.mark.parametrize("name, backend", [
    *((name, backend) for backend in (None, "aot_eager") for name in OPERATORS),
    pytest.param("decay_conv", "inductor", marks=pytest.mark.long)])
def test_profiles_name_operators(name, backend, monkeypatch):
    call = compiled(name, backend, monkeypatch) if backend else COUNTS[name][0]
    with profile() as profiled:
        call().sum().backward()
    events = {event.key: event for event in profiled.key_averages()}
    for key in (f"fastmix::{name}", f"fastmix::{name}_backward"):
        assert events[key].count == 1, key


@pytest.mark.long
def test_aot_inductor_in_a_fresh_process(tmp_path):
    model = build("MetaformerGPT").float().eval()
    tokens = torch.randint(0, 32, (2, 19))
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(model, (tokens,)), package_path=str(tmp_path / "model.pt2"))
    with zipfile.ZipFile(package) as files:
        assert any(b"fastmix::decay_conv" in files.read(name) for name in files.namelist())
    with torch.no_grad():
        torch.save((tokens, model(tokens)), tmp_path / "expected.pt")
    code = f"""
import fastmix, torch
tokens, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = torch._inductor.aoti_load_package({package!r})
assert torch.allclose(model(tokens), expected, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
