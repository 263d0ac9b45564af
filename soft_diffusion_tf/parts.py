"""Parts: frozen dataclasses that travel through configs by name or as "module:Class".

An experiment is made of parts: a corruption, schedules, a loss, a network, a sampler's rule, a
prior, a data set, metrics. Each family of parts has a base class, and a part is a frozen dataclass
derived from it:

    @dataclasses.dataclass(frozen=True)
    class Ring(priors.Estimator):
      radius: float = 1.0

A config writes a part as a mapping, {"kind": "my_module:Ring", "radius": 2.0}, or as a text,
"my_module:Ring(radius=2.0)". A part of this package goes by its short name. To import a module runs
it, so a part from elsewhere takes consent (see `trust`).
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import json
import math
import numbers
import re
import reprlib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

from soft_diffusion_tf import trust


def nearest(value: Any, choices: Iterable[str]) -> str:
  """The choice whose spelling is closest to a value, for messages."""
  names = {choice.lower(): choice for choice in choices}
  return names[difflib.get_close_matches(str(value).lower(), list(names), 1, cutoff=0)[0]]


def check_choice(what: str, value: Any, choices: Iterable[str]) -> None:
  """Raises the ValueError of a value that is not among the choices, with the nearest one."""
  if value not in choices:
    raise ValueError(
      f"{what} {value!r} is unknown; did you mean {nearest(value, choices)!r}? "
      f"There are {', '.join(choices)}"
    )


def first_line(error: BaseException) -> str:
  """What an error says first, or its class where it says nothing."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- What a field may be --------------------------------------------------------------------------


class Range(typing.NamedTuple):
  """The numbers that a field takes: from `low` to `high`, or without the ends that `ends` opens."""

  low: float
  high: float
  ends: str = "[]"

  def check(self, where: str, value: Any) -> None:
    """Raises the ValueError of a number outside; `where` names it."""
    above = value > self.low if self.ends[0] == "(" else value >= self.low
    below = value < self.high if self.ends[1] == ")" else value <= self.high
    if not (above and below):  # NaN as well
      raise ValueError(f"{where} must be {self}, got {value}")

  def __str__(self) -> str:
    words = {"(": "above", "[": "from", ")": "below", "]": "to"}
    if (self.low, self.ends[0], self.high) == (0, "(", _ANY):
      return "positive and finite"
    last = "on" if self.high == _ANY else f"{words[self.ends[1]]} {self.high:,}"
    return f"{words[self.ends[0]]} {self.low:,} {last}"


class Choice(typing.NamedTuple):
  """The texts that a field takes."""

  choices: tuple[str, ...]

  def check(self, where: str, value: Any) -> None:
    """Raises the ValueError of another text, with the nearest one; `where` names it."""
    check_choice(f"{where} =", value, self.choices)


_ANY = 1.7e308  # what is above is not finite
_MOST = 10**12  # of anything that is counted in steps
_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}

Positive = Annotated[float, Range(0, _ANY, "(]")]
NotNegative = Annotated[float, Range(0, _ANY)]
Share = Annotated[float, Range(0, 1, "[)")]  # of a whole that is never reached
Count = Annotated[int, Range(1, 2**31 - 1)]
Steps = Annotated[int, Range(1, _MOST)]
Every = Annotated[int, Range(0, _MOST)]  # so many steps; 0: never
Side = Annotated[int, Range(1, 8192)]  # of an image, in pixels


