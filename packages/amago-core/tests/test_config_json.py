"""Configurations survive JSON, and files can neither import nor smuggle in anything."""

from __future__ import annotations

import enum
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from amago_core.config_json import diff, from_json, load, register_config, save, to_json
from amago_core.errors import ConfigError
from amago_nets.tstep_encoders import FFTstepEncoderConfig


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@register_config
@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 3
    rates: tuple[float, ...] = (0.1, 1.0)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width} is not allowed; give an integer >= 1")


@register_config(name="other-inner")
@dataclass(frozen=True, kw_only=True)
class OtherInner:
    depth: int | None = None


@register_config
@dataclass(frozen=True, kw_only=True)
class Outer:
    needed: str
    inner: Inner | OtherInner = Inner()
    plain: Inner = Inner()
    many: tuple[Inner, ...] = ()
    pair: tuple[int, str] = (1, "a")
    path: Path = Path("runs")
    colour: Colour = Colour.RED
    mode: Literal["a", "b"] = "a"
    limit: int | float = 5
    maybe: float | None = None
    names: Sequence[str] = ()
    table: Mapping[str, float] = field(default_factory=dict)
    anything: Any = None
    flag: bool = False
    encoder: FFTstepEncoderConfig = FFTstepEncoderConfig()


FULL = Outer(
    needed="x",
    inner=OtherInner(depth=4),
    plain=Inner(width=7, rates=(math.inf, -0.0, 1e-300)),
    many=(Inner(), Inner(width=2)),
    pair=(2, "b"),
    path=Path("a/b"),
    colour=Colour.BLUE,
    mode="b",
    limit=math.inf,
    maybe=0.5,
    names=("p", "q"),
    table={"k": 1.5},
    anything={"list": (1, "two", None), "config": Inner(width=9)},
    flag=True,
    encoder=FFTstepEncoderConfig(d_hidden=32, obs_keys=("observation",)),
)


def through_json(config):
    return from_json(json.loads(json.dumps(to_json(config), allow_nan=False)))


@pytest.mark.parametrize("config", [Outer(needed=""), FULL, Inner(), FFTstepEncoderConfig()])
def test_round_trip(config):
    assert through_json(config) == config


def test_types_are_restored():
    back = through_json(FULL)
    assert isinstance(back.path, Path) and isinstance(back.many, tuple) and isinstance(back.limit, float)
    assert isinstance(through_json(Outer(needed="", limit=5)).limit, int)


def test_tags_are_short_and_public():
    data = to_json(FULL)
    assert data["type"] == "Outer" and data["inner"]["type"] == "other-inner"
    module, _, name = data["encoder"]["type"].partition(":")
    assert module in ("amago_nets", "amago_nets.tstep_encoders") and name == "FFTstepEncoderConfig"


def test_missing_fields_take_their_defaults():
    assert from_json({"type": "Outer", "needed": "x"}) == Outer(needed="x")
    assert from_json({"type": "Outer", "needed": "x", "plain": {"width": 4}}).plain == Inner(width=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"typo": 1}, "config: Outer has no field 'typo'; its fields are needed, inner"),
        ({"plain": {"type": "Inner", "widht": 1}}, "config.plain: Inner has no field 'widht'"),
        ({"plain": {"type": "Inner", "width": "3"}}, 'config.plain.width: expected an integer, got "3"'),
        ({"plain": {"type": "Inner", "width": True}}, "config.plain.width: expected an integer"),
        ({"plain": {"type": "Inner", "width": 1.0}}, "config.plain.width: expected an integer"),
        ({"plain": {"type": "Inner", "width": 0}}, "config.plain: Inner cannot be built: width=0"),
        ({"plain": {"type": "Inner", "rates": [1, "x"]}}, r"config.plain.rates\[1\]: expected a number"),
        ({"plain": {"type": "Inner", "rates": 3}}, "config.plain.rates: expected a list"),
        ({"plain": None}, "config.plain: expected Inner, got null"),
        ({"plain": {"type": "amago_nets.tstep_encoders:FFTstepEncoderConfig"}}, None),
        ({"many": [{"type": "Inner"}, 3]}, r"config.many\[1\]: expected Inner"),
        ({"pair": [1]}, "config.pair: expected a list of 2"),
        ({"colour": "GREEN"}, "config.colour: expected one of RED, BLUE"),
        ({"mode": "c"}, "config.mode: expected one of 'a', 'b'"),
        ({"flag": 1}, "config.flag: expected true or false"),
        ({"maybe": "x"}, "config.maybe: expected float or NoneType"),
        ({"needed": 3}, "config.needed: expected a string"),
        ({"path": 3}, "config.path: expected a path"),
        ({"table": {"k": "v"}}, "config.table.k: expected a number"),
        ({"encoder": {"type": "amago_nets.tstep_encoders:Nonsense"}}, "config.encoder: unknown type"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        from_json({"type": "Outer", "needed": "x", **change})
    assert "\n" not in str(caught.value)


def test_missing_required_field():
    with pytest.raises(ConfigError, match="needed"):
        from_json({"type": "Outer"})


@pytest.mark.parametrize(
    "tag",
    [
        "subprocess:Popen",
        "antigravity:x",
        "amago_nets",
        "amago_nets:__name__",
        "amago_core.config_json:importlib.import_module",
        "amago_core.config_json:Path",
        "amago_core.nothing:X",
        "amago_core..config:X",
        ":Outer",
        "Unregistered",
        None,
        3,
        ["Outer"],
    ],
)
def test_only_known_configurations_are_resolved(tag):
    before = set(sys.modules)
    with pytest.raises(ConfigError, match="unknown type"):
        from_json({"type": tag})
    assert "antigravity" not in set(sys.modules) - before


def test_user_configuration_fits_a_field_of_another_type():
    @register_config(name="test-my-encoder")
    @dataclass(frozen=True)
    class MyEncoder:
        size: int = 2

    config = Outer(needed="x", encoder=MyEncoder(size=5))
    assert through_json(config) == config


def test_registering():
    with pytest.raises(ConfigError, match="already taken"):

        @register_config(name="Inner")
        @dataclass(frozen=True)
        class Another:
            pass

    with pytest.raises(ConfigError, match="frozen"):
        register_config(dataclass(type("Thawed", (), {})))
    with pytest.raises(ConfigError, match="frozen"):
        register_config(int)

    @dataclass(frozen=True)
    class Unknown:
        pass

    with pytest.raises(ConfigError, match="register_config"):
        to_json(Unknown())


@pytest.mark.parametrize("value", [{1, 2}, object(), {1: 2}, lambda: 1, Inner])
def test_what_cannot_be_written_is_named(value):
    with pytest.raises(ConfigError, match="config.anything"):
        to_json(Outer(needed="", anything=value))


def test_files(tmp_path):
    path = tmp_path / "config.json"
    save(FULL, path)
    assert load(path) == FULL
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    path.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="expected an object"):
        load(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="cannot write"):
        save(FULL, tmp_path / "absent" / "config.json")


def test_diff():
    assert diff(FULL, FULL) == {}
    first, second = Outer(needed="x"), Outer(needed="y", plain=Inner(width=4), inner=OtherInner())
    assert diff(first, second) == {
        "needed": ("x", "y"),
        "inner.type": ("Inner", "other-inner"),
        "inner.width": (3, None),
        "inner.rates": ([0.1, 1.0], None),
        "plain.width": (3, 4),
    }
