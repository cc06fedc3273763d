"""Takes the place of the package metaformer-gpt (0.0.5), its submodules included."""

from fastmix.nn.metaformer_gpt.autoregressive_wrapper import (
    AutoregressiveWrapper as AutoregressiveWrapper,
)
from fastmix.nn.metaformer_gpt.metaformer_gpt import (
    FeedForward,
    MeanCenteringPool,
    MetaformerGPT,
    MultiheadExponentialTimeDecay,
    conv1d_fft,
    cummean,
)

__all__ = ["cummean", "conv1d_fft", "MeanCenteringPool", "MultiheadExponentialTimeDecay",
           "FeedForward", "MetaformerGPT"]
