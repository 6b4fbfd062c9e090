"""Where the packages of this checkout are."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "sopdeploy": ROOT / "sopdeploy",
    "sopdeploy_export": ROOT / "export" / "sopdeploy_export",
    "sopdeploy_service": ROOT / "service" / "sopdeploy_service",
    "sopdeploy_commands": ROOT / "commands" / "sopdeploy_commands",
    "sopdeploy_papers": ROOT / "plugins" / "papers" / "sopdeploy_papers",
}
PYTHONPATH = os.pathsep.join(str(folder.parent) for folder in PACKAGES.values())
