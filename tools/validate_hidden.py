"""Mean DSC of each organ on the validation patients with all their labels, also those that `label_share` hides.

For choosing between variants of a method while it is developed: a run itself must not see this truth, and the test
patients must not be used for it. Usage: python tools/validate_hidden.py RUN/03_round1_train RUN ... --precision 32-true
(a run folder, or the folder of one of its phases).
"""

import argparse
from dataclasses import replace
from pathlib import Path

import lightning as L

from organseg.cli.modules import load_module
from organseg.cli.training import quieten
from organseg.data import SliceDataModule
from organseg.data.cohort import CohortCase
from organseg.runtime.precision import affordable_precision
from organseg.strict_yaml import read_yaml


def uncovered(case: CohortCase) -> CohortCase:
    """The case with everything that its data set annotates."""
    return replace(case, annotated=frozenset(case.cached.header.annotated) & frozenset(case.organs))


def main() -> None:
    """One line a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--precision", default="bf16-mixed")
    arguments = parser.parse_args()
    quieten()
    for folder in arguments.folders:
        run = folder if (folder / "config.yaml").exists() else folder.parent
        config = read_yaml(run / "config.yaml")
        if not config["data"]["class_path"].endswith("SliceDataModule"):
            parser.error(f"{run}: trained on {config['data']['class_path']}; only slices can be scored here")
        if not config["data"]["init_args"].get("val_share"):
            parser.error(f"{run}: has no validation patients: train with --data.init_args.val_share 0.15")
        options = {key: value for key, value in config["data"]["init_args"].items() if key != "augmentation"}
        options["window_hu"] = tuple(options["window_hu"])
        data = SliceDataModule(**{**options, "seed": config["seed"]})
        data.cohort = replace(data.cohort, val=tuple(map(uncovered, data.cohort.val)))
        trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=1,
                            precision=affordable_precision(arguments.precision, "auto"))  # fmt: skip
        module = load_module(folder / "checkpoints" / "last.ckpt")
        trainer.validate(module, datamodule=data, verbose=False)
        scores = {name.removeprefix("val/dsc/"): 100 * float(value) for name, value in trainer.callback_metrics.items()}
        mean = scores.pop("val/dsc")
        print(f"{folder}: mean {mean:.1f}; " + ", ".join(f"{organ} {score:.1f}" for organ, score in scores.items()))


if __name__ == "__main__":
    main()
