"""From an opened picture to the slices that the encoder takes."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from huoyan.media.picture import Picture
from huoyan.media.slicing import cut_slices, plan_slices
from huoyan.media.types import MediaItem, PreparedPicture, SlicePlan, SliceRules

if TYPE_CHECKING:
    from huoyan.media.originals import Originals


def prepare_picture(
    picture: Picture, rules: SliceRules, max_slice_nums: int | None = None, originals: Originals | None = None
) -> PreparedPicture:
    """Plan, resize and cut one picture. `max_slice_nums` overrides the checkpoint's own.

    With `originals`, a picture that they take stays as it is, to be resized where it is encoded.
    """
    plan = plan_slices(picture.size, rules, max_slice_nums)
    key = _key(picture.digest, plan)
    kept = None if originals is None else originals.keep(key, plan, picture.pixels)
    return kept or PreparedPicture(key, plan, slices=cut_slices(picture.pixels, plan))


def prepare_items(
    items: Sequence[MediaItem], rules: SliceRules, originals: Originals | None = None
) -> list[PreparedPicture]:
    """Prepare every picture of every item, in order; `originals` as of `prepare_picture`."""
    pictures = [(picture, item.max_slice_nums) for item in items for picture in item.pictures]
    Picture.digest_together([picture for picture, _ in pictures])
    return [prepare_picture(picture, rules, limit, originals) for picture, limit in pictures]


def _key(digest: bytes, plan: SlicePlan) -> bytes:
    numbers = (*plan.overview, *(plan.grid or (0, 0)), *(plan.cell or (0, 0)))
    return hashlib.blake2b(digest + struct.pack("<6Q", *numbers), digest_size=16).digest()
