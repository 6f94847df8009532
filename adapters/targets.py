"""Which modules of the base a LoraConfig adapts, with which rank and alpha: PEFT's own rules, on the manifest's names.

Sources, PEFT 0.21: tuners_utils.check_target_module_exists, tuners_utils._maybe_include_all_linear_layers,
utils.other.get_pattern_key, tuners.lora.model.LoraModel._create_and_replace.
"""

from __future__ import annotations

import re
from typing import Generic, TypeVar

from adapters.manifest import Manifest, Module
from adapters.patterns import Budget, Pattern, PatternError
from adapters.peft_config import MAX_REGEX_KEYS, LoraSettings

ALL_LINEAR = "all-linear"

_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
# Lazy: the first numbered segment is the layer, a later one an expert. PEFT demands a segment before "layers".
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")

Value = TypeVar("Value", int, float)


class TargetMatcher:
    """The compiled target_modules, exclude_modules, layers_to_transform and layers_pattern of one configuration.

    PatternError from the constructor for a bad regular expression, from `targets` when matching takes too long."""

    def __init__(self, settings: LoraSettings, budget: Budget) -> None:
        self._wanted = _NameRule("target_modules", settings.target_modules, budget)
        self._excluded = _NameRule("exclude_modules", settings.exclude_modules, budget)
        self._all_linear = isinstance(settings.target_modules, str) and settings.target_modules.lower() == ALL_LINEAR
        self._layers = settings.layers_to_transform
        self._layer_patterns = [
            Pattern("layers_pattern", pattern, budget, r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")
            for pattern in settings.layers_pattern
        ]

    def targets(self, manifest: Manifest) -> list[Module]:
        """The adapted modules in model order; embeddings and the LM head among them if the configuration says so."""
        if self._all_linear:
            self._wanted.names = frozenset(module.name for module in manifest.linears)
            self._wanted.pattern = None
        return [module for module in manifest.modules if self._adapts(module.name)]

    def _adapts(self, name: str) -> bool:
        if self._excluded.matches(name):
            return False
        if not self._wanted.matches(name):
            return False
        # A module given by its full name is adapted whatever its layer, and so is one matched by an expression.
        if self._layers is None or self._wanted.pattern is not None or name in self._wanted.names:
            return True
        layer = self._layer_of(name)
        return layer is not None and layer in self._layers

    def _layer_of(self, name: str) -> int | None:
        if not self._layer_patterns:
            match = _ANY_LAYER.match(name)
        else:
            matches = (pattern.match(name) for pattern in self._layer_patterns)
            match = next((found for found in matches if found is not None), None)
        return int(match.group("idx")) if match is not None else None


class _NameRule:
    """A list of names (a module matches by its whole name or by what follows one of its dots) or a full-match regex."""

    def __init__(self, field: str, rule: str | tuple[str, ...], budget: Budget) -> None:
        self.names: frozenset[str] = frozenset()
        self.pattern: Pattern | None = None
        if isinstance(rule, tuple):
            self.names = frozenset(rule)
        elif rule:
            self.pattern = Pattern(field, rule, budget)

    def matches(self, name: str) -> bool:
        if self.pattern is not None:
            return self.pattern.fullmatch(name) is not None
        if not self.names:
            return False
        if name in self.names:
            return True
        dot = name.find(".")
        while dot >= 0:
            if name[dot + 1 :] in self.names:
                return True
            dot = name.find(".", dot + 1)
        return False


class PatternMap(Generic[Value]):
    """rank_pattern or alpha_pattern: the value of the first key that matches a module's name, else the default.

    A key is a regular expression for the end of the name, from its beginning or after a dot. Most keys are plain names
    (EVA writes one for every module), which are compared without a regular expression."""

    def __init__(self, field: str, values: dict[str, Value], budget: Budget) -> None:
        self._values: dict[str, Value] = values
        self._keys: list[tuple[str, Pattern | None]] = []
        expressions = 0
        for key in values:
            if _PLAIN.fullmatch(key):
                self._keys.append((key, None))
                continue
            expressions += 1
            if expressions > MAX_REGEX_KEYS:
                raise PatternError(f"{field}: at most {MAX_REGEX_KEYS} of its keys may be regular expressions")
            self._keys.append((key, Pattern(field, key, budget, r"(.*\.)?({})$")))

    def get(self, name: str, default: Value) -> Value:
        """PatternTimeoutError when matching takes too long."""
        for key, pattern in self._keys:
            if _plain_match(key, name) if pattern is None else pattern.match(name) is not None:
                return self._values[key]
        # PEFT's get_pattern_key falls back on the name itself.
        return self._values.get(name, default)


def _plain_match(key: str, name: str) -> bool:
    """re.match(rf"(.*\\.)?({key})$", name) for a key of word characters and dots (a dot stands for any character)."""
    start = len(name) - len(key)
    if start < 0 or (start > 0 and name[start - 1] != "."):
        return False
    tail = name[start:]
    return tail == key or ("." in key and all(a in (b, ".") for a, b in zip(key, tail, strict=True)))
