"""The operators: (b, n, …) in, time on axis 1, channels last; differentiable to any order."""

from fastmix.ops.causal_sgu import causal_sgu
from fastmix.ops.cumulative_mean import cumulative_mean
from fastmix.ops.decay_conv import decay_conv
from fastmix.ops.fft_conv import fft_conv
from fastmix.ops.gate_loop import gate_loop
from fastmix.ops.linear_scan import linear_scan
from fastmix.ops.windowed_sgu import windowed_sgu

from fastmix.ops import _dss_step, _flops, _sharding  # noqa: F401, isort: skip  (once all are registered)

__all__ = ["causal_sgu", "cumulative_mean", "decay_conv", "fft_conv", "gate_loop", "linear_scan",
           "windowed_sgu"]
