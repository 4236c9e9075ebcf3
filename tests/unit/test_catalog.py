"""The file of models: what it may say, and what an operator's file changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.prices import ModelPrices
from providers.catalog import OWN_FILE, Ability, CatalogError, WireFormat, load_catalog

PROVIDER = '[providers.local]\nformat = "chat-completions"\nbase_url = "http://10.0.0.5/v1"\n'
MODEL = '[models.mine]\nproviders = { local = "mine" }\n'


def written(folder: Path, text: str) -> Path:
    file = folder / "models.toml"
    file.write_text(text)
    return file


def test_the_servers_own_file_is_whole() -> None:
    catalog = load_catalog()
    assert {"openai", "anthropic", "google", "groq", "openrouter"} <= catalog.providers.keys()
    for model in catalog.models.values():
        assert model.name
        assert model.abilities is not None
        assert model.context_tokens
        assert model.max_output_tokens
        assert model.max_output_tokens < model.context_tokens
        assert model.providers
        for provider in model.providers:
            assert catalog.providers[provider].base_url.startswith("https://")
    assert catalog.providers["anthropic"].format is WireFormat.ANTHROPIC_MESSAGES


def test_its_prices_are_exact() -> None:
    assert load_catalog().models["gpt-6-luna"].prices == ModelPrices(100_000, 10_000, 500_000)


def test_an_operators_file_adds_models_and_providers(tmp_path: Path) -> None:
    catalog = load_catalog(written(tmp_path, PROVIDER + MODEL))
    model = catalog.models["mine"]
    assert (model.name, dict(model.providers), model.abilities, model.prices) == ("mine", {"local": "mine"}, None, None)
    assert catalog.providers["local"].needs_key
    assert catalog.models.keys() == {*load_catalog().models, "mine"}


def test_an_operators_file_changes_the_fields_it_names_and_no_other(tmp_path: Path) -> None:
    changes = '[models."gpt-6-luna"]\nprices = { prompt = 1, cached = 0, completion = 2.5 }\n'
    changes += PROVIDER + '[models."gpt-oss-120b".providers]\nlocal = "oss"\n'
    before, after = load_catalog(), load_catalog(written(tmp_path, changes))
    luna = after.models["gpt-6-luna"]
    assert luna.prices == ModelPrices(1_000_000, 0, 2_500_000)
    assert (luna.name, luna.providers) == (before.models["gpt-6-luna"].name, before.models["gpt-6-luna"].providers)
    assert after.models["gpt-oss-120b"].providers["local"] == "oss"
    assert after.models["gpt-oss-120b"].providers["groq"] == before.models["gpt-oss-120b"].providers["groq"]


def test_an_operators_file_takes_a_model_away(tmp_path: Path) -> None:
    assert "gpt-6-luna" not in load_catalog(written(tmp_path, '[models."gpt-6-luna"]\noffered = false\n')).models


def test_openrouter_is_the_last_way_to_a_model(tmp_path: Path) -> None:
    text = PROVIDER + '[models.mine]\nproviders = { openrouter = "x/mine", local = "mine" }\n'
    assert list(load_catalog(written(tmp_path, text)).models["mine"].providers) == ["local", "openrouter"]


def test_names_of_an_endpoints_models_replace_those_of_the_file() -> None:
    catalog = load_catalog().with_only("openai", ["gpt-6-luna", "llama3.2"])
    of_openai = {model.id for model in catalog.models.values() if "openai" in model.providers}
    assert of_openai == {"gpt-6-luna", "llama3.2"}
    # What others have, too, stays with them.
    assert list(catalog.models["gpt-6.2-sol"].providers) == ["openrouter"]


def test_a_name_that_another_providers_model_has_is_refused() -> None:
    with pytest.raises(CatalogError, match="claude-haiku-5-5"):
        load_catalog().with_only("openai", ["claude-haiku-5-5"])


WRONG = {
    "no TOML": ("[models", "not TOML"),
    "no text": ("\ud800", "not TOML"),
    "an unknown table": ("[model.x]", "'model'"),
    "an unknown field": (PROVIDER + MODEL + "price = 1", "models.mine.*'price'"),
    "no tables": ("models = 3", "models"),
    "a field for a table": ("[models]\nmine = 3", "models"),
    "no providers": ("[models.mine]\nname = 'x'", "models.mine: providers"),
    "an empty list of providers": ("[models.mine]\nproviders = {}", "models.mine: providers"),
    "providers that are no table": ("[models.mine]\nproviders = ['openai']", "models.mine: providers"),
    "a provider that is not there": ("[models.mine]\nproviders = { nobody = 'x' }", "nobody"),
    "an empty vendor name": (PROVIDER + "[models.mine]\nproviders = { local = ' ' }", "models.mine: providers"),
    "an id with a colon": (PROVIDER + "[models.'custom:x']\nproviders = { local = 'x' }", "custom:x"),
    "an unknown ability": (PROVIDER + MODEL + "abilities = ['flight']", "models.mine: abilities: one of vision"),
    "an ability that is no text": (PROVIDER + MODEL + "abilities = [1]", "models.mine: abilities"),
    "a context of nothing": (PROVIDER + MODEL + "context_tokens = 0", "models.mine: context_tokens"),
    "a context that is true": (PROVIDER + MODEL + "context_tokens = true", "models.mine: context_tokens"),
    "a context that is a text": (PROVIDER + MODEL + "context_tokens = 'big'", "models.mine: context_tokens"),
    "half of the prices": (PROVIDER + MODEL + "prices = { prompt = 1 }", "models.mine: prices: cached"),
    "a negative price": (PROVIDER + MODEL + "prices = {prompt=-1, cached=0, completion=0}", "prices: prompt"),
    "no number": (PROVIDER + MODEL + "prices = {prompt=nan, cached=0, completion=0}", "prices: prompt"),
    "a price that is true": (PROVIDER + MODEL + "prices = {prompt=true, cached=0, completion=0}", "prices: prompt"),
    "seven decimals": (PROVIDER + MODEL + "prices = {prompt=0.0000001, cached=0, completion=0}", "six decimals"),
    "an unknown format": ("[providers.x]\nformat = 'soap'\nbase_url = 'https://x'", "providers.x: format: one of chat"),
    "no address": ("[providers.x]\nformat = 'chat-completions'", "providers.x: base_url"),
    "a provider's name with a colon": ("[providers.'custom:x']\nformat = 'chat-completions'", "custom:x"),
    "an unknown name of the limit": (PROVIDER + "output_limit_field = 'limit'", "output_limit_field"),
    "a model that is offered perhaps": (PROVIDER + MODEL + "offered = 'yes'", "models.mine: offered: true or false"),
}


@pytest.mark.parametrize(("text", "told"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_by_table_and_field(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "models.toml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CatalogError, match=told):
        load_catalog(file)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="cannot be read"):
        load_catalog(tmp_path / "none.toml")


def test_a_file_that_never_ends_is_not_read_whole() -> None:
    with pytest.raises(CatalogError, match="bytes"):
        load_catalog(Path("/dev/zero"))


def test_the_own_file_can_be_an_operators_file() -> None:
    assert load_catalog(OWN_FILE) == load_catalog()


def test_what_a_provider_lacks_its_models_lack(tmp_path: Path) -> None:
    assert load_catalog().providers["google"].lacks == {Ability.PDF}
