"""What the sections of the configuration share: ranges, and a model that refuses unknown keys and wrong types."""

import math
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from core.addresses import check_address
from core.errors import ConfigError

__all__ = ["Alpha", "Augment", "Count", "NonNegative", "Positive", "Section", "Share"]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value


Positive = Annotated[float, Field(gt=0), AfterValidator(_finite)]
NonNegative = Annotated[float, Field(ge=0), AfterValidator(_finite)]
Count = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0, lt=1, description="failure probability")]
Share = Annotated[float, Field(gt=0, le=1)]
Augment = Literal["none", "flip", "crop_flip", "resized_crop"]
"""What is done to a training image in each epoch, see `core.training.augment`."""


class Section(BaseModel):
    """A section of the configuration: immutable; unknown keys, wrong types and addresses with secrets are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        for key, value in self:
            if isinstance(value, str):
                try:
                    check_address(value, key)
                except ConfigError as error:
                    raise ValueError(str(error)) from None
        return self
