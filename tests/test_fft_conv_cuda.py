"""fft_conv's CUDA kernels without a GPU: run on the CPU, compiled, loaded and refused.

tests/cuda/host.cpp runs every stretch between two barriers for every thread, from poisoned
shared memory; it fails where two threads meet, where an access is misaligned or out of bounds.
"""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmix
from fastmix import _build, _native, reference

ROOT = Path(__file__).parent.parent
HOPPER, CONSUMER = 227 << 10, 99 << 10  # bytes of shared memory that a block may have

needs_compiler = pytest.mark.skipif(_build.compiler() is None, reason="no C++ compiler")


class Host:
    """The kernels as operators on CPU tensors, and what the last calls would cost a GPU."""

    def __init__(self, path):
        self.path = path
        torch.ops.load_library(str(path))
        self.library = ctypes.CDLL(str(path))
        self.library.fastmix_host_start.argtypes = [ctypes.c_int64]
        self.library.fastmix_host_global.restype = ctypes.c_int64

    def start(self, shared):
        self.library.fastmix_host_start(shared)

    def counts(self):
        found = (ctypes.c_int64 * 4)()
        self.library.fastmix_host_counts(found)
        return dict(zip(("blocks", "barriers", "shared", "waits"), found))

    def accesses(self, what):
        """Threads' global accesses, "load16" or "store2" and so on."""
        return self.library.fastmix_host_global(what.encode())

    def __call__(self, x, kernel, grad):
        """y, dx and dkernel."""
        y = torch.ops.fastmix_cuda.fft_conv(x, kernel)
        return y, *torch.ops.fastmix_cuda.fft_conv_backward(grad, x, kernel)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    if _build.compiler() is None:
        pytest.skip("no C++ compiler")
    torch_folder = Path(torch.__file__).parent
    path = tmp_path_factory.mktemp("cuda") / "host.so"
    sources = [*(ROOT / "csrc" / "cuda").glob("*.cpp"), ROOT / "tests" / "cuda" / "host.cpp"]
    subprocess.run([_build.compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", "-w",
                    *_build.REGISTRATION, "-DFASTMIX_CUDA_KEY=CPU", "-isystem",
                    torch_folder / "include", *sources, "-o", path, "-L", torch_folder / "lib",
                    "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"], check=True)
    return Host(path)


def defined(x, kernel, grad):
    """y, dx and dkernel in float64."""
    x, kernel = x.double().requires_grad_(), kernel.double().requires_grad_()
    if x.shape[1] <= 300:
        y = reference.fft_conv(x, kernel)
    else:  # the definition is quadratic
        n, m = x.shape[1], kernel.shape[-2]
        lags = kernel if kernel.ndim == 3 else kernel[None]
        spectrum = torch.fft.rfft(lags, n=n + m, dim=1)[..., None]
        y = torch.fft.irfft(torch.fft.rfft(x, n=n + m, dim=1) * spectrum, n=n + m, dim=1)[:, :n]
    return y, *torch.autograd.grad(y, (x, kernel), grad.double())


def check(host, x, kernel, shared=HOPPER):
    """Values and gradients: to 1e-6 of the largest, or to the rounding of the dtype."""
    grad = torch.randn(x.shape).to(x.dtype)
    host.start(shared)
    for found, expected in zip(host(x, kernel, grad), defined(x, kernel, grad), strict=True):
        limit = 1e-6 + (0 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps / 2)
        largest = expected.abs().max()
        assert found.is_contiguous() and (found - expected).abs().max() <= limit * largest
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


def test_a_million_steps(host):
    check(host, torch.randn(1, 1 << 20, 1, 1), torch.randn(1 << 20, 1))


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


@pytest.mark.parametrize("n", [600, 5000])
def test_any_strides(host, n):
    fused = torch.randn(2, n, 3, 24)
    check(host, fused[:, :, 1].unflatten(-1, (3, 8)), torch.randn(3, n, 2).permute(2, 1, 0))
    check(host, torch.randn(2, 3, 4, n).permute(0, 3, 1, 2), torch.randn(2, n, 6)[..., ::2])
    check(host, torch.randn(2, 1, 3, 4).expand(2, n, 3, 4), torch.randn(2, n, 3).flip(1))
    check(host, torch.randn(2 * n * 12 + 1)[1:].view(2, n, 3, 4), torch.randn(2, n, 3))


def test_empty_batches(host):
    x, kernel = torch.randn(0, 9, 2, 3), torch.randn(9, 2)
    y, dx, dkernel = host(x, kernel, x)
    assert y.shape == dx.shape == x.shape and not dkernel.any()


def test_outputs_are_written_whole(host):
    torch.use_deterministic_algorithms(True)  # new tensors are NaN
    try:
        check(host, torch.randn(2, 700, 2, 5), torch.randn(2, 900, 2))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("n, row", [(2048, 16), (8192, 8)])
