"""Train a byte-level GPT on packed documents, with attention written in a few lines.

The text is on every machine: the source files of Python's own standard library, each file a document. Documents of
natural length are laid end to end in one sequence, and two functions say what attention does with them: `packed_causal`
keeps each document to itself, `alibi` prefers what is near. On the way the script checks that a training step equals the
same step with dense reference attention, and that no document sees another; it ends by writing two pictures.

    python examples/train_packed.py            # about two minutes on two CPU cores; uses a GPU if there is one
    python examples/train_packed.py --smoke    # a few small steps
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import flexattn

SEQUENCE = 2048  # bytes in a packed sequence
LAYERS, WIDTH, HEADS, KV_HEADS = 4, 128, 4, 2
START = 256  # the token that begins a document; the others are bytes


def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Scores fall with distance, with a slope of each head's own: this takes the place of position embeddings."""
    return score - torch.exp2(-8 / HEADS * h) * (q_idx - kv_idx)


def packed_causal(document: Tensor) -> flexattn.BlockMask:
    """A byte sees what precedes it in its own document. `document` [B, S] numbers the documents of each sequence."""

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (document[b, q_idx] == document[b, kv_idx]) & (q_idx >= kv_idx)

    B, S = document.shape
    return flexattn.create_block_mask(mask_mod, B, None, S, S, device=document.device)


@dataclass
class Packed:
    """What the model reads, what it must predict, and the number of the document a position belongs to; all [B, S]."""

    tokens: Tensor
    targets: Tensor
    document: Tensor

    def window(self, start: int, length: int) -> Packed:
        """`length` positions of each sequence."""
        return Packed(*(t[:, start : start + length] for t in (self.tokens, self.targets, self.document)))

    def boundary(self) -> int:
        """The first position of the second document."""
        return int((self.document[0] == 0).sum())


