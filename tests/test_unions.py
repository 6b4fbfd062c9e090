"""Each value of a union, such as an optimizer of a recipe, is built and does what it is for."""

import importlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pydantic
import pytest
import torch
from pydantic.fields import FieldInfo

from sopdeploy.data.augment import AugmentedDataset
from sopdeploy.data.photos.photo import ArrayImages
from sopdeploy.data.sources import open_data
from sopdeploy.errors import DataError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.training.loop.optimizer import create_optimizer
from sopdeploy.training.procedure import select_procedure
from sopdeploy.training.settings.recipe import read_recipe
from tests.docs.reading import module_at, text_of
from tests.support.rooms import PACKAGES, ROOT
from tests.sweep.smallest import POOLINGS

Use = Callable[[Any, Path], object]


def find_unions() -> Iterator[tuple[str, Any]]:
    """Yield the name and the type of each union of the packages whose values are told apart by `kind`."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            if "pydantic.Field(discriminator=" not in path.read_text(encoding="utf-8"):
                continue

            parts = path.relative_to(folder).with_suffix("").parts
            module = importlib.import_module(".".join((package, *parts)))
            for name, value in vars(module).items():
                facts = [one for one in get_args(value)[1:] if isinstance(one, FieldInfo)]
                is_own = f"\n{name} = Annotated[" in path.read_text(encoding="utf-8")
                if is_own and any(one.discriminator == "kind" for one in facts):
                    yield name, value


UNIONS = dict(find_unions())


def kinds_of(union: Any) -> list[str]:
    """List the values of `kind` of the members of *union*."""
    members = get_args(get_args(union)[0])
    return [
        kind for member in members for kind in get_args(member.model_fields["kind"].annotation)
    ]


def step(config: Any, _folder: Path) -> None:
    """Take a step with the optimizer of *config*, which lowers the loss."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = create_optimizer(config, [weight])
    loss = (weight**2).sum()

    (weight.grad,) = torch.autograd.grad(loss, [weight])
    optimizer.step()
    assert (weight**2).sum() < loss


def follow(config: Any, _folder: Path) -> None:
    """Follow the schedule of *config* for two epochs."""
    factors = [config.factor(time, 2) for time in (0.0, 0.5, 1.0, 1.9)]
    assert all(math.isfinite(factor) and 0 <= factor <= 1 for factor in factors)
    assert max(factors) > 0


def crop(config: Any, _folder: Path) -> None:
    """Augment an image by *config*."""
    images = ArrayImages(("a",), np.full((1, 20, 30, 3), 7, np.uint8), np.zeros(1, np.int64))
    rules = Preprocess(resize=16, crop=16)
    augmented = AugmentedDataset(
        images=images, augmentation=config, preprocess=rules, seed=0, epoch=0
    )
    assert augmented.pixels([0]).shape == (1, 16, 16, 3)


def open_images(config: Any, folder: Path) -> None:
    """Open the images of *config*; an empty folder is an error that says what it lacks."""
    if "path" not in type(config).model_fields:
        assert len(open_data(config).train)
        return

    with pytest.raises(DataError, match=re.escape(str(folder))):
        open_data(config.model_copy(update={"path": folder}))


def choose(config: Any, _folder: Path) -> None:
    """Choose the procedure *config* for 60 images; "auto" chooses another one."""
    recipe = read_recipe("photos").model_copy(update={"procedure": config})
    chosen = select_procedure(recipe, 60).recipe.procedure
    assert chosen.kind == ("few_shot" if config.kind == "auto" else config.kind)


USES: dict[str, tuple[dict[str, Any], Use]] = {
    "OptimizerConfig": ({"lr": 0.1}, step),
    "Schedule": ({}, follow),
    "Augmentation": ({}, crop),
    "DataConfig": ({}, open_images),
    "AnyProcedureConfig": ({}, choose),
}
# Unions whose values others build: `tests/sweep` lowers each pooling, and each training ends with a result.
ELSEWHERE = {"Pooling", "AnyProcedureResult"}


def test_every_union_is_used_here_or_elsewhere() -> None:
    assert set(UNIONS) == set(USES) | ELSEWHERE

    tried = {choice["kind"] for choice in POOLINGS}
    assert set(kinds_of(UNIONS["Pooling"])) <= tried
    procedures = set(kinds_of(UNIONS["AnyProcedureConfig"]))
    assert set(kinds_of(UNIONS["AnyProcedureResult"])) <= procedures


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in USES for kind in kinds_of(UNIONS[name])]
)
def test_each_kind_of_a_union_does_what_it_is_for(name: str, kind: str, tmp_path: Path) -> None:
    options, use = USES[name]
    adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(UNIONS[name])
    use(adapter.validate_python({"kind": kind, **options}), tmp_path)


def test_the_page_of_recipes_has_the_options_of_each_union() -> None:
    tables = module_at(ROOT / "docs" / "generate_operations.py").TABLES_WITH_KIND
    described_as_formats = {"DataConfig"}  # in `photos.md` and `train.md`
    of_recipes = {*USES, "Pooling"} - described_as_formats

    assert [UNIONS[name] for name in of_recipes if UNIONS[name] not in tables.values()] == []


@pytest.mark.parametrize("name", USES)
def test_a_page_about_training_names_each_kind(name: str) -> None:
    pages = [text_of(f"docs/{page}.md") for page in ("recipes", "photos", "train")]
    named = {code for page in pages for code in re.findall(r"`([^`\n]+)`", page)}

    assert set(kinds_of(UNIONS[name])) - named == set()
