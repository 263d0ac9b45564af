"""Images: the built-in digits, any TFDS image set, or a folder; and the pipeline over them.

Every source is decoded once into uint8 [N, H, W, C], upright by its EXIF orientation; batches are
float32 in [0, 1]. Which image stands where is a function of (seed, step, position), so a run can go
on from any step.

A data set's name is "digits", "folder:PATH" or a TFDS name. "all", "train" and "test" are splits of
each: of the digits the first 1,500 and the last 297; of a folder every tenth image, in the order of
the paths, is held out for "test"; TFDS sets have their own, and take its slicing ("train[:10%]").
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import json
import logging
import os
import pathlib
import re
import struct
import sys

import numpy as np
import tensorflow as tf
import tqdm

from soft_diffusion_tf import packages, parts, rng, trust

DIGITS_TRAIN = 1500
SUFFIXES = (".png", ".jpg", ".jpeg")
CROPS = ("auto", "none", "centre", "celeb_a_140", "celeb_a_128")
FOLDER = "folder:"  # before the path of a folder of images
# What a file may hold, whatever its name ends in: pictures alone. Pillow would start another
# program for some other formats.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM", "JPEG2000")
_PNG_MARK, _PNG_NOTES = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_ORIENTATION = 0x0112  # the EXIF tag
_ORIENTED = re.compile(rb"(?i)exif|orientation")  # in a file that may have one
_CONNECT, _ANSWER, _RETRIES = 5, 60, 2  # seconds for a server of TFDS, and further tries


@dataclasses.dataclass(frozen=True)
class Source:
  """A data set in memory: images uint8 [N, H, W, C], labels int64 [N], and where it is from."""

  name: str
  images: np.ndarray
  labels: np.ndarray

  def __post_init__(self):
    if self.images.dtype != np.uint8:
      raise ValueError(
        f"{self.name}: a data set holds images as uint8 from 0 to 255, not {self.images.dtype}; "
        "give np.uint8(np.rint(255 * images)) of images in [0, 1]"
      )

  def __len__(self):
    return len(self.images)

  def floats(self, index=slice(None)):
    """Images float32 in [0, 1]."""
    return self.images[index].astype(np.float32) / 255.0


class Reader(parts.Part, role="data set"):
  """A data set of one's own: a part (see `parts`) with one method, `read`."""

  def read(self, split):
    """The images of a split, uint8 [N, H, W, C], or a pair of them and labels int64 [N]."""
    raise NotImplementedError

  def __str__(self):
    return parts.spell(self)


def reader_of(name):
  """The `Reader` that "module:Class(fields)" names, by consent; another name stays as it is.

  TFDS has names like "huggingface:mnist": a class is told by its capital letter, or by "()".
  """
  code = parts.code_in(name) if isinstance(name, str) else ""
  is_class = code.rpartition(":")[2].rpartition(".")[2][:1].isupper() or "(" in str(name)
  return parts.make(Reader, name) if code and is_class else name


def load(name, split="train", image_shape=None, crop="auto", data_dir=None, progress=True):
  """Decodes a data set.

  Args:
    name: "digits", "folder:PATH", a TFDS name, a `Reader` or "module:Class" of one.
    split: see the module's text.
    image_shape: (H, W, C) to give; None keeps what is there. Images are cropped (see `crop`), then
      resized by antialiased bilinear interpolation and rounded to 8 bits; colour becomes grey by
      the BT.601 weights, grey becomes three equal channels. Nothing is enlarged.
    crop: "none"; "centre" (the largest centred part of the target's shape); "celeb_a_140" (the
      centred 140×140 of Song et al. 2021); "celeb_a_128" (128×128 around x = 89, y = 121); "auto"
      is "celeb_a_140" for `celeb_a` and "centre" otherwise.
    data_dir: where TFDS keeps its data sets.

  Raises:
    ValueError: one line that names the data set or file, the cause and the remedy.
  """
  parts.check_choice("the crop", crop, CROPS)
  if image_shape is not None and len(image_shape) != 3:
    raise ValueError(f"an image shape is (height, width, channels), got {tuple(image_shape)}")
  name = reader_of(name)
  if isinstance(name, Reader):
    name, (images, labels) = str(name), _read(name, split)
    prepared = _prepare_each(images, [f"{name} {k}" for k in range(len(images))], image_shape, crop)
  elif name == "digits":
    images, labels = _digits(split)
    prepared = _prepare_each(images, [f"digit {k}" for k in range(len(images))], image_shape, crop)
  elif name.startswith(FOLDER):
    path = name[len(FOLDER) :]
    if not path.strip():
      raise ValueError(f"data set {name!r} names no folder; give {FOLDER}PATH")
    prepared, labels = _folder(pathlib.Path(path).expanduser(), split, image_shape, crop)
  else:
    _refuse_path(name)
    crop = "celeb_a_140" if crop == "auto" and name == "celeb_a" else crop
    prepared, labels = _tfds(name, split, image_shape, crop, data_dir, progress)
  return Source(name, prepared, labels)


