"""Relabelling rounds: who is relabelled, where, how much, and when the network trains again."""

from organseg.curriculum.callback import Curriculum
from organseg.curriculum.cross_fitted import CrossFittedConfidence
from organseg.curriculum.scores import LearnedConfidence, MaximumClassProbability, Score
from organseg.curriculum.selection import Selection, select_confident

__all__ = [
    "CrossFittedConfidence",
    "Curriculum",
    "LearnedConfidence",
    "MaximumClassProbability",
    "Score",
    "Selection",
    "select_confident",
]
