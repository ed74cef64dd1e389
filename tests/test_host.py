"""No system is assumed: no home folder, no password entry, no UTF-8, no compiler of one kind."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_config

from proard import host
from proard.config import job_settings
from proard.kernels import compiled
from proard.stages import common, sample_archs

ROOT = Path(__file__).parents[1]


def test_cores_are_counted_where_the_system_does_not_limit_them(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert host.usable_cores() == 3
    settings = job_settings(tiny_config(), "sample_archs")
    argv = ["--settings", settings, "--device", "cpu", "--archs", str(tmp_path / "archs.parquet")]
    job = common.parse_arguments(sample_archs.__doc__, argv, stage="sample_archs", writes=["archs"])
    assert job.threads == 3


def test_output_replaces_what_its_encoding_lacks():
    written = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(written, encoding="ascii")) as output:
        host.take_any_character()
        print("50 % · robust █")
    output.flush()
    assert written.getvalue() == b"50 % ? robust ?\n"


def test_a_program_runs_in_a_c_locale_without_a_home_folder(tmp_path):
    """Also as a user without password entry, if the system allows a change of user."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LC_ALL": "C"}
    environment |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TMPDIR": str(tmp_path)}
    code = "from proard.stages.common import run; from proard.kernels.compiled import maps_library as library\n"
    code += "run(lambda: print(chr(183), library() is not None, flush=True))"
    command = [sys.executable, "-c", code]
    other = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    if shutil.which("unshare") and not subprocess.run([*other, "true"], capture_output=True, check=False).returncode:
        command = [*other, *command]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="ascii", check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"? {shutil.which('cc') is not None}\n"


def test_without_a_home_folder_kernels_are_kept_in_a_folder_of_the_users_own(tmp_path):
    folder = compiled.private_folder(tmp_path)
    assert folder == compiled.private_folder(tmp_path)
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)  # others could put a library there
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        compiled.private_folder(tmp_path)


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_compiler_that_does_not_know_the_processors_flag_is_asked_otherwise(monkeypatch, tmp_path):
    """As Apple's for Arm, which takes -mcpu=native, or none of both."""
    source, asked, compiler = tmp_path / "one.c", tmp_path / "asked", tmp_path / "cc-of-another-kind"
    source.write_text("int one(void) { return 1; }")
    compiler.write_text(f'#!/bin/sh\necho "$@" >>{asked}\ncase "$*" in *=native*) exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)  # the processor's own flag is asked for only without it
    assert compiled.build(source).exists()
    assert ["-march" in line or "-mcpu" in line for line in asked.read_text().splitlines()] == [True, True, False]
