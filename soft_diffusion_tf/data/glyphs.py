"""The data set "glyphs": letters of six alphabets in the free fonts that matplotlib brings along.

Each letter of each of 16 fonts (DejaVu Sans, Sans Mono, Serif, and STIX, in four styles each) is an
image of 32 × 32 grey pixels, black on white, its ink in the middle: some 20,000 shapes, with no
download. They are drawn by FreeType, whose versions round apart. Equal images, such as the Latin
and the Greek A of one font, are there once. The label is the alphabet. The fonts' licences
(Bitstream Vera's; STIX' own) allow use and change of all kinds.
"""

import pathlib
import unicodedata

import numpy as np

from soft_diffusion_tf import packages

NAME = "glyphs"
SHAPE = (32, 32, 1)
ALPHABETS = ("LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN", "HEBREW")
_FONTS = tuple(
  f"{family}{style}.ttf"
  for family, styles in {
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
    "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
  }.items()
  for style in styles
)
_SIZE, _EDGE = 22, 1  # of a letter, in pixels; what stays free around its ink


def _letters(path):
  """(character, number of its alphabet) of the letters of a font, in their order."""
  from matplotlib import ft2font

  for code in sorted(ft2font.FT2Font(str(path)).get_charmap()):
    if unicodedata.category(chr(code)) in ("Lu", "Ll", "Lo"):
      alphabet = unicodedata.name(chr(code), "").partition(" ")[0]
      if alphabet in ALPHABETS:
        yield chr(code), ALPHABETS.index(alphabet)


def images():
  """(images uint8 [N, 32, 32, 1], labels int64 [N]) of all letters, in a fixed order."""
  with packages.needed("matplotlib", "the glyphs, which are those of its fonts"):
    import matplotlib as mpl
  from PIL import Image, ImageDraw, ImageFont

  folder = pathlib.Path(mpl.get_data_path()) / "fonts" / "ttf"
  found = {}
  for name in _FONTS:
    font = ImageFont.truetype(folder / name, _SIZE)
    for character, alphabet in _letters(folder / name):
      left, top, right, bottom = font.getbbox(character)
      width, height = right - left, bottom - top
      if not (0 < width <= SHAPE[1] - 2 * _EDGE and 0 < height <= SHAPE[0] - 2 * _EDGE):
        continue
      image = Image.new("L", SHAPE[1::-1], 255)
      place = ((SHAPE[1] - width) // 2 - left, (SHAPE[0] - height) // 2 - top)
      ImageDraw.Draw(image).text(place, character, fill=0, font=font)
      found.setdefault(image.tobytes(), alphabet)  # once, where letters look alike
  values = np.frombuffer(b"".join(found), np.uint8).reshape(-1, *SHAPE)
  return values.copy(), np.fromiter(found.values(), np.int64, len(found))
