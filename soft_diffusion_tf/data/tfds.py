"""Data sets of TFDS: their images and labels, and consent to the code that they may run."""

import contextlib
import functools
import json
import logging
import os
import pathlib
import re
import sys

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import packages, parts, trust
from soft_diffusion_tf.data import doctor, pictures
from soft_diffusion_tf.data.labels import numbered

_CONNECT, _ANSWER, _RETRIES = 5, 60, 2  # seconds for a server of TFDS, and further tries


def read(name, split, shape, crop, data_dir, progress, report):
  """(images, labels, names of the labels) of a data set, prepared; a report takes what is found."""
  with packages.needed("tensorflow-datasets", f"the data set {name!r}"):
    import tensorflow_datasets as tfds

  def decoded(record):
    """A record as TFDS decodes it, and the image's file beside it, which says how it is turned."""
    image = builder.info.features["image"].decode_example(record["image"])
    return {**record, "image": image, "file": record["image"]}

  remedy = "give TFDS its folder (data.data_dir), or check the name and the network"
  if os.path.isdir(name):
    remedy = f"of a folder of images write folder:{name}"
  try:
    builder = tfds.builder(name, data_dir=data_dir)
    if not builder.is_prepared():
      with _short_waits(tfds, progress):
        builder.download_and_prepare()
    read = tfds.ReadConfig(interleave_cycle_length=1)  # one file after the other: a fixed order
    split = "+".join(builder.info.splits) if split == "all" else split
    features = builder.info.features
    encoded = "image" in features and type(features["image"]) is tfds.features.Image
    files = encoded and features["image"].np_dtype == np.uint8
    dataset = builder.as_dataset(
      split=split,
      shuffle_files=False,
      read_config=read,
      decoders={"image": tfds.decode.SkipDecoding()} if files else None,
    )
    if files:  # in the pipeline, not image by image: that would cost half as much again
      dataset = dataset.map(decoded, tf.data.AUTOTUNE)
    total = builder.info.splits[split].num_examples
  except Exception as error:  # TFDS raises of its own, of requests' and of TensorFlow's kinds
    text = parts.first_line(error)
    raise ValueError(f"TFDS data set {name!r}, split {split!r}: {text}; {remedy}") from None
  if "image" not in features:
    raise ValueError(f"TFDS data set {name!r} has no 'image'; it has {list(features)}")
  crop = "centre" if crop == "auto" else crop
  labelled = "label" in features
  labels = []
  report.what = "examples"

  def pixels_of(example, where, done):
    """An example's image as uint8; alpha lies on the policy's colour unless it is asked for."""
    values = np.asarray(example["image"])
    if files:
      values = pictures.upright(values, example["file"])
    if values.ndim == 2:
      values = values[..., None]
    pixels = pictures.scaled(values, where)
    if pixels is not values:
      done.append(f"{values.dtype} scaled to 8 bits")
    if encoded and shape is not None and values.shape[2] in (2, 4) and shape[2] != values.shape[2]:
      pixels = pictures.on_background(pixels[..., :-1], pixels[..., -1], where, report.policy, done)
    return pixels, f"{values.shape[-1]} × {values.dtype}"

  def one(record):  # TFDS decodes in parallel; so are the images prepared
    k, example = record
    where, done = f"{name} example {k}", []
    pixels, mode = pixels_of(example, where, done)
    picture = pictures.Picture(pixels, "TFDS", mode, 1, tuple(done))
    return *doctor.examine(picture, where, shape, crop, report.policy), where

  def records():
    for k, example in enumerate(tfds.as_numpy(dataset.prefetch(tf.data.AUTOTUNE))):
      if labelled:
        labels.append(example["label"])
      yield k, example

  try:
    images, kept = doctor.collect(
      one,
      records(),
      total,
      report,
      shape,
      f"reading {name}",
      None if progress else True,
      lambda record: doctor.digest(record[1]["file" if files else "image"]),
    )
  except tf.errors.OpError as error:  # a file that is missing or damaged, or an image in it
    text = parts.first_line(error)
    raise ValueError(
      f"TFDS data set {name!r}, split {split!r}: {text}; copy or prepare it again"
    ) from None
  if not labelled:
    return images, np.zeros([len(kept)], np.int64), ()
  numbers, names = numbered(labels)
  if numbers is None:
    report.remarks.append(("labels", "'label' is not one class for each image: not taken"))
    numbers, names = np.zeros([len(labels)], np.int64), ()
  if not names and isinstance(features["label"], tfds.features.ClassLabel):
    names = tuple(features["label"].names)
  return images, numbers[kept], names


def check_consent(name, data_dir=None):
  """Raises the `trust.UntrustedCode` of a data set that a config names and that runs code.

  A TFDS name may have TFDS fetch or import a builder of somebody's, and the description of a
  prepared set beside the images, features.json, names classes that TFDS imports.
  """
  if not re.fullmatch(r"[A-Za-z]\w*(/[\w.-]+)?(:[\d*]+\.[\d*]+\.[\d*]+)?", name):
    trust.check(name, "a TFDS data set with a namespace or arguments")
  if not data_dir:
    return
  if not pathlib.Path(data_dir).is_dir():
    trust.check(data_dir, "a TFDS data_dir that is no local folder")
    return
  for file in pathlib.Path(data_dir).rglob("features.json"):

    def look(pairs, file=file):
      for key, kind in pairs:
        if (
          key in ("pythonClassName", "python_class_name", "type")
          and isinstance(kind, str)
          and "." in kind
          and not kind.startswith("tensorflow_datasets.")
        ):
          trust.check(kind, f"{file}: a class")

    try:
      json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=look)
    except trust.UntrustedCode:
      raise
    except (OSError, ValueError, RecursionError) as error:
      raise ValueError(f"{file}: not JSON ({error}); prepare the data set again") from None


@contextlib.contextmanager
def _short_waits(tfds, progress):
  """TFDS gives a server that does not answer up seconds, not minutes, after it was first asked."""
  from tensorflow_datasets.core.download import downloader

  if not (progress and sys.stderr.isatty()):
    tfds.disable_progress_bar()
  before = downloader.MAX_RETRIES, downloader._open_with_requests
  talk = logging.getLogger("urllib3.connectionpool")  # a warning for every try
  level = talk.level
  try:
    talk.setLevel(logging.ERROR)
    downloader.MAX_RETRIES = _RETRIES
    downloader._open_with_requests = functools.partial(before[1], timeout=(_CONNECT, _ANSWER))
    yield
  finally:
    downloader.MAX_RETRIES, downloader._open_with_requests = before
    talk.setLevel(level)
