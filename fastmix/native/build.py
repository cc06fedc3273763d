"""Compiles csrc/ into one shared library: setup.py does ahead of time, library.py on first use.

Standard library only, so that setup.py can run this file without torch or fastmix.
"""

import base64
import functools
import hashlib
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

# As g++ and clang++ take them; clang++ refuses -fPIC for Windows, where all code is like that.
FLAGS = ["-std=c++17", "-O3", *([] if sys.platform == "win32" else ["-fPIC"]),
         "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
# Only linkers for ELF files leave libraries out that nothing seems to need.
LINK = [] if sys.platform in ("darwin", "win32") else ["-Wl,--no-as-needed"]
# LibTorch's stable ABI as of 2.10: the library runs on every later torch.
REGISTRATION = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
KERNELS = ["-fno-exceptions"]
# The CUDA half: these machines' own code, and PTX for those to come.
CUDA_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr",
              "-Xcompiler=-fPIC,-fvisibility=hidden", "-diag-suppress=177"]
CUDA_TARGETS = ("80", "86", "89", "90", "100")
# One build of the kernels for each. A library has all of them, and the best one that the machine
# has is chosen at run time; or, compiled on first use, that one alone.
INSTRUCTION_SETS: dict[str, list[str]] = {"portable": []}
if platform.machine() in ("aarch64", "arm64", "ARM64"):  # Linux, macOS, Windows: all have NEON
    # Scheduling before registers are given out makes g++ spill more than it hides. clang does not
    # know that flag; g++ passes over the other one.
    INSTRUCTION_SETS = {"neon": ["-fno-schedule-insns", "-Wno-ignored-optimization-argument"]}
elif platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c",
                   "-mprefer-vector-width=512"]}
# Names avx512's kernels where they use the processor's matrix unit, which is found at run time.
MATRIX_UNIT = "amx"
CHOICES = (*INSTRUCTION_SETS, *([MATRIX_UNIT] if "avx512" in INSTRUCTION_SETS else []))
# What compiles the kernels, and what to install where it is missing.
COMPILERS = ("clang++",) if sys.platform == "win32" else ("c++", "g++", "clang++")
INSTALL = {"darwin": "xcode-select --install brings Apple's",
           "win32": "LLVM's clang++ on PATH, beside Visual Studio's build tools, whose headers and "
                    "libraries it uses"}.get(sys.platform, "c++, g++ or clang++ on PATH")
SILENCE = 10  # seconds after which show_progress says again, off a terminal, how far it is


def compiler() -> list[str] | None:
    """The C++ compiler's command, with arguments if $CXX has some, or None."""
    return _command("CXX", *COMPILERS)


def cuda_compiler() -> list[str] | None:
    """nvcc's command, with arguments if $CUDACXX has some, or None."""
    return _command("CUDACXX", "nvcc", "/usr/local/cuda/bin/nvcc")


def _command(variable: str, *usual: str) -> list[str] | None:
    named = os.environ.get(variable)
    if named and shutil.which(named) is None:  # no file of that name, whatever blanks are in it
        try:
            first, *arguments = shlex.split(named)
        except ValueError:  # an open quotation mark, or nothing but blanks
            return None
    else:
        first, arguments = named or next(filter(shutil.which, usual), usual[0]), []
    path = shutil.which(first)
    return None if path is None else [path, *arguments]


def why_not_compiled(cuda: bool = False) -> str | None:
    """Why nothing can be compiled here, in words, or None."""
    if cuda and cuda_compiler() is None:
        return _not_found("nvcc", "CUDACXX", "nvcc on PATH or in /usr/local/cuda")
    command = compiler()
    if command is None:
        return _not_found("C++ compiler", "CXX", INSTALL)
    # A launcher, as ccache is, may come first.
    refused = [word for word in command if Path(word).stem.lower() in ("cl", "clang-cl")]
    if refused:
        return (f"{refused[0]} takes other options than clang++, and Microsoft's has no vector "
                "types, which the kernels are made of: set CXX to LLVM's clang++, which uses the "
                "headers and libraries of Visual Studio")
    return None


