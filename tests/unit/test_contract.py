"""The model contract: round trip, and an error that names each mismatch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from service.artefact import voc
from service.artefact.contract import ModelContract
from service.artefact.labels import VOC_LABELS, LabelSet
from service.errors import ContractError
from tests.artefacts import make_contract


@dataclass
class Tensor:
    """A graph's input or output, as ONNX Runtime describes it."""

    name: str
    type: str
    shape: list[int | str | None] = field(default_factory=list)


IMAGE = Tensor("image", "tensor(uint8)", ["N", "h", "w", 3])
LOGITS = Tensor("logits", "tensor(float)", [None, 21, "lh", "lw"])


def test_metadata_round_trip() -> None:
    """A contract is read back unchanged; other tools' entries are ignored."""
    contract = make_contract(metrics={"val_miou": 0.5125}, stride=32, precision="int8")
    metadata = {**contract.to_metadata(), "someone": "else"}
    assert ModelContract.from_metadata(metadata) == contract
    assert metadata["fcn.name"] == "tiny"
    assert metadata["fcn.shapes"] == "[[64, 96], [96, 64], [96, 96]]"


@pytest.mark.parametrize("key", sorted(make_contract().to_metadata()))
def test_a_missing_key_is_named(key: str) -> None:
    """Every key is required; the error names the missing one."""
    metadata = make_contract().to_metadata()
    del metadata[key]
    with pytest.raises(ContractError, match=f"lacks {key}"):
        ModelContract.from_metadata(metadata)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fcn.schema_version", "3", "fcn.schema_version is '3', but this service reads 1 and 2"),
        ("fcn.stride", "7", "fcn.stride: .*8, 16 or 32, got 7"),
        ("fcn.stride", "sixteen", "fcn.stride is not JSON"),
        ("fcn.labels", '{"names": ["a"], "colors": []}', "fcn.labels: 1 classes, but 0 colors"),
        ("fcn.labels", '["background"]', "fcn.labels: "),
        ("fcn.labels", '{"colors": []}', "fcn.labels.names: "),
        ("fcn.shapes", "[[100, 96]]", "fcn.shapes: 100x96 is not a multiple of 32"),
        ("fcn.shapes", "[[96, 96], [64, 96]]", "fcn.shapes: .*ascending"),
        ("fcn.shapes", "[]", "fcn.shapes"),
        ("fcn.mean", "[0.5, 0.5, 128]", "fcn.mean.2: .*got 128"),
        ("fcn.color_order", "BGR", "fcn.color_order: .*'RGB', got 'BGR'"),
        ("fcn.precision", "fp8", "fcn.precision: .*got 'fp8'"),
        ("fcn.name", "a/../b", "fcn.name"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(key: str, value: str, message: str) -> None:
    """The error names the key and the value in one line."""
    metadata = {**make_contract().to_metadata(), key: value}
    with pytest.raises(ContractError, match=message) as caught:
        ModelContract.from_metadata(metadata)
    assert "\n" not in str(caught.value)


def first_version(classes: Sequence[str]) -> dict[str, str]:
    """Metadata of schema version 1: class names instead of a label set."""
    metadata = make_contract().to_metadata()
    del metadata["fcn.labels"]
    return {**metadata, "fcn.schema_version": "1", "fcn.classes": json.dumps(classes)}


def test_the_first_version_still_loads() -> None:
    """Version 1 metadata gives the contract with VOC's label set."""
    contract = ModelContract.from_metadata(first_version(voc.CLASSES))
    assert contract == make_contract()
    assert contract.labels == VOC_LABELS


SWAPPED = [*voc.CLASSES[:8], "dog", *voc.CLASSES[9:12], "cat", *voc.CLASSES[13:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fcn.classes": json.dumps(SWAPPED)}, "class 8 is 'dog', but VOC's is 'cat'"),
        ({"fcn.classes": '["background"]'}, "fcn.classes is not a list of VOC's 21 names"),
        ({"fcn.classes": "{}"}, "fcn.classes is not a list of VOC's 21 names"),
        ({"fcn.classes": "cat,dog"}, "fcn.classes is not JSON: 'cat,dog'"),
    ],
)
def test_the_first_version_has_vocs_classes(changes: dict[str, str], message: str) -> None:
    """Other classes or another order are an error that names the first difference."""
    with pytest.raises(ContractError, match=message):
        ModelContract.from_metadata({**first_version(voc.CLASSES), **changes})


def test_the_first_version_needs_its_classes() -> None:
    """Version 1 metadata without classes is an error."""
    metadata = first_version(voc.CLASSES)
    del metadata["fcn.classes"]
    with pytest.raises(ContractError, match=r"lacks fcn\.classes"):
        ModelContract.from_metadata(metadata)


def test_any_label_set_is_carried() -> None:
    """Names and colours are read back unchanged; the logits need one channel per class."""
    labels = LabelSet(
        names=["background", "traffic light", "Straße"], colors=[(0, 0, 0), (1, 2, 3), (255, 0, 9)]
    )
    contract = make_contract(labels=labels)
    assert ModelContract.from_metadata(contract.to_metadata()) == contract
    logits = Tensor("logits", "tensor(float)", [None, 3, "lh", "lw"])
    contract.check_graph([IMAGE], [logits])
    with pytest.raises(ContractError, match=r"21.*not .*3"):
        contract.check_graph([IMAGE], [LOGITS])


def test_the_promised_graph_is_accepted() -> None:
    """Dynamic dimensions may be symbols or None."""
    assert make_contract().check_graph([IMAGE], [LOGITS]) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([Tensor("x", "tensor(uint8)")], [LOGITS], "input should be 'image' alone, but is 'x'"),
        ([IMAGE, IMAGE], [LOGITS], "input should be 'image' alone"),
        ([IMAGE], [], "output should be 'logits' alone, but is none"),
        ([Tensor("image", "tensor(float)")], [LOGITS], "tensor.float., not tensor.uint8."),
        ([Tensor("image", "tensor(uint8)", ["N", 3, "h", "w"])], [LOGITS], "has shape"),
        ([Tensor("image", "tensor(uint8)", [1, 512, 512, 3])], [LOGITS], "is dynamic"),
        ([IMAGE], [Tensor("logits", "tensor(float)", ["N", 19, "a", "b"])], "19.*not .*21"),
        ([IMAGE], [Tensor("logits", "tensor(float16)", ["N", 21, "a", "b"])], "float16"),
    ],
)
def test_another_graph_is_refused(
    inputs: list[Tensor], outputs: list[Tensor], message: str
) -> None:
    """Other names, types or shapes are an error."""
    with pytest.raises(ContractError, match=message):
        make_contract().check_graph(inputs, outputs)


def test_padding_color_is_the_mean() -> None:
    """The padding colour is ImageNet's mean, rounded to 8 bits."""
    assert make_contract().padding_color == (124, 116, 104)
