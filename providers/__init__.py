"""The model registry and the adapters that stream answers from model vendors."""
