"""What the certificate of a bundle says: which statements an export proved, and which it measured.

Does not import torch. Certificates of versions 0.1.0 and 0.2.0 do not list their statements.
"""

from typing import Literal

import pydantic

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import CERTIFICATE
from sopdeploy.config import Text, parse_json
from sopdeploy.errors import BundleError

Evidence = Literal["proved", "measured"]
Statements = dict[Text, Evidence]  # by title, in the order of the export
OF_0_1_0: Statements = {
    "Tensors": "proved",
    "Graphs": "proved",
    "Batch sizes": "proved",
    "Outputs": "measured",
    "Repetition": "measured",
    "ONNX": "proved",
    "Images": "proved",
    "File": "measured",
}
OF_0_2_0: Statements = {
    "Removed": "proved",
    "Graph": "proved",
    "Plain run": "proved",
    "Images": "proved",
    "File": "measured",
}
_STATEMENTS = pydantic.TypeAdapter(Statements)


def read_statements(bundle: Bundle) -> Statements:
    """Return whether each statement of the certificate of *bundle* was proved or measured.

    Raises `BundleError` if the certificate says something else.
    """
    try:
        certificate = parse_json(bundle.contents[CERTIFICATE])
        # Only version 0.1.0 captured a second graph.
        earlier = OF_0_1_0 if "batch_of_one" in certificate["roots"] else OF_0_2_0
        return _STATEMENTS.validate_python(certificate.get("statements", earlier))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{bundle.path / CERTIFICATE}: does not say what was proved and what was measured; export the "
            "bundle again"
        ) from error
