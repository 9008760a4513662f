"""Hostile messages of the three protocols: valid requests with a few parts replaced.

A random part of a request, at any depth, becomes something that a parser, a validator or NumPy
could stumble over: long, deep, wide, of another type, repeated, or false about its own length.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tests.artefacts import encode, two_class_photo

PIXELS = two_class_photo()
PHOTO = encode(PIXELS)
BASE64 = base64.b64encode(PHOTO).decode()
DATA_URI = f"data:image/png;base64,{BASE64}"
LENGTH = "Inference-Header-Content-Length"

# Sizes are spread evenly over their magnitudes, up to this many bytes of JSON.
MOST_BYTES = 2_000_000


class Request(NamedTuple):
    """One request; ``name`` says what is hostile about it."""

    name: str
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class Raw(bytes):
    """A value that is written as it is, which may be no JSON."""


def requests(seed: int, count: int, model: str = "tiny") -> Iterator[Request]:
    """``count`` requests, the same for the same ``seed``; ``model``: its name in paths."""
    rng = random.Random(seed)  # noqa: S311
    for number in range(count):
        build = rng.choice(_BUILDERS)
        request = build(rng, model)
        yield request._replace(name=f"{number}: {request.name}")


def dump(value: object) -> bytes:
    """JSON of a value that may contain `Raw` ones, to any depth."""
    if isinstance(value, Raw):
        return bytes(value)
    if isinstance(value, dict):
        members = (json.dumps(key).encode() + b":" + dump(one) for key, one in value.items())
        return b"{" + b",".join(members) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(dump, value)) + b"]"
    return json.dumps(value).encode()


# ---- values ------------------------------------------------------------------------------------


def _size(rng: random.Random, unit_bytes: int = 1) -> int:
    """A number of units, from one to as many as fit."""
    return int((MOST_BYTES / unit_bytes) ** rng.random())


def _scalar(rng: random.Random) -> object:
    digits = rng.choice([1, 9, 10, 19, 20, 400, 4299, 4300, 4301, 20_000])
    return rng.choice(
        [
            None,
            True,
            False,
            "",
            -1,
            0,
            0.5,
            256,
            2**31,
            2**63,
            2**64,
            Raw(rng.choice([b"", b"-"]) + b"9" * digits),
            Raw(b"0." + b"9" * digits),
            Raw(b"1e" + b"9" * rng.choice([1, 3, 20_000])),
            Raw(b"-0"),
            Raw(b"01"),
            Raw(b"NaN"),
            Raw(b"-Infinity"),
            Raw(b'"\\ud800"'),
            Raw(b'"\\udc00\\ud800"'),
            Raw(b'"\xff\xfe"'),
            Raw(b'"\0"'),
            "\0\u2028\u202e",
            "\U0001f600" * rng.choice([1, 1000]),
        ]
    )


def _text(rng: random.Random) -> object:
    size = _size(rng, 8)
    return rng.choice(
        [
            "a" * size,
            "a" * size + "\U0001f600",
            Raw(b'"' + b"\\u00e9" * size + b'"'),
            Raw(b'"' + b"\\n" * size + b'"'),
            Raw(b'"' + b"a" * size),
            "=" * size,
            "A" * (size // 4 * 4),
            BASE64 + " " * size,
            BASE64[: rng.randrange(len(BASE64))],
            "\n".join(BASE64[at : at + 76] for at in range(0, len(BASE64), 76)),
            "data:," + "%41" * size,
            "data:," + "%" * size,
            "data:" + ";" * size,
            "data:image/png;base64," + "A" * size,
            "data:image/png;base64,," + BASE64,
            DATA_URI,
            "/data/" + "../" * size,
            "http://" + "a." * size,
            "file:///etc/passwd",
        ]
    )


def _many(rng: random.Random) -> object:
    unit = rng.choice(
        [b"0", b"[]", b"{}", b'""', b"null", b"-1", b"1.5", b"[[]]", b'{"a":{}}', b'"ab"',
         b"[1,2,3]", b'{"data":{}}', b'{"name":"image"}', b'{"name":"mask"}',
         b"12345678901234567890"]
    )  # fmt: skip
    size = _size(rng, len(unit) + 1)
    kind = rng.randrange(4)
    if kind == 0:  # the first differs: arrays of mixed types
        return Raw(
            b'["' + b"a" * rng.choice([1, 10_000]) + b'",' + unit + (b"," + unit) * size + b"]"
        )
    if kind == 1:
        return Raw(b"[" + unit + (b"," + unit) * size + b"]")
    if kind == 2:
        size = _size(rng, len(unit) + 10)
        return Raw(b"{" + b",".join(b'"%d":%s' % (n, unit) for n in range(size)) + b"}")
    return Raw(b'{"a":' + unit + (b',"a":' + unit) * size + b"}")


def _deep(rng: random.Random) -> object:
    depth = rng.choice([2, 50, 150, 199, 200, 201, 1000, 100_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'[{"":', b"}]")])
    return Raw(opening * depth + b"1" + closing * rng.choice([depth, 0]))


def _value(rng: random.Random) -> object:
    return rng.choice([_scalar, _scalar, _text, _many, _deep])(rng)


# ---- mutations of a tree -----------------------------------------------------------------------


def _places(value: object, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each part; of the numbers in a long list, the first only."""
    yield place
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _places(one, (*place, key))
    elif isinstance(value, list):
        for index, one in enumerate(value[:2]):
            yield from _places(one, (*place, index))


