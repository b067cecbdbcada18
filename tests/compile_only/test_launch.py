"""Every argument of every kernel passes Triton's own launcher, without a GPU: nested tuples, None, empty tuples, constants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run(script: str, tmp_path: Path) -> str:
    """What a script prints in a process of its own, with a fake libcuda beneath Triton's launcher."""
    library = tmp_path / "libcuda.so.1"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-w", "-shared", "-fPIC", "-o", library, HERE / "fake_libcuda.c"], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment |= {"LD_LIBRARY_PATH": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    environment["FLEXATTN_CACHE_DIR"] = str(tmp_path / "tuned")
    done = subprocess.run(
        [sys.executable, HERE / script], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_are_launched_with_their_operands(tmp_path: Path) -> None:
    printed = run("launches.py", tmp_path)
    cases = [part.splitlines() for part in printed.split("case ")[1:]]
    assert [lines[0].split()[0] for lines in cases] == ["plain", "float32", "listed", "learned", "hopper", "tiles"]
    for head, *lines in cases:
        name, query = head.split()
        launches = [list(map(int, line.split()[1:])) for line in lines if line.startswith("launch")]
        # forward, delta, dQ, dK/dV
        own = [name != "hopper", False, True, True]  # there it is a descriptor
        assert all(y == z == 1 for _, y, z, _, _ in launches), "grids have one dimension"
        # The first parameter of all but delta is the query; tiles of 128 or less, 2 batch entries and 4 heads.
        assert [pointer == int(query) for *_, pointer in launches] == own, (name, lines)
        assert launches[0][0] % 8 == 0 and launches[0][0] >= 3 * 8
    loaded = [line for line in printed.splitlines() if line.startswith("load ")]
    assert any("attention_forward_hopper_mask_mod_" in line for line in loaded)
    assert any("score_mod_" in line and "row_grads_" in line for line in loaded), "variants have names of their own"


def test_tuned_kernels_are_compiled_and_launched_as_what_was_fastest(tmp_path: Path) -> None:
    records = [json.loads(line) for line in run("autotuned.py", tmp_path).splitlines() if line.startswith("{")]
    first, second, *entries = records
    best = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 4, "tma": False, "overlap": False}
    expected = {"forward": best, "dq": {**best, "num_stages": 1}, "dkdv": {**best, "num_stages": 1}}
    assert len(first["runs"]) > len(second["runs"]) == 3, "the second call times nothing"
    final = {r.pop("pass"): r for r in second["runs"] if r.pop("tuned")}
    assert final == expected
    assert [e["facts"]["pass"] for e in entries] == list(expected)
    for entry in entries:
        assert entry["choice"] == expected[entry["facts"]["pass"]]
        assert len(entry["milliseconds"]) == (4 if entry["facts"]["pass"] == "forward" else 2)
        assert entry["facts"]["blocks"] == {"attended": "1/2", "partial": "1/2"}
        assert entry["facts"]["pinned"]["BLOCK_M"] == 64
        assert "captured c0 float32 1" in entry["facts"]["program"]
