"""Calls to a server: a channel for each process, retries, and the server's errors as evosample's."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from evosample import errors
from evosample.errors import EvosampleError
from evosample.private_server import PrivateServer
from evosample.v1 import selection_pb2_grpc as pb_grpc

_FIRST_DELAY_S = 0.05
_MAX_DELAY_S = 2.0
_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.use_local_subchannel_pool", 1),  # channels of one process don't share their back-off
]


class Connection:
    """Where a server is, and how long to put up with its absence. Pickling keeps just that.

    Args:
        address: HOST:PORT or unix:/PATH.
        connect_timeout_s: how long the first call tries to reach a server.
        outage_timeout_s: how long later calls try, after a server has once answered.
        server: the private server at that address, which lives as long as a connection to it is in use.
    """

    def __init__(
        self,
        address: str,
        *,
        connect_timeout_s: float,
        outage_timeout_s: float,
        server: PrivateServer | None = None,
    ) -> None:
        self.address = address
        self.server = server
        self.outage_timeout_s = outage_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._has_answered = False
        self._is_closed = False
        self._channel: grpc.Channel | None = None
        self._stub: pb_grpc.SelectionServiceStub | None = None
        self._pid = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _connection, (self.address, self._connect_timeout_s, self.outage_timeout_s)

    def stub(self) -> pb_grpc.SelectionServiceStub:
        """The stub of this process: gRPC's handles must not cross a fork. Raises UsageError once closed."""
        if self._is_closed:
            raise errors.UsageError("this client is closed: use it inside its `with` block, or connect anew")
        if self._stub is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._channel = grpc.insecure_channel(self.address, options=_CHANNEL_OPTIONS)
            self._stub = pb_grpc.SelectionServiceStub(self._channel)
        return self._stub

    def close(self) -> None:
        """Close this process's channel, and a private server."""
        self._is_closed = True
        if self._channel is not None and self._pid == os.getpid():
            self._channel.close()
        self._channel = self._stub = None
        if self.server is not None:
            self.server.close()

    def call(self, method: str, request: Any, *, give_up: threading.Event | None = None) -> Any:
        """A unary call, retried while the server is unavailable and nobody gives up; raises EvosampleError."""
        return self._retried(lambda: getattr(self.stub(), method)(request, timeout=self.outage_timeout_s), give_up)

    def collect(self, method: str, request: Any) -> list[Any]:
        """All responses of a stream that soon ends, retried as a whole; raises EvosampleError."""
        responses: list[Any] = self._retried(
            lambda: list(getattr(self.stub(), method)(request, timeout=self.outage_timeout_s))
        )
        return responses

    def _retried(self, attempt: Callable[[], Any], give_up: threading.Event | None = None) -> Any:
        """The result of an idempotent attempt, repeated while it fails with UNAVAILABLE."""
        if not self._has_answered:
            self._reach_server()
        for retry in self.retries(give_up):
            try:
                result = attempt()
            except grpc.RpcError as error:
                retry(error)
            else:
                return result
        raise AssertionError("retries end by raising")

    def _reach_server(self) -> None:
        """Bound the first contact by a quick call: the real one may rightly take long, such as planning an epoch."""
        self.stub()
        assert self._channel is not None
        # an empty request is all it takes
        check: grpc.UnaryUnaryMultiCallable[None, bytes] = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            lambda _: b"",
            bytes,
        )
        for retry in self.retries():
            try:
                check(None, timeout=self._connect_timeout_s)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise self._no_answer(self._connect_timeout_s) from error
                retry(error)
            else:
                self._has_answered = True
                return

    def _no_answer(self, timeout_s: float, cause: str = "") -> errors.UnavailableError:
        return errors.UnavailableError(
            f"no answer from a server at {self.address} within {timeout_s:g} s. Is it running, and is the address "
            f"right? Start one with `evosample-server`.{cause and f' (Last: {cause})'}"
        )

    def retries(self, give_up: threading.Event | None = None) -> Iterator[Callable[[grpc.RpcError], None]]:
        """For each attempt a function to call with its failure: it waits, or raises if there is no use in waiting.

        Exponential back-off with full jitter, under one deadline for all attempts.
        """
        timeout_s = self.outage_timeout_s if self._has_answered else self._connect_timeout_s
        deadline_s = time.monotonic() + timeout_s
        delay_s = _FIRST_DELAY_S
        give_up = give_up or threading.Event()

        def retry(error: grpc.RpcError) -> None:
            translated = self._translated(error, timeout_s)
            if self.server is not None and not self.server.is_running:
                raise errors.UnavailableError(f"the private server has ended: {self.server.said()}") from error
            wait_s = random.uniform(0, delay_s)  # noqa: S311  # jitter
            if not isinstance(translated, errors.UnavailableError) or time.monotonic() + wait_s > deadline_s:
                raise translated from error
            if give_up.wait(wait_s):
                raise translated from error

        while True:
            yield retry
            delay_s = min(2 * delay_s, _MAX_DELAY_S)

    def _translated(self, error: grpc.RpcError, timeout_s: float) -> EvosampleError:
        translated = from_grpc(error)
        if isinstance(translated, errors.UnavailableError):
            return self._no_answer(timeout_s, str(translated))
        return translated


def _connection(address: str, connect_timeout_s: float, outage_timeout_s: float) -> Connection:
    return Connection(address, connect_timeout_s=connect_timeout_s, outage_timeout_s=outage_timeout_s)


def from_grpc(error: grpc.RpcError) -> EvosampleError:
    """A failed call's status as evosample's error: by the reason it carries, else by its code."""
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    message, code = error.details() or "", error.code().name
    reason, field = "", ""
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad_request) and bad_request.field_violations:
            field = bad_request.field_violations[0].field
    leaves = _leaves(EvosampleError)
    matching = [leaf for leaf in leaves if leaf.code == code]
    exact = [leaf for leaf in matching if leaf.reason == reason]
    found = (exact or matching or [errors.InternalError])[0]
    if found in (errors.InvalidArgumentError, errors.NotFoundError):
        return found(message, field=field)
    if found is errors.WaitTimeoutError:
        return found(f"the server did not answer in time: {message}")
    return found(message)


def _leaves(root: type[EvosampleError]) -> list[type[EvosampleError]]:
    return [leaf for child in root.__subclasses__() for leaf in (child, *_leaves(child))]
