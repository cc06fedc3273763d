"""Installing in every way that users have, offline, each into an environment of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from fastmix.native import build, library

ROOT = Path(__file__).parent.parent
PURELIB = Path(sysconfig.get_paths()["purelib"])

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(build.compiler() is None or os.name != "posix",
                       reason="no C++ compiler, or no shell to imitate one")]


class Environment:
    """A fresh one at `path`, to which `packages` of this one are lent: "all" but fastmix, or a
    name."""

    def __init__(self, path, packages):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
        self.python = path / "bin" / "python"
        self.lent = path / "lent"
        self.lent.mkdir()
        (self.site,) = path.glob("lib/python*/site-packages")
        (self.site / "lent.pth").write_text(f"{self.lent}\n", "utf-8")
        self.lend(packages)

    def lend(self, packages):
        for file in PURELIB.iterdir():
            own = file.name.startswith(("fastmix", "__editable__")) or file.suffix == ".pth"
            wanted = packages == "all" or file.name.startswith((packages, "_distutils_hack"))
            if wanted and not own and not (self.lent / file.name).exists():
                (self.lent / file.name).symlink_to(file)

    def run(self, *arguments, environment=None):
        """Its output; None in `environment` unsets a variable."""
        inherited = {key: value for key, value in os.environ.items()
                     if key != "PYTHONPATH" and not key.startswith("FASTMIX_")}
        environment = {**inherited, "PIP_NO_INDEX": "1", **(environment or {})}
        ran = subprocess.run(
            arguments, capture_output=True, text=True, cwd="/",
            env={key: value for key, value in environment.items() if value is not None})
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    def install(self, *what, under=(), **how):
        """In an isolated build pip takes setuptools from its index; here it is lent, and torch,
        which an isolated build lacks, is not."""
        return self.run(*under, sys.executable, "-m", "pip", "--disable-pip-version-check",
                        "--python", self.python, "install", "--no-deps", "--no-build-isolation",
                        *what, **how)

    def works(self, environment):
        """fastmix.env finds every operator right, on the C++ kernels."""
        said = self.run(self.python, "-m", "fastmix.env", environment={
            "FASTMIX_IMPLEMENTATION": "native", **environment})
        assert "native, forced  (native: ok" in said
        return said

    def libraries(self):
        return [*self.site.glob("fastmix/native/built-*.so")]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what git would check out: installing writes into it."""
    return copied(tmp_path / "checkout")


def copied(folder):
    return shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"))


def stand_in(folder):
    """Instead of a compiler: copies the library that the tests have where one is to be linked."""
    folder.mkdir()
    shutil.copyfile(library.load(), folder / "library")
    path = folder / "c++"
    path.write_text(f"""#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in -o) made="$2" ;; -shared) linked=1 ;; esac
    shift
done
if [ "$linked" ]; then cp {folder}/library "$made"; else echo > "$made"; fi
""")
    path.chmod(0o755)
    return {"CXX": str(path), "CUDACXX": "none"}


def cached(folder):
    """An environment whose cache holds a library already, for a machine without a compiler."""
    path = library.load()
    folder.mkdir(mode=0o700)
    for file in path, build.checksum_file(path):
        shutil.copy(file, folder)
    return {"FASTMIX_CACHE": str(folder), "CXX": "no-compiler",
            "FASTMIX_INSTRUCTION_SETS": os.environ["FASTMIX_INSTRUCTION_SETS"]}


def test_isolated(tmp_path, checkout):
    """No torch beside the build: the wheel is pure, and the library is in the cache."""
    fresh = Environment(tmp_path / "venv", "setuptools")
    fresh.install(checkout)
    assert not fresh.libraries()
    fresh.lend("all")
    fresh.works(cached(tmp_path / "cache"))


