"""The dashboard as a web site: its listener, its sign-in page, and the door in front of NiceGUI's pages."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from html import escape
from ipaddress import ip_address
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import structlog
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from nicegui import Client, ui
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evosample.errors import UnavailableError
from evosample.wire import is_local
from evosample_server.dashboard.pages import add_pages
from evosample_server.dashboard.sessions import Sessions, SignIn
from evosample_server.experiments import Experiments
from evosample_server.status import to_domain

_log = structlog.get_logger()

_GRACE_S = 1
_SIGN_IN = "/sign-in"
_MAX_FORM_BYTES = 2**14
_SOCKETS = "/_nicegui_ws/"

# Vue compiles templates in the browser, and NiceGUI's page starts with a script of its own: hence 'unsafe-...'. What
# counts is that nothing comes from or goes to anybody else.
_PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_SIGN_IN_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


class Dashboard:
    """The dashboard of a server, in its event loop. There is one in a process: NiceGUI has global state.

    Args:
        address: HOST:PORT to listen on; port 0 is any.
        sign_in: what a token opens. None: everybody may see everything; without TLS under the machine's own names and
            addresses alone (so that no page of another site gets in by having its name point here).
        tls: over which it is served; None: plain text.

    Attributes:
        address: its URL, with the port that it got.

    Raises:
        UnavailableError: it can't listen there.
    """

    def __init__(self, address: str, *, sign_in: SignIn | None = None, tls: ssl.SSLContext | None = None) -> None:
        host, _, port = address.rpartition(":")
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        try:
            self._socket = socket.create_server((host.strip("[]"), int(port)), family=family)
        except OSError as error:
            raise UnavailableError(
                f"can't serve the dashboard on {address}: {error.strerror}. Is the address right (HOST:PORT), and free?"
            ) from error
        bound_port = self._socket.getsockname()[1]
        self.address = f"{'http' if tls is None else 'https'}://{host}:{bound_port}"
        # Cookies don't tell ports apart: servers on one machine must not sign each other's users out.
        self._sessions = Sessions(sign_in, cookie=f"evosample_session_{bound_port}")
        self._tls = tls
        self._names: set[str] | None = None
        if sign_in is None and tls is None:
            self._names = {"localhost", host.lower(), socket.gethostname().lower()}
            if not is_local(address):
                self._names.add(socket.getfqdn().lower())

    async def serve(self, experiments: Experiments, stopping: asyncio.Event) -> None:
        """Serve until told to stop; pages that are open don't hold it up."""
        tls = self._tls
        server = _Server(
            uvicorn.Config(
                _app(experiments, self._sessions, self._names),
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # whoever comes from this machine could name any other as where they come from
                ws_max_size=2**20,  # more than any page sends, of whoever comes
                timeout_graceful_shutdown=_GRACE_S,
                ssl_context_factory=None if tls is None else lambda *_: tls,
            )
        )
        serving = asyncio.ensure_future(server.serve(sockets=[self._socket]))
        stopped = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
            if not stopping.is_set():
                _log.error("the dashboard has ended by itself; training goes on")
        finally:
            stopped.cancel()
            server.should_exit = True
            await serving


def _app(experiments: Experiments, sessions: Sessions, names: set[str] | None) -> ASGIApp:
    app = FastAPI(openapi_url=None)
    _add_sign_in(app, sessions)
    add_pages(experiments, sessions)
    ui.run_with(
        app,
        title="evosample",
        favicon=_ICON,
        dark=None,
        language="en-US",
        binding_refresh_interval=None,  # nothing is bound
        tailwind=False,
        show_welcome_message=False,
    )
    return _Door(app, sessions, names)


def _add_sign_in(app: FastAPI, sessions: Sessions) -> None:
    @app.get(_SIGN_IN)
    async def show(next: str = "/") -> Response:  # noqa: A002  # what it is called in the URL
        return _sign_in_page(next) if sessions.are_needed else RedirectResponse(_local(next), 303)

    @app.post(_SIGN_IN)
    async def sign_in(request: Request) -> Response:
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return PlainTextResponse("sign in on the page of this site", 403)
        form = await _small_form(request)
        if form is None:
            return _sign_in_page("/", problem="This is too long to be a token.", status_code=413)
        next_page = form.get("next", "/")
        try:
            session_id = await sessions.begin(form.get("token", "").strip(), request)
        except Exception as error:  # noqa: BLE001  # the boundary: whatever it is, the visitor is told
            return _sign_in_page(next_page, problem=str(to_domain(error)), status_code=503)
        if session_id is None:
            problem = "This token is not valid: it is mistyped, was revoked or has expired."
            return _sign_in_page(next_page, problem=problem, status_code=401)
        response = RedirectResponse(_local(next_page), 303)
        schemes = request.url.scheme, request.headers.get("x-forwarded-proto")  # a false one hurts its sender alone
        response.set_cookie(sessions.cookie, session_id, httponly=True, samesite="strict", secure="https" in schemes)
        return response


