"""One picture: a file of any still format → uint8 [h, w, c], upright, in sRGB; then cut and shrunk.

What a viewer shows is what is read. A format is told by a file's content. The EXIF orientation is
applied. A colour profile (ICC) is followed to sRGB. Palettes, single bits, CMYK, 16 bits and floats
in [0, 1] become 8 bits. Transparency lies on a colour. Of an animation the first frame is taken.
8-bit grey and RGB pictures without a profile keep their bits.
"""

import dataclasses
import functools
import io
import os
import re
import struct

import numpy as np
import tensorflow as tf

from soft_diffusion_tf.data import tiff
from soft_diffusion_tf.data.policy import Policy, Unusable

CROPS = ("auto", "none", "centre", "celeb_a_140", "celeb_a_128")
# What a file may hold, whatever its name ends in: pictures alone. Pillow would start another
# program for some other formats.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM", "JPEG2000")
_ARRAY_MARK = b"\x93NUMPY"
_PNG_MARK, _PNG_NOTES = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_ORIENTATION = 0x0112  # the EXIF tag
_BITS, _WHITE, _SAMPLES = 258, 262, 339  # tags of TIFF: bits, whether 0 is white, kind of number
_ORIENTED = re.compile(rb"(?i)exif|orientation")  # in a file that may have one
_SIXTEEN = 257.0  # 65535 / 255
_CLEAR = {"L;2": 3, "L;4": 15}  # white of a PNG whose transparent grey Pillow does not scale
_LIKE_SRGB = 2  # levels by which a profile may move a colour and count as sRGB: it rounds


@dataclasses.dataclass(frozen=True)
class Picture:
  """A picture as it was read: pixels uint8 [h, w, c], and what was found and done on the way."""

  pixels: np.ndarray
  format: str
  mode: str
  orientation: int = 1
  done: tuple[str, ...] = ()


def read_image(path, policy=None, channels=None):
  """One file as uint8 [h, w, c], upright and in sRGB.

  Args:
    policy: of transparency; by default it lies on white.
    channels: the number asked for: 2 or 4 keep an alpha channel, and of a TIFF file with so many
      bands all are read. Else c is 1 or 3, but of a .npy file its own.

  Raises:
    Unusable: one line that names a file that cannot be used.
  """
  return read(path, policy, channels).pixels


def read(path, policy=None, channels=None):
  """Like `read_image`, as a `Picture`."""
  policy = policy or Policy()
  try:
    with opened(path) as file:
      mark = file.read(len(_ARRAY_MARK))
      file.seek(0)
      if mark == _ARRAY_MARK:
        return _read_array(file, path)
      if channels not in (None, 1, 3) and (bands := tiff.read_bands(file, channels)) is not None:
        return _of_bands(*bands, path)
      if tiff.check_planes(file):
        return _of_bands(*tiff.read_bands(file), path)
      try:
        return _decode(file, path, policy, channels)
      except Unusable:
        raise
      except Exception as error:
        file.seek(0)
        unknown = type(error).__name__ == "UnidentifiedImageError"  # as are floats of three colours
        if unknown and (bands := tiff.read_bands(file)) is not None:
          return _of_bands(*bands, path)
        if (pixels := _without_notes(file)) is None:
          raise
        return _decode(pixels, path, policy, channels)  # notes must not make pixels unreadable
  except Unusable:
    raise
  except Exception as error:  # Pillow's decoders raise many kinds, errors of their own among them
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "UnidentifiedImageError":  # whose text is an object's address
      text = f"it is none of {', '.join(_FORMATS)}, or damaged"
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
      text = "it is a link to a file that is not there"
    large = isinstance(error, MemoryError) or type(error).__name__ == "DecompressionBombError"
    kind = "too large" if large else "unreadable"
    raise Unusable(kind, path, f"cannot be read as an image ({text})") from None


def opened(path):
  """An open file: of a path, or of a member of an archive (`folders.Member`)."""
  return path.open("rb") if hasattr(path, "open") else open(path, "rb")


