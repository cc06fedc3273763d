"""fft_conv's CUDA kernels without a GPU: run on the CPU, compiled, loaded and refused.

tests/cuda/host.cpp runs every phase between two barriers for every thread, from poisoned
shared memory; it fails where two threads meet, where an access is misaligned or out of bounds,
where a copy is read that nobody waited for.
"""

import contextlib
import csv
import ctypes
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastmix
from cases import unwritten_is_nan
from fastmix import native, reference
from fastmix.native import build, cuda, library
from fastmix.ops._register import OPERATORS

ROOT = Path(__file__).parent.parent
HOPPER, CONSUMER = 227 << 10, 99 << 10  # bytes of shared memory that a block may have

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


class Host:
    """The kernels as operators on CPU tensors, and what the last calls would cost a GPU."""

    def __init__(self, path):
        self.path = path
        torch.ops.load_library(str(path))
        self.library = ctypes.CDLL(str(path))
        self.library.fastmix_host_start.argtypes = [ctypes.c_int64, ctypes.c_int]
        self.library.fastmix_host_global.restype = ctypes.c_int64

    def start(self, shared, capability=0):
        """A machine whose blocks may have so many bytes; without tensor cores, or with."""
        self.library.fastmix_host_start(shared, capability)

    def counts(self):
        actual = (ctypes.c_int64 * 6)()
        self.library.fastmix_host_counts(actual)
        return dict(zip(("blocks", "barriers", "shared", "waits", "products", "matrices"), actual))

    def accesses(self, what):
        """Threads' global accesses, "load16" or "store2" and so on."""
        return self.library.fastmix_host_global(what.encode())

    def __call__(self, x, kernel, grad, skip=None):
        """y, dx and dkernel; and dskip, if there is a skip."""
        y = torch.ops.fastmix_cuda_host.fft_conv(x, kernel, skip)
        *actual, parts = torch.ops.fastmix_cuda_host.fft_conv_backward(grad, x, kernel, skip)
        return y, *actual, *[parts.sum(0)] * (skip is not None)


@pytest.fixture(scope="session")
def host():
    """Compiled once and kept beside the library: for every process, run and version of torch."""
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    torch_folder, own = Path(torch.__file__).parent, ROOT / "tests" / "cuda"
    sources = [*(ROOT / "csrc" / "cuda").glob("*.cpp"), own / "host.cpp"]
    command = [*build.compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", "-w",
               *build.REGISTRATION, "-DFASTMIX_HOST"]
    made_from = hashlib.sha256(repr(command).encode())
    for file in sorted(own.iterdir()):
        made_from.update(file.read_bytes())
    folder = library.cache_folder() / "tests"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"host-{made_from.hexdigest()[:16]}-{build.compiled_name()}"
    with library.build_lock(folder):
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            subprocess.run([*command, "-isystem", torch_folder / "include", *sources, "-o",
                            unfinished, "-L", torch_folder / "lib", "-Wl,--no-as-needed",
                            "-ltorch", "-ltorch_cpu"], check=True)
            unfinished.rename(path)
    return Host(path)


def defined(x, kernel, grad, skip=None):
    """y, dx and dkernel in float64; and dskip, if there is a skip."""
    x, kernel = x.double().requires_grad_(), kernel.double().requires_grad_()
    if x.shape[1] <= 300:
        y = reference.fft_conv(x, kernel)
    else:  # the definition is quadratic
        n, m = x.shape[1], kernel.shape[-2]
        lags = kernel if kernel.ndim == 3 else kernel[None]
        spectrum = torch.fft.rfft(lags, n=n + m, dim=1)[..., None]
        y = torch.fft.irfft(torch.fft.rfft(x, n=n + m, dim=1) * spectrum, n=n + m, dim=1)[:, :n]
    inputs = [x, kernel]
    if skip is not None:
        inputs.append(skip.double().requires_grad_())
        y = y + inputs[2] * x
    return y, *torch.autograd.grad(y, inputs, grad.double())


