"""Untrusted templates: what hostile ones are refused for, and what honest ones may use."""

import pytest

from edge_gemma.errors import TemplateError
from edge_gemma.template import Template

HOSTILE = {
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a huge range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "nested lists": "{% set l = range(9999) | list %}{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}",
    "multiplied text": "{{ 'a' * 10 ** 10 }}",
    "multiplied list": "{{ [1] * 900000000 }}",
    "multiplied often": "{% set n = namespace(l=[1]) %}{% for i in range(9) %}{% set n.l = n.l * 999 %}{% endfor %}",
    "doubled with ~": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubled with +": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubled list": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubled in a block": "{% set n = namespace(s='aa') %}{% for i in range(60) %}"
    "{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "padding method": "{{ 'a'.ljust(10 ** 10) }}",
    "padding filter": "{{ 'a' | center(10000000000) }}",
    "padding in map": "{{ ['a'] | map('center', 10000000000) | list }}",
    "indent": "{{ ('a\n' * 100000) | indent(100000) }}",
    "format": "{{ '{:>9}'.format(1) }}",
    "format by another name": "{% set f = '{:>9}'.format %}{{ f(1) }}",
    "format_map": "{{ '{a:>9}'.format_map({'a': 1}) }}",
    "percent": "{{ '%9d' % 1 }}",
    "percent filter": "{{ '%9d' | format(1) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "power tower": "{{ 9 ** 64 ** 64 ** 64 ** 64 ** 64 }}",
    "long output": "{% for i in range(99999) %}" + "a" * 200 + "{% endfor %}",
    "lipsum": "{{ lipsum(100000) }}",
    "classes": "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "attr filter": "{{ (() | attr('__class__')).__bases__ }}",
    "files": "{% include '/etc/passwd' %}",
    "changing what it was given": "{{ messages.append(1) }}",
    "raising": "{{ raise_exception('roles\nmust alternate') }}",
    "missing": "{{ messages[7].content }}",
    "division": "{{ 1 / 0 }}",
    "not a template": "{% if %}",
    "unknown tag": "{% spam %}",
    "unknown filter": "{{ 1 | spam }}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "too long": "a" * (1 << 20) + "a",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_one_line(name):
    with pytest.raises(TemplateError) as error:
        Template(HOSTILE[name]).render(messages=[{"role": "user", "content": "x"}])
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("the chat template ")


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
