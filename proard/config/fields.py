"""Field types of the settings (numbers that may be given as text, pixel radii) and the base class."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError


class UserError(ValueError):
    """An error that a user can correct; only its text is shown, without a traceback."""


class ConfigError(UserError):
    """An error in a setting: the text names the key, the value and what was expected."""


class DataError(UserError):
    """An error in the user's images or labels: the text names the file, and the row or class."""


def shown(value: Any) -> str:
    """A value as part of a line; of a long one only the beginning."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


class Settings(BaseModel):
    """Base class of all settings: immutable; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


LARGEST_INT = 2**63 - 1
FOLDER_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.=-]*"


def parse_number(value: Any) -> Any:
    """Convert text such as `8/255`, `1e-3` or `7` into a number; return everything else unchanged for pydantic.

    A number that a float cannot represent is refused; so are infinities and NaN.
    """
    if isinstance(value, bool):
        raise PydanticCustomError("number", "a number, not true or false")
    try:
        number = _spelled(value.replace(" ", "")) if isinstance(value, str) else value
        is_finite = not isinstance(number, (int, float)) or math.isfinite(number)
    except OverflowError:  # an integer or a fraction too large for a float
        is_finite = False
    except (ValueError, ZeroDivisionError):
        raise PydanticCustomError("number", "a number such as 0.05, 1e-3 or 8/255") from None
    if not is_finite:
        raise PydanticCustomError("number", "a finite number, at most 1.7e308")
    return number


def _spelled(text: str) -> float:
    """The number in a text: an exact integer if it is written as one."""
    if "/" not in text:
        rough = float(text)  # before the exact value: 1e999999999 has too many digits to compute it
        if rough == 0 or not math.isfinite(rough):
            return rough
    fraction = Fraction(text)
    return int(fraction) if fraction.denominator == 1 and not re.search("[.eE]", text) else float(fraction)


def in_64_bits(value: int) -> int:
    """Refuse an integer too large for tensors and generators."""
    if abs(value) > LARGEST_INT:
        raise PydanticCustomError("integer", "an integer below 9.2e18")
    return value


def in_pixel_units(value: float) -> float:
    """Refuse a radius above 1: it was probably given on the 0-255 scale."""
    if value > 1:
        raise PydanticCustomError(
            "pixel_units", "a length in pixel units of [0, 1]: write {text}/255", {"text": f"{value:g}"}
        )
    return value


def folder_name(value: str) -> str:
    """Refuse a text that is not a plain folder name: `..` would lead out of the run's folder."""
    if not re.fullmatch(FOLDER_NAME, value):
        raise PydanticCustomError("name", "letters, digits, _ . = and -, beginning with a letter, a digit or _")
    return value


def class_names(value: Any) -> Any:
    """Refuse class names that YAML read as another type for lack of quotes, and values that are not a list of names."""
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9.]+", value):  # a number of classes from the command line
        return value
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise PydanticCustomError("classes", "a list of names; quote numbers, yes and no")
    if len(value) < 2:
        raise PydanticCustomError("classes", "a list of names, at least two")
    if len(set(value)) < len(value):
        raise PydanticCustomError("classes", "a list of different names")
    return value


def names_differ(field: str, *reserved: str) -> Any:
    """A validator for the body of a settings class: entries of a field have different names, none of them reserved."""

    def check(settings: Any) -> Any:
        names = [entry.name for entry in getattr(settings, field)]
        wrong = sorted({name for name in names if names.count(name) > 1 or name in reserved})
        if wrong:
            kept = f" other than {' and '.join(f'`{name}`' for name in reserved)}" if reserved else ""
            found = f"they are {names}" if len(names) < 10 else f"repeated or reserved: {', '.join(wrong)}"
            raise ValueError(f"{field} need different names{kept}; {found}")
        return settings

    return model_validator(mode="after")(check)


def as_tuple(value: Any) -> Any:
    """A list as a tuple; a single entry needs no list."""
    if value is None:
        raise PydanticCustomError("one_or_more", "one entry, or a list")
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def without_list(entries: tuple[Any, ...]) -> Any:
    """A single entry as it may be written: alone."""
    return entries[0] if len(entries) == 1 else list(entries)


NUMBER_SCHEMA = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[-+0-9.eE/ ]+$"}]}

Number = Annotated[float, BeforeValidator(parse_number), WithJsonSchema(NUMBER_SCHEMA)]
Int = Annotated[int, BeforeValidator(parse_number), AfterValidator(in_64_bits), WithJsonSchema(NUMBER_SCHEMA)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
UnitInterval = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[Int, Field(ge=1)]
Natural = Annotated[Int, Field(ge=0)]
PixelLength = Annotated[Number, Field(gt=0), AfterValidator(in_pixel_units)]
FolderName = Annotated[str, Field(json_schema_extra={"pattern": f"^{FOLDER_NAME}$"}), AfterValidator(folder_name)]
Classes = Annotated[Annotated[Int, Field(ge=2)] | tuple[str, ...] | None, BeforeValidator(class_names)]
