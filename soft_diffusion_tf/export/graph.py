"""The graph of an exported model: its signatures, from seeds and images to images."""

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import (
  drawing,
  restoration,
  samplers,
)

RESTORING_TIMES = 256  # times at which a restoration may start
MOST_IMAGES = 65_536  # images in one call
FRAMES = 24  # of a reverse process, at most


def _in_batches(one, shapes, seeds, size):
  """A function of `size` image seeds for any seeds [N], as `drawing.batches` lays them out.

  Args:
    one: int64 [size] → float32 tensors [size, *shape], one for each of `shapes`.

  Returns:
    What `one` gives, with N as the first axis.
  """
  # TensorFlow picks other kernels where it knows the size of a batch beforehand, and they round
  # otherwise: so batches are cut in a way that hides it, as it is hidden in `samplers.Sampler`.
  seeds, back = tf.unique(seeds)  # a seed that is asked for twice is drawn once
  place = tf.cast(tf.math.floormod(seeds, size), tf.int32)
  order = tf.argsort(place, stable=True)
  sorted_place = tf.gather(place, order)
  begin = tf.searchsorted(sorted_place, tf.range(size))
  rank = tf.range(tf.size(seeds)) - tf.gather(begin, sorted_place)
  batch = tf.scatter_nd(order[:, tf.newaxis], rank, tf.shape(seeds))
  # Without seeds a batch is drawn all the same: only the check of their number may fail then.
  count = tf.maximum(tf.reduce_max(batch), 0) + 1
  index = batch * size + place
  filling = tf.tile(tf.range(size, dtype=tf.int64), [count])
  drawn = tf.tensor_scatter_nd_update(filling, index[:, tf.newaxis], seeds)
  arrays = [tf.TensorArray(tf.float32, count, element_shape=[None, *s]) for s in shapes]

  def body(k, arrays):
    parts = one(drawn[k * size : (k + 1) * size])
    return k + 1, [array.write(k, part) for array, part in zip(arrays, parts)]

  arrays = tf.while_loop(
    lambda k, _: k < count, body, (tf.constant(0), arrays), parallel_iterations=1
  )[1]
  return [tf.gather(array.concat(), tf.gather(index, back)) for array in arrays]


def _uint8(images):
  """`plots.to_uint8`, as graph operations."""
  scaled = tf.clip_by_value(tf.cast(images, tf.float64), 0.0, 1.0) * 255.0
  return tf.cast(tf.round(scaled), tf.uint8)


def _both(images):
  return {"images": images, "uint8": _uint8(images)}


def _cuts(plan):
  """Where a table is cut to show its process: up to FRAMES + 1 row numbers, from 0 to its end.

  A cut between a step and its corrector would show the step undone.
  """
  following = np.append(np.asarray(plan)[1:, 5], 0.0)
  ends = np.flatnonzero(following != samplers.CORRECTOR) + 1
  picked = np.linspace(0, len(ends), min(FRAMES, len(ends)) + 1).round().astype(int)[1:]
  return np.concatenate([[0], ends[picked - 1]]).astype(np.int32)


def _check_images(images, what):
  tf.debugging.assert_positive(tf.size(images), f"{what} holds no image; give at least 1")
  tf.debugging.assert_all_finite(images, f"{what} holds NaN or infinite values")


def _check_seeds(seeds):
  count = tf.size(seeds)
  tf.debugging.assert_positive(count, "ask for at least 1 image")
  tf.debugging.assert_less_equal(
    count, MOST_IMAGES, f"ask for at most {MOST_IMAGES} images in one call"
  )


def _seeds_from(seed, count):
  """Image seeds seed, seed + 1, …, int64 [count]; they must not wrap around."""
  count = tf.cast(count, tf.int64)
  last = tf.int64.max - tf.maximum(count, 1) + 1
  tf.debugging.assert_less_equal(seed, last, "seed is too large for so many images")
  return seed + tf.range(count)


def _check_num(num):
  """num, checked, and bounded: what runs beside the check must neither fail nor be large."""
  tf.debugging.assert_positive(num, "num must be at least 1")
  tf.debugging.assert_less_equal(num, MOST_IMAGES, f"num must be at most {MOST_IMAGES}")
  return tf.clip_by_value(num, 1, MOST_IMAGES)


def _check_time(t, least=0.0):
  inside = tf.reduce_all((t >= least) & (t <= 1.0))
  tf.debugging.Assert(inside, ["t must lie in [0, 1], got", t])


