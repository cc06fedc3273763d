"""Installing, importing and looking at the package, each in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import fastmix
import fastmix.nn
from fastmix import dispatch, env
from fastmix.native import build
from fastmix.ops._register import OPERATORS

ROOT = Path(__file__).parent.parent


def python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/",
                          env={**os.environ, **environment})


@pytest.mark.long
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


@pytest.mark.long
def test_import_brings_nothing_heavy():
    ran = python("""
import torch, sys
before = set(sys.modules)
import fastmix
print([m for m in sys.modules if m not in before and m.split(".")[0] != "fastmix"])
""")
    brought = eval(ran.stdout)
    assert not {m.split(".")[0] for m in brought} & {"scipy", "triton", "matplotlib", "numpy"}


@pytest.mark.long
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
                 for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu")}
    expected.add("fastmix/py.typed")
    expected |= {f"fastmix/_triton/{path.name}" for path in (ROOT / "kernels/triton").glob("*.py")}
    if quick_compiler is not None:  # the library, built ahead: for one platform, any Python
        cuda = build.torch_has_cuda(Path(torch.__file__).parent) and build.cuda_compiler()
        library = Path("fastmix/native") / build.name_built_ahead(bool(cuda))
        expected |= {str(library), str(build.checksum_file(library))}
        assert "-py3-none-" in wheel.name and "any" not in wheel.name
    assert modules == expected


def run_env(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "fastmix.env", *arguments], capture_output=True,
                          text=True, env=os.environ | environment)


def test_env_names_every_operator_and_what_is_missing():
    ran = run_env("--quick")
    assert ran.returncode == 0, ran.stderr
    assert f"fastmix {fastmix.__version__}" in ran.stdout
    for operator in OPERATORS:
        assert operator in ran.stdout
    for name, reason in fastmix.implementations("gate_loop", "cpu").items():
        assert reason is None or f"not {name}: {reason}" in ran.stdout


def test_env_tries_every_implementation_that_can_run():
    ran = run_env("--json")
    assert ran.returncode == 0, ran.stderr
    facts = json.loads(ran.stdout)
    assert facts["cpu"] and facts["libc"] and facts["commit"]
    operators = facts["devices"]["cpu"]["operators"]
    assert set(operators) == set(OPERATORS)
    for operator, states in operators.items():
        can_run = [name for name, reason in fastmix.implementations(operator, "cpu").items()
                   if reason is None]
        assert states["self_test"] == dict.fromkeys(can_run, "ok")


def test_env_finds_an_implementation_that_is_wrong(monkeypatch):
    def wrong(x):
        return x.clone()

    monkeypatch.setattr(OPERATORS["cumulative_mean"].fallback, "forward", wrong)
    assert "wrong" in env.self_test("cpu")["cumulative_mean"]["fallback"]

    def broken(x):
        raise RuntimeError("out of order")

    monkeypatch.setattr(OPERATORS["cumulative_mean"].fallback, "forward", broken)
    outcomes = env.self_test("cpu")
    assert outcomes["cumulative_mean"]["fallback"] == "RuntimeError: out of order"
    assert outcomes["decay_conv"]["fallback"] == "ok"

    forward = OPERATORS["gate_loop"].fallback.forward

    def wrong_with_real_gates(q, k, v, gates, *others):
        return forward(q, k, v if gates is None else 1.1 * v, gates, *others)

    monkeypatch.setattr(OPERATORS["gate_loop"].fallback, "forward", wrong_with_real_gates)
    assert "wrong" in env.self_test("cpu")["gate_loop"]["fallback"]


@pytest.mark.long
def test_env_tries_everything_within_five_seconds_once_compiled():
    """Of the processor: a machine that others use as well takes longer by the clock."""
    resource = pytest.importorskip("resource")
    command = [sys.executable, "-m", "fastmix.env"]
    subprocess.run(command, capture_output=True, check=True, cwd=ROOT)  # compiles
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ran.stdout.count("fallback: ok") >= len(OPERATORS)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_who_forces_what_cannot_run_is_told_what_else_to_do():
    kernel = dispatch._raising("gate_loop", "native", "cuda", "no such kernel")
    with pytest.raises(RuntimeError, match="no such kernel .without fastmix.force"):
        kernel()
    with pytest.raises(RuntimeError, match="too long .without fastmix.force"):
        OPERATORS["gate_loop"].run_instead("native", "too long", True, False, ())


@pytest.mark.long
def test_env_says_what_is_forced():
    ran = run_env("--quick", FASTMIX_IMPLEMENTATION="fallback")
    assert "FASTMIX_IMPLEMENTATION  fallback: forced for all calls" in ran.stdout
    assert "decay_conv            fallback, forced" in ran.stdout


@pytest.mark.parametrize("name, why", [
    ("fastest", "implementation must be one of"), ("triton", "no operator can run on 'triton'")])
def test_env_starts_whatever_is_forced(name, why):
    if name == "triton" and fastmix.implementations("gate_loop")["triton"] is None:
        pytest.skip("Triton runs here")
    ran = run_env("--quick", FASTMIX_IMPLEMENTATION=name)
    assert ran.returncode == 1 and not ran.stderr
    assert (f"FASTMIX_IMPLEMENTATION  {name}: refused. FASTMIX_IMPLEMENTATION in the environment: "
            f"{why}") in ran.stdout
    assert "forced" not in ran.stdout.partition("cpu: ")[2]


@pytest.mark.long
def test_env_into_a_pipe_that_is_closed():
    with subprocess.Popen([sys.executable, "-m", "fastmix.env", "--quick"], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ran:
        ran.stdout.close()
        assert ran.stderr.read() == "" and ran.wait() == 0


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


@pytest.mark.long
def test_the_environment_forces_too():
    code = "import fastmix, torch; fastmix.ops.cumulative_mean(torch.ones(1, 2)); print('ran')"
    for name in ("fallback", ""):
        assert python(code, FASTMIX_IMPLEMENTATION=name).stdout == "ran\n"
    for name, reason in fastmix.implementations("cumulative_mean", "cpu").items():
        if reason is not None:
            ran = python(code, FASTMIX_IMPLEMENTATION=name)
            assert ran.returncode != 0 and reason in ran.stderr
    ran = python(code, FASTMIX_IMPLEMENTATION="fastest")
    assert ("FASTMIX_IMPLEMENTATION in the environment: implementation must be one of"
            in ran.stderr)


@pytest.mark.long
def test_nn_is_there_after_importing_the_package():
    ran = python("""
