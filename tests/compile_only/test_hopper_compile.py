"""The warp-specialised kernel compiles for sm_90: nothing spills, and the softmax stands between a product and its wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def records(what: str, cache: Path) -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "tests/compile_only/hopper_table.py", what]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[0])
    return found


def test_the_softmax_runs_beside_the_product_of_the_tile_before(tmp_path: Path) -> None:
    found = records("table", tmp_path)
    assert len(found) == 2 * 5  # head dimensions, variants
    for record in found:
        assert record["spilled"] == 0, record
        assert record["products"] >= 48 and record["copies"] >= 8, record
        assert {24, 240} <= set(record["registers of a part"]), record
        assert record["unordered"] == 0, record
        # Both products are issued, the scores waited for, exponentials computed, the output waited for.
        loops = [order for order in record["loops"] if order == "G1e0"]
        assert len(loops) == 4, ("two phases of two consumers", record)


def test_every_operation_and_every_form_of_operands_compiles(tmp_path: Path) -> None:
    operations = records("operations", tmp_path)
    assert [(record["dtype"], record["operations"] >= 9) for record in operations] == [
        ("bool", True), ("int32", True), ("bfloat16", True),
    ]  # fmt: skip
    forms = records("forms", tmp_path)
    assert [(record["form"], record["spilled"]) for record in forms] == [("64 and 128", 0), ("a number", 0)]