def _read(reader, split):
  """The images and labels of a reader, checked."""
  found = reader.read(split)
  images, labels = found if isinstance(found, tuple) else (found, None)
  images = np.asarray(images)
  if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
    raise ValueError(
      f"{reader}: read({split!r}) must give images uint8 [N, H, W, C], got {images.dtype} "
      f"{list(images.shape)}"
    )
  labels = np.zeros([len(images)], np.int64) if labels is None else np.asarray(labels, np.int64)
  return images, labels


def _refuse_path(name):
  """Raises the ValueError of a path that stands where a data set's name belongs."""
  path = os.path.expanduser(name)
  looks = name.startswith(("/", "~", ".")) or (os.sep in name and os.path.exists(path))
  if not name.strip() or looks or not name.isprintable():
    hint = f" of a folder of images write {FOLDER}{name}," if looks else ""
    raise ValueError(
      f"data set {name!r} is no name;{hint} else digits or a name that TFDS has, such as cifar10"
    )


def _digits(split):
  with packages.needed("scikit-learn", "the built-in digits"):
    from sklearn.datasets import load_digits  # 8×8, values 0 … 16

  content = load_digits()
  images = np.rint(content.images * (255 / 16)).astype(np.uint8)[..., None]
  parts = {
    "all": slice(None),
    "train": slice(0, DIGITS_TRAIN),
    "test": slice(DIGITS_TRAIN, None),
  }
  if split not in parts:
    raise ValueError(f"digits has no split {split!r}; choose one of {', '.join(parts)}")
  return images[parts[split]], content.target[parts[split]].astype(np.int64)


# --- One image ----------------------------------------------------------------------------------


def _crop_box(height, width, shape, crop):
  """(top, left, height, width) of the part to keep."""
  if crop == "celeb_a_140":
    return (height - 140) // 2, (width - 140) // 2, 140, 140
  if crop == "celeb_a_128":
    return 121 - 64, 89 - 64, 128, 128
  if crop == "none" or shape is None:
    return 0, 0, height, width
  scale = min(height / shape[0], width / shape[1])
  h, w = round(shape[0] * scale), round(shape[1] * scale)
  return (height - h) // 2, (width - w) // 2, h, w


def prepare(image, where, shape, crop):
  """One decoded image uint8 [h, w, c] → uint8 `shape`; `where` names it in errors."""
  if image.ndim != 3 or image.shape[2] not in (1, 3):
    raise ValueError(
      f"{where}: {image.shape[-1] if image.ndim == 3 else '?'} channels; "
      "only grey and RGB images are taken: remove the alpha channel or convert the file"
    )
  top, left, h, w = _crop_box(*image.shape[:2], shape, crop)
  if top < 0 or left < 0 or top + h > image.shape[0] or left + w > image.shape[1]:
    raise ValueError(
      f"{where}: {image.shape[0]}×{image.shape[1]} pixels are too few for the crop {crop!r}"
    )
  image = image[top : top + h, left : left + w]
  if shape is None:
    return image
  if h < shape[0] or w < shape[1]:
    raise ValueError(
      f"{where}: {h}×{w} pixels after cropping, smaller than the {shape[0]}×{shape[1]} asked for; "
      "ask for a smaller image_shape or leave the image out"
    )
  if (h, w) != tuple(shape[:2]):
    resized = tf.image.resize(image, shape[:2], method="bilinear", antialias=True).numpy()
    image = np.rint(np.clip(resized, 0, 255)).astype(np.uint8)
  if image.shape[2] == shape[2]:
    return image
  if shape[2] == 3:
    return np.repeat(image, 3, axis=2)
  if shape[2] == 1:
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.rint(grey).astype(np.uint8)[..., None]
  raise ValueError(f"{where}: cannot give {shape[2]} channels; image_shape ends in 1 or 3")


