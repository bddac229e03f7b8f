"""What a server can be told: by options, or by environment variables of the same name with the prefix EVOSAMPLE_."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from evosample.wire import check_address


class Settings(BaseSettings):
    """Selection server: keeps the scores of training samples in Redis, and streams over gRPC what to train on."""

    model_config = SettingsConfigDict(
        env_prefix="EVOSAMPLE_",
        env_ignore_empty=True,  # compose files pass what is not set as empty
        frozen=True,
        extra="forbid",
        cli_prog_name="evosample-server",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
    )

    listen: str = Field(
        "127.0.0.1:50051", description="address to listen on: HOST:PORT (port 0: any, printed), or unix:/PATH"
    )
    redis_url: str | None = Field(
        None,
        description="Redis or Valkey to use, such as redis://:password@host:6379/0, rediss://host:6379/0 (TLS), "
        "unix:///path/redis.sock, redis+cluster://host:6379,host:6379, redis+sentinel://host:26379,host:26379/SERVICE "
        "(both with rediss, too); without it one is started in --data-dir, and ends with the server",
    )
    data_dir: Path = Field(Path("evosample-data"), description="where the server's own Valkey keeps its data")
    max_samples: int = Field(
        200_000_000, ge=1, description="largest num_samples of an experiment; planning takes about 100 bytes a sample"
    )
    retain_epochs: int = Field(
        2, ge=1, description="epochs whose scores are kept, the current one counted; a job can go back to these"
    )
    max_experiments: int = Field(10_000, ge=1, description="most experiments of a project")
    max_streams: int = Field(
        1_000, ge=1, description="most streams of ids at once; one is open for each rank that is waiting for an epoch"
    )
    max_message_bytes: int = Field(
        4 * 2**20, ge=2**20, le=2**30, description="most bytes of losses or scores that come in one message"
    )
    cache_bytes: int = Field(2**30, ge=0, description="memory for columns that were read or written lately")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level to log")
    parent_pid: int | None = Field(
        None,
        description="of a private server: stop when this process, the server's parent, ends, and remove the folder of "
        "the unix socket",
    )

    @field_validator("listen")
    @classmethod
    def _listen_is_an_address(cls, listen: str) -> str:
        check_address("listen", listen)
        return listen

    @model_validator(mode="after")
    def _private_servers_have_a_socket(self) -> Self:
        if self.parent_pid is not None and not self.listen.startswith("unix:"):
            raise ValueError("--parent-pid needs --listen unix:/FOLDER/SOCKET, in a folder of the server's own")
        return self
