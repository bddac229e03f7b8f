"""What a server can be told: by options, or by environment variables of the same name with the prefix EVOSAMPLE_."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from evosample.wire import check_address, is_local


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
    tls_cert: Path | None = Field(
        None, description="the server's certificate and its chain, a PEM file; it may be renewed while the server runs"
    )
    tls_key: Path | None = Field(None, description="the private key of --tls-cert, a PEM file without a password")
    tls_client_ca: Path | None = Field(
        None, description="authorities (a PEM file) that sign clients' certificates, which clients must then show"
    )
    tokens: bool | None = Field(
        None,
        description="ask every caller for a token; default: yes, unless the server listens without TLS where others "
        "can't reach it (127.0.0.1, unix:), or is --insecure",
    )
    root_token_file: Path | None = Field(
        None,
        description="a file with a token of at least 32 characters, whose holder is administrator of every project: to "
        "make the first tokens with `evosample token create`",
    )
    health_socket: Path | None = Field(
        None,
        description="a unix socket on which the gRPC health service alone answers, without TLS: for probes inside a "
        "container (python -m evosample_server.probe)",
    )
    insecure: bool = Field(
        False, description="listen without TLS or without asking for tokens where others can reach the server"
    )
    http: str | None = Field(
        None, description="address to serve the dashboard on, such as 127.0.0.1:8080; needs evosample[dashboard]"
    )
    redis_url: str | None = Field(
        None,
        description="Redis or Valkey to use, such as redis://:password@host:6379/0, rediss://host:6379/0 (TLS), "
        "unix:///path/redis.sock, redis+cluster://host:6379,host:6379, redis+sentinel://host:26379,host:26379/SERVICE "
        "(both with rediss, too); without it one is started in --data-dir, and ends with the server",
    )
    redis_password_file: Path | None = Field(
        None, description="a file with the password of --redis-url, which then needs none (a user may stand in it)"
    )
    data_dir: Path = Field(Path("evosample-data"), description="where the server's own Valkey keeps its data")
    max_samples: int = Field(
        200_000_000, ge=1, description="largest num_samples of an experiment; planning takes about 60 bytes a sample"
    )
    retain_epochs: int = Field(
        2, ge=1, description="epochs whose scores are kept, the current one counted; a job can go back to these"
    )
    max_experiments: int = Field(10_000, ge=1, description="most experiments of a project")
    max_project_samples: int = Field(
        10_000_000_000, ge=1, description="most samples of a project's experiments together"
    )
    max_streams: int = Field(
        2_000, ge=1, description="most streams of ids at once; one is open for each rank that is waiting for an epoch"
    )
    max_project_streams: int | None = Field(
        None, ge=1, description="most of these streams for one project; default: half of --max-streams"
    )
    max_connection_age_s: int = Field(
        600,
        ge=1,
        description="age at which a client is asked to connect anew, give or take a tenth, so that running jobs find "
        "servers that were added; calls under way are not broken off",
    )
    max_message_bytes: int = Field(
        4 * 2**20, ge=2**20, le=2**30, description="most bytes of losses or scores that come in one message"
    )
    cache_bytes: int = Field(2**30, ge=0, description="memory for columns that were read or written lately")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level to log")
    log_format: Literal["human", "json"] = Field(
        "human", description="how log lines look: for people, or each a JSON object"
    )
    metrics: str | None = Field(
        None,
        description="address for Prometheus, HOST:PORT (port 0: any, logged): /metrics tells whoever asks, names of "
        "projects and experiments included as --metrics-experiments says",
    )
    metrics_experiments: int | None = Field(
        None,
        ge=0,
        description="most experiments that metrics tell of by name, among those that were lately served; default: 100, "
        "but none where callers need tokens and others can reach --metrics",
    )
    otlp_endpoint: str | None = Field(
        None,
        description="collector for traces, such as http://collector:4318 (OpenTelemetry's OTLP over HTTP; needs the "
        "extra [tracing])",
    )
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

    @field_validator("http", "metrics")
    @classmethod
    def _is_an_address_with_a_port(cls, address: str | None, field: ValidationInfo) -> str | None:
        if address is not None:
            check_address(str(field.field_name), address)
            if address.startswith("unix:"):
                raise ValueError(
                    "expected HOST:PORT, such as 127.0.0.1:8080: browsers and Prometheus can't open a unix socket"
                )
        return address

    @field_validator("otlp_endpoint")
    @classmethod
    def _otlp_endpoint_is_a_url(cls, otlp_endpoint: str | None) -> str | None:
        if otlp_endpoint is not None and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", otlp_endpoint):
            raise ValueError("expected the base URL of a collector, such as http://collector:4318")
        return otlp_endpoint

    @model_validator(mode="after")
    def _private_servers_have_a_socket(self) -> Self:
        if self.parent_pid is not None and not self.listen.startswith("unix:"):
            raise ValueError("--parent-pid needs --listen unix:/FOLDER/SOCKET, in a folder of the server's own")
        return self

    @model_validator(mode="after")
    def _passwords_have_a_store(self) -> Self:
        if self.redis_password_file is not None and self.redis_url is None:
            raise ValueError("--redis-password-file needs --redis-url: the server's own store has no password")
        return self

    @model_validator(mode="after")
    def _others_are_kept_out(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together: name the certificate's file and its key's")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key: clients show certificates over TLS only")
        if self.tls_cert is not None and self.listen.startswith("unix:"):
            raise ValueError("--tls-cert: there is no TLS on a unix socket; who may open it is up to its folder")
        if self.root_token_file is not None and not self.needs_tokens:
            raise ValueError("--root-token-file: this server would not ask for tokens; say --tokens")
        is_safe = self.insecure or (self.tls_cert is not None and self.needs_tokens)
        for option, address in (("--listen", self.listen), ("--http", self.http)):
            if address is not None and not (is_local(address) or is_safe):
                raise ValueError(
                    f"{option} {address}: others can reach this server. Give it a certificate (--tls-cert, --tls-key), "
                    "and let it ask for tokens (--root-token-file for the first one; not --no-tokens); or say "
                    "--insecure, if all who can reach it may read and change everything"
                )
        return self

    @property
    def most_named_experiments(self) -> int:
        """Most experiments that metrics tell of by name: names are for whoever may see them."""
        if self.metrics_experiments is not None:
            return self.metrics_experiments
        return 100 if self.metrics is None or is_local(self.metrics) or not self.needs_tokens else 0

    @property
    def most_project_streams(self) -> int:
        """Most streams of ids of one project: others get some, too, unless it was told otherwise."""
        return self.max_project_streams or max(self.max_streams // 2, 1)

    @property
    def needs_tokens(self) -> bool:
        """Whether callers need a token."""
        if self.tokens is not None:
            return self.tokens
        return not self.insecure and (self.tls_cert is not None or not is_local(self.listen))
