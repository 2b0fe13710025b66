"""The loss of a base classifier that is trained here."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from core.config.values import Count, NonNegative, Positive, Section

__all__ = ["LossConfig"]

_KEYS = {
    "gaussian": "copies",
    "consistency": "copies weight eta",
    "macer": "copies weight beta gamma deferred",
    "smoothmix": "copies weight steps step_size one_step warmup",
    "cat_rs": "copies weight steps epsilon",
    "smoothadv": "copies steps epsilon warmup",
}


class LossConfig(Section):
    """What is minimised, the name alone or with numbers of your own; the published ones for CIFAR-10 unless given."""

    name: Literal["gaussian", "consistency", "macer", "smoothmix", "cat_rs", "smoothadv"] = "gaussian"
    """`gaussian` (Cohen 2019), `consistency` (Jeong & Shin 2020), `macer` (Zhai 2020), `smoothmix` (Jeong 2021),
    `cat_rs` (Jeong 2023), `smoothadv` (Salman 2019, PGD)."""
    copies: Count | None = None
    """Noisy copies of each image in a step, m: 1, 2, 16, 2, 4 and 4 unless given."""
    weight: NonNegative | None = None
    """Of what is added to the cross-entropy. For sigma = .25, .5, 1: `consistency` 20, 10, 10; `macer` 12, 4, 12;
    `cat_rs` .5, 1, 2; `smoothmix` 5. Other sigmas take the nearest one's."""
    eta: NonNegative = 0.5
    """Weight of the entropy (`consistency`)."""
    beta: Positive = 16.0
    """Inverse temperature of the softmax whose radius is maximised (`macer`)."""
    gamma: Positive = 8.0
    """Margins Phi^-1(pA) - Phi^-1(pB) beyond this one are not raised further (`macer`)."""
    deferred: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training before the radius counts (`macer`; published for sigma = 1: up to the first drop of the
    learning rate, 200 of 440 epochs)."""
    steps: Count | None = None
    """Of the attack: 4 for `smoothmix` and `cat_rs`, 10 for `smoothadv` unless given."""
    step_size: Positive | None = None
    """l2 length of a step of the attack (`smoothmix`), pixel scale [0, 1]: .5, 1, 2 for sigma = .25, .5, 1 unless
    given; `cat_rs` and `smoothadv` take 2 epsilon / steps."""
    one_step: bool = False
    """Put the image after the first step of the attack in the clean one's place (`smoothmix`)."""
    epsilon: Positive | None = None
    """l2 radius of the attack, pixel scale [0, 1]: 1 for `cat_rs`; 1, 1, 2 for `smoothadv` at sigma = .25, .5, 1 unless
    given."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 1 / 15
    """Share of the training in which the attack (`smoothadv`) or the weight of the mixture (`smoothmix`) grows linearly
    from 0; published: 10 epochs of 150."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _only_where_they_count(self) -> Self:
        own = _KEYS[self.name].split()
        for key, field in type(self).model_fields.items():  # not those that were given: a manifest gives all of them
            if key not in ("name", *own) and getattr(self, key) != field.default:
                raise ValueError(f"{key}: loss {self.name} has no such number; it has {', '.join(own)}")
        if self.name == "consistency" and self.copies == 1:
            raise ValueError("copies: 1 copy is always consistent with itself; loss consistency needs 2 or more")
        return self