def read_documents(seed: int, largest: int, total: int = 6_000_000) -> list[bytes]:
    """Files of the standard library of up to `largest` bytes, so that some share a sequence, in an order of `seed`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}  # encodings: near copies
    paths = sorted(p for p in root.rglob("*.py") if skip.isdisjoint(p.relative_to(root).parts))
    random.Random(seed).shuffle(paths)
    documents = []
    for path in paths:
        if 0 < path.stat().st_size <= min(largest, total):
            documents.append(path.read_bytes())
            total -= len(documents[-1])
    return documents


def pack(documents: list[bytes], length: int, seed: int, device: str) -> Iterator[Packed]:
    """Sequences of documents laid end to end, without padding, for ever. A document that does not fit is split."""
    generator = random.Random(seed)
    queue: list[bytes] = []
    while True:
        tokens: list[int] = []
        targets: list[int] = []
        document: list[int] = []
        while len(targets) < length:
            queue = queue or generator.sample(documents, len(documents))
            text, room = queue.pop(), length - len(targets)
            piece = text[:room]
            if len(text) > room:
                queue.append(text[room:])
            tokens += [START, *piece[:-1]]
            targets += piece
            document += [document[-1] + 1 if document else 0] * len(piece)
        yield Packed(*(torch.tensor([x], device=device) for x in (tokens, targets, document)))


class Block(nn.Module):
    """A transformer layer with grouped query heads."""

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.split = [HEADS * size, KV_HEADS * size, KV_HEADS * size]
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.qkv = nn.Linear(WIDTH, sum(self.split), bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, block_mask: flexattn.BlockMask, backend: str) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)  # [B, heads, S, size]
            for t in self.qkv(self.norm1(x)).split(self.split, dim=-1)
        )
        y = flexattn.flex_attention(q, k, v, score_mod=alibi, block_mask=block_mask, enable_gqa=True, backend=backend)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out. One block mask serves all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(257, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: Tensor, document: Tensor, backend: str = "auto") -> Tensor:
        block_mask = packed_causal(document)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, block_mask, backend)
        return self.head(self.norm(x))

    def loss(self, batch: Packed, backend: str = "auto") -> Tensor:
        """Mean cross entropy of a byte, in nats."""
        logits = self(batch.tokens, batch.document, backend)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())


def require(holds: bool, claim: str) -> None:
    if not holds:
        raise SystemExit(f"Check failed, this should hold: {claim}")


def check_reference(model: GPT, batch: Packed) -> str:
    """Loss and gradients of a step equal those of dense reference attention, up to rounding.

    Float64 tells what rounding costs: a dense float32 step misses it by e. The blocked step rounds as often, in another
    order; grant it 2 e, and the two float32 steps lie at most 3 e apart.
    """

    def step(backend: str, dtype: torch.dtype) -> Tensor:
        twin = copy.deepcopy(model).to(dtype)
        loss = twin.loss(batch, backend)
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        return torch.cat([t.double().flatten() for t in (loss.detach(), *gradients)])

    exact, dense = step("reference", torch.float64), step("reference", torch.float32)
    blocked = step("auto", torch.float32)
    apart, allowed = ((x / exact.norm()).item() for x in ((blocked - dense).norm(), 3 * (dense - exact).norm()))
    claim = f"a step equals the step with reference attention (difference {apart:.1e}, rounding allows {allowed:.1e})"
    require(apart <= allowed, claim)
    return claim


@torch.no_grad()
def check_isolation(model: GPT, batch: Packed) -> str:
    """Other bytes in the first half of the second document: its second half sees them, no other document does."""
    start = batch.boundary()
    stop = start + int((batch.document[0] == 1).sum())
    middle = (start + stop) // 2
    tokens = batch.tokens.clone()
    tokens[0, start + 1 : middle] = 255 - tokens[0, start + 1 : middle]  # all but the start token
    before, after = (model(t, batch.document)[0] for t in (batch.tokens, tokens))
    same = (before == after).all(-1)
    rows = (~same).nonzero().flatten().tolist() or [-1]
    where = f"other bytes at {start}:{middle} changed logits at {rows[0]}:{rows[-1] + 1} of {len(same)}"
    claim = f"no document sees another ({where}; the document is {start}:{stop})"
    require(bool(same[: start + 1].all() and same[stop:].all()), claim)
    require(not bool(same[middle]), "a byte sees what precedes it in its own document")
    return claim


def draw_loss(path: Path, train: list[float], validation: dict[int, float]) -> None:
    """Loss over the steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(train) + 1), train, linewidth=0.8, alpha=0.6, label="training")
    axes.plot(list(validation), list(validation.values()), marker="o", label="validation")
    axes.set(xlabel="step", ylabel="bits per byte", title="Byte-level GPT on packed documents")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def draw_mask(path: Path, batch: Packed, detail: int = 48) -> None:
    """The block mask of a sequence, and its elements around the first boundary between documents."""
    mask = packed_causal(batch.document)
    kind = mask.to_dense()[0, 0].cpu()  # 0 skipped, 1 partial
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        for row, count, blocks in zip(kind, mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True):
            row[blocks[:count].long().cpu()] = 2  # full
    S, start = len(batch.document[0]), max(0, batch.boundary() - detail // 2)
    end = start + detail
    element = flexattn.create_mask(mask.mask_mod, 1, 1, S, S, device=mask.device)[0, 0, start:end, start:end].cpu()
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = ["whitesmoke", "orange", "steelblue"]
    left.imshow(kind, cmap=ListedColormap(colors), vmin=0, vmax=2, extent=(0, S, S, 0))
    left.set_title(f"Blocks of {mask.BLOCK_SIZE[0]}: orange partial, blue full, {mask.sparsity():.0f} % skipped")
    right.imshow(element, cmap=ListedColormap(colors[::2]), vmin=0, vmax=1, extent=(start, end, end, start))
    right.set_title(f"Elements where the second document begins, at {batch.boundary()}")
    for axes in (left, right):
        axes.set(xlabel="key", ylabel="query")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="a few steps on short sequences")
    args = parser.parse_args()
    steps, length = (4, 512) if args.smoke else (args.steps, SEQUENCE)
    device = args.device
    torch.manual_seed(args.seed)

    documents = read_documents(args.seed, largest=length + length // 2)
    require(len(documents) >= 20, "the sources of the standard library are installed")  # Debian has 40 short ones
    held_out = len(documents) // 10
    batches = pack(documents[held_out:], length, args.seed, device)
    validation_set = list(islice(pack(documents[:held_out], length, args.seed, device), 1 if args.smoke else 4))
    several = next(  # three documents, the first of some length
        b
        for b in pack(documents[:held_out], length, args.seed, device)
        if b.document.max() >= 2 and b.boundary() >= length // 8
    )

    model = GPT().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # warmup, then a cosine
        optimizer, max_lr=6e-3, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
    )
    precision = torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda"))
    print(
        f"{len(documents)} documents, {sum(map(len, documents)):,} bytes, {held_out} held out; "
        f"{sum(p.numel() for p in model.parameters()):,} parameters; {length} bytes a step; {device}"
    )

    train: list[float] = []
    validation: dict[int, float] = {}
    passed: list[str] = []
    seconds = 0.0
    with tqdm(range(1, steps + 1), unit="step") as progress:
        for step in progress:
            began = time.perf_counter()
            with precision:
                loss = model.loss(next(batches))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            train.append(loss.item() / math.log(2))
            seconds += time.perf_counter() - began
            if step % max(1, steps // 10) == 0 or step == steps:
                with torch.no_grad(), precision:
                    losses = [model.loss(batch).item() for batch in validation_set]
                validation[step] = sum(losses) / len(losses) / math.log(2)
            if step == (steps + 1) // 2:
                passed.append(check_reference(model, several.window(max(0, several.boundary() - 256), 512)))
                with precision:
                    passed.append(check_isolation(model, several))
            progress.set_postfix_str(f"loss {train[-1]:.2f} bits/byte, {step * length / seconds:,.0f} tokens/s")

    pictures = args.out / "loss.png", args.out / "block_mask.png"
    args.out.mkdir(parents=True, exist_ok=True)
    draw_loss(pictures[0], train, validation)
    draw_mask(pictures[1], several)
    last = train[-max(1, steps // 10) :]
    print(f"Training loss   {sum(last) / len(last):.3f} bits per byte (mean of the last {len(last)} steps)")
    print(f"Validation loss {validation[steps]:.3f} bits per byte; {steps * length / seconds:,.0f} tokens/s")
    print(*(f"Check passed: {claim}" for claim in passed), *(f"Wrote {path}" for path in pictures), sep="\n")


if __name__ == "__main__":
    main()
