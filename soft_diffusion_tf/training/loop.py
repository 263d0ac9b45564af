"""The training loop."""

import functools
import json
import math
import pathlib
import sys

import numpy as np
import tensorflow as tf
import tqdm

from soft_diffusion_tf import data, files, memory, parts, priors, trust
from soft_diffusion_tf.model import NonFiniteLoss
from soft_diffusion_tf.training import snapshots, strategies
from soft_diffusion_tf.training.checkpoints import Checkpoints
from soft_diffusion_tf.training.monitoring import Monitor
from soft_diffusion_tf.training.run import CHECKPOINTS, PRIOR_FILE, Run, build, ema_remark
from soft_diffusion_tf.training.watching import (
  BUCKETS,
  GRID_IMAGES,
  Clipped,
  Pictures,
  load_held_out,
  make_held_out,
  make_norms,
  say_what_evaluation_lacks,
)
from soft_diffusion_tf.training.workdir import (
  HISTORY_FILE,
  changed_fields,
  check_records,
  put_records_away,
  save_labels,
  spell_changes,
)
from soft_diffusion_tf.training.workers import (
  Preempted,
  check_agreement,
  end_at_once,
  is_chief,
  lost_workers,
  make_any_worker,
  on_sigterm,
)

PRIOR_IMAGES = 10_000  # the prior is fitted to at most this many training images, and to fewer
PRIOR_BYTES = 1 << 29  # where they would take more than this: 64 × 64 × 3 do not
_WIDEST = 1e6  # ratio of the loss's weights over t that goes without a warning


def _say(progress, text):
  """Prints what a run is at, above its bar."""
  if progress and text:
    tqdm.tqdm.write(text)
    sys.stdout.flush()


def make_loop(model, strategy):
  """`loop(iterator, n)`: n steps in one call of one compiled function.

  It returns sums over the steps ("wait" is the time spent on waiting for input, in seconds), and
  of the first loss or gradient that was not finite the step, or −1, and the mean t of the examples
  whose loss was not, or NaN where only the gradient was not.
  """

  def replica_step(x_0, labels=None, done=None):  # no model uses labels yet
    out = model.update(x_0, done)
    bucket = tf.minimum(tf.cast(out["t"] * BUCKETS, tf.int32), BUCKETS - 1)
    odd = ~tf.math.is_finite(out["losses"])
    return {
      "loss": out["loss"],
      "norm": out["gradient_norm"] / strategy.num_replicas_in_sync,
      "sums": tf.math.unsorted_segment_sum(out["losses"], bucket, BUCKETS),
      "counts": tf.math.unsorted_segment_sum(tf.ones_like(out["losses"]), bucket, BUCKETS),
      "odd": tf.reduce_sum(tf.cast(odd, tf.float32)),
      "odd_t": tf.reduce_sum(tf.where(odd, out["t"], 0.0)),
    }

  def loop(iterator, n):
    def body(k, totals, odd_step, odd_t):
      step = tf.cast(model.optimizer.iterations, tf.int64)
      with tf.control_dependencies([k]):  # the step before is done
        begin = tf.timestamp()
      with tf.control_dependencies([begin]):
        batch = iterator.get_next()
      local = [strategy.experimental_local_results(v) for v in tf.nest.flatten(batch)]
      with tf.control_dependencies(tf.nest.flatten(local)):
        wait = tf.timestamp() - begin
      with tf.control_dependencies([wait]):  # not later, with one thread, than the step itself
        batch = tf.nest.map_structure(tf.identity, batch, expand_composites=True)
      each = strategy.run(replica_step, args=batch if isinstance(batch, tuple) else (batch,))
      out = {k: strategy.reduce(tf.distribute.ReduceOp.SUM, v, None) for k, v in each.items()}
      out["wait"] = wait
      totals = {key: totals[key] + out[key] for key in totals}
      finite = tf.math.is_finite(out["loss"]) & tf.math.is_finite(out["norm"])
      first = (odd_step < 0) & ~finite
      odd_step = tf.where(first, step, odd_step)
      odd_t = tf.where(first, out["odd_t"] / out["odd"], odd_t)
      with tf.control_dependencies([out["loss"], out["norm"]]):
        return k + 1, totals, odd_step, odd_t

    zeros = {"loss": tf.zeros([]), "norm": tf.zeros([]), "wait": tf.zeros([], tf.float64)}
    zeros |= {"sums": tf.zeros([BUCKETS]), "counts": tf.zeros([BUCKETS])}
    start = (tf.constant(0), zeros, tf.constant(-1, tf.int64), tf.constant(0.0))
    return tf.while_loop(lambda k, *_: k < n, body, start)[1:]

  # Control flow is written out, so AutoGraph would only cost time: most of the tracing.
  return tf.function(loop, autograph=False)


