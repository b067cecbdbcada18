"""The table of kernel configurations, chains of them, and what kernel options pin."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexattn.codegen.pipeline import variant
from flexattn.codegen.trace import trace
from flexattn.config import (
    AHEAD,
    LADDER,
    RECOMMENDED,
    KernelConfig,
    Pinned,
    candidates,
    chain,
    family,
    fitted,
    least_shared_memory,
    pinned,
    prefers_one_pass,
)
from flexattn.kernel_options import check_kernel_options, options_of, options_text, parsed_options

TARGETS = [("cuda", 75), ("cuda", 80), ("cuda", 89), ("cuda", 90), ("cuda", 100), ("cuda", 120), ("hip", "gfx942")]


@pytest.mark.parametrize(("backend", "arch"), TARGETS)
@pytest.mark.parametrize("product", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_every_target_has_a_chain_that_ends_with_what_fits_anywhere(
    backend: str, arch: int | str, product: str, head_dim: int
) -> None:
    for which in ("forward", "dq", "dkdv"):
        configs = chain(which, backend, arch, product, head_dim)  # type: ignore[arg-type]
        assert len(set(configs)) == len(configs)
        assert configs[-1]._replace(tma=False) == LADDER[-1] and LADDER[-1].num_stages == 1
        for config in configs:
            for size in (config.BLOCK_M, config.BLOCK_N):
                assert size >= 16 and size & (size - 1) == 0
            # Tiles divide the blocks of 128 that masks have by default.
            assert config.BLOCK_M <= 128 and config.BLOCK_N <= 128


def test_the_first_of_a_chain_is_the_recommendation_for_the_next_larger_head_dimension() -> None:
    rows = RECOMMENDED["forward", "consumer", "half"]
    assert chain("forward", "cuda", 89, "half", 16)[0] == rows[64]
    assert chain("forward", "cuda", 89, "half", 128)[0] == rows[128]
    assert chain("forward", "cuda", 89, "half", 256)[0] == rows[256]


def test_what_registers_may_not_allow_is_tried_before_the_recommendation() -> None:
    for head_dim, ahead in AHEAD["forward", "hopper", "half"].items():
        configs = chain("forward", "cuda", 90, "half", head_dim)
        assert configs[: len(ahead)] == tuple(c._replace(tma=True) for c in ahead)
        assert configs[len(ahead)] == RECOMMENDED["forward", "hopper", "half"][head_dim]._replace(tma=True)
        assert all(c.overlap for c in ahead) and not any(c.overlap for c in configs[len(ahead) :])
        assert chain("forward", "cuda", 90, "half", head_dim, ahead=False) == configs[len(ahead) :]


def test_variants_that_gather_do_without_what_they_would_spill_in() -> None:
    table, ids = torch.zeros(99), torch.zeros(50, dtype=torch.int32)
    gathering = lambda s, b, h, q_idx, kv_idx: s + table[kv_idx - q_idx + 49]
    assert variant(trace(gathering, None).program).gathers
    assert variant(trace(None, lambda b, h, q_idx, kv_idx: table[q_idx * kv_idx] > 0).program).gathers
    assert not variant(trace(lambda s, b, h, q_idx, kv_idx: s + table[kv_idx], None).program).gathers
    assert not variant(trace(None, lambda b, h, q_idx, kv_idx: ids[q_idx] == ids[kv_idx]).program).gathers


def test_one_pass_is_preferred_only_where_the_table_has_it() -> None:
    assert prefers_one_pass("cuda", 90, "half", 64) and prefers_one_pass("cuda", 90, "half", 16)
    assert prefers_one_pass("cuda", 90, "half", 80) and not prefers_one_pass("cuda", 90, "half", 96)
    assert not prefers_one_pass("cuda", 90, "half", 128) and not prefers_one_pass("cuda", 90, "tf32", 64)
    assert not prefers_one_pass("cuda", 80, "half", 64) and not prefers_one_pass("hip", "gfx942", "half", 64)


def test_what_is_pinned_is_the_same_in_the_whole_chain() -> None:
    configs = chain("dq", "cuda", 90, "half", 64, Pinned(BLOCK_N=16, num_warps=2))
    assert {(c.BLOCK_N, c.num_warps) for c in configs} == {(16, 2)}
    assert len({c.BLOCK_M for c in configs}) > 1


@pytest.mark.parametrize("which", ["forward", "dq", "dkdv", "one_pass"])
def test_candidates_begin_with_the_recommendation_and_go_away_from_it(which: Any) -> None:
    rungs, found = chain(which, "cuda", 90, "half", 64), candidates(which, "cuda", 90, "half", 64)
    assert found[0] == rungs[0]
    assert set(rungs) <= set(found) and len(set(found)) == len(found)
    changed = [sum(a != b for a, b in zip(config, found[0], strict=True)) for config in found]
    assert changed[:6] == [0, 1, 1, 1, 1, 1]
    assert {c.tma for c in found} == {False, True}
    assert {c.overlap for c in found} == ({False, True} if which == "forward" else {False})
    assert not any(c.tma for c in candidates(which, "cuda", 80, "half", 64))


def test_candidates_keep_what_is_pinned() -> None:
    found = candidates("forward", "cuda", 90, "half", 64, Pinned(BLOCK_N=16, num_warps=2, tma=False))
    assert {(c.BLOCK_N, c.num_warps, c.tma) for c in found} == {(16, 2, False)}
    assert {c.BLOCK_M for c in found} >= {32, 64, 128} and {c.num_stages for c in found} >= {1, 2, 3, 4}
    full = Pinned(64, 32, 4, 1, False, False, False)
    assert candidates("dq", "cuda", 90, "half", 64, full) == (KernelConfig(*full),)  # type: ignore[arg-type]


def test_the_larger_side_of_a_tile_is_the_one_that_a_program_owns() -> None:
    sizes = {which: {c[:2] for c in chain(which, "cuda", 80, "half", 64)} for which in ("dq", "dkdv")}
    assert (128, 64) in sizes["dq"] and (64, 128) not in sizes["dq"]
    assert (64, 128) in sizes["dkdv"] and (128, 64) not in sizes["dkdv"]


def test_a_choice_that_later_operands_do_not_fit_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands that are aligned otherwise are another kernel, which may need more shared memory."""
    OutOfResources = pytest.importorskip("triton.runtime.errors", reason="needs Triton: Linux").OutOfResources
    from flexattn.backends import launch as module

    large, small = KernelConfig(128, 64, 4, 3), KernelConfig(16, 16, 4, 1)
    searched, ran = iter([large, small]), []

    def run(call: object, config: KernelConfig) -> None:
        ran.append(config)
        if config is large and len(ran) > 1:
            raise OutOfResources(300_000, 232_448, "shared memory")

    found = lambda *_, **__: module.Chosen(next(searched), module.Resources(0, 0, 0), None)
    for name, stub in {"interpreted": lambda: False, "current": lambda: None, "_search": found, "run": run}.items():
        monkeypatch.setattr(module, name, stub)
    monkeypatch.setattr(module, "_CHOSEN", {})
    call = module.Call(
        None, "forward", ("key",), "half", 64, 256, Pinned(), {}, lambda _: {}, torch.device("cpu")
    )  # fmt: skip
    for _ in range(3):
        module.launch(call)
    assert ran == [large, large, small, small]


