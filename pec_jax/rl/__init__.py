"""The RL method: policy, rollout, score, objectives, constraints, update."""