def _mutate(rng: random.Random, tree: Any) -> tuple[str, Any]:  # noqa: ANN401
    """Replace, remove or repeat a random part; returns what was done, and the tree."""
    places = list(_places(tree))
    place = rng.choice(places)
    if not place:
        return "a whole body", _value(rng)
    parent = tree
    for step in place[:-1]:
        parent = parent[step]
    key = place[-1]
    where = ".".join(map(str, place))
    kind = rng.randrange(5)
    if kind == 0 and isinstance(parent, dict):
        del parent[key]
        return f"no {where}", tree
    if kind == 1 and isinstance(parent, dict):
        # The same member again, before or after the right one.
        parent[key] = Raw(dump(_value(rng)) + b"," + dump(key) + b":" + dump(parent[key]))
        return f"{where} twice", tree
    if kind == 2 and isinstance(parent, dict):
        parent[rng.choice(["k", "é", "\0"]) * _size(rng, 8)] = _scalar(rng)
        return f"a long key beside {where}", tree
    if kind == 3 and isinstance(parent, list):
        parent *= 1 + _size(rng, len(dump(parent)) + 1)
        return f"{where} repeated", tree
    parent[key] = _value(rng)
    return f"another {where}", tree


def _mutated(rng: random.Random, tree: Any) -> tuple[str, bytes]:  # noqa: ANN401
    names = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        if not isinstance(tree, dict):
            break
        name, tree = _mutate(rng, tree)
        names.append(name)
    body = dump(tree)
    kind = rng.randrange(20)
    if kind == 0:
        names.append("cut")
        body = body[: rng.randrange(len(body) + 1)]
    elif kind == 1:
        names.append("after white space")
        body = b" \n" * _size(rng, 2) + body
    elif kind == 2:
        names.append("with one byte changed")
        at = rng.randrange(len(body) + 1)
        body = body[:at] + bytes([rng.randrange(256)]) + body[at + 1 :]
    elif kind == 3:
        names.append("with more after it")
        body += rng.choice([b"x", b"{}", b"\0" * _size(rng)])
    return ", ".join(names), body


# ---- requests ----------------------------------------------------------------------------------


def _open_inference(rng: random.Random, model: str) -> Request:
    height, width, _ = PIXELS.shape
    numbers = {"name": "image", "shape": [height, width, 3], "datatype": "UINT8"}
    tensor: dict[str, Any] = rng.choice(
        [
            {**numbers, "data": PIXELS.reshape(-1).tolist()},
            {**numbers, "data": PIXELS.tolist()},
            {**numbers, "shape": [1, height, width, 3], "data": PIXELS.tolist()},
            {"name": "image", "shape": [1], "datatype": "BYTES", "data": [BASE64]},
        ]
    )
    tree: dict[str, Any] = {
        "id": "42",
        "parameters": {"binary_data_output": rng.random() < 0.5, "max_side": 96},
        "inputs": [tensor],
        "outputs": [
            {"name": "mask", "parameters": {"binary_data": False}},
            {"name": "confidence"},
        ],
    }
    name, body = _mutated(rng, tree)
    return Request(f"/v2, {name}", "POST", f"/v2/models/{model}/infer", {}, body)


def _binary_data(rng: random.Random, model: str) -> Request:
    """Lengths that are false: of the JSON, of the data after it, and of the file in that."""
    file = rng.random() < 0.5
    data = len(PHOTO).to_bytes(4, "little") + PHOTO if file else PIXELS.tobytes()
    tensor = {
        "name": "image",
        "shape": [1] if file else list(PIXELS.shape),
        "datatype": "BYTES" if file else "UINT8",
        "parameters": {"binary_data_size": len(data)},
    }
    tree: Any = {"inputs": [tensor]}
    names = []
    if rng.random() < 0.5:
        tensor["parameters"] = {"binary_data_size": _scalar(rng)}
        names.append("another size")
    if rng.random() < 0.5:
        name, tree = _mutate(rng, tree)
        names.append(name)
    text = dump(tree)
    length = str(len(text))
    if rng.random() < 0.5:
        names.append("another length of the JSON")
        length = rng.choice(
            ["", "-1", "0", "1", "1e3", "0x10", "+5", "\u00b2", "9" * 19, "9" * 5000,
             str(len(text) - 1), str(len(text) + 1), str(len(text + data)), " ", "1,2"]
        )  # fmt: skip
    if rng.random() < 0.5:
        names.append("another tail")
        data = rng.choice(
            [b"", data[:-1], data + b"x", data[: rng.randrange(len(data))], b"\xff" * 4 + data[4:],
             bytes(_size(rng))]
        )  # fmt: skip
    headers = {LENGTH: length}
    path = f"/v2/models/{model}/infer"
    return Request(f"binary /v2, {', '.join(names)}", "POST", path, headers, text + data)


