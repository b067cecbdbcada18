"""Models that call PyTorch's `flex_attention`, unchanged, on the kernels of this library.

While the route is on, the function `torch.nn.attention.flex_attention.flex_attention` runs other code. It stays the same
object, so that every name it was imported under is routed, and so is a `torch.compile(flex_attention)` made before.
Dynamo guards on the code of functions, so code that was compiled before a switch is compiled again after it.

Example:
    >>> import torch
    >>> from torch.nn.attention.flex_attention import flex_attention
    >>> from flexattn.integrations import torch_flex
    >>> q = torch.randn(1, 2, 64, 16, requires_grad=True)
    >>> with torch_flex.route():
    ...     flex_attention(q, q, q).sum().backward()  # PyTorch has no backward on a CPU
    >>> q.grad.shape
    torch.Size([1, 2, 64, 16])
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as theirs

from ..api import flex_attention
from ..block_mask import BlockMask
from ..codegen.errors import UnsupportedTorch
from ..codegen.private import SUPPORTED, find, version_of
from ..kernel_options import OPTIONS, PREFIXES
from ..listed_blocks import LISTS

__all__ = ["install", "installed", "route", "uninstall"]

_FUNCTION: Any = theirs.flex_attention
_HOP = find("torch.nn.attention.flex_attention.flex_attention_hop")
_TUNING = frozenset(theirs.FlexKernelOptions.__annotations__)
_KERNELS = ("FLASH", "TRITON_DECODE")  # of PyTorch's; which one runs changes no result
_OF_AMD = ("kpack", "matrix_instr_nonkdim", "waves_per_eu")


def install() -> None:
    """Route PyTorch's `flex_attention` here, in the whole process, until `uninstall`. Twice is as good as once.

    Every call of it, in eager code and in what `torch.compile` compiles, is then one of `flexattn.flex_attention`: block
    masks of PyTorch are converted, results have PyTorch's types, gradients work on a CPU too, and errors are this
    library's. What was exported or compiled ahead of time before stays what it was. Call it outside compiled functions.

    Raises:
        UnsupportedTorch: if PyTorch's function has other parameters than it has in the versions that are supported.
    """
    _state.switch(installed=True)


def uninstall() -> None:
    """Undo `install`. Where a `route` is still open, calls are routed until it ends."""
    _state.switch(installed=False)


def installed() -> bool:
    """Whether calls are routed now, by `install` or by an open `route`."""
    return _on


class route(contextlib.ContextDecorator):
    """A context manager, or a decorator, in which PyTorch's `flex_attention` is routed here; see `install`.

    Routes nest, and the last one to end switches back, also after an exception. It holds for the whole process: calls in
    other threads are routed as well as long as a route is open in one.

    Example:
        >>> import torch
        >>> import torch.nn.attention.flex_attention as torch_flex_attention
        >>> from flexattn.integrations import torch_flex
        >>> with torch_flex.route(), torch_flex.route():
        ...     torch_flex.installed()
        True
        >>> torch_flex.installed()
        False
    """

    def __enter__(self) -> None:
        _state.switch(routes=1)

    def __exit__(self, *exception: object) -> None:
        _state.switch(routes=-1)


def _routed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> Any:
    # Only the code of this function is used, with the globals and the defaults of PyTorch's.
    from flexattn.integrations.torch_flex import attention

    return attention(
        query, key, value, score_mod, block_mask, scale, enable_gqa, return_lse, kernel_options, return_aux
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None,
    block_mask: Any,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    kernel_options: Mapping[str, Any] | None,
    return_aux: Any,
) -> Any:
    """What a routed call does. Takes and returns what PyTorch's `flex_attention` does."""
    # True, except where another thread has just switched. Dynamo guards on what it reads here, so that code which was
    # compiled with the route is not used without it, not even where it does not guard on the code of the function.
    if not _on:
        return _FUNCTION(
            query,
            key,
            value,
            score_mod,
            block_mask,
            scale,
            enable_gqa,
            return_lse,
            kernel_options,
            return_aux=return_aux,
        )
    found: Any = flex_attention(  # type: ignore[call-overload]
        query,
        key,
        value,
        score_mod,
        _converted(block_mask),
        scale,
        enable_gqa,
        return_lse,
        _options(kernel_options),
        return_aux=return_aux,
    )
    if return_aux is None:
        return found
    out, aux = found
    return out, theirs.AuxOutput(aux.lse, aux.max_scores)


