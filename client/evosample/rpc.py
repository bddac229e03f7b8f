"""Calls to servers: a channel for each address and process, retries, and the servers' errors as evosample's."""

from __future__ import annotations

import itertools
import logging
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import grpc

from evosample import diagnosis, errors
from evosample.credentials import Tls, token_to_use
from evosample.errors import EvosampleError
from evosample.private_server import PrivateServer
from evosample.rows import decode_event
from evosample.v1 import administration_pb2_grpc as administration_pb_grpc
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from evosample.wire import is_local

_log = logging.getLogger("evosample")

_CALL_TIMEOUT_S = 120.0  # of one attempt: planning an epoch takes its time; a frozen server is found out long before
_FIRST_DELAY_S = 0.05
_MAX_DELAY_S = 2.0
_LOG_AFTER_S = 2.0
_LOG_INTERVAL_S = 30.0
_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A server that is frozen, or gone without a word, is found out after 20 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # what newer gRPC goes by; a minute if not set
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # channels of one process don't share their back-off
    # A name may stand for many servers: calls go to all of them in turn.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
]


_first_pid: int | None = None  # of the first process that used gRPC, among this one and those it was forked from


def _check_not_forked() -> None:
    """Raises UsageError where gRPC would hang: in a process that was forked from one that has used it."""
    global _first_pid
    if _first_pid is None:
        _first_pid = os.getpid()
    if _first_pid != os.getpid() and os.environ.get("GRPC_ENABLE_FORK_SUPPORT") == "0":
        raise errors.UsageError(
            "this process was forked from one that has used evosample, and gRPC does not outlive a fork: start it with "
            'multiprocessing\'s "spawn" or "forkserver", or set GRPC_ENABLE_FORK_SUPPORT=1 before evosample is imported'
        )


class _Stub(pb_grpc.SelectionServiceStub, administration_pb_grpc.AdministrationServiceStub):
    """The methods of both services."""

    def __init__(self, channel: grpc.Channel) -> None:
        pb_grpc.SelectionServiceStub.__init__(self, channel)
        administration_pb_grpc.AdministrationServiceStub.__init__(self, channel)
        path = f"/{pb.DESCRIPTOR.services_by_name['SelectionService'].full_name}/StreamEpoch"
        self.StreamEpoch = channel.unary_stream(path, pb.StreamEpochRequest.SerializeToString, cast(Any, decode_event))


