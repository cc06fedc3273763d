import os

# Workers of pytest-xdist share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor's cache knows an operator by its name only, not by the version of its code.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch

from fastmix import _build

# test_triton.py runs these in a process of their own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else [
    "triton"]


@pytest.fixture(autouse=True)
def fresh_inputs(request):
    """New random numbers in every run; the seed is shown with a failure."""
    seed = torch.seed() % 2**32
    torch.manual_seed(seed)
    request.node.user_properties.append(("seed", seed))
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def quick_compiler(tmp_path_factory):
    """For tests of what is built and not of what it does: the C++ compiler, which is not to
    optimise. None where there is no compiler."""
    if _build.compiler() is None:
        return None
    compiler = tmp_path_factory.mktemp("compiler") / "quick-c++"
    compiler.write_text(f'#!/bin/sh\nexec {_build.compiler()} "$@" -O0\n')
    compiler.chmod(0o755)
    return str(compiler)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    outcome = yield
    report = outcome.get_result()
    for name, seed in item.user_properties:
        if report.failed and name == "seed":
            report.sections.append(("seed", f"torch.manual_seed({seed})"))


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "long" not in item.keywords)  # none is left over for one core
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU here"))
