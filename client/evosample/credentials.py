"""What a client shows to servers, and by what it knows them: tokens and TLS."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from evosample.errors import InvalidArgumentError

_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True)
class Tls:
    """The files (PEM) of an encrypted connection.

    Args:
        ca: certificates of the authorities, one of which must have signed the server's. Default: the system's.
        cert: the client's own certificate, where the server asks for one.
        key: its private key, without a password.
    """

    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise InvalidArgumentError(
                f"cert={_shown(self.cert)}, key={_shown(self.key)}: a client's certificate and its private key belong "
                "together: name both files, or neither",
                field="cert" if self.cert is None else "key",
            )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For gRPC, from the files as they are now; raises InvalidArgumentError."""
        self.context()  # says what is wrong with them, which gRPC does not
        ca = _system_authorities() if self.ca is None else Path(self.ca)
        return grpc.ssl_channel_credentials(
            None if ca is None else ca.read_bytes(),  # None: those that come with gRPC
            None if self.key is None else Path(self.key).read_bytes(),
            None if self.cert is None else Path(self.cert).read_bytes(),
        )

    def context(self) -> ssl.SSLContext:
        """The same for Python's ssl; raises InvalidArgumentError."""
        try:
            context = ssl.create_default_context(cafile=self.ca or _system_authorities())
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key, password="")  # none: it would ask for it on the terminal
        except OSError as error:  # also of ssl
            reason = getattr(error, "reason", None) or error.strerror or str(error)
            raise InvalidArgumentError(
                f"tls: can't use ca={_shown(self.ca)}, cert={_shown(self.cert)}, key={_shown(self.key)}: {reason}. "
                "Expected PEM files, and a key without a password that belongs to the certificate",
                field="tls",
            ) from error
        context.set_alpn_protocols(["h2"])
        return context


def tls_to_use(tls: Tls | bool | None) -> Tls | None:
    """TLS as an argument or, if that is None, the environment has it; None: no TLS. Raises InvalidArgumentError."""
    if tls is None:
        files = tls_files_of_environment()
        wanted = os.environ.get("EVOSAMPLE_TLS", "").lower()
        if wanted and wanted not in (*_YES, *_NO):
            raise InvalidArgumentError(f"EVOSAMPLE_TLS={wanted!r}: expected 1 or 0", field="tls")
        return Tls(**files) if wanted in _YES or (not wanted and any(files.values())) else None
    if isinstance(tls, bool):
        return Tls() if tls else None
    if not isinstance(tls, Tls):
        raise InvalidArgumentError(
            f"tls={type(tls).__name__}: expected True, False or evosample.Tls(ca=..., cert=..., key=...)", field="tls"
        )
    return tls


def tls_files_of_environment() -> dict[str, str | None]:
    """The arguments of Tls that the environment has; None: it has none."""
    return {name: os.environ.get(f"EVOSAMPLE_TLS_{name.upper()}") or None for name in ("ca", "cert", "key")}


def token_to_use(token: str | None) -> str | None:
    """The token of an argument or, if that is None, of the environment; None: none. Raises InvalidArgumentError."""
    if token is not None:
        return _checked("token", token) if token else None
    if os.environ.get("EVOSAMPLE_TOKEN"):
        return _checked("EVOSAMPLE_TOKEN", os.environ["EVOSAMPLE_TOKEN"])
    if os.environ.get("EVOSAMPLE_TOKEN_FILE"):
        return read_token(os.environ["EVOSAMPLE_TOKEN_FILE"])
    return None


def read_token(file: str | os.PathLike[str]) -> str:
    """The token in a file; raises InvalidArgumentError."""
    try:
        return _checked(str(file), Path(file).read_text(errors="replace"))
    except OSError as error:
        raise InvalidArgumentError(f"can't read the token in {file}: {error.strerror}", field="token") from error


def _checked(source: str, token: str) -> str:
    """A token that a header can hold. Its error does not show it."""
    text = token.strip() if isinstance(token, str) else ""
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise InvalidArgumentError(
            f"{source}: expected a token, such as `evosample token create` prints: ASCII characters without spaces",
            field="token",
        )
    return text


def _system_authorities() -> Path | None:
    """The file with the authorities that the system trusts; None if it is nowhere to be found."""
    paths = ssl.get_default_verify_paths()
    candidates = [paths.cafile, paths.capath and Path(paths.capath) / "ca-certificates.crt"]
    return next((Path(path) for path in candidates if path and Path(path).is_file()), None)


def _shown(path: str | os.PathLike[str] | None) -> str:
    return "None" if path is None else repr(os.fspath(path))
