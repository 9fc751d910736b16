"""Entries of WebDataset tars: neighbouring members of one name and several suffixes are one sample.

    000017.jpg   the picture (any of PICTURES)
    000017.json  the entry: an object with `conversations`, or the conversation itself as a list
    000017.txt   without .json: a caption, the answer to CAPTION_QUESTION

The name of a member is split at the first dot after the last slash, as WebDataset does. Only headers and
texts are read; a picture is named by its place in the tar, so tars must not be compressed.
"""

from __future__ import annotations

import json
import posixpath
import struct
import tarfile
from collections.abc import Iterator
from typing import Any

from unimrg.data.readers.entries import LONGEST_ENTRY, PICTURES, Broken, Malformed, Packed
from unimrg.data.readers.source import Source

CAPTION_QUESTION = "Describe the image."
PADDING = 1 << 20  # the most zeros behind the end; tar writes up to 10 KiB
TEXTS = frozenset(("json", "txt"))

Parts = dict[str, Any]  # of a sample, by suffix: the member of a picture, what a text member says


def read_tar(source: Source, path: str) -> Iterator[Any]:
    """Entries of the tar `path`. Raises Broken where it can't be followed any further, and StorageError."""
    source.most = LONGEST_ENTRY  # of a header or a text
    name, parts = "", Parts()
    broken: Broken | None = None
    try:
        for member in _members(source):
            folder, base = posixpath.split(member.name)
            stem, _, suffix = base.partition(".")
            stem, suffix = posixpath.join(folder, stem), suffix.lower()
            if suffix not in PICTURES | TEXTS:
                continue
            if parts and (stem != name or suffix in parts):
                yield _sample(source, path, name, parts)
                parts = Parts()
            name = stem
            parts[suffix] = member if suffix in PICTURES else _text(source, member)
    except Broken as error:
        broken = error
    if parts:
        yield _sample(source, path, name, parts)
    if broken is not None:
        raise broken


def _members(source: Source) -> Iterator[tarfile.TarInfo]:
    """Members but folders, without keeping them. Raises Broken."""
    end = -1
    try:
        archive = tarfile.TarFile(fileobj=source, mode="r")  # type: ignore[arg-type]
        while (member := archive.next()) is not None:
            if archive.offset <= end:
                raise Broken(f"the member at byte {member.offset} leads back")
            end = archive.offset
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            if not member.isdir():
                yield member
    except (tarfile.TarError, RecursionError, ValueError, OverflowError, struct.error) as error:
        raise Broken(f"the tar breaks at byte {max(end, 0)}: {error}") from error
    # tarfile takes a damaged header for the end. Behind the true end are zeros, or nothing.
    source.seek(archive.offset)
    if any(source.read(PADDING)) or source.size > archive.offset + PADDING:
        raise Broken(f"the tar ends at byte {archive.offset}, but not the file: damage, or two tars in one")


def _text(source: Source, member: tarfile.TarInfo) -> str | Malformed:
    """What a member says, or why it can't be read."""
    if not member.isreg() or member.issparse():
        return Malformed(f"{member.name} is a link or has holes; only plain members are read")
    if member.size > LONGEST_ENTRY:
        return Malformed(f"{member.name} has {member.size} bytes, at most {LONGEST_ENTRY}")
    source.seek(member.offset_data)
    try:
        return source.read(member.size).decode()
    except UnicodeDecodeError as error:
        return Malformed(f"{member.name} is not UTF-8: {error}")


def _sample(source: Source, path: str, name: str, parts: Parts) -> Any:
    pictures = {suffix: part for suffix, part in parts.items() if suffix in PICTURES}
    value = _value(parts)
    if isinstance(value, dict):
        value.setdefault("id", posixpath.normpath(f"{path}/{name}"))
    if not pictures:
        if isinstance(value, dict) and value.get("image") is not None:
            return Malformed(
                f"{path}/{name} has no picture beside it; members of a sample must be neighbours"
            )
        return value
    picture = next(iter(pictures.values()))
    if len(pictures) > 1:
        value = Malformed(f"{len(pictures)} pictures of one name; a sample has one")
    if not picture.isreg() or picture.issparse():
        value = Malformed(f"{picture.name} is a link or has holes; only plain members are read")
    return Packed(value, f"{path}/{picture.name}", f"{source.name}@{picture.offset_data}+{picture.size}")


def _value(parts: Parts) -> Any:
    """The entry of a sample as in JSON, or Malformed."""
    text = parts.get("json", parts.get("txt"))
    if text is None:
        return Malformed("neither .json nor .txt beside the picture; members of a sample must be neighbours")
    if isinstance(text, Malformed):
        return text
    if "json" not in parts:
        turns = (("human", CAPTION_QUESTION), ("gpt", text.strip()))
        return {"conversations": [{"from": who, "value": words} for who, words in turns]}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Malformed(f"broken JSON: {error}")
    return {"conversations": value} if isinstance(value, list) else value
