"""The table of views: complete, negotiable, and strict about what each view needs."""

import io
import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from service.http.negotiation import negotiate
from service.inference.upsampling import Labels
from service.views import (
    COMMON_PARAMETERS,
    IMAGE_FORMATS,
    JSON,
    SUFFIXES,
    VIEWS,
    MediaType,
    Options,
    Scene,
    View,
    ViewName,
    offers,
)
from tests.artefacts import make_contract

MASK = np.array([[0, 8, 8], [15, 15, 0]], dtype=np.uint8)
SCENE = Scene(
    Labels(MASK, np.full(MASK.shape, 200, dtype=np.uint8)),
    make_contract(),
    photo=np.full((*MASK.shape, 3), 90, dtype=np.uint8),
)
WITHOUT_PHOTO = replace(SCENE, photo=None)
WITHOUT_CONFIDENCE = replace(SCENE, labels=Labels(MASK, None))

ENCODINGS = [(view, media_type) for view in VIEWS.values() for media_type in view.media_types]


def test_every_name_has_an_entry() -> None:
    """The table has exactly the names of `ViewName`, in their order, and "mask" is the default."""
    assert tuple(VIEWS) == get_args(ViewName)
    assert all(name == view.name for name, view in VIEWS.items())
    assert Options().view == "mask"


@pytest.mark.parametrize(("view", "media_type"), ENCODINGS)
def test_every_media_type_is_rendered(view: View, media_type: MediaType) -> None:
    """A complete scene is encoded as the media type says, at the photo's size."""
    content = view.render(SCENE, Options(view=view.name), media_type)
    if media_type == JSON:
        body = json.loads(content)
        assert (body["width"], body["height"]) == (3, 2)
    else:
        with Image.open(io.BytesIO(content)) as image:
            assert (image.format, image.size) == (IMAGE_FORMATS[media_type], (3, 2))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_without_its_needs_is_an_error(view: View) -> None:
    """A scene without the photo or the confidence that a view needs never gives a mask instead."""
    for scene, needed in (
        (WITHOUT_PHOTO, view.needs_photo),
        (WITHOUT_CONFIDENCE, view.needs_confidence),
    ):
        for media_type in view.media_types:
            if needed:
                with pytest.raises(RuntimeError, match="needs_"):
                    view.render(scene, Options(view=view.name), media_type)
            else:
                expected = view.render(SCENE, Options(view=view.name), media_type)
                assert view.render(scene, Options(view=view.name), media_type) == expected


def test_what_the_views_need() -> None:
    """Only views that show the photo keep it, and only those with confidences compute them."""
    assert {view.name for view in VIEWS.values() if view.needs_photo} == {"overlay", "cutout"}
    assert {view.name for view in VIEWS.values() if view.needs_confidence} == {"confidence", "json"}


@pytest.mark.parametrize("name", VIEWS)
def test_media_types_are_negotiated(name: ViewName) -> None:
    """Accept selects each of a view's media types; without it the view's first is used."""
    offered = offers(name)
    assert tuple(offered)[: len(VIEWS[name].media_types)] == VIEWS[name].media_types
    assert negotiate([], tuple(offered)) == VIEWS[name].media_types[0]
    for media_type in offered:
        assert negotiate([f"text/html, {media_type};q=0.1"], tuple(offered)) == media_type


@pytest.mark.parametrize("name", VIEWS)
def test_json_is_offered_for_every_view(name: ViewName) -> None:
    """JSON is rendered by the view "json", all other media types by the view itself."""
    offered = offers(name)
    assert offered.pop(JSON) is VIEWS["json"]
    assert set(offered) == set(VIEWS[name].media_types) - {JSON}
    assert all(view is VIEWS[name] for view in offered.values())


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_parameters_are_options(view: View) -> None:
    """Each listed parameter is a field of `Options`, once."""
    parameters = [*COMMON_PARAMETERS, *view.parameters]
    assert set(parameters) <= Options.model_fields.keys() - {"view"}
    assert len(set(parameters)) == len(parameters)


def test_every_option_is_read() -> None:
    """Each field of `Options` is read by all views or listed by at least one."""
    listed = {name for view in VIEWS.values() for name in view.parameters}
    assert listed | {"view", *COMMON_PARAMETERS} == Options.model_fields.keys()


def test_the_description_of_view_is_the_tables() -> None:
    """OpenAPI describes each view with the table's words."""
    description = Options.model_fields["view"].description or ""
    for view in VIEWS.values():
        assert f"`{view.name}`: {view.description}" in description


def test_suffixes() -> None:
    """Files are named after the default media type."""
    assert {name: view.suffix for name, view in VIEWS.items()} == {
        "mask": ".png",
        "overlay": ".png",
        "cutout": ".png",
        "confidence": ".png",
        "json": ".json",
    }
    assert SUFFIXES.keys() == set(get_args(MediaType)) == {*IMAGE_FORMATS, JSON}
