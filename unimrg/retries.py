"""When a call to object storage is worth repeating, how long to wait before, and how often that happened.

Only what may be gone a moment later is repeated: errors of the server, "slow down", lost connections,
time-outs and answers cut short. Waits grow exponentially with full jitter, so that many workers don't come
back at once (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from unimrg.failures import RETRY_REASONS, retry_reason

T = TypeVar("T")

# A call is tried at most ATTEMPTS times, and not again after RETRY_SECONDS. The waits add up to 23 s on
# average: the restart of a server passes unnoticed, one that stays away is reported within two minutes. A
# server that never answered is probably misspelt: FIRST_SECONDS.
ATTEMPTS = 8
RETRY_SECONDS = 60.0
FIRST_SECONDS = 4.0

# The first wait is up to WAIT_SECONDS, each further one up to twice that, none longer than MAX_WAIT_SECONDS.
WAIT_SECONDS = float(os.environ.get("UNIMRG_RETRY_WAIT_SECONDS") or 0.5)
MAX_WAIT_SECONDS = 15.0

_jitter = secrets.SystemRandom()  # the training's own random states stay as they are
_lock = threading.Lock()
_retries: Counter[str] = Counter()


def retrying(call: Callable[[], T], answered: bool = True) -> T:
    """What `call` returns, repeated while its errors are transient; the last of them is raised with a note.

    answered: whether the server ever did; if not, a lost connection is given up soon.
    """
    start = time.monotonic()
    attempt = 1
    while True:
        try:
            return call()
        except OSError as error:
            reason = retry_reason(error)
            if reason is None:
                raise
            silent = not answered and "NETWORK_CONNECTION" in str(error)
            wait = _jitter.uniform(0, min(MAX_WAIT_SECONDS, WAIT_SECONDS * 2 ** (attempt - 1)))
            spent = time.monotonic() - start
            if attempt >= ATTEMPTS or spent + wait > (FIRST_SECONDS if silent else RETRY_SECONDS):
                error.add_note(f"given up after {spent:.0f} s and {attempt} of {ATTEMPTS} attempts")
                raise
        count_retry(reason)
        attempt += 1
        time.sleep(wait)


def count_retry(reason: str) -> None:
    """reason: one of RETRY_REASONS."""
    with _lock:
        _retries[reason] += 1


def take_retries() -> dict[str, int]:
    """Retries of this process since the last call, by reason, all RETRY_REASONS; safe among threads."""
    with _lock:
        taken = {reason: _retries[reason] for reason in RETRY_REASONS}
        _retries.clear()
    return taken
