"""One file per audio-visual LLM family behind one interface (models/avllm.py), and the instrumented attention (models/attention.py)."""

from models.attention import SITES, Cut, CutError, Kind
from models.avllm import AVLLM, ModelError, spread_ranks
from models.load import load_model
from models.selfcheck import self_check
from models.sequences import Media

__all__ = ["AVLLM", "SITES", "Cut", "CutError", "Kind", "Media", "ModelError", "load_model", "self_check", "spread_ranks"]
