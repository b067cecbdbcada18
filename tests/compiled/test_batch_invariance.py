"""`batch_invariant=` inside torch.compile: the bits of eager code, and what has to be read outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexattn import Documents, flex_attention, masks


def attend(q: Tensor, k: Tensor, v: Tensor, documents: bool | Documents) -> Tensor:
    return flex_attention(q, k, v, mask_mod=masks.sliding_window(50), batch_invariant=documents)


def test_compiled_results_and_gradients_have_the_bits_of_eager_ones() -> None:
    operands = [torch.randn(2, 2, 200, 16) for _ in range(3)]
    compiled = torch.compile(attend, fullgraph=True)
    for documents in (Documents.from_lengths([70, 130]), Documents.from_lengths([128, 50, 22]), True):
        if isinstance(documents, Documents):
            assert documents.aligned.moved  # made here, outside
        found = []
        for function in (attend, compiled):
            leaves = [t.clone().requires_grad_() for t in operands]
            out = function(*leaves, documents)
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for eager, other in zip(*found, strict=True):
            assert torch.equal(eager.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("dynamic", [True, None])
def test_lengths_and_layouts_that_change_give_the_bits_of_eager_code(dynamic: bool | None) -> None:
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (70, 130, 200):
        rows = [torch.randn(2, length, 3, 16) for _ in range(3)]
        for operands in ([t.transpose(1, 2).contiguous() for t in rows], [t.transpose(1, 2) for t in rows]):
            eager, other = attend(*operands, True), compiled(*operands, True)
            assert torch.equal(eager.view(torch.int32), other.view(torch.int32))
            assert eager.stride() == other.stride()


def test_documents_that_were_not_laid_out_are_refused_with_what_to_do() -> None:
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    with pytest.raises(Exception, match=r"read documents\.aligned once outside"):
        torch.compile(attend, fullgraph=True)(q, k, v, Documents.from_lengths([12, 8]))


def test_the_reference_is_not_compiled_and_says_so() -> None:
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))

    def dense(q: Tensor) -> Tensor:
        return flex_attention(q, k, v, batch_invariant=True, backend="reference")

    with pytest.raises(Exception, match="compile backend='tiled'"):
        torch.compile(dense, fullgraph=True)(q)


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, True)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_has_the_bits_of_eager_code_at_every_length(strict: bool) -> None:
    length = torch.export.Dim("length", min=129, max=512)
    example = tuple(torch.randn(1, 2, 200, 16) for _ in range(3))
    exported = torch.export.export(Attention(), example, dynamic_shapes=[{2: length}] * 3, strict=strict).module()
    for n in (129, 200, 256):  # also one that is a multiple of the block size
        operands = [torch.randn(1, 2, n, 16) for _ in range(3)]
        eager, other = attend(*operands, True), exported(*operands)
        assert torch.equal(eager.view(torch.int32), other.view(torch.int32))
