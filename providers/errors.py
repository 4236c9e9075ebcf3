"""What vendors' error objects mean, as they come with a status or in the middle of an answer.

One table for all: the vendors' names do not contradict each other, and gateways hand on the names and texts of whoever
is behind them.
"""

from __future__ import annotations

import re
from typing import Any

from providers.base import FailureCode, ProviderFailure
from providers.http import OUT_OF_CREDIT, failure, failure_for_status

# How vendors name what a status alone does not tell, as `code`, `type` or `status` of the error object or as
# `error_code` of its details, in lower case.
_OUT_OF_CREDIT_NAMES = {
    "insufficient_quota",
    "billing_hard_limit_reached",
    "billing_error",
    "contract_spend_limit_reached",
    "enforced_spend_limit_reached",
    "linked_organization_spend_limit_reached",
}
_ERROR_NAMES = {
    "context_length_exceeded": FailureCode.CONTEXT_TOO_LONG,
    "exceed_context_size_error": FailureCode.CONTEXT_TOO_LONG,  # llama.cpp
    "request_too_large": FailureCode.CONTEXT_TOO_LONG,  # Anthropic
    "content_filter": FailureCode.CONTENT_FILTERED,
    "content_policy_violation": FailureCode.CONTENT_FILTERED,
    "invalid_api_key": FailureCode.PROVIDER_REJECTED_KEY,
}
# vLLM, Ollama, OpenRouter and Anthropic say it in the text only; Gemini refuses a wrong key with 400.
_ERROR_PHRASES = (
    ("context length", FailureCode.CONTEXT_TOO_LONG),
    ("context window", FailureCode.CONTEXT_TOO_LONG),
    ("context limit", FailureCode.CONTEXT_TOO_LONG),
    ("prompt is too long", FailureCode.CONTEXT_TOO_LONG),
    ("input is too long", FailureCode.CONTEXT_TOO_LONG),
    ("content filtering policy", FailureCode.CONTENT_FILTERED),
    ("api key not valid", FailureCode.PROVIDER_REJECTED_KEY),
)
# Anthropic, of thinking blocks that were sent back. Its words change; the kind of block and one of these stay.
_OF_REASONING = re.compile(
    r"thinking.{0,200}(signature|cannot be modified|different conversation)|signature.{0,200}thinking", re.DOTALL
)
_OUT_OF_CREDIT_PHRASE = "credit balance is too low"
# Inside of an answer there is no status; these names mean what the status means that they come with elsewhere.
_STATUSES = {
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
    "too_many_requests": 429,
    "authentication_error": 401,
    "permission_error": 403,
    "invalid_request_error": 400,
    "model_not_found": 404,
    "not_found_error": 404,
    "timeout": 408,
    "timeout_error": 504,
    "api_error": 500,
    "server_error": 500,
    "overloaded_error": 529,
}


def named_failure(body: Any) -> ProviderFailure | None:
    """What a vendor's error object says beyond its status; None where it says nothing that is known.

    The shapes seen: `{"error": {...}}`, the same in a list (Gemini), `{"error": "text"}` (Ollama), the bare object
    (Mistral).
    """
    if isinstance(body, list):
        body = body[0] if body else None
    error = body.get("error") or body if isinstance(body, dict) else None
    for name in _error_names(error):
        if name in _OUT_OF_CREDIT_NAMES:
            return ProviderFailure(FailureCode.PROVIDER_REJECTED_REQUEST, OUT_OF_CREDIT)
        if name in _ERROR_NAMES:
            return failure(_ERROR_NAMES[name])
    text = (error.get("message") if isinstance(error, dict) else error) or ""
    if isinstance(text, str):
        text = text.lower()
        if _OF_REASONING.search(text):
            return failure(FailureCode.PROVIDER_REJECTED_REQUEST, of_reasoning=True)
        if _OUT_OF_CREDIT_PHRASE in text:
            return ProviderFailure(FailureCode.PROVIDER_REJECTED_REQUEST, OUT_OF_CREDIT)
        for phrase, code in _ERROR_PHRASES:
            if phrase in text:
                return failure(code)
    return None


def stream_failure(error: Any) -> ProviderFailure:
    """What an error inside of an answer means, where no status helps: its name, else its number, else "unavailable"."""
    if named := named_failure({"error": error}):
        return named
    for name in _error_names(error):
        if name in _STATUSES:
            return failure_for_status(_STATUSES[name])
        if re.fullmatch("[45][0-9][0-9]", name):
            return failure_for_status(int(name))
    return failure(FailureCode.PROVIDER_UNAVAILABLE)


def _error_names(error: Any) -> list[str]:
    if not isinstance(error, dict):
        return []
    names = [error.get(key) for key in ("code", "type", "status")]
    details = error.get("details")
    if isinstance(details, dict):
        names.append(details.get("error_code"))
    return [str(name).lower() for name in names if isinstance(name, str | int)]
