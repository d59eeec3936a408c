"""Which lanes share a UNet call, by hand."""

from hrf_fast.training.calls import together


def test_lanes_join_when_the_step_reaches_their_start():
    # T 4: lane 0 from step 1, lane 1 from step 3
    calls = list(together([1, 3], [2, 2], 4, max_batch=4))
    assert calls == [(1, [0]), (2, [0]), (3, [0, 1])]


def test_a_call_holds_at_most_max_batch_images_and_whole_lanes():
    # 3 + 3 fit into 6, the third does not; a lane of 9 is alone
    assert list(together([0, 0, 0], [3, 3, 3], 1, max_batch=6)) == [(0, [0, 1]), (0, [2])]
    assert list(together([0, 0], [9, 1], 1, max_batch=6)) == [(0, [0]), (0, [1])]


def test_lanes_beyond_their_window_share_no_call_with_lanes_inside():
    # lane 0 ends its window at 1, lane 1 at 2
    calls = list(together([0, 0], [1, 1], 3, max_batch=2, stops=[1, 2]))
    assert calls == [(0, [0, 1]), (1, [1]), (1, [0]), (2, [0, 1])]


def test_every_lane_runs_every_step_from_its_start_once():
    starts, sizes = [5, 0, 3, 3, 9], [5, 2, 4, 1, 3]
    calls = list(together(starts, sizes, 10, max_batch=7, stops=[9, 8, 9, 6, 10]))
    for lane, start in enumerate(starts):
        assert [step for step, lanes in calls if lane in lanes] == list(range(start, 10))