def is_picture(path):
  """Whether a file's content begins like a picture's, whatever its name ends in."""
  from PIL import Image

  try:
    with opened(path) as file:
      if file.read(len(_ARRAY_MARK)) == _ARRAY_MARK:
        return True
      file.seek(0)
      with Image.open(file, formats=_formats()):
        return True
  except Exception:  # whatever it is, it is no picture
    return False


@functools.cache
def suffixes():
  """What the names of pictures end in, in small letters."""
  from PIL import Image

  Image.init()
  known = {suffix for suffix, name in Image.EXTENSION.items() if name in _FORMATS}
  return frozenset(known | {".npy", ".avif", ".webp"})


# --- Decoding -------------------------------------------------------------------------------------


def _decode(file, path, policy, channels):
  """The picture in an open file.

  Not of a path, which Pillow would map into memory: it takes a TIFF lying on its side wrongly so.
  """
  from PIL import Image

  with Image.open(file, formats=_formats()) as image:
    raw = image.tile[0][3] if image.tile else ""  # before it is loaded
    image.load()
    if (most := _CLEAR.get(raw if isinstance(raw, str) else "")) and "transparency" in image.info:
      image.info["transparency"] = image.info["transparency"] * 255 // most
    orientation = _orientation(image)
    done: list[str] = []
    pixels = _colours(image, path, policy, channels, done)
    if orientation in _TURNS:
      pixels = np.ascontiguousarray(_TURNS[orientation](pixels))
      done.append("turned upright")
    if image.format != "MPO" and _moves(image):
      done.append("first frame of several")
    return Picture(pixels, image.format, image.mode, orientation, tuple(done))


def _colours(image, path, policy, channels, done):
  """The pixels of a loaded Pillow image: uint8, grey or RGB, with alpha where it is asked for."""
  mode, alpha, profile = image.mode, None, image.info.get("icc_profile")
  if image.format == "TIFF" and mode == "L" and _tag(image, _SAMPLES) == 2:
    raise Unusable("values", path, "signed whole numbers, whose white is not known")
  if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
    values = _as_shown(image, 65535)
    if (clear := image.info.get("transparency")) is not None:
      alpha = np.where(values == clear, 0, 255).astype(np.uint8)
    image = _picture_of(scaled(values.astype(np.uint16), path))
    done.append("16 bits scaled to 8")
  elif mode in ("F", "I"):
    values = _as_shown(image, 1.0)
    if mode == "I":
      raise Unusable("values", path, "32-bit whole numbers, whose white is not known")
    image = _picture_of(scaled(values, path))
    done.append("floats scaled to 8 bits")
  elif mode in ("P", "1", "L", "RGB") and "transparency" in image.info:
    clear = image.info["transparency"]
    if mode == "RGB" and max(clear) > 255:  # of 16 bits, of which Pillow has taken the upper eight
      image.info["transparency"] = tuple(value >> 8 for value in clear)
    image = image.convert("LA" if mode in ("1", "L") else "RGBA")
  elif mode == "1":
    image = image.convert("L")
  elif mode == "PA" or mode == "RGBa":
    image = image.convert("RGBA")
  elif mode == "La":
    image = image.convert("LA")
  elif mode == "LAB":
    image, profile = _from_lab(image), None
  elif mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
    image = image.convert("RGB")  # P, YCbCr, HSV, RGBX
  if mode in ("P", "PA", "1", "CMYK", "YCbCr", "HSV", "LAB"):
    done.append({"P": "palette", "PA": "palette", "1": "1 bit"}.get(mode, mode) + " resolved")
  if image.mode in ("LA", "RGBA"):
    alpha = np.asarray(image.getchannel("A"))
    image = image.convert(image.mode[:-1])
  image = _into_srgb(image, profile, done)
  if image.mode == "CMYK":
    image = image.convert("RGB")
  pixels = np.asarray(image)
  pixels = pixels.reshape(*pixels.shape[:2], -1)
  if alpha is None:
    return pixels
  if channels == pixels.shape[2] + 1:
    return np.concatenate([pixels, alpha[..., None]], 2)
  return on_background(pixels, alpha, path, policy, done)


def _tag(image, number):
  """The value of a tag of a TIFF file, the first of several; None where there is none."""
  value = getattr(image, "tag_v2", {}).get(number)
  return value[0] if isinstance(value, tuple) and value else value


