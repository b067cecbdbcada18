"""What a mod may not call, and what to write instead."""

from __future__ import annotations

from .errors import TraceError


def unsupported(name: str) -> TraceError:
    return TraceError(
        f"calls `{name}`, which has no counterpart in a kernel",
        "Mods may use elementwise torch functions, indexing of captured tensors and small reductions of captured rows.",
        "an expression of supported functions (docs/operations.md lists them)",
    )


def random_number(name: str) -> TraceError:
    return TraceError(
        f"draws random numbers with `{name}`",
        "The mod is traced once, so every score would get the same number.",
        "draw outside and index the result: noise[b, h, q_idx, kv_idx]",
    )


def write(name: str, shared: bool = False) -> TraceError:
    if shared:
        return TraceError(
            f"writes with `{name}` to what `detach` or `.data` gives",
            "In torch that would change the value which was detached, too.",
            "a new value: x = score.detach() + 1",
        )
    return TraceError(
        f"writes to a captured tensor with `{name}`",
        "The kernel runs for all elements at once and in no order, so a write has no defined result.",
        "a new value: x = t[h] + 1, and updates outside the mod",
    )


def value_read(name: str) -> TraceError:
    """`name` asks a traced tensor for its value: `item`, `__index__` of a list's index, `__hash__` of a dictionary's key."""
    what, instead = {
        "__index__": (
            "uses a traced index where Python needs a number (in a list or a range)",
            "a tensor made outside the mod: values = torch.tensor([...]), and values[h] in it",
        ),
        "__hash__": (
            "looks up a traced value in a dictionary or a set",
            "a tensor made outside the mod: values = torch.tensor([...]), and values[h] in it; for a set (x == 1) | (x == 4)",
        ),
    }.get(
        name,
        (
            f"reads the value of a traced tensor with `{name}`",
            "torch functions of the tensor itself, torch.where for choices",
        ),
    )
    return TraceError(
        what,
        "A score or an index has no value while a mod is traced: the kernel evaluates a whole tile at once.",
        instead,
    )


def without_gradient() -> TraceError:
    return TraceError(
        "computes where gradients are off: under torch.no_grad, or in the forward of a torch.autograd.Function",
        "The derivative is generated from the operations, and would go through these.",
        "x.detach() for what shall have no gradient; a gradient of one's own is taken outside of attention",
    )


def own_gradient() -> TraceError:
    return TraceError(
        "applies a torch.autograd.Function to a traced tensor",
        "The derivative is generated from the operations, and would not be the backward of that function.",
        "the operations themselves, with x.detach() for what shall have no gradient: x + (f(x) - x).detach() has the value "
        "of f and the gradient of x",
    )
