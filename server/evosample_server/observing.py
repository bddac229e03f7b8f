"""What is noted of every call: how long it took and how it ended, its span, and the id by which logs know it."""

from __future__ import annotations

import asyncio
import inspect
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import grpc
import structlog
from opentelemetry import trace
from opentelemetry.context import attach
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from evosample_server.metrics import FAULT_CODES, OTHER_METHOD, Metrics
from evosample_server.status import REQUEST_ID_KEY

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PARENT_SPAN = TraceContextTextMapPropagator()

Context = grpc.aio.ServicerContext[Any, Any]


class ObservingInterceptor(grpc.aio.ServerInterceptor):
    """Goes around all other interceptors.

    A call is told apart by the `x-request-id` that comes with it or, if that is missing or unfit for a log, by a random
    one. Log lines have it, and it is sent back in the trailing metadata.
    """

    def __init__(self, metrics: Metrics, tracer: trace.Tracer) -> None:
        self._metrics = metrics
        self._tracer = tracer
        self._log = structlog.get_logger().bind()  # bound once: each call would bind it again
        self._handlers: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        began_s = time.perf_counter()
        metadata: dict[str, Any] = dict(handler_call_details.invocation_metadata or ())
        request_id = metadata.get(REQUEST_ID_KEY, "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(8)
        # Each call is a task with a context of its own: what is set here ends with it.
        structlog.contextvars.bind_contextvars(request_id=request_id)
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        if handler is None:
            self._metrics.rpc_seconds.labels(OTHER_METHOD, "UNIMPLEMENTED").observe(time.perf_counter() - began_s)
            return None
        service, _, method = path.lstrip("/").partition("/")
        span = self._tracer.start_span(
            f"{service}/{method}",
            _PARENT_SPAN.extract(metadata),
            trace.SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method, "evosample.request_id": request_id},
        )
        attach(trace.set_span_in_context(span))
        _call.set(_Call(method, request_id, began_s, span))
        if path not in self._handlers:  # a method's handler is always the same
            self._handlers[path] = self._noting(handler)
        return self._handlers[path]

    def _noting(self, handler: Any) -> Any:
        """A method's handler as one that notes how each call ends."""
        requests, responses = (
            "stream" if s else "unary" for s in (handler.request_streaming, handler.response_streaming)
        )
        behavior = getattr(handler, f"{requests}_{responses}")

        async def coroutine(request: Any, context: Context) -> Any:
            with _Noting(self, context):
                return await behavior(request, context)

        async def generator(request: Any, context: Context) -> AsyncIterator[Any]:
            with _Noting(self, context):
                async for response in behavior(request, context):
                    yield response

        # gRPC tells a method that yields its responses from one that writes them by what kind of function it is
        is_generator = inspect.isasyncgenfunction(behavior)
        make_handler = getattr(grpc, f"{requests}_{responses}_rpc_method_handler")
        return make_handler(
            generator if is_generator else coroutine, handler.request_deserializer, handler.response_serializer
        )

    def ended(self, call: _Call, code: grpc.StatusCode) -> None:
        """Note the end of a call."""
        took_s = time.perf_counter() - call.began_s
        self._metrics.rpc_seconds.labels(call.method, code.name).observe(took_s)
        call.span.set_attribute("rpc.grpc.status_code", code.value[0])
        if code.name in FAULT_CODES:
            self._metrics.faults.labels(code.name).inc()
            call.span.set_status(trace.StatusCode.ERROR)
        call.span.end()
        self._log.debug("answered", method=call.method, code=code.name, seconds=took_s)


class _Call(NamedTuple):
    method: str
    request_id: str
    began_s: float
    span: trace.Span


_call: ContextVar[_Call] = ContextVar("call")


class _Noting:
    """The context in which a method runs. (A generator's would take several times as long to enter.)"""

    def __init__(self, interceptor: ObservingInterceptor, context: Context) -> None:
        self._interceptor = interceptor
        self._context = context
        self._call = _call.get()
        context.set_trailing_metadata(((REQUEST_ID_KEY, self._call.request_id),))

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        code = self._context.code()
        if code is None:
            code = grpc.StatusCode.OK
            if kind is not None:
                is_gone = issubclass(kind, (asyncio.CancelledError, GeneratorExit))
                code = grpc.StatusCode.CANCELLED if is_gone else grpc.StatusCode.UNKNOWN
        self._interceptor.ended(self._call, code)
