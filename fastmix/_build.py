"""Compiles csrc/ into one shared library: setup.py does ahead of time, _native.py on first use.

Standard library only, so that setup.py can run this file without torch or fastmix.
"""

import concurrent.futures
import functools
import hashlib
import os
import platform
import re
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
# The CUDA half: these machines' own code, and PTX for those to come.
CUDA_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr",
              "-Xcompiler=-fPIC,-fvisibility=hidden", "-diag-suppress=177"]
CUDA_TARGETS = ("80", "86", "89", "90", "100")
CUDA_PARTS = {  # of a file, compiled side by side
    "fft_conv": ("backward", "forward", "columns_in", "columns_out", "row_backward", "row_forward",
                 "row_spectra", "row_lags", "spectra", "lags", "skips", "device"),
    "toeplitz_conv": ("whole",)}
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


def cuda_compiler():
    """nvcc's command, or None."""
    named = os.environ.get("CUDACXX")
    beside = shutil.which("nvcc", path="/usr/local/cuda/bin")
    return shutil.which(named) if named else shutil.which("nvcc") or beside


def cuda_code(targets=None, ptx=True):
    """nvcc's flags for machine code of compute capabilities (by default of all in CUDA_TARGETS
    that it knows), and PTX for those to come.

    Making PTX is most of nvcc's work, so one serves all.
    """
    oldest = CUDA_TARGETS[0]
    if targets is None:
        known = subprocess.run([cuda_compiler(), "--list-gpu-arch"], capture_output=True, text=True)
        targets = [t for t in CUDA_TARGETS if f"compute_{t}" in known.stdout.split()]
    code = [f"sm_{t}" for t in targets] + [f"compute_{oldest}"] * ptx
    return [f"-gencode=arch=compute_{oldest},code=[{','.join(code)}]"] if targets else []


def torch_has_cuda(torch_folder):
    return any((Path(torch_folder) / "lib").glob("*torch_cuda.*"))


def sources():
    """csrc/: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "_csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


@functools.cache
def fingerprint():
    """A hash of all that the library is made from, torch's headers aside: they are stable."""
    seen = hashlib.sha256(repr((FLAGS, REGISTRATION, KERNELS, INSTRUCTION_SETS, CUDA_FLAGS,
                                CUDA_TARGETS, CUDA_PARTS)).encode())
    for file in sorted(sources().glob("c*/*")):
        seen.update(file.name.encode() + b"\0" + file.read_bytes())
    return seen.hexdigest()[:16]


def compiled_name(part="cpu", cuda=()):
    """A library's file name in a cache: of these sources, of `cuda` (see build) and of the
    compilers; without those, a pattern for what they may have made."""
    tools = [compiler(), cuda_compiler()] if cuda else [compiler()]
    name = "-".join([part, fingerprint(), *re.findall(r"sm_(\d+)", " ".join(cuda))])
    if None in tools:
        return f"{name}-*.so"
    identity = []
    for tool in map(os.path.realpath, tools):
        seen = os.stat(tool)
        identity.append((tool, seen.st_size, seen.st_mtime_ns))
    return f"{name}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:8]}.so"


def build(target, torch_folder, progress=lambda done, of: None, more_flags=(), cpu=True, cuda=()):
    """Compiles the kernels for CPUs, for GPUs if there are flags for them in `cuda` (of
    cuda_code), or both, and puts the library at `target`, whole or not at all.

    Raises RuntimeError with what the compiler said.
    """
    command, nvcc = compiler(), cuda_compiler()
    if command is None:
        raise RuntimeError("no C++ compiler was found (c++, g++ or $CXX)")
    if cuda and nvcc is None:
        raise RuntimeError("no nvcc was found (PATH, /usr/local/cuda or $CUDACXX)")
    registration = [*REGISTRATION, "-isystem", str(Path(torch_folder) / "include")]
    jobs = {}  # object file: command
    for file in sorted(sources().glob("cuda/*")) if cuda else []:
        if file.suffix == ".cpp":
            jobs[f"{file.stem}.cuda.o"] = [command, *FLAGS, *registration, "-c", str(file)]
        for part in CUDA_PARTS[file.stem] if file.suffix == ".cu" else ():
            which = [] if part in ("device", "whole") else [f"-DFASTMIX_KERNEL={part}"]
            jobs[f"{file.stem}.{part}.o"] = [nvcc, *CUDA_FLAGS, "-ccbin", command, *cuda, *which,
                                             "-c", str(file)]
    for file in sorted(sources().glob("cpu/*.cpp")) if cpu else []:
        parts = {"registration": registration}
        if "FASTMIX_CPU" in file.read_text():
            parts |= {name: [*KERNELS, *flags, f"-DFASTMIX_CPU={name}"]
                      for name, flags in INSTRUCTION_SETS.items()}
        for part, flags in parts.items():
            jobs[f"{file.stem}.{part}.o"] = [command, *FLAGS, *flags, *more_flags, "-c", str(file)]
    link = ([nvcc, "-ccbin", command, "-cudart=static", "-Xlinker=--no-as-needed"] if cuda
            else [command, *more_flags, "-Wl,--no-as-needed"])
    with tempfile.TemporaryDirectory(dir=Path(target).parent, prefix=".building-") as folder:
        library = Path(folder) / "library"
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            running = [pool.submit(_run, [*line, "-o", str(Path(folder) / made)])
                       for made, line in jobs.items()]
            for done, job in enumerate(concurrent.futures.as_completed(running), 1):
                job.result()
                progress(done, len(jobs))
        _run([*link, "-shared", "-o", str(library), *(str(Path(folder) / made) for made in jobs),
              "-L", str(Path(torch_folder) / "lib"), "-ltorch", "-ltorch_cpu"])
        library.chmod(0o755)  # whatever the umask: others must not be able to write to it
        os.replace(library, target)


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr.strip()}")


def show_progress(done, of):
    """On a terminal one line that counts; elsewhere its first and last state."""
    if sys.stderr.isatty():
        print(f"\rfastmix: compiling its kernels, {done} of {of}",
              end="\n" if done == of else "", file=sys.stderr, flush=True)
    elif done in (1, of):
        print(f"fastmix: compiling its kernels, {done} of {of}", file=sys.stderr, flush=True)
