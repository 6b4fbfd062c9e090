"""Export networks of other people's repositories by `inspect` and the command that it prints.

    python benchmarks/two_commands.py FOLDER [--only NAME]

FOLDER has a checkout of each repository under the last part of its name, and its code stays as
it is. The weights are random, in a file that is made as the repository's training makes it. The
table of docs/benchmarks/networks.md says what the two commands did.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

STATE = "net.state_dict()"
RESULTS = "'epoch': 1, 'best_prec1': 1.0"
PARALLEL = f"{{{RESULTS}, 'arch': 'x', 'state_dict': torch.nn.DataParallel(net).state_dict()}}"
SINGLE = f"{{{RESULTS}, 'state_dict': {STATE}}}"
NET = f"{{'net': {STATE}, 'acc': 90.0, 'epoch': 1}}"


class Candidate(NamedTuple):
    """A network, what its training saves as code, and in *code* a module `mine` that builds it, if needed."""

    repository: str
    network: str
    saved: str
    options: tuple[str, ...] = ()
    pixels: int = 32
    logits: str | None = None
    code: str = ""


MIXTURE = """
from torch import nn
from moe import MoE
class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = MoE(input_size=3072, output_size=10, num_experts=10, hidden_size=128, k=4)
    def forward(self, images):
        return self.moe(images.flatten(1))
"""
DARTS = """
import genotypes
from model import NetworkCIFAR
def build():
    net = NetworkCIFAR(8, 10, 5, True, genotypes.DARTS_V2)
    net.drop_path_prob = 0.0
    return net
"""
COVARIANCE = """
from model_init import get_model
from src.representation import MPNCOV
def build():
    pooling = {"function": MPNCOV, "iterNum": 5, "is_sqrt": True, "is_vec": True, "input_dim": 512}
    return get_model("resnet18", {**pooling, "dimension_reduction": 32}, 10, 0)
"""
EXITING = """
from argparse import Namespace
import models
def build():
    scales = {"nScales": 3, "nChannels": 16, "growthRate": 6, "grFactor": [1, 2, 4], "bnFactor": [1, 2, 4]}
    blocks = {"nBlocks": 3, "base": 2, "stepmode": "even", "step": 1, "bottleneck": True}
    return models.msdnet(Namespace(**scales, **blocks, prune="max", reduction=0.5, data="cifar10"))
