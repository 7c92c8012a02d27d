"""The built-in tools: right results, and one clear line for everything else."""

import ast
import datetime
import json
import os
import re
import subprocess
import threading
import time
import zoneinfo
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.errors import UsageError
from edge_gemma.tools.builtin import builtin_tools, calculator, numbers, timers, units
from edge_gemma.tools.builtin.clock import get_date, get_time
from edge_gemma.tools.builtin.files import TextFiles
from edge_gemma.tools.builtin.notes import Notes
from edge_gemma.tools.builtin.timers import Timers
from tests import ROOT
from training.tools import FAMILIES


def test_each_has_its_own_name_and_a_description(tmp_path):
    tools = builtin_tools(print, notes=tmp_path / "n", folders=[tmp_path])
    assert len({tool.name for tool in tools}) == len(tools) == 16
    assert all(tool.description for tool in tools)
    assert [tool.name for tool in tools][:5] == ["get_time", "set_timer", "get_date", "cancel_timer", "set_alarm"]
    assert not [tool.name for tool in builtin_tools(None) if "timer" in tool.name or "alarm" in tool.name]


def test_the_demonstration_model_was_trained_with_these_names_and_parameters():
    families = {"get_time": "clock", "get_date": "date", "set_timer": "timer", "cancel_timer": "cancel_timer"}
    families |= {"set_alarm": "alarm", "cancel_alarm": "cancel_alarm", "calculate": "calculate"}
    tools = {tool.name: tool.declaration["function"] for tool in builtin_tools(print)}
    for name, kind in families.items():
        assert name in FAMILIES[kind].names
        assert tools[name]["description"] in FAMILIES[kind].descriptions
        for parameter in tools[name]["parameters"]["properties"]:
            assert any(parameter in slot.names for slot in FAMILIES[kind].slots.values())


# ---- clock


def test_clock_and_date():
    assert re.fullmatch(r"\d{1,2}:\d\d", get_time())
    there = datetime.datetime.now(datetime.UTC).astimezone(zoneinfo.ZoneInfo("Europe/Oslo"))
    assert get_time("Oslo").partition(":")[0] in {str(there.hour), str((there.hour + 1) % 24)}
    assert str(datetime.date.today().year) in get_date()
    with pytest.raises(UsageError, match="no time zone is named after Nowhere"):
        get_time("Nowhere")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10 minutes", 600), ("ten minutes", 600), ("an hour and a half", 5400), ("half an hour", 1800),
        ("a quarter of an hour", 900), ("1h30", 5400), ("two and a half hours", 9000), ("1:30:00", 5400), ("5:00", 300),
        ("twenty-five minutes", 1500), ("one hundred and twenty seconds", 120), ("1.5 hours", 5400),
        ("", None), ("soon", None), ("10", None), ("0 minutes", None), ("half past 6", None),
        ("9" * 30 + " hours", None), ("-5 minutes", None), (" −5 minutes", None),
    ],
)  # fmt: skip
def test_durations(text, seconds):
    assert numbers.duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("7:30", (7, 30, False)), ("half past six", (6, 30, False)), ("6 pm", (18, 0, True)), ("18:00", (18, 0, True)),
        ("seven oh five pm", (19, 5, True)), ("quarter to seven", (6, 45, False)), ("noon", (12, 0, True)),
        ("12 am", (0, 0, True)), ("ten past 8 in the evening", (20, 10, True)), ("7 o'clock", (7, 0, False)),
        ("25:00", None), ("foo", None), ("", None), ("7:75", None), ("-3", None),
    ],
)  # fmt: skip
def test_times_of_day(text, time):
    assert numbers.time_of_day(text) == time


@given(st.text())
def test_any_text_is_a_duration_or_none(text):
    numbers.duration(text)
    numbers.time_of_day(text)


# ---- timers


def test_a_timer_rings_once_and_is_gone():
    rang, done = [], threading.Event()
    set_of = Timers(lambda what: (rang.append(what), done.set()))
    assert set_of.set_timer("0.05 seconds", "tea") == "ok"
    assert "timer tea" in set_of.list_timers()[0]
    assert done.wait(5)
    assert (rang, set_of.list_timers()) == (["timer tea"], [])


def test_a_timer_that_is_cancelled_does_not_ring():
    rang = []
    set_of = Timers(rang.append)
    set_of.set_timer("0.2 seconds")
    set_of.set_timer("ten minutes")
    set_of.set_timer("1 hour", "cake")
    assert set_of.cancel_timer("cake") == "ok"
    assert set_of.cancel_timer() == "ok"  # the next one to ring
    time.sleep(0.4)
    assert (rang, len(set_of.list_timers())) == ([], 1)
    set_of.clear()
    with pytest.raises(UsageError, match="there is no timer"):
        set_of.cancel_timer()
    with pytest.raises(UsageError, match="the duration is soon"):
        set_of.set_timer("soon")


