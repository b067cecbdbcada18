"""The pytest plugin: on which device and backend to test attention, with what seed, and what to skip without a GPU.

pytest loads it wherever flexattn is installed, under the name `flexattn`; `-p no:flexattn` turns it off. torch is imported
when the first fixture or marker of these is used; until then it costs two milliseconds. It sets no hypothesis profile.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NO_GPU = "needs a CUDA device: run it on a machine that has one, with a CUDA build of torch"
TOO_LATE = (
    "--flexattn-interpret comes too late: Triton is imported already, and reads TRITON_INTERPRET only then. Set "
    "TRITON_INTERPRET=1 before pytest starts"
)
MARKERS = ("flexattn_gpu: needs a CUDA device; skipped, with the reason, where there is none",)
BACKENDS = ("auto", "triton", "tiled", "reference")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, and the ini values that are their defaults."""
    group = parser.getgroup("flexattn", "testing attention (flexattn)")
    group.addoption(
        "--flexattn-device",
        metavar="DEVICE",
        help="the device of the fixture flexattn_device, such as cpu or cuda:1. Default: cuda where there is one, else cpu",
    )
    group.addoption(
        "--flexattn-backend", choices=BACKENDS, help="the backend of the fixture flexattn_backend. Default: auto"
    )
    group.addoption(
        "--flexattn-seed",
        type=int,
        metavar="N",
        help="the seed of flexattn_seed and flexattn_deterministic. Default: 0",
    )
    group.addoption(
        "--flexattn-interpret",
        action="store_true",
        help="run Triton's kernels in its interpreter, on the CPU: sets TRITON_INTERPRET=1 before Triton is imported",
    )
    for name in ("device", "backend", "seed"):
        parser.addini(f"flexattn_{name}", f"what --flexattn-{name} is where it is not given", default="")


def _said(config: pytest.Config, name: str, default: str) -> str:
    """An option, or else its ini value, or else a default."""
    said = config.getoption(f"flexattn_{name}")
    return str(said) if said is not None else str(config.getini(f"flexattn_{name}")) or default


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before any conftest imports Triton."""
    if not early_config.known_args_namespace.flexattn_interpret or os.environ.get("TRITON_INTERPRET") == "1":
        return
    if "triton" in sys.modules:
        raise pytest.UsageError(TOO_LATE)
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, and check what an ini file says."""
    for line in MARKERS:
        config.addinivalue_line("markers", line)
    backend, seed = _said(config, "backend", "auto"), _said(config, "seed", "0")
    if backend not in BACKENDS:
        raise pytest.UsageError(f"flexattn_backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if not seed.isdecimal() or int(seed) >= 1 << 63:
        raise pytest.UsageError(f"the flexattn seed is {seed!r}; it must be an integer, 0 or more, of 63 bits")


@pytest.hookimpl(tryfirst=True)  # before fixtures, which may need the device
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("flexattn_gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip(NO_GPU)


@pytest.fixture(scope="session")
def flexattn_device(pytestconfig: pytest.Config) -> Any:
    """The `torch.device` to test on: --flexattn-device, or the ini value flexattn_device, or cuda where there is one."""
    return device_of(_said(pytestconfig, "device", ""))


def device_of(said: str) -> Any:
    """The device of a name, or the default one; skips the test where it is not there."""
    import torch

    available = torch.cuda.is_available()
    try:
        device = torch.device(said or ("cuda" if available else "cpu"))
    except RuntimeError as error:
        raise pytest.UsageError(f"--flexattn-device={said}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not available:
        pytest.skip(NO_GPU)
    try:
        torch.empty(1, device=said or None)
    except (RuntimeError, AssertionError) as error:  # the third of two GPUs, or a build without this type
        pytest.skip(f"{device} is not there: {str(error).splitlines()[0]}")
    return device


@pytest.fixture(scope="session")
def flexattn_backend(pytestconfig: pytest.Config) -> str:
    """The backend to pass to `flex_attention`: --flexattn-backend, or the ini value flexattn_backend, or "auto"."""
    return _said(pytestconfig, "backend", "auto")


@pytest.fixture
def flexattn_seed(pytestconfig: pytest.Config) -> Iterator[int]:
    """The seed, --flexattn-seed or 0, from which Python's and torch's generators start in this test.

    Their states are afterwards what they were before.
    """
    import torch

    seed = int(_said(pytestconfig, "seed", "0"))
    before, torch_before = random.getstate(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    random.seed(seed)
    torch.manual_seed(seed)
    yield seed
    random.setstate(before)
    torch.set_rng_state(torch_before)
    if devices is not None:
        torch.cuda.set_rng_state_all(devices)


@pytest.fixture
def flexattn_deterministic(flexattn_seed: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A test that gives the same bits in every run: seeded, torch's deterministic algorithms, one thread, exact products.

    The value is the seed. What is set for the test, and what the test itself sets of the same, is restored: default dtype
    and device, gradients, deterministic algorithms, threads, and the precision of float32 products.
    """
    import torch

    if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:  # without it, torch refuses products on a GPU
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with restored():
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")
        yield flexattn_seed


@contextmanager
def restored() -> Iterator[None]:
    """What torch holds for the whole process is afterwards as it was before."""
    import torch

    before = torch_state()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_default_dtype(before["default dtype"])
        if (device := before["default device"]) != torch.get_default_device():
            torch.set_default_device(None if device.type == "cpu" else device)  # None: without a mode that sets it
        torch.set_grad_enabled(before["gradients"])
        torch.use_deterministic_algorithms(before["deterministic"], warn_only=warned)
        torch.set_num_threads(before["threads"])
        torch.set_float32_matmul_precision(precision)


def torch_state() -> dict[str, Any]:
    """What torch holds for the whole process, and a test can leave behind."""
    import torch

    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }
