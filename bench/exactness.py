"""How far a result is from float64, and how far it may be.

The truth is `fastmix.reference` in float64, on the same (rounded) inputs. Causal operators
with independent channels allow a sample: the first time steps and the last channels or
heads of the full-size result equal the result on those inputs alone, and so do its
gradients once the incoming gradient is zero elsewhere.
"""

import torch

from fastmix import reference


class Exam:
    """Holds `errors(…)` of any implementation of `case` against `limits`: twice the errors of
    the reference in the same dtype (the half types with float32 sums), plus a rounding floor."""

    def __init__(self, case, inputs):
        self.case = case
        self.inputs = inputs
        n = inputs[0].shape[1]
        self.steps = {"values": min(n, case.value_steps), "gradients": min(n, case.gradient_steps)}
        self.incoming = None
        self.truth = self._answer(torch.float64)
        half = inputs[0].dtype.itemsize < 4
        plain = self._answer(torch.float32 if half else inputs[0].dtype.to_real())
        if half:
            plain = {name: [t.to(inputs[0].dtype) for t in plain[name]] for name in plain}
        floor = max((2 if half else 4) * torch.finfo(inputs[0].dtype).eps, 1e-12)
        self.limits = {name: 2 * relative(plain[name], self.truth[name]) + floor for name in plain}

    def errors(self, step):
        """{"values": …, "gradients": …} of a step on the exam's inputs: max abs difference /
        max abs truth, the worst of all tensors."""
        incoming = torch.zeros_like(step.incoming)
        self._part(incoming, self.case.output, "gradients").copy_(self.incoming)
        values, gradients = step.run(incoming)
        if not all(t.isfinite().all() for t in (values, *gradients)):
            return {"values": float("nan"), "gradients": float("nan")}
        answer = {
            "values": [self._part(values.detach(), self.case.output, "values")],
            "gradients": [self._part(g, axes, "gradients")
                          for g, (axes, _) in zip(gradients, self.case.inputs.values())]}
        return {name: relative(answer[name], self.truth[name]) for name in answer}

    def _answer(self, dtype):
        """The reference in `dtype`, on the sample."""
        with torch.no_grad():
            values = self.case.call(reference, *self._sample("values", dtype))
        leaves = [t.requires_grad_() for t in self._sample("gradients", dtype)]
        out = self.case.call(reference, *leaves)
        if self.incoming is None:
            self.incoming = torch.randn_like(out).to(self.inputs[0].dtype)
        gradients = torch.autograd.grad(out, leaves, self.incoming.to(out.dtype))
        return {"values": [values], "gradients": list(gradients)}

    def _sample(self, name, dtype):
        parts = [self._part(t.detach(), axes, name)
                 for t, (axes, _) in zip(self.inputs, self.case.inputs.values())]
        return [t.to(dtype.to_complex() if t.is_complex() else dtype) for t in parts]

    def _part(self, tensor, axes, name):
        index = []
        for axis in axes.split():
            if axis == "n":
                index.append(slice(self.steps[name]))
            else:
                index.append(slice(-self.case.sample.get(axis, 0), None))
        return tensor[tuple(index)]


def relative(tensors, truths):
    errors = []
    for tensor, truth in zip(tensors, truths):
        scale = truth.abs().max()
        errors.append((tensor.to(truth.dtype) - truth).abs().max() / scale.where(scale > 0, 1))
    return torch.stack(errors).max().item()  # NaN if any is NaN


def within(errors, limits):
    return all(errors[name] <= limits[name] for name in limits)