def test_there_is_a_limit_of_timers():
    set_of = Timers(print)
    for _ in range(100):
        set_of.set_timer("1 hour")
    with pytest.raises(UsageError, match="100 timers are set"):
        set_of.set_timer("1 hour")
    set_of.clear()


@pytest.mark.parametrize(
    ("time", "day", "at"),
    [
        ("6", None, "11-29 18:00"), ("7:30", "tomorrow", "11-30 07:30"), ("13:00", None, "11-30 13:00"),
        ("6 pm", "monday", "11-30 18:00"), ("8:00", "sunday", "12-06 08:00"), ("9", "2026-12-24", "12-24 09:00"),
    ],
)  # fmt: skip
def test_alarms_ring_at_the_next_such_time(time, day, at):
    now = datetime.datetime(2026, 11, 29, 14, 0)  # a Sunday
    assert f"{timers._moment(time, day, now):%m-%d %H:%M}" == at


@pytest.mark.parametrize(("time", "day"), [("25", None), ("6", "someday"), ("13:00", "today")])
def test_alarms_that_cannot_be_meant(time, day):
    with pytest.raises(UsageError):
        timers._moment(time, day, datetime.datetime(2026, 11, 29, 14, 0))


# ---- calculator and units


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12 times 7", "84"), ("(3+4)*2/5", "2.8"), ("1/3", "1/3, about 0.333333333333333"), ("0.1+0.2", "0.3"),
        ("2^64", "18446744073709551616"), ("sqrt(9/4)", "1.5"), ("15% of 80", "12"), ("1,000+1", "1001"),
        ("50%", "0.5"), ("12345678901234567890.5 * 2", "24691357802469135781"), ("1e-400 * 1_0e3_99", "1"),
        ("5. + .5", "5.5"), ("12 x 17", "204"), ("12x17", "204"), ("0 x 5 + 0x10", "16"),
        ("the square root of 81 plus 1", "10"),
        ("-1 ** 2 + 10 % 3", "0"), ("factorial(20)", "2432902008176640000"), ("sqrt(2)", "about 1.41421356237310"),
        ("(-1)**999999999999", "-1"), ("max(1, 5/2)", "2.5"), ("7 // 2", "3"),
    ],
)  # fmt: skip
def test_sums_are_exact(expression, result):
    assert calculator.calculate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9", "__import__('os')", "().__class__", "'a'*10**9", "1/0", "0**-1", "(-8)**(1/3)", "1e999999999",
        "ln(0)", "1e-999999999",
        "(" * 400 + "1" + ")" * 400, "-" * 900 + "1", "1" * 1001, "factorial(10**6)", "[1 for _ in ()]",
        "lambda: 1", "x",
        "f'{1}'", "1 if 1 else 2", "10**1000 ** 2", "", "sqrt(-1)", "exp(10**9)", "sqrt(1, 2)", "True", "1j", "a.b",
        "1;2",
    ],
)  # fmt: skip
def test_whatever_is_no_sum_is_refused_at_once(expression):
    begun = time.perf_counter()
    with pytest.raises(UsageError):
        calculator.calculate(expression)
    assert time.perf_counter() - begun < 1


def test_nothing_is_evaluated():
    tree = ast.parse((ROOT / "edge_gemma" / "tools" / "builtin" / "calculator.py").read_text(encoding="utf-8"))
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"eval", "exec", "compile", "getattr", "__import__"}


@given(
    st.recursive(
        st.integers(0, 99).map(str),
        lambda x: st.tuples(x, st.sampled_from("+-*"), x).map("({0[0]}{0[1]}{0[2]})".format),
    )
)
def test_sums_are_those_of_python(expression):
    if len(expression) <= 1000:
        assert calculator.value(expression) == Fraction(eval(expression))


@pytest.mark.parametrize(
    ("value", "one", "other", "result"),
    [
        (1, "mile", "km", "1.609344 km"), (100, "C", "F", "212 F"), (0, "K", "celsius", "-273.15 celsius"),
        (2, "cups", "ml", "473.176473 ml"), (8, "oz", "cup", "1 cup"), (16, "ounces", "pounds", "1 pounds"),
        (36, "km/h", "m/s", "10 m/s"), (1.5, "hours", "minutes", "90 minutes"), (1, "GiB", "MB", "1073.741824 MB"),
        (5, "feet", "inches", "60 inches"), (60, "miles per hour", "mph", "60 mph"), (1, "inch", "cm", "2.54 cm"),
    ],
)  # fmt: skip
def test_units_are_exact(value, one, other, result):
    assert units.convert_units(value, one, other) == result


