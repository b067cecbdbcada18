"""Results kept for tensors: not those of another state, nor those of another stream of a GPU."""

from __future__ import annotations

import inspect
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flexattn.backends.kept import kept

TREES = "torch._inductor.cudagraph_trees"


class Streams:
    """The stream of the moment, of a GPU that is not there, and that of torch.compile's CUDA graphs."""

    now, graphs = 0, 7


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    found, own = Streams(), threading.get_ident()

    def get_manager(index: int, create_if_none_exists: bool = True) -> Any:
        assert not create_if_none_exists and threading.get_ident() == own
        return SimpleNamespace(stream=SimpleNamespace(cuda_stream=found.graphs))

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=found.now))
    monkeypatch.setitem(sys.modules, TREES, SimpleNamespace(get_manager=get_manager))
    return found


def on_gpu() -> Tensor:
    with FakeTensorMode():
        return torch.empty(3, device="cuda:0")


def test_a_tensor_that_is_written_to_has_new_results() -> None:
    t = torch.zeros(3)
    first = kept("test", [t], (), object)
    assert kept("test", [t], (), object) is first
    t.add_(1)
    assert kept("test", [t], (), object) is not first


def test_each_stream_has_results_of_its_own(streams: Streams) -> None:
    """Nobody makes a stream wait for what another one has made, nor for its end before the memory is used again."""
    t = on_gpu()
    first = kept("test", [t], (), object)
    streams.now = 1
    second = kept("test", [t], (), object)
    assert second is not first and kept("test", [t], (), object) is second
    streams.now = 0
    assert kept("test", [t], (), object) is first


def test_nothing_stays_in_the_memory_of_cuda_graphs(streams: Streams) -> None:
    """torch.compile raises an error if a run that warms up for a graph leaves anything there but its outputs."""
    t = on_gpu()
    streams.now = streams.graphs
    assert kept("test", [t], (), object) is not kept("test", [t], (), object)
    streams.now = 0
    assert kept("test", [t], (), object) is kept("test", [t], (), object)


def test_threads_without_such_graphs_keep_what_they_make(streams: Streams) -> None:
    t, found = on_gpu(), []
    thread = threading.Thread(target=lambda: found.extend(kept("test", [t], (), object) for _ in range(2)))
    thread.start()
    thread.join()
    assert len(found) == 2 and found[0] is found[1]


def test_torch_has_what_tells_the_memory_of_its_graphs() -> None:
    from torch._inductor import cudagraph_trees

    assert cudagraph_trees.get_manager(0, create_if_none_exists=False) is None
    assert "self.stream = torch.cuda.Stream()" in inspect.getsource(cudagraph_trees.CUDAGraphTreeManager)
