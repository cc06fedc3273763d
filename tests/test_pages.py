"""What stands beside the code: examples run, links lead somewhere, workflows are valid."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")])
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEXT = ["train_text", "sample_text"]  # the second needs what the first writes


def run(*command):
    ran = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.long
@pytest.mark.parametrize("path", [
    path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem not in TEXT
], ids=lambda p: p.stem)
def test_examples_run(path):
    assert run(path)


@pytest.mark.long
def test_text_is_learnt_resumed_and_written(tmp_path):
    train = ["examples/train_text.py", "--out", tmp_path, "--seq", "64", "--dim", "32",
             "--batch", "2", "--sample", "20", "--model"]
    run(*train, "metaformer", "--steps", "3")
    assert (tmp_path / "loss.png").exists()
    first = torch.load(tmp_path / "checkpoint.pt")
    assert "after 5 steps" in run(*train, "metaformer", "--steps", "5", "--resume")
    resumed = torch.load(tmp_path / "checkpoint.pt")
    assert resumed["losses"][:3] == first["losses"] and len(resumed["losses"]) == 5
    written = run("examples/sample_text.py", tmp_path / "checkpoint.pt", "--prompt", "The ")
    assert written.startswith("The ")


@pytest.mark.long
@pytest.mark.parametrize("model", ["gateloop", "smoothing", "dsconv", "gmlp"])
def test_text_of_every_model(model, tmp_path):
    assert "after 2 steps" in run(
        "examples/train_text.py", "--out", tmp_path, "--seq", "64", "--dim", "32", "--batch", "2",
        "--sample", "20", "--steps", "2", "--model", model)


def test_code_of_the_readme_runs():
    blocks = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 2
    run("-c", "\n".join(blocks))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https:)([^)\s]+)\)", page.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]


@pytest.mark.skipif(shutil.which("check-jsonschema") is None,
                    reason="check-jsonschema is not installed; ./dev installs it")
def test_workflows_are_valid():
    assert WORKFLOWS
    ran = subprocess.run(["check-jsonschema", "--builtin-schema", "vendor.github-workflows",
                          *WORKFLOWS], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
