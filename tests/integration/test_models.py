"""Several models: the default is loaded at the start, the others on the first request."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from httpx import Response

from service.artefact.manifest import MANIFEST_NAME
from service.inference.engines import Engines
from service.settings import Settings
from tests.artefacts import build_artefact, encode, two_class_photo
from tests.clients import InProcess, in_process

pytestmark = pytest.mark.anyio

PHOTO = encode(two_class_photo())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three artefacts, one with an unreadable manifest, and an unrelated folder."""
    for name in ("first", "second", "third", "broken"):
        build_artefact(tmp_path / name, name=name)
    (tmp_path / "broken" / MANIFEST_NAME).write_text("{")
    (tmp_path / "notes").mkdir()
    return tmp_path


@pytest.fixture
async def client(folder: Path, make_settings: Callable[..., Settings]) -> AsyncIterator[InProcess]:
    """The app on `first`."""
    async with in_process(make_settings(model=folder / "first")) as running:
        yield running


async def post(client: InProcess, **options: str) -> Response:
    """The photo, with parameters."""
    return await client.http.post("/segment", content=PHOTO, params=options)


async def listed(client: InProcess) -> dict[str, tuple[bool, bool]]:
    """`GET /models`: whether each is the default, and loaded."""
    models = (await client.http.get("/models")).json()["models"]
    return {one["name"]: (one["default"], one["loaded"]) for one in models}


async def test_a_model_is_loaded_when_it_is_asked_for(client: InProcess) -> None:
    """The list starts with the default; a response names the model that computed it."""
    assert list((await listed(client)).items()) == [
        ("first", (True, True)),
        ("second", (False, False)),
        ("third", (False, False)),
    ]
    assert (await post(client)).headers["X-Model"] == "first/1"
    answers = await asyncio.gather(*(post(client, model="second") for _ in range(4)))
    assert {answer.headers["X-Model"] for answer in answers} == {"second/1"}
    assert (await listed(client))["second"] == (False, True)
    assert (await post(client, model="first")).headers["X-Model"] == "first/1"


async def test_a_name_that_is_not_served_is_404(client: InProcess) -> None:
    """The message lists the served names."""
    answer = await post(client, model="../first")
    assert answer.status_code == 404
    assert answer.json()["type"] == "/problems/unknown-model"
    assert "first, second, third" in answer.json()["detail"]


async def test_an_artefact_that_was_spoilt_meanwhile_is_503(
    client: InProcess, folder: Path
) -> None:
    """The others are served, and so is this one after the repair."""
    path = folder / "second" / "network.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    answer = await post(client, model="second")
    assert answer.status_code == 503
    assert answer.json()["type"] == "/problems/model-unavailable"
    assert "Retry-After" in answer.headers
    assert (await post(client)).status_code == 200
    path.write_bytes(whole)
    assert (await post(client, model="second")).status_code == 200


async def test_past_the_budget_the_least_recently_used_is_closed(
    client: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never the default; the next request loads a closed model again."""
    # Each model uses the whole budget.
    budget = client.service.engines.budget_bytes
    used = iter(range(0, 100 * budget, budget))
    monkeypatch.setattr(Engines, "_memory", lambda _: next(used))
    await post(client, model="second")
    await post(client, model="third")
    assert await listed(client) == {
        "first": (True, True),
        "second": (False, False),
        "third": (False, True),
    }
    assert (await post(client, model="second")).headers["X-Model"] == "second/1"


async def test_what_is_in_use_stays(client: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in use is kept, even over the budget."""
    engines = client.service.engines
    used = iter(range(0, 100 * engines.budget_bytes, engines.budget_bytes))
    monkeypatch.setattr(Engines, "_memory", lambda _: next(used))
    async with engines.use("second"):
        await post(client, model="third")
        assert (await listed(client))["second"] == (False, True)
    await post(client, model="third")


async def test_without_memory_for_others_the_default_is_alone(
    folder: Path, make_settings: Callable[..., Settings]
) -> None:
    """A budget of 0 disables the other models."""
    settings = make_settings(model=folder / "first", models_memory_mb=0)
    async with in_process(settings) as running:
        assert list(await listed(running)) == ["first"]
        assert (await post(running, model="second")).status_code == 404
