"""A minute of random calls, other ones every time, and the same under sanitizers."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmix.native import build

CAMPAIGN = Path(__file__).parent / "campaign.py"


@pytest.fixture
def run(pytestconfig):
    """run(*options) → what the campaign prints; it draws from the run's --seed."""
    return functools.partial(campaign, "--seed", str(pytestconfig.option.seed))


def campaign(*options):
    # Which instruction sets it compiles it chooses itself: under sanitizers only this machine's.
    environment = {name: value for name, value in os.environ.items()
                   if name != "FASTMIX_INSTRUCTION_SETS"}
    ran = subprocess.run([sys.executable, CAMPAIGN, *options], capture_output=True, text=True,
                         env=environment)
    if "the compiler has no lib" in ran.stderr:
        pytest.skip(ran.stderr.strip())
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    print(ran.stdout)  # the seed, and what was counted
    return ran.stdout


@pytest.mark.long
def test_a_minute_of_random_calls(run):
    """None kills its process, hangs, or writes to its arguments."""
    run("--minutes", "1", "--processes", "2", "--fatal", "crash", "hang", "modified")


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                    reason="Triton is not installed: there are no wheels for it here")
def test_random_calls_of_interpreted_kernels(run):
    counted = run("--minutes", "5", "--calls", "6", "--processes", "2",
                  "--operators", "cumulative_mean", "--implementations", "triton",
                  "--fatal", "crash", "hang", "modified")
    assert ": 6 calls" in counted and "cumulative_mean triton" in counted


@pytest.mark.long
@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_sanitizers_find_nothing_in_2000_random_calls(run):
    """There are fewer calls where three minutes do not hold as many."""
    run("--sanitize", "address", "--minutes", "3", "--calls", "290", "--processes", "2",
        "--operators", *("linear_scan gate_loop decay_conv fft_conv windowed_sgu causal_sgu "
                         "cumulative_mean").split(),
        "--implementations", "portable", "avx2", "avx512", "--fatal", "crash", "hang", "modified")
