"""Run by test_extending.py in a process of its own: the definitions it makes stay there.

Loads the files of docs/extending.md, checks each against an independent computation, and trains one
iteration with all of them. Prints the metrics as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from pec_jax.config.registry import CONSTRAINTS, ENCODERS, OBJECTIVES
from pec_jax.config.schema import from_config_dict, to_dict
from pec_jax.config.user_file import import_plugins
from pec_jax.evaluation.labels import label_of
from pec_jax.rl.signals import Signals, whole_groups
from pec_jax.rl.train_step import train_step
from pec_jax.training.build import build


def torch_judge(directory: Path) -> torch.nn.Module:
    """A random judge, saved as torch saves it."""

    class Judge(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.head = torch.nn.Linear(8, 1)

        def forward(self, images):
            return self.head(torch.relu(self.conv(images)).mean((2, 3)))[:, 0]

    torch.manual_seed(0)
    judge = Judge()
    directory.mkdir()
    save_file(judge.state_dict(), directory / "model.safetensors")
    return judge


def check_judge(experiment, judge) -> None:
    """The score is torch's, over the temperature."""
    levels = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64, 3))
    images = (levels / 255).astype(np.float32)
    reward = experiment.rewards.rewards["judge"]
    found = reward.score(experiment.frozen.networks[reward.network], jnp.asarray(images), {})
    with torch.no_grad():
        expected = judge(torch.tensor(images).reshape(-1, 64, 64, 3).movedim(-1, 1)) / 2.0
    # fp32 sums over 256 places in another order.
    np.testing.assert_allclose(found, expected.reshape(2, 3), rtol=1e-5, atol=1e-6)


def check_palette() -> None:
    """The features are NumPy's histogram."""
    definition = ENCODERS["palette"]
    encoder = definition.make(definition.options(bins=4), None)
    image = np.random.default_rng(1).uniform(size=(16, 16, 3)).astype(np.float32)
    found = encoder.image_features({}, jnp.asarray(image)[None])[0]
    counts = [np.histogram(image[..., c], bins=4, range=(0, 1))[0] for c in range(3)]
    np.testing.assert_allclose(found, np.concatenate(counts) / 256, atol=1e-7)
    assert encoder.dim == len(found)


def check_capped() -> None:
    """Nobody is paid more than the cap, and the others what they are above their group's mean."""
    definition = CONSTRAINTS["capped"]
    surprisal = jnp.array([[0.0, 0.3, 3.0], [1.0, 1.0, 1.0]])
    groups = whole_groups(jnp.zeros((2, 3)), surprisal, None)
    signals = Signals(jnp.zeros((2, 3)), surprisal, groups)
    state = {"weight": jnp.float32(2.0)}
    found = definition.bonus(definition.options(weight=2.0, cap=0.5), state, signals)
    np.testing.assert_allclose(found, [[-2.2, -1.6, 1.0], [0.0, 0.0, 0.0]], atol=1e-6)


def check_truncated() -> None:
    """The gradient is that of -A min(w, rho) logp with the weight held still."""
    definition = OBJECTIVES["truncated"]
    objective = definition.make(definition.options(rho=1.5))
    advantages, logp = jnp.array([[1.0, -2.0]]), jnp.array([[0.7, -0.3]])

    def loss(logp):
        ratio = jax.lax.stop_gradient(jnp.exp(logp))
        signals = Signals(advantages, advantages, None, logp=logp, ratio=ratio)
        return jnp.sum(objective.losses(None, signals._replace(advantages=advantages), None)[0])

    expected = [[-1.0 * 1.5, 2.0 * np.exp(-0.3)]]  # e^.7 = 2.01 is above rho
    np.testing.assert_allclose(jax.grad(loss)(logp), expected, rtol=1e-6)


def main() -> None:
    directory = Path(sys.argv[1])
    import_plugins([str(path) for path in sorted(directory.glob("*.py"))])  # as --plugin does
    judge = torch_judge(directory / "my_judge")
    check_palette()
    check_capped()
    check_truncated()
    from tests.conftest import small_config_dict

    config = small_config_dict()
    judge_options = {"weight": 0.5, "model": str(directory / "my_judge"), "temperature": 2.0}
    config.rewards.judge.update(judge_options)
    config.perception.encoder = "dino + 0.5 * palette"
    config.constraints.capped.weight = 0.1
    config.objective.name = "truncated"
    config.objective.truncated.rho = 2.0
    config.updates.minibatches = 2
    config = from_config_dict(config)
    experiment = build(config)
    check_judge(experiment, judge)
    program, frozen = experiment.program, experiment.frozen
    batch = experiment.tables["train"].gather(np.arange(2))
    step = jax.jit(lambda *arguments: train_step(program, *arguments))
    _, metrics = step(program.initial_state(experiment.params), frozen, batch, jax.random.key(0))
    values = {name: float(value) for name, value in metrics.items()}
    print(json.dumps({"metrics": values, "label": label_of(to_dict(config))}))


if __name__ == "__main__":
    main()
