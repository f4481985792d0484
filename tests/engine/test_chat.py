"""Chat templates: right for real ones, harmless for hostile ones."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moestro.engine.chat import TemplateError, Templates


CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER = [{"role": "user", "content": "Hi ✓"}]


@pytest.fixture(scope="module")
def templates() -> Iterator[Templates]:
    made = Templates()
    yield made
    made.close()


def render(templates: Templates, template: str) -> str:
    return templates.render(template, {"messages": USER, "add_generation_prompt": True, "eos_token": "</s>"})


def test_a_real_template_gives_what_transformers_gives(templates: Templates) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    other = (
        "{%- set ns = namespace(n=0) -%}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m | tojson }}\n"
        "{% if m.role == 'none' %}{% break %}{% endif %}{% generation %}{{ m.content | trim }}{% endgeneration %}"
        "{{ eos_token }}{% endfor %}{{ [1, 2] | tojson(indent=1) }}"
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")
    for template in (CHATML, other):
        wanted = tokenizer.apply_chat_template(USER, chat_template=template, tokenize=False, add_generation_prompt=True)
        assert render(templates, template) == wanted


def test_refusals_of_the_template_are_told(templates: Templates) -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        render(templates, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TemplateError, match="Syntax"):
        render(templates, "{% for %}")
    assert render(templates, "{{ strftime_now('%Y') }}") >= "2024"


SECRETS = ("root:", "uid=", "PATH=", "<built-in", "<class", "<function", "<module", "<frame", "subprocess", "Popen")
ROADS = (
    "''.__class__.__mro__[1].__subclasses__()",
    "''['__class__']",
    "''|attr('__class__')",
    "''|attr('\\x5f\\x5fclass\\x5f\\x5f')",
    "''|attr('__cla'~'ss__')",
    "[]|map(attribute='__class__')|list",
    "[messages]|map('attr','__class__')|list",
    "[messages]|groupby('__class__')|list",
    "messages|sum('__class__')",
    "messages|sort(attribute='__class__')|list",
    "messages|unique(attribute='__class__')|list",
    "[1]|selectattr('__class__')|list",
    "cycler.__init__.__globals__.os.popen('id').read()",
    "joiner.__init__.__globals__['os']",
    "lipsum.__globals__['os'].popen('id').read()",
    "lipsum|attr('__globals__')",
    "namespace.__init__.__globals__",
    "self.__init__.__globals__",
    "self._TemplateReference__context",
    "self.__dict__",
    "raise_exception.__globals__",
    "raise_exception.__code__",
    "raise_exception.__closure__",
    "strftime_now.__globals__",
    "strftime_now.__self__",
    "tojson.__globals__",
    "messages.append(1)",
    "messages.clear()",
    "messages[0].update({'a': 1})",
    "messages[0].pop('role')",
    "messages.__init__.__globals__",
    "'{0.__class__}'.format(messages)",
    "'{0.__class__.__mro__}'.format('')",
    "'{a.__class__}'.format_map({'a': 1})",
    "('{0.__cl' ~ 'ass__}').format(1)",
    "'%s'|format(raise_exception)|attr('__class__')",
    "(range(1)|attr('__iter__')).__self__.__class__",
    "dict.__base__",
    "dict(a=1).__class__",
    "config",
    "request.application.__globals__",
    "get_flashed_messages.__globals__",
    "url_for.__globals__",
    "loop.__init__.__globals__",
    "caller.__globals__",
    "varargs.__class__",
    "undefined_name.__class__",
    "(undefined_name|default('')).__class__.__bases__",
    "messages.__reduce__()",
    "messages.__getattribute__('__class__')",
    "x.__init__.__builtins__.exec('1')",
    "eval('1')",
    "open('/etc/passwd').read()",
    "__import__('os').environ",
    "strftime_now('%' * 10000000)[:5].__class__",
)


@pytest.mark.parametrize("road", ROADS)
def test_no_way_out(templates: Templates, road: str) -> None:
    for template in ("{{ %s }}" % road, "{%% set a = %s %%}{{ a }}" % road):  # noqa: UP031
        try:
            text = render(templates, template)
        except TemplateError:
            continue
        assert not any(secret in text for secret in SECRETS), text[:200]
    assert render(templates, "{{ messages[0].role }}{{ messages | length }}") == "user1"


@pytest.mark.parametrize("what", ["include '/etc/passwd'", "import 'os' as os", "extends 'x'", "from 'x' import y"])
def test_no_other_templates(templates: Templates, what: str) -> None:
    with pytest.raises(TemplateError):
        render(templates, "{% " + what + " %}")


BOMBS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(10**9) %}x{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'a' * 1000000000 }}",
    "{{ ('a' * 10000000) * 1000 }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:>1000000000}'.format('a') }}",
    "{{ [1] * 1000000000 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ (2 ** 1000000) ** 100000 }}",
    "{{ lipsum(n=100000) }}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=['a']) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% for a in range(99999) %}{% for b in range(99) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a'.replace('a', 'b' * 99999999) }}",
    "{{ range(99999) | batch(1) | list | list * 99999 }}",
    "{{ 'x' | indent(1000000000, true) }}",
    "{{ ('(' * 100) ~ ')' * 100 }}" + "{% if 1 %}" * 400 + "{% endif %}" * 400,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 100000 + "1 }}",
    "{{ " + "[" * 3000 + "]" * 3000 + " }}",
)


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_go_off_elsewhere_and_soon(templates: Templates, bomb: str) -> None:
    assert render(templates, "ready") == "ready"
    began = time.monotonic()
    with contextlib.suppress(TemplateError):
        assert len(render(templates, bomb)) < 4 << 20
    assert time.monotonic() - began < 1.0 + 0.5  # the limit, and a machine that has other things to do
    assert render(templates, CHATML).endswith("assistant\n")


def test_the_process_cannot_open_anything(templates: Templates) -> None:
    render(templates, "x")
    assert templates._process is not None
    limits = Path(f"/proc/{templates._process.pid}/limits").read_text(encoding="ascii")
    rows = {line[:26].strip(): line[26:].split()[0] for line in limits.splitlines()[1:]}
    assert rows["Max open files"] == "3"
    assert rows["Max file size"] == "0"
    assert int(rows["Max address space"]) < 1 << 30
