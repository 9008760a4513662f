"""API keys, rate limits, CORS and security headers: over ASGI, and with a server process."""

import base64
import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import __version__
from service.access import new_key
from service.app import create_app
from service.client import Client, RequestRefused
from service.settings import Settings
from tests.artefacts import encode, two_class_photo
from tests.clients import (
    InProcess,
    Server,
    assert_problem,
    command_line,
    environment,
    fails,
    in_process,
    serving,
)

PHOTO = encode(two_class_photo())

OPEN = {
    "/healthz",
    "/readyz",
    "/metrics",
    "/v2/health/live",
    "/v2/health/ready",
    "/label-studio/health",
}
"""Documented paths that need no key."""

PAGES = ("/", "/docs", "/openapi.json", "/static/style.css")

PROTOCOLS = ("/v2", "/hf", "/label-studio")

SCHEMES = {"HTTPBearer", "APIKeyHeader", "HTTPBasic"}


@dataclass(frozen=True)
class Keys:
    """A file of keys with alice's in it."""

    file: Path
    alice: str


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """A file that does not change."""
    file = tmp_path_factory.mktemp("keys") / "api_keys"
    key, line = new_key("alice")
    file.write_text(line + "\n")
    return Keys(file, key)


@pytest.fixture
async def client(make_settings: Callable[..., Settings], keys: Keys) -> AsyncIterator[InProcess]:
    """The app with keys."""
    async with in_process(make_settings(api_keys_file=keys.file)) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    """The usual header."""
    return {"Authorization": f"Bearer {key}"}


def basic(key: str) -> dict[str, str]:
    """The header that Label Studio sends."""
    return {"Authorization": f"Basic {base64.b64encode(f'any:{key}'.encode()).decode()}"}


# ---- keys ----------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_every_operation_but_those_listed_needs_a_key(
    client: InProcess, make_settings: Callable[..., Settings]
) -> None:
    """A new operation is protected unless it is listed here."""
    paths = create_app(make_settings()).openapi()["paths"]
    assert set(paths) > OPEN
    for path, methods in paths.items():
        for method in methods:
            response = await client.http.request(method, path.format(name="tiny", version="1"))
            assert (response.status_code == 401) == (path not in OPEN), (method, path)


@pytest.mark.anyio
async def test_pages_need_no_key(client: InProcess) -> None:
    """The pages ask for the key themselves."""
    for path in PAGES:
        assert (await client.http.get(path)).status_code == 200


@pytest.mark.anyio
async def test_without_a_key(client: InProcess) -> None:
    """401 names the missing key; other protocols get it in their own format."""
    response = await client.http.post("/segment", content=PHOTO)
    assert assert_problem(response, 401, "unauthorized")["detail"] == "send an API key"
    assert response.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/v2", "/hf/image-segmentation", "/label-studio/predict"):
        method = "GET" if path == "/v2" else "POST"
        response = await client.http.request(method, path)
        assert (response.status_code, response.json()) == (401, {"error": "send an API key"})


@pytest.mark.anyio
async def test_a_key_is_sent_in_one_of_three_ways(client: InProcess, keys: Keys) -> None:
    """Each way works for every endpoint."""
    for headers in (bearer(keys.alice), {"X-API-Key": keys.alice}, basic(keys.alice)):
        response = await client.http.post("/segment", content=PHOTO, headers=headers)
        assert response.status_code == 200
        assert (await client.http.get("/v2/models/tiny", headers=headers)).status_code == 200


@pytest.mark.anyio
async def test_a_proxys_own_authorization_beside_the_key(client: InProcess, keys: Keys) -> None:
    """X-API-Key takes precedence over Authorization."""
    for other in (bearer("a proxy's"), basic("a proxy's")):
        response = await client.http.get("/model", headers={**other, "X-API-Key": keys.alice})
        assert response.status_code == 200