def _not_found(tool: str, variable: str, usual: str) -> str:
    named = os.environ.get(variable)
    return f"no {tool} was found: " + (f"{variable} is {named!r}, which is not a command" if named
                                       else f"install one ({usual}) or set {variable}")


def cxxflags() -> list[str]:
    """$CXXFLAGS, which come last so that they can overrule the flags of this file."""
    try:
        return shlex.split(os.environ.get("CXXFLAGS", ""))
    except ValueError as error:
        raise RuntimeError(f"CXXFLAGS cannot be split into arguments: {error}; quote "
                           "it as a shell would want it") from error


def parallel_jobs() -> int:
    """The number of compilers that run at once: $MAX_JOBS, or the cores this process may use."""
    named = os.environ.get("MAX_JOBS")
    if named:
        if not named.strip().isdecimal() or int(named) < 1:
            raise RuntimeError(f"MAX_JOBS must be a whole number of at least 1, got {named!r}")
        return int(named)
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
             else os.cpu_count() or 1)
    quotas = _quotas(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, min([cores, *map(math.ceil, quotas)]))


def _quotas(membership: Path, root: Path) -> list[float]:
    """The cores that control groups, versions 1 and 2, grant this process and its parents."""
    quotas = []
    lines = membership.read_text(encoding="utf-8").splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        folder = top / own.lstrip("/")
        for group in (folder, *folder.parents):
            try:
                if controllers:
                    quota = (group / "cpu.cfs_quota_us").read_text(encoding="utf-8")
                    period = (group / "cpu.cfs_period_us").read_text(encoding="utf-8")
                else:
                    quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
                if float(quota) > 0:
                    quotas.append(float(quota) / float(period))
            except (OSError, ValueError):  # no limit here: no such file, "max" or -1
                pass
            if group == top:
                break
    return quotas


def output_of(command: list[str]) -> str:
    """The output of a command; nothing if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return "" if done.returncode else done.stdout


def cuda_code(targets: Iterable[str] | None = None, ptx: bool = True) -> list[str]:
    """nvcc's flags for machine code of compute capabilities (by default of all in CUDA_TARGETS
    that it knows), and PTX for those to come.

    Making PTX is most of nvcc's work, so one serves all.
    """
    oldest = CUDA_TARGETS[0]
    if targets is None:
        nvcc = cuda_compiler()
        known = output_of([*nvcc, "--list-gpu-arch"]).split() if nvcc else []
        targets = [t for t in CUDA_TARGETS if f"compute_{t}" in known]
    code = [f"sm_{t}" for t in targets] + [f"compute_{oldest}"] * ptx
    return [f"-gencode=arch=compute_{oldest},code=[{','.join(code)}]"] if targets else []


def torch_has_cuda(torch_folder: Path) -> bool:
    """Whether the torch in that folder was built for CUDA."""
    return any((Path(torch_folder) / "lib").glob("*torch_cuda.*"))


def name_built_ahead(cuda: bool) -> str:
    """The file name, beside this file, of a library that setup.py makes, with CUDA kernels or
    without."""
    return f"built-{'cpu-cuda' if cuda else 'cpu'}-{fingerprint()}.so"


def own_instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """The sets to compile on first use: the best of INSTRUCTION_SETS that this processor has, or
    the one that runs what is named (see below); with FASTMIX_INSTRUCTION_SETS=all (for tests) all
    that it has; all there are where the system does not list what the processor has."""
    named = named_instruction_set()
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    listed = re.search(r"^flags\s*:(.*)", text, re.M)
    has = set(listed[1].split()) if listed else None
    # "-mavx2" is the flag of "avx2"; what has a value is a preference.
    able = [name for name, flags in INSTRUCTION_SETS.items() if has is None or
            {flag[2:] for flag in flags if flag.startswith("-m") and "=" not in flag} <= has]
    if os.environ.get("FASTMIX_INSTRUCTION_SETS") == "all" or has is None and not named:
        return tuple(able)
    if "avx512" in able and (has is None or {"amx_tile", "amx_bf16"} <= has):
        able.append(MATRIX_UNIT)
    if named and named not in able:
        raise RuntimeError(f"FASTMIX_INSTRUCTION_SETS must be one that this processor has: "
                           f"{', '.join(able)}, got {named!r}: name one of these, or unset it")
    runs = named or able[-1]
    return ("avx512" if runs == MATRIX_UNIT else runs,)


def named_instruction_set() -> str | None:
    """What $FASTMIX_INSTRUCTION_SETS names, one of CHOICES, so that nothing else runs."""
    named = os.environ.get("FASTMIX_INSTRUCTION_SETS") or "all"
    if named not in ("all", *CHOICES):
        raise RuntimeError("FASTMIX_INSTRUCTION_SETS must be 'all', one of "
                           f"{', '.join(CHOICES)}, or not set, got {named!r}")
    return None if named == "all" else named


def sources() -> Path:
    """csrc/: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "_csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


