"""The tables with narrow networks on a few digits: each row runs, and its errors say nothing."""

from contextlib import suppress
from typing import Any

from sopdeploy.errors import ConfigError
from sopdeploy.models.registry import entry, make_config
from sopdeploy.training.settings.recipe import Recipe, format_toml, read_recipe
from sopdeploy_papers.reproduction.tables import PrintedTable

# Of options of networks and poolings, also of each number in a list
LIMITS = {
    **{
        "depth": 26,
        "base_width": 16,
        "blocks": 3,
        "widen": 2,
        "blocks_per_stage": 1,
        "cardinality": 2,
    },
    **{
        "group_width": 8,
        "component_widths": 16,
        "gate_widths": 16,
        "cov_width": 32,
        "final_width": 32,
    },
    **{"aux_blocks": 1, "aux_widths": 16, "width": 32, "dim": 256, "words": 4, "rank": 4},
}
SIDES = {32: 16, 64: 32, 224: 64}  # of images, by those of the catalog's network


def small_table(table: PrintedTable) -> PrintedTable:
    """Return *table* with one run per row and changes that let it train in seconds."""
    rows = []
    for row in table.rows:
        trained = table.recipe_of(row)
        changes = ()
        if trained is not None:
            with suppress(ConfigError):  # a pooling of a plug-in, which the tests switch off
                changes = small_overrides(read_recipe(*trained))
        rows.append(row.model_copy(update={"set": (*row.set, *changes)}))
    return table.model_copy(update={"seeds": 1, "rows": tuple(rows)})


def small_overrides(recipe: Recipe) -> tuple[str, ...]:
    """Build the changes that reduce the network of *recipe* and train it for two epochs on digits."""
    name = recipe.model.name
    side = SIDES[entry(recipe.model.name).image_size]
    options = make_config(name, recipe.model.config).model_dump(mode="json")
    small = limited(options)
    config = recipe.model.config | {
        key: small[key] for key in options if small[key] != options[key]
    }

    if name == "vgg16-bn":  # has no narrow form
        name = "resnet8"
        config = {"pooling": small["pooling"]}
    elif name.startswith("timm:"):
        name = "timm:test_resnet"
    config |= {"classifier": "linear"} if name == "alexnet" else {}
    config |= {"side": side} if "side" in options else {}
    overrides = [
        *(
            f"model.name={name}",
            f"model.config={format_toml(config)}",
            'data={kind="digits"}',
            "epochs=2",
        ),
        *(f"preprocess.resize={side}", f"preprocess.crop={side}", "batch_size=32"),
        *(
            "workers=0",
            "optimizer.lr=0.001",
            "optimizer.clip_norm=5.0",
            'schedule={kind="one-cycle"}',
        ),
    ]
    if recipe.model.remove_branches_at is not None:
        overrides.append("model.remove_branches_at=1")
    if recipe.teacher is not None and recipe.teacher.model is not None:
        overrides.append('teacher.model={name="resnet8"}')
    if recipe.start is not None and recipe.start.learn == "all":
        overrides.append("start.weights=none")
    return tuple(overrides)


def limited(value: Any, limit: int | None = None) -> Any:
    """Reduce a number to *limit*, and those of a dictionary to `LIMITS`."""
    if isinstance(value, dict):
        return {key: limited(inner, LIMITS.get(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [limited(inner, limit) for inner in value]
    return value if limit is None or isinstance(value, str | None) else min(value, limit)
