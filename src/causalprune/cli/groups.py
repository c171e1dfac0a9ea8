"""Groups of options: a dataclass in a command's signature stands for the options that are its fields."""

import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from typing import Any

from typer.models import OptionInfo

from causalprune.cli.output import voice


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of its groups: those parameters whose type is a dataclass.

    Each field is an option, or a group in turn, and is shown in the panel of its group in the help. A parameter's own
    default, an instance of its group, has the defaults of this command.
    """
    own = list(inspect.signature(command).parameters.values())
    options = list(_flat(own))

    @functools.wraps(command)
    def called(**given: Any) -> None:
        values = _built(own, given)
        ready()
        command(**values)

    called.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    called.__annotations__ = {option.name: option.annotation for option in options}
    return called


def ready() -> None:
    """Import what every command with a model needs, which takes seconds, and say that it goes on."""
    with voice.stage("starting"):
        import_module("causalprune.runs.single")


def _flat(parameters: Iterable[inspect.Parameter], panel: str | None = None) -> Iterator[inspect.Parameter]:
    """Yield options for parameters, those of a group in its place."""
    for one in parameters:
        if _is_group(one.annotation):
            yield from _flat(_members(one), one.annotation.panel)
        else:
            yield one.replace(kind=one.KEYWORD_ONLY, annotation=_in_panel(one.annotation, panel))


def _built(parameters: Iterable[inspect.Parameter], given: dict[str, Any]) -> dict[str, Any]:
    """Return the values of parameters by their names, groups built from the options that are given."""
    return {
        one.name: one.annotation(**_built(_members(one), given))
        if _is_group(one.annotation)
        else given[one.name]
        for one in parameters
    }


def _is_group(annotation: Any) -> bool:
    return is_dataclass(annotation)


def _members(group: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """Yield the fields of a group as parameters, with their defaults in this command."""
    types = typing.get_type_hints(group.annotation, include_extras=True)
    for field in fields(group.annotation):
        default = field.default
        if group.default is not group.empty:
            default = getattr(group.default, field.name)
        elif default is MISSING:
            default = group.empty if field.default_factory is MISSING else field.default_factory()
        yield inspect.Parameter(field.name, group.KEYWORD_ONLY, annotation=types[field.name], default=default)


def _in_panel(annotation: Any, panel: str | None) -> Any:
    """Return the type of an option with its panel of the help; arguments have one of their own."""
    kind, *notes = typing.get_args(annotation)
    if panel is None or not isinstance(notes[0], OptionInfo):
        return annotation
    own = copy(notes[0])
    own.rich_help_panel = panel
    return typing.Annotated[kind, own]
