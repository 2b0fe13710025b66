"""What the sections of the configuration share: ranges, and a model that refuses unknown keys and wrong types."""

import math
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

__all__ = ["Alpha", "Count", "NonNegative", "Positive", "Section", "Share"]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value


Positive = Annotated[float, Field(gt=0), AfterValidator(_finite)]
NonNegative = Annotated[float, Field(ge=0), AfterValidator(_finite)]
Count = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0, lt=1, description="failure probability")]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A section of the configuration: immutable; unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
