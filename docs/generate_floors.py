"""Generate the floors of ARCHITECTURE.md from the import contracts of pyproject.toml."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "ARCHITECTURE.md"
ROOMS = {  # the folder of each room's package, from the roof down
    "sopdeploy_commands": "commands/sopdeploy_commands",
    "sopdeploy_service": "service/sopdeploy_service",
    "sopdeploy_export": "export/sopdeploy_export",
    "sopdeploy": "sopdeploy",
}
_WIDTH = 120
_BLOCK = re.compile(r"(<!-- floors -->\n```text\n).*?(```\n)", re.DOTALL)


def floors() -> str:
    """List the folders and modules of each room: each imports only what stands behind it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = {
        one["containers"][0]: one["layers"] for one in contracts if one["type"] == "layers"
    }
    lines: list[str] = []
    for package, folder in ROOMS.items():
        line = f"{folder}:"
        for layer in layers[package]:
            name = layer.replace(" | ", ", ")
            separator = " " if line.endswith(":") else " > "
            if len(line) + len(separator) + len(name) > _WIDTH:
                lines.append(f"{line} >")
                line, separator = "   ", " "
            line += separator + name
        lines.append(line)
    return "\n".join(lines)


def architecture_page() -> str:
    """Return ARCHITECTURE.md with the floors of today's contracts."""
    page = PAGE.read_text(encoding="utf-8")
    return _BLOCK.sub(lambda block: f"{block[1]}{floors()}\n{block[2]}", page)
