"""Calls that are done by a plan, on a fake libcuda, in a process where Triton is not interpreted: planned.py, repeated.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_plans_launch_what_the_whole_way_launches(tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so.1"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-w", "-shared", "-fPIC", "-o", library, HERE / "fake_libcuda.c"], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment |= {"LD_LIBRARY_PATH": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path), "PYTHONPATH": str(HERE)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        HERE / "planned.py",
        HERE / "repeated.py",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 30, "the tests were found"