class _WithHeaders(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
):
    """Numbers the calls, so that they can be found in the server's log, and shows the token with each of them.

    (gRPC's call credentials would show it over TLS only.)
    """

    def __init__(self, address: str, token: str | None) -> None:
        self._headers = [] if token is None else [("authorization", f"Bearer {token}")]
        self._prefix = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        _log.debug("calls to %s have the request ids %s-1, %s-2 ...", address, self._prefix, self._prefix)

    def _send(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        request_id = ("x-request-id", f"{self._prefix}-{next(self._numbers)}")
        return continuation(details._replace(metadata=[*self._headers, request_id]), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = _send  # type: ignore[assignment]


class Connection:
    """Where servers are, what to show them, and how long to put up with their absence. Pickling keeps just that.

    Calls go to one address, chosen at random so that many clients spread over all, until that one fails; then to the
    next. Which server answers does not matter: servers hold no state.

    Args:
        addresses: HOST:PORT or unix:/PATH each.
        connect_timeout_s: how long the first call tries to reach a server.
        outage_timeout_s: how long later calls try, after a server has once answered.
        tls: None: plain text. A pickle has the names of its files.
        token: empty: none; None: what the environment has, which each process looks up for itself. A pickle has it.
        server: the private server at the only address.

    Attributes:
        tls: as passed.
        is_shared: other processes were told of the private server.
    """

    def __init__(
        self,
        addresses: tuple[str, ...],
        *,
        connect_timeout_s: float,
        outage_timeout_s: float,
        tls: Tls | None = None,
        token: str | None = None,
        server: PrivateServer | None = None,
    ) -> None:
        self.addresses = addresses
        self.server = server
        self.tls = tls
        self._token = token
        self.is_shared = False
        self.outage_timeout_s = outage_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._current = random.randrange(len(addresses))  # noqa: S311  # for balance
        self._has_answered = False
        self._is_closed = False
        self._channels: dict[str, tuple[grpc.Channel, _Stub]] = {}
        self._refusals: dict[str, str] = {}  # address -> what the last diagnosis has found
        self._pid = 0
        self._lock = threading.Lock()
        self._failing_since_s: float | None = None
        self._last_log_s = 0.0
        self._last_failure: EvosampleError | None = None
        self._last_is_answer = False  # of a server, which is there but can't do its work

    def __reduce__(self) -> tuple[Any, ...]:
        options = {
            "connect_timeout_s": self._connect_timeout_s,
            "outage_timeout_s": self.outage_timeout_s,
            "tls": self.tls,
            "token": self._token,
        }
        return _connection, (self.addresses, options)

    def stub(self) -> _Stub:
        """The stub of this process for the address in use. Raises UsageError once closed."""
        return self._opened()[1]

    def _opened(self) -> tuple[grpc.Channel, _Stub]:
        if self._is_closed:
            raise errors.UsageError("this client is closed: use it inside its `with` block, or connect anew")
        _check_not_forked()
        with self._lock:
            if self._pid != os.getpid():  # gRPC's handles must not cross a fork
                self._pid, self._channels = os.getpid(), {}
            address = self.addresses[self._current]
            if address not in self._channels:
                token = token_to_use(self._token)
                if token and self.tls is None and not is_local(address):
                    _log.warning("the token goes to %s unencrypted, for others to read: use TLS (tls=True)", address)
                if self.tls is None:
                    channel = grpc.insecure_channel(address, _CHANNEL_OPTIONS)
                else:
                    channel = grpc.secure_channel(address, self.tls.channel_credentials(), _CHANNEL_OPTIONS)
                channel = grpc.intercept_channel(channel, _WithHeaders(address, token))
                self._channels[address] = channel, _Stub(channel)
            return self._channels[address]

    def close(self) -> None:
        """Close this process's channels, and a private server."""
        self._is_closed = True
        if self._pid == os.getpid():
            for channel, _ in self._channels.values():
                channel.close()
        self._channels = {}
        if self.server is not None:
            self.server.close()

    def call(self, method: str, request: Any, *, give_up: threading.Event | None = None) -> Any:
        """A unary call, retried while no server is available; raises EvosampleError.

        It is retried for `outage_timeout_s`, or where the caller may give up for as long as it does not.
        """
        return self._retried(lambda: getattr(self.stub(), method)(request, timeout=_CALL_TIMEOUT_S), give_up)

    def collect(self, method: str, request: Any) -> list[Any]:
        """All responses of a stream that soon ends, retried as a whole; raises EvosampleError."""
        responses: list[Any] = self._retried(
            lambda: list(getattr(self.stub(), method)(request, timeout=_CALL_TIMEOUT_S))
        )
        return responses

    def send(self, method: str, requests: Callable[[], Iterable[Any]]) -> Any:
        """A call that streams requests, retried as a whole; raises EvosampleError."""
        return self._retried(lambda: getattr(self.stub(), method)(iter(requests()), timeout=_CALL_TIMEOUT_S))

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
                self.answered()
                return result
        raise AssertionError("retries end by raising")

    def _reach_server(self) -> None:
        """Bound the first contact by a quick call: the real one may rightly take long, such as planning an epoch."""
        timeout_s = self._connect_timeout_s / len(self.addresses)  # one that is frozen must not use up all of it
        for retry in self.retries():
            # an empty request is all it takes
            check: grpc.UnaryUnaryMultiCallable[None, bytes] = self._opened()[0].unary_unary(
                "/grpc.health.v1.Health/Check", lambda _: b"", bytes
            )
            try:
                check(None, timeout=timeout_s)
            except grpc.RpcError as error:
                retry(error)
            else:
                self._has_answered = True
                self.answered()
                return

    def answered(self) -> None:
        """Note that a server has answered: there is no outage, or no longer."""
        if self._failing_since_s is None:
            return
        with self._lock:
            if self._failing_since_s is not None and self._last_log_s > self._failing_since_s:
                _log.warning(
                    "a server answers again, after %.0f s: nothing is lost", time.monotonic() - self._failing_since_s
                )
            self._failing_since_s = None
            self._refusals = {}

    def outage_s(self) -> float:
        """For how long no server has answered; 0 if one did last."""
        since_s = self._failing_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def unavailable(self, timeout_s: float) -> errors.UnavailableError:
        """What to raise when an outage has lasted too long, or will last until somebody does something."""
        refusals = "; ".join(f"can't use the server at {address}: {why}" for address, why in self._refusals.items())
        if self._are_all_refused:
            return errors.UnavailableError(refusals)
        if self._last_is_answer:
            return errors.UnavailableError(str(self._last_failure))
        cause = f" (Last: {refusals or self._last_failure})" if self._last_failure is not None else ""
        return errors.UnavailableError(
            f"no answer from a server at {', '.join(self.addresses)} within {timeout_s:g} s. Is it running, and is the "
            f"address right? Start one with `evosample-server`.{cause}"
        )

    def retries(self, give_up: threading.Event | None = None) -> Iterator[Callable[[grpc.RpcError], None]]:
        """For each attempt a function to call with its failure: it waits, or raises if there is no use in waiting.

        Exponential back-off with full jitter, under one deadline for all attempts; under none where somebody may give
        up: there what is over a bound of a server is waited for, too. Each failure moves on to the next address.
        """
        timeout_s = self.outage_timeout_s if self._has_answered else self._connect_timeout_s
        deadline_s = time.monotonic() + timeout_s if give_up is None else float("inf")
        delay_s = _FIRST_DELAY_S
        waiting = give_up or threading.Event()
        passing: tuple[type[EvosampleError], ...] = (errors.UnavailableError, errors.WaitTimeoutError)
        if give_up is not None:
            passing = (*passing, errors.ResourceExhaustedError)

        def retry(error: grpc.RpcError) -> None:
            failure = from_grpc(error)
            if not isinstance(failure, passing):
                raise failure from error
            if self.server is not None and not self._is_closed:
                self.server.keep_running()
            self._failed(failure, attempted, is_answer=_is_answer(error))
            if self._are_all_refused and not self._has_answered:
                raise self.unavailable(timeout_s) from error
            left_s = deadline_s - time.monotonic()
            # The last attempt is made at the deadline itself: a server that is there by then is found.
            wait_s = min(random.uniform(0, delay_s), left_s)  # noqa: S311  # jitter
            if left_s <= 0 or waiting.wait(wait_s):
                raise self.unavailable(timeout_s) from error

        while True:
            attempted = self._current
            yield retry
            delay_s = min(2 * delay_s, _MAX_DELAY_S)

    @property
    def _are_all_refused(self) -> bool:
        """Whether trying on is of no use until somebody does something."""
        return len(self._refusals) == len(set(self.addresses))

    def _failed(self, failure: EvosampleError, attempted: int, *, is_answer: bool) -> None:
        """Note that a server was not available, and move on to the next address."""
        now_s = time.monotonic()
        with self._lock:
            self._last_failure, self._last_is_answer = failure, is_answer
            if self._current == attempted:
                self._current = (attempted + 1) % len(self.addresses)
            if self._failing_since_s is None:
                self._failing_since_s = now_s
            outage_s = now_s - self._failing_since_s
            is_first = self._last_log_s < self._failing_since_s
            is_due = outage_s > _LOG_AFTER_S and (is_first or now_s - self._last_log_s > _LOG_INTERVAL_S)
            if self._has_answered and is_due:
                self._last_log_s = now_s
        if is_due or not self._has_answered:
            address = self.addresses[attempted]
            refusal = diagnosis.refusal(address, self.tls)
            self._refusals.pop(address, None)
            if refusal is not None:
                self._refusals[address] = refusal
        if is_due and self._has_answered:
            addresses = ", ".join(self.addresses)
            _log.warning(
                "no server at %s has answered for %.0f s, trying on: %s", addresses, outage_s, refusal or failure
            )


def _connection(addresses: tuple[str, ...], options: dict[str, Any]) -> Connection:
    return Connection(addresses, **options)


def _is_answer(error: grpc.RpcError) -> bool:
    """Whether a server has said so, and not gRPC for want of one."""
    from grpc_status import rpc_status

    return rpc_status.from_call(error) is not None


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
    if status is None and code in ("CANCELLED", "UNKNOWN"):  # by gRPC itself, as when a server stops
        return errors.UnavailableError(f"the call was broken off: {message}")
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
