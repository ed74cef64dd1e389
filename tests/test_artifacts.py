"""Files of a run: atomic writes, checksums, tensors and tables, damaged files, provenance."""

from __future__ import annotations

import json
import os

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from proard.artifacts import (
    HISTORY,
    MEASURED,
    ArtifactError,
    Provenance,
    atomic_path,
    load_tensors,
    read_header,
    read_metadata,
    read_table,
    save_tensors,
    sha256,
    tensors_checksum,
    write_json,
    write_table,
    write_text,
)

SETTINGS = {"run": "tiny", "train": {"lr": 0.1}}


def provenance(*inputs):
    return Provenance.of(stage="train_phase", settings=SETTINGS, seed=3, inputs=inputs)


def tensors():
    return {
        "weight": torch.arange(24.0).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "pixels": torch.arange(6, dtype=torch.uint8).reshape(2, 3)[:, ::2],
    }


# Atomic writing.


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="in the middle"), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the new")
        raise RuntimeError("in the middle")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.txt"]


def test_nothing_stands_under_the_name_before_the_write_is_complete(tmp_path):
    with atomic_path(tmp_path / "new" / "table.txt") as temporary:
        temporary.write_text("half")
        assert [entry.name for entry in temporary.parent.iterdir()] == [temporary.name]
        assert temporary.name.startswith(".")
    assert (tmp_path / "new" / "table.txt").read_text() == "half"


def test_written_files_have_the_permissions_of_ordinary_ones(tmp_path):
    (tmp_path / "ordinary").write_text("")
    write_json(tmp_path / "ours", {"a": 1})
    assert os.stat(tmp_path / "ours").st_mode == os.stat(tmp_path / "ordinary").st_mode
    assert json.loads((tmp_path / "ours").read_text()) == {"a": 1}


def test_checksum_of_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(ArtifactError, match=r"nowhere cannot be read .* rerun the stage that writes it"):
        sha256(tmp_path / "nowhere")


# Tensors.


def test_tensors_survive_a_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors(), kind="teacher", provenance=provenance(), note=[1, "two"])
    loaded, header = load_tensors(path, kind=("student", "teacher"))
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(loaded[name], tensor)
    assert header["note"] == [1, "two"]
    assert header["checksum"] == tensors_checksum(tensors())


def test_checksum_sees_names_shapes_types_and_values_and_nothing_else():
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    changed = [
        {"c": base["a"], "b": base["b"]},
        {**base, "a": base["a"].reshape(3, 2)},
        {**base, "a": base["a"].double()},
        {**base, "a": base["a"] + torch.eye(2, 3) * 1e-6},
        {**base, "b": -base["b"]},
        {"a": base["a"]},
        {"a": base["b"], "b": base["a"]},
    ]
    sums = {tensors_checksum(entry) for entry in [base, *changed]}
    assert len(sums) == len(changed) + 1
    reordered = {"b": base["b"], "a": base["a"].t().contiguous().t().requires_grad_()}
    assert tensors_checksum(reordered) == tensors_checksum(base)


def test_checksum_does_not_depend_on_provenance(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        save_tensors(tmp_path / name, tensors(), kind="teacher", provenance=Provenance("run", "stage", seed=seed))
    assert read_header(tmp_path / "a")["checksum"] == read_header(tmp_path / "b")["checksum"]
    assert sha256(tmp_path / "a") != sha256(tmp_path / "b")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_tensors_are_named(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors(), kind="teacher")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"x.safetensors is truncated .*; delete it and rerun its stage") as caught:
        load_tensors(path, kind="teacher")
    assert "\n" not in str(caught.value)


def test_every_flipped_byte_is_noticed(tmp_path):
    """Damage of header or contents raises the one type of error that stages print in one line."""
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, kind="teacher")
    intact = path.read_bytes()
    for position in range(len(intact)):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 0x04]) + intact[position + 1 :])
        with pytest.raises(ArtifactError):
            load_tensors(path, kind="teacher")


def test_missing_and_foreign_tensors_are_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"x.safetensors does not exist; rerun the stage"):
        load_tensors(tmp_path / "x.safetensors", kind="teacher")
    with pytest.raises(ArtifactError, match="is truncated or no safetensors file"):
        load_tensors(tmp_path, kind="teacher")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
    assert read_header(tmp_path / "foreign.safetensors") == {}
    with pytest.raises(ArtifactError, match="contains 'foreign tensors', expected teacher or control"):
        load_tensors(tmp_path / "foreign.safetensors", kind=("teacher", "control"))


# Tables.


def row(**changes):
    return {"phase": "all", "epoch": 1, "loss": 0.5, "best": True, **changes}


