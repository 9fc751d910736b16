"""What can go wrong, as types: the message says what, where and how to mend it.

UnimrgError
├── ConfigError          a knob is unknown, misspelt or out of range; raised before anything starts
├── StorageError         a bucket, a folder or an object can't be reached, read or written
├── DataError            the data set as a whole is unusable (no manifest, too many bad samples)
├── SampleError          one sample is unusable: it is quarantined under `reason`, the run goes on
├── CheckpointError      weights or a checkpoint can't be read, or don't fit the model
└── MissingExtraError    a package that only some runs need is missing; says the line that installs it
"""

from __future__ import annotations


class UnimrgError(Exception):
    """Base of every error a user can mend. Commands print it as one line and exit with status 2."""


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; its kind when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ConfigError(UnimrgError):
    """A configuration key or value that can't be used."""


class StorageError(UnimrgError):
    """Object storage or a folder that can't be reached, read or written.

    `kind` says what may help: "transient" (waiting; it was already tried several times), "denied" (other keys
    or rights), "no-bucket" (another name), or "other".
    """

    KINDS = ("transient", "denied", "no-bucket", "other")

    def __init__(self, message: str, kind: str = "other") -> None:
        if kind not in self.KINDS:
            raise ValueError(f"unknown kind of storage error {kind!r}")
        super().__init__(message)
        self.kind = kind


class DataError(UnimrgError):
    """A data set that can't be used as a whole."""


class SampleError(UnimrgError):
    """One unusable sample.

    `reason` is a short kebab-case word from a closed list (a metric label, so it never holds a path);
    `detail` says what was found.
    """

    REASONS = (
        "missing-file",
        "empty-file",
        "not-an-image",
        "corrupt-image",
        "too-large",
        "path-outside-folder",
        "malformed-conversation",
        "missing-label",
        "unreadable-file",
        "teacher-failed",
    )

    def __init__(self, reason: str, detail: str = "") -> None:
        if reason not in self.REASONS:
            raise ValueError(f"unknown quarantine reason {reason!r}")
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class CheckpointError(UnimrgError):
    """Weights or a checkpoint that can't be read, or don't belong to the model."""


class MissingExtraError(UnimrgError):
    """A package that only some runs need is not installed."""

    def __init__(self, package: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: pip install {package}")
