"""What happens to pictures that cannot be taken as they are, and the error of a refused one."""

import dataclasses
from typing import Annotated

from soft_diffusion_tf import parts
from soft_diffusion_tf.parts import Choice, Share

SMALL = ("leave_out", "enlarge", "refuse")


def shown(name):
  """A file's name in one line: letters that cannot be printed are escaped."""
  text = str(name)
  return text if text.isprintable() else repr(text)[1:-1]


@dataclasses.dataclass(frozen=True)
class Policy(parts.Checked):
  """What happens to pictures that cannot be taken as they are; `experiment.Data` has its fields.

  Attributes:
    transparency: the colour that lies behind transparent pixels, such as "white" or "#808080", or
      "refuse".
    small: pictures smaller than asked for are left out ("leave_out"), enlarged ("enlarge"), or
      count as files that cannot be used ("refuse").
    skip_bad: the share of files that may be left out because they cannot be used. With more of
      them, all are listed and nothing is done.
  """

  _group = "data."

  transparency: str = "white"
  small: Annotated[str, Choice(SMALL)] = "leave_out"
  skip_bad: Share = 0.0

  def __post_init__(self):
    super().__post_init__()
    self.background  # noqa: B018  it raises for a text that is no colour

  @property
  def background(self):
    """(red, green, blue) behind transparent pixels; None where they are refused."""
    if self.transparency in ("refuse", "white"):
      return None if self.transparency == "refuse" else (255, 255, 255)
    from PIL import ImageColor

    try:
      return ImageColor.getrgb(self.transparency)[:3]
    except ValueError:
      raise ValueError(
        f"data.transparency = {self.transparency!r} is no colour; give one such as white or "
        "#808080, or refuse"
      ) from None

  def __str__(self):
    behind = self.transparency
    return (
      f"transparency: {behind if behind == 'refuse' else f'onto {behind}'}; small: {self.small}; "
      f"skip_bad: {self.skip_bad:g}"
    )


class Unusable(ValueError):
  """A picture that cannot be used as asked: its `kind` (of `REMEDIES`), `where`, and a line."""

  def __init__(self, kind, where, text):
    super().__init__(f"{shown(where)}: {text}; {REMEDIES[kind]}")
    self.kind, self.where, self.text = kind, where, text


SMALL_REMEDY = "ask for a smaller data.image_shape or enlarge such images (data.small=enlarge)"
REMEDIES = {  # kind → what helps
  "unreadable": "remove or replace the file",
  "too large": "make it smaller",
  "transparent": "name the colour behind it (data.transparency=white) or remove the alpha channel",
  "values": "scale it to [0, 1] or convert it to 8 or 16 bits",
  "channels": "set the last number of data.image_shape to its channels or convert the file",
  "size": "bring the files to one, or set data.image_shape where images are trained on",
  "small": f"{SMALL_REMEDY}, or leave them out (data.small=leave_out)",
}
