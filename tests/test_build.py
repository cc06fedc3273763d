"""Compiling and loading the C++ kernels: compilers, flags, the cache, and what goes wrong there.

Most tests use a stand-in for the compiler, which copies the library that the other tests run.
"""

import ctypes
import math
import os
import platform
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastmix.native import build, library

ROOT = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent
ONE = build.CHOICES[:1]  # instruction set: calls of a stand-in for each file and set take time

pytestmark = pytest.mark.skipif(build.compiler() is None or os.name != "posix",
                                reason="no C++ compiler, or no shell to imitate one")


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def compiled():
    """A library of these sources."""
    return library.load()


@pytest.fixture
def stand_in(tmp_path, compiled, monkeypatch):
    """Compiles nothing: notes its arguments in `calls`, and copies a library where one is linked.
    The cache is empty, and this process has loaded nothing."""
    folder = tmp_path / "tools"
    folder.mkdir()
    path = script(folder / "c++", f"""case "$*" in *" -") exit ;; esac  # what the assembler knows
echo "$@" >> {folder}/calls
echo "+1 $(date +%s%N)" >> {folder}/times
sleep ${{SLEEP:-0}}
while [ $# -gt 0 ]; do
    case "$1" in -o) made="$2" ;; -shared) linked=1 ;; esac
    shift
done
if [ "$linked" ]; then cp {compiled} "$made"; else echo > "$made"; fi
echo "-1 $(date +%s%N)" >> {folder}/times""")
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("FASTMIX_INSTRUCTION_SETS", ONE[0])
    monkeypatch.setenv("FASTMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "_failures", {})
    return path


def python(code, environment=None):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})})


CALL = """
import sys, warnings, torch, fastmix
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = fastmix.ops.cumulative_mean(torch.tensor([[1.0, 3.0]]))
assert out.tolist() == [[1.0, 2.0]]
print(len(caught), *(w.message for w in caught))
"""


# ---- compilers and flags


def test_a_compiler_may_come_with_arguments(stand_in, tmp_path, monkeypatch):
    spaced = script(tmp_path / "my compiler", 'exec "$@"')
    launcher = script(stand_in.parent / "ccache", 'exec "$@"')
    monkeypatch.setenv("PATH", str(stand_in.parent), prepend=os.pathsep)
    for named, expected in ((f"{stand_in} -m64", [str(stand_in), "-m64"]),
                            ("ccache c++", [str(launcher), "c++"]),
                            (str(spaced), [str(spaced)]),
                            (f"'{spaced}' c++ -m64", [str(spaced), "c++", "-m64"]),
                            ("", [str(stand_in)]), ("  ", None), ("no-such", None),
                            ("c++ '", None)):
        monkeypatch.setenv("CXX", named)
        monkeypatch.setenv("CUDACXX", named or "c++")
        assert build.compiler() == expected, named
        assert build.cuda_compiler() == expected, named
        reason = build.why_not_compiled()
        if expected is None:
            assert reason == f"no C++ compiler was found: CXX is {named!r}, which is not a command"
            assert f"CUDACXX is {named!r}" in build.why_not_compiled(cuda=True)
        else:
            assert reason is None
    monkeypatch.setenv("CXX", "ccache c++ -m64")
    build.build(tmp_path / "made.so", TORCH, sets=ONE)
    assert build.why_not_whole(tmp_path / "made.so") is None
    calls = (stand_in.parent / "calls").read_text().splitlines()
    assert all(call.startswith("-m64 ") for call in calls)


def test_nvcc_is_given_the_compiler_that_a_launcher_calls():
    assert build._host_compiler(["/usr/bin/g++"]) == ["-ccbin", "/usr/bin/g++"]
    assert build._host_compiler(["/bin/ccache", "g++", "-m64"]) == [
        "-ccbin", "g++", "-Xcompiler=-m64"]
    assert build._host_compiler(["g++", "-m64"]) == ["-ccbin", "g++", "-Xcompiler=-m64"]


