"""What the programs share: quiet start, checked flags, and one line for every mistake."""

import contextlib
import functools
import math
import os
import re
import signal
import sys
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from soft_diffusion_tf import bin as _start
from soft_diffusion_tf import parts, shipped

BAD_INPUT = 2
FAULT = 1  # the program's own
MOST_SHOWN = 10_000  # images in one picture

_LONGEST = 1000  # characters of an error's line
_HELP = {"--help", "-h", "-help", "-?", "--helpshort", "--helpfull", "--helpxml"}
_LOG = re.compile(rb"[IWE]\d{4} \d\d:\d\d:|WARNING: All log messages before |To enable the foll")
_PLACES = ("out", "workdir", "plot", "report")  # flags that say where a program writes

_words: list[str] = []  # of the command line that are no flags

_DEBUG = flags.DEFINE_bool("debug", False, "Show the whole traceback of an error.")


# --- Flags ----------------------------------------------------------------------------------------


class _Path(flags.ArgumentParser):
  """A path: never empty, which would stand for the current folder; ~ is the home folder."""

  syntactic_help = "a file or a folder"

  def parse(self, argument):
    if not argument.strip():
      raise ValueError("no path is given; is a shell variable unset?")
    return os.path.expanduser(argument)


class _Paths(_Path):
  """Paths with commas between them."""

  syntactic_help = "files or folders with commas between"

  def parse(self, argument):
    if isinstance(argument, list):
      return argument
    return [super(_Paths, self).parse(part) for part in argument.split(",")]


def define_path(name, default, help, **options):
  """A flag that names a file or folder."""
  return flags.DEFINE(
    _Path(), name, default, help, serializer=flags.ArgumentSerializer(), **options
  )


def define_paths(name, default, help, **options):
  """A flag that names several files or folders."""
  return flags.DEFINE(
    _Paths(), name, default, help, serializer=flags.CsvListSerializer(","), **options
  )


class _BadConfig(Exception):
  """A config file that cannot be used; the message is the line to print."""


class _ConfigFile(flags.ArgumentParser):
  """Runs a config file by ml_collections' parser; whatever that raises becomes one line."""

  syntactic_help = "a config file"

  def __init__(self, parser):
    self._parser = parser
    self.content = None  # what the file gave

  def parse(self, argument):
    _load_tensorflow()
    try:
      config = self._parser.parse(shipped.config(argument))
    except BaseException as error:  # a config file is the user's own program
      if isinstance(error, KeyboardInterrupt):
        raise
      # ml_collections puts the whole traceback into the text of an error of its own.
      wrapped = _text_of(error).startswith("Error whilst parsing config file")
      raise _BadConfig(_fault_of(argument, error.__context__ if wrapped else error)) from error
    if not isinstance(config, ConfigDict):
      error = vars(config).get("_error") if hasattr(config, "__dict__") else None
      if isinstance(error, OSError):  # kept there by ml_collections until the config is read
        raise _BadConfig(_fault_of(argument, error))
      raise _BadConfig(
        f"{argument}: get_config() gives {type(config).__name__}, not a ConfigDict; end it with "
        "`return Experiment(...).to_config()`"
      )
    self.content = config
    return config


def _text_of(error):
  """The text of an error in one line; "" of one that has none, or that fails to give it."""
  try:
    return " ".join(str(error).split())
  except Exception:
    return ""


def _fault_of(path, error):
  text = _text_of(error)
  if isinstance(error, SystemExit):
    return f"{path}: it ends the program by sys.exit({text}); a config file returns a config"
  if isinstance(error, AttributeError) and "'get_config'" in text:
    return f"{path}: it has no function get_config; is it a config file?"
  if isinstance(error, ValueError) and text and not isinstance(error, UnicodeError):
    return f"{path}: {text}"
  kind = type(error).__name__
  if text.startswith("Failed loading config file"):  # ml_collections' list of where it looked
    text = text[text.find("[Errno") :]
  return f"{path}: {kind}{': ' if text else ''}{text}; mend the config file (--debug shows where)"


