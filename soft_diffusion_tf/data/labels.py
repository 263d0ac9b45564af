"""Labels of any kind as numbers."""

import numpy as np


def numbered(labels):
  """(int64 [N], their names) of labels of any kind: numbers keep theirs, texts are numbered in the
  order of the alphabet. (None, ()) of what is not one whole number or text each.
  """
  try:
    values = np.asarray(labels)
  except ValueError:  # of several lengths
    return None, ()
  if values.ndim != 1 or values.dtype.kind not in "iubSUO":
    return None, ()
  if values.dtype.kind == "u" and values.size and values.max() >= 2**63:
    return None, ()
  if values.dtype.kind in "iub":
    return values.astype(np.int64), ()
  if not all(isinstance(label, bytes | str) for label in labels):
    return None, ()
  texts = [x.decode("utf-8", "replace") if isinstance(x, bytes) else str(x) for x in labels]
  names, numbers = np.unique(texts, return_inverse=True)
  return numbers.astype(np.int64), tuple(map(str, names))
