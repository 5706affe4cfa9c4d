from __future__ import annotations

import pytest

from amago_nets import registry
from amago_nets.registry import lookup, name_of, names, register


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", {})


def test_register_and_look_up() -> None:
    @register("b", kind="toy")
    class First:
        pass

    @register("a")
    class Second:
        registry_kind = "toy"

    assert lookup("toy", "b") is First
    assert lookup("toy", "a") is Second
    assert names("toy") == ("a", "b")
    assert name_of(Second) == ("toy", "a")


def test_duplicate_names_are_refused() -> None:
    @register("a", kind="toy")
    class First:
        pass

    class Second:
        pass

    with pytest.raises(ValueError, match="name='a'.*First"):
        register("a", kind="toy")(Second)
    register("a", kind="other")(Second)
    assert lookup("toy", "a") is First


def test_same_class_may_register_twice() -> None:
    for _ in range(2):

        @register("a", kind="toy")
        class Reloaded:
            pass

    assert lookup("toy", "a") is Reloaded


def test_unknown_names() -> None:
    @register("a", kind="toy")
    class First:
        pass

    with pytest.raises(ValueError, match=r"name='z' is not a registered toy.*\['a'\]"):
        lookup("toy", "z")
    with pytest.raises(ValueError, match="kind='nothing'.*'traj_encoder'"):
        lookup("nothing", "a")
    with pytest.raises(ValueError, match="cls=int is not registered"):
        name_of(int)
    with pytest.raises(ValueError, match="kind=None"):
        register("a")(int)
