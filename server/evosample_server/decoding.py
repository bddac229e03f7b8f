"""Requests that are no valid protobuf: INVALID_ARGUMENT, where gRPC would answer UNKNOWN and log a traceback."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import lru_cache
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from evosample.errors import InvalidArgumentError
from evosample_server import status

Context = grpc.aio.ServicerContext[Any, Any]


class DecodingInterceptor(grpc.aio.ServerInterceptor):
    """Decodes the requests of all methods of all services in gRPC's place: where there is a call to abort."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        return None if handler is None else _decoding(handler)


@lru_cache(maxsize=256)  # asked for at every call, but a method's handler is always the same
def _decoding(handler: Any) -> Any:
    """A method's handler as one that takes bytes."""

    def decoded(data: bytes) -> Any:
        try:
            return handler.request_deserializer(data)
        except DecodeError as error:
            raise InvalidArgumentError(
                f"the request can't be decoded: {error}. Expected the bytes of the message that this method takes, its "
                "strings in UTF-8: send it with code generated from the .proto file"
            ) from error

    async def all_decoded(messages: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for data in messages:
            yield decoded(data)

    request = all_decoded if handler.request_streaming else decoded
    requests, responses = ("stream" if s else "unary" for s in (handler.request_streaming, handler.response_streaming))
    behavior = getattr(handler, f"{requests}_{responses}")

    async def coroutine(received: Any, context: Context) -> Any:
        try:
            return await behavior(request(received), context)
        except InvalidArgumentError as error:
            await context.abort_with_status(status.to_grpc(error))

    async def generator(received: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async for response in behavior(request(received), context):
                yield response
        except InvalidArgumentError as error:
            await context.abort_with_status(status.to_grpc(error))

    # gRPC tells a method that yields its responses from one that writes them by what kind of function it is
    is_generator = inspect.isasyncgenfunction(behavior)
    make_handler = getattr(grpc, f"{requests}_{responses}_rpc_method_handler")
    return make_handler(generator if is_generator else coroutine, response_serializer=handler.response_serializer)