def checked(where: str, value: Any, hint: Any, like: Any = None) -> Any:
  """A value as its field's type has it: a list for a tuple and an int for a float are taken.

  Args:
    where: names the field.
    hint: its annotation. Types that this function does not know take any value.
    like: the field's default, an example for messages.

  Raises:
    ValueError: it is of another type, or not in the field's `Range` or `Choice`.
  """
  rules: tuple[Any, ...] = ()
  if typing.get_origin(hint) is Annotated:
    hint, *rules = typing.get_args(hint)  # type: ignore[assignment]
  inner = typing.get_args(hint)
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return _one_of(where, value, inner, like)
  if isinstance(hint, type) and issubclass(hint, Part):
    return make(hint, value, where)
  such = f" like {like!r}" if isinstance(like, int | float | str | tuple) else ""
  name = _KINDS.get(hint, "a " + getattr(hint, "__name__", "tuple"))
  wrong = f"{where} must be {name}{such}, got {reprlib.repr(value)}"
  if typing.get_origin(hint) is tuple:
    if not isinstance(value, list | tuple):
      raise ValueError(wrong)
    if inner[-1] is ...:
      inner = inner[:1] * len(value)
    if len(inner) != len(value):
      raise ValueError(f"{where} takes {len(inner)} numbers{such}, got {reprlib.repr(value)}")
    return tuple(checked(f"{where}[{k}]", v, h) for k, (v, h) in enumerate(zip(value, inner)))
  if hint is Any or not isinstance(hint, type):
    return value
  if not isinstance(value, bool):
    if hint is int and isinstance(value, numbers.Integral):
      value = int(value)
    elif hint is float and isinstance(value, numbers.Real):
      with contextlib.suppress(OverflowError):  # of an int
        value = float(value)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise ValueError(wrong)
  if hint is float and not math.isfinite(value) and all(r.high < math.inf for r in rules):
    raise ValueError(f"{where} must be a finite number, got {value}")
  for rule in rules:
    rule.check(where, value)
  return value


def _one_of(where: str, value: Any, hints: tuple[Any, ...], like: Any) -> Any:
  """A value as one of several types has it, or the ValueError of the first of them."""
  if value is None and type(None) in hints:
    return None
  wrong = None
  for hint in hints:
    if hint is not type(None):
      try:
        return checked(where, value, hint, like)
      except ValueError as error:
        wrong = wrong or error
  assert wrong is not None
  raise wrong


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
  """The annotations of a class; none where they cannot be read, as of names inside a function."""
  try:
    return typing.get_type_hints(kind, include_extras=True)
  except Exception:  # whatever an annotation raises
    return {}


class UnknownField(ValueError):
  """A config has a field that this version does not know."""


