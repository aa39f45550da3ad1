"""The commands that are not Lightning's: each takes the parsed arguments and returns the exit code."""

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from organseg.data.manifest import Manifest, load_manifest, write_manifest
from organseg.errors import Fault, UsageError
from organseg.files import publish_text
from organseg.processes import usable_cores

Item = TypeVar("Item")


def import_command(arguments: Namespace) -> int:
    """`organseg import`: a manifest for a folder."""
    from organseg.data.readers import READERS
    from organseg.data.readers.present import with_present_organs

    out = Path(arguments.out)
    if out.exists() and not arguments.overwrite:
        raise UsageError(f"{out}: exists; --overwrite replaces it")
    root = Path(arguments.root)
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    labels = integers_and_organs(arguments.labels)
    manifest = READERS[arguments.reader](root, arguments.name, labels, arguments.new_organs)
    manifest = replace(manifest, modality=arguments.modality)
    if arguments.annotated == "present":
        manifest = with_present_organs(manifest, usable_cores())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(out, manifest)
    labelled = sum(case.label is not None for case in manifest.cases)
    print(f"{out}: {len(manifest.cases)} cases, {labelled} of them labelled, {len(manifest.organs)} organs")
    for organ in manifest.organs:
        values = " and ".join(str(value) for value, name in sorted(manifest.labels.items()) if name == organ)
        cases = sum(organ in case.annotated for case in manifest.cases)
        print(f"  {organ}: {values}, annotated in {cases} cases")
    if arguments.annotated == "all" and labelled:
        print(
            "each organ counts as annotated in every label map, and as absent where it has no voxel there;\n"
            "where that is not so: --annotated present, or `annotated: [...]` of a case"
        )
    print(f"next: organseg check {out}")
    return 0


def integers_and_organs(pairs: list[str]) -> dict[int, str]:
    """`1=liver` -> {1: liver}."""
    labels: dict[int, str] = {}
    for pair in pairs:
        value, equals, organ = pair.partition("=")
        if not equals or not (value.isascii() and value.isdigit()):
            raise UsageError(f"--labels: found {pair!r}, expected an integer and an organ, like 1=liver")
        if int(value) in labels:
            raise UsageError(f"--labels: {int(value)} is given twice, as {labels[int(value)]} and as {organ}")
        labels[int(value)] = organ
    return labels


def check_command(arguments: Namespace) -> int:
    """`organseg check`: faults, then the matrix of who annotates what."""
    from organseg.data.check import check

    manifests = _manifests(arguments.datasets)
    refused = 0
    for manifest in manifests:
        counts: dict[str, tuple[int, ...]] = {}
        findings = check(manifest, arguments.processes or usable_cores())
        for finding in _progress(findings, len(manifest.cases), f"checking {manifest.name}"):
            _show(finding.faults)
            counts[finding.case] = finding.voxels
        bad = sum(not voxels for voxels in counts.values())
        refused += bad
        _matrix(manifest, counts)
        _tell_often_absent(manifest, counts)
        print(f"{manifest.name}: {len(counts) - bad} of {len(counts)} cases can be used")
    return 3 if refused else 0


def _manifests(paths: list[str]) -> list[Manifest]:
    """All manifests, or all faults of all of them."""
    manifests, problems = [], []
    for path in paths:
        try:
            manifests.append(load_manifest(Path(path)))
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    names = [manifest.name for manifest in manifests]
    if len(set(names)) < len(names):
        raise UsageError(f"two data sets have the same name: {', '.join(sorted(names))}")
    return manifests


def _matrix(manifest: Manifest, counts: dict[str, tuple[int, ...]]) -> None:
    """Cases x organs: `+` annotated and there, `0` annotated and absent, `.` unknown, `!` refused."""
    table = Table(title=f"{manifest.name}: + annotated, 0 annotated and absent, . unknown, ! refused")
    table.add_column("case")
    for organ in manifest.organs:
        table.add_column("\n".join(organ.split("_")), justify="center")
    for case in manifest.cases:
        voxels = counts.get(case.id, ())
        cells = []
        for k, organ in enumerate(manifest.organs):
            known = "+" if voxels and voxels[k] else "0"
            cells.append("!" if not voxels else known if organ in case.annotated else ".")
        table.add_row(case.id, *cells)
    totals = [str(sum(organ in case.annotated for case in manifest.cases)) for organ in manifest.organs]
    table.add_row("annotated in", *totals)
    console = Console(width=max(80, 22 + 13 * len(manifest.organs)) if not sys.stdout.isatty() else None)
    with console.capture() as text:
        console.print(table)
    print(text.get(), end="")  # rich itself would exit with 1 where nobody reads on


