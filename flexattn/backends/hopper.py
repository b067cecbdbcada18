"""The warp-specialised forward kernel for Hopper GPUs, in the place of the ordinary one where it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.language import bfloat16, float16
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..codegen.gluon_form import gluon_form
from ..config import KernelConfig
from ..problem import Problem
from ..templates.hopper_forward import attention_forward_hopper
from .launch import Call

ROWS = 64
DT = {torch.bfloat16: bfloat16, torch.float16: float16}


def specialised(call: Call, problem: Problem) -> Call:
    tensors = {"q": problem.query, "k": problem.key, "v": problem.value}
    arguments = {name: value for name, value in call.arguments.items() if name not in tensors}
    arguments |= {name: gluon_form(arguments[name]) for name in ("score_mod", "mask_mod")}
    arguments["batch_step"] = int(problem.key.shape[0] > 1)

    def shaped(config: KernelConfig) -> dict[str, Any]:
        values = call.shaped(config)
        rows = {"q": ROWS, "k": values["shape"].BLOCK_N.value, "v": values["shape"].BLOCK_N.value}
        return values | {n: descriptor(t, rows[n]) for n, t in tensors.items()} | {"STAGES": config.num_stages}

    return call._replace(kernel=attention_forward_hopper, key=("hopper", *call.key), arguments=arguments, shaped=shaped)


def descriptor(t: Tensor, rows: int) -> TensorDescriptor:
    box = [1, 1, rows, t.shape[-1]]
    layout = NVMMASharedLayout.get_default_for(box, DT[t.dtype])
    return TensorDescriptor(t, list(t.shape), list(t.stride()), box, layout)