def check_fields(kind: Any, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """Plain values as a dataclass has them, each checked against its field.

  Raises:
    UnknownField: a name that is no field, with the nearest one.
    ValueError: a value of the wrong type.
  """
  if not isinstance(values, Mapping):
    raise ValueError(f"{prefix[:-1]} must be a group of fields, got {reprlib.repr(values)}")
  hints, fields = _hints(kind), {f.name: f for f in dataclasses.fields(kind) if f.init}
  found = {}
  for name, value in values.items():
    check_known(prefix, name, fields)
    like = fields[name].default
    found[name] = checked(prefix + name, value, hints.get(name, Any), like)
  return found


def check_known(prefix: str, name: Any, fields: Iterable[str]) -> None:
  """Raises the UnknownField of a name that is not among the fields of a group."""
  names = sorted(fields)
  if name not in names:
    if not names:
      raise UnknownField(f"{prefix[:-1]} has no fields, got {name!s}")
    raise UnknownField(
      f"the config has no field {prefix}{name!s}; did you mean {prefix}{nearest(name, names)}?"
    )


class Checked:
  """A frozen dataclass whose fields are what their annotations say, whoever makes it.

  `_group` begins the names of its fields in messages.
  """

  _group: ClassVar[str] = ""

  def __post_init__(self) -> None:
    kind: Any = type(self)
    prefix = kind._group or (f"{kind.__name__}." if isinstance(self, Part) else "")
    hints = _hints(kind)
    for field in dataclasses.fields(self):  # type: ignore[arg-type]
      value = getattr(self, field.name)
      value = checked(prefix + field.name, value, hints.get(field.name, Any), field.default)
      object.__setattr__(self, field.name, value)


# --- Parts ----------------------------------------------------------------------------------------


class Part(Checked):
  """A part of an experiment. A family's base class gives its `role`, what messages call it.

  Every class of this package that is derived from a family's base is a member by its `name`, which
  is the class's own unless another is given: `class TwoStep(Rule, name="two_step")`.
  """

  _role: ClassVar[str] = "part"  # underscores: a part's fields may have any name without
  _members: ClassVar[dict[str, type[Part]]] = {}
  _as_text: ClassVar[bool] = False  # in a config, where it is a field of another part

  def __init_subclass__(cls, role: str = "", name: str = "", **kwargs: Any) -> None:
    super().__init_subclass__(**kwargs)
    if role:
      cls._role, cls._members = role, {}
    elif _room(cls) == _room(family(cls)) and not cls.__name__.startswith("_"):
      cls._members[name or cls.__name__] = cls

  def get_config(self) -> dict[str, Any]:
    """The name of its class under "kind" and its fields, ready for JSON.

    Raises:
      ValueError: a field, or an attribute that is none, would be lost.
    """
    cls = type(self)
    config: dict[str, Any] = {"kind": kind_of(self)}
    names: list[str] = (
      [f.name for f in dataclasses.fields(self)]  # type: ignore[arg-type]
      if dataclasses.is_dataclass(self)
      else []
    )
    cached = lambda k: isinstance(getattr(cls, k, None), functools.cached_property)
    lost = [k for k in vars(self) if k not in names and not cached(k)]
    if lost:
      raise ValueError(
        f"{cls.__name__}: {', '.join(lost)} would be lost in a config; make it a dataclass "
        "(@dataclasses.dataclass(frozen=True)) with a field for each"
      )
    for name in names:
      value = config[name] = plain(getattr(self, name))
      try:
        json.dumps(value)
      except TypeError:
        raise ValueError(
          f"{cls.__name__}.{name} is a {type(value).__name__}, which JSON does not hold; make it "
          "numbers, texts or tuples of them"
        ) from None
    return config

  @classmethod
  def coerce(cls, config: Any) -> Any:
    """A config, or what else a family takes in its place: a number for a constant schedule."""
    return config

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> Any:
    """The part that `get_config` described."""
    return cls(**{k: v for k, v in config.items() if k != "kind"})


def family(cls: type[Part]) -> type[Part]:
  """The base class whose family a part's class belongs to."""
  return next(base for base in cls.__mro__ if "_members" in vars(base))


def _room(cls: type) -> list[str]:
  """Where a class is defined. Importing a family's room must give all of its short names: a class
  of any other room has none, or the names would depend on what a program happened to load."""
  return cls.__module__.split(".")[:2]


def members(base: type[Part]) -> dict[str, Any]:
  """The classes of a family that this package has, by their short names."""
  return dict(base._members)


def kind_of(part: Any) -> str:
  """The name by which a config finds a part's class."""
  kind = type(part)
  for name, member in kind._members.items():
    if member is kind:
      return name
  return f"{kind.__module__}:{kind.__qualname__}"


def plain(value: Any) -> Any:
  """A field's value ready for JSON: parts, alone or in tuples, by their configs or as texts."""
  if isinstance(value, tuple):
    return tuple(map(plain, value))
  if isinstance(value, Part) and value._as_text:
    return spell(value)
  return value.get_config() if hasattr(value, "get_config") else value


def spell(part: Part) -> str:
  """A part as a text that `make` reads, with the fields that differ from their defaults."""
  fields: Any = dataclasses.fields(part) if dataclasses.is_dataclass(part) else ()  # type: ignore[arg-type]
  changed = [f"{f.name}={value!r}" for f in fields if (value := getattr(part, f.name)) != f.default]
  return kind_of(part) + (f"({', '.join(changed)})" if changed else "")


def parse(text: str) -> dict[str, Any]:
  """The config {"kind": …, fields} of a text such as "ddim" or "my_module:Rule(k=0.1)".

  Raises:
    ValueError: it is of another form.
  """
  match = re.fullmatch(r"\s*([\w.]+(?::[\w.]+)?)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
  try:
    if match is None:
      raise SyntaxError
    call = ast.parse(f"part({match[2] or ''})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
      raise SyntaxError
    return {"kind": match[1]} | {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
  except (SyntaxError, ValueError, MemoryError, RecursionError):
    raise ValueError(
      f"{reprlib.repr(text)} is no name with fields; write it like ddim, ddim(k=0.1) or "
      "my_module:MyClass(size=3)"
    ) from None


def split(text: str, separator: str) -> list[str]:
  """A text cut at a separator wherever that is not between parentheses."""
  return re.split(rf"{re.escape(separator)}(?![^()]*\))", text)


def identifier(part: Any) -> str:
  """A part's text made of letters, digits and "_" alone, for names of files and functions."""
  return re.sub(r"\W+", "_", str(part)).strip("_")


def make(base: Any, config: Any, where: str = "", trust_code: Any = False) -> Any:
  """The part of a family that a config describes; one that is a part already stays as it is.

  Args:
    base: the family's base class.
    config: {"kind": name, fields}, or a text (see `parse`).
    where: names the field that holds it, in messages.
    trust_code: consent to import what it names (see `trust.trust_code`).

  Raises:
    trust.UntrustedCode: it names code, and nobody has consented.
    ValueError: it describes no part of the family.
  """
  if isinstance(config, base):
    return config
  what = where or base._role
  config = base.coerce(config)
  if isinstance(config, base):
    return config
  if isinstance(config, str):
    config = parse(config)
  if not isinstance(config, Mapping):
    raise ValueError(
      f"{what} = {reprlib.repr(config)}: give its kind and fields, as "
      f"{{'kind': '{next(iter(base._members), 'my_module:MyClass')}'}}"
    )
  name = config.get("kind")
  with trust.trust_code(trust_code):
    if isinstance(name, str) and ":" in name:
      kind = trust.load(name)
      if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(f"{name} is not a class derived from {base.__name__}; name one")
    elif isinstance(name, str) and name in base._members:
      kind = base._members[name]
    else:
      known = "there are none by name, so give module:Class"
      if base._members:
        known = f"did you mean {nearest(name, base._members)!r}? There are "
        known += ", ".join(base._members)
      at = f"{where}: " if where else ""
      raise ValueError(f"{at}unknown {base._role} {reprlib.repr(name)}; {known}")
    fields = {k: v for k, v in config.items() if k != "kind"}
    if "__dataclass_fields__" in vars(kind):  # not one of its bases alone
      fields = check_fields(kind, fields, kind._group or f"{kind.__name__}.")
    try:
      return kind.from_config({"kind": name, **fields})
    except TypeError as error:
      raise ValueError(f"{name} does not take these fields: {error}") from None


# --- Code that configs name -----------------------------------------------------------------------


_CODE = re.compile(r"\s*([\w.<>]+:(?!\d)[\w.<>]+)\s*(\(.*\))?\s*", re.DOTALL)


def code_in(text: str) -> str:
  """The "module:name" of a text such as "module:Class(size=3)", or ""."""
  match = _CODE.fullmatch(text)
  return match[1] if match and not match[1].startswith(("folder:", "pack:")) else ""


def code_of(config: Any) -> set[str]:
  """The names "module:name" of all code that a config names, in its parts too."""
  if isinstance(config, Mapping):
    return set().union(*map(code_of, config.values()))
  if isinstance(config, list | tuple):
    return set().union(*map(code_of, config))
  return {name for text in split(str(config), "+") if (name := code_in(text))}


def check_importable(config: Any) -> None:
  """Raises the ValueError of a part, or a part of it, that only this process knows."""
  for name in sorted(code_of(config)):
    if _is_of_this_process(name):
      raise ValueError(
        f"{name} cannot be imported again, so that no other program could open what is trained "
        "with it; put it into a module of its own, and its folder on PYTHONPATH"
      )


def _is_of_this_process(name: str) -> bool:
  """Whether no other process could import what "module:name" names.

  It is in a script, a notebook or a function, or in a file that was loaded without being on the
  path, as config files are.
  """
  root = name.partition(":")[0].partition(".")[0]
  if root == "__main__" or "<" in name:
    return True
  finders = [f for f in sys.meta_path if hasattr(f, "find_spec")]
  return root in sys.modules and not any(f.find_spec(root, None) for f in finders)
