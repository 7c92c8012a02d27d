"""What a constraint saves: an object whose names are certain, beside as many tokens that are decoded one by one.

    python -m benchmarks.forced_tokens MODEL --repeat 5

The schema has as many properties as make `--tokens` tokens of which `--forced` are certain (names, punctuation) and the
others digits that the model chooses. Bound and free replies take turns. Prints JSON: tokens, medians of the seconds
from the first token to the last, and their ratio.
"""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

NAMES = (
    "temperature_outside", "pressure_inside", "distance_travelled", "fuel_remaining", "average_speed", "engine_hours",
    "battery_voltage", "oil_temperature", "tyre_pressure", "wind_direction", "sea_level", "heart_rate", "step_count",
    "screen_brightness", "water_level", "noise_level", "air_quality", "room_humidity", "door_openings",
    "power_consumption",
)  # fmt: skip


def schema(digits: list[int], names: list[str]) -> dict[str, Any]:
    """An object with these names, whose values have so many digits."""
    properties = {
        name: {"type": "integer", "minimum": 10 ** (n - 1), "maximum": 10**n - 1}
        for name, n in zip(names, digits, strict=True)
    }
    return {"type": "object", "properties": properties, "required": list(names), "additionalProperties": False}


@contextmanager
def counted(session: Any) -> Iterator[dict[str, int]]:
    """Counts the forward passes, and the tokens in those of several."""
    seen = {"passes": 0, "together": 0}
    prefill, step = session.prefill, session.step

    def prefill_counted(ids: list[int]) -> Any:
        seen["passes"] += 1
        seen["together"] += len(ids) - 1
        return prefill(ids)

    def step_counted(token: int) -> Any:
        seen["passes"] += 1
        return step(token)

    session.prefill, session.step = prefill_counted, step_counted
    try:
        yield seen
    finally:
        del session.prefill, session.step


def run(engine: Any, constraint: Any, tokens: int) -> tuple[float, int, int]:
    """Seconds from the first token to the last, tokens, tokens that were certain."""
    chat = engine.chat(max_tokens=tokens, temperature=1.0, seed=1)
    first, forced_before = None, 0
    with counted(chat.session) as seen:
        for _ in chat.send("Describe the vehicle.", constraint=constraint).pieces():
            if first is None:
                first, forced_before = time.perf_counter(), seen["together"]
    seconds = time.perf_counter() - (first or 0.0)
    return seconds, len(chat.last.tokens), seen["together"] - forced_before


@click.command()
@click.argument("model")
@click.option("--tokens", default=200, show_default=True)
@click.option("--forced", default=120, show_default=True)
@click.option("--repeat", default=5, show_default=True)
def main(model: str, tokens: int, forced: int, repeat: int) -> None:
    from edge_gemma import Constraint, Engine

    with Engine.load(model, cache_size=0) as engine:
        names: list[str] = []
        certain = 2
        while certain < forced and len(names) < len(NAMES):
            names.append(NAMES[len(names)])
            certain += len(engine.tokenizer.encode(f'"{names[-1]}": , '))
        free = tokens - forced
        digits = [free // len(names) + (i < free % len(names)) for i in range(len(names))]
        constraint = Constraint.json(schema(digits, names))
        pairs = []
        for n in range(repeat + 1):
            bound = run(engine, constraint, 2 * tokens)
            unbound = run(engine, None, bound[1])
            if n:  # the first compiles
                pairs.append((bound, unbound))
    seconds = [statistics.median(pair[i][0] for pair in pairs) for i in (0, 1)]
    result = {
        "tokens": pairs[0][0][1], "certain": pairs[0][0][2], "bound_s": round(seconds[0], 3),
        "free_tokens": pairs[0][1][1], "free_s": round(seconds[1], 3),
        "ratio": round(statistics.median(b[0] / b[1] / (u[0] / u[1]) for b, u in pairs), 3),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
