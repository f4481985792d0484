"""What a client may ask for: fields of completions and chat completions with their limits, and nothing else."""

from dataclasses import dataclass, replace
from typing import Any

from moestro.core.decoding import PLAIN, Decoder
from moestro.core.errors import MoestroError
from moestro.core.registry import method
from moestro.engine.fields import BadRequest, Fields, shown, whole_text
from moestro.engine.sampler import Sampling


CHOICES = 8
PROMPTS = 8
STOPS = 16
STOP_LENGTH = 256
LOGPROBS = 20
BIASES = 300
MESSAGES = 1024
ROLES = ("system", "developer", "user", "assistant", "tool")
# Ours to know, and without effect on the text.
_IGNORED = ("user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier", "parallel_tool_calls")
_NONE: dict[str, tuple[Any, ...]] = {"tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
                                     "function_call": ("none",), "modalities": (["text"],), "audio": (),
                                     "prediction": (), "reasoning_effort": (), "web_search_options": (),
                                     "response_format": ({"type": "text"},), "verbosity": ()}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A checked request.

    Attributes:
        chat: messages instead of prompts. prompts: texts or token ids. messages: for the chat template.
        max_tokens: None leaves it to the server. n: choices for each prompt. usage: ask for a last chunk with counts.
    """

    chat: bool
    prompts: list[str | list[int]]
    messages: list[dict[str, Any]]
    sampling: Sampling
    max_tokens: int | None
    n: int
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    decoder: Decoder


def completion(body: dict[str, Any], model: str, vocab: int, context: int) -> Asked:
    """The body of /v1/completions.

    Args:
        model: the served model's name. vocab: its tokens. context: positions a request may hold.

    Raises:
        BadRequest: a field is wrong.
    """
    fields = Fields(body)
    _model(fields, model)
    prompts = _prompts(fields, vocab, context)
    count = fields.whole("logprobs", None, 0, LOGPROBS)
    fields.unsupported({"echo": (False,), "suffix": ("",), "best_of": (1,), **_NONE})
    max_tokens = fields.whole("max_tokens", 16, 1, context)
    return _common(fields, vocab, context, chat=False, prompts=prompts, logprobs=count, max_tokens=max_tokens)


def chat_completion(body: dict[str, Any], model: str, vocab: int, context: int) -> Asked:
    """The body of /v1/chat/completions; see ``completion``."""
    fields = Fields(body)
    _model(fields, model)
    messages = _messages(fields)
    wanted = fields.flag("logprobs")
    count = fields.whole("top_logprobs", None, 0, LOGPROBS)
    if count is not None and not wanted:
        raise fields.bad("top_logprobs", "set logprobs to true with it")
    fields.unsupported(_NONE)
    new = fields.whole("max_completion_tokens", None, 1, context)
    old = fields.whole("max_tokens", None, 1, context)
    return _common(
        fields,
        vocab,
        context,
        chat=True,
        messages=messages,
        logprobs=(count or 0) if wanted else None,
        max_tokens=new if new is not None else old,
    )


def reseeded(sampling: Sampling, choice: int) -> Sampling:
    """The settings of a further choice: its draws are others than the first one's, and fixed by the same seed."""
    return replace(sampling, seed=((sampling.seed or 0) + choice * 0x9E3779B97F4A7C15) % 2**64)


def _common(
    fields: Fields,
    vocab: int,
    context: int,
    *,
    chat: bool,
    logprobs: int | None,
    max_tokens: int | None,
    prompts: list[str | list[int]] | None = None,
    messages: list[dict[str, Any]] | None = None,
) -> Asked:
    n = fields.whole("n", 1, 1, CHOICES)
    stream = fields.flag("stream")
    options = fields.inner("stream_options")
    usage = False
    if options is not None:
        usage = options.flag("include_usage")
        options.ignored("include_obfuscation")
        options.finish()
        if not stream:
            raise fields.bad("stream_options", "only with stream: true")
    sampling = _sampling(fields, vocab, context, logprobs)
    stops = _stops(fields)
    decoder = _decoder(fields)
    fields.ignored(*_IGNORED)
    fields.finish()
    return Asked(
        chat, prompts or [], messages or [], sampling, max_tokens, n or 1, stops, stream, usage, decoder
    )  # fmt: skip


def _sampling(fields: Fields, vocab: int, context: int, logprobs: int | None) -> Sampling:
    seed = fields.whole("seed", None, -(2**63), 2**64 - 1)
    bias = fields.inner("logit_bias")
    return Sampling(
        temperature=fields.number("temperature", 1.0, 0.0, 10.0),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0, above=True),
        top_k=fields.whole("top_k", 0, 0, vocab) or 0,
        seed=None if seed is None else seed % 2**64,
        min_tokens=fields.whole("min_tokens", 0, 0, context) or 0,
        ignore_eos=fields.flag("ignore_eos"),
        logprobs=logprobs,
        bias={} if bias is None else _bias(bias, vocab),
        presence=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        frequency=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
    )


