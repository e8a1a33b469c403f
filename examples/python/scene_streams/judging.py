# SPDX-License-Identifier: Apache-2.0
"""Whether a description is true of a scene."""

from __future__ import annotations

from emoji_scenes import Scenes

__all__ = ["judged", "share_right"]


def judged(captions: list[str], scenes: Scenes, *, background: bool = True) -> list[tuple[str, bool]]:
    """Remarks: each caption, and whether it is true of its scene, with or without its background."""

    def compared(text: str) -> str:
        return text if background else text.rpartition(" on ")[0] or text

    pairs = zip(captions, scenes, strict=True)
    return [(caption, compared(caption) in map(compared, scene.captions)) for caption, scene in pairs]


def share_right(remarks: list[tuple[str, bool]]) -> float:
    return sum(right for _, right in remarks) / len(remarks)
