"""Images that a program has already: arrays, a `tf.data.Dataset`, or an object like a list."""

import dataclasses

import numpy as np
import tensorflow as tf

from soft_diffusion_tf.data import doctor, folders, pictures
from soft_diffusion_tf.data.labels import numbered
from soft_diffusion_tf.data.policy import Unusable


def is_own(source):
  """Whether an object holds images that can be read one after the other."""
  like_a_list = hasattr(source, "__len__") and hasattr(source, "__getitem__")
  return isinstance(source, tf.data.Dataset) or (like_a_list and not isinstance(source, str | dict))


def of_file(path, split, report):
  """(images, labels or None) of a split of a .npy file, or of images and labels in a .npz file."""
  remedy = "give images [N, H, W, C], in a .npz file by the name images, with or without labels"
  try:
    content = np.load(path, mmap_mode="r", allow_pickle=False)
    labels = None
    if not isinstance(content, np.ndarray):
      if "images" not in content.files:
        raise ValueError(f"its arrays are {', '.join(content.files) or 'none'}")
      images = content["images"]
      labels = content["labels"] if "labels" in content.files else None
    else:
      images = content
  except Exception as error:  # NumPy raises many kinds for what is no such file
    text = " ".join(str(error).split()) or type(error).__name__
    if "allow_pickle" in text:  # with NumPy's advice to load it
      text = "it holds pickled objects, which are never loaded"
    raise ValueError(f"{path}: cannot be read ({text}); {remedy}") from None
  if images.ndim != 4 or not len(images):
    raise ValueError(f"{path}: an array {list(images.shape)} is no set of images; {remedy}")
  if labels is not None and labels.shape[:1] != images.shape[:1]:
    raise ValueError(
      f"{path}: {len(images)} images and labels of the shape {list(labels.shape)}; give one label "
      "for each"
    )
  _check_channels(images.shape, report.shape, path)
  keep = folders.held_out(len(images), split, str(path))
  report.total = len(images)
  folders.remark_split(report, len(images), "image")
  if not keep.any():
    raise ValueError(f"{path}: the split {split!r} is empty; it takes at least 10 images")
  rows = images if keep.all() else _Rows(images, np.flatnonzero(keep))
  return rows, None if labels is None else labels[keep]


def _check_channels(shape, asked, name):
  """Raises the ValueError of a shape that looks like [N, C, H, W] and is not what is asked for."""
  n, c, h, w = shape
  if c in (1, 3, 4) and min(h, w) > 4 and shape[1:] != asked:
    raise ValueError(
      f"{name}: images {list(shape)} have their channels first; give them as {[n, h, w, c]}, by "
      "np.moveaxis(images, 1, -1)"
    )


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Some rows of an array, which may be a mapped file: read one by one."""

  images: np.ndarray
  index: np.ndarray

  def __len__(self):
    return len(self.index)

  def __getitem__(self, k):
    return self.images[self.index[k]]


def read(source, name, report, crop):
  """(images, labels, names of the labels) of such an object, each image prepared.

  Args:
    source: images [N, H, W, C], or a pair of them and labels [N]; a finite `tf.data.Dataset` or an
      object with __len__ and __getitem__ that gives images [H, W, C] or pairs (image, label).
      Images are uint8, uint16, or floats in [0, 1].
  """
  report.what, crop = "images", "centre" if crop == "auto" else crop
  found, given = _apart(source)
  if isinstance(found, np.ndarray):
    if found.ndim != 4 or not len(found):
      raise ValueError(f"{name}: give images [N, H, W, C], not an array {list(found.shape)}")
    _check_channels(found.shape, report.shape, name)
    if given is not None and np.shape(given)[:1] != found.shape[:1]:
      raise ValueError(f"{name}: {len(found)} images and labels of shape {list(np.shape(given))}")
  as_it_is = isinstance(found, np.ndarray) and report.shape in (None, found.shape[1:])
  if as_it_is and found.dtype == np.uint8 and not isinstance(found, np.memmap):
    images, numbers = _seen(found, name, report), given
  else:
    numbers = [] if given is None else given
    keep = None if given is not None else numbers
    images, kept = doctor.collect(
      lambda item: _one(item, name, report, crop),
      enumerate(_items(found, name, keep)),
      None if isinstance(found, tf.data.Dataset) else len(found),
      report,
      report.shape,
      "reading images",
      stamp=lambda item: doctor.digest(item[1]),
    )
    if not report.count:
      raise ValueError(f"{name} holds no images")
    if not len(numbers) or not kept:
      numbers = None
    elif given is not None or len(numbers) == report.count:
      numbers = [numbers[k] for k in kept]
    else:
      raise ValueError(f"{name}: some items have a label and some have none")
  if numbers is None:
    return images, np.zeros([0 if images is None else len(images)], np.int64), ()
  numbers, names = numbered(list(numbers))
  if numbers is None:
    raise ValueError(f"{name}: labels must be one whole number or text for each image")
  return images, numbers, names


def _apart(source):
  """(images, labels or None) of a pair of arrays; what else there is, and None."""
  if isinstance(source, tuple) and len(source) == 2:
    images, labels = source
    if isinstance(images, _Rows):
      return images, labels
    if isinstance(images, np.ndarray | tf.Tensor) and images.ndim == 4:
      images = images if isinstance(images, np.ndarray) else np.asarray(images)
      return images, None if labels is None else np.asarray(labels)
  return (np.asarray(source) if isinstance(source, tf.Tensor) else source), None


def _items(found, name, numbers):
  """The images one by one; their labels are put into a list."""
  if isinstance(found, tf.data.Dataset):
    if found.cardinality() == tf.data.INFINITE_CARDINALITY:
      raise ValueError(f"{name} is endless: give one pass over the images, without repeat()")
    items = found.as_numpy_iterator()
  else:
    items = (found[k] for k in range(len(found)))
  for item in items:
    image, label = item, None
    if isinstance(item, dict) and "image" in item:
      image, label = item["image"], item.get("label")
    elif isinstance(item, tuple) and len(item) == 2:
      image, label = item
    image = np.asarray(image)
    if image.ndim == 4:  # a batch
      if label is not None:
        numbers.extend(np.asarray(label))
      yield from image
      continue
    if label is not None:
      numbers.append(label)
    yield image


def _one(item, name, report, crop):
  """(prepared pixels, facts, place) of an image of any type."""
  k, image = item
  where = f"{name} {k}"
  if image.ndim == 2:
    image = image[..., None]
  if image.ndim != 3 or not image.size:
    raise Unusable("unreadable", where, f"{list(image.shape)} is no image [H, W, C]")
  done = () if image.dtype == np.uint8 else (f"{image.dtype} scaled to 8 bits",)
  pixels = pictures.scaled(image, where)
  picture = pictures.Picture(pixels, "array", f"{image.shape[2]} × {image.dtype}", 1, done)
  return *doctor.examine(picture, where, report.shape, crop, report.policy), where


def _seen(images, name, report):
  """Images uint8 that stay as they are, without a copy; the report takes what is found."""
  for k, image in enumerate(images):
    picture = pictures.Picture(image, "array", f"{image.shape[2]} × {image.dtype}")
    _, facts = doctor.examine(picture, f"{name} {k}", report.shape, "none", report.policy)
    report.add(f"{name} {k}", facts)
  return images
