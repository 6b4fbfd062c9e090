"""`make sbom`: list the Python packages of an image as CycloneDX, from the lock it is built with.

The output is reproducible: it has no timestamp, and its serial number is a hash of the content. Python and
the system libraries belong to the base image and are not listed. Format: CycloneDX 1.6,
https://cyclonedx.org/docs/1.6/json/
"""

import hashlib
import re
import sys
import tomllib
import uuid
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License, LicenseAcknowledgement
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from locks import FOLDER, Locked, read_licences, read_lock
from packageurl import PackageURL

from sopdeploy import __version__

ROOT = Path(__file__).parents[1]
LOCKS = ("cpu", "gpu")
EXTRAS = ("sign", "oci")  # that `make lock` adds to `cpu` or `gpu`
NAMESPACE = uuid.UUID("5bd7a1a4-93b1-5c83-a9c4-6d1a0f0f7c11")
MARKER = "sopdeploy:marker"  # the platforms, as an environment marker


def licences(names: list[str]) -> list[License]:
    """Convert *names* to CycloneDX; a single name may be an SPDX expression."""
    factory, declared = LicenseFactory(), LicenseAcknowledgement.DECLARED
    if len(names) == 1:
        return [factory.make_from_string(names[0], license_acknowledgement=declared)]
    return [factory.make_with_name(name, acknowledgement=declared) for name in names]


def component(locked: Locked, declared: dict[str, list[str]]) -> Component:
    """Convert *locked* to a component with the hashes of all its files, of which one is installed."""
    purl = PackageURL("pypi", None, locked.name, locked.version)
    return Component(
        name=locked.name,
        version=locked.version,
        purl=purl,
        bom_ref=purl.to_string(),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=content) for content in locked.hashes],
        licenses=licences(declared[f"{locked.name}=={locked.version}"]),
        properties=[Property(name=MARKER, value=locked.marker)] if locked.marker else [],
    )


def direct_dependencies(lock: str) -> set[str]:
    """Read the names of the packages that pyproject.toml requires for the image of *lock*."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in (lock, *EXTRAS) for line in project["optional-dependencies"][extra]]
    return {re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0] for line in [*project["dependencies"], *extras]}


def make_sbom(lock: str, version: str = __version__) -> str:
    """Build the JSON text for the image of *lock* (`cpu` or `gpu`) of sopdeploy *version*."""
    purl = PackageURL("pypi", None, "sopdeploy", version)
    ours = Component(
        name="sopdeploy",
        version=version,
        type=ComponentType.APPLICATION,
        purl=purl,
        bom_ref=purl.to_string(),
        licenses=licences(["Apache-2.0"]),
    )
    declared = read_licences()
    components = [component(locked, declared) for locked in read_lock(FOLDER / f"{lock}.txt")]
    direct = direct_dependencies(lock)
    bom = Bom(components=components)
    bom.metadata.component = ours
    bom.metadata.timestamp = None  # type: ignore[assignment]  # like `cyclonedx-py --output-reproducible`
    bom.register_dependency(ours, [part for part in components if part.name in direct])
    bom.serial_number = NAMESPACE
    digest = hashlib.sha256(to_json(bom).encode()).hexdigest()
    bom.serial_number = uuid.uuid5(NAMESPACE, digest)
    return to_json(bom)


def to_json(bom: Bom) -> str:
    """Serialize *bom*."""
    outputter = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6)
    return outputter.output_as_string(indent=1) + "\n"


def write_all(folder: Path, version: str = __version__) -> list[Path]:
    """Write `sbom-LOCK.json` for each image into *folder*; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for lock in LOCKS:
        path = folder / f"sbom-{lock}.json"
        path.write_text(make_sbom(lock, version), encoding="utf-8")
        paths.append(path)
    return paths


if __name__ == "__main__":
    for path in write_all(ROOT / "dist"):
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")
