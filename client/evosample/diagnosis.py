"""Why a server does not answer, where that is up to TLS: gRPC says little of it."""

from __future__ import annotations

import socket
import ssl

from evosample.credentials import Tls

_TIMEOUT_S = 2.0

# OpenSSL's numbers (X509_V_ERR_...), and what to do.
_REASONS = {
    9: "is not valid yet: are both machines' clocks right?",
    10: "has expired: whoever runs the server renews it. (If it should not have: are both machines' clocks right?)",
    62: "is not for this name: connect by a name that it has, or have one made with this name (a subjectAltName)",
    64: "is not for this address: connect by a name that it has, or have one made with this address (a subjectAltName)",
}
_UNKNOWN_AUTHORITY = (
    "is signed by no authority that this client knows: name the right one with tls=evosample.Tls(ca=...), "
    "EVOSAMPLE_TLS_CA or --tls-ca"
)
_UNKNOWN_AUTHORITY_CODES = (18, 19, 20, 21)
_CLIENT_CERT = (
    "tls=evosample.Tls(cert=..., key=...), EVOSAMPLE_TLS_CERT and EVOSAMPLE_TLS_KEY, or --tls-cert and --tls-key"
)


def refusal(address: str, tls: Tls | None) -> str | None:
    """What keeps a client from talking to a server that can be reached; None if nothing does, or it can't be reached.

    Makes one connection, as gRPC would: within a few seconds.

    Args:
        address: HOST:PORT; of a unix socket there is nothing to find out.
        tls: as the client has it; None: it speaks plain text.
    """
    if address.startswith("unix:"):
        return None
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        for family, _, _, _, place in socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM):
            # Encrypted before it connects: of a connection that is reset meanwhile, Python's wrap_socket says that all
            # is well, or it leaks the socket.
            with _context(tls).wrap_socket(
                socket.socket(family), server_hostname=host, do_handshake_on_connect=False
            ) as connection:
                connection.settimeout(_TIMEOUT_S)
                try:
                    connection.connect(place)
                except OSError:
                    continue
                return _plain_text_refusal(connection) if tls is None else _tls_refusal(connection, tls)
    except OSError:  # it can't be reached, or falls silent: gRPC has said so
        pass
    return None


def _context(tls: Tls | None) -> ssl.SSLContext:
    if tls is not None:
        return tls.context()
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only whether it speaks TLS; nothing is sent
    return context


def _plain_text_refusal(connection: ssl.SSLSocket) -> str | None:
    try:
        connection.do_handshake()
    except ssl.SSLError:
        return None
    return "it speaks TLS, and this client does not: pass tls=True or evosample.Tls(ca=...), EVOSAMPLE_TLS=1, or --tls"


def _tls_refusal(connection: ssl.SSLSocket, tls: Tls) -> str | None:
    try:
        connection.do_handshake()
        if connection.recv(1):  # HTTP/2 begins with a word of the server's
            return None
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):  # cut off half-way, as by a server that stops
        return None
    except ssl.SSLCertVerificationError as error:
        known = _UNKNOWN_AUTHORITY if error.verify_code in _UNKNOWN_AUTHORITY_CODES else error.verify_message
        return f"its certificate {_REASONS.get(error.verify_code, known)}"
    except ssl.SSLError as error:
        reason = error.reason or ""
        if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
            return (
                "it does not speak TLS: start it with --tls-cert and --tls-key, or leave out tls (EVOSAMPLE_TLS, --tls)"
            )
        if "ALERT" not in reason or "VERSION" in reason:
            return f"TLS fails with it: {reason or error}"
    # It has turned down what this client is: some servers say so, others just end the connection.
    if tls.cert is None:
        return f"it asks clients for a certificate: pass one with {_CLIENT_CERT}"
    return (
        f"it turns down this client's certificate: is {tls.cert} signed by the authority that it asks for, and valid?"
    )
