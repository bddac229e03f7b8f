"""What every call goes through: its caller is admitted, its request decoded, and what it raises becomes a status."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from evosample.errors import InvalidArgumentError, ResourceExhaustedError
from evosample_server import status
from evosample_server.access import OPEN_SERVICES, Access, caller, confine

Context = grpc.aio.ServicerContext[Any, Any]

_CHECK_INTERVAL_S = 1.0
_MAX_OPEN_BYTES = 4_096


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Stands between gRPC and all methods of all services, which raise errors and know nothing of statuses.

    It reads and decodes requests in gRPC's place, which would read all of one before anybody could ask whose it is, and
    answer to one that is no valid protobuf with UNKNOWN and a traceback in the log.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._handlers: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = handler_call_details.method
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:  # there is no such method
                return None
            self._handlers[method] = self._intercepted(method, handler)
        return self._handlers[method]

    def _intercepted(self, method: str, handler: Any) -> Any:
        """A method's handler as one of a stream of bytes, of which nothing is read before the caller is admitted."""
        is_open = method.startswith(OPEN_SERVICES)
        requests, responses = (
            "stream" if s else "unary" for s in (handler.request_streaming, handler.response_streaming)
        )
        behavior = getattr(handler, f"{requests}_{responses}")

        async def admit(context: Context) -> None:
            if not is_open:
                found = await self._access.admit(method, context.invocation_metadata() or (), context.peer())
                caller.set(found)

        def decoded(data: bytes) -> Any:
            if is_open and len(data) > _MAX_OPEN_BYTES:
                raise ResourceExhaustedError(
                    f"the request has {len(data):,} bytes, and {method} takes at most {_MAX_OPEN_BYTES:,}: "
                    "name a service or a symbol, and no more"
                )
            try:
                return handler.request_deserializer(data)
            except DecodeError as error:
                raise InvalidArgumentError(
                    f"the request can't be decoded: {error}. Expected the bytes of the message that this method takes, "
                    "its strings in UTF-8: send it with code generated from the .proto file"
                ) from error

        def encoded(response: Any) -> bytes:
            return response if isinstance(response, bytes) else handler.response_serializer(response)

        def first(data: bytes) -> Any:
            """The request, or the first of them: the one that names a project."""
            message = decoded(data)
            if not is_open:
                confine(method, message, caller.get())
            return message

        async def received(messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            is_first = True
            async for data in messages:
                await admit(context)  # what was begun with a token is not finished with it once it is revoked
                yield first(data) if is_first else decoded(data)
                is_first = False
            await admit(context)

        async def request(messages: AsyncIterator[bytes], context: Context) -> Any:
            """What the method is called with."""
            if handler.request_streaming:
                return received(messages, context)
            data = await context.read()
            await admit(context)  # it may have been long in coming
            if data is grpc.aio.EOF:
                raise InvalidArgumentError("the call has ended without a request")
            return first(data)

        async def coroutine(messages: AsyncIterator[bytes], context: Context) -> Any:
            try:
                await admit(context)
                return await behavior(await request(messages, context), context)
            except Exception as error:  # noqa: BLE001  # the boundary: everything becomes a status
                await _fail(error, context)

        async def generator(messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            try:
                await admit(context)
                admitted_s = time.monotonic()
                async for response in behavior(await request(messages, context), context):
                    if time.monotonic() - admitted_s >= _CHECK_INTERVAL_S:  # it may have been revoked since
                        await admit(context)
                        admitted_s = time.monotonic()
                    yield response
            except Exception as error:  # noqa: BLE001  # as above
                await _fail(error, context)

        # gRPC tells a method that yields its responses from one that writes them by what kind of function it is
        is_generator = inspect.isasyncgenfunction(behavior)
        make_handler = getattr(grpc, f"stream_{responses}_rpc_method_handler")
        return make_handler(generator if is_generator else coroutine, response_serializer=encoded)


async def _fail(error: Exception, context: Context) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    try:
        await context.abort_with_status(status.to_grpc(error))
    except grpc.aio.InternalError as unsent:  # the caller has left just now: nobody is there to be told
        raise asyncio.CancelledError from unsent
