"""Detach branches of networks in other people's repositories, whose code stays as it is.

    python benchmarks/branches.py FOLDER --results FILE [--only NAME]

FOLDER has a checkout of each repository under the last part of its name. Weights are random,
batch norms have the statistics of the exporter's images. For each network, `unused_modules`
names what the chosen output does not depend on; the network is exported without that, and the
file is compared with it on other images in batches of 1, 2, 3 and 7. Each network runs in a
process of its own, because repositories use the same names for their modules. FILE has a line
of JSON per network; the printed table is that of docs/benchmarks/networks.md.
"""

import argparse
import ast
import contextlib
import io
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import torch
from measure import markdown
from torch import nn

from sopdeploy import Preprocess, export_network, unused_modules
from sopdeploy.config import StrictModel
from sopdeploy.errors import SopdeployError, first_line
from sopdeploy.layers.normalize import Normalize
from sopdeploy_export.capture.deployed import choose_output, generated_images

BATCHES = (1, 2, 3, 7)
BatchNorm = nn.modules.batchnorm._BatchNorm


class Row(StrictModel):
    """What became of a network: its `proof` with what was `removed`, or why it is `refused`."""

    kind: str
    repository: str
    network: str
    pixels: int
    proof: str = ""
    removed: str = ""
    percent: float = 0.0  # of the bytes of all tensors
    difference: float = 0.0  # of the file, relative to the largest logit
    refused: str = ""
    crashed: str = ""
    seconds: float = 0.0


class Candidate(NamedTuple):
    """A network to try: Python code that builds it in the folder of its repository, and what to export."""

    kind: str
    repository: str
    folder: str
    code: str  # the last line is an expression
    key: str | int | None
    pixels: int
    allow_constants: bool = False


MSDNET = """from argparse import Namespace
from models.{0} import {1} as net
net(Namespace(nBlocks=3, base=2, step=2, stepmode="even", nChannels=8, data="cifar10", growthRate=4,
    grFactor=[1, 2, 4], bnFactor=[1, 2, 4], nScales=3, prune="max", reduction=0.5, bottleneck=True, T=1.0,
    gamma=0.1, pretrained=None))"""
