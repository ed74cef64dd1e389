"""Memory of activations: by liveness and as onnxruntime places them, counted by hand and measured on the runtime."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import TINY, tiny_space

from proard.config import PRESETS, UserError
from proard.latency.graphs import onnx_file, random_weights
from proard.space import Part, SearchSpace, parse_budget
from proard.space.memory import arena, peak
from proard.space.parts import Node
from proard.space.sampling import identity_columns
from proard.stages.select_student import arena_of, under_budget, with_costs

MEASURE = """
import sys
import numpy as np
import onnxruntime as ort

ort.set_default_logger_severity(0)
memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, 1, -1, -1))  # extended by what is requested, no more
for path in sys.argv[1:]:
    options, run = ort.SessionOptions(), ort.RunOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # no padded channels
    options.add_session_config_entry("session.use_env_allocators", "1")
    run.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    images = np.random.rand(1, *session.get_inputs()[0].shape[1:]).astype(np.float32)
    for number in range(2):
        print("RUN", number, file=sys.stderr, flush=True)
        session.run(None, {"images": images}, run)
"""


def measured_arenas(*paths: Path) -> list[int]:
    """The block in which onnxruntime holds all activations, planned in a first run and allocated in the second."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, paths)], check=True, capture_output=True, text=True)
    return [
        int(re.findall(r"\(requested\) num_bytes: (\d+)", text.split("RUN 0")[0])[0])
        for text in done.stderr.split("RUN 1")[1:]
    ]


@pytest.mark.parametrize("name", ["resnet_digits", "resnet_micro", "mobilenet_micro", "resnet_micro_silu"])
def test_the_placed_activations_fill_the_arena_of_onnxruntime(name: str, tmp_path: Path):
    space = SearchSpace(PRESETS[name])
    drawn = [space.arch(genotype) for genotype in space.sample(3, np.random.default_rng(0))]
    parts = [Part.whole(space.spec(arch)) for arch in (space.smallest, space.largest, *drawn)]
    files = [tmp_path / f"{number}.onnx" for number in range(len(parts))]
    for part, path in zip(parts, files, strict=True):
        path.write_bytes(onnx_file(part, random_weights(0)))
    found = measured_arenas(*files)
    np.testing.assert_allclose([part.arena for part in parts], found, rtol=0.1)
    assert all(peak(part.nodes, 0) <= block for part, block in zip(parts, found, strict=True))


def node(kind: str, reads: str, output: str, *shape: int) -> Node:
    return Node(kind, tuple(reads), output, shape)


def test_peak_memory_of_graphs_counted_by_hand():
    chain = [Node("Conv", ("images",), "a", (100,)), node("Relu", "a", "b", 100), node("Conv", "b", "c", 50)]
    assert peak(chain, 40) == 4 * 150  # Relu in place
    assert peak([*chain, node("Add", "ca", "d", 50)], 40) == 4 * 250  # a is read later: Relu has a map of its own
    block = [node("Conv", "x", "a", 10), node("Conv", "a", "b", 30), node("Add", "bx", "c", 30)]
    block = [Node("Conv", ("images",), "x", (30,)), *block]
    assert peak(block, 4 * 20) == 4 * 70  # x, a and b; the sum is written over b or x
    assert peak(block, 4 * 60) == 4 * 90  # image and x


def test_placed_memory_of_graphs_counted_by_hand():
    first, last = Node("Conv", ("images",), "a", (64,)), node("Conv", "z", "logits", 1)
    assert arena([first, node("Relu", "a", "z", 64), last]) == 256  # Relu in place
    assert arena([first, node("Conv", "a", "z", 1), last]) == 2 * 256  # every map is aligned
    assert arena([first, node("Conv", "a", "b", 64), node("Conv", "b", "z", 64), last]) == 2 * 256  # a's buffer again
    gated = node("HardSwish", "a", "z", 64)
    assert arena([first, gated, last]) == 3 * 256  # input, gate and their product are three maps
    # b (512 bytes) is not needed between its readers, but d, of equal shape, takes its buffer: c cannot.
    kept = [node("Conv", "a", "b", 128), node("Conv", "b", "c", 192), node("Conv", "c", "d", 128)]
    assert arena([first, *kept, node("Conv", "d", "z", 64), last]) == 256 + 512 + 768
    # Freed, a leaves a gap that is too small for d but holds z.
    gap = [node("Conv", "a", "b", 32, 4), node("Conv", "b", "c", 64, 4), node("Conv", "bc", "d", 96)]
    assert arena([first, *gap, node("Conv", "cd", "z", 1), last]) == 256 + 512 + 1024 + 512
    # The branch that is listed later is executed first: its large map and b are there at once.
    fork = [node("Conv", "a", "b", 64), node("Conv", "a", "c", 1024), node("Conv", "c", "d", 64)]
    assert arena([first, *fork, node("Add", "bd", "z", 64), last]) == 256 + 4096 + 256


def test_a_limit_on_sram_holds_for_what_the_runtime_places():
    space = tiny_space(TINY)
    genotypes = np.unique(space.sample(60, np.random.default_rng(0)), axis=0)
    order = np.arange(len(genotypes)) / len(genotypes)
    columns = identity_columns(space, genotypes)
    archive = with_costs(pd.DataFrame({**columns, "predicted_clean_acc": order, "predicted_robust_acc": order}), space)
    needed = partial(arena_of, space)
    needs = np.asarray([needed(arch) for arch in archive["arch"]])
    memory = np.maximum(needs, archive["sram"])
    limit = int(np.median(memory))
    assert ((archive["sram"] <= limit) & (memory > limit)).any()  # liveness alone would allow these
    chosen = under_budget(archive, parse_budget(f"sram={limit}"), 4, arena=needed)
    assert chosen["arch"].tolist() == archive["arch"][memory <= limit].tolist()[::-1][:4]
    with pytest.raises(UserError, match=rf"smallest feasible cost is sram={memory.min()} "):
        under_budget(archive, parse_budget(f"sram={archive['sram'].min()}"), 4, arena=needed)
