"""What a workdir holds from before, and what a run that goes on there may change."""

import json
import re

import numpy as np

from soft_diffusion_tf import trust
from soft_diffusion_tf.experiment import INCIDENTAL, Experiment
from soft_diffusion_tf.training.monitoring import METRICS_FILE, WINDOWS_FILE
from soft_diffusion_tf.training.run import CHECKPOINTS

HISTORY_FILE = "history.jsonl"
LABELS_FILE = "labels.json"
RECORDS = (  # of steps that were taken
  METRICS_FILE,
  WINDOWS_FILE,
  "evaluations.jsonl",
  "sweep/results.jsonl",
)
# What may change when a run goes on in its workdir; all else would make it another run. The rate is
# not incidental, but who is told to lower it has to be able to.
_MAY_CHANGE = (*INCIDENTAL, "training.learning_rate")


def changed_fields(workdir, experiment):
  """Fields that differ from the workdir's config, as {name: (old, new)}; a ValueError for those
  that would make it another run.
  """
  if not (workdir / "config.json").exists():
    return {}
  # What this run names is trusted, and no other code that a config.json of unknown origin names.
  with trust.trust_code(experiment.code()):
    try:
      before = Experiment.load(workdir)
    except trust.UntrustedCode:
      raise ValueError(
        f"{workdir} holds a run of another config (it names code that this config does not "
        "name); take another workdir"
      ) from None
  names = before.differences(experiment)
  if changed := [name for name in names if not name.startswith(_MAY_CHANGE)]:
    raise ValueError(
      f"{workdir} holds a run of another config (it differs in {', '.join(changed)}); "
      "take another workdir, or the config that the run was started with"
    )
  old, new = before.flat(), experiment.flat()
  return {name: (old.get(name), new.get(name)) for name in names}


def spell_changes(changes):
  short = lambda value: text if len(text := str(value)) <= 60 else text[:57] + "…"
  return ", ".join(f"{name} {short(old)} → {short(new)}" for name, (old, new) in changes.items())


def check_records(workdir, restored, anew):
  """A ValueError where records tell of steps whose checkpoints are gone, unless `anew`."""
  if restored is not None and anew:
    raise ValueError(
      f"{workdir} has a checkpoint, of step {restored:,}, and --start_anew is for a workdir that "
      "has lost all of them; leave it out to go on, or take another workdir"
    )
  found = [
    name for name in RECORDS if (workdir / name).exists() and (workdir / name).stat().st_size
  ]
  history = workdir / HISTORY_FILE
  if history.exists() and any(map(int, re.findall(r'"step": (\d+)', history.read_text()))):
    found.append(HISTORY_FILE)
  if restored is None and found and not anew:
    raise ValueError(
      f"{workdir} has records ({', '.join(found)}) and no checkpoint: was {CHECKPOINTS}/ moved or "
      "deleted? Put it back, take another workdir, or give --start_anew, which puts the records "
      "into a folder and begins at step 0"
    )


def put_records_away(workdir):
  """Moves the records of a run whose checkpoints are gone into records-1, or the next free one."""
  names = [
    n for n in (*RECORDS, HISTORY_FILE, "tensorboard", "best.json") if (workdir / n).exists()
  ]
  if not names:
    return
  k = 1
  while (folder := workdir / f"records-{k}").exists():
    k += 1
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (workdir / name).rename(folder / name)


def save_labels(source, workdir):
  """Writes the names of the labels and how many images have each: labels.json."""
  values, counts = np.unique(source.labels, return_counts=True)
  if not source.label_names and len(values) < 2:
    return
  names = list(source.label_names) or list(map(str, range(int(values.max()) + 1)))
  content = {"names": names, "counts": dict(zip(map(str, values), map(int, counts)))}
  text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
  (workdir / LABELS_FILE).write_text(text, encoding="utf-8")
