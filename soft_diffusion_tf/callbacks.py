"""Keras callbacks for `SoftDiffusionModel.fit`: pictures of samples, and their Fréchet distance.

Both draw with the averaged weights, from fixed seeds, so that one epoch compares with the next.
"""

import pathlib

import keras
import numpy as np

from soft_diffusion_tf import drawing, evaluation, plots
from soft_diffusion_tf.evaluation import features
from soft_diffusion_tf.experiment import Sampling


class _Drawing(keras.callbacks.Callback):
  """Draws every few epochs; the sampler is traced once."""

  def __init__(self, count, options, every):
    super().__init__()
    if count < 1 or every < 1:
      raise ValueError(f"count and every must be at least 1, got {count} and {every}")
    self.count, self.every = count, every
    self.options = options or Sampling()
    self._batch_sampler, self._drawn = None, None  # the latter is the model of the former

  def images(self):
    """Samples float32 [count, H, W, C] of the model as it is now."""
    model = self.model
    if self._drawn is not model or self._batch_sampler.diffusion is not model.diffusion:
      self._batch_sampler = drawing.BatchSampler(model.diffusion, model.denoiser(), self.options)
      self._drawn = model
    self._batch_sampler.refresh()
    return self._batch_sampler.images(np.arange(self.count))

  def _due(self, epoch):
    return (epoch + 1) % self.every == 0


class SampleGrid(_Drawing):
  """Writes FOLDER/epoch-NNNN.png, a grid of samples, every few epochs.

  Args:
    folder: made if need be; a picture of the same epoch is replaced.
    count: samples in the grid.
    options: `experiment.Sampling`; by default its defaults.
    every: epochs between two pictures.
  """

  def __init__(self, folder, count=64, options=None, every=1):
    super().__init__(count, options, every)
    self.folder = pathlib.Path(folder)

  def on_epoch_end(self, epoch, logs=None):
    if self._due(epoch):
      images = self.images()
      picture = plots.grid(images, zoom=plots.zoom_for(images))
      plots.save_png(self.folder / f"epoch-{epoch + 1:04d}.png", picture)


class FrechetDistance(_Drawing):
  """Adds the Fréchet distance of samples to real images to the logs, every few epochs.

  It stands in the logs as "FD[pixels]" or the like: what `ModelCheckpoint` and `EarlyStopping` can
  monitor, and what `fit` gives back in its history.

  Args:
    images: real images, uint8 or float in [0, 1], [N, H, W, C].
    count: samples; by default as many as there are real images.
    network: a name of `evaluation.features.feature_network`, or one made by it.
    options, every: as for `SampleGrid`.
  """

  def __init__(self, images, count=None, network="pixels", options=None, every=1):
    super().__init__(len(images) if count is None else count, options, every)
    if isinstance(network, str):
      network = features.feature_network(network)
    self._network = network
    self._reference = self._moments(images)

  def _moments(self, images):
    batches = evaluation.image_batches(images)
    return evaluation.measure(self._network, batches, len(images), subset=0).moments

  def on_epoch_end(self, epoch, logs=None):
    if not self._due(epoch):
      return
    samples = self._moments(plots.to_uint8(self.images()))
    distance = evaluation.frechet(self._network.label, samples, self._reference)
    if logs is not None:
      logs[distance.label] = distance.value