@functools.cache
def fingerprint() -> str:
    """A hash of all that the library is made from, torch's headers aside: they are stable."""
    everything = hashlib.sha256(repr((platform.machine(), FLAGS, REGISTRATION, KERNELS,
                                      INSTRUCTION_SETS, CUDA_FLAGS,
                                      CUDA_TARGETS)).encode())
    for file in sorted(sources().glob("c*/*")):
        everything.update(file.name.encode() + b"\0" + file.read_bytes())
    return everything.hexdigest()[:16]


def compiled_name(device_type: str = "cpu", cuda: Sequence[str] = (),
                  sets: Sequence[str] = tuple(INSTRUCTION_SETS)) -> str:
    """A library's file name in a cache: of these sources, of `cuda` and `sets` (see build), and
    of the compilers and flags in the environment; without compilers, a pattern for any of them."""
    kind = re.findall(r"sm_(\d+)", " ".join(cuda)) if device_type == "cuda" else sets
    name = "-".join([device_type, *kind, fingerprint()])
    commands = [compiler(), cuda_compiler()] if cuda else [compiler()]
    variables = ["CXXFLAGS", *(["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"] if cuda else [])]
    identity: list[object] = [os.environ.get(variable, "") for variable in variables]
    for command in commands:
        if command is None:
            return f"{name}-*.so"
        for word in [*command, "as"]:  # the assembler says what is compiled: see _matrix_unit
            file = shutil.which(word)
            if file is None:
                identity.append(word)
            else:
                path = os.path.realpath(file)
                status = os.stat(path)
                identity += [path, status.st_size, status.st_mtime_ns]
    return f"{name}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:8]}.so"


def build(target: Path, torch_folder: Path,
          progress: Callable[[int, int], None] = lambda done, of: None,
          more_flags: Sequence[str] = (), cpu: bool = True, cuda: Sequence[str] = (),
          sets: Sequence[str] = tuple(INSTRUCTION_SETS)) -> dict[str, float]:
    """Compiles the kernels for CPUs (`sets`: one of INSTRUCTION_SETS, or those up to one), for GPUs
    if there are flags for them in `cuda` (of cuda_code), or both, and puts the library at `target`,
    whole or not at all, with its checksum beside it.

    Returns {object file: the seconds its compiler ran}. Raises RuntimeError with what the compiler
    said.
    """
    reason = why_not_compiled(bool(cuda))
    if reason is not None:
        raise RuntimeError(reason)
    jobs, link = _commands(torch_folder, [*more_flags, *cxxflags()], cpu, cuda, sets)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as name:
        folder = Path(name)
        seconds = _run_all([[*command, "-o", str(folder / made)]
                            for made, command in jobs.items()], folder, progress)
        library = folder / target.name
        _run_all([[*link, "-shared", "-o", str(library), *(str(folder / made) for made in jobs),
                   "-L", str(torch_folder / "lib"), "-ltorch", "-ltorch_cpu"]], folder)
        library.chmod(0o755)  # whatever the umask: others must not be able to write to it
        checksum = checksum_file(library)
        checksum.write_text(_checksum(library), encoding="utf-8")
        for file in (library, checksum):
            with open(file, "rb+") as opened:  # on disk before it has its name
                os.fsync(opened.fileno())
        os.replace(checksum, checksum_file(target))
        os.replace(library, target)
    return dict(zip(jobs, seconds))


