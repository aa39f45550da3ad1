"""The journal decides what is finished: chained lines, verified results, torn lines ignored."""

import hashlib
from pathlib import Path

import pytest

from organseg.curriculum.journal import Entry, Journal
from organseg.errors import IntegrityError, StorageError

PLAN = ["00_a", "01_b", "02_c"]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path, digest)


def finish(journal: Journal, phase: str, parent: str, content: bytes = b"x") -> Entry:
    (journal.run / phase).write_bytes(content)
    entry = Entry(phase, parent, {phase: digest(journal.run / phase)})
    journal.append(entry)
    return entry


def test_phases_are_finished_in_their_order(journal):
    assert journal.finished(PLAN, "root") == []
    first = finish(journal, "00_a", "root")
    second = finish(journal, "01_b", first.digest)
    assert journal.finished(PLAN, "root") == [first, second]
    assert journal.finished(PLAN, "another config") == []
    finish(journal, "02_c", "of something else")
    assert journal.finished(PLAN, "root") == [first, second]


def test_every_torn_line_is_an_unfinished_phase(journal):
    first = finish(journal, "00_a", "root")
    whole = journal.path.read_bytes()
    second = finish(journal, "01_b", first.digest)
    line = journal.path.read_bytes()[len(whole) :]
    for cut in range(len(line) - 1):  # without the last line end the line is whole already
        journal.path.write_bytes(whole + line[:cut])
        assert journal.finished(PLAN, "root") == [first]
        journal.append(second)
        assert journal.finished(PLAN, "root") == [first, second]


@pytest.mark.parametrize("line", [
    "[]", "7", '"x"', "\xff", "{}", '{"phase": "00_a", "parent": ["root"], "outputs": {}}',
    '{"phase": "00_a", "parent": "root", "outputs": 3}',
])  # fmt: skip
def test_a_foreign_line_is_no_phase(journal, line):
    journal.path.write_text(f"{line}\n")
    assert journal.finished(PLAN, "root") == []
    first = finish(journal, "00_a", "root")
    assert journal.finished(PLAN, "root") == [first]


def test_a_changed_result_is_named(journal):
    finish(journal, "00_a", "root")
    (journal.run / "00_a").write_bytes(b"y")
    with pytest.raises(IntegrityError, match=r"00_a: changed or removed since 00_a was finished"):
        journal.finished(PLAN, "root")


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(StorageError, match="journal"):
        Journal(tmp_path / "nowhere", digest).append(Entry("a", "b", {}))
