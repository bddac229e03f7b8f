"""Domain errors -> gRPC status: the one table."""

from __future__ import annotations

import re
from typing import Any, cast

import grpc
import structlog
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from redis import exceptions as redis_errors

from evosample.errors import (
    EvosampleError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from evosample.sampling import InvalidValue

_log = structlog.get_logger()

REQUEST_ID_KEY = "x-request-id"
"""Of the metadata entry that names a call."""

# It travels three times over, once in an encoding of up to three bytes each, and gRPC refuses trailers over 8 KiB.
_MAX_MESSAGE_BYTES = 1_200

# redis-py has no class for some of a store's answers, and for none that Redis before 7 gives from within a script.
_ANSWER = re.compile(r"(?:Error running script .*: -)?([A-Z]+) ")
_MEANS_AWAY = {"BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MISCONF", "NOAUTH", "NOPERM", "NOREPLICAS", "READONLY"}
_MEANS_AWAY |= {"TRYAGAIN", "WRONGPASS"}
_MAY_NOT = re.compile(r"ACL failure in script|.*The user executing the script can't")


def to_domain(error: Exception) -> EvosampleError:
    """What an error of a lower floor, or one that nobody expected, is to a client."""
    match error:
        case EvosampleError():
            return error
        case InvalidValue():
            return InvalidArgumentError(str(error), field=error.field)
        case redis_errors.ResponseError() if _is_out_of_memory(error):
            _log.warning("the store is out of memory", cause=str(error))
            return UnavailableError(f"the store is out of memory: give Redis more (maxmemory). {error}")
        case redis_errors.RedisError() | redis_errors.RedisClusterException() if _is_away(error):
            _log.warning("the store is away", cause=str(error))
            return UnavailableError(f"the server can't use its store: {error}")
        case _:
            _log.error("unexpected error", exc_info=error)
            where = f"request_id={request_id}" if (request_id := _request_id()) else "this time"
            return InternalError(f"unexpected {type(error).__name__}; the server's log has the cause, at {where}")


def _request_id() -> str:
    """What the call is known by that is being answered; empty outside of calls."""
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))


def _is_out_of_memory(error: redis_errors.ResponseError) -> bool:
    return isinstance(error, redis_errors.OutOfMemoryError) or _answer(error) == "OOM"


def _is_away(error: Exception) -> bool:
    """Whether a store is not there, fails over, or does not let us write: things that pass, or that others can mend."""
    match error:
        case (
            redis_errors.ConnectionError()
            | redis_errors.TimeoutError()
            | redis_errors.ReadOnlyError()
            | redis_errors.NoPermissionError()
            | redis_errors.ClusterError()  # ClusterDownError and MasterDownError, too
            | redis_errors.TryAgainError()
            | redis_errors.AskError()  # MovedError, too
            | redis_errors.RedisClusterException()
        ):
            return True
        case redis_errors.ResponseError():
            return _answer(error) in _MEANS_AWAY or _MAY_NOT.match(str(error)) is not None
    return False


def _answer(error: redis_errors.ResponseError) -> str:
    """The word that an answer begins with, where redis-py has left it."""
    found = _ANSWER.match(str(error))
    return found[1] if found else ""


def _fitting(message: str) -> str:
    """A message without its middle where that would not fit: it may quote what came with the request."""
    data = message.encode(errors="replace")
    if len(data) <= _MAX_MESSAGE_BYTES:
        return message
    half = _MAX_MESSAGE_BYTES // 2  # its beginning says what was wrong, its end what to do
    return f"{data[:half].decode(errors='ignore')} ... {data[-half:].decode(errors='ignore')}"


def to_grpc(error: Exception) -> grpc.Status:
    """The status that a client gets: code, message, and details that programs can read."""
    domain = to_domain(error)
    message = _fitting(str(domain))
    detail = any_pb2.Any()
    if isinstance(domain, (InvalidArgumentError, NotFoundError)):
        violation = error_details_pb2.BadRequest.FieldViolation(field=domain.field, description=message)
        detail.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    else:
        detail.Pack(error_details_pb2.ErrorInfo(reason=domain.reason, domain="evosample"))
    code: int = grpc.StatusCode[domain.code].value[0]
    status: Any = rpc_status.to_status(status_pb2.Status(code=code, message=message, details=[detail]))
    metadata = (*status.trailing_metadata, (REQUEST_ID_KEY, _request_id()))
    return cast(grpc.Status, status._replace(trailing_metadata=metadata))
