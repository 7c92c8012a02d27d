"""`edge-gemma batch` with the charges of poison.py: python -m tests.archive.drive JSON.

JSON is an object: job, the fields of a Job; charge and reader, those of Poisoned and PoisonedReader. It prints what the
command prints: notes and errors a line each, the report as JSON.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from edge_gemma.archive import job as archive
from edge_gemma.errors import EdgeGemmaError
from tests.archive.poison import Poisoned, PoisonedReader


def main(given: dict[str, Any]) -> int:
    """Returns the exit code."""
    if "charge" in given:
        archive.ModelCharge = partial(Poisoned, **given["charge"])  # type: ignore[assignment,misc]
    if "reader" in given:
        reader = PoisonedReader(**given["reader"])
        archive.Batch = partial(archive.Batch, reader=reader)  # type: ignore[assignment,misc]
    fields = given["job"] | {"output": Path(given["job"]["output"])}
    try:
        report = archive.run(archive.Job(**fields), lambda text: print(f"({text})", file=sys.stderr, flush=True))
    except EdgeGemmaError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report.as_dict()))
    return int(report.failed + report.set_aside > 0)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
