"""The time and the date, here or in the time zone of a city."""

import datetime
import zoneinfo

from edge_gemma.errors import UsageError
from edge_gemma.tools.function import tool


@tool
def get_time(city: str | None = None) -> str:
    """Get the time"""
    now = _now(city)
    return f"{now.hour}:{now.minute:02}"  # no leading zero: the demonstration model drops another digit with it


@tool
def get_date() -> str:
    """Get the date"""
    now = datetime.datetime.now().astimezone()
    return now.strftime(f"%A, %B {now.day}, %Y")


def _now(city: str | None) -> datetime.datetime:
    """Raises UsageError for a city that no time zone is named after."""
    if not city or city.lower() in ("here", "local"):
        return datetime.datetime.now().astimezone()
    wanted = city.split(",")[0].strip().replace(" ", "_").lower()
    for name in sorted(zoneinfo.available_timezones()):
        if wanted in (name.lower(), name.rpartition("/")[2].lower()):
            return datetime.datetime.now(zoneinfo.ZoneInfo(name))
    raise UsageError(f"no time zone is named after {city}: name a large city, or a zone such as Europe/Oslo")
