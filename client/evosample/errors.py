"""Everything that evosample raises.

EvosampleError
|-- InvalidArgumentError (also ValueError)   a bad value: field, value, what is allowed
|-- NotFoundError (also LookupError)         no such experiment, or it was deleted
|-- AlreadyExistsError                       another spec under the same name
|-- FailedPreconditionError                  not in this state: a position no longer kept, a finished experiment
|   |-- EpochClosedError                     losses for an epoch that is over
|   |-- EpochNotRetainedError                the epoch of a position is not kept any more, or not reached yet
|   `-- StoreBehindError                     the store has lost what it had acknowledged: join again, send again
|-- SupersededError                          a newer run, or a newer process of this rank, has taken over
|-- UnauthenticatedError                     no token, or none that is valid: how to pass one
|-- PermissionDeniedError (also PermissionError)  the token's role is too low: which is needed
|-- ResourceExhaustedError                   over a bound: which, and how to raise it
|-- DataLossError                            the store, or a shard, has lost or damaged data
|-- UnavailableError (also ConnectionError)  no server, or its store is away; safe to retry
|-- WaitTimeoutError (also TimeoutError)     waited as long as allowed: for whom
|-- UnimplementedError                       this server does not have that
|-- InternalError                            a bug of the server
`-- UsageError (also RuntimeError)           calls in an order that can't work, such as a step without losses

The one exception is what the settings of a policy or a spec raise where they are made: InvalidValue, a ValueError.
Client and server share this tree: the server raises it, the wire carries `code` and `reason`, the client raises it.
"""

from __future__ import annotations

from typing import ClassVar


class EvosampleError(Exception):
    """The root: catch it to catch everything that evosample raises."""

    code: ClassVar[str] = ""
    """Name of the gRPC status code; empty for what never crosses the wire."""
    reason: ClassVar[str] = ""
    """Tells errors of one code apart (google.rpc.ErrorInfo.reason)."""


class InvalidArgumentError(EvosampleError, ValueError):
    """A value outside what its field allows. `field` names it, where known."""

    code: ClassVar[str] = "INVALID_ARGUMENT"
    reason: ClassVar[str] = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class NotFoundError(EvosampleError, LookupError):
    """There is no such experiment. `field` names what did not match, where known."""

    code: ClassVar[str] = "NOT_FOUND"
    reason: ClassVar[str] = "NOT_FOUND"

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class AlreadyExistsError(EvosampleError):
    """The name is taken by an experiment with another spec."""

    code: ClassVar[str] = "ALREADY_EXISTS"
    reason: ClassVar[str] = "SPEC_DIFFERS"


class FailedPreconditionError(EvosampleError):
    """The experiment is not in a state that allows this."""

    code: ClassVar[str] = "FAILED_PRECONDITION"
    reason: ClassVar[str] = "FAILED_PRECONDITION"


class EpochClosedError(FailedPreconditionError):
    """The epoch is over: it takes no more losses."""

    reason: ClassVar[str] = "EPOCH_CLOSED"


class EpochNotRetainedError(FailedPreconditionError):
    """What an epoch left is not there: it is no longer retained, or not reached yet."""

    reason: ClassVar[str] = "EPOCH_NOT_RETAINED"


class StoreBehindError(FailedPreconditionError):
    """The store has lost what it had acknowledged, as after a fail-over. A living run sends it again by itself."""

    reason: ClassVar[str] = "STORE_BEHIND"


class SupersededError(EvosampleError):
    """A newer run of the experiment, or a newer process of the same rank, has taken over."""

    code: ClassVar[str] = "ABORTED"
    reason: ClassVar[str] = "SUPERSEDED"


class UnauthenticatedError(EvosampleError):
    """The server asks for a token, and got none that is valid."""

    code: ClassVar[str] = "UNAUTHENTICATED"
    reason: ClassVar[str] = "UNAUTHENTICATED"


class PermissionDeniedError(EvosampleError, PermissionError):
    """The token is valid, but not for this."""

    code: ClassVar[str] = "PERMISSION_DENIED"
    reason: ClassVar[str] = "PERMISSION_DENIED"


class ResourceExhaustedError(EvosampleError):
    """Over a bound of the server or its store."""

    code: ClassVar[str] = "RESOURCE_EXHAUSTED"
    reason: ClassVar[str] = "RESOURCE_EXHAUSTED"


class DataLossError(EvosampleError):
    """The store no longer has what was committed to it, or a shard not what its index says."""

    code: ClassVar[str] = "DATA_LOSS"
    reason: ClassVar[str] = "DATA_LOSS"


class UnavailableError(EvosampleError, ConnectionError):
    """No server could be reached, or the server can't reach its store."""

    code: ClassVar[str] = "UNAVAILABLE"
    reason: ClassVar[str] = "UNAVAILABLE"


class WaitTimeoutError(EvosampleError, TimeoutError):
    """A wait has reached its bound."""

    code: ClassVar[str] = "DEADLINE_EXCEEDED"
    reason: ClassVar[str] = "WAIT_TIMEOUT"


class UnimplementedError(EvosampleError, NotImplementedError):
    """This version of the server does not offer the call."""

    code: ClassVar[str] = "UNIMPLEMENTED"
    reason: ClassVar[str] = "UNIMPLEMENTED"


class InternalError(EvosampleError):
    """The server failed in a way that it does not know; its log has the cause."""

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"


class UsageError(EvosampleError, RuntimeError):
    """The calls came in an order that can't work."""