def test_flags_of_the_environment_are_used_and_named(stand_in, tmp_path, monkeypatch):
    plain = build.compiled_name()
    monkeypatch.setenv("CXXFLAGS", '-O2 "-DNAME=a b"')
    assert build.compiled_name() != plain
    build.build(tmp_path / "made.so", TORCH, sets=ONE)
    calls = (stand_in.parent / "calls").read_text().splitlines()
    assert all("-O2 -DNAME=a b" in call for call in calls)
    monkeypatch.setenv("CXX", f"{stand_in} -m64")
    with_argument = build.compiled_name()
    monkeypatch.setenv("CXXFLAGS", "")
    assert len({plain, with_argument, build.compiled_name()}) == 3
    monkeypatch.setenv("CUDACXX", str(stand_in))
    names = []
    for flags in ("", "-lineinfo"):
        monkeypatch.setenv("NVCC_PREPEND_FLAGS", flags)
        names.append(build.compiled_name("cuda", ["-gencode=arch=compute_80,code=[sm_80]"]))
    assert names[0] != names[1]
    monkeypatch.setenv("CXXFLAGS", "'")
    with pytest.raises(RuntimeError, match="CXXFLAGS cannot be split"):
        build.build(tmp_path / "made.so", TORCH, sets=ONE)


@pytest.mark.parametrize("status", [0, 1])
def test_a_compiler_may_speak_another_encoding(stand_in, tmp_path, monkeypatch, status):
    command = script(tmp_path / "c++", f"printf 'ung\\374ltig\\n' >&2\n{stand_in} \"$@\"\n"
                                       f"exit {status}")
    monkeypatch.setenv("CXX", str(command))
    if status:
        with pytest.raises(RuntimeError, match="ended with status 1: ung\ufffdltig"):
            build.build(tmp_path / "made.so", TORCH, sets=ONE)
        assert not (tmp_path / "made.so").exists()
    else:
        build.build(tmp_path / "made.so", TORCH, sets=ONE)
    assert build.output_of([str(command), "-o", str(tmp_path / "o")]) == ""  # prints to stderr


