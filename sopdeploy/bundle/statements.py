"""What the certificate of a bundle says: which statements an export proved, and which it measured.

Does not import torch.
"""

from typing import Literal

import pydantic

from sopdeploy.base.config import Text, parse_json
from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import CERTIFICATE
from sopdeploy.errors import BundleError

Evidence = Literal["proved", "measured"]
Statements = dict[Text, Evidence]  # by title, in the order of the export
_STATEMENTS = pydantic.TypeAdapter(Statements)


def read_statements(bundle: Bundle) -> Statements:
    """Return whether each statement of the certificate of *bundle* was proved or measured.

    Raises `BundleError` if the certificate says something else.
    """
    try:
        return _STATEMENTS.validate_python(
            parse_json(bundle.contents[CERTIFICATE])["statements"]
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{bundle.path / CERTIFICATE}: does not say what was proved and what was measured; export the "
            "bundle again"
        ) from error
