"""From an endpoint and a key to the adapter that speaks with it: one shared session, the key a header."""

from __future__ import annotations

import aiohttp

from providers.anthropic import AnthropicProvider
from providers.base import Provider
from providers.catalog import Endpoint, WireFormat
from providers.chat_completions import ChatCompletionsProvider
from providers.http import Deadlines


class Endpoints:
    """Makes adapters. An adapter holds no connection of its own and may be dropped when its answer has ended.

    Args:
        session: for endpoints that the operator named; owned and closed by the caller.
        guarded: for endpoints that users named: it connects to no address inside; owned and closed by the caller.
        deadlines: how long a vendor may take.
        anthropic_max_tokens: limit of an answer without its thinking, which Anthropic's format requires.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        guarded: aiohttp.ClientSession,
        *,
        deadlines: Deadlines,
        anthropic_max_tokens: int,
    ) -> None:
        self._session = session
        self._guarded = guarded
        self._deadlines = deadlines
        self._anthropic_max_tokens = anthropic_max_tokens

    def connect(self, endpoint: Endpoint, api_key: str | None) -> Provider:
        """An adapter for this endpoint and key.

        Raises:
            ValueError: the address or the key cannot be used; the message contains neither.
        """
        session = self._guarded if endpoint.guarded else self._session
        if endpoint.format is WireFormat.ANTHROPIC_MESSAGES:
            return AnthropicProvider(
                session=session,
                base_url=endpoint.base_url,
                api_key=api_key,
                deadlines=self._deadlines,
                max_text_tokens=self._anthropic_max_tokens,
            )
        return ChatCompletionsProvider(
            session=session,
            base_url=endpoint.base_url,
            api_key=api_key,
            deadlines=self._deadlines,
            output_limit_field=endpoint.output_limit_field,
        )
