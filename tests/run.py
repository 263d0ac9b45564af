"""The main program of every test target in BUILD: pytest runs the files that it is given.

A test file that runs by itself only defines its tests and ends well, whatever they assert. This
ends with pytest's exit code. Under Bazel, `--test_arg` adds flags of pytest's.
"""

import os
import pathlib
import sys

import pytest

if __name__ == "__main__":
  root = pathlib.Path(__file__).parents[1]
  # The programs that tests start find what this one was given.
  os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, sys.path[1:])])
  os.chdir(root)
  sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
