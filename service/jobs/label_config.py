"""Label Studio's labelling configuration: which classes each of its labels stands for.

Source: https://labelstud.io/tags/brushlabels.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from service.artefact.labels import LabelSet
from service.errors import InvalidParameter

MAX_LABELS: Final = 1000
"""Most labels of a configuration: four times the classes that a model can have."""

_MAX_LENGTH: Final = 2**18
# No configuration needs these; attackers use them to expand XML or to read files.
_DECLARATION: Final = re.compile(r"<!(DOCTYPE|ENTITY)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class BrushControl:
    """A ``<BrushLabels>`` tag over an ``<Image>``.

    ``data_key``: key of the image in a task's data; ``labels``: the names by which each label may
    stand for classes, in the configuration's order; see `class_ids`.
    """

    from_name: str
    to_name: str
    data_key: str
    labels: dict[str, frozenset[str]]


def parse_label_config(config: str, label_set: LabelSet) -> list[BrushControl]:
    """The brush controls of a configuration.

    A label stands for the classes in its attribute ``predicted_values``, or else for the class of
    ``label_set`` with its own name. Case, spaces and punctuation do not matter ("Potted plant").
    Raises `InvalidParameter` if the configuration cannot be read or no label stands for a class.
    """
    if len(config) > _MAX_LENGTH:
        raise InvalidParameter(f"label_config: must have at most {_MAX_LENGTH} characters")
    if _DECLARATION.search(config):
        raise InvalidParameter("label_config: DOCTYPE and ENTITY declarations are not allowed")
    try:
        root = ET.fromstring(config)  # noqa: S314 - without declarations
    except (ET.ParseError, ValueError) as exc:
        raise InvalidParameter("label_config: must be well-formed XML") from exc
    images = {
        tag.get("name", ""): tag.get("value", "").removeprefix("$")
        for tag in root.iter("Image")
        if tag.get("value", "").startswith("$")
    }
    controls = []
    for tag in root.iter("BrushLabels"):
        from_name, to_name = tag.get("name", ""), tag.get("toName", "")
        if from_name and to_name in images:
            labels = {}
            for child in tag.findall("Label"):
                name = child.get("alias") or child.get("value")
                if name:
                    labels[name] = _names(child)
            controls.append(BrushControl(from_name, to_name, images[to_name], labels))
    if sum(len(control.labels) for control in controls) > MAX_LABELS:
        raise InvalidParameter(f"label_config: must have at most {MAX_LABELS} labels")
    if not controls:
        raise InvalidParameter('label_config: no <BrushLabels> over an <Image value="$...">')
    if not any(class_ids(names, label_set) for one in controls for names in one.labels.values()):
        raise InvalidParameter(
            f"label_config: no label is one of the classes {', '.join(label_set.names)}"
        )
    return controls


def class_ids(names: Collection[str], label_set: LabelSet) -> frozenset[int]:
    """The classes of ``label_set`` that a label of these names stands for."""
    exact, plain = _ids_by_name(label_set.names)
    return frozenset().union(
        *(exact.get(name, ()) for name in names),
        # A class whose name has no letter or digit is meant only by that very name.
        *(plain.get(_plain(name), ()) for name in names if _plain(name)),
    )


@lru_cache(maxsize=8)
def _ids_by_name(
    names: tuple[str, ...],
) -> tuple[Mapping[str, Collection[int]], Mapping[str, Collection[int]]]:
    """The classes by name, and by `_plain` name."""
    exact, plain = defaultdict(list), defaultdict(list)
    for index, name in enumerate(names):
        exact[name].append(index)
        plain[_plain(name)].append(index)
    return exact, plain


def _names(tag: ET.Element) -> frozenset[str]:
    names = [tag.get("value", ""), tag.get("alias", "")]
    if tag.get("predicted_values"):
        names = tag.get("predicted_values", "").split(",")
    return frozenset(name.strip() for name in names if name.strip())


def _plain(name: str) -> str:
    """Letters and digits alone, case folded: VOC writes ``pottedplant``, people do not."""
    return "".join(character for character in name.casefold() if character.isalnum())
