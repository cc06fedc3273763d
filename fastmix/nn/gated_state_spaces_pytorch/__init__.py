"""Takes the place of the package gated-state-spaces-pytorch (0.1.0), its submodules included."""

from fastmix.nn.gated_state_spaces_pytorch import dsconv, gss, mhesa
from fastmix.nn.gated_state_spaces_pytorch.autoregressive_wrapper import AutoregressiveWrapper
from fastmix.nn.gated_state_spaces_pytorch.dsconv import GatedDsConv, GatedDsConvLM
from fastmix.nn.gated_state_spaces_pytorch.gss import GSS, GatedStateSpacesLM
from fastmix.nn.gated_state_spaces_pytorch.mhesa import GatedExponentialSmoothingLM, GatedMHESA

__all__ = ["GatedDsConv", "GatedDsConvLM", "GatedExponentialSmoothingLM", "GatedMHESA",
           "GSS", "GatedStateSpacesLM", "AutoregressiveWrapper", "dsconv", "gss", "mhesa"]
