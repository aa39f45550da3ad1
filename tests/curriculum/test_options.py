"""Options of a curriculum that cannot mean what they say are refused before anything is trained."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rounds import CONFIGS
from toy import organseg

from organseg.curriculum import CrossFittedConfidence, Curriculum, LearnedConfidence, Selection
from organseg.errors import UsageError


@pytest.mark.parametrize(("options", "said"), [
    ({"rounds": 0}, "rounds 0"),
    ({"gamma_max": 1.5}, "gamma_max 1.5"),
    ({"result": "best", "round0": Path("run")}, "also compares round 0"),
    ({"score": "confidence", "selection": Selection(threshold=0.3)}, "threshold: 0.3: below 0.5"),
    ({"score": LearnedConfidence(over="known"), "selection": Selection(threshold=0.4)}, "threshold: 0.4: below 0.5"),
    ({"score": "mcp", "accumulate": True, "selection": Selection(smooth_mm=8.0)}, "set them to 0, false and null"),
    ({"score": "mcp", "accumulate": True, "selection": Selection(largest_piece=True)}, "set them to 0, false and null"),
    ({"score": "mcp", "accumulate": True, "selection": Selection(max_volume=1.0)}, "set them to 0, false and null"),
])  # fmt: skip
def test_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match="curriculum") as caught:
        Curriculum(**options)
    assert said in str(caught.value)


@pytest.mark.parametrize("score", ["mcp", CrossFittedConfidence()])
def test_other_scores_take_improbable_candidates(score: Any) -> None:
    Curriculum(score=score, selection=Selection(threshold=0.3))


def test_refused_before_data_are_read() -> None:
    experiment = CONFIGS / "experiment" / "phantom_30_inerrant_thesis.yaml"
    done = organseg("fit", "--config", experiment, "--data.init_args.cache=nowhere", "--curriculum.accumulate=true",
                    "--curriculum.selection.smooth_mm=8", check=2)  # fmt: skip
    assert "set them to 0, false and null" in done.stderr and "nowhere" not in done.stderr


def test_round_0_is_counted_in_steps() -> None:
    host: Any = SimpleNamespace(run_folder=SimpleNamespace(path=Path("run")), round0_steps=-1)
    with pytest.raises(UsageError, match=r"set `--trainer\.max_steps`"):
        Curriculum().run(host, SimpleNamespace())  # type: ignore[arg-type]


def test_a_confidence_network_never_sees_pseudo_labels() -> None:
    curriculum = Curriculum(rounds=2)
    curriculum.folder = Path("run")
    seen = {phase.name: curriculum._pseudo_labels(phase) for phase in curriculum.plan()}
    assert {name: folder.name for name, folder in seen.items() if folder} == {
        "03_round1_train": "round_1", "06_round2_train": "round_2",
    }  # fmt: skip