def test_options_belong_to_a_pass_and_a_prefixed_one_goes_first() -> None:
    options = {"BLOCK_M": 64, "BLOCK_M1": 32, "BLOCK_N2": 16, "num_warps": 4, "bwd_num_warps": 8, "fwd_num_stages": 3}
    forward, backward = options_of(options, forward=True), options_of(options, forward=False)
    assert pinned("forward", forward) == Pinned(64, None, 4, 3)
    assert pinned("dkdv", backward) == Pinned(32, None, 8, None)
    assert pinned("dq", backward) == Pinned(None, 16, 8, None)


def test_families() -> None:
    assert [family(*target) for target in TARGETS] == [
        "consumer", "datacenter", "consumer", "hopper", "hopper", "consumer", "amd",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tile", "block", "expected"),
    [(128, 128, 128), (128, 64, 64), (64, 192, 64), (128, 192, 64), (128, 100, 64), (16, 100, 16), (128, 6, 16), (64, 24, 32)],
)  # fmt: skip
def test_a_tile_divides_its_block_or_covers_it(tile: int, block: int, expected: int) -> None:
    assert fitted(tile, block) == expected


def test_the_least_shared_memory_is_that_of_the_stages_in_flight() -> None:
    assert least_shared_memory("forward", KernelConfig(128, 64, 8, 3), 512) == 2 * 64 * 512
    assert least_shared_memory("dkdv", KernelConfig(32, 128, 8, 2), 512) == 32 * 512


def test_options_survive_the_text_that_operators_take() -> None:
    options = {"num_warps": 8, "BLOCK_M": 64, "USE_TMA": False, "BACKEND": "TRITON"}
    assert options_text(options) == "BACKEND=TRITON,BLOCK_M=64,USE_TMA=False,num_warps=8"
    assert parsed_options(options_text(options)) == options
    assert parsed_options("") == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"BLOCK_M": 48}, "'BLOCK_M' is 48; it must be a power of two from 16 to 512"),
        ({"BLOCK_N": 8}, "'BLOCK_N' is 8; it must be a power of two from 16 to 512"),
        ({"fwd_num_warps": 64}, "'fwd_num_warps' is 64; it must be a power of two, at most 32"),
        ({"BLOCK_M": 1024}, "'BLOCK_M' is 1024; it must be a power of two from 16 to 512"),
        ({"bwd_BLOCK_M": 64}, "'bwd_BLOCK_M' has no meaning: BLOCK_M and BLOCK_N are tiles of the forward"),
        ({"fwd_BLOCK_N2": 64}, "'fwd_BLOCK_N2' has no meaning"),
        ({"num_stages": True}, "'num_stages' is True; it must be a positive integer"),
        ({"BACKEND": "FLASH"}, "'BACKEND' is 'FLASH'; it must be \"AUTO\" or \"TRITON\""),
    ],
)
def test_a_value_that_an_option_cannot_take_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_kernel_options(options)


@pytest.mark.parametrize("name", ["fwd_FAST_TANH", "bwd_FAST_TANH"])
def test_forward_and_backward_take_the_same_tanh(name: str) -> None:
    with pytest.raises(ValueError, match="the backward computes the scores of the forward again"):
        check_kernel_options({name: True})
    assert check_kernel_options({"FAST_TANH": True}) == {"FAST_TANH": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fwd_ONE_PASS": True}, "'fwd_ONE_PASS' has no meaning: it is about the backward alone; write 'ONE_PASS'"),
        ({"bwd_OVERLAP": True}, "'bwd_OVERLAP' has no meaning: it is about the forward alone; write 'OVERLAP'"),
        ({"ONE_PASS": True, "bwd_DETERMINISTIC": True}, "ONE_PASS=True and DETERMINISTIC=True: one pass adds to dQ by"),
        ({"OVERLAP": True, "fwd_USE_TMA": False}, "OVERLAP=True and USE_TMA=False: values are added late only where"),
    ],
)
def test_options_that_mean_nothing_or_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_kernel_options(options)
    assert check_kernel_options({"OVERLAP": True, "bwd_USE_TMA": False})
