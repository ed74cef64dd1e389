"""Field types of the settings: numbers that may arrive as text, pixel radii, and the base class."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
)
from pydantic_core import PydanticCustomError


class UserError(ValueError):
    """Something a user can mend; its text is all that is shown, without a traceback."""


class ConfigError(UserError):
    """A setting: the text names the key, the value and what was expected."""


class Settings(BaseModel):
    """Base of every settings class: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Extended(Settings):
    """Settings that gained keys: those in `gained` are written only where set, so that older fingerprints hold."""

    gained: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def leave_out_unset(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """All keys but the gained ones that stand at their default."""
        fields = type(self).model_fields
        unset = {key for key in self.gained if getattr(self, key) == fields[key].default}
        return {key: value for key, value in write(self).items() if key not in unset}


def parse_number(value: Any) -> Any:
    """Turn text such as `8/255`, `1e-3` or `7` into the number it spells; leave everything else to pydantic."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "a number, not true or false")
    if isinstance(value, str):
        try:
            fraction = Fraction(value.replace(" ", ""))
        except (ValueError, ZeroDivisionError):
            raise PydanticCustomError("number", "a number such as 0.05, 1e-3 or 8/255") from None
        return int(fraction) if fraction.denominator == 1 and "." not in value and "e" not in value else float(fraction)
    return value


def in_pixel_units(value: float) -> float:
    """Refuse a radius above 1: someone wrote it on the 0-255 scale."""
    if value > 1:
        raise PydanticCustomError(
            "pixel_units", "a length in pixel units of [0, 1]: write {text}/255", {"text": f"{value:g}"}
        )
    return value


NUMBER_SCHEMA = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[-+0-9.eE/ ]+$"}]}

Number = Annotated[float, BeforeValidator(parse_number), WithJsonSchema(NUMBER_SCHEMA)]
Int = Annotated[int, BeforeValidator(parse_number), WithJsonSchema(NUMBER_SCHEMA)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[Int, Field(ge=1)]
Natural = Annotated[Int, Field(ge=0)]
PixelLength = Annotated[Number, Field(gt=0), AfterValidator(in_pixel_units)]
