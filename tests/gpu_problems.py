"""A small problem of the GPU benchmark, on the CPU."""

from __future__ import annotations

import torch


def small_problem():
    import plain_step
    import step_rows

    return step_rows.make_problem(
        step_rows.scaled_space("resnet_digits", 0.5),
        recipe=plain_step.Recipe(num_steps=2),
        num_archs=2,
        batch_size=4,
        dtype=torch.float32,
    )
