"""Compiles the Triton kernels for GPUs, without one: a program of its own, since tests interpret them."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from proard.kernels import fused_maps, fused_norm, fused_product

HALF, FLOAT, NUMBER = "*bf16", "*fp32", "i32"
SIZES = dict.fromkeys(("rows", "units", "channel_units", "depth_units", "column_units", "stride_units"), NUMBER)
SIZES |= {"chunk_rows": NUMBER, "chunks": NUMBER, "eps": "fp32"}
NORM = {**dict.fromkeys(("x", "y", "dy", "dx", "side", "dside"), HALF), **SIZES}
NORM |= dict.fromkeys(("sums", "scale", "shift", "mean", "var", "mean_out", "var_out", "dscale", "dshift"), FLOAT)
PRODUCT = dict.fromkeys(("x", "weight", "bias", "side", "before", "out"), HALF)
PRODUCT |= SIZES
PASS = {**dict.fromkeys(("x", "bias", "side", "gradient", "before"), HALF), **SIZES}
TILE = {"ROWS": 128, "COLUMNS": 32}
KERNELS = [
    (fused_maps._finish, PASS, {"HAS_BIAS": True, "HAS_SIDE": True, "KIND": 3, "BLOCK": 256}),
    (fused_maps._slope, PASS, {"HAS_SIDE": True, "KIND": 4, "BLOCK": 256}),
    (fused_norm._norm_sums, NORM, TILE),
    (fused_norm._norm_apply, NORM, {"HAS_SIDE": True, "KIND": 1, **TILE}),
    (fused_norm._norm_slope_sums, NORM, {"FROM_OUTPUT": True, "KIND": 1, **TILE}),
    (fused_norm._norm_gradient, NORM, {"HAS_SIDE": True, "KIND": 1, **TILE}),
    (
        fused_product._product,
        PRODUCT,
        {"HAS_BIAS": True, "HAS_SIDE": True, "KIND": 1, "SLOPE": 1, "EVEN": True}
        | {"TURNED": False, "ROWS": 128, "COLUMNS": 128, "DEPTH": 64},
    ),
]


def shared_memory(capabilities: tuple[int, ...] = (80, 90)) -> dict[str, int]:
    """Bytes of shared memory of a program, by kernel and compute capability."""
    found = {}
    for capability in capabilities:
        for kernel, types, constants in KERNELS:
            names = kernel.arg_names
            signature = {name: "constexpr" if name in constants else types[name] for name in names}
            source = ASTSource(
                fn=kernel,
                signature=signature,
                constexprs={(names.index(name),): value for name, value in constants.items()},
                attrs={
                    (index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if signature[name][0] == "*"
                },
            )
            target = GPUTarget("cuda", capability, 32)
            made = triton.compile(source, target=target, options={"num_warps": 8, "num_stages": 3})
            found[f"{kernel.fn.__name__} {capability}"] = made.metadata.shared
    return found
