"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

not_identity = Field(json_schema_extra={"identity": False})

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class StageConfig(BaseModel):
    """Base of every section: unknown keys are refused, and `identity()` names what a result depends on."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True)

    def identity(self) -> dict[str, Any]:
        """The settings that a result depends on, as plain JSON values."""
        skipped = {
            name
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("identity") is False
        }
        return self.model_dump(mode="json", exclude=skipped)
