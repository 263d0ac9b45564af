"""Consent to run code that a file names.

Workdirs, packed models and .keras files are data: to open one runs nothing of its author's. Such
data may name code outside this package, as "module:Class" of a corruption of one's own, and to
import a module runs all that it holds. So whatever is named in data is imported here, and here
alone, and only by consent:

    with trust_code():
      model = keras.models.load_model("model.keras")

The functions that open files take `trust_code=True` for the same, the programs `--trust_code`. A
config file is a program itself: who gives one by --config has consented to what it names.
"""

import contextlib
import contextvars
import importlib

_NOBODY: frozenset[str] = frozenset()
_consent: contextvars.ContextVar[bool | frozenset[str]] = contextvars.ContextVar(
  "consent", default=_NOBODY
)


class UntrustedCode(ValueError):
  """Data names code that its user has not consented to run."""


@contextlib.contextmanager
def trust_code(consent=True):
  """Within it, data may name code outside this package, and opening the data runs it.

  Args:
    consent: True: any code; names ("module:name"): these alone; False: what was agreed to outside.
  """
  if not consent:
    yield
    return
  before = _consent.get()
  both = True if True in (consent, before) else before | frozenset(consent)
  token = _consent.set(both)
  try:
    yield
  finally:
    _consent.reset(token)


def check(name, what="code of another module"):
  """Raises UntrustedCode unless there is consent to run what `name` names."""
  consent = _consent.get()
  if consent is not True and name not in consent:
    raise UntrustedCode(
      f"{what} is asked for, {name!r}, and to load that runs it; if you trust whoever wrote this, "
      "give --trust_code, in Python trust_code=True or `with soft_diffusion_tf.trust.trust_code():`"
    )


def load(name):
  """The object that "module:name" names, by consent.

  Raises:
    UntrustedCode: there is no consent.
    ValueError: it cannot be imported.
  """
  check(name)
  return find(name)


def find(name):
  """The object that "module:name" names, for a name from the user's own program."""
  module, _, attribute = name.partition(":")
  try:
    value = importlib.import_module(module)
    for part in attribute.split("."):
      value = getattr(value, part)
  except (Exception, SystemExit) as error:  # a module is a program: it may raise anything
    raise ValueError(
      f"cannot import {name!r} ({type(error).__name__}: {error}); is its folder on PYTHONPATH, and "
      "is it 'module:name'?"
    ) from error
  return value