def measured(x, kernel, grad, skip):
    """Each result of `defined`, with the size that its errors are divided by: its largest number,
    over all lags for dkernel. The sums of dskip may happen to be small, so theirs is the norm of
    what is summed."""
    # Lags that a short kernel has not are computed with the others, and rounded with them.
    m = kernel.shape[-2]
    y, dx, dkernel, dskip = defined(
        x, F.pad(kernel, (0, 0, 0, max(0, x.shape[1] - m))), grad, skip)
    sizes = [t.detach().abs().max() for t in (y, dx, dkernel)]
    return zip((y, dx, dkernel[..., :m, :], dskip),
               (*sizes, (x.double() * grad).norm(dim=(0, 1)).max()), strict=True)


def check(host, x, kernel, shared=HOPPER, capability=0, grad=None):
    """Values and gradients: to 1e-6 of the largest, of all lags, or to the dtype's rounding."""
    grad = torch.randn(x.shape).to(x.dtype) if grad is None else grad
    skip = torch.randn(x.shape[2:])
    host.start(shared, capability)
    with unwritten_is_nan():
        results = host(x, kernel, grad, skip)
    exact = measured(x, kernel, grad, skip)
    for actual, (expected, size) in zip(results, exact, strict=True):
        limit = 1e-6 + (0 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps / 2)
        assert actual.is_contiguous() and actual.shape == expected.shape
        assert (actual - expected).abs().max() <= limit * size
    assert host.counts()["waits"] == 0


LENGTHS = [1, 2, 7, 255, 256, 257, 511, 512, 513, 1021, 1024, 1025, 2047, 2048, 2049, 4093, 4096,
           4097, 8191, 8192, 8193]


@pytest.mark.parametrize("n", LENGTHS)
def test_values_and_gradients(host, n):
    for d in (1, 3, 4):
        check(host, torch.randn(2, n, 2, d), torch.randn(2, n, 2))


@pytest.mark.parametrize("n", [16383, 16384])
def test_the_longest_that_fit_into_a_block(host, n):
    check(host, torch.randn(1, n, 1, 2), torch.randn(1, n, 1))


@pytest.mark.parametrize("n", [16385, 20000, 32768, 32769, 65536, 65537, 131072])
def test_longer_ones_go_through_scratch(host, n):
    check(host, torch.randn(1, n, 1, 2), torch.randn(1, n, 1))


@pytest.mark.long
def test_a_million_steps(host):
    check(host, torch.randn(1, 1 << 20, 1, 1), torch.randn(1 << 20, 1))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slabs_of_long_sequences(host, dtype):
    """Little scratch: channels and kernels go through it a few at a time."""
    n = 16400
    host.library.fastmix_host_scratch(ctypes.c_int64(1 << 20))
    try:
        check(host, torch.randn(2, n, 2, 5).to(dtype), torch.randn(2, n, 2).to(dtype))
        check(host, torch.randn(3, n, 1, 9).to(dtype), torch.randn(n - 100, 1))
        check(host, torch.randn(1, 2, 3, n).to(dtype).permute(0, 3, 1, 2), torch.randn(n + 9, 2))
    finally:
        host.library.fastmix_host_scratch(ctypes.c_int64(32 << 20))


@pytest.mark.parametrize("n", [1, 300, 1000, 2048, 4097, 8192, 16000])
def test_blocks_with_less_shared_memory(host, n):
    check(host, torch.randn(1, n, 2, 3), torch.randn(1, n, 2), CONSUMER)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [2, 257, 600, 1025, 3000, 5000, 9000])
def test_narrow_dtypes(host, dtype, n):
    for d in (3, 8):
        check(host, torch.randn(1, n, 2, d).to(dtype), torch.randn(1, n, 2).to(dtype))
    check(host, torch.randn(2, n, 2, 2).to(dtype), torch.randn(n, 2))  # a wider kernel, for all


@pytest.mark.parametrize("n, m", [(700, 3), (700, 2000), (5000, 1), (3, 700)])
def test_kernels_shorter_and_longer_than_the_sequence(host, n, m):
    check(host, torch.randn(2, n, 3, 2), torch.randn(2, m, 3))
    check(host, torch.randn(2, n, 3, 2), torch.randn(m, 3))