def _commands(torch_folder: Path, flags: Sequence[str], cpu: bool, cuda: Sequence[str],
              sets: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """{object file: the command that compiles it}, and the command that links them."""
    command, nvcc = compiler() or [], cuda_compiler() or []
    nvcc = [*nvcc, *_host_compiler(command)]
    registration = [*REGISTRATION, "-isystem", str(torch_folder / "include")]
    jobs = {}
    for file in sorted(sources().glob("cuda/*")) if cuda else []:
        if file.suffix == ".cpp":
            jobs[f"{file.stem}.cuda.o"] = [*command, *FLAGS, *registration, *flags, "-c",
                                           str(file)]
        for part in _cuda_parts(file) if file.suffix == ".cu" else ():
            which = [] if part == "rest" else [f"-DFASTMIX_KERNEL={part}"]
            jobs[f"{file.stem}.{part}.o"] = [*nvcc, *CUDA_FLAGS, *cuda, *which, "-c", str(file)]
    only = [] if len(sets) == len(INSTRUCTION_SETS) else ["-DFASTMIX_NO_AVX512"] if sets[1:] else [
        f"-DFASTMIX_ONLY={sets[0]}", f"-DFASTMIX_ONLY_INDEX={[*INSTRUCTION_SETS].index(sets[0])}"]
    if cpu:
        folder = sources() / "cpu"
        flags = [*_matrix_unit([*command, *flags], sets), *flags]
        jobs["registration.o"] = [*command, *FLAGS, *registration, *only, *flags, "-c",
                                  str(folder / "registration.cpp")]
        # The longest first, so that none is left for the end; a file without FASTMIX_CPU has
        # no kernels.
        for file in sorted(folder.glob("*.cpp"), key=lambda file: -file.stat().st_size):
            for name in sets if "#ifdef FASTMIX_CPU" in file.read_text(encoding="utf-8") else ():
                jobs[f"{file.stem}.{name}.o"] = [
                    *command, *FLAGS, *KERNELS, *INSTRUCTION_SETS[name], f"-DFASTMIX_CPU={name}",
                    *flags, "-c", str(file)]
    return jobs, ([*nvcc, "-cudart=static", "-Xlinker=--no-as-needed"] if cuda
                  else [*command, *flags, *LINK])


def _matrix_unit(command: list[str], sets: Sequence[str]) -> list[str]:
    """A flag that leaves the matrix unit out, where the assembler does not know it though the
    compiler does: g++ 11 may stand beside binutils that are older."""
    if "avx512" not in sets:
        return []
    tried = subprocess.run([*command, "-x", "c++", "-c", "-o", os.devnull, "-"],
                           capture_output=True, input=b'void f() { asm volatile("tilerelease"); }')
    return ["-DFASTMIX_NO_MATRIX_UNIT"] if tried.returncode else []


def _cuda_parts(file: Path) -> list[str]:
    """The parts of a CUDA source that are compiled side by side: each kernel that the header of the
    same name lists, and the rest."""
    header = file.with_suffix(".h").read_text(encoding="utf-8")
    kernels = re.search(r"enum class Kernel \{(.*?)\}", header, re.S)
    names = re.findall(r"^ *(\w+),", kernels[1], re.M) if kernels else []
    return [*names, "rest"]


def _host_compiler(command: list[str]) -> list[str]:
    """nvcc's flags for the compiler of $CXX. It takes one program, and calls no ccache."""
    launched = len(command) > 1 and not command[1].startswith("-")
    program, *arguments = command[launched:]
    return ["-ccbin", program, *(f"-Xcompiler={argument}" for argument in arguments)]


def _run_all(commands: list[list[str]], folder: Path,
             progress: Callable[[int, int], None] = lambda done, of: None) -> list[float]:
    """Runs commands side by side, whose output goes to a file in `folder`, and returns the seconds
    of each. None is left running when one fails, or when Ctrl-C comes."""
    waiting, most = list(reversed(commands)), parallel_jobs()
    running: dict[subprocess.Popen[bytes], tuple[int, float, Path]] = {}
    seconds = [0.0] * len(commands)
    progress(0, len(commands))
    said = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < most:
                index = len(commands) - len(waiting)
                log = folder / f"{index}.log"
                with open(log, "wb") as output:
                    process = subprocess.Popen(waiting.pop(), stdin=subprocess.DEVNULL,
                                               stdout=output, stderr=output)
                running[process] = index, time.monotonic(), log
            time.sleep(0.02)
            ended = [p for p in running if p.poll() is not None]
            for process in ended:
                index, start, log = running.pop(process)
                seconds[index] = time.monotonic() - start
                if process.returncode:
                    raise RuntimeError(f"{shlex.join(commands[index])}\nended with status "
                                       f"{process.returncode}: "
                                       f"{log.read_text(errors='replace').strip()}")
            if ended or time.monotonic() - said > SILENCE / 10:
                progress(len(commands) - len(waiting) - len(running), len(commands))
                said = time.monotonic()
        return seconds
    finally:
        for process in running:
            process.kill()
            process.wait()


def checksum_file(library: Path) -> Path:
    """Where the checksum of a library lies."""
    return library.with_name(library.name + ".sha256")


def _checksum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _as_installed(library: Path) -> bool:
    """Whether a library is what its wheel's RECORD says. auditwheel may change a library after it
    was built, and writes the RECORD anew, but not our checksum."""
    site = Path(__file__).parents[2]
    if not library.is_relative_to(site):
        return False
    digest = base64.urlsafe_b64encode(hashlib.sha256(library.read_bytes()).digest()).rstrip(b"=")
    line = f"{library.relative_to(site).as_posix()},sha256={digest.decode()},"
    return any(line in record.read_text(encoding="utf-8")
               for record in site.glob("fastmix-*.dist-info/RECORD"))


def why_not_whole(library: Path) -> str | None:
    """Why a library cannot be what the compiler wrote, or None. Loading a damaged one would end
    the process."""
    try:
        whole = (checksum_file(library).read_text(encoding="utf-8") == _checksum(library)
                 or _as_installed(library))
    except FileNotFoundError:
        return f"{library} has no checksum beside it"
    except (OSError, ValueError) as error:
        return f"{library} cannot be checked: {error}"
    return None if whole else f"{library} is damaged: it does not match its checksum"


_last_line = -math.inf  # when show_progress wrote it


def show_progress(done: int, of: int) -> None:
    """On a terminal one line that counts; elsewhere a line every ten seconds, and the last one."""
    global _last_line
    if sys.stderr.isatty():
        print(f"\rfastmix: compiling its kernels, {done} of {of}",
              end="\n" if done == of else "", file=sys.stderr, flush=True)
    elif done == of or time.monotonic() - _last_line >= SILENCE:
        print(f"fastmix: compiling its kernels, {done} of {of}", file=sys.stderr, flush=True)
        _last_line = -math.inf if done == of else time.monotonic()


def main(sets: list[str]) -> None:
    """Compiles the kernels for `sets`, or for this machine's own, and says what took how long."""
    import importlib.util

    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        sys.exit("torch must be installed: its headers are compiled against")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        seconds = build(Path(folder) / "timed.so", Path(torch.origin).parent, show_progress,
                        sets=sets or own_instruction_sets())
    for made, taken in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{taken:7.1f} s  {made}")
    print(f"{sum(seconds.values()):7.1f} s  in all, {time.monotonic() - start:.1f} s by the clock "
          f"with {parallel_jobs()} at once, and linked")


if __name__ == "__main__":  # python fastmix/native/build.py [portable | avx2 | avx512]
    main(sys.argv[1:])
