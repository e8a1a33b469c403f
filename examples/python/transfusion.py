# SPDX-License-Identifier: Apache-2.0
"""Text tokens and continuous image latents in one stream, as in Transfusion, on endless captioned pictures.

    pip install -r examples/python/requirements.txt
    python examples/python/transfusion.py                            # minutes on two CPU cores
    python examples/python/transfusion.py --mixer mamba --compare runs/transfusion-small-mom
    python examples/python/transfusion.py --device cuda --amp --size base
    torchrun --nproc-per-node 2 examples/python/transfusion.py --parallel fsdp2

Text is predicted token by token, pictures by flow matching: the velocity from picture to noise. A run can be stopped at
any moment, even by kill -9; the same command goes on, to the same losses bit by bit.
"""

from __future__ import annotations

from training_kit.startup import imports_explained

with imports_explained():
    from discrete_kit.data import load_scenes
    from training_kit.app import Setting, finish, run
    from transfusion_kit.arguments import parse_transfusion
    from transfusion_kit.task import TransfusionTask

TRANSFUSION = Setting(parse_transfusion, ("latents", "diffusion_weight"), load_scenes, TransfusionTask)


def main() -> int:
    return run(__doc__ or "", TRANSFUSION)


if __name__ == "__main__":
    finish(main)
