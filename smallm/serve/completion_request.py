"""The body of a request to /v1/completions, checked."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from smallm.errors import UserError
from smallm.generation.config import GenerationConfig
from smallm.options import check_bool, check_int, check_names
from smallm.tokenizer.vocabulary import Vocabulary

SAME_NAME = ("temperature", "top_p", "top_k", "min_p", "min_length", "repetition_penalty", "repetition_window",
             "allowed", "banned", "overflow")  # fmt: skip
"""Fields that are options of `GenerationConfig`; null stands for the default."""
OTHERS = ("model", "prompt", "max_tokens", "stop", "seed", "n", "echo", "logprobs", "stream", "stream_options", "user")
ONLY: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "suffix": ("",)
}  # fmt: skip
"""Fields that OpenAI defines and this server does not have, with the values that change nothing."""
MAX_LOGPROBS = 5  # as OpenAI


@dataclass(frozen=True)
class Limits:
    """What one request, and all requests together, may ask for."""

    max_length: int = 10_000
    """New characters of one text."""
    max_texts: int = 16
    """Texts of one request: prompts times n."""
    max_body: int = 1 << 20
    """Bytes of a request."""
    max_requests: int = 64
    """Requests that are being answered; further requests are refused with status 503."""
    deadline: float = 120.0
    """Seconds for one request, from its first byte to the last byte of the answer."""
    body_deadline: float = 10.0
    """Seconds for the body of a request to arrive."""


@dataclass(frozen=True)
class CompletionRequest:
    """What a client asks for."""

    prompts: tuple[str, ...]
    config: GenerationConfig
    n: int
    echo: bool
    logprobs: bool
    stream: bool
    include_usage: bool

    @classmethod
    def parse(cls, body: Any, vocabulary: Vocabulary, limits: Limits) -> "CompletionRequest":
        """body: the decoded JSON. Raises `UserError` for unknown fields, wrong types and values out of range."""
        if not isinstance(body, dict):
            raise UserError("the body is not a JSON object; send an object with the field prompt")
        check_names(body, (*OTHERS, *SAME_NAME, *ONLY))
        given = {name: value for name, value in body.items() if value is not None}
        for name, values in ONLY.items():
            if name in given and given[name] not in values:
                raise UserError(f"{name} = {given[name]!r:.40} is not supported; leave it out")
        prompts = _prompts(given.get("prompt", ""), vocabulary)
        flags = {name: given.get(name, False) for name in ("echo", "stream")}
        options = given.get("stream_options", {})
        include_usage = options.get("include_usage", False) if isinstance(options, dict) else options
        for name, value in {**flags, "stream_options.include_usage": include_usage}.items():
            check_bool(name, value)
        n, length = given.get("n", 1), given.get("max_tokens", 16)
        check_int("n", n, 1, limits.max_texts)
        check_int("max_tokens", length, 0, limits.max_length, note="characters")
        if n * len(prompts) > limits.max_texts:
            raise UserError(f"{len(prompts)} prompts times n = {n} are too many texts; the limit is {limits.max_texts}")
        if "logprobs" in given and not isinstance(given["logprobs"], bool):  # chat clients send a truth value
            check_int("logprobs", given["logprobs"], 0, MAX_LOGPROBS)
        config = GenerationConfig(
            max_length=length, stop=given.get("stop", ()), rng_seed=given.get("seed", secrets.randbits(32)),
            **{name: given[name] for name in SAME_NAME if name in given},
        )  # fmt: skip
        return cls(prompts, config, n, logprobs=given.get("logprobs", False) is not False,
                   include_usage=include_usage, **flags)  # fmt: skip

    def options(self, number: int) -> dict[str, Any]:
        """The options of `LanguageModel.stream` for text `number`, counted over all prompts."""
        values = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        return values | {"stream_number": number}


def _prompts(prompt: Any, vocabulary: Vocabulary) -> tuple[str, ...]:
    """The texts of a prompt: a string, ids, or a list of these."""
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, list) and prompt:
        if all(isinstance(each, str) for each in prompt):
            return tuple(prompt)
        if all(isinstance(each, int) and not isinstance(each, bool) for each in prompt):
            if not all(0 <= id < vocabulary.size for id in prompt):
                raise UserError(f"prompt has ids out of range; they must be from 0 to {vocabulary.size - 1}")
            return (vocabulary.decode(prompt),)
        if all(isinstance(each, list) and each for each in prompt):
            return tuple(text for each in prompt for text in _prompts(each, vocabulary))
    raise UserError(f"prompt = {prompt!r:.40} is not a text; send a string, a list of strings or ids")
