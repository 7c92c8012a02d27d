"""Untrusted templates: what hostile ones are refused for, and what honest ones may use."""

import json
import math
import subprocess
import sys

import pytest
from jinja2.filters import FILTERS
from jinja2.sandbox import SandboxedEnvironment

from edge_gemma.errors import TemplateError
from edge_gemma.text.template_sandbox import SOURCE_LIMIT, Template
from tests import ROOT
from tests.hostile_templates import HOSTILE

REFUSED = {
    "classes": "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "attr filter": "{{ (() | attr('__class__')).__bases__ }}",
    "of a namespace": "{% set n = namespace(a=1) %}{{ n.__init__.__globals__ }}",
    "files": "{% include '/etc/passwd' %}",
    "changing what it was given": "{{ messages.append(1) }}",
    "raising": "{{ raise_exception('roles\nmust alternate') }}",
    "missing": "{{ messages[7].content }}",
    "missing in a namespace": "{% set n = namespace(a=1) %}{{ n.b.c }}",
    "division": "{{ 1 / 0 }}",
    "not a template": "{% if %}",
    "unknown tag": "{% spam %}",
    "unknown filter": "{{ 1 | spam }}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "too long": "a" * (SOURCE_LIMIT + 1),
}
GENERATED = 120


@pytest.mark.parametrize("name", REFUSED)
def test_refused_templates_end_in_one_line(name):
    with pytest.raises(TemplateError) as error:
        Template(REFUSED[name]).render(messages=[{"role": "user", "content": "x"}])
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("the chat template ")


@pytest.mark.slow
def test_hostile_templates_end_soon_and_in_little_memory():
    """In a process of their own with 400 MB more than it starts with: a MemoryError there would be told."""
    command = [sys.executable, "-m", "tests.hostile_templates", "7", str(GENERATED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert len(outcomes) == len(HOSTILE) + GENERATED
    slowest = max(outcomes, key=lambda outcome: outcome["seconds"])
    print("slowest:", slowest)
    assert slowest["seconds"] < 20  # 3 on the machine where this was written
    for outcome in outcomes:
        name, message = outcome["name"], outcome["message"]
        assert "MemoryError" not in message, name
        assert name not in HOSTILE or message.startswith("the chat template "), name
        assert "\n" not in message, name


LARGE = [1_000_001, -2_000_000, 1734567890, 10**18, 10**400, 1e7, -1e300, math.nan, math.inf]


@pytest.mark.parametrize("number", LARGE, ids=lambda n: repr(n)[:10])
@pytest.mark.parametrize(
    "source",
    [
        "{{ n }}", "{% macro m(v, w=1) %}{{ v }}{% endmacro %}{{ m(n, w=n) }}", "{{ [n] | tojson(indent=2) }}",
        "{{ n | tojson }}", "{{ n | string }}", "{{ n | abs }}", "{{ n | default(n) }}", "{{ d.get('a', n) }}",
        "{{ [n] | join(',') }}", "{{ {'a': n} | dictsort }}", "{{ n is number }}{{ n == n }}{{ n in [n] }}",
        "{{ n | center(9) }}", "{{ n | trim }}", "{{ n + n }}{{ n * 2 }}{{ n - 1 }}", "{{ [n, n] | sum }}",
        "{{ [n, 1] | select('gt', n) | list }}", "{% for x in [n] %}{{ x }}{{ loop.cycle(n, n) }}{% endfor %}",
        "{% set s = namespace(v=n) %}{{ s.v }}", "{{ dict(a=n) }}", "{{ [n] | map('string') | list }}",
        "{{ 1 if n > 5 else n }}", "{{ 'a' ~ n }}", "{{ [1, n] | max }}", "{{ n | round(2) if n == n else 0 }}",
    ],
)  # fmt: skip
def test_numbers_of_any_size_pass(source, number):
    """As plain Jinja renders it: numbers are only refused where they say how large something is to be made."""
    plain = SandboxedEnvironment()
    plain.filters["tojson"] = lambda value, indent=None: json.dumps(value, indent=indent)
    try:
        expected = plain.from_string(source).render(n=number, d={})
    except (OverflowError, ValueError):
        pytest.skip("Python itself cannot")
    assert Template(source).render(n=number, d={}) == expected


@pytest.mark.parametrize("turns", [10, 1000, pytest.param(3000, marks=pytest.mark.slow)])
def test_long_conversations_render_and_the_budget_grows_with_them(turns):
    """Templates that look back from each message to all earlier ones, as Gemma 4's of April 2026 do."""
    source = (
        "{% for m in messages %}{% set ns = namespace(before=0) %}"
        "{% for j in range(loop.index0 - 1, -1, -1) %}{% if ns.before > 3 %}{% endif %}{% endfor %}"
        "{{ m['content'] | trim }}\n{% endfor %}"
    )
    messages = [{"role": role, "content": " Hi "} for _ in range(turns) for role in ("user", "assistant")]
    assert Template(source).render(messages=messages) == "Hi\n" * len(messages)


def test_a_long_text_renders():
    text = "some words\n" * 200_000
    source = (
        "{{ messages[0].content | trim }}{{ (messages[0].get('content')).replace('\n', ' ').split(' ') | join('-') }}"
    )
    rendered = Template(source).render(messages=[{"role": "user", "content": text}])
    assert rendered == text.strip() + text.replace("\n", " ").replace(" ", "-")


def test_the_filters_of_jinja_are_those_that_were_looked_at():
    """A newer Jinja with another filter: see template_sandbox.py whether its result can be large, then add it here."""
    known = """abs attr batch capitalize center count d default dictsort e escape filesizeformat first float forceescape
        format groupby indent int items join last length list lower map max min pprint random reject rejectattr replace
        reverse round safe select selectattr slice sort string striptags sum title tojson trim truncate unique upper
        urlencode urlize wordcount wordwrap xmlattr"""
    assert sorted(FILTERS) == known.split()


def test_a_budget_is_one_renderings_own():
    template = Template("{% for i in range(99999) %}{% endfor %}ok")
    assert [template.render() for _ in range(15)] == ["ok"] * 15


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for x in 'abc' %}{{ x }}{{ loop.index0 }}{{ ',' if not loop.last }}{% endfor %}", "a0,b1,c2"),
        ("{% for k, v in d.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}", "a1b2"),
        ("{% for x in missing %}{{ x }}{% else %}none{% endfor %}", "none"),
        ("{% for x in [1, 2, 3] if x != 2 %}{{ x }}{{ loop.length }}{% endfor %}", "1232"),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "13"),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1"),
        ("{{ 1 ~ none ~ 'x' ~ true }}", "1NonexTrue"),
        (
            "{{ d | tojson }} {{ 'é<' | tojson }} {{ d | tojson(indent=1) }}",
            '{"a": 1, "b": 2} "é<" {\n "a": 1,\n "b": 2\n}',
        ),
        ("{% generation %}x{% endgeneration %}y", "xy"),
        ("{% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ 7 % 4 }}{{ 2 ** 3 }}{{ 'ab' * 2 }}{{ ([1] + [2]) | length }}", "38abab2"),
        ("{% set n = namespace(x=1) %}{% for i in range(3) %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}", "4"),
    ],
)
def test_what_honest_templates_use_works(source, expected):
    assert Template(source).render(d={"a": 1, "b": 2}) == expected
