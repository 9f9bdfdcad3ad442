"""`accelerate launch train` and `python -m train`; see train/loop.py."""

import sys
import warnings
from pathlib import Path

# `accelerate launch train` puts this folder itself on the path: its files must not be found under their bare names.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft asks transformers by the old name

from train.loop import main  # noqa: E402

sys.exit(main())
