# SPDX-License-Identifier: Apache-2.0
"""Which scenes are trained on, and which are held out."""

from __future__ import annotations

from emoji_scenes.pack import SpritePack
from emoji_scenes.scenes import SceneSource

__all__ = ["HELD_OUT_SEED", "Splits"]

TRAINING, VALIDATION, NEW_DRAWINGS, FITTING, NEW_RECORDINGS = range(5)  # streams of scenes
HELD_OUT_SEED = 20250127
HOLD_OUT_EVERY = 20  # every 20th concept is never trained on


class Splits:
    """Sources of scenes.

    Attributes:
        known: concepts that training may show.
        training: endless; a run's seed gives it scenes of its own.
        held_out: other scenes of the same concepts, the same for all runs.
        new_drawings: scenes of concepts never trained on; None where there are too few concepts.
        fitting: what tokenisers are fitted to.
        new_recordings: for speech in voices never trained on.
    """

    def __init__(self, pack: SpritePack, seed: int) -> None:
        concepts = range(len(pack.names))
        self.known = [c for c in concepts if c % HOLD_OUT_EVERY != HOLD_OUT_EVERY - 1]
        new = list(concepts[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY])
        self.training = SceneSource(pack, self.known, seed, TRAINING)
        self.held_out = SceneSource(pack, self.known, HELD_OUT_SEED, VALIDATION)
        self.new_drawings = SceneSource(pack, new, HELD_OUT_SEED, NEW_DRAWINGS) if new else None
        self.fitting = SceneSource(pack, self.known, HELD_OUT_SEED, FITTING)
        self.new_recordings = SceneSource(pack, self.known, HELD_OUT_SEED, NEW_RECORDINGS)