async def _small_form(request: Request) -> dict[str, str] | None:
    """The fields of a form; None if it is too large, or breaks off.

    Starlette would write the files of a form to disk, of any size and whoever sends them.
    """
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_FORM_BYTES:
                return None
    except ClientDisconnect:
        return None
    return dict(parse_qsl(body.decode(errors="replace")))


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are for whoever runs the event loop


class _Door:
    """Lets nobody in who is not signed in, and gives every answer the headers that keep a browser out of trouble.

    Args:
        names: under which the site may be called, beside all addresses; None: any.
    """

    def __init__(self, app: ASGIApp, sessions: Sessions, names: set[str] | None) -> None:
        self.app = app  # of this name: NiceGUI looks for it to find its server
        self._sessions = sessions
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        if self._names is not None and not _is_among(self._names, connection.headers.get("host", "")):
            problem = "call this site by the machine's address, or by its name: localhost, or what `hostname` says"
            await PlainTextResponse(problem, 400)(scope, receive, send)
            return
        is_sign_in = scope["path"] == _SIGN_IN

        async def send_safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _SIGN_IN_POLICY if is_sign_in else _PAGE_POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "same-origin"
            await send(message)

        if not is_sign_in:
            try:
                is_signed_in = await self._sessions.grant(connection) is not None
            except Exception as error:  # noqa: BLE001  # the boundary, as above
                problem = f"can't tell who you are: {to_domain(error)}"
                await PlainTextResponse(problem, 503)(scope, receive, send_safe)
                return
            if scope["path"].startswith(_SOCKETS) and not (is_signed_in and self._is_of_own_page(connection)):
                # Refused by NiceGUI as any page that it does not know: then the browser loads the page again.
                query = dict(connection.query_params) | {"client_id": "signed-out", "implicit_handshake": "true"}
                scope = {**scope, "query_string": urlencode(query).encode()}
            elif not is_signed_in:
                await _to_sign_in(connection)(scope, receive, send_safe)
                return
        await self.app(scope, receive, send_safe)

    def _is_of_own_page(self, connection: HTTPConnection) -> bool:
        """Whether a socket is of a page that the same session has loaded: its id, part of URLs, is no proof."""
        page = Client.instances.get(connection.query_params.get("client_id", ""))
        return page is not None and self._sessions.are_same(connection, page.request)


def _is_among(names: set[str], host: str) -> bool:
    """Whether a Host header has one of these names, or an address: that is never the name of another site."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in names or ip_address(name) is not None
    except ValueError:
        return False


def _to_sign_in(connection: HTTPConnection) -> Response:
    if "text/html" not in connection.headers.get("accept", ""):
        return PlainTextResponse("sign in first", 401)
    wanted = connection.url.path + (f"?{connection.url.query}" if connection.url.query else "")
    return RedirectResponse(_SIGN_IN if wanted == "/" else f"{_SIGN_IN}?next={quote(wanted, safe='')}", 303)


def _local(target: str) -> str:
    """A place of this site: what comes with a link must not lead anywhere else."""
    is_local = target.startswith("/") and not target.startswith(("//", "/\\")) and target.isprintable()
    return target if is_local else "/"


_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#0f8fd0"/>'
    '<path d="M6 24h4v-5H6zm6 0h4V8h-4zm6 0h4v-9h-4zm6 0h3v-3h-3z" fill="#fff"/></svg>'
)

_SIGN_IN_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Sign in - evosample</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 16px/1.5 system-ui, sans-serif; margin: 0; min-height: 100vh; display: grid; place-items: center;
         background: light-dark(#f4f5f7, #121212); }
  form { box-sizing: border-box; width: min(24rem, calc(100vw - 2rem)); padding: 2rem; border-radius: 8px;
         background: light-dark(#fff, #1d1d1d); box-shadow: 0 1px 4px rgba(0, 0, 0, .25); }
  h1 { font-size: 1.4rem; margin: 0 0 1rem; }
  input, button { box-sizing: border-box; width: 100%; font: inherit; padding: .6rem .7rem; border-radius: 6px; }
  input { border: 1px solid #888; margin: .3rem 0 1rem; }
  button { border: 0; background: #0b6ca0; color: #fff; cursor: pointer; }
  p { margin: 0 0 1rem; color: light-dark(#a8300c, #ff9d73); }
  small { display: block; margin-top: 1rem; opacity: .75; }
</style>
</head>
<body>
<form method="post" action="/sign-in">
<h1>evosample</h1>
$problem
<label for="token">Token</label>
<input id="token" name="token" type="password" required autofocus autocomplete="current-password">
<input type="hidden" name="next" value="$next">
<button>Sign in</button>
<small>An administrator of your project makes tokens with <code>evosample token create</code>.</small>
</form>
</body>
</html>
"""


def _sign_in_page(next_page: str, *, problem: str = "", status_code: int = 200) -> Response:
    shown = f'<p role="alert">{escape(problem)}</p>' if problem else ""
    page = _SIGN_IN_PAGE.replace("$problem", shown).replace("$next", escape(_local(next_page)))
    return HTMLResponse(page, status_code, headers={"Cache-Control": "no-store"})
