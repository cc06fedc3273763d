import importlib.util
import os
import shlex
import sys

# Workers of pytest-xdist share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# The kernels of every instruction set that this machine has, not of its best one alone.
os.environ.setdefault("FASTMIX_INSTRUCTION_SETS", "all")
if getattr(importlib.util.find_spec("triton"), "origin", None) is None:
    sys.modules["triton"] = None  # not installed: the folder tests/triton is not it
# Inductor's cache knows an operator by its name only, not by the version of its code.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import random
import re
import zlib

import pytest
import torch

from cases import CASES
from fastmix.native import build

# test_triton.py runs these in a process of their own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else [
    "triton"]


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help=(
        "run what a run without it leaves out: tests marked `long`, and of tests with several "
        "parameters all cases but a few that show every value of each parameter once. Tests that "
        "are chosen by ::, -k or -m run whole"))
    parser.addoption("--seed", type=int, help=(
        "what random numbers are drawn from: that of an earlier run, from its first lines, "
        "repeats its draws"))


def pytest_configure(config):
    if config.option.seed is None:  # xdist hands the options on to its workers
        config.option.seed = random.randrange(2**32)
    torch.manual_seed(config.option.seed)  # some tests draw their cases


def pytest_report_header(config):
    return f"random numbers: --seed {config.option.seed}"


@pytest.fixture(autouse=True)
def fresh_inputs(request):
    """Random numbers from the run's seed and the test's name: a test that fails alone draws
    what it drew among all others."""
    torch.manual_seed(zlib.crc32(f"{request.config.option.seed} {request.node.nodeid}".encode()))
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def quick_compiler(tmp_path_factory):
    """For tests of what is built and not of what it does: the C++ compiler, which is not to
    optimise. None where there is no compiler."""
    if build.compiler() is None:
        return None
    compiler = tmp_path_factory.mktemp("compiler") / "quick-c++"
    compiler.write_text(f'#!/bin/sh\nexec {shlex.join(build.compiler())} "$@" -O0\n')
    compiler.chmod(0o755)
    return str(compiler)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("random numbers", f"--seed {item.config.option.seed}"))


def without_kind(name):
    """The operator's name for its case's, alone or before that of an implementation."""
    case = max((c for c in CASES if f"{name}-".startswith(f"{c}-")), key=len, default=None)
    return name if case is None else CASES[case].operator + name[len(case):]


def names_of(item):
    """The name of its value of each parameter, or of parameters that are given together."""
    costly, names = item.get_closest_marker("costly"), item.callspec._idlist
    return [*map(without_kind, names)] if costly else names


def every_value_once(items):
    """A few of one test's cases that have every value of each of its parameters among them. Of
    integers, which are sizes, the middle one stands for all; but each refusal is tried."""
    values = {item: set() for item in items}
    for parameter, names in enumerate(zip(*map(names_of, items))):
        sizes = [name for name in dict.fromkeys(names) if re.fullmatch(r"\d+(-\d+)*", name)]
        if "refuse" in items[0].originalname:
            sizes = []
        needless = set(sizes) - {*sizes[len(sizes) // 2:][:1]}
        for item, name in zip(items, names):
            values[item] |= {(parameter, name)} - {(parameter, size) for size in needless}
    missing = set().union(*values.values())
    chosen = []
    while missing:
        chosen.append(max(items, key=lambda item: len(values[item] & missing)))
        missing -= values[chosen[-1]]
    return chosen


def short_tier(items):
    """Those that run without --long."""
    short, cases, first = set(), {}, {}
    for item in items:
        if item.get_closest_marker("long"):
            continue
        # Interpreted kernels take minutes: of each file of tests/triton the first test.
        if item.path.parent.name == "triton" and (
                item.originalname != first.setdefault(item.path, item.originalname)):
            continue
        if hasattr(item, "callspec"):
            cases.setdefault((item.path, item.cls, item.originalname), []).append(item)
        else:
            short.add(item)
    return short.union(*map(every_value_once, cases.values()))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    chosen = config.option.keyword or config.option.markexpr
    named = chosen or any("::" in str(arg) for arg in config.args)
    if not named:
        short = short_tier(items)
        config.hook.pytest_deselected(
            items=[item for item in items if (item in short) == config.option.long])
        items[:] = [item for item in items if (item in short) != config.option.long]
    # What is interpreted or compiled for long first, then other long ones: none is left over for
    # one core, nor does another wait for the compiler.
    items.sort(key=lambda item: (item.get_closest_marker("long") is None, item.path.stem not in (
        "test_triton", "test_fft_conv_cuda")))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU here"))
