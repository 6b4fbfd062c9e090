"""Networks as tutorials write them are exported with proof, or refused for a reason that the pages list."""

from contextlib import nullcontext
from pathlib import Path

import pytest
from torch import nn

from sopdeploy.errors import ConfigError, SopdeployError
from sopdeploy_export.options import ExportOptions
from tests.export.once import proving_once
from tests.export.user_network import idioms, networks

QUICK, RANGE = ExportOptions(max_batch=1), ExportOptions()
BY_SIZE = ("average pooling with ceil_mode", "attention between views", "flatten of tokens")


@pytest.mark.parametrize("case", idioms.EXPORTED)
def test_it_is_exported_with_proof(case: str, tmp_path: Path) -> None:
    build, options, proof = idioms.EXPORTED[case]
    network = networks.trained(build())
    options = {"options": RANGE if case in BY_SIZE else QUICK} | options
    with nullcontext() if case in BY_SIZE else proving_once(alone=True):
        exported = networks.export_small(network, tmp_path, **options)
    assert exported.certificate.proof == proof
    assert exported.certificate.mixes_images == ()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", idioms.REFUSED)
def test_it_is_refused_in_one_line_that_names_the_remedy(case: str, tmp_path: Path) -> None:
    build, options, message = idioms.REFUSED[case]
    network: nn.Module = build().eval()
    with pytest.raises(SopdeployError, match=message) as error:
        networks.export_small(network, tmp_path, **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_invalid_option_is_named_as_by_the_command_line() -> None:
    with pytest.raises(ConfigError, match=r"max_drop: Input should be a finite number \(got 'inf'\)"):
        ExportOptions(max_drop=float("inf"))
