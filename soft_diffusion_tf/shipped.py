"""The configs and schedules that come with the package, by name.

In a wheel they lie in the package, as `soft_diffusion_tf/configs`; in a checkout in the top-level
folder `configs`, of which the wheel's are copies.
"""

import os
import pathlib

from soft_diffusion_tf import parts

_HERE = pathlib.Path(__file__).parent


def configs():
  """The configs that come with the package: name → file."""
  inside = _HERE / "configs"
  folder = inside if inside.is_dir() else _HERE.parent / "configs"
  return {file.stem: file for file in sorted(folder.glob("[a-z]*.py"))}


def config(name):
  """The file of a config, as a string: of a path, or of a name such as "digits_blur".

  Raises:
    ValueError: there is neither such a file nor such a name.
  """
  if os.path.isfile(name):
    return str(name)
  known = configs()
  if str(name) in known:
    return str(known[str(name)])
  hint = "give the path of a config file"
  if known:
    hint = f"did you mean {parts.nearest(pathlib.Path(name).stem, known)}?"
  raise ValueError(
    f"no such config file, and none of that name comes with soft-diffusion-tf; {hint}"
  )