def _as_shown(image, most):
  """The numbers of a grey image of more than 8 bits, from black to `most`.

  Pillow leaves 12 bits of a TIFF file as they are, and of more than 8 bits those whose white is 0.
  """
  values = np.asarray(image)
  if image.format != "TIFF":
    return values
  if _tag(image, _BITS) == 12:
    values = np.rint(values * (65535 / 4095)).astype(np.uint16)
  return most - values if _tag(image, _WHITE) == 0 else values


def on_background(pixels, alpha, where, policy, done=None):
  """Pixels uint8 [h, w, c] with alpha [h, w] on the policy's colour, as a viewer shows them."""
  if alpha.min(initial=255) == 255:
    return pixels
  if policy.background is None:
    raise Unusable("transparent", where, "it has transparent pixels")
  behind = np.array(policy.background, np.float32)
  if pixels.shape[2] == 1 and len(set(policy.background)) == 1:
    behind = behind[:1]
  share = alpha[..., None].astype(np.float32) / 255.0
  if done is not None:
    done.append(f"transparency laid onto {policy.transparency}")
  return np.rint(share * pixels + (1 - share) * behind).astype(np.uint8)


def scaled(values, where):
  """An array of another type as uint8: 16 bits by 1/257, floats in [0, 1] by 255, bits by 255.

  Raises:
    Unusable: numbers that are none of these, or beyond their range.
  """
  values = values.astype(values.dtype.newbyteorder("="), copy=False)
  if values.dtype == np.uint8:
    return values
  if values.dtype == np.uint16:
    return np.rint(values / _SIXTEEN).astype(np.uint8)
  if values.dtype == np.bool_:
    return np.where(values, np.uint8(255), np.uint8(0))
  kind, low, high = values.dtype.kind, 0.0, 0.0
  if kind not in "fiu":
    raise Unusable("values", where, f"{values.dtype} is no number of an image")
  if values.size:
    low, high = float(values.min()), float(values.max())  # NaN where one value is
  most, slack = (1.0, 0.01) if kind == "f" else (255.0, 0.0)
  if not (low >= -slack and high <= most + slack):
    raise Unusable(
      "values", where, f"{values.dtype} values from {low:.4g} to {high:.4g}, not in [0, {most:g}]"
    )
  if kind != "f":
    return values.astype(np.uint8)
  return np.rint(np.clip(values.astype(np.float64), 0, 1) * 255).astype(np.uint8)


def _read_array(file, path):
  """The picture in a .npy file: [h, w] or [h, w, c]."""
  return _of_array(np.load(file, allow_pickle=False), path, "NPY")


def _of_bands(values, orientation, path):
  """The picture of what `tiff.read_bands` gives."""
  picture = _of_array(values, path, "TIFF")
  if orientation not in _TURNS:
    return picture
  pixels = np.ascontiguousarray(_TURNS[orientation](picture.pixels))
  done = (*picture.done, "turned upright")
  return dataclasses.replace(picture, pixels=pixels, orientation=orientation, done=done)


def _of_array(values, path, kind):
  if values.ndim == 2:
    values = values[..., None]
  if values.ndim != 3 or not values.size:
    raise Unusable("unreadable", path, f"an array {list(values.shape)} is no image [h, w, c]")
  done = () if values.dtype == np.uint8 else (f"{values.dtype} scaled to 8 bits",)
  return Picture(scaled(values, path), kind, f"{values.shape[2]} × {values.dtype}", 1, done)


def _picture_of(pixels):
  from PIL import Image

  return Image.fromarray(pixels)


def _into_srgb(image, profile, done):
  """An image in sRGB, by the colour profile in its file: grey stays grey."""
  if not profile or image.mode not in ("L", "RGB", "CMYK"):
    return image
  transform = _transform(profile, image.mode)
  if transform is None:
    return image
  from PIL import ImageCms

  done.append("colour profile followed to sRGB")
  converted = ImageCms.applyTransform(image, transform)
  return converted.getchannel("G") if image.mode == "L" else converted