def _prepare_each(images, names, shape, crop):
  if shape is None or tuple(shape) == images.shape[1:]:
    return images
  crop = "centre" if crop == "auto" else crop
  return np.stack([prepare(image, name, shape, crop) for image, name in zip(images, names)])


# --- Folder -------------------------------------------------------------------------------------


def list_images(folder):
  """Image files below a folder, sorted; a ValueError when there are none."""
  folder = pathlib.Path(folder)
  if folder.is_file():
    raise ValueError(f"{folder} is a file; give the folder that holds the images")
  if not folder.is_dir():
    raise ValueError(f"{folder}: no such folder of images; is the path right?")
  files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
  if not files:
    raise ValueError(f"{folder}: no {', '.join(SUFFIXES)} files in it or below; is the path right?")
  return files


def read_image(path):
  """One file as uint8 [h, w, 1 or 3], upright: turned and mirrored as its EXIF orientation says.

  Raises:
    ValueError: one line that names a file that cannot be used.
  """
  try:
    with open(path, "rb") as file:
      try:
        image = _decode(file)
      except Exception:  # notes in a PNG file must not make its pixels unreadable
        file.seek(0)
        if (pixels := _without_notes(file)) is None:
          raise
        image = _decode(pixels)
  except Exception as error:  # Pillow's decoders raise many kinds, errors of their own among them
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "UnidentifiedImageError":  # whose text is an object's address
      text = f"it is none of {', '.join(_FORMATS)}"
    large = isinstance(error, MemoryError) or type(error).__name__ == "DecompressionBombError"
    remedy = "make it smaller" if large else "remove or replace the file"
    raise ValueError(f"{path}: cannot be read as an image ({text}); {remedy}") from None
  if image.mode in ("L", "RGB"):
    array = np.asarray(image)
    return array.reshape(*array.shape[:2], -1)
  raise ValueError(
    f"{path}: mode {image.mode} is not taken; only 8-bit grey and RGB images are: convert the file"
  )


def _decode(file):
  """The image in an open file, upright; palettes and single bits are resolved.

  Not of a path, which Pillow would map into memory: it takes a TIFF lying on its side wrongly so.
  """
  from PIL import Image

  with Image.open(file, formats=_formats()) as image:
    image.load()
    turn = _turns().get(_orientation(image))
    if image.mode == "P":
      image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode == "1":
      image = image.convert("L")
    return image.copy() if turn is None else image.transpose(turn)


@functools.cache
def _formats():
  """Those of `_FORMATS` that this build of Pillow knows."""
  from PIL import Image

  Image.init()
  return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def _turns():
  """What brings an image of each EXIF orientation upright; 1 is upright."""
  from PIL.Image import Transpose

  return {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
  }  # fmt: skip


def _upright(pixels, content):
  """Decoded pixels [h, w, c], turned as the EXIF orientation in their file's bytes says."""
  from PIL import Image

  if not _ORIENTED.search(content):  # most files: no second look at them
    return pixels
  try:
    with Image.open(io.BytesIO(content), formats=_formats()) as image:
      turn = _turns().get(_orientation(image))
  except Exception:  # damaged for Pillow, not for TFDS
    return pixels
  if turn is None:
    return pixels
  turned = np.asarray(
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).transpose(turn)
  )
  return turned.reshape(*turned.shape[:2], -1)


def _orientation(image):
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except Exception:  # damaged notes, not damaged pixels
    return 1


def _without_notes(file):
  """An open PNG file without its texts and colour profile; None for what is no PNG file.

  Pillow refuses a file for a text that is long when unpacked, or damaged.
  """
  if file.read(len(_PNG_MARK)) != _PNG_MARK:
    return None
  kept = [_PNG_MARK]
  while len(head := file.read(8)) == 8:
    length, kind = struct.unpack(">I4s", head)
    rest = file.read(length + 4)  # with the checksum
    if kind not in _PNG_NOTES:
      kept += [head, rest]
  return io.BytesIO(b"".join(kept))


