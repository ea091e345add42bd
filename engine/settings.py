"""Settings of a run, each with its origin, and the layers they are joined from. Without torch."""

from dataclasses import dataclass, fields

from engine.errors import flag_errors
from families import family_of

TYPED, DEFAULT = "typed", "default"


@dataclass(frozen=True)
class Settings:
    """Values by name, as in `settings.lr`; nobody writes into them.

    origins: {name: where its value comes from}. weights: {setting that names a file: its opened Weights}. unused: typed
    flags that have no effect.
    """

    values: dict
    origins: dict
    weights: dict
    unused: tuple = ()

    def __getattr__(self, name):
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(f"no setting is called {name!r}") from None

    @property
    def family(self):
        """The family of `model`."""
        return family_of(self.model)

    def own(self, kind):
        """The family's own flags of a kind ("train", "sample", ...) and what it asks besides, as keyword arguments."""
        names = [flag.dest for flag in self.family.own_flags([kind])] + list(self.family.asks.get(kind, ()))
        return {name: self.values[name] for name in names if name in self.values}

    def make_objective(self):
        """The family's objective. Raises InputError for data and flags that it cannot be made from."""
        with flag_errors("--data-path", self.values.get("data_path")):
            return self.family.make_objective(**self.own("train"))

    def make(self, kind, **others):
        """An object of the dataclass `kind`, whose fields are the settings of these names, or given here."""
        names = {field.name for field in fields(kind)} & self.values.keys() - others.keys()
        return kind(**{name: self.values[name] for name in names}, **others)

    def notable(self):
        """[(name, value, origin)] of what is not a plain default."""
        rows = [(name, value, self.origins[name]) for name, value in self.values.items()]
        return [row for row in rows if row[2] != DEFAULT]


class Layers:
    """Settings joined layer by layer: of a name, the first value that is not None counts."""

    def __init__(self):
        self.values, self.origins = {}, {}

    def add(self, values, origin):
        """Add a layer weaker than those before."""
        for name, value in values.items():
            if value is not None and name not in self.values:
                self.values[name], self.origins[name] = value, origin
