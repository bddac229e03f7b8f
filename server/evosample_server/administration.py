"""The gRPC face of what is not about experiments: tokens, and the server itself."""

from __future__ import annotations

import importlib.metadata
import time
from typing import Any

import grpc
from redis.exceptions import RedisClusterException, RedisError

from evosample.v1 import administration_pb2 as pb
from evosample.v1 import administration_pb2_grpc as pb_grpc
from evosample.wire import role_from_proto, role_to_proto, token_to_proto
from evosample_server.access import Access, audit, caller
from evosample_server.store import Store
from evosample_server.tokens import Tokens

Context = grpc.aio.ServicerContext[Any, Any]


class AdministrationService(pb_grpc.AdministrationServiceServicer):
    """`evosample.v1.AdministrationService`."""

    def __init__(self, tokens: Tokens, access: Access, store: Store) -> None:
        self._tokens = tokens
        self._access = access
        self._store = store

    async def CreateToken(self, request: pb.CreateTokenRequest, context: Context) -> Any:
        token, bearer_token = await self._tokens.create(
            request.project,
            role=role_from_proto(request.role),
            note=request.note,
            ttl_s=request.ttl_s if request.HasField("ttl_s") else None,
        )
        expires = f"{token.expire_time:%Y-%m-%d %H:%M} UTC" if token.expire_time else "never"
        audit("create token", project=token.project, token=token.id, role=token.role, expires=expires)
        return pb.CreateTokenResponse(token=token_to_proto(token), bearer_token=bearer_token)

    async def ListTokens(self, request: pb.ListTokensRequest, context: Context) -> Any:
        found = await self._tokens.of_project(request.project)
        return pb.ListTokensResponse(tokens=map(token_to_proto, found))

    async def RevokeToken(self, request: pb.RevokeTokenRequest, context: Context) -> Any:
        await self._tokens.revoke(request.project, request.id)
        audit("revoke token", project=request.project, token=request.id)
        return pb.RevokeTokenResponse()

    async def GetServer(self, request: pb.GetServerRequest, context: Context) -> Any:
        by = caller.get()
        response = pb.GetServerResponse(
            version=importlib.metadata.version("evosample"),
            needs_tokens=self._access.needs_tokens,
            project=by.project,
            role=role_to_proto(by.role),
            store=await self._store_state(),
        )
        response.server_time.GetCurrentTime()
        return response

    async def _store_state(self) -> pb.StoreState:
        try:
            began_s = time.monotonic()
            await self._store.probe()
            latency_s = time.monotonic() - began_s
            return pb.StoreState(latency_s=latency_s, used_memory_bytes=await self._store.used_memory_bytes())
        except (RedisError, RedisClusterException, OSError) as error:
            return pb.StoreState(error=str(error) or type(error).__name__)
