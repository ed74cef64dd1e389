"""Compile an exported program for an Ethos-U and print Vela's report; it runs in an environment of its own.

    python estimate.py PROGRAM.pt2 TARGET

The last line is JSON: versions, and the operators that the NPU does not run.
"""

from __future__ import annotations

import json
import operator
import re
import sys
from importlib.metadata import version

import torch
from executorch.backends.arm.ethosu import EthosUCompileSpec, EthosUPartitioner
from executorch.backends.arm.quantizer import EthosUQuantizer, get_symmetric_quantization_config
from executorch.exir import to_edge_transform_and_lower
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

CALIBRATION_IMAGES = 16
AT_THE_BORDER = (["quantize_per_tensor"], ["dequantize_per_tensor"])  # of the input and the output: the NPU gets int8


def main(program: str, target: str) -> None:
    """Quantise with ranges of random images, on which neither memory nor cycles depend, and compile.

    Parameters
    ----------
    program : str
        A torch.export archive: float32 images in [0, 1] of shape (1, channels, height, width) to logits.
    target : str
        Such as ethos-u55-128.
    """
    module = torch.export.load(program).module(check_guards=False)
    (images,) = module.graph.find_nodes(op="placeholder")
    image = torch.zeros(images.meta["val"].shape)
    spec = EthosUCompileSpec(target=target, extra_flags=["--verbose-cycle-estimate"])
    quantizer = EthosUQuantizer(spec)
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(module, quantizer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(CALIBRATION_IMAGES):
            prepared(torch.rand(image.shape, generator=generator))
    quantised = torch.export.export(convert_pt2e(prepared), (image,), strict=False)
    lowered = to_edge_transform_and_lower(quantised, partitioner=[EthosUPartitioner(spec)])
    targets = [node.target for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
    others = [str(each) for each in targets if each != operator.getitem and not str(each).endswith("call_delegate")]
    names = {found[0] if (found := re.search(r"\w+(\.\w+)+", each)) else each for each in others}
    left = sorted(name for name in names if name.split(".")[1:2] not in AT_THE_BORDER)
    versions = {name: version(package) for name, package in (("vela", "ethos-u-vela"), ("executorch", "executorch"))}
    print(json.dumps({**versions, "torch": torch.__version__, "undelegated": left}))


if __name__ == "__main__":
    main(*sys.argv[1:])
