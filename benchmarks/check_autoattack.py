"""Standard AutoAttack on an exported student, by its pt2 file and the package pyautoattack alone.

Nothing of the package that exported the student is imported. The images are those of `prepare_data/test.safetensors`.
With a table of the stage `autoattack_student` (made with `attack_all: true`) the outcomes are compared image by image.

    python benchmarks/check_autoattack.py results/RUN/export_student/BUDGET/student.pt2 \
        results/RUN/prepare_data/test.safetensors --table results/RUN/autoattack_student/BUDGET/table.parquet
"""

from __future__ import annotations

import argparse
import json
import time

import pyarrow.parquet as pq
import pyautoattack
import torch
from safetensors.torch import load_file

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")  # version `standard`
NORMS = {"linf": "Linf", "l2": "L2"}


def main() -> None:
    """Attack, print the accuracies, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", metavar="student.pt2")
    parser.add_argument("images", metavar="test.safetensors")
    parser.add_argument("--num-images", type=int, help="the first images of the file (default: all)")
    parser.add_argument("--block-size", type=int, default=250, help="images attacked together (default 250)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--table", metavar="table.parquet", help="outcomes to compare with")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    about = {"proard.json": ""}
    student = torch.export.load(arguments.student, extra_files=about).module()
    threat = json.loads(about["proard.json"])["threat"]
    stored = load_file(arguments.images)
    images = stored["images"][: arguments.num_images].permute(0, 3, 1, 2).float().div(255).contiguous()
    labels = stored["labels"][: arguments.num_images]

    started, robust, after = time.monotonic(), torch.zeros(len(images), dtype=torch.bool), {}
    for block, first in enumerate(range(0, len(images), arguments.block_size)):
        part = slice(first, first + arguments.block_size)
        with torch.no_grad():
            standing = student(images[part]).argmax(1) == labels[part]
        after.setdefault("clean", []).append(standing.clone())
        for place, name in enumerate(ATTACKS):
            index = standing.nonzero()[:, 0]
            if len(index):
                seed = 1000 * arguments.seed + len(ATTACKS) * block + place
                x, y = images[part][index], labels[part][index]
                adversary = pyautoattack.AutoAttack(student, norm=NORMS[threat["norm"]], eps=threat["eps"], seed=seed)
                adversary.attacks_to_run = [name]
                classes = student(x[:1]).shape[1]
                adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = min(9, classes - 1)
                adv, _ = adversary.run_standard_evaluation(x, y, batch_size=len(x))
                with torch.no_grad():
                    standing[index] = student(adv).argmax(1) == y
            after.setdefault(name, []).append(standing.clone())
        robust[part] = standing
    outcomes = {name: torch.cat(parts) for name, parts in after.items()}
    shown = ", ".join(f"{name} {mask.double().mean():.2%}" for name, mask in outcomes.items())
    print(f"{len(images)} images, {threat['norm']} {threat['eps']:g}: {shown}; {time.monotonic() - started:.0f} s")
    if arguments.table:
        compare(arguments.table, outcomes)


def compare(path: str, outcomes: dict[str, torch.Tensor]) -> None:
    """Count the images whose outcomes differ from those of a table; end with status 1 if there are any."""
    differ = {}
    for row in pq.read_table(path).to_pylist():
        if row["attack"] in outcomes:
            differ[row["attack"]] = int((torch.tensor(row["robust"]) != outcomes[row["attack"]]).sum())
    print(f"images with another outcome than in {path}: {differ}")
    if any(differ.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
