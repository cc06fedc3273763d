"""Compiles csrc/ into one shared library: setup.py does ahead of time, _native.py on first use.

Standard library only, so that setup.py can run this file without torch or fastmix.
"""

import concurrent.futures
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno",
         "-fno-trapping-math"]
# LibTorch's stable ABI as of 2.10: the library runs on every later torch.
REGISTRATION = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
KERNELS = ["-fno-exceptions"]
# One build of the kernels for each; the best one that the machine has is chosen at run time.
INSTRUCTION_SETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c",
                   "-mprefer-vector-width=512"]}


def compiler():
    """The C++ compiler's command, or None."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("c++") or shutil.which("g++")


def sources():
    """csrc/: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "_csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


@functools.cache
def fingerprint():
    """A hash of all that the library is made from, torch's headers aside: they are stable."""
    seen = hashlib.sha256(repr((FLAGS, REGISTRATION, KERNELS, INSTRUCTION_SETS)).encode())
    for file in sorted(sources().glob("cpu/*")):
        seen.update(file.name.encode() + b"\0" + file.read_bytes())
    return seen.hexdigest()[:16]


def compiled_name():
    """A library's file name in a cache: of these sources and, if there is one, this compiler."""
    found = compiler()
    if found is None:
        return f"native-{fingerprint()}-*.so"
    seen = os.stat(os.path.realpath(found))
    identity = repr((os.path.realpath(found), seen.st_size, seen.st_mtime_ns))
    return f"native-{fingerprint()}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}.so"


def build(target, torch_folder, progress=lambda done, of: None, more_flags=()):
    """Compiles everything and puts the library at `target`, whole or not at all.

    Raises RuntimeError with what the compiler said.
    """
    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler was found (c++, g++ or $CXX)")
    include = ["-isystem", str(Path(torch_folder) / "include")]
    with tempfile.TemporaryDirectory(dir=Path(target).parent, prefix=".building-") as folder:
        jobs = []
        for file in sorted(sources().glob("cpu/*.cpp")):
            parts = {"registration": [*REGISTRATION, *include]}
            if "FASTMIX_CPU" in file.read_text():
                parts |= {name: [*KERNELS, *flags, f"-DFASTMIX_CPU={name}"]
                          for name, flags in INSTRUCTION_SETS.items()}
            for part, flags in parts.items():
                made = Path(folder) / f"{file.stem}.{part}.o"
                jobs.append((made, [command, *FLAGS, *flags, *more_flags, "-c", str(file)]))
        library = Path(folder) / "library"
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            running = [pool.submit(_run, [*line, "-o", str(o)]) for o, line in jobs]
            for done, job in enumerate(concurrent.futures.as_completed(running), 1):
                job.result()
                progress(done, len(jobs))
        _run([command, *more_flags, "-shared", "-o", str(library), *(str(o) for o, _ in jobs),
              "-L", str(Path(torch_folder) / "lib"), "-Wl,--no-as-needed", "-ltorch",
              "-ltorch_cpu"])
        os.replace(library, target)


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr.strip()}")


def show_progress(done, of):
    """On a terminal one line that counts; elsewhere its first and last state."""
    if sys.stderr.isatty():
        print(f"\rfastmix: compiling its CPU kernels, {done} of {of}",
              end="\n" if done == of else "", file=sys.stderr, flush=True)
    elif done in (1, of):
        print(f"fastmix: compiling its CPU kernels, {done} of {of}", file=sys.stderr, flush=True)
