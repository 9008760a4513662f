"""The manifest: round trip, and an error for each file that differs from it."""

import json
from pathlib import Path

import pytest

from service.artefact.manifest import MANIFEST_NAME, Accuracy, load_manifest, read_files
from service.errors import ContractError, IntegrityError
from tests.artefacts import build_artefact, make_contract


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artefact that the test may break."""
    return build_artefact(tmp_path / "artefact")


def edit(folder: Path, **changes: object) -> None:
    """Change fields of a manifest on disk."""
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_round_trip(folder: Path) -> None:
    """A manifest is read back unchanged, classes without an IoU included."""
    accuracy = Accuracy(
        miou=0.5,
        pixel_accuracy=0.9,
        mean_accuracy=0.6,
        frequency_weighted_iou=0.8,
        per_class_iou={"cat": 0.7, "sofa": None},
    )
    manifest = load_manifest(folder).model_copy(
        update={"metrics": {"fp32": accuracy}, "recipe": {"lr": 0.01, "steps": [1, 2]}}
    )
    manifest.write(folder)
    assert load_manifest(folder) == manifest


def test_the_files_of_a_fresh_artefact_match_its_manifest(folder: Path) -> None:
    """`read_files` accepts them and returns their contents."""
    manifest = load_manifest(folder)
    content = (folder / "network.onnx").read_bytes()
    assert read_files(folder, manifest) == {"network.onnx": content}
    assert manifest.files["network.onnx"].bytes == len(content)


def test_a_changed_file_is_named(folder: Path) -> None:
    """One changed byte is an error that names the file and both sums."""
    path = folder / "network.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match=r"network\.onnx: sha256 is .* says "):
        read_files(folder, load_manifest(folder))


def test_a_missing_file_is_named(folder: Path) -> None:
    """Every file that the manifest lists must exist."""
    (folder / "network.onnx").unlink()
    with pytest.raises(IntegrityError, match=r"network\.onnx: No such file"):
        read_files(folder, load_manifest(folder))


def test_a_folder_without_manifest_is_no_artefact(tmp_path: Path) -> None:
    """The error names the missing manifest."""
    with pytest.raises(IntegrityError, match=r"manifest\.json: No such file"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"files": {}}, "files"),
        ({"files": {"../x": {"sha256": "0" * 64, "bytes": 1, "precision": "fp32"}}}, "plain"),
        ({"files": {"x": {"sha256": "0", "bytes": 1, "precision": "fp32"}}}, "sha256"),
        ({"surprise": 1}, "surprise"),
        ({"created": "yesterday"}, "created"),
    ],
)
def test_a_wrong_field_is_named(folder: Path, changes: dict[str, object], message: str) -> None:
    """The error names the manifest and the field in one line."""
    edit(folder, **changes)
    with pytest.raises(ContractError, match=rf"manifest\.json: .*{message}") as caught:
        load_manifest(folder)
    assert "\n" not in str(caught.value)


def test_a_manifest_of_another_model_is_refused(folder: Path) -> None:
    """Name, version and precision must equal the graph's."""
    manifest = load_manifest(folder)
    with pytest.raises(ContractError, match=r"version is '1' in .*, but '2' in network\.onnx"):
        manifest.check_contract(make_contract(version="2"), "network.onnx")
    with pytest.raises(ContractError, match="precision is 'fp32'"):
        manifest.check_contract(make_contract(precision="int8"), "network.onnx")


def test_files_are_picked_by_precision(folder: Path) -> None:
    """The first available precision is used; if there is none, the error lists those there are."""
    manifest = load_manifest(folder)
    assert manifest.pick_file(["int8", "fp32"]) == "network.onnx"
    with pytest.raises(ContractError, match="no network of precision int8, only fp32"):
        manifest.pick_file(["int8"])
