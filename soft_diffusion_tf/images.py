"""What an image is here: values in [0, 1]. `check_range` refuses all others, in one line."""

import numpy as np

SLACK = 0.01  # beyond [0, 1]: what resizing and added noise of a grey level may give


def check_floats(dtype, what):
  """Raises a ValueError for images of a dtype of whole numbers, such as uint8 from 0 to 255."""
  if not np.issubdtype(dtype, np.integer) and dtype != np.bool_:
    return
  raise ValueError(
    f"{what} are {np.dtype(dtype).name}, and images here are floats in [0, 1]: divide by 255, say"
  )


def check_range(images, what):
  """Raises a ValueError for images that hold NaN or values beyond [0, 1].

  Args:
    images: an array of any shape; of a sequence of arrays, or of its ends [low, high], the same.
    what: names them in the message.
  """
  images = np.asarray(images)
  if not images.size:
    return
  low, high = float(images.min()), float(images.max())  # NaN where one value is
  if low >= -SLACK and high <= 1 + SLACK:
    return
  if not np.isfinite([low, high]).all():
    raise ValueError(f"{what} hold NaN or infinity; clean the data or leave such images out")
  remedy = "clip them to it"
  if high > 2:
    remedy = "divide by 255, say"
  elif low < -2 * SLACK:
    remedy = "of images in [-1, 1] take (x + 1) / 2"
  raise ValueError(
    f"{what} run from {low:.4g} to {high:.4g}, and images here are floats in [0, 1]: {remedy}"
  )
