"""The site as a client meets it that is no browser: who gets in, and what comes with every answer."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from dashboards import GuardedDashboard, OpenDashboard, dashboard_url
from stores import wait_until
from support import ROOT_TOKEN, Guarded, ServerProcess

PAGE = {"accept": "text/html"}


@pytest.fixture
def http(guarded: GuardedDashboard) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, headers=PAGE) as client:
        yield client


def sign_in(http: httpx.Client, token: str, **form: str) -> httpx.Response:
    return http.post("/sign-in", data={"token": token, **form})


def test_a_token_opens_its_project_alone(guarded: GuardedDashboard, http: httpx.Client, name: str) -> None:
    for project in ("red", "blue"):
        guarded.client.create_experiment(
            f"{project}-{name}", project=project, num_samples=8, num_epochs=3, meta_batch_size=4, mini_batch_size=2
        )
    assert sign_in(http, guarded.reader).headers["location"] == "/"
    # Connections to a store that a test before has ended fail once each.
    wait_until(lambda: f"red-{name}" in http.get("/").text, "the page to show the project")
    assert f"blue-{name}" not in http.get("/").text
    assert http.get(f"/experiments/red-{name}").status_code == 200
    assert http.get(f"/experiments/red-{name}?project=red").status_code == 200

    def refusal(place: str) -> str:
        answer = http.get(place)
        assert answer.status_code == 404
        return re.sub(r"[0-9a-f-]{36}|blue|red|no-such", "...", answer.text)

    for page in (f"/experiments/blue-{name}", f"/experiments/red-{name}", "/"):
        assert refusal(f"{page}?project=blue") == refusal(f"{page}?project=no-such")
    assert refusal(f"/experiments/blue-{name}") == refusal(f"/experiments/no-such-{name}")

    with httpx.Client(base_url=guarded.url, headers=PAGE) as root:
        sign_in(root, ROOT_TOKEN)
        assert f"blue-{name}" in root.get("/?project=blue").text
        assert root.get(f"/experiments/red-{name}?project=red").status_code == 200


def test_a_wrong_token_is_refused_and_not_repeated(http: httpx.Client) -> None:
    for token in ("", "wrong-token", "x" * 10_000):
        answer = sign_in(http, token)
        assert answer.status_code == 401
        assert "not valid" in answer.text
        assert not token or token not in answer.text
        assert not answer.cookies


def test_a_form_that_goes_on_and_on_is_not_kept(guarded: GuardedDashboard) -> None:
    lines = ["POST /sign-in HTTP/1.1", "host: 127.0.0.1", f"content-length: {2**30}"]
    lines += ["content-type: multipart/form-data; boundary=x", "", "--x"]
    lines += ['content-disposition: form-data; name="token"; filename="token"', "", ""]
    with socket.create_connection(("127.0.0.1", int(guarded.url.rpartition(":")[2])), timeout=20) as sender:
        sender.sendall("\r\n".join(lines).encode() + bytes(2**20))
        assert sender.recv(4096).startswith(b"HTTP/1.1 413 "), "answered long before its end"
    with socket.create_connection(("127.0.0.1", int(guarded.url.rpartition(":")[2]))) as sender:
        sender.sendall(
            "\r\n".join([*lines[:3], "", "token="]).encode()
        )  # what has broken off is no error of the server's


def test_the_cookie_is_out_of_reach_of_scripts_and_of_other_sites(
    guarded: GuardedDashboard, http: httpx.Client
) -> None:
    answer = sign_in(http, guarded.reader)
    attributes = answer.headers["set-cookie"].lower().split("; ")
    assert {"httponly", "samesite=strict", "path=/"} <= set(attributes)
    assert guarded.reader not in answer.headers["set-cookie"]
    secure = http.post("/sign-in", data={"token": guarded.reader}, headers={"x-forwarded-proto": "https"})
    assert "secure" in secure.headers["set-cookie"].lower().split("; ")


@pytest.mark.parametrize(
    ("wanted", "target"),
    [
        ("/compare?a=x&b=y", "/compare?a=x&b=y"),
        ("https://elsewhere.example/", "/"),
        ("//elsewhere.example/", "/"),
        ("/\\elsewhere.example/", "/"),
        ("/\r\nset-cookie: a=b", "/"),
        ("javascript:alert(1)", "/"),
    ],
)
def test_signing_in_leads_to_this_site_alone(
    guarded: GuardedDashboard, http: httpx.Client, wanted: str, target: str
) -> None:
    assert sign_in(http, guarded.reader, next=wanted).headers["location"] == target


def test_what_comes_with_a_link_is_text(http: httpx.Client) -> None:
    answer = http.get("/sign-in", params={"next": '/"><script>alert(1)</script>'})
    assert "<script>" not in answer.text


def test_a_host_that_guesses_cant_pass_for_another(tmp_path: Path) -> None:
    server = Guarded(tmp_path, "--http", "127.0.0.1:0")
    unused = server.new_token("reader")
    with httpx.Client(base_url=dashboard_url(server)) as visitor:
        for i in range(10):
            said = visitor.post("/sign-in", data={"token": "wrong"}, headers={"x-forwarded-for": f"10.0.0.{i}"})
            assert said.status_code == 401
        answer = visitor.post("/sign-in", data={"token": unused}, headers={"x-forwarded-for": "10.0.0.99"})
    server.stop()
    assert answer.status_code == 503
    assert "came from 127.0.0.1" in answer.text
    assert re.findall("refused .*method=(.*) peer=ipv4:127.0.0.1:0", server.log) == ["dashboard"]


def test_another_site_signs_nobody_in(guarded: GuardedDashboard, http: httpx.Client) -> None:
    answer = http.post("/sign-in", data={"token": guarded.reader}, headers={"sec-fetch-site": "cross-site"})
    assert answer.status_code == 403
    assert not answer.cookies


def test_who_signs_in_again_and_again_ends_sessions_of_their_own_alone(
    guarded: GuardedDashboard, http: httpx.Client
) -> None:
    another = guarded.server.new_token("reader", "red")
    sessions = [sign_in(http, token).cookies for token in (another, *101 * [guarded.reader])]
    for session, status_code in zip(sessions[:3], (200, 303, 200), strict=True):
        http.cookies = session
        assert http.get("/").status_code == status_code


def test_while_the_store_is_away_nothing_is_shown_and_nobody_signed_out(
    guarded: GuardedDashboard, http: httpx.Client
) -> None:
    unused = guarded.server.new_token("reader", "red")
    sign_in(http, guarded.reader)
    assert http.get("/").status_code == 200
    guarded.store.kill()
    wait_until(lambda: http.get("/").status_code != 200, "the server to ask the store again")
    answers = [http.get("/"), sign_in(http, unused)]
    guarded.store.restart()
    for answer in answers:
        assert answer.status_code == 503
        assert "use its store: its log says why" in answer.text
    wait_until(lambda: http.get("/").status_code == 200, "the session to go on")


def test_every_answer_keeps_browsers_to_this_site(guarded: GuardedDashboard, http: httpx.Client) -> None:
    answers = [http.get("/sign-in"), http.get("/")]
    sign_in(http, guarded.reader)
    answers += [http.get("/"), http.get("/nowhere"), http.get("/favicon.ico")]
    assert [answer.status_code for answer in answers] == [200, 303, 200, 404, 200]
    for answer in answers:
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] in ("'none'", "'self'")
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert not re.search(r"http|\*", answer.headers["content-security-policy"])
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_an_open_dashboard_answers_to_the_machine_s_own_names_alone(
    dashboard: OpenDashboard, start_server: Callable[..., ServerProcess]
) -> None:
    """A page of another site gets in under no name that its owner has made to point here; addresses are nobody's."""
    to_all = dashboard_url(start_server("--insecure", "--http", "0.0.0.0:0")).replace("0.0.0.0", "127.0.0.1")
    own = ["localhost", "127.0.0.1", "[::1]", "10.1.2.3"]
    others = ["elsewhere.example", "localhost.elsewhere.example", "127.0.0.1.elsewhere.example", "", "[::1", "a/b"]
    for url, names in ((dashboard.url, own), (to_all, [*own, socket.gethostname().upper()])):
        port = url.rpartition(":")[2]
        for name in [*names, *others]:
            answer = httpx.get(url, headers={"host": f"{name}:{port}"})
            assert answer.status_code == (200 if name in names else 400), name
        assert "localhost" in answer.text
    assert httpx.get(f"{dashboard.url}/sign-in").headers["location"] == "/"


def refusal_to_start(data_dir: Path, address: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "evosample_server", "--listen", "127.0.0.1:0", "--data-dir", str(data_dir)]
    ended = subprocess.run([*command, "--http", address], capture_output=True, text=True, timeout=60, check=False)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("address", ["0.0.0.0:0", "example.com:80", "unix:/dashboard", "8080"])
def test_an_address_that_others_reach_is_refused(tmp_path: Path, address: str) -> None:
    code, message = refusal_to_start(tmp_path, address)
    assert code == 2
    assert re.match(r"evosample-server: --http.*(expected|others can reach this server)", message)


def test_a_taken_port_is_an_error_that_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, message = refusal_to_start(tmp_path, address)
    assert code == 1
    assert f"can't serve the dashboard on {address}: Address already in use" in message
