"""Strict defaults for every test: fixed seeds and threads, reproducible examples, nothing left behind in torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Read when torch is imported. One thread and no pool of compile workers: the processes of pytest-xdist are enough.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Every run compiles anew: what an earlier one left on the disk must not decide its results.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import hypothesis
import pytest
import torch

# Read when Triton is imported. Where there is no GPU, kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

import flexattn
import flexattn.codegen
from flexattn_plugins.pytest_plugin import torch_state

ROOT = Path(__file__).resolve().parents[1]
NOT_INTERPRETED = "needs Triton's interpreter: set TRITON_INTERPRET=1, which a machine with a GPU does not by itself"

settings.register_profile("default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True, max_examples=60)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


class TorchRandom:
    """torch's generator as hypothesis wants it, so that an example sees the same numbers each time it is run."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(TORCH_RANDOM)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--features", metavar="FILE", help="write which features' tests passed, for docs/compile.md")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to test a mixture: ./flexattn of one checkout with the codegen that another one installed, or without plugin."""
    package, codegen = (Path(m.__path__[0]).resolve() for m in (flexattn, flexattn.codegen))
    if codegen not in (package / "codegen", package.parent / "codegen"):
        raise pytest.UsageError(
            f"flexattn is {package}, but flexattn.codegen is {codegen}: another checkout is installed in this "
            f"environment. Install this one: {sys.executable} -m pip install --no-deps -e {ROOT}"
        )
    if not config.pluginmanager.has_plugin("flexattn"):
        raise pytest.UsageError(
            "the tests use flexattn's pytest plugin, which an older installation does not have, and PYTEST_DISABLE_PLUGIN_"
            f"AUTOLOAD turns off. Install again: {sys.executable} -m pip install --no-deps -e {ROOT}; or add -p flexattn"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/gpu needs a GPU; everything in tests/interpreter Triton's interpreter."""
    for item in items:
        if ROOT / "tests" / "gpu" in item.path.parents:
            item.add_marker("flexattn_gpu")
        if ROOT / "tests" / "interpreter" in item.path.parents and os.environ.get("TRITON_INTERPRET") != "1":
            item.add_marker(pytest.mark.skip(reason=NOT_INTERPRETED))
        item.user_properties += [("feature", mark.args[0]) for mark in item.iter_markers("feature")]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of compiled kernels, which tests/compile_only hands over as a property; and the table of features."""
    if terminalreporter.config.getoption("features"):
        write_features(Path(terminalreporter.config.getoption("features")), terminalreporter.stats)
    reports = terminalreporter.stats.get("passed", [])
    records = [r for report in reports for name, value in report.user_properties if name == "compiled" for r in value]
    if records:
        sys.path.insert(0, str(ROOT / "scripts"))
        from compile_table import table

        terminalreporter.section("kernels compiled without a device (bfloat16, 8 heads, S = 4096)")
        terminalreporter.write_line(table(records))


def write_features(path: Path, stats: dict[str, Any]) -> None:
    """For each feature how many tests passed, failed and were skipped, with PyTorch's version."""
    counts: dict[str, dict[str, int]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in stats.get(outcome, []):
            for name, value in report.user_properties:
                if name == "feature" and (report.when == "call" or outcome != "passed"):
                    entry = counts.setdefault(value, {"passed": 0, "failed": 0, "skipped": 0})
                    entry["failed" if outcome == "error" else outcome] += 1
    record = {"torch": torch.__version__.split("+")[0], "features": dict(sorted(counts.items()))}
    path.write_text(json.dumps(record, indent=1) + "\n")


@pytest.fixture(autouse=True, scope="session")
def _fast_interpreter() -> Iterator[None]:
    """Triton's interpreter patches its language at every call of a device function; inside a kernel once is enough."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    call = interpreter.InterpretedFunction.__call__

    def plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            self.fn in self.rewritten_fn
        ):  # its globals have been patched by the first call, and are until the kernel ends
            return self.rewritten_fn[self.fn](*args, **kwargs)
        return call(self, *args, **kwargs)

    with patch.object(interpreter.InterpretedFunction, "__call__", plain):
        yield


@pytest.fixture(autouse=True)
def _reproducible(flexattn_seed: int) -> Iterator[None]:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    before = torch_state()
    yield
    if "torch._dynamo" in sys.modules:  # compiled code and its recompilation counts
        torch._dynamo.reset()
    assert torch_state() == before, "the test leaves torch in another state, and the next one would run in it"