def test_many_channels_are_cut_into_parts(host):
    check(host, torch.randn(1, 300, 1, 37), torch.randn(1, 300, 1))
    check(host, torch.randn(3, 2100, 1, 24), torch.randn(2100, 1))


@pytest.mark.parametrize("n", [600, pytest.param(5000, marks=pytest.mark.long)])
def test_any_strides(host, n):
    fused = torch.randn(2, n, 3, 24)
    check(host, fused[:, :, 1].unflatten(-1, (3, 8)), torch.randn(3, n, 2).permute(2, 1, 0))
    check(host, torch.randn(2, 3, 4, n).permute(0, 3, 1, 2), torch.randn(2, n, 6)[..., ::2])
    check(host, torch.randn(2, 1, 3, 4).expand(2, n, 3, 4), torch.randn(2, n, 3).flip(1))
    check(host, torch.randn(2 * n * 12 + 1)[1:].view(2, n, 3, 4), torch.randn(2, n, 3))


def test_empty_batches(host):
    x, kernel, skip = torch.randn(0, 9, 2, 3), torch.randn(9, 2), torch.randn(2, 3)
    y, dx, dkernel, dskip = host(x, kernel, x, skip)
    assert y.shape == dx.shape == x.shape and dskip.shape == skip.shape
    assert not dkernel.any() and not dskip.any()


@pytest.mark.parametrize("n, row", [(2048, 16), (8192, 8)])
def test_rows_are_read_and_written_whole(host, n, row, capsys):
    """The widths and turns that a GPU would pay for, and no narrower ones on the data."""
    for dtype in (torch.float32, torch.bfloat16):
        x, kernel = torch.randn(1, n, 1, 8).to(dtype), torch.randn(1, n, 1)
        host.start(HOPPER)
        torch.ops.fastmix_cuda_host.fft_conv(x, kernel, None)
        width = x.numel() * x.element_size() // row
        assert host.accesses(f"store{row}") >= width and host.accesses("store4") == 0
        assert host.accesses("load2") == 0 and host.accesses("load4") == kernel.numel()
        widths = {f"{what}{by}": host.accesses(f"{what}{by}")
                  for what in ("load", "store") for by in (2, 4, 8, 16)}
        with capsys.disabled():
            print(f"\nn={n} {dtype}: {host.counts()}, {widths}", end=" ")


def test_the_shapes_fit_the_devices(host):
    """Two blocks of 256 threads or one of 512 on a multiprocessor, with 1 KB more for each."""
    for shared, capability, longest, products in (
            (HOPPER, 90, 16384, 2048), (163 << 10, 80, 16384, 2048), (HOPPER, 100, 16384, 1024),
            (CONSUMER, 89, 8192, 512), (CONSUMER, 75, 8192, 0)):
        shapes = cuda.fft_conv_shapes(shared, capability, host.path)
        assert max(row[0] for row in shapes) == longest
        assert max((row[0] for row in shapes if row[3] == "products"), default=0) == products
        for length, size, direction, way, threads, used, channels in shapes:
            assert used <= shared
            if way == "products":
                assert (size, threads, channels) == (2, 128, 64)
            else:
                assert threads in (256, 512) and channels * size in (4, 8, 16)
            if shared == HOPPER:
                assert (used + 1024) * 512 // threads <= (1 + (way == "products")) * 228 << 10, (
                    length, size, direction)


@pytest.mark.parametrize("kernels", [(2,), ()])
@pytest.mark.parametrize("skip", [None, torch.ones(1, 64)])
def test_scratch_of_the_backward_is_a_twentieth_of_its_tensors(host, kernels, skip):
    """b = 8, n = 8192, h = 8, d = 64 on Hopper, a thirty-second of both: four multiprocessors."""
    x, kernel = torch.randn(2, 8192, 1, 64).bfloat16(), torch.randn(*kernels, 8192, 1).bfloat16()
    host.start(HOPPER, 90)
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.ops.fastmix_cuda_host.fft_conv_backward(x, x, kernel, skip)
    made = sum(event.self_cpu_memory_usage for event in profile.events()
               if event.name == "aten::empty")
    assert 0 < made - x.nbytes - kernel.nbytes <= 0.05 * (4 * x.nbytes + 2 * kernel.nbytes)


