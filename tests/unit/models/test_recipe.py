"""Recipes are complete and checked before a run starts."""

from pathlib import Path

import pytest

from models.networks import NETWORKS
from models.recipe import RECIPES, RecipeError, find_recipe, load_recipe


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_committed_recipes_are_valid(path: Path) -> None:
    """Each names a network that exists."""
    assert load_recipe(path).network in NETWORKS


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("batch_size = 16", "batch_size = 0", "batch_size"),
        ("batch_size = 16", "batchsize = 16", "batchsize"),
        ("batch_size = 16", "", "batch_size"),
        ("crop_size = 320", "crop_size = 300", "crop_size"),
        ("batch_size = 16", "batch_size =", "not TOML"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    """Out of range, misspelt, missing, or not TOML."""
    text = (RECIPES / "cpu.toml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "wrong.toml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(RecipeError, match=named):
        load_recipe(path)


def test_a_committed_recipe_goes_by_its_name() -> None:
    """Anything else is a path."""
    assert load_recipe(find_recipe("full")).frozen_stages == 0
    assert find_recipe("mine/full.toml") == Path("mine/full.toml")


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    """One line with the path."""
    with pytest.raises(RecipeError, match=r"absent\.toml"):
        load_recipe(tmp_path / "absent.toml")


def test_a_change_takes_the_place_of_the_files_value() -> None:
    """As with --set: any line of TOML, checked like the file."""
    path = RECIPES / "cpu.toml"
    recipe = load_recipe(path, ["jitter=0.1", "scale_range = [0.75, 1.5]"])
    assert recipe.jitter == 0.1
    assert recipe.scale_range == (0.75, 1.5)
    assert recipe.model_copy(update={"jitter": 0.3, "scale_range": (0.5, 1.5)}) == load_recipe(path)
    with pytest.raises(RecipeError, match="batchsize"):
        load_recipe(path, ["batchsize=4"])
    with pytest.raises(RecipeError, match="seed: not TOML"):
        load_recipe(path, ["seed"])
