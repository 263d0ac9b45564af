"""A trained model graded by samples of it."""

import dataclasses
import json
import pathlib

import numpy as np
import tensorflow as tf

from soft_diffusion_tf import plots
from soft_diffusion_tf.evaluation.distances import by_metrics, with_reference
from soft_diffusion_tf.evaluation.references import check_count
from soft_diffusion_tf.evaluation.statistics import measure, sample_batches


def run_conditions(experiment, step, options, count, first_seed=0, weights=None):
  """What a run's numbers depend on, besides network and reference; `weights`: see `Run.weights`."""
  return {
    "experiment": experiment.name,
    "step": int(step),
    **(weights or {"ema_decay": experiment.training.ema_decay}),
    "sampler": str(options.sampler),
    "nfe": options.evaluations,
    "sampling": json.loads(json.dumps(options.to_dict())),
    "samples": int(count),
    "first_seed": int(first_seed),
  }


def evaluate_run(
  run,
  network,
  real,
  count,
  options=None,
  *,
  first_seed=0,
  keep=None,
  progress=True,
  partial=None,
  every=60.0,
  real_images=None,
):
  """`count` samples of a run, by its averaged weights, against a `Reference`.

  Args:
    first_seed: samples are of image seeds first_seed … first_seed + count − 1.
    keep: a list that batches of samples are put into; else none outlives its batch.
    partial, every: see `measure`.
    real_images: uint8 [N, H, W, C], for the metrics of the config; by default the training split.
  """
  options = options or run.experiment.sampling
  e = run.experiment.evaluation
  kept = keep if keep is not None or not e.metrics or partial else []
  check_count(count, np.inf)
  seeds = np.arange(first_seed, first_seed + count)
  statistics = measure(
    network,
    sample_batches(run, seeds, options, kept),
    count,
    e.subset,
    "sampling" if progress else None,
    partial,
    every,
  )
  about = run_conditions(run.experiment, run.step, options, count, first_seed, run.weights)
  about |= {"reference": real.conditions}
  result = with_reference(network, statistics, real, e.neighbours, about)
  metrics = {}
  if e.metrics:
    if real_images is None:
      real_images = run.experiment.data.load(progress=False).images
    if kept is None:  # a part of the samples may have been drawn by a process before this one
      kept = [run.images(seeds[: e.subset], options)]
    metrics = by_metrics(e, plots.to_uint8(np.concatenate(kept)), real_images)
  return dataclasses.replace(result, remark=run.remark, metrics=metrics)


def to_tensorboard(workdir, record):
  """The numbers of a run's record as scalars under the checkpoint's step."""
  writer = tf.summary.create_file_writer(str(pathlib.Path(workdir) / "tensorboard"))
  where = f"evaluation/{record['sampler']}_{record['nfe']}_N{record['samples']}"
  if length := record.get("ema_length"):
    where += f"_length{length:g}"
  elif not record["ema_decay"]:
    where += "_raw"
  with writer.as_default():
    tf.summary.scalar(f"{where}/{record['label']}", record["value"], record["step"])
    for name in ("exact", "kid", "inception_score", "precision", "recall"):
      if record[name] is not None:
        tf.summary.scalar(f"{where}/{name}", record[name], record["step"])
    for name, value in record.get("metrics", {}).items():
      tf.summary.scalar(f"{where}/{name}", value, record["step"])
  writer.close()