@pytest.mark.anyio
async def test_a_wrong_key(client: InProcess, keys: Keys) -> None:
    """Any other text is refused: a hash too, and a key in the URL."""
    digest = keys.file.read_text().split(":")[1].strip()
    for headers in (
        bearer("fcn_wrong"),
        bearer(keys.alice[:-1]),
        bearer(keys.alice.upper()),
        bearer(digest),
        {"X-API-Key": "fcn_wrong"},
        basic("fcn_wrong"),
    ):
        response = await client.http.post("/segment", content=PHOTO, headers=headers)
        assert "not known" in assert_problem(response, 401, "unauthorized")["detail"]
    for value in (b"Bearer", keys.alice.encode(), f"Bearer {keys.alice}".encode() + b"\xe9"):
        authorization = {b"Authorization": value}
        response = await client.http.post("/segment", content=PHOTO, headers=authorization)
        assert_problem(response, 401, "unauthorized")
    broken = await client.http.get("/model", headers={"Authorization": "Basic !"})
    assert_problem(broken, 401, "unauthorized")
    for name in ("api_key", "key", "X-API-Key", "access_token"):
        response = await client.http.get("/model", params={name: keys.alice})
        assert_problem(response, 401, "unauthorized")


@pytest.mark.anyio
async def test_the_body_of_a_stranger_is_not_read(client: InProcess) -> None:
    """Nor are its parameters validated."""
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1
            assert read < 10
            yield bytes(10_000)

    response = await client.http.post("/segment?view=nonsense", content=endless())
    assert_problem(response, 401, "unauthorized")


@pytest.mark.anyio
async def test_without_a_file_no_key_is_asked_for(make_settings: Callable[..., Settings]) -> None:
    """Every request is admitted."""
    async with in_process(make_settings()) as running:
        response = await running.http.post("/segment", content=PHOTO, headers=bearer("any"))
        assert response.status_code == 200


@pytest.mark.anyio
async def test_refusals_are_counted(client: InProcess) -> None:
    """By reason, and by route."""
    await client.http.get("/model", headers=bearer("fcn_wrong"))
    text = (await client.http.get("/metrics")).text
    assert 'fcn_refusals_total{reason="unauthorized"} 1.0' in text
    assert 'fcn_requests_total{method="GET",route="/model",status="401"} 1.0' in text


@pytest.mark.parametrize("configured", [{}, {"rate_limit": "1/day"}, {"keys": True}])
def test_the_description_says_what_can_occur(
    make_settings: Callable[..., Settings], keys: Keys, configured: dict[str, Any]
) -> None:
    """401 and 429 where they can occur; how a key is sent, if keys are configured."""
    asks = "keys" in configured
    settings = make_settings(api_keys_file=keys.file) if asks else make_settings(**configured)
    description = create_app(settings).openapi()
    assert set(description["components"].get("securitySchemes", {})) == (SCHEMES if asks else set())
    for path, methods in description["paths"].items():
        for operation in methods.values():
            guarded = path not in OPEN
            assert ("401" in operation["responses"]) == (guarded and asks)
            assert ("429" in operation["responses"]) == (guarded and "rate_limit" in configured)
            schemes = [scheme for one in operation.get("security", ()) for scheme in one]
            assert set(schemes) == (SCHEMES if guarded and asks else set())
            for status in {"401", "429"} & set(operation["responses"]):
                (media_type,) = operation["responses"][status]["content"]
                own = path.startswith(PROTOCOLS)
                assert media_type == ("application/json" if own else "application/problem+json")


# ---- rates ---------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_rate_limit(make_settings: Callable[..., Settings]) -> None:
    """Further requests get 429 with the exact Retry-After; probes are not counted."""
    async with in_process(make_settings(rate_limit="2/hour")) as running:
        for path in ("/model", "/classes"):
            assert (await running.http.get(path)).status_code == 200
        response = await running.http.post("/segment", content=PHOTO)
        problem = assert_problem(response, 429, "rate-limited")
        assert problem["detail"] == "more than 2 per 1 hour"
        assert 3590 <= int(response.headers["Retry-After"]) <= 3600
        assert (await running.http.get("/v2")).json() == {"error": "more than 2 per 1 hour"}
        for path in (*OPEN, *PAGES):
            assert (await running.http.get(path)).status_code == 200
        text = (await running.http.get("/metrics")).text
        assert 'fcn_refusals_total{reason="rate-limited"} 2.0' in text