def _folder(folder, split, shape, crop):
  files = list_images(folder)
  held_out = np.arange(len(files)) % 10 == 9
  keep = {"all": held_out | True, "train": ~held_out, "test": held_out}.get(split)
  if keep is None:
    raise ValueError(f"a folder has no split {split!r}; choose one of all, train, test")
  files = [f for f, kept in zip(files, keep) if kept]
  if not files:
    raise ValueError(f"{folder}: the split {split!r} is empty; it takes at least 10 images")
  crop = "centre" if crop == "auto" else crop

  def one(path):
    return prepare(read_image(path), path, shape, crop)

  images = list(tqdm.tqdm(_in_parallel(one, files), "reading images", len(files), disable=None))
  shapes = {image.shape for image in images}
  if len(shapes) > 1:
    odd = next(f for f, image in zip(files, images) if image.shape != images[0].shape)
    raise ValueError(
      f"{odd}: its size or colour differs from {files[0].name}'s; bring the files to one, or set "
      "data.image_shape where images are trained on"
    )
  names = [str(f.parent.relative_to(folder)) for f in files]
  return np.stack(images), np.unique(names, return_inverse=True)[1].astype(np.int64)


# --- TFDS ---------------------------------------------------------------------------------------


def _tfds(name, split, shape, crop, data_dir, progress):
  with packages.needed("tensorflow-datasets", f"the data set {name!r}"):
    import tensorflow_datasets as tfds

  def decoded(record):
    """A record as TFDS decodes it, and the image's file beside it, which says how it is turned."""
    image = builder.info.features["image"].decode_example(record["image"])
    return {**record, "image": image, "file": record["image"]}

  remedy = "give TFDS its folder (data.data_dir), or check the name and the network"
  if os.path.isdir(name):
    remedy = f"of a folder of images write {FOLDER}{name}"
  try:
    builder = tfds.builder(name, data_dir=data_dir)
    if not builder.is_prepared():
      with _short_waits(tfds, progress):
        builder.download_and_prepare()
    read = tfds.ReadConfig(interleave_cycle_length=1)  # one file after the other: a fixed order
    split = "+".join(builder.info.splits) if split == "all" else split
    features = builder.info.features
    files = "image" in features and type(features["image"]) is tfds.features.Image
    files = files and features["image"].np_dtype == np.uint8
    dataset = builder.as_dataset(
      split=split, shuffle_files=False, read_config=read,
      decoders={"image": tfds.decode.SkipDecoding()} if files else None,
    )  # fmt: skip
    if files:  # in the pipeline, not image by image: that would cost half as much again
      dataset = dataset.map(decoded, tf.data.AUTOTUNE)
    total = builder.info.splits[split].num_examples
  except Exception as error:  # TFDS raises of its own, of requests' and of TensorFlow's kinds
    text = parts.first_line(error)
    raise ValueError(f"TFDS data set {name!r}, split {split!r}: {text}; {remedy}") from None
  if "image" not in builder.info.features:
    raise ValueError(f"TFDS data set {name!r} has no 'image'; it has {list(builder.info.features)}")
  crop = "centre" if crop == "auto" else crop
  labelled = "label" in builder.info.features

  def one(record):  # TFDS decodes in parallel; so are the images prepared
    k, record = record
    image = _upright(record["image"], record["file"]) if files else record["image"]
    if (shape is not None and tuple(shape) != image.shape) or crop.startswith("celeb_a"):
      image = prepare(image, f"{name} example {k}", shape, crop)
    return image, record["label"] if labelled else 0

  records = enumerate(tfds.as_numpy(dataset.prefetch(tf.data.AUTOTUNE)))
  bar = tqdm.tqdm(
    _in_parallel(one, records), f"reading {name}", total, disable=None if progress else True
  )
  images, labels = _allocate(name, total, shape), np.zeros([total], np.int64)
  try:
    for k, (image, label) in enumerate(bar):
      if images is None:
        images = _allocate(name, total, image.shape)
      if image.shape != images.shape[1:]:
        raise ValueError(f"{name}: images of several sizes; set data.image_shape")
      images[k], labels[k] = image, label
  except tf.errors.OpError as error:  # a file that is missing or damaged, or an image in it
    text = parts.first_line(error)
    raise ValueError(
      f"TFDS data set {name!r}, split {split!r}: {text}; copy or prepare it again"
    ) from None
  return images, labels


