"""Domain errors -> gRPC status: the one table."""

from __future__ import annotations

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
    ResourceExhaustedError,
    UnavailableError,
)
from evosample.sampling import InvalidValue

_log = structlog.get_logger()


def to_domain(error: Exception) -> EvosampleError:
    """What an error of a lower floor, or one that nobody expected, is to a client."""
    match error:
        case EvosampleError():
            return error
        case InvalidValue():
            return InvalidArgumentError(str(error), field=error.field)
        case redis_errors.OutOfMemoryError():
            return ResourceExhaustedError(f"the store is out of memory: give Redis more (maxmemory). {error}")
        case redis_errors.ConnectionError() | redis_errors.TimeoutError() | redis_errors.ReadOnlyError():
            _log.warning("the store is away", cause=str(error))
            return UnavailableError(f"the server can't use its store: {error}")
        case _:
            _log.error("unexpected error", exc_info=error)
            return InternalError(f"unexpected {type(error).__name__}; the server's log has the cause")


def to_grpc(error: Exception) -> grpc.Status:
    """The status that a client gets: code, message, and details that programs can read."""
    domain = to_domain(error)
    detail = any_pb2.Any()
    if isinstance(domain, (InvalidArgumentError, NotFoundError)):
        violation = error_details_pb2.BadRequest.FieldViolation(field=domain.field, description=str(domain))
        detail.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    else:
        detail.Pack(error_details_pb2.ErrorInfo(reason=domain.reason, domain="evosample"))
    code: int = grpc.StatusCode[domain.code].value[0]
    status: grpc.Status = rpc_status.to_status(status_pb2.Status(code=code, message=str(domain), details=[detail]))
    return status
