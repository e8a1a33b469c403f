# SPDX-License-Identifier: Apache-2.0
"""Text and discrete image tokens in one causal stream, as in Chameleon, on endless captioned pictures.

    pip install -r examples/python/requirements.txt
    python examples/python/chameleon.py                              # minutes on two CPU cores
    python examples/python/chameleon.py --mixer mamba --compare runs/chameleon-small-mom
    python examples/python/chameleon.py --device cuda --amp --size base
    torchrun --nproc-per-node 2 examples/python/chameleon.py --parallel fsdp2

A run can be stopped at any moment, even by kill -9; the same command goes on, to the same losses bit by bit.
"""

from __future__ import annotations

from training_kit.startup import imports_explained

with imports_explained():
    from discrete_kit.arguments import parse_chameleon
    from discrete_kit.data import load_scenes
    from discrete_kit.task import DiscreteTask
    from training_kit.app import Setting, finish, run

CHAMELEON = Setting(parse_chameleon, ("codes",), load_scenes, DiscreteTask)


def main() -> int:
    return run(__doc__ or "", CHAMELEON)


if __name__ == "__main__":
    finish(main)