def check_consent(name, data_dir=None):
  """Raises the `trust.UntrustedCode` of a data set that a config names and that runs code.

  A TFDS name may have TFDS fetch or import a builder of somebody's, and the description of a
  prepared set beside the images, features.json, names classes that TFDS imports.
  """
  if isinstance(name, Reader) or name == "digits" or name.startswith("folder:"):
    return
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
        if (key in ("pythonClassName", "python_class_name", "type") and isinstance(kind, str)
            and "." in kind and not kind.startswith("tensorflow_datasets.")):  # fmt: skip
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


def _in_parallel(function, items, ahead=64):
  """The results of a function over an iterable, in order, a few computed ahead by threads."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    pending = collections.deque()
    for item in items:
      pending.append(pool.submit(function, item))
      if len(pending) > ahead:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()


def _allocate(name, count, shape):
  """Room for the decoded images, which stay in memory; None while their shape is not known."""
  if shape is None:
    return None
  try:
    return np.empty([count, *shape], np.uint8)
  except MemoryError:
    size = count * np.prod(shape, dtype=np.int64) / 2**30
    raise ValueError(
      f"{name}: {count} images of {tuple(shape)} take {size:.1f} GiB of memory; "
      "take a part of the split (such as train[:50%]) or smaller images"
    ) from None


# --- The pipeline -------------------------------------------------------------------------------


def order(position, count, seed):
  """Which image stands at each position of the endless stream: int64 [n] → int64 [n].

  Position p belongs to epoch p // count; every epoch is a permutation of its own, computed at the
  place that is asked for, so that any position can be had without the ones before it.
  """
  epoch, place = position // count, position % count
  key = tf.stack(
    [tf.fill(tf.shape(epoch), tf.cast(seed, tf.int64)), epoch, tf.zeros_like(epoch)], 1
  )
  last = tf.fill(tf.shape(place), tf.cast(count - 1, tf.int64))
  return tf.raw_ops.RandomIndexShuffle(index=place, seed=key, max_index=last, rounds=4)


def examples(images, index, first, seed=0, flip=False):
  """The images at an index, as a batch float32 [B, H, W, C] in [0, 1].

  Args:
    images: uint8 [N, H, W, C].
    index: int [B].
    first: the position in the endless stream of the batch's first image: it decides the flips.
    flip: mirror left-right with probability ½.
  """
  batch = tf.cast(tf.gather(images, index), tf.float32) / 255.0
  if not flip:
    return batch
  stream = tf.stack([tf.cast(seed, tf.int64), tf.constant(1, tf.int64)])
  draw = rng.uniform(stream, first, tf.shape(index)[0], (1, 1, 1))
  return tf.where(draw < 0.5, batch[:, :, ::-1], batch)


def batches(source, batch_size, *, seed=0, start=0, flip=False, replicas=(1, 1)):
  """An endless tf.data pipeline of float32 [batch_size, H, W, C] in [0, 1].

  Batch k of the pipeline is batch start + k of the run: a function of (seed, start + k) alone.

  Args:
    flip: mirror left-right with probability ½.
    replicas: (H, R) of `strategies.replicas_by_host`, for a pipeline that is to be distributed.
      TensorFlow cuts a batch into H·R parts and gives the hosts every H-th of them: they are put
      into the order in which replica r gets the r-th H·R-th of the batch.
  """
  hosts, each = replicas
  if len(source) < 1 or batch_size < 1:
    raise ValueError(f"cannot batch {len(source)} images by {batch_size}")
  with tf.device("CPU:0"):  # a GPU's memory is for the network
    images = tf.constant(source.images)

  def make(step):
    first = step * batch_size
    position = first + tf.range(batch_size, dtype=tf.int64)
    batch = examples(images, order(position, len(source), seed), first, seed, flip)
    if hosts > 1 < each:
      parts = tf.reshape(batch, [hosts, each, -1, *source.images.shape[1:]])
      batch = tf.reshape(tf.transpose(parts, [1, 0, 2, 3, 4, 5]), tf.shape(batch))
    return tf.ensure_shape(batch, [batch_size, *source.images.shape[1:]])

  steps = tf.data.Dataset.range(start, np.iinfo(np.int64).max)
  sharding = tf.data.Options()  # several workers take their parts of the same global batch
  sharding.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
  steps = steps.with_options(sharding)
  return steps.map(make, tf.data.AUTOTUNE, deterministic=True).prefetch(4)
