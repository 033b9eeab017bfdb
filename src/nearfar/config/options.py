"""Typed options: a dataclass says what an option may be, what it does, and what it means for comparing runs.

An option is a field of a dataclass. Its annotation gives the type, ``option`` the default, the range and the help.
Everything else is a query of these: the defaults that Hydra composes, the checks, the tables of the docs, which runs
repeat each other, which options are paths. A run that is going to fail should fail while its user still looks at it,
and a value that would be ignored is as wrong as one that cannot be read.
"""

from __future__ import annotations

import dataclasses
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from nearfar.config.rules import Choice, Number, Rule, Switch, Text, shown
from nearfar.data.files import Json
from nearfar.errors import NearfarError, nearest_name

__all__ = [
    "GroupOf",
    "Option",
    "Role",
    "column",
    "default_values",
    "fraction",
    "group",
    "group_variants",
    "open_options",
    "option",
    "option_table",
    "options_of",
    "path",
    "raw_group",
    "read_options",
    "section",
    "set_option",
    "take_alias",
    "to_dict",
    "variants_of",
]

#: What a different value means. ``result``: a different experiment. ``batches``: the same, and batches are composed
#: differently; ``loss``: the same, and training losses are different quantities, so that neither compares them.
#: ``repeat``: the same experiment again. ``place``: nothing; it says where a run lies or how it was started.
Role = Literal["result", "batches", "loss", "repeat", "place"]
#: What a text means on this machine: a file or folder, or a model that may be a folder.
Place = Literal["path", "model"]
T = TypeVar("T")
Named = TypeVar("Named", bound=str | int | None)
_KEY = "nearfar"


# -- fields --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Option:
    """One option as its dataclass declares it: the rule of its values, its help, its role, and whether it is a path."""

    rule: Rule
    help: str
    default: object
    role: Role = "result"
    place: Place | None = None


@dataclass(frozen=True)
class _Declared:
    """What ``option`` keeps in a field until the annotation is read."""

    help: str
    role: Role | None = None
    place: Place | None = None
    rule: Rule | None = None
    least: float | None = None
    most: float | None = None
    inside: bool = False
    variants: Mapping[str, object] | None = None
    raw: bool = False
    models: tuple[str, ...] = ()


def option(
    default: T,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    inside: bool = False,
    role: Role | None = None,
    rule: Rule | None = None,
) -> T:
    """A field of a dataclass of options: its default, the text of the help with the unit, and the range of a number.

    The annotation is the type: ``int``, ``float``, ``bool``, ``str`` or a ``Literal`` of choices, each perhaps
    ``| None``; ``rule`` is for values of a different form. A subclass that changes the default alone assigns it.

    >>> @dataclass
    ... class Training:
    ...     epochs: int = option(40, "passes over the training split", least=1)
    >>> read_options(Training, {"epochs": 0})
    Traceback (most recent call last):
    nearfar.errors.NearfarError: epochs=0 is out of range: at least 1.
    """
    return _field(default, _Declared(help, role, None, rule, least, most, inside))


def fraction(default: float, help: str, *, role: Role | None = None) -> float:
    """An option that is a share and leaves something, such as a dropout: 0 to .99."""
    return option(default, help, least=0.0, most=0.99, role=role)


def path(
    default: Named,
    help: str,
    *,
    optional: bool = True,
    model: bool = False,
    role: Role | None = None,
) -> Named:
    """An option that is a file or folder, which may be called by digits; a ``model`` may be a name on a hub as well."""
    return _field(
        default, _Declared(help, role, "model" if model else "path", Text(optional=optional, number=True))
    )


def column(help: str) -> str | int | None:
    """The name of a column, or its number (1, 2, …) in a file without a header line; null: found by its usual names."""
    return _field(None, _Declared(help, rule=Text(optional=True, number=True)))


def group(*, help: str = "", role: Role | None = None, **variants: object) -> Any:
    """A group of options that is chosen by name: ``sampler=hard``. The first is the default of the dataclass.

    Each variant is an instance of a dataclass of options. Variants of different classes are told apart by a field
    with a ``Literal`` annotation (``name`` or ``kind``), which every one of them has.
    """
    first = next(iter(variants.values()))
    return _field(first, _Declared(help, role, variants=variants))