def _tell_often_absent(manifest: Manifest, counts: dict[str, tuple[int, ...]]) -> None:
    """An organ that many of the cases that annotate it lack: more likely nobody annotated it there."""
    for k, organ in enumerate(manifest.organs):
        of = [counts[case.id][k] for case in manifest.cases if organ in case.annotated and counts.get(case.id)]
        absent = of.count(0)
        if absent > 1 and 4 * absent > len(of):
            print(
                f"organseg: warning: {organ}: no voxel in {absent} of {len(of)} cases that annotate it: really absent, "
                "or not annotated there? Say so in `annotated`, or import with --annotated present",
                file=sys.stderr,
            )


def _show(faults: Iterable[Fault]) -> None:
    for fault in faults:
        print(fault, file=sys.stderr)


def prepare_command(arguments: Namespace) -> int:
    """`organseg prepare`: fill a cache."""
    from organseg.data.prepare import prepare
    from organseg.data.shards import Shard
    from organseg.volumes import WorkingGrid

    if (arguments.size is not None and arguments.size < 1) or not all(0 < mm < inf for mm in arguments.spacing or ()):
        raise UsageError("--size and --spacing must be numbers above 0")
    grid = WorkingGrid(arguments.size, tuple(arguments.spacing) if arguments.spacing else None)
    refused, shard = 0, Shard.parse(arguments.shard)
    for manifest in _manifests(arguments.datasets):
        results = prepare(manifest, Path(arguments.out), grid, arguments.processes or usable_cores(), shard)
        made = skipped = bad = 0
        for prepared in _progress(results, len(shard.of(manifest.cases)), f"preparing {manifest.name}"):
            _show(prepared.faults)
            bad += not prepared.digest
            skipped += prepared.skipped
            made += bool(prepared.digest) and not prepared.skipped
        refused += bad
        part = "" if shard.count == 1 else f" (shard {shard.index} of {shard.count})"
        print(f"{manifest.name}{part}: {made} cases prepared, {skipped} were current, {bad} refused")
    return 3 if refused else 0


def plan_command(arguments: Namespace) -> int:
    """`organseg plan`: a config with the sizes of an nnU-Net."""
    from organseg.cli.planning import plan_config

    text = plan_config(arguments)
    if arguments.out:
        publish_text(Path(arguments.out), text)
        print(arguments.out)
    else:
        print(text, end="")
    return 0


def phantom_command(arguments: Namespace) -> int:
    """`organseg phantom`: a synthetic cohort."""
    from organseg.data.phantom import write_cohort

    if arguments.cases < 1 or min(arguments.shape) < 16:
        raise UsageError("--cases must be at least 1, each number of --shape at least 16")
    out = Path(arguments.out)
    if (out / "dataset.yaml").exists():
        raise UsageError(f"{out}: holds a data set already; choose another --out")
    with _bar() as bar:
        task = bar.add_task("phantoms", total=arguments.cases)
        path = write_cohort(
            out,
            cases=arguments.cases,
            seed=arguments.seed,
            shape=tuple(arguments.shape),
            mirrored=arguments.mirrored,
            processes=arguments.processes or usable_cores(),
            progress=lambda *_: bar.advance(task),
        )
    print(f"{path}: {arguments.cases} cases\nnext: organseg prepare {path} --out cache")
    return 0


def predict_command(arguments: Namespace) -> int:
    """`organseg predict`: label maps of new scans."""
    from organseg.cli.prediction import predict

    return predict(arguments)


def evaluate_command(arguments: Namespace) -> int:
    """`organseg evaluate`: metrics of label maps that lie in a folder."""
    from organseg.cli.scoring import evaluate

    return evaluate(arguments, integers_and_organs(arguments.labels))


def report_command(arguments: Namespace) -> int:
    """`organseg report`: pictures and tables of a run."""
    if arguments.what == "all":
        from organseg.report import write_report

        print(write_report(Path(arguments.run)))
    else:
        from organseg.cli import analysis

        draw = {"attention": analysis.attention, "receptive-field": analysis.receptive_field, "prior": analysis.prior}
        print(draw[arguments.what](arguments))
    return 0


def doctor_command(arguments: Namespace) -> int:
    """`organseg doctor`: the machine."""
    from organseg.cli.doctor import doctor

    return doctor(arguments)


def export_command(arguments: Namespace) -> int:
    """`organseg export`: pseudo-labels of a round, for a viewer."""
    from organseg.cli.export import export

    return export(arguments)


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not sys.stdout.isatty())


def _progress(items: Iterable[Item], total: int, description: str) -> Iterator[Item]:
    """Items behind a progress bar, where a terminal shows one."""
    with _bar() as bar:
        yield from bar.track(items, total=total, description=description)
