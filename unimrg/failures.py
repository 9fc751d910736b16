"""Failures of object storage: which of them may pass, and how each is said in one sentence.

pyarrow has one exception for all of them, so its text has to tell (pyarrow 26.0, `AWS Error …`).
"""

from __future__ import annotations

import re

from unimrg.errors import StorageError

RETRY_REASONS = ("server-error", "slow-down", "connection", "timeout", "truncated")

# What pyarrow's S3 errors say. The answer to HEAD has no body and pyarrow doesn't read every body, so "slow
# down" can't be told from other 503s. "Failed to flush" is an answer longer than the bytes asked for, be it
# wrong content or the text of an error. Codes of curl that stand for a mistake (an address that is none, an
# untrusted certificate) are left out of "connection".
REASONS = {
    "truncated": re.compile(
        r"curlCode: 18\b|XML_ERROR|Failed to flush response stream|NO_SUCH_UPLOAD|InvalidPart\b"
    ),
    "timeout": re.compile(r"curlCode: 28\b|REQUEST_TIMEOUT|HTTP status (408|504)"),
    "slow-down": re.compile(
        r"AWS Error (SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|REQUEST_LIMIT_EXCEEDED)|HTTP status (429|503)"
    ),
    "server-error": re.compile(r"AWS Error INTERNAL_FAILURE|HTTP status 5\d\d"),
    "connection": re.compile(r"AWS Error NETWORK_CONNECTION(?!.*curlCode: (1|3|58|59|60|77)\b)"),
}


class CutShort(OSError):
    """An answer of another length or kind than was promised."""


def retry_reason(error: BaseException) -> str | None:
    """The one of RETRY_REASONS that makes a call worth repeating, or None."""
    if isinstance(error, CutShort):
        return "truncated"
    if not isinstance(error, OSError):
        return None
    text = str(error)
    return next((reason for reason, pattern in REASONS.items() if pattern.search(text)), None)


DENIED = re.compile(
    r"AWS Error (ACCESS_DENIED|SIGNATURE_DOES_NOT_MATCH|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID"
    r"|EXPIRED_TOKEN|INVALID_SIGNATURE|MISSING_AUTHENTICATION_TOKEN|UNRECOGNIZED_CLIENT"
    r"|UNKNOWN [(]HTTP status 40[13])|PERMISSION_DENIED|UNAUTHENTICATED|ExpiredToken"
)


# How S3 answers HEAD, and pyarrow reads a refused GET: without the code that says why.
UNEXPLAINED = re.compile(r"UNKNOWN [(]HTTP status 400[)] during \w+ operation:( No response body\.)?$")


def explained(verb: str, where: str, endpoint: str, error: Exception) -> StorageError:
    """A failed call in one sentence: what, where, how to mend. `verb`: "read", "write", …"""
    text = " ".join(str(error).split())
    if "NO_SUCH_BUCKET" in text:
        return no_bucket(where.split("://")[0], where.split("://")[-1].split("/")[0], endpoint)
    at = f" at {endpoint}" if endpoint else ""
    if DENIED.search(text) or UNEXPLAINED.search(text):
        aws = "S3Config, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws or the machine's role"
        google = "GOOGLE_APPLICATION_CREDENTIALS or the machine's service account"
        places = google if where.startswith("gs://") else aws
        why = "access denied"
        if "ExpiredToken" in text:
            why += " (the session token has expired)"
        elif UNEXPLAINED.search(text):
            why += " (HTTP 400 without a reason: an expired session token, or the wrong region)"
        message = f"{why}: can't {verb} {where}{at}; check the keys in {places}, and what they may do"
        return StorageError(message, "denied")
    message = f"can't {verb} {where}{_mend(text, at, error)}"
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return StorageError(message + notes, "transient" if retry_reason(error) else "other")


UNWELL = {
    "server-error": "the store reports an error of its own",
    "slow-down": "the store asks to slow down or is out of service",
    "timeout": "the store takes too long",
}


def _mend(text: str, at: str, error: Exception) -> str:
    """The rest of the sentence: why, and what to do."""
    if "NETWORK_CONNECTION" in text:
        return f": {_network(text)}{at or ' at AWS'}; check the endpoint and that it is up"
    if (reason := retry_reason(error)) in UNWELL:
        code = re.search(r"AWS Error \w+( [(]HTTP status \d+[)])?", text)
        return f"{at}: {UNWELL[reason]} ({code[0] if code else text}); start again when it is well"
    if re.search(r"PERMANENT_REDIRECT|HTTP status 301|AuthorizationHeaderMalformed", text):
        return ": the bucket is in another region; set the region"
    if isinstance(error, PermissionError):
        return ": the file permissions forbid it"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return ": a file stands where a folder is needed"
    what = (error.strerror if isinstance(error, OSError) and error.strerror else None) or text
    return f"{at}: {re.sub(r' *[(]Request ID: [^)]*[)]', '', what)[:300]}"


def _network(text: str) -> str:
    found = re.search(r"curlCode: (\d+)", text)
    words = {
        "6": "no such host",
        "7": "connection refused",
        "18": "answers are cut short",
        "28": "no answer in time",
        "35": "TLS does not work (is it http:// instead of https://?)",
        "56": "connection lost",
        "60": "the TLS certificate is not trusted (AWS_CA_BUNDLE names your own authority)",
    }
    return words.get(found.group(1) if found else "", "no connection")


def no_bucket(scheme: str, bucket: str, endpoint: str) -> StorageError:
    """A bucket that isn't there."""
    at = f" at {endpoint}" if endpoint else ""
    message = f"there is no bucket {scheme}://{bucket}{at}; check the name, or create it"
    return StorageError(message, "no-bucket")
