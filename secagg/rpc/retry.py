"""One retry policy: exponential with jitter, a cap on each wait, and a cap on all of it.

Every call of the contract is idempotent, so a lost answer is asked for again. Only "not yet", "too
much at once" and "unreachable" are tried again; a wait that the other side asks for is honoured. A
connection that TLS refuses is not tried again: it would be refused for ever.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc

from secagg.errors import NotReadyError, OverloadedError, SecaggError, UnavailableError
from secagg.rpc.status import from_rpc_error, retry_delay_s

__all__ = ["RetryPolicy"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again, and when to give up.

    Attributes:
        initial_s: first wait, in seconds; doubled each time.
        longest_s: longest single wait.
        total_s: time after which a server that is unreachable or overloaded is given up. "Not yet"
            is an answer, and waits as long as it keeps coming.
        sleep, clock: replaced in tests.
        diagnose: why a server is unreachable for good, if it is; asked once a call.
    """

    initial_s: float = 0.1
    longest_s: float = 5.0
    total_s: float = 60.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    diagnose: Callable[[], SecaggError | None] = lambda: None

    def call(self, attempt: Callable[[], _T]) -> _T:
        """Run a call until it succeeds or trying again cannot help.

        Raises:
            SecaggError: what the other side raised, or `UnavailableError` after ``total_s``.
        """
        wait, failing_since = self.initial_s, None
        while True:
            try:
                return attempt()
            except grpc.RpcError as rpc_error:
                error, asked = from_rpc_error(rpc_error), retry_delay_s(rpc_error)
            if not isinstance(error, NotReadyError | OverloadedError | UnavailableError):
                raise error
            now = self.clock()
            if isinstance(error, NotReadyError):
                wait, failing_since = self.initial_s, None
            elif failing_since is None:
                failing_since = now
                if isinstance(error, UnavailableError) and (found := self.diagnose()):
                    raise found
            if failing_since is not None and now - failing_since >= self.total_s:
                raise error
            # A server may ask for patience, but not for years.
            delay = min(asked if asked and asked > 0 else wait, self.longest_s)
            # Jitter keeps a thousand clients from coming back in step; it protects no secret.
            self.sleep(delay * random.uniform(0.75, 1.25))  # noqa: S311
            wait *= 2