def define_config():
  """The --config flag: a name of the package's configs or a file with get_config.

  Its fields are overridable by --config.FIELD=VALUE.
  """
  holder = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config: one that comes with the package by name, such as digits_blur, or your own file; "
    "override a field by --config.group.field=value.",
  )
  flag = flags.FLAGS["config"]
  flag.parser = _ConfigFile(flag.parser)
  return holder


def experiment_of(config):
  """The `Experiment` of the --config flag's value; a fault that no override made names the file."""
  from soft_diffusion_tf.experiment import Experiment

  try:
    return Experiment.from_config(config, trust_code=True)
  except ValueError as error:
    overrides = [a[len("--config.") :] for a in sys.argv if a.startswith("--config.")]
    said = {part for override in overrides for part in override.split("=", 1) if part}
    path = _config_path(sys.argv)
    if path is None or any(part in str(error) for part in said):
      raise
    raise ValueError(f"{path}: {error}") from error


def require_config():
  """Raises the ValueError of a command without --config, before the config is read."""
  if _config_path(sys.argv) is None:
    raise ValueError("give --config=FILE, or the name of a shipped config, as --config=digits_blur")


def define_trust_code():
  """The --trust_code flag of programs that open a model: consent to run code that it names."""
  return flags.DEFINE_bool(
    "trust_code", False, "Run code that the model's files name: for files of people you trust."
  )


def define_weights(raw=True):
  """The flags of programs that draw by a run: by which of its weights; --raw_weights if `raw`."""
  length = flags.DEFINE_float(
    "ema_length",
    None,
    "Draw by an average of this length, a share of the training, of a run that was trained with "
    "training.averages; by default by the average of training.ema_decay.",
  )
  if not raw:
    return (length,)
  return length, flags.DEFINE_bool(
    "raw_weights", False, "Draw by the weights under training, not by their averages."
  )


def asked_weights(length, raw=None):
  """What the flags of `define_weights` say, as arguments of `training.load`."""
  return {"length": length.value, "averaged": raw is None or not raw.value}


def refuse(ignored, why):
  """Raises the ValueError of one of the flags that was given; `why` says what would ignore it."""
  for flag in ignored:
    if flag.present and flag.value is not False:
      raise ValueError(f"{why}; leave {flag.serialize()} out")


# --- Parsing --------------------------------------------------------------------------------------


def say(text):
  """Prints a message about the progress, at once."""
  print(text, flush=True)


@contextlib.contextmanager
def _without_log():
  """Keeps lines of TensorFlow's log from stderr; what else is written there passes.

  Until it has found its devices TensorFlow prints what it likes, at any TF_CPP_MIN_LOG_LEVEL:
  without a GPU the want of one, as an error. Another process looks through the lines, so that they
  come through also when this one dies.
  """
  sys.stderr.flush()
  real, (out, into) = os.dup(2), os.pipe()
  if not (child := os.fork()):
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, signal.SIG_IGN)
    os.close(into)
    with open(out, "rb") as lines:
      for line in lines:
        if not _LOG.match(line):
          os.write(real, line)
    os._exit(0)
  os.dup2(into, 2)
  os.close(into)
  os.close(out)
  try:
    yield
  finally:
    sys.stderr.flush()
    os.dup2(real, 2)
    os.close(real)
    os.waitpid(child, 0)


def _load_tensorflow():
  """Imports TensorFlow and lets it find its devices, which takes a while and is said."""
  if "tensorflow" in sys.modules:
    return
  say("loading TensorFlow")
  quiet = sys.stderr and not _wants_debug(sys.argv)
  with _without_log() if quiet else contextlib.nullcontext():
    import tensorflow as tf

    tf.config.list_physical_devices()


def _fail(text, code=BAD_INPUT):
  text = " ".join(str(text).split())
  text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
  if len(text) > _LONGEST:
    text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
  if sys.stdout:
    sys.stdout.flush()
  print(f"error: {text}", file=sys.stderr)
  sys.exit(code)


def _config_path(argv):
  """The value of --config=FILE or --config FILE, or None."""
  for k, argument in enumerate(argv):
    name, equals, value = argument.partition("=")
    if name in ("--config", "-config"):
      return value if equals else argv[k + 1] if k + 1 < len(argv) else ""
  return None


