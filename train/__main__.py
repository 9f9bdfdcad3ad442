"""`accelerate launch train` and `python -m train`; see train/loop.py."""

import sys
from pathlib import Path

# `accelerate launch train` puts this folder itself on the path: its files must not be found under their bare names.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from train.loop import main  # noqa: E402

sys.exit(main())
