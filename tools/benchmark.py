"""Benchmarks, one subcommand each; ratios hold within one run.

python tools/benchmark.py corruption
python tools/benchmark.py network --config=small
python tools/benchmark.py sinkhorn
python tools/benchmark.py train --config=configs/digits_blur.py
python tools/benchmark.py data --config=configs/digits_blur.py
python tools/benchmark.py schedule
python tools/benchmark.py sample
python tools/benchmark.py evaluate
python tools/benchmark.py serve --model=DIR
python tools/benchmark.py start
"""

import importlib.util
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

FOLDER = pathlib.Path(__file__).parent / "benchmarks"


def main(argv):
  names = sorted(f.stem for f in FOLDER.glob("*.py"))
  if not argv or argv[0] not in names:
    print(__doc__)
    print(f"error: give one of {', '.join(names)}, then its own flags (--help)", file=sys.stderr)
    return 2
  spec = importlib.util.spec_from_file_location(argv[0], FOLDER / f"{argv[0]}.py")
  module = importlib.util.module_from_spec(spec)
  sys.path.insert(0, str(FOLDER.parents[1]))
  spec.loader.exec_module(module)
  return module.main(argv[1:])


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
