"""Images: built-in digits and glyphs, any TFDS image set, or a folder; and the pipeline over them.

Every source is decoded once into uint8 [N, H, W, C], upright by its EXIF orientation; batches are
float32 in [0, 1]. Which image stands where is a function of (seed, step, position), so a run can go
on from any step.

A data set's name is "digits", "glyphs", "folder:PATH" or a TFDS name. "all", "train" and "test" are
splits of each: of the digits the first 1,500 and the last 297; of the glyphs, and of a folder in
the order of the paths, every tenth image is held out for "test"; TFDS sets have their own, and take
its slicing ("train[:10%]"). A split may also be a folder of its own, "folder:PATH".

"pack:PATH" is a pack: images of any source, prepared and written by `soft-diffusion-data pack`.
They are read from the disk while training, so that memory does not grow with their number.

`pictures` reads one picture, `policy` says what happens to odd ones, `doctor` tells what is wrong
with a source. `folders`, `tfds`, `glyphs` and `own` read sources, `pack` writes and reads packs,
`pipeline` makes batches.
"""

from soft_diffusion_tf.data.augment import EDM, Augmentation, Flip, Shift, label_size
from soft_diffusion_tf.data.doctor import Refused, Report
from soft_diffusion_tf.data.folders import list_images
from soft_diffusion_tf.data.pictures import CROPS, prepare, read_image
from soft_diffusion_tf.data.pipeline import balanced_order, batches, examples, order
from soft_diffusion_tf.data.policy import SMALL, Policy, Unusable
from soft_diffusion_tf.data.sources import (
  DIGITS_TRAIN,
  FOLDER,
  Reader,
  Source,
  check_consent,
  load,
  reader_of,
  survey,
)

__all__ = [
  "CROPS",
  "DIGITS_TRAIN",
  "EDM",
  "FOLDER",
  "SMALL",
  "Augmentation",
  "Flip",
  "Policy",
  "Reader",
  "Refused",
  "Report",
  "Shift",
  "Source",
  "Unusable",
  "balanced_order",
  "batches",
  "check_consent",
  "examples",
  "label_size",
  "list_images",
  "load",
  "order",
  "prepare",
  "read_image",
  "reader_of",
  "survey",
]
