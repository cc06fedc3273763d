"""fastmix.nn.<package> in the place of each published package, names and submodules included."""

import importlib
import inspect
import pkgutil

import pytest

import fastmix.nn

PACKAGES = ["g_mlp_gpt", "gated_state_spaces_pytorch", "gateloop_transformer", "metaformer_gpt"]
# Helpers of each file's own, and jax's version of a file.
HELPERS = {"exists", "default", "cast_tuple", "Sequential", "eval_decorator", "top_k", "route_args",
           "layer_drop", "Deterministic", "eps_by_dtype", "abs_clamp_eps", "binary_operator",
           "heinsen_associative_scan", "get_jax_gate_loop_operator", "pad_at_dim",
           "append_dims"}
NOT_HERE = {"gateloop_transformer_jax"}


def submodules(package):
    return {module.name for module in pkgutil.iter_modules(package.__path__)}


@pytest.mark.parametrize("name", PACKAGES)
def test_has_what_the_package_has(name):
    theirs = importlib.import_module(name)
    mine = importlib.import_module(f"fastmix.nn.{name}")
    for public in (n for n, v in vars(theirs).items() if inspect.isclass(v)):
        assert inspect.isclass(getattr(mine, public)), public
    assert submodules(theirs) - NOT_HERE - {"autoregressive_wrapper"} <= submodules(mine)
    for file in submodules(theirs) & submodules(mine):
        published = importlib.import_module(f"{name}.{file}")
        twin = importlib.import_module(f"fastmix.nn.{name}.{file}")
        for public, value in vars(published).items():
            own = getattr(value, "__module__", "") == published.__name__
            if own and not public.startswith("_") and public not in HELPERS:
                assert hasattr(twin, public), f"{file}.{public}"


def test_associative_scan_is_function_and_submodule():
    scan = fastmix.nn.gateloop_transformer.associative_scan
    assert scan.associative_scan is scan
    assert importlib.import_module(
        "fastmix.nn.gateloop_transformer.associative_scan").associative_scan is scan
