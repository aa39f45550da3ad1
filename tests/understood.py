"""Whether a command line of the README is one that organseg's own parser takes, before data are read."""

from collections.abc import Sequence

import pytest

from organseg import cli


def assert_understood(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `fit` and `test` also the config is built."""
    monkeypatch.setattr("organseg.processes.STOP.listen", lambda *_: None)  # pytest's own signals stay
    if words[0] in ("fit", "test"):
        with pytest.raises(SystemExit) as stop:
            cli.run([*words, "--print_config"])
        assert stop.value.code in (0, None), words
    else:
        cli._parser().parse_args(words)