@pytest.mark.long
def test_sources_are_read_whatever_the_locale(stand_in):
    """In ASCII, as in any encoding but UTF-8, their formulas cannot be read."""
    said = python(CALL, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert said.returncode == 0 and said.stdout.split()[0] == "0", said.stdout + said.stderr
    assert (stand_in.parent / "calls").exists()


def test_no_text_is_read_or_written_in_the_encoding_of_the_locale():
    for path in (ROOT / "fastmix").rglob("*.py"):
        for call in re.findall(r"(?:read|write)_text\(.*", path.read_text(encoding="utf-8")):
            assert "encoding=" in call or "errors=" in call, (path, call)


@pytest.mark.parametrize("system, install", [
    ("linux", "c++, g++ or clang++ on PATH"), ("darwin", "xcode-select --install brings Apple's"),
    ("win32", "LLVM's clang++ on PATH, beside Visual Studio's build tools, ")])
def test_every_system_has_its_flags_and_says_what_to_install(system, install, tmp_path,
                                                             monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(sys, "platform", system)
        there = runpy.run_path(build.__file__)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert there["why_not_compiled"]().startswith(
        f"no C++ compiler was found: install one ({install}")
    path = script(tmp_path / "clang++", "exit 0")
    assert there["compiler"]() == [str(path)] and there["why_not_compiled"]() is None
    jobs, link = there["_commands"](TORCH, (), True, (), ONE)
    assert len(jobs) > 5
    assert all(("-fPIC" in job) == (system != "win32") for job in jobs.values())
    assert ("-Wl,--no-as-needed" in link) == (system == "linux")  # others' linkers do not know it


@pytest.mark.parametrize("name", ["cl", "clang-cl", "CL"])
def test_compilers_that_take_other_options_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(script(tmp_path / name, "exit 0")))
    assert build.why_not_compiled().startswith(f"{tmp_path / name} takes other options than")
    launcher = script(tmp_path / "ccache", "exit 0")
    for named in (f"{launcher} {name}", f"{launcher} {tmp_path / name} -m64"):
        monkeypatch.setenv("CXX", named)
        assert f"{name} takes other options than" in build.why_not_compiled()
    with pytest.raises(RuntimeError, match="set CXX to LLVM's clang"):
        build.build(tmp_path / "made.so", TORCH, sets=ONE)


def test_windows_is_not_asked_for_permission_bits(tmp_path, monkeypatch):
    """There os.stat makes them up: everything seems to be open to all."""
    tmp_path.chmod(0o777)
    assert "can be written to by others" in library.why_not_trusted(tmp_path)
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        reason = library.why_not_trusted(tmp_path)
    assert reason is None


def at_once(stand_in):
    """How many compilers ran side by side at most."""
    events = sorted((int(when), int(step)) for step, when in (
        line.split() for line in (stand_in.parent / "times").read_text().splitlines()))
    running, most = 0, 0
    for _, step in events:
        running += step
        most = max(most, running)
    return most


def test_max_jobs_and_the_usable_cores_limit_compilation(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("SLEEP", "0.05")
    monkeypatch.setenv("MAX_JOBS", "1")
    build.build(tmp_path / "made.so", TORCH, sets=ONE)
    assert at_once(stand_in) == 1
    monkeypatch.setenv("MAX_JOBS", "3")
    build.build(tmp_path / "made.so", TORCH, sets=ONE)
    assert at_once(stand_in) == 3
    for wrong in ("0", "-1", "many"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(RuntimeError, match=f"MAX_JOBS must be a whole number.*got '{wrong}'"):
            build.parallel_jobs()
    monkeypatch.delenv("MAX_JOBS")
    monkeypatch.setattr(build, "_quotas", lambda *folders: [])
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert build.parallel_jobs() == 3
    monkeypatch.setattr(build, "_quotas", lambda *folders: [8.0, 1.5])
    assert build.parallel_jobs() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(build, "_quotas", lambda *folders: [])
    assert build.parallel_jobs() == 64


def test_the_seconds_of_each_compiler_are_told(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLEEP", "0.1")
    build.main([*ONE])
    *rows, whole = capsys.readouterr().out.splitlines()
    assert len(rows) == len(set(rows)) > 5
    assert any(row.endswith(" s  registration.o") for row in rows)
    assert all(0.1 <= float(row.split()[0]) < 60 for row in rows)
    assert float(whole.split()[0]) == pytest.approx(
        sum(float(row.split()[0]) for row in rows), abs=0.1 * len(rows))


@pytest.mark.long
def test_a_compilation_says_how_far_it_is_off_a_terminal(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "SILENCE", 0.5)
    monkeypatch.setattr(build, "_last_line", -math.inf)
    monkeypatch.setenv("SLEEP", "1.5")
    monkeypatch.setenv("MAX_JOBS", "100")
    build.build(tmp_path / "made.so", TORCH, build.show_progress, sets=ONE)
    lines = capsys.readouterr().err.splitlines()
    count = int(lines[0].split()[-1])
    assert lines[0] == f"fastmix: compiling its kernels, 0 of {count}" and len(lines) >= 3
    assert lines[-1] == f"fastmix: compiling its kernels, {count} of {count}"
    monkeypatch.setattr(build, "SILENCE", 1e9)
    build.build(tmp_path / "made.so", TORCH, build.show_progress, sets=ONE)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_quotas_of_control_groups_and_their_parents(tmp_path):
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    assert build._quotas(own, root) == []
    for folder, file, text in (("", "cpu.max", "max 100000"), ("a", "cpu.max", "250000 100000"),
                               ("a/b", "cpu.max", "max 100000"),
                               ("cpu,cpuacct/c", "cpu.cfs_quota_us", "50000"),
                               ("cpu,cpuacct/c", "cpu.cfs_period_us", "100000"),
                               ("cpu,cpuacct", "cpu.cfs_quota_us", "-1"),
                               ("cpu,cpuacct", "cpu.cfs_period_us", "100000")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / file).write_text(text + "\n")
    own.write_text("0::/a/b\n")
    assert build._quotas(own, root) == [2.5]
    own.write_text("5:memory:/c\n4:cpu,cpuacct:/c\n0::/gone\n")
    assert build._quotas(own, root) == [0.5]


# ---- instruction sets


@pytest.mark.skipif("avx512" not in build.INSTRUCTION_SETS, reason="not x86-64")
def test_first_use_compiles_what_the_processor_has(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTMIX_INSTRUCTION_SETS")
    cpuinfo = tmp_path / "cpuinfo"
    everything = ("portable", "avx2", "avx512")
    assert build.own_instruction_sets(cpuinfo) == everything  # nothing is known
    monkeypatch.setenv("FASTMIX_INSTRUCTION_SETS", "all")
    assert build.own_instruction_sets(cpuinfo) == everything
    for flags, best in (("fpu sse2", "portable"), ("avx avx2 fma", "portable"),
                        ("avx avx2 fma f16c avx512f", "avx2"),
                        ("avx2 fma f16c avx512f avx512dq avx512bw avx512vl", "avx512"),
                        ("avx2 fma f16c avx512f avx512dq avx512bw avx512vl amx_tile amx_bf16",
                         "avx512")):
        cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\nbugs : \n")
        monkeypatch.delenv("FASTMIX_INSTRUCTION_SETS")
        assert build.own_instruction_sets(cpuinfo) == (best,)
        monkeypatch.setenv("FASTMIX_INSTRUCTION_SETS", "all")  # that run here
        assert build.own_instruction_sets(cpuinfo) == everything[:everything.index(best) + 1]
    monkeypatch.setenv("FASTMIX_INSTRUCTION_SETS", "sse")
    with pytest.raises(RuntimeError, match="FASTMIX_INSTRUCTION_SETS must be 'all', one of "
                                           "portable, avx2, avx512, amx, or not set, got 'sse'"):
        build.own_instruction_sets(cpuinfo)
    monkeypatch.setenv("FASTMIX_INSTRUCTION_SETS", "avx2")
    assert build.own_instruction_sets(cpuinfo) == ("avx2",)
    assert build.own_instruction_sets(tmp_path / "missing") == ("avx2",)
    monkeypatch.setenv("FASTMIX_INSTRUCTION_SETS", "amx")  # avx512's kernels use it
    assert build.own_instruction_sets(tmp_path / "missing") == ("avx512",)
    with pytest.raises(RuntimeError, match="one that this processor has: portable, avx2, avx512, "
                                           "got 'amx'"):
        cpuinfo.write_text("flags : avx2 fma f16c avx512f avx512dq avx512bw avx512vl\n")
        build.own_instruction_sets(cpuinfo)
    monkeypatch.setenv("FASTMIX_INSTRUCTION_SETS", "avx2")
    cpuinfo.write_text("flags : fpu sse2\n")
    with pytest.raises(RuntimeError, match="one that this processor has: portable, got 'avx2'"):
        build.own_instruction_sets(cpuinfo)


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "ARM64"])  # Linux, macOS, Windows
def test_aarch64_has_neon(machine, tmp_path, monkeypatch):
    monkeypatch.delenv("FASTMIX_INSTRUCTION_SETS")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    there = runpy.run_path(build.__file__)
    cpuinfo = tmp_path / "cpuinfo"
    assert there["own_instruction_sets"](cpuinfo) == ("neon",)
    # Emulated, it may be the text of the machine that emulates.
    for text in ("Features : fp asimd\n", "flags : fpu sse2 avx2\n"):
        cpuinfo.write_text(text)
        assert there["own_instruction_sets"](cpuinfo) == ("neon",)
    assert there["compiled_name"]().startswith("cpu-neon-")
    monkeypatch.setenv("FASTMIX_INSTRUCTION_SETS", "avx2")
    with pytest.raises(RuntimeError, match="must be 'all', one of neon, or not set, got 'avx2'"):
        there["own_instruction_sets"](cpuinfo)


@pytest.mark.skipif("avx512" not in build.INSTRUCTION_SETS, reason="not x86-64")
def test_an_assembler_that_does_not_know_the_matrix_unit(tmp_path, monkeypatch):
    """As an older one beside g++ 11: the kernels are compiled without it."""
    real = build.compiler()
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", f"""case "$*" in
    *-x\\ c++*) echo "Error: no such instruction: tilerelease" >&2; exit 1 ;;
esac
exec {" ".join(real)} "$@\"""")))
    jobs, _ = build._commands(TORCH, [], True, (), ("avx512",))
    assert all("-DFASTMIX_NO_MATRIX_UNIT" in command for command in jobs.values())
    others, _ = build._commands(TORCH, [], True, (), ("avx2",))
    assert not any("-DFASTMIX_NO_MATRIX_UNIT" in command for command in others.values())
    for made in ("causal_sgu.avx512.o", "registration.o"):
        command = [{"-c": "-E"}.get(word, word) for word in jobs[made]]
        text = build.output_of(command)
        assert "FASTMIX_KERNEL" not in text and "namespace fastmix" in text
        assert "unit_gemm(int64_t" not in text and "SYS_arch_prctl" not in text
        assert "syscall(" not in text.partition("has_matrix_unit() {")[2].partition("refused")[0]


