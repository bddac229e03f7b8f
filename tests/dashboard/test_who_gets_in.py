"""Everything that the site serves, asked for by everybody: with a server's own tokens, over TLS and not."""

from __future__ import annotations

import itertools
import json
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from dashboards import dashboard_url
from support import ROOT_TOKEN, Guarded

HTML = {"accept": "text/html"}
SETTINGS: dict[str, Any] = {"num_samples": 100, "meta_batch_size": 10, "mini_batch_size": 5}
NUM_EPOCHS, SHOWN_EPOCHS = 48_613, re.compile("48,?613")  # by this one sees that experiments of the project are shown

SIGN_IN, GONE, SHOWN, ELSE = "sign in first", "there is nothing of this name", "shown", "something else is shown"
OPEN, REFUSED = "open", "refused"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
WEBSOCKET = {
    "connection": "upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}

# What those get who are not signed in, and those who are: to another project, to this one, to all (as "default").
TABLE = {
    "/": {
        "/": (SIGN_IN, ELSE, SHOWN, ELSE),
        "/?project=mine": (SIGN_IN, GONE, SHOWN, SHOWN),
        "/?project=theirs": (SIGN_IN, ELSE, GONE, ELSE),
        "/?project=none": (SIGN_IN, GONE, GONE, ELSE),
    },
    "/experiments/{name}": {
        "/experiments/one": (SIGN_IN, GONE, SHOWN, GONE),
        "/experiments/one?project=mine": (SIGN_IN, GONE, SHOWN, SHOWN),
        "/experiments/one?project=theirs": (SIGN_IN, GONE, GONE, GONE),
        "/experiments/none": (SIGN_IN, GONE, GONE, GONE),
    },
    "/compare": {
        "/compare": (SIGN_IN, ELSE, ELSE, ELSE),
        "/compare?a=one&b=other": (SIGN_IN, GONE, SHOWN, GONE),
        "/compare?a=one&b=other&project=mine": (SIGN_IN, GONE, SHOWN, SHOWN),
        "/compare?a=one&b=other&project=theirs": (SIGN_IN, GONE, GONE, GONE),
        "/compare?a=none&b=other": (SIGN_IN, GONE, GONE, GONE),
    },
    "/sign-in": {"/sign-in": (ELSE, ELSE, ELSE, ELSE), "/sign-in?next=/experiments/one": (ELSE, ELSE, ELSE, ELSE)},
    "/favicon.ico": {"/favicon.ico": (SIGN_IN, ELSE, ELSE, ELSE)},
    "/_nicegui/VERSION/static": {
        "/_nicegui/VERSION/static/nicegui.js": (SIGN_IN, ELSE, ELSE, ELSE),
        "/_nicegui/VERSION/static/..%2f__init__.py": (SIGN_IN, GONE, GONE, GONE),
    },
    "/_nicegui/VERSION/libraries/{key:path}": {"/_nicegui/VERSION/libraries/none": (SIGN_IN, GONE, GONE, GONE)},
    "/_nicegui/VERSION/components/{key:path}": {"/_nicegui/VERSION/components/none": (SIGN_IN, GONE, GONE, GONE)},
    "/_nicegui/VERSION/resources/{key}/{path:path}": {
        "/_nicegui/VERSION/resources/none/x": (SIGN_IN, GONE, GONE, GONE)
    },
    "/_nicegui/VERSION/dynamic_resources/{name}": {
        "/_nicegui/VERSION/dynamic_resources/x": (SIGN_IN, GONE, GONE, GONE)
    },
    "/_nicegui/VERSION/esm/{key}/{path:path}": {"/_nicegui/VERSION/esm/none/x": (SIGN_IN, GONE, GONE, GONE)},
    "/_nicegui_ws": {
        "the socket of one's own page": (REFUSED, OPEN, OPEN, OPEN),
        "the socket of another's page": (REFUSED, REFUSED, REFUSED, REFUSED),
        "the socket of no page": (REFUSED, REFUSED, REFUSED, REFUSED),
        "/_nicegui_ws/else": (GONE, GONE, GONE, GONE),
    },
    "what there is not": dict.fromkeys(
        ("/openapi.json", "/docs", "/redoc", "/metrics", "/none", "/experiments", "/sign-out", "/.env"),
        (SIGN_IN, GONE, GONE, GONE),
    ),
}
COLUMNS = {
    **dict.fromkeys(
        ("nobody", "nonsense", "no token", "wrong", "cut off", "expired", "revoked", "revoked since", "expired since"),
        0,
    ),
    "of another project": 1,
    **dict.fromkeys(("reader", "writer", "administrator"), 2),
    "root": 3,
}


def routes() -> set[str]:
    """What the site serves, as its app has it once it has started; in a process of its own, for NiceGUI is global."""
    code = """if True:
        import asyncio, json
        from evosample_server.dashboard import site
        from evosample_server.dashboard.sessions import Sessions

        app = site._app(None, Sessions(None, cookie=""), None)
        while not hasattr(app, "routes"):
            app = app.app

        def found(routes, prefix=""):
            for route in routes:
                inner = getattr(getattr(route, "app", None), "routes", None)
                path = prefix + route.path
                yield from [path] if inner is None else found(inner, path)

        async def main():
            async with app.router.lifespan_context(app):
                print(json.dumps(list(found(app.routes))))

        asyncio.run(main())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {re.sub(r"^/_nicegui/[\d.]+/", "/_nicegui/VERSION/", route) for route in json.loads(done.stdout)}


def test_the_table_has_every_route() -> None:
    assert routes() == TABLE.keys() - {"what there is not"}


class Site:
    """A guarded server's dashboard.

    Attributes:
        server: it.
        url: where it is.
    """

    def __init__(self, server: Guarded) -> None:
        self.server = server
        self.url = dashboard_url(server)
        self._trusted = ssl.create_default_context(cafile=server.ca) if server.tls else True

    def visitor(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self._trusted, headers=HTML)

    def sign_in(self, visitor: httpx.Client, token: str) -> bool:
        """Whether a token opens the site."""
        answer = visitor.post("/sign-in", data={"token": token})
        assert answer.status_code in (303, 401), answer.text
        assert bool(answer.cookies) == (answer.status_code == 303)
        assert ("; secure" in answer.headers.get("set-cookie", "").lower()) == (bool(answer.cookies) and self.is_tls)
        return answer.status_code == 303

    @property
    def is_tls(self) -> bool:
        return bool(self.server.tls)


@pytest.fixture(params=[False, True], ids=["plain text", "TLS"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    server = Guarded(tmp_path, "--http", "127.0.0.1:0", has_tls=request.param)
    found = Site(server)
    with server.connect(ROOT_TOKEN) as root:
        for name, num_epochs in (("one", NUM_EPOCHS), ("other", NUM_EPOCHS + 1)):
            root.create_experiment(name, project="mine", num_epochs=num_epochs, **SETTINGS)
    yield found
    assert server.stop() == 0


def page_id(visitor: httpx.Client) -> str:
    """By which the socket of a page says whose it is; that of no page for who can't open one."""
    found = re.search(r"client_id['\"]: ?['\"]([0-9a-f-]{36})", visitor.get("/").text)
    return "none" if found is None else found[1]


def socket_outcome(visitor: httpx.Client, client_id: str) -> str:
    """Whether a page's socket lets somebody in, as its script connects it."""
    query = {"EIO": "4", "transport": "polling", "client_id": client_id, "implicit_handshake": "true"}
    query |= {"document_id": "d", "tab_id": "t", "next_message_id": "0"}
    place = "/_nicegui_ws/socket.io/"
    query["sid"] = json.loads(visitor.get(place, params=query).text[1:])["sid"]
    visitor.post(place, params=query, content="40")
    said = visitor.get(place, params=query).text
    assert said.startswith(("40", "44")), said
    return OPEN if said.startswith("40") else REFUSED


def page_outcome(answer: httpx.Response) -> str:
    match answer.status_code:
        case 303 if answer.headers["location"].startswith("/sign-in"):
            return SIGN_IN
        case 404:
            return GONE
        case 200:
            return SHOWN if SHOWN_EPOCHS.search(answer.text) else ELSE
    return f"{answer.status_code} {answer.text}"


def outcome(visitor: httpx.Client, place: str, another: httpx.Client) -> str:
    match place:
        case "the socket of one's own page":
            return socket_outcome(visitor, page_id(visitor))
        case "the socket of another's page":
            return socket_outcome(visitor, page_id(another))
        case "the socket of no page":
            return socket_outcome(visitor, "none")
    return page_outcome(visitor.get(place))


def test_nobody_gets_in_but_those_who_may(site: Site) -> None:
    server = site.server
    mine: dict[str, str] = {role: server.new_token(role) for role in ("reader", "writer", "administrator")}
    revoked, revoked_since, expired_since = (server.new_token("writer", ttl_s=ttl_s) for ttl_s in (None, None, 5))
    has_expired_s = time.monotonic() + 5
    server.revoke(revoked)
    good = {"expired since": expired_since, "revoked since": revoked_since, **mine, "root": ROOT_TOKEN}
    good["of another project"] = server.new_token("administrator", "theirs")
    bad = {"no token": "", "wrong": f"evo_0123456789ab_{43 * 'x'}", "cut off": mine["reader"][:-1], "revoked": revoked}
    with ExitStack() as stack:
        visitors = {who: stack.enter_context(site.visitor()) for who in COLUMNS}
        another = stack.enter_context(site.visitor())
        assert site.sign_in(another, mine["administrator"])
        for who, token in good.items():
            assert site.sign_in(visitors[who], token), who
            assert visitors[who].get("/").status_code == 200
        server.revoke(revoked_since)
        time.sleep(max(1.1, has_expired_s - time.monotonic()))
        for who, token in (bad | {"expired": expired_since}).items():
            assert not site.sign_in(visitors[who], token), who
        visitors["nonsense"].cookies.set(next(iter(another.cookies)), "nonsense")
        visitors["nobody"].headers["authorization"] = f"Bearer {mine['administrator']}"  # tokens are for calls alone
        version = re.search(r"/_nicegui/([0-9.]+)/", another.get("/").text)
        assert version is not None
        met, expected = {}, {}
        for places in TABLE.values():
            for place, outcomes in places.items():
                for who, visitor in visitors.items():
                    met[who, place] = outcome(visitor, place.replace("VERSION", version[1]), another)
                    expected[who, place] = outcomes[COLUMNS[who]]
        wrong = {key: (met[key], "not", expected[key]) for key in met if met[key] != expected[key]}
        assert not wrong, wrong
        guarded = [place for places in TABLE.values() for place in places if places[place][0] is SIGN_IN]
        for place, method in itertools.product(guarded, METHODS):
            answer = visitors["revoked since"].request(method, place, headers={"accept": "*/*"})
            assert answer.status_code == 401, (method, place)
        for place in TABLE.keys() & set(guarded):
            assert visitors["nobody"].get(place, headers=WEBSOCKET | {"accept": "*/*"}).status_code == 401, place
    assert not [token for token in (*good.values(), *bad.values()) if len(token) > 30 and token[17:] in server.log]


def test_what_speaks_another_protocol_gets_no_answer(site: Site) -> None:
    """A server that speaks TLS says nothing in plain text, and the other way round; not even where to sign in."""
    scheme, other = ("https", "http") if site.is_tls else ("http", "https")
    with httpx.Client(verify=False) as visitor:
        for port_of in (site.url, f"{scheme}://{site.server.address}"):
            with pytest.raises(httpx.TransportError):
                visitor.get(port_of.replace(scheme, other), headers=HTML)
        assert visitor.get(f"{site.url}/sign-in").status_code == 200
    if site.is_tls:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(site.url)
        with socket.create_connection(("127.0.0.1", int(site.url.rpartition(":")[2]))) as plain:
            plain.sendall(b"GET /sign-in HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
            assert b"HTTP" not in plain.recv(4096)