def _last_overrides(argv):
  """The arguments with the last value of each field alone; a tuple's values would be joined."""
  names = [a.partition("=")[0] if a.startswith("--config.") and "=" in a else None for a in argv]
  last = {name: k for k, name in enumerate(names)}
  return [a for k, (a, name) in enumerate(zip(argv, names)) if name is None or last[name] == k]


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


def _explain_override(argv, config, error):
  """Names the override that does not fit the config, and the nearest field that does."""
  for argument in argv:
    if not argument.startswith("--config."):
      continue
    name = argument[len("--config.") :].split("=", 1)[0]
    node, before = config, []
    for part in name.split("."):
      if not isinstance(node, ConfigDict) or part not in node:
        keys = list(node.keys()) if isinstance(node, ConfigDict) else []
        hint = ""
        if keys:
          hint = f"; did you mean {'.'.join([*before, parts.nearest(part, keys)])}?"
        _fail(f"the config has no field {name}{hint}")
      node, before = node[part], [*before, part]
  _fail(f"--config: {error}")


def _explain_flag(error):
  """The line of a flag that does not parse: what was given, and what it takes."""
  text = " ".join(str(error).split())
  missing = re.search(r"Flag --([\w.]+) must have a value other than None", text)
  if missing:
    name = missing[1]
    return f"give --{name}=…: {flags.FLAGS[name].help}"
  illegal = re.match(r"flag --([\w.]+)=(.*?): ", text)
  if illegal and illegal[1] in flags.FLAGS:
    flag = flags.FLAGS[illegal[1]]
    takes = "true or false" if flag.boolean else getattr(flag.parser, "syntactic_help", "")
    reason = text[illegal.end() :]
    if isinstance(flag.parser, flags.IntegerParser | flags.FloatParser) or flag.boolean:
      article = "" if takes.startswith(("a ", "an ", "true")) else "an "  # of "integer >= 2"
      return f"--{illegal[1]}={illegal[2]}: give {article}{takes}"
    return f"--{illegal[1]}={illegal[2]}: {reason}"
  if "config." in text and _config_path(sys.argv) is None and "config" in flags.FLAGS:
    return f"{text}; give --config=FILE before its overrides"
  return text


def _check_values():
  """Fails for what no flag takes: nothing, or a number not finite or of more than 64 bits."""
  for name, value in flags.FLAGS.flag_values_dict().items():
    if value == "" and flags.FLAGS[name].default != "" and not name.startswith("config."):
      _fail(f"--{name}= is empty; is a shell variable unset? Without the flag its default holds")
    for number in value if isinstance(value, list | tuple) else [value]:
      if isinstance(number, float) and not math.isfinite(number):
        _fail(f"--{name}={number:g} is not a finite number; give one")
      if isinstance(number, int) and not -(2**63) <= number < 2**63:
        _fail(f"--{name}={number} has more than 64 bits; give a smaller number")


def _without_config(argv):
  """The arguments but for --config and its overrides."""
  kept, value_follows = [], False
  for argument in argv:
    if value_follows and not argument.startswith("-"):
      value_follows = False
      continue
    ours = re.match(r"--?config(\.[\w.]+)?(=|$)", argument)
    value_follows = bool(ours) and not ours[2]
    if not ours:
      kept.append(argument)
  return kept


def positional_arguments():
  """The arguments that are no flags, such as check and digits of `soft-diffusion-data`."""
  return tuple(_words)


def _parse(argv, check=None):
  """The arguments that are no flags; ends with one line where a flag or the config is wrong.

  Whatever is wrong without a look at the config is said before it is read: a config is a program,
  and loads TensorFlow.
  """
  own = "config" in flags.FLAGS and isinstance(flags.FLAGS["config"].parser, _ConfigFile)
  path = _config_path(argv) if own else None
  if path is not None:
    try:
      shipped.config(path)
    except ValueError as error:
      _fail(f"--config={path}: {error}")
  try:
    rest = flags.FLAGS(argv if path is None else _without_config(argv))
    _words[:] = rest[1:]
    _check_values()
    if check is not None:
      _run_check(check)
    if path is not None:
      rest = flags.FLAGS(_last_overrides(argv))
      _check_values()
    return rest
  except Exception as error:
    if _wants_debug(argv):
      raise
    if isinstance(error, _BadConfig):
      _fail(error)
    content = flags.FLAGS["config"].parser.content if own else None
    if (isinstance(error, flags.Error) and "override" not in str(error)) or content is None:
      _fail(_explain_flag(error))
    return _explain_override(argv, content, error)


