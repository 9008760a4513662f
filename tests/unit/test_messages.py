"""JSON and base64 of other services' protocols, as image workers read them."""

import base64
import pickle
import typing
from collections.abc import Iterator

import numpy as np
import pytest
from pydantic import FailFast

from service.artefact import voc
from service.artefact.labels import VOC_LABELS, LabelSet
from service.errors import BodyTooLarge, InvalidParameter, MalformedRequest, SegmentError
from service.jobs.label_config import MAX_LABELS, class_ids, parse_label_config
from service.jobs.label_studio import ReadSetup, ReadTasks
from service.jobs.messages import (
    MAX_JSON_MEMORY,
    Message,
    decode_base64,
    decode_data_uri,
    decode_image_text,
    json_memory,
    write_numbers,
)
from service.routes.protocols import open_inference  # noqa: F401 - defines a message
from service.workers.pool import Limits, WorkerPool


def messages(base: type[Message] = Message) -> Iterator[type[Message]]:
    """All requests."""
    for message in base.__subclasses__():
        yield message
        yield from messages(message)


def test_lists_stop_at_their_first_error() -> None:
    """A list whose items can be wrong fails fast: an error for each would take megabytes."""
    lists = 0
    for message in messages():
        for name, field in message.model_fields.items():
            for kind in (field.annotation, *typing.get_args(field.annotation)):
                if typing.get_origin(kind) is list and typing.get_args(kind) != (typing.Any,):
                    assert any(isinstance(one, FailFast) for one in field.metadata), (message, name)
                    lists += 1
    assert lists == 4


