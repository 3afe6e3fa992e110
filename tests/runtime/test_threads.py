"""Torch's threads for one calling thread, and the choice between one and all. No test asserts how
long something takes: timings are given to the records by hand.
"""

from threading import Thread

import pytest
import torch

import offramp as off
from offramp.errors import BadData
from offramp.runtime import threads as module
from offramp.runtime.threads import MeasuredThreads, can_set, on_threads
from small import ladder_of, rows_of

pytestmark = pytest.mark.skipif(not can_set(), reason="torch was built without OpenMP")


@pytest.fixture
def three():
    """Three threads in this thread; others keep one, and so does every later test."""
    with on_threads(3):
        yield


def in_new_thread(function):
    found = []
    thread = Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_the_number_holds_inside_and_not_afterwards(three):
    with on_threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 3


def test_the_number_comes_back_after_an_error(three):
    with pytest.raises(ValueError, match="stop"), on_threads(2):
        raise ValueError("stop")
    assert torch.get_num_threads() == 3


def test_other_threads_keep_their_number_and_new_ones_get_the_usual_one(three):
    usual = in_new_thread(torch.get_num_threads)
    with on_threads(5):
        assert in_new_thread(torch.get_num_threads) == usual
    assert torch.get_num_threads() == 3
    # torch.set_num_threads would have changed it for threads that start meanwhile:
    assert usual == 1


def test_a_thread_that_never_computed_gets_its_number_back():
    def there_and_back():
        with on_threads(4):
            inside = torch.get_num_threads()
        return inside, torch.get_num_threads()

    assert in_new_thread(there_and_back) == (4, 1)


def test_where_torch_has_no_openmp_nothing_is_set(three, monkeypatch):
    monkeypatch.setattr(module, "_libraries", lambda: None)
    assert not can_set()
    with on_threads(2):
        assert torch.get_num_threads() == 3
    choose = MeasuredThreads()
    assert choose("stem", 4, torch.get_num_threads) == 3
    assert "none yet" in str(choose)


def played(seconds, batches, *, share=1.0, record=None):
    """The numbers of threads of some batches, where a row takes seconds[number]."""
    record = record or module._Record(4)
    numbers = []
    for _ in range(batches):
        number = record.next()
        record.add(number, seconds[number], share)
        numbers.append(number)
    return numbers, record


def test_one_thread_comes_first_and_all_are_tried_soon():
    numbers, record = played({1: 4.0, 4: 1.0}, 10)
    assert numbers == [1, 1, 1, 4, 4, 4, 4, 4, 4, 4]
    assert record.chosen == 4


def test_slower_threads_are_left_after_the_first_timing_that_counts():
    numbers, record = played({1: 1.0, 4: 3.0}, 200)
    assert record.chosen == 1
    # A trial is a batch that prepares kernels and a batch that is timed.
    trials = [index for index, number in enumerate(numbers) if number == 4]
    assert trials == [3, 4, 37, 38, 103, 104]


def test_trials_become_rarer():
    numbers, record = played({1: 1.0, 4: 3.0}, 6000)
    assert record.wait == module.LATEST
    assert numbers.count(4) <= 2 * 12


def test_without_a_core_of_its_own_all_threads_are_not_tried():
    numbers, record = played({1: 1.0, 4: 0.1}, 300, share=0.5)
    assert set(numbers) == {1}
    # The machine is idle again.
    numbers, record = played({1: 1.0, 4: 0.1}, 20, record=record)
    assert record.chosen == 4


def test_a_machine_that_gets_busy_changes_the_choice():
    _, record = played({1: 4.0, 4: 1.0}, 60)
    assert record.chosen == 4
    _, record = played({1: 8.0, 4: 50.0}, 60, record=record)
    assert record.chosen == 1


def test_the_first_batch_on_a_number_does_not_count():
    record = module._Record(4)
    record.add(record.next(), 100.0, 1.0)
    assert not record.times[1]
    record.add(record.next(), 1.0, 1.0)
    assert list(record.times[1]) == [1.0]


def test_a_batch_without_trial_runs_on_all_threads_until_one_is_known_to_be_faster():
    record = module._Record(4)
    assert record.known() == 4
    _, record = played({1: 1.0, 4: 3.0}, 20, record=record)
    assert record.known() == 1


def test_stages_and_sizes_are_chosen_for_apart_and_printed(three):
    choose = MeasuredThreads()
    for _ in range(12):
        assert choose("stem", 1, lambda: "one") == "one"
    choose("head", 40, lambda: "many")
    assert "head at 32 to 63 rows 1 of 3" in str(choose)
    assert "stem at 1 rows" in str(choose)
    assert torch.get_num_threads() == 3


def test_a_stage_that_fails_leaves_no_timing_and_restores_the_number(three):
    choose = MeasuredThreads()

    def fail():
        raise BadData("no")

    with pytest.raises(BadData, match="no"):
        choose("stem", 1, fail)
    (record,) = choose._records.values()
    assert not record.warm
    assert torch.get_num_threads() == 3


def test_one_thread_is_left_alone():
    choose = MeasuredThreads()
    assert choose("stem", 1, torch.get_num_threads) == 1
    assert not choose._records


def test_a_runner_answers_the_same_with_every_number_and_prints_its_choice(three):
    net = ladder_of(3)
    x = rows_of(9)
    plan = off.Plan.by_hand(dict.fromkeys(net.topology.gates, 0.2))
    runner = off.open(net, plan)
    fixed = off.open(net, plan, engine="torch:threads=1")
    wanted = fixed(x)
    for _ in range(40):
        answers = runner(x)
        assert torch.equal(answers.exit, wanted.exit)
        torch.testing.assert_close(answers.logits, wanted.logits)
    assert "threads as measured on the batches (" in repr(runner)
    assert "threads as measured" not in repr(fixed)
    assert torch.get_num_threads() == 3


def test_concurrent_callers_keep_their_own_numbers(three):
    net = ladder_of(3)
    x = rows_of(9)
    runner = off.open(net, off.Plan.by_hand(dict.fromkeys(net.topology.gates, 0.2)))
    wanted = runner(x).exit
    numbers = []

    def call(count):
        with on_threads(count):
            for _ in range(50):
                if not torch.equal(runner(x).exit, wanted):
                    return
                numbers.append((count, torch.get_num_threads()))

    callers = [Thread(target=call, args=(count,)) for count in (1, 2, 3, 4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(numbers) == 200
    assert all(asked == found for asked, found in numbers)
    assert torch.get_num_threads() == 3


def test_a_deadline_tries_nothing(three, monkeypatch):
    net = ladder_of(2)
    x = rows_of(4)
    runner = off.open(net, off.Plan.never_leave(net.topology), timing_rows=x)
    seen = []
    monkeypatch.setattr(
        module._Record, "next", lambda self: seen.append("trial") or self.chosen, raising=True
    )
    runner(x, deadline_ms=1e6)
    assert not seen
    runner(x)
    assert seen
