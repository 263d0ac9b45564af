"""What the programs share: quiet start, config flags whose errors help, one-line errors."""

import difflib
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

BAD_INPUT = 2
AGAIN = 75  # what schedulers take for a run to be started once more

_DEBUG = flags.DEFINE_bool("debug", False, "Show the whole traceback of an error.")


def define_config():
  """The --config flag: a file with get_config, its fields overridable by --config.FIELD=VALUE."""
  return config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, such as configs/digits_blur.py; override a field by --config.group.field=value.",
  )


def define_trust_code():
  """The --trust_code flag of programs that open a model: consent to run code that it names."""
  return flags.DEFINE_bool(
    "trust_code", False, "Run code that the model's files name: for files of people you trust."
  )


def refuse(ignored, why):
  """Raises the ValueError of one of the flags that was given; `why` says what would ignore it."""
  for flag in ignored:
    if flag.present and flag.value is not False:
      raise ValueError(f"{why}; leave {flag.serialize()} out")


def refuse_to_overwrite(path, force, flag="out"):
  """Raises the ValueError of a file, named by `flag`, that is there already, unless `force`."""
  if os.path.exists(path) and not force:
    raise ValueError(f"{path} is there already; give another --{flag} or --force")


def _fail(text):
  print(f"error: {text}", file=sys.stderr)
  sys.exit(BAD_INPUT)


def _config_path(argv):
  """The value of --config=FILE or --config FILE, or None."""
  for k, argument in enumerate(argv):
    if argument.startswith("--config="):
      return argument.split("=", 1)[1]
    if argument == "--config" and k + 1 < len(argv):
      return argv[k + 1]
  return None


def _print_help(main):
  """The program's text and its own flags: absl would leave out those that this module defines."""
  print((sys.modules[main.__module__].__doc__ or "").strip())
  print("\nflags:")
  holders = [*main.__globals__.values(), _DEBUG]
  for holder in holders:
    if isinstance(holder, flags.FlagHolder):
      flag = flags.FLAGS[holder.name]
      default = "" if flag.default in (None, "") else f" (default: {flag.default})"
      print(f"  --{flag.name}: {flag.help}{default}")


def _explain_override(argv, error):
  """Names the override that does not fit the config, and the nearest field that does."""
  path = _config_path(argv)
  if path is None:
    _fail("give --config=FILE before its overrides")
  from soft_diffusion_tf import experiment

  try:
    config = experiment.from_file(path).to_config()
  except Exception as cause:  # whatever a user's own file raises
    text = " ".join(str(cause).split())
    _fail(
      f"{path}: {text or error}"
      if isinstance(cause, ValueError)
      else f"{path}: {type(cause).__name__}: {text}; mend the config file (--debug shows where)"
    )
  for argument in argv:
    if not argument.startswith("--config."):
      continue
    name = argument[len("--config.") :].split("=", 1)[0]
    node, before = config, []
    for part in name.split("."):
      if not isinstance(node, ConfigDict) or part not in node:
        keys = list(node.keys()) if isinstance(node, ConfigDict) else []
        near = difflib.get_close_matches(part, keys, 1, cutoff=0)
        hint = f"; did you mean {'.'.join([*before, near[0]])}?" if near else ""
        _fail(f"the config has no field {name}{hint}")
      node, before = node[part], [*before, part]
  _fail(str(error))


def _parse(argv):
  path = _config_path(argv)
  if path is not None and not os.path.isfile(path):
    _fail(f"{path}: no such config file; give --config=FILE, such as configs/digits_blur.py")
  try:
    return app.parse_flags_with_usage(argv)
  except Exception as error:  # a config file is the user's own program
    if "--debug" in argv:
      raise
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return _explain_override(argv, lines[0])


def _guarded(main):
  def run(argv):
    if len(argv) > 1:
      _fail(f"unexpected argument {argv[1]!r}; flags are given as --name=value")
    logging.set_verbosity(logging.WARNING)
    import tensorflow as tf  # after the flags, so that --help is quick

    from soft_diffusion_tf import training

    try:
      main()
    except (ValueError, OSError, training.NonFiniteLoss, tf.errors.ResourceExhaustedError) as error:
      if _DEBUG.value:
        raise
      _fail(" ".join(str(error).split()))
    except training.Preempted as end:
      print(end, file=sys.stderr)
      sys.exit(AGAIN)
    except training.WorkerLost as end:
      print(f"error: {end}", file=sys.stderr, flush=True)
      os._exit(AGAIN)  # an orderly exit would wait for the worker that is gone
    except KeyboardInterrupt:
      print("interrupted; start again with the same command to go on", file=sys.stderr)
      sys.exit(130)

  return run


def run(main):
  """Parses flags and calls main(); bad input ends with one line on stderr and exit code 2."""
  if {"--help", "-h", "-help", "--helpshort", "--helpfull"} & set(sys.argv[1:]):
    _print_help(main)
    return
  app.run(_guarded(main), flags_parser=_parse)
