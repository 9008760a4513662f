"""A training run's hyper-parameters, read from TOML: everything that a run depends on but data."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import StageError

RECIPES: Final = Path(__file__).parent / "recipes"


class RecipeError(StageError):
    """The recipe cannot be read or has an invalid value; the message names it."""


class Recipe(BaseModel):
    """See ``models/recipes/*.toml``, where comments give the reason for each value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    network: str
    split: str
    held_out: int = Field(ge=1)
    """Images of the split that are held out of training, for choosing between models."""
    seed: int = 0

    iterations: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    crop_size: int = Field(gt=0, multiple_of=32)
    working_size: int = Field(gt=0, multiple_of=32)
    scale_range: tuple[float, float]
    jitter: float = Field(ge=0, lt=1)
    repeat_threshold: float = Field(ge=0, le=1)
    """Classes in fewer than this share of the images are repeated; 0 disables it."""

    learning_rate: float = Field(gt=0)
    head_learning_rate_factor: float = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    poly_power: float = Field(gt=0)
    warm_up_iterations: int = Field(ge=0)
    ema_decay: float = Field(gt=0, lt=1)

    frozen_stages: int = Field(ge=0, le=6)
    """Leading stages of the backbone that keep their starting weights; the stem is the first."""
    batch_norm: Literal["train", "frozen"]
    """In the backbone: ``frozen`` keeps the running statistics and trains scale and shift only."""
    precision: Literal["fp32", "bf16"]
    """Of the convolutions' arithmetic; weights and loss are always float32."""
    compile: bool
    """Compile the network, or only the frozen stages if there are any: they gain on a CPU."""
    checkpoint_every: int = Field(gt=0)
    evaluate_every: int = Field(gt=0)


def find_recipe(given: str) -> Path:
    """Return a recipe's path: ``full`` is ``models/recipes/full.toml``, a ``.toml`` is a path."""
    path = Path(given)
    return path if path.suffix == ".toml" else RECIPES / f"{given}.toml"


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a TOML file.

    Args:
        path: the file.
        changes: lines of TOML, such as ``jitter = 0.1``, that replace the file's values.

    Raises:
        RecipeError: the file is missing, a text is not TOML, or a value is missing, unknown or
            invalid.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        for change in changes:
            values.update(tomllib.loads(change))
        return Recipe.model_validate(values)
    except OSError as exc:
        raise RecipeError(f"{path}: cannot be read: {exc}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise RecipeError(f"{' '.join([str(path), *changes])}: not TOML: {exc}") from exc
    except ValidationError as exc:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors()]
        raise RecipeError("\n  ".join([f"{path}:", *lines])) from exc