@pytest.mark.anyio
async def test_each_key_has_its_own_rate(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """Keys are counted by name; wrong keys by address, and soon not even checked."""
    (alice, alices), (again, alices_too), (bob, bobs) = map(new_key, ("alice", "alice", "bob"))
    file = tmp_path / "api_keys"
    file.write_text("\n".join((alices, alices_too, bobs)))
    settings = make_settings(api_keys_file=file, rate_limit="2/hour")
    async with in_process(settings) as running:

        async def ask(key: str) -> int:
            return (await running.http.get("/model", headers=bearer(key))).status_code

        assert [await ask(key) for key in (alice, again, alice, again)] == [200, 200, 429, 429]
        assert [await ask(f"fcn_{guess}") for guess in range(4)] == [401, 401, 429, 429]
        assert [await ask(bob) for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize(("trusted", "believed"), [("127.0.0.1", True), ("192.0.2.0/24", False)])
def test_the_address_behind_a_proxy(tiny_artefact: Path, trusted: str, believed: bool) -> None:
    """A trusted proxy's X-Forwarded-For counts; what clients put into it does not."""

    def ask(forwarded: str) -> int:
        headers = {"X-Forwarded-For": forwarded}
        return httpx.get(url, headers=headers).status_code

    with serving(tiny_artefact, rate_limit="1/hour", trusted_proxies=trusted) as running:
        url = f"{running.url}/classes"
        assert ask("203.0.113.1") == 200
        assert ask("203.0.113.1") == 429
        assert ask("203.0.113.2") == (200 if believed else 429)
        assert ask("203.0.113.3, 203.0.113.2") == 429


# ---- browsers ------------------------------------------------------------------------------------

ORIGIN = "https://one.example"


@pytest.mark.anyio
async def test_other_origins_are_not_let_in_unless_said(client: InProcess) -> None:
    """No response has a CORS header."""
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    for response in (
        await client.http.get("/healthz", headers={"Origin": ORIGIN}),
        await client.http.options("/segment", headers=preflight),
    ):
        assert not [name for name in response.headers if name.startswith("access-control-")]


@pytest.mark.anyio
async def test_origins_that_are_let_in(make_settings: Callable[..., Settings], keys: Keys) -> None:
    """Only the configured origins, with or without a key; every header is exposed."""
    settings = make_settings(api_keys_file=keys.file, cors_origins=f"{ORIGIN},https://two.example")
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    async with in_process(settings) as running:
        for origin, allowed in ((ORIGIN, ORIGIN), ("https://three.example", None)):
            asked = await running.http.options("/segment", headers={"Origin": origin, **preflight})
            assert asked.headers.get("Access-Control-Allow-Origin") == allowed
            assert asked.status_code == (200 if allowed else 400)
        assert "authorization" in asked.headers["Access-Control-Allow-Headers"]
        headers = {"Origin": ORIGIN, **bearer(keys.alice)}
        sent = await running.http.post("/segment", content=PHOTO, headers=headers)
        assert sent.status_code == 200
        assert sent.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert sent.headers["Access-Control-Expose-Headers"] == "*"
        assert sent.headers["Vary"] == "Accept, Origin"
        refused = await running.http.get("/model", headers={"Origin": ORIGIN})
        assert refused.status_code == 401
        assert refused.headers["Access-Control-Allow-Origin"] == ORIGIN


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://service"},
        {"Origin": "https://SERVICE:8443"},
        {"Origin": ORIGIN, "X-Forwarded-Host": "one.example"},
        {"Origin": ORIGIN, "X-Forwarded-Host": "one.example:443, two.example"},
        {"Origin": ORIGIN, "Sec-Fetch-Site": "same-origin"},
        {"Origin": "null", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ],
)
@pytest.mark.anyio
async def test_the_services_own_pages_may_send(client: InProcess, headers: dict[str, str]) -> None:
    """Also behind a proxy that changes scheme, port or name; and what is no browser."""
    response = await client.http.post("/segment", headers=headers)
    assert_problem(response, 401, "unauthorized")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": ORIGIN},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://service.one.example"},
        {"Origin": "http://[::1"},
        {"Origin": "http://service", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://service", "Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "null", "X-Forwarded-Host": "null"},
        {"Origin": "null", "Host": ""},
    ],
)
@pytest.mark.anyio
async def test_other_sites_pages_may_not_send(client: InProcess, headers: dict[str, str]) -> None:
    """403 before key, parameters and body; reading without effects is not affected."""
    for path in ("/segment?view=nonsense", "/segment/batch"):
        response = await client.http.post(path, headers=headers)
        assert_problem(response, 403, "cross-site")
    for path in ("/v2/models/tiny/infer", "/hf/image-segmentation", "/label-studio/predict"):
        response = await client.http.post(path, headers=headers)
        assert response.status_code == 403
        assert set(response.json()) == {"error"}
    assert (await client.http.get("/healthz", headers=headers)).status_code == 200


