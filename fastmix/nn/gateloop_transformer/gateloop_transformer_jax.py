"""In the place of `gateloop_transformer.gateloop_transformer_jax`, which is made of jax."""

raise ImportError(
    f"{__name__}: fastmix is made of PyTorch and has no twin of this module, which is made of jax "
    "and equinox: import it from gateloop_transformer, or fastmix.nn.GateLoopTransformer, the "
    "same model in PyTorch", name=__name__)
