"""The programs as processes, many of them quickly.

A process that has imported what they import, and has used none of it, forks for every run. What
runs is the program itself, as `python -m` or `python FILE` would run it, with its own arguments,
exit code, stdout and stderr; only the seconds of importing TensorFlow are spared.
"""

import atexit
import contextlib
import dataclasses
import functools
import gc
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

_MEMORY = 16 << 30  # bytes that a run may map: a mistake must not take the machine's
ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Result:
  """What is left of a run; `returncode` is −9 of one that ran out of its time."""

  returncode: int
  stdout: str
  stderr: str
  seconds: float


class Forks:
  """A process that forks; `run` runs a program in a fork of it."""

  def __init__(self):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": str(ROOT)}
    self._process = subprocess.Popen(
      [sys.executable, "-m", "tests.forks"],
      cwd=ROOT,
      text=True,
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
    )

  def run(self, program, *flags, limit=120.0, until=None, folder=ROOT):
    """Runs "soft_diffusion_tf.bin.train", say, or "tools/lab.py".

    Args:
      limit: seconds until it is killed.
      until: text on stdout after which it is sent SIGTERM.
      folder: where it runs.
    """
    with tempfile.TemporaryDirectory() as said:
      out, err = (pathlib.Path(said, name) for name in ("out", "err"))
      job = {
        "program": program,
        "flags": [*map(str, flags)],
        "out": str(out),
        "err": str(err),
        "limit": limit,
        "until": until,
        "folder": str(folder),
      }
      out.touch()
      begin = time.monotonic()
      self._process.stdin.write(json.dumps(job) + "\n")
      self._process.stdin.flush()
      code = int(self._process.stdout.readline())
      read = lambda file: file.read_text(encoding="utf-8", errors="replace")
      return Result(code, read(out), read(err), time.monotonic() - begin)

  def close(self):
    self._process.stdin.close()
    self._process.wait()


@contextlib.contextmanager
def forks():
  """A `Forks`, closed at the end."""
  own = Forks()
  try:
    yield own
  finally:
    own.close()


@functools.cache
def shared():
  """One `Forks` for all tests of this process."""
  own = Forks()
  atexit.register(own.close)
  return own


def _wait(child, job):
  """The exit code of a child, which is killed, with all that it started, when its time is up."""
  end, asked = time.monotonic() + job["limit"], False
  while True:
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
      code = os.waitstatus_to_exitcode(status)
      break
    if time.monotonic() > end:
      os.killpg(child, signal.SIGKILL)
      os.waitpid(child, 0)
      return -9
    if (
      job["until"]
      and not asked
      and job["until"] in pathlib.Path(job["out"]).read_text(errors="replace")
    ):
      os.kill(child, signal.SIGTERM)
      asked = True
    time.sleep(0.02)
  with contextlib.suppress(ProcessLookupError):
    os.killpg(child, signal.SIGKILL)
  return code


def _serve(answers):
  """Runs jobs; returns one in the process that is to run it, and None at the end."""
  for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
      os.setsid()
      return job
    answers.write(f"{_wait(child, job)}\n")
    answers.flush()
  return None


def _become(job):
  """Turns this process into the program of a job."""
  for number, path, mode in ((1, job["out"], os.O_WRONLY), (2, job["err"], os.O_WRONLY)):
    file = os.open(path, mode | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, number)
    os.close(file)
  nothing = os.open(os.devnull, os.O_RDONLY)
  os.dup2(nothing, 0)
  sys.stdin = os.fdopen(0, encoding="utf-8")
  sys.stdout = os.fdopen(1, "w", encoding="utf-8", buffering=1)
  sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1, errors="backslashreplace")
  os.chdir(job["folder"])
  resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
  sys.argv = [job["program"], *job["flags"]]


if __name__ == "__main__":
  import importlib
  import runpy

  answers = os.fdopen(os.dup(1), "w")
  for package in ("soft_diffusion_tf", "soft_diffusion_tf/networks"):
    for file in sorted((ROOT / package).glob("*.py")):
      importlib.import_module(".".join((*pathlib.Path(package).parts, file.stem)))
  for module in (
    "matplotlib.figure",
    "matplotlib.pyplot",
    "ml_collections.config_flags",
    "PIL.Image",
    "sklearn.datasets",
    "tensorflow_datasets",
    "uvicorn",
    "scipy.stats",
  ):
    importlib.import_module(module)
  gc.freeze()  # what is shared with the forks stays so
  job = _serve(answers)
  if job is not None:
    answers.close()
    del sys.modules["tests.forks" if "tests.forks" in sys.modules else "__main__"]
    _become(job)
    code = 0
    try:
      if job["program"].endswith(".py"):
        runpy.run_path(str(ROOT / job["program"]), run_name="__main__")
      else:
        runpy.run_module(job["program"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
      code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
      traceback.print_exc()
      code = 1
    # As the interpreter ends, but for taking apart all that it has imported, which takes seconds.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
