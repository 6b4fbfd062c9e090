"""Export a network of every family of timm, all classifiers of torchvision and some of transformers.

    python benchmarks/networks.py --results FILE [--library timm] [--minutes 4]

Weights are random; batch norms have the statistics of the exporter's images. Each network is
exported for batches of 1 to 64 images, with its own builder as the plain network, and is
accepted with proof or refused for one reason. FILE has a line of JSON per network: another call
continues, and networks in FILE are not tried again. Tables of all results are printed.
transformers is optional: its networks are left out if it is not installed.
"""

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime as ort
import timm
import torch
from measure import markdown
from torch import nn
from torchvision import models

from sopdeploy import Preprocess, export_network
from sopdeploy.config import StrictModel
from sopdeploy.errors import SopdeployError
from sopdeploy.layers.normalize import Normalize
from sopdeploy_export.capture.deployed import choose_output, generated_images

CLASSES = 4
BATCHES = (1, 2, 3, 7)
# Options of timm's networks, in the order in which they are tried.
FEW_BLOCKS: tuple[dict[str, Any], ...] = ({"depth": 2}, {"depths": (1, 1, 1, 1)}, {})
SIDES = (64, 96, 128, 224, 240, 256)  # the first one that the network computes
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
STAGES = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}
WINDOWS = {
    "image_size": 64,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
LEVIT = {
    "hidden_sizes": [16, 24, 32],
    "num_attention_heads": [2, 2, 2],
    "depths": [1, 1, 1],
    "key_dim": [8] * 3,
}
TRANSFORMERS: dict[str, dict[str, Any]] = {  # the options of each configuration
    "ViT": {**VISION, "intermediate_size": 64},
    "DeiT": {**VISION, "intermediate_size": 64},
    "Beit": {**VISION, "intermediate_size": 64, "use_relative_position_bias": True},
    "Swin": WINDOWS,
    "Swinv2": WINDOWS,
    "Dinov2": VISION,
    "Siglip": {"vision_config": {**VISION, "intermediate_size": 64}},
    "ConvNext": STAGES,
    "ConvNextV2": STAGES,
    "ResNet": {**STAGES, "embedding_size": 16},
    "RegNet": {**STAGES, "embedding_size": 16, "groups_width": 8},
    "MobileNetV2": {"image_size": 64, "depth_multiplier": 0.35},
    "EfficientNet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "Levit": {"image_size": 64, **LEVIT},
}


class Row(StrictModel):
    """What became of a network: its `proof`, why it is `refused`, or the bug that `crashed` the export.

    `pixels` is empty if the network computes no size; `drift` is the largest difference from
    float64, `difference` that of the file from the network on images that the export has not
    seen, relative to the largest logit.
    """

    library: str
    family: str
    network: str
    pixels: int | Literal[""] = ""
    proof: str = ""
    drift: float | None = None
    difference: float | None = None
    refused: str = ""
    crashed: str = ""
    seconds: float | None = None


class Candidate(NamedTuple):
    """A network to try; `build` takes the size of its images."""

    library: str
    family: str
    name: str
    build: Callable[[int], nn.Module]
    logits_key: str | None = None


def of_timm(done: Container[str] = ()) -> Iterator[Candidate]:
    """Yield the network with the fewest weights of every family of timm that is not *done*."""
    for family in timm.list_modules():
        if family in done:  # to count the weights of a family takes seconds
            continue
        names = [
            name for name in timm.list_models(module=family) if not name.startswith("test_")
        ]
        sizes = [(size, name) for name in names if (size := _count_weights(name)) is not None]
        if sizes:
            _, name = min(sizes)
            yield Candidate("timm", family, name, partial(_create_timm, name))


def _count_weights(name: str) -> int | None:
    """Count the parameters of a network of timm without their memory; None if it cannot be built so."""
    with contextlib.suppress(Exception), torch.device("meta"):  # timm's code can raise anything
        return sum(
            weight.numel()
            for weight in timm.create_model(name, num_classes=CLASSES).parameters()
        )
    return None


def _create_timm(name: str, side: int) -> nn.Module:
    """Create a network of timm with few blocks, for images of *side* pixels, as far as these are options."""
    sizes: tuple[dict[str, Any], ...] = ({"img_size": side}, {})
    for blocks, size in itertools.product(FEW_BLOCKS, sizes):
        with contextlib.suppress(Exception):  # timm's code can raise anything
            return timm.create_model(name, num_classes=CLASSES, **blocks, **size)
    return timm.create_model(name, num_classes=CLASSES)


def of_torchvision(done: Container[str] = ()) -> Iterator[Candidate]:
    """Yield every classifier of torchvision that is not *done*, those with few weights first."""
    names = [name for name in models.list_models(module=models) if name not in done]
    sizes = {
        name: next(iter(models.get_model_weights(name))).meta["num_params"] for name in names
    }
    for name in sorted(names, key=lambda name: sizes[name]):

        def build(side: int, name: str = name) -> nn.Module:
            options: dict[str, Any] = {}
            if name.startswith("vit"):
                options = {"image_size": side}
            if name.startswith("maxvit"):
                options = {"input_size": (side, side)}
            if name in ("googlenet", "inception_v3"):
                options = {"init_weights": False, "aux_logits": False}
            return models.get_model(name, weights=None, num_classes=CLASSES, **options)

        yield Candidate("torchvision", name, name, build)


def of_transformers(done: Container[str] = ()) -> Iterator[Candidate]:
    """Yield small classifiers of transformers that are not *done*, if it is installed."""
    if importlib.util.find_spec("transformers") is None:
        return
    library = importlib.import_module("transformers")
    for family, options in TRANSFORMERS.items():
        if family in done:
            continue

        def build(
            _side: int, family: str = family, options: dict[str, Any] = options
        ) -> nn.Module:
            config = getattr(library, f"{family}Config")(**options, num_labels=CLASSES)
            network: nn.Module = getattr(library, f"{family}ForImageClassification")(config)
            return network

        yield Candidate(
            "transformers", family, f"{family}ForImageClassification", build, "logits"
        )


LIBRARIES = {"timm": of_timm, "torchvision": of_torchvision, "transformers": of_transformers}


def prepare(candidate: Candidate) -> tuple[nn.Module, int]:
    """Build the network of *candidate* for the smallest size that it computes, with statistics of images."""
    problem: Exception | None = None
    for side in SIDES:
        torch.manual_seed(0)
        try:
            network = candidate.build(side)
            network.eval()(torch.zeros(1, 3, side, side))
            draw_zero_weights(network)
            set_statistics(network, side)
        except Exception as error:  # the library's code can raise anything
            problem = error
        else:
            return network, side
    raise RuntimeError(f"no size of {SIDES} is computed: {problem}")


def draw_zero_weights(network: nn.Module) -> None:
    """Draw the weights of the linear layers in *network* that begin at zero, as some heads of timm do."""
    for part in network.modules():
        if isinstance(part, nn.Linear) and not part.weight.any():
            part.reset_parameters()


@torch.no_grad()
def set_statistics(network: nn.Module, side: int) -> None:
    """Set the statistics of batch norms in *network* to those of the images that the exporter compares.

    With those of a new network, the signal of some vanishes; with those of noise or with
    dropped branches, that of deep networks grows until rounding errors are as large as the
    logits. Returns to eval mode.
    """
    normalize = Normalize(Preprocess(resize=side, crop=side), torch.contiguous_format)
    images = normalize(torch.from_numpy(generated_images(side)))
    norms = [
        part
        for part in network.eval().modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def images(rules: Preprocess, count: int) -> np.ndarray[Any, Any]:
    """Draw images that no export has seen."""
    random = np.random.default_rng(5)
    return random.integers(0, 256, (count, rules.crop, rules.crop, 3), dtype=np.uint8)


@torch.no_grad()
def outputs(
    network: nn.Module, rules: Preprocess, key: Any, pixels: np.ndarray[Any, Any]
) -> torch.Tensor:
    """Compute the logits of *network*."""
    output = network(
        Normalize(rules, torch.contiguous_format)(torch.from_numpy(pixels)).contiguous()
    )
    logits = output if isinstance(output, torch.Tensor) else choose_output(output, key)
    return torch.as_tensor(logits)


def largest_difference(network: nn.Module, rules: Preprocess, key: Any, file: Path) -> float:
    """Compare *file* with *network*, relative to the largest logit."""
    session, differences, largest = ort.InferenceSession(str(file)), [], 0.0
    for size in BATCHES:
        pixels = images(rules, size)
        expected = outputs(network, rules, key, pixels).numpy()
        differences.append(
            float(np.abs(session.run(None, {"images": pixels})[0] - expected).max())
        )
        largest = max(largest, float(np.abs(expected).max()))
    return max(differences) / largest


def attempt(candidate: Candidate) -> Row:
    """Export *candidate* and describe the result."""
    row = Row(library=candidate.library, family=candidate.family, network=candidate.name)
    start = time.process_time()

    try:
        network, side = prepare(candidate)
    except RuntimeError as error:  # the network is none for single tensors of images
        return row.model_copy(update={"refused": str(error).partition("\n")[0]})

    rules = Preprocess(resize=side, crop=side)
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            exported = export_network(
                network,
                plain=lambda: candidate.build(side),
                labels=[f"class {number}" for number in range(CLASSES)],
                preprocess=rules,
                destination=folder,
                name="sweep",
                logits_key=candidate.logits_key,
            )
            drift = exported.parity.outputs["logits"].largest_drift
            file = exported.path / "model.onnx"
            difference = largest_difference(network, rules, candidate.logits_key, file)
            found = {
                "proof": exported.certificate.proof,
                "drift": drift,
                "difference": difference,
            }
        except SopdeployError as error:
            found = {"refused": str(error)}
        except Exception as error:  # a bug of the exporter, which the table must show
            found = {"crashed": f"{type(error).__name__}: {error}".partition("\n")[0]}

    seconds = round(time.process_time() - start, 1)
    return row.model_copy(update={"pixels": side, "seconds": seconds, **found})


def tables(rows: list[Row]) -> str:
    """Write the tables of docs/benchmarks/networks.md."""
    rows = sorted(rows, key=lambda row: (row.library, row.family))
    refused = [
        (
            row.library,
            f"`{row.network}`",
            row.pixels,
            (row.refused or row.crashed).replace("|", "\\|"),
        )
        for row in rows
        if not row.proof
    ]
    exported: dict[str, list[tuple[Any, ...]]] = {}
    for row in rows:
        if not row.proof:
            continue
        cells = (
            f"`{row.network}`{f' ({row.family})' if row.library == 'timm' else ''}",
            row.pixels,
            f"{row.drift:.1e}",
            "" if row.difference is None else f"{row.difference:.1e}",
        )
        exported.setdefault(row.library, []).append(cells)

    measured = ("pixels", "numerical error", "file differs by")
    found = [markdown(("library", "network", "pixels", "reason"), refused)]
    found += [markdown((library, *measured), cells) for library, cells in exported.items()]
    return "\n\n".join(found)


def main() -> None:
    """Try the networks that are not in the file of results, and print the tables of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--library", choices=LIBRARIES, action="append")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no network afterwards"
    )
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    rows = [Row.model_validate_json(line) for line in lines]
    for library in arguments.library or LIBRARIES:
        for candidate in LIBRARIES[library](
            {row.family for row in rows if row.library == library}
        ):
            if time.monotonic() > end:
                break
            row = attempt(candidate)
            line = row.model_dump_json(exclude_unset=True)
            print(line, file=sys.stderr, flush=True)
            rows.append(row)
            with arguments.results.open("a") as file:
                file.write(line + "\n")
    print(tables(rows))


if __name__ == "__main__":
    main()