@pytest.mark.parametrize("origins", [ORIGIN, "*"])
@pytest.mark.anyio
async def test_origins_of_cors_may_send(
    make_settings: Callable[..., Settings], origins: str
) -> None:
    """Whatever the browser says about their site; others may not."""
    async with in_process(make_settings(cors_origins=origins)) as running:
        for origin, status in ((ORIGIN, 200), ("null", 200 if origins == "*" else 403)):
            headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
            response = await running.http.post("/segment", content=PHOTO, headers=headers)
            assert response.status_code == status


@pytest.mark.anyio
async def test_every_answer_has_its_security_headers(
    make_settings: Callable[..., Settings], keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every response has them; pages have their own policy, which forbids framing too."""
    settings = make_settings(api_keys_file=keys.file, cors_origins=ORIGIN)
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    async with in_process(settings) as running:

        async def ask(method: str, path: str, **options: Any) -> httpx.Response:  # noqa: ANN401
            headers = {**bearer(keys.alice), **options.pop("headers", {})}
            return await running.http.request(method, path, headers=headers, **options)

        answers = [
            await ask("POST", "/segment", content=PHOTO),
            await ask("POST", "/segment", content=b"no picture"),
            await ask("GET", "/segment"),
            await ask("GET", "/nowhere"),
            await ask("OPTIONS", "/segment", headers=preflight),
            await ask("GET", "/model", headers=bearer("fcn_wrong")),
            await ask("GET", "/metrics"),
            *[await ask("GET", path) for path in PAGES],
            await ask("GET", "/static/nowhere"),
        ]
        monkeypatch.delattr(running.service, "engines")
        answers.append(await ask("GET", "/model"))
    statuses = [200, 415, 405, 404, 200, 401, 200, 200, 200, 200, 200, 404, 500]
    assert [one.status_code for one in answers] == statuses
    for one in answers:
        assert one.headers["X-Content-Type-Options"] == "nosniff"
        assert one.headers["Referrer-Policy"] == "no-referrer"
        assert one.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        policy = one.headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in policy
        page = one.url.path in ("/", "/docs", "/static/style.css")
        assert policy.startswith("default-src 'self'" if page else "default-src 'none'")
        assert one.headers["Cache-Control"] == ("no-cache" if page else "no-store")


# ---- a server process ----------------------------------------------------------------------------


@contextlib.contextmanager
def reading(server: Server) -> Iterator[list[str]]:
    """The lines of its log so far; all of them once the server has exited."""
    lines: list[str] = []
    assert server.process.stderr is not None
    reader = threading.Thread(target=lines.extend, args=(server.process.stderr,))
    reader.start()
    yield lines
    server.process.terminate()
    reader.join()


def until(is_so: Callable[[], bool]) -> None:
    """Repeat for at most a minute; a server checks the file once a second."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline


def replace(file: Path, *lines: str) -> None:
    """Replace a file atomically with these lines."""
    fresh = file.with_name("fresh")
    fresh.write_text("\n".join(lines))
    fresh.replace(file)


@pytest.fixture(scope="module")
def server(tiny_artefact: Path, keys: Keys) -> Iterator[Server]:
    """A server with API keys."""
    with serving(tiny_artefact, api_keys_file=keys.file) as running, reading(running):
        yield running


def test_keys_are_replaced_while_it_runs(tiny_artefact: Path, tmp_path: Path) -> None:
    """Both of two workers accept a new key and refuse a removed one."""
    file = tmp_path / "api_keys"
    (old, its_line), (new, new_line) = new_key("alice"), new_key("alice")
    file.write_text(its_line)
    with serving(tiny_artefact, api_keys_file=file, processes=2) as server, reading(server):

        def statuses(key: str) -> set[int]:
            """The statuses on enough new connections to reach both workers."""
            return {
                httpx.get(f"{server.url}/classes", headers=bearer(key)).status_code
                for _ in range(20)
            }

        assert (statuses(old), statuses(new)) == ({200}, {401})
        replace(file, its_line, new_line)
        until(lambda: (statuses(old), statuses(new)) == ({200}, {200}))
        replace(file, new_line)
        until(lambda: (statuses(old), statuses(new)) == ({401}, {200}))


def test_no_log_line_shows_a_key(tiny_artefact: Path, tmp_path: Path) -> None:
    """No valid or wrong key is logged, even at debug level; a key's name is."""
    (alice, line), (wrong, _), (pasted, _) = map(new_key, ("alice", "nobody", "bob"))
    file = tmp_path / "api_keys"
    file.write_text(line)
    with (
        serving(tiny_artefact, api_keys_file=file, log_level="debug") as server,
        reading(server) as log,
        httpx.Client(base_url=server.url) as http,
    ):
        for key in (alice, wrong):
            for headers in (bearer(key), {"X-API-Key": key}, basic(key)):
                http.post("/segment", content=PHOTO, headers=headers)
                http.post("/segment", content=b"no picture", headers=headers)
                http.post("/segment", files={"photo": PHOTO}, headers=headers)
                http.get("/v2/models/nowhere", headers=headers)
            http.get("/model", params={"api_key": key})
            malformed(server, f"X-API-Key: {key}")
        replace(file, line, f"bob:{pasted}")
        until(
            lambda: http.get("/model", headers=bearer(alice)).is_error or "line 2" in "".join(log)
        )
    text = "".join(log)
    assert '"key": "alice"' in text
    assert "line 2: should be name:sha256-hex" in text
    digest = line.partition(":")[2]
    forms = (
        alice,
        wrong,
        pasted,
        digest,
        *(basic(key)["Authorization"][6:] for key in (alice, wrong)),
    )
    assert [form for form in forms if form in text] == []


def malformed(server: Server, *headers: str) -> bytes:
    """The response to malformed HTTP."""
    with socket.create_connection(server.address, 30) as connection:
        connection.sendall("\r\n".join(["GET / HTTP/1.1", *headers, "no header", "", ""]).encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_no_answer_tells_what_software_it_is(server: Server, keys: Keys) -> None:
    """Headers, errors and description contain no server name and no version."""
    paths = ("/", "/healthz", "/nowhere", "/openapi.json", "/docs")
    answers = [httpx.get(f"{server.url}{path}") for path in paths]
    answers.append(httpx.post(f"{server.url}/segment", headers=bearer(keys.alice)))
    for one in answers:
        assert not {"Server", "X-Powered-By", "Via"} & set(one.headers.keys())
    told = [f"{one.headers} {one.text}".lower() for one in answers]
    broken = malformed(server).decode().lower()
    assert broken.startswith("http/1.1 400")
    names = ("uvicorn", "starlette", "fastapi", "python", "onnxruntime", __version__)
    for text in (*told, broken):
        assert [name for name in names if name in text.replace("openapi", "")] == []


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_file_of_keys_is_one_line(
    tiny_artefact: Path, tmp_path: Path, processes: int
) -> None:
    """Regardless of the number of workers."""
    file = tmp_path / "api_keys"
    file.write_text("alice\n")
    status, stderr = fails(
        *("serve", "--port", "0"),
        model=tiny_artefact,
        api_keys_file=file,
        processes=processes,
        log_level="error",
    )
    expected = f"fcn-segment: API keys: {file}, line 1: should be name:sha256-hex\n"
    assert (status, stderr) == (2, expected)


def test_the_client_sends_its_key(
    server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An explicit key takes precedence over the environment's."""
    with Client(server.url, api_key=keys.alice) as client:
        assert client.mask(PHOTO).shape == (64, 96)
    with Client(server.url) as client, pytest.raises(RequestRefused) as caught:
        client.classes()
    assert caught.value.problem.status == 401
    monkeypatch.setenv("FCN_API_KEY", keys.alice)
    with Client(server.url) as client:
        assert client.models().models[0].name == "tiny"
    with Client(server.url, api_key="fcn_wrong") as client, pytest.raises(RequestRefused):
        client.classes()


def test_the_command_line_sends_the_environments_key(
    server: Server, keys: Keys, tmp_path: Path
) -> None:
    """To the service at --url; without a key the error is one line."""
    (tmp_path / "photo.png").write_bytes(PHOTO)
    command = command_line(
        "predict", tmp_path / "photo.png", "--out", tmp_path, "--url", server.url
    )
    command += ["--format", "json"]
    for variables, status in (({}, 1), ({"api_key": keys.alice}, 0)):
        done = subprocess.run(
            command,
            env=environment(**variables),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, done.stderr
        assert ("fcn-segment: send an API key" in done.stderr) == (not variables)
    assert (tmp_path / "photo.json").is_file()