class Exported(tf.Module):
  """Everything that the SavedModel computes; `functions` has them by signature."""

  def __init__(self, run, options, restoring):
    super().__init__(name="soft_diffusion")
    self.ema = [v.value for v in run.model.ema_network.variables]
    self.functions = {}
    shape = tuple(run.diffusion.image_shape)
    denoiser, diffusion = run.denoiser(), run.diffusion
    image = lambda name: tf.TensorSpec([None, *shape], tf.float32, name)
    times = tf.TensorSpec([None], tf.float32, "t")
    time = tf.TensorSpec([], tf.float32, "t")
    seed = tf.TensorSpec([], tf.int64, "seed")
    num = tf.TensorSpec([], tf.int32, "num")

    # One trace of the network, which every signature calls.
    @tf.function(autograph=False, input_signature=[image("x_t"), times])
    def predict(x_t, t):
      return tf.ensure_shape(denoiser(x_t, t), x_t.shape)

    def per_image(t, x):
      _check_time(t)
      return t + tf.zeros_like(x[:, 0, 0, 0])

    def denoise(x_t, t):
      _check_images(x_t, "x_t")
      return {"x0_hat": predict(x_t, per_image(t, x_t))}

    def score(x_t, t):
      _check_images(x_t, "x_t")
      t = per_image(t, x_t)
      return {"score": diffusion.score(x_t, t, predict(x_t, t))}

    def corrupt(x_0, t, seed):
      _check_images(x_0, "x_0")
      seeds = _seeds_from(seed, tf.shape(x_0)[0])
      return {"x_t": restoration.corrupt(diffusion, x_0, per_image(t, x_0), seeds)}

    self._add("denoise", denoise, [image("x_t"), times])
    self._add("score", score, [image("x_t"), times])
    self._add("corrupt", corrupt, [image("x_0"), times, seed])
    self.evaluations = {}
    seeds = tf.TensorSpec([None], tf.int64, "seeds")
    for k, (name, o) in enumerate(options.items()):
      batch_sampler = drawing.BatchSampler(diffusion, predict, o)
      self.evaluations[name] = int(batch_sampler.plan.shape[0])
      sample, draw, process = _drawing(batch_sampler)
      for kind, function, specs in (
        ("sample", sample, [num, seed]),
        ("draw", draw, [seeds]),
        ("process", process, [seeds]),
      ):
        self._add([f"{kind}_{name}"] + ([kind] if k == 0 else []), function, specs)
    restore, restore_map = _restoring(diffusion, predict, restoring)
    self._add("restore", restore, [image("y"), time, seed])
    self._add("restore_map", restore_map, [image("y"), time, seed, num])

  def _add(self, names, function, specs):
    function = tf.function(function, autograph=False, input_signature=specs)
    for name in [names] if isinstance(names, str) else names:
      self.functions[name] = function


def _drawing(batch_sampler):
  """The functions of one sampler: of a number and a seed, of seeds, and the process of seeds."""
  diffusion, denoiser = batch_sampler.diffusion, batch_sampler.sampler.denoiser
  plan, size, shape = batch_sampler.plan, batch_sampler.options.batch_size, diffusion.image_shape

  def images_of(seeds):
    x = diffusion.draw_prior(seeds)
    return [samplers.sample(diffusion, denoiser, plan, seeds, x).x]

  cuts = _cuts(plan)
  times = np.append(np.asarray(plan)[cuts[:-1], 0], np.asarray(plan)[-1, 1]).astype(np.float32)
  frames = len(cuts) - 1

  def frames_of(seeds):
    x = diffusion.draw_prior(seeds)
    arrays = [tf.TensorArray(tf.float32, frames, element_shape=x.shape) for _ in range(2)]

    def body(k, state, states, predictions):
      begin, end = tf.gather(cuts, k), tf.gather(cuts, k + 1)
      state = samplers.sample(
        diffusion, denoiser, plan[begin:end], seeds, state.x, state.x0_hat, begin, state.before
      )
      return k + 1, state, states.write(k, state.x), predictions.write(k, state.x0_hat)

    first = samplers.State(x, tf.zeros_like(x), x)
    _, _, states, predictions = tf.while_loop(
      lambda k, *_: k < frames, body, (tf.constant(0), first, *arrays)
    )
    order = [1, 0, 2, 3, 4]
    x_t = tf.concat([x[tf.newaxis], states.stack()], 0)
    return [tf.transpose(x_t, order), tf.transpose(predictions.stack(), order)]

  def sample(num, seed):
    num = _check_num(num)
    return draw(_seeds_from(seed, num))

  def draw(seeds):
    _check_seeds(seeds)
    return _both(_in_batches(images_of, [shape], seeds, size)[0])

  def process(seeds):
    _check_seeds(seeds)
    shapes = [(frames + 1, *shape), (frames, *shape)]
    x_t, x0_hat = _in_batches(frames_of, shapes, seeds, size)
    return {"times": tf.constant(times), "x_t": x_t, "x0_hat": x0_hat}

  return sample, draw, process


def _restoring(diffusion, predict, options):
  """The functions that restore: one sample an image, and several with their spread."""
  tables = [
    restoration.plan(diffusion, k / RESTORING_TIMES, options) for k in range(1, RESTORING_TIMES + 1)
  ]
  tables = np.stack(tables)  # as many rows in each: the number of steps is fixed

  def several(y, t, seed, num):
    _check_images(y, "y")
    _check_time(t)
    num = _check_num(num)
    start = tf.clip_by_value(tf.cast(tf.round(t * RESTORING_TIMES), tf.int32), 1, RESTORING_TIMES)
    many = tf.repeat(y, num, axis=0)
    seeds = _seeds_from(seed, tf.shape(many)[0])
    images = restoration.restore(diffusion, predict, tf.gather(tables, start - 1), seeds, many)
    return tf.reshape(images, tf.concat([tf.shape(y)[:1], [num], tf.shape(y)[1:]], 0))

  def restore(y, t, seed):
    return _both(several(y, t, seed, tf.constant(1))[:, 0])

  def restore_map(y, t, seed, num):
    samples = several(y, t, seed, num)
    mean = tf.reduce_mean(samples, axis=1)
    count = tf.cast(tf.maximum(num - 1, 1), tf.float32)
    variance = tf.reduce_sum((samples - mean[:, tf.newaxis]) ** 2, axis=1) / count
    return {"samples": samples, "mean": mean, "std": tf.sqrt(variance)}

  return restore, restore_map
