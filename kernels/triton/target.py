"""What kernels are compiled for, and what they are told about its registers."""

import torch
import triton

from fastmix._triton import interpreted


def arch():
    """The compute capability, 90 for 9.0; 0 where there is none: on AMD, in the interpreter."""
    if interpreted():
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def is_amd():
    return not interpreted() and (
        triton.runtime.driver.active.get_current_target().backend == "hip")


def float32_precision():
    """How products of float32 operands are formed: torch's own switch."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def registers(most):
    """The option that lets ptxas take `most` registers: left to itself it may aim at fewer, for
    one more program on a multiprocessor, and spill."""
    return dict(maxnreg=most) if arch() else {}