@pytest.mark.parametrize("how", ["ahead", "no home"])
def test_built_ahead(tmp_path, checkout, how):
    fresh = Environment(tmp_path / "venv", "all")
    gone = {"HOME": None, "XDG_CACHE_HOME": None} if how == "no home" else {}
    fresh.install(checkout, environment={**stand_in(tmp_path / "tools"), **gone})
    (built,) = fresh.libraries()
    said = fresh.works({"CXX": "no-compiler", **gone})
    assert f"{built}, " in said

    # As auditwheel does: the library has changed, and the wheel's RECORD says so.
    with open(built, "ab") as file:
        file.write(b"changed")
    damaged = fresh.run(fresh.python, "-m", "fastmix.env", "--quick", environment={
        "CXX": "no-compiler", "FASTMIX_CACHE": str(tmp_path / "nothing")})
    assert f"{built} is damaged" in damaged
    (record,) = fresh.site.glob("fastmix-*.dist-info/RECORD")
    name = str(built.relative_to(fresh.site))
    digest = fresh.run(fresh.python, "-c", "import base64, hashlib, sys\n"
                       "digest = hashlib.sha256(open(sys.argv[1], 'rb').read()).digest()\n"
                       "print(base64.urlsafe_b64encode(digest).decode().strip('='))", built).strip()
    lines = [line for line in record.read_text().splitlines() if not line.startswith(f"{name},")]
    record.write_text("\n".join([*lines, f"{name},sha256={digest},{built.stat().st_size}"]))
    assert f"{built}, " in fresh.works({"CXX": "no-compiler"})


def test_editable(tmp_path, checkout):
    fresh = Environment(tmp_path / "venv", "all")
    fresh.install("-e", checkout)
    fresh.works(cached(tmp_path / "cache"))
    found = fresh.run(fresh.python, "-c", "import fastmix; print(fastmix.__file__)")
    assert found.strip() == str(checkout / "fastmix" / "__init__.py")


def test_from_an_sdist(tmp_path, checkout):
    fresh = Environment(tmp_path / "venv", "setuptools")
    fresh.run(fresh.python, "-c", "import os; from setuptools import build_meta; "
              f"os.chdir({str(checkout)!r}); build_meta.build_sdist({str(tmp_path)!r})")
    (sdist,) = tmp_path.glob("fastmix-*.tar.gz")
    fresh.install(sdist)
    fresh.lend("all")
    fresh.works(cached(tmp_path / "cache"))


def test_from_and_into_paths_of_odd_letters(tmp_path, quick_compiler):
    """The installation's own sources are compiled here, and the cache has such a name too."""
    folder = tmp_path / "Übung 1 – 試験"
    folder.mkdir()
    fresh = Environment(folder / "venv", "setuptools")
    fresh.install(copied(folder / "my checkout"))
    fresh.lend("all")
    said = fresh.works({"CXX": quick_compiler, "FASTMIX_CACHE": str(folder / "cache"),
                        "FASTMIX_INSTRUCTION_SETS": build.CHOICES[0]})
    assert f"{folder}/cache/cpu-{build.CHOICES[0]}-" in said


READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'


@pytest.mark.parametrize("packages", ["setuptools", "all"])
def test_from_a_checkout_that_cannot_be_written_to(tmp_path, checkout, packages):
    subprocess.run(["chmod", "-R", "a-w", checkout], check=True)
    under = []
    if os.getuid() == 0:  # who can write there all the same
        under = ["unshare", "-m", "sh", "-c", READ_ONLY, checkout]
        if shutil.which("unshare") is None or subprocess.run([*under, "true"]).returncode:
            pytest.skip("this root cannot mount a folder as one to be read only")
    fresh = Environment(tmp_path / "venv", packages)
    fresh.install(checkout, under=under, environment=stand_in(tmp_path / "tools"))
    assert len(fresh.libraries()) == (packages == "all")
    subprocess.run(["chmod", "-R", "u+w", checkout], check=True)  # for pytest to clean up
    fresh.lend("all")
    fresh.works(cached(tmp_path / "cache"))
