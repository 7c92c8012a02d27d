"""Templates that try to take all time or all memory, a list of them and a generator, and a process that renders them.

    python -m tests.hostile_templates SEED COUNT

renders the list and COUNT generated ones in little memory, and prints what became of each as JSON lines. It does not
know how a rendering is bounded.
"""

import json
import random
import resource
import sys
import time
import warnings

NAMES = "{% set n = namespace(l=[1], s='a', t=(1,), m={}) %}"
LOOPS, ENDS = "{% for i in range(99999) %}{% for j in range(99999) %}", "{% endfor %}{% endfor %}"
TEXT = NAMES + "{% for i in range(18) %}{% set n.s = n.s + n.s %}{% endfor %}"  # n.s has 262,144 characters
LIST = "{% set l = range(99999) | list %}"


def sixty_times(statement: str) -> str:
    return NAMES + "{% for i in range(60) %}" + statement + "{% endfor %}"


def often(statement: str) -> str:
    return LOOPS + statement + ENDS


HOSTILE = {
    "nested ranges": often(""),
    "a huge range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "nested lists": LIST + "{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}",
    "multiplied text": "{{ 'a' * 10 ** 10 }}",
    "multiplied list": "{{ [1] * 900000000 }}",
    "multiplied often": sixty_times("{% set n.l = n.l * 999 %}"),
    "multiplied the other way": "{{ 900000000 * [1] }}",
    "doubled with ~": sixty_times("{% set n.s = n.s ~ n.s %}"),
    "doubled with +": sixty_times("{% set n.s = n.s + n.s %}"),
    "doubled list": sixty_times("{% set n.l = n.l + n.l %}"),
    "doubled in a block": sixty_times("{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}"),
    "doubled by escapes": "{% autoescape true %}" + sixty_times("{% set n.s = n.s ~ n.s %}") + "{% endautoescape %}",
    "doubled by filters": sixty_times("{% set n.s = [n.s, n.s] | join %}"),
    "doubled by callers": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 40 + "aaaa" + "{% endcall %}" * 40,
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "endless blocks": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
    "recursion with texts": "{% macro f(n, s) %}{% if n %}{{ f(n - 1, s + 'a' * 999) }}{{ f(n - 1, s + 'b' * 999) }}"
    "{% endif %}{% endmacro %}{{ f(50, '') }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "recursive loop of many": "{% for x in [1] recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "list of one list twice": sixty_times("{% set n.l = [n.l, n.l] %}") + "{{ n.l }}",
    "tuple of one tuple twice": sixty_times("{% set n.t = (n.t, n.t) %}") + "{{ {n.t: 1} }}",
    "mapping of one mapping twice": sixty_times("{% set n.m = {'a': n.m, 'b': n.m} %}") + "{{ n.m | tojson }}",
    "dict of one dict twice": sixty_times("{% set n.m = dict(a=n.m, b=n.m) %}") + "{{ n.m | string }}",
    "namespace of one twice": sixty_times("{% set n.l = namespace(a=n.l, b=n.l) %}")
    + "{{ n.l }}{{ n }}{{ [n] }}{{ raise_exception('written') }}",
    "two such lists compared": NAMES + "{% set k = namespace(l=[1]) %}{% for i in range(60) %}"
    "{% set n.l = [n.l, n.l] %}{% set k.l = [k.l, k.l] %}{% endfor %}{{ n.l == k.l }}",
    "deep tuple": NAMES + "{% for i in range(99999) %}{% set n.t = (n.t, i) %}{% endfor %}{{ {n.t: 1} }}",
    "deep list": NAMES + "{% for i in range(99999) %}{% set n.l = [n.l] %}{% endfor %}{{ n.l }}",
    "one text many times": "{{ (['a' * 1000000] * 1000000) | join }}",
    "one text doubled": sixty_times("{% set n.l = (n.l if i else ['a' * 1000000]) + n.l %}") + "{{ n.l }}",
    "one text as a default": TEXT + "{{ range(99999) | map(attribute='x', default=n.s) | join | length }}",
    "one text as an attribute": TEXT + "{% set d = {'a': n.s} %}{{ ([d] * 99999) | map(attribute='a') | join }}",
    "sorting": LIST + often("{{ l | sort | length }}"),
    "unique": LIST + often("{{ l | unique | list | length }}"),
    "looking in a list": LIST + often("{{ 1.5 in l }}"),
    "looking in a range": often("{{ 1.5 in range(99999) }}"),
    "selecting": LIST + often("{{ l | select('in', l) | list | length }}"),
    "comparing": LIST + "{% set m = range(99999) | list %}" + often("{% if l == m %}{% endif %}"),
    "testing": LIST + often("{% if l is eq l %}{% endif %}"),
    "finding": TEXT + often("{% if n.s.find('b') %}{% endif %}"),
    "trimming": TEXT + often("{% if n.s | trim | length %}{% endif %}"),
    "counting": TEXT + often("{{ n.s | wordcount }}"),
    "slicing a text": TEXT + often("{% if n.s[1:] %}{% endif %}"),
    "slicing a list": LIST + often("{% if l[1:] %}{% endif %}"),
    "reversing": LIST + often("{{ l | reverse | list | length }}"),
    "cycling": "{% set c = cycler(*range(99999)) %}" + often("{{ c.next() }}"),
    "changes": LIST + often("{% if loop.changed(l) %}{% endif %}"),
    "many lists": NAMES + often("{% set n.l = [n.l, i] if j < 50 else [i, j] %}"),
    "many pieces": sixty_times("{% set n.s = n.s + n.s + ',' %}{% set x = n.s.split(',') %}"),
    "a long body": often("{% if i %}{% endif %}" * 3000),
    "a long text": often("a" * 100_000 + "{{ i }}"),
    "a long block": often("{% set x %}" + "a" * 50_000 + "{{ i }}" + "b" * 50_000 + "{% endset %}"),
    "a long macro": "{% macro f() %}" + "{% if 1 > 2 %}{% endif %}" * 4000 + "{% endmacro %}" + often("{{ f() }}"),
    "long output": "{% for i in range(99999) %}" + "a" * 200 + "{% endfor %}",
    "padding method": "{{ 'a'.ljust(10 ** 10) }}",
    "padding with zeros": "{{ '1'.zfill(10 ** 10) }}",
    "padding tabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "padding filter": "{{ 'a' | center(10000000000) }}",
    "padding in map": "{{ ['a'] | map('center', 10000000000) | list }}",
    "padding a batch": "{{ [1] | batch(10 ** 10, 'a') | list }}",
    "many slices": "{{ [1] | slice(10 ** 10) | list }}",
    "bytes of a number": "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "indent": "{{ ('a\n' * 100000) | indent(100000) }}",
    "indented JSON": LIST + "{{ l | tojson(indent=100000) }}",
    "deep indented JSON": LIST + NAMES + "{% set n.l = l %}{% for i in range(150) %}{% set n.l = [n.l] %}{% endfor %}"
    "{{ n.l | tojson(indent=50) }}",
    "format": "{{ '{:>9}'.format(1) }}",
    "format by another name": "{% set f = '{:>9}'.format %}{{ f(1) }}",
    "format_map": "{{ '{a:>9}'.format_map({'a': 1}) }}",
    "percent": "{{ '%9d' % 1 }}",
    "percent filter": "{{ '%9d' | format(1) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace by name": TEXT + "{{ n.s | replace(new=n.s, old='a') }}",
    "replace nothing": TEXT + "{{ n.s | replace('', n.s) }}",
    "translate": TEXT + "{{ n.s.translate({97: n.s}) }}",
    "join": TEXT + "{{ n.s.join(n.s) }}",
    "adding lists up": "{{ ([[1]] * 99999) | sum(start=[]) }}",
    "rounding": "{{ 5 | round(-30000000) }}",
    "rounding up": "{{ 5.5 | round(300000000, 'ceil') }}",
    "power": "{{ 9 ** (10 ** 9) }}",
    "power tower": "{{ 2 ** (64 ** (64 ** (64 ** 64))) }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "a large number from text": TEXT + "{% set x = n.s | int(base=16) %}{{ (x // 3) // 7 }}",
    "a long form of date": "{{ strftime_now('%1000000000Y' * 100000) }}",
    "the ledger's own filters": "{{ ['x'] | map(' each', -100000000) | list }}" + often(""),
    "lipsum": "{{ lipsum(100000) }}",
}  # fmt: skip


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_OPERATORS = _words("+ * ** ~ % // == < in")
_VALUES = (
    *("n.s", "n.l", "n.t", "n.m", "n", "x", "i", "messages", "messages[0]", "'a'", "'a b,c\n'", "''", "[]", "{}"),
    *("1", "-1", "0.5", "99999", "10 ** 9", "10000000000", "none", "true", "range(99999)", "range(9)"),
)
_FILTERS = _words(
    "abs attr batch capitalize center count default dictsort e first float groupby indent int items join last length "
    "list lower map max min random reject replace reverse round safe select selectattr slice sort string sum title "
    "tojson trim truncate unique upper urlencode wordcount"
)
_METHODS = _words(
    "capitalize center count encode decode endswith expandtabs find index join ljust lstrip partition replace rjust "
    "rsplit split splitlines startswith strip translate upper zfill get items keys values copy to_bytes bit_length"
)


def expression(rng: random.Random, depth: int) -> str:
    def inner() -> str:
        return expression(rng, depth - 1)

    def some(most: int) -> str:
        return ", ".join(inner() for _ in range(rng.randint(0, most)))

    if depth == 0 or rng.random() < 0.15:
        return rng.choice(_VALUES)
    forms = (
        lambda: f"({inner()} {rng.choice(_OPERATORS)} {inner()})",
        lambda: f"({inner()} | {rng.choice(_FILTERS)}({some(2)}))",
        lambda: f"({inner()} | map('{rng.choice(_FILTERS)}', {inner()}) | {rng.choice(('list', 'join', 'sort'))})",
        lambda: f"({inner()}).{rng.choice(_METHODS)}({some(2)})",
        lambda: f"[{inner()}, {inner()}]",
        lambda: f"({inner()}, {inner()})",
        lambda: f"{{'a': {inner()}, 'b': {inner()}}}",
        lambda: f"dict(a={inner()}, b={inner()})",
        lambda: f"namespace(a={inner()})",
        lambda: f"({inner()})[{rng.choice((':', '1:', '::-1', '0'))}]",
    )
    return rng.choice(forms)()


def template(rng: random.Random) -> str:
    """A loop of up to 100,000 rounds in which values are made of themselves. Wrong types end many of them early."""
    statements = (
        lambda: f"{{% set n.{rng.choice('sltm')} = {expression(rng, rng.randint(1, 3))} %}}",
        lambda: f"{{% set x %}}{{{{ {expression(rng, 2)} }}}}{{{{ x }}}}{{% endset %}}",
        lambda: f"{{{{ {expression(rng, 2)} }}}}",
        lambda: f"{{% for j in {expression(rng, 1)} %}}{{% set n.s = {expression(rng, 1)} %}}{{% endfor %}}",
        lambda: f"{{% if {expression(rng, 2)} %}}{{% endif %}}",
    )
    body = "".join(rng.choice(statements)() for _ in range(rng.randint(1, 3)))
    rounds = rng.choice((3, 20, 60, 1000, 99999))
    return f"{NAMES}{{% set x = 'ab' %}}{{% for i in range({rounds}) %}}{body}{{% endfor %}}"


def main(seed: int, count: int) -> None:
    from edge_gemma.errors import TemplateError
    from edge_gemma.text.template_sandbox import Template

    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115
    memory = pages * resource.getpagesize() + (400 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    rng = random.Random(seed)
    sources = HOSTILE | {f"generated {i}": template(rng) for i in range(count)}
    messages = [{"role": "user", "content": "some text of a user"}]
    warnings.simplefilter("ignore", SyntaxWarning)  # of Python's compiler: `1[0]`
    for name, source in sources.items():
        start = time.process_time()
        try:
            message = f"{len(Template(source).render(messages=messages))} characters"
        except TemplateError as error:
            message = str(error)
        print(json.dumps({"name": name, "seconds": time.process_time() - start, "message": message}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
