"""Relabelling rounds: who is relabelled, where, how much, and when the network trains again."""

from organseg.curriculum.callback import Curriculum
from organseg.curriculum.relabel import select_confident

__all__ = ["Curriculum", "select_confident"]
