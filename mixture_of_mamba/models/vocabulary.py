# SPDX-License-Identifier: Apache-2.0
"""One numbering of all modalities' tokens, and which token may follow in which region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from mixture_of_mamba.models.checks import check_ids, first_outside
from mixture_of_mamba.routing_forms import is_row_of_integers, kind_of, tensor_or_list

__all__ = ["TokenRange", "Vocabulary"]


@dataclass(frozen=True)
class TokenRange:
    """Tokens of one modality.

    Attributes:
        name: "text", "image", ..; for messages and for reports.
        size: how many tokens.
        begin, end: token ids, text both, that stand before and after a region of this modality (BOI and EOI).
        length: tokens in one region (1024 in Chameleon's images); None when regions differ and ``end`` is chosen.
    """

    name: str
    size: int
    begin: int | None = None
    end: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class Vocabulary:
    """Contiguous ranges of token ids, one a modality: text first, then image, speech and so on.

    Token ids 0 .. size[0] - 1 are modality 0, the next size[1] are modality 1, and so on; -1 is padding. What begins
    and ends a region is text.
    """

    ranges: tuple[TokenRange, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranges", tuple(self.ranges))
        if not self.ranges:
            raise ValueError("ranges must hold one TokenRange per modality, text first, got none")
        text = self.ranges[0]
        special: list[int] = []
        for m, one in enumerate(self.ranges):
            if one.size < 1:
                raise ValueError(f"ranges[{m}] must have a size of at least 1, got {one.size}")
            if m == 0:
                if (one.begin, one.end, one.length) != (None, None, None):
                    raise ValueError("ranges[0] is text and must have no begin, end and length, got some")
                continue
            for name in ("begin", "end"):
                token = getattr(one, name)
                if token is None or not 0 <= token < text.size:
                    raise ValueError(f"ranges[{m}].{name} must be a text token, 0 .. {text.size - 1}, got {token}")
                special.append(token)
            if one.length is not None and one.length < 1:
                raise ValueError(f"ranges[{m}].length must be at least 1, got {one.length}")
        if len(set(special)) != len(special):
            raise ValueError(f"ranges must all have a begin and an end of their own, got tokens {special}")

    @property
    def num_modalities(self) -> int:
        return len(self.ranges)

    @property
    def size(self) -> int:
        return sum(one.size for one in self.ranges)

    def first(self, modality: int) -> int:
        """The first token id of a modality; of ``num_modalities``, the vocabulary's size."""
        if not 0 <= modality <= self.num_modalities:
            raise ValueError(f"modality must lie in 0 .. num_modalities = {self.num_modalities}, got {modality}")
        return sum(one.size for one in self.ranges[:modality])

    def modality_of(self, tokens: Tensor) -> Tensor:
        """Modality ids of token ids, int64 with the same shape; -1 (padding) stays -1."""
        if not isinstance(tokens, Tensor) or tokens.is_floating_point():
            raise ValueError(f"tokens must be a tensor of integers, got {kind_of(tokens)}")
        check_ids(tokens, self.size, "size")
        modality = -(tokens < 0).long()
        for m in range(1, self.num_modalities):
            modality = modality + (tokens >= self.first(m))
        return modality

    def tokens_of(self, codes: Sequence[int] | Tensor, modality: int) -> Tensor:
        """A region: begin, the codes (counted from 0 in their modality), end. int64 ``[codes + 2]``.

        Args:
            codes: integers ``[codes]``, as many as a region of the modality has. Values on a GPU are not checked.
            modality: 1 .. num_modalities - 1.
        """
        last = self.num_modalities - 1
        if not isinstance(modality, Integral) or isinstance(modality, bool) or not 1 <= modality <= last:
            raise ValueError(
                f"modality must be an integer in 1 .. num_modalities - 1 = {last} (0, text, has no regions), "
                f"got {modality!r}"
            )
        one = self.ranges[modality]
        codes = _checked_codes(codes, one)
        body = codes.long() + self.first(modality)
        return torch.cat((body.new_tensor([one.begin]), body, body.new_tensor([one.end])))

    def legal(self, *, device: torch.device | None = None, regions: bool = True) -> Tensor:
        """Which token may follow: bool ``[2 * modalities, size]``.

        Row m: inside a region of modality m (row 0: text). Row modalities + m: the region has all its tokens, and only
        its end may follow. In text, all text may follow but the ends of regions; nor their beginnings, if not
        ``regions``.
        """
        count = self.num_modalities
        table = torch.zeros(2 * count, self.size, dtype=torch.bool)
        table[0, : self.ranges[0].size] = True
        for m, one in enumerate(self.ranges[1:], start=1):
            assert one.begin is not None and one.end is not None
            table[0, one.end] = False
            table[0, one.begin] &= regions
            table[m, self.first(m) : self.first(m + 1)] = True
            table[m, one.end] = one.length is None
            table[count + m, one.end] = True
        table[count] = table[0]
        return table.to(device) if device is not None else table


def _checked_codes(codes: Sequence[int] | Tensor, one: TokenRange) -> Tensor:
    given = tensor_or_list(codes)
    if given is None:
        raise ValueError(f"codes must be a tensor or a list of integers, got {kind_of(codes)}")
    if not is_row_of_integers(given):
        raise ValueError(f"codes must be integers [codes], got {kind_of(given)}")
    if one.length is not None and len(given) != one.length:
        raise ValueError(f"codes must be as many as a region of {one.name} has, {one.length}, got {len(given)}")
    outside = first_outside(given, 0, one.size - 1)
    if outside is not None:
        raise ValueError(
            f"codes must lie in 0 .. size - 1 = {one.size - 1} of {one.name}, got {given[outside]} at {outside}"
        )
    return given if isinstance(codes, Tensor) else given.to(torch.get_default_device())
