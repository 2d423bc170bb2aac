"""What is asked of a scan in words: sets of prompts as files with a version and a digest, so that answers repeat."""

from __future__ import annotations

from voxelstem.prompts.reader import NAMES, Ensemble, Prompts, read_prompts

__all__ = ["NAMES", "Ensemble", "Prompts", "read_prompts"]
