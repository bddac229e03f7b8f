"""Tokens in Redis: of each one its project, its role, and a digest of its secret."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import re
import secrets
from typing import Any, cast

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from evosample.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError
from evosample.sampling import InvalidValue, check_int, check_name
from evosample.wire import Role, Token
from evosample_server import keys
from evosample_server.store import replicated

_MAX_TOKENS = 1_000  # of a project; all of them fit into one answer
_MAX_NOTE_CHARACTERS = 200
_MAX_TTL_S = 100 * 365 * 86_400
_ID = re.compile("[0-9a-f]{12}")
_TOKEN = re.compile(r"evo_(?P<id>[0-9a-f]{12})_(?P<secret>[A-Za-z0-9_-]{43})")


class Tokens:
    """The verbs that access needs of Redis. `redis` does not decode responses."""

    def __init__(self, redis: Redis | RedisCluster) -> None:
        self._redis = redis

    async def create(self, project: str, *, role: Role, note: str, ttl_s: int | None) -> tuple[Token, str]:
        """Make a token; returns also what its holder is to send, which nobody can find out later."""
        check_name("project", project)
        if len(note) > _MAX_NOTE_CHARACTERS or not note.isprintable():
            raise InvalidValue("note", note, f"at most {_MAX_NOTE_CHARACTERS} printable characters")
        if ttl_s is not None:
            check_int("ttl_s", ttl_s, 1, _MAX_TTL_S)
        if len(await self.of_project(project)) >= _MAX_TOKENS:
            raise ResourceExhaustedError(
                f"project {project!r} has {_MAX_TOKENS:,} tokens, as many as it may have: revoke some"
            )
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        expire_time = None if ttl_s is None else now + datetime.timedelta(seconds=ttl_s)
        token = Token(secrets.token_hex(6), project, role, note, now, expire_time)
        secret = secrets.token_urlsafe(32)
        record = {
            "project": project,
            "role": role,
            "note": note,
            "create_time": int(now.timestamp()),
            "expire_time": None if expire_time is None else int(expire_time.timestamp()),
            "digest": _digest(secret),
        }
        await cast(Any, self._redis.hset(keys.TOKENS, token.id, json.dumps(record)))
        await replicated(self._redis, keys.TOKENS_REPLICATED)
        return token, f"evo_{token.id}_{secret}"

    async def of_project(self, project: str) -> list[Token]:
        """A project's tokens, those that have expired included, in the order in which they were made."""
        found = await cast(Any, self._redis.hgetall(keys.TOKENS))
        tokens = [_token(token_id.decode(), json.loads(data)) for token_id, data in found.items()]
        mine = (token for token in tokens if token.project == project)
        return sorted(mine, key=lambda token: (token.create_time, token.id))

    async def revoke(self, project: str, token_id: str) -> None:
        """Forget a token of a project; raises NotFoundError if it has none of this id."""
        if not _ID.fullmatch(token_id):  # which is not shown: it may be a whole token
            raise InvalidArgumentError(
                "id: expected the 12 characters that ListTokens gives as a token's id", field="id"
            )
        data = await cast(Any, self._redis.hget(keys.TOKENS, token_id))
        is_ours = data is not None and json.loads(data)["project"] == project
        if not is_ours or not await cast(Any, self._redis.hdel(keys.TOKENS, token_id)):
            raise NotFoundError(
                f"id={token_id!r}: project {project!r} has no such token; list those there are", field="id"
            )
        await replicated(self._redis, keys.TOKENS_REPLICATED)

    async def find(self, presented: str) -> Token | None:
        """What is known of the token that a caller has sent; None if it is none, or not the right one.

        How long it takes says nothing of the digests that are kept.
        """
        match = _TOKEN.fullmatch(presented)
        if match is None:
            return None
        data = await cast(Any, self._redis.hget(keys.TOKENS, match["id"]))
        record = {"digest": _digest("")} if data is None else json.loads(data)
        if not hmac.compare_digest(record["digest"], _digest(match["secret"])) or data is None:
            return None
        return _token(match["id"], record)


def _digest(secret: str) -> str:
    """Of 32 random bytes: what they are can't be guessed, so a plain hash is as good as a slow one."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _token(token_id: str, record: dict[str, Any]) -> Token:
    expire_time = record["expire_time"]
    return Token(
        id=token_id,
        project=record["project"],
        role=record["role"],
        note=record["note"],
        create_time=datetime.datetime.fromtimestamp(record["create_time"], datetime.UTC),
        expire_time=None if expire_time is None else datetime.datetime.fromtimestamp(expire_time, datetime.UTC),
    )