def _run_check(check):
  try:
    check()
  except (ValueError, OSError) as error:
    if _DEBUG.value:
      raise
    _fail(_line_of(error))


def _wants_debug(argv):
  return any(re.fullmatch(r"--?debug(=(true|t|1|yes|y))?", a.lower()) for a in argv)


# --- Running --------------------------------------------------------------------------------------


def _line_of(error):
  """The line of an error; one of a file that was not named says where the program writes."""
  text = _text_of(error) or type(error).__name__
  if isinstance(error, OSError) and error.filename is None:
    places = [
      f"--{p}={flags.FLAGS[p].value}" for p in _PLACES if p in flags.FLAGS and flags.FLAGS[p].value
    ]
    if places:
      text += f", at work for {' and '.join(places)}"
  if isinstance(error, OSError):
    text += "; check the path, its permissions and the free space"
  return text


def _guarded(main, resumable, most_words=0):
  def run(argv):
    if len(argv) > 1 + most_words:
      _fail(f"unexpected argument {argv[1 + most_words]!r}; flags are given as --name=value")
    _load_tensorflow()  # after the flags, so that --help is quick
    import tensorflow as tf

    from soft_diffusion_tf import training, trust
    from soft_diffusion_tf.model import NonFiniteLoss

    _start.loaded(signal.SIGINT, *(() if resumable else (signal.SIGTERM,)))
    bad_input = (ValueError, OSError, NonFiniteLoss, tf.errors.ResourceExhaustedError)
    try:
      with trust.trust_code("trust_code" in flags.FLAGS and flags.FLAGS.trust_code):
        main()
    except training.Preempted as end:
      print(end, file=sys.stderr)
      sys.exit(os.EX_TEMPFAIL)
    except training.WorkerLost as end:
      print(f"error: {end}", file=sys.stderr, flush=True)
      os._exit(os.EX_TEMPFAIL)  # an orderly exit would wait for the worker that is gone
    except MemoryError as error:
      if _DEBUG.value:
        raise
      _fail(f"there is not enough memory ({error}); ask for less at once")
    except Exception as error:
      if _DEBUG.value:
        raise
      if isinstance(error, bad_input):
        _fail(_line_of(error))
      _fail(
        f"{type(error).__name__}: {_text_of(error)} (a fault of the program, not of its user: "
        "--debug shows where; please report it)",
        FAULT,
      )

  return run


def run(main, resumable=False, check=None, most_words=0):
  """Parses flags and calls main(); bad input ends with one line on stderr and exit code 2.

  Args:
    main: the program; TensorFlow is loaded before it is called.
    check: raises the ValueError of flags that are wrong by themselves. It is called before
      TensorFlow is loaded and the config is read, which take seconds.
    resumable: the program goes on from where it was ended, also by SIGTERM: exit code 75.
    most_words: arguments that it takes beside its flags, at the most (see `positional_arguments`).
  """
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="backslashreplace")  # a terminal may know fewer letters
  if _HELP & {argument.split("=")[0] for argument in sys.argv[1:]}:
    _print_help(main)
    return
  _start.loading()
  if not _wants_debug(sys.argv):
    logging.set_verbosity(logging.ERROR)
    if not sys.warnoptions:
      warnings.simplefilter("ignore")
  try:
    app.run(
      _guarded(main, resumable, most_words), flags_parser=functools.partial(_parse, check=check)
    )
  except KeyboardInterrupt:
    print("interrupted; start again with the same command to go on", file=sys.stderr)
    sys.exit(130)


_start.loaded()  # what imported this module may be no program
