"""The teachers of a run: made when a stage needs them, with one connection pool, journal and budget."""

import contextlib
import pathlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import aiohttp

from dqjax.config import ConfigError
from dqjax.data.endpoint import Endpoint, open_session
from dqjax.data.journal import Journal, tokens_in
from dqjax.data.limits import Budget
from dqjax.data.models import Models, ScorerConfig
from dqjax.data.teacher import EndpointTeacher, Journaled, Teacher, TeacherConfig
from dqjax.rewards.verbosity import StyleScorer

_SHARD = re.compile(r"\.shard-\d+-of-\d+(?=\.journal\.jsonl$)")


class Staff:
    """Teachers by name.

    Args:
      configs: of all teachers; names are unique.
      models: makes the local ones, and scorers; commands that know models provide it.
      max_total_tokens: what all calls whose journals lie in one folder may cost together; a shard has its part of it.
    """

    def __init__(
        self,
        configs: Sequence[TeacherConfig] = (),
        models: Models | None = None,
        max_total_tokens: int | None = None,
    ):
        self._configs = {config.name: config for config in configs}
        if len(self._configs) < len(configs):
            raise ConfigError("teachers: two have the same name")
        self._models, self._limit = models, max_total_tokens
        self._locals: dict[str, Teacher] = {}
        self._working: dict[str, Teacher] = {}

    def identities(self, names: Sequence[str] | None = None) -> dict[str, str]:
        """Models by teacher name."""
        return {name: config.identity for name, config in self._configs.items() if names is None or name in names}

    def config(self, name: str) -> TeacherConfig:
        """Raises ConfigError for an unknown name."""
        if name not in self._configs:
            raise ConfigError(f"no teacher is called {name!r}; there are {', '.join(self._configs) or 'none'}")
        return self._configs[name]

    def teacher(self, name: str) -> Teacher:
        """A teacher that is at work."""
        return self._working[name]

    def scorer(self, config: ScorerConfig) -> StyleScorer:
        """A trained RV/CD scorer."""
        return self._known_models(f"scorer {config.checkpoint}").scorer(config)

    @contextlib.asynccontextmanager
    async def at_work(
        self, names: Sequence[str], journal_path: pathlib.Path, *, usage: Counter[str], shards: int = 1
    ) -> AsyncIterator[int]:
        """Opens the named teachers for a stage; yields how many requests they work on at once.

        Args:
          usage: see `Journaled`.
        """
        configs = [self.config(name) for name in dict.fromkeys(names)]
        with Journal(journal_path) as journal:
            limit = None if self._limit is None else self._limit // shards
            elsewhere = sum(tokens_in(path) for path in _siblings(journal_path)) if limit is not None else 0
            budget = Budget(limit, journal.spent + elsewhere, journal.charge)
            async with open_session() as session:
                for config in configs:
                    self._working[config.name] = Journaled(self._open(config, session, budget), journal, usage)
                try:
                    yield sum(teacher.parallel for teacher in self._working.values())
                finally:
                    for teacher in self._working.values():
                        await teacher.close()
                    self._working.clear()

    def _open(self, config: TeacherConfig, session: aiohttp.ClientSession, budget: Budget) -> Teacher:
        if config.local is None:
            return EndpointTeacher(config, [Endpoint(e, session) for e in config.endpoints], budget)
        if config.name not in self._locals:
            self._locals[config.name] = self._known_models(f"teacher {config.name}").teacher(config)
        return self._locals[config.name]

    def _known_models(self, what: str) -> Models:
        if self._models is None:
            raise ConfigError(f"{what} is local; only python -m dqjax.data makes such ones")
        return self._models


def _siblings(path: pathlib.Path) -> list[pathlib.Path]:
    """Other journals in the folder, of the same shard."""
    mine = _SHARD.search(path.name)
    others = [other for other in path.parent.glob("*.journal.jsonl") if other.name != path.name]
    return [o for o in others if (found := _SHARD.search(o.name)) == mine or (found and mine and found[0] == mine[0])]