def _repository(rng: random.Random, model: str) -> Request:
    name, body = _mutated(rng, {"ready": True})
    return Request(f"index, {name}", "POST", "/v2/repository/index", {}, body)


def _hugging_face(rng: random.Random, model: str) -> Request:
    tree = {
        "inputs": rng.choice([BASE64, DATA_URI]),
        "parameters": {
            "subtask": "semantic",
            "threshold": 0.1,
            "mask_threshold": 0.1,
            "overlap_mask_area_threshold": 0.1,
        },
    }
    name, body = _mutated(rng, tree)
    return Request(f"/hf, {name}", "POST", f"/hf/image-segmentation?model={model}", {}, body)


def _predict(rng: random.Random, model: str) -> Request:
    task = {"id": 1, "data": {"picture": DATA_URI}, "annotations": [], "predictions": []}
    xml, config = ("", _CONFIG) if rng.random() < 0.5 else _config(rng)
    tree = {"tasks": [task, task], "project": "1.17", "label_config": config, "params": {}}
    name, body = _mutated(rng, tree) if not xml or rng.random() < 0.3 else (xml, dump(tree))
    return Request(f"predict, {xml} {name}", "POST", "/label-studio/predict", {}, body)


def _setup(rng: random.Random, model: str) -> Request:
    xml, config = _config(rng)
    tree = {"project": "1.17", "schema": config, "extra_params": None}
    name, body = _mutated(rng, tree) if rng.random() < 0.3 else ("", dump(tree))
    return Request(f"setup, {xml} {name}", "POST", "/label-studio/setup", {}, body)


_LABELS = '<Label value="Person"/><Label value="Animal" predicted_values="cat,dog"/>'
_CONFIG = (
    '<View><Image name="img" value="$picture"/><BrushLabels name="tag" toName="img">'
    f"{_LABELS}</BrushLabels></View>"
)


def _config(rng: random.Random) -> tuple[str, str]:
    """A hostile labelling configuration, and its name."""
    size = _size(rng, 8)
    several = min(size, 5000)
    control = f'<BrushLabels name="{{0}}" toName="img{{0}}">{_LABELS}</BrushLabels>'
    image = '<Image name="img{0}" value="$p{0}"/>'
    configs: list[tuple[str, Callable[[], str]]] = [
        ("nested", lambda: "<View>" * several + _CONFIG + "</View>" * several),
        ("unclosed", lambda: "<View>" * size),
        ("attributes", lambda: "<View " + " ".join(f'a{n}=""' for n in range(several)) + "/>"),
        ("the same attribute", lambda: '<View a="" a=""/>'),
        ("labels", lambda: _CONFIG.replace(
            "</Brush", "".join(f'<Label value="{n}" predicted_values="cat"/>'
                               for n in range(several)) + "</Brush")),
        ("controls", lambda: "<View>" + "".join(
            image.format(n) + control.format(n) for n in range(several // 10 + 1)) + "</View>"),
        ("controls of one image", lambda: _CONFIG.replace("<View>", "<View>" + (
            f'<BrushLabels name="b" toName="img">{_LABELS}</BrushLabels>' * (several // 4)))),
        ("predicted values", lambda: _CONFIG.replace("cat,dog", "cat," * size)),
        ("a long name", lambda: _CONFIG.replace("Person", "person" * size)),
        ("a long key", lambda: _CONFIG.replace("$picture", "$" + "p" * size)),
        ("punctuation", lambda: _CONFIG.replace("Person", "-" * several + "person")),
        ("entities", lambda: '<!DOCTYPE a [<!ENTITY b "' + "c" * several + '">]>' + _CONFIG),
        ("an external entity", lambda: '<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>'),
        ("an encoding", lambda: f'<?xml version="1.0" encoding="{rng.choice(["utf-16", "x"])}"?>'
                                + _CONFIG),
        ("comments", lambda: _CONFIG.replace("<Image", "<!--" + "-x" * several + "--><Image")),
        ("character data", lambda: _CONFIG.replace("<Image", "<![CDATA[" + "]" * several + "<I")),
        ("references", lambda: _CONFIG.replace("Person", "&#112;" * several)),
        ("a bad reference", lambda: _CONFIG.replace("Person", "&#xD800;")),
        ("a name space", lambda: _CONFIG.replace("<View>", '<View xmlns="' + "u" * size + '">')),
        ("instructions", lambda: "<?a b?>" * several + _CONFIG),
        ("NUL", lambda: _CONFIG.replace("Person", "per\0son")),
        ("emoji", lambda: _CONFIG.replace("Person", "\U0001f600" * several)),
        ("cut", lambda: _CONFIG[: rng.randrange(len(_CONFIG))]),
    ]  # fmt: skip
    name, build = rng.choice(configs)
    return f"configuration: {name}", build()


_BUILDERS: list[Callable[[random.Random, str], Request]] = [
    _open_inference,
    _open_inference,
    _binary_data,
    _repository,
    _hugging_face,
    _predict,
    _predict,
    _setup,
]
