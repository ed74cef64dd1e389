"""The fused kernels of an attack step, in Triton. Imported only if a GPU, or the interpreter in tests, runs them.

Each kernel reads its inputs once and writes its result once, in one launch; `plain` defines what it computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # pixels per program


@triton.jit
def _pgd_update(adv, gradient, low, high, step_size, size, BLOCK: tl.constexpr):
    """Move `adv` by the gradient's sign and clip it."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    slope = tl.load(gradient + index, mask=inside, other=0.0)
    pixel = tl.load(adv + index, mask=inside, other=0.0)
    pixel += tl.where(slope > 0, step_size, tl.where(slope < 0, -step_size, 0.0))
    lowest, highest = tl.load(low + index, mask=inside, other=0.0), tl.load(high + index, mask=inside, other=0.0)
    pixel = tl.maximum(pixel, lowest, propagate_nan=tl.PropagateNan.ALL)  # as torch.clamp does
    pixel = tl.minimum(pixel, highest, propagate_nan=tl.PropagateNan.ALL)
    tl.store(adv + index, pixel, mask=inside)


@triton.jit
def _softmax_difference(out, logits, target, classes, LABELS: tl.constexpr, BLOCK: tl.constexpr):
    """One image per program: softmax of its logits minus its target row, or minus 1 at its label if LABELS."""
    image = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < classes
    place = image * classes + column
    logit = tl.load(logits + place, mask=inside, other=-float("inf")).to(tl.float32)
    power = tl.exp(logit - tl.max(logit, 0))
    share = power / tl.sum(power, 0)
    if LABELS:
        wanted = tl.where(column == tl.load(target + image), 1.0, 0.0)
    else:
        wanted = tl.load(target + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (share - wanted).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key", "first", "stream", "numbers", "blocks", "size"])
def _philox_uniform(out, key, first, stream, numbers, blocks, size, BLOCK: tl.constexpr):
    """Four numbers per lane: those of one counter."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < size
    image = lane // blocks
    block = lane % blocks
    zero = tl.zeros((BLOCK,), tl.uint32)
    counter = (block.to(tl.uint32), (image + first).to(tl.uint32), zero + stream.to(tl.uint32), zero)
    a, b, c, d = tl.philox(key, counter[0], counter[1], counter[2], counter[3])
    base = out + image * numbers
    for place in tl.static_range(4):
        word = a if place == 0 else b if place == 1 else c if place == 2 else d
        index = block * 4 + place
        number = (word >> 8).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)
        tl.store(base + index, number, mask=inside & (index < numbers))


def pgd_update_(adv: Tensor, gradient: Tensor, low: Tensor, high: Tensor, *, step_size: float) -> Tensor:
    """`plain.pgd_update_` in one launch, for tensors accepted by `fits`; `gradient` is not changed."""
    size = adv.numel()
    _pgd_update[(triton.cdiv(size, BLOCK),)](adv, gradient, low, high, step_size, size, BLOCK=BLOCK)
    return adv


def softmax_difference(logits: Tensor, target: Tensor) -> Tensor:
    """`plain.softmax_difference` in one launch, for all floating types except float64."""
    logits, target = logits.contiguous(), target.contiguous()
    images, classes = logits.shape
    out = torch.empty_like(logits)
    _softmax_difference[(images,)](
        out,
        logits,
        target,
        classes,
        LABELS=not target.dtype.is_floating_point,
        BLOCK=triton.next_power_of_2(classes),
    )
    return out


def philox_uniform(shape: Sequence[int], key: int, first: int, stream: int, device: torch.device) -> Tensor:
    """`noise.plain_uniform` in one launch."""
    out = torch.empty(*shape, device=device)
    numbers = out[0].numel()
    blocks = triton.cdiv(numbers, 4)
    size = len(out) * blocks
    _philox_uniform[(triton.cdiv(size, BLOCK),)](out, key, first, stream, numbers, blocks, size, BLOCK=BLOCK)
    return out


def fits(adv: Tensor, *others: Tensor) -> bool:
    """Whether tensors are float32 with the same dense memory layout, so that one index is valid for all."""
    dense = adv.is_contiguous() or adv.is_contiguous(memory_format=torch.channels_last)
    return dense and all(x.dtype is torch.float32 and x.stride() == adv.stride() for x in (adv, *others))
