"""Draws docs/img/OPERATOR.svg: how much each output step hears of each input step.

    python docs/pictures.py

Every square is computed by the operator's definition: an input of 1 at one step, 0 at all others.
"""

import math
from pathlib import Path

import torch

from fastmix import reference

STEPS, SIDE, LEFT, TOP = 16, 13, 34, 40
POSITIVE, NEGATIVE, EMPTY, INK = "#2563a8", "#d97706", "#eef1f5", "#333"


def impulse(step, *shape):
    """1 at `step`, 0 elsewhere: (1, STEPS, *shape), float64."""
    x = torch.zeros(1, STEPS, *shape, dtype=torch.float64)
    x[:, step] = 1
    return x


def gating(step):
    """[res, gate] whose normed gate is (1, -1) at `step` and 0 elsewhere; res is 1."""
    return torch.cat([torch.ones(1, STEPS, 2, dtype=torch.float64),
                      impulse(step, 2) * torch.tensor([1.0, -1.0])], -1)


TIME = torch.arange(STEPS, dtype=torch.float64)
REAL_GATES = (0.85 + 0.15 * (TIME * 1.7).cos()).index_fill(0, torch.tensor([10]), 0)
COMPLEX_GATES = torch.polar(torch.full_like(TIME, 0.93), 0.35 + 0.1 * (TIME * 1.3).sin())
KERNEL = (-0.12 * TIME).exp() * (0.9 * TIME).cos()
ROWS, COLUMNS = TIME[:, None], torch.arange(2 * STEPS, dtype=torch.float64)
WEIGHT = (1 + 2.3 * ROWS + 0.8 * COLUMNS + 0.35 * ROWS * COLUMNS).cos()
NO_BIAS = torch.zeros(1, STEPS, dtype=torch.float64)
ONES = torch.ones(1, STEPS, 1, 1, dtype=torch.float64)

# What one input step leaves in all outputs.
COLUMN = {
    "linear_scan": lambda j: reference.linear_scan(REAL_GATES[None], impulse(j)),
    "gate_loop": lambda j: reference.gate_loop(ONES, ONES, impulse(j, 1, 1),
                                               COMPLEX_GATES[None, :, None]),
    "decay_conv": lambda j: reference.decay_conv(impulse(j, 1, 1),
                                                 torch.tensor([0.75], dtype=torch.float64)),
    "fft_conv": lambda j: reference.fft_conv(impulse(j, 1, 1), KERNEL[:, None]),
    "windowed_sgu": lambda j: reference.windowed_sgu(
        gating(j), WEIGHT[None, :4, :8], NO_BIAS[:, :4], eps=1e-12)[..., 0],
    "causal_sgu": lambda j: reference.causal_sgu(
        gating(j), WEIGHT[None, :, :STEPS], NO_BIAS, eps=1e-12)[..., 0],
    "cumulative_mean": lambda j: reference.cumulative_mean(impulse(j)),
}


def picture(operator):
    """The SVG: a row of squares for each output step, a square for each input step."""
    weights = torch.stack([COLUMN[operator](j).flatten() for j in range(STEPS)], 1)
    weights = weights / weights.abs().max()
    side = STEPS * SIDE
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + side + 14}" '
        f'height="{TOP + side + 14}" font-family="sans-serif" font-size="12" fill="{INK}">',
        '<rect width="100%" height="100%" rx="6" fill="#fff"/>',
        f'<text x="{LEFT}" y="{TOP - 12}">input step →</text>',
        f'<text transform="translate({LEFT - 12} {TOP}) rotate(90)">output step →</text>',
        f'<rect x="{LEFT}" y="{TOP}" width="{side - 1}" height="{side - 1}" fill="{EMPTY}"/>']
    for t in range(STEPS):
        for j in range(STEPS):
            weight = weights[t, j].item()
            opacity = math.sqrt(abs(weight))  # so that small weights are seen too
            if opacity >= 0.05:
                lines.append(
                    f'<rect x="{LEFT + j * SIDE}" y="{TOP + t * SIDE}" width="{SIDE - 1}" '
                    f'height="{SIDE - 1}" fill-opacity="{opacity:.2f}" '
                    f'fill="{POSITIVE if weight > 0 else NEGATIVE}"/>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    for name in COLUMN:
        (Path(__file__).parent / "img" / f"{name}.svg").write_text(picture(name), "utf-8")
