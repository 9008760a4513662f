"""The model contract: round trip, and every disagreement named."""

from dataclasses import dataclass, field

import pytest
from pydantic import ValidationError

from service.artefact.contract import ModelContract
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
    """What is written into a graph is read back unchanged, beside other tools' entries."""
    contract = make_contract(metrics={"val_miou": 0.5125}, stride=32, precision="int8")
    metadata = {**contract.to_metadata(), "someone": "else"}
    assert ModelContract.from_metadata(metadata) == contract
    assert metadata["fcn.name"] == "tiny"
    assert metadata["fcn.shapes"] == "[[64, 96], [96, 64], [96, 96]]"


@pytest.mark.parametrize("key", sorted(make_contract().to_metadata()))
def test_a_missing_key_is_named(key: str) -> None:
    """No key is optional, and the error says which one is missing."""
    metadata = make_contract().to_metadata()
    del metadata[key]
    with pytest.raises(ContractError, match=f"lacks {key}"):
        ModelContract.from_metadata(metadata)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fcn.schema_version", "2", "fcn.schema_version is '2', but this service reads 1"),
        ("fcn.stride", "7", "fcn.stride: .*8, 16 or 32, got 7"),
        ("fcn.stride", "sixteen", "fcn.stride is not JSON"),
        ("fcn.classes", '["background"]', "fcn.classes: 1 classes, but VOC has 21"),
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
    """The error names key and value, on one line."""
    metadata = {**make_contract().to_metadata(), key: value}
    with pytest.raises(ContractError, match=message) as caught:
        ModelContract.from_metadata(metadata)
    assert "\n" not in str(caught.value)


def test_another_class_order_is_refused() -> None:
    """Classes are compared with VOC's, one by one."""
    classes = list(make_contract().classes)
    classes[8], classes[12] = classes[12], classes[8]
    with pytest.raises(ValidationError, match="class 8 is 'dog', but VOC's is 'cat'"):
        make_contract(classes=tuple(classes))


def test_the_promised_graph_is_accepted() -> None:
    """Dynamic batch and size, in symbols or None, are what the contract wants."""
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
    """Names, types and shapes of the graph must be the promised ones."""
    with pytest.raises(ContractError, match=message):
        make_contract().check_graph(inputs, outputs)


def test_padding_color_is_the_mean() -> None:
    """ImageNet's mean, rounded to 8 bits."""
    assert make_contract().padding_color == (124, 116, 104)
