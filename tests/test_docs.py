"""What the pages and docstrings show, runs, and prints or raises what they say."""

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import re
import runpy
from pathlib import Path

import pytest
import torch

import fastmix
from fastmix import ops

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SKETCHES = {"states", "models"}  # pages whose code is about any operator or model
PAGES = {page: page.read_text("utf-8") for page in sorted(DOCS.rglob("*.md"))}
COSTLY = {"torch"}  # pages that compile and export
HEADINGS = ["Example", "Arguments", "State", "Cost", "Errors", "Source"]


@pytest.mark.parametrize("module", [
    *(f"ops.{name}" for name in ops.__all__), "generation", "states", "dispatch", "_accelerate",
    pytest.param("ops._register", marks=pytest.mark.long)])  # exports
def test_examples_run(module):
    # The module, which its function hides as an attribute of the package.
    ran = doctest.testmod(importlib.import_module(f"fastmix.{module}"),
                          extraglobs={"torch": torch, "fastmix": fastmix})
    assert ran.attempted > 0 and ran.failed == 0


def code_of(page):
    """[(code, what it prints)]: a text block right behind is what a python block prints."""
    return re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", PAGES[page],
                      re.DOTALL | re.MULTILINE)


def outcome(code, names):
    """What code prints; the error's name and message last, if it raises one."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(code, "<page>", "exec"), names)
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
    return printed.getvalue()


def assert_says(got, said):
    """… at the end of what a page says stands for more words."""
    got, said = got.strip(), said.strip()
    if said.endswith("…"):
        got, said = got[: len(said) - 1], said[:-1]
    assert got == said


@pytest.mark.parametrize("page", [
    pytest.param(page, id=str(page.relative_to(DOCS)),
                 marks=[pytest.mark.long] if page.stem in COSTLY else [])
    for page in PAGES if page.stem not in SKETCHES and code_of(page)])
def test_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code, printed in code_of(page):
        assert_says(outcome(code, names), printed)
    for call, error in re.findall(r"^\| `([^`]+\))` \| `(\w+Error: [^`]+)` \|", PAGES[page],
                                  re.MULTILINE):
        assert_says(outcome(call, names), error)


@pytest.mark.parametrize("operator", ops.__all__)
def test_every_operator_has_its_page(operator):
    text = PAGES[DOCS / "operators" / f"{operator}.md"]
    assert re.findall("^## (.*)$", text, re.MULTILINE)[0] == "Example"
    assert set(HEADINGS) <= set(re.findall("^## (.*)$", text, re.MULTILINE))
    assert f"../img/{operator}.svg" in text
    # Every argument stands in the table, or on the page that the table names.
    table = text + PAGES[DOCS / "operators" / "windowed_sgu.md"] * ("_sgu" in operator)
    for argument in inspect.signature(getattr(ops, operator)).parameters:
        assert f"`{argument}`" in table


def test_pictures_are_those_that_the_script_draws():
    script = runpy.run_path(str(DOCS / "pictures.py"))
    for operator in ops.__all__:
        assert (DOCS / "img" / f"{operator}.svg").read_text("utf-8") == script["picture"](operator)


def test_messages_of_troubleshooting_are_those_of_the_code():
    words = "\n".join(
        node.value for file in (ROOT / "fastmix").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str))
    page = PAGES[DOCS / "troubleshooting.md"]
    before, after = page.split("## Arguments")
    # … is what differs; an f-string has a gap there.
    quoted = re.findall(r"^\| `([^`]+)`", before + after.split("Loading and importing")[1], re.M)
    # Torch's words, Python's, and those of a compiler.
    elsewhere = ("We failed to resolve", "No module named", "__builtin_shufflevector")
    quoted = [message for message in quoted if not message.startswith(elsewhere)]
    assert len(quoted) > 10
    for message in quoted:
        for part in message.replace("C++ compiler", "…").split("…"):  # a name that is put in
            assert part.strip(" ,:") in words
