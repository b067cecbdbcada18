"""torch.export and AOTInductor: archives that a new process loads and runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import flexattn
from flexattn import and_masks, create_block_mask, flex_attention, masks

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention.mask_mod:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # PyTorch's, about itself
]
B, H, L, D = 2, 4, 70, 8


class Attention(nn.Module):
    """A layer of some kind: what it captures, and where its mask comes from."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.slopes = nn.Parameter(torch.rand(H))
        self.register_buffer("ids", torch.arange(L) // 20)
        self.cap = 20.0
        self.mask = create_block_mask(masks.causal_mask, None, None, L, L, "cpu", 32)

    def mod(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.cap * torch.tanh((score + self.slopes[h] * (kv_idx - q_idx)) / self.cap)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        match self.kind:
            case "plain":
                return flex_attention(q, k, v)
            case "mod":
                return flex_attention(q, k, v, self.mod)
            case "block mask":
                return flex_attention(q, k, v, self.mod, self.mask)
            case "block mask made inside":
                made = create_block_mask(
                    masks.causal_mask, None, None, q.shape[2], k.shape[2], device=q.device, BLOCK_SIZE=32
                )
                return flex_attention(q, k, v, self.mod, made)
        same = and_masks(masks.document_mask(self.ids), masks.causal_mask)
        return flex_attention(q, k, v, mask_mod=same)


KINDS = ["plain", "mod", "block mask", "block mask made inside", "documents"]
_LOAD = """
import sys, torch, flexattn
kind, archive, data = sys.argv[1:]
load = torch._inductor.aoti_load_package if kind == "aoti" else lambda path: torch.export.load(path).module()
model = load(archive)
for inputs, expected in torch.load(data):
    torch.testing.assert_close(model(*inputs), expected)
print("loaded")
"""


def inputs(length: int = L) -> tuple[Tensor, ...]:
    return tuple(torch.randn(B, H, length, D) for _ in range(3))


def loads(kind: str, archive: Path | str, data: Path) -> None:
    command = [sys.executable, "-c", _LOAD, kind, str(archive), str(data)]
    # From the folder of the package, so that it is the one under test in a checkout as well.
    folder = Path(flexattn.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.stdout.strip() == "loaded", done.stderr[-2000:]


def exported(model: nn.Module, dynamic: bool, strict: bool) -> torch.export.ExportedProgram:
    length = torch.export.Dim("length", min=33, max=4096)  # more than one row of blocks
    with torch.no_grad():
        shapes = ({2: length},) * 3 if dynamic else None
        return torch.export.export(model, inputs(), dynamic_shapes=shapes, strict=strict)


@pytest.mark.feature("torch.export, loaded in a new process")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_computes_the_same(kind: str, strict: bool) -> None:
    model = Attention(kind)
    program = exported(model, False, strict)
    given = inputs()
    torch.testing.assert_close(program.module()(*given), model(*given))
    targets = [str(n.target) for n in program.graph.nodes if "flexattn" in str(n.target)]
    assert targets[-1] == "flexattn.forward.default"


@pytest.mark.feature("torch.export, loaded in a new process")
@pytest.mark.parametrize("kind", ["mod", "block mask made inside"])
def test_an_exported_model_takes_other_lengths_in_a_new_process(kind: str, tmp_path: Path) -> None:
    model = Attention(kind).eval()
    program = exported(model, True, False)
    pairs = [(given, model(*given).detach()) for given in (inputs(), inputs(100), inputs(33))]
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save(pairs, tmp_path / "data.pt")
    loads("export", tmp_path / "model.pt2", tmp_path / "data.pt")


@pytest.mark.feature("AOTInductor, loaded in a new process")
@pytest.mark.parametrize(("kind", "dynamic"), [("plain", False), ("mod", True), ("documents", False)])
def test_a_package_of_aotinductor_runs_in_a_new_process(kind: str, dynamic: bool, tmp_path: Path) -> None:
    model = Attention(kind).eval()
    program = exported(model, dynamic, False)
    lengths = (L, 100) if dynamic else (L,)
    torch.save([(given, model(*given).detach()) for given in map(inputs, lengths)], tmp_path / "data.pt")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loads("aoti", package, tmp_path / "data.pt")
