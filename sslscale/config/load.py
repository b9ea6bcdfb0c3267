"""YAML and `key=value` overrides in, one validated RunConfig out; errors name the key and what it may be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from sslscale.config.backbones import BACKBONES
from sslscale.config.base import StageConfig
from sslscale.config.models import RunConfig
from sslscale.errors import UserError, did_you_mean

Model = TypeVar("Model", bound=BaseModel)

BACKBONE_NAMES = frozenset(("pretrain", "pixels", "hog", "mean_frame"))
"""What embed.backbone means by a bare word, whatever files of that name there are."""


def load_config(
    path: str | None = None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> RunConfig:
    """Reads `path` (YAML), applies `overrides` (`pretrain.epochs=3`), sets `flags` by key as they are, and validates.

    The value of an override is YAML, and where the setting is a text, the text as it stands: `run=/data/exp #3`.
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
        loaded = OmegaConf.create({} if path is None else read_sections(Path(path)))
        given = [(key, _read_value(key, text)) for key, _, text in (override.partition("=") for override in overrides)]
        for key, value in [*given, *((key, _literal(value)) for key, value in (flags or {}).items())]:
            OmegaConf.update(loaded, key, value, merge=False, force_add=True)  # `a={...}` replaces, `a.b=` merges
        plain = OmegaConf.to_container(loaded, resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError("the config does not parse", got=" ".join(str(error).split())) from error
    assert isinstance(plain, dict)
    return _absolute(validate(RunConfig, plain))


def check_dataset(config: RunConfig, dataset: str) -> None:
    """UserError where the config names no such dataset."""
    if dataset not in config.datasets:
        raise UserError(
            f"the config names no dataset {dataset!r}{did_you_mean(dataset, config.datasets)}",
            allowed=", ".join(config.datasets) or "none yet",
            fix=f"add datasets.{dataset}=SHARDS",
        )


# ------------------------------------------------------------------ overrides


def _read_value(key: str, text: str) -> Any:
    """What `key=text` sets; none of YAML's comments, numbers and braces in a text, but null where it may be none."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    kinds = list(_kinds_of(key.split(".")))
    is_text = any(map(_is_text, kinds))
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload, index]
    except (OmegaConfBaseException, YAMLError):
        if not is_text:
            raise
        return _literal(text)
    return _literal(text) if is_text and not (value is None and NoneType in kinds) else value


def _kinds_of(key: Sequence[str]) -> Iterator[Any]:
    """The types that the setting at `key` may have; none for a key that is unknown."""
    kinds: list[Any] = [RunConfig]
    for part in key:
        inner: list[Any] = []
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields:
                inner += _alternatives(kind.model_fields[part].annotation)
            elif get_origin(kind) is dict:
                inner += _alternatives(get_args(kind)[1])
        kinds = inner
    yield from kinds


def _alternatives(annotation: Any) -> Iterator[Any]:
    """`Annotated[str, ...] | None` -> str, NoneType."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for one in get_args(annotation):
            yield from _alternatives(one)
    else:
        yield annotation


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and any(isinstance(word, str) for word in get_args(kind)))


def _literal(value: Any) -> Any:
    """`value` with every `${` in its texts written so that OmegaConf reads it as it stands."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    return [_literal(item) for item in value] if isinstance(value, list) else value


# ------------------------------------------------------------------ files


def read_sections(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
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
    merged = read_sections(path.parent / str(base), (*below, path.resolve()))
    for name, section in sections.items():
        under = merged.get(name)
        merged[name] = {**under, **section} if isinstance(under, dict) and isinstance(section, dict) else section
    return merged


def _absolute(config: RunConfig) -> RunConfig:
    """Relative folders belong to this process's working directory; workers and ranks have another."""
    config.run = _absolute_path(config.run)
    config.datasets = {name: _absolute_path(location) for name, location in config.datasets.items()}
    if config.storage.cache is not None:
        config.storage.cache = _absolute_path(config.storage.cache)
    if config.pack is not None:
        config.pack.output = _absolute_path(config.pack.output)
        if config.pack.path is not None:
            config.pack.path = _absolute_path(config.pack.path)
    if config.pretrain is not None and config.pretrain.init_from is not None:
        config.pretrain.init_from = _absolute_path(config.pretrain.init_from)
    config.embed.backbone = _absolute_backbone(config.embed.backbone)
    config.baselines = [_absolute_backbone(name) for name in config.baselines]
    return config


def _absolute_path(location: str) -> str:
    return (
        location if "://" in location or location.startswith("pipe:") else str(Path(location).expanduser().absolute())
    )


def _absolute_backbone(name: str) -> str:
    """A name, timm:NAME and module:Class as they are; a folder or a file from the root."""
    if name in BACKBONE_NAMES or (":" in name and not name.startswith(("/", ".", "~"))):
        return name
    return _absolute_path(name) if "/" in name or Path(name).exists() else name


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
    """The resolved config as YAML that `load_config` reads as the same."""
    return dump_sections(plain_sections(config))


def plain_sections(config: StageConfig) -> dict[str, Any]:
    """What a config file holds of it."""
    return _literal(config.model_dump(mode="json"))


def dump_sections(sections: Mapping[str, Any]) -> str:
    """YAML as `read_sections` takes it: a text that it would read as a number is in quotes."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dict(sections)))