def test_an_assembler_is_part_of_the_compiler(tmp_path, monkeypatch):
    """A library compiled beside another one may lack the matrix unit."""
    before = build.compiled_name()
    script(tmp_path / "as", "exit")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert build.compiled_name() != before


# A processor that has the matrix unit, and a Linux that has it and may refuse it.
IMITATION = """#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
extern "C" __attribute__((visibility("default"))) int asked, refuses;
int asked = 0, refuses = 0;
static long imitated(long what, ...) {
  __builtin_va_list more;
  __builtin_va_start(more, what);
  if (what == 0x1021) *__builtin_va_arg(more, unsigned long*) = 3ul << 17;
  __builtin_va_end(more);
  asked += what == 0x1023;
  return what == 0x1023 ? -refuses : 0;
}
#define syscall(number, ...) imitated(__VA_ARGS__)
#define __get_cpuid_count(leaf, more, a, b, c, d) \\
  (*(a) = *(b) = *(c) = 0, *(d) = 1u << 22 | 1u << 24, 1)
"""


@pytest.mark.skipif("amx" not in build.CHOICES, reason="not x86-64")
@pytest.mark.parametrize("refuses", [0, 1])
def test_a_matrix_unit_is_looked_for_and_asked_for_where_it_is_chosen(refuses, tmp_path):
    header, made = tmp_path / "imitation.h", tmp_path / "tensors.so"
    header.write_text(IMITATION)
    source = ROOT / "csrc/cpu/tensors.cpp"
    _, link = build._commands(TORCH, [], True, (), ("avx512",))
    subprocess.run([*link, *build.FLAGS, *build.REGISTRATION, "-O0", "-isystem", TORCH / "include",
                    "-include", header, "-DFASTMIX_ONLY=avx512", "-DFASTMIX_ONLY_INDEX=2",
                    "-shared", source, "-o", made, "-L", TORCH / "lib", "-ltorch", "-ltorch_cpu"],
                   check=True)
    kernels = ctypes.CDLL(str(made))
    if kernels.fastmix_best_instruction_set() != 3:
        pytest.skip("the compiler knows no matrix unit")
    asked = ctypes.c_int.in_dll(kernels, "asked")
    ctypes.c_int.in_dll(kernels, "refuses").value = refuses
    assert kernels.fastmix_choose_instruction_set(2) and asked.value == 0
    for _ in range(2):
        assert kernels.fastmix_choose_instruction_set(3) == 1 - refuses and asked.value == 1
    assert kernels.fastmix_best_instruction_set() == 3 - refuses


