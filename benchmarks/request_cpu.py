"""CPU time of a request without decoding and inference, for this checkout and another.

The server decodes no images and returns constant outputs, so HTTP, admission, threads and response remain.
Garbage collections are as rare as in `serve`, also in other checkouts whose copy of this file lacks this.
With `--other FOLDER` (another checkout of this project, which runs its own copy of this file), both are
measured alternately. Every round starts a new server; the value is the median of the rounds.

    python benchmarks/request_cpu.py --other ../before --rounds 5
"""

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import uvicorn
from load import put_load
from measure import Result, existing, make_parser, report
from serving_alone import write_images
from serving_ours import CLASSES, count_answered, fake_model, replace_decoder
from serving_peers import OURS, cpu_seconds, free_port, started

from sopdeploy_service.app import create_app
from sopdeploy_service.server.draining_server import http_config
from sopdeploy_service.settings import load_settings

HERE = Path(__file__).resolve()

# The threshold of `freeze_objects`. With Python's own, full collections of 45 ms are a fifth of the CPU time.
RUN_WITH_RARE_COLLECTIONS = """
import gc, runpy, sys
gc.set_threshold(10_000, *gc.get_threshold()[1:])
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--serve", type=int, metavar="PORT", help="run as the server (used internally)")
    parser.add_argument("--other", type=existing, help="another checkout to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--query", default="", help="query of every request, such as top_k=3")
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve)
        return
    trees = {"this": HERE.parents[1]} | ({"other": arguments.other.resolve()} if arguments.other else {})
    milliseconds: dict[str, list[float]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        for _ in range(arguments.rounds):
            for name, tree in trees.items():
                milliseconds[name].append(measure(tree, Path(folder), arguments))
    medians = {name: statistics.median(values) for name, values in milliseconds.items()}
    result = Result(
        case="CPU per request",
        against=str(arguments.other or ""),
        ours=medians["this"],
        other=medians.get("other"),
        unit="cpu-ms",
        runs=arguments.rounds,
    )
    report([result], as_json=arguments.json)


def measure(tree: Path, folder: Path, arguments: argparse.Namespace) -> float:
    """Measure the CPU milliseconds per request of the server in *tree* under load."""
    port = free_port()
    scripts = tree / "benchmarks"
    places = {"PYTHONPATH": os.pathsep.join(map(str, (tree, tree / "service", scripts)))}
    command = [sys.executable, "-c", RUN_WITH_RARE_COLLECTIONS, str(scripts / HERE.name)]
    command += ["--serve", str(port)]
    with started(command, OURS, port, places, folder) as process:
        server = f"http://127.0.0.1:{port}"
        url = f"{server}/v1/classify" + (f"?{arguments.query}" if arguments.query else "")
        options = "--connections", arguments.connections
        put_load(url, folder, 0.1, *options)  # a second of warm-up
        before = cpu_seconds(process), count_answered(server)
        put_load(url, folder, arguments.seconds, *options)
        spent, count = cpu_seconds(process) - before[0], count_answered(server) - before[1]
    return 1000 * spent / count


def serve(port: int) -> None:
    """Serve constant outputs without decoding images."""
    model = fake_model(0, 0, 8)
    logits = np.random.default_rng(0).normal(size=(8, CLASSES)).astype(np.float32)

    class Constant:
        name, device, largest_batch = "constant", "fake", 8

        def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
            return {"logits": logits[: len(images)]}

        def close(self) -> None:
            """Do nothing: there is nothing to release."""

    replace_decoder()
    settings = load_settings(port=port, queue_size=1024, max_batch=8)
    app = create_app({"model": replace(model, runtime=Constant())}, settings)
    config = http_config(app, settings)
    config.port = port
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
