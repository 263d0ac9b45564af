"""Packages that only a part of the work needs: imported where they are used, named when missing.

with packages.needed("scikit-learn", "the built-in digits"):
  from sklearn.datasets import load_digits
"""

import contextlib


@contextlib.contextmanager
def needed(package, purpose, instead=""):
  """Turns a failed import within it into one line that says what to install.

  Args:
    package: the name that pip knows it by.
    purpose: what needs it.
    instead: another way, if there is one.

  Raises:
    ValueError: something could not be imported.
  """
  try:
    yield
  except ImportError as error:
    text = " ".join(str(error).split())
    remedy = f"pip install '{package}'" + (f", or {instead}" if instead else "")
    raise ValueError(f"{purpose} needs {package} ({text}); {remedy}") from error
