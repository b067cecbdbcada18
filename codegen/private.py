"""Every private name of PyTorch that this library uses, and what it is used for. No other file names one.

All were found unchanged in PyTorch 2.11 to 2.15. If one is missing, its use raises `UnsupportedTorch`, which says what
cannot be done: when flexattn is imported, or for names that only some calls need, at the first such call. There is no
other way of doing the same, so never a wrong result in silence.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import torch

from .errors import UnsupportedTorch

SUPPORTED = "2.11 to 2.15"
_F = TypeVar("_F", bound=Callable[..., Any])


class Use(NamedTuple):
    """What a private name is needed for, when it is asked for, and how to do without the call that needs it."""

    name: str
    purpose: str
    when: str = "import"
    instead: str = "Install a supported version"


USES = {
    use.name: use
    for use in (
        Use("torch._ops.HigherOrderOperator", "the call that Dynamo captures"),
        Use(
            "torch._dynamo.variables.higher_order_ops._hop_name_to_variable_class",
            "telling Dynamo how to capture mods",
            "torch.compile",
            "Call it outside the compiled region: torch.compiler.disable(flex_attention)",
        ),
        Use(
            "torch._dynamo.variables.higher_order_ops.FlexAttentionHigherOrderVariable",
            "capturing mods in Dynamo",
            "torch.compile",
            "Call it outside the compiled region: torch.compiler.disable(flex_attention)",
        ),
        Use(
            "torch._dynamo.decorators.assume_constant_result",
            "functions that Dynamo runs while it traces; only the mark that it sets is used",
            "torch.compile",
            "Call it outside the compiled region: torch.compiler.disable(flex_attention)",
        ),
        Use("torch._C._AutoDispatchBelowAutograd", "the operator's autograd kernel"),
        Use("torch._C._after_autograd_keyset", "the operator's autograd kernel"),
        Use("torch._C._are_functorch_transforms_active", "torch.func transforms"),
        Use("torch._C._autograd._profiler_enabled", "noticing that operators are recorded"),
        Use("torch._C._len_torch_function_stack", "noticing modes that change what a mod does"),
        Use("torch._C._len_torch_dispatch_stack", "noticing modes that change what a mod does"),
        Use("torch.overrides._get_current_function_mode_stack", "noticing modes that change what a mod does"),
        Use("torch.utils._device.DeviceContext", "telling a default device from other modes"),
        Use("torch.nn.modules.module._global_forward_hooks", "noticing hooks of modules"),
        Use("torch.nn.modules.module._global_forward_pre_hooks", "noticing hooks of modules"),
        Use("torch.nn.modules.module._global_backward_hooks", "noticing hooks of modules"),
        Use("torch.nn.modules.module._global_backward_pre_hooks", "noticing hooks of modules"),
        Use("torch._C._functorch.is_legacy_batchedtensor", "noticing is_grads_batched, which operators do not know"),
        Use("torch._C.DisableTorchFunctionSubclass", "placeholders of a trace"),
        Use("torch._C.DisableTorchFunction", "placeholders of a trace"),
        Use("torch.Tensor._make_wrapper_subclass", "placeholders of a trace"),
        Use("torch.Tensor._base", "telling writes to captured tensors from writes to a mod's own"),
        Use("torch.Tensor._version", "noticing writes to tensors that cached results were made of"),
        Use("torch._subclasses.fake_tensor.FakeTensor", "tensors without data"),
        Use("torch.utils._python_dispatch.TorchDispatchMode", "recording what a call does"),
        Use("torch.utils._pytree.register_pytree_node", "block masks as trees of tensors"),
        Use("torch.utils._pytree.GetAttrKey", "block masks as trees of tensors"),
        Use("torch.autograd.forward_ad._current_level", "noticing forward-mode differentiation"),
        Use(
            "torch.nn.attention.flex_attention.flex_attention_hop",
            "routing calls of torch's flex_attention here",
            "flexattn.integrations.torch_flex",
            "Call flexattn.flex_attention itself",
        ),
    )
}


@cache
def find(name: str) -> Any:
    """The object of a name in `USES`. Raises `UnsupportedTorch` if this PyTorch has none."""
    use = USES[name]
    module, _, attribute = name.rpartition(".")
    try:
        try:
            holder = importlib.import_module(module)
        except ModuleNotFoundError:  # a class, such as torch.Tensor
            outer, _, inner = module.rpartition(".")
            holder = getattr(importlib.import_module(outer), inner)
        return getattr(holder, attribute)
    except (ImportError, AttributeError) as error:
        raise UnsupportedTorch(
            f"flexattn supports PyTorch {SUPPORTED}; this is {torch.__version__}, which has no {name}. "
            f"It is needed for {use.purpose}. {use.instead}"
        ) from error


HigherOrderOperator = find("torch._ops.HigherOrderOperator")
AutoDispatchBelowAutograd = find("torch._C._AutoDispatchBelowAutograd")
AFTER_AUTOGRAD = find("torch._C._after_autograd_keyset")
DisableTorchFunctionSubclass = find("torch._C.DisableTorchFunctionSubclass")
DisableTorchFunction = find("torch._C.DisableTorchFunction")
FakeTensor = find("torch._subclasses.fake_tensor.FakeTensor")
TorchDispatchMode: Any = find("torch.utils._python_dispatch.TorchDispatchMode")
register_pytree_node = find("torch.utils._pytree.register_pytree_node")
GetAttrKey = find("torch.utils._pytree.GetAttrKey")
transforms_are_active: Callable[[], bool] = find("torch._C._are_functorch_transforms_active")
is_legacy_batched: Callable[[torch.Tensor], bool] = find("torch._C._functorch.is_legacy_batchedtensor")
make_wrapper_subclass: Callable[..., Any] = find("torch.Tensor._make_wrapper_subclass")
base_of: Callable[[torch.Tensor], torch.Tensor | None] = find("torch.Tensor._base").__get__
version_of: Callable[[torch.Tensor], int] = find("torch.Tensor._version").__get__
find("torch.autograd.forward_ad._current_level")
_profiling: Callable[[], bool] = find("torch._C._autograd._profiler_enabled")
_function_modes: Callable[[], int] = find("torch._C._len_torch_function_stack")
_dispatch_modes: Callable[[], int] = find("torch._C._len_torch_dispatch_stack")
_function_mode_stack: Callable[[], list[Any]] = find("torch.overrides._get_current_function_mode_stack")
_DeviceContext = find("torch.utils._device.DeviceContext")
_GLOBAL_HOOKS = tuple(find(name) for name in USES if name.startswith("torch.nn.modules.module._global"))


def modes_are_active() -> bool:
    """Whether torch's functions may do something else than usual. A default device does not count."""
    if _dispatch_modes() or transforms_are_active():
        return True
    return _function_modes() > 0 and not all(type(mode) is _DeviceContext for mode in _function_mode_stack())


