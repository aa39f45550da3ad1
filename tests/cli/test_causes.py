"""What a user is told of errors that others wrapped."""

import pytest
import torch
from torch._utils import ExceptionWrapper

from organseg.cli.causes import known_cause
from organseg.errors import IntegrityError, UsageError, WorkerError


def test_an_error_of_a_loader_worker_is_its_last_line():
    try:
        raise IntegrityError("set/a: a.h5: found damage, expected none: prepare again")
    except IntegrityError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(IntegrityError, match="Traceback") as caught:
        wrapped.reraise()
    found = known_cause(caught.value)
    assert isinstance(found, IntegrityError)
    assert str(found) == "set/a: a.h5: found damage, expected none: prepare again"


def test_ours_behind_another():
    try:
        try:
            raise UsageError("ours")
        except UsageError as error:
            raise RuntimeError("theirs") from error
    except RuntimeError as error:
        assert str(known_cause(error)) == "ours"
    assert known_cause(None) is None
    assert known_cause(ValueError("a bug")) is None


def test_too_little_memory_names_what_takes_it():
    found = known_cause(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert isinstance(found, WorkerError)
    assert "batch_size" in str(found) and "CUDA out of memory" in str(found)