def _model(fields: Fields, served: str) -> None:
    name = fields.text("model", 512)
    if name is not None and name != served:
        raise BadRequest(
            f"model {shown(name)} is not served here; {served} is", param="model", status=404, code="model_not_found"
        )


def _prompts(fields: Fields, vocab: int, context: int) -> list[str | list[int]]:
    value = fields.get("prompt")

    def tokens(ids: list[Any]) -> list[int]:
        if len(ids) > context:
            raise BadRequest(f"a prompt of {len(ids)} tokens; {context} fit", param="prompt")
        if not all(type(i) is int and 0 <= i < vocab for i in ids):
            raise BadRequest(f"prompt: token ids are whole numbers from 0 to {vocab - 1}", param="prompt")
        return ids

    if isinstance(value, str):
        return [whole_text(value, "prompt")]
    if isinstance(value, list) and value:
        if type(value[0]) is int:
            return [tokens(value)]
        if len(value) > PROMPTS:
            raise BadRequest(f"{len(value)} prompts; at most {PROMPTS} go into a request", param="prompt")
        if all(isinstance(part, str) for part in value):
            return [whole_text(part, "prompt") for part in value]
        if all(isinstance(part, list) and part for part in value):
            return [tokens(part) for part in value]
    raise fields.bad("prompt", "a string, a list of strings, token ids or a list of lists of them is wanted")


def _messages(fields: Fields) -> list[dict[str, Any]]:
    value = fields.get("messages")
    if not isinstance(value, list) or not value or len(value) > MESSAGES:
        raise fields.bad("messages", f"a list of 1 to {MESSAGES} messages is wanted")
    messages = []
    for number, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise BadRequest(f"messages.{number}: an object is wanted", param=f"messages.{number}")
        message = Fields(entry, f"messages.{number}")
        role = message.text("role", 32)
        if role not in ROLES:
            raise message.bad("role", f"one of {', '.join(ROLES)} is wanted")
        found = {"role": role, "content": _content(message)}
        name = message.text("name", 256)
        message.unsupported({"tool_calls": ([],), "function_call": (), "audio": (), "refusal": ()})
        message.ignored("tool_call_id", "reasoning_content")
        message.finish()
        messages.append(found if name is None else {**found, "name": name})
    return messages


def _content(message: Fields) -> str:
    value = message.get("content")
    if isinstance(value, str):
        return whole_text(value, message.name("content"))
    if value is None and message.body.get("role") == "assistant":
        return ""
    if not isinstance(value, list):
        raise message.bad("content", "a string or a list of text parts is wanted")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise message.bad("content", f"a part of type {shown(kind)}; this server reads text only")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise message.bad("content", "a text part holds type and text")
        texts.append(whole_text(part["text"], message.name("content")))
    return "".join(texts)


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > STOPS:
        raise fields.bad("stop", f"a string or a list of at most {STOPS} is wanted")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= STOP_LENGTH:
            raise fields.bad("stop", f"a stop string has 1 to {STOP_LENGTH} characters")
        whole_text(stop, "stop")
    return tuple(stops)


def _bias(bias: Fields, vocab: int) -> dict[int, float]:
    if len(bias.body) > BIASES:
        raise BadRequest(f"{len(bias.body)} entries of logit_bias; at most {BIASES}", param="logit_bias")
    found = {}
    for key in bias.body:
        token = int(key) if key.isascii() and key.isdigit() and len(key) < 12 else -1
        if not 0 <= token < vocab:
            raise BadRequest(f"logit_bias: {shown(key)} is no token id below {vocab}", param="logit_bias")
        found[token] = bias.number(key, 0.0, -100.0, 100.0)
    return found


def _decoder(fields: Fields) -> Decoder:
    """``"decoding": {"method": "serve.scmoe", ...}``: a method with its settings; absent: the model as it is."""
    inner = fields.inner("decoding")
    if inner is None:
        return PLAIN
    name = inner.text("method", 100)
    if name is None or not name.startswith("serve."):
        raise inner.bad("method", "a method of the stage serve is wanted, such as serve.scmoe")
    try:
        found = method(name)
        made = found.entry("policy")(found.configure({k: v for k, v in inner.body.items() if k != "method"}))
    except MoestroError as error:
        raise BadRequest(str(error)[:400], param="decoding") from None
    if not hasattr(made, "combine"):
        raise inner.bad("method", "this method does not decode")
    decoder: Decoder = made
    return decoder
