"""The operators in pure PyTorch, for any device torch knows.

One file per operator, each with two functions. `forward` is made of differentiable
torch calls only, so autograd of any order and every `torch.func` transform pass
through it. `backward` is the first-order gradient, written out to save memory; it
conjugates with `torch.conj_physical`, because a compiled program runs operators where the
lazy `.conj()` has no effect. gate_loop and fft_conv have a third, `decomposed`, which
`fastmix.decompose` puts into programs: what runtimes have no complex numbers for, in real ones.
"""
