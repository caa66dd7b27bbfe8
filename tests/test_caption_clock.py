"""What the log's `reward_time` counts."""

import torch

import Caption
from models.caption import SelfCritical


def test_the_rewards_share_of_time_leaves_out_what_is_no_training(monkeypatch):
    """DDP's rehearsal of the first step, validations, and what comes before the first step."""
    objective = SelfCritical(lambda sequences, references: torch.zeros(len(sequences)))
    now, clock = [100.0], Caption.RewardClock(objective)
    monkeypatch.setattr(Caption.time, "perf_counter", lambda: now[0])

    def spend(seconds, of_reward):
        now[0] += seconds
        objective.reward_seconds += of_reward

    for _ in range(2):
        spend(50, of_reward=40)  # the rehearsal, or a validation
        clock.start()
        spend(4, of_reward=1)
        clock.start()
        spend(4, of_reward=1)
        assert clock.share() == {"reward_time": 0.25}
        spend(2, of_reward=1)  # with no step between: data are waited for
        clock.start()
        assert clock.share() == {"reward_time": 0.5}
        clock.stop()