@pytest.mark.parametrize("unit", [b"[],", b"0,", b'{"":{}},', b"[[]],", b'"a",'])
def test_json_of_too_many_values(unit: bytes) -> None:
    """Lists, objects and values count, wherever they are; half of what is refused is not."""
    body = unit * (MAX_JSON_MEMORY // json_memory(unit) + 1)
    with pytest.raises(BodyTooLarge, match="too many values"):
        json_memory(body)
    assert json_memory(body[: len(body) // 2]) <= MAX_JSON_MEMORY


HOSTILE = {
    "lists": b"[" + b"[1]," * 500_000 + b"0]",
    "nested lists": b"[" + (b"[" * 100 + b"]" * 100 + b",") * 5_000 + b"0]",
    "nested objects": b"[" + (b'{"":' * 100 + b"1" + b"}" * 100 + b",") * 4_000 + b"0]",
    "objects": b"[" + b'{"a":1},' * 300_000 + b"0]",
    "texts": b"[" + b'"ab",' * 1_000_000 + b"0]",
    "one object": b"{" + b",".join(b'"%d":1' % n for n in range(1_000_000)) + b"}",
    "wide characters": b'"' + b"a" * 10_000_000 + b'\\ud83d\\ude00"',
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", HOSTILE)
async def test_reading_stays_within_its_memory(name: str) -> None:
    """An image worker whose memory is what `json_memory` says reads it and is not lost.

    The values are read as a task's data, which keeps them all.
    """
    body = b'{"label_config": "", "tasks": [{"data": {"a": %s}}]}' % HOSTILE[name]
    needs = json_memory(body)
    lost: list[str] = []
    async with WorkerPool.open(1, lost.append) as pool:
        first = await pool.run(ReadTasks(VOC_LABELS, 2**20), [body], Limits(30, 60, 2**20))
        assert first.facts["needs"] == needs
        with pytest.raises(InvalidParameter, match="label_config"):
            await pool.run(ReadTasks(VOC_LABELS, needs), [body], Limits(30, 60, needs))
    assert lost == []


def test_images_as_text() -> None:
    """Base64 and data: URIs, in base64 or with escapes, give the same bytes."""
    data = bytes(range(256))
    text = base64.b64encode(data)
    assert decode_image_text(text, 256) == data
    assert decode_image_text(b"data:image/png;base64," + text, 256) == data
    assert decode_image_text(b"data:," + b"".join(b"%%%02x" % byte for byte in data), 256) == data
    assert decode_image_text(b"data:,abc", 256) == b"abc"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b"!", MalformedRequest),
        (b"YQ", MalformedRequest),
        (b"YWJj\n", MalformedRequest),
        (b"YQ==YQ==", MalformedRequest),
        (b"=" * 1000, MalformedRequest),
        ("\U0001f600".encode(), MalformedRequest),
        (b"data:", MalformedRequest),
        (b"data:image/png;base64", MalformedRequest),
        (b"data:;base64,?", MalformedRequest),
        (base64.b64encode(bytes(101)), BodyTooLarge),
        (b"data:;base64," + base64.b64encode(bytes(101)), BodyTooLarge),
        (b"data:," + b"a" * 101, BodyTooLarge),
        (b"data:," + b"%41" * 2**17, BodyTooLarge),
        (b"data:," + b"%" * 2**17, BodyTooLarge),
    ],
)
def test_texts_that_are_no_image(text: bytes, error: type[SegmentError]) -> None:
    """They are malformed or too long."""
    with pytest.raises(error):
        decode_image_text(text, 100)


def test_the_limit_is_that_of_the_file() -> None:
    """A file of exactly the limit is accepted in each form."""
    text = base64.b64encode(bytes(100))
    assert decode_base64(text, 100) == bytes(100)
    assert decode_data_uri(b"data:;base64," + text, 100) == bytes(100)


@pytest.mark.parametrize("size", [1, 256, 2**18, 2**18 + 1])
def test_numbers_as_text(size: int) -> None:
    """They are separated by commas, in order, whatever the stripe."""
    values = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    text = bytearray(b"x")
    write_numbers(text, values)
    assert text == b"x" + ",".join(map(str, values.tolist())).encode()


# ---- labelling configurations ------------------------------------------------------------------


def config(labels: str) -> str:
    """A configuration with these labels."""
    return (
        '<View><Image name="i" value="$picture"/><BrushLabels name="b" toName="i">'
        f"{labels}</BrushLabels></View>"
    )


def test_a_label_stands_for_its_names() -> None:
    """Case and punctuation do not matter; a label may name several classes, and unknown ones."""
    names = ["Potted-Plant", "pottedplant", "CAT", "tv monitor", "unicorn"]
    classes = ["background", "pottedplant", "cat", "tvmonitor"]
    found = class_ids(names, VOC_LABELS)
    assert found == {voc.CLASSES.index(name) for name in classes[1:]}
    assert class_ids([], VOC_LABELS) == class_ids(["", "-", "unicorn"], VOC_LABELS) == frozenset()


def test_classes_of_the_same_plain_name() -> None:
    """A label stands for all of them, and by its exact name too."""
    label_set = LabelSet(names=("bus", "bus stop", "bus-stop", "BUS"), colors=VOC_LABELS.colors[:4])
    assert class_ids(["Bus"], label_set) == {0, 3}
    assert class_ids(["bus stop"], label_set) == {1, 2}


def test_the_most_labels() -> None:
    """As many labels as allowed are read; one more is refused, over all controls."""
    label = '<Label value="{}" predicted_values="cat"/>'
    many = "".join(label.format(number) for number in range(MAX_LABELS))
    (control,) = parse_label_config(config(many), VOC_LABELS)
    assert len(control.labels) == MAX_LABELS
    with pytest.raises(InvalidParameter, match="at most 1000 labels"):
        parse_label_config(config(many + label.format("more")), VOC_LABELS)
    other = '</BrushLabels><BrushLabels name="c" toName="i">' + label.format("more")
    with pytest.raises(InvalidParameter, match="at most 1000 labels"):
        parse_label_config(config(many + other), VOC_LABELS)


@pytest.mark.parametrize(
    "xml",
    [
        "<a>" * 30_000 + "</a>" * 30_000,
        "<a " + " ".join(f"b{number}=''" for number in range(20_000)) + "/>",
        "<a>" + "<b/>" * 60_000 + "</a>",
        "<a>&#xD800;</a>",
        "<a>\0</a>",
        '<?xml version="1.0" encoding="utf-16"?><a/>',
        "<a b='" + "&lt;" * 60_000 + "'/>",
        '<a xmlns:x="' + "u" * 200_000 + '"><x:b x:c=""/></a>',
    ],
)
def test_hostile_xml(xml: str) -> None:
    """It is refused by its content, whatever its shape."""
    with pytest.raises(InvalidParameter, match="label_config"):
        parse_label_config(xml, VOC_LABELS)


def test_the_tasks_of_a_request() -> None:
    """The images' texts follow each other; a task without an image has no length."""
    body = (
        b'{"label_config": %s, "tasks": [{"data": {"picture": "data:,a"}}, {"data": {}},'
        b' {"data": {"picture": 7}}, {"data": {"picture": "/data/\\u00e9"}}]}'
    ) % _json(config('<Label value="Cat"/>'))
    answer = ReadTasks(VOC_LABELS, MAX_JSON_MEMORY).run([body])
    texts, controls = answer.parts
    assert answer.facts == {"keys": ["picture"], "images": [[7], [None], [None], [8]]}
    assert bytes(texts) == "data:,a/data/é".encode()
    (control,) = pickle.loads(bytes(controls))  # noqa: S301
    assert (control.from_name, control.data_key) == ("b", "picture")


def test_a_project_without_a_configuration() -> None:
    """It can be connected."""
    assert ReadSetup(VOC_LABELS, MAX_JSON_MEMORY).run([b'{"schema": null}']).facts == {}


def _json(text: str) -> bytes:
    return b'"' + text.replace('"', '\\"').encode() + b'"'