@pytest.mark.skipif("avx512" not in build.INSTRUCTION_SETS, reason="not x86-64")
def test_machines_that_share_a_home_have_a_library_each(stand_in, monkeypatch):
    paths = []
    for own in ("portable", "avx2"):
        monkeypatch.setattr(build, "own_instruction_sets", lambda own=own: (own,))
        assert library.existing("cpu") is None
        paths.append(library._compiled("cpu"))
        assert library.existing("cpu") == paths[-1]
        assert paths[-1].name.startswith(f"cpu-{own}-")
        calls = (stand_in.parent / "calls").read_text()
        (stand_in.parent / "calls").unlink()
        assert f"-DFASTMIX_CPU={own} " in calls and calls.count("-DFASTMIX_CPU=") == len(
            [file for file in (ROOT / "csrc/cpu").glob("*.cpp") if "FASTMIX_CPU" in
             file.read_text()])
        assert f"-DFASTMIX_ONLY={own} -DFASTMIX_ONLY_INDEX=" in calls
    for path in paths:
        path.unlink()
    # One of several instruction sets serves every machine that needs one of them.
    for several in ("portable", "avx2"), ("portable", "avx2", "avx512"):
        monkeypatch.setattr(build, "own_instruction_sets", lambda own=several: own)
        assert library.existing("cpu") is None
        path = library._compiled("cpu")
        assert path.name.startswith(f"cpu-{'-'.join(several)}-{build.fingerprint()}-")
        calls = (stand_in.parent / "calls").read_text()
        (stand_in.parent / "calls").unlink()
        assert "-DFASTMIX_ONLY" not in calls
        for mark, there in ("CPU=avx2", True), ("CPU=avx512", "avx512" in several), (
                "NO_AVX512", "avx512" not in several):
            assert (f"-DFASTMIX_{mark} " in calls) == there
        for own in build.INSTRUCTION_SETS:
            monkeypatch.setattr(build, "own_instruction_sets", lambda own=own: (own,))
            assert library.existing("cpu") == (path if own in several else None)
        path.unlink()


