"""Where images come from: what is built in, a reader of one's own, folders, TFDS; and `load`."""

import dataclasses
import hashlib
import os
import pathlib

import numpy as np

from soft_diffusion_tf import packages, parts
from soft_diffusion_tf.data import doctor, folders, glyphs, own, pack, pictures, tfds
from soft_diffusion_tf.data.policy import Policy

DIGITS_TRAIN = 1500
FOLDER, PACK = folders.PREFIX, pack.PREFIX
BUILT_IN = ("digits", glyphs.NAME)
GIVEN = "given"  # how the names of images begin that a program hands over


@dataclasses.dataclass(frozen=True)
class Source:
  """A data set in memory: images uint8 [N, H, W, C], labels int64 [N], and where it is from.

  `label_names[k]` is the name of label k, where labels have names; `report` is the doctor's table,
  in lines.
  """

  name: str
  images: np.ndarray
  labels: np.ndarray
  label_names: tuple[str, ...] = ()
  report: tuple[str, ...] = dataclasses.field(default=(), compare=False, repr=False)

  def __post_init__(self):
    if self.images.dtype != np.uint8:
      raise ValueError(
        f"{self.name}: a data set holds images as uint8 from 0 to 255, not {self.images.dtype}; "
        "give np.uint8(np.rint(255 * images)) of images in [0, 1]"
      )

  def __len__(self):
    return len(self.images)

  def digest(self):
    """A digest of images and labels, which are not copied for it."""
    total = hashlib.sha256(repr(self.images.shape).encode())
    for k in range(0, len(self), 4096):
      total.update(np.ascontiguousarray(self.images[k : k + 4096]))
    total.update(np.ascontiguousarray(self.labels))
    return total.hexdigest()

  def floats(self, index=slice(None)):
    """Images float32 in [0, 1]."""
    return self.images[index].astype(np.float32) / 255.0


class Reader(parts.Part, role="data set"):
  """A data set of one's own: a part (see `parts`) with one method, `read`.

  Or with `__len__` and `__getitem__`, which gives an image [H, W, C] or a pair (image, label): then
  every tenth belongs to the split "test", the others to "train".
  """

  def read(self, split):
    """The images of a split, or a pair of them and their labels: what `own.read` takes.

    uint8, uint16 or floats in [0, 1]: an array [N, H, W, C], a `tf.data.Dataset` or a list.
    """
    if not own.is_own(self):
      raise NotImplementedError
    keep = folders.held_out(len(self), split, str(self))
    return [self[int(k)] for k in np.flatnonzero(keep)]

  def __str__(self):
    return parts.spell(self)


def reader_of(name):
  """The `Reader` that "module:Class(fields)" names, by consent; another name stays as it is.

  TFDS has names like "huggingface:mnist": a class is told by its capital letter, or by "()".
  """
  code = parts.code_in(name) if isinstance(name, str) else ""
  is_class = code.rpartition(":")[2].rpartition(".")[2][:1].isupper() or "(" in str(name)
  return parts.make(Reader, name) if code and is_class else name


def survey(
  name, split="all", image_shape=None, crop="auto", data_dir=None, progress=True, policy=None
):
  """The doctor's `Report` of a data set: like `load`, but nothing is kept and nothing refused.

  Without an image shape nothing is asked of the images' sizes.
  """
  return _read_all(name, split, image_shape, crop, data_dir, progress, policy, False)[-1]


def load(
  name,
  split="train",
  image_shape=None,
  crop="auto",
  data_dir=None,
  progress=True,
  policy=None,
  say=None,
  storage=None,
  most=None,
):
  """Decodes a data set.

  Args:
    name: "digits", "glyphs", "folder:PATH" of a folder or of a zip, .npy or .npz file, "pack:PATH"
      of a pack, a TFDS name, a `Reader` or "module:Class" of one; or images themselves, all of them
      whatever the split: a `Source`, or what `own.read` takes.
    split: "all", "train", "test" (see the package's text), what TFDS has, or "folder:PATH" of
      another folder, which is the split.
    image_shape: (H, W, C) to give; None keeps what is there. Images are cropped (see `crop`), then
      resized by antialiased bilinear interpolation and rounded to 8 bits; colour becomes grey by
      the BT.601 weights, grey becomes three equal channels. Nothing is enlarged but by the policy.
    crop: "none"; "centre" (the largest centred part of the target's shape); "celeb_a_140" (the
      centred 140×140 of Song et al. 2021); "celeb_a_128" (128×128 around x = 89, y = 121); "auto"
      is "celeb_a_140" for CelebA, by TFDS or a folder, and "centre" otherwise.
    data_dir: where TFDS keeps its data sets.
    policy: a `Policy`: what happens to images that cannot be taken as they are.
    say: a function that gets the lines of the doctor's table, before anything is refused.
    storage: where the images go, in place of a `doctor.Storage` of `most` bytes.
    most: bytes of images that are held in memory; more stay in the file of a pack, and of other
      sources in a temporary one. None: a pack stays in its file, and all others in memory.

  Raises:
    ValueError: one line that names the data set or file, the cause and the remedy.
  """
  name, images, labels, names, report = _read_all(
    name, split, image_shape, crop, data_dir, progress, policy, True, storage, most
  )
  lines = tuple(report.lines())
  for line in lines if say is not None else ():
    say(line)
  report.check()
  if images is None:
    raise ValueError(f"{name}: the split {split!r} holds no images; take another")
  return Source(name, images, labels, names, lines)  # what it kept of each image is let go