"""
SIMPLE_VIT = (
    "image_size=32",
    "patch_size=8",
    "num_classes=10",
    "dim=32",
    "depth=2",
    "heads=2",
    "mlp_dim=64",
)
EXITS = ("input_shape=(3,32,32)", "num_classes=10", "starting_filter=2")
CANDIDATES = [
    Candidate(
        "davidmrau/mixture-of-experts", "mine:Classifier", STATE, logits="0", code=MIXTURE
    ),
    Candidate(
        "AberHu/Knowledge-Distillation-Zoo",
        "network:define_tsnet",
        NET,
        ("name=resnet20", "num_class=10", "cuda=False"),
        logits="5",
    ),
    Candidate("quark0/darts/cnn", "mine:build", STATE, logits="0", code=DARTS),
    Candidate("eksuas/eenets.pytorch", "custom_eenet:CustomEENet", "net", EXITS, logits="0"),
    Candidate("lucidrains/vit-pytorch", "vit_pytorch.simple_vit:SimpleViT", STATE, SIMPLE_VIT),
    Candidate(
        "leaderj1001/BottleneckTransformers",
        "model:ResNet50",
        f"{{'model_state_dict': {STATE}, 'global_epoch': 1, 'best_acc': 1.0}}",
        ("num_classes=10", "resolution=(64,64)"),
        64,
    ),
    Candidate("chengyangfu/pytorch-vgg-cifar10", "vgg:vgg11_bn", SINGLE),
    Candidate(
        "luanyunteng/pytorch-be-your-own-teacher",
        "models.resnet:multi_resnet18_kd",
        PARALLEL,
        ("num_classes=10",),
        logits="0",
    ),
    Candidate("jiangtaoxie/fast-MPN-COV", "mine:build", PARALLEL, pixels=64, code=COVARIANCE),
    Candidate(
        "Jongchan/attention-module",
        "MODELS.model_resnet:ResidualNet",
        PARALLEL,
        ("network_type=CIFAR10", "depth=18", "num_classes=10", "att_type=CBAM"),
    ),
    Candidate("akamaster/pytorch_resnet_cifar10", "resnet:resnet20", PARALLEL),
    Candidate("junyuseu/pytorch-cifar-models", "models:resnet20_cifar", SINGLE),
    Candidate(
        "xternalz/WideResNet-pytorch",
        "wideresnet:WideResNet",
        PARALLEL,
        ("depth=10", "num_classes=10", "widen_factor=1"),
    ),
    Candidate(
        "kuangliu/pytorch-cifar", "models.shufflenetv2:ShuffleNetV2", NET, ("net_size=0.5",)
    ),
    Candidate(
        "weiaicunzai/pytorch-cifar100",
        "models.stochasticdepth:stochastic_depth_resnet18",
        STATE,
    ),
    Candidate(
        "bearpaw/pytorch-classification",
        "models.cifar.preresnet:preresnet",
        PARALLEL,
        ("num_classes=10", "depth=20"),
    ),
    Candidate(
        "lukemelas/EfficientNet-PyTorch",
        "efficientnet_pytorch:EfficientNet.from_name",
        PARALLEL,
        ("model_name=efficientnet-b0",),
        64,
    ),
    Candidate(
        "moskomule/senet.pytorch", "senet.se_resnet:se_resnet20", STATE, ("num_classes=10",)
    ),
    Candidate(
        "BangguWu/ECANet", "models.eca_resnet:eca_resnet18", PARALLEL, ("num_classes=10",), 64
    ),
    Candidate(
        "d-li14/mobilenetv2.pytorch",
        "models.imagenet:mobilenetv2",
        PARALLEL,
        ("width_mult=0.35",),
        64,
    ),
    Candidate("kalviny/MSDNet-PyTorch", "mine:build", PARALLEL, logits="-1", code=EXITING),
    Candidate(
        "ArchipLab-LinfengZhang/pytorch-self-distillation-final",
        "resnet:resnet18",
        STATE,
        ("num_classes=10",),
        logits="0.0",
    ),
]
SAVE = """
import sys
import torch
from sopdeploy_export.user_network.loading import network_builder
net = network_builder("network", sys.argv[1], sys.argv[3:])()
torch.save(eval(sys.argv[2]), "w.pth.tar")
"""


def attempt(candidate: Candidate, folder: Path) -> str:
    """Save the weights of *candidate*, run both commands, and describe the result in a row of the table."""
    place = folder.joinpath(*candidate.repository.split("/")[1:])
    with tempfile.TemporaryDirectory() as work:
        paths = os.pathsep.join([str(place), work, os.environ.get("PYTHONPATH", "")])
        Path(work, "mine.py").write_text(candidate.code, encoding="utf-8")

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                (sys.executable, *words),
                cwd=work,
                env={**os.environ, "PYTHONPATH": paths},
                capture_output=True,
                text=True,
                check=False,
            )

        saved = run("-c", SAVE, candidate.network, candidate.saved, *candidate.options)
        if saved.returncode:
            raise SystemExit(saved.stderr)
        options = [word for option in candidate.options for word in ("--option", option)]
        options += [
            "--network",
            candidate.network,
            "--preprocess",
            f"imagenet:{candidate.pixels}",
        ]
        options += [] if candidate.logits is None else ["--logits-key", candidate.logits]
        done = run("-m", "sopdeploy", "inspect", "w.pth.tar", *options, "--json")
        result = ""
        if not done.returncode:
            inspected = json.loads(done.stdout)
            names = "".join(f"class {number}\n" for number in range(inspected["num_classes"]))
            Path(work, "labels.txt").write_text(names, encoding="utf-8")
            done = run("-m", *shlex.split(inspected["command"]), "--json")
            if not done.returncode:
                removed = ", ".join(inspected["unused"]) or "nothing"
                result = f"{json.loads(done.stdout)['proof']} | {removed}"
    result = result or f"refused: {done.stderr.strip().splitlines()[-1]} | "
    return f"| {candidate.repository} | {candidate.network} | {candidate.pixels} | {result} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Try all networks, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    options = parser.parse_args(arguments)
    for candidate in CANDIDATES:
        if options.only in candidate.repository:
            print(attempt(candidate, options.folder.resolve()), flush=True)


if __name__ == "__main__":
    main()
