"""The pytest plugin, in test suites of its own: what is skipped, which options there are, and that it costs nothing."""

from __future__ import annotations

import pytest
import torch

from flexattn_plugins.pytest_plugin import device_of

pytest_plugins = "pytester"

GPU = """
import pytest

@pytest.mark.flexattn_gpu
def test_on_a_gpu():
    raise AssertionError("it ran")

def test_anywhere():
    pass
"""
FIXTURES = """
import random
import torch

def test_fixtures(flexattn_device, flexattn_backend, flexattn_seed):
    print(flexattn_device, flexattn_backend, flexattn_seed, torch.initial_seed())
    assert isinstance(flexattn_device, torch.device)
"""
SEEDED = """
import random
import pytest
import torch

before = random.getstate(), torch.get_rng_state()

@pytest.mark.parametrize("_", range(2))
def test_seeded(_, flexattn_seed):
    assert (random.random(), torch.rand(()).item()) == (random.Random(5).random(), torch.rand(
        (), generator=torch.Generator().manual_seed(5)).item())

def test_what_was_drawn_before_goes_on():
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
"""
DETERMINISTIC = """
import torch

threads = torch.get_num_threads()

def test_inside(flexattn_deterministic):
    assert torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 1
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)

def test_afterwards():
    assert not torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == threads
    assert torch.get_default_dtype() is torch.float32 and torch.get_default_device().type == "cpu"
    assert torch.is_grad_enabled()
"""


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def run(pytester: pytest.Pytester, source: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(source)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:xdist", *options)


def test_what_needs_a_gpu_is_collected_and_skipped_with_the_reason(pytester: pytest.Pytester) -> None:
    result = run(pytester, GPU, "--strict-markers", "-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*needs a CUDA device: run it on a machine that has one*"])


def test_the_plugin_can_be_turned_off(pytester: pytest.Pytester) -> None:
    result = run(pytester, GPU, "--strict-markers", "-p", "no:flexattn")
    result.stdout.fnmatch_lines(["*'flexattn_gpu' not found in `markers` configuration option*"])


def test_it_is_loaded_by_name_where_plugins_are_not_loaded(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(GPU)
    pytester.runpytest_subprocess("-p", "flexattn", "--strict-markers").assert_outcomes(passed=1, skipped=1)


def test_by_default_a_test_is_seeded_and_leaves_torch_as_it_was(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_deterministic=DETERMINISTIC, test_fixtures=FIXTURES)
    result = pytester.runpytest_subprocess("-s", "-p", "no:xdist", "-p", "no:randomly")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["*cpu auto 0 0*"])


def test_options_come_before_the_ini_file(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nflexattn_device = meta\nflexattn_backend = tiled\nflexattn_seed = 3")
    pytester.makepyfile(test_seeded=SEEDED, test_fixtures=FIXTURES)
    result = pytester.runpytest_subprocess("-s", "-p", "no:xdist", "-p", "no:randomly", "--flexattn-seed=5")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*meta tiled 5 5*"])


@pytest.mark.parametrize(
    ("options", "ini", "message"),
    [
        (["--flexattn-backend=fast"], "", "*--flexattn-backend*invalid choice: 'fast'*"),
        (
            [],
            "flexattn_backend = fast",
            "*flexattn_backend is 'fast'; it must be one of auto, triton, tiled, reference*",
        ),
        ([], "flexattn_seed = many", "*the flexattn seed is 'many'; it must be an integer, 0 or more*"),
        (
            [f"--flexattn-seed={1 << 70}"],
            "",
            "*the flexattn seed is '11805*'; it must be an integer, 0 or more, of 63 bits*",
        ),
    ],
)
def test_wrong_options_are_refused(pytester: pytest.Pytester, options: list[str], ini: str, message: str) -> None:
    pytester.makeini(f"[pytest]\n{ini}")
    result = run(pytester, "def test_it(flexattn_backend, pytestconfig):\n    pass", *options)
    assert result.ret != 0
    (result.stderr if result.errlines else result.stdout).fnmatch_lines([message])


def test_a_device_that_is_not_there_skips_and_one_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("") == torch.device("cpu") and device_of("meta") == torch.device("meta")
    with pytest.raises(pytest.skip.Exception, match="needs a CUDA device"):
        device_of("cuda:1")
    with pytest.raises(pytest.skip.Exception, match="xpu is not there: "):
        device_of("xpu")
    with pytest.raises(pytest.UsageError, match="--flexattn-device=gpu: Expected one of cpu, cuda"):
        device_of("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of("") == torch.device("cuda")


def test_the_interpreter_is_on_before_a_conftest_imports_triton(pytester: pytest.Pytester) -> None:
    pytest.importorskip("triton", reason="needs Triton: Linux")
    pytester.makeconftest("import triton, triton.knobs\ninterpreted = triton.knobs.runtime.interpret")
    source = "import triton\ndef test_it():\n    assert triton.knobs.runtime.interpret\n"
    run(pytester, source, "--flexattn-interpret").assert_outcomes(passed=1)
    run(pytester, source).assert_outcomes(failed=1)
    late = pytester.makepyfile(early="import triton")
    result = run(pytester, source, "-p", late.stem, "--flexattn-interpret")
    result.stderr.fnmatch_lines(["*comes too late: Triton is imported already*"])


def test_a_test_run_without_attention_imports_neither_torch_nor_flexattn(pytester: pytest.Pytester) -> None:
    """Nor does hypothesis, which has a hook of its own."""
    source = (
        "import hypothesis, sys\ndef test_it():\n    assert not {'torch', 'triton', 'flexattn'} & set(sys.modules)\n"
    )
    run(pytester, source).assert_outcomes(passed=1)
    listed = run(pytester, source, "--help")
    listed.stdout.fnmatch_lines(["*--flexattn-device=DEVICE*", "*flexattn_seed*"])


def test_a_failed_check_shows_the_users_line_and_the_message_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "from flexattn import masks\n"
        "from flexattn.testing import assert_causal\n"
        "def test_it():\n"
        "    assert_causal(masks.prefix_lm(3), 8)\n"
    )
    result = pytester.runpytest_inprocess("-p", "no:xdist")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*assert_causal(masks.prefix_lm(3), 8)*", "*is not causal: it attends at b=0*"])
    result.stdout.no_fnmatch_line("*causal.py*")
