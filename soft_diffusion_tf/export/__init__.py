"""A trained model as one thing to hand on: a SavedModel that needs TensorFlow alone, or one file.

`save` writes a folder: the SavedModel with the averaged weights in it, README.md (the model
card), and in `assets.extra/`, where TensorFlow leaves room for such things, config.json, prior.npz
and manifest.json (`manifest_of` reads it). `load` makes of that folder a
`training.Run` again. `pack` writes a single .npz of float16 weights, such as those that come with
this package; `from_pretrained` opens any of these by path, and the latter by name.

Signatures of the SavedModel (B, N: any number; images are float32 in [0, 1] where not said):

| signature | inputs | outputs |
|---|---|---|
| sample_NAME, sample | num int32 [], seed int64 [] | images [num, H, W, C], uint8 |
| draw_NAME, draw | seeds int64 [N] | images [N, H, W, C], uint8 (the same in 8 bits) |
| process_NAME, process | seeds int64 [N] | times [F + 1], x_t [N, F + 1, …], x0_hat [N, F, …] |
| denoise | x_t [B, H, W, C], t [B] or [1] | x0_hat: E[x_0 given x_t] |
| score | x_t, t [B] or [1] | score: ∇ log q_t(x_t) |
| corrupt | x_0, t [B] or [1], seed int64 [] | x_t |
| restore | y [B, H, W, C], t [], seed int64 [] | images, uint8: one sample of each clean image |
| restore_map | y, t [], seed, num int32 [] | samples [B, num, H, W, C], mean, std |

Image i of `sample` is that of the image seed seed + i, and `draw` takes image seeds themselves: to
the bit what `training.Run.images` draws by the same options. `corrupt` gives image b the noise of
seed + b; sample k of image b in `restore_map` has the image seed seed + b · num + k (`restore`:
num = 1), and t is rounded to a whole multiple of 1/`RESTORING_TIMES` there.
"""

from soft_diffusion_tf.export.about import FORMAT, digest_of
from soft_diffusion_tf.export.card import UNSTATED, card
from soft_diffusion_tf.export.folder import (
  EXTRA,
  MANIFEST,
  MANIFEST_PATH,
  load,
  manifest_of,
  name_of,
  save,
  signature,
  usual_options,
)
from soft_diffusion_tf.export.packed import from_pretrained, pack, pretrained, unpack

__all__ = [
  "EXTRA",
  "FORMAT",
  "MANIFEST",
  "MANIFEST_PATH",
  "UNSTATED",
  "card",
  "digest_of",
  "from_pretrained",
  "load",
  "manifest_of",
  "name_of",
  "pack",
  "pretrained",
  "save",
  "signature",
  "unpack",
  "usual_options",
]
