import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from organseg.checkpoints import verify_checkpoint
from organseg.errors import IntegrityError, UsageError
from organseg.runtime.checkpoint_io import save_checkpoint
from organseg.runtime.run_folder import RunFolder, identity

CONFIG = {
    "seed": 0,
    "model": {"class_path": "M", "init_args": {"network": {"init_args": {"width": 16}}}},
    "trainer": {"max_steps": 10, "devices": 1, "precision": "32-true"},
    "data": {"class_path": "D", "init_args": {"cache": "here", "workers": 2, "fold": 0}},
}


def test_identity_has_what_decides_the_weights_and_nothing_else() -> None:
    assert identity(CONFIG) == {
        "seed": 0,
        "model.class_path": "M",
        "model.init_args.network.init_args.width": 16,
        "trainer.max_steps": 10,
        "trainer.precision": "32-true",
        "data.class_path": "D",
        "data.fold": 0,
    }


def test_options_that_came_later_do_not_make_an_older_run_another_one() -> None:
    later = {**CONFIG, "data": {**CONFIG["data"], "init_args": {**CONFIG["data"]["init_args"], "test_datasets": None}}}
    assert identity(later) == identity(CONFIG)
    later["data"]["init_args"]["test_datasets"] = ["held"]
    assert identity(later) == {**identity(CONFIG), "data.test_datasets": ["held"]}


def test_a_networks_option_that_came_later_is_of_the_identity_where_it_is_used() -> None:
    """Defaults of an injected network's class are part of its config."""
    network = {"class_path": "organseg.networks.UTransformer", "init_args": {"width": 16, "qk_norm": False}}
    later = {**CONFIG, "model": {"class_path": "M", "init_args": {"network": network, "qk_norm": False}}}
    assert not [key for key in identity(later) if key.endswith("qk_norm")]
    network["init_args"]["qk_norm"] = True
    assert identity(later)["model.init_args.network.init_args.qk_norm"] is True


def test_no_folder_is_a_new_run(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "new").record() is None


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        RunFolder(tmp_path).record()


def test_what_a_killed_start_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".run.json.host.1.1.00000000.tmp").touch()
    (tmp_path / ".lock").touch()
    assert RunFolder(tmp_path).record() is None


def test_two_at_once_are_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from organseg.runtime.run_folder import RunFolder\n"
    script += "held = RunFolder(Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.read()"
    first = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match="another `fit`"):
        RunFolder(tmp_path).lock()
    first.kill()
    first.communicate()
    RunFolder(tmp_path).lock().close()


def test_overwrite_removes_only_what_a_run_writes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write(identity(CONFIG), finished=False)
    run.checkpoints.mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    run.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_difference_names_both_values(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write(identity(CONFIG), finished=False)
    record = run.record()
    assert record is not None
    run.compare(record, identity(CONFIG))
    with pytest.raises(IntegrityError, match="seed: run has 0, asked for 4"):
        run.compare(record, identity({**CONFIG, "seed": 4}))


def test_what_a_run_takes_from_others_may_lie_elsewhere_but_not_be_another(tmp_path: Path) -> None:
    def taking(coarse: Path | None) -> dict[str, Any]:
        model = {"class_path": "M", "init_args": {"coarse": coarse and str(coarse), "prior": None}}
        return identity({**CONFIG, "model": model})

    run, here = RunFolder(tmp_path / "run"), tmp_path / "here.ckpt"
    run.write(taking(tmp_path / "gone.ckpt"), finished=False)
    record = run.record()
    assert record is not None
    run.compare(record, taking(here))
    with pytest.raises(IntegrityError, match=r"coarse: run has .*gone\.ckpt, asked for None"):
        run.compare(record, taking(None))
    save_checkpoint({"state_dict": {}}, here)
    (run.path / "prior").mkdir()
    (run.path / "prior" / "made_of.json").write_text(f'{{"coarse": "{verify_checkpoint(here)}"}}')
    run.compare(record, taking(here))
    save_checkpoint({"state_dict": {"another": 1}}, here)
    with pytest.raises(IntegrityError, match=r"coarse: run has .*gone\.ckpt, asked for .*here\.ckpt"):
        run.compare(record, taking(here))
    for spoilt in ("", "{", "[1]"):
        (run.path / "prior" / "made_of.json").write_text(spoilt)
        with pytest.raises(IntegrityError, match=r"made_of\.json: found no JSON .*put them back to .*gone\.ckpt"):
            run.compare(record, taking(here))
        run.compare(record, taking(tmp_path / "gone.ckpt"))  # where nothing has moved, nobody asks
    # A curriculum's journal hangs on what was said when its first phase began.
    assert run.paths_at_start(record) == {}
    phase = run.path / "00_round0_train" / "checkpoints"
    phase.mkdir(parents=True)
    (phase / "last.ckpt").touch()
    given = {"model.init_args.coarse": str(tmp_path / "gone.ckpt"), "model.init_args.prior": None}
    assert run.paths_at_start(record) == given


def test_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(IntegrityError, match="--overwrite"):
        RunFolder(tmp_path).record()


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("organseg.runtime.run_folder.fcntl.lockf", refused)
    RunFolder(tmp_path / "run").lock().close()
    assert "no lock on this file system" in capsys.readouterr().err
