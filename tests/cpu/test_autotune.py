"""Choosing a configuration by timing: what is tried, what is dropped, what is kept, and when nothing is timed.

The kernel, the timer and the device are stand-ins; which of them is chosen is decided by the code that chooses on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexattn import tuning_cache
from flexattn.config import FREE, KernelConfig, Pinned, candidates, chain

pytest.importorskip("triton", reason="needs Triton: Linux")
from flexattn.backends import autotune, launch
from flexattn.backends.agreement import agree
from flexattn.backends.launch import Call, Tuning
from flexattn.backends.target import Target

TARGET = Target("cuda", 90, 232448)
TABLE = chain("forward", "cuda", 90, "half", 64)[0]
FAST = TABLE._replace(BLOCK_M=64)
WORDS = autotune.in_words(FAST)
Rule = Callable[[KernelConfig], Any]


class Kernel:
    """A kernel that adds one to its output, and whatever else a test says; it notes what was compiled and run."""

    fn = SimpleNamespace(__name__="stand_in")

    def __init__(self) -> None:
        self.compiled: list[KernelConfig] = []
        self.ran: list[KernelConfig] = []
        self.refuses: Rule = lambda config: False
        self.spills: Rule = lambda config: 0
        self.error: Rule = lambda config: 0.0
        self.milliseconds: Rule = lambda config: 1.0

    def run(self, *, grid: Any, warmup: bool, config: KernelConfig, **_: Any) -> Any:
        self.compiled.append(config)
        if self.refuses(config):
            raise RuntimeError("the compiler refuses")
        metadata = SimpleNamespace(shared=1000)
        return SimpleNamespace(metadata=metadata, n_regs=1, n_spills=self.spills(config), _init_handles=lambda: None)

    def __getitem__(self, grid: Any) -> Any:
        def runs(*, config: KernelConfig, out: Tensor, **_: Any) -> None:
            self.ran.append(config)
            out += 1 + self.error(config)

        return runs

    def time(self, run: Callable[[], None]) -> float:
        run()
        return float(self.milliseconds(self.ran[-1]))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kernel]:
    """A stand-in on a machine with a Hopper GPU that has tuned nothing yet."""
    made = Kernel()
    monkeypatch.setenv("FLEXATTN_CACHE_DIR", str(tmp_path))
    for module in (launch, autotune):
        monkeypatch.setattr(module, "current", lambda: TARGET)
        monkeypatch.setattr(module, "interpreted", lambda: False)
    monkeypatch.setattr(autotune, "event_timer", lambda device: made.time)
    forget(monkeypatch)
    yield made


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(launch, "_CHOSEN", {})
    monkeypatch.setattr(autotune, "_FASTEST", {})


def call_of(kernel: Kernel, pinned: Pinned = FREE, **facts: Any) -> Call:
    out = torch.zeros(4, 8)
    return Call(
        kernel, "forward", ("key",), "half", 64, 256, pinned, {"out": out},
        lambda config: {"grid": 1, "config": config}, torch.device("cpu"),
        prepare=out.zero_, outputs=lambda: (out,),
        tuning=Tuning(tuple(facts.items()), lambda: {"pass": "forward", **facts}, autotune.search),
    )  # fmt: skip


def tuned(call: Call) -> KernelConfig:
    return launch.choose(call, None).config


def test_the_fastest_candidate_is_chosen_and_run_last(kernel: Kernel) -> None:
    kernel.milliseconds = lambda config: 0.5 if config == FAST else 1.0
    call = call_of(kernel)
    launch.launch(call)
    assert kernel.ran[-1] == tuned(call) == FAST
    assert torch.equal(call.arguments["out"], torch.ones(4, 8)), "runs that were timed have left nothing"


def test_the_table_stays_unless_another_is_faster_by_more_than_noise(kernel: Kernel) -> None:
    kernel.milliseconds = lambda config: 1.0 if config == TABLE else 0.99
    assert tuned(call_of(kernel)) == TABLE
    kernel.milliseconds = lambda config: 1.0 if config == TABLE else 0.97
    assert tuned(call_of(kernel, other=1)) != TABLE


def test_a_candidate_is_judged_by_its_median(kernel: Kernel) -> None:
    times = iter([1.0, 0.1, *[1.0, 2.0] * 100])
    kernel.milliseconds = lambda config: next(times)
    pins = Pinned(64, 64, 4, tma=False, overlap=False)
    assert tuned(call_of(kernel, pins)) == chain("forward", "cuda", 90, "half", 64, pins)[0]


def test_a_candidate_with_another_result_is_dropped_with_a_warning(kernel: Kernel) -> None:
    kernel.milliseconds = lambda config: 0.5 if config == FAST else 1.0
    for number, error in enumerate((1.0, float("nan"), float("inf"))):
        kernel.error = lambda config: error if config == FAST else 0.0
        autotune.say_once.cache_clear()
        with pytest.warns(UserWarning, match=f"{WORDS} computes something else"):
            assert tuned(call_of(kernel, number=number)) == TABLE


def test_a_candidate_that_fails_or_spills_is_dropped_quietly(kernel: Kernel) -> None:
    slow = TABLE._replace(BLOCK_N=128)
    kernel.milliseconds = lambda config: {FAST: 0.5, slow: 0.6}.get(config, 1.0)
    kernel.refuses = lambda config: config == FAST
    assert tuned(call_of(kernel)) == slow

    def fails(config: KernelConfig) -> float:
        if config == FAST:
            raise RuntimeError("the launch fails")
        return 0.0

    kernel.refuses, kernel.error = lambda config: False, fails
    assert tuned(call_of(kernel, number=1)) == slow
    kernel.error, kernel.spills = lambda config: 0.0, lambda config: (autotune.SPILLED + 1) * (config == FAST)
    assert tuned(call_of(kernel, number=2)) == slow
    assert FAST not in kernel.ran[-1:]


def test_what_is_pinned_is_so_in_all_that_is_tried(kernel: Kernel) -> None:
    kernel.milliseconds = lambda config: 1.0 / config.BLOCK_N
    assert tuned(call_of(kernel, Pinned(BLOCK_M=16, num_stages=2))).BLOCK_N == 128
    assert {(c.BLOCK_M, c.num_stages) for c in kernel.compiled} == {(16, 2)}
    assert len({c.BLOCK_N for c in kernel.compiled}) > 1


def test_tuning_is_bounded(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(call_of(kernel))
    assert len(set(kernel.compiled)) == 1 + autotune.COMPILED
    kernel.compiled.clear()
    monkeypatch.setattr(autotune, "SECONDS", -1.0)
    assert tuned(call_of(kernel, number=1)) == TABLE
    assert kernel.compiled == []
    assert len(kernel.ran) < 10 * len(candidates("forward", "cuda", 90, "half", 64))


def test_candidates_that_cannot_fit_are_not_compiled(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "current", lambda: Target("cuda", 86, 20_000))
    tuned(call_of(kernel))
    assert all((c.num_stages - 1) * c.BLOCK_N * 256 <= 20_000 for c in kernel.compiled)
    assert len(set(kernel.compiled)) > 5


def test_a_choice_is_made_once_and_read_from_disk_by_the_next_process(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.milliseconds = lambda config: 0.5 if config == FAST else 1.0
    tuned(call_of(kernel))
    (entry,) = tuning_cache.entries()
    assert entry.choice == FAST._asdict()
    assert entry.milliseconds[WORDS] == 0.5
    kernel.ran.clear()
    assert tuned(call_of(kernel)) == FAST
    forget(monkeypatch)
    assert tuned(call_of(kernel)) == FAST
    assert kernel.ran == []
    assert tuned(call_of(kernel, other=1)) == FAST
    assert kernel.ran != []


@pytest.mark.parametrize(
    "choice", [{"BLOCK_M": 64}, {**FAST._asdict(), "unknown": 1}, {**FAST._asdict(), "num_warps": 3}]
)
def test_a_kept_choice_that_is_no_configuration_is_made_anew(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, choice: dict[str, int]
) -> None:
    kernel.refuses = lambda config: config.num_warps == 3
    tuned(call_of(kernel))
    (entry,) = tuning_cache.entries()
    tuning_cache.store(entry._replace(choice=choice))
    forget(monkeypatch)
    assert tuned(call_of(kernel)) == TABLE
    assert tuning_cache.entries() == [entry]


def test_the_capture_of_a_graph_times_nothing_and_decides_nothing(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.milliseconds = lambda config: 0.5 if config == FAST else 1.0
    call = call_of(kernel)
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    monkeypatch.setattr(autotune, "capturing", lambda device: True)
    assert tuned(call) == TABLE
    assert autotune.fastest([[call], [call_of(kernel, number=1)]]) == 0
    assert kernel.ran == [] and tuning_cache.entries() == []
    monkeypatch.setattr(launch, "capturing", lambda device: False)
    assert tuned(call) == FAST
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    assert tuned(call) == FAST, "one that was chosen before is used"


def test_the_fastest_sequence_is_that_whose_calls_together_are(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, other = (call_of(kernel, number=n) for n in range(3))
    kernel.milliseconds = lambda config: 1.0
    for call in (one, two, other):
        tuned(call)
    kernel.ran.clear()

    def total(run: Callable[[], None]) -> float:
        before = len(kernel.ran)
        run()
        return float(len(kernel.ran) - before)

    monkeypatch.setattr(autotune, "event_timer", lambda device: total)
    assert autotune.fastest([[one, two], [other]]) == 1
    assert autotune.fastest([[other], [one, two]]) == 0
    ran = len(kernel.ran)
    assert autotune.fastest([[one, two], [other]]) == 1
    forget(monkeypatch)
    assert autotune.fastest([[one, two], [other]]) == 1
    assert len(kernel.ran) == ran, "the second process has read it"
    assert [e.choice for e in tuning_cache.entries()][-2:] == [{"alternative": 1}, {"alternative": 0}]
    assert autotune.fastest([[one, two], [other._replace(tuning=None)]]) == 0


def test_what_a_sequence_does_besides_its_calls_counts(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (call_of(kernel, number=n) for n in range(2))
    kernel.milliseconds = lambda config: 1.0
    for call in (one, other):
        tuned(call)
    done: list[int] = []

    def total(run: Callable[[], None]) -> float:
        before = len(kernel.ran) + len(done)
        run()
        return float(len(kernel.ran) + len(done) - before)

    monkeypatch.setattr(autotune, "event_timer", lambda device: total)
    assert autotune.fastest([[one, lambda: done.append(1)], [other]]) == 1


def test_a_sequence_that_fails_is_left_out(kernel: Kernel) -> None:
    works = call_of(kernel, number=1)
    broken = call_of(Kernel(), number=2)
    broken.kernel.refuses = lambda config: True
    assert autotune.fastest([[broken], [works]]) == 1
    assert autotune.fastest([[broken], [broken]]) == 0


def test_runs_agree_up_to_rounding() -> None:
    exact = torch.randn(3, 100, 64)
    exact[0, 0] = float("-inf")
    for dtype, product, digits in (
        (torch.bfloat16, "half", 8),
        (torch.float16, "half", 11),
        (torch.float32, "ieee", 20),
    ):
        expected = exact.to(dtype)
        rounded = (exact + torch.randn_like(exact) * 2.0**-digits).to(dtype)
        assert agree([rounded], [expected], product)  # type: ignore[arg-type]
        for wrong in (0.0, 5.0, float("nan"), float("inf")):
            other = rounded.clone()
            other[1, 7, 16:32] = wrong
            assert not agree([rounded, other], [expected, expected], product)  # type: ignore[arg-type]
    assert agree([torch.zeros(0)], [torch.zeros(0)], "half")
    assert not agree([torch.tensor(1.0)], [torch.tensor(2.0)], "ieee")


def test_without_memory_for_tuning_the_table_is_used(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(autotune, "event_timer", full)
    with pytest.warns(UserWarning, match="the forward kernel is not tuned, since there is no memory"):
        assert tuned(call_of(kernel)) == TABLE
    assert tuned(call_of(kernel)) == TABLE
    assert tuning_cache.entries() == []


def test_what_was_chosen_is_logged(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    kernel.milliseconds = lambda config: 0.5 if config == FAST else 1.0
    with caplog.at_level("DEBUG", "flexattn.autotune"):
        tuned(call_of(kernel))
    first, second, *_ = caplog.messages
    assert first == f"forward: {WORDS} is the fastest of {1 + autotune.COMPILED}"
    assert second == f"forward: 0.5000 ms with {WORDS}"
