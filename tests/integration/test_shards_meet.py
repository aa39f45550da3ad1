"""Tasks of a job array, in any order, one of them killed and repeated: what comes out is what one process makes."""

import csv
import hashlib
import random
from pathlib import Path

import nibabel
import pytest
from rounds import TWO_RANKS, killed_at, weights
from toy import TOY, organseg
from warm import end_of, start

from organseg import cli
from organseg.data.staging import place_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CONFIG = Path(__file__).parents[2] / "configs" / "experiment" / "phantom_30_inerrant0.yaml"
LEARNS = (
    "--model.init_args.optimizer=torch.optim.Adam",
    "--model.init_args.optimizer.init_args.lr=0.01",
    "--model.init_args.network.init_args.norm=instance",
    "--data.init_args.label_share=1.0",
    "--trainer.max_steps=40",
    "--trainer.precision=32-true",
)
"""Enough for a spleen: label maps of nothing but background would all be alike."""


@pytest.fixture(scope="module")
def cache(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On a coarser grid than the scans'."""
    path = tmp_path_factory.mktemp("coarser")
    sets = [str(toy / name / "dataset.yaml") for name in ("phantoms", "btcv")]
    assert cli.run(["prepare", *sets, "--out", str(path), "--size", "24", "--processes", "1"]) == 0
    return path


def fit(cache: Path, run: Path, *more: object) -> str:
    done = organseg("fit", "--config", CONFIG, "--data.init_args.cache", cache, "--out", run, *TOY, *LEARNS,
                    "--data.init_args.datasets=[phantom]", "--data.init_args.test_datasets=[btcv]", *more)  # fmt: skip
    return done.stdout


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that reads a copy of the cache on a local disk, and its test by one process."""
    folder = tmp_path_factory.mktemp("shards")
    said = fit(cache, folder / "run", "--data.init_args.stage", folder / "disk")
    assert "staged 11 of 11 cases" in said
    place = place_of(cache, folder / "disk")
    assert sorted(path.name for path in place.iterdir() if path.is_dir()) == ["btcv", "phantom"]
    assert cli.run(scoring(folder / "run", folder / "run")) == 0
    return folder / "run"


def scoring(run: Path, out: Path, *more: object) -> list[str]:
    words = ["test", "--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt", "--out", out]
    return [str(word) for word in (*words, *more)]


def files(folder: Path, *left_out: str) -> dict[str, str]:
    """Path -> content hash of everything in a folder."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.match("shards/*/*")]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
        if not path.name.startswith(("shard_", *left_out))
    }


def shuffled() -> list[int]:
    return random.Random(1).sample(range(3), 3)


def test_three_preparations_one_killed_are_one(toy: Path, tmp_path: Path) -> None:
    words = ["prepare", str(toy / "phantoms" / "dataset.yaml"), "--processes", "1", "--out"]
    assert cli.run([*words, str(tmp_path / "whole")]) == 0
    cache, order = tmp_path / "cache", shuffled()
    second = f"phantom_{order[0] + 3:03}"  # of the first shard's two cases
    shard = [*words, str(cache), "--shard"]
    assert killed_at([*shard, f"{order[0]}/3"], cache, f"os.rename phantom/{second}")
    assert len(list(cache.rglob("*.h5"))) == 1 and list(cache.rglob("*.tmp"))
    for index in (*order[1:], order[0]):
        assert not (cache / "phantom" / "index.json").exists()
        assert cli.run([*shard, f"{index}/3"]) == 0
    assert files(cache) == files(tmp_path / "whole")


@pytest.mark.slow
def test_three_tests_one_killed_are_one(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted, order = files(trained / "test"), shuffled()
    assert len({content for name, content in wanted.items() if name.endswith(".nii.gz")}) == 5
    shard = scoring(trained, tmp_path, "--shard")
    first = range(5)[order[0] :: 3]
    assert len(first) == 2, "one case is done when the second is killed"
    record = tmp_path / "test" / "shards" / "btcv" / f"phantom_{first[0]:03}.json"
    assert killed_at([*shard, f"{order[0]}/3"], tmp_path, f"os.rename test/shards/btcv/phantom_{first[1]:03}")
    assert record.exists() and list(tmp_path.rglob("*.tmp"))
    before = record.stat().st_mtime_ns
    for done, index in enumerate((*order[1:], order[0])):
        assert f"{done} of 3 shards" in capsys.readouterr().out or not done
        assert not (tmp_path / "test" / "cases.csv").exists()
        assert cli.run([*shard, f"{index}/3"]) == 0
    assert files(tmp_path / "test") == wanted
    assert record.stat().st_mtime_ns == before, "what was done is not done again"
    (tmp_path / "test" / "cases.csv").unlink()
    assert cli.run([*shard, "1/3"]) == 0, "with nothing left to do it writes the tables"
    assert files(tmp_path / "test") == wanted
    assert cli.run([*shard, "1/2"]) == 0  # another array: its cases are its own
    assert "1 of 2 shards are complete, 2 of 5 cases" in capsys.readouterr().out
    assert cli.run(shard[:-1]) == 0
    assert files(tmp_path / "test") == wanted and not (tmp_path / "test" / "shards").exists()


@pytest.mark.slow
def test_three_predictions_one_killed_are_one(trained: Path, toy: Path, tmp_path: Path) -> None:
    words = ["predict", "--ckpt_path", str(trained / "checkpoints" / "last.ckpt"), "--accelerator", "cpu", "--input",
             str(toy / "btcv" / "img"), "--out"]  # fmt: skip
    assert cli.run([*words, str(tmp_path / "whole")]) == 0
    out, order = tmp_path / "out", shuffled()
    out.mkdir()
    second = f"phantom_{order[0] + 3:03}"
    shard = [*words, str(out), "--shard"]
    assert killed_at([*shard, f"{order[0]}/3"], out, f"os.rename {second}")
    assert len(list(out.glob("*.nii.gz"))) == 1
    for index in (*order[1:], order[0]):
        assert cli.run([*shard, f"{index}/3"]) == 0
    assert files(out, "predictions", ".") == files(tmp_path / "whole", "predictions", ".")
    tested = sorted((trained / "test" / "predictions" / "btcv").glob("*.nii.gz"))
    assert len(tested) == 5
    for path in tested:  # which is scored against the truth, in the file's own geometry
        assert (out / path.name).read_bytes() == path.read_bytes()
    with (trained / "test" / "cases.csv").open() as file:
        spleens = [float(row["dsc"]) for row in csv.DictReader(file) if row["organ"] == "spleen"]
    assert min(spleens) > 0.3


@pytest.mark.slow
def test_evaluate_scores_a_run_s_own_predictions_as_its_test_did(trained: Path, toy: Path, tmp_path: Path) -> None:
    words = [
        "evaluate",
        toy / "btcv" / "dataset.yaml",
        "--predictions",
        trained / "test" / "predictions",
        "--out",
        tmp_path,
    ]
    assert cli.run([str(word) for word in words]) == 0
    for name in ("cases.csv", "summary.csv"):
        assert (tmp_path / name).read_bytes() == (trained / "test" / name).read_bytes()


@pytest.mark.slow
def test_mr_is_predicted_as_it_is_tested(toy: Path, tmp_path: Path) -> None:
    """Each scan by its own normalisation, which no training set can give."""
    manifest = (
        (toy / "btcv" / "dataset.yaml").read_text().replace("modality: CT", f"modality: MR\nroot: {toy / 'btcv'}")
    )
    (tmp_path / "mr.yaml").write_text(manifest)
    assert cli.run(["prepare", str(tmp_path / "mr.yaml"), "--out", str(tmp_path / "cache"), "--processes", "1"]) == 0
    run = tmp_path / "run"
    organseg("fit", "--config", CONFIG, "--data.init_args.cache", tmp_path / "cache", "--out", run, *TOY, *LEARNS,
             "--data.init_args.datasets=[btcv]", "--data.init_args.folds=2")  # fmt: skip
    assert cli.run(scoring(run, run)) == 0
    tested = sorted((run / "test" / "predictions" / "btcv").glob("*.nii.gz"))
    scans = [str(toy / "btcv" / "img" / path.name) for path in tested]
    words = [
        "predict",
        "--ckpt_path",
        str(run / "checkpoints" / "last.ckpt"),
        "--accelerator",
        "cpu",
        "--input",
        *scans,
    ]
    assert cli.run([*words, "--out", str(tmp_path / "out")]) == 0
    assert tested
    for path in tested:
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        assert nibabel.load(path).get_fdata().any()


@pytest.mark.slow
def test_two_ranks_in_a_shard(trained: Path, tmp_path: Path) -> None:
    first = start(scoring(trained, tmp_path, "--shard", "0/2", *TWO_RANKS))
    assert end_of(first, 200) == 0
    assert cli.run(scoring(trained, tmp_path, "--shard", "1/2")) == 0
    assert files(tmp_path / "test") == files(trained / "test")


@pytest.mark.slow
def test_a_copy_of_the_cache_trains_the_same_network(trained: Path, cache: Path, tmp_path: Path) -> None:
    fit(cache, tmp_path / "run")
    one, other = (weights(run / "checkpoints" / "last.ckpt") for run in (trained, tmp_path / "run"))
    assert one == other
    # Nor is it another run: what was begun with a copy goes on without one.
    one, other = ((run / "run.json").read_text() for run in (trained, tmp_path / "run"))
    assert one == other


def test_a_shard_is_of_a_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["test", "--config", str(CONFIG), "--shard", "2/2"]) == 2
    assert "--shard 2/2: expected I/N" in capsys.readouterr().err
    for command in ("fit", "validate"):
        assert cli.run([command, "--config", str(CONFIG), "--shard", "0/2"]) == 2
        assert capsys.readouterr().err == "organseg: unrecognized arguments: --shard 0/2\n"
