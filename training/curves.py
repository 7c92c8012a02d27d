"""Makes one CSV and one plot of a training's logs, which are kept in docs/.

    python -m training.curves DATA docs/training          # docs/training.csv and docs/training.svg; needs matplotlib

Owns: how a log is read (the last line of a step counts, as a resumed run repeats some), how the curves look. Does not
know: how a stage is trained.
"""

import csv
import io
from pathlib import Path

import click

from benchmarks.figures import figure
from edge_gemma.folder.atomic import write_file

STAGES = ("hear", "speak", "together")
LOSSES = ("loss", "speech", "talk", "spelt")
ERRORS = {"dev": "held-out sentences", "test_unseen": "unseen voices", "test_human": "recordings"}
Steps = dict[int, dict[str, float]]


def read_log(path: Path) -> Steps:
    """A stage's lines by step. A line is name=value,name=value,..."""
    steps = {}
    with open(path, newline="") as file:
        for line in csv.reader(file):
            values = {name: float(value) for name, _, value in (field.partition("=") for field in line)}
            steps[int(values["step"])] = values
    return dict(sorted(steps.items()))


def as_csv(stages: dict[str, Steps]) -> str:
    """One line for each stage and step that was logged."""
    names = ["rate", *LOSSES, *ERRORS]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["stage", "step", *names])
    for stage, steps in stages.items():
        for step, values in steps.items():
            rows.writerow([stage, step, *(values.get(name, "") for name in names)])
    return text.getvalue()


def draw(stages: dict[str, Steps], path: Path) -> None:
    """Losses above, word errors below, a column for each stage."""
    with figure(path, nrows=2, ncols=len(stages), figsize=(4 * len(stages), 6), squeeze=False, sharex="col") as axes:
        for (above, below), (stage, steps) in zip(axes.T, stages.items(), strict=True):
            for panel, labels in ((above, {name: name for name in LOSSES}), (below, ERRORS)):
                for name, label in labels.items():
                    points = {step: values[name] for step, values in steps.items() if name in values}
                    if points:
                        panel.plot(list(points), list(points.values()), label=label, linewidth=1)
                panel.grid(alpha=0.3)
                panel.legend(fontsize="small")
            above.set(title=stage, ylabel="loss", yscale="log")
            below.set(xlabel="step", ylabel="word error rate", ylim=(0, 1.1))


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("target", type=click.Path(path_type=Path))
def main(data: Path, target: Path) -> None:
    """Write TARGET.csv and TARGET.svg from the logs in DATA."""
    stages = {name: read_log(data / name / "log.csv") for name in STAGES if (data / name / "log.csv").exists()}
    if not stages:
        raise click.UsageError(f"{data} holds no log: expected {', '.join(f'{s}/log.csv' for s in STAGES)}")
    write_file(target.with_suffix(".csv"), as_csv(stages).encode())
    draw(stages, target.with_suffix(".svg"))
    print(f"{target}.csv, {target}.svg: {sum(map(len, stages.values()))} lines of {', '.join(stages)}")


if __name__ == "__main__":
    main()
