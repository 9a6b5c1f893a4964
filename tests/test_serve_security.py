"""Who may use the server, and how much they may send."""

from __future__ import annotations

import base64
import http.client
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import FakePipeline, Server, fake, running

from mlxdiff.errors import UsageError
from mlxdiff.serve.guard import Policy

__all__ = ["fake"]

TOKEN = "a-long-secret"


@pytest.fixture
def server(tmp_path: Path, fake: type[FakePipeline]) -> Iterator[Server]:
    policy = Policy(
        names=frozenset({"mac.local"}),
        origins=frozenset({"https://app.example"}),
        upload_bytes=1_000_000,
        upload_seconds=1.0,
        pause_seconds=0.5,
    )
    with running(tmp_path, policy=policy) as one:
        yield one


@pytest.fixture
def locked(tmp_path: Path, fake: type[FakePipeline]) -> Iterator[Server]:
    with running(tmp_path, policy=Policy(token=TOKEN)) as one:
        yield one


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example",
                                  "10.0.0.1", "[::2]:80", ""])  # fmt: skip
def test_a_foreign_host_is_refused(server: Server, host: str) -> None:
    for path in ("/", "/api/jobs", "/v1/models", "/sdapi/v1/options"):
        status, answer, _ = server.ask("GET", path, headers={"Host": host})
        assert status == 421 and "--allow-host" in answer["error"]["message"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1", "LOCALHOST", "[::1]:7", "mac.local"])
def test_an_own_name_is_taken(server: Server, host: str) -> None:
    assert server.ask("GET", "/api/jobs", headers={"Host": host})[0] == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1",
                                    "https://app.example.evil", "http://app.example"])  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_foreign_page_is_refused(server: Server, origin: str, method: str) -> None:
    status, answer, headers = server.ask(
        method, "/api/jobs", {"prompt": "a"}, {"Origin": origin, "Content-Type": "text/plain"}
    )
    assert status == 403 and "--allow-origin" in answer["error"]["message"]
    assert "access-control-allow-origin" not in headers
    assert server.engine.jobs() == []


def test_the_own_page_and_a_named_origin_are_served(server: Server) -> None:
    assert server.ask("GET", "/api/jobs", headers={"Origin": server.url})[0] == 200
    origin = {"Origin": "https://app.example"}
    status, _, headers = server.ask("OPTIONS", "/api/jobs", headers=origin)
    assert status == 204 and headers["access-control-allow-origin"] == "https://app.example"
    status, _, headers = server.ask("GET", "/api/jobs", headers=origin)
    assert status == 200 and headers["access-control-allow-origin"] == "https://app.example"


def test_other_sites_cannot_embed_but_can_link(server: Server) -> None:
    site = {"Sec-Fetch-Site": "cross-site"}
    assert server.ask("GET", "/api/pictures", headers=site)[0] == 403
    assert server.ask("GET", "/", headers=site | {"Sec-Fetch-Mode": "navigate"})[0] == 200
    assert server.ask("GET", "/api/jobs", headers=site | {"Sec-Fetch-Mode": "navigate"})[0] == 403


def test_answers_carry_no_names_of_others(server: Server) -> None:
    headers = server.ask("GET", "/")[2]
    assert "server" not in headers and headers["x-frame-options"] == "DENY"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers


PATHS = ["/api/pictures/../../etc/passwd", "/api/pictures/..%2f..%2fetc%2fpasswd.png",
         "/api/pictures/%2e%2e%2fsecret.png", "/..%2fpyproject.toml", "/page.html",
         "/v1/models/..%2f..%2fetc"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_address_leads_to_a_file(server: Server, path: str) -> None:
    assert server.ask("GET", path)[0] == 404


def test_an_upload_that_says_it_is_huge_is_refused_at_once(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest("POST", "/api/jobs")
    connection.putheader("Content-Length", "1000000000")
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_an_upload_of_unsaid_size_is_counted(server: Server) -> None:
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        head = f"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
        client.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        block = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        try:
            for _ in range(16_000):  # a gigabyte
                client.sendall(block)
                sent += 0x10000
        except OSError:
            pass
        assert sent < 50_000_000
    assert server.ask("GET", "/api/jobs")[0] == 200


@pytest.mark.parametrize("pause", [0.1, 5.0])
def test_a_slow_upload_is_ended(server: Server, pause: float) -> None:
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        head = f"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
        client.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
        client.settimeout(pause)
        answer = b""
        while time.monotonic() - start < 8 and not answer:
            try:
                answer = client.recv(100)
            except TimeoutError:
                client.sendall(b" ")
        assert b" 408 " in answer
    assert time.monotonic() - start < 7


@pytest.mark.parametrize("before", [b"", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "])
def test_a_head_that_arrives_slowly_is_ended(
    tmp_path: Path, fake: type[FakePipeline], before: bytes
) -> None:
    """From a client that is silent, and from one that sends a byte now and then (slowloris)."""
    with running(tmp_path, policy=Policy(head_seconds=0.4)) as server:
        start = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.port), timeout=0.1) as client:
            client.sendall(before)
            answer: bytes | None = None
            while answer is None and time.monotonic() - start < 8:
                try:
                    answer = client.recv(100)
                except TimeoutError:
                    if before:
                        client.sendall(b"x")
                except ConnectionError:
                    answer = b""
            assert answer == b""
        assert 0.3 < time.monotonic() - start < 5
        # A connection that is kept alive may rest between its requests.
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        for _ in range(2):
            connection.request("GET", "/api/jobs")
            answered = connection.getresponse()
            assert answered.status == 200 and answered.read()
            time.sleep(0.6)
        connection.close()


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"user:{password}".encode()).decode()


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"},
                                     {"Authorization": "Bearer"}, {"Authorization": basic("no")},
                                     {"Authorization": "Basic !!"}, {"Cookie": "mlxdiff_token=x"},
                                     {"Authorization": "Bearer " + TOKEN[:-1]}])  # fmt: skip
def test_without_the_token_nothing_is_served(locked: Server, headers: dict[str, str]) -> None:
    for path in ("/", "/api/jobs", "/v1/models", "/sdapi/v1/options", "/?token=wrong"):
        status, answer, _ = locked.ask("GET", path, headers=headers)
        assert status == 401 and "token" in answer["error"]["message"]
        assert TOKEN not in str(answer)


@pytest.mark.parametrize("value", [f"Bearer {TOKEN}", f"bearer {TOKEN}", basic(TOKEN)])
def test_the_token_opens(locked: Server, value: str) -> None:
    assert locked.ask("GET", "/api/jobs", headers={"Authorization": value})[0] == 200


def test_a_page_opened_with_the_token_remembers_it(locked: Server) -> None:
    status, _, headers = locked.ask("GET", f"/?token={TOKEN}")
    assert status == 303 and headers["location"] == "/"
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
    found = {"Cookie": cookie.partition(";")[0]}
    assert locked.ask("GET", "/", headers=found)[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.2", "mac.local"])
def test_an_address_that_others_reach_needs_a_token(host: str) -> None:
    with pytest.raises(UsageError, match="--token"):
        Policy(host=host)
    assert Policy(host=host, token=TOKEN).knows(f"{host}:80" if ":" not in host else "[::]:80")


@pytest.mark.parametrize("given", [{"token": "short"}, {"origins": frozenset({"*"})},
                                   {"origins": frozenset({"https://a/b"})}])  # fmt: skip
def test_a_policy_that_cannot_be_meant_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--"):
        Policy(**given)


def test_nothing_of_a_request_is_printed(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    server.ask("POST", "/api/jobs", {"prompt": "very private"})
    server.ask("POST", "/api/jobs", {"prompt": "very private", "steps": 0})
    said = capfd.readouterr()
    assert said.out == said.err == ""
