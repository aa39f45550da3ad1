"""Hypothesis draws the same examples in every run: a test that fails once in a while teaches people to run it again."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
