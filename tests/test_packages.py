"""fastmix.nn.<package> in the place of each published package, names and submodules included."""

import importlib
import inspect
import pkgutil

import pytest
import torch

import fastmix.nn

PACKAGES = ["g_mlp_gpt", "gated_state_spaces_pytorch", "gateloop_transformer", "metaformer_gpt"]
# A function made of jax, and what replays a module in the published reversible backward.
LEFT_OUT = {"get_jax_gate_loop_operator", "Deterministic"}
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
    for file in submodules(theirs) & submodules(mine) - NOT_HERE:
        published = importlib.import_module(f"{name}.{file}")
        twin = importlib.import_module(f"fastmix.nn.{name}.{file}")
        for public, value in vars(published).items():
            own = getattr(value, "__module__", "") == published.__name__
            if (own or public == "binary_operator") and not public.startswith("_"):
                assert hasattr(twin, public) == (public not in LEFT_OUT), f"{file}.{public}"


def test_what_is_made_of_jax_says_so():
    with pytest.raises(ImportError, match="has no twin of this module, which is made of jax"):
        importlib.import_module("fastmix.nn.gateloop_transformer.gateloop_transformer_jax")
    with pytest.raises(ImportError, match="import it from gateloop_transformer, or fastmix.nn"):
        from fastmix.nn.gateloop_transformer import gateloop_transformer_jax  # noqa: F401


def test_associative_scan_is_function_and_submodule():
    scan = fastmix.nn.gateloop_transformer.associative_scan
    assert scan.associative_scan is scan
    assert importlib.import_module(
        "fastmix.nn.gateloop_transformer.associative_scan").associative_scan is scan


X = torch.linspace(0.1, 0.9, 24, dtype=torch.float64).view(2, 4, 3)
ROUTES = {"mask": [(True, False), (False, True)], "other": [(True, True), (False, False)]}
HELPERS = {  # of every file that has one of that name: calls that must give the same
    "exists": [(None,), (0,)],
    "default": [(None, 2), (0, 2)],
    "cast_tuple": [(3, 2), ((1, 2), 3)],
    "append_dims": [(X, 2), (X, 0), (X, -1)],
    "pad_at_dim": [(X, (1, 2), 1), (X, (0, 1), -2, 5.0)],
    "top_k": [(X[0], 0.5)],
    "route_args": [(ROUTES, {"mask": 1, "unknown": 2}, 2), (ROUTES, {}, 2)],
    "layer_drop": [([1, 2, 3, 4], 0.5), ([1, 2], 1.0)],
    "eps_by_dtype": [(torch.float16,), (torch.float32,)],
    "abs_clamp_eps": [(X - 0.5,), (X - 0.5, 0.3)],
    "binary_operator": [((X, X + 1), (X - 1, 2 * X))],
    "heinsen_associative_scan": [(X, X + 1), (X, X - 0.5, 0.3)],
}


@pytest.mark.parametrize("helper", HELPERS)
def test_helpers_give_the_same(helper):
    files = [(package, file) for package in PACKAGES for file in submodules(
        importlib.import_module(package)) - NOT_HERE]
    tried = 0
    for package, file in files:
        published = importlib.import_module(f"{package}.{file}")
        if not hasattr(published, helper):
            continue
        tried += 1
        twin = importlib.import_module(f"fastmix.nn.{package}.{file}")
        for args in HELPERS[helper]:
            results = []
            for module in (published, twin):
                torch.manual_seed(3)
                results.append(getattr(module, helper)(*args))
            torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert tried


def test_sequential_leaves_out_what_is_none():
    join = fastmix.nn.gateloop_transformer.gateloop_transformer.Sequential
    first, second = torch.nn.Tanh(), torch.nn.ReLU()
    assert isinstance(join(None), torch.nn.Identity) and join(None, first) is first
    assert list(join(first, None, second)) == [first, second]


@pytest.mark.parametrize("package", ["g_mlp_gpt", "gated_state_spaces_pytorch", "metaformer_gpt"])
def test_eval_decorator_is_over_with_the_function(package):
    file = importlib.import_module(f"fastmix.nn.{package}.autoregressive_wrapper")
    model = torch.nn.Dropout()
    assert file.eval_decorator(lambda model, x: (model.training, x))(model, 2) == (False, 2)
    assert model.training
    with pytest.raises(ZeroDivisionError):
        file.eval_decorator(lambda model: 1 / 0)(model)
    assert model.training