def watched() -> bool:
    """Whether someone may look at calls of operators: a mode, a transform, a profiler, or a trace of torch.jit."""
    return bool(
        _profiling() or _function_modes() or _dispatch_modes() or transforms_are_active() or torch.jit.is_tracing()
    )


def warms_up_for_a_graph(device: torch.device) -> bool:
    """Whether this runs on the stream of torch.compile's CUDA graphs, whose memory must be free again after each run."""
    trees: Any = sys.modules.get("torch._inductor.cudagraph_trees")  # not there before the first such graph
    if trees is None:
        return False
    try:
        manager = trees.get_manager(device.index, create_if_none_exists=False)
    except AssertionError:  # a thread that has none
        return False
    return manager is not None and bool(manager.stream == torch.cuda.current_stream(device))


def only_calls_forward(module: torch.nn.Module) -> bool:
    """Whether calling a module is calling its `forward`: it has no hooks and is not compiled."""
    return (
        module._compiled_call_impl is None
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not any(_GLOBAL_HOOKS)
    )


def constant_while_compiling(function: _F) -> _F:
    """`torch.compiler.assume_constant_result` by the mark that it sets: itself it imports Dynamo, which takes a second.

    Were the mark another one, Dynamo would trace these functions, and refuse what they do.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def forward_mode_is_on() -> bool:
    """Whether tensors may have tangents."""
    return torch.autograd.forward_ad._current_level >= 0


def is_mask_of_a_slice(mask_mod: Any) -> bool:
    """Whether this is what PyTorch puts in the place of the mask_mod of a slice: a function that raises.

    Told by its name: should it get another one, PyTorch's own message is raised where the mask is used.
    """
    return type(mask_mod) is FunctionType and mask_mod.__name__ == "_sliced_mask_mod_error"
