# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of text and image as a file that programs in other languages read, too.

image CODES PATCHES      how many codes there are, and how many of them are one picture
<null>                   then the text tokens, one a line, in the order of their ids; image codes follow them
...
"""

from __future__ import annotations

from pathlib import Path

from scene_streams.vocabulary import BOI, EOI, SPECIAL, Vocabulary

from mixture_of_mamba import models

__all__ = ["VOCABULARY_NAME", "read_vocabulary", "write_vocabulary"]

VOCABULARY_NAME = "vocabulary.txt"


def write_vocabulary(path: Path, vocabulary: Vocabulary, patches: int) -> None:
    (codes,) = vocabulary.codes
    path.write_text("\n".join((f"image {codes} {patches}", *SPECIAL, *vocabulary.words, "")), encoding="utf-8")


def read_vocabulary(path: Path) -> models.Vocabulary:
    """Raises a ValueError where the file is another one."""
    first, *words = path.read_text(encoding="utf-8").splitlines()
    name, *sizes = first.split()
    if name != "image" or len(sizes) != 2 or tuple(words[: len(SPECIAL)]) != SPECIAL:
        raise ValueError(f"{path} is not a {VOCABULARY_NAME} of export_stream.py")
    codes, patches = map(int, sizes)
    text, image = models.TokenRange("text", len(words)), models.TokenRange("image", codes, BOI, EOI, patches)
    return models.Vocabulary((text, image))