class _Known(NamedTuple):
    """A converted block mask without its mask_mod, which may refer to PyTorch's, and what it was made of."""

    mask: BlockMask
    lists: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    sizes: tuple[Any, Any]


_known: weakref.WeakKeyDictionary[theirs.BlockMask, _Known] = weakref.WeakKeyDictionary()


def _converted(block_mask: Any) -> Any:
    """PyTorch's block mask as ours; anything else as it is. Lists are checked when they are first met."""
    if not isinstance(block_mask, theirs.BlockMask):
        return block_mask
    if torch.compiler.is_compiling():
        return BlockMask.from_torch(block_mask)
    lists = tuple(getattr(block_mask, name) for name in LISTS)
    if any(t.is_inference() for t in lists if t is not None):  # no version to tell a write by
        return BlockMask.from_torch(block_mask)
    versions = tuple(version_of(t) for t in lists if t is not None)
    sizes = (block_mask.seq_lengths, block_mask.BLOCK_SIZE)
    known = _known.get(block_mask)
    if known is not None and known[2:] == (versions, sizes) and all(map(_same, known.lists, lists)):
        return known.mask.with_mask_mod(block_mask.mask_mod)
    made = BlockMask.from_torch(block_mask)
    _known[block_mask] = _Known(made.with_mask_mod(None), lists, versions, sizes)
    return made


def _same(one: object, other: object) -> bool:
    return one is other


def _options(given: Mapping[str, Any] | None) -> Any:
    """PyTorch's kernel options, less those that only its own kernels have, and those that it drops where they do not apply.

    What neither knows stays, to be refused.
    """
    if not isinstance(given, Mapping):
        return given
    kept = {}
    for name, value in given.items():
        bare = name[4:] if name.startswith(PREFIXES) else name
        if bare == "BACKEND" and value in _KERNELS:
            continue
        if bare == "USE_TMA" and value is True:  # a permission, not a demand
            continue
        if bare in _OF_AMD and torch.version.hip is None:
            continue
        if bare in OPTIONS or bare not in _TUNING:
            kept[name] = value
    return kept


def _watched_hop(*args: Any, **kwargs: Any) -> Any:
    """PyTorch's operator, as another object.

    Dynamo guards on that global wherever it has inlined PyTorch's `flex_attention`. It does not guard on the code of a
    function that is an attribute of a module before PyTorch 2.12.
    """
    return _HOP(*args, **kwargs)


_on = False


class _State:
    """Who wants the route, and what to put back when nobody does any more."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.installed = False
        self.routes = 0
        self.original: CodeType | None = None

    def switch(self, installed: bool | None = None, routes: int = 0) -> None:
        global _on
        with self.lock:
            wanted = self.installed if installed is None else installed
            if (wanted or self.routes + routes) and self.original is None:
                _check_parameters()
                self.original, _on = _FUNCTION.__code__, True
                self._replace(_routed.__code__, _watched_hop)
            elif not (wanted or self.routes + routes) and self.original is not None:
                self._replace(self.original, _HOP)
                self.original, _on = None, False
            self.installed, self.routes = wanted, self.routes + routes

    @staticmethod
    def _replace(code: CodeType, hop: Any) -> None:
        _FUNCTION.__code__ = code
        theirs.flex_attention_hop = hop


_state = _State()


def _check_parameters() -> None:
    """Raise `UnsupportedTorch` if PyTorch's function cannot take the code of ours."""
    ours = _parameters(_routed)
    if not isinstance(_FUNCTION, FunctionType) or _parameters(_FUNCTION) != ours:
        raise UnsupportedTorch(
            f"flexattn supports PyTorch {SUPPORTED}; this is {torch.__version__}, whose flex_attention has other parameters "
            f"than ({', '.join(ours[0])}). Call flexattn.flex_attention itself, with flexattn.BlockMask.from_torch(block_mask)"
        )


def _parameters(function: Any) -> tuple[tuple[str, ...], int, int, Any, Any, int]:
    """Names and kinds of the parameters, and the defaults."""
    code, flags = function.__code__, 0x04 | 0x08  # *args, **kwargs
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    kinds = code.co_posonlyargcount, code.co_kwonlyargcount
    return (names, *kinds, function.__defaults__, function.__kwdefaults__, code.co_flags & flags)
