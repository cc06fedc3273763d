"""Installing, importing and looking at the package, each in a process of its own."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fastmix
import fastmix.nn
from fastmix import _build
from fastmix.ops._register import OPERATORS

ROOT = Path(__file__).parent.parent


def python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/",
                          env={**os.environ, **environment})


def test_imports_with_torch_and_einops_alone():
    """Every other package the project can use is blocked, and the first call is a compiled one."""
    ran = python("""
import sys
for name in ("scipy", "triton", "matplotlib", "rotary_embedding_torch", "ninja", "setuptools"):
    sys.modules[name] = None
import torch, fastmix, fastmix.nn
model = fastmix.nn.GateLoopTransformer(num_tokens=16, dim=8, depth=1)
tokens = torch.randint(0, 16, (1, 9))
compiled = torch.compile(model, fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(tokens), model(tokens))
""")
    assert ran.returncode == 0, ran.stderr


def test_import_brings_nothing_heavy():
    ran = python("""
import torch, sys
before = set(sys.modules)
import fastmix
print([m for m in sys.modules if m not in before and m.split(".")[0] != "fastmix"])
""")
    brought = eval(ran.stdout)
    assert not {m.split(".")[0] for m in brought} & {"scipy", "triton", "matplotlib", "numpy"}


def test_wheel_holds_the_package_and_nothing_else(tmp_path, quick_compiler, monkeypatch):
    if quick_compiler is not None:
        monkeypatch.setenv("CXX", quick_compiler)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
                    "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        modules = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "fastmix").rglob("*.py")}
    expected |= {f"fastmix/_csrc/{path.relative_to(ROOT / 'csrc')}"
                 for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    expected |= {f"fastmix/_triton/{path.name}" for path in (ROOT / "kernels/triton").glob("*.py")}
    if quick_compiler is not None:  # the library, built ahead: for one platform, any Python
        cuda = _build.torch_has_cuda(Path(torch.__file__).parent) and _build.cuda_compiler()
        expected.add(f"fastmix/_native{'-cuda' if cuda else ''}-{_build.fingerprint()}.so")
        assert "-py3-none-" in wheel.name and "any" not in wheel.name
    assert modules == expected


def test_env_names_every_operator_and_what_is_missing():
    ran = subprocess.run([sys.executable, "-m", "fastmix.env"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert f"fastmix {fastmix.__version__}" in ran.stdout
    for operator in OPERATORS:
        assert operator in ran.stdout
    for name, reason in fastmix.implementations("gate_loop", "cpu").items():
        assert reason is None or f"not {name}: {reason}" in ran.stdout


def test_version_is_that_of_the_package():
    assert f'version = "{fastmix.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_nn_exports_every_unambiguous_name():
    files = [fastmix.nn.metaformer_gpt, fastmix.nn.mhesa, fastmix.nn.dsconv,
             fastmix.nn.g_mlp_gpt, fastmix.nn.gateloop_transformer]
    names = {}
    for file in files:
        for name in file.__all__:
            names.setdefault(name, set()).add(getattr(file, name))
    for name, objects in names.items():
        if len(objects) == 1:
            assert getattr(fastmix.nn, name) in objects
        else:
            assert not hasattr(fastmix.nn, name), name
    assert fastmix.nn.GateLoopTransformer is fastmix.nn.gateloop_transformer.Transformer


def test_force_runs_what_it_names_and_refuses_what_it_cannot():
    x, decay = torch.randn(1, 5, 2, 3), torch.rand(2)
    expected = fastmix.ops.decay_conv(x, decay)
    with fastmix.force("fallback"):
        assert torch.equal(fastmix.ops.decay_conv(x, decay), expected)
    for name, reason in fastmix.implementations("decay_conv", "cpu").items():
        if reason is not None:
            with pytest.raises(RuntimeError, match=reason), fastmix.force(name):
                fastmix.ops.decay_conv(x, decay)
    with pytest.raises(ValueError, match="implementation must be one of .*got 'fastest'"):
        fastmix.force("fastest").__enter__()
    with pytest.raises(ValueError, match="operator must be one of .*got 'attention'"):
        fastmix.implementations("attention")
    assert torch.equal(fastmix.ops.decay_conv(x, decay), expected)


def test_the_environment_forces_too():
    code = "import fastmix, torch; fastmix.ops.cumulative_mean(torch.ones(1, 2)); print('ran')"
    for name in ("fallback", ""):
        assert python(code, FASTMIX_IMPLEMENTATION=name).stdout == "ran\n"
    for name, reason in fastmix.implementations("cumulative_mean", "cpu").items():
        if reason is not None:
            ran = python(code, FASTMIX_IMPLEMENTATION=name)
            assert ran.returncode != 0 and reason in ran.stderr
    ran = python(code, FASTMIX_IMPLEMENTATION="fastest")
    assert "implementation must be one of" in ran.stderr
