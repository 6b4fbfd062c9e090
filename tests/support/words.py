"""Words of pydantic's messages, which no message of this project has."""

import re

OF_PYDANTIC = re.compile(
    r"\binputs?\b|should|discriminator|Unable|permitted|validat|extract|\bpars|python|instance|Assertion|"
    r"Value error|Field required|function-|constrained|pydantic",
    re.IGNORECASE,
)
