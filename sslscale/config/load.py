"""YAML and `key=value` overrides in, one validated RunConfig out; errors name the key and what it may be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from sslscale.config.backbones import BACKBONES
from sslscale.config.base import StageConfig
from sslscale.config.models import RunConfig
from sslscale.errors import UserError, did_you_mean

Model = TypeVar("Model", bound=BaseModel)


def load_config(path: str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads `path` (YAML), applies `overrides` (`pretrain.epochs=3`) and validates.

    A file may name another as its `base` (relative to itself): its settings replace those of the base, each setting of
    a section as a whole. Raises UserError for a missing file, YAML that does not parse, an unknown key or a value of
    the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for override in overrides:
        if not override.partition("=")[0] or "=" not in override:
            raise UserError("an override has the form section.key=value", got=override)
    try:
        loaded = OmegaConf.create({} if path is None else _read(Path(path)))
        for override in overrides:
            key = override.partition("=")[0]
            value = OmegaConf.select(OmegaConf.from_dotlist([override]), key)
            OmegaConf.update(loaded, key, value, merge=False, force_add=True)  # `a={...}` replaces, `a.b=` merges
        plain = OmegaConf.to_container(loaded, resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError("the config does not parse", got=" ".join(str(error).split())) from error
    assert isinstance(plain, dict)
    return _absolute(validate(RunConfig, plain))


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The sections of a file, laid over those of its base. `below` are the files whose base this one is."""
    from omegaconf import OmegaConf

    if not path.is_file():
        given_by = f", the base of {below[-1]}" if below else ""
        raise UserError("there is no such config file", got=f"{path}{given_by}", fix="give the path of a YAML file")
    if path.resolve() in below:
        raise UserError("config files are each other's base", got=" -> ".join(map(str, [*below, path])))
    loaded = OmegaConf.create(path.read_text())
    if not OmegaConf.is_dict(loaded):
        raise UserError("a config file holds a mapping of sections", got=str(path))
    sections: dict[str, Any] = OmegaConf.to_container(loaded)  # type: ignore[assignment]
    if (base := sections.pop("base", None)) is None:
        return sections
    merged = _read(path.parent / str(base), (*below, path.resolve()))
    for name, section in sections.items():
        under = merged.get(name)
        merged[name] = {**under, **section} if isinstance(under, dict) and isinstance(section, dict) else section
    return merged


def _absolute(config: RunConfig) -> RunConfig:
    """Relative folders belong to this process's working directory; workers and ranks have another."""
    config.run = _absolute_path(config.run)
    config.datasets = {name: _absolute_path(location) for name, location in config.datasets.items()}
    if config.pack is not None:
        config.pack.output = _absolute_path(config.pack.output)
    if config.pretrain is not None and config.pretrain.init_from is not None:
        config.pretrain.init_from = _absolute_path(config.pretrain.init_from)
    return config


def _absolute_path(location: str) -> str:
    return (
        location if "://" in location or location.startswith("pipe:") else str(Path(location).expanduser().absolute())
    )


def validate(model: type[Model], values: dict[Any, Any], prefix: str = "") -> Model:
    """`model(**values)`, with pydantic's complaints turned into one UserError that names every wrong key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        complaints = error.errors()
        first = _explain(model, complaints[0], prefix)
        if len(complaints) > 1:
            first.fix = "; ".join(
                filter(None, [first.fix, f"{len(complaints) - 1} more wrong settings after this one"])
            )
        raise UserError(first.what, got=first.got, allowed=first.allowed, fix=first.fix) from None


def _explain(model: type[BaseModel], complaint: Any, prefix: str) -> UserError:
    location = [str(part) for part in complaint["loc"]]
    key = ".".join(part for part in [prefix, *location] if part and not part.startswith("="))
    if complaint["type"] == "extra_forbidden":
        fields = sorted(_section(model, location[:-1]).model_fields)
        return UserError(
            f"unknown setting {key!r}{did_you_mean(location[-1], fields)}",
            got=f"{key}={complaint['input']!r}",
            allowed=", ".join(fields),
        )
    if complaint["type"] == "missing":
        return UserError(f"the setting {key!r} is missing", fix=f"add {key}=... to the config or the command")
    message = complaint["msg"].removeprefix("Value error, ")
    if complaint["type"] == "value_error":
        return UserError(f"{key or 'the config'}: {message}")
    return UserError(f"the setting {key!r} has a wrong value", got=repr(complaint["input"]), allowed=message)


def _section(model: type[BaseModel], location: Sequence[str]) -> type[BaseModel]:
    """The model that holds the key at `location`, through optional sections."""
    for part in location:
        if part.startswith("="):  # a tag: which of several backbones it is
            return BACKBONES[part.removeprefix("=")]
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        candidates = [
            c for c in (annotation, *get_args(annotation)) if isinstance(c, type) and issubclass(c, BaseModel)
        ]
        model = candidates[0] if candidates else model
    return model


def dump_config(config: StageConfig) -> str:
    """The resolved config as YAML."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)
