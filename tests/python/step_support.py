# SPDX-License-Identifier: Apache-2.0
"""Calls of the operators that update their state in place, from arguments of the ones that do not."""

from __future__ import annotations

import torch
from support import Arguments, Results

import mixture_of_mamba as mom

NOT_OF_A_STEP = ("cu_seqlens", "initial_state", "reverse")


def of_a_step(arguments: Arguments) -> Arguments:
    return {name: value for name, value in arguments.items() if name not in NOT_OF_A_STEP}


def step(function, arguments: Arguments, dtype: torch.dtype | None = None) -> Results:
    """The state begins as the initial one, in its dtype unless one is given."""
    state = arguments["initial_state"].to(dtype or arguments["initial_state"].dtype, copy=True)
    with torch.no_grad():
        return {"out": function(state=state, **of_a_step(arguments)), "state": state}


def replayed_step(first: Arguments, second: Arguments) -> Results:
    """A step of the scan that was captured in a CUDA graph with the first arguments and is replayed with the second."""
    given = of_a_step(first)
    static = {name: value.clone() if torch.is_tensor(value) else value for name, value in given.items()}
    state = first["initial_state"].clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        mom.selective_scan_step(state=state, **static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mom.selective_scan_step(state=state, **static)
    for name, value in static.items():
        if torch.is_tensor(value):
            value.copy_(second[name])
    state.copy_(second["initial_state"])
    graph.replay()
    return {"out": out, "state": state}
