"""The command line, the only place that knows every room. Heavy imports wait for a command."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from organseg import __version__
from organseg.cli.secret_values import refuse_secrets
from organseg.cli.trusted import take_trusted
from organseg.errors import OrgansegError
from organseg.processes import STOP, LosableOutput, die_with_launcher

_LIGHTNING = {
    "fit": "train; the same command on an unfinished run goes on with it",
    "validate": "whole-case DSC on the validation patients",
    "test": "all metrics on the held-out patients, as tables and label maps",
}

_LONG = (*_LIGHTNING, "prepare", "predict", "evaluate")
"""Commands whose work counts for more than what they say."""

_SHARD = "every N-th case, from the I-th on (0 to N - 1): for a task of a job array; all tasks share one --out"


def run(argv: Sequence[str]) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name.

    Returns:
        The exit code (see `errors.py`).
    """
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    shown = sys.stdout, sys.stderr
    try:
        refuse_secrets(argv, "command line")
        argv = take_trusted(argv)
        if argv and argv[0] in _LONG:
            sys.stdout, sys.stderr = map(LosableOutput, shown)
        if argv and argv[0] in _LIGHTNING:
            die_with_launcher()
            if argv[0] == "fit":
                STOP.listen(signal.SIGTERM, signal.SIGUSR1)  # schedulers do not wait until it trains
            from organseg.cli.training import run_lightning

            return run_lightning(argv)
        parser = _parser()
        arguments = parser.parse_args(argv or ["--help"])
        command = arguments.command
        from organseg.cli import commands

        result: int = getattr(commands, f"{command}_command")(arguments)
        sys.stdout.flush()
        return result
    except OrgansegError as error:
        if debug:
            raise
        print(f"organseg: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning ends so
            return 128 + signal.SIGINT
        raise
    except BrokenPipeError:
        # Nobody reads on; without this the interpreter would fail once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, LosableOutput):
                stream.flush()
        sys.stdout, sys.stderr = shown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="organseg",
        description="One multi-organ segmentation model from partially labelled scans. Not a medical device.",
        epilog="Any command: --debug shows a traceback; --trust-import MODULE lets a config or a checkpoint name its "
        "classes. Options of fit, validate and test: `organseg fit --help`.",
    )
    parser.add_argument("--version", action="version", version=f"organseg {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in _LIGHTNING.items():
        commands.add_parser(name, help=text, add_help=False)
    _add_data_commands(commands)
    _add_run_commands(commands)
    return parser


def _add_data_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    importer = commands.add_parser("import", help="write a dataset.yaml for a folder of scans and label maps")
    importer.add_argument("reader", choices=("btcv", "folder"), help="layout of the folder")
    importer.add_argument("root", help="the folder")
    importer.add_argument("--out", required=True, help="the dataset.yaml to write")
    importer.add_argument("--name", default="", help="name of the data set (default: the reader's, or the folder's)")
    importer.add_argument(
        "--labels",
        nargs="*",
        default=[],
        metavar="INT=ORGAN",
        help="what the integers mean; parts of an organ have its name, what is none is background",
    )
    importer.add_argument("--new-organs", nargs="*", default=[], metavar="NAME", help="organs not known to organseg")
    importer.add_argument(
        "--annotated",
        choices=("all", "present"),
        default="all",
        help="every organ in every label map (default), or in each those that it shows",
    )
    importer.add_argument("--modality", choices=("CT", "MR"), default="CT")
    importer.add_argument("--overwrite", action="store_true", help="replace an existing dataset.yaml")

    checker = commands.add_parser("check", help="list every fault of every case, and who annotates what")
    checker.add_argument("datasets", nargs="+", metavar="DATASET.yaml")
    checker.add_argument("--processes", type=int, default=0, help="default: all cores")

    preparer = commands.add_parser("prepare", help="fill a cache that training reads; goes on where it stopped")
    preparer.add_argument("datasets", nargs="+", metavar="DATASET.yaml")
    preparer.add_argument("--out", required=True, metavar="CACHE", help="folder of the cache")
    grid = preparer.add_mutually_exclusive_group()
    grid.add_argument("--size", type=int, help="rows and columns of the slices, for example 128 (default: the scan's)")
    grid.add_argument("--spacing", type=float, nargs=3, metavar=("Z", "Y", "X"), help="voxel spacing, mm")
    preparer.add_argument("--processes", type=int, default=0, help="default: all cores")
    preparer.add_argument("--shard", default="0/1", metavar="I/N", help=_SHARD)

    planner = commands.add_parser("plan", help="sizes of an nnU-Net for prepared data sets, as a config")
    planner.add_argument("cache", metavar="CACHE")
    planner.add_argument("--datasets", nargs="+", help="default: all in the cache")
    planner.add_argument("--dims", type=int, choices=(2, 3), default=3)
    planner.add_argument("--memory_gb", type=float, default=8.0, help="that a training step may take")
    planner.add_argument("--width", type=int, default=32, help="channels of the first level")
    planner.add_argument("--residual", action="store_true", help="with a residual encoder")
    planner.add_argument("--transformer", action="store_true", help="as the backbone of a U-Transformer")
    planner.add_argument(
        "--precision", choices=("bf16-mixed", "32-true"), default="bf16-mixed", help="of the training (%(default)s)"
    )
    planner.add_argument("--out", help="the config to write (default: show it)")

    phantom = commands.add_parser("phantom", help="make a synthetic cohort to try things on")
    phantom.add_argument("--cases", type=int, default=20)
    phantom.add_argument("--seed", type=int, default=0)
    phantom.add_argument("--out", required=True, help="folder to write")
    phantom.add_argument("--shape", type=int, nargs=3, default=(96, 128, 128), metavar=("Z", "Y", "X"))
    phantom.add_argument(
        "--mirrored",
        action="store_true",
        help="patients of whom half are mirrored: only far context tells organs apart",
    )
    phantom.add_argument("--processes", type=int, default=0, help="default: all cores")


def _add_run_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    predictor = commands.add_parser("predict", help="segment new scans with a checkpoint; nothing else is needed")
    predictor.add_argument(
        "--ckpt_path", required=True, nargs="+", help="a checkpoint of `fit`, or several whose mean is taken"
    )
    predictor.add_argument("--tta", action="store_true", help="the mean over five shifts and gains of each scan")
    predictor.add_argument("--input", required=True, nargs="+", help="NIfTI files, or folders of them")
    predictor.add_argument("--out", required=True, help="folder of the label maps")
    predictor.add_argument("--probabilities", action="store_true", help="also write each organ's probability")
    predictor.add_argument("--overwrite", action="store_true", help="replace outputs made otherwise")
    predictor.add_argument("--affine", choices=("sform", "qform"), help="which one counts where a header's two differ")
    predictor.add_argument(
        "--assume_affine", action="store_true", help="files without one lie left, anterior, superior"
    )
    predictor.add_argument("--shard", default="0/1", metavar="I/N", help=_SHARD)
    predictor.add_argument("--accelerator", default="auto", help="cpu, gpu, ...")
    predictor.add_argument("--devices", default="1", help="one: several share the scans out by --shard (%(default)s)")
    predictor.add_argument("--precision", default="32-true", help="for example bf16-mixed")

    scorer = commands.add_parser("evaluate", help="all metrics of label maps that anybody made of a data set's scans")
    scorer.add_argument("dataset", metavar="DATASET.yaml", help="with the truth")
    scorer.add_argument(
        "--predictions", required=True, metavar="DIR",
        help="label maps, named as `test` or `predict` writes them, or by the case's id",
    )  # fmt: skip
    scorer.add_argument(
        "--labels", nargs="*", default=[], metavar="INT=ORGAN",
        help="what their integers mean; others are background (default: as labels.json or nnU-Net's dataset.json "
        "beside them says, or as in the data set, and others are faults)",
    )  # fmt: skip
    scorer.add_argument("--out", required=True, metavar="DIR", help="folder of cases.csv and summary.csv")
    scorer.add_argument("--overwrite", action="store_true", help="replace them")
    scorer.add_argument("--processes", type=int, default=0, help="default: all cores")

    reporter = commands.add_parser("report", help="curves, box plots and overlays of a run, as one folder")
    reporter.add_argument("run", metavar="RUN")
    reporter.add_argument(
        "what", nargs="?", default="all", choices=("all", "attention", "receptive-field", "prior"),
        help="all (default), where the network's attention looks for a voxel, what a layer of it sees, or STIPPLE's "
        "priors (with --case: where they lie in it)",
    )  # fmt: skip
    reporter.add_argument("--case", metavar="DATASET/ID", help="attention, prior: a case of the run's cache")
    reporter.add_argument(
        "--voxel", type=int, nargs=3, metavar=("Z", "Y", "X"),
        help="attention: index in the cached image, z from the feet, y from the front, x from the patient's right",
    )  # fmt: skip
    reporter.add_argument(
        "--layer", default="bottom", metavar="NAME", help="receptive-field: whose it is (%(default)s: the bottleneck)"
    )

    doctor = commands.add_parser("doctor", help="what this machine has, and what would go wrong on it")
    doctor.add_argument("--cache", nargs="+", default=[], help="prepared folders to look at")
    doctor.add_argument("--out", nargs="+", default=[], help="folders that will be written to")
    doctor.add_argument("--quick", action="store_true", help="without starting two ranks")

    exporter = commands.add_parser("export", help="pseudo-labels of a relabelling round as NIfTI, for a viewer")
    exporter.add_argument("run", metavar="RUN")
    exporter.add_argument("--round", type=int, metavar="T", help="default: the last one that is finished")
    exporter.add_argument("--out", required=True, help="folder of the maps: label, round and score of each case")
    exporter.add_argument(
        "--merged", action="store_true", help="also annotations and pseudo-labels as training saw them"
    )
    exporter.add_argument("--cache", help="where the run's cache is now (default: as in its config)")
    exporter.add_argument("--overwrite", action="store_true", help="replace existing outputs")