import sys, fastmix
assert "fastmix.nn" not in sys.modules
assert fastmix.nn.GateLoopTransformer and fastmix.nn is sys.modules["fastmix.nn"]
assert not hasattr(fastmix, "no_such_name")
""")
    assert ran.returncode == 0, ran.stderr


def test_force_without_with_says_that_it_had_no_effect():
    with pytest.warns(RuntimeWarning, match=r"write `with fastmix.force\('fallback'\):`"):
        fastmix.force("fallback")
    x = torch.ones(1, 2)

    @fastmix.force("fallback")
    def decorated():
        return fastmix.dispatch.forced(), fastmix.ops.cumulative_mean(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert decorated()[0] == "fallback"
        with fastmix.force("fallback"):
            assert fastmix.dispatch.forced() == "fallback"
        with pytest.raises(ValueError):
            fastmix.force("fastest")
    assert fastmix.dispatch.forced() is None


def with_path(folder, code):
    """Runs code with `folder` on the path and whatever is installed but fastmix: -S leaves out
    .pth files, by which an editable installation is found."""
    path = [str(folder), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    return subprocess.run([sys.executable, "-I", "-S", "-c",
                           f"import sys\nsys.path[:0] = {path}\n{code}"],
                          capture_output=True, text=True, cwd="/")


@pytest.mark.long
def test_a_checkout_on_the_path_has_every_kernel():
    ran = with_path(ROOT, f"""
import fastmix, fastmix._triton, fastmix.dispatch
from fastmix import native
assert fastmix.__file__ == {str(ROOT / "fastmix" / "__init__.py")!r}, fastmix.__file__
assert set(fastmix.dispatch._modules) == {{"native", "triton"}}
print(sorted(native.KERNELS["cpu"]), sorted(fastmix._triton.KERNELS))
""")
    assert ran.returncode == 0, ran.stderr
    kernels = [sorted(set(OPERATORS) & {path.stem for path in (ROOT / folder).iterdir()})
               for folder in ("csrc/cpu", "kernels/triton")]
    assert ran.stdout == f"{kernels[0]} {kernels[1]}\n"


@pytest.mark.long
def test_a_folder_of_kernels_that_is_missing_is_named(tmp_path):
    """As where git makes no symbolic links."""
    copy = tmp_path / "fastmix"
    shutil.copytree(ROOT / "fastmix", copy, ignore=shutil.ignore_patterns("_triton"))
    (copy / "_triton").write_text("../kernels/triton")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    ran = with_path(tmp_path, "import fastmix; print(fastmix.__file__); "
                              "print(fastmix.implementations('gate_loop')['triton'])")
    assert ran.returncode == 0, ran.stderr
    file, reason = ran.stdout.splitlines()
    assert file == str(copy / "__init__.py")
    assert f"its kernels are not at {copy / '_triton'}: install fastmix again" in reason


def test_sdist_holds_every_source_once(tmp_path):
    subprocess.run([sys.executable, "-c", "from setuptools import build_meta; "
                    f"build_meta.build_sdist({str(tmp_path)!r})"], cwd=ROOT, check=True,
                   capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive if not member.isdir()]
        assert all(member.isdir() or member.isreg() for member in archive)
    triton = [f"kernels/triton/{path.name}" for path in (ROOT / "kernels/triton").glob("*.py")]
    assert [names.count(name) for name in triton] == [1] * len(triton)
    assert not [name for name in names if name.startswith("fastmix/_triton")]
    native = [f"csrc/{path.parent.name}/{path.name}" for path in (ROOT / "csrc").glob("*/*")]
    assert set(native) <= set(names)
