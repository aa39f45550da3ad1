"""Mixed precision is asked for where the hardware has it, and a run goes on in what it was begun in."""

import pytest

from organseg.errors import UsageError
from organseg.runtime import precision
from organseg.runtime.precision import affordable_precision


@pytest.mark.parametrize(("hardware", "found"), [(True, "bf16-mixed"), (False, "32-true")])
def test_bf16_in_software_is_replaced_and_that_is_said(monkeypatch, capsys, hardware, found):
    monkeypatch.setattr(precision, "bf16_in_hardware", lambda: hardware)
    assert affordable_precision("bf16-mixed", "cpu") == found
    said = capsys.readouterr().err
    assert said == (
        "" if hardware else "organseg: this CPU has no bfloat16 arithmetic: 32-true instead of bf16-mixed\n"
    )


def test_what_else_is_asked_for_stays(monkeypatch, capsys):
    monkeypatch.setattr(precision, "bf16_in_hardware", lambda: False)
    assert affordable_precision("bf16-mixed", "gpu") == "bf16-mixed"
    assert affordable_precision("64-true", "cpu") == "64-true"
    assert affordable_precision(None, "auto") is None
    assert not capsys.readouterr().err


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize("asked", ["16-mixed", "16", 16])
def test_float16_is_for_gpus(monkeypatch, asked, accelerated):
    monkeypatch.setattr(precision, "_accelerated", lambda: accelerated)
    assert affordable_precision(asked, "gpu") == asked
    for accelerator in ("cpu",) if accelerated else ("cpu", "auto"):
        with pytest.raises(UsageError, match=f"found {asked} on a CPU.*bf16-mixed or 32-true"):
            affordable_precision(asked, accelerator)
    if accelerated:
        assert affordable_precision(asked, "auto") == asked


@pytest.mark.parametrize("asked", ["16-true", "bf16-true"])
def test_weights_have_32_bits(asked):
    with pytest.raises(UsageError, match=f"found {asked}, expected weights of 32 bits"):
        affordable_precision(asked, "gpu")


def test_other_ranks_say_nothing(monkeypatch, capsys):
    monkeypatch.setattr(precision, "bf16_in_hardware", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert affordable_precision("bf16-mixed", "cpu") == "32-true"
    assert not capsys.readouterr().err


def test_a_gpu_of_before_ampere_computes_in_fp32(monkeypatch, capsys):
    monkeypatch.setattr("organseg.runtime.precision.old_gpu", lambda: True)
    monkeypatch.setattr("organseg.runtime.precision._accelerated", lambda: True)
    assert [affordable_precision("bf16-mixed", name) for name in ("auto", "gpu", "cuda")] == ["32-true"] * 3
    assert affordable_precision("16-mixed", "gpu") == "16-mixed"
    assert capsys.readouterr().err.count("this GPU has no bfloat16 arithmetic") == 3