def train(
  experiment, workdir, strategy=None, progress=True, anew=False, source=None, held_out=None
):
  """Trains to `experiment.training.steps`, going on from the workdir's newest checkpoint.

  Args:
    experiment: an `Experiment`.
    workdir: its folder, made if need be.
    strategy: a `tf.distribute.Strategy`; by default the current one.
    progress: show a bar with the time left, and print what the run is at.
    anew: begin at step 0 in a workdir that has records and has lost its checkpoints.
    source: images of your own in place of the config's data set: an array [N, H, W, C], a
      `tf.data.Dataset`, an object with __len__ and __getitem__, or a `data.Source` (see
      `data.load`). A digest of the images is the data set's name in the workdir.
    held_out: images of your own that are not trained on, for the held-out loss.

  Returns:
    The `Run` at its end.

  Raises:
    ValueError: bad input, or a workdir that belongs to another config or process.
    NonFiniteLoss: names step and, of a loss, t and σ; the last checkpoint stays.
    Preempted: SIGTERM came, to this worker or another; the state is saved.
    WorkerLost: another worker of a multi-worker run has died.
  """
  workdir = pathlib.Path(workdir)
  strategy = strategy or tf.distribute.get_strategy()
  replicas, batch = strategy.num_replicas_in_sync, experiment.training.batch_size
  shares = experiment.training.accumulate
  if batch % (replicas * shares):
    each = replicas * shares
    by = f" of {shares} parts each" if shares > 1 else ""
    raise ValueError(
      f"training.batch_size = {batch} cannot be shared by {replicas} replicas{by}; "
      f"take {batch // each * each or each} or another multiple of {each}"
    )
  # An unsound process or network is refused before a file is written.
  apart = bool(tf.config.list_physical_devices("GPU"))
  apart |= isinstance(strategy, tf.distribute.TPUStrategy)
  memory.check(experiment, *strategies.replicas_by_host(strategy), apart)
  parts.check_importable(list(experiment.code()))
  diffusion = experiment.build_diffusion()
  experiment.check_network()
  d = experiment.data
  with on_sigterm(end_at_once):  # there is nothing to save yet
    tell = functools.partial(_say, progress and is_chief(strategy))
    given = source is not None
    if given:
      source = data.load(source, "all", d.image_shape, d.crop, policy=d.policy, say=tell)
      experiment = experiment.replace(data={"name": source.name})
    else:
      _say(progress, f"reading {d.name}")
      source = d.load(progress=progress, say=tell)
    if not is_chief(strategy):
      with lost_workers(strategy):
        return _train(experiment, source, diffusion, workdir, strategy, {}, anew, progress=False)
    held_out = load_held_out(d, given, held_out, tell)
    with files.lock(workdir), lost_workers(strategy):
      changes = changed_fields(workdir, experiment)
      return _train(
        experiment, source, diffusion, workdir, strategy, changes, anew, progress, held_out
      )


