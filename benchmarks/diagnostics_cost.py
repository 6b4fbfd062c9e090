"""Cost of the training diagnostics of a report, compared with one epoch of training.

    python benchmarks/diagnostics_cost.py [--quick] [--json]

Measures the accuracy of all heads of the demo's network (branches on every stage) on its 359 held-out images.
The epoch includes training, evaluation and diagnostics. CPU time of one thread.
"""

import tempfile
from functools import partial
from pathlib import Path
from time import process_time

from measure import compare, parse, report

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.data.base import PreprocessedDataset
from sopdeploy.data.sources import open_data
from sopdeploy.layers.normalize import Normalize
from sopdeploy.training.diagnostics import diagnose
from sopdeploy.training.recipe import read_recipe
from sopdeploy.training.train import train_recipe


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__)
    recipe = read_recipe("digits-dsop", ["epochs=1", "threads=1"])
    held_out = PreprocessedDataset(open_data(recipe.data).held_out, recipe.preprocess)
    normalize = Normalize(recipe.preprocess)
    with tempfile.TemporaryDirectory() as folder:
        train_recipe(recipe, Path(folder) / "first")
        path = Path(folder) / "first" / "last.pt"
        model = build_classifier(read_checkpoint(path), path)
        runs = iter(range(1000))

        def epoch() -> None:
            train_recipe(recipe, Path(folder) / str(next(runs)))

        result = compare(
            "diagnostics of all heads",
            "one epoch with diagnostics",
            partial(diagnose, model, held_out, normalize, 64),
            epoch,
            runs=2 if arguments.quick else 7,
            clock=process_time,
        )
    report([result], as_json=arguments.json)


if __name__ == "__main__":
    main()
