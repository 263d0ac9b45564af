"""The programs: absl flags, then one call. Never imported by the library."""

import os
import signal
import threading

_USUAL = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
_SAID = {
  signal.SIGTERM: (b"asked to end before anything was done; start again to go on\n", 75),
  signal.SIGINT: (b"interrupted; start again with the same command to go on\n", 130),
}


def _end(number, frame):
  text, code = _SAID[number]
  os.write(2, text)
  os._exit(code)  # an exception would be caught by one of the modules that are being imported


def loading():
  """Makes SIGTERM and SIGINT end the process in one line until `loaded`."""
  if threading.current_thread() is threading.main_thread():
    for number, handler in _USUAL.items():
      if signal.getsignal(number) == handler:
        signal.signal(number, _end)


def loaded(*numbers):
  """Gives these signals, or all, back the handlers that Python starts with."""
  if threading.current_thread() is threading.main_thread():
    for number in numbers or _USUAL:
      if signal.getsignal(number) is _end:
        signal.signal(number, _USUAL[number])


loading()  # from here on: absl, which the programs import next, takes a third of a second
