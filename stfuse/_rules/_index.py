"""Indices."""

from stfuse._rules._base import Rule

RULES: dict[str, Rule] = {}
