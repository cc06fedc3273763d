"""What stands beside the code: examples run, links lead somewhere, workflows are valid."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastmix import ops

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
def test_examples_run_and_say_what_to_look_for(path):
    assert "look for" in run(path)


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
def test_a_training_that_is_killed_goes_on(tmp_path):
    train = ["examples/train_text.py", "--out", tmp_path, "--seq", "64", "--dim", "32", "--batch",
             "2", "--sample", "20", "--save-every", "2", "--steps"]
    checkpoint = tmp_path / "checkpoint.pt"
    with subprocess.Popen([sys.executable, *map(str, train), "100000"], cwd=ROOT,
                          stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not checkpoint.exists():
            time.sleep(0.1)
        process.kill()
    done = len(torch.load(checkpoint)["losses"])
    assert done and f"after {done + 2} steps" in run(*train, str(done + 2), "--resume")


@pytest.mark.long
def test_text_is_learnt_by_two_processes_as_by_one(tmp_path):
    losses = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        said = run(*launcher, "examples/train_text.py", "--out", tmp_path, "--seq", "64", "--dim",
                   "32", "--batch", "4", "--sample", "20", "--steps", "3")
        assert said.count("after 3 steps") == 1
        losses.append(torch.load(tmp_path / "checkpoint.pt")["losses"])
        (tmp_path / "checkpoint.pt").unlink()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("model", ["gateloop", "smoothing", "dsconv", "gmlp"])
def test_text_of_every_model(model, tmp_path):
    assert "after 2 steps" in run(
        "examples/train_text.py", "--out", tmp_path, "--seq", "64", "--dim", "32", "--batch", "2",
        "--sample", "20", "--steps", "2", "--model", model)


def test_code_of_the_readme_runs():
    blocks = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 3 and all(block.count("\n") <= 8 for block in blocks)
    run("-c", "\n".join(blocks))


def test_the_readme_is_short_and_leads_to_every_page_of_a_first_day():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 120
    first_day = {"docs/install.md", "docs/quickstart.md", "docs/troubleshooting.md", *(
        page.relative_to(ROOT).as_posix() for page in PAGES
        if page.parent.name in ("operators", "families") and page.stem != "index")}
    assert len(first_day) > 15
    assert first_day <= set(re.findall(r"\]\(([^)]+)\)", text))


def test_ratios_of_the_readme_are_those_of_the_report_under_its_picture():
    text = (ROOT / "README.md").read_text("utf-8")
    picture, = re.findall(r"docs/img/(cpu-[\w-]+)\.png", text)
    report = json.loads((ROOT / f"bench/results/{picture}-native.json").read_text("utf-8"))
    rows = {row["operator"]: row for row in reversed(report["operators"])}  # each one's first
    gate_loop, decay_conv = rows["gate_loop"], rows["decay_conv"]
    steps = sorted(row["ratio_original"] for row in report["models"])
    tokens = sorted(row["ratio_original"] for row in report["generation"])
    held = {
        r"`gate_loop` is (\S+) times": gate_loop["ratio_original"]["forward_backward"],
        r"takes (\S+) MB": gate_loop["peak_bytes"] / 1e6,
        r"MB instead of (\d+)": gate_loop["original"]["peak_bytes"] / 1e6,
        r"`decay_conv` is (\S+) times": decay_conv["ratio_original"]["forward_backward"],
        r"models are (\S+) to": steps[0], r"models are \S+ to (\S+) times": steps[-1],
        r"tokens come (\S+) to": tokens[0], r"tokens come \S+ to (\S+) times": tokens[-1]}
    for where, number in held.items():
        said, = re.findall(where, text)
        digits = len(said.replace(".", ""))
        assert digits > 1 and float(said) == float(f"{number:.{digits}g}"), (where, number)
    for row in gate_loop, decay_conv:  # no number that its own measuring cannot tell
        assert row["ratio_original_spread"]["forward_backward"] < 0.2, row["row"]
    processor = re.sub(r"\(R\)|\(TM\)| Processor.*", "", report["header"]["cpu"])
    assert processor in text


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https:)([^)\s]+)\)", page.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]


# ---- CONTRIBUTING.md: which files a new operator needs

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
TRITON = {file.stem for file in (ROOT / "kernels" / "triton").glob("*.py")} & set(ops.__all__)
# Of a file that not every operator is in, those that are.
IN = {
    "fastmix/states.py": {"cumulative_mean", "windowed_sgu", "causal_sgu", "fft_conv"},
    "tests/test_states.py": {*ops.__all__} - {"fft_conv"},  # it has test_fft_conv_state.py
    "tests/test_extremes.py": {*ops.__all__} - {"fft_conv"},  # it has test_fft_conv_disturbance.py
    "kernels/triton/trial.py": {"gate_loop", "windowed_sgu"},  # they multiply matrices
}


def checklist():
    """[(file, the names that its row quotes, the operators that the file must know)]"""
    rows = []
    section = CONTRIBUTING.split("## Adding an operator")[1].split("\n## ")[0]
    for part in section.split("\n### ")[1:]:
        about = TRITON if "In Triton" in part.splitlines()[0] else {*ops.__all__}
        for file, said in re.findall(r"^\| `([^`]+)` \| (.*) \|$", part, re.MULTILINE):
            rows.append((file, re.findall(r"`(\w+)`", said), IN.get(file, about)))
    return rows


def named_in(path):
    text = path.read_text("utf-8")
    return {operator for operator in ops.__all__ if re.search(rf"\b{operator}\b", text)}


@pytest.mark.parametrize("file, names, operators", [
    pytest.param(*row, id=row[0]) for row in checklist()])
def test_files_of_the_checklist_know_every_operator(file, names, operators):
    if "<name>" in file:  # gate_loop's interpreted kernels are tested in two files
        for name in operators:
            assert list(ROOT.glob(file.replace("<name>.py", f"{name}*.py").replace("<name>", name)))
        return
    assert operators <= named_in(ROOT / file)
    text = (ROOT / file).read_text("utf-8")
    assert [name for name in names if name not in text] == []


def test_the_checklist_has_every_file_that_knows_all_operators():
    folders = "fastmix", "csrc", "kernels", "tests", "bench", "docs"
    everywhere = [*ROOT.glob("*.*"), *(path for folder in folders
                                       for path in (ROOT / folder).rglob("*"))]
    known = {path.relative_to(ROOT).as_posix() for path in everywhere
             if path.suffix in (".py", ".cpp", ".h", ".sh", ".md", ".yml")
             and named_in(path) == {*ops.__all__}}
    assert len(known) > 20
    assert known <= {file for file, *_ in checklist()} | {"CONTRIBUTING.md"}


def test_what_decides_how_gate_loop_runs_is_where_the_design_says():
    rows = re.findall(r"^\| [^|]* \| `([\w/]+/\w+\.\w+)` \| (.*) \|$",
                      (ROOT / "docs" / "design.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 10
    for file, there in rows:
        text = (ROOT / file).read_text("utf-8")
        assert [name for name in re.findall(r"`(\w+)`", there)
                if name not in text and name != "FASTMIX_IMPLEMENTATION"] == []


def test_what_returns_a_reason_or_none_is_called_why_not():
    files = [*(ROOT / "fastmix").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8"))))
    functions = [node for node in nodes
                 if isinstance(node, ast.FunctionDef) and node.returns is not None
                 and ast.unparse(node.returns) == "str | None"]
    reasons = {node.name for node in functions
               if re.search("why|reason", ast.get_docstring(node) or "", re.IGNORECASE)}
    assert len(reasons) > 8
    assert [name for name in reasons if "why_not" not in name] == []


def test_functions_are_short():
    """80 lines of body and 20 parameters; Triton's kernels may have more of those."""
    folders = "fastmix", "kernels", "bench", "tests", "examples", "docs"
    files = [ROOT / "setup.py", *(file for folder in folders
                                  for file in (ROOT / folder).rglob("*.py"))]
    functions = [(file, node) for file in files for node in ast.walk(ast.parse(
        file.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 1000
    for file, function in functions:
        statements = function.body[ast.get_docstring(function) is not None:]
        lines = function.end_lineno - statements[0].lineno + 1 if statements else 0
        given = function.args
        parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        kernel = any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
        assert lines <= 80, (file, function.name)
        assert kernel or len(parameters) <= 20, (file, function.name)


def test_functions_in_cpp_can_be_read_too():
    """Their bodies have 80 lines at most, from the line that opens a brace to its partner."""
    text = re.compile(r'"(?:\\.|[^"\\])*"|\'.\'|//.*')
    other = re.compile(r"\s*(namespace|struct|class|enum|union|extern|if|for|while|switch|do|}|#)")
    for file in sorted((ROOT / "csrc").glob("*/*.*")):
        lines = [text.sub("", line).rstrip() for line in file.read_text().splitlines()]
        for start, line in enumerate(lines):
            if ")" not in line or not line.endswith("{") or other.match(line):
                continue
            depth, end = 1, start
            while depth:
                end += 1
                depth += lines[end].count("{") - lines[end].count("}")
            assert end - start - 1 <= 80, f"{file}:{start + 1}"


def test_every_test_file_is_in_the_table():
    operators = {f"test_{name}" for name in ops.__all__}
    modules = {f"test_{path.stem}" for path in (ROOT / "fastmix" / "nn").iterdir()}
    files = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    for name in files - operators - modules:
        assert f"{name}.py`" in CONTRIBUTING


@pytest.mark.skipif(shutil.which("check-jsonschema") is None,
                    reason="check-jsonschema is not installed; ./dev installs it")
def test_workflows_are_valid():
    assert WORKFLOWS
    ran = subprocess.run(["check-jsonschema", "--builtin-schema", "vendor.github-workflows",
                          *WORKFLOWS], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.skipif(os.name == "nt", reason="CI's scripts are for Linux and macOS")
def test_a_newer_python_is_not_taken_for_the_oldest(tmp_path):
    for tool in "bash", "dirname", "sed":
        (tmp_path / tool).symlink_to(shutil.which(tool))
    newer = tmp_path / "python3"

    def ran(*arguments):
        only = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
        return subprocess.run(["bash", ROOT / ".ci" / "oldest", *arguments], env=only,
                              capture_output=True, text=True)

    nothing = ran()
    assert nothing.returncode == 1 and "NOT RUN: no Python here" in nothing.stderr
    assert ran("newer").returncode == 1
    newer.write_text("#!/bin/sh\necho 3.99\n")
    newer.chmod(0o755)
    refused = ran()
    assert refused.returncode == 1 and "NOT RUN on Python 3.10" in refused.stderr


@pytest.mark.skipif(os.name == "nt", reason="CI's scripts are for Linux and macOS")
def test_tests_for_aarch64_fail_where_they_cannot_run(tmp_path):
    for tool in "bash", "dirname":
        (tmp_path / tool).symlink_to(shutil.which(tool))
    for system, reason in (("Darwin arm64", "on aarch64 itself, ./dev pytest runs"),
                           ("Linux x86_64", "apt-get install qemu-user-static g++-aarch64")):
        uname = tmp_path / "uname"
        uname.write_text(f"#!{shutil.which('sh')}\necho {system}\n")
        uname.chmod(0o755)
        ran = subprocess.run(["bash", ROOT / ".ci" / "aarch64"], env={"PATH": str(tmp_path)},
                             capture_output=True, text=True)
        assert ran.returncode == 1 and "NOT RUN: " in ran.stderr and reason in ran.stderr