def test_units_that_do_not_fit():
    with pytest.raises(UsageError, match="km is a length and kg a mass"):
        units.convert_units(1, "km", "kg")
    with pytest.raises(UsageError, match="there is no unit smoot"):
        units.convert_units(1, "smoot", "kg")


# ---- notes


def test_notes_are_kept_found_and_deleted(tmp_path):
    notes = Notes(tmp_path / "new" / "notes.txt")
    assert notes.list_notes() == []
    assert notes.add_note("buy\nmilk") == "note 1 is written"
    notes.add_note("call Anna about the milk")
    assert [note.split(" ", 2)[2] for note in notes.search_notes("MILK anna")] == ["call Anna about the milk"]
    assert "buy milk" in notes.delete_note(1)
    assert len(Notes(notes.path).list_notes()) == 1
    for bad in (lambda: notes.delete_note(5), lambda: notes.add_note(" "), lambda: notes.add_note("x" * 3000)):
        with pytest.raises(UsageError):
            bad()


def test_two_chats_that_write_notes_lose_none(tmp_path):
    several = [Notes(tmp_path / "notes.txt") for _ in range(4)]
    threads = [threading.Thread(target=notes.add_note, args=(f"n{i}",)) for notes in several for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(several[0].list_notes()) == 32


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/full")])
def test_what_is_no_file_of_notes_is_not_waited_for(tmp_path, make):
    notes = Notes(tmp_path / "notes.txt")
    make(notes.path)
    for act in (notes.list_notes, lambda: notes.add_note("x"), lambda: notes.delete_note(1)):
        with pytest.raises(UsageError, match="is no file, expected one of notes"):
            act()


# ---- files


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "secret.txt").write_text("the secret")
    root = tmp_path / "docs"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("one\ntwo Words\nthree\n")
    (root / "sub" / "b.txt").write_text("words again\n")
    (root / ".env").write_text("words secret")
    (root / "binary").write_bytes(b"words\0")
    os.symlink(tmp_path / "secret.txt", root / "link.txt")
    os.symlink(tmp_path, root / "out")
    os.symlink(root / "a.txt", root / "inside.txt")
    os.mkfifo(root / "pipe")
    return root


def test_files_are_listed_read_and_searched(folder):
    files = TextFiles([folder])
    assert files.list_files() == ["a.txt", "binary", "sub/b.txt"]
    assert files.read_file("a.txt") == "one\ntwo Words\nthree"
    assert files.read_file("a.txt", 2) == "two Words\nthree"
    assert files.read_file("inside.txt") == files.read_file(str(folder / "a.txt"))
    assert files.search_files("words") == ["a.txt:2: two Words", "sub/b.txt:1: words again"]
    several = TextFiles([folder, folder / "sub", folder])
    assert several.list_files() == ["docs/a.txt", "docs/binary", "docs/sub/b.txt", "docs/sub/b.txt"]
    assert "docs/sub/b.txt" in several.list_files()
    assert several.read_file("docs/a.txt").startswith("one")


@pytest.mark.parametrize(
    "path",
    ["../secret.txt", "link.txt", "out/secret.txt", "sub/../../secret.txt", ".env", "/etc/passwd", "sub", "no", "",
     "a\0b",
     "pipe", "binary", "~/x", "..", "x" * 5000],
)  # fmt: skip
def test_nothing_outside_is_read(folder, path):
    with pytest.raises(UsageError) as error:
        TextFiles([folder]).read_file(path)
    assert "the secret" not in str(error.value)


def test_a_long_file_is_read_in_parts_and_a_huge_one_refused(folder):
    (folder / "long.txt").write_text("".join(f"line {n} {'x' * 90}\n" for n in range(500)))
    files = TextFiles([folder])
    first = files.read_file("long.txt")
    assert len(first) < 7000
    at = int(re.search(r"go on with line (\d+)\)$", first)[1])
    assert files.read_file("long.txt", at).startswith(f"line {at - 1} ")
    with (folder / "huge.txt").open("wb") as file:
        file.truncate(50_000_000)
    with pytest.raises(UsageError, match="expected a file of at most"):
        files.read_file("huge.txt")
    with pytest.raises(UsageError, match="is not a folder"):
        TextFiles([folder / "a.txt"])
    json.dumps(files.search_files("line"))
    assert len(files.search_files("line")) == 51


def test_folders_in_one_another_are_listed_however_deep_they_are(tmp_path):
    opened = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("a", dir_fd=opened)
        inner = os.open("a", os.O_RDONLY, dir_fd=opened)
        os.close(opened)
        opened = inner
    os.close(opened)
    (tmp_path / "a" / "text").write_text("found")
    assert TextFiles([tmp_path]).search_files("found") == ["a/text:1: found"]
    subprocess.run(["rm", "-r", str(tmp_path / "a")], check=True)  # too deep for shutil.rmtree