def _train(
  experiment, source, diffusion, workdir, strategy, changes, anew, progress, held_out_source=None
):
  options, chief = experiment.training, is_chief(strategy)

  def say(text):
    _say(progress, text)

  if (workdir / PRIOR_FILE).exists():
    with trust.trust_code(experiment.code()):  # its class is one that this run names
      prior = priors.Prior.load(workdir / PRIOR_FILE)
  else:
    most = min(PRIOR_IMAGES, max(64, PRIOR_BYTES // (4 * math.prod(experiment.data.image_shape))))
    picked = np.random.default_rng(experiment.seed).permutation(len(source))[:most]
    images = source.floats(np.sort(picked))
    if not isinstance(experiment.prior, priors.Zero):  # which needs none
      say(f"fitting the prior to {len(images):,} images")
    prior = priors.fit(experiment.prior, images, diffusion)
  diffusion = diffusion.with_prior(prior)
  say("building the network")
  with strategy.scope():
    model = build(experiment, diffusion)
  checkpoints = Checkpoints(workdir / CHECKPOINTS, model, options.keep)
  restored = checkpoints.restore()
  step = restored or 0
  check_records(workdir, restored, anew)
  check_agreement(strategy, experiment, step, source, prior, model)
  run = Run(experiment, model, step)
  if restored is not None and step >= options.steps:
    say(f"{workdir} is at step {step:,} of {options.steps:,}: nothing is left to do")
    if changes:
      say(f"left as it was, for no step would have used it: {spell_changes(changes)}")
    return run
  if chief:  # not before: a config that cannot be trained does not claim the workdir
    if anew:
      put_records_away(workdir)
    if changes:
      say(f"changed: {spell_changes(changes)} from step {step:,} on")
      with open(workdir / HISTORY_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "changed": changes}) + "\n")
    experiment.save(workdir)
    save_labels(source, workdir)
    if not (workdir / PRIOR_FILE).exists():
      prior.save(workdir / PRIOR_FILE)
    if restored is None:
      checkpoints.save(wait=True)
    else:
      say(f"going on from step {step:,} of {options.steps:,}")
    snapshots.drop_after(workdir, step)
    if remark := ema_remark(experiment, options.steps):
      say(f"warning: {remark}; take at most {0.01 ** (1 / options.steps):.4g}")
    low, high = experiment.weight_range()
    if high > _WIDEST * low:
      say(
        f"warning: over t the loss weighs what the network gives by {low:.1g} to {high:.1g}, so "
        "that the heaviest times are all it learns; take the prediction whose errors are of one "
        "size (score with scale_by_sigma, or noise), loss.weight = 'one', or a larger t_min"
      )
    held_out = make_held_out(experiment, held_out_source, model, strategy)
    say_what_evaluation_lacks(experiment, source, say)
  if restored is None:
    say(f"starting at step 0 of {options.steps:,}")
  hosts, each = strategies.replicas_by_host(strategy)

  def pipeline(context):  # a worker's own part of every batch
    return data.batches(
      source,
      options.batch_size,
      seed=experiment.seed,
      start=step,
      flip=experiment.data.flip,
      part=(context.input_pipeline_id, hosts),
      each=each,
      labels=True,
      told=True,
      balanced=experiment.data.balanced,
      augment=experiment.data.augment,
    )

  iterator = iter(strategy.distribute_datasets_from_function(pipeline))
  loop, norms = make_loop(model, strategy), make_norms(model)
  anywhere = make_any_worker(strategy)
  monitor = Monitor(workdir, step, options.steps, options.batch_size, progress, chief)
  clipped = Clipped(options.clip_norm, say)
  asked: list[int] = []  # not empty once SIGTERM has come
  with monitor, checkpoints.finishing(), on_sigterm(lambda number, frame: asked.append(number)):
    show = Pictures(run, source, monitor) if chief else None
    if show and step == 0:
      show.schedule(workdir)
    say("compiling the training step, which the first steps wait for")
    while step < options.steps:
      ahead = [e - step % e for e in _periods(options)] + [options.steps - step]
      n = min(options.steps_per_loop, *ahead, 2**31 - 1)
      totals, odd_step, odd_t = loop(iterator, tf.constant(n))
      if int(odd_step) >= 0:
        checkpoints.wait()
        what = "the gradient"
        if np.isfinite(odd_t):
          what = f"the loss (t = {float(odd_t):.4f}, σ = {float(diffusion.sigma(odd_t)):.4g})"
        raise NonFiniteLoss(
          f"{what} is not finite at step {int(odd_step)}; the last good checkpoint is "
          f"{checkpoints.paths()[0]}; lower training.learning_rate or look at the data"
        )
      step += n
      run.step = step
      monitor.advance(step, totals)
      last = step == options.steps
      if _due(step, options.log_every) or last:
        values = {"learning_rate": model.optimizer.learning_rate, **norms()}
        if chief and held_out and (monitor.passed(step, options.checkpoint_every) or last):
          values |= held_out()
        clipped.add(monitor.record(step, **values))
      if show and options.sample_every and (_due(step, options.sample_every) or last):
        say(f"drawing {GRID_IMAGES} samples at step {step:,}")
        show.samples()
        show.predictions()
      if chief and model.profiles and _due(step, options.average_every):
        snapshots.save(workdir, model, step)
      keep, stop = _due(step, options.keep_every), anywhere(asked)
      if chief and (_due(step, options.checkpoint_every) or keep or last or stop):
        monitor.flush(step)
        checkpoints.save(for_good=keep, wait=last or stop)
      if stop and not last:
        raise Preempted(f"asked to end at step {step}, which is saved; start again to go on")
  return run


def _periods(options):
  every = (
    options.log_every,
    options.checkpoint_every,
    options.keep_every,
    options.sample_every,
    options.average_every if options.averages else 0,
  )
  return [e for e in every if e > 0]


def _due(step, every):
  return every > 0 and step % every == 0
