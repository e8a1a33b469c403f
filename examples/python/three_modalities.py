# SPDX-License-Identifier: Apache-2.0
"""Text, discrete image tokens and discrete speech tokens in one causal stream, as in the paper's third setting.

    pip install -r examples/python/requirements.txt
    python examples/python/three_modalities.py                       # minutes on two CPU cores
    python examples/python/three_modalities.py --mixer in_proj,out_proj
    python examples/python/three_modalities.py --device cuda --amp --size base
    torchrun --nproc-per-node 2 examples/python/three_modalities.py --parallel ddp

What the model says is in speech/ of the run's folder, to be listened to. A run can be stopped at any moment, even by
kill -9; the same command goes on, to the same losses bit by bit.
"""

from __future__ import annotations

from training_kit.startup import imports_explained

with imports_explained():
    from discrete_kit.arguments import parse_three_modalities
    from discrete_kit.data import load_spoken_scenes
    from discrete_kit.task import DiscreteTask
    from training_kit.app import Setting, finish, run

THREE_MODALITIES = Setting(parse_three_modalities, ("codes", "speech_codes"), load_spoken_scenes, DiscreteTask)


def main() -> int:
    return run(__doc__ or "", THREE_MODALITIES)


if __name__ == "__main__":
    finish(main)
