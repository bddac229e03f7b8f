"""The server's certificate, which may be renewed while it runs."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc
import structlog

from evosample.errors import FailedPreconditionError

_log = structlog.get_logger()


def server_credentials(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """TLS with the certificate and the key in these files, which are read again whenever they have changed.

    Every new connection looks whether they have. Files that can't be used are logged: until they can, which every new
    connection tries, the certificate before stays in use.

    Args:
        cert: the chain, PEM: the server's certificate first.
        key: its private key, PEM, not encrypted.
        client_ca: who signs the certificates that clients must then show, PEM. None: they need none.

    Raises:
        FailedPreconditionError: a file is missing, is not what it should be, or the key belongs to another certificate.
    """
    files = _Files([cert, key] if client_ca is None else [cert, key, client_ca])
    return grpc.dynamic_ssl_server_credentials(
        files.first(),
        files.renewed,  # type: ignore[arg-type]  # it may return None, as gRPC's documentation says
        client_ca is not None,
    )


def server_context(cert: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    """The same for Python's own servers."""
    files = _Files([cert, key] if client_ca is None else [cert, key, client_ca])
    files.first()
    context = files.context

    def look(connection: ssl.SSLObject, *_: object) -> None:
        files.renewed()
        connection.context = files.context

    context.sni_callback = look  # called in every handshake
    return context


_Stamp = tuple[int, int, int] | None  # differs between what a file held before and holds now


class _Files:
    """The files, as they were when they could last be used.

    Attributes:
        context: what they made then.
    """

    context: ssl.SSLContext

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._used: list[_Stamp] = []
        self._logged: list[_Stamp] = []  # that they can't be used

    def read(self) -> grpc.ServerCertificateConfiguration:
        """What is in the files; raises OSError, or ValueError if it can't be used."""
        now = [_stamp(path) for path in self._paths]
        cert, key, *client_ca = self._paths
        chain, private_key, *authorities = [path.read_bytes() for path in self._paths]
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cert, key, password="")  # none: it would ask for it on the terminal
            for path in client_ca:
                context.load_verify_locations(path)
                context.verify_mode = ssl.CERT_REQUIRED
        except ssl.SSLError as error:
            names = ", ".join(map(str, self._paths))
            raise ValueError(
                f"{error.reason or error} in {names}. Expected PEM files: the certificate's chain, its private key "
                "without a password, and the authorities that sign clients' certificates"
            ) from error
        self.context, self._used = context, now
        return grpc.ssl_server_certificate_configuration(
            [(private_key, chain)], authorities[0] if authorities else None
        )

    def first(self) -> grpc.ServerCertificateConfiguration:
        """What is in the files; raises FailedPreconditionError if it can't be used."""
        try:
            return self.read()
        except (OSError, ValueError) as error:
            raise FailedPreconditionError(f"can't use the server's certificate: {_explained(error)}") from error

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """What is in the files, if they have changed and can be used. gRPC calls it before every handshake."""
        now = [_stamp(path) for path in self._paths]
        if now == self._used:
            return None
        try:
            config = self.read()
        except (OSError, ValueError) as error:  # which may pass without a trace in the stamps
            if now != self._logged:
                _log.error("can't use the renewed certificate: the one before stays in use", cause=_explained(error))
            self._logged = now
            return None
        _log.info("the certificate was renewed")
        return config


def _stamp(path: Path) -> _Stamp:
    try:
        file = path.stat()
    except OSError:
        return None
    return file.st_mtime_ns, file.st_ino, file.st_size


def _explained(error: Exception) -> str:
    return f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
