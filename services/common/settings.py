"""Settings of a service: a YAML file, and `ASD_*` variables that override it."""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from asd.transport.files import DamagedFile, read_content
from asd.visible import one_line, visible
from services.common.addresses import check_target
from services.common.documents import MOST_YAML_BYTES, parse_yaml

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# The address of another service.
Target = Annotated[str, AfterValidator(check_target)]

# Most requests that a process holds at a time. Chosen: far more than one process answers within a deadline,
# and few enough for its memory, as each holds its prompt.
Requests = Annotated[int, Field(ge=1, le=65_536)]

# Kubernetes sets such variables for every Service of a namespace: a Service named asd-router yields
# ASD_ROUTER_PORT and more. They are not settings.
_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT|PORT_\d+_(TCP|UDP|SCTP)(_.*)?)$")

# Content of the file of the current load: pydantic makes its sources from the class, without arguments.
_loaded_file: ContextVar[Mapping[str, Any]] = ContextVar("loaded_file", default=MappingProxyType({}))


class SettingsError(Exception):
    """The configuration cannot be used; the message says which entry and why.

    Text of files and variables is shown with its control characters escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))


class _Numbers(BaseModel):
    """Refuses `true` or `yes` as a number, which pydantic takes, as Python does.

    pydantic's strict mode would also refuse the strings of variables and the lists of YAML.
    """

    @field_validator("*", mode="before")
    @classmethod
    def _check_numbers(cls, value: object, info: ValidationInfo) -> object:
        if info.field_name and _is_number(cls, info.field_name):
            for truth in _truths(value):
                raise ValueError(f"must be a number, not {str(truth).lower()}")
        return value


class Section(_Numbers):
    """Part of a service's settings: frozen, with no unknown keys. Hold sequences in tuples."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class ServiceSettings(_Numbers, BaseSettings):
    """Base of a service's settings.

    A subclass sets `model_config = service_config("ASD_ROUTER_")`. Its field `max_concurrent` is then read
    from the YAML file and from ASD_ROUTER_MAX_CONCURRENT; `policy.target` from ASD_ROUTER_POLICY__TARGET.
    Lists in variables are JSON.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let variables override the file."""
        return (
            init_settings,
            env_settings,
            InitSettingsSource(settings_cls, init_kwargs=dict(_loaded_file.get())),
        )

    @classmethod
    def load(cls, file: Path | None) -> Self:
        """Return the settings from a YAML file and the environment.

        Raises SettingsError if the file cannot be read, or an entry is unknown or wrong.
        """
        cls._refuse_unknown_variables(os.environ)
        token = _loaded_file.set(_read_yaml(file))
        try:
            return cls()
        except ValidationError as error:
            where = cls._variables_at_fault(error) or (str(file) if file else "the environment")
            raise SettingsError(f"{where}: {explain(error)}") from error
        except Exception as error:
            # pydantic-settings raises its own error if a variable's JSON does not parse.
            if type(error).__name__ == "SettingsError":
                raise SettingsError(cls._explain_variable(error)) from error
            raise
        finally:
            _loaded_file.reset(token)

    @classmethod
    def _variables_at_fault(cls, error: ValidationError) -> str:
        """Return the variables that set the wrong entries; "" if the file set some of them."""
        prefix = str(cls.model_config.get("env_prefix") or "")
        given = {variable.upper(): variable for variable in cls.variables_in(os.environ)}
        found = []
        for problem in error.errors(include_url=False):
            names = [str(part) for part in problem["loc"]]
            tried = [f"{prefix}{'__'.join(names[:count])}".upper() for count in range(len(names), 0, -1)]
            found.append(next((given[name] for name in tried if name in given), ""))
        return ", ".join(dict.fromkeys(found)) if all(found) else ""

    @classmethod
    def _explain_variable(cls, error: Exception) -> str:
        """Return the fault of a variable, with the variable's name: pydantic-settings names the field."""
        field = re.search(r'field "(\w+)"', str(error))
        if field is None:
            return str(error)
        variable = f"{cls.model_config.get('env_prefix') or ''}{field[1]}".upper()
        return f"{variable} is not JSON, as lists and mappings in variables are: {error.__cause__}"

    @classmethod
    def from_arguments(cls, arguments: Sequence[str] | None = None) -> Self:
        """Return the settings of a command line with `--config FILE`; exit with a message on an error."""
        parser = argparse.ArgumentParser(description=(cls.__doc__ or "").split("\n", maxsplit=1)[0])
        parser.add_argument("--config", type=Path, metavar="FILE", help="settings, as YAML")
        options = parser.parse_args(arguments)
        try:
            return cls.load(options.config)
        except SettingsError as error:
            parser.exit(2, f"{parser.prog}: {error}\n")

    @classmethod
    def variables_in(cls, environment: Iterable[str]) -> list[str]:
        """Return the environment's variables for these settings."""
        prefix = str(cls.model_config.get("env_prefix") or "")
        return [
            variable
            for variable in environment
            if prefix and variable.upper().startswith(prefix) and not _SERVICE_LINK.search(variable.upper())
        ]

    @classmethod
    def _refuse_unknown_variables(cls, environment: Iterable[str]) -> None:
        prefix = str(cls.model_config.get("env_prefix") or "")
        known = {f"{prefix}{name}".upper() for name in cls.model_fields}
        for variable in cls.variables_in(environment):
            name = variable.upper()
            if name.split("__", maxsplit=1)[0] not in known:
                raise SettingsError(f"unknown variable {variable}: {suggestion(name, sorted(known))}")


def suggestion(name: str, known: Sequence[str]) -> str:
    """Return what an unknown name may have meant: the known one that is close, or all that are known."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def service_config(env_prefix: str) -> SettingsConfigDict:
    """Return the pydantic configuration of a service whose variables start with a prefix ("ASD_ROUTER_")."""
    return SettingsConfigDict(
        env_prefix=env_prefix,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        allow_inf_nan=False,
    )


def _truths(value: object) -> Iterator[bool]:
    """Yield the booleans of a value: itself, or those in a list or mapping."""
    if isinstance(value, bool):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _truths(each)


@functools.cache
def _is_number(model: type[BaseModel], name: str) -> bool:
    """Return whether a field takes numbers, alone or in a list, and no booleans."""
    kinds = set(_kinds(model.model_fields[name].annotation))
    return bool not in kinds and any(issubclass(kind, int | float) for kind in kinds)


def _kinds(annotation: object) -> Iterator[type]:
    """Yield the types that an annotation is made of; of a Literal, those of its values."""
    parts = get_args(annotation)
    for part in parts:
        yield from _kinds(part)
    if not parts:
        yield annotation if isinstance(annotation, type) else type(annotation)


def _read_yaml(file: Path | None) -> Mapping[str, Any]:
    if file is None:
        return {}
    try:
        content = parse_yaml(read_content(file, MOST_YAML_BYTES, is_pipe_fine=True), str(file))
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror or error}") from error
    except DamagedFile as error:
        raise SettingsError(error.message) from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingsError(f"{file}: must hold a mapping of settings")
    return content


def explain(error: ValidationError) -> str:
    """Return the errors in one line, entry by entry."""
    return one_line(
        "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or 'settings'}: "
            f"{problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_url=False)
        )
    )
