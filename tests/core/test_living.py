"""Finding objects by their class while other threads run."""

from __future__ import annotations

import threading
from collections import OrderedDict

from jdcore._living import instances, living


class _Thing(OrderedDict[int, int]):
    pass


def test_objects_of_a_class_and_of_those_derived_from_it_are_found() -> None:
    things = [_Thing({1: 2}) for _ in range(3)]
    assert {id(thing) for thing in living(_Thing)} == set(map(id, things))
    assert set(map(id, things)) < {id(thing) for thing in living(OrderedDict)}


def test_objects_of_a_class_in_python_are_found_by_what_refers_to_it() -> None:
    class Base:
        pass

    class One(Base):
        pass

    class Other(Base):
        __slots__ = ("value",)

    class Both(One, Other):
        pass

    things = [Base(), One(), Both(), Other()]
    assert {id(thing) for thing in instances(Base)} == set(map(id, things))
    assert set(map(id, instances(Other))) == set(map(id, things[2:]))
    assert not instances(type("Unused", (Base,), {}))


def test_tuples_that_other_threads_have_not_finished_are_left_alone() -> None:
    done, errors = threading.Event(), []

    def make_tuples() -> None:
        while not done.is_set():
            try:
                tuple(i for i in range(12))
            except SystemError as error:
                errors.append(error)

    thread = threading.Thread(target=make_tuples)
    thread.start()
    for _ in range(5):
        living(OrderedDict)
    done.set()
    thread.join()
    assert not errors