# ---- what goes wrong


DAMAGES = {"empty": lambda data: b"", "cut short": lambda data: data[: len(data) * 9 // 10],
           "zeros": lambda data: data[:4096] + bytes(len(data) - 4096)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_not_loaded_but_compiled_again(stand_in, damage):
    path = library._compiled("cpu")
    assert library.existing("cpu") == path
    data = path.read_bytes()
    path.write_bytes(DAMAGES[damage](data))
    assert library.existing("cpu") is None and library.why_not("cpu") is None
    with pytest.warns(RuntimeWarning, match=f"again: {path} is damaged"):
        assert library._compiled("cpu") == path
    assert path.read_bytes() == data and library.existing("cpu") == path
    build.checksum_file(path).unlink()
    with pytest.warns(RuntimeWarning, match=f"again: {path} has no checksum"):
        assert library._compiled("cpu") == path


@pytest.mark.long
def test_a_process_survives_a_damaged_library(stand_in):
    path = library._compiled("cpu")
    path.write_bytes(DAMAGES["zeros"](path.read_bytes()))
    without = python(CALL, {"CXX": "no-such-compiler"})
    assert without.returncode == 0, without.stderr
    assert f"1 fastmix runs its pure PyTorch fallback on the CPU: {path} is damaged" in (
        without.stdout.replace("the C++ kernels could not be built or loaded: ", ""))
    ran = python(CALL)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"1 fastmix compiles its kernels again: {path} is damaged")
    assert python(CALL).stdout == "0\n"


def test_a_damaged_library_built_ahead_is_not_loaded(stand_in, tmp_path, monkeypatch):
    ahead = tmp_path / "ahead.so"
    monkeypatch.setattr(build, "name_built_ahead", lambda cuda: str(ahead))
    build.build(ahead, TORCH, sets=ONE)
    assert library.existing("cpu") == ahead
    library.cache_folder().mkdir(mode=0o700)
    library.cache_folder().chmod(0o777)  # no matter: the cache is not looked at
    assert library.existing("cpu") == ahead
    library.cache_folder().chmod(0o700)
    ahead.write_bytes(b"")
    assert library.existing("cpu") is None
    with pytest.warns(RuntimeWarning, match=f"again: {ahead} is damaged"):
        path = library._compiled("cpu")
    assert library.existing("cpu") == path != ahead


def test_a_library_that_does_not_load_is_one_warning(stand_in):
    """It is there, and whole: as one that was linked with another system's libraries."""
    path = library._compiled("cpu")
    path.write_bytes(99 * b"of another machine")
    build.checksum_file(path).write_text(build._checksum(path))
    assert library.existing("cpu") == path
    ran = python(CALL.replace("out =", "fastmix.ops.cumulative_mean(torch.ones(1, 1)); out ="))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("1 fastmix runs its pure PyTorch fallback on the CPU: the C++ "
                                 "kernels could not be built or loaded: ")
    assert str(path) in ran.stdout


def test_a_full_disk_leaves_nothing_behind(stand_in, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RuntimeError, match="could not be built or loaded.*No space left"):
        library.load("cpu")
    assert [path.name for path in library.cache_folder().iterdir()] == [".lock"]


def test_a_disk_that_is_full_while_compiling_leaves_nothing_behind(stand_in, monkeypatch):
    command = script(stand_in.parent / "full", "echo made | cat > /dev/full")
    monkeypatch.setenv("CXX", str(command))
    with pytest.raises(RuntimeError, match="No space left"):
        library.load("cpu")
    assert [path.name for path in library.cache_folder().iterdir()] == [".lock"]


READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


@pytest.mark.long
def test_a_home_that_is_read_only_is_one_warning(stand_in, tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    under = []
    if os.getuid() == 0:  # who can write there all the same
        under = ["unshare", "-m", "sh", "-c", READ_ONLY, str(home)]
        if shutil.which("unshare") is None or subprocess.run([*under, "true"]).returncode:
            pytest.skip("this root cannot mount a folder as one to be read only")
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("FASTMIX_CACHE", "XDG_CACHE_HOME")}
    ran = subprocess.run([*under, sys.executable, "-c", CALL], capture_output=True, text=True,
                         env=environment | {"HOME": str(home), "PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("1 fastmix runs its pure PyTorch fallback on the CPU: ")
    assert str(home) in ran.stdout and "FASTMIX_CACHE" in ran.stdout


def test_two_versions_on_one_home_have_a_library_each(stand_in, tmp_path, monkeypatch):
    """Sources of another version make another name; neither goes when the other is compiled."""
    first = library._compiled("cpu")
    other = tmp_path / "csrc"
    shutil.copytree(build.sources(), other)
    (other / "cpu" / "registration.cpp").open("a").write("// of another version\n")
    monkeypatch.setattr(build, "sources", lambda: other)
    monkeypatch.setattr(build, "fingerprint", build.fingerprint.__wrapped__)
    second = library._compiled("cpu")
    assert first != second and first.parent == second.parent
    assert first.exists() and second.exists()
    assert library.existing("cpu") == second


def test_others_stop_where_one_compiler_fails(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "2")
    monkeypatch.setenv("CXX", str(script(
        tmp_path / "c++", 'case "$*" in *DFASTMIX_CPU=*) exec sleep 60 ;; esac; exit 1')))
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="ended with status 1"):
        build.build(tmp_path / "made.so", TORCH, sets=ONE)
    assert time.monotonic() - start < 30


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups")
def test_ctrl_c_stops_the_compilers_and_the_next_call_starts_anew(stand_in):
    code = """
import os, signal, torch, fastmix
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
os.environ["SLEEP"] = "60"
try:
    fastmix.ops.cumulative_mean(torch.tensor([[1.0, 3.0]]))
except KeyboardInterrupt:
    print("interrupted", flush=True)
os.environ["SLEEP"] = "0"
assert fastmix.ops.cumulative_mean(torch.tensor([[1.0, 3.0]])).tolist() == [[1.0, 2.0]]
from fastmix.native import library
print(len(library._loaded))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.PIPE,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}) as run:
        assert "compiling its kernels, 0 of" in run.stderr.readline()
        while not (stand_in.parent / "times").exists():
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        start = time.monotonic()
        out, err = run.communicate(timeout=60)
    assert out == "interrupted\n1\n" and time.monotonic() - start < 50, err
    assert not list(library.cache_folder().glob(".building-*"))


@pytest.mark.long
def test_sixteen_processes_at_first_use_compile_once(stand_in):
    ran = python("""
import os, torch, fastmix
torch.set_num_threads(1)
children = []
for _ in range(16):
    child = os.fork()
    if child == 0:
        out = fastmix.ops.cumulative_mean(torch.tensor([[1.0, 3.0]]))
        from fastmix.native import library
        os._exit(0 if out.tolist() == [[1.0, 2.0]] and library._loaded else 1)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 16
""", {"SLEEP": "0.1"})
    assert ran.returncode == 0, ran.stderr
    calls = (stand_in.parent / "calls").read_text().splitlines()
    assert sum("-shared" in call for call in calls) == 1
    assert ran.stderr.count("compiling its kernels, 0 of") == 1
    assert "another process is compiling the kernels, this one waits" in ran.stderr


def test_a_cache_of_another_user_is_refused(stand_in, monkeypatch):
    folder = library.cache_folder()
    folder.mkdir(mode=0o700)
    if os.getuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert library.why_not("cpu") == (
        f"{folder} belongs to another user: set FASTMIX_CACHE to a directory of your own")
    with pytest.raises(RuntimeError, match="belongs to another user"):
        library.load("cpu")


def test_a_cache_that_cannot_be_written_to_is_refused(stand_in, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTMIX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeError, match=f"the cache directory {tmp_path}/file/cache cannot be "
                                           "written to"):
        library.load("cpu")
    monkeypatch.setattr(library, "_failures", {})
    monkeypatch.setenv("FASTMIX_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert "cannot be written to (set FASTMIX_CACHE" in library.why_not("cpu")


def test_a_cache_that_cannot_be_made_is_named(stand_in, tmp_path, monkeypatch):
    """As in /proc, where root may write and yet makes nothing."""
    def refuse(folder, **options):
        raise FileNotFoundError(2, "No such file or directory", str(folder.parent))

    monkeypatch.setenv("FASTMIX_CACHE", str(tmp_path / "new" / "cache"))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RuntimeError, match=f"the cache directory {tmp_path}/new/cache cannot be "
                                           "made: .*set FASTMIX_CACHE"):
        library.load("cpu")


def test_a_user_without_a_home_is_told_what_to_set(stand_in, monkeypatch):
    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTMIX_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    assert "no home directory" in library.why_not("cpu")
    assert "set FASTMIX_CACHE" in library.why_not("cpu")



# ---- importing again


@pytest.mark.long
def test_importing_again_after_sys_modules_was_cleared(tmp_path):
    ran = python("""
import sys, torch
import fastmix, fastmix.nn
first = fastmix
for name in [name for name in sys.modules if name.partition(".")[0] == "fastmix"]:
    del sys.modules[name]
import fastmix
assert fastmix is first and sys.modules["fastmix"] is first
assert fastmix.ops.cumulative_mean(torch.ones(1, 2)).tolist() == [[1.0, 1.0]]
from fastmix.ops import gate_loop
import fastmix.nn
assert gate_loop is fastmix.ops.gate_loop
fastmix.nn.GateLoopTransformer(num_tokens=4, dim=8, depth=1)(torch.zeros(1, 3, dtype=torch.long))
del sys.modules["fastmix"]
import fastmix
assert fastmix is first
""")
    assert ran.returncode == 0, ran.stderr
    (tmp_path / "fastmix").symlink_to(ROOT / "fastmix")
    other = python(f"""
import sys, fastmix
for name in [name for name in sys.modules if name.partition(".")[0] == "fastmix"]:
    del sys.modules[name]
sys.path.insert(0, {str(tmp_path)!r})
import fastmix
""")
    assert "cannot be registered twice: import" in other.stderr.splitlines()[-1]
    assert "in a new process" in other.stderr.splitlines()[-1]


def test_reloading_one_file_is_refused_in_words():
    said = python("""
import importlib, sys
import fastmix
for name in ("fastmix.ops._register", "fastmix.ops.gate_loop", "fastmix.ops.fft_conv"):
    try:
        importlib.reload(sys.modules[name])
    except ImportError as error:
        assert "Start a new process" in str(error), error
    else:
        raise AssertionError(name)
import torch
assert fastmix.ops.cumulative_mean(torch.ones(1, 3)).tolist() == [[1, 1, 1]]""",
                  {"FASTMIX_IMPLEMENTATION": "fallback"})
    assert said.returncode == 0, said.stderr
