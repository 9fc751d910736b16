"""Entries of JSON lists and JSON lines, parsed piece by piece."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, Protocol

from unimrg.data.readers.entries import LONGEST_ENTRY, Malformed
from unimrg.errors import DataError

CHUNK_BYTES = 4 << 20
WHITE = re.compile(r"[ \t\r\n]*")


class Readable(Protocol):
    """A file open for reading in binary."""

    def read(self, size: int, /) -> bytes: ...


def read_json(file: Readable, name: str) -> Iterator[Any]:
    """Entries of a JSON list. Raises DataError naming the byte where it breaks.

    Bytes that are not UTF-8 come as lone surrogates (PEP 383): only the entry they are in is malformed then.
    """
    text = _Text(file, name)
    text.skip()
    text.take("[")
    while True:
        text.skip()
        if text.take("]", required=False):
            break
        yield text.value()
        text.skip()
        if not text.take(",", required=False):
            text.take("]")
            break
    text.skip()
    if text.at < len(text.buffer):
        raise text.broken("something follows the list", text.at)


class _Text:
    """A growing window of decoded text: `at` is the place of the parser in `buffer`."""

    def __init__(self, file: Readable, name: str) -> None:
        self.file, self.name = file, name
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.buffer, self.at = "", 0
        self.dropped = 0  # bytes of text no longer in the buffer
        self.decode = json.JSONDecoder().raw_decode

    def value(self) -> Any:
        """The JSON value at `at`, stepping over it; reads on until all of it is there. Raises DataError."""
        while True:
            try:
                value, end = self.decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                # Far from the end of what was read it is a mistake; near it the rest may be yet to come.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.buffer) - 16
                position = error.pos - self.at
                if not (cut and self.more()):
                    raise self.broken(error.msg, self.at + position) from error
            except (ValueError, RecursionError) as error:  # a number or a nesting beyond all sense
                raise self.broken(str(error), self.at) from error
            else:
                length, whole = end - self.at, end + 2 < len(self.buffer)
                if whole or not self.more():  # "1" may become "1.5", "1e" and "1e-" may become "1e-5"
                    self.at += length
                    return value

    def more(self) -> bool:
        """Read on, forgetting what is behind `at`; False at the end of the file."""
        self.dropped += _bytes(self.buffer[: self.at])
        self.buffer, self.at = self.buffer[self.at :], 0
        if len(self.buffer) > LONGEST_ENTRY:
            raise self.broken(f"an entry of more than {LONGEST_ENTRY >> 20} MiB (an unclosed quote?)", 0)
        raw = self.file.read(max(CHUNK_BYTES, len(self.buffer)))  # doubling: long entries stay linear
        self.buffer += self.decoder.decode(raw, final=not raw)
        return bool(raw)

    def skip(self) -> None:
        """Over white space, so that a character stands at `at` unless the file ends."""
        while True:
            found = WHITE.match(self.buffer, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.buffer) or not self.more():
                return

    def take(self, character: str, required: bool = True) -> bool:
        """Step over `character` when it is next. Raises DataError when it must be and isn't."""
        found = self.buffer.startswith(character, self.at)
        if required and not found:
            raise self.broken(f"expected {character!r}", self.at)
        self.at += found
        return found

    def broken(self, what: str, position: int) -> DataError:
        byte = self.dropped + _bytes(self.buffer[:position])
        return DataError(f"{self.name}: broken JSON at byte {byte}: {what}")


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def read_jsonl(file: Readable) -> Iterator[Any]:
    """Entries of JSON lines; a line that can't be read is Malformed, and the next one counts again."""
    for number, (offset, line) in enumerate(_lines(file)):
        if line is None:
            yield Malformed(f"line {number + 1}, at byte {offset}, has more than {LONGEST_ENTRY >> 20} MiB")
            continue
        text = line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
        if text.strip():
            try:
                yield json.loads(text.decode())
            except (ValueError, RecursionError) as error:
                at = offset + (getattr(error, "pos", 0) or getattr(error, "start", 0))
                yield Malformed(f"line {number + 1}: broken JSON at byte {at}: {error}")


def _lines(file: Readable) -> Iterator[tuple[int, bytes | None]]:
    """(byte where it starts, line) without line ends; None instead of a line that is too long."""
    start, passed, rest = 0, 0, b""  # passed: bytes of a line too long that are gone already
    while chunk := file.read(max(CHUNK_BYTES, len(rest))):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield start, None if passed + len(line) > LONGEST_ENTRY else line
            start, passed = start + passed + len(line) + 1, 0
        if passed + len(rest) > LONGEST_ENTRY:
            passed, rest = passed + len(rest), b""
    if passed or rest:
        yield start, None if passed else rest
