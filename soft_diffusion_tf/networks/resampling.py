"""Up- and down-sampling by two, with and without a FIR filter (StyleGAN2, arXiv:1912.04958).

All functions take and return images [B, H, W, C], pad with zeros and treat channels independently,
except the two fused convolutions, whose kernel is [kh, kw, C_in, C_out]. `taps` is the filter: 1-D
taps of a separable filter, e.g. (1, 3, 3, 1), or a 2-D kernel; it is normalised to sum 1, and then
scaled by factor² when zeros are inserted, so that a constant image keeps its value.

Filters are constants, in float32 also under a mixed policy: the gradient of a depthwise convolution
in bfloat16 is an order of magnitude slower on CPUs, and the filter's own rounding would show.
"""

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import products


def _kernel(taps):
  """The normalised 2-D filter, float32 [K, K], reversed: convolution as cross-correlation."""
  taps = np.asarray(taps, np.float64)
  kernel = np.outer(taps, taps) if taps.ndim == 1 else taps
  if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or not kernel.sum():
    raise ValueError(
      f"FIR taps must be 1-D, or a square 2-D kernel, with a sum other than 0, not {taps.tolist()}"
    )
  return (kernel / kernel.sum())[::-1, ::-1].astype(np.float32)


def _filter(x, kernel, before, after, stride=1):
  """Pads both axes by (before, after), filters each channel, and keeps each stride-th value."""
  dtype = x.dtype
  x = tf.pad(tf.cast(x, tf.float32), [[0, 0], [before, after], [before, after], [0, 0]])
  if products.compiled():
    y = _shifted_sum(x, kernel, stride)
  else:
    weights = np.repeat(kernel[:, :, None, None], x.shape[-1], axis=2)
    y = tf.nn.depthwise_conv2d(x, weights, [1, stride, stride, 1], "VALID")
  return tf.cast(y, dtype)


def _shifted_sum(x, kernel, stride):
  """The filter as a sum of shifted images, which XLA makes one elementwise kernel of.

  A depthwise convolution would go to cuDNN as one of C groups, which takes 3.5 times as long on an
  H200 ([500, 32, 32, 64] in bfloat16, stride 2: 1.18 against 0.34 ms).
  """
  size = len(kernel)
  rows, columns = ((n - size) // stride * stride + 1 for n in x.shape[1:3])
  return tf.add_n(
    [
      float(kernel[i, j]) * x[:, i : i + rows : stride, j : j + columns : stride]
      for i in range(size)
      for j in range(size)
      if kernel[i, j]
    ]
  )


def _insert_zeros(x, factor):
  """[B, H, W, C] → [B, factor·H, factor·W, C], factor − 1 zeros after each sample."""
  _, height, width, channels = x.shape
  zeros = factor - 1
  x = tf.pad(
    tf.reshape(x, [-1, height, 1, width, 1, channels]),
    [[0, 0], [0, 0], [0, zeros], [0, 0], [0, zeros], [0, 0]],
  )
  return tf.reshape(x, [-1, height * factor, width * factor, channels])


def fir_upsample(x, taps, factor=2):
  """[B, H, W, C] → [B, factor·H, factor·W, C]."""
  kernel = _kernel(taps) * factor**2
  p = len(kernel) - factor
  return _filter(_insert_zeros(x, factor), kernel, (p + 1) // 2 + factor - 1, p // 2)


def fir_downsample(x, taps, factor=2):
  """[B, H, W, C] → [B, H/factor, W/factor, C]."""
  kernel = _kernel(taps)
  p = len(kernel) - factor
  return _filter(x, kernel, (p + 1) // 2, p // 2, stride=factor)


def fir_conv_downsample(x, weights, taps, factor=2):
  """FIR, then a convolution of stride `factor`; → [B, H/factor, W/factor, C_out]."""
  kernel = _kernel(taps)
  p = len(kernel) - factor + weights.shape[0] - 1
  x = _filter(x, kernel, (p + 1) // 2, p // 2)
  return tf.nn.conv2d(x, weights, factor, "VALID")


def fir_conv_upsample(x, weights, taps, factor=2):
  """Transposed convolution of stride `factor`, then FIR; → [B, factor·H, factor·W, C_out]."""
  kernel = _kernel(taps) * factor**2
  _, height, width, _ = x.shape
  size = weights.shape[0]
  p = len(kernel) - factor - (size - 1)
  # The gradient of a convolution flips its kernel; the published operator does not.
  flipped = tf.transpose(tf.reverse(weights, [0, 1]), [0, 1, 3, 2])
  shape = [
    tf.shape(x)[0],
    (height - 1) * factor + size,
    (width - 1) * factor + size,
    weights.shape[-1],
  ]
  x = tf.nn.conv2d_transpose(x, flipped, shape, factor, "VALID")
  return _filter(x, kernel, (p + 1) // 2 + factor - 1, p // 2 + 1)


def nearest_upsample(x):
  """[B, H, W, C] → [B, 2H, 2W, C]; each pixel becomes a 2 × 2 square."""
  _, height, width, channels = x.shape
  x = tf.concat([x, x], axis=-1)  # twice as wide, once reshaped
  x = tf.reshape(x, [-1, height, 2 * width * channels])
  return tf.reshape(tf.concat([x, x], axis=-1), [-1, 2 * height, 2 * width, channels])


def mean_downsample(x):
  """[B, H, W, C] → [B, H/2, W/2, C], the mean of each 2 × 2 square."""
  return tf.nn.avg_pool2d(x, 2, 2, "VALID")


def resample(x, direction, taps=None):
  """Doubles ("up") or halves ("down") an image, through the FIR filter if `taps` is not None."""
  if direction == "up":
    return fir_upsample(x, taps) if taps else nearest_upsample(x)
  return fir_downsample(x, taps) if taps else mean_downsample(x)