def section(default: T, help: str = "", *, role: Role | None = None) -> T:
    """Options under a name of their own that are no group to choose, such as ``trainer``."""
    return _field(default, _Declared(help, role))


def raw_group(default: Json, help: str, *, models: Sequence[str] = (), role: Role | None = None) -> Json:
    """A group whose options belong to the arguments of a class, which checks them itself, such as an encoder's.

    ``models``: those of them that name a model, on a hub or in a folder.
    """
    return _field(dict(default), _Declared(help, role, raw=True, models=tuple(models)))


def _field(default: T, declared: _Declared) -> T:
    metadata = {_KEY: declared}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: _copied(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _copied(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: _copied(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


# -- queries -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Field:
    """A field with its declaration and the classes that its annotation allows for a group."""

    name: str
    declared: _Declared
    default: object
    hint: object

    @property
    def classes(self) -> tuple[type, ...]:
        if self.declared.variants is not None:
            return tuple(dict.fromkeys(type(each) for each in self.declared.variants.values()))
        return (type(self.default),) if dataclasses.is_dataclass(self.default) else ()

    @property
    def rule(self) -> Rule:
        return self.declared.rule or _rule_of(self.hint, self.declared, self.name)


#: reading annotations takes half of the time of reading a configuration
_type_hints: Callable[[Any], Json] = cache(typing.get_type_hints)


def _declared_fields(cls: Any) -> tuple[_Field, ...]:
    hints = _type_hints(cls)
    fields = []
    for each in dataclasses.fields(cls):
        declared = each.metadata.get(_KEY)
        if declared is None:  # a subclass that gives a default alone keeps what its parent declared
            declared = next(
                (
                    parent.__dataclass_fields__[each.name].metadata[_KEY]
                    for parent in cls.__mro__[1:]
                    if _KEY in getattr(parent, "__dataclass_fields__", {}).get(each.name, each).metadata
                ),
                None,
            )
        if declared is None:
            raise TypeError(f"{cls.__name__}.{each.name} is no option: declare it with nearfar.config.option")
        default = each.default if each.default is not dataclasses.MISSING else None
        if each.default_factory is not dataclasses.MISSING:
            default = each.default_factory()
        fields.append(_Field(each.name, declared, default, hints[each.name]))
    return tuple(fields)


_fields: Callable[[type], tuple[_Field, ...]] = cache(_declared_fields)


def _rule_of(hint: object, declared: _Declared, name: str) -> Rule:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        rest = [each for each in arguments if each is not type(None)]
        if len(rest) == 1 and len(rest) < len(arguments):
            rule: Any = _rule_of(rest[0], declared, name)
            return dataclasses.replace(rule, optional=True)
    elif origin is Literal:
        return Choice(arguments)
    elif hint in (int, float):
        return Number(declared.least, declared.most, whole=hint is int, inside=declared.inside)
    elif hint is bool:
        return Switch()
    elif hint is str:
        return Text()
    raise TypeError(f"option {name}: {hint} has no rule of its own; give rule=")


def options_of(
    cls: type, prefix: str = "", role: Role = "result", instance: object = None
) -> Iterator[tuple[str, Option]]:
    """Every option of a dataclass by its dotted name; of a group, those of all its variants.

    Defaults are those of the ``instance``, where one is given.
    """
    for each in _fields(cls):
        name, declared = f"{prefix}{each.name}", each.declared
        default = each.default if instance is None else getattr(instance, each.name)
        inherited: Role = declared.role or role
        if each.classes:
            variants = list(declared.variants.values()) if declared.variants is not None else [default]
            seen: set[str] = set()
            for kind in each.classes:
                first = next(variant for variant in variants if type(variant) is kind)
                for key, nested in options_of(kind, f"{name}.", inherited, first):
                    if key not in seen:
                        seen.add(key)
                        yield key, nested
        elif declared.raw:
            yield name, Option(Text(), declared.help, default, inherited)
            for key in declared.models:
                yield f"{name}.{key}", Option(Text(), declared.help, None, inherited, "model")
        else:
            yield name, Option(each.rule, declared.help, default, inherited, declared.place)


def option_table(cls: type) -> Mapping[str, Option]:
    """``options_of`` as a mapping, by dotted name.

    >>> @dataclass
    ... class Options:
    ...     lr: float = option(0.1, "learning rate", least=0)
    ...     images: str | None = path(None, "a folder of pictures")
    >>> {name: str(each.rule) for name, each in option_table(Options).items()}
    {'lr': 'at least 0', 'images': 'text'}
    """
    return _tables(cls)


_tables: Callable[[type], Mapping[str, Option]] = cache(lambda cls: dict(options_of(cls)))


def variants_of(cls: type) -> dict[str, Json]:
    """The groups of a dataclass and the named variants of each, as plain values: what Hydra chooses from."""
    return {
        each.name: {name: to_dict(value) for name, value in each.declared.variants.items()}
        for each in _fields(cls)
        if each.declared.variants is not None
    }


def group_variants(cls: type, group: str) -> Mapping[str, Any]:
    """The variants of a group as instances, by name; none where the dataclass has no such group."""
    declared = next((each.declared for each in _fields(cls) if each.name == group), None)
    return (declared.variants or {}) if declared is not None else {}


class GroupOf(NamedTuple):
    """A group of options: the name of its default, the names one may choose, its help; ``raw`` of an encoder's."""

    default: str
    names: tuple[str, ...]
    help: str
    raw: bool


def declared_groups(cls: type) -> dict[str, GroupOf]:
    """The groups of a dataclass that are chosen by name."""
    groups = {}
    for each in _fields(cls):
        declared = each.declared
        if declared.raw:
            assert isinstance(each.default, Mapping)
            groups[each.name] = GroupOf(str(each.default.get("kind")), (), declared.help, True)
        elif declared.variants is not None:
            names = tuple(declared.variants)
            about = declared.help or " ".join(
                f"{name}: {(type(value).__doc__ or '').strip().splitlines()[0]}"
                for name, value in declared.variants.items()
            )
            groups[each.name] = GroupOf(names[0], names, about, False)
    return groups


def open_options(cls: type) -> set[str]:
    """The options whose keys are not fixed: groups of an encoder's arguments, and values by name."""
    return {each.name for each in _fields(cls) if each.declared.raw or isinstance(each.default, dict)}


def default_values(cls: type) -> Json:
    """The defaults of a dataclass as plain values, without its groups, which are chosen by name."""
    return {
        each.name: to_dict(each.default) if dataclasses.is_dataclass(each.default) else _copied(each.default)
        for each in _fields(cls)
        if each.declared.variants is None and not each.declared.raw
    }


def to_dict(options: object) -> Json:
    """Options as plain nested values, in the order of their declaration."""
    return {
        each.name: to_dict(value)
        if dataclasses.is_dataclass(value := getattr(options, each.name))
        else _copied(value)
        for each in _fields(type(options))
    }


def set_option(options: object, name: str, value: object) -> None:
    """Set the option of a dotted name, also within a group whose values are a mapping."""
    *parents, last = name.split(".")
    for parent in parents:
        options = options[parent] if isinstance(options, dict) else getattr(options, parent)
    if isinstance(options, dict):
        options[last] = value
    else:
        setattr(options, last, value)


def take_alias(options: object, alias: str, name: str) -> None:
    """Let ``alias``, the notes' name of the option ``name``, stand for it; an error where both are given and differ."""
    value = getattr(options, alias)
    if value is None:
        return
    current = options
    for part in name.split("."):
        current = getattr(current, part)
    if current not in (option_table(type(options))[name].default, value):
        raise NearfarError(f"{alias}={value} and {name}={current}: they are one option; give one of them.")
    set_option(options, name, value)
    setattr(options, alias, None)


# -- reading -------------------------------------------------------------------------------------------------
def read_options(cls: type[T], config: Mapping[str, object], *, saved: bool = False) -> T:
    """The options that a composed configuration holds, each checked by its rule, and all by ``check`` of ``cls``.

    Of the configuration of a ``saved`` run, options that came after it was trained have their defaults, and those that
    are gone are named in a warning.

    Raises ``NearfarError`` for the first option that is missing, unknown, of the wrong type or out of range.
    """
    options = _read(cls, config, "", saved, saved)
    check: Callable[[], None] | None = getattr(options, "check", None)
    if check is not None:
        check()
    return options


def _read(cls: type[T], config: Mapping[str, object], prefix: str, saved: bool, fill: bool) -> T:
    """``fill``: options that are not there have their defaults; otherwise they are an error."""
    values: Json = {}
    for each in _fields(cls):
        name = f"{prefix}{each.name}"
        value = _value(config, each.name, name)
        if value is _ABSENT:
            if not fill:
                raise NearfarError(f"the option {name} is missing: it was deleted, or its group is null.")
            values[each.name] = _copied(each.default)
        elif each.declared.raw:
            values[each.name] = _read_raw(value, name)
        elif each.classes:
            values[each.name] = _read_group(each, value, name, saved, fill)
        else:
            each.rule.check(name, value)
            values[each.name] = value
    _check_unknown(cls, [str(key) for key in config if str(key) not in values], prefix, saved)
    return cls(**values)


def _check_unknown(cls: type, unknown: Sequence[str], prefix: str, saved: bool) -> None:
    if not unknown:
        return
    if saved:
        names = ", ".join(prefix + key for key in unknown)
        warnings.warn(
            f"the run was trained with options that this version does not have: {names}", stacklevel=2
        )
        return
    known = [each.name for each in _fields(cls)]
    of = f" in {prefix[:-1]}" if prefix else ""
    raise NearfarError(f"there is no option '{unknown[0]}'{of}: {nearest_name(unknown[0], known)}")


def _read_raw(value: object, name: str) -> Json:
    given = _group_values(value, name, "kind")
    Text().check(f"{name}.kind", given.get("kind"))
    return {str(key): each for key, each in given.items()}


def _read_group(each: _Field, value: object, name: str, saved: bool, fill: bool) -> object:
    tag = _tag(each.classes)
    given = _group_values(value, name, tag or _fields(each.classes[0])[0].name)
    if tag is None or len(each.classes) == 1:
        return _read(each.classes[0], given, f"{name}.", saved, fill)
    kinds = {choice: cls for cls in each.classes for choice in get_args(_type_hints(cls)[tag])}
    choice = given.get(tag)
    Choice(tuple(kinds)).check(f"{name}.{tag}", choice)
    cls = kinds[choice]
    own = {field.name for field in _fields(cls)}
    foreign = [
        key
        for key in given
        if key not in own and any(key == f.name for c in each.classes for f in _fields(c))
    ]
    if foreign and not saved:
        owners = [
            f"{name}={variant}"
            for variant, values in (each.declared.variants or {}).items()
            if foreign[0] in {field.name for field in _fields(type(values))}
        ]
        raise NearfarError(
            f"{name}.{foreign[0]} has no effect with {name}.{tag}={choice}; it belongs to {' or '.join(owners)}."
        )
    # A variant that is chosen by its tag alone has the defaults of its other options.
    return _read(cls, given, f"{name}.", saved, True)


def _tag(classes: Sequence[type]) -> str | None:
    """The field by which variants are told apart: the first that is a ``Literal`` in all of them."""
    for each in _fields(classes[0]):
        if all(get_origin(_type_hints(cls).get(each.name)) is Literal for cls in classes):
            return each.name
    return None


def _group_values(value: object, name: str, example: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise NearfarError(
            f"{name}={shown(value)}: a group of options is needed here ({name}.{example} is one of them)."
        )
    return value


_ABSENT = object()


def _value(config: Mapping[str, object], key: str, name: str) -> object:
    """A value without anything of OmegaConf's, or ``_ABSENT``."""
    try:
        if key not in config and not (OmegaConf.is_config(config) and OmegaConf.is_missing(config, key)):
            return _ABSENT
        value = config[key]
        if not OmegaConf.is_config(value):
            return value
        return OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        missing = getattr(error, "full_key", None) or name
        raise NearfarError(f"{missing} must be given: add {missing}=VALUE.") from None
    except (InterpolationResolutionError, OmegaConfBaseException) as error:
        raise NearfarError(f"{name}: {str(error).splitlines()[0]}.") from None
