"""The process that renders chat templates.

A template comes with a model and is a program: it runs here, not in the server.

Run as a file of its own. Reads one JSON line {"template", "values"} at a time from standard input and answers with one
JSON line {"text"} or {"error"}. Before the first template it gives up opening files, sockets and processes, and
limits its memory; whoever started it limits its time.
"""

import contextlib
import datetime
import json
import sys
from typing import Any


ROOM = 40 << 20
OUTPUT = 4 << 20


class TemplateError(Exception):
    """The template refuses the messages, or writes too much."""


def environment() -> Any:
    """The environment that chat templates of Hugging Face models expect, in Jinja's immutable sandbox."""
    import jinja2.debug  # noqa: F401 - templates that fail ask for it, when no file can be opened any more
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %} ... {% endgeneration %}`` marks the assistant's text; here it is only shown."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(str(message)[:300])

    def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
                sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def now(form: str) -> str:
        return datetime.datetime.now().strftime(str(form)[:100])

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    made.filters["tojson"] = to_json
    made.globals.update(raise_exception=refuse, strftime_now=now)
    return made


def render(made: Any, template: str, values: dict[str, Any]) -> str:
    """The text, at most ``OUTPUT`` characters of it."""
    parts, length = [], 0
    for part in made.from_string(template).generate(**values):
        length += len(part)
        if length > OUTPUT:
            raise TemplateError(f"it writes more than {OUTPUT} characters")
        parts.append(part)
    return "".join(parts)


def give_up_rights() -> None:
    """No files, sockets, processes or much memory from here on."""
    import resource

    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    for what, limit in (
        (resource.RLIMIT_AS, mapped + ROOM),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (limit, limit))


def main() -> None:
    """Answer until standard input ends."""
    made = environment()
    # Load what is lazy, the codec of escapes in strings too.
    render(made, "{% for m in messages %}{{ m | tojson }}{{ '\\n' }}{% endfor %}", {"messages": [{"a": 1}]})
    with contextlib.suppress(ImportError, OSError):  # not every system knows these limits; the parent's clock remains
        give_up_rights()
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            answer = {"text": render(made, asked["template"], asked["values"])}
        except MemoryError:
            answer = {"error": "it needs too much memory"}
        except RecursionError:
            answer = {"error": "it is nested too deeply"}
        except Exception as error:  # whatever a foreign program may raise is that program's error
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