@functools.lru_cache(maxsize=64)
def _transform(profile, mode):
  """What brings colours of a profile to sRGB; None where it is sRGB, or cannot be used."""
  try:
    from PIL import Image, ImageCms

    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
      return transform
    ramp = np.arange(0, 256, 1 if mode == "L" else 15, dtype=np.uint8)
    cube = np.stack(np.meshgrid(ramp, ramp, ramp), -1).reshape(1, -1, 3)
    probe = ramp[None] if mode == "L" else cube
    moved = np.asarray(ImageCms.applyTransform(Image.fromarray(probe), transform), int)
    before = np.repeat(probe[..., None], 3, -1) if mode == "L" else probe
    return None if np.abs(moved - before).max() <= _LIKE_SRGB else transform
  except Exception:  # damaged, of another kind of image, or Pillow without LittleCMS
    return None


def _from_lab(image):
  from PIL import ImageCms

  lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
  return ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))


@functools.cache
def _formats():
  """Those of `_FORMATS` that this build of Pillow knows."""
  from PIL import Image

  Image.init()
  return tuple(name for name in _FORMATS if name in Image.OPEN)


_ACROSS = lambda a: np.swapaxes(a, 0, 1)
# What brings pixels of each EXIF orientation upright; 1 is upright.
_TURNS = {
  2: lambda a: a[:, ::-1],
  3: lambda a: a[::-1, ::-1],
  4: lambda a: a[::-1],
  5: _ACROSS,
  6: lambda a: _ACROSS(a)[:, ::-1],
  7: lambda a: _ACROSS(a)[::-1, ::-1],
  8: lambda a: _ACROSS(a)[::-1],
}


def upright(pixels, content):
  """Decoded pixels [h, w, c], turned as the EXIF orientation in their file's bytes says."""
  from PIL import Image

  if not _ORIENTED.search(content):  # most files: no second look at them
    return pixels
  try:
    with Image.open(io.BytesIO(content), formats=_formats()) as image:
      orientation = _orientation(image)
  except Exception:  # damaged for Pillow, not for TFDS
    return pixels
  if orientation not in _TURNS:
    return pixels
  return np.ascontiguousarray(_TURNS[orientation](pixels))


def _orientation(image):
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except Exception:  # damaged notes, not damaged pixels
    return 1


def _moves(image):
  try:
    return bool(getattr(image, "is_animated", False))
  except Exception:  # a damaged second frame
    return True


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


# --- Cutting and shrinking ------------------------------------------------------------------------


def crop_box(height, width, shape, crop):
  """(top, left, height, width) of the part to keep."""
  if crop == "celeb_a_140":
    return (height - 140) // 2, (width - 140) // 2, 140, 140
  if crop == "celeb_a_128":
    return 121 - 64, 89 - 64, 128, 128
  if crop == "none" or shape is None:
    return 0, 0, height, width
  scale = min(height / shape[0], width / shape[1])
  h, w = max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
  return (height - h) // 2, (width - w) // 2, h, w


def prepare(image, where, shape, crop, enlarge=False):
  """One decoded image uint8 [h, w, c] → uint8 `shape`; `where` names it in errors.

  Raises:
    Unusable: it is too small, or has other channels.
  """
  if image.ndim != 3 or (image.shape[2] not in (1, 3) and shape and image.shape[2] != shape[2]):
    raise Unusable(
      "channels",
      where,
      f"{image.shape[-1] if image.ndim == 3 else '?'} channels; only grey and RGB images are taken"
      + (f" where {shape[2]} are asked for" if shape else ""),
    )
  top, left, h, w = crop_box(*image.shape[:2], shape, crop)
  if top < 0 or left < 0 or top + h > image.shape[0] or left + w > image.shape[1]:
    raise Unusable(
      "small",
      where,
      f"{image.shape[0]}×{image.shape[1]} pixels are too few for the crop {crop!r}",
    )
  image = image[top : top + h, left : left + w]
  if shape is None:
    return image
  if (h < shape[0] or w < shape[1]) and not enlarge:
    raise Unusable(
      "small",
      where,
      f"{h}×{w} pixels after cropping, smaller than the {shape[0]}×{shape[1]} asked for",
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
  raise Unusable("channels", where, f"{image.shape[2]} channels cannot give {shape[2]} channels")