@pytest.mark.long
@pytest.mark.parametrize("n", [300, 5000, 20000])
def test_the_same_bits_twice(host, n):
    x, kernel = torch.randn(2, n, 2, 6), torch.randn(n, 2)
    host.start(HOPPER)
    assert all(map(torch.equal, host(x, kernel, x), host(x, kernel, x)))
    assert all(map(torch.equal, host(x, kernel, x), host(x, kernel, x, torch.zeros(2, 6))[:3]))


@pytest.mark.parametrize("skip", [None, torch.randn(3, 2).bfloat16().T])
def test_the_operator_hands_over_what_the_kernels_take(host, monkeypatch, skip):
    """A skip of any dtype and strides; its gradient comes back in parts."""
    monkeypatch.setattr(torch.ops, "fastmix_cuda", torch.ops.fastmix_cuda_host)
    monkeypatch.setattr(cuda, "why_not_on", lambda device: None)
    host.start(HOPPER)
    forward, backward = native.forced("fft_conv", "cuda")
    args = torch.randn(2, 300, 2, 3).bfloat16(), torch.randn(300, 2), skip
    grad = torch.randn(2, 300, 2, 3).bfloat16()
    operator = OPERATORS["fft_conv"]
    for actual, expected in zip(
            (forward(*args), *backward(grad, *args)),
            (operator.run_fallback(*args), *operator.run_fallback_backward(grad, *args)),
            strict=True):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


# ---- products on tensor cores


SIZES = [1, 2, 7, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 521]
A100, ADA = (163 << 10, 80), (CONSUMER, 89)


