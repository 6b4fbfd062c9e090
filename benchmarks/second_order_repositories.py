"""Import or export checkpoints of second-order networks in other people's repositories, by commands.

    python benchmarks/second_order_repositories.py FOLDER --results FILE [--only NAME]

FOLDER has a checkout of each repository under the last part of its name; its code stays as it is and builds
the network with random weights, because released weights could not be downloaded. The checkpoint has the
keys that the repository's training writes. The exported file is compared with the repository's network on
other images in batches of 1, 2, 3 and 7. FILE has a line of JSON per network.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from branches import Candidate, build, largest_difference
from torch import nn

from sopdeploy import Preprocess


class Repository(NamedTuple):
    """A network, what its training writes beside `state_dict`, and the command that makes it a checkpoint.

    Without *model*, the network is exported by `--network` and *options*, in *folder*.
    """

    name: str
    folder: str
    code: str
    saved: dict[str, object] | None  # None: the state dict itself
    model: str | None = None
    options: tuple[str, ...] = ()
    pixels: int = 224


POSITIONS = [["0"] * (count - 1) + ["1"] for count in (3, 4, 6, 3)]
SAVED = {"epoch": 1, "best_prec1": 0.0, "optimizer": {"state": {}, "param_groups": []}}
REPOSITORIES = [
    Repository(
        "jiangtaoxie/fast-MPN-COV",
        "",
        "from model_init import get_model\nfrom src.representation import MPNCOV\n"
        "get_model('mpncovresnet50', {'function': MPNCOV, 'iterNum': 5, 'is_sqrt': True, 'is_vec': True, "
        "'input_dim': 2048, 'dimension_reduction': 256}, 1000, 0)",
        {**SAVED, "arch": "mpncovresnet50"},
        "isqrt-resnet50",
    ),
    Repository(
        "ZilinGao/Global-Second-order-Pooling-Convolutional-Networks",
        "torchvision",
        f"from models.resnet import resnet50\nresnet50(att_position={POSITIONS}, att_dim=128, GSoP_mode=1)",
        {**SAVED, "arch": "resnet50"},
        "gsop-net1-resnet50",
    ),
    Repository(
        "mingzeG/DropCov",
        "CNNs",
        "from models.ResNet_ACD import resnet18_ACD\nresnet18_ACD()",
        {**SAVED, "arch": "resnet18_ACD"},
        options=("--network", "models.ResNet_ACD:resnet18_ACD", "--training-only", "eca_layer"),
    ),
    Repository(
        "HaoMood/bilinear-cnn",
        "src",
        "from bilinear_cnn_all import BCNN\nBCNN()",
        None,
        options=("--network", "bilinear_cnn_all:BCNN"),
        pixels=448,
    ),
]


def attempt(repository: Repository, folder: Path) -> dict[str, object]:
    """Save a checkpoint, convert it by commands, and compare the file with the repository's network."""
    pixels = repository.pixels
    candidate = Candidate("second order", repository.name, repository.folder, repository.code, None, pixels)
    network = build(candidate, folder)
    rules = Preprocess(resize=256 if pixels == 224 else pixels, crop=pixels)
    place = folder / repository.name.partition("/")[2] / repository.folder
    with tempfile.TemporaryDirectory() as work:
        file, checkpoint, bundles = (str(Path(work, name)) for name in ("w.pth.tar", "ckpt.pt", "bundles"))
        state = nn.DataParallel(network).state_dict()
        torch.save(state if repository.saved is None else {**repository.saved, "state_dict": state}, file)
        if repository.model is not None:
            run("import", file, "--as", repository.model, "--out-file", checkpoint, folder=place)
            exported = run("export", checkpoint, "--out", bundles, "--json", folder=place)
        else:
            Path(work, "names.txt").write_text("".join(f"c{i}\n" for i in range(classes(network))))
            options = (
                *repository.options,
                "--preprocess",
                f"imagenet:{pixels}",
                "--labels",
                f"{work}/names.txt",
            )
            exported = run("export", file, *options, "--out", bundles, "--json", folder=place)
        answer = json.loads(exported)
        difference = largest_difference(network, rules, None, Path(answer["bundle"], "model.onnx"))
        logits = answer["parity"]["outputs"]["logits"]
    drift = max(logits["drift"].values()) / logits["noise_floor"]
    return {"repository": repository.name, "proof": answer["proof"], "floors": drift, "differs": difference}


def classes(network: nn.Module) -> int:
    """Return the number of outputs of the last linear layer."""
    return [part for part in network.modules() if isinstance(part, nn.Linear)][-1].out_features


def run(*command: str, folder: Path) -> str:
    """Run a command of sopdeploy in *folder*; return what it prints."""
    program = (sys.executable, "-m", "sopdeploy", *command)
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """Try all networks, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--only", default="")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for repository in REPOSITORIES:
        if options.only in repository.name:
            line = json.dumps(attempt(repository, options.folder.resolve()))
            print(line, flush=True)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")


if __name__ == "__main__":
    main()