def _read_all(
  name, split, image_shape, crop, data_dir, progress, policy, keep, storage=None, most=None
):
  """(name, images or None, labels, their names, report) of a data set."""
  parts.check_choice("the crop", crop, pictures.CROPS)
  if image_shape is not None and not (
    len(image_shape) == 3 and all(isinstance(n, int | np.integer) and n > 0 for n in image_shape)
  ):
    raise ValueError(f"an image shape is (height, width, channels), got {tuple(image_shape)}")
  policy, name = policy or Policy(), reader_of(name)
  own_folder = isinstance(split, str) and split.startswith(FOLDER)
  if own_folder:
    name, split = split, "all"
  shape = None if image_shape is None else tuple(image_shape)
  known = isinstance(name, str | Reader)
  label = str(name) if known else getattr(name, "name", f"the {type(name).__name__}")
  storage = storage or doctor.Storage(most)
  report = doctor.Report(label, split if known else "all", shape, policy, keep, storage)
  report.whole_split = own_folder
  if isinstance(name, Source):
    given = (name.images, name.labels)
    name, names = name.name, name.label_names
    prepared, labels, _ = own.read(given, name, report, crop)
  elif isinstance(name, Reader):
    found, name = name.read(split), str(name)
    if not own.is_own(found):
      raise ValueError(f"{name}: read({split!r}) gives a {type(found).__name__}, no images")
    prepared, labels, names = own.read(found, name, report, crop)
  elif own.is_own(name):
    prepared, labels, names = own.read(name, f"the {type(name).__name__}", report, crop)
    name = _name_of(prepared, labels)
  elif not isinstance(name, str):
    raise ValueError(
      f"a {type(name).__name__} is no data set; give images [N, H, W, C], a tf.data.Dataset, or an "
      "object with __len__ and __getitem__"
    )
  elif name == "digits":
    prepared, labels, _ = own.read(_digits(split), "digit", report, crop)
    names = tuple(map(str, range(10)))
  elif name == glyphs.NAME:
    images, labels = glyphs.images()
    keep = folders.held_out(len(images), split, name)
    folders.remark_split(report, len(images), "image")
    prepared, labels, _ = own.read((images[keep], labels[keep]), "glyph", report, crop)
    names = tuple(map(str.lower, glyphs.ALPHABETS))
  elif name.startswith(PACK):
    path = _expanded(name[len(PACK) :], name)
    prepared, labels, names, index = pack.read(path, split, shape, crop, policy, most, progress)
    report.packed(index, len(prepared))
  elif name.startswith(FOLDER):
    path = name[len(FOLDER) :]
    folder = _expanded(path, name)
    if folder.suffix in (".npy", ".npz") and folder.is_file():
      prepared, labels, names = own.read(own.of_file(folder, split, report), folder, report, crop)
    else:
      prepared, labels, names = folders.read(folder, split, shape, crop, report)
  else:
    _refuse_path(name)
    crop = "celeb_a_140" if crop == "auto" and name == "celeb_a" else crop
    prepared, labels, names = tfds.read(name, split, shape, crop, data_dir, progress, report)
  report.count_labels(labels, names)
  return name, prepared, labels, names, report


def _expanded(path, name):
  """A path with the home folder in the place of ~."""
  if not path.strip():
    raise ValueError(f"data set {name!r} names no folder; give {name.partition(':')[0]}:PATH")
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError:
    raise ValueError(f"data set {name!r}: there is no such user; give the whole path") from None


def check_consent(name, data_dir=None):
  """Raises the `trust.UntrustedCode` of a data set that a config names and that runs code.

  A TFDS name may have TFDS fetch or import a builder of somebody's, and the description of a
  prepared set beside the images, features.json, names classes that TFDS imports.
  """
  if not (isinstance(name, Reader) or name in BUILT_IN or name.startswith((FOLDER, PACK))):
    tfds.check_consent(name, data_dir)


def _name_of(images, labels):
  """The name of images that were given by a program: no other images have it."""
  if images is None:
    return GIVEN
  return f"{GIVEN} {Source(GIVEN, images, labels).digest()[:12]}"


def _refuse_path(name):
  """Raises the ValueError of a path that stands where a data set's name belongs."""
  if name.startswith(GIVEN + " "):
    raise ValueError(
      f"data set {name!r} was handed to training.train by a program, which alone has it; give its "
      "images again (source=…), or name a data set"
    )
  path = os.path.expanduser(name)
  looks = name.startswith(("/", "~", ".")) or (os.sep in name and os.path.exists(path))
  if not name.strip() or looks or not name.isprintable():
    hint = f" of a folder of images write {FOLDER}{name}," if looks else ""
    raise ValueError(
      f"data set {name!r} is no name;{hint} else digits, glyphs or a name that TFDS has, such as "
      "cifar10"
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