SDN = {"num_classes": 10, "augment_training": False, "input_size": 32, "init_weights": True}
RESNET_SDN = {
    **SDN,
    "num_blocks": [2, 2, 2],
    "block_type": "basic",
    "add_ic": [[0, 1], [1, 0], [1, 0]],
}
WRN_SDN = {
    **SDN,
    "num_blocks": [1, 1, 1],
    "widen_factor": 1,
    "dropout_rate": 0.3,
    "add_ic": [[1], [1], [0]],
}
MOBILE_SDN = {
    **SDN,
    "cfg": [64, (128, 2), 128, (256, 2), (512, 2), (1024, 2)],
    "add_ic": [0, 1, 0, 1, 0, 0],
}
WSOL = "acol_drop_threshold=0.6, adl_drop_rate=0.75, adl_drop_threshold=0.8"
# fmt: off
CANDIDATES = [
    Candidate("deep supervision", "ArchipLab-LinfengZhang/contrastive-deep-supervision", "CIFAR",
        "import resnet\nresnet.resnet18(num_classes=10)", None, 32),
    Candidate("deep supervision", "DingXiaoH/RepVGG", "",
        "from repvggplus import RepVGGplus\nRepVGGplus(num_blocks=[1, 2, 4, 1], num_classes=10, "
        "width_multiplier=[0.5, 0.5, 0.5, 0.5], deploy=False, use_post_se=True)", "main", 64),
    Candidate("deep supervision", "winycg/HSAKD", "",
        "from models.wrn import wrn_16_2_aux\nwrn_16_2_aux(num_classes=10)", 0, 32),
    Candidate("deep supervision", "winycg/HSAKD", "",
        "from models.resnet import resnet20_aux\nresnet20_aux(num_classes=10)", 0, 32),
    Candidate("deep supervision", "winycg/HSAKD", "",
        "from models.ShuffleNetv1 import ShuffleV1_aux\nShuffleV1_aux(num_classes=10)", 0, 32),
    Candidate("self-distillation", "luanyunteng/pytorch-be-your-own-teacher", "",
        "from models.resnet import multi_resnet18_kd\nmulti_resnet18_kd(num_classes=10)", 0, 32),
    Candidate("self-distillation", "ArchipLab-LinfengZhang/pytorch-self-distillation-final", "",
        "import resnet\nresnet.resnet18(num_classes=10)", "0.0", 32),
    Candidate("early exits", "kalviny/MSDNet-PyTorch", "", MSDNET.format("msdnet", "MSDNet"), -1, 32),
    Candidate("early exits", "kalviny/MSDNet-PyTorch", "", MSDNET.format("msdnet", "MSDNet"), 0, 32),
    Candidate("early exits", "kalviny/IMTA", "", MSDNET.format("msdnet_ge", "msdnet_ge"), "0.-1", 32),
    *(
        Candidate(
            "early exits",
            "yigitcankaya/Shallow-Deep-Networks",
            "",
            f"import network_architectures\nfrom architectures.SDNs.{name}_SDN import {name}_SDN as net\n"
            f"net({options!r})",
            -1,
            32,
        )
        for name, options in (
            ("ResNet", RESNET_SDN),
            ("WideResNet", WRN_SDN),
            ("MobileNet", MOBILE_SDN),
        )
    ),
    Candidate("auxiliary classifiers", "Lornatang/GoogLeNet-PyTorch", "",
        "from model import GoogLeNet\nGoogLeNet(num_classes=10, aux_logits=True, transform_input=False)",
        None, 96),
    Candidate("auxiliary classifiers", "WZMIAOMIAO/deep-learning-for-image-processing",
        "pytorch_classification/Test4_googlenet",
        "from model import GoogLeNet\nGoogLeNet(num_classes=10, aux_logits=True, init_weights=False)", None,
        96),
    Candidate("auxiliary classifiers", "GuYuc/WS-DAN.PyTorch", "",
        "from models.inception import Inception3\nInception3(num_classes=10, aux_logits=True)", None, 299),
    Candidate("attention dropping", "GuYuc/WS-DAN.PyTorch", "",
        "from models.wsdan import WSDAN\nWSDAN(num_classes=10, M=4, net='resnet34')", 0, 64),
    Candidate("attention dropping", "clovaai/wsolevaluation", "",
        f"from wsol import resnet\nresnet.resnet50('acol', False, num_classes=10, {WSOL})", "logits", 64),
    Candidate("attention dropping", "clovaai/wsolevaluation", "",
        f"from wsol import resnet\nresnet.resnet50('adl', False, num_classes=10, {WSOL})", "logits", 64),
    Candidate("attention dropping", "clovaai/wsolevaluation", "",
        f"from wsol import resnet\nresnet.resnet50('spg', False, num_classes=10, {WSOL})", "logits", 64),
    Candidate("attention dropping", "clovaai/wsolevaluation", "",
        f"from wsol import vgg\nvgg.vgg16('acol', False, large_feature_map=False, num_classes=10, {WSOL})",
        "logits", 64),
    Candidate("attention dropping", "clovaai/wsolevaluation", "",
        f"from wsol import vgg\nvgg.vgg16('spg', False, large_feature_map=False, num_classes=10, {WSOL})",
        "logits", 64),
    Candidate("multi-branch fine-grained", "PRIS-CV/PMG-Progressive-Multi-Granularity-Training", "",
        "import Resnet\nfrom model import PMG\nPMG(Resnet.ResNet(Resnet.Bottleneck, [1, 1, 1, 1]), 64, 10)",
        3, 448),
    Candidate("multi-branch fine-grained", "PRIS-CV/PMG-Progressive-Multi-Granularity-Training", "",
        "import Resnet\nfrom model import PMG\nPMG(Resnet.ResNet(Resnet.Bottleneck, [1, 1, 1, 1]), 64, 10)",
        2, 448),
    Candidate("multi-branch fine-grained", "yangze0930/NTS-Net", "",
        "from torch.utils import model_zoo\nfrom core import resnet\n"
        "built = resnet.ResNet(resnet.Bottleneck, [3, 4, 6, 3])\n"
        "model_zoo.load_url = lambda _: built.state_dict()\n"  # instead of a download
        "from core.model import attention_net\nattention_net(topN=2)", 0, 448),
    Candidate("multi-branch fine-grained", "JDAI-CV/DCL", "../pretrained-models.pytorch",
        "from argparse import Namespace\nimport config\nconfig.pretrained_model.clear()\n"
        "from models.LoadModel import MainModel\n"
        "MainModel(Namespace(use_dcl=True, numcls=10, backbone='resnet50', use_Asoftmax=False, cls_2=True, "
        "cls_2xmul=False))", 0, 128),
    Candidate("multi-branch fine-grained", "chou141253/FGVC-PIM", "",
        "from models.builder import build_resnet50\nbuild_resnet50('', img_size=128, fpn_size=64, "
        "num_classes=10, num_selects={'layer1': 32, 'layer2': 32, 'layer3': 32, 'layer4': 16})", "comb_outs",
        128),
    Candidate("projection head", "xuguodong03/SSKD", "",
        "from wrapper import wrapper\nfrom models.resnet import resnet20\nwrapper(resnet20(num_classes=10))",
        0, 32),
    Candidate("projection head", "xuguodong03/SSKD", "",
        "from wrapper import wrapper\nfrom models.vgg import vgg8_bn\nwrapper(vgg8_bn(num_classes=10))", 0,
        32),
    Candidate("projection head", "FlamieZhu/Balanced-Contrastive-Learning", "",
        "from models.resnext import BCLModel\nBCLModel(num_classes=10, name='resnet50', feat_dim=128)", 1,
        64),
    Candidate("re-parameterization", "DingXiaoH/RepVGG", "",
        "from repvgg import RepVGG\nRepVGG([1, 1, 2, 1], num_classes=10, width_multiplier=[0.5] * 4)", None,
        64),
    Candidate("re-parameterization", "apple/ml-mobileone", "",
        "from mobileone import mobileone\nmobileone(num_classes=10, variant='s0')", None, 64),
    Candidate("re-parameterization", "DingXiaoH/DiverseBranchBlock", "",
        "from convnet_utils import switch_conv_bn_impl\nswitch_conv_bn_impl('DBB')\nimport resnet\n"
        "resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10, width_multiplier=0.25)", None, 64,
        allow_constants=True),
]
# fmt: on


