"""Every fused kernel against its plain twin on the shapes that networks and attacks use it with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from gpu_checks import Wrong
from gpu_run import Row, printed

from proard.kernels import dispatch, plain

# (batch, channels, height, width): odd channel counts and sides, the widest maps, one image and many
UPDATES = (
    (1, 1, 8, 8),
    (1, 3, 32, 32),
    (7, 5, 17, 19),
    (1024, 3, 32, 32),
    (1, 3, 224, 224),
    (1024, 1, 224, 224),
)
BATCHES, CLASSES = (1, 1024), (1, 2, 7, 10, 100, 101, 1000, 1001)
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8}  # of a softmax difference


def proof_rows(name: str, device: torch.device, kernels: ModuleType | None = None) -> list[Row]:
    """Rows of a kernel's proof, printed as a table.

    Parameters
    ----------
    name : str
        One of `PROOFS`.
    kernels : module, optional
        Holds the kernels; by default those that serve the device.

    Raises
    ------
    Wrong
        The kernel differs from its twin, or does not run here.
    """
    kernels = kernels or dispatch.fused_for(device)
    if kernels is None:
        raise Wrong(f"the fused kernels do not run on {device}; the warning above says why")
    rows: list[Row] = []
    try:
        for shape, difference, limit in PROOFS[name](kernels, device):
            rows.append({"bench": "gpu_proofs", "row": name, "lever": shape, "difference": difference})
            if not difference <= limit:
                raise Wrong(f"{name} differs from its plain twin by {difference:.2g} on {shape}")
    finally:
        if rows:
            printed(f"{name} against its plain twin", rows, {"difference": "largest difference"})
    return rows


def updates(kernels: ModuleType, device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Shape, largest difference and what it may be: none, as both twins compute the same numbers."""
    for shape in UPDATES:
        for layout in (torch.channels_last, torch.contiguous_format):
            generator = torch.Generator(device).manual_seed(0)
            images = torch.rand(shape, generator=generator, device=device).contiguous(memory_format=layout)
            gradient = torch.randn(shape, generator=generator, device=device).contiguous(memory_format=layout)
            low, high = (images - 0.03).clamp_(min=0), (images + 0.03).clamp_(max=1)
            given = (images, gradient, low, high)
            if not kernels.fits(*given):
                raise Wrong(f"the fused update does not take images of shape {shape}")
            own = kernels.pgd_update_(images.clone(), gradient, low, high, step_size=2 / 255)
            twin = plain.pgd_update_(images, gradient, low, high, step_size=2 / 255)
            yield f"{shape} {str(layout).removeprefix('torch.')}", float((own - twin).abs().max()), 0.0


def softmax_differences(kernels: ModuleType, device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Shape, largest difference and what it may be by rounding."""
    for number in CLASSES:
        for batch in BATCHES:
            for dtype, limit in ROUNDING.items():
                generator = torch.Generator(device).manual_seed(0)
                logits = (10 * torch.randn((batch, number), generator=generator, device=device)).to(dtype)
                labels = torch.arange(batch, device=device) % number
                largest = 0.0
                for target in (labels, logits.float().flip(1).softmax(1)):
                    pair = [twin.softmax_difference(logits, target).float() for twin in (kernels, plain)]
                    largest = max(largest, float((pair[0] - pair[1]).abs().max()))
                yield f"{(batch, number)} {str(dtype).removeprefix('torch.')}", largest, limit


Proof = Callable[[ModuleType, torch.device], Iterator[tuple[str, float, float]]]
PROOFS: dict[str, Proof] = {"pgd_update_": updates, "softmax_difference": softmax_differences}
