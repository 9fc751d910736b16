"""What readers yield and raise: entries as they stand in a data set, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What an entry may hold; everything else in it is passed over.
FIELDS = ("id", "image", "conversations", "depth", "masks", "family", "pair", "conflict")
LONGEST_ENTRY = 16 << 20  # bytes of one entry; more is an unclosed bracket or an attack
PICTURES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "jp2"))


class Malformed(Exception):
    """One entry can't be used; the message says why. Never leaves this package and manifest.py."""


class Broken(Exception):
    """A file can't be read from here on; the message says where and why. Never leaves unimrg/data."""


@dataclass(frozen=True)
class Packed:
    """An entry whose picture lies inside of the file that it was read from.

    value: as in JSON, or Malformed. image: a name for the picture, unique in the data set. place: see
    `unimrg.data.pictures`. Readers make these; an entry that names a place itself isn't listened to.
    """

    value: Any
    image: str
    place: str