def build(candidate: Candidate, folder: Path) -> nn.Module:
    """Run the code of *candidate* in its repository below *folder*."""
    place = folder / candidate.repository.partition("/")[2]
    sys.path[:0] = [str(place / candidate.folder), str(place)]
    *statements, last = ast.parse(candidate.code).body
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(ast.Module(statements, []), "table", "exec"), names)  # noqa: S102 # the repository's code
    network: nn.Module = eval(ast.unparse(last), names)  # noqa: S307
    norms = [part.train() for part in network.eval().modules() if isinstance(part, BatchNorm)]
    for norm in norms:
        norm.momentum = None  # so that the statistics become those of the images
    with torch.no_grad(), contextlib.suppress(Exception):  # `attempt` says why it fails
        rules = Preprocess(resize=candidate.pixels, crop=candidate.pixels)
        pixels = torch.from_numpy(generated_images(candidate.pixels)[-4:])
        network(Normalize(rules, torch.contiguous_format)(pixels).contiguous())
    return network.eval()


def attempt(candidate: Candidate, folder: Path) -> Row:
    """Export the network of *candidate* without what its output does not depend on; print nothing."""
    with contextlib.redirect_stdout(io.StringIO()):  # networks print while they are built
        return _attempt(candidate, folder)


def _attempt(candidate: Candidate, folder: Path) -> Row:
    row = Row(
        kind=candidate.kind,
        repository=candidate.repository,
        network=candidate.code.split("\n")[-1].partition("(")[0],
        pixels=candidate.pixels,
    )
    rules, started = (
        Preprocess(resize=candidate.pixels, crop=candidate.pixels),
        time.monotonic(),
    )
    try:
        network = build(candidate, folder)
    except Exception as error:  # the repository's code
        return row.model_copy(update={"crashed": f"cannot be built: {first_line(error)}"})
    key: Any = candidate.key
    row = row.model_copy(
        update={
            "network": f"{type(network).__name__}{'' if key is None else f', output {key}'}"
        }
    )
    try:
        parts = unused_modules(network, rules, key)
        with tempfile.TemporaryDirectory() as out:
            classes = int(outputs(network, rules, key, images(rules, 1)).shape[1])
            exported = export_network(
                network,
                training_only=parts,
                labels=[f"c{i}" for i in range(classes)],
                preprocess=rules,
                destination=out,
                name="network",
                logits_key=key,
                allow_constants=candidate.allow_constants,
            )
            difference = largest_difference(network, rules, key, exported.path / "model.onnx")
        certificate = exported.certificate
        total = sum(
            entry.bytes
            for entry in (*certificate.removed, *certificate.kept, *certificate.unreached)
        )
        return row.model_copy(
            update={
                "proof": certificate.proof,
                "removed": ", ".join(parts),
                "percent": round(100 * certificate.bytes_removed / total, 1),
                "difference": difference,
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    except SopdeployError as error:
        return row.model_copy(
            update={"refused": str(error), "seconds": round(time.monotonic() - started, 1)}
        )
    except Exception as error:  # a bug of the export
        return row.model_copy(update={"crashed": f"{type(error).__name__}: {error}"})


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


def in_processes(folder: Path, candidates: Sequence[Candidate]) -> Iterator[Row]:
    """Try each of *candidates* in a process of its own."""
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        yield from pool.imap(partial(attempt, folder=folder), candidates)


def table(rows: list[Row]) -> str:
    """Write the table of the page."""
    head = (
        "kind",
        "repository",
        "network",
        "pixels",
        "result",
        "removed",
        "of the bytes",
        "file differs by",
    )
    cells = []
    for row in rows:
        result = row.proof or (
            f"refused: {row.refused}" if row.refused else f"fails: {row.crashed}"
        )
        numbers = (f"{row.percent:g} %", f"{row.difference:.0e}") if row.proof else ("", "")
        removed = row.removed or (
            "nothing: the output depends on all parts" if row.proof else ""
        )
        cells.append(
            (row.kind, row.repository, row.network, row.pixels, result, removed, *numbers)
        )
    return markdown(head, cells)


def main() -> None:
    """Try all networks, write the results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument(
        "--only", default="", help="a part of the repository's name or of the code"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [found for found in CANDIDATES if arguments.only in found.repository + found.code]
    for row in in_processes(arguments.folder, chosen):
        print(row.model_dump_json(exclude_defaults=True), flush=True)
        with arguments.results.open("a", encoding="utf-8") as file:
            file.write(f"{row.model_dump_json()}\n")
    lines = arguments.results.read_text(encoding="utf-8").splitlines()
    print(table([Row.model_validate_json(line) for line in lines]))


if __name__ == "__main__":
    main()