def test_table_survives_a_round_trip_with_units_and_provenance(tmp_path):
    path, source = tmp_path / "history.parquet", tmp_path / "input.txt"
    source.write_text("abc")
    write_table(path, [row(), row(epoch=2, loss=None)], HISTORY, provenance(source))
    frame = read_table(path, columns=["epoch", "val_robust_acc"])
    assert list(frame.columns) == list(HISTORY)
    assert frame.epoch.tolist() == [1, 2]
    assert frame.loss[0] == 0.5
    assert np.isnan(frame.loss[1])
    assert frame.val_robust_acc.isna().all()
    metadata = read_metadata(path)
    assert (metadata["run"], metadata["stage"], metadata["seed"]) == ("tiny", "train_phase", 3)
    assert metadata["settings"] == SETTINGS
    assert metadata["inputs"] == {"input.txt": sha256(source)}
    assert metadata["units"]["lr"] == HISTORY["lr"][1]


def test_inputs_of_one_name_are_all_in_the_provenance(tmp_path):
    paths = [tmp_path / shard / "table.parquet" for shard in ("0000-0049", "0050-0099")]
    for path in (*paths, tmp_path / "archs.parquet"):
        write_text(path, path.parent.name)
    inputs = provenance(*paths, tmp_path / "archs.parquet").inputs
    assert list(inputs) == ["0000-0049/table.parquet", "0050-0099/table.parquet", "archs.parquet"]
    assert len(set(inputs.values())) == 3


def test_lists_and_integers_keep_their_types(tmp_path):
    path = tmp_path / "table.parquet"
    write_table(path, [{"genotype": [1, 2], "macs": 2**40, "arch_id": "ab"}], MEASURED, provenance())
    frame = read_table(path)
    assert frame.genotype[0].tolist() == [1, 2]
    assert (frame.macs[0], frame.macs.dtype) == (2**40, np.int64)


def test_empty_table_keeps_its_columns(tmp_path):
    write_table(tmp_path / "empty.parquet", [], HISTORY, provenance())
    frame = read_table(tmp_path / "empty.parquet")
    assert (len(frame), list(frame.columns)) == (0, list(HISTORY))


def test_foreign_columns_and_wrong_types_are_refused_and_write_nothing(tmp_path):
    path = tmp_path / "table.parquet"
    with pytest.raises(ValueError, match=r"columns \['losss'\] do not belong to this table"):
        write_table(path, [row(losss=1)], HISTORY, provenance())
    with pytest.raises(ValueError, match="one"):
        write_table(path, [row(epoch="one")], HISTORY, provenance())
    assert not list(tmp_path.iterdir())


def test_damaged_and_missing_tables_are_named(tmp_path):
    path = tmp_path / "table.parquet"
    with pytest.raises(ArtifactError, match=r"table.parquet does not exist; rerun the stage"):
        read_table(path)
    write_table(path, [row(loss=float(index)) for index in range(200)], HISTORY, provenance())
    intact = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(0).column(list(HISTORY).index("loss"))
    values = column.data_page_offset + column.total_compressed_size // 2
    flipped = intact[:values] + bytes([intact[values] ^ 1]) + intact[values + 1 :]
    for damaged in (b"", intact[:50], intact[:-20], b"x" * 500, flipped):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"table.parquet is no readable Parquet table .*delete it") as caught:
            read_table(path)
        assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_a_table_is_noticed_or_changes_nothing(tmp_path):
    """After damage anywhere, reading gives the written data or an error of the one type."""
    path = tmp_path / "table.parquet"
    write_table(path, [row(epoch=index, loss=index / 7) for index in range(9)], HISTORY, provenance())
    intact, frame = path.read_bytes(), read_table(path)
    refused = 0
    for position in range(0, len(intact), 3):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 0x04]) + intact[position + 1 :])
        try:
            found = read_table(path)
        except ArtifactError:
            refused += 1
        else:
            pd.testing.assert_frame_equal(found, frame)
    assert refused > len(intact) / 6


def test_tables_of_earlier_versions_have_no_checksum(tmp_path):
    path = tmp_path / "table.parquet"
    write_table(path, [row()], HISTORY, provenance())
    frame, table = read_table(path), pq.read_table(path)
    metadata = {name: value for name, value in table.schema.metadata.items() if name != b"checksum"}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    pd.testing.assert_frame_equal(read_table(path), frame)


def test_table_of_another_kind_lacks_columns(tmp_path):
    write_table(tmp_path / "table.parquet", [row()], HISTORY, provenance())
    with pytest.raises(ArtifactError, match=r"table.parquet lacks the columns \['robust_acc'\]"):
        read_table(tmp_path / "table.parquet", columns=["epoch", "robust_acc"])