def test_rows_are_read_and_written_whole(host, n, row, capsys):
    """The widths and turns that a GPU would pay for, and no narrower ones on the data."""
    for dtype in (torch.float32, torch.bfloat16):
        x, kernel = torch.randn(1, n, 1, 8).to(dtype), torch.randn(1, n, 1)
        host.start(HOPPER)
        torch.ops.fastmix_cuda.fft_conv(x, kernel)
        width = x.numel() * x.element_size() // row
        assert host.accesses(f"store{row}") >= width and host.accesses("store4") == 0
        assert host.accesses("load2") == 0 and host.accesses("load4") == kernel.numel()
        widths = {f"{what}{by}": host.accesses(f"{what}{by}")
                  for what in ("load", "store") for by in (2, 4, 8, 16)}
        with capsys.disabled():
            print(f"\nn={n} {dtype}: {host.counts()}, {widths}", end=" ")


def test_the_shapes_fit_the_devices(host):
    """Two blocks of 256 threads or one of 512 on a multiprocessor, with 1 KB more for each."""
    for shared, longest in ((HOPPER, 16384), (163 << 10, 16384), (CONSUMER, 8192)):
        shapes = _native.fft_conv_shapes(shared, host.path)
        assert max(row[0] for row in shapes) == longest
        for length, size, direction, threads, used, channels in shapes:
            assert used <= shared and threads in (256, 512)
            assert channels * size in (4, 8, 16)
            if shared == HOPPER:
                assert (used + 1024) * 512 // threads <= 228 << 10, (length, size, direction)


def test_the_same_bits_twice(host):
    x, kernel = torch.randn(2, 3000, 2, 6), torch.randn(3000, 2)
    assert all(map(torch.equal, host(x, kernel, x), host(x, kernel, x)))


# ---- the library


needs_nvcc = pytest.mark.skipif(_build.cuda_compiler() is None or _build.compiler() is None,
                                reason="no nvcc")


@pytest.fixture(scope="module")
def whole_library(tmp_path_factory):
    """Kernels for CPUs and for every GPU in one."""
    path = tmp_path_factory.mktemp("cuda") / "whole.so"
    _build.build(path, Path(torch.__file__).parent, cuda=_build.cuda_code())
    return path


LOAD = """
import sys, torch
torch.library.define("fastmix::decay_conv", "(Tensor x, Tensor decay, Tensor? gain, Tensor? "
                     "initial_state, int carry_every) -> (Tensor, Tensor, Tensor)")
torch.ops.load_library(sys.argv[1])
x, kernel = torch.randn(1, 9, 2, 2), torch.randn(9, 2)
try:
    torch.ops.fastmix_cuda.fft_conv(x, kernel)
except NotImplementedError as error:
    print("refused:", "CPU" in str(error))
"""


@needs_nvcc
def test_the_library_loads_registers_and_is_refused_without_a_gpu(whole_library):
    ran = subprocess.run([sys.executable, "-c", LOAD, whole_library], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout == "refused: True\n", ran.stderr


@needs_nvcc
def test_no_kernel_is_worse_than_the_table(whole_library):
    pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    ran = subprocess.run([sys.executable, ROOT / "bench" / "cuda_static.py", "--check",
                          whole_library], capture_output=True, text=True)
    assert ran.returncode == 0 and "none worse" in ran.stdout, ran.stdout + ran.stderr[-2000:]


def test_tensors_without_kernels_are_told_why():
    found = fastmix.implementations("fft_conv", "cuda")["native"]
    if torch.cuda.is_available():
        assert found is None or "nvcc" in found or "compute capability" in found
    else:
        assert found == "torch finds no CUDA device here"
    assert fastmix.implementations("gate_loop", "cuda")["native"] == (
        "gate_loop has no CUDA C++ kernel")
    assert "float64 is wanted" in _native._refusal(torch.empty(1, 2, 3, 4, dtype=torch.float64))
    assert "steps" in _native._refusal(torch.empty(1, 1, 1, 1).expand(1, _native.LONGEST + 1, 1, 1))
    assert _native._refusal(torch.empty(1, 2, 3, 4)) is None


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [*LENGTHS, 16384, 16385, 65536, 1 << 20])
def test_values_and_gradients_on_a_gpu(n, dtype):
    b, h, d = (2, 4, 16) if n <= 65536 else (1, 1, 2)
    x, grad = torch.randn(2, b, n, h, d, device="cuda").to(dtype)
    for kernel in (torch.randn(b, n, h, device="cuda").to(dtype), torch.randn(n, h, device="cuda")):
        leaves = x.clone().requires_grad_(), kernel.clone().requires_grad_()
        with fastmix.force("native"):
            y = fastmix.ops.fft_conv(*leaves)
            found = y, *torch.autograd.grad(y, leaves, grad)
            again = fastmix.ops.fft_conv(*leaves)
        for f, e in zip(found, defined(x, kernel, grad), strict=True):
            limit = 1e-6 + (0 if f.dtype == torch.float32 else torch.finfo(f.dtype).eps / 2)
            assert (f - e).abs().max() <= limit * e.abs().max()
        assert torch.equal(y, again)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    x, kernel = torch.randn(2, 3000, 2, 8, device="cuda"), torch.randn(3000, 2, device="cuda")
    with fastmix.force("native"):
        expected = fastmix.ops.fft_conv(x, kernel)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fastmix.ops.fft_conv(x, kernel)
        graph.replay()
    assert torch.equal(y, expected)
