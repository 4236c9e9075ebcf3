"""Which provider a model is asked through: the user's key, then their OpenRouter key, then the operator's."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.base import GenerationRequest, ProviderEvent, TextDelta
from providers.catalog import Ability, Catalog, CatalogModel, Endpoint, WireFormat
from providers.registry import (
    MissingKeyError,
    ModelRecord,
    ModelRegistry,
    OwnAccess,
    OwnModel,
    UnknownModelError,
)


class Route:
    """A provider that only remembers how it was reached."""

    def __init__(self, endpoint: str, key: str | None, *, own: bool) -> None:
        self.way = (endpoint, key, own)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[ProviderEvent, None]:
        """Says what it was asked; no test asks it."""
        yield TextDelta(request.model)

    async def close(self) -> None:
        """Nothing is open."""


NAMES = ("openai", "anthropic", "openrouter")
CATALOG = Catalog(
    {
        name: Endpoint(
            name=name,
            label=name.title(),
            format=WireFormat.CHAT_COMPLETIONS,
            base_url=f"https://{name}.example/v1",
            lacks=frozenset({Ability.PDF} if name == "openrouter" else ()),
        )
        for name in NAMES
    },
    {
        model.id: model
        for model in (
            CatalogModel(
                id="gpt",
                name="GPT",
                providers={"openai": "gpt", "openrouter": "openai/gpt"},
                abilities=frozenset({Ability.PDF, Ability.VISION}),
            ),
            CatalogModel(id="claude", name="Claude", providers={"anthropic": "c", "openrouter": "anthropic/c"}),
            CatalogModel(id="routed", name="Routed", providers={"openrouter": "x/routed"}),
        )
    },
)
ECHO = ModelRecord("echo", "Echo", "scripted", "echo")


def registry(operators: Mapping[str, str] | None = None, default: str | None = None) -> ModelRegistry:
    return ModelRegistry(
        CATALOG,
        operators={name: Route(name, key, own=False) for name, key in (operators or {}).items()},
        connect=lambda endpoint, key: Route(endpoint.name, key, own=True),
        fixed=[(ECHO, Route("scripted", None, own=False))],
        default=default,
    )


def way(models: ModelRegistry, model_id: str | None, own: OwnAccess) -> tuple[str, str | None, bool]:
    provider = models.resolve(model_id, own)[1]
    assert isinstance(provider, Route)
    return provider.way


KEY = st.sampled_from(["absent", "unreadable", "readable"])


@given(own=st.fixed_dictionaries(dict.fromkeys(NAMES, KEY)), operator=st.sets(st.sampled_from(NAMES)))
def test_the_order_of_the_choice(own: dict[str, str], operator: set[str]) -> None:
    access = OwnAccess(
        keys={name: f"own-{name}" if state == "readable" else None for name, state in own.items() if state != "absent"}
    )
    models = registry({name: f"operator-{name}" for name in operator})
    listed = {record.id: record for record in models.available(access)}
    for model_id, native in (("gpt", "openai"), ("claude", "anthropic")):
        # Said anew, in the words of the rule.
        wanted: tuple[str, str | None, bool] | None
        if own[native] == "readable":
            wanted = (native, f"own-{native}", True)
        elif own["openrouter"] == "readable":
            wanted = ("openrouter", "own-openrouter", True)
        elif native in operator and own[native] == "absent":
            wanted = (native, f"operator-{native}", False)
        elif "openrouter" in operator and own["openrouter"] == "absent":
            wanted = ("openrouter", "operator-openrouter", False)
        else:
            wanted = None
        if wanted is None:
            assert model_id not in listed
            with pytest.raises(MissingKeyError) as missing:
                models.resolve(model_id, access)
            assert missing.value.providers == [native.title(), "Openrouter"]
            states = [own[native], own["openrouter"]]
            assert (missing.value.unreadable is not None) == ("unreadable" in states)
        else:
            assert way(models, model_id, access) == wanted
            assert (listed[model_id].provider, listed[model_id].own_key) == (wanted[0], wanted[2])


def test_a_model_has_the_name_of_the_provider_that_is_asked() -> None:
    models = registry({"openai": "k"})
    assert models.resolve("gpt")[0].vendor_name == "gpt"
    assert models.resolve("gpt", OwnAccess(keys={"openrouter": "o"}))[0].vendor_name == "openai/gpt"


def test_a_model_has_the_abilities_that_it_has_through_that_provider() -> None:
    models = registry({"openai": "k"})
    assert models.resolve("gpt")[0].abilities == frozenset({Ability.PDF, Ability.VISION})
    assert models.resolve("gpt", OwnAccess(keys={"openrouter": "o"}))[0].abilities == frozenset({Ability.VISION})


def test_of_a_model_that_nobody_described_nothing_is_known() -> None:
    record = registry({"anthropic": "k"}).resolve("claude")[0]
    assert record.abilities is None
    assert not record.can(Ability.VISION)
    assert record.can(Ability.EFFORT, unless_known=True)


def test_one_broken_key_costs_one_provider_and_nothing_else() -> None:
    models = registry({"openai": "k", "anthropic": "k"})
    broken = OwnAccess(keys={"openai": None})
    assert [record.id for record in models.available(broken)] == ["claude", "echo"]
    assert way(models, "claude", broken) == ("anthropic", "k", False)


def test_the_default_is_the_operators_choice_where_the_user_can_use_it() -> None:
    models = registry({"openai": "k"}, default="claude")
    assert way(models, None, OwnAccess(keys={"anthropic": "a"})) == ("anthropic", "a", True)
    assert models.resolve(None)[0].id == "gpt"


def test_without_any_model_there_is_no_default() -> None:
    with pytest.raises(UnknownModelError):
        ModelRegistry(CATALOG).resolve(None)


def test_a_default_that_nobody_has_is_refused() -> None:
    with pytest.raises(UnknownModelError):
        registry(default="gone")


def test_what_a_user_made_is_theirs_alone() -> None:
    mine = OwnModel(provider="openrouter", vendor_name="x/y", name="Mine")
    own = OwnAccess(keys={"openrouter": "o"}, models=(mine,))
    models = registry({"openrouter": "operator"})
    assert mine.id == "custom:openrouter/x/y"
    assert way(models, mine.id, own) == ("openrouter", "o", True)
    with pytest.raises(UnknownModelError):
        models.resolve(mine.id)


def test_a_model_that_a_user_made_is_never_asked_with_the_operators_key() -> None:
    mine = OwnModel(provider="openai", vendor_name="expensive", name="Mine")
    own = OwnAccess(models=(mine,))
    models = registry({"openai": "operator"})
    assert mine.id not in [record.id for record in models.available(own)]
    with pytest.raises(MissingKeyError):
        models.resolve(mine.id, own)
    # It is known all the same, so that what names it can be shown.
    described = models.describe(mine.id, own)
    assert described is not None
    assert described.name == "Mine"


def test_an_endpoint_of_a_user_is_asked_with_its_own_key_or_none() -> None:
    endpoint = Endpoint(
        name="custom:home", label="Home", format=WireFormat.CHAT_COMPLETIONS, base_url="https://h/v1", guarded=True
    )
    mine = OwnModel(provider="home", vendor_name="llama", name="Llama")
    models = registry()
    for keys, expected in (({}, None), ({"custom:home": "h"}, "h")):
        own = OwnAccess(keys=keys, endpoints={"home": endpoint}, models=(mine,))
        assert way(models, "custom:home/llama", own) == ("custom:home", expected, True)
    own = OwnAccess(keys={"custom:home": None}, endpoints={"home": endpoint}, models=(mine,))
    with pytest.raises(MissingKeyError) as missing:
        models.resolve("custom:home/llama", own)
    assert missing.value.unreadable == "home"


def test_the_first_of_the_list_is_not_a_users_model() -> None:
    mine = OwnModel(provider="openrouter", vendor_name="x", name="Mine")
    own = OwnAccess(keys={"openrouter": "o"}, models=(mine,))
    assert registry().available(own)[0].id == mine.id
    assert registry().resolve(None, own)[0].id == "gpt"


def test_what_is_written_of_access_shows_no_key() -> None:
    own = OwnAccess(keys={"openai": "sk-canary"})
    assert "canary" not in repr(own)
    assert "canary" not in repr(registry().resolve("gpt", own)[0])
    with pytest.raises(MissingKeyError) as missing:
        registry().resolve("claude", own)
    assert "canary" not in repr(missing.value)


@pytest.mark.parametrize(
    ("context", "most", "prompt", "possible"),
    [
        (None, None, 10, None),
        (None, 500, 10, 500),
        (8_000, None, 1_000, 7_000),
        (8_000, 500, 1_000, 500),
        (8_000, None, 7_500, 2_000),
        (8_000, 500, 9_000, 500),
        (1, None, 9, 1),
    ],
)
def test_a_model_can_write_what_its_context_leaves_and_no_more_than_it_writes_at_most(
    context: int | None, most: int | None, prompt: int, possible: int | None
) -> None:
    model = ModelRecord("m", "M", "p", "m", context_tokens=context, max_output_tokens=most)
    assert model.possible_answer(prompt) == possible