def check_products(host, x, kernel, device=(HOPPER, 90), **more):
    check(host, x, kernel, *device, **more)
    assert host.counts()["products"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", SIZES)
def test_products(host, dtype, n):
    x = torch.randn(2, n, 2, 64).to(dtype)
    x[..., 5] = 0  # to an output of 0 exactly
    check_products(host, x, torch.randn(2, n, 2).to(dtype))
    check_products(host, torch.randn(2, n, 2, 40).to(dtype), torch.randn(n, 2).to(dtype))


@pytest.mark.parametrize("n, dtype", [(1000, torch.float16), (2047, torch.bfloat16),
                                      (2048, torch.float16)])
def test_long_products(host, n, dtype):
    check_products(host, torch.randn(1, n, 1, 64).to(dtype), torch.randn(1, n, 1).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [1, 3, 8, 63, 65, 72, 100, 128])
def test_products_of_any_channels(host, dtype, d):
    n = 32 if d == 1 else 90 if d < 8 else 250
    check_products(host, torch.randn(2, n, 3, d).to(dtype), torch.randn(2, n, 3).to(dtype))


@pytest.mark.parametrize("n, m", [(300, 1), (300, 64), (300, 65), (300, 66), (1500, 129), (3, 700),
                                  (4500, 700), (20000, 2)])
def test_products_with_short_and_long_kernels(host, n, m):
    x, dtype = torch.randn(2, n, 1, 64 if n < 1000 else 48), torch.bfloat16
    check_products(host, x.to(dtype), torch.randn(2, m, 1).to(dtype))
    check_products(host, x.to(dtype), torch.randn(m, 1).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_any_strides(host, dtype):
    n, dt = 200, dict(dtype=dtype)
    fused = torch.randn(2, n, 3, 128).to(dtype)
    grad = torch.randn(2, 1, 1, 1).to(dtype).expand(2, n, 2, 64)
    check_products(host, fused[:, :, 1].unflatten(-1, (2, 64)),
                   torch.randn(3, n, 2, 2, **dt)[1].permute(2, 0, 1), grad=grad)
    check_products(host, torch.randn(2, 2, 64, n, **dt).permute(0, 3, 1, 2),
                   torch.randn(2, n, 4, **dt)[..., ::2])
    check_products(host, torch.randn(2, 1, 3, 64, **dt).expand(2, n, 3, 64),
                   torch.randn(2, n, 3, **dt).flip(1),
                   grad=torch.randn(2, n, 3, 128, **dt)[..., ::2])
    check_products(host, fused[..., :61], torch.randn(n, 3, **dt), grad=fused[..., 64:125])
    check_products(host, torch.randn(2 * n * 192 + 1, **dt)[1:].view(2, n, 3, 64),
                   torch.randn(2, n, 3, **dt))
    check_products(host, torch.randn(n, 2, 3, 64, **dt).transpose(0, 1),
                   torch.randn(n, **dt)[:, None].expand(n, 3))


def test_products_on_other_machines(host):
    for device in (A100, ADA):
        check_products(
            host, torch.randn(1, 300, 2, 64).half(), torch.randn(1, 300, 2).half(), device)


def test_what_is_transformed_all_the_same(host):
    """Longer sequences, few channels, other kernels, machines without tensor cores."""
    half, taps = torch.randn(1, 512, 1, 64).half(), torch.randn(1, 512, 1).half()
    for device, x, kernel in (((CONSUMER, 75), half, taps), ((HOPPER, 90), half, taps.float()),
                              ((HOPPER, 90), half[..., :15], taps),
                              (ADA, torch.cat((half, half[:, :1]), 1), torch.cat((taps, taps), 1))):
        check(host, x, kernel, *device)
        assert host.counts()["products"] == 0


def test_a_product_costs_what_was_designed(host, capsys):
    """Matrix products: only those of the triangle's tiles. Rows go whole, no bank is waited for."""
    n = 2048
    x, kernel = torch.randn(2, 1, n, 1, 64).half(), torch.randn(1, n, 1).half()
    tiles = n // 64 * (n // 64 + 1) // 2
    for count, call, loads in (
            (tiles, lambda: torch.ops.fastmix_cuda_host.fft_conv(x[0], kernel, None), 16),
            (2 * tiles,
             lambda: torch.ops.fastmix_cuda_host.fft_conv_backward(*x, kernel, None), 48)):
        host.start(HOPPER, 90)
        call()
        counts = host.counts()
        assert counts["products"] == 128 * count and counts["waits"] == 0
        assert counts["matrices"] == loads * tiles
        assert host.accesses("store16") == x[0].numel() // 8
        with capsys.disabled():
            widths = {f"{what}{by}": host.accesses(f"{what}{by}")
                      for what in ("load", "store") for by in (2, 4, 8, 16)}
            print(f"\nn={n} products: {counts}, {widths}", end=" ")


def test_products_carry_nan_no_further_than_a_tile(host):
    x, kernel = torch.randn(1, 400, 1, 64).half(), torch.randn(1, 400, 1).half()
    x[0, 200, 0, 3] = float("nan")
    host.start(HOPPER, 90)
    y = torch.ops.fastmix_cuda_host.fft_conv(x, kernel, None)
    assert y[:, 200:, :, 3].isnan().all() and not y[:, :192].isnan().any()
    assert not y[..., [0, 1, 2, 4]].isnan().any()


@pytest.mark.long
def test_products_have_the_same_bits_twice(host):
    x, kernel = torch.randn(2, 600, 2, 80).half(), torch.randn(600, 2).half()
    host.start(HOPPER, 90)
    assert all(map(torch.equal, host(x, kernel, x), host(x, kernel, x)))
    assert all(map(torch.equal, host(x, kernel, x), host(x, kernel, x, torch.zeros(2, 80))[:3]))
    assert host.counts()["products"] > 0


# ---- the library


needs_nvcc = pytest.mark.skipif(build.cuda_compiler() is None or build.compiler() is None,
                                reason="no nvcc")


LOAD = """
import sys, torch
torch.library.define("fastmix::decay_conv", "(Tensor x, Tensor decay, Tensor? gain, Tensor? "
                     "initial_state, int carry_every) -> (Tensor, Tensor, Tensor)")
torch.ops.load_library(sys.argv[1])
x, kernel = torch.randn(1, 9, 2, 2), torch.randn(9, 2)
try:
    torch.ops.fastmix_cuda.fft_conv(x, kernel, None)
except NotImplementedError as error:
    print("refused:", "CPU" in str(error))
"""


@pytest.mark.long
@needs_nvcc
def test_a_library_for_cpus_and_every_gpu(tmp_path, quick_compiler, monkeypatch):
    """It loads, registers and is refused without a GPU; no kernel in it is worse than the table.

    One test, for nvcc takes minutes.
    """
    path = tmp_path / "whole.so"
    monkeypatch.setenv("CXX", quick_compiler)  # nvcc's own code is optimised all the same
    build.build(path, Path(torch.__file__).parent, cuda=build.cuda_code())
    ran = subprocess.run([sys.executable, "-c", LOAD, path], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout == "refused: True\n", ran.stderr
    pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    ran = subprocess.run([sys.executable, ROOT / "bench" / "cuda_static.py", "--check", path],
                         capture_output=True, text=True)
    if "cannot be told" in ran.stdout:
        pytest.skip(ran.stdout)
    assert ran.returncode == 0 and "none worse" in ran.stdout, ran.stdout + ran.stderr[-2000:]


def test_no_kernel_of_the_table_has_a_stack():
    with open(ROOT / "bench" / "expected" / "cuda.csv", newline="") as file:
        stacks = [value for row in csv.DictReader(file) for name, value in row.items()
                  if name.endswith(" stack")]
    assert len(stacks) == 455 and set(stacks) == {"0"}


def test_tensors_without_kernels_are_told_why():
    actual = fastmix.implementations("fft_conv", "cuda")["native"]
    if torch.cuda.is_available():
        assert actual is None or "nvcc" in actual or "compute capability" in actual
    else:
        assert actual.startswith("torch finds no CUDA device here")
    assert fastmix.implementations("gate_loop", "cuda")["native"] == (
        "gate_loop has no CUDA C++ kernel")
    assert "x is float64" in cuda.why_not_for(torch.empty(1, 2, 3, 4, dtype=torch.float64))
    assert "steps" in cuda.why_not_for(torch.empty(1, 1, 1, 1).expand(1, cuda.LONGEST + 1, 1, 1))
    assert cuda.why_not_for(torch.empty(1, 2, 3, 4)) is None


@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_compiled_while_a_cuda_graph_is_captured(monkeypatch, there):
    """Where there can be kernels; elsewhere the fallback is captured, as ever."""
    loaded, device = [], torch.device("cuda", 0)

    def load(device_type):
        loaded.append(device_type)
        raise RuntimeError("no nvcc")

    monkeypatch.setattr(cuda.library, "load", load)
    monkeypatch.setattr(cuda.library, "why_not_gpu", lambda: None)
    monkeypatch.setattr(cuda.library, "why_not", lambda device_type: None if there else "no nvcc")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    why_not_on = cuda.why_not_on.__wrapped__
    if there:
        with pytest.raises(RuntimeError, match="on cuda:0 yet.* call the operator once before"):
            why_not_on(device)
        assert not loaded
    else:
        assert why_not_on(device) == "no nvcc"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert why_not_on(device) == "no nvcc" and loaded[-1] == "cuda"  # tried, for it may be now


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [*LENGTHS, 16384, 16385, 65536, 1 << 20])
def test_values_and_gradients_on_a_gpu(n, dtype):
    b, h, d = (2, 4, 16 if n % 2 else 5) if n <= 65536 else (1, 1, 2)
    x, grad = torch.randn(2, b, n, h, d, device="cuda").to(dtype)
    for kernel in (torch.randn(b, n, h, device="cuda").to(dtype), torch.randn(n, h, device="cuda")):
        skip = torch.randn(h, d, device="cuda").to(kernel.dtype)
        leaves = [t.clone().requires_grad_() for t in (x, kernel, skip)]
        with fastmix.force("native"):
            actual = _values_and_gradients(leaves, grad)
            again = _values_and_gradients(leaves, grad)
        for f, (e, size) in zip(actual, measured(x, kernel, grad, skip), strict=True):
            limit = 1e-6 + (0 if f.dtype == torch.float32 else torch.finfo(f.dtype).eps / 2)
            assert (f - e).abs().max() <= limit * size
        assert all(map(torch.equal, actual, again))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [*SIZES, 1000, 2047, 2048, 5000])
def test_products_on_a_gpu(n, dtype):
    for d in (64, 72 if n % 2 else 192):
        x, grad = torch.randn(2, 2, n, 4, d, device="cuda").to(dtype)
        shared = torch.randn(n, 4, device="cuda").to(dtype)
        for kernel in (torch.randn(2, n, 4, device="cuda").to(dtype), shared, shared[:100]):
            skip = torch.randn(4, d, device="cuda")
            leaves = [t.clone().requires_grad_() for t in (x, kernel, skip)]
            with fastmix.force("native"):
                actual = _values_and_gradients(leaves, grad)
                again = _values_and_gradients(leaves, grad)
            for f, (e, size) in zip(actual, measured(x, kernel, grad, skip), strict=True):
                # Tensor cores may cut off what they add: 2^-23 of a sum, every 16 steps.
                limit = 1e-6 + n / 16 * 2**-23 + torch.finfo(dtype).eps / 2
                assert (f - e).abs().max() <= limit * size
            assert all(map(torch.equal, actual, again))


def _values_and_gradients(leaves, grad):
    y = fastmix.ops.fft_conv(*leaves)
    return y, *torch.autograd.grad(y, leaves, grad)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_on_another_gpu_than_the_current_one():
    x, kernel = torch.randn(1, 300, 2, 8, device="cuda:1"), torch.randn(300, 2, device="cuda:1")
    with fastmix.force("native"), torch.cuda.device(0):
        y = fastmix.ops.fft_conv(x, kernel)
        assert torch.cuda.current_device() == 0
    assert y.device == x.device
    exact = defined(x, kernel, torch.ones_like(x))[0]
    assert (y - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.gpu
def test_products_of_any_strides_on_a_gpu():
    fused = torch.randn(2, 500, 3, 128, device="cuda").bfloat16()
    kernel = torch.randn(2, 500, 2, device="cuda").bfloat16().permute(2, 1, 0)
    times_last = torch.randn(2, 2, 64, 500, device="cuda").bfloat16().permute(0, 3, 1, 2)
    for x in (fused[:, :, 1].unflatten(-1, (2, 64)), times_last,
              fused[..., 1:].flatten(2)[..., 3:131].unflatten(-1, (2, 64))):
        leaves = x.detach().requires_grad_(), kernel.detach().requires_grad_()
        with fastmix.force("native"):
            y = fastmix.ops.fft_conv(*leaves)
            actual = y, *torch.autograd.grad(y.sum(), leaves)  # an expanded gradient
        for f, e in zip(actual, defined(x, kernel, torch.ones_like(y)), strict=True):
            limit = 1e-6 + torch.finfo(f.dtype).eps / 2
            assert (f - e).abs().max() <= limit * (e.abs().max() + 1)


@pytest.mark.gpu
def test_any_strides_and_lags_on_a_gpu():
    fused = torch.randn(2, 5000, 3, 24, device="cuda")
    x = fused[:, :, 1].unflatten(-1, (3, 8))
    for m in (1, 700, 9000):
        kernel = torch.randn(3, m, 2, device="cuda").permute(2, 1, 0).requires_grad_()
        leaf = x.detach().requires_grad_()
        with fastmix.force("native"), torch.cuda.stream(torch.cuda.Stream()):
            y = fastmix.ops.fft_conv(leaf, kernel)
            actual = y, *torch.autograd.grad(y.sum(), (leaf, kernel))
            torch.cuda.current_stream().synchronize()
        for f, e in zip(actual, defined(x, kernel.detach(), torch.ones_like(y)), strict=True):
            assert (f - e).abs().max() <= 1e-6 * (e.abs().max() + x.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [100, 700, 3000, 20000])
def test_in_a_cuda_graph(n, dtype):
    x = torch.randn(2, n, 2, 8, device="cuda", dtype=dtype)
    kernel = torch.randn(n, 2, device="cuda", dtype=dtype)
    with fastmix.force("native"):
        fastmix.ops.fft_conv(x[:, :9], kernel)  # the library is there; the kernels are not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fastmix.ops.fft_conv(x, kernel)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, fastmix.ops.fft_conv(x, kernel))
