"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from sslscale.errors import UserError

Bound = TypeVar("Bound", int, float)

not_identity = Field(json_schema_extra={"identity": False})

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
AboveZero = Annotated[float, Field(gt=0.0)]


def _check_two(given: object) -> object:
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise UserError("a range is two numbers", got=given, allowed="[low, high]")
    return given


def _check_ascends(given: tuple[Bound, Bound]) -> tuple[Bound, Bound]:
    low, high = given
    if low > high:
        raise UserError(
            "a range begins at its lower end", got=[low, high], allowed="low <= high", fix=f"give [{high}, {low}]"
        )
    return given


Range = Annotated[tuple[Bound, Bound], BeforeValidator(_check_two), AfterValidator(_check_ascends)]
"""`Range[Fraction]`: [low, high], each a Fraction, and low at most high."""


class StageConfig(BaseModel):
    """Base of every section: unknown keys are refused, and `identity()` names what a result depends on."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True, allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """The settings that a result depends on, as plain JSON values."""
        skipped = {
            name
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("identity") is False
        }
        return self.model_dump(mode="json", exclude=skipped)
