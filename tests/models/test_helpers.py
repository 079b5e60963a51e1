import threading

import pytest

from pipeinfer_dask.models.helpers import Helpers


def test_results_come_in_the_order_of_the_functions_whoever_is_first() -> None:
    helpers, last_done = Helpers(3), threading.Event()

    def last() -> int:
        last_done.set()
        return threading.get_ident()

    def other() -> int:
        assert last_done.wait(10)
        return threading.get_ident()

    *others, mine = helpers.call([other, other, last])
    assert mine == threading.get_ident()
    assert mine not in others
    assert helpers.call([lambda: "a", lambda: "b", lambda: "c"]) == ["a", "b", "c"]


@pytest.mark.parametrize("place", [0, 1])
def test_what_a_function_raises_is_raised_and_the_next_call_is_as_ever(place: int) -> None:
    helpers = Helpers(2)
    functions = [lambda: 1, lambda: 2]
    functions[place] = lambda: 1 // 0
    with pytest.raises(ZeroDivisionError):
        helpers.call(functions)
    assert helpers.call([lambda: 3, lambda: 4]) == [3, 4]


def test_one_thread_has_no_helpers() -> None:
    before = threading.active_count()
    assert Helpers(1).call([lambda: threading.get_ident()]) == [threading.get_ident()]
    assert threading.active_count() == before
