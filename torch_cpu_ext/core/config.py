"""What all technique configs share: a version, and a plain dictionary form for JSON files."""

import dataclasses
from typing import Any, ClassVar, TypeVar

C = TypeVar("C", bound="Config")


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of the techniques' configs: frozen dataclasses, validated at construction.

    A field may be added with a default; when one changes its meaning, ``version`` goes up and ``from_dict`` of the subclass translates.
    """

    version: ClassVar[int] = 1

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain values that `from_dict` takes back."""
        return {"config": type(self).__name__, "version": self.version, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """The config that `to_dict` was called on.

        Raises:
            ValueError: the dictionary belongs to another config, comes from a newer version or holds unknown fields.
        """
        fields = dict(values)
        name, version = fields.pop("config", cls.__name__), fields.pop("version", cls.version)
        if name != cls.__name__:
            raise ValueError(f"from_dict: config must be {cls.__name__}, got {name}")
        if version > cls.version:
            raise ValueError(f"from_dict: version must be at most {cls.version}, got {version}; a newer torch_cpu_ext wrote it")
        unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"from_dict: fields must be those of {cls.__name__}, got {', '.join(unknown)}")
        return cls(**fields)


def require(condition: bool, config: Config, field: str, accepted: str) -> None:
    """Raises ValueError that names the field, its value and what is accepted, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{type(config).__name__}: {field} must be {accepted}, got {getattr(config, field)!r}")
