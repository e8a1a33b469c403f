# SPDX-License-Identifier: Apache-2.0
"""The operators' registrations in C++, beside Python's and without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mixture_of_mamba as mom
from mixture_of_mamba import _library


def test_python_s_registrations_stand(cpp):
    assert not cpp.initialize()


def run_apart(cpp_path: Path, program: str) -> str:
    """In a process of its own, with the operator library and the C++ module but without the Python package."""
    head = (
        "import importlib.util, torch\n"
        f"torch.ops.load_library({str(_library.CPU_LIBRARY)!r})\n"
        f"spec = importlib.util.spec_from_file_location('mixture_of_mamba_cpp', {str(cpp_path)!r})\n"
        "cpp = importlib.util.module_from_spec(spec); spec.loader.exec_module(cpp)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(mom.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", head + program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_registrations_of_cpp_pass_torch_s_own_checks(cpp_path):
    """Schema, autograd, fake and ahead-of-time dispatch with symbolic shapes, where Python's are absent."""
    printed = run_apart(
        cpp_path,
        """
assert cpp.initialize()
ops = torch.ops.mixture_of_mamba
torch.manual_seed(0)
def leaf(*shape): return torch.randn(*shape).requires_grad_()
ids = torch.randint(-1, 3, (2, 5))
rows, order, offsets = ops.modality_routing(ids, 3, True)
host = offsets.long()
weights = lambda *shape: [leaf(*shape) for _ in range(3)]
A, B = -torch.rand(4, 3), leaf(2, 5, 3)
block = (leaf(2, 5, 6), weights(8, 6), [], leaf(4, 3), leaf(4), weights(8, 4), weights(4, 2), weights(4), leaf(4, 3),
         leaf(4), weights(6, 4), [], rows, offsets, host, None, leaf(2, 2, 4), leaf(2, 4, 3), False, True)
calls = {
    "modality_routing": (ids, 3, True),
    "permute_rows": (leaf(2, 5, 4), order, rows),
    "grouped_linear": (leaf(2, 5, 4), weights(6, 4), weights(6), offsets, host),
    "causal_conv1d": (leaf(2, 5, 4), leaf(4, 3), leaf(4), rows, offsets, None, leaf(2, 2, 4), True),
    "selective_scan": (leaf(2, 5, 4), leaf(2, 5, 4), A.requires_grad_(), B, B, leaf(4), leaf(2, 5, 4), leaf(3, 4), rows,
                       offsets, None, leaf(2, 4, 3), True, False, True),
    "mamba_block": block,
}
for name, arguments in calls.items():
    torch.library.opcheck(getattr(ops, name).default, arguments)
    print(name)
""",
    )
    assert printed.split() == [
        "modality_routing",
        "permute_rows",
        "grouped_linear",
        "causal_conv1d",
        "selective_scan",
        "mamba_block",
    ]


def test_the_package_after_cpp_s_registrations_says_what_to_do(cpp_path):
    printed = run_apart(
        cpp_path,
        """
assert cpp.initialize()
try:
    import mixture_of_mamba
except ImportError as error:
    print(error)
""",
    )
    assert "import mixture_of_mamba before" in printed
